"""Schedules of the field, under its names: functions from the step count to a number.

Any function of the step count serves wherever this package takes a number, those of Optax too.
"""

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers


def geometric(start: float, *, growth: float, every: int = 1) -> optax.Schedule:
    r"""Growth by a factor every so many steps.

    At step k it is $\text{start} \cdot \text{growth}^{\lfloor k/\text{every} \rfloor}$. With the steps of an
    epoch as `every` it is BinaryRelax's growth per epoch.

    Args:
        start: the value at step 0.
        growth: the factor, at least 0; below 1 the value shrinks.
        every: the steps between two changes.

    Returns:
        A schedule.

    Raises:
        ValueError: for a negative `start` or `growth`, or an `every` that is no whole number of at least 1.

    Example:
        >>> from stam_jax import schedules
        >>> strength = schedules.geometric(1.0, growth=2.0, every=100)
        >>> print([float(strength(k)) for k in (0, 99, 100, 250)])
        [1.0, 1.0, 2.0, 4.0]
    """
    _numbers.check_each("geometric", ("start", start, 0), ("growth", growth, 0))
    _numbers.check_steps("geometric", ("every", every, 1))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # Whole-number division: a quotient in float32 would be late by a step now and then.
        factor = jnp.power(1.0 * growth, jnp.floor_divide(count, every))
        # The factor may outgrow its type and be infinite, and 0 times that is not 0.
        return start * jnp.where(start == 0, 0.0, factor)

    return schedule


def linear_to_hard(hard_from: int, *, start: int = 0) -> optax.Schedule:
    """The share of the way from float to hard, at an even pace: the theta of `LinearBlend`.

    Args:
        hard_from: the step from which on it is 1.
        start: the step until which it is 0.

    Returns:
        A schedule.

    Raises:
        ValueError: unless 0 <= `start` <= `hard_from`, both whole numbers.

    Example:
        >>> from stam_jax import schedules
        >>> theta = schedules.linear_to_hard(200, start=100)
        >>> print([float(theta(k)) for k in (0, 100, 150, 200, 300)])
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    _check_span("linear_to_hard", start, hard_from)
    return lambda count: _progress(count, start, hard_from)


def sigmoid_inverse_slope(hard_from: int, *, start: int = 0, steepness: float = 10.0) -> optax.Schedule:
    r"""PARQ's fall from 1 to 0 along a sigmoid: the inverse slope of `PiecewiseAffine`.

    With $t = (k - \text{start})/(\text{hard\_from} - \text{start})$ and the logistic function $\sigma$, it is
    $\sigma(c\,(1/2 - t))$, shifted and scaled to be 1 at t = 0 and 0 at t = 1, and constant outside.

    Args:
        hard_from: the step from which on it is 0.
        start: the step until which it is 1.
        steepness: c, at least 0.001; all but linear below 1.

    Returns:
        A schedule.

    Raises:
        ValueError: unless 0 <= `start` <= `hard_from`, both whole numbers, or for a `steepness` out of range.

    Example:
        >>> from stam_jax import schedules
        >>> inverse_slope = schedules.sigmoid_inverse_slope(200, start=100)
        >>> print([round(float(inverse_slope(k)), 3) for k in (0, 100, 125, 150, 200)])
        [1.0, 1.0, 0.93, 0.5, 0.0]

    References:
        Jin et al., PARQ: piecewise-affine regularized quantization, arXiv:2503.15748.
    """
    _check_span("sigmoid_inverse_slope", start, hard_from)
    _numbers.check("sigmoid_inverse_slope", "steepness", steepness, low=1e-3, finite=True, schedule=False)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        t = _progress(count, start, hard_from)
        at = lambda t: jax.nn.sigmoid(steepness * (0.5 - t))
        return jnp.where(t < 1, (at(t) - at(1.0)) / (at(0.0) - at(1.0)), 0.0)

    return schedule


def _progress(count: jax.typing.ArrayLike, start: int, hard_from: int) -> jax.Array:
    """How far a step is from start to hard_from, from 0 to 1; from hard_from on it is exactly 1."""
    length = jnp.maximum(1.0 * jnp.asarray(hard_from) - start, 1e-30)
    share = jnp.clip((1.0 * jnp.asarray(count) - start) / length, 0, 1)
    return jnp.where(jnp.asarray(count) >= hard_from, 1.0, share)


def _check_span(where: str, start: int, hard_from: int) -> None:
    _numbers.check_steps(where, ("start", start, 0), ("hard_from", hard_from, 0))
    is_traced = isinstance(start, jax.Array) or isinstance(hard_from, jax.Array)
    if not is_traced and not start <= hard_from:
        raise ValueError(f"{where}: start must be at most hard_from; got {start!r} and {hard_from!r}.")
