"""The general iteration: equal to the math in float64, and the properties its documentation states."""

import itertools
import math
import pickle
import re
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stam_jax import (
    Binary,
    LeastSquares,
    SplittingState,
    StepInertia,
    Ternary,
    Uniform,
    admm_quant,
    binary_connect,
    binary_relax,
    bop,
    md_tanh,
    parq,
    prox_quant,
    quantize,
    schedules,
    stam,
    stam_proximal,
    straight_through,
    three_block_splitting,
)
from stam_jax.regularizers import L1, Box, GroupLasso, Ridge
from stam_jax.relaxations import Hard, LinearBlend, SquaredDistance
from tests import helpers, reference
from tests.methods import blended
from tests.runs import ETA, PROBLEM, assert_follows

TENSOR = Binary(axis=())
SGD = optax.sgd(ETA)
PARAMS = {"bias": jnp.array([0.1, 0.2]), "kernel": jnp.array([[0.5, -2.0], [1.0, 0.25], [-0.75, 1.5]])}
GRADIENTS = {"bias": jnp.array([1.0, -1.0]), "kernel": jnp.array([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]])}
assert_close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7))
slow = pytest.mark.slow
assert_equal = partial(jax.tree.map, np.testing.assert_array_equal)


def splitting(optimizer: Any = SGD, **settings: Any) -> Any:
    """Three-block splitting that is binary and hard, but for the settings."""
    given = {"quantizer": Binary(), "relaxation": Hard(), "inertia": 1.0} | settings
    return three_block_splitting(optimizer, **given)


# The iteration equals the math.


growing = lambda k: 0.1 + 0.05 * k


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("regularizer", "prox", "tau", "rho"),
    [
        pytest.param(None, None, 0.0, growing, id="free"),
        pytest.param(None, None, 5.0, 0.7, id="free-whatever-tau"),
        pytest.param(Box(0.4), reference.box(0.4), 3.0, 0.7, id="box"),
        pytest.param(Ridge(0.5), reference.ridge(0.5), 3.0, growing, id="ridge"),
        pytest.param(L1(0.3), reference.l1(0.3), 3.0, 0.7, id="l1"),
        pytest.param(L1(0.3), reference.l1(0.3), lambda k: 0.2 * k, growing, id="l1-schedule"),
    ],
)
def test_the_proximal_form_minimizes_the_three_blocks_in_turn(regularizer, prox, tau, rho):
    optimizer = stam_proximal(ETA, rho, regularizer=regularizer, regularizer_penalty=tau)
    assert_follows(optimizer, reference.proximal(ETA, rho, prox=prox, tau=tau))


@pytest.mark.usefixtures("x64")
def test_the_step_size_of_the_proximal_form_may_be_a_schedule():
    eta, rho, tau = (lambda k: 0.2 / (k + 1.0)), (lambda k: 0.3 * k), (lambda k: 5.0 - 0.1 * k)
    optimizer = stam_proximal(eta, rho, regularizer=Ridge(0.5), regularizer_penalty=tau, quantizer=TENSOR)
    advance = reference.proximal(eta, rho, prox=reference.ridge(0.5), tau=tau, axis=())
    assert_follows(optimizer, advance, eta)


RELAXATIONS = {
    "squared": (SquaredDistance(2.0), reference.squared_distance(2.0)),
    "blend-schedule": (LinearBlend(lambda k: k / 50.0), reference.linear_blend(lambda k: k / 50.0)),
    "hard": (Hard(), reference.squared_distance(math.inf)),
}


# Every two of inertia, order and relaxation together, and among the slow tests every three.
KAPPAS, ORDERS = (0, 0.3, 0.99, 1), ("first", "last")
ALL_THREE = [
    pytest.param(
        kappa,
        ORDERS[k],
        relaxation,
        id=f"{kappa}-{ORDERS[k]}-{relaxation}",
        marks=() if (i + j + k) % 2 else slow,
    )
    for (i, kappa), (j, relaxation), k in itertools.product(enumerate(KAPPAS), enumerate(RELAXATIONS), (0, 1))
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kappa", "order", "relaxation"), ALL_THREE)
def test_three_block_splitting_is_its_formula(kappa, order, relaxation):
    relax, expected = RELAXATIONS[relaxation]
    optimizer = splitting(relaxation=relax, inertia=kappa, project=order)
    assert_follows(optimizer, reference.general(ETA, relax=expected, kappa=kappa, order=order))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("regularizer", "prox", "strength", "order"),
    [
        (Box(0.4), reference.box(0.4), 0.0, "first"),
        (Box(0.4), reference.box(0.4), math.inf, "last"),
        (Box(0.4), reference.box(0.4), lambda k: 0.1 * k, "first"),
        (Ridge(0.5), reference.ridge(0.5), 0.0, "last"),
        (Ridge(0.5), reference.ridge(0.5), math.inf, "first"),
        (Ridge(0.5), reference.ridge(0.5), lambda k: 0.1 * k, "last"),
    ],
)
def test_three_block_splitting_is_its_formula_with_a_regularizer(regularizer, prox, strength, order):
    relax, expected = RELAXATIONS["squared"]
    optimizer = splitting(
        optax.sgd(ETA, momentum=0.9),
        relaxation=relax,
        inertia=0.3,
        project=order,
        regularizer=regularizer,
        regularizer_step=0.7,
        regularizer_strength=strength,
        quantizer=TENSOR,
    )
    settings = {"prox": prox, "step": 0.7, "strength": strength, "axis": ()}
    advance = reference.general(ETA, relax=expected, kappa=0.3, order=order, **settings)
    assert_follows(optimizer, advance, decay=0.9)


