"""More values than two: exact optima, groups along the input axis, and what codes and scales say."""

import itertools
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stam_jax import Binary, LeastSquares, PowerOfTwo, Ternary, Uniform, hard_params, stam
from tests import helpers

# Compiled once for each quantiser and shape, for many examples.
project = jax.jit(lambda quantizer, v: quantizer.project(v), static_argnums=0)
codes_of = jax.jit(lambda quantizer, v: quantizer.codes(v), static_argnums=0)
scales_of = jax.jit(lambda quantizer, v: quantizer.scales(v), static_argnums=0)
decode = jax.jit(lambda quantizer, codes, scales: quantizer.decode(codes, scales), static_argnums=0)
contains = jax.jit(lambda quantizer, y: quantizer.contains(y), static_argnums=0)

LEVELS = {
    Ternary: [-1.0, 0.0, 1.0],
    Uniform: [j / 7 for j in range(-7, 8)],
    PowerOfTwo: sorted([0.0, *(sign * 2.0**-j for j in range(7) for sign in (-1, 1))]),
}
THREE_BITS = {
    Uniform: [-1.0, -2 / 3, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0],
    PowerOfTwo: [-1.0, -1 / 2, -1 / 4, 0.0, 1 / 4, 1 / 2, 1.0],
}
CASES = [
    (Ternary, {}, LEVELS[Ternary]),
    *((kind, {"bits": 3}, levels) for kind, levels in THREE_BITS.items()),
    (Uniform, {"bits": 4}, LEVELS[Uniform]),
    (PowerOfTwo, {"bits": 4}, LEVELS[PowerOfTwo]),
]
every_case = pytest.mark.parametrize(
    ("kind", "options", "levels"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
SCALES = [{"scale": "tensor"}, {"scale": "channel"}, {"scale": "group", "group": 2}, {"scale": None}]
# How scales are shared does not depend on how many levels there are.
few_cases = pytest.mark.parametrize(
    ("kind", "options", "levels"), CASES[:3], ids=lambda value: getattr(value, "__name__", None)
)
every_scale = pytest.mark.parametrize("sharing", SCALES, ids=lambda sharing: str(sharing["scale"]))
VALUES = st.floats(-1e3, 1e3, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-3 else 0.0)
WEIGHTS = hnp.arrays(np.float32, (2, 4, 2), elements=VALUES)


def best_distance(v: np.ndarray, levels: list[float]) -> float:
    """The least squared distance over every assignment of levels, each with its best scale."""
    distances = [np.sum(v**2)]
    for assignment in itertools.product(levels, repeat=len(v)):
        q = np.array(assignment)
        if np.any(q):
            alpha = max(np.dot(v, q) / np.dot(q, q), 0.0)
            distances.append(np.sum((v - alpha * q) ** 2))
    return min(distances)


@pytest.mark.usefixtures("x64")
@every_case
@settings(max_examples=25)
@given(data=st.data())
def test_no_assignment_and_scale_come_closer(kind, options, levels, data):
    # Few enough weights that all assignments can be tried.
    count = {3: 7, 7: 4, 15: 3}[len(levels)]
    v = data.draw(hnp.arrays(np.float64, count, elements=VALUES))
    y = np.asarray(project(kind(scale="tensor", **options), v))
    assert np.sum((v - y) ** 2) <= best_distance(v, levels) * (1 + 1e-9) + 1e-12


@every_case
@given(v=hnp.arrays(np.float32, 6, elements=st.floats(-2, 2, width=32)))
def test_without_scales_each_weight_goes_to_the_nearest_level(kind, options, levels, v):
    y = np.asarray(project(kind(scale=None, **options), v))
    nearest = np.min(np.abs(v[:, None] - np.array(levels)), axis=1)
    np.testing.assert_allclose(np.abs(v - y), nearest, atol=1e-6)
    assert np.all(np.isclose(y[:, None], np.array(levels), atol=1e-6).any(axis=1))


@few_cases
@every_scale
@settings(max_examples=15)  # For each of the 12 sets.
@given(v=WEIGHTS)
def test_the_projection_lies_in_the_set_and_stays(kind, options, levels, sharing, v):
    quantizer = kind(**sharing, **options)
    y = project(quantizer, v)
    assert (y.shape, y.dtype) == (v.shape, v.dtype)
    assert contains(quantizer, y)
    np.testing.assert_allclose(project(quantizer, y), y, rtol=1e-5)


@few_cases
@every_scale
@settings(max_examples=15)  # For each of the 12 sets.
@given(v=WEIGHTS)
def test_codes_count_the_levels_from_the_lowest(kind, options, levels, sharing, v):
    quantizer = kind(**sharing, **options)
    codes, scales = codes_of(quantizer, v), scales_of(quantizer, v)
    assert (codes.dtype, codes.shape) == (jnp.uint8, v.shape)
    assert len(levels) <= 2**quantizer.bits
    assert jnp.all(codes < len(levels))
    np.testing.assert_array_equal(decode(quantizer, codes, scales), project(quantizer, v))
    if sharing["scale"] == "tensor":
        expected = np.array(levels)[np.asarray(codes)] * float(scales.reshape(()))
        np.testing.assert_allclose(project(quantizer, v), expected, rtol=1e-5, atol=1e-6)


@every_case
@given(v=hnp.arrays(np.float32, 12, elements=VALUES))
def test_the_projection_is_odd_and_follows_the_scale_of_its_argument(kind, options, levels, v):
    quantizer = kind(scale="tensor", **options)
    y = np.asarray(project(quantizer, v))
    np.testing.assert_array_equal(project(quantizer, -v), -y)
    np.testing.assert_array_equal(project(quantizer, 4 * v), 4 * y)


@pytest.mark.parametrize("kind", [Binary, Ternary, Uniform, PowerOfTwo])
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_group_is_a_tensor_of_its_own(kind, axis):
    v: Any = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    tensor = kind(scale="tensor")
    expected = np.empty_like(v)
    for place, start, output in itertools.product(range(2), range(0, 6, 2), range(3)):
        part = slice(start, start + 2)
        expected[place, part, output] = tensor.project(v[place, part, output])
    # With the output axis first, the inputs are next: (outputs, inputs, places).
    turn = lambda a: jnp.asarray(a if axis == -1 else np.transpose(a, (2, 1, 0)))
    y = kind(scale="group", group=2, axis=axis).project(turn(v))
    np.testing.assert_allclose(y, turn(expected), rtol=1e-6)


@pytest.mark.parametrize("kind", [Binary, Ternary])
def test_fewer_inputs_than_a_group_are_one_group(kind):
    v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    grouped = kind(scale="group", group=64).project(v)
    np.testing.assert_allclose(grouped, kind(scale="channel").project(v), rtol=1e-6)


def test_inputs_that_do_not_divide_into_groups_are_refused_with_the_leaf_named():
    params = {"kernel": jnp.ones((6, 2))}
    with pytest.raises(ValueError, match=r"'kernel' .* cannot divide the 6 inputs"):
        stam(0.1, quantizer=Binary(scale="group", group=4)).init(params)


def test_the_heuristic_keeps_what_is_larger_than_seven_tenths_of_the_mean():
    v = np.random.default_rng(0).normal(size=(50, 3))
    y = np.asarray(Ternary(rule="heuristic").project(jnp.asarray(v, jnp.float32)))
    for channel in range(3):
        size = np.abs(v[:, channel])
        kept = size > 0.7 * size.mean()
        expected = np.where(kept, size[kept].mean() * np.sign(v[:, channel]), 0.0)
        np.testing.assert_allclose(y[:, channel], expected, rtol=1e-5)


def test_the_heuristic_is_close_to_the_optimum_and_never_better():
    v = jnp.asarray(np.random.default_rng(1).normal(size=(400, 8)), jnp.float32)
    distance = lambda rule: jnp.sum((v - Ternary(rule=rule).project(v)) ** 2)
    assert distance("exact") < distance("heuristic") < 1.01 * distance("exact")


def test_more_bits_come_closer():
    v = jnp.asarray(np.random.default_rng(2).normal(size=(400, 8)), jnp.float32)
    distance = lambda quantizer: float(jnp.sum((v - project(quantizer, v)) ** 2))
    errors = [distance(q) for q in (Binary(), Ternary(), Uniform(bits=3), Uniform(bits=4))]
    assert errors == sorted(errors, reverse=True)
    assert distance(Binary(scale="group", group=4)) < distance(Binary()) < distance(Binary(scale="tensor"))


@every_case
def test_many_equal_weights_in_bfloat16_keep_their_value(kind, options, levels):
    v = jnp.full((200_000,), 0.1, jnp.bfloat16)
    y = project(kind(scale="tensor", **options), v)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, v)


@few_cases
@every_scale
def test_jit_and_vmap_change_nothing(kind, options, levels, sharing):
    quantizer = kind(**sharing, **options)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
    each = jnp.stack([project(quantizer, part) for part in v])
    np.testing.assert_allclose(jax.vmap(quantizer.project)(v), each, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(quantizer.project)(v[0]), each[0], rtol=1e-6)


@few_cases
@every_scale
def test_zeros_and_empty_arrays_are_their_own_projection(kind, options, levels, sharing):
    quantizer = kind(**sharing, **options)
    for shape in ((4, 2), (0, 2), (4, 0)):
        zeros = jnp.zeros(shape)
        np.testing.assert_array_equal(project(quantizer, zeros), zeros)
        assert contains(quantizer, zeros)


@every_case
def test_a_nan_is_seen(kind, options, levels):
    for scale in ("tensor", None):
        y = kind(scale=scale, **options).project(jnp.array([1.0, jnp.nan]))
        assert jnp.isnan(y[1])


@every_case
def test_near_misses_are_not_in_the_set(kind, options, levels):
    for scale in ("tensor", None):
        quantizer = kind(scale=scale, **options)
        exact = jnp.array(levels, jnp.float32)
        assert contains(quantizer, exact)
        assert not contains(quantizer, exact.at[-1].mul(1.001).at[0].mul(0.999))
        assert not contains(quantizer, exact.at[0].set(jnp.inf))
        assert not contains(quantizer, exact.at[0].set(jnp.nan))
    assert not kind(scale=None, **options).contains(2 * exact)


@pytest.mark.parametrize("kind", [Uniform, PowerOfTwo])
def test_two_bits_are_ternary(kind):
    v = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    np.testing.assert_array_equal(kind(bits=2).project(v), Ternary().project(v))


@pytest.mark.parametrize("kind", [Uniform, PowerOfTwo])
@pytest.mark.parametrize("bits", [1, 5, 2.0, True])
def test_bits_out_of_range_are_refused(kind, bits):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: bits must be a whole number from 2 to 4"):
        kind(bits=bits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": "group"}, "scale='group' and group go together"),
        ({"group": 4}, "scale='group' and group go together"),
        ({"scale": "group", "group": 0}, "group must be at least 1"),
        ({"scale": "group", "group": 4, "axis": 1}, "knows the input axis"),
    ],
)
def test_settings_of_groups_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Binary(**options)


