"""The pictures of results: curves over the epochs, and accuracies side by side."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.reporting.run_folder import Row

Metrics = Sequence[Row]

# Okabe and Ito's colors, which color-blind readers tell apart; the first two are for float and `stam`.
_BLACK, _RED = "#000000", "#D55E00"
_OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
# As many lines as a reader tells apart in one panel.
_MOST = 8
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 9,
}
# Inches, and dots per inch: half as many again as a page shows in 700 pixels.
_WIDTH, _DPI = 7.0, 150


def curves(path: Path, lines: Mapping[str, Sequence[Metrics]]) -> None:
    """Draw the metrics of several methods, or trials, over the epochs.

    A line is the mean over the seeds, and the band around it goes from the lowest to the highest. More lines
    than a reader tells apart get a panel each; what was measured at one epoch only is drawn side by side.

    Args:
        path: the picture to write; its ending says the format.
        lines: by method or trial, the metrics of each seed, a row per measured epoch.
    """
    with matplotlib.rc_context(_STYLE):
        if len({row["epoch"] for seeds in lines.values() for metrics in seeds for row in metrics}) == 1:
            figure = _side_by_side(lines)
        else:
            figure = _together(lines) if len(lines) <= _MOST else _one_by_one(lines)
        figure.savefig(path, dpi=_DPI)


def _together(lines: Mapping[str, Sequence[Metrics]]) -> Figure:
    """All lines in each of four panels."""
    colors = _colors(lines)
    figure = Figure(figsize=(_WIDTH, 5.6), layout="constrained")
    accuracy, relaxed, gap, flips = figure.subplots(2, 2).flat
    for name, seeds in lines.items():
        style = {"color": colors[name], "bold": name == "stam"}
        _line(accuracy, seeds, _main(seeds), label=name, **style)
        _line(relaxed, seeds, "relaxed_accuracy", **style)
        if _main(seeds) == "hard_accuracy":
            _line(gap, seeds, "quantization_gap", **style)
            _line(flips, seeds, "sign_flips", **style)
    accuracy.set_title("Quantized network, validation images")
    relaxed.set_title("Network in training (relaxed)")
    gap.set_title("Quantization gap |x - P(x)| / |x|")
    flips.set_title("Signs changed since the last point")
    for axes in (accuracy, relaxed):
        axes.set_ylim(_accuracy_range(lines))
    for axes in (gap, flips):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
    for axes in (accuracy, relaxed, gap, flips):
        _axes_of_shares(axes)
    if "stam" in lines:
        _label_at_end(accuracy, lines["stam"], _main(lines["stam"]), "stam")
    figure.legend(*accuracy.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


def _one_by_one(lines: Mapping[str, Sequence[Metrics]]) -> Figure:
    """A panel for each line, with the others in gray behind it where they are few."""
    columns = 3
    rows = math.ceil(len(lines) / columns)
    figure = Figure(figsize=(_WIDTH, 1.75 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, seeds) in zip(panels, lines.items(), strict=False):
        for other in lines.values() if len(lines) <= 2 * _MOST else ():
            _line(axes, other, _main(other), color="#BBBBBB", width=0.6, band=False)
        is_float = _main(seeds) == "relaxed_accuracy"
        color = _BLACK if is_float else _RED if name == "stam" else _OTHERS[0]
        if not is_float:
            _line(axes, seeds, "relaxed_accuracy", color=color, dashes=":", width=1.0, band=False)
        _line(axes, seeds, _main(seeds), color=color, bold=name == "stam")
        axes.set_title(name.replace(" ", "\n"), fontweight="bold" if name == "stam" else None)
        axes.set_ylim(_accuracy_range(lines))
        _axes_of_shares(axes)
    for axes in panels[len(lines) :]:
        axes.set_visible(False)
    figure.supxlabel("epoch (solid: quantized network on the validation images; dotted: relaxed)", fontsize=9)
    return figure


def _side_by_side(lines: Mapping[str, Sequence[Metrics]]) -> Figure:
    """A row for each line, of the one epoch that was measured."""
    rows = {
        textwrap.fill(name, 56, break_on_hyphens=False): [row for metrics in seeds for row in metrics]
        for name, seeds in lines.items()
    }
    height = 0.1 + 0.14 * max(1 + name.count("\n") for name in rows)
    figure = Figure(figsize=(_WIDTH, 0.6 + height * len(rows)), layout="constrained")
    _spreads(figure.subplots(), rows, "accuracy on the validation images")
    return figure


def _axes_of_shares(axes: Any) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _colors(lines: Mapping[str, Any]) -> dict[str, str]:
    """A color for each line."""
    fixed = {"float": _BLACK, "stam": _RED}
    others = [name for name in lines if name not in fixed]
    return fixed | dict(zip(others, (*_OTHERS, _BLACK), strict=False))


def _main(seeds: Sequence[Metrics]) -> str:
    """The accuracy of the network that a method is for."""
    rows = [row for metrics in seeds for row in metrics]
    is_float = all(row["hard_accuracy"] is None for row in rows)
    return "relaxed_accuracy" if is_float else "hard_accuracy"


def _points(seeds: Sequence[Metrics], name: str) -> dict[int, list[float]]:
    """What was measured, by epoch, of all seeds."""
    points: dict[int, list[float]] = {}
    for row in (row for metrics in seeds for row in metrics):
        if row[name] is not None:
            points.setdefault(row["epoch"], []).append(row[name])
    return dict(sorted(points.items()))


def _line(
    axes: Any,
    seeds: Sequence[Metrics],
    name: str,
    *,
    color: str,
    bold: bool = False,
    width: float = 1.4,
    dashes: str = "-",
    band: bool = True,
    label: str | None = None,
) -> None:
    """The mean over the seeds, and a band from the lowest to the highest."""
    points = _points(seeds, name)
    epochs = list(points)
    means = [statistics.mean(values) for values in points.values()]
    style = {"color": color, "linestyle": dashes, "zorder": 3 if bold else 2}
    axes.plot(epochs, means, linewidth=2.6 if bold else width, label=label, **style)
    if band and any(len(values) > 1 for values in points.values()):
        low, high = np.array([(min(values), max(values)) for values in points.values()]).T
        axes.fill_between(epochs, low, high, color=color, alpha=0.18, linewidth=0)


def _label_at_end(axes: Any, seeds: Sequence[Metrics], name: str, text: str) -> None:
    epoch, values = list(_points(seeds, name).items())[-1]
    place = (epoch, statistics.mean(values))
    axes.annotate(
        text,
        place,
        (4, 0),
        textcoords="offset points",
        color=_RED,
        fontweight="bold",
        va="center",
        fontsize=9,
    )


def _accuracy_range(lines: Mapping[str, Sequence[Metrics]]) -> tuple[float, float]:
    """Ends for the accuracies: the upper one above all of them, the lower one below the runs' second half."""
    found = [
        [row[name] for row in metrics if row[name] is not None]
        for seeds in lines.values()
        for metrics in seeds
        for name in ("relaxed_accuracy", "hard_accuracy")
    ]
    found = [line for line in found if line]
    lowest = min(min(line[len(line) // 2 :]) for line in found)
    highest = max(max(line) for line in found)
    return max(lowest - 0.05, 0.0), min(highest + 0.05, 1.003)


def accuracies(path: Path, cells: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    """Draw the accuracies of methods with the standard deviation over their seeds, a panel per network.

    Args:
        path: the picture to write; its ending says the format.
        cells: by panel and method, the rows of results, one per seed.
    """
    methods = list(dict.fromkeys(method for column in cells.values() for method in column))
    with matplotlib.rc_context(_STYLE):
        size = (1.5 + 3.5 * len(cells), 1.4 + 0.32 * len(methods))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
        for axes, (title, column) in zip(panels, cells.items(), strict=True):
            column = {method: column.get(method, ()) for method in methods}
            _spreads(axes, column, "accuracy on the test images")
            axes.set_title(title)
    figure.savefig(path, dpi=_DPI)


def _spreads(axes: Any, column: Mapping[str, Sequence[Row]], label: str) -> None:
    """A row for each name: a stroke for each accuracy, their mean, and their standard deviation."""
    for place, (name, rows) in enumerate(column.items()):
        values = [
            row["relaxed_accuracy" if row["hard_accuracy"] is None else "hard_accuracy"] for row in rows
        ]
        if not values:
            continue
        color = {"float": _BLACK, "stam": _RED}.get(name, _OTHERS[0])
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.plot(values, [place] * len(values), "|", color=color, alpha=0.5)
        axes.errorbar(statistics.mean(values), place, xerr=spread, fmt="o", color=color, capsize=3)
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_yticks(range(len(column)), list(column))
    axes.set_ylim(len(column) - 0.5, -0.5)