@pytest.mark.usefixtures("x64")
def test_every_schedule_is_read_at_the_count_of_the_step_that_ends():
    eta, kappa, step = (lambda k: 0.1 / (k + 1.0)), (lambda k: 1 - 0.02 * k), (lambda k: 0.1 + 0.1 * k)
    strength, damping = (lambda k: 0.3 * k), (lambda k: 0.2 * k)
    optimizer = splitting(
        optax.sgd(eta),
        relaxation=SquaredDistance(strength),
        inertia=kappa,
        regularizer=Ridge(0.5),
        regularizer_step=step,
        regularizer_strength=damping,
        project="first",
    )
    relax = reference.squared_distance(strength)
    settings = {"prox": reference.ridge(0.5), "step": step, "strength": damping}
    assert_follows(
        optimizer, reference.general(eta, relax=relax, kappa=kappa, order="first", **settings), eta
    )


@pytest.mark.usefixtures("x64")
def test_an_inertia_that_is_traced_gives_what_the_number_gives():
    blend = LinearBlend(lambda k: k / 50.0)
    for inertia in (0.0, 1.0):
        traced, state = helpers.train(splitting(relaxation=blend, inertia=jnp.array(inertia)), PROBLEM)
        known, _ = helpers.train(splitting(relaxation=blend, inertia=inertia), PROBLEM)
        np.testing.assert_allclose(traced["kernel"], known["kernel"], rtol=1e-14)
        assert state.latent is not None


def test_the_inertia_goes_with_the_square_of_the_mean_of_the_relative_steps_of_all_weights():
    weights = {
        "wide": {"kernel": np.full((3, 4), 2.0, np.float32)},
        "small": {"w": np.array([[0.1], [-0.3]], np.float32)},
        "none": {"kernel": np.zeros((0, 2), np.float32)},
    }
    moves = jax.tree.map(lambda leaf: 0.01 * np.cos(np.arange(leaf.size)).reshape(leaf.shape), weights)
    optimizer = splitting(None, relaxation=LinearBlend(0.5), inertia=StepInertia(hold=20.0))
    params, state = jax.tree.map(jnp.asarray, weights), helpers.begin(optimizer, weights)
    sizes: list[float] = []
    for k in range(4):
        before = state.latent
        steps = jax.tree.map(lambda move, k=k: jnp.asarray((k + 1) * move, jnp.float32), moves)
        params, state = helpers.take_step(optimizer, steps, state, params)
        typical = np.mean(sizes) if sizes else 0.0
        kappa = 1 - min(20 * typical, 0.25) * typical
        relative = []
        for layer, name in (("wide", "kernel"), ("small", "w")):
            u = np.float64(steps[layer][name])
            w = np.float64(before[layer][name]) + u
            x = (w + reference.project(w)) / 2
            np.testing.assert_allclose(params[layer][name], x, rtol=1e-6)
            np.testing.assert_allclose(state.latent[layer][name], x + kappa * (w - x), rtol=1e-6)
            relative += list(np.ravel(np.abs(u) / np.mean(np.abs(w))))
        sizes.append(float(np.mean(relative)))
    assert 20 * sizes[0] < 0.25 < 20 * np.mean(sizes)


def test_a_step_that_leaves_next_to_nothing_of_its_weights_counts_as_one_of_their_size():
    optimizer = splitting(None, inertia=StepInertia(hold=16.0))
    params = {"a": {"kernel": jnp.ones((3, 1))}, "b": {"kernel": jnp.ones((1, 1))}}
    steps = {"a": {"kernel": jnp.zeros((3, 1))}, "b": {"kernel": jnp.full((1, 1), -0.9999)}}
    _, state = optimizer.update(steps, optimizer.init(params), params)
    assert float(state.relative_step) == pytest.approx(1 / 4)


def test_there_may_be_more_weights_than_an_int32_counts():
    optimizer = stam(SGD, hard_from=5)
    params = {"kernel": jax.ShapeDtypeStruct((80, 8192, 28672), jnp.float32)}
    jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)


def signs_after(draw: Any, *, hold: float, steps: int) -> np.ndarray:
    """The signs of 50 positive weights after steps that are drawn from a key."""
    optimizer = splitting(None, inertia=StepInertia(hold=hold))
    params = {"kernel": jnp.ones((50, 1))}

    def step(carry: Any, key: Any) -> Any:
        return helpers.take_step(optimizer, {"kernel": draw(key)}, carry[1], carry[0]), None

    run = lambda carry: jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), steps))[0]
    params, _ = helpers.quick_jit(run)((params, optimizer.init(params)))
    return np.sign(params["kernel"])


@pytest.mark.parametrize("size", [1e-3, 0.03, 0.3])
def test_steps_of_one_direction_turn_held_signs_whatever_their_size(size):
    signs = signs_after(lambda key: jnp.full((50, 1), -size), hold=16.0, steps=round(4 / size))
    np.testing.assert_array_equal(signs, -1)


@pytest.mark.parametrize("size", [0.005, 0.01, 0.03])
def test_noise_turns_signs_unless_they_are_held(size):
    noise = lambda key: size * jax.random.rademacher(key, (50, 1), jnp.float32)
    steps = round(2 / size**2)  # A walk of so many steps goes further than the weights are large.
    assert np.mean(signs_after(noise, hold=0.0, steps=steps) < 0) > 0.1
    np.testing.assert_array_equal(signs_after(noise, hold=16.0, steps=steps), 1)


