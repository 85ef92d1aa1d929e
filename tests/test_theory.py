"""The theorems on runs of problems whose constants are known, and iterations that they do not cover."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stam_jax
from benchmarks import theorems
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.theorems import SEEDS, TENSOR, build, everywhere
from stam_jax import (
    Binary,
    LeastSquares,
    PowerOfTwo,
    Quantizer,
    StepInertia,
    Ternary,
    Uniform,
    diagnostics,
    quantize,
    stam,
    stam_proximal,
    theory,
    three_block_splitting,
)
from stam_jax.quantizers import Shared
from stam_jax.regularizers import Box, Ridge
from stam_jax.relaxations import LinearBlend, SquaredDistance
from tests import helpers, reference

# One of them always, the others among the slow tests.
on_every_problem = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "waves" else pytest.mark.slow) for name in PROBLEMS]
)


@cache
def pose(name: str) -> Problem:
    """The problem, its stochastic gradients a function of what `chances` draws."""
    problem = PROBLEMS[name]()
    if name == "digits":
        return problem
    return problem._replace(draw=lambda x, noise: jax.grad(problem.loss)(x) + noise)


def chances(problem: Problem, seeds: int, steps: int) -> Any:
    """What the gradients of every step of every run are drawn with."""
    if problem.start.ndim == 2:  # Minibatches of digits.
        return jax.random.split(jax.random.key(1), (seeds, steps))
    noise = np.random.default_rng(1).normal(size=(seeds, steps, problem.start.size))
    return problem.noise / np.sqrt(problem.start.size) * noise


def compiled(problem: Problem) -> Any:
    """The runs on digits take long, and the others long to compile."""
    return jax.jit if problem.start.ndim == 2 else helpers.quick_jit


def projected(x: jax.Array) -> jax.Array:
    return quantize(x, everywhere(TENSOR))


class Runs(NamedTuple):
    """What every step of every run came to: arrays over settings, seeds and steps.

    Args:
        residual: |R|^2, R being how the iteration moved less its noise.
        measured: the same of the library's residual.
        work: the flip work.
    """

    residual: Any
    measured: Any
    work: Any


def run(
    problem: Problem,
    steps: int,
    learning_rates: Any,
    penalties: Any,
    inertias: Any = None,
    *,
    seeds: int = SEEDS,
    take: Callable[[Any, Any], Any] | None = None,
    quantizer: Quantizer = TENSOR,
    pulls: dict[str, Any] | None = None,
    project: Any = "first",
) -> Runs:
    """Runs of theorem 1, or with inertias of theorem 2, or of another step: one program for all settings."""
    pulls, rule = pulls or {}, everywhere(quantizer)

    def one(eta: Any, rho: Any, kappa: Any, drawn: Any) -> Runs:
        optimizer = stam_proximal(eta, rho, quantizer=rule, **pulls)
        if inertias is not None:
            relaxation = SquaredDistance(eta * rho)
            optimizer = three_block_splitting(
                optax.sgd(eta), quantizer=rule, relaxation=relaxation, inertia=kappa, project=project
            )
        tau = pulls.get("regularizer_penalty", 0.0)
        moved = diagnostics.effective_step(eta, penalty=rho, regularizer_penalty=tau)
        model: Any = {"penalty": (1 - kappa) * rho, "quantizer": rule, **pulls}
        costs: Any = {"learning_rate": eta, "penalty": rho, "inertia": kappa, "quantizer": rule}

        def step(carry: Any, drawn: Any) -> Any:
            x, state = carry
            gradient, d = jax.grad(problem.loss)(x), problem.draw(x, drawn)
            measured = diagnostics.residual(gradient, state, x, **model).whole.total
            new_x, new_state = helpers.take_step(optimizer, d, state, x)
            if take is not None:
                new_x = take(x, d)
            residual = (x - new_x) / moved - (d - gradient)
            work = jnp.zeros([])
            if inertias is not None:
                work = diagnostics.flip_work(problem.loss, d, (state, x), (new_state, new_x), **costs)
            return (new_x, new_state), Runs(jnp.sum(residual**2), measured**2, work)

        start: Any = (problem.start, optimizer.init(problem.start))
        return jax.lax.scan(step, start, drawn)[1]

    numbers = np.broadcast_arrays(*map(np.float64, (learning_rates, penalties, inertias or 0.0)))
    of_seeds = jax.vmap(one, in_axes=(None, None, None, 0))
    of_all = compiled(problem)(jax.vmap(of_seeds, in_axes=(0, 0, 0, None)))
    found = of_all(*numbers, chances(problem, seeds, steps))
    return jax.tree.map(np.asarray, found)


@partial(helpers.quick_jit, static_argnames=("loss", "quantizer", "regularizer"))
def objective(start: Any, penalty: Any, tau: Any, loss: Any, quantizer: Any, regularizer: Any) -> Any:
    rule = everywhere(quantizer)
    state = stam_proximal(1.0, 1.0, quantizer=rule).init(start)
    pulls: Any = {"regularizer": regularizer, "regularizer_penalty": tau}
    return diagnostics.objective(loss(start), state, start, penalty=penalty, quantizer=rule, **pulls).total


def decrease(problem: Problem, penalty: Any, pulls: Any = None, quantizer: Quantizer = TENSOR) -> float:
    """How far the objective can fall from the start, at most."""
    pulls = pulls or {"regularizer": None, "regularizer_penalty": 0.0}
    box, tau = pulls["regularizer"], pulls["regularizer_penalty"]
    return float(objective(problem.start, penalty, tau, problem.loss, quantizer, box)) - problem.least


def constants(problem: Problem, steps: int, penalty: float, pulls: dict[str, Any] | None = None) -> Any:
    return {
        "smoothness": problem.smoothness,
        "noise": problem.noise,
        "decrease": decrease(problem, penalty, pulls),
        "steps": steps,
        "penalty": penalty,
        "regularizer_penalty": (pulls or {}).get("regularizer_penalty", 0.0),
    }


# Runs of theorem 1 without a regularizer: a penalty and a number of steps each, with the best step for them.
PLAIN = {
    "weak": (0.1, 1000),
    "strong": (30.0, 1000),
    "strongest": (1e4, 1000),
    "short": (1.0, 125),
    "middling": (1.0, 500),
    "long": (1.0, 2000),
}


@cache
def plain_runs(name: str) -> dict[str, Runs]:
    """Each of them over its own steps."""
    problem = pose(name)
    known = [constants(problem, steps, penalty) for penalty, steps in PLAIN.values()]
    rates = [1 / problem.smoothness if k["penalty"] == 1e4 else theory.step_size(**k) for k in known]
    found = run(problem, 2000, rates, [k["penalty"] for k in known])
    return {kind: Runs(*(of[i, :, : PLAIN[kind][1]] for of in found)) for i, kind in enumerate(PLAIN)}


def assert_under_the_bound(found: Runs, learning_rate: float, known: Any) -> None:
    allowed = theory.bound(learning_rate, **known)
    residual = np.mean(found.residual, axis=-1)
    assert np.all(residual < allowed)
    # Not by so much that anything would pass.
    assert np.max(residual) > allowed / 20
    # And the library measures the residual that the proof speaks of.
    np.testing.assert_allclose(np.mean(found.measured, axis=-1), residual, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@on_every_problem
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_the_residual_stays_under_the_bound_in_every_run(name, kind):
    penalty, steps = PLAIN[kind]
    known = constants(pose(name), steps, penalty)
    assert_under_the_bound(plain_runs(name)[kind], theory.step_size(**known), known)


@pytest.mark.usefixtures("x64")
@on_every_problem
@pytest.mark.parametrize("regularizer", [Box(0.5), Ridge(0.5)])
def test_with_a_regularizer_too(name, regularizer):
    problem, penalty, steps = pose(name), 1.0, 1000
    pulls = {"regularizer": regularizer, "regularizer_penalty": 3.0 if regularizer == Box(0.5) else 0.5}
    known = constants(problem, steps, penalty, pulls)
    learning_rate = theory.step_size(**known)
    found = run(problem, steps, [learning_rate], [penalty], pulls=pulls)
    assert_under_the_bound(found, learning_rate, known)


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_the_residual_falls_as_the_fourth_root_of_the_steps(name):
    kinds = ("short", "middling", "long")
    roots = [np.sqrt(np.mean(plain_runs(name)[kind].measured)) for kind in kinds]
    slope = np.polyfit(np.log([PLAIN[kind][1] for kind in kinds]), np.log(roots), 1)[0]
    assert -0.5 < slope <= -0.22


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_an_explicit_penalty_step_breaks_the_bound_and_the_proximal_one_does_not(name):
    problem, (penalty, steps) = pose(name), PLAIN["strongest"]
    learning_rate = 1 / problem.smoothness
    explicit = lambda x, d: x - learning_rate * (d + penalty * (x - projected(x)))
    wrong = run(problem, steps, [learning_rate], [penalty], take=explicit, seeds=4)
    right = plain_runs(name)["strongest"]
    allowed = theory.bound(learning_rate, **constants(problem, steps, penalty))
    assert not np.any(np.mean(wrong.residual, axis=-1) < allowed)
    assert not np.any(np.mean(wrong.measured, axis=-1) < allowed)
    assert np.all(np.mean(right.residual, axis=-1) < allowed)


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_noise_in_the_projection_breaks_the_bound_where_quantized_weights_are_small(name):
    """They are a tenth of what the noise moves a weight by: with "last", noise chooses the signs."""
    problem, steps = pose(name), 2000
    learning_rate, penalty = 1 / problem.smoothness, 100 * problem.smoothness
    alpha = float(0.1 * learning_rate * problem.noise / np.sqrt(problem.start.size))
    problem = problem._replace(start=np.where(problem.start >= 0, alpha, -alpha))
    known = constants(problem, steps, penalty)
    known["decrease"] = decrease(problem, penalty, quantizer=Binary(scale=alpha))
    allowed = theory.bound(learning_rate, **known)
    few: Any = {"quantizer": Binary(scale=alpha), "seeds": 4}
    right = run(problem, steps, [learning_rate], [penalty], **few)
    wrong = run(problem, steps, [learning_rate], [penalty], [0.0], project="last", **few)
    assert np.all(np.mean(right.residual, axis=-1) < allowed)
    # At the y that has seen the noise, not at the one from before it.
    assert np.all(np.mean(wrong.residual, axis=-1) > 5 * allowed)
    assert np.all(np.mean(wrong.measured, axis=-1) < allowed)


@pytest.mark.usefixtures("x64")
def test_the_penalty_never_limits_the_step():
    problem, steps, penalties = pose("waves")._replace(noise=0.0), 20_000, (1e-3, 1.0, 1e3, 1e6)
    learning_rate = 1 / problem.smoothness
    found = run(problem, steps, learning_rate, penalties, seeds=1).residual[:, 0]
    for penalty, residual in zip(penalties, found, strict=True):
        assert np.mean(residual) <= theory.bound(learning_rate, **constants(problem, steps, penalty))
        assert np.mean(residual) < np.mean(residual[:200]) / 5


@pytest.mark.usefixtures("x64")
@on_every_problem
@pytest.mark.parametrize("project", ["first", "last"])
def test_with_inertia_the_residual_stays_under_the_bound_with_the_flip_work(name, project):
    problem, steps, penalty = pose(name), 1000, 30.0
    learning_rate, inertias = 1 / problem.smoothness, (0.0, 0.5, 0.9, 0.99, 1.0)
    found = run(problem, steps, learning_rate, penalty, inertias, project=project)
    moved = diagnostics.effective_step(learning_rate, penalty=penalty)
    for i, kappa in enumerate(inertias):
        work, measured = np.sum(found.work[i], axis=-1), np.mean(found.measured[i], axis=-1)
        pull = (1 - kappa) * penalty
        fall = decrease(problem, pull) + work
        allowed = 2 * fall / (moved * steps) + (problem.smoothness + pull) * moved * problem.noise**2
        known = constants(problem, steps, penalty) | {"decrease": fall[0], "inertia": kappa}
        assert theory.bound(learning_rate, **known) == pytest.approx(allowed[0], rel=1e-12)
        assert np.all(measured < allowed)
        assert np.max(measured / allowed) > 1 / 20
        assert np.all(work != 0)


@pytest.mark.usefixtures("x64")
@on_every_problem
@pytest.mark.parametrize("project", ["first", "last"])
def test_an_inertia_that_follows_from_the_steps_pays_with_the_pull_work(name, project):
    problem, steps, penalty = pose(name), 1000, 30.0
    eta, rule, inertia = 1 / problem.smoothness, everywhere(TENSOR), StepInertia(hold=16.0)
    optimizer = three_block_splitting(
        optax.sgd(eta),
        quantizer=rule,
        relaxation=SquaredDistance(eta * penalty),
        inertia=inertia,
        project=project,
    )
    moved = diagnostics.effective_step(eta, penalty=penalty)

    def one(drawn: Any) -> Any:
        def step(carry: Any, drawn: Any) -> Any:
            x, state, before = carry
            kappa = inertia.at(state.count, state.relative_step)
            gradient, d = jax.grad(problem.loss)(x), problem.draw(x, drawn)
            model: Any = {"penalty": (1 - before) * penalty, "quantizer": rule}
            residual = diagnostics.residual(gradient, state, x, **model).whole.total
            new_x, new_state = helpers.take_step(optimizer, d, state, x)
            costs: Any = {"learning_rate": eta, "penalty": penalty, "inertia": before, "quantizer": rule}
            flips = diagnostics.flip_work(problem.loss, d, (state, x), (new_state, new_x), **costs)
            q, new_q = projected(state.latent), projected(new_state.latent)
            pull = (before - kappa) * penalty / 2 * jnp.sum((new_x - new_q) ** 2)
            total = lambda x, q, kappa: problem.loss(x) + (1 - kappa) * penalty / 2 * jnp.sum((x - q) ** 2)
            descended = x - moved * (d + (1 - before) * penalty * (x - q))
            risen = total(new_x, new_q, kappa) - total(descended, q, before)
            return (new_x, new_state, kappa), (residual**2, flips, pull, kappa, risen)

        start: Any = (problem.start, optimizer.init(problem.start), jnp.asarray(1.0))
        return jax.lax.scan(step, start, drawn)[1]

    squares, flips, pull, kappa, risen = compiled(problem)(jax.vmap(one))(chances(problem, SEEDS, steps))
    fall = decrease(problem, 0.0) + np.sum(flips + pull, axis=-1)
    left = (1 - np.mean(kappa, axis=-1)) * penalty  # The first pull, 0, and the last one aside.
    allowed = 2 * fall / (moved * steps) + (problem.smoothness + left) * moved * problem.noise**2
    measured = np.mean(squares, axis=-1)
    assert np.all(measured < allowed)
    assert np.max(measured / allowed) > 1 / 50
    assert np.all(np.sum(pull, axis=-1) != 0)
    np.testing.assert_allclose(flips + pull, risen, rtol=0, atol=1e-9 * np.max(np.abs(risen)))
    assert np.ptp(kappa) > 1e-3


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_penalties_that_grow_pay_with_the_penalty_work(name):
    """Steps and penalties may change as long as the steps stay below 1 / L and the penalties do not fall."""
    problem, steps = pose(name), 1000
    rates = optax.exponential_decay(1 / problem.smoothness, steps, 0.1)
    rho = optax.exponential_decay(0.01, steps, 1e4)
    tau = optax.exponential_decay(0.1, steps, 10.0)
    box = Box(0.5)
    rule = everywhere(TENSOR)
    optimizer = stam_proximal(rates, rho, quantizer=rule, regularizer=box, regularizer_penalty=tau)

    def one(drawn: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            x, state = carry
            k, drawn = given
            eta, r, t, next_r, next_t = (
                jnp.asarray(number) for number in (rates(k), rho(k), tau(k), rho(k + 1), tau(k + 1))
            )
            model: Any = {"penalty": r, "regularizer": box, "regularizer_penalty": t, "quantizer": rule}
            moved = diagnostics.effective_step(eta, penalty=r, regularizer_penalty=t)
            residual = diagnostics.residual(jax.grad(problem.loss)(x), state, x, **model).whole.total
            new_x, new_state = helpers.take_step(optimizer, problem.draw(x, drawn), state, x)
            from_quantized = jnp.sum((new_x - projected(new_x)) ** 2)
            from_box = jnp.sum((new_x - box.prox(new_x, 1 / t)) ** 2)
            work = (next_r - r) / 2 * from_quantized + (next_t - t) / 2 * from_box
            noise = (problem.smoothness + r + t) * moved**2 * problem.noise**2
            return (new_x, new_state), (moved * residual**2, work, noise, moved)

        ks = jnp.arange(steps)
        start = (problem.start, optimizer.init(problem.start))
        _, found = jax.lax.scan(step, start, (ks, drawn))
        return jax.tree.map(jnp.sum, found)

    squares, work, noise, moved = compiled(problem)(jax.vmap(one))(chances(problem, SEEDS, steps))
    fall = decrease(problem, 0.01, {"regularizer": box, "regularizer_penalty": 0.1})
    allowed = (2 * (fall + work) + noise) / moved
    assert np.all(squares / moved < allowed)
    assert np.max(squares / moved / allowed) > 1 / 100
    assert np.all(work > 0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_table_in_the_documentation_is_of_such_runs():
    problem, kappa = pose("waves"), 0.9
    row = theorems.measure("waves", kappa, "last")
    rate = 1 / problem.smoothness
    mine = run(problem, theorems.STEPS, rate, [theorems.PENALTY], [kappa], project="last")
    # With other noise.
    assert row["residual"] == pytest.approx(np.mean(mine.measured), rel=0.02)
    assert row["work"] == pytest.approx(np.mean(np.sum(mine.work, axis=-1)), rel=0.1)
    assert row["kept"] == SEEDS
    assert row["residual"] < row["bound"]
    assert row["flips"] > 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("project", ["first", "last"])
@pytest.mark.parametrize("inertia", [0.0, 0.3, 0.99, 1.0, lambda k: 0.5 + 0.4 * (-1.0) ** k])
def test_the_iteration_can_be_told_in_x_alone(inertia: Any, project: Any):
    """x+ = x - eta_hat (d + (1 - kappa) rho (x - y+)) + c (y+ - y), y_0 being x_0; in NumPy.

    The kappa of a step is that with which the step before it has ended.
    """
    rng = np.random.default_rng(0)
    eta, rho = 0.1, 40.0
    lam = eta * rho
    kappas = [reference.at(inertia, k) for k in range(60)]
    optimizer = build(eta, rho, quantizer=Binary(), inertia=inertia, project=project)
    start = rng.normal(size=(6, 4))
    params = jnp.asarray(start)
    state = helpers.begin(optimizer, params)
    step = helpers.quick_jit(partial(helpers.take_step, optimizer))
    x = y = start
    flips = 0
    for kappa, next_kappa in zip([0.7, *kappas], kappas, strict=False):
        carried = kappa * lam / (1 + lam)
        d = 3 * rng.normal(size=x.shape) + x - 0.3
        params, state = step(d, state, params)
        v = x + kappa * lam * (x - y)
        new_y = reference.project(v if project == "first" else v - eta * d)
        x = x - eta / (1 + lam) * (d + (1 - kappa) * rho * (x - new_y)) + carried * (new_y - y)
        flips += np.sum(new_y * y < 0)
        y = new_y
        np.testing.assert_allclose(params, x, rtol=0, atol=1e-12)
        # The latent weights follow from x and y: w - x = lam (x - y).
        assert (state.latent is None) == (inertia == 0)
        if inertia != 0:
            np.testing.assert_allclose(state.latent, x + next_kappa * lam * (x - y), rtol=0, atol=1e-11)
    assert flips > 0 or kappas[0] < 0.9


# Quantizers whose projection is a nearest point of their set, but for rounding.
EXACT = {
    "binary per channel": Binary(),
    "binary per tensor": Binary(axis=()),
    "binary per group": Binary(group=2),
    "signs": Binary(scale=1.0),
    "ternary": Ternary(),
    "uniform of 4 bits per tensor": Uniform(bits=4, axis=()),
    "power of two without scale": PowerOfTwo(bits=3, scale=2.0),
}
weights_of_a_kernel = st.lists(st.floats(-4, 4, width=16), min_size=8, max_size=8)


def blended(quantizers: Any, dtype: Any) -> Any:
    """Of each quantizer: where a step without a gradient leads from w, and what both are quantized to."""

    def step(quantizer: Any, w: jax.Array, theta: jax.Array) -> Any:
        optimizer = three_block_splitting(
            optax.identity(), quantizer=quantizer, relaxation=LinearBlend(theta), inertia=1.0
        )
        params = {"kernel": w.astype(dtype)}
        x, _ = helpers.take_step(optimizer, {"kernel": 0 * w}, optimizer.init(params), params)
        trees = (x, quantize(x, quantizer), quantize(params, quantizer))
        return tuple(tree["kernel"].astype(jnp.float32) for tree in trees)

    found = helpers.quick_jit(lambda w, theta: {name: step(q, w, theta) for name, q in quantizers.items()})
    return lambda w, theta: found(np.float32(w), np.float32(theta)).items()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_point_on_the_way_to_the_projection_has_the_same_projection(dtype):
    steps = blended(EXACT, dtype)

    @given(weights=weights_of_a_kernel, theta=st.floats(0.02, 1.0))
    def check(weights, theta):
        for name, (_, again, y) in steps(np.reshape(weights, (4, 2)), theta):
            again, y = np.asarray(again), np.asarray(y)
            np.testing.assert_array_equal(again >= 0, y >= 0, err_msg=name)
            np.testing.assert_allclose(again, y, rtol=2e-6 if dtype == "float32" else 2e-2, err_msg=name)

    check()


def test_where_two_magnitudes_are_searched_for_it_is_as_near_as_the_search_is_good():
    steps = blended({"least squares": LeastSquares()}, "float32")
    distance = lambda x, y: float(np.sum((np.float64(x) - np.float64(y)) ** 2))
    w = np.random.default_rng(0).standard_cauchy(size=(64, 16))
    for theta in (0.1, 0.5, 0.9, 1.0):
        ((_, (x, again, y)),) = steps(w, theta)
        assert distance(x, again) <= distance(x, y) + 0.02 * distance(x, 0)
    # Once hard there is nothing left to search for.
    np.testing.assert_allclose(x, y, rtol=1e-6)
    np.testing.assert_allclose(again, y, rtol=1e-5)


def test_every_kind_of_quantizer_is_among_them():
    kinds = [getattr(stam_jax, name) for name in stam_jax.__all__]
    of_quantizers = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Shared)}
    assert {*map(type, EXACT.values()), LeastSquares} == of_quantizers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parameters_and_the_latent_weights_are_quantized_to_the_same_network(dtype):
    """At every step of a run whose signs turn, before the network is hard and after."""
    optimizer = stam(optax.sgd(0.3, momentum=0.9), hard_from=30, hold=1.0)
    start, *noise = np.random.default_rng(0).normal(size=(41, 32, 8))

    @helpers.quick_jit
    def train(params: Any) -> Any:
        def step(carry: Any, gradients: Any) -> Any:
            params, state = helpers.take_step(optimizer, gradients, carry[1], carry[0])
            return (params, state), (quantize(params)["kernel"], quantize(state.latent)["kernel"])

        return jax.lax.scan(step, (params, optimizer.init(params)), {"kernel": jnp.asarray(noise, dtype)})[1]

    of_params, of_latent = train({"kernel": jnp.asarray(start, dtype)})
    # Step 0 does not pull yet.
    of_params, of_latent = (np.asarray(y[1:], np.float32) for y in (of_params, of_latent))
    np.testing.assert_array_equal(of_params > 0, of_latent > 0)
    np.testing.assert_allclose(of_params, of_latent, rtol=2e-6 if dtype == "float32" else 2e-2)
    assert np.mean(of_params[1:] * of_params[:-1] < 0) > 0.01


@pytest.mark.parametrize(
    ("rho", "kappa", "tau"),
    [
        (0.0, 0.0, 0.0),
        (3.0, 0.0, 0.0),
        (1e3, 0.0, 2.0),
        (1e9, 0.0, 1e9),
        (3.0, 0.5, 0.0),
        (1e9, 0.99, 0.0),
        (50.0, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.1, 50.0])
def test_no_other_step_has_a_lower_bound(rho, kappa, tau, noise):
    known = {
        "smoothness": 2.0,
        "noise": noise,
        "decrease": 3.0,
        "steps": 500,
        "penalty": rho,
        "inertia": kappa,
        "regularizer_penalty": tau,
    }
    best = theory.step_size(**known)
    assert 0 < best <= 0.5 * (1 + 1e-12)
    least = theory.bound(best, **known)
    moved = best / (1 + best * (rho + tau))
    expected = 2 * 3.0 / (moved * 500) + (2.0 + (1 - kappa) * rho + tau) * moved * noise**2
    assert least == pytest.approx(expected, rel=1e-12)
    for other in np.geomspace(1e-12, 0.5, 60):
        assert least <= theory.bound(float(other), **known) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"smoothness": 0.0}, "smoothness must be above 0"),
        ({"noise": -1.0}, r"noise must be a number in \[0, inf\)"),
        ({"steps": 0}, r"steps must be a number in \[1, inf\)"),
        ({"penalty": np.inf}, r"penalty must be a number in \[0, inf\)"),
        ({"inertia": 1.5}, r"inertia must be a number in \[0, 1\]"),
        ({"inertia": 0.5, "regularizer_penalty": 1.0}, "no theorem covers inertia together with"),
    ],
)
def test_constants_that_no_problem_has_are_refused(change, words):
    known = {"smoothness": 1.0, "noise": 1.0, "decrease": 1.0, "steps": 10} | change
    with pytest.raises(ValueError, match=words):
        theory.step_size(**known)
    with pytest.raises(ValueError, match=words):
        theory.bound(0.5, **known)


def test_flip_work_may_leave_less_than_nothing_to_fall_and_a_step_size_needs_something():
    known = {"smoothness": 1.0, "noise": 1.0, "steps": 10, "penalty": 3.0, "inertia": 0.5}
    assert theory.bound(1.0, decrease=-0.5, **known) == pytest.approx(2 * -0.5 / 2.5 + 2.5 / 4)
    with pytest.raises(ValueError, match="decrease must be above 0"):
        theory.step_size(decrease=0.0, **known)
    for nothing in (np.inf, np.nan):
        with pytest.raises(ValueError, match="decrease must be a number in"):
            theory.bound(1.0, decrease=nothing, **known)


@pytest.mark.usefixtures("x64")
def test_noise_in_weights_that_are_not_quantized_has_a_share_of_its_own():
    """A quantized weight hardly moves beside one that is not: without that share the bound would break."""
    rho, float_noise, steps = 79.0, 0.05, 5000
    hessian = jnp.array([[-0.64, 0.7], [0.7, 1.4]])
    smoothness = float(np.max(np.abs(np.linalg.eigvalsh(hessian))))
    whole = lambda params: jnp.array([params["kernel"][0, 0] - 1, params["bias"][0]])
    loss = lambda params: 0.5 * whole(params) @ hessian @ whole(params)
    signs, eta = Binary(scale=1.0), 1 / smoothness
    optimizer = stam_proximal(eta, rho, quantizer=signs)
    start = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    noise = float_noise * np.random.default_rng(1).normal(size=(SEEDS, steps, 1))

    def one(noise: jax.Array) -> Any:
        def step(carry: Any, noise: jax.Array) -> Any:
            params, state = carry
            gradients = jax.grad(loss)(params)
            model: Any = {"penalty": rho, "quantizer": signs}
            found = diagnostics.residual(gradients, state, params, **model)
            objective = diagnostics.objective(loss(params), state, params, **model).total
            noisy = gradients | {"bias": gradients["bias"] + noise}
            squares = found.leaves["kernel"].total ** 2, found.leaves["bias"].total ** 2
            return helpers.take_step(optimizer, noisy, state, params), (*squares, objective)

        _, found = jax.lax.scan(step, (start, optimizer.init(start)), noise)
        return jnp.mean(found[0]), jnp.mean(found[1]), jnp.min(found[2])

    of_kernel, of_bias, least = helpers.quick_jit(jax.vmap(one))(noise)
    known: Any = {
        "smoothness": smoothness,
        "noise": 0.0,
        "decrease": -float(jnp.min(least)),
        "steps": steps,
        "penalty": rho,
    }
    assert np.all(of_kernel + (1 + eta * rho) * of_bias < theory.bound(eta, float_noise=float_noise, **known))
    # As if the noise were in the quantized weights.
    assert np.all(of_kernel + of_bias > theory.bound(eta, **(known | {"noise": float_noise})))


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
    found, early = helpers.quick_jit(
        lambda point: [
            theory.estimate_smoothness(loss, point, key=jax.random.key(0), iterations=n) for n in (300, 2)
        ]
    )(point)
    assert float(found.value) == pytest.approx(largest, rel=1e-3)
    assert float(found.change) < 1e-3
    assert early.value < largest
    assert early.change > found.change


def test_a_flat_loss_has_no_curvature():
    point = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)}
    flat = lambda x: jnp.sum(3 * x["a"]) + jnp.sum(x["b"]).astype(jnp.float32)
    found = theory.estimate_smoothness(flat, point, key=jax.random.key(0))
    assert (float(found.value), float(found.change)) == (0, 0)
    for iterations, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="estimate_smoothness: iterations"):
            theory.estimate_smoothness(
                jnp.sum,
                jnp.ones(3),
                key=jax.random.key(0),
                iterations=iterations,  # pyright: ignore[reportArgumentType]
            )
