"""The measures against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stam_jax import Binary, LinearBlend, quantisation_gap, quantized_leaves, sign_flips, stam
from tests import helpers

rng = np.random.default_rng(0)
PARAMS = {
    "first": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
    "second": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
    "bias": jnp.full(4, 100.0),
}
TENSOR = Binary(scale="tensor")


def numpy_gap(xs, vs):
    xs, vs = ([np.float64(leaf) for leaf in leaves] for leaves in (xs, vs))
    ys = [np.where(v >= 0, 1.0, -1.0) * np.mean(np.abs(v)) for v in vs]
    distance = sum(np.sum((x - y) ** 2) for x, y in zip(xs, ys, strict=True))
    return np.sqrt(distance / sum(np.sum(y**2) for y in ys))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gap_is_the_relative_distance_over_all_quantised_leaves_together(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    optimizer = stam(0.5, quantizer=TENSOR, relaxation=LinearBlend(0.5))
    state = helpers.begin(optimizer, params)
    for _ in range(2):
        params, state = helpers.take_step(optimizer, jax.tree.map(jnp.sin, params), state, params)
    leaves = quantized_leaves(state, params)
    expected = numpy_gap(*zip(*((params[name], leaves[name].latent) for name in leaves), strict=True))
    gap = jax.jit(quantisation_gap)(state, params)
    assert (gap.shape, gap.dtype) == ((), jnp.float32)
    # The hard weights are given in the parameters' own dtype.
    np.testing.assert_allclose(gap, expected, rtol=1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("x", [jnp.array([[2.0, -2.0]]), jnp.zeros((2, 2)), jnp.zeros((0, 2))])
def test_binary_weights_have_no_gap(x):
    assert quantisation_gap(stam(0.1, quantizer=TENSOR).init(x), x) == 0


def test_weights_at_a_distance_from_a_hard_network_of_zeros_have_no_finite_gap():
    state = stam(0.1, quantizer=TENSOR).init(jnp.zeros((1, 2)))
    assert quantisation_gap(state, jnp.ones((1, 2))) == np.inf


def test_a_gap_needs_a_state_of_stam():
    with pytest.raises(ValueError, match="no StamState"):
        quantisation_gap((), PARAMS)


def test_flips_are_the_share_of_signs_that_differ():
    before, after = (
        [rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=11).astype(np.float32)] for _ in range(2)
    )
    differing = sum(np.sum(np.sign(a) != np.sign(b)) for a, b in zip(before, after, strict=True))
    flips = jax.jit(sign_flips)(before, after)
    assert (flips.shape, flips.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(flips, differing / 32, rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0.0, -0.0, -1.0], [1.0, 2.0, -3.0], 0.0),
        ([0.0, 0.0], [-1.0, 1.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_zero_counts_as_plus_and_nothing_as_no_flip(before, after, expected):
    assert sign_flips({"w": jnp.array(before)}, {"w": jnp.array(after)}) == expected


def test_trees_without_leaves_have_no_flips():
    assert sign_flips({}, {}) == 0


@pytest.mark.parametrize(
    "after", [{"a": jnp.ones(3)}, {"b": jnp.ones(2)}, {}, {"a": {"deeper": jnp.ones(2)}}, [jnp.ones(2)]]
)
def test_flips_need_trees_of_one_shape(after):
    with pytest.raises(ValueError, match=r"shapes .* differ|structure|[Dd]ict|[Ll]ist|key"):
        sign_flips({"a": jnp.ones(2)}, after)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "complex64"])
def test_numbers_without_a_sign_cannot_flip(dtype):
    with pytest.raises(TypeError, match=f"arrays of dtype {dtype} have no sign"):
        sign_flips({"w": jnp.ones(2, dtype)}, {"w": jnp.ones(2, dtype)})
