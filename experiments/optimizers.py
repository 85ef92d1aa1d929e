"""The methods under comparison, at their settings, as Optax optimisers."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stam_jax
from experiments import averaging, balance, weighted
from experiments.config import SettingsError, TrainSettings


def choose(params: Any, settings: TrainSettings) -> stam_jax.Selection:
    """The kernels to quantise: all but those excluded.

    Raises:
        SettingsError: if a rule of `settings.exclude` does not fit the network, or nothing is left.
    """
    try:
        selection = stam_jax.select(params, exclude=settings.exclude)
    except ValueError as error:
        raise SettingsError(f"--exclude: {error}") from error
    if not any(row.quantized for row in selection.rows):
        raise SettingsError(
            "--exclude: that leaves no kernel binary; for a float network use --method float."
        )
    return selection


def build(settings: TrainSettings, selection: stam_jax.Selection, *, steps: int, epoch: int) -> Any:
    """The optimiser of a run.

    Args:
        settings: of the run.
        selection: the leaves to quantise.
        steps: steps of the whole run.
        epoch: steps of one epoch.

    Returns:
        An `optax.GradientTransformation`: weight decay and momentum, the same for all methods but Bop, whose
        binary weights take plain gradients; then the method with a schedule of the step size.

    Raises:
        SettingsError: if the step size is to fall after an epoch that the run does not have, or a setting is
            given that is another method's.
    """
    _check_method_has_its_own(settings)
    learning_rate = _warmed_up(_schedule(settings, steps=steps, epoch=epoch), settings, epoch=epoch)
    scale = None if settings.scale == "none" else settings.scale
    common = {"quantizer": stam_jax.Binary(scale=scale), "mask": selection}
    hard_from = max(round(settings.hard_from * steps), 1)
    momentum = optax.trace(settings.momentum, nesterov=settings.nesterov)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=lambda p: stam_jax.select(p).mask)
    match settings.method:
        case "float":
            method = optax.scale_by_learning_rate(learning_rate)
        case "binary_connect":
            method = stam_jax.binary_connect(learning_rate, **common)
        case "straight_through":
            method = stam_jax.straight_through(learning_rate, clip=None, **common)
        case "straight_through_clipped":
            # The estimator gates the gradient before it becomes momentum.
            gated = stam_jax.straight_through(learning_rate, inner=momentum, **common)
            return optax.chain(decay, gated)
        case "binary_relax":
            # The paper's 200 epochs, told in shares of the run: the strength ends phase I at 1.04^150.
            method = stam_jax.binary_relax(
                learning_rate,
                growth_every=epoch,
                growth=1.04 ** (200 / settings.epochs),
                hard_from=hard_from,
                **common,
            )
        case "prox_quant":
            relaxed = jnp.arange(hard_from)
            growth = settings.threshold / max(
                float(jnp.vdot(jax.vmap(learning_rate)(relaxed), relaxed)), 1e-9
            )
            method = stam_jax.prox_quant(learning_rate, growth=growth, hard_from=hard_from, **common)
        case "parq":
            method = stam_jax.parq(learning_rate, hard_from=hard_from, **common)
        case "md_tanh":
            method = stam_jax.md_tanh(
                learning_rate,
                growth=100 ** (epoch / hard_from),
                growth_every=epoch,
                hard_from=hard_from,
                **common,
            )
        case "admm_quant":
            method = stam_jax.admm_quant(
                learning_rate, penalty=1.0, dual_every=epoch, hard_from=hard_from, **common
            )
        case "bop":
            flips = stam_jax.bop(learning_rate, adaptivity=1e-3, threshold=1e-4, **common)
            rest = optax.chain(decay, momentum, optax.scale_by_learning_rate(learning_rate))
            kinds = jax.tree.map(lambda chosen: "binary" if chosen else "float", selection.mask)
            return optax.partition({"binary": flips, "float": rest}, kinds)
        case "linear_blend":
            # As the relaxation of BinaryRelax is in torchao.
            blend = stam_jax.LinearBlend(stam_jax.schedules.linear_to_hard(hard_from))
            method = stam_jax.stam(learning_rate, relaxation=blend, inertia=1.0, **common)
        case "stam_proximal":
            method = _proximal(settings, learning_rate, selection, hard_from=hard_from, epoch=epoch, **common)
        case "stam":
            method = _inertial(settings, learning_rate, hard_from=hard_from, steps=steps, **common)
            if settings.average_from is not None:
                begin = max(round(settings.average_from * steps), 1)
                if settings.inertia == 0 or begin == steps:
                    raise SettingsError(
                        "--average-from: needs float weights, and so an --inertia above 0, and two steps at "
                        f"least; got inertia {settings.inertia}, and {begin} of {steps} steps to begin after."
                    )
                method = averaging.averaged(method, begin=begin, end=steps)
    return optax.chain(decay, momentum, method)


_OF_STAM = (
    "relaxation",
    "inertia",
    "inertia_rule",
    "anneal_inertia",
    "pull",
    "project",
    "box",
    "ridge",
    "average_from",
)
_METHOD_OF = dict.fromkeys(_OF_STAM, "stam") | {
    "penalty": "stam_proximal",
    "penalty_rule": "stam_proximal",
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


def _proximal(
    settings: TrainSettings,
    learning_rate: optax.Schedule,
    selection: stam_jax.Selection,
    *,
    hard_from: int,
    epoch: int,
    **common: Any,
) -> optax.GradientTransformation:
    """STAM without inertia."""
    first, last = settings.penalty
    times = 3 if settings.penalty_rule == "restarted" else 1
    period = -(-hard_from // times)
    grown = stam_jax.schedules.geometric(first, growth=(last / first) ** (1 / period))

    def method(factor: float) -> optax.GradientTransformationExtraArgs:
        penalty = lambda count: jnp.where(count < hard_from, factor * grown(count % period), jnp.inf)
        return stam_jax.stam(learning_rate, penalty=penalty, **common)

    match settings.penalty_rule:
        case "growing" | "restarted":
            return method(1.0)
        case "balanced":
            # Some ten looks an epoch let it grow or shrink a thousandfold within one.
            balanced = lambda penalty: stam_jax.stam(learning_rate, penalty=penalty, **common)
            return balance.balanced(balanced, start=first, every=max(epoch // 10, 1), hard_from=hard_from)
        case "layerwise":
            # By the root of the inputs: 1 over that is the scale of initial weights, but for a factor.
            inputs = [math.prod(row.shape[:-1]) if row.quantized else 0 for row in selection.rows]
            mean = math.fsum(map(math.sqrt, inputs)) / np.count_nonzero(inputs)
            methods: dict[Any, optax.GradientTransformation] = {
                count: method(math.sqrt(count) / mean) for count in inputs
            }
            methods[0] = optax.scale_by_learning_rate(learning_rate)
            return optax.partition(methods, jax.tree.unflatten(jax.tree.structure(selection.mask), inputs))


def _inertial(
    settings: TrainSettings, learning_rate: optax.Schedule, *, hard_from: int, steps: int, **common: Any
) -> optax.GradientTransformation:
    """STAM with inertia.

    Raises:
        SettingsError: if the float weights are to be both in a box and decayed, or the inertia is to follow
            two rules, or none that can be.
    """
    annealed = stam_jax.schedules.linear_to_hard(hard_from)
    match settings.relaxation:
        case "linear":
            relaxation = stam_jax.LinearBlend(annealed)
        case "affine":
            relaxation = stam_jax.PiecewiseAffine(lambda count: 1 - annealed(count))
        case "squared":
            # From 1 to the strength at which BinaryRelax's paper ends phase I, 1.04^150.
            grown = stam_jax.schedules.geometric(1.0, growth=1.04 ** (150 / hard_from))
            relaxation = stam_jax.HardFrom(stam_jax.SquaredDistance(grown), hard_from)
        case "tanh":
            grown = stam_jax.schedules.geometric(1.0, growth=100 ** (1 / hard_from))
            relaxation = stam_jax.HardFrom(stam_jax.ScaledTanh(grown), hard_from)
    if settings.ridge and settings.box is not None:
        raise SettingsError("--box and --ridge: one of them, not both.")
    regularizer = None
    if settings.ridge:
        regularizer = stam_jax.Ridge(settings.ridge)
    elif settings.box is not None:
        regularizer = stam_jax.Box(settings.box)
    inertia = settings.inertia
    is_weighted = settings.inertia_rule == "weighted"
    if is_weighted:
        others = [name for name in ("anneal_inertia", "pull", "average_from") if getattr(settings, name)]
        if others:
            raise SettingsError(f"--inertia-rule and --{others[0].replace('_', '-')}: one of them, not both.")
        inertia = 1.0
    elif settings.anneal_inertia is not None:
        inertia = _annealed(settings, settings.anneal_inertia, steps)
    elif settings.pull:
        left = cast(optax.Schedule, stam_jax.schedules.inertia(learning_rate, pull=settings.pull))
        inertia = lambda count: settings.inertia * left(count)
    method = stam_jax.stam(
        learning_rate,
        relaxation=relaxation,
        regularizer=regularizer,
        inertia=inertia,
        project=settings.project,
        **common,
    )
    if is_weighted:
        return weighted.weighted(method, inertia=settings.inertia, selection=common["mask"])
    return method


def _annealed(settings: TrainSettings, shares: tuple[float, float], steps: int) -> optax.Schedule:
    """Inertia as given until one step, and none from another one on.

    Raises:
        SettingsError: if the second step does not come after the first, or a pull is given as well.
    """
    begin, end = (round(share * steps) for share in shares)
    if begin >= end:
        raise SettingsError(
            f"--anneal-inertia: the second share should be larger, by a step at least; got {shares[0]} and "
            f"{shares[1]} of {steps} steps."
        )
    if settings.pull:
        raise SettingsError("--anneal-inertia and --pull: one of them, not both.")
    first = max(1 - settings.inertia, 1e-4)
    grown = stam_jax.schedules.geometric(first, growth=math.exp(-math.log(first) / (end - begin)))
    parts = [
        optax.constant_schedule(settings.inertia),
        lambda count: 1 - grown(count),
        optax.constant_schedule(0.0),
    ]
    return optax.join_schedules(parts, [begin, end])


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