def test_signs_that_are_not_held_have_an_inertia_of_1():
    free, _ = helpers.train(stam(SGD, hard_from=30, hold=0.0), PROBLEM)
    known, _ = helpers.train(blended(SGD, hard_from=30, inertia=1.0), PROBLEM)
    np.testing.assert_allclose(free["kernel"], known["kernel"], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_proximal_form_is_a_configuration_of_the_general_one():
    rho, tau = 2.0, 4.0
    proximal, _ = helpers.train(
        stam_proximal(ETA, rho, regularizer=Ridge(0.5), regularizer_penalty=tau), PROBLEM
    )
    general, _ = helpers.train(
        splitting(
            relaxation=SquaredDistance(ETA * rho / (1 + ETA * tau)),
            inertia=0.0,
            project="first",
            regularizer=Ridge(0.5),
            regularizer_step=1 / tau,
            regularizer_strength=ETA * tau,
        ),
        PROBLEM,
    )
    np.testing.assert_allclose(proximal["kernel"], general["kernel"], rtol=1e-12)


# What the documentation states of it.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tau", [None, 5.0])
def test_no_penalty_limits_the_step(tau):
    exact = reference.Problem.draw(noise=0.0, steps=60)
    ridge = 0.5
    regularized = {"regularizer": Ridge(ridge), "regularizer_penalty": tau} if tau else {}
    eta, penalties = 1 / exact.smoothness(), (1e-3, 1.0, 1e3, 1e6)
    run = lambda rho: helpers.trajectory(stam_proximal(eta, rho, **regularized), exact, helpers.start(exact))[
        0
    ]
    histories = jax.tree.map(np.asarray, helpers.quick_jit(jax.vmap(run))(np.array(penalties)))

    def objective(rho: float, x: np.ndarray, bias: np.ndarray) -> float:
        """Phi at the exact minimizers y and z for this x."""
        y = reference.project(x)
        value = exact.loss(x, bias) + rho / 2 * np.sum((x - y) ** 2)
        if tau:
            z = x * tau / (tau + ridge)
            value += ridge / 2 * np.sum(z**2) + tau / 2 * np.sum((x - z) ** 2)
        return value

    for rho, kernels, biases in zip(penalties, histories["kernel"], histories["bias"], strict=True):
        steps = zip([exact.kernel, *kernels], [exact.bias, *biases], strict=True)
        values = [objective(rho, x, bias) for x, bias in steps]
        assert np.all(np.diff(values) <= 1e-12 * values[0])
        assert values[-1] < values[0] - 1e-3


def test_projecting_first_keeps_the_noise_of_a_step_out_of_the_projection():
    def signs(project: Any, noise: float) -> Any:
        optimizer = splitting(optax.sgd(1.0), project=project)
        gradients = jax.tree.map(lambda g: noise * g, GRADIENTS)
        return helpers.take_step(optimizer, gradients, optimizer.init(PARAMS), PARAMS)[0]["kernel"]

    np.testing.assert_array_equal(signs("first", 1.0), signs("first", -9.0))
    assert np.any(signs("last", 1.0) != signs("last", -9.0))


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0.0), np.float64(0.0)])
def test_a_counter_is_the_whole_state_without_inertia(zero):
    for optimizer in (splitting(inertia=zero), stam_proximal(ETA, 1.0)):
        state = helpers.begin(optimizer, PARAMS)
        for _ in range(3):
            (count,) = jax.tree.leaves(state)
            assert (count.shape, count.dtype) == ((), jnp.int32)
            _, state = helpers.take_step(optimizer, GRADIENTS, state, PARAMS)
        assert state.count == 3


def test_the_latent_weights_are_the_one_copy_that_inertia_takes():
    state = helpers.begin(splitting(inertia=0.5), PARAMS)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), (3, 2)]
    np.testing.assert_array_equal(state.latent["kernel"], PARAMS["kernel"])
    assert isinstance(state.latent["bias"], optax.MaskedNode)


