"""The schedules against their formulas."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from stam_jax import schedules
from tests.helpers import quick_jit


def values_of(schedule: Any, counts: Any) -> np.ndarray:
    return np.asarray(quick_jit(jax.vmap(schedule))(np.asarray(counts)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 7, 41, 390])
def test_geometric_growth_comes_at_every_multiple_of_its_interval_and_never_late(every):
    counts = [k for n in range(12) for k in (n * every, (n + 1) * every - 1)]
    strength = values_of(schedules.geometric(0.5, growth=1.1, every=every), counts)
    np.testing.assert_allclose(strength, [0.5 * 1.1 ** (k // every) for k in counts], rtol=1e-12)


def test_geometric_from_zero_stays_zero_when_its_factor_overflows():
    np.testing.assert_array_equal(values_of(schedules.geometric(0.0, growth=10.0), [0, 1000]), 0)
    np.testing.assert_array_equal(values_of(schedules.geometric(1.0, growth=10.0), [1000]), math.inf)
    np.testing.assert_array_equal(values_of(schedules.geometric(1.0, growth=0.5), [2]), 0.25)


@pytest.mark.usefixtures("x64")
def test_the_linear_schedule_moves_at_an_even_pace():
    theta = values_of(schedules.linear_to_hard(60, start=20), range(80))
    expected = [0.0] * 20 + [(k - 20) / 40 for k in range(20, 60)] + [1.0] * 20
    np.testing.assert_allclose(theta, expected, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steepness", [0.1, 10.0, 50.0])
def test_the_inverse_slope_falls_along_a_sigmoid_from_one_to_zero(steepness):
    values = values_of(schedules.sigmoid_inverse_slope(60, start=20, steepness=steepness), range(80))
    logistic = lambda t: 1 / (1 + math.exp(-steepness * (0.5 - t)))
    middle = [(logistic((k - 20) / 40) - logistic(1)) / (logistic(0) - logistic(1)) for k in range(20, 60)]
    np.testing.assert_allclose(values, [1.0] * 20 + middle + [0.0] * 20, atol=1e-12)
    assert np.all(np.diff(values[20:61]) < 0)
    assert values[40] == pytest.approx(0.5)


@pytest.mark.parametrize("hard_from", [0, 7, 2**24, 2**24 + 1])
def test_what_ends_is_at_its_end_exactly_from_the_step_that_is_named(hard_from):
    # Not every whole number above 2^24 is one of float32.
    counts = [k for k in (hard_from - 1, hard_from, hard_from + 1, 2 * hard_from + 9) if k >= 0]
    for start in {0, hard_from // 2, hard_from}:
        theta = values_of(schedules.linear_to_hard(hard_from, start=start), counts)
        slope = values_of(schedules.sigmoid_inverse_slope(hard_from, start=start), counts)
        np.testing.assert_array_equal(theta[-3:], 1)
        np.testing.assert_array_equal(slope[-3:], 0)
        if hard_from == 7:
            np.testing.assert_array_less([theta[0], 0], [1, slope[0]])


def test_a_span_of_no_length_is_a_jump():
    np.testing.assert_array_equal(
        values_of(schedules.linear_to_hard(5, start=5), range(8)), [0] * 5 + [1] * 3
    )
    slope = values_of(schedules.sigmoid_inverse_slope(5, start=5), range(8))
    np.testing.assert_allclose(slope, [1] * 5 + [0] * 3, rtol=1e-6)


def test_a_span_may_be_traced():
    at = jax.jit(lambda hard_from, start, k: schedules.linear_to_hard(hard_from, start=start)(k))
    np.testing.assert_allclose([at(60, 20, k) for k in (10, 30, 70)], [0, 0.25, 1], rtol=1e-6)
    at = jax.jit(lambda hard_from, k: schedules.sigmoid_inverse_slope(hard_from)(k))
    np.testing.assert_allclose([at(60, k) for k in (0, 30, 60)], [1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize("start", [0, 0.0, 1e-3, 1.0])
def test_growth_without_bounds_is_no_error_where_nan_is_one(start):
    with jax.debug_nans(True):
        schedule: Any = schedules.geometric(start, growth=10.0)
        ends = [float(schedule(k)) for k in (1, 5000)]
    assert ends == [pytest.approx(10 * start), math.inf if start else 0.0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: schedules.geometric(-1.0, growth=2.0), r"geometric: start .*-1\.0"),
        (lambda: schedules.geometric(1.0, growth=-2.0), r"geometric: growth .*-2\.0"),
        (lambda: schedules.geometric(1.0, growth=2.0, every=0), r"geometric: every .*0"),
        (lambda: schedules.linear_to_hard(5, start=6), r"linear_to_hard: start must be at most hard_from"),
        (lambda: schedules.linear_to_hard(-1), r"linear_to_hard: hard_from .*-1"),
        (lambda: schedules.linear_to_hard(5, start=-1), r"linear_to_hard: start .*-1"),
        (lambda: schedules.sigmoid_inverse_slope(5, start=9), r"start must be at most hard_from"),
        (lambda: schedules.sigmoid_inverse_slope(5, steepness=math.nan), r"steepness .*nan"),
    ],
)
def test_numbers_out_of_range_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
