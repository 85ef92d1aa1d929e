"""Several runs in a row: what is finished is left, what is unfinished goes on, what fails is told."""

import contextlib
import functools
import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import filelock
import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

from experiments import checkpoints, data, devices, runs, training
from experiments.config import (
    CompareSettings,
    DatasetName,
    Execution,
    SettingsError,
    StoppedError,
    TrainSettings,
)
from experiments.training import Trainer


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


class _Rate(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> str:
        speed = task.finished_speed or task.speed
        return "" if speed is None else f"{speed * task.fields['images']:,.0f} images/s"


def title(settings: TrainSettings) -> str:
    """A run in a few words."""
    return f"{settings.model} on {settings.dataset}, {settings.method}, seed {settings.seed}"


@functools.cache
def dataset(name: DatasetName, data_dir: Path | None, streamed: bool) -> data.Dataset:
    """An image set, loaded once."""
    # Where it has to be prepared first, one process does it.
    loaded = data.load(name, data_dir, streamed=streamed) if devices.is_first() else None
    devices.wait(f"{name} is there")
    return loaded or data.load(name, data_dir, streamed=streamed)


def trainer(settings: TrainSettings, execution: Execution) -> Trainer:
    """A trainer for a run and all that differ from it by their seed alone.

    Raises:
        SettingsError: if the settings do not go together.
    """
    if execution.workers and execution.loader != "stream":
        raise SettingsError("--workers: only with --loader stream.")
    if execution.steps_per_call and execution.loader == "stream":
        raise SettingsError("--steps-per-call: only with --loader memory.")
    images = dataset(settings.dataset, execution.data_dir, execution.loader == "stream")
    return Trainer(settings, images, execution)


def check(settings: CompareSettings, execution: Execution) -> None:
    """Find what is wrong with the settings of a comparison.

    Raises:
        SettingsError: if the settings do not go together.
    """
    methods = settings.chosen()
    settled = {method: settings.run(method, 0).settled() for method in methods}
    for method in methods:
        if method == methods[0] or method in settings.own:  # The others have what the first has.
            trainer(settled[method], execution)


def with_warm_start(job: Job, folder: Path) -> Sequence[Job]:
    """A job, its settings settled, behind that of the float run which it begins at, if it does.

    Args:
        job: the run; its settings are not settled yet.
        folder: where the float run goes.
    """
    start = job.settings.warm_start_run()
    job = job._replace(settings=job.settings.settled())
    return (
        [job] if start is None else [job._replace(settings=start, folder=folder), job._replace(start=folder)]
    )


def run(
    jobs: Sequence[Job], execution: Execution, console: Console, finished: Callable[[Job], Any]
) -> list[Failure]:
    """Train what is not finished yet, one after the other; what another process trains is left to it.

    Args:
        jobs: the runs, each begun by `runs.begin`.
        execution: how they are carried out.
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
        Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        ) as progress,
    ):
        total = progress.add_task("all", total=len(jobs), unit="runs", images=0, note="")
        progress.update(total, visible=len(jobs) > 1)
        elsewhere: set[Path] = set()
        missing = [job for job in jobs if not _exists(job.folder / runs.RESULT)]
        progress.update(total, completed=len(jobs) - len(missing))
        for done, job in enumerate(missing, len(jobs) - len(missing)):
            with _claimed(job.folder) as is_ours:
                if not is_ours or job.start in elsewhere:
                    elsewhere.add(job.folder)
                elif not _exists(job.folder / runs.RESULT):
                    if stop_requested():
                        raise StoppedError(f"stopped after {done} of {len(jobs)} runs")
                    shared = job.settings.without_seed()
                    try:
                        if current is None or current[0] != shared:
                            current = None
                            gc.collect()  # A trainer holds functions that hold it: this frees the devices.
                            current = shared, trainer(job.settings, execution)
                        _run(job, current[1], progress, stop_requested)
                    except StoppedError:
                        raise
                    except Exception as error:
                        if jax.process_count() > 1:
                            raise  # The others may be waiting for this process.
                        traceback.clear_frames(error.__traceback__)  # They hold arrays on the devices.
                        failures.append(Failure(job, error))
                        (job.folder / runs.ERROR).write_text(f"{type(error).__name__}: {error}\n")
                    finished(job)
            progress.advance(total)
    if elsewhere:
        console.print(f"left to other processes: {len(elsewhere)} of {len(jobs)} runs", highlight=False)
    return failures


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether a run is this command's, and not under way in another on the same folder; held meanwhile."""
    lock = filelock.FileLock(folder / runs.LOCK)
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
        if (folder / runs.RESULT).is_file():  # Nobody needs to ask again.
            (folder / runs.LOCK).unlink(missing_ok=True)


def _exists(path: Path) -> bool:
    """Whether there is a file, as the first process sees it."""
    return devices.agreed(path.is_file())


def _run(job: Job, trainer: Trainer, progress: Progress, stop_requested: Callable[[], bool]) -> None:
    """Train once, with a bar."""
    settings = job.settings
    start = None
    if job.start is not None:
        start = job.start / runs.RELAXED
        if not _exists(start) or not _exists(job.start / runs.RESULT):
            raise RuntimeError("the float run that it begins at did not finish.")
    task = progress.add_task(
        title(settings), total=trainer.steps, unit="steps", images=settings.batch_size, note="compiling"
    )
    note = lambda row: progress.update(task, note=_note(row))
    told = training.Progress(lambda step: progress.update(task, completed=step), note)
    try:
        carry_out = trainer.run if job.judged_on == "test" else trainer.rehearse
        row = carry_out(settings.seed, job.folder, told, start=start, stop_requested=stop_requested)
    finally:
        progress.remove_task(task)
    if devices.is_first():
        (job.folder / runs.ERROR).unlink(missing_ok=True)
        runs.write_json(job.folder / runs.RESULT, [row])
        if trainer.execution.checkpoint_every is None:
            checkpoints.remove(job.folder / runs.CHECKPOINTS)  # They only served to go on.
    devices.wait(str(job.folder / runs.RESULT))
    progress.console.print(f"{title(settings)}: {row['seconds']:,.0f} s", highlight=False)


def _note(metrics: Mapping[str, Any]) -> str:
    """What to say beside the bar of a run."""
    hard = metrics["hard_accuracy"]
    binary = "" if hard is None else f"  binary {hard:.1%}"
    return f"loss {metrics['loss']:.3f}  validation {metrics['relaxed_accuracy']:.1%}{binary}"