def test_no_option_hides_in_a_state():
    at_first = jax.tree.structure(stam(SGD, hard_from=5).init(PARAMS))
    others = [
        stam(SGD, hard_from=9, hold=5.0, quantizer=Ternary()),
        stam(SGD, hard_from=5, hold=lambda count: 0.0),
    ]
    assert {jax.tree.structure(other.init(PARAMS)) for other in others} == {at_first}
    state = helpers.begin(stam(optax.adam(ETA), hard_from=5), PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert_equal(pickle.loads(pickle.dumps(state)), state)


@slow
def test_leaves_that_are_not_quantized_take_the_step_of_the_optimizer_as_it_is():
    adam = optax.adamw(ETA, weight_decay=0.3)
    alone, _ = helpers.take_step(adam, GRADIENTS, adam.init(PARAMS), PARAMS)
    proximal = stam_proximal(ETA, 1e3, regularizer=Ridge(1.0), regularizer_penalty=5.0)
    plain = PARAMS["bias"] - jnp.float32(ETA) * GRADIENTS["bias"]
    for optimizer, expected in [
        (stam(adam, hard_from=1), alone["bias"]),
        (splitting(adam, regularizer=Box(0.01)), alone["bias"]),
        (proximal, plain),
    ]:
        after, _ = helpers.take_step(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
        np.testing.assert_array_equal(after["bias"], expected)


def test_a_step_starts_from_the_latent_weights_and_undoes_what_else_moved_the_parameters():
    moved = PARAMS | {"kernel": PARAMS["kernel"] + 0.1}
    for inertia, is_undone in [(1.0, True), (0.5, True), (0.0, False)]:
        optimizer = splitting(relaxation=LinearBlend(0.2), inertia=inertia)
        state = optimizer.init(PARAMS)
        expected, from_moved = (
            helpers.take_step(optimizer, GRADIENTS, state, params)[0]["kernel"] for params in (PARAMS, moved)
        )
        assert np.allclose(from_moved, expected, rtol=1e-6) == is_undone


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(splitting(inertia=0.5), id="hard"),
        pytest.param(stam(SGD, hard_from=0), id="stam"),
        pytest.param(
            splitting(relaxation=SquaredDistance(math.inf), inertia=0.5), id="infinite squared distance"
        ),
    ],
)
def test_a_hard_network_differs_from_its_projection_by_the_rounding_of_the_update_alone(optimizer, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    old, state = params, optimizer.init(params)
    for _ in range(5):
        old, (params, state) = params, helpers.take_step(optimizer, GRADIENTS, state, params)
    x, before = np.float64(params["kernel"]), np.float64(old["kernel"])
    y = reference.project(x)
    # The update rounds once, its sum with the old weight once more, and the mean of the result is off as far.
    ulp = float(jnp.finfo(dtype).eps)
    assert np.all(np.abs(x - y) <= 2 * ulp * (np.abs(y - before) + np.abs(y)))
    np.testing.assert_allclose(np.float64(quantize(params)["kernel"]), y, rtol=ulp)


@pytest.mark.parametrize("penalty", [math.inf, lambda k: jnp.where(k < 0, 1.0, jnp.inf)])
def test_an_infinite_penalty_is_hard_even_at_a_step_size_of_zero(penalty):
    optimizer = stam_proximal(0.0, penalty)
    params, _ = helpers.take_step(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(params["kernel"], reference.project(PARAMS["kernel"]), rtol=1e-6)


def test_no_schedule_makes_jit_trace_again():
    moving = lambda low, high: optax.linear_schedule(low, high, 10)
    regularized = {"regularizer": Ridge(0.1), "regularizer_penalty": moving(1.0, 5.0)}
    optimizers = (
        stam_proximal(moving(0.1, 0.0), moving(0.0, 9.0), **regularized),
        stam(optax.sgd(moving(0.1, 0.0)), hard_from=5, hold=moving(0.0, 25.0)),
        splitting(
            optax.sgd(moving(0.1, 0.0)),
            relaxation=SquaredDistance(moving(0.0, 9.0)),
            regularizer=Ridge(0.1),
            regularizer_step=moving(0.1, 2.0),
            regularizer_strength=moving(0.0, 2.0),
        ),
    )
    for optimizer in optimizers:
        traces = []

        @helpers.quick_jit
        def step(state, params, optimizer=optimizer, traces=traces):
            traces.append(None)
            return helpers.take_step(optimizer, GRADIENTS, state, params)

        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(12):
            params, state = step(state, params)
        assert len(traces) == 1


# What the optimizer inside is given.


def seen_by_the_optimizer(params: Any, gradients: Any, steps: int = 1) -> tuple[list[Any], Any, Any]:
    """Gradients and parameters of each call of an optimizer inside `stam`, and the run's end."""
    calls: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        calls.append((updates, params))
        return jax.tree.map(lambda g: -0.01 * g, updates), state

    spy = optax.GradientTransformation(lambda params: calls.append(params) or optax.EmptyState(), update)
    optimizer = stam(spy, hard_from=1)
    state = helpers.begin(optimizer, params)
    for _ in range(steps):
        params, state = helpers.take_step(optimizer, gradients, state, params)
    return calls, params, state


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_optimizer_sees_latent_weights_and_gradients_in_float32(dtype):
    params, gradients = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (PARAMS, GRADIENTS))
    (first, *calls), _, _ = seen_by_the_optimizer(params, gradients, steps=2)
    assert len(calls) == 2
    for tree in (first, *itertools.chain(*calls)):
        assert {name: leaf.dtype for name, leaf in tree.items()} == {
            "kernel": jnp.float32,
            "bias": jnp.dtype(dtype),
        }
    assert_equal(first, jax.tree.map(jnp.float32, params))
    assert_equal(calls[0][0], jax.tree.map(jnp.float32, gradients))


def test_the_optimizer_sees_the_latent_weights_and_not_the_relaxed_ones():
    one, two = (seen_by_the_optimizer(PARAMS, GRADIENTS, steps) for steps in (3, 4))
    _, (_, seen) = one[0][-1], two[0][-1]
    np.testing.assert_array_equal(seen["kernel"], one[2].latent["kernel"])
    assert np.all(seen["kernel"] != one[1]["kernel"])
    np.testing.assert_array_equal(seen["bias"], one[1]["bias"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_moments_of_quantized_leaves_are_in_float32(dtype):
    params, gradients = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (PARAMS, GRADIENTS))
    optimizer = stam(optax.adamw(1e-3), hard_from=5)
    state: Any = jax.eval_shape(optimizer.init, params)
    for _ in range(2):
        adam = state.inner[0]
        assert {adam.mu["kernel"].dtype, adam.nu["kernel"].dtype} == {jnp.dtype(jnp.float32)}
        assert {adam.mu["bias"].dtype, adam.nu["bias"].dtype} == {jnp.dtype(dtype)}
        step = partial(helpers.take_step, optimizer)
        params, state = jax.eval_shape(step, gradients, state, params)
        assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(dtype)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["around", "behind"])
def test_the_weight_decay_of_adamw_acts_on_latent_weights_around_it_and_on_relaxed_ones_behind_it(form):
    rate, decay, kappa, hard_from, steps = 0.05, 0.4, 0.9, 20, 30
    adamw = optax.adamw(rate, weight_decay=decay)
    link = partial(blended, hard_from=hard_from, inertia=kappa)
    optimizer = link(adamw) if form == "around" else optax.chain(adamw, link())
    gradient = lambda x, k: np.cos(0.9 * k + 3 * x)

    names = ("kernel", "bias")
    params = {name: jnp.asarray(PARAMS[name], jnp.float64) for name in names}
    state, update = helpers.begin(optimizer, params), jax.jit(partial(helpers.take_step, optimizer))
    x = {name: np.asarray(params[name]) for name in names}
    v, m, s = dict(x), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for k in range(steps):
        g = {name: gradient(x[name], k) for name in names}
        params, state = update(jax.tree.map(jnp.asarray, g), state, params)
        theta = min(k / hard_from, 1)
        for name in names:
            m[name] = 0.9 * m[name] + 0.1 * g[name]
            s[name] = 0.999 * s[name] + 0.001 * g[name] ** 2
            slope = m[name] / (1 - 0.9 ** (k + 1)) / (np.sqrt(s[name] / (1 - 0.999 ** (k + 1))) + 1e-8)
            decayed = v[name] if form == "around" else x[name]
            w = v[name] - rate * (slope + decay * decayed)
            x[name] = (1 - theta) * w + theta * reference.project(w) if name == "kernel" else w
            v[name] = x[name] + kappa * (w - x[name]) if name == "kernel" else w
            np.testing.assert_allclose(params[name], x[name], rtol=1e-9, atol=1e-10)


def test_what_an_update_is_given_besides_reaches_the_optimizer():
    given: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        given.append(extra)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = stam(spy, hard_from=5)
    optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS, value=1.5)
    assert given == [{"value": 1.5}]
    # Those that take no more than the gradient are not troubled with it.
    optimizer = stam(SGD, hard_from=5)
    plain = optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)
    assert_equal(optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS, value=1.0), plain)


