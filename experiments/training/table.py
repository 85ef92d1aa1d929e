"""The command `table`: methods on several image sets and networks, written from the folders of the runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.config import METHODS, CompareSettings, Execution, TableSettings
from experiments.data import devices
from experiments.reporting import plots, run_folder, tables
from experiments.training import compare, jobs
from experiments.training.begin import begin

MARKDOWN, CSV, PICTURE = "table.md", "table.csv", "table.png"
_COLUMNS: tuple[str, ...] = (
    "dataset", "training_images", "model", "width", "precision", "epochs", "method", "seed",
    "hard_accuracy", "relaxed_accuracy", "hard_accuracy_running_statistics",
    "relaxed_accuracy_running_statistics", "binary_share", "bytes_float", "bytes_packed", "seconds",
)  # fmt: skip


def table(
    settings: TableSettings, execution: Execution, folder: Path, console: Console
) -> list[jobs.Failure]:
    """Train every run that is missing, write and print the table, and return the runs that failed.

    Raises:
        SettingsError: if the settings do not go together.
    """
    comparisons = settings.comparisons()
    for comparison in comparisons:
        jobs.check(comparison, execution)
    planned = []
    for comparison in comparisons:
        place = _place(folder, comparison)
        begin(place, "compare", comparison, resume=True)
        planned += compare.jobs_of(comparison, place, resume=True)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    failures = jobs.run(planned, execution, folder, console, lambda job: compare.gather(job.folder.parent))
    for comparison in comparisons:
        compare.conclude(_place(folder, comparison))
    if devices.is_first():
        write(folder)
        console.print(Markdown((folder / MARKDOWN).read_text()))
        for name in (MARKDOWN, CSV, PICTURE):
            if (folder / name).is_file():
                console.print(f"Written: {folder / name}", soft_wrap=True, highlight=False)
    return failures


def _place(folder: Path, comparison: CompareSettings) -> Path:
    return folder / f"{comparison.dataset}-{comparison.model}"


def write(folder: Path) -> None:
    """Write the table of a folder, in Markdown, as CSV and as a picture, from its runs' folders alone."""
    rows, failed = _read(folder)
    (folder / CSV).write_text(_csv(rows))
    (folder / MARKDOWN).write_text(_markdown(rows, failed))
    if rows:
        plots.accuracies(folder / PICTURE, _cells(rows))


def _read(folder: Path) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """The results with their settings, and what the runs without a result say."""
    rows, failed = [], {}
    for place in sorted(path.parent for path in folder.glob(f"*/*/{run_folder.CONFIG}")):
        if (place / run_folder.RESULTS).is_file():
            settings = run_folder.read_json(place / run_folder.CONFIG)
            rows += [settings | row for row in run_folder.read_csv(place / run_folder.RESULTS)]
        else:
            error = place / run_folder.ERROR
            said = error.read_text().strip() if error.is_file() else "not finished"
            failed[place.relative_to(folder).as_posix()] = said
    key = lambda row: (row["dataset"], row["model"], METHODS.index(row["method"]), row["seed"])
    return sorted(rows, key=key), failed


def _cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The rows by image set and network, and then by method."""
    cells: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        column = cells.setdefault(f"{row['dataset']}, {row['model']}", {})
        column.setdefault(row["method"], []).append(row)
    return cells


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    return run_folder.as_csv([{name: row[name] for name in _COLUMNS} for row in rows])


def _markdown(rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> str:
    cells = _cells(rows)
    lines = [
        "Accuracy in % on the test images after the last epoch, of the binary network (of the float one for "
        "`float`); mean and standard deviation, and in brackets the number of seeds.",
        "",
        f"| method | {' | '.join(cells)} |",
        f"|---|{'--:|' * len(cells)}",
    ]
    for method in METHODS:
        if any(method in column for column in cells.values()):
            entries = [tables.headline(column.get(method, ())) for column in cells.values()]
            lines.append(f"| {method} | {' | '.join(entries)} |")
    if failed:
        lines += ["", "Without a result:", ""]
        lines += [f"* {name}: {said}" for name, said in failed.items()]
    return "\n".join(lines) + "\n"
