"""An inertia that follows from the size of the optimizer's steps, so that it has no unit."""

import dataclasses

import jax
import jax.numpy as jnp

from stam_jax import _numbers
from stam_jax._numbers import ScalarOrSchedule


@dataclasses.dataclass(frozen=True)
class StepInertia:
    r"""The inertia that holds signs against the noise of steps, for steps of any unit.

    With $\bar r_k$ the mean of the relative steps $r_0, \dots, r_{k-1}$ so far, 0 at first,

    $$\kappa_k = 1 - \min(\mathrm{hold}\;\bar r_k,\, 1/4)\;\bar r_k, \qquad
      r_k = \frac{1}{n} \sum_{\text{leaves}} n_{\text{leaf}}
      \min\Bigl(\frac{\mathrm{mean}|u|}{\mathrm{mean}|v + u|}, 1\Bigr),$$

    over the quantized leaves with $n$ weights in all, u being all of the step that the optimizer makes from
    the latent weights v. The square is that of noise: over the $1/(1 - \kappa)$ steps that the latent weights
    remember, noise carries them by about $|u|/\sqrt{1 - \kappa}$, and a sign is held where that is less than
    the size of a weight. The pull is at most a quarter of the mean step, so such steps turn a sign if they
    keep their direction. Steps far below the mean, at the end of a schedule or in one leaf alone, do not. All
    leaves have the same inertia, which is known before the step that it acts on.

    Args:
        hold: how firmly signs are held, a number without a unit, from 0 (an inertia of 1), or a schedule of
            the step count.

    Raises:
        ValueError: if `hold` is a number below 0 or not finite.

    Example:
        >>> from stam_jax import StepInertia
        >>> print(f"{StepInertia(hold=16.0).at(0, 0.01):.4f}")
        0.9984
    """

    hold: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("StepInertia", "hold", self.hold, finite=True)

    def at(self, count: jax.typing.ArrayLike, relative_step: jax.typing.ArrayLike) -> jax.Array:
        """The inertia of step `count`, after steps of a mean relative size."""
        return 1 - jnp.minimum(_numbers.at(self.hold, count) * relative_step, 0.25) * relative_step


def relative_step(steps: dict[str, jax.Array], weights: dict[str, jax.Array]) -> jax.Array:
    """The size |u| of a step relative to the mean |w| of its leaf, at most 1, on average over all weights."""
    leaves = [(steps[path], w) for path, w in weights.items() if w.size]
    # Of w by output channel first: these means are the scales of `Binary`, which are taken already. Of u at
    # once: on GPUs, XLA takes that mean in the pass that writes the new weights.
    size = lambda w: jnp.mean(jnp.mean(jnp.abs(w), axis=tuple(range(w.ndim - 1))))
    # Leaves of zeros alone have no size that a step could be relative to.
    ratio = lambda u, w: jnp.minimum(jnp.mean(jnp.abs(u)) / jnp.where(size(w) > 0, size(w), jnp.inf), 1)
    # Floats: more weights than an int32 can count are no rarity.
    parts = [float(w.size) * ratio(u, w) for u, w in leaves]
    return sum(parts, jnp.zeros([])) / float(max(sum(w.size for _, w in leaves), 1))