# Number formats.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("inertia", [0.0, lambda k: 1.0 / (k + 1.0)], ids=["none", "schedule"])
def test_parameters_keep_their_dtype_and_latent_weights_have_32_bits_at_least(dtype, inertia):
    # Schedules come out in float64 here: nothing of that may reach the parameters.
    schedule = lambda k: jnp.asarray(0.1, jnp.float64) / (k + 1)
    optimizer = splitting(
        optax.sgd(schedule),
        relaxation=SquaredDistance(schedule),
        inertia=inertia,
        regularizer=Ridge(0.1),
        regularizer_step=schedule,
        regularizer_strength=schedule,
    )
    params, gradients = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (PARAMS, GRADIENTS))
    state: Any = jax.eval_shape(optimizer.init, params)
    for _ in range(2):
        updates, state = jax.eval_shape(optimizer.update, gradients, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        latents = {leaf.dtype for leaf in jax.tree.leaves(state.latent)}
        assert latents == (set() if inertia == 0.0 else {jnp.promote_types(dtype, jnp.float32)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_may_be_of_another_type_than_the_parameters(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    optimizer = stam(hard_from=5)
    for gradients in (GRADIENTS, jax.tree.map(jnp.bfloat16, GRADIENTS)):
        before = jax.eval_shape(optimizer.init, params)
        updates, after = jax.eval_shape(optimizer.update, gradients, before, params)
        assert updates["kernel"].dtype == jnp.dtype(dtype)
        assert after == before


def test_updates_far_below_an_ulp_of_bfloat16_add_up():
    steps, step = 200, 1e-4
    ones = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    params, optimizer = ones, splitting(optax.sgd(step), relaxation=LinearBlend(0.0), inertia=0.9)
    state = helpers.begin(optimizer, params)
    advance = jax.jit(partial(helpers.take_step, optimizer, ones))
    for _ in range(steps):
        params, state = advance(state, params)
    np.testing.assert_allclose(state.latent["kernel"], 1 - steps * step, rtol=2e-5)
    np.testing.assert_allclose(np.float32(params["kernel"]), 1 - steps * step, atol=2.0**-8)


# Transformations of JAX.

# An optimizer whose state is the weights that it is given.
KEEPER = optax.GradientTransformation(
    lambda params: {"kernel": cast(Any, params)["kernel"]},
    lambda updates, state, params=None: (jax.tree.map(lambda g: -0.1 * g, updates), state),
)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(stam_proximal(ETA, 1.0), id="proximal"),
        pytest.param(stam(optax.adam(ETA), hard_from=5), id="stam", marks=slow),
        pytest.param(
            stam(optax.contrib.schedule_free_adamw(ETA), hard_from=5), id="schedule_free", marks=slow
        ),
        pytest.param(stam(KEEPER, hard_from=5), id="keeper"),
        pytest.param(admm_quant(SGD, penalty=1.0, dual_every=1, hard_from=9), id="admm_quant", marks=slow),
        pytest.param(admm_quant(KEEPER, penalty=1.0, dual_every=1, hard_from=9), id="admm_quant keeper"),
        pytest.param(bop(SGD), id="bop", marks=slow),
    ],
)
def test_parameters_and_state_can_be_donated(optimizer):
    step = lambda params, state: helpers.take_step(optimizer, GRADIENTS, state, params)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = optimizer.init(params)
    donated = jax.tree.leaves((params, state))
    # The number of bytes an array begins at says whether it is another's.
    assert len({leaf.unsafe_buffer_pointer() for leaf in donated}) == len(donated)
    after = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert all(leaf.is_deleted() for leaf in donated)
    assert_equal(after, jax.jit(step)(PARAMS, optimizer.init(PARAMS)))


def test_a_scan_over_steps_is_the_loop_over_steps():
    optimizer = splitting(relaxation=SquaredDistance(lambda k: k / 5), inertia=0.9)
    step = lambda carry, _: (helpers.take_step(optimizer, GRADIENTS, carry[1], carry[0]), None)
    carry = (PARAMS, optimizer.init(PARAMS))
    scanned, _ = jax.lax.scan(step, carry, length=10)
    for _ in range(10):
        carry, _ = step(carry, None)
    assert_close(scanned, carry)


def test_the_state_can_be_planned_from_shapes_alone():
    optimizer = stam(optax.adam(ETA), hard_from=5)
    planned, state = jax.eval_shape(optimizer.init, PARAMS), optimizer.init(PARAMS)
    assert jax.tree.structure(planned) == jax.tree.structure(state)
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert shapes(planned) == shapes(state)


INFINITE = schedules.geometric(1.0, growth=1e20)
STRICT: dict[str, Any] = {
    "stam": stam(optax.adamw(ETA), hard_from=2),
    "proximal": stam_proximal(ETA, math.inf),
    "proximal-schedule": stam_proximal(
        ETA, INFINITE, regularizer=L1(0.1), regularizer_penalty=lambda k: 1.0 * k
    ),
    "no-pull": splitting(relaxation=SquaredDistance(schedules.geometric(0.0, growth=1e20)), inertia=0.5),
    "regularized": splitting(
        inertia=0.5, regularizer=GroupLasso(0.1), regularizer_strength=INFINITE, project="first"
    ),
    "few-bits": splitting(quantizer=Uniform(bits=3), relaxation=LinearBlend(0.5), inertia=0.5),
    "least-squares": splitting(quantizer=LeastSquares(group=2), inertia=0.5),
    "binary_connect": binary_connect(SGD),
    "binary_relax": binary_relax(SGD, growth_every=1, growth=1e20, hard_from=10),
    "prox_quant": prox_quant(SGD, threshold=INFINITE, hard_from=10),
    "parq": parq(SGD, hard_from=3, quantizer=Ternary()),
    "parq-at-once": parq(SGD, hard_from=0),
    "md_tanh": md_tanh(SGD, growth=1e20, growth_every=1, hard_from=10, quantizer=Binary()),
    "straight_through": straight_through(SGD, quantizer=Ternary()),
    "admm_quant": admm_quant(SGD, penalty=1.0, dual_every=2, hard_from=3),
    "bop": bop(SGD, quantizer=TENSOR),
}


# Most of what divides, always.
STRICTEST = ("proximal-schedule", "regularized", "few-bits", "md_tanh", "admm_quant")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in STRICTEST else slow) for name in STRICT]
)
def test_it_works_where_jax_allows_neither_nan_nor_arrays_of_different_ranks(name):
    # A column of zeros has a scale of zero.
    column = lambda values: {"kernel": jnp.asarray(np.outer(values, [1, 0]), jnp.float32)}
    optimizer, params, gradients = STRICT[name], PARAMS | column(np.arange(4)), GRADIENTS | column([0.3] * 4)
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        state = helpers.begin(optimizer, params)
        for _ in range(4):
            params, state = helpers.take_step(optimizer, gradients, state, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in params.values())


