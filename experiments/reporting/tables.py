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
    """How much of the differences between the quantized networks so few test images make by themselves."""
    means = {
        method: statistics.mean(row["hard_accuracy"] for row in group)
        for method, group in by("method", rows).items()
        if group[0]["hard_accuracy"] is not None
    }
    if len(means) < 2:
        return
    best = max(means.values())
    # Two standard deviations of the difference of two accuracies, had each other test images.
    noise = max(2 * (2 * best * (1 - best) / images) ** 0.5, 1 / images)
    worse = {method: best - mean for method, mean in means.items() if best - mean > noise}
    told = ", ".join(f"{method} by {100 * gap:.1f}" for method, gap in worse.items())
    console.print(
        f"One of the {images:,} test images is {100 / images:.2f} points. Less than {100 * noise:.1f} points "
        "between two networks may be by chance, for the images alone. "
        + (f"Further than that below the best: {told}." if worse else "So these methods are not told apart."),
        highlight=False,
        soft_wrap=True,
    )


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
