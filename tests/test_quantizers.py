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

from stam_jax import Binary, LeastSquares, PowerOfTwo, Quantizer, Ternary, Uniform, _assignment
from stam_jax._packed import layout
from stam_jax.quantizers import decode, encode, levels_of, nearest
from tests import reference_quantizers as reference
from tests.helpers import quick_jit

project: Any = _assignment.project  # Takes NumPy's arrays too.

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
# One of each way to fit: a mean, a search for one number, a search for two.
each_fit = pytest.mark.parametrize("kind", [Binary, Ternary, LeastSquares])
scaled_kinds = pytest.mark.parametrize("kind", KINDS[:-1])


levels_for = quick_jit(levels_of, static_argnums=0)
to_nearest, to_codes, to_weights = quick_jit(nearest), quick_jit(encode), quick_jit(decode)


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
    levels = levels_for(Binary(**options), w)
    codes = to_codes(w, levels)
    assert (codes.dtype, codes.shape) == (jnp.uint8, w.shape)
    np.testing.assert_array_equal(codes, w >= 0)
    np.testing.assert_array_equal(to_weights(codes, levels), to_nearest(w, levels))


@every_sharing
def test_there_is_a_scale_for_each_group_and_no_more(options, parts):
    scales = jax.eval_shape(Binary(**options).scales, normal(*SHAPE))
    assert scales.ndim == len(SHAPE)
    assert scales.size == len(list(reference.groups(SHAPE, *parts)))


def test_odd_but_for_zeros_and_in_proportion_to_the_weights():
    w = normal(*SHAPE)
    y = project(Binary(), w)
    np.testing.assert_array_equal(project(Binary(), -w), -y)
    np.testing.assert_array_equal(project(Binary(), 4 * w), 4 * y)


# Ties, zeros, and what is not finite.


@every_kind
def test_weights_of_any_size_have_a_projection_that_stays(kind):
    exponents = np.arange(-149, 120)  # From the least subnormal number, a column of weights each.
    for w in (normal(8, 1), np.ones((8, 1)), np.ones((1, 1))):
        y = project(kind(), np.float32(np.ldexp(np.float64(w), exponents)))
        assert np.all(np.isfinite(y))
        # Where levels are next to the smallest normal number, processors may take them for zero.
        np.testing.assert_allclose(project(kind(), y), y, rtol=1e-5, atol=2e-38)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_sign_of_zero_is_plus(zero):
    w = jnp.array([zero, -1.0])
    np.testing.assert_array_equal(project(Binary(scale=1.0), w), [1, -1])
    np.testing.assert_array_equal(project(Binary(axis=()), w), [0.5, -0.5])


@settings(max_examples=40)
@given(levels=st.sets(st.integers(-8, 8), min_size=4, max_size=4).map(sorted))
def test_a_weight_halfway_between_levels_goes_up(levels):
    steps: Any = np.arange(-40, 41, dtype=np.float32) / 4
    found = [jnp.full((1,), level, jnp.float32) for level in levels]
    y = to_nearest(steps, found)
    np.testing.assert_array_equal(y, reference.nearest(steps, levels))
    np.testing.assert_array_equal(to_weights(to_codes(steps, found), found), y)


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
    w = jnp.array([[np.nan, np.inf, -np.inf, 0.99]])
    np.testing.assert_array_equal(project(kind(scale=1.0), w), [[np.nan, 1, -1, 1]])


@every_kind
def test_an_infinite_weight_keeps_its_sign_and_a_nan_is_seen(kind):
    columns = [[np.inf, 1, -2], [-np.inf, 1, -2], [np.inf, -np.inf, 0], [np.nan, 1, 0], [1, -1, 1]]
    # In as many rows and columns as above, for which the projection is compiled.
    w = np.resize([np.resize(column, 8) for column in columns], (269, 8)).T.astype(np.float32)
    y = np.asarray(project(kind(), w))[:, :5]
    w = w[:, :5]
    np.testing.assert_array_equal(y[np.isinf(w)], w[np.isinf(w)])
    np.testing.assert_array_equal(np.isnan(y).all(axis=0), [False, False, False, True, False])
    np.testing.assert_array_equal(np.isnan(y).any(axis=0), [False, False, False, True, False])
    np.testing.assert_allclose(y[:, -1], w[:, -1], rtol=1e-6)


@every_kind
def test_zeros_are_their_own_projection_and_meet_no_nan(kind):
    zeros = np.zeros((8, 269), np.float32)
    with jax.debug_nans(True):
        np.testing.assert_array_equal(project(kind(), zeros), zeros)


@each_fit
def test_an_empty_array_is_its_own_projection(kind):
    quantizers = [kind(**options) for options in ({"axis": 0}, {"axis": ()}, {"group": 2})]
    shapes = [(0, 3), (4, 0), (0, 0)]
    for shape, quantizer in zip(shapes, quantizers, strict=True):
        y = jax.eval_shape(lambda w, q=quantizer: project(q, w), jnp.zeros(shape, jnp.bfloat16))
        assert (y.shape, y.dtype) == (shape, jnp.bfloat16)
    empty = [np.zeros(shape, np.float32) for shape in shapes]
    for scales in quick_jit(lambda arrays: [q.scales(w) for w in arrays for q in quantizers])(empty):
        assert np.all(np.isfinite(scales))


@each_fit
def test_a_scalar_has_a_scale_of_its_own(kind):
    for value in (-3.0, 0.0, 0.5):
        np.testing.assert_allclose(project(kind(axis=()), jnp.float32(value)), value, rtol=1e-6)
    with pytest.raises(ValueError, match="axis"):
        kind().scales(jnp.float32(1))


