"""The theorems on runs of problems whose constants are known, and iterations that they do not cover."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import stam_jax
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.theorems import SEEDS, TENSOR, decrease, run
from stam_jax import (
    Binary,
    Box,
    LeastSquares,
    PowerOfTwo,
    Ridge,
    Ternary,
    Uniform,
    diagnostics,
    stam,
    theory,
)
from stam_jax._groups import Groups
from tests import helpers, reference

# One of them always, the others among the slow tests.
on_every_problem = pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, marks=() if build is PROBLEMS["waves"] else pytest.mark.slow, id=name)
        for name, build in PROBLEMS.items()
    ],
)


def constants(problem: Problem, steps: int, penalty: float, pulls: dict[str, Any] | None = None) -> Any:
    pulls = pulls or {}
    return {
        "smoothness": problem.smoothness,
        "noise": problem.noise,
        "decrease": decrease(problem, penalty=penalty, **pulls),
        "steps": steps,
        "penalty": penalty,
        "regularizer_penalty": pulls.get("regularizer_penalty", 0.0),
    }


@pytest.mark.usefixtures("x64")
@on_every_problem
@pytest.mark.parametrize(
    ("penalty", "pulls"),
    [
        (0.1, None),
        (30.0, None),
        (1.0, {"regularizer": Box(0.5), "regularizer_penalty": 3.0}),
        (1.0, {"regularizer": Ridge(0.5), "regularizer_penalty": 0.5}),
    ],
    ids=["weak", "strong", "boxed", "ridged"],
)
def test_the_residual_stays_under_the_bound_in_every_run(build, penalty, pulls):
    problem, steps = build(), 1000
    known = constants(problem, steps, penalty, pulls)
    learning_rate = theory.step_size(**known)
    found = run(problem, steps, learning_rate, penalty=penalty, pulls=pulls)
    allowed = theory.bound(learning_rate, **known)
    assert np.all(found.residual < allowed)
    # Not by so much that anything would pass.
    assert np.max(found.residual) > allowed / 20
    # And the library measures the residual that the proof speaks of.
    np.testing.assert_allclose(found.measured, found.residual, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_the_residual_falls_as_the_fourth_root_of_the_steps(build):
    problem, penalty = build(), 1.0
    lengths = [250, 1000, 4000]
    roots = []
    for steps in lengths:
        learning_rate = theory.step_size(**constants(problem, steps, penalty))
        roots.append(np.sqrt(np.mean(run(problem, steps, learning_rate, penalty=penalty).measured)))
    slope = np.polyfit(np.log(lengths), np.log(roots), 1)[0]
    assert -0.5 < slope <= -0.22


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_an_explicit_penalty_step_breaks_the_bound_and_the_proximal_one_does_not(build):
    problem, steps, penalty = build(), 1000, 1e4
    known = constants(problem, steps, penalty)
    learning_rate = 1 / problem.smoothness

    def explicit(x: Any, d: Any) -> Any:
        return x - learning_rate * (d + penalty * (x - TENSOR.project(x)))

    allowed = theory.bound(learning_rate, **known)
    wrong = run(problem, steps, learning_rate, penalty=penalty, take=explicit, seeds=4)
    assert not np.any(wrong.residual < allowed)
    assert not np.any(wrong.measured < allowed)
    right = run(problem, steps, learning_rate, penalty=penalty, seeds=4)
    assert np.all(right.residual < allowed)


@dataclasses.dataclass(frozen=True)
class TwoValues:
    """The set of vectors of one magnitude."""

    alpha: float
    bits: int = 1

    def project(self, v: jax.Array) -> jax.Array:
        return jnp.where(v >= 0, self.alpha, -self.alpha)

    def contains(self, y: jax.Array) -> jax.Array:
        return jnp.all(jnp.abs(y) == self.alpha)


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_noise_in_the_projection_breaks_the_bound_where_binary_weights_are_small(build):
    """They are a tenth of what the noise moves a float weight by: with "last", noise chooses the signs."""
    problem, steps = build(), 2000
    learning_rate, penalty = 1 / problem.smoothness, 100 * problem.smoothness
    alpha = 0.1 * learning_rate * problem.noise / np.sqrt(problem.start.size)
    problem = problem._replace(start=jnp.where(problem.start >= 0, alpha, -alpha))
    known = constants(problem, steps, penalty)
    known["decrease"] = decrease(problem, quantizer=TwoValues(alpha), penalty=penalty)
    allowed = theory.bound(learning_rate, **known)
    settings: Any = {"penalty": penalty, "quantizer": TwoValues(alpha), "seeds": 4}
    right = run(problem, steps, learning_rate, project="first", **settings)
    wrong = run(problem, steps, learning_rate, project="last", **settings)
    assert np.all(right.residual < allowed)
    # At the y that has seen the noise, not at the one from before it.
    assert np.all(wrong.residual > 5 * allowed)
    assert np.all(wrong.measured < allowed)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3, 1e6])
def test_the_penalty_never_limits_the_step(penalty):
    problem = PROBLEMS["waves"](noise=0.0)
    learning_rate = 1 / problem.smoothness
    short, long = (
        run(problem, steps, learning_rate, penalty=penalty, seeds=1).residual[0] for steps in (200, 20_000)
    )
    assert long <= theory.bound(learning_rate, **constants(problem, 20_000, penalty))
    assert long < short / 5


@pytest.mark.usefixtures("x64")
@on_every_problem
@pytest.mark.parametrize("project", ["first", "last"])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_with_inertia_the_residual_stays_under_the_bound_with_the_flip_work(build, kappa, project):
    problem, steps, penalty = build(), 1000, 30.0
    learning_rate = 1 / problem.smoothness
    settings: Any = {"penalty": penalty, "inertia": kappa, "project": project}
    found = run(problem, steps, learning_rate, with_work=True, **settings)
    pull = (1 - kappa) * penalty
    fall = decrease(problem, penalty=pull) + found.work
    moved = learning_rate / (1 + learning_rate * penalty)
    allowed = 2 * fall / (moved * steps) + (problem.smoothness + pull) * moved * problem.noise**2
    known = constants(problem, steps, penalty) | {"decrease": fall[0], "inertia": kappa}
    assert theory.bound(learning_rate, **known) == pytest.approx(allowed[0], rel=1e-12)
    assert np.all(found.measured < allowed)
    assert np.max(found.measured / allowed) > 1 / 20
    assert np.all(found.work != 0)


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_penalties_that_grow_pay_with_the_penalty_work(build):
    """Steps and penalties may change as long as the steps stay below 1 / L and the penalties do not fall."""
    problem, steps = build(), 1000
    rates = optax.exponential_decay(1 / problem.smoothness, steps, 0.1)
    rho = optax.exponential_decay(0.01, steps, 1e4)
    tau = optax.exponential_decay(0.1, steps, 10.0)
    box = Box(0.5)
    optimizer = stam(
        rates,
        penalty=rho,
        regularizer=box,
        regularizer_penalty=tau,
        quantizer=TENSOR,
        mask=True,
    )

    def one(key: jax.Array) -> Any:
        def step(carry: Any, given: Any) -> Any:
            x, state = carry
            k, key = given
            eta, r, t, next_r, next_t = (
                jnp.asarray(number) for number in (rates(k), rho(k), tau(k), rho(k + 1), tau(k + 1))
            )
            model: Any = {"penalty": r, "regularizer": box, "regularizer_penalty": t}
            moved = diagnostics.effective_step(eta, penalty=r, regularizer_penalty=t)
            residual = diagnostics.residual(jax.grad(problem.loss)(x), state, x, **model).whole.total
            new_x, new_state = helpers.take_step(optimizer, problem.draw(x, key), state, x)
            from_binary = jnp.sum((new_x - TENSOR.project(new_x)) ** 2)
            from_box = jnp.sum((new_x - box.prox(new_x, 1 / t)) ** 2)
            work = (next_r - r) / 2 * from_binary + (next_t - t) / 2 * from_box
            noise = (problem.smoothness + r + t) * moved**2 * problem.noise**2
            return (new_x, new_state), (moved * residual**2, work, noise, moved)

        ks = jnp.arange(steps)
        start = (problem.start, optimizer.init(problem.start))
        _, found = jax.lax.scan(step, start, (ks, jax.random.split(key, steps)))
        return jax.tree.map(jnp.sum, found)

    squares, work, noise, moved = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), SEEDS))
    first: Any = {"penalty": rho(0), "regularizer": box, "regularizer_penalty": tau(0)}
    allowed = (2 * (decrease(problem, **first) + work) + noise) / moved
    assert np.all(squares / moved < allowed)
    assert np.max(squares / moved / allowed) > 1 / 100
    assert np.all(work > 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("project", ["first", "last"])
@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.99, 1.0])
def test_the_iteration_can_be_told_in_x_alone(kappa, project):
    """x+ = x - eta_hat (d + (1 - kappa) rho (x - y+)) + c (y+ - y), y_0 being x_0; in NumPy."""
    rng = np.random.default_rng(0)
    eta, rho = 0.1, 40.0
    lam = eta * rho
    carried = kappa * lam / (1 + lam)
    optimizer = stam(eta, penalty=rho, inertia=kappa, project=project)
    start = rng.normal(size=(6, 4))
    params = jnp.asarray(start)
    state = helpers.begin(optimizer, params)
    x = y = start
    flips = 0
    for _ in range(60):
        d = 3 * rng.normal(size=x.shape) + x - 0.3
        params, state = helpers.take_step(optimizer, jnp.asarray(d), state, params)
        v = x + kappa * lam * (x - y)
        new_y = reference.project(v if project == "first" else v - eta * d)
        x = x - eta / (1 + lam) * (d + (1 - kappa) * rho * (x - new_y)) + carried * (new_y - y)
        flips += np.sum(new_y * y < 0)
        y = new_y
        np.testing.assert_allclose(params, x, rtol=0, atol=1e-12)
        # The float weights follow from x and y: w - x = lam (x - y).
        if kappa > 0:
            np.testing.assert_allclose(state.latent, x + kappa * lam * (x - y), rtol=0, atol=1e-11)
    assert flips > 0 or kappa < 0.9


EXACT = {
    "binary per channel": Binary(),
    "binary per tensor": Binary(scale="tensor"),
    "binary per group": Binary(scale="group", group=2),
    "signs": Binary(scale=None),
    "ternary": Ternary(),
    "ternary per tensor": Ternary(scale="tensor"),
    "ternary without scale": Ternary(scale=None),
    "uniform": Uniform(bits=3),
    "power of two": PowerOfTwo(bits=3, scale="tensor"),
    "least squares": LeastSquares(bits=2),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("quantizer", EXACT.values(), ids=EXACT)
@given(
    weights=st.lists(st.floats(-4, 4), min_size=8, max_size=8),
    theta=st.floats(0.02, 1.0),
)
def test_a_point_on_the_way_to_the_projection_has_the_same_projection(quantizer, weights, theta):
    w = jnp.asarray(weights).reshape(4, 2)
    y = quantizer.project(w)
    x = (1 - theta) * w + theta * y
    again = quantizer.project(x)
    # Next to Q the direction of w - y is nothing but rounding.
    assume(bool(jnp.linalg.norm(w - y) > 1e-6) or theta == 1.0)
    size = float(jnp.max(jnp.abs(w)))
    np.testing.assert_allclose(again, y, rtol=0, atol=1e-9 * max(size, 1e-3))


def test_every_kind_of_quantiser_is_among_them():
    kinds = [getattr(stam_jax, name) for name in stam_jax.__all__]
    of_quantizers = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Groups)}
    assert {type(quantizer) for quantizer in EXACT.values()} == of_quantizers


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
def test_noise_in_weights_that_stay_in_float_has_a_share_of_its_own():
    """A binary weight that hardly moves beside a float one: without that share the bound would be broken."""
    rho, float_noise, steps = 79.0, 0.05, 5000
    hessian = jnp.array([[-0.64, 0.7], [0.7, 1.4]])
    smoothness = float(np.max(np.abs(np.linalg.eigvalsh(hessian))))
    whole = lambda params: jnp.array([params["kernel"][0, 0] - 1, params["bias"][0]])
    loss = lambda params: 0.5 * whole(params) @ hessian @ whole(params)
    signs, eta = Binary(scale=None), 1 / smoothness
    optimizer = stam(eta, penalty=rho, quantizer=signs)
    start = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}

    def one(key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            gradients = jax.grad(loss)(params)
            found = diagnostics.residual(gradients, state, params, penalty=rho)
            objective = diagnostics.objective(loss(params), state, params, penalty=rho).total
            noisy = gradients | {"bias": gradients["bias"] + float_noise * jax.random.normal(key, (1,))}
            squares = found.leaves["kernel"].total ** 2, found.leaves["bias"].total ** 2
            return helpers.take_step(optimizer, noisy, state, params), (*squares, objective)

        _, found = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, steps))
        return jnp.mean(found[0]), jnp.mean(found[1]), jnp.min(found[2])

    of_kernel, of_bias, least = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), SEEDS))
    known: Any = {
        "smoothness": smoothness,
        "noise": 0.0,
        "decrease": -float(jnp.min(least)),
        "steps": steps,
        "penalty": rho,
    }
    assert np.all(of_kernel + (1 + eta * rho) * of_bias < theory.bound(eta, float_noise=float_noise, **known))
    # As if the noise were in the quantised weights.
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
    found = theory.estimate_smoothness(loss, point, key=jax.random.key(0), iterations=300)
    assert float(found.value) == pytest.approx(largest, rel=1e-3)
    assert float(found.change) < 1e-3
    early = theory.estimate_smoothness(loss, point, key=jax.random.key(0), iterations=2)
    assert early.value < largest
    assert early.change > found.change


def test_a_flat_loss_has_no_curvature():
    point = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)}
    flat = lambda x: jnp.sum(3 * x["a"]) + jnp.sum(x["b"]).astype(jnp.float32)
    found = theory.estimate_smoothness(flat, point, key=jax.random.key(0))
    assert (float(found.value), float(found.change)) == (0, 0)
    for iterations, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="iterations must be a whole number of at least 1"):
            theory.estimate_smoothness(
                jnp.sum,
                jnp.ones(3),
                key=jax.random.key(0),
                iterations=iterations,  # pyright: ignore[reportArgumentType]
            )
