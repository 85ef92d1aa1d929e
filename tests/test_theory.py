"""The theorem on runs of problems whose constants are known, and iterations that it does not cover."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stam_jax import Binary, stam, theory

SEEDS = 20
TENSOR = Binary(scale="tensor")


class Problem(NamedTuple):
    """A non-convex loss whose constants are known, each weight by itself: a parabola and a wave.

    It is sum of a (x - t)^2 / 2 + c cos(w x), so its second derivatives lie within max(a) + c w^2 of 0, and
    it is at least -c for each weight.

    Args:
        curvature: a, of each weight.
        target: t, of each weight.
        wave: c.
        frequency: w.
        start: where runs begin.
        noise: root of the mean squared distance of a stochastic gradient from the gradient.
    """

    curvature: np.ndarray
    target: np.ndarray
    wave: float
    frequency: float
    start: np.ndarray
    noise: float

    @property
    def smoothness(self) -> float:
        return float(np.max(self.curvature)) + self.wave * self.frequency**2

    def loss(self, x: Any) -> Any:
        waves = self.wave * jnp.cos(self.frequency * x)
        return jnp.sum(0.5 * self.curvature * (x - self.target) ** 2 + waves)

    def gradient(self, x: Any) -> Any:
        return self.curvature * (x - self.target) - self.wave * self.frequency * jnp.sin(self.frequency * x)

    def decrease(self, penalty: float) -> float:
        """How far the objective can fall from the start, at most."""
        x = np.asarray(self.start)
        y = np.where(x >= 0, 1, -1) * np.mean(np.abs(x))
        waves = self.wave * np.cos(self.frequency * x)
        loss = np.sum(0.5 * self.curvature * (x - self.target) ** 2 + waves)
        return float(loss + penalty / 2 * np.sum((x - y) ** 2) + self.wave * x.size)


def problem(noise: float = 2.0, size: int = 32, seed: int = 0) -> Problem:
    draws = np.random.default_rng(seed)
    target = draws.choice([-1.0, 1.0], size) * draws.uniform(0.5, 1.5, size)
    return Problem(
        curvature=draws.uniform(0.1, 1.0, size),
        target=target,
        wave=0.3,
        frequency=2.0,
        start=draws.normal(size=size),
        noise=noise,
    )


def residuals(
    given: Problem, steps: int, penalty: float, take: Callable[[Any, Any], Any], seeds: int = SEEDS
) -> np.ndarray:
    """The mean squared residual over the steps of a run, for each seed.

    Args:
        given: the problem.
        steps: of each run.
        penalty: rho of the residual.
        take: the next x, from x and a stochastic gradient there.
        seeds: how many runs.
    """

    def run(key: jax.Array) -> jax.Array:
        def step(x: Any, key: jax.Array) -> tuple[Any, Any]:
            exact = given.gradient(x)
            residual = exact + penalty * (x - TENSOR.project(x))
            noise = jax.random.normal(key, x.shape, x.dtype) * (given.noise / np.sqrt(x.size))
            return take(x, exact + noise), jnp.sum(residual**2)

        _, squares = jax.lax.scan(step, jnp.asarray(given.start), jax.random.split(key, steps))
        return jnp.mean(squares)

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), seeds)))


def proximal(learning_rate: float, penalty: float) -> Callable[[Any, Any], Any]:
    """One step of the theorem's method, by the library; its state is a step counter."""
    optimizer = stam(learning_rate, penalty=penalty, quantizer=TENSOR, mask=True)

    def take(x: Any, gradient: Any) -> Any:
        updates, _ = optimizer.update(gradient, optimizer.init(x), x)
        return x + updates

    return take


def constants(given: Problem, steps: int, penalty: float) -> dict[str, Any]:
    return {
        "smoothness": given.smoothness,
        "noise": given.noise,
        "decrease": given.decrease(penalty),
        "steps": steps,
        "penalty": penalty,
    }


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
@pytest.mark.usefixtures("x64")
def test_the_residual_stays_under_the_bound_in_every_run(penalty):
    given, steps = problem(), 2000
    known = constants(given, steps, penalty)
    learning_rate = theory.step_size(**known)
    found = residuals(given, steps, penalty, proximal(learning_rate, penalty))
    allowed = theory.bound(learning_rate, **known)
    assert np.all(found < allowed)
    # Not by so much that anything would pass.
    assert np.max(found) > allowed / 100


@pytest.mark.usefixtures("x64")
def test_the_residual_falls_as_the_fourth_root_of_the_steps():
    given, penalty = problem(), 1.0
    lengths = [250, 1000, 4000, 16000]
    roots = []
    for steps in lengths:
        learning_rate = theory.step_size(**constants(given, steps, penalty))
        roots.append(np.sqrt(np.mean(residuals(given, steps, penalty, proximal(learning_rate, penalty)))))
    slope = np.polyfit(np.log(lengths), np.log(roots), 1)[0]
    assert -0.5 < slope <= -0.22


