"""What several test modules share: the problem of `reference` in JAX, and a plain training loop."""

import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import reference

_OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def quick_compilation() -> dict[str, str]:
    """Environment variables by which programs are compiled more quickly, and run more slowly.

    Most optimizations are left out, and XLA's older emitters for CPUs take the place of its newer ones.
    """
    flags = {**dict.fromkeys(os.environ.get("XLA_FLAGS", "").split()), _OLDER_EMITTERS: None}
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}


def environment_of_users() -> dict[str, str]:
    """The environment without those, for a process that trains in full."""
    flags = os.environ.get("XLA_FLAGS", "").replace(_OLDER_EMITTERS, "")
    return os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": flags}


# For what runs once: compiled without optimization, which takes half the time.
quick_jit: Any = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def slow(values: Iterable[Any]) -> list[Any]:
    """Parameters that only the slow tests have."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


def start(problem: reference.Problem) -> dict[str, jax.Array]:
    return {"bias": jnp.asarray(problem.bias), "kernel": jnp.asarray(problem.kernel)}


def loss(problem: reference.Problem, params: dict[str, jax.Array]) -> jax.Array:
    r = problem.inputs @ params["kernel"] + params["bias"] - problem.targets
    return jnp.sum(r**2 / (1 + r**2)) / len(problem.inputs)


def trajectory(optimizer: optax.GradientTransformation, problem: reference.Problem, start: Any) -> Any:
    """The parameters after each step, stacked, and the last state of the optimizer; inside jit or vmap."""

    def step(carry: Any, noise: Any) -> Any:
        params, state = carry
        gradients = jax.tree.map(jnp.add, jax.grad(lambda params: loss(problem, params))(params), noise)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    noise = {"bias": problem.bias_noise, "kernel": problem.kernel_noise}
    (_, state), history = jax.lax.scan(step, (start, optimizer.init(start)), noise)
    return history, state


def train(
    optimizer: optax.GradientTransformation, problem: reference.Problem
) -> tuple[dict[str, np.ndarray], Any]:
    """The same from the start of the problem."""
    history, state = quick_jit(lambda params: trajectory(optimizer, problem, params))(start(problem))
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
    return quick_jit(jax.vmap(step))(np.array(counts))


def run_without_training(
    self: Any, seed: int, folder: Any, *arguments: Any, **options: Any
) -> dict[str, Any]:
    """In the place of `Trainer.run` and `Trainer.rehearse`, where a test is of what goes on around runs."""
    from experiments.reporting import run_folder

    hard = None if self.settings.method == "float" else 0.5 + 0.1 * seed
    row = {"relaxed_accuracy": 0.6, "hard_accuracy": hard, "quantization_gap": hard, "sign_flips": hard}
    rows = [{"epoch": epoch, "loss": 1.0, **row} for epoch in range(1, self.settings.epochs + 1)]
    run_folder.write_text(folder / run_folder.METRICS, run_folder.as_csv(rows))
    statistics = {
        f"{name}_accuracy_running_statistics": row[f"{name}_accuracy"] for name in ("relaxed", "hard")
    }
    files = {"binary_share": 0.9, "bytes_float": 1000, "bytes_packed": None if hard is None else 100}
    return {"method": self.settings.method, **row, **statistics, **files, "seed": seed, "seconds": 1.0}
