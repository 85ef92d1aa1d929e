"""The projection onto binary weights: exact, least-squares optimal, and with its edge cases stated."""

import itertools
import math
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stam_jax import Binary
from tests import reference

KINDS = [
    Binary(scale=None),
    Binary(scale="tensor"),
    Binary(scale="channel"),
    Binary(scale="channel", axis=0),
    Binary(scale="channel", axis=1),
]
# Few shapes, since each is compiled on its own.
SHAPES = st.sampled_from([(1, 1), (4, 3), (2, 3, 4)])
# Zeros and ties included; nothing so small or so large that squares leave float32.
VALUES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0)
WEIGHTS = hnp.arrays(np.float32, SHAPES, elements=VALUES)
every_kind = pytest.mark.parametrize("binary", KINDS, ids=lambda b: f"{b.scale}{b.axis}")


@every_kind
@given(v=WEIGHTS)
def test_the_projection_is_the_mean_size_times_the_sign(binary, v):
    y = binary.project(v)
    assert (y.shape, y.dtype) == (v.shape, v.dtype)
    np.testing.assert_allclose(y, reference.project(v, binary.scale, binary.axis), rtol=1e-6)


@every_kind
@given(v=WEIGHTS)
def test_the_projection_lies_in_the_set(binary, v):
    assert binary.contains(binary.project(v))


@every_kind
@given(v=WEIGHTS)
def test_projecting_twice_changes_nothing(binary, v):
    once = binary.project(v)
    np.testing.assert_allclose(binary.project(once), once, rtol=1e-6)


