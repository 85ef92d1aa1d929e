"""Which weights share a scale, and the projection onto binary weights: exact and least-squares optimal."""

import dataclasses
import itertools
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stam_jax import Binary, LeastSquares, PowerOfTwo, Quantizer, Ternary, Uniform
from stam_jax._assignment import project
from stam_jax.quantizers import bits_per_weight, decode, encode, level_count, levels_of, nearest
from tests import reference_quantizers as reference

SHAPE = (2, 4, 3)
# Each way to share a scale, and its groups: channels, group, group_axis.
SHARING: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "default": ({}, ((-1,),)),
    "first": ({"axis": 0}, ((0,),)),
    "middle": ({"axis": 1}, ((1,),)),
    "tuple": ({"axis": (2,)}, ((-1,),)),
    "all": ({"axis": ()}, ((),)),
    "stack": ({"axis": (0, -1)}, ((0, -1),)),
    "group": ({"group": 2, "group_axis": -2}, ((-1,), 2, 1)),
    "group of a stack": ({"axis": (0, -1), "group": 2}, ((0, -1), 2, 1)),
    "group of all": ({"axis": (), "group": 1, "group_axis": 0}, ((), 1, 0)),
}
every_sharing = pytest.mark.parametrize(("options", "parts"), SHARING.values(), ids=SHARING)
# Zeros and ties included; nothing so small or so large that squares leave float32.
VALUES = st.floats(-1e6, 1e6, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0)
WEIGHTS = hnp.arrays(np.float32, SHAPE, elements=VALUES)
KINDS: list[type[Any]] = [Binary, Ternary, Uniform, PowerOfTwo, LeastSquares]
every_kind = pytest.mark.parametrize("kind", KINDS)
scaled_kinds = pytest.mark.parametrize("kind", KINDS[:-1])


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def by_groups(w: np.ndarray, *parts: Any) -> np.ndarray:
    """The binary weights of each group by itself, in float64."""
    y = np.full(w.shape, np.nan)
    for index in reference.groups(w.shape, *parts):
        y[index] = reference.binary(w[index])
    return y


# The projection.


@every_sharing
@settings(max_examples=20)
@given(w=WEIGHTS)
def test_the_projection_is_the_mean_size_times_the_sign(options, parts, w):
    y = project(Binary(**options), w)
    assert (y.shape, y.dtype) == (w.shape, w.dtype)
    np.testing.assert_allclose(y, by_groups(w, *parts), rtol=1e-6)


@every_sharing
@settings(max_examples=20)
@given(w=WEIGHTS, t=st.floats(0, 1))
def test_all_the_way_to_the_projection_has_the_same_projection(options, parts, w, t):
    binary = Binary(**options)
    y = np.float64(project(binary, w))
    np.testing.assert_allclose(project(binary, np.float32(y)), y, rtol=1e-6)
    # Rounding may take the sign of what is next to zero.
    between = (1 - t) * w + t * y
    between = np.float32(np.where((between >= 0) == (y >= 0), between, y))
    np.testing.assert_allclose(project(binary, between), y, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 2, 5, 8])
@settings(max_examples=15)
@given(data=st.data())
def test_no_signs_and_scale_come_closer(count, data):
    w = data.draw(hnp.arrays(np.float64, count, elements=VALUES))
    error = np.sum((w - np.asarray(project(Binary(axis=()), w))) ** 2)
    assert error <= reference.least_error(w, reference.BINARY) * (1 + 1e-12)


@given(w=WEIGHTS)
def test_with_a_fixed_scale_each_weight_goes_to_the_nearer_value(w):
    for scale in (1.0, 0.25):
        expected = np.where(w >= 0, scale, -scale)
        np.testing.assert_array_equal(project(Binary(scale=scale), w), expected)


@every_sharing
@settings(max_examples=20)
@given(w=WEIGHTS)
def test_codes_and_scales_say_all_of_the_projection(options, parts, w):
    levels = jax.jit(levels_of, static_argnums=0)(Binary(**options), w)
    codes = encode(w, levels)
    assert (codes.dtype, codes.shape) == (jnp.uint8, w.shape)
    np.testing.assert_array_equal(codes, w >= 0)
    np.testing.assert_array_equal(decode(codes, levels), nearest(w, levels))


