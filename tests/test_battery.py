"""What holds for every method of the package alike."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stam_jax import LinearBlend, StamState, binary_connect, binary_relax, hard_params, prox_quant, stam
from tests import helpers

STEPS = 400
Method = Callable[..., optax.GradientTransformationExtraArgs]


def relaxed(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return binary_relax(learning_rate, growth_every=4, hard_from=300, **settings)


def proximal(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    rho = optax.exponential_decay(1e-3, STEPS // 16, 2.0)
    return stam(learning_rate, penalty=rho, inertia=0.0, **settings)


def inertial(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    theta = optax.linear_schedule(0.0, 1.0, 3 * STEPS // 4)
    return stam(learning_rate, relaxation=LinearBlend(theta), inertia=0.99, **settings)


def shrunk(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return prox_quant(learning_rate, growth=0.01, hard_from=300, **settings)


METHODS: dict[str, Method] = {
    "binary_connect": binary_connect,
    "binary_relax": relaxed,
    "prox_quant": shrunk,
    "proximal": proximal,
    "inertial": inertial,
    "default": stam,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

# Binary least squares: a planted sign pattern seen through noise, so that no float solution is binary.
rng = np.random.default_rng(0)
INPUTS = jnp.asarray(rng.normal(size=(128, 16)), jnp.float32)
SIGNS = jnp.asarray(np.where(rng.normal(size=(16, 4)) > 0, 1.0, -1.0), jnp.float32)
BIAS = jnp.asarray(rng.normal(size=4), jnp.float32)
TARGETS = INPUTS @ SIGNS + BIAS + jnp.asarray(rng.normal(size=(128, 4)), jnp.float32)
START = {"bias": jnp.zeros(4), "kernel": jnp.asarray(0.1 * rng.normal(size=(16, 4)), jnp.float32)}


def loss(params: Any, inputs: jax.Array = INPUTS, targets: jax.Array = TARGETS) -> jax.Array:
    return jnp.sum((inputs @ params["kernel"] + params["bias"] - targets) ** 2) / (2 * len(inputs))


def train(optimizer: optax.GradientTransformation, steps: int) -> Any:
    def step(carry: Any, _: None) -> Any:
        params, state = carry
        return helpers.take_step(optimizer, jax.grad(loss)(params), state, params), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])((START, optimizer.init(START)))


def float_solution() -> np.ndarray:
    """The kernel above the bias of ordinary least squares."""
    inputs = np.hstack([np.float64(INPUTS), np.ones((len(INPUTS), 1))])
    return np.linalg.lstsq(inputs, np.float64(TARGETS), rcond=None)[0]


@every_method
def test_with_nothing_to_quantise_it_is_gradient_descent_exactly(method):
    params, state = train(method(0.05, mask=False), STEPS)
    expected, _ = train(optax.sgd(0.05), STEPS)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    jax.tree.map(np.testing.assert_array_equal, hard_params(state, params), params)
    solution = float_solution()
    np.testing.assert_allclose(params["kernel"], solution[:-1], atol=1e-4)
    np.testing.assert_allclose(params["bias"], solution[-1], atol=1e-4)


@every_method
def test_it_finds_the_planted_signs(method):
    params, state = train(method(optax.linear_schedule(0.05, 0.0, STEPS)), STEPS)
    hard = hard_params(state, params)
    np.testing.assert_array_equal(np.sign(hard["kernel"]), SIGNS)
    np.testing.assert_allclose(np.abs(hard["kernel"]), 1.0, atol=0.05)
    assert loss(hard) < 1.01 * loss({"kernel": SIGNS, "bias": BIAS})


@every_method
def test_jit_changes_nothing(method):
    optimizer = method(0.05)
    jitted = jax.jit(lambda gradients, state, params: helpers.take_step(optimizer, gradients, state, params))
    eager_carry = jitted_carry = (START, optimizer.init(START))
    for _ in range(3):
        gradients = jax.grad(loss)(eager_carry[0])
        eager_carry = helpers.take_step(optimizer, gradients, eager_carry[1], eager_carry[0])
        jitted_carry = jitted(gradients, jitted_carry[1], jitted_carry[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jitted_carry, eager_carry
    )


@every_method
def test_the_state_keeps_its_structure_and_types(method):
    optimizer = method(0.05)
    before = optimizer.init(START)
    _, after = helpers.take_step(optimizer, START, before, START)
    assert isinstance(after, StamState)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    types = lambda state: [jax.typeof(leaf) for leaf in jax.tree.leaves(state)]
    assert types(after) == types(before)


@every_method
def test_two_runs_are_the_same_bit_for_bit(method):
    jax.tree.map(np.testing.assert_array_equal, train(method(0.05), 50), train(method(0.05), 50))


def check_sharding() -> None:
    """Every method, with rows of weights and of data spread over eight devices, against one device."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
    inputs, targets = (jax.device_put(array, rows) for array in (INPUTS, TARGETS))
    for name, method in METHODS.items():
        optimizer = method(0.05)

        @jax.jit
        def step(params, state, optimizer=optimizer):
            gradients = jax.grad(loss)(params, inputs, targets)
            return helpers.take_step(optimizer, gradients, state, params)

        params = {
            "bias": jax.device_put(START["bias"], whole),
            "kernel": jax.device_put(START["kernel"], rows),
        }
        state = jax.jit(optimizer.init)(params)
        for _ in range(20):
            params, state = step(params, state)
        for leaf in (params["kernel"], *jax.tree.leaves(state.displacement)):
            assert len({shard.device for shard in leaf.addressable_shards}) == 8
            assert leaf.sharding.is_equivalent_to(rows, 2), f"{name}: {leaf.sharding}"
        expected, expected_state = train(optimizer, 20)
        compare = lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
        jax.tree.map(compare, params, expected)
        jax.tree.map(compare, hard_params(state, params), hard_params(expected_state, expected))


def test_weights_spread_over_eight_devices_train_as_on_one():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    code = (
        "import jax; assert jax.device_count() == 8; from tests import test_battery as t; t.check_sharding()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
