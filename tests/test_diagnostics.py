"""The gap and the flips against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stam_jax import Binary, diagnostics, quantize, stam
from tests import helpers

rng = np.random.default_rng(0)
PARAMS: Any = {
    "first": {"kernel": np.float32(rng.normal(size=(6, 5)))},
    "second": {"kernel": np.float32(rng.normal(size=(5, 4))), "bias": np.full(4, 100.0, np.float32)},
}
TENSOR = Binary(axis=())


def numpy_gap(xs):
    xs = [np.asarray(x, np.float64) for x in xs]
    ys = [np.where(x >= 0, 1.0, -1.0) * np.mean(np.abs(x)) for x in xs]
    distance = sum(np.sum((x - y) ** 2) for x, y in zip(xs, ys, strict=True))
    return np.sqrt(distance / sum(np.sum(x**2) for x in xs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gap_is_the_relative_distance_over_all_quantized_leaves_together(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    gap, first = helpers.quick_jit(
        lambda params: [diagnostics.quantization_gap(params, q) for q in (TENSOR, {"first": TENSOR})]
    )(params)
    assert (gap.shape, gap.dtype) == ((), jnp.float32)
    # The quantized weights are given in the parameters' own dtype.
    expected = numpy_gap([params["first"]["kernel"], params["second"]["kernel"]])
    np.testing.assert_allclose(gap, expected, rtol=1e-5 if dtype == "float32" else 1e-2)
    # A pattern leaves out what it does not name.
    np.testing.assert_allclose(first, numpy_gap([params["first"]["kernel"]]), rtol=1e-2)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1.6e-6), ("bfloat16", 4e-3)])
def test_the_gap_of_a_hard_network_is_rounding_and_of_another_quantizer_is_not(dtype, rounding):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    optimizer = stam(optax.sgd(0.1), hard_from=3)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        params, state = helpers.take_step(optimizer, jax.tree.map(jnp.sin, params), state, params)
        both = diagnostics.quantization_gap(params), diagnostics.quantization_gap(params, TENSOR)
        return (params, state), both

    run = lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=5)[1]
    gaps, others = helpers.quick_jit(run)(params)
    assert gaps[0] > 0.1
    assert np.max(gaps[3:]) <= rounding
    assert others[-1] > 0.05


@pytest.mark.parametrize("x", [jnp.array([[2.0, -2.0]]), jnp.zeros((2, 2)), jnp.zeros((0, 2))])
def test_binary_weights_have_no_gap(x):
    assert diagnostics.quantization_gap({"kernel": x}, TENSOR) == 0


def test_zeros_at_a_distance_from_their_projection_have_no_finite_gap():
    assert diagnostics.quantization_gap({"kernel": jnp.zeros((1, 2))}, Binary(scale=1.0)) == np.inf


def test_nothing_quantized_has_no_gap_to_measure():
    with pytest.raises(ValueError, match="nothing is quantized"):
        diagnostics.quantization_gap({"bias": jnp.ones(2)})


def test_flips_are_the_share_of_signs_that_differ():
    before, after = (
        [rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=11).astype(np.float32)] for _ in range(2)
    )
    differing = sum(np.sum(np.sign(a) != np.sign(b)) for a, b in zip(before, after, strict=True))
    flips = jax.jit(diagnostics.sign_flips)(before, after)
    assert (flips.shape, flips.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(flips, differing / 32, rtol=1e-6)


def test_flips_are_the_same_before_and_after_quantization():
    before, after = PARAMS, jax.tree.map(lambda leaf: leaf[::-1], PARAMS)
    flips = jax.jit(diagnostics.sign_flips)
    quantized = flips(*helpers.quick_jit(lambda *trees: list(map(quantize, trees)))(before, after))
    assert quantized == flips(before, after) > 0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0.0, -0.0, -1.0], [1.0, 2.0, -3.0], 0.0),
        ([0.0, 0.0], [-1.0, 1.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_zero_counts_as_plus_and_nothing_as_no_flip(before, after, expected):
    assert diagnostics.sign_flips({"w": jnp.array(before)}, {"w": jnp.array(after)}) == expected


def test_trees_without_leaves_have_no_flips():
    assert diagnostics.sign_flips({}, {}) == 0


@pytest.mark.parametrize(
    "after", [{"a": jnp.ones(3)}, {"b": jnp.ones(2)}, {}, {"a": {"deeper": jnp.ones(2)}}, [jnp.ones(2)]]
)
def test_flips_need_trees_of_one_shape(after):
    with pytest.raises(ValueError, match="sign_flips"):
        diagnostics.sign_flips({"a": jnp.ones(2)}, after)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "complex64"])
def test_numbers_without_a_sign_cannot_flip(dtype):
    with pytest.raises(TypeError, match=dtype):
        diagnostics.sign_flips({"w": jnp.ones(2, dtype)}, {"w": jnp.ones(2, dtype)})