# The precision of scales.


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Binary, jnp.float16),
        (Ternary, jnp.bfloat16),
        (LeastSquares, jnp.bfloat16),
        *(pytest.param(kind, jnp.bfloat16, marks=pytest.mark.slow) for kind in (Binary, Uniform, PowerOfTwo)),
    ],
)
def test_many_equal_weights_of_short_floats_keep_their_value(kind, dtype):
    w = jnp.asarray(np.full(100_000, 0.1), dtype)
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
    np.testing.assert_allclose(Binary(axis=axis).scales(jnp.asarray(w)), expected, rtol=2e-6)


@pytest.mark.usefixtures("x64")
def test_float64_is_kept():
    w = jnp.array([1.0, 1 / 3], jnp.float64)
    assert Binary(axis=()).scales(w).dtype == jnp.float64
    np.testing.assert_allclose(Binary(axis=()).scales(w), [2 / 3], rtol=1e-15)


# Which weights share a scale.


@pytest.mark.parametrize("kind", [Binary, LeastSquares, pytest.param(Ternary, marks=pytest.mark.slow)])
def test_stacked_layers_heads_and_groups_are_matrices_of_their_own(kind):
    """Each against the channels of a matrix, whose columns are its groups."""
    w = normal(8, 3, 2)
    stack, heads, groups = (kind(axis=(1, -1)), kind(axis=(-2, -1)), kind(axis=(-2, -1), group=4))
    shared = kind(axis=-1)
    plain = lambda q, w: nearest(w, levels_of(q, w))
    columns, rows = w.reshape(8, 6), w.reshape(24, 2)
    halves = w.reshape(2, 4, 6).transpose(1, 0, 2).reshape(4, 12)
    found, alone = quick_jit(
        lambda: (
            [plain(q, w) for q in (stack, heads, groups, shared)],
            [plain(kind(), matrix) for matrix in (columns, columns, halves, rows)],
        )
    )()
    alone[2] = alone[2].reshape(4, 2, 6).transpose(1, 0, 2)
    for y, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(y, np.reshape(expected, w.shape), rtol=1e-6)
    assert not np.allclose(found[0], found[3], rtol=1e-2)


def test_stacked_layers_are_those_of_a_loop():
    w = normal(3, 8, 2)
    each = np.stack([project(Binary(), layer) for layer in w])
    np.testing.assert_allclose(project(Binary(axis=(0, -1)), w), each, rtol=1e-6)


def test_an_axis_as_int_tuple_or_none_is_the_same_axis():
    w = normal(4, 3)
    for other in (Binary(axis=1), Binary(axis=(1,)), Binary(axis=None)):
        np.testing.assert_array_equal(other.scales(jnp.asarray(w)), Binary().scales(jnp.asarray(w)))


@pytest.mark.parametrize(
    ("quantizer", "shape", "scales"),
    [
        (Binary(axis=(-2, -1), group=8), (32, 4, 8), (4, 4, 8)),
        (Binary(group=8, group_axis=-2), (3, 3, 32, 8), (1, 1, 4, 8)),
        (Binary(axis=(0, 1, -1), group=8), (3, 3, 32, 8), (3, 3, 4, 8)),
        (Binary(axis=0, group=2), (8, 6), (8, 3)),
        (LeastSquares(group=2), (6, 5), (2, 3, 5)),
    ],
    ids=str,
)
def test_the_scales_of_groups_divide_their_axis(quantizer, shape, scales):
    assert jax.eval_shape(quantizer.scales, jnp.ones(shape)).shape == scales


@pytest.mark.parametrize("group", [6, 64])
def test_an_axis_that_is_not_longer_than_a_group_is_one_group(group):
    w = normal(6, 4)
    np.testing.assert_array_equal(project(Binary(group=group), w), project(Binary(), w))


@pytest.mark.parametrize(
    ("options", "shape", "said"),
    [
        ({"axis": (1, 2)}, (4, 3), "axis 2"),
        ({"axis": 2}, (3, 3), "axis 2"),
        ({"axis": -3}, (3, 3), "axis -3"),
        ({"axis": 0}, (), "axis 0"),
        ({"axis": (0, -2)}, (3, 3), "repeated"),
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
    np.testing.assert_array_equal(kind(scale=0.5).scales(jnp.ones((3, 4))), [[0.5]])


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
        assert layout(binary, shape).levels == 2
        assert layout(binary, shape).bits == 1


# What JAX may do with them.


@every_kind
@pytest.mark.parametrize(
    "options", [{}, {"axis": (0, -1)}, {"axis": ()}, {"group": 2, "group_axis": 1}], ids=str
)
def test_ranks_are_promoted_nowhere(kind, options):
    quantizer = kind(**options)
    with jax.numpy_rank_promotion("raise"):
        levels = jax.eval_shape(lambda w: levels_of(quantizer, w), normal(*SHAPE))
        assert all(len(level.shape) == len(SHAPE) for level in levels)
        for use in (nearest, lambda w, levels: decode(encode(w, levels), levels)):
            y = jax.eval_shape(lambda w, use=use: use(w, levels_of(quantizer, w)), normal(*SHAPE))
            assert y.shape == SHAPE


def test_jit_and_vmap_change_nothing():
    binary, w = Binary(axis=(0, -1), group=2), normal(2, *SHAPE)
    plain = lambda w: nearest(w, levels_of(binary, w))
    each = np.stack([plain(part) for part in w])
    np.testing.assert_allclose(jax.jit(jax.vmap(plain))(w), each, rtol=1e-6)
    np.testing.assert_allclose(project(binary, w[0]), each[0], rtol=1e-6)
