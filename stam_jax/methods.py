"""The field's methods that are configurations of `stam`."""

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, schedules
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._state import Mask
from stam_jax._transform import stam
from stam_jax.quantizers import Binary, Quantizer
from stam_jax.regularizers import Box
from stam_jax.relaxations import (
    Hard,
    HardFrom,
    L1Distance,
    PiecewiseAffine,
    ScaledTanh,
    SquaredDistance,
)


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
    _numbers.check_each(
        "binary_relax",
        ("growth_every", growth_every, 1),
        ("hard_from", hard_from, 0),
        ("strength", strength, 0),
        ("growth", growth, 1),
    )
    lam = schedules.geometric(strength, growth=growth, every=growth_every)
    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=HardFrom(SquaredDistance(lam), hard_from),
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
    _numbers.check_each("prox_quant", ("growth", growth, 0), ("hard_from", hard_from, 0))

    def threshold(count: jax.typing.ArrayLike) -> jax.Array:
        return _numbers.at(learning_rate, count) * growth * jnp.asarray(count)

    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=HardFrom(L1Distance(threshold), hard_from),
        regularizer=None if clip is None else Box(clip),
        inertia=0.0,
        project="last",
        mask=mask,
    )


def parq(
    learning_rate: ScalarOrSchedule,
    *,
    hard_from: int,
    anneal_from: int = 0,
    steepness: float = 10.0,
    quantizer: Quantizer = Binary(),
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""PARQ: a float step, then a piecewise-affine map whose slope grows until it is the projection.

    $$w^+ = w - \eta d, \qquad x^+ = \mathrm{clip}(m + (w^+ - m)/s_k,\ q_i,\ q_{i+1})$$

    between the levels $q_i$ and $q_{i+1}$ of Q on both sides of $w^+$, with m halfway between them. The
    inverse slope $s_k$ falls from 1 to 0 along a sigmoid. It is `stam` with inertia 1, the piecewise-affine
    relaxation and projection last.

    Args:
        learning_rate: the step size, a number or a schedule.
        hard_from: the step from which on the weights are quantised.
        anneal_from: the step until which the map is but a clip to the outermost levels.
        steepness: of the sigmoid.
        quantizer: the set Q; it must have `levels`, as those of this package do.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also unless 0 <= `anneal_from` < `hard_from`, or for a `steepness`
            below 0.001.

    Example:
        >>> import optax
        >>> from stam_jax import parq
        >>> optimizer = optax.chain(optax.trace(0.9), parq(0.1, hard_from=60_000))

    References:
        Jin et al., PARQ: piecewise-affine regularized quantization, arXiv:2503.15748.
    """
    _numbers.check_each(
        "parq", ("hard_from", hard_from, 1), ("anneal_from", anneal_from, 0), ("steepness", steepness, 1e-3)
    )
    inverse_slope = schedules.sigmoid_inverse_slope(hard_from, start=anneal_from, steepness=steepness)
    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=PiecewiseAffine(inverse_slope),
        inertia=1.0,
        project="last",
        mask=mask,
    )


def md_tanh(
    learning_rate: ScalarOrSchedule,
    *,
    hard_from: int,
    growth: float = 1.02,
    growth_every: int = 200,
    quantizer: Quantizer = Binary(scale=None),
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Mirror descent with a tanh that steepens, in its numerically stable form (MD-tanh-S).

    $$w^+ = w - \eta d, \qquad x^+ = \tanh(\beta_k w^+)$$

    where the gradient at x moves the dual variables w, and $\beta_k$ grows by a factor every so many steps;
    from step `hard_from` on $x^+ = P_Q(w^+)$. With scales it is $\alpha \tanh(\beta_k w^+/\alpha)$. It is
    `stam` with inertia 1, the scaled tanh and projection last.

    Args:
        learning_rate: the step size, a number or a schedule.
        hard_from: the step from which on the weights are quantised.
        growth: the factor, at least 1. The default, and the next, are those of the authors' script for
            CIFAR-10, which runs for 100,000 steps behind Adam.
        growth_every: the steps between two growths of $\beta$.
        quantizer: the set Q; the paper's binary one is {-1, +1}. It must have `levels`.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also for a `growth` or `growth_every` below 1, or a negative
            `hard_from`.

    Example:
        >>> import optax
        >>> from stam_jax import md_tanh
        >>> optimizer = optax.chain(optax.scale_by_adam(), md_tanh(1e-3, hard_from=75_000))

    References:
        Ajanthan et al., Mirror descent view for neural network quantization, arXiv:1910.08237.
    """
    _numbers.check_each(
        "md_tanh", ("hard_from", hard_from, 0), ("growth", growth, 1), ("growth_every", growth_every, 1)
    )
    beta = schedules.geometric(1.0, growth=growth, every=growth_every)
    return stam(
        learning_rate,
        quantizer=quantizer,
        relaxation=HardFrom(ScaledTanh(beta), hard_from),
        inertia=1.0,
        project="last",
        mask=mask,
    )
