"""Regularisers h of the constrained block z, each given by its prox.

A regulariser is any hashable object with one method, `prox(v, step)`, the minimiser over u of
`h(u) + |u - v|^2 / (2 step)`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from stam_jax import _numbers


class Regularizer(Protocol):
    """What the engine asks of a regulariser; any hashable object with this method serves."""

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """The minimiser over u of h(u) + |u - v|^2 / (2 step), in the shape and dtype of v."""
        ...


@dataclasses.dataclass(frozen=True)
class Box:
    r"""BinaryConnect's clipping: h is the indicator of $|z_i| \le$ `limit`.

    Args:
        limit: half the width of the box, in the units of the weights.

    Raises:
        ValueError: if `limit` is not a finite number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Box
        >>> print(Box(1.0).prox(jnp.array([-3.0, 0.5]), step=0.1))
        [-1.   0.5]

    References:
        Courbariaux et al., BinaryConnect, arXiv:1511.00363.
    """

    limit: float = 1.0

    def __post_init__(self):
        _numbers.check("Box", "limit", self.limit, finite=True, schedule=False)

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """The nearest point of the box, whatever the step."""
        del step
        # Selects, not `clip`: XLA on CPU works a clamp out twice and copies the state for it.
        return jnp.where(v > self.limit, self.limit, jnp.where(v < -self.limit, -self.limit, v))


@dataclasses.dataclass(frozen=True)
class Ridge:
    r"""Decoupled weight decay: $h(z) = (\text{strength}/2)\,|z|^2$.

    Args:
        strength: the weight of the squared norm.

    Raises:
        ValueError: if `strength` is not a finite number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Ridge
        >>> print(Ridge(2.0).prox(jnp.array([3.0]), step=0.25))
        [2.]
    """

    strength: float = 1e-4

    def __post_init__(self):
        _numbers.check("Ridge", "strength", self.strength, finite=True, schedule=False)

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """The shrunken point v / (1 + step * strength)."""
        return v / (1 + step * self.strength)
