"""The mean of the float weights over the end of a run, for its last projection."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import stam_jax


class AveragedState(NamedTuple):
    """What is known of the mean.

    Args:
        mean: of the float weights since the average began; before that, the float weights.
        method: state of the method.
    """

    mean: Any
    method: stam_jax.StamState


def averaged(method: optax.GradientTransformation, *, begin: int, end: int) -> optax.GradientTransformation:
    """A method whose float weights become their own mean with the last step, and the weights its projection.

    Args:
        method: one of `stam_jax` that keeps float weights, by itself.
        begin: the first step after which they count.
        end: the last step.

    Returns:
        An optimiser; its update needs the parameters.
    """

    def init(params: Any) -> AveragedState:
        state = cast(stam_jax.StamState, method.init(params))
        # A copy: two names of one array could not both be donated.
        return AveragedState(jax.tree.map(jnp.copy, state.latent), state)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AveragedState]:
        updates, after = method.update(updates, state.method, params)
        inner = cast(stam_jax.StamState, after)
        share = 1 / jnp.maximum(inner.count - begin + 1, 1)
        mean = jax.tree.map(lambda mean, v: mean + share * (v - mean), state.mean, inner.latent)

        def last() -> tuple[Any, Any]:
            hard = stam_jax.hard_params(inner._replace(latent=mean), optax.apply_updates(params, updates))
            return optax.tree.sub(hard, params), mean

        updates, latent = jax.lax.cond(inner.count == end, last, lambda: (updates, inner.latent))
        return updates, AveragedState(mean, inner._replace(latent=latent))

    return optax.GradientTransformation(init, update)
