"""Each prox against its definition, by minimizing on a fine grid."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stam_jax.regularizers import L1, Box, GroupLasso, Ridge
from tests.helpers import quick_jit

WEIGHT = st.floats(-3, 3)
STEP = st.floats(0.01, 20)
SIZE = st.floats(0.1, 2)
GRID = np.linspace(-4, 4, 80_001)
prox = quick_jit(lambda kind, size, v, step: kind(size).prox(v, step), static_argnums=0)
every_kind = pytest.mark.parametrize(
    ("kind", "penalty"),
    [
        pytest.param(Box, lambda u, limit: np.where(np.abs(u) <= limit, 0.0, np.inf), id="box"),
        pytest.param(Ridge, lambda u, strength: strength / 2 * u**2, id="ridge"),
        pytest.param(L1, lambda u, strength: strength * np.abs(u), id="l1"),
    ],
)


@pytest.mark.usefixtures("x64")
@every_kind
@given(v=WEIGHT, step=STEP, size=SIZE)
def test_the_prox_minimizes_its_objective(kind, penalty, v, step, size):
    values = penalty(GRID, size) + (GRID - v) ** 2 / (2 * step)
    np.testing.assert_allclose(prox(kind, size, v, step), GRID[np.argmin(values)], atol=2e-4)


@pytest.mark.usefixtures("x64")
@every_kind
@given(a=WEIGHT, b=WEIGHT, step=STEP, size=SIZE)
def test_the_prox_of_a_convex_penalty_is_firmly_non_expansive(kind, penalty, a, b, step, size):
    del penalty
    p, q = (float(prox(kind, size, v, step)) for v in (a, b))
    assert (p - q) ** 2 <= (p - q) * (a - b) + 1e-15


@pytest.mark.parametrize("regularizer", [Box(0.5), Ridge(0.5), L1(0.5), GroupLasso(0.5)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_prox_keeps_shape_and_dtype(regularizer, dtype):
    v = jnp.ones((2, 0, 3), dtype)
    z = jax.jit(regularizer.prox)(v, 0.1)
    assert (z.shape, z.dtype) == (v.shape, v.dtype)


@pytest.mark.parametrize(("regularizer", "expected"), [(Box(0.0), 0.0), (Ridge(0.0), -3.0), (L1(0.0), -3.0)])
def test_the_ends_of_the_range_are_exact(regularizer, expected):
    assert jax.jit(regularizer.prox)(-3.0, 0.5) == expected


@pytest.mark.parametrize("kind", [Box, Ridge, L1, GroupLasso])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1.0, ValueError),
        (math.inf, ValueError),
        (math.nan, ValueError),
        ("1", TypeError),
        (lambda count: 1.0, TypeError),
    ],
)
def test_sizes_out_of_range_are_named(kind, value, error):
    with pytest.raises(error, match=rf"{kind.__name__}: (limit|strength) must be a number"):
        kind(value)


VECTORS = st.tuples(WEIGHT, WEIGHT, WEIGHT).map(lambda v: np.array(v)[:, None])


@pytest.mark.usefixtures("x64")
@given(v=VECTORS, step=STEP, size=SIZE)
def test_group_lasso_shortens_a_channel_along_its_own_direction(v, step, size):
    # Along v the problem is one of lengths, and no direction is better: the norm does not see it.
    lengths = np.linspace(0, 6, 60_001)
    length = np.linalg.norm(v)
    best = lengths[np.argmin(size * lengths + (lengths - length) ** 2 / (2 * step))]
    expected = v * best / length if length else v
    np.testing.assert_allclose(prox(GroupLasso, size, v, step), expected, atol=2e-4)


@pytest.mark.usefixtures("x64")
@given(a=VECTORS, b=VECTORS, step=STEP, size=SIZE)
def test_group_lasso_is_firmly_non_expansive(a, b, step, size):
    p, q = (np.asarray(prox(GroupLasso, size, v, step)) for v in (a, b))
    assert np.sum((p - q) ** 2) <= np.sum((p - q) * (a - b)) + 1e-12


def test_group_lasso_treats_each_channel_alone():
    v = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    z = np.asarray(prox(GroupLasso, 1.0, v, 0.5))
    for channel in range(3):
        alone = prox(GroupLasso, 1.0, v[..., channel : channel + 1], 0.5)
        np.testing.assert_allclose(z[..., channel : channel + 1], alone, rtol=1e-6)
    first = quick_jit(GroupLasso(1.0, axis=0).prox)(np.moveaxis(v, -1, 0), 0.5)
    np.testing.assert_allclose(np.moveaxis(first, 0, -1), z, rtol=1e-6)
