"""The commands `train` and `compare`: runs side by side, their table and their picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.config import METHODS, CompareSettings, Execution, TrainSettings
from experiments.data import devices
from experiments.reporting import plots, results, run_folder, tables
from experiments.reporting.run_folder import CONFIG, CURVES, METRICS, RESULTS, Row
from experiments.training import jobs
from experiments.training.begin import begin
from experiments.training.jobs import Job


def train(
    settings: TrainSettings, execution: Execution, output: Path | None, console: Console, *, resume: bool
) -> list[Row]:
    """Train once; print the table; return the one row."""
    jobs.trainer(settings, execution)  # Finds what is wrong with the settings.
    folder = begin(output, f"train-{settings.dataset}", settings, resume=resume)
    planned = jobs.with_warm_start(Job(settings, folder), settings.float_start(), folder / "float")
    for job in planned[:-1]:
        begin(job.folder, "train", job.settings, resume=resume)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    for failure in jobs.run(planned, execution, folder, console, lambda job: None):
        raise failure.error
    rows: list[Row] = [*run_folder.read_csv(folder / RESULTS)]
    if devices.is_first():
        plots.curves(folder / CURVES, {settings.method: [run_folder.read_csv(folder / METRICS)]})
    _say(rows, folder, console)
    return rows


def compare(
    settings: CompareSettings, execution: Execution, output: Path | None, console: Console, *, resume: bool
) -> list[jobs.Failure]:
    """Train once per method and seed, print the table, and return the runs that failed.

    Raises:
        SettingsError: if the settings do not go together.
    """
    jobs.check(settings, execution)
    folder = begin(output, f"compare-{settings.dataset}", settings, resume=resume)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    planned = jobs_of(settings, folder, resume=resume)
    failures = jobs.run(planned, execution, folder, console, lambda job: gather(folder))
    rows = conclude(folder).rows
    for failure in failures:
        console.print(f"failed: {failure}", style="bold red", highlight=False, soft_wrap=True)
    if rows:
        _say(rows, folder, console)
        tables.print_noise(rows, jobs.dataset_of(settings, execution).test.size, console)
    return failures


def jobs_of(settings: CompareSettings, folder: Path, *, resume: bool) -> list[Job]:
    """The runs of a comparison, begun."""
    planned: dict[Path, Job] = {}
    for method in settings.chosen():
        for seed in range(settings.seeds):
            run = settings.run(method, seed)
            start = settings.run("float", seed) if run.float_start() else None
            job = Job(run, _place(folder, method, seed))
            for each in jobs.with_warm_start(job, start, _place(folder, "float", seed)):
                planned.setdefault(each.folder, each)
    for job in planned.values():
        begin(job.folder, "train", job.settings, resume=resume)
    # Float runs that others begin at come first, and all of one method follow each other.
    return sorted(planned.values(), key=lambda job: job.start is not None)


def _place(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method}-seed{seed}"


def conclude(folder: Path) -> results.Results:
    """Write the results of a comparison, and draw them."""
    gathered = gather(folder)
    if gathered.rows and devices.is_first():
        results.draw(folder, gathered)
    return gathered


def gather(folder: Path) -> results.Results:
    """Write the results of a comparison from the folders of its runs; return them."""
    config = run_folder.read_json(folder / CONFIG)
    runs = [(method, seed) for method in METHODS for seed in range(config["seeds"])]
    gathered = results.gather(
        config, [(_place(folder, method, seed), {"method": method, "seed": seed}) for method, seed in runs]
    )
    if gathered.rows and devices.is_first():
        results.write(folder, gathered)
    return gathered


def _say(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """Print the table, and where the files are."""
    tables.print_results(rows, console)
    console.print(f"Curves:  {folder / CURVES}", soft_wrap=True, highlight=False)
    console.print(f"Results: {folder / RESULTS}", soft_wrap=True, highlight=False)
