"""The field's methods as configurations of `stam`."""

import math

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._transform import Mask, stam
from stam_jax.quantizers import Binary, Quantizer
from stam_jax.regularizers import Box
from stam_jax.relaxations import Hard, L1Distance, SquaredDistance


def binary_connect(
    learning_rate: ScalarOrSchedule,
    *,
    quantizer: Quantizer = Binary(scale=None),
    clip: float | None = 1.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""BinaryConnect: the network runs on the quantised weights, the gradients move clipped float ones.

    $$w^+ = \mathrm{clip}(w - \eta d, -c, c), \qquad x^+ = P_Q(w^+).$$

    It is `stam` with inertia 1, the hard relaxation, projection last, and the box as an exact constraint.
    With `Binary(scale="channel")` the binary weights have XNOR-Net's scales, with gradients passed on as in
    BinaryConnect.

    Args:
        learning_rate: the step size, a number or a schedule.
        quantizer: the set Q; the paper's is {-1, +1}.
        clip: half the width c of the box; None for no clipping.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import binary_connect, hard_params
        >>> params = {"kernel": jnp.array([[0.2, -3.0]])}
        >>> state = binary_connect(0.1).init(params)
        >>> print(hard_params(state, params)["kernel"])
        [[ 1. -1.]]

    References:
        Courbariaux et al., BinaryConnect, arXiv:1511.00363; Rastegari et al., XNOR-Net, arXiv:1603.05279.
    """
    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=Hard(),
        regularizer=None if clip is None else Box(clip),
        inertia=1.0,
        project="last",
        mask=mask,
    )


def binary_relax(
    learning_rate: ScalarOrSchedule,
    *,
    growth_every: int,
    hard_from: int,
    strength: float = 1.0,
    growth: float = 1.04,
    quantizer: Quantizer = Binary(scale="tensor"),
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""BinaryRelax: the weights are drawn towards the quantised ones ever more strongly, then set to them.

    $$w^+ = w - \eta d, \qquad x^+ = \frac{w^+ + \lambda_k P_Q(w^+)}{1 + \lambda_k},$$

    where $\lambda_k$ grows by a factor every so many steps (phase I) and is infinite from step `hard_from`
    on (phase II). It is `stam` with inertia 1, the squared-distance relaxation and projection last.

    Args:
        learning_rate: the step size, a number or a schedule.
        growth_every: the steps between two growths of $\lambda$; the paper grows it each epoch.
        hard_from: the step at which phase II begins; the paper's is at three quarters of the run.
        strength: the first $\lambda$.
        growth: the factor, at least 1.
        quantizer: the set Q; the paper's has one scale per layer.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also for a `growth_every` or `growth` below 1, or a negative
            `hard_from` or `strength`.

    Example:
        >>> import optax
        >>> from stam_jax import binary_relax
        >>> steps_per_epoch, epochs = 390, 200
        >>> optimizer = optax.chain(
        ...     optax.trace(0.9),
        ...     binary_relax(0.1, growth_every=steps_per_epoch, hard_from=150 * steps_per_epoch),
        ... )

    References:
        Yin et al., BinaryRelax, arXiv:1801.06313.
    """
    for name, value, low in (
        ("growth_every", growth_every, 1),
        ("hard_from", hard_from, 0),
        ("strength", strength, 0),
        ("growth", growth, 1),
    ):
        _numbers.check("binary_relax", name, value, low=low, finite=True, schedule=False)

    def lam(count: jax.typing.ArrayLike) -> jax.Array:
        # Whole-number division: a quotient in float32 would be late by a step now and then.
        factor = jnp.power(1.0 * growth, jnp.floor_divide(count, growth_every))
        # The factor may outgrow its type and be infinite, and 0 times that is not 0.
        grown = jnp.where(strength == 0, 0.0, strength * factor)
        return jnp.where(jnp.asarray(count) < hard_from, grown, math.inf)

    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=SquaredDistance(lam),
        inertia=1.0,
        project="last",
        mask=mask,
    )


def prox_quant(
    learning_rate: ScalarOrSchedule,
    *,
    growth: float,
    hard_from: int,
    quantizer: Quantizer = Binary(scale=None),
    clip: float | None = 1.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ProxQuant: a proximal gradient step on the l1 distance to Q, of a strength that grows with the steps.

    $$w^+ = \mathrm{clip}(x - \eta d, -c, c), \qquad
      x^+ = P_Q(w^+) + \mathrm{soft}(w^+ - P_Q(w^+), \eta\,\lambda_k)$$

    with $\lambda_k = \text{growth} \cdot k$, and $x^+ = P_Q(w^+)$ from step `hard_from` on. It is `stam` with
    inertia 0, the l1-distance relaxation, projection last, and the box as an exact constraint. It keeps no
    copy of the weights.

    Args:
        learning_rate: the step size, a number or a schedule.
        growth: what the strength $\lambda$ grows by at each step.
        hard_from: the step from which on the weights are quantised.
        quantizer: the set Q; the paper's binary one is {-1, +1}.
        clip: half the width c of the box; None for no clipping.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also for a negative `growth` or `hard_from`.

    Example:
        >>> import optax
        >>> from stam_jax import prox_quant
        >>> optimizer = optax.chain(optax.scale_by_adam(), prox_quant(1e-2, growth=1e-4, hard_from=60_000))

    References:
        Bai, Wang and Liberty, ProxQuant, arXiv:1810.00861.
    """
    for name, value in (("growth", growth), ("hard_from", hard_from)):
        _numbers.check("prox_quant", name, value, finite=True, schedule=False)

    def threshold(count: jax.typing.ArrayLike) -> jax.Array:
        grown = _numbers.at(learning_rate, count) * growth * jnp.asarray(count)
        return jnp.where(jnp.asarray(count) < hard_from, grown, math.inf)

    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=L1Distance(threshold),
        regularizer=None if clip is None else Box(clip),
        inertia=0.0,
        project="last",
        mask=mask,
    )
