"""Relaxations: how far the weights x that a network runs on are drawn from float to quantised.

A relaxation is any hashable object with one method, `at(count)`, which returns the map of that step: a
function of the float weights w and their projection y, arrays of one shape, that gives x. Whatever depends
on the step alone is so worked out once, not for every leaf.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from stam_jax import _numbers
from stam_jax._numbers import ScalarOrSchedule
from stam_jax.regularizers import soft_threshold

RelaxationMap = Callable[[jax.Array, jax.Array], jax.Array]


class Relaxation(Protocol):
    """What the engine asks of a relaxation; any hashable object with this method serves."""

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y) -> x of step `count`."""
        ...


@dataclasses.dataclass(frozen=True)
class SquaredDistance:
    r"""BinaryRelax's map $x = (w + \lambda y)/(1 + \lambda)$, the prox of the squared distance to Q.

    It minimises $|u - w|^2/2 + (\lambda/2)|u - y|^2$ over u. $\lambda = \infty$ is the hard network, x = y.

    Args:
        lam: the strength, from 0 (float) to infinity (hard); a number or a schedule of the step count.

    Raises:
        ValueError: if `lam` is a negative number.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import SquaredDistance
        >>> relax = SquaredDistance(lam=3.0).at(0)
        >>> print(relax(jnp.array([0.2, -1.8]), jnp.array([1.0, -1.0])))
        [ 0.8 -1.2]

    References:
        Yin et al., BinaryRelax, arXiv:1801.06313.
    """

    lam: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("SquaredDistance", "lam", self.lam)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y) -> x of step `count`."""
        lam = _numbers.at(self.lam, count)
        share_w = 1 / (1 + jnp.asarray(lam))
        # lam / (1 + lam), which keeps its digits where lam is small, and is 1 where lam is huge or infinite.
        share_y = jnp.where(lam < 1, lam * share_w, 1 / (1 + 1 / jnp.maximum(lam, 1.0)))
        return lambda w, y: share_w * w + share_y * y


@dataclasses.dataclass(frozen=True)
class LinearBlend:
    r"""The straight line from float to quantised, $x = (1 - \theta) w + \theta y$.

    The same segment as `SquaredDistance`, with $\theta = \lambda/(1+\lambda)$, parametrised so that a linear
    schedule moves x at an even pace and reaches the hard network, $\theta = 1$, in finite time.

    Args:
        theta: the quantised share, from 0 (float) to 1 (hard); a number or a schedule of the step count.

    Raises:
        ValueError: if `theta` is a number outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import LinearBlend
        >>> blend = LinearBlend(theta=optax.linear_schedule(0.0, 1.0, transition_steps=100))
        >>> print(blend.at(25)(jnp.array([0.2]), jnp.array([1.0])))
        [0.4]
    """

    theta: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("LinearBlend", "theta", self.theta, high=1.0)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y) -> x of step `count`."""
        theta = _numbers.at(self.theta, count)
        return lambda w, y: (1 - theta) * w + theta * y


@dataclasses.dataclass(frozen=True)
class L1Distance:
    r"""ProxQuant's map, the prox of the l1 distance to Q: $x = y + \mathrm{soft}(w - y, \lambda)$.

    For w in the cell of y it minimises $|u - w|^2/2 + \lambda\,|u - P_Q(u)|_1$ over u, with the scales of Q
    held at those of y: the W-shaped penalty. Weights closer to Q than $\lambda$ are set to it exactly.

    Args:
        lam: the threshold, from 0 (float) to infinity (hard), in the units of the weights; a number or a
            schedule of the step count.

    Raises:
        ValueError: if `lam` is a negative number.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import L1Distance
        >>> relax = L1Distance(lam=0.5).at(0)
        >>> print(relax(jnp.array([0.25, -1.75, 0.75]), jnp.array([1.0, -1.0, 1.0])))
        [ 0.75 -1.25  1.  ]

    References:
        Bai, Wang and Liberty, ProxQuant, arXiv:1810.00861.
    """

    lam: ScalarOrSchedule

    def __post_init__(self):
        _numbers.check("L1Distance", "lam", self.lam)

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y) -> x of step `count`."""
        lam = _numbers.at(self.lam, count)
        return lambda w, y: y + soft_threshold(w - y, lam)


@dataclasses.dataclass(frozen=True)
class Hard:
    """No relaxation: the network runs on the quantised weights, x = y.

    Example:
        >>> from stam_jax import Hard
        >>> Hard().at(0)(0.3, 1.0)
        1.0
    """

    def at(self, count: jax.typing.ArrayLike) -> RelaxationMap:
        """The map (w, y) -> x of step `count`."""
        del count
        return lambda w, y: y


def from_penalty(penalty: Any, learning_rate: Any, damping: Any) -> RelaxationMap:
    r"""The squared-distance map of the model's penalty, $\lambda = \eta\rho / (1 + \eta\tau)$.

    `damping` is $\eta\tau$. An infinite penalty is the hard network, also at a step size of zero.
    """
    lam = jnp.where(jnp.isinf(penalty), math.inf, jnp.asarray(learning_rate) * penalty / (1 + damping))
    return SquaredDistance(lam).at(0)