@every_sharing
def test_there_is_a_scale_for_each_group_and_no_more(options, parts):
    scales = Binary(**options).scales(normal(*SHAPE))
    assert scales.ndim == len(SHAPE)
    assert scales.size == len(list(reference.groups(SHAPE, *parts)))


def test_odd_but_for_zeros_and_in_proportion_to_the_weights():
    w = normal(*SHAPE)
    y = project(Binary(), w)
    np.testing.assert_array_equal(project(Binary(), -w), -y)
    np.testing.assert_array_equal(project(Binary(), 4 * w), 4 * y)


# Ties, zeros, and what is not finite.


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_zero_is_plus(zero):
    w = jnp.array([zero, -1.0])
    np.testing.assert_array_equal(project(Binary(scale=1.0), w), [1, -1])
    np.testing.assert_array_equal(project(Binary(axis=()), w), [0.5, -0.5])


@settings(max_examples=40)
@given(levels=st.lists(st.integers(-8, 8), min_size=2, max_size=5, unique=True).map(sorted))
def test_a_weight_halfway_between_levels_goes_up(levels):
    steps: Any = np.arange(-40, 41, dtype=np.float32) / 4
    found = [jnp.full((1,), level, jnp.float32) for level in levels]
    np.testing.assert_array_equal(nearest(steps, found), reference.nearest(steps, levels))
    np.testing.assert_array_equal(decode(encode(steps, found), found), nearest(steps, found))


def test_halfway_between_the_largest_numbers_is_between_them():
    large: Any = jnp.float32(3e38)
    levels = [large / 4, large]
    np.testing.assert_array_equal(nearest(large * jnp.array([0.5, 0.7]), levels), levels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_sharing
def test_a_nan_or_an_infinity_takes_its_whole_group_and_no_other(options, parts, bad):
    w = np.ones(SHAPE, np.float32)
    w[1, 2, 0], w[0, 0, 0] = bad, -1.0
    expected = np.where(w >= 0, 1.0, -1.0)
    (taken,) = [i for i in reference.groups(SHAPE, *parts) if not np.all(np.isfinite(w[i]))]
    expected[taken] *= np.abs(bad)
    np.testing.assert_array_equal(project(Binary(**options), w), expected)


@scaled_kinds
def test_at_a_fixed_scale_nan_stays_nan_and_an_infinity_goes_to_the_last_level(kind):
    w = jnp.array([[np.nan, np.inf, -np.inf, 0.9]])
    np.testing.assert_array_equal(project(kind(scale=1.0), w), [[np.nan, 1, -1, np.float32(1)]])


@every_kind
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_an_infinite_weight_keeps_its_sign_and_a_nan_is_seen(kind, dtype):
    for bad in ([np.inf, 1.0, -2.0], [-np.inf, 1.0, -2.0], [np.inf, -np.inf, 0.0]):
        y = project(kind(axis=()), jnp.array(bad, dtype))
        is_infinite = np.isinf(bad)
        np.testing.assert_array_equal(np.float32(y)[is_infinite], np.array(bad)[is_infinite])
        assert not jnp.any(jnp.isnan(y))
    y = project(kind(axis=()), jnp.array([1.0, np.nan], dtype))
    assert y.dtype == dtype
    assert jnp.all(jnp.isnan(y))


@every_kind
@pytest.mark.parametrize("options", [{}, {"axis": ()}, {"group": 2}], ids=str)
def test_zeros_are_their_own_projection_and_meet_no_nan(kind, options):
    zeros = jnp.zeros((4, 2))
    with jax.debug_nans(True):
        y = project(kind(**options), zeros)
    np.testing.assert_array_equal(y, zeros)


@every_kind
@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"axis": ()}, {"group": 2}], ids=str)
def test_an_empty_array_is_its_own_projection(kind, options):
    quantizer = kind(**options)
    for shape in ((0, 3), (4, 0), (0, 0)):
        empty = jnp.zeros(shape, jnp.bfloat16)
        # Without a program for each shape.
        y = nearest(empty.astype(jnp.float32), levels_of(quantizer, empty))
        assert y.shape == shape
        assert np.all(np.isfinite(quantizer.scales(empty)))


@every_kind
def test_a_scalar_has_a_scale_of_its_own(kind):
    for value in (-3.0, 0.0, 0.5):
        assert project(kind(axis=()), jnp.asarray(value)) == value
    with pytest.raises(ValueError, match="axis"):
        kind().scales(jnp.asarray(1.0))


