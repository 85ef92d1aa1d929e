"""More values than two: how far the fits are from the optimum, and what codes and scales say."""

from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stam_jax import Binary, LeastSquares, PowerOfTwo, Ternary, Uniform, _assignment, quantize, stam
from stam_jax._packed import layout
from stam_jax.quantizers import decode, encode, levels_of, nearest
from tests import reference_quantizers as reference
from tests.helpers import quick_jit


def describe(quantizer: Any, w: Any) -> Any:
    """The nearest weights, the levels, the codes, and what these are decoded to."""
    levels = levels_of(quantizer, w)
    codes = encode(w, levels)
    return nearest(w, levels), levels, codes, decode(codes, levels)


described = quick_jit(describe, static_argnums=0)
projected = quick_jit(lambda quantizer, w: nearest(w, levels_of(quantizer, w)), static_argnums=0)

# Each with the magnitudes of its levels at scale 1.
FIXED: dict[str, tuple[Any, tuple[float, ...]]] = {
    "ternary": (Ternary, reference.TERNARY),
    "uniform 3": (lambda **options: Uniform(bits=3, **options), reference.uniform(3)),
    "uniform 4": (lambda **options: Uniform(bits=4, **options), reference.uniform(4)),
    "powers 3": (lambda **options: PowerOfTwo(bits=3, **options), reference.powers(3)),
    "powers 4": (lambda **options: PowerOfTwo(bits=4, **options), reference.powers(4)),
}
FITS = [Ternary(), Uniform(bits=3), Uniform(bits=4), PowerOfTwo(bits=3), PowerOfTwo(bits=4), LeastSquares()]
WIDEST = [Ternary(), Uniform(bits=4), PowerOfTwo(bits=4), LeastSquares()]
name: Any = lambda q: f"{type(q).__name__}{getattr(q, 'bits', '')}"
every_fit = pytest.mark.parametrize("quantizer", FITS, ids=name)
widest_fits = pytest.mark.parametrize("quantizer", WIDEST, ids=name)
every_fixed = pytest.mark.parametrize(("kind", "magnitudes"), FIXED.values(), ids=FIXED)

VALUES = st.floats(-1e3, 1e3, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-3 else 0.0)
COLUMN = (12, 1)

# How far from the optimum a fit may be, in shares of |w|^2: the power of 2^(1/8) next to the best scale is at
# most 2^(1/16) from it, and moves the quantized weights, no longer than w, by so much.
EXCESS = {**dict.fromkeys((Ternary, Uniform, PowerOfTwo), (2 ** (1 / 16) - 1) ** 2), LeastSquares: 0.02}

DRAWS: dict[str, Any] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "Laplace": lambda rng, size: rng.laplace(size=size),
    "uniform": lambda rng, size: rng.uniform(-1, 1, size=size),
    "Cauchy": lambda rng, size: rng.standard_cauchy(size=size),
    "lognormal": lambda rng, size: rng.lognormal(size=size) * rng.choice([-1, 1], size=size),
    "wide lognormal": lambda rng, size: rng.lognormal(sigma=2, size=size),
    "small integers": lambda rng, size: rng.integers(-3, 4, size=size) + 0.0,
    "integers": lambda rng, size: rng.integers(-9, 10, size=size) + 0.0,
    "mostly zeros": lambda rng, size: rng.normal(size=size) * (rng.uniform(size=size) < 0.1),
}


def drawn(count: int, columns: int) -> np.ndarray:
    """Some columns of each kind, one after the other."""
    rng = np.random.default_rng(count)
    return np.concatenate([draw(rng, (count, columns)) for draw in DRAWS.values()], axis=1)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def least(quantizer: Any, w: np.ndarray) -> np.ndarray:
    """The least squared error of each column."""
    if isinstance(quantizer, LeastSquares):
        return reference.optimal_error_of_two(w.T)
    kinds = {
        Ternary: lambda bits: reference.TERNARY,
        Uniform: reference.uniform,
        PowerOfTwo: reference.powers,
    }
    return reference.optimal_error(w.T, kinds[type(quantizer)](getattr(quantizer, "bits", 2)))


# The references themselves.


@pytest.mark.parametrize("magnitudes", [(1.0,), *(m for _, m in FIXED.values())], ids=len)
@settings(max_examples=20)
@given(data=st.data())
def test_the_optimum_by_sorting_is_the_best_of_all_assignments(magnitudes, data):
    count = {1: 7, 2: 6, 4: 3, 8: 2}[len(magnitudes)]
    w: Any = data.draw(hnp.arrays(np.float64, count, elements=VALUES))
    slack = 1e-9 * np.sum(w**2) + 1e-12
    assert abs(reference.optimal_error(w, magnitudes) - reference.least_error(w, magnitudes)) <= slack


