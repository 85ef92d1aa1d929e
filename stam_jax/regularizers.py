"""Regularizers h of the constrained block z, each given by its prox.

A regularizer is any hashable object with one method, `prox(v, step)`, the minimizer over u of
`h(u) + |u - v|^2 / (2 step)`. One that also has `value(z)`, h itself, can be part of an objective that is
measured.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from stam_jax import _numbers


class Regularizer(Protocol):
    """What the iteration asks of a regularizer; any hashable object with this method serves."""

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """The minimizer over u of h(u) + |u - v|^2 / (2 step), in the shape and dtype of v."""
        ...


@runtime_checkable
class HasValue(Regularizer, Protocol):
    """A regularizer that can say what it costs; `diagnostics.objective` asks for it."""

    def value(self, z: jax.Array) -> jax.Array:
        """h(z), a scalar of at least 0, infinite where z is not allowed; in float32 at least."""
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
        >>> from stam_jax.regularizers import Box
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

    def value(self, z: jax.Array) -> jax.Array:
        """0 in the box, infinite outside."""
        # The limit as the prox rounds it, to the digits of z.
        return jnp.where(jnp.all(jnp.abs(z) <= jnp.asarray(self.limit, z.dtype)), 0.0, jnp.inf)


@dataclasses.dataclass(frozen=True)
class Ridge:
    r"""Decoupled weight decay: $h(z) = (\text{strength}/2)\,|z|^2$.

    Args:
        strength: the weight of the squared norm.

    Raises:
        ValueError: if `strength` is not a finite number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.regularizers import Ridge
        >>> print(Ridge(2.0).prox(jnp.array([3.0]), step=0.25))
        [2.]
    """

    strength: float = 1e-4

    def __post_init__(self):
        _numbers.check("Ridge", "strength", self.strength, finite=True, schedule=False)

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """The shrunken point v / (1 + step * strength)."""
        return v / (1 + step * self.strength)

    def value(self, z: jax.Array) -> jax.Array:
        """Half the strength times the squared norm."""
        return self.strength / 2 * jnp.sum(jnp.square(_widened(z)))


def _widened(v: jax.Array) -> jax.Array:
    """V in the dtype that sums over it are taken in: float32 at least."""
    return v.astype(jnp.promote_types(v.dtype, jnp.float32))


def soft_threshold(v: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
    """The prox of threshold * |u|_1: each entry moved toward 0 by the threshold, and no further."""
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


@dataclasses.dataclass(frozen=True)
class L1:
    r"""Sparsity: $h(z) = \text{strength}\,|z|_1$.

    Args:
        strength: the weight of the norm.

    Raises:
        ValueError: if `strength` is not a finite number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.regularizers import L1
        >>> print(L1(2.0).prox(jnp.array([3.0, -0.1]), step=0.25))
        [ 2.5 -0. ]
    """

    strength: float = 1e-4

    def __post_init__(self):
        _numbers.check("L1", "strength", self.strength, finite=True, schedule=False)

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """The point moved toward 0 by step * strength, entry by entry."""
        return soft_threshold(v, step * self.strength).astype(v.dtype)

    def value(self, z: jax.Array) -> jax.Array:
        """The strength times the sum of absolute values."""
        return self.strength * jnp.sum(jnp.abs(_widened(z)))


@dataclasses.dataclass(frozen=True)
class GroupLasso:
    r"""Sparsity by output channels: $h(z) = \text{strength} \sum_c |z_c|_2$.

    Args:
        strength: the weight of the norms.
        axis: the output-channel axis: -1 for Flax's kernels, 0 for Equinox's and PyTorch's weights.

    Raises:
        ValueError: if `strength` is not a finite number of at least 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax.regularizers import GroupLasso
        >>> print(GroupLasso(2.5).prox(jnp.array([[3.0, 0.1], [4.0, 0.1]]), step=1.0))
        [[1.5 0. ]
         [2.  0. ]]
    """

    strength: float = 1e-4
    axis: int = -1

    def __post_init__(self):
        _numbers.check("GroupLasso", "strength", self.strength, finite=True, schedule=False)

    def prox(self, v: jax.Array, step: jax.typing.ArrayLike) -> jax.Array:
        """Each channel shortened by step * strength, to 0 at the shortest."""
        length = self._lengths(v)
        kept = jnp.maximum(length - step * self.strength, 0)
        return (v * jnp.where(length > 0, kept / jnp.where(length > 0, length, 1), 0)).astype(v.dtype)

    def value(self, z: jax.Array) -> jax.Array:
        """The strength times the sum of the channels' lengths."""
        return self.strength * jnp.sum(self._lengths(z))

    def _lengths(self, v: jax.Array) -> jax.Array:
        """The length of each channel, with the axes of v."""
        axes = tuple(i for i in range(v.ndim) if i != self.axis % max(v.ndim, 1))
        return jnp.sqrt(jnp.sum(jnp.square(_widened(v)), axis=axes, keepdims=True))
