"""The deliverable: binary weights exactly, from whatever optimiser state holds them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stam_jax import Binary, LinearBlend, hard_params, quantized_leaves, select, stam
from tests import helpers

rng = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "bias": jnp.zeros(5)},
    "head": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)},
}
KERNELS = ["body/kernel", "head/kernel"]
BODY = {"body": True, "head": False}
injected = optax.inject_hyperparams(stam, static_args=("mask",))

WRAPPED = {
    "bare": stam(0.1),
    "proximal": stam(0.1, penalty=1.0, inertia=0.0),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), stam(0.1)),
    "partition": optax.partition(
        {"body": stam(0.1), "head": stam(0.2, quantizer=Binary(scale="tensor"))},
        {"body": "body", "head": "head"},
    ),
    "masked": optax.chain(
        optax.masked(stam(0.1), BODY), optax.masked(stam(0.1), {"body": False, "head": True})
    ),
    "multi-steps": optax.MultiSteps(stam(0.1), every_k_schedule=2),
    "injected": injected(0.1),
    "injected-mask": injected(
        optax.linear_schedule(0.1, 0.0, 5), inertia=0.5, mask=lambda params: select(params)
    ),
    "apply-if-finite": optax.apply_if_finite(stam(0.1), 3),
}


def hard_by_hand(v: Any, scale: str | None = "channel") -> np.ndarray:
    mean = np.mean(np.abs(np.float64(v)), axis=0 if scale == "channel" else None, keepdims=True)
    return np.where(np.float64(v) >= 0, mean, -mean)


@pytest.mark.parametrize("name", WRAPPED)
def test_hard_weights_are_exactly_two_values_per_group_through_every_wrapper(name):
    optimizer = WRAPPED[name]
    params, state = PARAMS, optimizer.init(PARAMS)
    step = jax.jit(partial(helpers.take_step, optimizer))
    for _ in range(4):
        params, state = step(jax.tree.map(jnp.sin, params), state, params)
    leaves = quantized_leaves(state, params)
    hard = hard_params(state, params)
    assert list(leaves) == KERNELS
    assert jax.tree.structure(hard) == jax.tree.structure(params)
    assert hard["body"]["bias"] is params["body"]["bias"]
    for layer in ("body", "head"):
        leaf = leaves[f"{layer}/kernel"]
        assert leaf.quantizer.contains(hard[layer]["kernel"])
        assert isinstance(leaf.quantizer, Binary)
        expected = hard_by_hand(leaf.latent, leaf.quantizer.scale)
        np.testing.assert_allclose(hard[layer]["kernel"], expected, rtol=1e-6)
        # Training has moved the weights away from where they began.
        assert np.any(np.asarray(leaf.latent) != np.asarray(PARAMS[layer]["kernel"]))


def test_both_weights_of_a_lookahead_have_hard_ones():
    optimizer = optax.lookahead(stam(0.1, penalty=1.0, inertia=0.0), sync_period=3, slow_step_size=0.5)
    params: Any = optax.LookaheadParams.init_synced(PARAMS)
    state = optimizer.init(params)
    for _ in range(4):
        params, state = helpers.take_step(optimizer, jax.tree.map(jnp.sin, params.fast), state, params)
    for weights in (params.fast, params.slow):
        hard = hard_params(state, weights)["head"]["kernel"]
        np.testing.assert_allclose(hard, hard_by_hand(weights["head"]["kernel"]), rtol=1e-6)


def test_the_float_block_is_projected_and_not_the_relaxed_weights():
    optimizer = stam(
        1.0, relaxation=LinearBlend(0.5), quantizer=Binary(scale="tensor"), project="first", inertia=1.0
    )
    params = {"kernel": jnp.array([[1.0, 1.0]])}
    state = optimizer.init(params)
    # w = (2, -4), but x leans towards the projection of (1, 1) and keeps its second sign less clearly.
    params, state = helpers.take_step(optimizer, {"kernel": jnp.array([[-1.0, 5.0]])}, state, params)
    np.testing.assert_array_equal(params["kernel"], [[1.5, -1.5]])
    np.testing.assert_array_equal(quantized_leaves(state, params)["kernel"].latent, [[2.0, -4.0]])
    np.testing.assert_array_equal(hard_params(state, params)["kernel"], [[3.0, -3.0]])


def test_without_inertia_the_parameters_are_the_float_block():
    params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]])}
    state = stam(0.1, penalty=1.0, inertia=0.0).init(params)
    moved = {"kernel": jnp.array([[-1.0, 4.0], [3.0, 0.0]])}
    np.testing.assert_array_equal(quantized_leaves(state, moved)["kernel"].latent, moved["kernel"])
    np.testing.assert_array_equal(hard_params(state, moved)["kernel"], [[-2.0, 2.0], [2.0, 2.0]])


@pytest.mark.parametrize("inertia", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hard_weights_have_the_dtype_of_the_parameters(dtype, inertia):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    state = stam(0.1, penalty=1.0, inertia=inertia).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(hard_params(state, params))} == {jnp.dtype(dtype)}
    for leaf in quantized_leaves(state, params).values():
        assert leaf.latent.dtype == jnp.float32
        assert leaf.quantizer.contains(leaf.hard)


def test_hard_weights_can_be_read_inside_jit():
    optimizer = stam(0.1)
    state = optimizer.init(PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(hard_params)(state, PARAMS), hard_params(state, PARAMS)
    )


def test_the_leaves_come_in_the_order_of_the_parameters():
    state = optax.partition({"body": stam(0.1), "head": stam(0.1)}, {"body": "head", "head": "body"}).init(
        PARAMS
    )
    assert list(quantized_leaves(state, PARAMS)) == KERNELS


@pytest.mark.parametrize(
    ("state", "params", "message"),
    [
        (optax.adam(0.1).init(PARAMS), PARAMS, r"no StamState in opt_state"),
        ((stam(0.1).init(PARAMS), stam(0.1).init(PARAMS)), PARAMS, r"Two states .* 'body/kernel'"),
        (
            stam(0.1).init(PARAMS),
            {"head": PARAMS["head"]},
            r"holds the leaf 'body/kernel', which params lack; they hold head/kernel",
        ),
        (
            stam(0.1).init(PARAMS),
            PARAMS | {"head": {"kernel": jnp.zeros((4, 5))}},
            r"'head/kernel' has shape \(5, 4\) in opt_state and \(4, 5\) in params",
        ),
    ],
)
@pytest.mark.parametrize("function", [hard_params, quantized_leaves])
def test_a_state_that_is_not_of_these_parameters_is_refused(function, state, params, message):
    with pytest.raises(ValueError, match=message):
        function(state, params)