def test_rules_of_ternary_other_than_the_two_are_refused():
    rule: Any = "0.7"
    with pytest.raises(ValueError, match="rule must be 'exact' or 'heuristic'"):
        Ternary(rule=rule)


@every_case
def test_the_engine_trains_to_levels(kind, options, levels):
    quantizer = kind(**options)
    target = jnp.asarray(np.random.default_rng(3).normal(size=(16, 4)), jnp.float32)
    optimizer = stam(0.1, quantizer=quantizer)
    x = {"kernel": jnp.zeros((16, 4))}
    state = helpers.begin(optimizer, x)
    step = jax.jit(lambda x, state: helpers.take_step(optimizer, {"kernel": x["kernel"] - target}, state, x))
    for _ in range(200):
        x, state = step(x, state)
    y = hard_params(state, x)["kernel"]
    assert contains(quantizer, y)
    assert jnp.sum((y - target) ** 2) < jnp.sum((Binary().project(target) - target) ** 2)


# Levels, which relaxations ask for.


def three_bits(**sharing: Any) -> Uniform:
    return Uniform(bits=3, **sharing)


@pytest.mark.parametrize(
    ("kind", "sharing"),
    [
        *itertools.product([Binary, Ternary, three_bits, PowerOfTwo], SCALES),
        *((LeastSquares, sharing) for sharing in SCALES if sharing["scale"]),  # It has no set without scales.
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value["scale"]),
)
def test_the_levels_ascend_and_every_weight_lies_at_the_one_its_code_names(kind, sharing):
    quantizer = kind(**sharing)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
    levels = quantizer.levels(v)
    count = len(levels)
    assert 2 ** (quantizer.bits - 1) < count <= 2**quantizer.bits
    assert jnp.all(levels[1:] > levels[:-1])
    np.testing.assert_allclose(levels, -levels[::-1])
    everywhere = jnp.broadcast_to(levels, (count, *v.shape))
    named = jnp.take_along_axis(everywhere, codes_of(quantizer, v)[None].astype(jnp.int32), axis=0)[0]
    np.testing.assert_allclose(named, project(quantizer, v), rtol=1e-6)


