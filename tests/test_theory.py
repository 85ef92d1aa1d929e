"""The theorems on runs of problems whose constants are known, and iterations that they do not cover."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stam_jax
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.theorems import SEEDS, TENSOR, build, decrease, everywhere, run
from stam_jax import (
    Binary,
    LeastSquares,
    PowerOfTwo,
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
from stam_jax.relaxations import LinearBlend
from tests import helpers, reference

# One of them always, the others among the slow tests.
on_every_problem = pytest.mark.parametrize(
    "pose",
    [
        pytest.param(pose, marks=() if pose is PROBLEMS["waves"] else pytest.mark.slow, id=name)
        for name, pose in PROBLEMS.items()
    ],
)


def projected(x: jax.Array) -> jax.Array:
    return quantize(x, everywhere(TENSOR))


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
def test_the_residual_stays_under_the_bound_in_every_run(pose, penalty, pulls):
    problem, steps = pose(), 1000
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
def test_the_residual_falls_as_the_fourth_root_of_the_steps(pose):
    problem, penalty = pose(), 1.0
    lengths = [250, 1000, 4000]
    roots = []
    for steps in lengths:
        learning_rate = theory.step_size(**constants(problem, steps, penalty))
        roots.append(np.sqrt(np.mean(run(problem, steps, learning_rate, penalty=penalty).measured)))
    slope = np.polyfit(np.log(lengths), np.log(roots), 1)[0]
    assert -0.5 < slope <= -0.22


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_an_explicit_penalty_step_breaks_the_bound_and_the_proximal_one_does_not(pose):
    problem, steps, penalty = pose(), 1000, 1e4
    known = constants(problem, steps, penalty)
    learning_rate = 1 / problem.smoothness

    def explicit(x: Any, d: Any) -> Any:
        return x - learning_rate * (d + penalty * (x - projected(x)))

    allowed = theory.bound(learning_rate, **known)
    wrong = run(problem, steps, learning_rate, penalty=penalty, take=explicit, seeds=4)
    assert not np.any(wrong.residual < allowed)
    assert not np.any(wrong.measured < allowed)
    right = run(problem, steps, learning_rate, penalty=penalty, seeds=4)
    assert np.all(right.residual < allowed)


@pytest.mark.usefixtures("x64")
@on_every_problem
def test_noise_in_the_projection_breaks_the_bound_where_quantized_weights_are_small(pose):
    """They are a tenth of what the noise moves a weight by: with "last", noise chooses the signs."""
    problem, steps = pose(), 2000
    learning_rate, penalty = 1 / problem.smoothness, 100 * problem.smoothness
    alpha = float(0.1 * learning_rate * problem.noise / np.sqrt(problem.start.size))
    problem = problem._replace(start=jnp.where(problem.start >= 0, alpha, -alpha))
    known = constants(problem, steps, penalty)
    known["decrease"] = decrease(problem, quantizer=Binary(scale=alpha), penalty=penalty)
    allowed = theory.bound(learning_rate, **known)
    settings: Any = {"penalty": penalty, "quantizer": Binary(scale=alpha), "seeds": 4}
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
def test_with_inertia_the_residual_stays_under_the_bound_with_the_flip_work(pose, kappa, project):
    problem, steps, penalty = pose(), 1000, 30.0
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
def test_penalties_that_grow_pay_with_the_penalty_work(pose):
    """Steps and penalties may change as long as the steps stay below 1 / L and the penalties do not fall."""
    problem, steps = pose(), 1000
    rates = optax.exponential_decay(1 / problem.smoothness, steps, 0.1)
    rho = optax.exponential_decay(0.01, steps, 1e4)
    tau = optax.exponential_decay(0.1, steps, 10.0)
    box = Box(0.5)
    rule = everywhere(TENSOR)
    optimizer = stam_proximal(rates, rho, quantizer=rule, regularizer=box, regularizer_penalty=tau)

    def one(key: jax.Array) -> Any:
        def step(carry: Any, given: Any) -> Any:
            x, state = carry
            k, key = given
            eta, r, t, next_r, next_t = (
                jnp.asarray(number) for number in (rates(k), rho(k), tau(k), rho(k + 1), tau(k + 1))
            )
            model: Any = {"penalty": r, "regularizer": box, "regularizer_penalty": t, "quantizer": rule}
            moved = diagnostics.effective_step(eta, penalty=r, regularizer_penalty=t)
            residual = diagnostics.residual(jax.grad(problem.loss)(x), state, x, **model).whole.total
            new_x, new_state = helpers.take_step(optimizer, problem.draw(x, key), state, x)
            from_quantized = jnp.sum((new_x - projected(new_x)) ** 2)
            from_box = jnp.sum((new_x - box.prox(new_x, 1 / t)) ** 2)
            work = (next_r - r) / 2 * from_quantized + (next_t - t) / 2 * from_box
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
    optimizer = build(eta, rho, quantizer=Binary(), inertia=kappa, project=project)
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
        # The latent weights follow from x and y: w - x = lam (x - y).
        assert (state.latent is None) == (kappa == 0)
        if kappa > 0:
            np.testing.assert_allclose(state.latent, x + kappa * lam * (x - y), rtol=0, atol=1e-11)
    assert flips > 0 or kappa < 0.9


# Quantizers whose projection is the nearest point of their set, but for rounding; and those whose squared
# distance may exceed the least one by a share of |w|^2.
EXACT = {
    "binary per channel": Binary(),
    "binary per tensor": Binary(axis=()),
    "binary per group": Binary(group=2),
    "signs": Binary(scale=1.0),
    "ternary without scale": Ternary(scale=1.0),
    "uniform without scale": Uniform(bits=3, scale=2.0),
    "power of two without scale": PowerOfTwo(bits=3, scale=2.0),
}
NEARLY = {
    "ternary": (Ternary(), 0.01),
    "ternary per tensor": (Ternary(axis=()), 0.01),
    "uniform": (Uniform(bits=3), 0.01),
    "uniform of 4 bits per tensor": (Uniform(bits=4, axis=()), 0.01),
    "power of two per tensor": (PowerOfTwo(bits=3, axis=()), 0.01),
    "least squares": (LeastSquares(), 0.02),
}
weights_of_a_kernel = st.lists(st.floats(-4, 4, width=16), min_size=8, max_size=8)


def blended(quantizer: Any, dtype: Any) -> Any:
    """What w, and where a step without a gradient leads from it, are quantized to; and that point itself."""

    @jax.jit
    def step(w: jax.Array, theta: jax.Array) -> Any:
        optimizer = three_block_splitting(
            optax.identity(), quantizer=quantizer, relaxation=LinearBlend(theta), inertia=1.0
        )
        params = {"kernel": w.astype(dtype)}
        x, _ = helpers.take_step(optimizer, {"kernel": 0 * w}, optimizer.init(params), params)
        trees = (x, quantize(x, quantizer), quantize(params, quantizer))
        return tuple(tree["kernel"].astype(jnp.float32) for tree in trees)

    return step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXACT)
def test_a_point_on_the_way_to_the_projection_has_the_same_projection(name, dtype):
    step = blended(EXACT[name], dtype)

    @given(weights=weights_of_a_kernel, theta=st.floats(0.02, 1.0))
    def check(weights, theta):
        w = jnp.asarray(weights, jnp.float32).reshape(4, 2)
        _, again, y = step(w, theta)
        np.testing.assert_array_equal(again >= 0, y >= 0)
        np.testing.assert_allclose(again, y, rtol=2e-6 if dtype == "float32" else 2e-2)

    check()


@pytest.mark.parametrize("name", NEARLY)
def test_where_scales_are_searched_for_it_is_as_near_as_the_search_is_good(name):
    quantizer, share = NEARLY[name]
    step = blended(quantizer, "float32")
    distance = lambda x, y: float(np.sum((np.float64(x) - np.float64(y)) ** 2))

    def check(w, theta):
        x, again, y = step(jnp.asarray(w, jnp.float32), theta)
        assert distance(x, again) <= distance(x, y) + share * distance(x, 0) + 1e-9
        # Once hard there is nothing left to search for.
        hard, again_hard, _ = step(jnp.asarray(w, jnp.float32), 1.0)
        np.testing.assert_allclose(hard, y, rtol=1e-6)
        np.testing.assert_allclose(again_hard, y, rtol=1e-5)
        return again, y

    @given(weights=weights_of_a_kernel, theta=st.floats(0.02, 1.0))
    def check_any(weights, theta):
        check(np.reshape(weights, (4, 2)), theta)

    check_any()
    # Among many normal weights the two differ little.
    w = np.random.default_rng(0).normal(size=(256, 16))
    for theta in (0.1, 0.5, 0.9):
        again, y = check(w, theta)
        assert distance(again, y) < 0.03**2 * distance(w, 0)
        assert np.all(again * y >= 0)


def test_every_kind_of_quantizer_is_among_them():
    kinds = [getattr(stam_jax, name) for name in stam_jax.__all__]
    of_quantizers = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Shared)}
    tried = [*EXACT.values(), *(quantizer for quantizer, _ in NEARLY.values())]
    assert {type(quantizer) for quantizer in tried} == of_quantizers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parameters_and_the_latent_weights_are_quantized_to_the_same_network(dtype):
    """At every step of a run whose signs turn, before the network is hard and after."""
    optimizer = stam(optax.sgd(0.3, momentum=0.9), hard_from=30, inertia=0.9)
    keys = jax.random.split(jax.random.key(0), 40)

    @jax.jit
    def train(params: Any) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            gradients = {"kernel": jax.random.normal(key, (32, 8), dtype)}
            params, state = helpers.take_step(optimizer, gradients, carry[1], carry[0])
            return (params, state), (quantize(params)["kernel"], quantize(state.latent)["kernel"])

        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    of_params, of_latent = train({"kernel": jax.random.normal(jax.random.key(1), (32, 8), dtype)})
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

    def one(key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            gradients = jax.grad(loss)(params)
            model: Any = {"penalty": rho, "quantizer": signs}
            found = diagnostics.residual(gradients, state, params, **model)
            objective = diagnostics.objective(loss(params), state, params, **model).total
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
        with pytest.raises(error, match="estimate_smoothness: iterations"):
            theory.estimate_smoothness(
                jnp.sum,
                jnp.ones(3),
                key=jax.random.key(0),
                iterations=iterations,  # pyright: ignore[reportArgumentType]
            )
