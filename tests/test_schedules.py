"""The schedules against their formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stam_jax import schedules


def values_of(schedule: Any, counts: Any) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(counts)))


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


@pytest.mark.usefixtures("x64")
def test_inertia_falls_short_of_one_in_proportion_to_a_small_step_size_and_stays_above_zero():
    rate = lambda k: 0.1 / (k + 1.0)
    inertia = values_of(schedules.inertia(rate, pull=0.5), range(20))
    np.testing.assert_allclose(1 / inertia - 1, [0.05 / (k + 1) for k in range(20)], rtol=1e-10)
    # What is a number stays one, known before anything is traced.
    given: list[Any] = [schedules.inertia(eta, pull=0.5) for eta in (0, 2.0, 6, 1e9)]
    assert given[:3] == [1, 0.5, 0.25]
    assert 0 < given[3] < 1e-8
    assert {type(kappa) for kappa in given} == {float}
    assert jax.jit(lambda eta: schedules.inertia(eta, pull=0.5))(2.0) == 0.5


@pytest.mark.usefixtures("x64")
def test_inertia_is_that_of_a_proximal_step_towards_the_relaxed_weights():
    eta, pull, w, x = 0.3, 2.0, 1.7, -0.4
    kappa: Any = schedules.inertia(eta, pull=pull)
    v = x + kappa * (w - x)
    # At the minimum of (v - w)^2 / (2 eta) + pull (v - x)^2 / 2 the slope is 0.
    assert (v - w) / eta + pull * (v - x) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: schedules.inertia(-0.1), r"inertia: learning_rate .*-0\.1"),
        (lambda: schedules.inertia(0.1, pull=-1.0), r"inertia: pull .*-1\.0"),
        (lambda: schedules.geometric(-1.0, growth=2.0), r"geometric: start .*-1\.0"),
        (lambda: schedules.geometric(1.0, growth=-2.0), r"geometric: growth .*-2\.0"),
        (lambda: schedules.geometric(1.0, growth=2.0, every=0), r"geometric: every .*0"),
        (lambda: schedules.linear_to_hard(0), r"linear_to_hard: start must be below hard_from; got 0 and 0"),
        (lambda: schedules.linear_to_hard(5, start=-1), r"linear_to_hard: start .*-1"),
        (lambda: schedules.sigmoid_inverse_slope(5, start=9), r"start must be below hard_from; got 9 and 5"),
        (lambda: schedules.sigmoid_inverse_slope(5, steepness=math.nan), r"steepness .*nan"),
    ],
)
def test_numbers_out_of_range_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()