# Least squares: levels that are sums of scales.


@pytest.mark.usefixtures("x64")
@given(v=hnp.arrays(np.float64, 9, elements=VALUES))
def test_two_bits_of_least_squares_are_the_best_of_all_cuts(v: Any):
    size = np.sort(np.abs(v))
    best = min(
        np.sum((size[:k] - size[:k].mean()) ** 2) + np.sum((size[k:] - size[k:].mean()) ** 2)
        if k < len(v)
        else np.sum((size - size.mean()) ** 2)
        for k in range(1, len(v) + 1)
    )
    y = np.asarray(LeastSquares(bits=2, scale="tensor").project(v))
    assert np.sum((v - y) ** 2) <= best * (1 + 1e-9) + 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bits", [2, 3, 4])
@given(v=hnp.arrays(np.float64, 12, elements=VALUES))
def test_the_greedy_rule_fits_one_summand_at_a_time(bits: int, v: Any):
    left, expected = v.copy(), np.zeros_like(v)
    for _ in range(bits):
        summand = np.where(left >= 0, 1.0, -1.0) * np.mean(np.abs(left))
        left, expected = left - summand, expected + summand
    quantizer = LeastSquares(bits=bits, rule="greedy", scale="tensor")
    scales = scales_of(quantizer, v).ravel()
    # The scales are those of the greedy summands; each weight then goes to the nearest of all their sums.
    assert np.sum((v - np.asarray(project(quantizer, v))) ** 2) <= np.sum(left**2) * (1 + 1e-9) + 1e-12
    sums = [np.dot(signs, scales) for signs in itertools.product((-1, 1), repeat=bits)]
    np.testing.assert_allclose(np.sort(quantizer.levels(v).ravel()), np.sort(sums), atol=1e-9)
    left = v.copy()
    for alpha in np.asarray(scales):
        np.testing.assert_allclose(alpha, np.mean(np.abs(left)), rtol=1e-9, atol=1e-9)
        left = left - np.where(left >= 0, 1.0, -1.0) * alpha