@pytest.mark.usefixtures("x64")
def test_an_explicit_penalty_step_breaks_the_bound_and_the_proximal_one_does_not():
    given, steps, penalty = problem(), 2000, 1e4
    known = constants(given, steps, penalty)
    learning_rate = 1 / given.smoothness

    def explicit(x: Any, gradient: Any) -> Any:
        return x - learning_rate * (gradient + penalty * (x - TENSOR.project(x)))

    assert not np.any(
        residuals(given, steps, penalty, explicit, seeds=4) < theory.bound(learning_rate, **known)
    )
    good = residuals(given, steps, penalty, proximal(learning_rate, penalty), seeds=4)
    assert np.all(good < theory.bound(learning_rate, **known))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3, 1e6])
def test_the_penalty_never_limits_the_step(penalty):
    given = problem(noise=0.0)
    learning_rate = 1 / given.smoothness
    short, long = (
        residuals(given, steps, penalty, proximal(learning_rate, penalty), seeds=1)[0]
        for steps in (200, 20_000)
    )
    assert long <= theory.bound(learning_rate, **constants(given, 20_000, penalty))
    assert long < short / 5


@pytest.mark.parametrize(("rho", "tau"), [(0.0, 0.0), (3.0, 0.0), (1e3, 2.0), (1e9, 1e9)])
@pytest.mark.parametrize("noise", [0.0, 0.1, 50.0])
def test_no_other_step_has_a_lower_bound(rho, tau, noise):
    known = {
        "smoothness": 2.0,
        "noise": noise,
        "decrease": 3.0,
        "steps": 500,
        "penalty": rho,
        "regularizer_penalty": tau,
    }
    best = theory.step_size(**known)
    assert 0 < best <= 0.5 * (1 + 1e-12)
    least = theory.bound(best, **known)
    moved = best / (1 + best * (rho + tau))
    expected = 2 * 3.0 / (moved * 500) + (2.0 + rho + tau) * moved * noise**2
    assert least == pytest.approx(expected, rel=1e-12)
    for other in np.geomspace(1e-12, 0.5, 60):
        assert least <= theory.bound(float(other), **known) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smoothness": 0.0}, "smoothness must be above 0"),
        ({"decrease": 0.0}, "decrease must be above 0"),
        ({"noise": -1.0}, r"noise must be a number in \[0, inf\)"),
        ({"steps": 0}, r"steps must be a number in \[1, inf\)"),
        ({"penalty": np.inf}, r"penalty must be a number in \[0, inf\)"),
    ],
)
def test_constants_that_no_problem_has_are_refused(change, words):
    known = {"smoothness": 1.0, "noise": 1.0, "decrease": 1.0, "steps": 10} | change
    with pytest.raises(ValueError, match=words):
        theory.step_size(**known)
    with pytest.raises(ValueError, match=words):
        theory.bound(0.5, **known)


def test_a_step_beyond_the_theorem_is_refused():
    known = {"smoothness": 4.0, "noise": 1.0, "decrease": 1.0, "steps": 10}
    assert theory.bound(0.25, **known) > 0
    for learning_rate in (0.26, 0.0):
        with pytest.raises(ValueError, match=r"learning_rate must be in \(0, 1 / smoothness\] = \(0, 0.25\]"):
            theory.bound(learning_rate, **known)


def test_power_iteration_finds_the_largest_eigenvalue_of_a_tree_of_weights():
    draws = np.random.default_rng(0)
    half = draws.normal(size=(7, 7))
    hessian = half + half.T
    largest = np.max(np.abs(np.linalg.eigvalsh(hessian)))
    flat = lambda tree: jnp.concatenate([tree["a"].ravel(), tree["b"]])
    loss = lambda tree: 0.5 * flat(tree) @ hessian @ flat(tree) + jnp.sum(tree["b"])
    point = {"a": jnp.ones((2, 2)), "b": jnp.zeros(3)}
    found = theory.estimate_smoothness(loss, point, key=jax.random.key(0), iterations=300)
    assert float(found.value) == pytest.approx(largest, rel=1e-3)
    assert float(found.change) < 1e-3
    early = theory.estimate_smoothness(loss, point, key=jax.random.key(0), iterations=2)
    assert early.value < largest
    assert early.change > found.change


def test_a_flat_loss_has_no_curvature():
    found = theory.estimate_smoothness(lambda x: jnp.sum(3 * x), jnp.ones(3), key=jax.random.key(0))
    assert (float(found.value), float(found.change)) == (0, 0)
    with pytest.raises(ValueError, match="iterations"):
        theory.estimate_smoothness(jnp.sum, jnp.ones(3), key=jax.random.key(0), iterations=0)
