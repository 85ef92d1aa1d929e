"""The batches of an epoch: what is in them, and the processes that read them."""

import dataclasses
import multiprocessing
import os

import numpy as np
import pytest

from experiments.config import SettingsError
from experiments.data.batches import batches as batches_of
from experiments.data.records import Records, Split
from tests.helpers import slow

COUNT, BATCH = 50, 8


def images(count: int) -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 4, 4, 3), np.uint8), np.arange(count, dtype=np.int32))


RECORDS, ORDER = images(COUNT), np.random.default_rng(1).permutation(COUNT)


@dataclasses.dataclass(frozen=True)
class Telling:
    """Records whose labels tell which process read them."""

    records: Records

    @property
    def size(self) -> int:
        return self.records.size

    def at(self, indices: np.ndarray) -> Split:
        return self.records.at(indices)._replace(labels=np.full(len(indices), os.getpid(), np.int32))


@dataclasses.dataclass(frozen=True)
class Failing:
    """Records that cannot be read."""

    size: int = COUNT

    def at(self, indices: np.ndarray) -> Split:
        raise OSError(f"no record {indices[0]}")


def same(read: Split, expected: Split) -> bool:
    np.testing.assert_array_equal(read.images, expected.images)
    np.testing.assert_array_equal(read.labels, expected.labels)
    return read.images.dtype == expected.images.dtype and read.labels.dtype == expected.labels.dtype


@pytest.mark.parametrize("workers", [0, *slow([1, 2])])
def test_a_batch_holds_the_records_of_its_place_in_the_order(workers):
    read = list(batches_of(RECORDS, ORDER, batch_size=BATCH, workers=workers))
    assert len(read) == COUNT // BATCH, "whole batches only"
    for i, batch in enumerate(read):
        assert same(batch, RECORDS.at(ORDER[i * BATCH : (i + 1) * BATCH]))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (5, 0), *slow([(4, 2)])])
def test_reading_may_start_at_any_batch(start, workers):
    whole = list(batches_of(RECORDS, ORDER, batch_size=BATCH))
    read = list(batches_of(RECORDS, ORDER, batch_size=BATCH, start=start, workers=workers))
    assert len(read) == len(whole) - start
    assert all(same(*pair) for pair in zip(read, whole[start:], strict=True))


@pytest.mark.parametrize(("count", "start"), [(COUNT, 6), (COUNT, 9), (BATCH - 1, 0), (0, 0)])
def test_there_may_be_no_batch_left(count, start):
    assert not list(batches_of(RECORDS, ORDER[:count], batch_size=BATCH, start=start, workers=2))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_training_processes_share_each_batch_in_order(processes):
    whole = list(batches_of(RECORDS, ORDER, batch_size=BATCH, start=1))
    shares = [
        list(batches_of(RECORDS, ORDER, batch_size=BATCH, start=1, process=p, processes=processes))
        for p in range(processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part.labels) for part in parts} == {BATCH // processes}
        assert same(Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))), batch)


def test_a_batch_that_cannot_be_shared_is_refused_at_once():
    with pytest.raises(SettingsError, match="--batch-size: 8 images cannot be shared equally by 3 processes"):
        batches_of(RECORDS, ORDER, batch_size=BATCH, processes=3)


def test_each_worker_reads_its_share_and_ends_when_the_batches_are_closed():
    long = np.tile(ORDER, 20)  # So that no worker is done before the batches are closed.
    batches = batches_of(Telling(RECORDS), long, batch_size=BATCH, workers=2)
    readers = {int(next(batches).labels[0]) for _ in range(4)}
    assert len(readers) == 2
    assert readers <= {child.pid for child in multiprocessing.active_children()}
    batches.close()
    assert not multiprocessing.active_children()


def test_workers_end_when_the_batches_are_dropped():
    batches = batches_of(RECORDS, np.tile(ORDER, 20), batch_size=BATCH, workers=1)
    kept = next(batches)
    assert multiprocessing.active_children()
    del batches
    assert not multiprocessing.active_children()
    assert same(kept, RECORDS.at(ORDER[:BATCH])), "a batch outlives the worker that read it"


def test_without_workers_this_process_reads():
    batches = batches_of(Telling(RECORDS), ORDER, batch_size=BATCH)
    assert all(np.all(batch.labels == os.getpid()) for batch in batches)


@pytest.mark.parametrize("workers", [0, *slow([1])])
def test_what_goes_wrong_in_reading_is_told(workers):
    with pytest.raises(OSError, match="no record 0"):
        list(batches_of(Failing(), np.arange(COUNT), batch_size=BATCH, workers=workers))
    assert not multiprocessing.active_children()