# Habits of Optax.


def test_the_numbers_of_stam_can_be_injected_and_changed_without_a_new_trace():
    injected: Any = optax.inject_hyperparams(stam)(SGD, hard_from=4, hold=0.5)
    traces = []

    @jax.jit
    def step(state, params):
        traces.append(None)
        return helpers.take_step(injected, GRADIENTS, state, params)

    params, state = PARAMS, helpers.begin(injected, PARAMS)
    expected, plain_state = PARAMS, stam(SGD, hard_from=4).init(PARAMS)
    for hard_from, hold in [(4, 0.5), (4, 0.5), (8, 2.0), (8, 0.0), (2, 1e6)]:
        state.hyperparams["hard_from"] = jnp.asarray(hard_from, state.hyperparams["hard_from"].dtype)
        state.hyperparams["hold"] = jnp.asarray(hold, jnp.float32)
        params, state = step(state, params)
        plain = stam(SGD, hard_from=hard_from, hold=hold)
        expected, plain_state = helpers.take_step(plain, GRADIENTS, plain_state, expected)
        assert_close(params, expected)
    assert len(traces) == 1
    assert_close(params["kernel"], quantize(params)["kernel"])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        pytest.param(stam_proximal, {"learning_rate": 0.1, "penalty": 2.0}, marks=slow),
        (
            stam_proximal,
            {"learning_rate": 0.1, "penalty": 2.0, "regularizer": Ridge(0.5), "regularizer_penalty": 3.0},
        ),
        pytest.param(
            stam_proximal, {"learning_rate": 0.1, "penalty": 2.0, "regularizer_penalty": 5.0}, marks=slow
        ),
        pytest.param(binary_connect, {"clip": 0.4}, marks=slow),
        (binary_relax, {"growth_every": 3, "hard_from": 10}),
        pytest.param(prox_quant, {"threshold": 0.1, "hard_from": 10}, marks=slow),
        (parq, {"hard_from": 10, "anneal_from": 1}),
        pytest.param(md_tanh, {"hard_from": 10}, marks=slow),
    ],
)
def test_the_numbers_of_the_methods_can_be_injected(method, settings):
    ours, expected = (
        helpers.take_step(optimizer, GRADIENTS, helpers.begin(optimizer, PARAMS), PARAMS)[0]
        for optimizer in (optax.inject_hyperparams(method)(**settings), method(**settings))
    )
    assert_close(ours, expected)


def by_name(path: str, leaf: jax.ShapeDtypeStruct) -> Binary | None:
    return TENSOR if path == "kernel" and leaf.ndim == 2 else None


def test_a_function_that_chooses_quantizers_is_named_as_static_to_inject_hyperparams():
    static = optax.inject_hyperparams(stam, static_args=("quantizer",))
    injected: Any = static(SGD, hard_from=3, quantizer=by_name)
    plain = stam(SGD, hard_from=3, quantizer=by_name)
    params, state = PARAMS, helpers.begin(injected, PARAMS)
    expected, plain_state = PARAMS, helpers.begin(plain, PARAMS)
    for _ in range(5):
        params, state = helpers.take_step(injected, GRADIENTS, state, params)
        expected, plain_state = helpers.take_step(plain, GRADIENTS, plain_state, expected)
    assert_close(params, expected)
    assert len(np.unique(np.abs(params["kernel"]))) == 1