def alternate(v: np.ndarray, scales: np.ndarray) -> float:
    """The squared distance that is left when codes and scales, in turn, no longer come closer."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(scales))))
    for _ in range(30):
        codes = signs[np.argmin(np.abs(v[:, None] - signs @ scales), axis=1)]
        scales = np.linalg.lstsq(codes, v, rcond=None)[0]
    return float(np.sum(np.min(np.abs(v[:, None] - signs @ scales), axis=1) ** 2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_and_scales_in_turn_come_closer_and_to_rest(bits):
    quantizer = LeastSquares(bits=bits, scale="tensor")
    best = jax.jit(lambda v: (project(quantizer, v), scales_of(quantizer, v).ravel()))
    greedy = jax.jit(LeastSquares(bits=bits, rule="greedy", scale="tensor").project)
    uniform = jax.jit(Uniform(bits=bits, scale="tensor").project)
    signs = np.array(list(itertools.product((-1, 1), repeat=bits)))
    to_uniform, to_refitted, to_best_known = [], [], []
    rng = np.random.default_rng(0)
    for seed in range(30):
        v: Any = np.random.default_rng(seed).standard_t(4, size=200)
        y, scales = map(np.asarray, best(v))
        distance = np.sum((v - y) ** 2)
        assert distance < np.sum((v - greedy(v)) ** 2)
        to_uniform.append(distance / np.sum((v - uniform(v)) ** 2))
        # Codes at the nearest sums, and scales that fit those codes best.
        assert np.allclose(np.min(np.abs(v[:, None] - signs @ scales), axis=1), np.abs(v - y))
        rows = signs[np.argmin(np.abs(y[:, None] - signs @ scales), axis=1)]
        refitted = np.linalg.lstsq(rows, v, rcond=None)[0]
        to_refitted.append(distance / np.sum((v - rows @ refitted) ** 2))
        known = min(alternate(v, start) for start in rng.uniform(0, 0.7 * np.max(np.abs(v)), (10, bits)))
        to_best_known.append(distance / known)
    # Ten random starts, each brought to rest, find nothing much better.
    assert np.mean(to_best_known) < {3: 1.05, 4: 1.15}[bits]
    assert np.median(to_uniform) < 0.8
    assert np.median(to_refitted) < 1.0001
    assert np.mean(to_refitted) < 1.05


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rule", ["best", "greedy"])
@pytest.mark.parametrize("sharing", SCALES[:3], ids=lambda sharing: str(sharing["scale"]))
def test_sums_of_scales_are_coded_and_contained(bits, rule, sharing):
    quantizer = LeastSquares(bits=bits, rule=rule, **sharing)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 3)), jnp.float32)

    @jax.jit
    def described(v):
        codes, scales = codes_of(quantizer, v), scales_of(quantizer, v)
        return project(quantizer, v), codes, decode(quantizer, codes, scales)

    y, codes, decoded = described(v)
    assert (codes.dtype, codes.shape) == (jnp.uint8, v.shape)
    np.testing.assert_array_equal(decoded, y)
    assert contains(quantizer, y)
    assert contains(quantizer, y.astype(jnp.bfloat16))
    if sharing["scale"] != "group":
        assert not contains(quantizer, v)
    assert not contains(quantizer, y.at[0].set(jnp.nan))
    if bits == 2 and rule == "best":
        np.testing.assert_allclose(described(y)[0], y, rtol=1e-5, atol=1e-6)


def test_least_squares_of_a_stack_are_those_of_its_parts():
    quantizer = LeastSquares(bits=3)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 3)), jnp.float32)
    one = jax.jit(quantizer.project)
    np.testing.assert_allclose(jax.vmap(one)(v), jnp.stack([one(part) for part in v]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "array",
    [jnp.zeros((4, 2)), jnp.zeros((0, 2)), jnp.full(100_000, 0.1, jnp.bfloat16), jnp.array([-0.5])],
    ids=["zeros", "empty", "equal", "single"],
)
def test_least_squares_of_weights_of_one_size_are_those(bits, array):
    quantizer = LeastSquares(bits=bits, scale="tensor")
    y = jax.jit(quantizer.project)(array)
    assert y.dtype == array.dtype
    np.testing.assert_allclose(np.float32(y), np.float32(array), rtol=1e-6)
    assert contains(quantizer, y)


@pytest.mark.parametrize("bits", [3, 4])
def test_least_squares_are_never_worse_than_greedy_whatever_the_size_of_the_weights(bits):
    best, greedy = LeastSquares(bits=bits), LeastSquares(bits=bits, rule="greedy")
    v = jnp.asarray(np.random.default_rng(0).normal(size=(16, 400)), jnp.float32)
    error = lambda quantizer, v: np.sum((np.float64(v) - np.float64(project(quantizer, v))) ** 2, axis=0)
    assert np.all(error(best, v) <= error(greedy, v) * (1 + 1e-5))
    np.testing.assert_allclose(project(best, 2.0**70 * v), 2.0**70 * project(best, v), rtol=1e-5)


def test_empty_arrays_have_levels():
    for shape in ((0, 3), (4, 0)):
        assert Binary(scale="group", group=2).levels(jnp.zeros(shape)).shape == (2, *shape)


def test_least_squares_show_a_nan():
    assert jnp.any(jnp.isnan(LeastSquares(scale="tensor").project(jnp.array([1.0, jnp.nan]))))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 4; got 1"),
        ({"rule": "optimal"}, "rule must be 'best' or 'greedy'; got 'optimal'"),
        ({"scale": None}, "scale=None leaves no scales to fit"),
    ],
)
def test_settings_of_least_squares_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        LeastSquares(**options)