@every_kind
@given(v=WEIGHTS, t=st.floats(0, 1))
def test_the_way_to_the_projection_has_the_same_projection(binary, v, t):
    y = np.asarray(binary.project(v))
    between = np.float32((1 - t) * np.float64(v) + t * np.float64(y))
    np.testing.assert_allclose(binary.project(between), y, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", ["tensor", None])
@given(v=hnp.arrays(np.float64, st.sampled_from([1, 2, 5, 8]), elements=VALUES))
def test_no_sign_pattern_and_scale_come_closer(scale, v):
    distance = np.sum((v - np.asarray(Binary(scale=scale).project(v))) ** 2)
    for signs in itertools.product((-1.0, 1.0), repeat=len(v)):
        # The best scale of a pattern; a negative one belongs to the opposite pattern.
        alpha = max(0.0, np.dot(v, signs) / len(v)) if scale else 1.0
        assert distance <= np.sum((v - alpha * np.array(signs)) ** 2) * (1 + 1e-12)


@given(v=hnp.arrays(np.float32, (4, 3), elements=VALUES))
def test_each_channel_is_a_tensor_of_its_own(v):
    tensor = Binary(scale="tensor")
    by_rows = np.stack([tensor.project(row) for row in v])
    np.testing.assert_allclose(Binary(axis=0).project(v), by_rows, rtol=1e-6)
    np.testing.assert_allclose(Binary(axis=-1).project(v.T).T, by_rows, rtol=1e-6)


@every_kind
@given(v=WEIGHTS)
def test_sign_bits_and_scales_say_all_of_the_projection(binary, v):
    codes, scales = binary.codes(v), binary.scales(v)
    assert (codes.dtype, codes.shape) == (jnp.uint8, v.shape)
    assert jnp.all(codes <= 1)
    assert scales.ndim == v.ndim
    np.testing.assert_array_equal(binary.decode(codes, scales), binary.project(v))


@every_kind
def test_jit_and_vmap_change_nothing(binary):
    v = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
    each = jnp.stack([binary.project(part) for part in v])
    np.testing.assert_allclose(jax.vmap(binary.project)(v), each, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(binary.project)(v[0]), each[0], rtol=1e-6)
    assert jnp.all(jax.jit(jax.vmap(binary.contains))(each))


# Edge cases.


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_zero_is_plus(zero):
    np.testing.assert_array_equal(Binary(scale=None).project(jnp.array([zero, -1.0])), [1, -1])
    np.testing.assert_array_equal(Binary(scale="tensor").project(jnp.array([zero, -1.0])), [0.5, -0.5])


@pytest.mark.parametrize("binary", KINDS[1:])
def test_a_group_of_zeros_projects_to_zeros_which_lie_in_the_set(binary):
    zeros = jnp.zeros((2, 3))
    np.testing.assert_array_equal(binary.project(zeros), zeros)
    assert binary.contains(zeros)


@every_kind
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_array_is_its_own_projection(binary, shape):
    empty = jnp.zeros(shape, jnp.bfloat16)
    y = binary.project(empty)
    assert (y.shape, y.dtype) == (shape, jnp.bfloat16)
    assert binary.contains(empty)


@pytest.mark.parametrize("binary", [Binary(scale="tensor"), Binary(scale=None)])
def test_a_scalar_has_a_scale_of_its_own(binary):
    assert binary.project(-3.0) == (-3.0 if binary.scale else -1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("binary", KINDS[1:], ids=lambda b: f"{b.scale}{b.axis}")
def test_a_nan_or_an_infinity_takes_its_whole_group_and_no_other(binary, bad):
    v = np.ones((3, 4), np.float32)
    v[1, 2] = bad
    expected = reference.project(v, binary.scale, binary.axis)
    y = binary.project(v)
    np.testing.assert_array_equal(y, expected)
    assert (
        np.sum(~np.isfinite(expected))
        == {"tensor": 12, "channel": v.shape[1 - binary.axis % 2]}[binary.scale]
    )
    assert not binary.contains(y)


def test_without_scales_too_a_nan_does_not_pass_for_a_weight():
    y = Binary(scale=None).project(jnp.array([np.nan, 1.0]))
    assert np.isnan(y[0])
    assert not Binary(scale=None).contains(y)


def test_without_scales_an_infinity_has_a_nearest_weight():
    np.testing.assert_array_equal(Binary(scale=None).project(jnp.array([np.inf, -np.inf])), [1, -1])


# The scale is a mean that does not lose digits.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2_000_000,), (500, 4000)])
def test_millions_of_equal_entries_have_their_value_as_the_mean(dtype, shape):
    v = jnp.full(shape, 0.1, dtype)
    np.testing.assert_array_equal(Binary(scale="tensor").project(v)[:2], v[:2])


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        ("tensor", (3_000_000,)),
        ("tensor", (3, 3, 512, 512)),
        ("channel", (3_000_000, 1)),
        ("channel", (3, 3, 512, 512)),
    ],
)
def test_a_mean_over_millions_in_float32_is_that_in_float64(scale, shape):
    v = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    axes = tuple(range(v.ndim - 1)) if scale == "channel" else None
    expected = np.mean(np.abs(v.astype(np.float64)), axis=axes, keepdims=True)
    np.testing.assert_allclose(Binary(scale=scale).scales(v), expected, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_scales_of_short_floats_are_float32(dtype):
    binary = Binary(scale="tensor")
    v = jnp.array([1.0, 2.0**-9], dtype)
    assert binary.scales(v).dtype == jnp.float32
    assert binary.scales(v)[0] == (1 + 2.0**-9) / 2
    assert binary.project(v).dtype == dtype


# Membership is exact.


@pytest.mark.parametrize(
    ("binary", "y", "inside"),
    [
        (Binary(scale="tensor"), [[0.3, -0.3], [0.3, 0.3]], True),
        (Binary(scale="tensor"), [[0.3, -0.3], [0.3, np.nextafter(np.float32(0.3), 1)]], False),
        (Binary(scale="tensor"), [[0.3, -0.3], [0.3, 0.0]], False),
        (Binary(scale="tensor"), [[1.0, -1.0], [2.0, -2.0]], False),
        (Binary(axis=0), [[1.0, -1.0], [2.0, -2.0]], True),
        (Binary(axis=-1), [[1.0, -1.0], [2.0, -2.0]], False),
        (Binary(axis=-1), [[1.0, -2.0], [-1.0, -2.0]], True),
        (Binary(scale=None), [[1.0, -1.0]], True),
        (Binary(scale=None), [[1.0, -np.nextafter(np.float32(1), 0)]], False),
        (Binary(scale=None), [[0.5, -0.5]], False),
        (Binary(scale="tensor"), [[math.inf, -math.inf]], False),
        (Binary(scale="tensor"), [[math.nan, math.nan]], False),
    ],
)
def test_the_set_holds_its_members_and_no_near_miss(binary, y, inside):
    assert bool(binary.contains(jnp.array(y, jnp.float32))) is inside


def test_one_weight_takes_one_bit():
    assert Binary().bits == 1


def test_equal_quantizers_are_one_key():
    kinds: Any = {Binary(): 1, Binary(scale="channel", axis=-1): 2, Binary(axis=0): 3}
    assert len(kinds) == 2


@pytest.mark.parametrize("scale", ["groups", 1.0, ""])
def test_unknown_scales_are_refused(scale):
    with pytest.raises(ValueError, match=r"scale must be 'tensor', 'channel', 'group' or None; got"):
        Binary(scale=scale)


@pytest.mark.parametrize("method", ["project", "contains", "scales"])
@pytest.mark.parametrize(("axis", "shape"), [(-1, (3,)), (-1, ()), (2, (3, 3)), (-3, (3, 3))])
def test_channels_need_a_matrix_with_that_axis(method, axis, shape):
    with pytest.raises(ValueError, match=rf"axis={axis}\) needs an array of rank 2 or more with that axis"):
        getattr(Binary(axis=axis), method)(jnp.ones(shape))
