"""Several runs side by side: their folders, the table, the picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import data, plots, runs
from experiments.config import CompareSettings, SettingsError, TrainSettings
from experiments.training import Trainer

Row = Mapping[str, Any]


def train(settings: TrainSettings, output: Path | None, console: Console) -> list[Row]:
    """Train once; print the table; return the one row."""
    trainer = Trainer(settings, data.load(settings.dataset))
    folder = runs.create(output, "train", settings)
    return _run_all([(trainer, settings, folder)], folder, console)


def compare(settings: CompareSettings, output: Path | None, console: Console) -> list[Row]:
    """Train once per method and seed, print the table, and return its rows.

    Raises:
        SettingsError: if the settings do not go together.
    """
    methods = settings.chosen()
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise SettingsError("--seeds: give at least one, and none twice.")
    dataset = data.load(settings.dataset)
    jobs = []
    for method in methods:
        each = settings.runs_of(method)
        trainer = Trainer(each[0], dataset)
        jobs.extend((trainer, one) for one in each)
    folder = runs.create(output, "compare", settings)
    return _run_all(
        [
            (trainer, one, runs.create(folder / f"{one.method}-seed{one.seed}", "train", one))
            for trainer, one in jobs
        ],
        folder,
        console,
    )


def _run_all(
    jobs: Sequence[tuple[Trainer, TrainSettings, Path]], folder: Path, console: Console
) -> list[Row]:
    """Train each; write the results, after every run, and the picture; print the table."""
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    rows: list[Row] = []
    metrics: dict[str, list[Any]] = {}
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = [
            progress.add_task(
                f"{settings.method} seed {settings.seed}",
                total=settings.epochs,
                start=False,
                note="",
            )
            for _, settings, _ in jobs
        ]
        for task, (trainer, settings, place) in zip(tasks, jobs, strict=True):
            progress.start_task(task)
            progress.update(task, note="compiling")

            def show(row: Row, task: Any = task) -> None:
                progress.update(task, advance=1, note=_note(row))

            rows.append(trainer.run(settings.seed, place, show))
            runs.write_json(place / runs.RESULT, rows[-1:])
            runs.write_json(folder / runs.RESULT, rows)
            metrics.setdefault(settings.method, []).append(runs.read_metrics(place / runs.METRICS))
    plots.curves(folder / runs.CURVES, metrics)
    print_results(rows, console)
    console.print(f"Curves:  {folder / runs.CURVES}", soft_wrap=True, highlight=False)
    console.print(f"Results: {folder / runs.RESULT}", soft_wrap=True, highlight=False)
    return rows


def _note(metrics: Row) -> str:
    """What to say beside the bar of a run."""
    hard = metrics["hard_accuracy"]
    binary = "" if hard is None else f"  binary {hard:.1%}"
    return f"loss {metrics['loss']:.3f}  validation {metrics['relaxed_accuracy']:.1%}{binary}"


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
        "Batch-norm statistics are estimated anew on training images, or run along with training (running).",
        highlight=False,
    )


def cells(method: str, group: Sequence[Row]) -> list[str]:
    """What a table says of one method: its accuracies, its share of binary weights, its files."""
    packed = group[0]["bytes_packed"]
    return [
        method,
        _percent(group, "hard_accuracy"),
        _percent(group, "relaxed_accuracy"),
        _percent(group, "hard_accuracy_running_statistics"),
        _percent(group, "relaxed_accuracy_running_statistics"),
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


def _percent(group: Sequence[Row], name: str) -> str:
    """A share in per cent, over the rows of one method: its mean, and its standard deviation."""
    values = [100 * row[name] for row in group if row[name] is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def evaluate(folder: Path, console: Console) -> list[Row]:
    """Measure the packed networks of a run's folder anew; say whether they do as they did.

    Raises:
        SettingsError: if the folder is not one of a run, or holds no packed network.
    """
    rows = []
    for place in runs.single_runs(folder):
        if not (place / runs.PACKED).is_file():
            continue
        settings = runs.read_settings(place / runs.CONFIG)
        accuracy = Trainer(settings, data.load(settings.dataset)).judge_file(place / runs.PACKED)
        recorded = runs.read_json(place / runs.RESULT)[0]["hard_accuracy"]
        rows.append(
            {"run": str(place), "accuracy": accuracy, "recorded": recorded, "same": accuracy == recorded}
        )
    if not rows:
        raise SettingsError(
            f"{folder} holds no {runs.PACKED}: its runs are of the float network, or did not finish, "
            "or their weights were not kept."
        )
    table = Table(box=rich.box.SIMPLE_HEAD)
    for title in ("run", "accuracy of the packed file", "recorded", ""):
        table.add_column(title)
    for row in rows:
        same = "the same" if row["same"] else "[bold red]differs"
        table.add_row(row["run"], f"{row['accuracy']:.2%}", f"{row['recorded']:.2%}", same)
    console.print(table)
    return rows
