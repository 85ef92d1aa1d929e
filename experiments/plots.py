"""The picture of a run: accuracy, quantisation gap and sign flips over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def curves(path: Path, runs: Mapping[str, Sequence[Metrics]]) -> None:
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
        for index, (method, seeds) in enumerate(runs.items()):
            colour = _COLOURS[index % len(_COLOURS)]
            dashes = "-" if index < len(_COLOURS) else "--"
            for seed, metrics in enumerate(seeds):
                label = method if seed == 0 else None
                is_float = metrics[0]["hard_accuracy"] is None
                style = {"color": colour, "alpha": 0.85, "linewidth": 1.4, "linestyle": dashes}
                _line(accuracy, metrics, "relaxed_accuracy", **style | {"linewidth": 0.9, "linestyle": ":"})
                main = "relaxed_accuracy" if is_float else "hard_accuracy"
                _line(accuracy, metrics, main, **style, label=label)
                if not is_float:
                    _line(gap, metrics, "quantisation_gap", **style, label=label)
                    _line(flips, metrics, "sign_flips", **style, label=label)
    accuracy.set(title="Accuracy on validation images", ylim=(_floor(runs), 1.003))
    accuracy.plot([], [], color="grey", linestyle=":", label="as trained (relaxed)")
    gap.set(title="Quantisation gap |x - y| / |y|")
    flips.set(title="Share of weights that change sign in an epoch")
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


def _floor(runs: Mapping[str, Sequence[Metrics]]) -> float:
    """A lower end for the accuracies that shows the second half of the runs in full."""
    late = [
        row[name]
        for seeds in runs.values()
        for metrics in seeds
        for row in metrics[len(metrics) // 2 :]
        for name in ("relaxed_accuracy", "hard_accuracy")
        if row[name] is not None
    ]
    return max(min(late) - 0.05, 0.0)
