"""Each relaxation against its definition, by minimizing on a fine grid."""

import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stam_jax import Binary, Ternary, Uniform
from stam_jax.quantizers import nearest
from stam_jax.relaxations import (
    Hard,
    HardFrom,
    L1Distance,
    LinearBlend,
    PiecewiseAffine,
    ScaledTanh,
    SquaredDistance,
)
from tests.helpers import quick_jit

WEIGHT = st.floats(-3, 3, allow_subnormal=False)
GRID = np.linspace(-4, 4, 80_001)


NO_LEVELS: Any = None  # For maps that need none.


W, Y = np.array([0.3, -1.7, 0.0]), np.array([1.1, -1.1, 1.1])


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, y=WEIGHT, lam=st.floats(0, 50))
def test_squared_distance_minimizes_its_objective(w, y, lam):
    values = (GRID - w) ** 2 / 2 + lam / 2 * (GRID - y) ** 2
    np.testing.assert_allclose(
        SquaredDistance(lam).at(0)(w, y, NO_LEVELS), GRID[np.argmin(values)], atol=1e-4
    )


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, y=WEIGHT, theta=st.floats(0, 1, exclude_max=True))
def test_the_blend_is_the_squared_distance_in_another_parameter(w, y, theta):
    squared = SquaredDistance(theta / (1 - theta)).at(0)(w, y, NO_LEVELS)
    np.testing.assert_allclose(LinearBlend(theta).at(0)(w, y, NO_LEVELS), squared, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("relaxation", "expected"),
    [
        (SquaredDistance(0.0), W),
        (SquaredDistance(math.inf), Y),
        (L1Distance(0.0), W),
        (L1Distance(math.inf), Y),
        (LinearBlend(0.0), W),
        (LinearBlend(1.0), Y),
        (Hard(), Y),
        (HardFrom(LinearBlend(0.0), step=1), W),
        (HardFrom(LinearBlend(0.0), step=0), Y),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_the_ends_are_exact(relaxation, expected, jit):
    relax = relaxation.at(0)
    w, y = jnp.asarray(W, jnp.float32), jnp.asarray(Y, jnp.float32)
    x = (jax.jit(relax, static_argnums=2) if jit else relax)(w, y, NO_LEVELS)
    np.testing.assert_array_equal(x, np.float32(expected))


@pytest.mark.parametrize("lam", [1e6, 1e30, 1e37, 1e38, 2e38, 3.4e38])
@pytest.mark.parametrize("traced", [False, True])
def test_an_enormous_strength_is_all_but_hard(lam, traced):
    # 1 / lam falls below the normal numbers of float32 long before lam is infinite.
    relax = lambda lam: SquaredDistance(lam).at(0)(jnp.float32(0.3), jnp.float32(1.0), NO_LEVELS)
    x = jax.jit(relax)(jnp.float32(lam)) if traced else relax(lam)
    np.testing.assert_allclose(x, 1.0, rtol=1e-5)


@pytest.mark.parametrize("lam", [1e-30, 1e-9, 1e-4])
def test_a_tiny_strength_keeps_its_digits(lam):
    x = SquaredDistance(lam).at(0)(jnp.array(0.0), jnp.array(1.0), NO_LEVELS)
    np.testing.assert_allclose(x, lam, rtol=2e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("relaxation", "fixed"),
    [
        (SquaredDistance(lambda k: 0.5 * k), lambda k: SquaredDistance(0.5 * k)),
        (LinearBlend(lambda k: k / 8), lambda k: LinearBlend(k / 8)),
        (L1Distance(lambda k: k / 8), lambda k: L1Distance(k / 8)),
    ],
)
def test_a_schedule_is_the_number_of_its_step(relaxation, fixed):
    for k in range(5):
        np.testing.assert_allclose(
            relaxation.at(k)(W, Y, NO_LEVELS), fixed(k).at(0)(W, Y, NO_LEVELS), rtol=1e-15
        )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SquaredDistance(-1.0), ValueError, r"SquaredDistance: lam .*\[0, inf\].*-1\.0"),
        (lambda: SquaredDistance(math.nan), ValueError, r"SquaredDistance: lam .*nan"),
        (lambda: L1Distance(-1.0), ValueError, r"L1Distance: lam .*\[0, inf\].*-1\.0"),
        (lambda: LinearBlend(1.5), ValueError, r"LinearBlend: theta .*\[0, 1\].*1\.5"),
        (lambda: PiecewiseAffine(1.5), ValueError, r"PiecewiseAffine: inverse_slope .*\[0, 1\].*1\.5"),
        (lambda: ScaledTanh(-1.0), ValueError, r"ScaledTanh: beta .*\[0, inf\].*-1\.0"),
        (lambda: HardFrom(Hard(), -1), ValueError, r"HardFrom: step .*\[0, inf\).*-1"),
        (lambda: HardFrom(Hard(), cast(Any, math.inf)), ValueError, r"HardFrom: step .*inf"),
        (
            lambda: HardFrom(cast(Any, lambda count: 1.0), 5),
            TypeError,
            r"HardFrom: relaxation must be an object with at",
        ),
        (lambda: HardFrom(cast(Any, Hard), 5), TypeError, r"HardFrom: relaxation must be an object with at"),
        (lambda: LinearBlend(-0.5), ValueError, r"LinearBlend: theta .*\[0, 1\].*-0\.5"),
    ],
)
def test_strengths_out_of_range_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "relaxation",
    [
        SquaredDistance(2.0),
        L1Distance(2.0),
        LinearBlend(0.5),
        PiecewiseAffine(0.5),
        ScaledTanh(2.0),
        HardFrom(Hard(), 5),
        Hard(),
    ],
)
def test_equal_relaxations_are_one_key(relaxation):
    assert {relaxation, type(relaxation)(**vars(relaxation))} == {relaxation}


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, lam=st.floats(0, 4))
def test_the_l1_distance_minimizes_the_w_shaped_penalty(w, lam):
    y = 1.0 if w >= 0 else -1.0
    values = (GRID - w) ** 2 / 2 + lam * np.minimum(np.abs(GRID - 1), np.abs(GRID + 1))
    x = float(L1Distance(lam).at(0)(jnp.asarray(w), jnp.asarray(y), NO_LEVELS))
    # At w = 0 the penalty has a minimum on either side; by value they are the same.
    value = (x - w) ** 2 / 2 + lam * min(abs(x - 1), abs(x + 1))
    assert value <= values.min() + 1e-7


