"""The devices: one mesh over all of them, the processes that share it, and being asked to stop."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.config import Execution, SettingsError

_AXIS = "data"


def connect(execution: Execution) -> None:
    """Join the processes that train together; before anything else is done with JAX.

    Raises:
        SettingsError: if the options do not go together, or the other processes are not to be found.
    """
    given = (execution.processes, execution.process)
    if execution.coordinator is None or execution.coordinator == "auto":
        if given != (None, None):
            raise SettingsError("--processes and --process: only with --coordinator HOST:PORT.")
        if execution.coordinator is None:
            return
        arguments = {}
    else:
        if None in given:
            raise SettingsError("--coordinator HOST:PORT: give --processes and --process as well.")
        arguments = {
            "coordinator_address": execution.coordinator,
            "num_processes": execution.processes,
            "process_id": execution.process,
        }
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise SettingsError(f"--coordinator: cannot join the other processes: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(value: bool) -> bool:
    """What the first process says."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


class Layout:
    """Where arrays lie: whole on every device, or a share of the batch on each."""

    def __init__(self):
        mesh = jax.make_mesh((jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec(_AXIS))

    def everywhere(self, tree: Any) -> Any:
        """The arrays of a tree, a copy on every device."""
        return jax.device_put(tree, self.whole)

    def batch(self, tree: Any) -> Any:
        """Arrays of which this process holds its share of the first axis, spread over the devices."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.split, x), tree)

    def spread(self, tree: Any) -> Any:
        """Inside jit: the arrays of a tree, their first axis spread over the devices."""
        return jax.lax.with_sharding_constraint(tree, self.split)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """While it is open, SIGTERM and Ctrl-C only ask for a stop; a second Ctrl-C interrupts at once.

    Gives the question for the number of the signal that has asked, which is 0 if none has. Where several
    processes train together, each has to put it as often as the others, and all get the same answer.
    """
    asked = 0
    if jax.process_count() > 1:
        questions = itertools.count()

        def is_asked() -> int:
            nonlocal asked
            # JAX catches the signal in each process and chooses a question that all have yet to put.
            if multihost_utils.reached_preemption_sync_point(next(questions)):
                asked = signal.SIGTERM
            return asked

        yield is_asked
        return
    if threading.current_thread() is not threading.main_thread():  # Which alone may handle signals.
        yield lambda: asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        asked = number
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        for number in before:
            signal.signal(number, ask)
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
