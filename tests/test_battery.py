"""What holds for every method of the package alike."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stam_jax import (
    Binary,
    LeastSquares,
    PowerOfTwo,
    StamState,
    Ternary,
    Uniform,
    hard_params,
    quantized_leaves,
)
from tests import helpers, home_made
from tests.methods import METHODS, STEPS

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
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_parameters_and_state_keep_their_types(method, dtype, x64):
    optimizer = method(0.05)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), START)
    before = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, before, params)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    types = lambda tree: [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]
    assert types(after) == types(before)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(before) if leaf.ndim} <= {
        jnp.promote_types(dtype, jnp.float32)
    }


@every_method
def test_it_descends_into_the_valley_of_rosenbrock_when_nothing_is_quantised(method):
    valley = lambda p: (1 - p["a"][0, 0]) ** 2 + 100 * (p["b"] - p["a"][0, 0] ** 2) ** 2
    optimizer = optax.chain(optax.trace(0.9), method(2e-4, mask=False))
    start = {"a": jnp.array([[-1.2]]), "b": jnp.array(1.0)}

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        return helpers.take_step(optimizer, jax.grad(valley)(params), state, params), None

    (end, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=6000))(
        (start, optimizer.init(start))
    )
    np.testing.assert_allclose([end["a"][0, 0], end["b"]], 1.0, atol=0.02)


@every_method
def test_two_runs_are_the_same_bit_for_bit(method):
    jax.tree.map(np.testing.assert_array_equal, train(method(0.05), 50), train(method(0.05), 50))


# Every habit of Optax.

NOISE = [jax.tree.map(lambda x, k=k: jnp.cos(7 * k + 50 * x), START) for k in range(6)]


def steps(optimizer: Any, gradients: Any, start: Any = START) -> Any:
    """Parameters and state after a step along each of the gradients."""
    carry = start, optimizer.init(start)
    for gradient in gradients:
        carry = helpers.take_step(optimizer, gradient, carry[1], carry[0])
    return carry


def is_stam_state(node: Any) -> bool:
    return isinstance(node, StamState)


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@every_method
def test_injected_hyperparameters_can_change_without_a_new_trace(method):
    traces = []
    injected = optax.inject_hyperparams(lambda learning_rate: method(learning_rate))(0.05)

    @jax.jit
    def step(state, params, gradient):
        traces.append(None)
        return helpers.take_step(injected, gradient, state, params)

    params, state = START, helpers.begin(injected, START)
    plain_params, plain_state = START, method(0.05).init(START)
    for k, gradient in enumerate(NOISE):
        rate = 0.05 / (k + 1)
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        params, state = step(state, params, gradient)
        plain_params, plain_state = helpers.take_step(method(rate), gradient, plain_state, plain_params)
    assert_same(params, plain_params)
    assert len(traces) == 1


@every_method
def test_a_part_of_a_tree_can_be_its_own(method):
    expected, _ = steps(method(0.05), NOISE)
    parts = {"kernel": "quantised", "bias": "float"}
    partitioned = optax.partition({"quantised": method(0.05), "float": optax.sgd(0.05)}, parts)
    masked = optax.chain(
        optax.masked(method(0.05), {"kernel": True, "bias": False}),
        optax.masked(optax.sgd(0.05), {"kernel": False, "bias": True}),
    )
    for optimizer in (partitioned, masked):
        params, state = steps(optimizer, NOISE)
        assert_same(params, expected)
        assert list(quantized_leaves(state, params)) == ["kernel"]


@every_method
def test_two_small_batches_are_one_large_one(method):
    gradient = lambda params, rows: jax.grad(loss)(params, INPUTS[rows], TARGETS[rows])
    accumulated, small = START, optax.MultiSteps(method(0.05), 2).gradient_transformation()
    expected, large = START, method(0.05)
    small_state, large_state = small.init(START), large.init(START)
    for _ in range(3):
        for rows in (slice(0, 64), slice(64, 128)):
            direction = gradient(accumulated, rows)
            accumulated, small_state = helpers.take_step(small, direction, small_state, accumulated)
        direction = gradient(expected, slice(0, 128))
        expected, large_state = helpers.take_step(large, direction, large_state, expected)
    assert_same(accumulated, expected)
    assert_same(hard_params(small_state, accumulated), hard_params(large_state, expected))


@every_method
def test_a_step_that_is_not_finite_changes_nothing(method):
    optimizer = optax.apply_if_finite(method(0.05), 3)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, NOISE[0])
    params, state = steps(optimizer, [NOISE[0], broken, NOISE[1]])
    expected, expected_state = steps(method(0.05), NOISE[:2])
    assert_same(params, expected)
    assert_same(hard_params(state, params), hard_params(expected_state, expected))


@every_method
def test_lookahead_moves_the_parameters_and_not_the_float_block_that_a_state_holds(method):
    params: Any = optax.LookaheadParams.init_synced(START)
    optimizer: Any = optax.lookahead(method(0.05), sync_period=3, slow_step_size=0.5)
    state = optimizer.init(params)
    for gradient in NOISE[:2]:
        params, state = helpers.take_step(optimizer, gradient, state, params)
    alone, alone_state = helpers.take_step(method(0.05), NOISE[2], state.fast_state, params.fast)
    params, state = helpers.take_step(optimizer, NOISE[2], state, params)
    assert_same(params.fast, params.slow)
    assert_same(params.fast, jax.tree.map(lambda a, b: (a + b) / 2, START, alone))
    latent, alone_latent = (
        quantized_leaves(s, p)["kernel"].latent for s, p in ((state, params.fast), (alone_state, alone))
    )
    (own,) = (node for node in jax.tree.leaves(state, is_leaf=is_stam_state) if is_stam_state(node))
    assert_same(latent, params.fast["kernel"] if own.latent is None else alone_latent)


@every_method
def test_lookahead_finds_the_planted_signs_but_for_one(method):
    optimizer = optax.lookahead(method(optax.linear_schedule(0.05, 0.0, STEPS)), 5, 0.5)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        return helpers.take_step(optimizer, jax.grad(loss)(params.fast), state, params), None

    start: Any = optax.LookaheadParams.init_synced(START)
    carry = start, optimizer.init(start)
    params, state = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS)[0])(carry)
    # A gradient at the slow weights now and then is noise to the methods that keep float ones.
    assert np.sum(np.sign(hard_params(state, params.fast)["kernel"]) != SIGNS) <= 1


@every_method
def test_clipping_and_weight_decay_come_before_it(method):
    chained = optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.3), method(0.05))
    params, state = START, method(0.05).init(START)
    for gradient in NOISE[:3]:
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
        direction = jax.tree.map(lambda g, x, norm=norm: g / max(norm / 0.5, 1) + 0.3 * x, gradient, params)
        params, state = helpers.take_step(method(0.05), direction, state, params)
    assert_same(steps(chained, NOISE[:3])[0], params)


@every_method
def test_functions_of_parameters_map_over_its_state(method):
    optimizer = optax.chain(optax.trace(0.9), method(0.05))
    _, state = steps(optimizer, NOISE[:2])
    doubled = optax.tree.map_params(optimizer, lambda leaf: 2 * leaf, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True):
        # Counts are not like parameters; all else that a state keeps is.
        np.testing.assert_array_equal(after, 2 * before if jnp.ndim(before) else before)


@every_method
def test_unusual_trees_stay_as_they_are(method):
    optimizer = method(0.05)
    params = {
        "none": None,
        "scalar": jnp.array(2.0),
        "empty": jnp.zeros((0, 3)),
        "zeros": jnp.zeros((4, 2)),
        "ragged": [jnp.ones((2, 3)), (jnp.ones(5), jnp.ones((1, 1, 4))), {}],
    }
    after, state = steps(optimizer, [params, params], params)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, params)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((after, hard_params(state, after))))
    assert list(quantized_leaves(state, after)) == ["empty", "ragged/0", "ragged/1/1", "zeros"]
    for nothing in ({}, (), {"none": None}):
        assert steps(optimizer, [nothing], nothing)[0] == nothing


@every_method
def test_parameters_and_state_can_be_donated(method):
    optimizer = method(0.05)
    step = lambda params, state, gradient: helpers.take_step(optimizer, gradient, state, params)
    params = jax.tree.map(jnp.copy, START)
    state = optimizer.init(params)
    donated = jax.tree.leaves((params, state))
    after = jax.jit(step, donate_argnums=(0, 1))(params, state, NOISE[0])
    assert all(leaf.is_deleted() for leaf in donated)
    assert_same(after, steps(optimizer, NOISE[:1]))


@every_method
def test_seeds_under_vmap_are_the_loop_over_seeds(method):
    optimizer = method(0.05)

    def run(scale: jax.Array) -> Any:
        params, state = steps(optimizer, NOISE[:2], jax.tree.map(lambda leaf: scale * leaf, START))
        return params, hard_params(state, params)

    together = jax.jit(jax.vmap(run))(jnp.array([1.0, 0.5, -2.0]))
    for i, scale in enumerate([1.0, 0.5, -2.0]):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), run(jnp.array(scale)))


@every_method
def test_wrong_calls_say_what_and_where(method):
    optimizer = method(0.05)
    state = optimizer.init(START)
    with pytest.raises(ValueError, match=r"^\w+: update needs the parameters"):
        optimizer.update(NOISE[0], state)
    with pytest.raises(ValueError, match=r"^\w+: updates do not match .*missing \['kernel'\]"):
        optimizer.update({"bias": NOISE[0]["bias"]}, state, START)
    with pytest.raises(ValueError, match=r"^\w+: params do not match .*unexpected \['head'\]"):
        optimizer.update(NOISE[0], state, START | {"head": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"^\w+: update takes the state of its own init.*got EmptyState"):
        optimizer.update(NOISE[0], optax.EmptyState(), START)
    with pytest.raises(ValueError, match=r"^\w+: mask says nothing of the leaf 'bias'"):
        method(0.05, mask={"kernel": True}).init(START)


def test_a_method_of_ones_own_takes_twenty_lines_at_most():
    pieces = (home_made.Shifts, home_made.Cubic, home_made.home_made)
    assert sum(len(inspect.getsource(piece).splitlines()) for piece in pieces) <= 20


QUANTIZERS = (
    Binary(scale="tensor"),
    Binary(scale="group", group=4),
    Ternary(),
    Uniform(bits=3, scale="tensor"),
    PowerOfTwo(bits=3),
    LeastSquares(bits=2, scale="tensor"),
    LeastSquares(bits=3),
)


def check_sharding() -> None:
    """Methods and quantisers, with rows of weights and data spread over eight devices, against one device."""
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
        for leaf in (params["kernel"], *(leaf for leaf in jax.tree.leaves(state) if leaf.ndim)):
            assert len({shard.device for shard in leaf.addressable_shards}) == 8
            assert leaf.sharding.is_equivalent_to(rows, 2), f"{name}: {leaf.sharding}"
        expected, expected_state = train(optimizer, 20)
        compare = lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
        jax.tree.map(compare, params, expected)
        jax.tree.map(compare, hard_params(state, params), hard_params(expected_state, expected))
    v = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    for quantizer in QUANTIZERS:
        spread = jax.jit(quantizer.project)(jax.device_put(v, rows))
        alone = jax.jit(quantizer.project)(v)
        np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-6, err_msg=str(quantizer))


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
