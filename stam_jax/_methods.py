"""`stam`, its proximal form, and the published methods that are configurations of `three_block_splitting`."""

import math

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, schedules
from stam_jax._assignment import Quantizers
from stam_jax._inertia import StepInertia
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._splitting import three_block_splitting
from stam_jax.quantizers import Binary
from stam_jax.regularizers import Box, Regularizer
from stam_jax.relaxations import (
    Hard,
    HardFrom,
    L1Distance,
    LinearBlend,
    PiecewiseAffine,
    ScaledTanh,
    SquaredDistance,
)


def stam(
    optimizer: optax.GradientTransformation | None = None,
    *,
    hard_from: int,
    quantizer: Quantizers = Binary(),
    hold: ScalarOrSchedule = 16.0,
) -> optax.GradientTransformationExtraArgs:
    r"""STAM with inertia, around any Optax optimizer or as a link of a chain.

    With u the optimizer's step, made from the latent weights v, and y the nearest quantized weights,

    $$w = v + u, \qquad y = P_Q(w), \qquad x = (1 - \theta_k)\,w + \theta_k\,y, \qquad
      v \leftarrow x + \kappa_k\,(w - x),$$

    where $\theta_k$ grows in a straight line from 0 to 1 at step `hard_from`, and the inertia $\kappa_k$, a
    little below 1, follows from the size of the steps as in `StepInertia`. The network runs on the relaxed
    weights x, which the parameters hold: train as always. The quantized network is `quantize(params)`:
    evaluate and ship that.

    `stam(optax.adamw(1e-3), hard_from=...)` is the form to prefer: weight decay and moments
    see the latent weights. `optax.chain(optax.sgd(0.1), stam(hard_from=...))` takes the step of the
    transforms before it. `optax.MultiSteps` goes around either; inside `stam`, `hard_from` counts its
    micro-steps, and signs are held less firmly.
    `optax.lookahead` works with neither, as a step starts from the latent weights and undoes what else has
    moved the parameters.

    Args:
        optimizer: an Optax optimizer with its learning rate, such as `optax.adamw(1e-3)`; None for a link of
            a chain.
        hard_from: the step from which the network is hard, x = y; about three quarters of all steps.
        quantizer: what is quantized, and how:

            * a quantizer such as `Binary()`, for every floating-point leaf of rank 2 or more that is called
              `kernel`, `weight` or `w`, but those of embeddings and of normalization;
            * a dictionary from patterns over paths, with the wildcards of the shell, to quantizers or None:
              the first match decides, a pattern that names a module covers all weights below it, and `"*"`
              alone stands for the default leaves: `{"head": None, "*/query/kernel": Binary(axis=(-2, -1)),
              "*": Binary()}`;
            * a function `(path, jax.ShapeDtypeStruct) -> quantizer or None`. `optax.inject_hyperparams` takes
              functions for schedules: give it `static_args=("quantizer",)`.

            `tabulate(params, quantizer)` shows the outcome. Give the same to `quantize` and `pack`.
        hold: how firmly signs are held against the noise of the steps: a number from 0 (they are not held),
            or a schedule. It has no unit. The default was chosen behind SGD with momentum 0.9 and AdamW, at
            steps of 0.1% to 1% of the weights. See `StepInertia`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `SplittingState`; its `update` needs the
        parameters.

    Raises:
        ValueError, TypeError: as `three_block_splitting`; also for a `hard_from` that is no whole number.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from stam_jax import quantize, stam
        >>> target = jnp.array([[0.9, -0.2], [-1.1, 0.4]])
        >>> loss = lambda params: jnp.sum((params["kernel"] - target) ** 2)
        >>> params = {"kernel": jnp.zeros((2, 2))}
        >>> optimizer = stam(optax.sgd(0.1), hard_from=75)
        >>> state = optimizer.init(params)
        >>> for _ in range(100):
        ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(jnp.sign(quantize(params)["kernel"]))
        [[ 1. -1.]
         [-1.  1.]]

    References:
        Bian, Liu and Zhang, A stochastic three-block splitting algorithm and its application to quantized
        deep neural networks, arXiv:2204.11065. Its equations were not available: the iteration is this
        project's own, docs/theory.md.
    """
    _numbers.check_steps("stam", ("hard_from", hard_from, 0))
    _numbers.check("stam", "hold", hold, finite=True)
    return three_block_splitting(
        optimizer,
        name="stam",
        quantizer=quantizer,
        relaxation=LinearBlend(schedules.linear_to_hard(hard_from)),
        inertia=StepInertia(hold),
    )


