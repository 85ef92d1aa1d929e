"""Each relaxation against its definition, by minimising on a fine grid."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stam_jax import Hard, L1Distance, LinearBlend, SquaredDistance
from stam_jax.relaxations import from_penalty

WEIGHT = st.floats(-3, 3)
GRID = np.linspace(-4, 4, 80_001)


def no_levels() -> jax.Array:
    raise AssertionError("this map needs no levels")


W, Y = np.array([0.3, -1.7, 0.0]), np.array([1.1, -1.1, 1.1])


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, y=WEIGHT, lam=st.floats(0, 50))
def test_squared_distance_minimises_its_objective(w, y, lam):
    values = (GRID - w) ** 2 / 2 + lam / 2 * (GRID - y) ** 2
    np.testing.assert_allclose(
        SquaredDistance(lam).at(0)(w, y, no_levels), GRID[np.argmin(values)], atol=1e-4
    )


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, y=WEIGHT, theta=st.floats(0, 1, exclude_max=True))
def test_the_blend_is_the_squared_distance_in_another_parameter(w, y, theta):
    squared = SquaredDistance(theta / (1 - theta)).at(0)(w, y, no_levels)
    np.testing.assert_allclose(LinearBlend(theta).at(0)(w, y, no_levels), squared, rtol=1e-12, atol=1e-12)


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
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_the_ends_are_exact(relaxation, expected, jit):
    relax = relaxation.at(0)
    w, y = jnp.asarray(W, jnp.float32), jnp.asarray(Y, jnp.float32)
    x = (jax.jit(relax, static_argnums=2) if jit else relax)(w, y, no_levels)
    np.testing.assert_array_equal(x, np.float32(expected))


@pytest.mark.parametrize("lam", [1e6, 1e30, 1e37, 1e38, 2e38, 3.4e38])
@pytest.mark.parametrize("traced", [False, True])
def test_an_enormous_strength_is_all_but_hard(lam, traced):
    # 1 / lam falls below the normal numbers of float32 long before lam is infinite.
    relax = lambda lam: SquaredDistance(lam).at(0)(jnp.float32(0.3), jnp.float32(1.0), no_levels)
    x = jax.jit(relax)(jnp.float32(lam)) if traced else relax(lam)
    np.testing.assert_allclose(x, 1.0, rtol=1e-5)


@pytest.mark.parametrize("lam", [1e-30, 1e-9, 1e-4])
def test_a_tiny_strength_keeps_its_digits(lam):
    x = SquaredDistance(lam).at(0)(jnp.array(0.0), jnp.array(1.0), no_levels)
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
            relaxation.at(k)(W, Y, no_levels), fixed(k).at(0)(W, Y, no_levels), rtol=1e-15
        )


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, y=WEIGHT, rho=st.floats(0, 50), eta=st.floats(0, 2), damping=st.floats(0, 3))
def test_a_penalty_pulls_as_strongly_as_the_step_size_lets_it(w, y, rho, eta, damping):
    lam = eta * rho / (1 + damping)
    expected = (w + lam * y) / (1 + lam)
    np.testing.assert_allclose(
        from_penalty(rho, eta, damping)(w, y, no_levels), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("eta", [0.0, 0.1])
@pytest.mark.parametrize("traced", [False, True])
def test_an_infinite_penalty_is_hard_also_at_a_step_size_of_zero(eta, traced):
    relax = lambda rho, eta: from_penalty(rho, eta, 0.0)(jnp.asarray(W), jnp.asarray(Y), no_levels)
    x = (jax.jit(relax) if traced else relax)(math.inf, eta)
    np.testing.assert_array_equal(x, np.float32(Y))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SquaredDistance(-1.0), ValueError, r"SquaredDistance: lam .*\[0, inf\].*-1\.0"),
        (lambda: SquaredDistance(math.nan), ValueError, r"SquaredDistance: lam .*nan"),
        (lambda: L1Distance(-1.0), ValueError, r"L1Distance: lam .*\[0, inf\].*-1\.0"),
        (lambda: LinearBlend(1.5), ValueError, r"LinearBlend: theta .*\[0, 1\].*1\.5"),
        (lambda: LinearBlend(-0.5), ValueError, r"LinearBlend: theta .*\[0, 1\].*-0\.5"),
    ],
)
def test_strengths_out_of_range_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("relaxation", [SquaredDistance(2.0), L1Distance(2.0), LinearBlend(0.5), Hard()])
def test_equal_relaxations_are_one_key(relaxation):
    assert {relaxation, type(relaxation)(**vars(relaxation))} == {relaxation}


@pytest.mark.usefixtures("x64")
@given(w=WEIGHT, lam=st.floats(0, 4))
def test_the_l1_distance_minimises_the_w_shaped_penalty(w, lam):
    y = 1.0 if w >= 0 else -1.0
    values = (GRID - w) ** 2 / 2 + lam * np.minimum(np.abs(GRID - 1), np.abs(GRID + 1))
    x = float(L1Distance(lam).at(0)(jnp.asarray(w), jnp.asarray(y), no_levels))
    # At w = 0 the penalty has a minimum on either side; by value they are the same.
    value = (x - w) ** 2 / 2 + lam * min(abs(x - 1), abs(x + 1))
    assert value <= values.min() + 1e-7
