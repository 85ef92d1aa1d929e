"""The commands `train` and `compare`: runs side by side, their table and their picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from experiments import devices, grid, plots, runs
from experiments.config import (
    METHODS,
    CompareSettings,
    Execution,
    Method,
    TrainSettings,
)
from experiments.grid import Job

Row = Mapping[str, Any]


def train(
    settings: TrainSettings, execution: Execution, output: Path | None, console: Console, *, resume: bool
) -> list[Row]:
    """Train once; print the table; return the one row."""
    settled = settings.settled()
    grid.trainer(settled, execution)  # Finds what is wrong with the settings.
    folder = runs.begin(output, f"train-{settings.dataset}", settled, resume=resume)
    jobs = grid.with_warm_start(Job(settings, folder), folder / "float")
    for job in jobs[:-1]:
        runs.begin(job.folder, "train", job.settings, resume=resume)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    for failure in grid.run(jobs, execution, console, lambda job: None):
        raise failure.error
    rows = runs.read_json(folder / runs.RESULT)
    if devices.is_first():
        metrics = runs.read_metrics(folder / runs.METRICS)
        plots.curves(folder / runs.CURVES, {settings.method: [metrics]})
    _conclude(rows, folder, console)
    return rows


def compare(
    settings: CompareSettings, execution: Execution, output: Path | None, console: Console, *, resume: bool
) -> list[grid.Failure]:
    """Train once per method and seed, print the table, and return the runs that failed.

    Raises:
        SettingsError: if the settings do not go together.
    """
    grid.check(settings, execution)
    folder = runs.begin(output, f"compare-{settings.dataset}", settings, resume=resume)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    failures = grid.run(
        jobs_of(settings, folder, resume=resume), execution, console, lambda job: collect(folder)
    )
    rows = collect(folder)
    for failure in failures:
        console.print(f"failed: {failure}", style="bold red", highlight=False, soft_wrap=True)
    if rows:
        _conclude(rows, folder, console)
    return failures


def jobs_of(settings: CompareSettings, folder: Path, *, resume: bool) -> list[Job]:
    """The runs of a comparison, begun."""
    jobs: dict[Path, Job] = {}
    place = lambda run: folder / f"{run.method}-seed{run.seed}"
    for method in settings.chosen():
        for seed in range(settings.seeds):
            run = settings.run(method, seed)
            float_run = folder / f"float-seed{seed}"
            for job in grid.with_warm_start(Job(run, place(run)), float_run):
                jobs.setdefault(job.folder, job)
    for job in jobs.values():
        runs.begin(job.folder, "train", job.settings, resume=resume)
    # Float runs that others begin at come first, and all of one method follow each other.
    return sorted(jobs.values(), key=lambda job: job.start is not None)


def collect(folder: Path) -> list[Row]:
    """Write the results and the picture of a comparison from the folders of its runs; return the rows."""
    places = sorted(
        (path.parent for path in folder.glob(f"*-seed*/{runs.RESULT}") if _is_run(path.parent)),
        key=lambda place: (METHODS.index(place.name.rpartition("-seed")[0]), _seed(place)),
    )
    rows = [row for place in places for row in runs.read_json(place / runs.RESULT)]
    if rows and devices.is_first():
        metrics: dict[Method, list[Any]] = {}
        for place, row in zip(places, rows, strict=True):
            metrics.setdefault(row["method"], []).append(runs.read_metrics(place / runs.METRICS))
        runs.write_json(folder / runs.RESULT, rows)
        plots.curves(folder / runs.CURVES, metrics)
    return rows


def _is_run(place: Path) -> bool:
    method, _, seed = place.name.rpartition("-seed")
    return method in METHODS and seed.isdecimal()


def _seed(place: Path) -> int:
    return int(place.name.rpartition("-seed")[2])


def _conclude(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """Print the table, and where the files are."""
    print_results(rows, console)
    console.print(f"Curves:  {folder / runs.CURVES}", soft_wrap=True, highlight=False)
    console.print(f"Results: {folder / runs.RESULT}", soft_wrap=True, highlight=False)


def print_results(rows: Sequence[Row], console: Console) -> None:
    """The table of results: a line per method, the mean over its seeds and the standard deviation."""
    groups = by_method(rows)
    seeds = max(len(group) for group in groups.values())
    spread = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    table = Table(
        title=f"Accuracy in % on the test images, after the last epoch{spread}",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for title in (
        "hard",
        "relaxed",
        "hard, running\nstatistics",
        "relaxed, running\nstatistics",
        "binary\nweights",
        "bytes,\nfloat",
        "bytes,\npacked",
        "seconds",
    ):
        table.add_column(title, justify="right")
    for method, group in groups.items():
        seconds = statistics.mean(row["seconds"] for row in group)
        table.add_row(*cells(method, group), f"{seconds:.1f}")
    console.print(table)
    console.print(
        "hard: the binary network, to evaluate and ship; relaxed: the network as trained (float for float).\n"
        "Batch-norm statistics are estimated anew on augmented training images, or run along (running).",
        highlight=False,
    )


def cells(method: str, group: Sequence[Row]) -> list[str]:
    """What a table says of one method: its accuracies, its share of binary weights, its files."""
    packed = group[0]["bytes_packed"]
    return [
        method,
        percent(group, "hard_accuracy"),
        percent(group, "relaxed_accuracy"),
        percent(group, "hard_accuracy_running_statistics"),
        percent(group, "relaxed_accuracy_running_statistics"),
        f"{group[0]['binary_share']:.1%}",
        f"{group[0]['bytes_float']:,}",
        "-" if packed is None else f"{packed:,}",
    ]


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each method."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def percent(group: Sequence[Row], name: str) -> str:
    """A share in per cent, over the rows of one method: its mean, and its standard deviation."""
    values = [100 * row[name] for row in group if row[name] is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def headline(group: Sequence[Row]) -> str:
    """The accuracy of the network that a method is for, and how many seeds it is the mean of."""
    if not group:
        return "-"
    name = "relaxed_accuracy" if group[0]["hard_accuracy"] is None else "hard_accuracy"
    return f"{percent(group, name)} ({len(group)})"
