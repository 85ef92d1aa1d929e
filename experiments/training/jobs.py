"""Several runs in a row: what is finished is left, what is unfinished goes on, what fails is told."""

import contextlib
import gc
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from experiments.config import (
    CompareSettings,
    Execution,
    Settings,
    SettingsError,
    StoppedError,
    TrainSettings,
)
from experiments.data import devices, image_sets
from experiments.reporting import run_folder
from experiments.reporting.run_folder import RESULTS
from experiments.training import checkpoints
from experiments.training.run import Progress as Told
from experiments.training.run import Trainer


class Job(NamedTuple):
    """One run.

    Args:
        settings: of the run.
        folder: where it goes.
        start: the folder of the float run whose weights it begins at, if any.
        judged_on: the images that its result is of. Only a run judged on the test images is packed.
    """

    settings: TrainSettings
    folder: Path
    start: Path | None = None
    judged_on: Literal["test", "validation"] = "test"


class Failure(NamedTuple):
    """A run that did not finish, and why."""

    job: Job
    error: Exception

    def __str__(self) -> str:
        return f"{title(self.job.settings)}: {type(self.error).__name__}: {self.error}"


def title(settings: TrainSettings) -> str:
    """A run in a few words."""
    return f"{settings.model} on {settings.dataset}, {settings.method}, seed {settings.seed}"


def dataset_of(settings: Settings, execution: Execution) -> image_sets.Dataset:
    """The image set of a run."""
    return image_sets.loaded(settings.dataset, execution.data_dir, streamed=execution.loader == "stream")


def trainer(settings: TrainSettings, execution: Execution) -> Trainer:
    """A trainer for a run and all that differ from it by their seed alone.

    Raises:
        SettingsError: if the settings do not go together.
    """
    if execution.workers and execution.loader != "stream":
        raise SettingsError("--workers: only with --loader stream.")
    if execution.steps_per_call and execution.loader == "stream":
        raise SettingsError("--steps-per-call: only with --loader memory.")
    return Trainer(settings, dataset_of(settings, execution), execution)


def check(settings: CompareSettings, execution: Execution) -> None:
    """Find what is wrong with the settings of a comparison.

    Raises:
        SettingsError: if the settings do not go together.
    """
    methods = settings.chosen()
    for method in methods:
        # The others have what the first has.
        if method == methods[0] or getattr(settings.overrides, method).as_dict():
            trainer(settings.run(method, 0), execution)


def with_warm_start(job: Job, start: TrainSettings | None, folder: Path) -> Sequence[Job]:
    """A job behind that of the float run which it begins at, if it does.

    Args:
        job: the run.
        start: settings of the float run; None if it begins at random weights.
        folder: where the float run goes.
    """
    return (
        [job] if start is None else [job._replace(settings=start, folder=folder), job._replace(start=folder)]
    )


