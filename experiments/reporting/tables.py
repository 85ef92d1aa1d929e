"""Tables of results: what they say of a method, on the terminal and on pages."""

import statistics
from collections.abc import Sequence

import rich.box
from rich.console import Console
from rich.table import Table

from experiments.reporting.results import by
from experiments.reporting.run_folder import Row


def print_results(rows: Sequence[Row], console: Console) -> None:
    """The table of results: a line per method, the mean over its seeds and the standard deviation."""
    groups = by("method", rows)
    seeds = max(len(group) for group in groups.values())
    spread = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    table = Table(
        title=f"Accuracy in % on the test images, after the last epoch{spread}",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for title in (
        "quantized",
        "relaxed",
        "quantized,\nrunning stats",
        "relaxed,\nrunning stats",
        "quantized\nweights",
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
        "quantized: the network to evaluate and ship; relaxed: the network as trained (float for float).\n"
        "Batch-norm statistics are estimated anew on augmented training images, or run along (running).",
        highlight=False,
    )


def print_noise(rows: Sequence[Row], images: int, console: Console) -> None:
    """How much of the differences between methods is noise: that of the test images, and that of seeds."""
    groups = by("method", rows)
    accuracies = [_headline(row) for row in rows]
    middle = statistics.mean(accuracies)
    # Of two accuracies on the same number of images, if each image were a toss of a coin of its own.
    error = 200 * (2 * middle * (1 - middle) / images) ** 0.5
    seeds = min(len(group) for group in groups.values())
    told = (
        "the seeds are one per method, so that their spread is not known"
        if seeds == 1
        else (
            f"over {seeds} seeds the standard deviation of a method is up to "
            f"{100 * max(statistics.stdev(map(_headline, group)) for group in groups.values()):.2f} points"
        )
    )
    console.print(
        f"One of the {images:,} test images is {100 / images:.2f} points. Two methods with a run each are "
        f"told apart by more than {max(error, 100 / images):.1f} points at best; {told}.",
        highlight=False,
        soft_wrap=True,
    )


def _headline(row: Row) -> float:
    """The accuracy of the network that a method is for."""
    return row["relaxed_accuracy"] if row["hard_accuracy"] is None else row["hard_accuracy"]


def cells(method: str, group: Sequence[Row]) -> list[str]:
    """What a table says of one method: its accuracies, its share of quantized weights, its files."""
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
