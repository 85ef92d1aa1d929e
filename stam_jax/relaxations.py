"""Relaxations: the maps from float weights w and quantized weights y to the relaxed weights x.

A relaxation is any hashable object with one method, `at(count)`, which returns the map of that step: a
function (w, y, levels) -> x of the float weights, their nearest levels, and all levels in ascending order,
arrays that broadcast against w. Whatever depends on the step alone is so computed once, not for every leaf.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from stam_jax import _numbers
from stam_jax._numbers import ScalarOrSchedule
from stam_jax.quantizers import Levels
from stam_jax.regularizers import soft_threshold

RelaxationMap = Callable[[jax.Array, jax.Array, Levels], jax.Array]


class Relaxation(Protocol):
    """What the iteration asks of a relaxation; any hashable object with this method serves."""

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        ...


def shares(lam: Any) -> tuple[jax.Array, jax.Array]:
    """What the prox of the squared distance of a strength keeps of w, and takes of y: they add up to 1."""
    share_w = 1 / (1 + jnp.asarray(lam))
    # lam / (1 + lam), which keeps its digits where lam is small, and is 1 where lam is huge or infinite.
    return share_w, jnp.where(lam < 1, jnp.minimum(lam, 1) * share_w, 1 / (1 + 1 / jnp.maximum(lam, 1.0)))


@dataclasses.dataclass(frozen=True)
class SquaredDistance:
    r"""BinaryRelax's map $x = (w + \lambda y)/(1 + \lambda)$, the prox of the squared distance to Q.

    It minimizes $|u - w|^2/2 + (\lambda/2)|u - y|^2$ over u. $\lambda = \infty$ is the hard network, x = y.

    Args:
        lam: the strength, from 0 (float) to infinity (hard); a number or a schedule of the step count.

    Raises:
        ValueError: if `lam` is a negative number.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.relaxations import SquaredDistance
        >>> relax = SquaredDistance(lam=3.0).at(0)
        >>> print(relax(jnp.array([0.2, -1.8]), jnp.array([1.0, -1.0]), None))
        [ 0.8 -1.2]

    References:
        Yin et al., BinaryRelax, arXiv:1801.06313.
    """

    lam: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("SquaredDistance", "lam", self.lam)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        share_w, share_y = shares(_numbers.at(self.lam, count))
        return lambda w, y, levels: share_w * w + share_y * y


@dataclasses.dataclass(frozen=True)
class LinearBlend:
    r"""The straight line from float to quantized, $x = (1 - \theta) w + \theta y$.

    The same segment as `SquaredDistance`, with $\theta = \lambda/(1+\lambda)$, parametrized so that a linear
    schedule moves x at an even pace and reaches the hard network, $\theta = 1$, in finite time.

    Args:
        theta: the quantized share, from 0 (float) to 1 (hard); a number or a schedule of the step count.

    Raises:
        ValueError: if `theta` is a number outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax.relaxations import LinearBlend
        >>> blend = LinearBlend(theta=optax.linear_schedule(0.0, 1.0, transition_steps=100))
        >>> print(blend.at(25)(jnp.array([0.2]), jnp.array([1.0]), None))
        [0.4]
    """

    theta: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("LinearBlend", "theta", self.theta, high=1.0)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        theta = _numbers.at(self.theta, count)
        return lambda w, y, levels: (1 - theta) * w + theta * y


@dataclasses.dataclass(frozen=True)
class L1Distance:
    r"""ProxQuant's map, the prox of the l1 distance to Q: $x = y + \mathrm{soft}(w - y, \lambda)$.

    For w in the cell of y it minimizes $|u - w|^2/2 + \lambda\,|u - P_Q(u)|_1$ over u, with the scales of Q
    held at those of y: the W-shaped penalty. Weights closer to Q than $\lambda$ are set to it exactly.

    Args:
        lam: the threshold, from 0 (float) to infinity (hard), in the units of the weights; a number or a
            schedule of the step count.

    Raises:
        ValueError: if `lam` is a negative number.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.relaxations import L1Distance
        >>> relax = L1Distance(lam=0.5).at(0)
        >>> print(relax(jnp.array([0.25, -1.75, 0.75]), jnp.array([1.0, -1.0, 1.0]), None))
        [ 0.75 -1.25  1.  ]

    References:
        Bai, Wang and Liberty, ProxQuant, arXiv:1810.00861.
    """

    lam: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("L1Distance", "lam", self.lam)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        lam = _numbers.at(self.lam, count)
        return lambda w, y, levels: y + soft_threshold(w - y, lam)


@dataclasses.dataclass(frozen=True)
class Hard:
    """No relaxation: the network runs on the quantized weights, x = y.

    Example:
        >>> from stam_jax.relaxations import Hard
        >>> Hard().at(0)(0.3, 1.0, None)
        1.0
    """

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        del count
        return lambda w, y, levels: y


@dataclasses.dataclass(frozen=True)
class HardFrom:
    """Another relaxation up to a step, and from then on the hard network.

    Args:
        relaxation: of the steps before.
        step: the step from which on x = y; `round(0.75 * steps)` for the last quarter of a run.

    Raises:
        ValueError: unless `step` is a whole number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.relaxations import HardFrom, SquaredDistance
        >>> relaxation = HardFrom(SquaredDistance(lam=1.0), step=100)
        >>> w, y = jnp.array([0.5]), jnp.array([1.0])
        >>> print(relaxation.at(99)(w, y, None), relaxation.at(100)(w, y, None))
        [0.75] [1.]
    """

    relaxation: Relaxation
    step: int

    def __post_init__(self):
        if isinstance(self.relaxation, type) or not hasattr(self.relaxation, "at"):
            raise TypeError(f"HardFrom: relaxation must be an object with at; got {self.relaxation!r}.")
        _numbers.check_steps("HardFrom", ("step", self.step, 0))

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        relax = self.relaxation.at(count)
        is_hard = jnp.asarray(count) >= self.step
        return lambda w, y, levels: jnp.where(is_hard, y, relax(w, y, levels))


@dataclasses.dataclass(frozen=True)
class PiecewiseAffine:
    r"""PARQ's map: steps of slope 1/s, from one level of Q to the next and flat outside.

    For w between the levels $q_k$ and $q_{k+1}$, $m$ halfway between them,
    $x = \mathrm{clip}(m + (w - m)/s,\ q_k,\ q_{k+1})$, and w beyond the outermost levels goes to those. For
    binary weights that is $\mathrm{clip}(w/s, -\alpha, \alpha)$, a hard tanh. It minimizes over u between the
    outermost levels $|u - w|^2/2 + (1 - s)/2 \cdot (u - q_k)(q_{k+1} - u)$, a penalty that vanishes at the
    levels. s = 0 is the hard network, x = y.

    Args:
        inverse_slope: s, from 1 (float, but clipped) to 0 (hard); a number or a schedule of the step count.

    Raises:
        ValueError: if `inverse_slope` is a number outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.relaxations import PiecewiseAffine
        >>> w, y = jnp.array([0.2, -0.1, 3.0]), jnp.array([1.0, -1.0, 1.0])
        >>> relax = PiecewiseAffine(inverse_slope=0.5).at(0)
        >>> print(relax(w, y, (-jnp.ones(1), jnp.ones(1))))
        [ 0.4 -0.2  1. ]

    References:
        Jin et al., PARQ: piecewise-affine regularized quantization, arXiv:2503.15748.
    """

    inverse_slope: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("PiecewiseAffine", "inverse_slope", self.inverse_slope, high=1.0)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        inverse_slope = jnp.asarray(_numbers.at(self.inverse_slope, count))
        slope = 1 / jnp.maximum(inverse_slope, 1e-30)
        step = lambda t, half: jnp.clip(slope * t, -half, half)
        return lambda w, y, levels: jnp.where(inverse_slope > 0, _staircase(w, levels, step), y)


@dataclasses.dataclass(frozen=True)
class ScaledTanh:
    r"""Mirror descent's map: smooth steps, for binary weights $x = \alpha \tanh(\beta w/\alpha)$.

    With more levels it is a staircase, the sum over the gaps between neighbors, of half-width $h_k$ around
    $m_k$, of $h_k \tanh(\beta (w - m_k)/h_k)$. $\beta = \infty$ is the hard network, x = y.

    Args:
        beta: the steepness, from 0 (all weights 0) to infinity (hard); a number or a schedule of the step
            count.

    Raises:
        ValueError: if `beta` is a negative number.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.relaxations import ScaledTanh
        >>> w, y = jnp.array([0.5, -0.25, 3.0]), jnp.array([1.0, -1.0, 1.0])
        >>> relax = ScaledTanh(beta=2.0).at(0)
        >>> print(relax(w, y, (-jnp.ones(1), jnp.ones(1))).round(3))
        [ 0.762 -0.462  1.   ]

    References:
        Ajanthan et al., Mirror descent view for neural network quantization, arXiv:1910.08237.
    """

    beta: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("ScaledTanh", "beta", self.beta)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y, levels) -> x of step `count`."""
        beta = jnp.asarray(_numbers.at(self.beta, count))
        steep = jnp.minimum(beta, 1e30)

        def step(t: jax.Array, half: jax.Array) -> jax.Array:
            return jnp.where(half == 0, 0, half * jnp.tanh(steep * t / jnp.where(half == 0, 1, half)))

        return lambda w, y, levels: jnp.where(jnp.isinf(beta), y, _staircase(w, levels, step))


def _staircase(w: jax.Array, levels: Levels, step: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """The sum of a step per gap between neighboring levels.

    A step is an odd function of the distance t from the middle of the gap, which goes from -half to +half,
    where half is half the width of the gap.
    """
    gaps = [((low + high) / 2, (high - low) / 2) for low, high in itertools.pairwise(levels)]
    steps = (step(w - middle, half) for middle, half in gaps)
    return sum(steps, (levels[0] + levels[-1]) / 2)
