"""Draw docs/relaxations.png: every relaxation map at four stages of its anneal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

from stam_jax import Binary, Quantizer, Ternary, schedules
from stam_jax.quantizers import levels_of, nearest
from stam_jax.relaxations import (
    Hard,
    HardFrom,
    L1Distance,
    LinearBlend,
    PiecewiseAffine,
    Relaxation,
    ScaledTanh,
    SquaredDistance,
)

STEPS = 100
# The stages, in steps of the anneal, with colors of Okabe and Ito's, which color-blind readers tell apart.
STAGES = {0: "#56B4E9", 33: "#009E73", 67: "#D55E00", 100: "#000000"}
QUANTIZERS = {
    "Binary: levels \N{MINUS SIGN}1 and +1": Binary(axis=(), scale=1.0),
    "Ternary: levels \N{MINUS SIGN}1, 0 and +1": Ternary(axis=(), scale=1.0),
}

_lam = schedules.geometric(0.1, growth=1.07)
_theta = schedules.linear_to_hard(STEPS)
_inverse_slope = schedules.sigmoid_inverse_slope(STEPS, steepness=4.0)
_beta = schedules.geometric(1.0, growth=1.035)
_threshold = optax.linear_schedule(0.0, 1.0, transition_steps=STEPS)

# Each relaxation with the name of its number and that number's schedule.
PANELS: dict[str, tuple[Relaxation, str, Callable[[int], Any] | None]] = {
    "SquaredDistance": (HardFrom(SquaredDistance(_lam), STEPS), "lam", _lam),
    "LinearBlend": (LinearBlend(_theta), "theta", _theta),
    "L1Distance": (HardFrom(L1Distance(_threshold), STEPS), "lam", _threshold),
    "PiecewiseAffine": (PiecewiseAffine(_inverse_slope), "inverse_slope", _inverse_slope),
    "ScaledTanh": (HardFrom(ScaledTanh(_beta), STEPS), "beta", _beta),
    "Hard": (Hard(), "", None),
}


def draw(path: Path) -> None:
    """Draw the relaxations, for binary weights above and for ternary ones below.

    Args:
        path: the picture to write; its ending says the format.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(9, 10.6), layout="constrained")
        halves: Any = figure.subfigures(2, 1, hspace=0.02)
        for half, (title, quantizer) in zip(halves, QUANTIZERS.items(), strict=True):
            half.suptitle(title, fontsize=13, fontweight="bold")
            panels = half.subplots(2, 3, sharex=True, sharey=True)
            for axes, (name, (relaxation, number, schedule)) in zip(panels.flat, PANELS.items(), strict=True):
                _panel(axes, relaxation, quantizer)
                axes.set_title(name, fontsize=11, pad=20)
                values = "x = y at every step" if schedule is None else _values(number, schedule)
                axes.annotate(
                    values,
                    (0.5, 1.0),
                    xytext=(0, 6),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color="#444444",
                )
            for axes in panels[-1]:
                axes.set_xlabel("latent weight w")
            for axes in panels[:, 0]:
                axes.set_ylabel("relaxed weight x")
        lines = [halves[0].axes[0].plot([], [], color=c, linewidth=2.2)[0] for c in STAGES.values()]
        figure.legend(
            lines,
            [f"{100 * stage // STEPS}%" for stage in STAGES],
            title="share of the anneal that is done",
            loc="outside upper center",
            ncols=len(STAGES),
            frameon=False,
            fontsize=11,
            title_fontsize=11,
        )
    figure.savefig(path, dpi=150)


def _panel(axes: Any, relaxation: Relaxation, quantizer: Quantizer) -> None:
    """One relaxation over one quantized set, a line per stage."""
    w = jnp.linspace(-2, 2, 2000)
    levels = levels_of(quantizer, w)
    for level in levels:
        axes.axhline(level.item(), color="#BBBBBB", linewidth=0.8, zorder=0)
    for stage, color in STAGES.items():
        x = relaxation.at(stage)(w, nearest(w, levels), levels)
        _curve(axes, np.asarray(w), np.asarray(x), color)
    axes.set(xlim=(-2, 2), ylim=(-2.1, 2.1), xticks=range(-2, 3), yticks=range(-2, 3))


def _curve(axes: Any, w: np.ndarray, x: np.ndarray, color: str) -> None:
    """A line that is thin and dotted where it jumps."""
    jumps = np.flatnonzero(np.abs(np.diff(x)) > 0.05)
    axes.plot(np.insert(w, jumps + 1, np.nan), np.insert(x, jumps + 1, np.nan), color=color, linewidth=1.8)
    for i in jumps:
        axes.plot(w[i : i + 2], x[i : i + 2], color=color, linewidth=0.8, linestyle=":")


def _values(number: str, schedule: Callable[[int], Any]) -> str:
    """The number that the relaxation takes, at each stage."""
    *before, last = (float(schedule(stage)) for stage in STAGES)
    final = f"{last:.2g}" if number in ("theta", "inverse_slope") else "hard"
    return f"{number}: " + ", ".join([*(f"{value:.2g}" for value in before), final])


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