@settings(max_examples=25)
@given(w=hnp.arrays(np.float64, 7, elements=VALUES))
def test_the_best_two_magnitudes_cut_the_sorted_weights_in_two(w: Any):
    slack = 1e-9 * np.sum(w**2) + 1e-12
    assert abs(reference.optimal_error_of_two(w) - reference.least_error_of_two(w)) <= slack


# The fits.


@pytest.mark.usefixtures("x64")
@widest_fits
@pytest.mark.parametrize("count", [64, *(pytest.param(count, marks=pytest.mark.slow) for count in (6, 4096))])
def test_a_fit_is_close_to_the_optimum_and_stays(quantizer, count):
    columns = {6: 60, 64: 40, 4096: 4}[count]
    w = drawn(count, columns)
    y = np.asarray(projected(quantizer, w))
    error, optimal = np.sum((w - y) ** 2, axis=0), least(quantizer, w)
    size = np.sum(w**2, axis=0)
    assert np.all(error >= optimal - 1e-9 * size)
    assert np.all(error <= optimal + EXCESS[type(quantizer)] * size)
    np.testing.assert_allclose(projected(quantizer, y), y, rtol=1e-14)


@every_fit
@settings(max_examples=25)
@given(w=hnp.arrays(np.float32, COLUMN, elements=VALUES))
def test_what_is_quantized_already_stays_and_signs_and_scale_carry_over(quantizer, w):
    together = np.concatenate([w, -w, 4 * w], axis=1)
    y = np.asarray(described(quantizer, together)[0])
    np.testing.assert_allclose(described(quantizer, y)[0], y, rtol=1e-6)
    np.testing.assert_array_equal(y[:, 2], 4 * y[:, 0])
    # Zero is not one of the values of LeastSquares, and goes to the upper of the two beside it.
    turned = (
        -y[:, 0] if not isinstance(quantizer, LeastSquares) else np.where(w[:, 0] == 0, y[:, 0], -y[:, 0])
    )
    np.testing.assert_array_equal(y[:, 1], turned)
    error = np.sum((np.float64(w[:, 0]) - y[:, 0]) ** 2)
    size = np.sum(np.float64(w) ** 2)
    assert error <= least(quantizer, w)[0] + (EXCESS[type(quantizer)] + 1e-5) * size


