"""The methods under comparison, at their settings, as Optax optimizers."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stam_jax
from experiments.config import SettingsError, TrainSettings
from stam_jax import relaxations, schedules

Quantizers = Mapping[str, stam_jax.Quantizer | None]


def choose(params: Any, settings: TrainSettings) -> Quantizers:
    """What is quantized, and how: every kernel but those excluded, by patterns as `stam_jax.stam` takes them.

    Args:
        params: the weights of the network; shapes alone do.
        settings: of the run.

    Raises:
        SettingsError: if a pattern of `settings.exclude` matches nothing, no kernel is left, or the quantizer
            does not have the scale.
    """
    float_instead = "For a float network use --method float."
    if "*" in settings.exclude:
        raise SettingsError(f"--exclude: '*' leaves no kernel quantized. {float_instead}")
    quantizers = dict.fromkeys(settings.exclude) | {"*": _quantizer(settings)}
    try:
        stam_jax.tabulate(params, quantizers)
    except ValueError as error:
        raise SettingsError(f"--exclude: {error} {float_instead}") from error
    return quantizers


def _quantizer(settings: TrainSettings) -> stam_jax.Quantizer:
    """The quantizer of the kernels.

    Raises:
        SettingsError: if it has no scale that could be 1.
    """
    axis = {"channel": -1, "tensor": (), "none": -1}[settings.scale]
    if settings.quantizer == "least_squares":
        if settings.scale == "none":
            raise SettingsError("--scale none: least_squares has two magnitudes, and no scale to be 1.")
        return stam_jax.LeastSquares(axis=axis)
    scale = 1.0 if settings.scale == "none" else None
    match settings.quantizer:
        case "binary":
            return stam_jax.Binary(axis=axis, scale=scale)
        case "ternary":
            return stam_jax.Ternary(axis=axis, scale=scale)
        case "uniform":
            return stam_jax.Uniform(bits=settings.bits, axis=axis, scale=scale)
        case "power_of_two":
            return stam_jax.PowerOfTwo(bits=settings.bits, axis=axis, scale=scale)


def build(settings: TrainSettings, quantizer: Quantizers, *, steps: int, epoch: int) -> Any:
    """The optimizer of a run.

    Args:
        settings: of the run.
        quantizer: what is quantized, and how; see `choose`.
        steps: steps of the whole run.
        epoch: steps of one epoch.

    Returns:
        An `optax.GradientTransformation`: SGD or AdamW with weight decay, the same for all methods, and the
        method behind it, or around it. Around it the decay sees the latent weights. Where a method goes
        around in any case, the decay of the weights in use comes before it.

    Raises:
        SettingsError: if the learning rate is to fall after an epoch that the run does not have, or a setting
            is given that the method cannot have.
    """
    _check_method_has_its_own(settings)
    learning_rate = _warmed_up(_schedule(settings, steps=steps, epoch=epoch), settings, epoch=epoch)
    hard_from = max(round(settings.hard_from * steps), 1)
    # Of the leaves of these networks kernels alone have two axes and more.
    is_kernel = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=is_kernel)
    sgd = optax.sgd(learning_rate, settings.momentum, settings.nesterov)
    optimizer = optax.chain(decay, sgd)
    if settings.optimizer == "adamw":
        moments = optax.scale_by_adam(settings.momentum, nesterov=settings.nesterov)
        optimizer = optax.chain(moments, decay, optax.scale_by_learning_rate(learning_rate))
    match settings.method:
        case "float":
            return optimizer
        case "stam_proximal":
            if settings.optimizer != "sgd" or settings.decay_latent:
                raise SettingsError(
                    "--method stam_proximal takes its step itself, from the weights in use: it has neither "
                    "--optimizer adamw nor --decay-latent."
                )
            first, last = settings.penalty
            grown = schedules.geometric(first, growth=(last / first) ** (1 / hard_from))
            penalty = lambda count: jnp.where(count < hard_from, grown(count), jnp.inf)
            proximal = stam_jax.stam_proximal(learning_rate, penalty, quantizer=quantizer)
            return optax.chain(decay, optax.trace(settings.momentum, settings.nesterov), proximal)
        case "bop":  # Its quantized weights take plain gradients; the optimizer is that of the others.
            return stam_jax.bop(optimizer, adaptivity=1e-3, threshold=1e-4, quantizer=quantizer)
        case "straight_through" | "straight_through_clipped" | "admm_quant":
            around = _around(settings, hard_from=hard_from, epoch=epoch, quantizer=quantizer)
            if settings.decay_latent:
                return around(optimizer)
            if settings.optimizer != "sgd":
                raise SettingsError(
                    f"--optimizer adamw: {settings.method} goes around it, where weight decay sees the "
                    "latent weights; say so by --decay-latent."
                )
            return optax.chain(decay, around(sgd))
    method = _behind(
        settings, learning_rate=learning_rate, hard_from=hard_from, epoch=epoch, quantizer=quantizer
    )
    return method(optimizer) if settings.decay_latent else optax.chain(optimizer, method())


def _around(
    settings: TrainSettings, *, hard_from: int, epoch: int, quantizer: Quantizers
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    """A method that needs the gradient, and so goes around an optimizer."""
    if settings.method != "admm_quant":
        clip = {} if settings.method == "straight_through_clipped" else {"clip": math.inf}
        return functools.partial(stam_jax.straight_through, quantizer=quantizer, **clip)
    return functools.partial(
        stam_jax.admm_quant,
        # A penalty of 1 to the sum of gradients that momentum makes, which takes in the penalty's own.
        penalty=1 - settings.momentum,
        dual_every=epoch,
        hard_from=hard_from,
        quantizer=quantizer,
    )


def _behind(
    settings: TrainSettings,
    *,
    learning_rate: optax.Schedule,
    hard_from: int,
    epoch: int,
    quantizer: Quantizers,
) -> Callable[..., optax.GradientTransformation]:
    """A method that takes the step of an optimizer, and so goes around one or stands behind it."""
    common = {"hard_from": hard_from, "quantizer": quantizer}
    match settings.method:
        case "binary_connect":
            return functools.partial(stam_jax.binary_connect, quantizer=quantizer)
        case "binary_relax":
            # The paper's 200 epochs, told in shares of the run: the strength ends phase I at 1.04^150.
            growth = 1.04 ** (200 / settings.epochs)
            return functools.partial(stam_jax.binary_relax, growth_every=epoch, growth=growth, **common)
        case "prox_quant":
            relaxed = jnp.arange(hard_from)
            area = max(float(jnp.vdot(jax.vmap(learning_rate)(relaxed), relaxed)), 1e-9)
            growth = settings.threshold / area
            threshold = lambda count: learning_rate(count) * growth * count
            return functools.partial(stam_jax.prox_quant, threshold=threshold, **common)
        case "parq":
            return functools.partial(stam_jax.parq, **common)
        case "md_tanh":
            growth = 100 ** (epoch / hard_from)
            return functools.partial(stam_jax.md_tanh, growth=growth, growth_every=epoch, **common)
    # With the linear relaxation and the projection last this is `stam_jax.stam`; with a fixed inertia of 1 in
    # the place of its own, the relaxation of BinaryRelax as torchao has it.
    is_stam = settings.method == "stam"
    return functools.partial(
        stam_jax.three_block_splitting,
        relaxation=_relaxation(settings, hard_from),
        inertia=stam_jax.StepInertia(settings.hold) if is_stam else settings.inertia,
        project=settings.project,
        quantizer=quantizer,
    )


_METHOD_OF = dict.fromkeys(("relaxation", "hold", "project"), "stam") | {
    "inertia": "linear_blend",
    "penalty": "stam_proximal",
    "threshold": "prox_quant",
}


def _check_method_has_its_own(settings: TrainSettings) -> None:
    """See that no setting is given that is another method's.

    Raises:
        SettingsError: if one is.
    """
    plain = TrainSettings()
    for name, method in _METHOD_OF.items():
        if settings.method != method and getattr(settings, name) != getattr(plain, name):
            option = name.replace("_", "-")
            raise SettingsError(f"--{option}: only with --method {method}; got --method {settings.method}.")


def _relaxation(settings: TrainSettings, hard_from: int) -> relaxations.Relaxation:
    """The map of `stam` from the latent weights and the quantized ones to the relaxed ones."""
    annealed = schedules.linear_to_hard(hard_from)
    match settings.relaxation:
        case "linear":
            return relaxations.LinearBlend(annealed)
        case "affine":
            return relaxations.PiecewiseAffine(lambda count: 1 - annealed(count))
        case "squared":
            # From 1 to the strength at which BinaryRelax's paper ends phase I, 1.04^150.
            grown = schedules.geometric(1.0, growth=1.04 ** (150 / hard_from))
            return relaxations.HardFrom(relaxations.SquaredDistance(grown), hard_from)
        case "tanh":
            grown = schedules.geometric(1.0, growth=100 ** (1 / hard_from))
            return relaxations.HardFrom(relaxations.ScaledTanh(grown), hard_from)


def _warmed_up(schedule: optax.Schedule, settings: TrainSettings, *, epoch: int) -> optax.Schedule:
    """A learning rate that grows over the first epochs to what it is otherwise.

    The first step is not of size 0: it would teach nothing.
    """
    if settings.warmup_epochs >= settings.epochs:
        raise SettingsError(
            f"--warmup-epochs: {settings.warmup_epochs} should be less than --epochs, {settings.epochs}."
        )
    if not settings.warmup_epochs:
        return schedule
    steps = settings.warmup_epochs * epoch
    return lambda step: schedule(step) * jnp.minimum((step + 1) / steps, 1.0)


def _schedule(settings: TrainSettings, *, steps: int, epoch: int) -> optax.Schedule:
    """The learning rate: to 0 along a cosine or linearly, or tenfold less after each of some epochs."""
    if settings.decay_epochs and settings.decay_from is not None:
        raise SettingsError("--decay-epochs and --decay-from: one of them, not both.")
    if settings.decay_from is not None:
        begin = round(settings.decay_from * steps)
        return optax.linear_schedule(settings.learning_rate, 0.0, steps - begin, transition_begin=begin)
    if not settings.decay_epochs:
        return optax.cosine_decay_schedule(settings.learning_rate, steps)
    ends = settings.decay_epochs
    if sorted(set(ends)) != list(ends) or ends[-1] >= settings.epochs:
        raise SettingsError(
            f"--decay-epochs: {', '.join(map(str, ends))} should rise and end before --epochs, "
            f"{settings.epochs}."
        )
    return optax.piecewise_constant_schedule(settings.learning_rate, {end * epoch: 0.1 for end in ends})
