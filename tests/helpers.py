"""What several test modules share: the problem of `reference` in JAX, and a plain training loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests import reference


def start(problem: reference.Problem) -> dict[str, jax.Array]:
    return {"bias": jnp.asarray(problem.bias), "kernel": jnp.asarray(problem.kernel)}


def loss(problem: reference.Problem, params: dict[str, jax.Array]) -> jax.Array:
    r = problem.inputs @ params["kernel"] + params["bias"] - problem.targets
    return jnp.sum(r**2 / (1 + r**2)) / len(problem.inputs)


def train(
    optimizer: optax.GradientTransformation, problem: reference.Problem
) -> tuple[dict[str, np.ndarray], Any]:
    """The parameters after each step, stacked, and the last state of the optimizer."""

    def step(carry: Any, noise: Any) -> Any:
        params, state = carry
        gradients = jax.tree.map(jnp.add, jax.grad(lambda params: loss(problem, params))(params), noise)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = start(problem)
    noise = {"bias": problem.bias_noise, "kernel": problem.kernel_noise}
    (_, state), history = jax.jit(lambda carry: jax.lax.scan(step, carry, noise))(
        (params, optimizer.init(params))
    )
    return jax.tree.map(np.asarray, history), state


def begin(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """The first state, free of Optax's union of all that a state may be."""
    return optimizer.init(params)


def take_step(optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any) -> Any:
    """The parameters and the state after one step."""
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def relaxed_at(optimizer: optax.GradientTransformation, params: jax.Array, counts: list[int]) -> Any:
    """The parameters after one step without a gradient, at each of the step counts."""
    state = begin(optimizer, params)
    step = lambda count: take_step(optimizer, 0 * params, state._replace(count=count), params)[0]
    return jax.jit(jax.vmap(step))(jnp.array(counts))
