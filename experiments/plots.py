"""The picture of a run: accuracy, quantisation gap and sign flips over time."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments.config import METHODS, Method

Metrics = Sequence[Mapping[str, Any]]

# Okabe and Ito's colors, which color-blind readers tell apart.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def curves(path: Path, runs: Mapping[Method, Sequence[Metrics]]) -> None:
    """Draw the metrics of several methods over the epochs; one line per seed.

    Args:
        path: the picture to write; its ending says the format.
        runs: by method, the metrics of each seed, a mapping per epoch.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        # The legend stands below the panels, in rows of six.
        rows = -(-(len(runs) + 1) // 6)
        figure = Figure(figsize=(13, 4 + 0.25 * rows), layout="constrained")
        accuracy, gap, flips = figure.subplots(1, 3)
        for method, seeds in runs.items():
            # The same in every picture, whichever methods are in it.
            index = METHODS.index(method)
            color = _COLOURS[index % len(_COLOURS)]
            dashes = "-" if index < len(_COLOURS) else "--"
            for seed, metrics in enumerate(filter(None, seeds)):
                label = method if seed == 0 else None
                is_float = metrics[0]["hard_accuracy"] is None
                style = {"color": color, "alpha": 0.85, "linewidth": 1.4, "linestyle": dashes}
                _line(accuracy, metrics, "relaxed_accuracy", **style | {"linewidth": 0.9, "linestyle": ":"})
                main = "relaxed_accuracy" if is_float else "hard_accuracy"
                _line(accuracy, metrics, main, **style, label=label)
                if not is_float:
                    _line(gap, metrics, "quantisation_gap", **style, label=label)
                    _line(flips, metrics, "sign_flips", **style, label=label)
    accuracy.set(title="Accuracy on validation images", ylim=_accuracy_range(runs))
    accuracy.plot([], [], color="grey", linestyle=":", label="as trained (relaxed)")
    gap.set(title="Quantization gap |x - y| / |x|")
    flips.set(title="Share of signs changed since the last point")
    for axes in (accuracy, gap, flips):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
    gap.set_ylim(bottom=0)
    flips.set_ylim(bottom=0)
    figure.legend(*accuracy.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=150)


def _line(axes: Any, metrics: Metrics, name: str, **style: Any) -> None:
    points = [(row["epoch"], row[name]) for row in metrics if row[name] is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def _accuracy_range(runs: Mapping[Method, Sequence[Metrics]]) -> tuple[float, float]:
    """Ends for the accuracies: the upper one above all of them, the lower one below the runs' second half."""
    lines = [
        [row[name] for row in metrics if row[name] is not None]
        for seeds in runs.values()
        for metrics in seeds
        for name in ("relaxed_accuracy", "hard_accuracy")
    ]
    lines = [line for line in lines if line]
    lowest = min(min(line[len(line) // 2 :]) for line in lines)
    highest = max(max(line) for line in lines)
    return max(lowest - 0.05, 0.0), min(highest + 0.05, 1.003)


def accuracies(path: Path, cells: Mapping[str, Mapping[str, Metrics]]) -> None:
    """Draw the accuracies of methods with the standard deviation over their seeds, a panel per network.

    Args:
        path: the picture to write; its ending says the format.
        cells: by panel and method, the rows of results, one per seed.
    """
    methods = list(dict.fromkeys(method for column in cells.values() for method in column))
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        size = (1.5 + 3.5 * len(cells), 1.4 + 0.32 * len(methods))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
        for axes, (title, column) in zip(panels, cells.items(), strict=True):
            for place, method in enumerate(methods):
                rows = column.get(method, ())
                values = [
                    100 * row["relaxed_accuracy" if row["hard_accuracy"] is None else "hard_accuracy"]
                    for row in rows
                ]
                if not values:
                    continue
                color = _COLOURS[0] if method == "float" else _COLOURS[1]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                axes.plot(values, [place] * len(values), "|", color=color, alpha=0.5)
                axes.errorbar(statistics.mean(values), place, xerr=spread, fmt="o", color=color, capsize=3)
            axes.set(title=title, xlabel="test accuracy, %")
            axes.set_yticks(range(len(methods)), methods)
            axes.grid(alpha=0.25)
        panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)