def run(
    jobs: Sequence[Job],
    execution: Execution,
    folder: Path,
    console: Console,
    finished: Callable[[Job], Any],
) -> list[Failure]:
    """Train what is not finished yet, one after the other; what another process trains is left to it.

    Args:
        jobs: the runs, each begun by `begin`.
        execution: how they are carried out.
        folder: of all of them, with which a stopped command goes on.
        console: told of every finished run.
        finished: called after each that was trained.

    Returns:
        The runs that failed.

    Raises:
        StoppedError: if the process was asked to stop.
    """
    failures = []
    current: tuple[TrainSettings, Trainer] | None = None
    with (
        devices.stop_requests() as stop_requested,
        # Eighty columns hold it: what a terminal has at least.
        Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
        ) as progress,
    ):
        total = progress.add_task("runs", total=len(jobs), note="", visible=len(jobs) > 1)
        elsewhere: set[Path] = set()
        missing = [job for job in jobs if not _exists(job.folder / RESULTS)]
        progress.update(total, completed=len(jobs) - len(missing))
        for done, job in enumerate(missing, len(jobs) - len(missing)):
            with _claimed(job.folder) as is_ours:
                if not is_ours or job.start in elsewhere:
                    elsewhere.add(job.folder)
                elif not _exists(job.folder / RESULTS):
                    if number := stop_requested():
                        raise StoppedError(f"stopped after {done} of {len(jobs)} runs", number, folder)
                    shared = job.settings.without_seed()
                    try:
                        if current is None or current[0] != shared:
                            current = None
                            gc.collect()  # A trainer holds functions that hold it: this frees the devices.
                            current = shared, trainer(job.settings, execution)
                        _run(job, current[1], progress, stop_requested)
                    except StoppedError as stopped:
                        raise StoppedError(stopped.message, stopped.number, folder) from stopped
                    except KeyboardInterrupt as error:  # The second: nothing of this run is saved any more.
                        raise StoppedError("interrupted", signal.SIGINT, folder) from error
                    except Exception as error:
                        if jax.process_count() > 1:
                            raise  # The others may be waiting for this process.
                        traceback.clear_frames(error.__traceback__)  # They hold arrays on the devices.
                        failures.append(Failure(job, error))
                        (job.folder / run_folder.ERROR).write_text(f"{type(error).__name__}: {error}\n")
                    finished(job)
            progress.advance(total)
    if elsewhere:
        console.print(f"left to other processes: {len(elsewhere)} of {len(jobs)} runs", highlight=False)
    return failures


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether a run is this command's, and not under way in another on the same folder; held meanwhile."""
    lock = filelock.FileLock(folder / run_folder.LOCK)
    ours = True
    if devices.is_first():
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            ours = False
    try:
        yield devices.agreed(ours)
    finally:
        lock.release()
        if (folder / RESULTS).is_file():  # Nobody needs to ask again.
            (folder / run_folder.LOCK).unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    """Whether there is a file, as the first process sees it."""
    return devices.agreed(path.is_file())


def _run(job: Job, trainer: Trainer, progress: Progress, stop_requested: Callable[[], int]) -> None:
    """Train once, with a bar."""
    settings = job.settings
    start = None
    if job.start is not None:
        start = job.start / run_folder.RELAXED
        if not _exists(start) or not _exists(job.start / RESULTS):
            raise RuntimeError("the float run that it begins at did not finish.")
    progress.console.print(title(settings), highlight=False)
    if not (job.folder / run_folder.CHECKPOINTS).is_dir() and (job.folder / run_folder.METRICS).is_file():
        progress.console.print("no checkpoint yet: starting over", highlight=False)
    task = progress.add_task("compiling", total=trainer.steps, note="")
    begun_at: list[int] = []

    def step_taken(step: int) -> None:
        progress.update(task, completed=step)
        if begun_at:  # The first call comes before the first step, which is compiled then.
            epoch = min(step // trainer.steps_per_epoch + 1, settings.epochs)
            progress.update(task, description=f"epoch {epoch}/{settings.epochs}")
        begun_at.append(step)

    told = Told(step_taken, lambda row: progress.update(task, note=_note(row)))
    try:
        carry_out = trainer.run if job.judged_on == "test" else trainer.rehearse
        row = carry_out(settings.seed, job.folder, told, start=start, stop_requested=stop_requested)
    finally:
        progress.remove_task(task)
    if devices.is_first():
        (job.folder / run_folder.ERROR).unlink(missing_ok=True)
        run_folder.write_text(job.folder / RESULTS, run_folder.as_csv([row]))
        if trainer.execution.checkpoint_every is None:
            checkpoints.remove(job.folder / run_folder.CHECKPOINTS)  # They only served to go on.
    devices.wait(str(job.folder / RESULTS))
    progress.console.print(f"{_note(row)} after {row['seconds']:,.0f} s", highlight=False)


def _note(row: Mapping[str, Any]) -> str:
    """The accuracy of the network that a run is for, in words."""
    name, kind = ("relaxed", "float") if row["hard_accuracy"] is None else ("hard", "quantized")
    return f"{kind} {row[f'{name}_accuracy']:.1%}"
