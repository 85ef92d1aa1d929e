"""The batches of an epoch, read ahead by Grain, in other processes if asked for."""

import dataclasses
from collections.abc import Generator

import numpy as np

from experiments.config import SettingsError
from experiments.data.records import Records, Split


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Batches by their number, as Grain wants them.

    Args:
        records: what they are made of.
        chosen: the indices of each batch, of shape [batches, images].
    """

    records: Records
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Split:
        return self.records.at(self.chosen[index])


def batches(
    records: Records,
    order: np.ndarray,
    *,
    batch_size: int,
    start: int = 0,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Generator[Split, None, None]:
    """The whole batches of an epoch in order, the same with any number of workers.

    Batch i holds the records `order[i * batch_size : (i + 1) * batch_size]`. Where several processes train
    together, each reads its own part of every batch, in one piece. Workers take seconds to start: an order of
    several epochs, each cut to whole batches, starts them once.

    Args:
        records: what to read; each worker process gets a copy, so leave those in memory to no worker.
        order: indices of records, in the order in which to read them.
        batch_size: images of a batch, of all training processes together.
        start: the first batch to read.
        workers: processes that read ahead; with 0 this one reads each batch when it is asked for.
        process: which of the training processes this is.
        processes: how many training processes there are.

    Returns:
        The batches. Closing or dropping the generator ends the workers.

    Raises:
        SettingsError: if the training processes cannot share a batch equally.
    """
    if batch_size % processes:
        raise SettingsError(
            f"--batch-size: {batch_size} images cannot be shared equally by {processes} processes."
        )
    whole = len(order) // batch_size
    shared = order[: whole * batch_size].reshape(whole, processes, batch_size // processes)
    return _read(_Batches(records, shared[start:, process]), workers)


def _read(source: _Batches, workers: int) -> Generator[Split, None, None]:
    """Batches one after another."""
    if not len(source):
        return
    import grain

    # Threads would only vie with each other: it is decoding that takes time, not the disk.
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(source).to_iter_dataset(reading)
    workers = min(workers, len(source))
    if workers:
        _mark_flags_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    iterator = iter(dataset)
    try:
        for batch in iterator:
            # Arrays of their own, not in the memory shared with a worker that may end before them.
            yield Split(*(np.array(array) for array in batch)) if workers else batch
    finally:
        iterator.close()


def _mark_flags_as_parsed() -> None:
    """Let Grain start workers: it asks for flags of Abseil, which only Abseil's own command lines parse."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