@pytest.mark.parametrize("rule", [by_name, lambda *_: None, lambda *_: 1.0])
def test_a_function_that_inject_hyperparams_takes_for_a_schedule_is_an_error(rule):
    with pytest.raises((TypeError, ValueError)):
        optax.inject_hyperparams(stam)(SGD, hard_from=3, quantizer=rule).init(PARAMS)


@slow
def test_steps_that_gather_small_batches_go_outside():
    outer: Any = optax.MultiSteps(stam(SGD, hard_from=2), 2).gradient_transformation()
    plain = stam(SGD, hard_from=2)
    params, state = PARAMS, outer.init(PARAMS)
    expected, plain_state = PARAMS, plain.init(PARAMS)
    for _ in range(4):
        expected, plain_state = helpers.take_step(plain, GRADIENTS, plain_state, expected)
        for share in (0.5, 1.5):
            gradients = jax.tree.map(lambda g, share=share: share * g, GRADIENTS)
            params, state = helpers.take_step(outer, gradients, state, params)
        assert_close(params, expected)
    assert_close(params["kernel"], quantize(params)["kernel"])


def test_inside_every_small_batch_is_a_step_of_its_own():
    gathering = cast(Any, optax.MultiSteps(SGD, 3))
    optimizer = stam(gathering, hard_from=4, hold=0.0)
    params, state = PARAMS, helpers.begin(optimizer, PARAMS)
    is_hard, latents = [], [state.latent["kernel"]]
    for _ in range(7):
        params, state = helpers.take_step(optimizer, GRADIENTS, state, params)
        is_hard.append(np.allclose(params["kernel"], quantize(params)["kernel"], rtol=1e-6))
        latents.append(state.latent["kernel"])
    assert is_hard == [False] * 4 + [True] * 3
    assert state.count == 7
    moves = [bool(np.any(a != b)) for a, b in itertools.pairwise(latents)]
    assert moves == [False, False, True, False, False, True, False]


def test_a_part_of_a_tree_may_be_its_own():
    # Where leaves are another transform's, nothing need be quantized.
    parts = {"kernel": "float", "bias": "quantized"}
    optimizer = optax.partition({"quantized": stam(SGD, hard_from=1), "float": SGD}, parts)
    after, _ = helpers.take_step(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
    expected, _ = helpers.take_step(SGD, GRADIENTS, SGD.init(PARAMS), PARAMS)
    assert_equal(after, expected)
    masked = optax.masked(stam(SGD, hard_from=0), {"kernel": True, "bias": False})
    after, _ = helpers.take_step(masked, GRADIENTS, masked.init(PARAMS), PARAMS)
    np.testing.assert_allclose(after["kernel"], quantize(expected)["kernel"], rtol=1e-6)


# Unusual trees and values.


def hardened(params: Any, gradients: Any, **settings: Any) -> Any:
    """The parameters after one hard step at a step size of 1."""
    optimizer = splitting(optax.sgd(1.0), **settings)
    step = lambda params, gradients: helpers.take_step(optimizer, gradients, optimizer.init(params), params)
    return helpers.quick_jit(step)(params, gradients)[0]


def test_none_leaves_stay_none():
    params = {"kernel": PARAMS["kernel"], "bias": None}
    after = hardened(params, {"kernel": GRADIENTS["kernel"], "bias": None})
    assert after["bias"] is None
    expected = reference.project(PARAMS["kernel"] - GRADIENTS["kernel"])
    np.testing.assert_allclose(after["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, (), {"a": None}])
def test_a_tree_without_leaves_is_fine(tree):
    assert hardened(tree, tree) == tree


def test_a_bare_array_is_quantized_where_a_function_says_so():
    fixed, free = (lambda path, leaf: Binary(scale=1.0)), (lambda path, leaf: TENSOR)
    assert hardened(jnp.array(-0.5), jnp.array(0.25), quantizer=fixed) == -1.0
    assert hardened(jnp.array(-0.5), jnp.array(0.25), quantizer=free) == -0.75
    with pytest.raises(ValueError, match="nothing is quantized"):
        hardened(jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_empty_arrays_stay_empty():
    empty = {"kernel": jnp.zeros((0, 3))}
    assert hardened(empty, empty)["kernel"].shape == (0, 3)


def test_zeros_stay_zeros():
    zeros = {"kernel": jnp.zeros((2, 3))}
    np.testing.assert_array_equal(hardened(zeros, zeros)["kernel"], zeros["kernel"])


def test_a_nan_spoils_the_weights_of_its_own_scale_and_nothing_else():
    gradients = GRADIENTS | {"kernel": GRADIENTS["kernel"].at[1, 0].set(jnp.nan)}
    after = hardened(PARAMS, gradients)
    np.testing.assert_array_equal(np.isnan(after["kernel"]), [[True, False]] * 3)
    assert np.all(np.isfinite(after["bias"]))


# Errors say what is wrong and where.


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"inertia": 1.5}, ValueError, "inertia"),
        ({"inertia": -0.1}, ValueError, "inertia"),
        ({"inertia": math.nan}, ValueError, "inertia"),
        ({"inertia": "firm"}, TypeError, "inertia"),
        ({"inertia": True}, TypeError, "inertia"),
        ({"inertia": None}, TypeError, "inertia"),
        ({"inertia": jnp.ones(2)}, ValueError, "inertia"),
        ({"regularizer_step": -1}, ValueError, "regularizer_step"),
        ({"regularizer_strength": -1}, ValueError, "regularizer_strength"),
        ({"project": "middle"}, ValueError, "project"),
        ({"project": None}, ValueError, "project"),
        ({"relaxation": 3.0}, TypeError, "relaxation"),
        ({"relaxation": Hard}, TypeError, "relaxation"),
        ({"regularizer": 1e-4}, TypeError, "regularizer"),
        ({"regularizer": Box}, TypeError, "regularizer"),
        ({"quantizer": Binary}, TypeError, "quantizer"),
        ({"quantizer": "binary"}, TypeError, "quantizer"),
    ],
)
def test_wrong_arguments_are_named_at_once(settings, error, said):
    with pytest.raises(error, match=f"^three_block_splitting: {said}"):
        splitting(**settings)


