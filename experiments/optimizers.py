"""The methods under comparison, at their settings, as Optax optimizers."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stam_jax
from experiments.config import SettingsError, TrainSettings
from stam_jax import relaxations, schedules

Quantizers = Mapping[str, stam_jax.Binary | None]


def choose(params: Any, settings: TrainSettings) -> Quantizers:
    """What is quantized, and how: every kernel but those excluded, by patterns as `stam_jax.stam` takes them.

    Args:
        params: the weights of the network; shapes alone do.
        settings: of the run.

    Raises:
        SettingsError: if a pattern of `settings.exclude` matches nothing, or no kernel is left.
    """
    scales = {
        "channel": stam_jax.Binary(),
        "tensor": stam_jax.Binary(axis=()),
        "none": stam_jax.Binary(scale=1.0),
    }
    float_instead = "For a float network use --method float."
    if "*" in settings.exclude:
        raise SettingsError(f"--exclude: '*' leaves no kernel binary. {float_instead}")
    quantizers = dict.fromkeys(settings.exclude) | {"*": scales[settings.scale]}
    try:
        stam_jax.tabulate(params, quantizers)
    except ValueError as error:
        raise SettingsError(f"--exclude: {error} {float_instead}") from error
    return quantizers


def build(settings: TrainSettings, quantizer: Quantizers, *, steps: int, epoch: int) -> Any:
    """The optimizer of a run.

    Args:
        settings: of the run.
        quantizer: what is quantized, and how; see `choose`.
        steps: steps of the whole run.
        epoch: steps of one epoch.

    Returns:
        An `optax.GradientTransformation`: weight decay of the weights in use and SGD with momentum, the same
        for all methods but Bop, whose binary weights take plain gradients; and the method, behind SGD or
        around it.

    Raises:
        SettingsError: if the step size is to fall after an epoch that the run does not have, or a setting is
            given that is another method's.
    """
    _check_method_has_its_own(settings)
    learning_rate = _warmed_up(_schedule(settings, steps=steps, epoch=epoch), settings, epoch=epoch)
    hard_from = max(round(settings.hard_from * steps), 1)
    # Of the leaves of these networks kernels alone have two axes and more.
    is_kernel = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=is_kernel)
    sgd = optax.sgd(learning_rate, settings.momentum, settings.nesterov)
    match settings.method:
        case "float":
            return optax.chain(decay, sgd)
        case "binary_connect":
            method = stam_jax.binary_connect(quantizer=quantizer)
        case "straight_through":
            return optax.chain(decay, stam_jax.straight_through(sgd, clip=math.inf, quantizer=quantizer))
        case "straight_through_clipped":
            return optax.chain(decay, stam_jax.straight_through(sgd, quantizer=quantizer))
        case "binary_relax":
            # The paper's 200 epochs, told in shares of the run: the strength ends phase I at 1.04^150.
            method = stam_jax.binary_relax(
                growth_every=epoch,
                growth=1.04 ** (200 / settings.epochs),
                hard_from=hard_from,
                quantizer=quantizer,
            )
        case "prox_quant":
            relaxed = jnp.arange(hard_from)
            area = max(float(jnp.vdot(jax.vmap(learning_rate)(relaxed), relaxed)), 1e-9)
            growth = settings.threshold / area
            threshold = lambda count: learning_rate(count) * growth * count
            method = stam_jax.prox_quant(threshold=threshold, hard_from=hard_from, quantizer=quantizer)
        case "parq":
            method = stam_jax.parq(hard_from=hard_from, quantizer=quantizer)
        case "md_tanh":
            method = stam_jax.md_tanh(
                growth=100 ** (epoch / hard_from),
                growth_every=epoch,
                hard_from=hard_from,
                quantizer=quantizer,
            )
        case "admm_quant":
            # A penalty of 1 to the sum of gradients that momentum makes, which takes in the penalty's own.
            admm = stam_jax.admm_quant(
                sgd,
                penalty=1 - settings.momentum,
                dual_every=epoch,
                hard_from=hard_from,
                quantizer=quantizer,
            )
            return optax.chain(decay, admm)
        case "bop":
            return stam_jax.bop(optax.chain(decay, sgd), adaptivity=1e-3, threshold=1e-4, quantizer=quantizer)
        case "linear_blend":
            # As the relaxation of BinaryRelax is in torchao.
            method = stam_jax.stam(hard_from=hard_from, inertia=1.0, quantizer=quantizer)
        case "stam_proximal":
            first, last = settings.penalty
            grown = schedules.geometric(first, growth=(last / first) ** (1 / hard_from))
            penalty = lambda count: jnp.where(count < hard_from, grown(count), jnp.inf)
            proximal = stam_jax.stam_proximal(learning_rate, penalty, quantizer=quantizer)
            return optax.chain(decay, optax.trace(settings.momentum, settings.nesterov), proximal)
        case "stam":
            # With the linear relaxation and the projection last this is `stam_jax.stam`.
            method = stam_jax.three_block_splitting(
                relaxation=_relaxation(settings, hard_from),
                inertia=settings.inertia,
                project=settings.project,
                quantizer=quantizer,
            )
    return optax.chain(decay, sgd, method)


_METHOD_OF = dict.fromkeys(("relaxation", "inertia", "project"), "stam") | {
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
    """A schedule of the step size that grows to what it is otherwise over the first epochs, as they are set.

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
    """The step size: to 0 along a cosine or in a straight line, or tenfold less after each of some epochs."""
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
