"""Runs of an optimizer on the problem of `reference`, compared with runs of a method written there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import AdmmState, SplittingState
from tests import helpers, reference

ETA = 0.1
PROBLEM = reference.Problem.draw()


def latent_of(state: Any, params: Any) -> Any:
    """What a state keeps of the kernel; the kernel itself, where it keeps nothing."""
    is_one = lambda node: isinstance(node, AdmmState | SplittingState)
    own = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    kept = [node.dual if isinstance(node, AdmmState) else node.latent for node in own]
    return params["kernel"] if kept in ([], [None]) else kept[0]["kernel"]


def assert_follows(optimizer: Any, advance: reference.Advance, eta: Any = ETA, **momentum: Any) -> None:
    """Every iterate, and the latent weights at the end, equal the reference's to rounding."""
    history, state = helpers.train(optimizer, PROBLEM)
    kernels, biases, latents = map(np.stack, zip(*PROBLEM.train(advance, eta, **momentum), strict=True))
    np.testing.assert_allclose(history["kernel"], kernels, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(history["bias"], biases, rtol=1e-12, atol=1e-13)
    latent = latent_of(state, jax.tree.map(lambda leaf: leaf[-1], history))
    np.testing.assert_allclose(latent, latents[-1], rtol=1e-12, atol=1e-13)


def relaxed_at(optimizer: Any, kernel: Any, counts: list[int]) -> np.ndarray:
    """The kernel after one step without a gradient, at each of the step counts."""
    params = {"kernel": jnp.asarray(kernel)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = helpers.begin(optimizer, params)
    step = lambda count: helpers.take_step(optimizer, zeros, state._replace(count=count), params)[0]["kernel"]
    return np.asarray(helpers.quick_jit(jax.vmap(step))(np.array(counts)))