# The precision of scales.


@every_kind
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_many_equal_weights_of_short_floats_keep_their_value(kind, dtype):
    w = jnp.full((100_000,), 0.1, dtype)
    np.testing.assert_array_equal(project(kind(axis=()), w), w)


def test_the_scales_of_short_floats_are_float32():
    for dtype in (jnp.float16, jnp.bfloat16):
        scales = Binary(axis=()).scales(jnp.array([1.0, 2.0**-9], dtype))
        assert scales.dtype == jnp.float32
        assert scales[0] == (1 + 2.0**-9) / 2
        assert Binary(scale=0.1).scales(jnp.ones((2, 2), dtype)).dtype == jnp.float32


@pytest.mark.parametrize(("axis", "shape"), [((), (1_000_000,)), (-1, (3, 3, 256, 512)), (0, (2, 600_000))])
def test_a_mean_of_many_in_float32_is_that_in_float64(axis, shape):
    w = normal(*shape)
    axes = tuple(i for i in range(w.ndim) if axis == () or i != axis % w.ndim)
    expected = np.mean(np.abs(np.float64(w)), axis=axes, keepdims=True)
    np.testing.assert_allclose(Binary(axis=axis).scales(w), expected, rtol=2e-6)


@pytest.mark.usefixtures("x64")
def test_float64_is_kept():
    w = jnp.array([1.0, 1 / 3], jnp.float64)
    assert Binary(axis=()).scales(w).dtype == jnp.float64
    np.testing.assert_allclose(Binary(axis=()).scales(w), [2 / 3], rtol=1e-15)


# Which weights share a scale.


@every_kind
def test_attention_kernels_have_a_channel_for_each_place_of_each_head(kind):
    w = normal(8, 2, 3)
    flat = project(kind(axis=-1), w.reshape(8, 6))
    np.testing.assert_allclose(project(kind(axis=(-2, -1)), w), flat.reshape(w.shape), rtol=1e-6)


@every_kind
def test_stacked_layers_are_layers_of_their_own(kind):
    w = normal(3, 8, 2)
    each = np.stack([project(kind(), layer) for layer in w])
    np.testing.assert_allclose(project(kind(axis=(0, -1)), w), each, rtol=1e-6)
    shared = project(kind(), w)
    assert not np.allclose(shared, each, rtol=1e-2)


@every_kind
def test_a_group_is_an_array_of_its_own(kind):
    w = normal(32, 4, 8)
    grouped = project(kind(axis=(-2, -1), group=8), w)
    parts = w.reshape(4, 8, 4, 8).transpose(0, 2, 3, 1).reshape(-1, 8)
    alone = np.asarray(project(kind(axis=0), parts)).reshape(4, 4, 8, 8).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(grouped, alone.reshape(w.shape), rtol=1e-6)


def test_an_axis_as_int_tuple_or_none_is_the_same_axis():
    w = normal(4, 3)
    for other in (Binary(axis=-1), Binary(axis=1), Binary(axis=(1,)), Binary(axis=None)):
        np.testing.assert_array_equal(other.scales(w), Binary().scales(w))


def test_the_scales_of_groups_divide_their_axis():
    assert Binary(axis=(-2, -1), group=8).scales(jnp.ones((32, 4, 8))).shape == (4, 4, 8)
    assert Binary(group=8, group_axis=-2).scales(jnp.ones((3, 3, 32, 8))).shape == (1, 1, 4, 8)
    assert Binary(axis=(0, 1, -1), group=8).scales(jnp.ones((3, 3, 32, 8))).shape == (3, 3, 4, 8)
    assert Binary(axis=0, group=2).scales(jnp.ones((8, 6))).shape == (8, 3)
    assert LeastSquares(group=2).scales(jnp.ones((6, 5))).shape == (2, 3, 5)


@every_kind
def test_an_axis_that_is_not_longer_than_a_group_is_one_group(kind):
    w = normal(6, 4)
    for group in (6, 64):
        np.testing.assert_array_equal(project(kind(group=group), w), project(kind(), w))