@every_fit
@settings(max_examples=15)
@given(w=hnp.arrays(np.float32, (12, 3), elements=VALUES))
def test_codes_count_the_levels_from_the_lowest(quantizer, w):
    y, levels, codes, decoded = described(quantizer, w)
    assert (codes.dtype, codes.shape) == (jnp.uint8, w.shape)
    assert len(levels) == layout(quantizer, w.shape).levels
    stacked = np.stack(levels)
    assert np.all(stacked[1:] >= stacked[:-1])
    np.testing.assert_array_equal(stacked, -stacked[::-1])
    np.testing.assert_array_equal(decoded, y)
    # By looking at all levels; the nearest is told by its distance, since levels may lie next to each other.
    np.testing.assert_allclose(
        np.abs(w - y), np.min(np.abs(w - stacked), axis=0), rtol=1e-5, atol=1e-6 * np.max(np.abs(w))
    )


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [*((q, jnp.bfloat16) for q in WIDEST), (Uniform(bits=4), jnp.float16)],
    ids=lambda value: name(value) if isinstance(value, (*EXCESS,)) else value.__name__,
)
def test_in_short_floats_too_what_is_quantized_stays(quantizer, dtype):
    w = jnp.asarray(np.clip(drawn(64, 3), -1e3, 1e3), dtype)
    project = quick_jit(_assignment.project, static_argnums=0)
    once = project(quantizer, w)
    assert once.dtype == dtype
    np.testing.assert_allclose(
        np.float32(project(quantizer, once)), np.float32(once), rtol=2 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.usefixtures("x64")
@every_fit
def test_it_stays_all_the_way_to_the_projection(quantizer):
    w = np.float64(normal(1024, 16)) if isinstance(quantizer, LeastSquares) else drawn(64, 40)
    y = np.asarray(projected(quantizer, w))
    for t in (0.01, 0.1, 0.5, 0.9, 0.99):
        np.testing.assert_allclose(projected(quantizer, (1 - t) * w + t * y), y, rtol=1e-12)


def test_more_bits_come_closer():
    w = normal(4096, 4)
    quantizers = [Binary(), Ternary(), LeastSquares(), Uniform(bits=3), Uniform(bits=4)]
    errors = [float(np.sum((w - projected(q, w)) ** 2) / np.sum(w**2)) for q in quantizers]
    assert errors == sorted(errors, reverse=True)
    # The shares that the page on theory compares the cost of a scale with.
    assert round(errors[1], 2) == 0.19
    assert round(errors[-1], 2) == 0.01
    powers = float(np.sum((w - projected(PowerOfTwo(bits=4), w)) ** 2) / np.sum(w**2))
    assert errors[-1] < powers < errors[1]


@pytest.mark.parametrize("quantizer", [Uniform(bits=2), PowerOfTwo(bits=2)], ids=name)
def test_two_bits_are_ternary(quantizer):
    w = normal(64, 8)
    np.testing.assert_allclose(projected(quantizer, w), projected(Ternary(), w), rtol=1e-6)
    assert layout(quantizer, (4, 4)).levels == 3


# Fixed scales.


@every_fixed
@settings(max_examples=25)
@given(w=hnp.arrays(np.float32, (6, 1), elements=st.floats(-2, 2, width=32)))
def test_at_a_fixed_scale_each_weight_goes_to_the_nearest_level(kind, magnitudes, w):
    levels = np.array(sorted({sign * m for m in magnitudes for sign in (-1, 1)}), np.float32)
    y, found, codes, _ = described(kind(scale=1.0), w)
    np.testing.assert_allclose(np.ravel(found), levels, rtol=1e-6)
    # At all but ties to rounding, which the next test has.
    np.testing.assert_allclose(np.abs(w - y), np.min(np.abs(w - levels), axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(np.ravel(found)[codes], y)


@pytest.mark.parametrize(
    ("quantizer", "weights", "expected"),
    [
        (Ternary(scale=1.0), [-0.5, 0.5, 0.0, -0.75], [0, 1, 0, -1]),
        (Uniform(bits=3, scale=3.0), [-2.5, -0.5, 0.5, 2.5], [-2, 0, 1, 3]),
        (PowerOfTwo(bits=3, scale=1.0), [-0.75, -0.125, 0.125, 0.375], [-0.5, 0, 0.25, 0.5]),
    ],
    ids=name,
)
def test_a_weight_halfway_between_levels_goes_up(quantizer, weights, expected):
    np.testing.assert_array_equal(projected(quantizer, jnp.array([weights])), [expected])


# What they say of themselves, and what is refused.


@pytest.mark.parametrize(
    ("quantizer", "levels", "bits"),
    [
        (Ternary(), 3, 2),
        (Ternary(scale=1.0), 3, 2),
        (Uniform(bits=2), 3, 2),
        (Uniform(bits=3), 7, 3),
        (Uniform(), 15, 4),
        (PowerOfTwo(bits=3, group=2), 7, 3),
        (PowerOfTwo(), 15, 4),
        (LeastSquares(), 4, 2),
    ],
    ids=str,
)
def test_the_bits_are_those_that_tell_the_levels_apart(quantizer, levels, bits):
    for shape in ((4, 3), (0, 3)):
        assert layout(quantizer, shape).levels == levels
        assert layout(quantizer, shape).bits == bits


@pytest.mark.parametrize("kind", [Uniform, PowerOfTwo])
def test_bits_out_of_range_are_refused(kind):
    for bits, error in (
        (1, ValueError),
        (5, ValueError),
        (2.0, TypeError),
        (True, TypeError),
        ("4", TypeError),
    ):
        with pytest.raises(error, match="bits"):
            kind(bits=bits)


def test_least_squares_have_no_scale_to_fix_and_two_bits():
    options: Any
    for options in ({"scale": 1.0}, {"bits": 2}):
        with pytest.raises(TypeError):
            LeastSquares(**options)


def test_quantizers_of_other_bits_are_other_keys():
    keys = [*FITS, Uniform(bits=2), PowerOfTwo(bits=2), Ternary(axis=0), Ternary(scale=1.0)]
    assert len(set(keys)) == len(keys)
    assert Uniform() == Uniform(bits=4)


# In use.


@pytest.mark.parametrize("quantizer", [LeastSquares()], ids=name)
def test_jit_and_vmap_change_nothing(quantizer):
    w = normal(3, 12, 3)
    stacked = jax.jit(jax.vmap(lambda w: nearest(w, levels_of(quantizer, w))))(w)
    for part, y in zip(w, stacked, strict=True):
        np.testing.assert_allclose(y, projected(quantizer, part), rtol=1e-6)


@pytest.mark.parametrize("quantizer", [Ternary()], ids=name)
def test_training_ends_at_levels(quantizer):
    target = normal(12, 3)
    optimizer = stam(optax.sgd(0.1), hard_from=10, quantizer=quantizer)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optimizer.update({"kernel": params["kernel"] - target}, state, params)
        return (optax.apply_updates(params, updates), state), None

    params: Any = {"kernel": np.zeros_like(target)}

    def run(params: Any) -> Any:
        params = jax.lax.scan(step, (params, optimizer.init(params)), length=15)[0][0]
        return params["kernel"], quantize(params, quantizer)["kernel"]

    trained, quantized = quick_jit(run)(params)
    assert np.any(trained)
    np.testing.assert_allclose(quantized, trained, rtol=1e-6)