SIMPLE: dict[str, Any] = {
    "stam": stam(SGD, hard_from=5),
    "stam_proximal": stam_proximal(ETA, 1.0),
    "straight_through": straight_through(SGD, clip=math.inf),
    "admm_quant": admm_quant(SGD, penalty=1.0, dual_every=1, hard_from=9),
    "bop": bop(SGD),
}
each = pytest.mark.parametrize("name", SIMPLE)


@each
@pytest.mark.parametrize(
    ("updates", "params", "said"),
    [
        pytest.param(GRADIENTS, None, "parameters are missing", id="no parameters"),
        pytest.param({"kernel": GRADIENTS["kernel"]}, PARAMS, "'bias'", id="a gradient less"),
        pytest.param(GRADIENTS | {"head": jnp.ones(1)}, PARAMS, "'head'", id="a gradient more"),
        pytest.param(GRADIENTS, PARAMS | {"head": jnp.ones(1)}, "'head'", id="a parameter more"),
        pytest.param(GRADIENTS | {"kernel": jnp.ones((2, 2))}, PARAMS, "'kernel'", id="another shape"),
        pytest.param(GRADIENTS | {"kernel": jnp.ones((1, 2))}, PARAMS, "'kernel'", id="a row"),
        pytest.param(GRADIENTS | {"kernel": jnp.ones(())}, PARAMS, "'kernel'", id="a number"),
        pytest.param(
            GRADIENTS | {"bias": jnp.ones((1,))}, PARAMS, "'bias'", id="a float leaf of another shape"
        ),
    ],
)
def test_updates_that_do_not_fit_are_named_though_they_might_broadcast(name, updates, params, said):
    optimizer = SIMPLE[name]
    with pytest.raises(ValueError, match=f"^{name}: .*{said}"):
        optimizer.update(updates, optimizer.init(PARAMS), params)


OTHERS: dict[str, tuple[Any, Any, Any, str]] = {
    # The optimizer whose state it is, with the parameters; the optimizer that is given it; what is named.
    "inertia for none": (splitting(inertia=1), PARAMS, splitting(inertia=0), "kernel"),
    "none for inertia": (splitting(inertia=0), PARAMS, splitting(inertia=1), "'kernel'"),
    "a number for a rule": (splitting(inertia=1), PARAMS, stam(SGD, hard_from=5), "relative_step is None"),
    "a rule for a number": (
        stam(SGD, hard_from=5),
        PARAMS,
        splitting(inertia=1),
        "its relative_step is Array",
    ),
    "a quantized leaf more": (
        stam(SGD, hard_from=5, quantizer={"a": Binary(), "b": Binary()}),
        {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))},
        stam(SGD, hard_from=5, quantizer={"a": Binary()}),
        "'b'",
    ),
    "a quantized leaf less": (
        stam(SGD, hard_from=5, quantizer={"a": Binary()}),
        {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))},
        stam(SGD, hard_from=5, quantizer={"a": Binary(), "b": Binary()}),
        "'b'",
    ),
    "another shape": (
        stam(SGD, hard_from=5),
        {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)},
        stam(SGD, hard_from=5),
        "'kernel'",
    ),
    "a method of another state": (bop(SGD), PARAMS, stam(SGD, hard_from=5), "SplittingState"),
    "a state of no method": (SGD, PARAMS, stam(SGD, hard_from=5), "SplittingState"),
    "the multipliers of another tree": (
        admm_quant(SGD, penalty=1.0, dual_every=1, hard_from=9),
        {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)},
        admm_quant(SGD, penalty=1.0, dual_every=1, hard_from=9),
        "'kernel'",
    ),
    "the momentum of other leaves": (
        bop(SGD, quantizer={"a": Binary()}),
        {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))},
        bop(SGD, quantizer={"b": Binary()}),
        "'(a|b)'",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_made_with_other_options_or_parameters_is_an_error(name):
    maker, params, taker, said = OTHERS[name]
    theirs = params if set(params) == {"a", "b"} else PARAMS
    gradients = jax.tree.map(jnp.ones_like, theirs)
    taker.update(gradients, taker.init(theirs), theirs)
    with pytest.raises(ValueError, match=said):
        taker.update(gradients, maker.init(params), theirs)


def test_a_state_does_for_another_quantizer_of_the_same_leaves():
    # What is quantized how is not part of a state: that is for `pack` to find out, from the weights.
    state = helpers.begin(stam(SGD, hard_from=5), PARAMS)
    assert isinstance(state, SplittingState)
    other = stam(SGD, hard_from=5, quantizer=Ternary())
    assert_equal(other.update(GRADIENTS, state, PARAMS), other.update(GRADIENTS, other.init(PARAMS), PARAMS))


def test_a_leaf_that_its_quantizer_cannot_take_is_named_in_init():
    with pytest.raises(ValueError, match="'deep/kernel'"):
        stam(SGD, hard_from=5, quantizer=Binary(axis=5)).init({"deep": {"kernel": jnp.ones((2, 2))}})


def test_a_leaf_of_integers_cannot_be_quantized():
    steps = {"steps": jnp.zeros((2, 2), jnp.int32)}
    with pytest.raises(ValueError, match=r"'steps' .*int32"):
        stam(SGD, hard_from=5, quantizer=lambda path, leaf: Binary()).init(steps)


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=re.escape("'a/kernel'")):
        stam(SGD, hard_from=5).init({"a/kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}})