@pytest.mark.parametrize(
    ("options", "shape", "said"),
    [
        ({"axis": (1, 2)}, (4, 3), "axis=2"),
        ({"axis": 2}, (3, 3), "axis=2"),
        ({"axis": -3}, (3, 3), "axis=-3"),
        ({"axis": 0}, (), "axis=0"),
        ({"axis": (0, -2)}, (3, 3), "twice"),
        ({}, (3,), "scale of its own"),
        ({"axis": (0, 1)}, (3, 3), "scale of its own"),
        ({"group": 4}, (6, 2), "divide"),
        ({"axis": 0, "group": 4}, (2, 6), "divide"),
        ({"group": 2}, (3, 3, 4, 2), "group_axis"),
        ({"axis": (), "group": 2}, (4, 4), "group_axis"),
        ({"group": 2, "group_axis": -1}, (4, 4), "group_axis"),
        ({"axis": 0, "group": 2, "group_axis": 0}, (4, 4), "group_axis"),
        ({"group": 2, "group_axis": 3}, (4, 4), "group_axis"),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(options, shape, said):
    for kind in (Binary, LeastSquares):
        with pytest.raises(ValueError, match=said):
            kind(**options).scales(jnp.ones(shape))


@every_kind
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"axis": "channel"}, TypeError, "axis"),
        ({"axis": 1.0}, TypeError, "axis"),
        ({"axis": True}, TypeError, "axis"),
        ({"axis": (0, "1")}, TypeError, "axis"),
        ({"axis": [0, 1]}, TypeError, "axis"),
        ({"group": "64"}, TypeError, "group"),
        ({"group": 2.0}, TypeError, "group"),
        ({"group": 0}, ValueError, "group"),
        ({"group": 4, "group_axis": "0"}, TypeError, "group_axis"),
        ({"group_axis": 0}, ValueError, "group"),
    ],
    ids=str,
)
def test_settings_that_name_no_axis_or_group_are_refused(kind, options, error, said):
    with pytest.raises(error, match=said):
        kind(**options)


@scaled_kinds
@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (0, ValueError),
        (-1.0, ValueError),
        (np.inf, ValueError),
        (np.nan, ValueError),
        (np.ones(2), ValueError),
        (jnp.ones(()), ValueError),
        ("channel", TypeError),
        (True, TypeError),
    ],
    ids=str,
)
def test_a_fixed_scale_that_is_no_positive_number_is_refused(kind, scale, error):
    with pytest.raises(error, match="scale"):
        kind(scale=scale)


@scaled_kinds
def test_a_fixed_scale_is_one_number_for_all(kind):
    scales = kind(scale=0.5).scales(jnp.ones((3, 4)))
    assert scales.shape == (1, 1)
    assert scales[0, 0] == 0.5


# As objects.


def test_equal_quantizers_are_one_key():
    kinds: Any = {Binary(): 1, Binary(axis=None): 2, Binary(axis=0): 3, Binary(scale=1.0): 4, Ternary(): 5}
    assert list(kinds.values()) == [2, 3, 4, 5]
    assert Binary(axis=(0, 1)) == Binary(axis=(0, 1))
    assert Binary() != Ternary()


@every_kind
def test_a_quantizer_is_a_frozen_object_of_keywords(kind):
    assert isinstance(kind(), Quantizer)
    assert isinstance(hash(kind(axis=(0, -1), group=2)), int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().axis = 0
    with pytest.raises(TypeError):
        kind(0)


def test_one_weight_takes_one_bit():
    for binary, shape in itertools.product((Binary(), Binary(scale=1.0), Binary(group=2)), ((4, 3), (0, 3))):
        assert level_count(binary, shape) == 2
        assert bits_per_weight(binary, shape) == 1


# What JAX may do with them.


@every_kind
@pytest.mark.parametrize(
    "options", [{}, {"axis": (0, -1)}, {"axis": ()}, {"group": 2, "group_axis": 1}], ids=str
)
def test_ranks_are_promoted_nowhere(kind, options):
    with jax.numpy_rank_promotion("raise"):
        y = project(kind(**options), normal(*SHAPE))
    assert np.all(np.isfinite(y))


@every_sharing
def test_jit_and_vmap_change_nothing(options, parts):
    binary, w = Binary(**options), normal(5, *SHAPE)
    plain = lambda w: nearest(w, levels_of(binary, w))
    each = jnp.stack([plain(part) for part in w])
    np.testing.assert_allclose(jax.jit(jax.vmap(plain))(w), each, rtol=1e-6)
    np.testing.assert_allclose(project(binary, w[0]), each[0], rtol=1e-6)
