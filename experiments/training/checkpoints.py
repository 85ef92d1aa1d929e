"""The state of a run on disk, from which it goes on."""

import shutil
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.data import devices

_SECONDS = 60.0


class Checkpoints:
    """The last state of a run, and those that are to be kept; each written whole or not at all.

    Args:
        folder: where they lie.
        keep_every: steps between those that are kept; none but the last by default.
    """

    def __init__(self, folder: Path, keep_every: int | None = None):
        self.folder, self.keep_every = folder.absolute(), keep_every
        self._saved_at = time.monotonic()

    def _manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, keep_period=self.keep_every, enable_async_checkpointing=False
            ),
        )

    def is_due(self, step: int, *, epoch_ends: bool) -> bool:
        """Whether to save after some steps: when a minute has passed, or for keeping.

        Several processes save at the ends of epochs only, where they can agree on the time.
        """
        if epoch_ends and self.keep_every is not None and step % self.keep_every == 0:
            return True
        late = time.monotonic() - self._saved_at > _SECONDS
        if jax.process_count() > 1:
            return epoch_ends and devices.agreed(late)
        return late

    def save(self, step: int, tree: Any) -> None:
        """Write a tree of arrays, known by the number of steps taken."""
        with self._manager() as manager:
            manager.save(step, args=ocp.args.StandardSave(tree))
        self._saved_at = time.monotonic()

    def restore(self, like: Any) -> Any | None:
        """The last tree that was saved, laid out as another is; None if none was."""
        if not self.folder.is_dir():
            return None
        with self._manager() as manager:
            if manager.latest_step() is None:
                return None
            return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))


def remove(folder: Path) -> None:
    """Remove the checkpoints in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