SETS = [Binary(scale=1.0), Ternary(scale=1.0), Uniform(bits=3, scale=1.0)]
every_set = pytest.mark.parametrize("quantizer", SETS, ids=lambda quantizer: type(quantizer).__name__)
STRENGTH = st.floats(0.02, 0.98)


def levels_of(quantizer: Binary | Ternary | Uniform) -> np.ndarray:
    return np.asarray(quantizer.levels(quantizer.scales(jnp.zeros(())))).ravel()


@partial(quick_jit, static_argnums=(0, 1))
def relaxed_by(kind: Any, quantizer: Any, strength: jax.Array, w: jax.Array) -> jax.Array:
    levels = quantizer.levels(quantizer.scales(w))
    return kind(strength).at(0)(w, nearest(w, levels), levels)


def relaxed(kind: Any, quantizer: Binary | Ternary | Uniform, strength: float, w: float) -> float:
    return float(relaxed_by(kind, quantizer, np.float64(strength), np.float64(w)))


@pytest.mark.usefixtures("x64")
@every_set
@given(w=WEIGHT, s=STRENGTH)
def test_the_piecewise_affine_map_minimizes_a_penalty_that_vanishes_at_the_levels(quantizer, w, s):
    levels = levels_of(quantizer)
    grid = np.linspace(levels[0], levels[-1], 40_001)
    right = np.clip(np.searchsorted(levels, grid), 1, len(levels) - 1)
    penalty = (1 - s) / 2 * (grid - levels[right - 1]) * (levels[right] - grid)
    best = grid[np.argmin((grid - w) ** 2 / 2 + penalty)]
    # The objective is strongly convex with modulus s, so the grid finds its minimizer as finely.
    np.testing.assert_allclose(relaxed(PiecewiseAffine, quantizer, s, w), best, atol=2e-4)


@pytest.mark.usefixtures("x64")
@given(w=st.floats(-2, 2, allow_subnormal=False), beta=st.floats(0.1, 3))
def test_the_tanh_minimizes_a_linear_form_and_an_entropy(w, beta):
    grid = np.linspace(-1, 1, 80_001)[1:-1]
    entropy = ((1 + grid) * np.log1p(grid) + (1 - grid) * np.log1p(-grid)) / (2 * beta)
    best = grid[np.argmin(entropy - w * grid)]
    np.testing.assert_allclose(relaxed(ScaledTanh, SETS[0], beta, w), best, atol=2e-4)
    np.testing.assert_allclose(
        relaxed(ScaledTanh, SETS[0], beta, w), math.tanh(beta * w), rtol=1e-12, atol=1e-300
    )


@pytest.mark.usefixtures("x64")
@every_set
@pytest.mark.parametrize(
    ("kind", "of"),
    [(PiecewiseAffine, lambda h: 1 - h), (ScaledTanh, lambda h: 1 / (1 - h) if h < 1 else math.inf)],
    ids=["piecewise affine", "tanh"],
)
@given(w=WEIGHT, h=STRENGTH)
def test_a_staircase_is_odd_grows_with_w_and_ends_at_the_projection(quantizer, kind, of, w, h):
    x = relaxed(kind, quantizer, of(h), w)
    np.testing.assert_allclose(relaxed(kind, quantizer, of(h), -w), -x, atol=1e-12)
    assert relaxed(kind, quantizer, of(h), w + 0.1) >= x - 1e-12
    levels, middles = levels_of(quantizer), np.convolve(levels_of(quantizer), [0.5, 0.5], "valid")
    assert levels[0] <= x <= levels[-1]
    if np.min(np.abs(w - middles)) > 0.01:
        nearest = levels[np.argmin(np.abs(w - levels))]
        np.testing.assert_allclose(relaxed(kind, quantizer, of(1 - 1e-4), w), nearest, atol=1e-6)
        assert relaxed(kind, quantizer, of(1.0), w) == nearest


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT)
def test_a_piecewise_affine_map_of_slope_one_clips_and_no_more(w):
    assert relaxed(PiecewiseAffine, SETS[0], 1.0, w) == min(max(w, -1.0), 1.0)


def test_levels_that_coincide_give_no_nan():
    w, zeros = jnp.ones(3), jnp.zeros(3)
    for relaxation in (PiecewiseAffine(0.5), ScaledTanh(2.0)):
        x = relaxation.at(0)(w, zeros, (jnp.zeros(1), jnp.zeros(1)))
        np.testing.assert_array_equal(x, zeros)


def test_another_relaxation_holds_until_the_hard_phase_and_not_a_step_longer():
    relaxation = HardFrom(LinearBlend(lambda k: k / 10), step=5)
    w, y = jnp.array(0.0), jnp.array(1.0)
    values = [float(relaxation.at(k)(w, y, NO_LEVELS)) for k in range(8)]
    np.testing.assert_allclose(values, [0, 0.1, 0.2, 0.3, 0.4, 1, 1, 1], rtol=1e-6)
