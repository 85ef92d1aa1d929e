"""The network to evaluate and ship: the projection of the parameters, whatever has made them."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stam_jax import (
    Binary,
    LeastSquares,
    SplittingState,
    Ternary,
    Uniform,
    pack,
    quantize,
    relaxations,
    stam,
    tabulate,
    three_block_splitting,
)
from tests import helpers
from tests.helpers import quick_jit
from tests.methods import METHODS

rng = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "bias": jnp.zeros(5)},
    "head": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)},
}
TENSOR = Binary(axis=())
# What each leaf of `PARAMS` shares its scales over: outputs have their own, and the head has one.
QUANTIZER = {"head": TENSOR, "*": Binary()}
OVER = {"body": 0, "head": None}


def projection(x: Any, over: int | tuple[int, ...] | None = 0) -> np.ndarray:
    """The nearest binary weights in float64, a scale shared over some axes or over all."""
    x = np.float64(x)
    return np.where(x >= 0, 1, -1) * np.mean(np.abs(x), axis=over, keepdims=True)


def random(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def test_quantized_leaves_are_the_nearest_weights_and_all_else_is_as_it_was():
    y = quantize(PARAMS, QUANTIZER)
    assert jax.tree.structure(y) == jax.tree.structure(PARAMS)
    assert y["body"]["bias"] is PARAMS["body"]["bias"]
    for layer, over in OVER.items():
        np.testing.assert_allclose(y[layer]["kernel"], projection(PARAMS[layer]["kernel"], over), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_add_up_in_single_precision_and_the_dtype_stays(dtype):
    x = random(4096, 2).astype(dtype)
    y = quantize({"kernel": x})["kernel"]
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(y, projection(x).astype(np.float32).astype(dtype))


def test_numpy_arrays_are_parameters_too():
    x = rng.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        quantize({"kernel": x})["kernel"], quantize({"kernel": jnp.asarray(x)})["kernel"]
    )


@pytest.mark.parametrize("quantizer", [QUANTIZER, pytest.param(Ternary(), marks=pytest.mark.slow)])
def test_it_is_the_same_inside_jit_and_twice_is_once(quantizer):
    y = quantize(PARAMS, quantizer)
    jitted = jax.jit(partial(quantize, quantizer=quantizer))
    jax.tree.map(np.testing.assert_array_equal, jitted(PARAMS), y)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), quantize(y, quantizer), y)


class Network(eqx.Module):
    layers: list[eqx.nn.Linear]
    activation: Any
    final: Any = eqx.field(static=True)
    scale: float


def test_equinox_modules_keep_their_functions():
    layers = [eqx.nn.Linear(3, 5, key=jax.random.key(i)) for i in range(2)]
    model: Any = Network(layers, jax.nn.relu, jnp.tanh, 2.0)
    y = quantize(model)
    assert isinstance(y, Network)
    assert y.activation is model.activation
    assert y.scale is model.scale
    for before, after in zip(model.layers, y.layers, strict=True):
        assert after.bias is before.bias
        np.testing.assert_allclose(after.weight, projection(before.weight, 1), rtol=1e-6)
    assert y.activation(y.layers[0](jnp.ones(3))).shape == (5,)
    # Filtered, as the optimizer sees it, it says the same.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert eqx.tree_equal(eqx.combine(quantize(params), static), y)


# Training, through every wrapper of Optax.

LABELS = {"body": "body", "head": "head"}
BODY, HEAD = {"body": True, "head": False}, {"body": False, "head": True}
HARD_FROM = 3
SGD = optax.sgd(0.1)
make = partial(stam, hard_from=HARD_FROM, quantizer=QUANTIZER)
injected = optax.inject_hyperparams(stam, static_args=("quantizer", "optimizer"))
WRAPPED = {
    "around": make(SGD),
    "behind": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9), make()),
    "partition": optax.partition(
        {
            "body": stam(SGD, hard_from=HARD_FROM),
            "head": stam(optax.adam(0.1), hard_from=HARD_FROM, quantizer=TENSOR),
        },
        LABELS,
    ),
    "masked": optax.chain(optax.masked(make(SGD), BODY), optax.masked(make(SGD), HEAD)),
    "multi-steps": optax.MultiSteps(make(SGD), every_k_schedule=2),
    "injected": injected(SGD, hard_from=HARD_FROM, quantizer=QUANTIZER, hold=9.0),
    "apply-if-finite": optax.apply_if_finite(make(SGD), 3),
}


def latents(state: Any) -> dict[str, Any]:
    """The latent weights of each layer, from all states of `stam` wherever they lie."""
    is_own = lambda node: isinstance(node, SplittingState)
    found = {}
    for node in jax.tree.leaves(state, is_leaf=is_own):
        if is_own(node):
            for layer in ("body", "head"):
                leaf = node.latent[layer]
                if isinstance(leaf, dict) and not isinstance(leaf["kernel"], optax.MaskedNode):
                    found[layer] = leaf["kernel"]
    return found


# The others are among the wrappers of the battery.
OFTEN = ("behind", "partition", "multi-steps", "injected")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in WRAPPED]
)
def test_the_quantized_parameters_are_the_projection_of_the_latent_weights(name):
    """Through every wrapper, before the network is hard and after; once hard they are the parameters."""
    optimizer = WRAPPED[name]
    params, state = PARAMS, optimizer.init(PARAMS)
    step = quick_jit(
        lambda k, state, params: helpers.take_step(
            optimizer, jax.tree.map(lambda x: jnp.sin(3 * x + k), params), state, params
        )
    )
    for k in range(10):
        params, state = step(k, state, params)
        y, v = quantize(params, QUANTIZER), latents(state)
        assert list(v) == ["body", "head"]
        for layer, over in OVER.items():
            np.testing.assert_allclose(y[layer]["kernel"], projection(v[layer], over), rtol=3e-6)
            gap = np.max(np.abs(y[layer]["kernel"] - params[layer]["kernel"]))
            assert gap > 1e-2 or k >= HARD_FROM
            # Multi-steps move every other time.
            assert gap <= 2e-6 or k <= 2 * HARD_FROM
    assert not np.array_equal(params["head"]["kernel"], PARAMS["head"]["kernel"])


def test_the_network_in_use_is_projected_and_not_the_latent_weights():
    optimizer = three_block_splitting(
        optax.sgd(1.0),
        quantizer=TENSOR,
        relaxation=relaxations.LinearBlend(0.5),
        inertia=1.0,
        project="first",
    )
    params = {"kernel": jnp.array([[1.0, 1.0]])}
    state = optimizer.init(params)
    # w = (2, -4), but x leans toward the projection of (1, 1).
    step = quick_jit(partial(helpers.take_step, optimizer))
    params, state = step({"kernel": jnp.array([[-1.0, 5.0]])}, state, params)
    np.testing.assert_array_equal(params["kernel"], [[1.5, -1.5]])
    np.testing.assert_array_equal(state.latent["kernel"], [[2.0, -4.0]])
    np.testing.assert_array_equal(quantize(params, TENSOR)["kernel"], [[1.5, -1.5]])


def test_a_frozen_layer_ships_the_projection_of_the_frozen_weights():
    frozen = {"body": {"kernel": True, "bias": True}, "head": {"kernel": False}}
    optimizer = optax.chain(
        stam(optax.sgd(0.5), hard_from=2, quantizer=QUANTIZER), optax.transforms.freeze(frozen)
    )
    params, state = PARAMS, optimizer.init(PARAMS)
    step = quick_jit(partial(helpers.take_step, optimizer))
    for _ in range(6):
        params, state = step(jax.tree.map(lambda x: 2 * np.sign(x) + 0.1, params), state, params)
    np.testing.assert_array_equal(params["body"]["kernel"], PARAMS["body"]["kernel"])
    # What the state says of the layer has gone on moving, over to other signs.
    v = latents(state)["body"]
    assert np.any(np.sign(v) != np.sign(params["body"]["kernel"]))
    y = quantize(params, QUANTIZER)
    np.testing.assert_allclose(y["body"]["kernel"], projection(PARAMS["body"]["kernel"]), rtol=1e-6)
    np.testing.assert_allclose(y["head"]["kernel"], params["head"]["kernel"], rtol=2e-6)
    # It is not hard, so it packs once it is quantized.
    with pytest.raises(ValueError, match="'body/kernel'"):
        pack(params, QUANTIZER)
    pack(y, QUANTIZER)


@pytest.mark.parametrize("kind", ["ema", "polyak"])
def test_averaged_weights_are_quantized_to_the_projection_of_the_average(kind):
    optimizer = make(SGD)
    params, state = PARAMS, optimizer.init(PARAMS)
    step = quick_jit(partial(helpers.take_step, optimizer))
    averaging = optax.ema(0.7)
    averaged, ema_state = params, averaging.init(params)
    history = []
    for k in range(8):
        params, state = step(jax.tree.map(lambda x, k=k: 3 * np.sin(9 * x + k), params), state, params)
        averaged, ema_state = averaging.update(params, ema_state)
        history.append(params)
    if kind == "polyak":
        averaged = jax.tree.map(lambda *xs: sum(xs) / len(xs), *history)
    shares = 0.7 ** np.arange(7, -1, -1) if kind == "ema" else np.ones(8)
    for layer, over in OVER.items():
        whole = np.average([np.float64(p[layer]["kernel"]) for p in history], axis=0, weights=shares)
        y = quantize(averaged, QUANTIZER)[layer]["kernel"]
        np.testing.assert_allclose(y, projection(whole, over), rtol=1e-5)
        # That is not the quantized network of the last step.
        assert np.any(np.abs(y - quantize(params, QUANTIZER)[layer]["kernel"]) > 0.01)


# Stacks, attention and experts: which weights share a scale.


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        ("kernel", TENSOR),
        ("weight", Binary()),
        pytest.param("kernel", Uniform(bits=3), marks=pytest.mark.slow),
    ],
)
def test_under_vmap_every_member_of_a_stack_has_scales_of_its_own(name, quantizer):
    stack = {"dense": {name: random(3, 4, 5) * np.array([[[1.0]], [[10.0]], [[0.1]]], np.float32)}}
    together = jax.vmap(partial(quantize, quantizer=quantizer))(stack)["dense"][name]
    for i in range(3):
        alone = quantize({"dense": {name: stack["dense"][name][i]}}, quantizer)["dense"][name]
        np.testing.assert_allclose(together[i], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "member", "stacked"),
    [
        ("kernel", Binary(), Binary(axis=(0, -1))),
        ("weight", Binary(), Binary(axis=(0, 1))),
        ("kernel", TENSOR, Binary(axis=0)),
        pytest.param("kernel", LeastSquares(), LeastSquares(axis=(0, -1)), marks=pytest.mark.slow),
        ("kernel", Binary(group=2), Binary(group=2, axis=(0, -1))),
    ],
)
def test_a_tuple_of_axes_says_of_a_stack_what_vmap_does(name, member, stacked):
    stack = {"layers": {name: random(3, 4, 5)}}
    expected = jax.vmap(partial(quantize, quantizer=member))(stack)
    np.testing.assert_allclose(quantize(stack, stacked)["layers"][name], expected["layers"][name], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "over", "scales"),
    [
        ((8, 2, 3), (1, 2), (0,), 6),  # A query kernel: inputs, heads, size.
        pytest.param((8, 2, 3), (-2, -1), (0,), 6, marks=pytest.mark.slow),
        ((2, 3, 8), -1, (0, 1), 8),  # An output kernel: heads, size, outputs.
        pytest.param((4, 8, 5), (0, -1), (1,), 20, marks=pytest.mark.slow),  # Stacked layers.
        ((4, 6, 8, 5), (0, 1, 3), (2,), 120),  # Stacked layers of experts.
        pytest.param((4, 6, 8, 5), (1,), (0, 2, 3), 6, marks=pytest.mark.slow),
        ((8, 2, 3), (), (0, 1, 2), 1),
    ],
)
def test_each_place_of_the_axes_that_are_named_has_a_scale(shape, axis, over, scales):
    params = {"attention": {"query": {"kernel": random(*shape)}}}
    quantizer = {"*/query/kernel": Binary(axis=axis)}
    x, y = (tree["attention"]["query"]["kernel"] for tree in (params, quantize(params, quantizer)))
    np.testing.assert_allclose(y, projection(x, over), rtol=1e-6)
    assert tabulate(params, quantizer).rows[0].scales == scales
    assert len(np.unique(np.abs(y))) == scales
    # Trained until it is hard, it is so too.
    optimizer = stam(optax.sgd(0.1), hard_from=0, quantizer=quantizer)
    hard, _ = quick_jit(lambda x: helpers.take_step(optimizer, x, optimizer.init(x), x))(params)
    np.testing.assert_allclose(
        hard["attention"]["query"]["kernel"], projection(0.9 * np.float64(x), over), rtol=1e-5
    )


UNSUITED = {
    "no-such-axis": Binary(axis=3),
    "no-such-axis-below": Binary(axis=(0, -4)),
    "an-axis-twice": Binary(axis=(0, -3)),
    "each-weight": Binary(axis=(0, 1, 2)),
    "a-remainder": Binary(axis=(-2, -1), group=5),
    "which-axis-to-divide": Binary(group=4),
    "a-channel-divided": Binary(group=4, group_axis=-1),
    "another-quantizer": Ternary(axis=3),
}
KERNEL = {"attention": {"query": {"kernel": random(8, 2, 4)}}}


@pytest.mark.parametrize("quantizer", UNSUITED.values(), ids=UNSUITED)
def test_a_leaf_that_its_quantizer_cannot_take_is_named(quantizer):
    for use in (
        stam(hard_from=1, quantizer=quantizer).init,
        *(partial(f, quantizer=quantizer) for f in (quantize, pack, tabulate)),
    ):
        with pytest.raises(ValueError, match="'attention/query/kernel'"):
            use(KERNEL)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_names_it_before_the_first_step(method):
    optimizer = method(optax.sgd(0.1), quantizer={"attention": Binary(axis=(0, 5))})
    with pytest.raises(ValueError, match="'attention/query/kernel'"):
        optimizer.init(KERNEL)
    with pytest.raises(ValueError, match="'attention/query/kernel'"):
        jax.eval_shape(optimizer.init, KERNEL)


def test_a_quantizer_of_ones_own_that_fails_is_told_with_the_leaf():
    class Broken:
        def scales(self, w):
            return w @ w

        def levels(self, scales):
            return -scales, scales

    with pytest.raises(ValueError, match="'attention/query/kernel'"):
        stam(hard_from=1, quantizer=Broken()).init(KERNEL)