def stam_proximal(
    learning_rate: ScalarOrSchedule,
    penalty: ScalarOrSchedule,
    *,
    quantizer: Quantizers = Binary(),
    regularizer: Regularizer | None = None,
    regularizer_penalty: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal STAM, the form of the theorem: a complete optimizer, without a copy of the weights.

    It minimizes

    $$f(x) + g(y) + h(z) + (\rho/2)|x-y|^2 + (\tau/2)|x-z|^2,$$

    where f is the loss, g the indicator of the quantized set and h a regularizer: y and z exactly, x by a
    proximal step along the stochastic gradient d,

    $$y = P_Q(x), \qquad z = \mathrm{prox}_{h/\tau}(x), \qquad
      x \leftarrow \frac{x - \eta d + \eta\rho y + \eta\tau z}{1 + \eta(\rho + \tau)}.$$

    For a smooth f, plain minibatch gradients, constant finite penalties and a step of order $K^{-1/2}$, an
    iterate drawn at random from $K = O(\varepsilon^{-4})$ steps has an expected stationarity residual of at
    most $\varepsilon$. Momentum and Adam before it are not covered. Leaves that are not quantized take the
    step $-\eta d$.

    Args:
        learning_rate: the step size $\eta$, at least 0. It, and the numbers below, may be schedules.
        penalty: $\rho$ from 0 to infinity, which is the hard network.
        quantizer: what is quantized, and how, as in `stam`.
        regularizer: h, such as `regularizers.L1(1e-4)`; None for none.
        regularizer_penalty: $\tau$, at least 0 and finite; it goes with a regularizer.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain: it multiplies by the learning
        rate.

    Raises:
        ValueError, TypeError: as `three_block_splitting`; also for a regularizer without a penalty.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import stam_proximal
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> optimizer = stam_proximal(0.5, penalty=2.0)
        >>> updates, _ = optimizer.update({"kernel": jnp.zeros((2, 1))}, optimizer.init(params), params)
        >>> print(optax.apply_updates(params, updates)["kernel"].T)
        [[2.5 1.5]]

    References:
        This project's formulation, docs/theory.md, for arXiv:2204.11065.
    """
    where = "stam_proximal"
    _numbers.check(where, "learning_rate", learning_rate, finite=True)
    _numbers.check(where, "penalty", penalty)
    _numbers.check(where, "regularizer_penalty", regularizer_penalty, finite=True)
    if regularizer is not None and _numbers.is_fixed_at(regularizer_penalty, 0):
        raise ValueError(
            f"{where}: regularizer needs a regularizer_penalty above 0; got {regularizer_penalty!r}."
        )
    has_z = 1.0 if regularizer is not None else 0.0
    damping = lambda count: (
        has_z * _numbers.at(learning_rate, count) * _numbers.at(regularizer_penalty, count)
    )

    def strength(count: jax.typing.ArrayLike) -> jax.Array:
        """Eta rho / (1 + eta tau); infinite with rho, also at a step size of 0."""
        eta, rho = jnp.asarray(_numbers.at(learning_rate, count)), jnp.asarray(_numbers.at(penalty, count))
        finite = jnp.isfinite(rho)
        return jnp.where(finite, eta * jnp.where(finite, rho, 0) / (1 + damping(count)), math.inf)

    return three_block_splitting(
        optax.scale_by_learning_rate(learning_rate),
        name=where,
        quantizer=quantizer,
        relaxation=SquaredDistance(strength),
        inertia=0.0,
        project="first",
        regularizer=regularizer,
        regularizer_step=lambda count: 1 / jnp.maximum(_numbers.at(regularizer_penalty, count), 1e-30),
        regularizer_strength=damping,
    )


def binary_connect(
    optimizer: optax.GradientTransformation | None = None,
    *,
    clip: float = 1.0,
    quantizer: Quantizers = Binary(scale=1.0),
) -> optax.GradientTransformationExtraArgs:
    r"""BinaryConnect: the network runs on the quantized weights, the gradients move clipped latent ones.

    $$w = \mathrm{clip}(v + u, -c, c), \qquad x = P_Q(w), \qquad v \leftarrow w.$$

    With `quantizer=Binary()` the quantized weights have XNOR-Net's scales.

    Args:
        optimizer: as in `stam`.
        clip: c, half the width of the box of the latent weights, in their units; infinity for no box.
        quantizer: what is quantized, and how, as in `stam`; the paper's set is {-1, +1}.

    Returns:
        As `stam`.

    Raises:
        ValueError, TypeError: as `stam`; also for a negative `clip`.

    Example:
        >>> import optax
        >>> from stam_jax import binary_connect
        >>> optimizer = binary_connect(optax.sgd(0.1, momentum=0.9))

    References:
        Courbariaux et al., BinaryConnect, arXiv:1511.00363; Rastegari et al., XNOR-Net, arXiv:1603.05279.
    """
    where = "binary_connect"
    return three_block_splitting(
        optimizer,
        name=where,
        quantizer=quantizer,
        relaxation=Hard(),
        inertia=1.0,
        regularizer=_box(where, clip),
    )


def _box(where: str, clip: float) -> Regularizer | None:
    """The constraint that keeps latent weights within the clip."""
    _numbers.check(where, "clip", clip, schedule=False)
    return None if _numbers.is_fixed_at(clip, math.inf) else Box(clip)


def binary_relax(
    optimizer: optax.GradientTransformation | None = None,
    *,
    growth_every: int,
    hard_from: int,
    strength: float = 1.0,
    growth: float = 1.04,
    quantizer: Quantizers = Binary(axis=()),
) -> optax.GradientTransformationExtraArgs:
    r"""BinaryRelax: the weights are drawn toward the quantized ones ever more strongly, then set to them.

    $$w = v + u, \qquad x = \frac{w + \lambda_k P_Q(w)}{1 + \lambda_k}, \qquad v \leftarrow w,$$

    where $\lambda_k$ grows by a factor every so many steps and is infinite from step `hard_from`.

    Args:
        optimizer: as in `stam`.
        growth_every: the steps between two growths of $\lambda$; the paper's is an epoch.
        hard_from: the step from which the network is hard; the paper's is at three quarters of the run.
        strength: the first $\lambda$.
        growth: the factor, at least 1.
        quantizer: what is quantized, and how, as in `stam`; the paper has one scale per layer.

    Returns:
        As `stam`.

    Raises:
        ValueError, TypeError: as `stam`; also for a `growth_every` or `growth` below 1, or a negative
            `strength`.

    Example:
        >>> import optax
        >>> from stam_jax import binary_relax
        >>> epoch = 390
        >>> sgd = optax.sgd(0.1, momentum=0.9)
        >>> optimizer = binary_relax(sgd, growth_every=epoch, hard_from=150 * epoch)

    References:
        Yin et al., BinaryRelax, arXiv:1801.06313.
    """
    where = "binary_relax"
    _numbers.check_steps(where, ("growth_every", growth_every, 1), ("hard_from", hard_from, 0))
    _numbers.check_each(where, ("strength", strength, 0), ("growth", growth, 1))
    squared = SquaredDistance(schedules.geometric(strength, growth=growth, every=growth_every))
    return three_block_splitting(
        optimizer, name=where, quantizer=quantizer, relaxation=HardFrom(squared, hard_from), inertia=1.0
    )


def prox_quant(
    optimizer: optax.GradientTransformation | None = None,
    *,
    threshold: ScalarOrSchedule,
    hard_from: int,
    clip: float = 1.0,
    quantizer: Quantizers = Binary(scale=1.0),
) -> optax.GradientTransformationExtraArgs:
    r"""ProxQuant: a step, then the prox of the l1 distance to the quantized set.

    $$w = \mathrm{clip}(x + u, -c, c), \qquad x \leftarrow P_Q(w) + \mathrm{soft}(w - P_Q(w), t_k),$$

    and $x = P_Q(w)$ from step `hard_from`. It keeps no copy of the weights.

    Args:
        optimizer: as in `stam`.
        threshold: $t_k$, in the units of the weights, a number or a schedule; the paper's is the learning
            rate times a strength that grows with the steps.
        hard_from: the step from which the network is hard.
        clip: c, half the width of the box of the weights, in their units; infinity for no box.
        quantizer: what is quantized, and how, as in `stam`; the paper's set is {-1, +1}.

    Returns:
        As `stam`.

    Raises:
        ValueError, TypeError: as `stam`; also for a negative `threshold` or `clip`.

    Example:
        >>> import optax
        >>> from stam_jax import prox_quant
        >>> threshold = lambda step: 1e-2 * 1e-4 * step
        >>> optimizer = prox_quant(optax.adam(1e-2), threshold=threshold, hard_from=60_000)

    References:
        Bai, Wang and Liberty, ProxQuant, arXiv:1810.00861.
    """
    where = "prox_quant"
    _numbers.check(where, "threshold", threshold)
    _numbers.check_steps(where, ("hard_from", hard_from, 0))
    return three_block_splitting(
        optimizer,
        name=where,
        quantizer=quantizer,
        relaxation=HardFrom(L1Distance(threshold), hard_from),
        inertia=0.0,
        regularizer=_box(where, clip),
    )


def parq(
    optimizer: optax.GradientTransformation | None = None,
    *,
    hard_from: int,
    anneal_from: int = 0,
    steepness: float = 10.0,
    quantizer: Quantizers = Binary(),
) -> optax.GradientTransformationExtraArgs:
    r"""PARQ: a piecewise-affine map whose slope grows until it is the projection.

    $$w = v + u, \qquad x = \mathrm{clip}(m + (w - m)/s_k,\ q_i,\ q_{i+1}), \qquad v \leftarrow w,$$

    between the levels $q_i$ and $q_{i+1}$ on both sides of w, with m halfway between them. The inverse slope
    $s_k$ falls from 1 to 0 along a sigmoid.

    Args:
        optimizer: as in `stam`.
        hard_from: the step from which the network is hard.
        anneal_from: the step until which the map is a clip to the outermost levels.
        steepness: of the sigmoid.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        As `stam`.

    Raises:
        ValueError, TypeError: as `stam`; also unless 0 <= `anneal_from` <= `hard_from`, or for a `steepness`
            below 0.001.

    Example:
        >>> import optax
        >>> from stam_jax import parq
        >>> optimizer = parq(optax.sgd(0.1, momentum=0.9), hard_from=60_000)

    References:
        Jin et al., PARQ: piecewise-affine regularized quantization, arXiv:2503.15748.
    """
    where = "parq"
    _numbers.check_steps(where, ("hard_from", hard_from, 0), ("anneal_from", anneal_from, 0))
    _numbers.check_each(where, ("steepness", steepness, 1e-3))
    inverse_slope = schedules.sigmoid_inverse_slope(hard_from, start=anneal_from, steepness=steepness)
    return three_block_splitting(
        optimizer, name=where, quantizer=quantizer, relaxation=PiecewiseAffine(inverse_slope), inertia=1.0
    )


def md_tanh(
    optimizer: optax.GradientTransformation | None = None,
    *,
    hard_from: int,
    growth: float = 1.02,
    growth_every: int = 200,
    quantizer: Quantizers = Binary(scale=1.0),
) -> optax.GradientTransformationExtraArgs:
    r"""Mirror descent with a tanh that steepens, in its numerically stable form (MD-tanh-S).

    $$w = v + u, \qquad x = \tanh(\beta_k w), \qquad v \leftarrow w,$$

    where $\beta_k$ grows by a factor every so many steps; from step `hard_from`, $x = P_Q(w)$. With scales it
    is $s \tanh(\beta_k w/s)$.

    Args:
        optimizer: as in `stam`.
        hard_from: the step from which the network is hard.
        growth: the factor, at least 1. The default, and the next, are those of the authors' script for
            CIFAR-10, which runs for 100,000 steps behind Adam.
        growth_every: the steps between two growths of $\beta$.
        quantizer: what is quantized, and how, as in `stam`; the paper's set is {-1, +1}.

    Returns:
        As `stam`.

    Raises:
        ValueError, TypeError: as `stam`; also for a `growth` or `growth_every` below 1.

    Example:
        >>> import optax
        >>> from stam_jax import md_tanh
        >>> optimizer = md_tanh(optax.adam(1e-3), hard_from=75_000)

    References:
        Ajanthan et al., Mirror descent view for neural network quantization, arXiv:1910.08237.
    """
    where = "md_tanh"
    _numbers.check_steps(where, ("hard_from", hard_from, 0), ("growth_every", growth_every, 1))
    _numbers.check_each(where, ("growth", growth, 1))
    tanh = ScaledTanh(schedules.geometric(1.0, growth=growth, every=growth_every))
    return three_block_splitting(
        optimizer, name=where, quantizer=quantizer, relaxation=HardFrom(tanh, hard_from), inertia=1.0
    )
