"""The methods under comparison, at their settings, as Optax optimisers."""

from typing import Any

import optax

import stam_jax
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
        An `optax.GradientTransformation`: weight decay and Nesterov momentum, the same for all methods,
        then the method with a cosine schedule of the step size.
    """
    learning_rate = optax.cosine_decay_schedule(settings.learning_rate, steps)
    scale = None if settings.scale == "none" else settings.scale
    quantizer = stam_jax.Binary(scale=scale)
    hard_from = round(settings.hard_from * steps)
    match settings.method:
        case "float":
            method = optax.scale_by_learning_rate(learning_rate)
        case "binary_connect":
            method = stam_jax.binary_connect(learning_rate, quantizer=quantizer, mask=selection)
        case "binary_relax":
            # The paper's 200 epochs, told in shares of the run: the strength ends phase I at 1.04^150.
            method = stam_jax.binary_relax(
                learning_rate,
                growth_every=epoch,
                growth=1.04 ** (200 / settings.epochs),
                hard_from=hard_from,
                quantizer=quantizer,
                mask=selection,
            )
        case "stam":
            method = stam_jax.stam(
                learning_rate,
                relaxation=stam_jax.LinearBlend(optax.linear_schedule(0.0, 1.0, max(hard_from, 1))),
                quantizer=quantizer,
                mask=selection,
            )
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=lambda p: stam_jax.select(p).mask),
        optax.trace(settings.momentum, nesterov=True),
        method,
    )
