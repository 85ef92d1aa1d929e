"""The engine: equal to the maths in float64, and the properties its documentation states."""

import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stam_jax import (
    Binary,
    Box,
    Hard,
    LinearBlend,
    PiecewiseAffine,
    Ridge,
    ScaledTanh,
    SquaredDistance,
    Ternary,
    admm_quant,
    binary_connect,
    binary_relax,
    bop,
    hard_params,
    md_tanh,
    parq,
    prox_quant,
    quantized_leaves,
    select,
    stam,
    straight_through,
)
from tests import helpers, reference

ETA = 0.1
PROBLEM = reference.Problem.draw()
TENSOR = Binary(scale="tensor")
PARAMS = {"bias": jnp.array([0.1, 0.2]), "kernel": jnp.array([[0.5, -2.0], [1.0, 0.25], [-0.75, 1.5]])}
GRADIENTS = {"bias": jnp.array([1.0, -1.0]), "kernel": jnp.array([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]])}


def assert_follows(optimizer: Any, advance: reference.Advance, eta: Any = ETA, **momentum: Any) -> None:
    """Every iterate, and the float block at the end, equal the reference's to rounding."""
    history, state = helpers.train(optimizer, PROBLEM)
    kernels, biases, latents = map(np.stack, zip(*PROBLEM.train(advance, eta, **momentum), strict=True))
    np.testing.assert_allclose(history["kernel"], kernels, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(history["bias"], biases, rtol=1e-12, atol=1e-13)
    last = {name: jnp.asarray(values[-1]) for name, values in history.items()}
    latent = quantized_leaves(state, last)["kernel"].latent
    np.testing.assert_allclose(latent, latents[-1], rtol=1e-12, atol=1e-13)


# The engine equals the maths.

CONSTRAINTS = [
    pytest.param(None, None, math.inf, id="free"),
    *(
        pytest.param(*pair, tau, id=f"{name}-tau={tau}")
        for name, pair in {
            "box": (Box(0.4), reference.box(0.4)),
            "ridge": (Ridge(0.5), reference.ridge(0.5)),
        }.items()
        for tau in (0.0, 3.0, math.inf)
    ),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rho", [0.7, lambda k: 0.1 + 0.05 * k], ids=["constant", "schedule"])
@pytest.mark.parametrize(("regularizer", "prox", "tau"), CONSTRAINTS)
def test_without_inertia_a_penalty_minimises_the_three_blocks_in_turn(regularizer, prox, tau, rho):
    optimizer = stam(ETA, penalty=rho, inertia=0.0, regularizer=regularizer, regularizer_penalty=tau)
    assert_follows(optimizer, reference.proximal(ETA, rho, prox=prox, tau=tau))


MOMENTUM = [
    pytest.param({}, id="plain"),
    pytest.param({"decay": 0.9}, id="heavy-ball"),
    pytest.param({"decay": 0.9, "nesterov": True}, id="nesterov"),
]


def behind_momentum(optimizer: Any, momentum: dict[str, Any]) -> Any:
    return optax.chain(optax.trace(**momentum), optimizer) if momentum else optimizer


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("clip", [0.3, None])
@pytest.mark.parametrize("scale", [None, "tensor", "channel"])
def test_binary_connect_is_the_published_iteration(scale, clip, momentum):
    optimizer = binary_connect(ETA, clip=clip, quantizer=Binary(scale=scale))
    assert_follows(
        behind_momentum(optimizer, momentum),
        reference.binary_connect(ETA, clip=clip, scale=scale),
        **momentum,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
def test_binary_relax_is_the_published_iteration(momentum):
    optimizer = binary_relax(ETA, growth_every=7, hard_from=35, strength=0.5)
    advance = reference.binary_relax(ETA, growth_every=7, hard_from=35, strength=0.5, growth=1.04)
    assert_follows(behind_momentum(optimizer, momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("clip", [1.0, None])
def test_prox_quant_is_the_published_iteration(momentum, clip):
    optimizer = prox_quant(ETA, growth=0.02, hard_from=40, clip=clip)
    advance = reference.prox_quant(ETA, growth=0.02, hard_from=40, clip=clip)
    assert_follows(behind_momentum(optimizer, momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize(
    "settings", [{"hard_from": 40}, {"hard_from": 45, "anneal_from": 10, "steepness": 3.0}]
)
def test_parq_is_the_published_iteration(momentum, settings):
    advance = reference.parq(ETA, **settings)
    assert_follows(behind_momentum(parq(ETA, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
def test_md_tanh_is_the_published_iteration(momentum):
    settings = {"growth": 1.1, "growth_every": 3, "hard_from": 45}
    advance = reference.md_tanh(ETA, **settings)
    assert_follows(behind_momentum(md_tanh(ETA, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("clip", [0.5, None])
def test_the_straight_through_estimator_gates_gradients_before_momentum(momentum, clip):
    inner = optax.trace(**momentum) if momentum else None
    advance = reference.binary_connect(ETA, clip=None)
    gate = math.inf if clip is None else clip
    assert_follows(straight_through(ETA, inner=inner, clip=clip), advance, gate=gate, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("dual_every", [1, 4])
def test_admm_is_its_three_blocks(momentum, dual_every):
    settings = {"penalty": 1.5, "dual_every": dual_every, "hard_from": 42}
    advance = reference.Admm(ETA, **settings)
    assert_follows(behind_momentum(admm_quant(ETA, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("adaptivity", [0.1, lambda k: 0.2 / (1 + k)], ids=["constant", "schedule"])
def test_bop_is_the_published_iteration(momentum, adaptivity):
    settings = {"adaptivity": adaptivity, "threshold": 0.01}
    advance = reference.Bop(**settings)
    assert_follows(behind_momentum(bop(ETA, **settings), momentum), advance, **momentum)


def test_the_flips_of_bop_keep_the_scales_of_the_start():
    optimizer = bop(ETA, adaptivity=0.5, threshold=0.0, quantizer=Binary())
    params, state = PARAMS, optimizer.init(PARAMS)
    sizes = np.abs(np.asarray(Binary().project(PARAMS["kernel"])))
    signs = []
    for sign in [1.0, -1.0] * 10:
        gradients = jax.tree.map(lambda g, sign=sign: sign * g, GRADIENTS)
        params, state = helpers.take_step(optimizer, gradients, state, params)
        np.testing.assert_array_equal(np.abs(params["kernel"]), sizes)
        signs.append(np.sign(params["kernel"]))
    assert np.any(signs[0] != signs[1])


@pytest.mark.parametrize("growth_every", [1, 7, 41, 55, 390])
def test_binary_relax_grows_at_every_multiple_of_its_interval_and_never_late(growth_every):
    # Boundaries are where rounding shows: a step count times a rounded reciprocal may fall short of them.
    counts = sorted({n * growth_every + offset for n in range(1, 8) for offset in (-1, 0)})
    optimizer = binary_relax(0.0, growth_every=growth_every, hard_from=10**6, growth=2.0, quantizer=TENSOR)
    strengths = np.array([2.0 ** (count // growth_every) for count in counts])
    # The projection of (1, 3) is (2, 2).
    relaxed = helpers.relaxed_at(optimizer, jnp.array([[1.0, 3.0]]), counts)
    np.testing.assert_allclose(relaxed[:, 0, 0], (1 + 2 * strengths) / (1 + strengths), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"growth": 2}, 2.0),
        ({"growth": 2, "strength": 3}, 2.0),
        ({"growth": 2.0, "strength": 1e-3}, 2.0),
        ({"growth": 2.0, "strength": 0}, 1.0),
        ({"growth": 2.0, "strength": 0.0}, 1.0),
    ],
)
def test_binary_relax_has_no_strength_too_large_to_count(settings, expected):
    optimizer = binary_relax(0.0, growth_every=1, hard_from=10**6, quantizer=TENSOR, **settings)
    # Past the whole numbers of 32 bits, and past the end of float32.
    relaxed = helpers.relaxed_at(optimizer, jnp.array([[1.0, 3.0]]), [31, 32, 40, 126, 127, 128, 150, 5000])
    np.testing.assert_allclose(relaxed[:, 0, 0], expected, rtol=1e-5)


RELAXATIONS = {
    "squared": (SquaredDistance(2.0), reference.squared_distance(2.0)),
    "squared-schedule": (
        SquaredDistance(lambda k: 0.1 * (k + 1.0)),
        reference.squared_distance(lambda k: 0.1 * (k + 1.0)),
    ),
    "blend-schedule": (LinearBlend(lambda k: k / 50.0), reference.linear_blend(lambda k: k / 50.0)),
    "hard": (Hard(), reference.squared_distance(math.inf)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("relaxation", ["squared", "squared-schedule", "hard"])
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("kappa", [0, 0.3, 0.99, 1])
def test_the_engine_is_its_formula(kappa, order, relaxation):
    relax, expected = RELAXATIONS[relaxation]
    optimizer = stam(ETA, relaxation=relax, inertia=kappa, project=order)
    assert_follows(optimizer, reference.general(ETA, relax=expected, kappa=kappa, order=order))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize(("regularizer", "prox", "tau"), CONSTRAINTS[1:])
def test_the_engine_is_its_formula_with_a_regularizer(regularizer, prox, tau, order):
    relax, expected = RELAXATIONS["squared"]
    optimizer = stam(
        ETA,
        relaxation=relax,
        inertia=0.3,
        project=order,
        regularizer=regularizer,
        regularizer_penalty=tau,
        quantizer=TENSOR,
    )
    advance = reference.general(
        ETA, relax=expected, kappa=0.3, order=order, prox=prox, tau=tau, scale="tensor"
    )
    assert_follows(optimizer, advance)


@pytest.mark.usefixtures("x64")
def test_every_schedule_is_read_at_the_count_of_the_step_that_ends():
    eta, kappa, tau = (lambda k: 0.1 / (k + 1.0)), (lambda k: 1 - 0.02 * k), (lambda k: 0.1 * k)
    strength = lambda k: 0.3 * k
    optimizer = stam(
        eta,
        relaxation=SquaredDistance(strength),
        inertia=kappa,
        regularizer=Ridge(0.5),
        regularizer_penalty=tau,
        project="first",
    )
    relax = reference.squared_distance(strength)
    advance = reference.general(
        eta, relax=relax, kappa=kappa, order="first", prox=reference.ridge(0.5), tau=tau
    )
    assert_follows(optimizer, advance, eta)


@pytest.mark.usefixtures("x64")
def test_an_inertia_of_zero_that_is_traced_gives_what_the_number_gives():
    traced, _ = helpers.train(stam(ETA, penalty=0.7, inertia=jnp.zeros([])), PROBLEM)
    known, _ = helpers.train(stam(ETA, penalty=0.7, inertia=0.0), PROBLEM)
    np.testing.assert_allclose(traced["kernel"], known["kernel"], rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_a_penalty_is_the_strength_that_the_step_size_and_tau_make_of_it():
    regularized = partial(
        stam, ETA, regularizer=Ridge(0.5), regularizer_penalty=4.0, inertia=0.5, project="last"
    )
    by_penalty, _ = helpers.train(regularized(penalty=2.0), PROBLEM)
    by_strength, _ = helpers.train(
        regularized(relaxation=SquaredDistance(ETA * 2.0 / (1 + ETA * 4.0))), PROBLEM
    )
    np.testing.assert_allclose(by_penalty["kernel"], by_strength["kernel"], rtol=1e-12)


def test_the_default_strength_grows_by_a_hundredth_each_step_until_the_network_is_hard():
    counts = [0, 100, 700, 3000, *range(8000, 10_000, 50), 10**6]
    # The projection of (1, 3) is (2, 2). With lam = 1.01^k - 1 the share of the float weights is 1.01^-k.
    shares = np.exp(-np.array(counts) * math.log(1.01))
    relaxed = helpers.relaxed_at(stam(0.0, quantizer=TENSOR), jnp.array([[1.0, 3.0]]), counts)
    np.testing.assert_allclose(relaxed[:, 0, 0], 2 - shares, rtol=1e-4)


# What the documentation states of it.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rho", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("tau", [0.0, 5.0])
def test_no_penalty_limits_the_step(rho, tau):
    exact = reference.Problem.draw(noise=0.0, steps=60)
    strength = 0.5
    optimizer = stam(
        1 / exact.smoothness(),
        penalty=rho,
        inertia=0.0,
        regularizer=Ridge(strength),
        regularizer_penalty=tau,
    )
    history, _ = helpers.train(optimizer, exact)

    def objective(x: np.ndarray, bias: np.ndarray) -> float:
        """Phi at the exact minimisers y and z for this x."""
        y = reference.project(x)
        z = x * tau / (tau + strength)
        coupling = rho / 2 * np.sum((x - y) ** 2) + tau / 2 * np.sum((x - z) ** 2)
        return exact.loss(x, bias) + strength / 2 * np.sum(z**2) + coupling

    steps = zip(history["kernel"], history["bias"], strict=True)
    values = [objective(exact.kernel, exact.bias), *itertools.starmap(objective, steps)]
    assert np.all(np.diff(values) <= 1e-12 * values[0])
    assert values[-1] < values[0] - 1e-3


def test_projecting_first_keeps_the_noise_of_a_step_out_of_the_projection():
    def signs(project: Any, noise: float) -> Any:
        optimizer = stam(1.0, relaxation=Hard(), project=project)
        gradients = jax.tree.map(lambda g: noise * g, GRADIENTS)
        return helpers.take_step(optimizer, gradients, optimizer.init(PARAMS), PARAMS)[0]["kernel"]

    np.testing.assert_array_equal(signs("first", 1.0), signs("first", -9.0))
    assert np.any(signs("last", 1.0) != signs("last", -9.0))


@pytest.mark.parametrize("inertia", [0, 0.0, np.float64(0.0)])
def test_a_counter_is_the_whole_state_without_inertia(inertia):
    optimizer = stam(ETA, penalty=1.0, inertia=inertia)
    state = helpers.begin(optimizer, PARAMS)
    for _ in range(3):
        (count,) = jax.tree.leaves(state)
        assert (count.shape, count.dtype) == ((), jnp.int32)
        _, state = helpers.take_step(optimizer, GRADIENTS, state, PARAMS)
    assert state.count == 3


def test_the_latent_block_is_the_one_copy_that_inertia_takes():
    assert len(jax.tree.leaves(stam(ETA).init(PARAMS))) == 2


def test_leaves_that_are_not_quantised_take_the_plain_step():
    optimizer = stam(ETA, penalty=1e3, regularizer=Ridge(1.0))
    after, _ = helpers.take_step(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(after["bias"], PARAMS["bias"] - jnp.float32(ETA) * GRADIENTS["bias"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "hard", [{"relaxation": Hard()}, {"penalty": math.inf}, {"relaxation": LinearBlend(1.0)}]
)
def test_a_hard_network_differs_from_its_projection_by_the_rounding_of_the_update_alone(hard, dtype):
    optimizer = stam(ETA, project="last", **hard)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    old, state = params, optimizer.init(params)
    for _ in range(5):
        old, (params, state) = params, helpers.take_step(optimizer, GRADIENTS, state, params)
    x, y = (np.float64(tree["kernel"]) for tree in (params, hard_params(state, params)))
    # The update rounds once, and its sum with the old weight once more.
    ulp = float(jnp.finfo(dtype).eps)
    bound = ulp * (np.abs(y - np.float64(old["kernel"])) + np.abs(y))
    assert np.all(np.abs(x - y) <= bound)


@pytest.mark.parametrize("penalty", [math.inf, lambda k: jnp.where(k < 0, 1.0, jnp.inf)])
def test_an_infinite_penalty_is_hard_even_at_a_step_size_of_zero(penalty):
    optimizer = stam(0.0, penalty=penalty, inertia=0.0)
    params, _ = helpers.take_step(optimizer, GRADIENTS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(params["kernel"], Binary().project(PARAMS["kernel"]), rtol=1e-6)


def test_no_schedule_makes_jit_trace_again():
    moving = lambda low, high: optax.linear_schedule(low, high, 10)
    regularized = {"regularizer": Ridge(0.1), "regularizer_penalty": moving(1.0, 5.0)}
    optimizers = (
        stam(moving(0.1, 0.0), penalty=moving(0.0, 9.0), inertia=moving(1.0, 0.0), **regularized),
        stam(moving(0.1, 0.0), relaxation=SquaredDistance(moving(0.0, 9.0))),
        stam(moving(0.1, 0.0), relaxation=LinearBlend(moving(0.0, 1.0))),
    )
    for optimizer in optimizers:
        traces = []

        @jax.jit
        def step(state, params, optimizer=optimizer, traces=traces):
            traces.append(None)
            return helpers.take_step(optimizer, GRADIENTS, state, params)

        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(12):
            params, state = step(state, params)
        assert len(traces) == 1


# Number formats.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("inertia", [0.0, lambda k: 1.0 / (k + 1.0)], ids=["proximal", "inertial"])
def test_parameters_keep_their_dtype_and_the_float_block_has_32_bits_at_least(dtype, inertia):
    # Schedules come out in float64 here: nothing of that may reach the parameters.
    schedule = lambda k: jnp.asarray(0.1, jnp.float64) / (k + 1)
    optimizer = stam(
        schedule,
        penalty=schedule,
        inertia=inertia,
        regularizer=Ridge(0.1),
        regularizer_penalty=schedule,
    )
    params, gradients = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (PARAMS, GRADIENTS))
    state = helpers.begin(optimizer, params)
    for _ in range(2):
        updates, _ = optimizer.update(gradients, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        _, state = helpers.take_step(optimizer, gradients, state, params)
        floats = {leaf.dtype for leaf in jax.tree.leaves(state.latent)}
        assert floats == (set() if inertia == 0.0 else {jnp.promote_types(dtype, jnp.float32)})


def test_updates_far_below_an_ulp_of_bfloat16_add_up():
    steps, step = 200, 1e-4
    params = jnp.ones((4, 4), jnp.bfloat16)
    optimizer = stam(step, relaxation=LinearBlend(0.0))
    state = helpers.begin(optimizer, params)
    advance = jax.jit(partial(helpers.take_step, optimizer, jnp.ones((4, 4), jnp.bfloat16)))
    for _ in range(steps):
        params, state = advance(state, params)
    latent = quantized_leaves(state, params)[""].latent
    np.testing.assert_allclose(latent, 1 - steps * step, rtol=1e-5)
    np.testing.assert_allclose(np.float32(params), 1 - steps * step, atol=2.0**-8)


# Transformations of JAX.


@pytest.mark.parametrize("inertia", [0.0, 1.0])
def test_parameters_and_state_can_be_donated(inertia):
    optimizer = stam(ETA, penalty=1.0, inertia=inertia)
    step = lambda params, state: helpers.take_step(optimizer, GRADIENTS, state, params)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = optimizer.init(params)
    donated = jax.tree.leaves((params, state))
    after = jax.jit(step, donate_argnums=(0, 1))(params, state)
    assert all(leaf.is_deleted() for leaf in donated)
    expected = jax.jit(step)(PARAMS, optimizer.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_seeds_under_vmap_are_the_loop_over_seeds():
    optimizer = stam(ETA, relaxation=SquaredDistance(1.0))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)), jnp.float32)

    def run(weights: jax.Array) -> Any:
        params = {"kernel": weights}
        state = optimizer.init(params)
        for _ in range(3):
            gradients = jax.tree.map(jnp.sin, params)
            params, state = helpers.take_step(optimizer, gradients, state, params)
        return params, state, hard_params(state, params)

    together = jax.vmap(run)(weights)
    for i, seed in enumerate(weights):
        each = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), each, run(seed))


def test_a_scan_over_steps_is_the_loop_over_steps():
    optimizer = stam(ETA, relaxation=SquaredDistance(lambda k: k / 5))
    step = lambda carry, _: (helpers.take_step(optimizer, GRADIENTS, carry[1], carry[0]), None)
    carry = (PARAMS, optimizer.init(PARAMS))
    scanned, _ = jax.lax.scan(step, carry, length=10)
    for _ in range(10):
        carry, _ = step(carry, None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), scanned, carry)


def test_the_state_can_be_planned_from_shapes_alone():
    optimizer = stam(ETA)
    planned = jax.eval_shape(optimizer.init, PARAMS)
    state = optimizer.init(PARAMS)
    assert jax.tree.structure(planned) == jax.tree.structure(state)
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert shapes(planned) == shapes(state)


def test_a_state_tells_its_quantizers_from_others():
    of = lambda quantizer: helpers.begin(stam(ETA, quantizer=quantizer), PARAMS)
    structures = [jax.tree.structure(of(kind)) for kind in (Binary(), Binary(scale="channel"), TENSOR)]
    assert structures[0] == structures[1] != structures[2]
    assert len(set(structures)) == 2
    records = [of(kind).quantizers["kernel"] for kind in (Binary(), Binary(scale="channel"), TENSOR)]
    assert len(set(records)) == 2
    assert repr(TENSOR) in repr(of(TENSOR))


# Unusual trees and values.


def quantise(params: Any, gradients: Any, **settings: Any) -> Any:
    """The parameters after one hard step at a step size of 1."""
    optimizer = stam(1.0, **({"relaxation": Hard(), "project": "last"} | settings))
    return helpers.take_step(optimizer, gradients, optimizer.init(params), params)[0]


def test_none_leaves_stay_none():
    params = {"kernel": PARAMS["kernel"], "bias": None}
    after = quantise(params, {"kernel": GRADIENTS["kernel"], "bias": None})
    assert after["bias"] is None
    expected = Binary().project(PARAMS["kernel"] - GRADIENTS["kernel"])
    np.testing.assert_allclose(after["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, (), {"a": None}])
def test_a_tree_without_leaves_is_fine(tree):
    assert quantise(tree, tree) == tree


@pytest.mark.parametrize("mask", [True, lambda _: True])
def test_a_bare_scalar_is_quantised_by_a_scale_per_tensor(mask):
    after = quantise(jnp.array(-0.5), jnp.array(0.25), quantizer=Binary(scale=None), mask=mask)
    assert after == -1.0
    after = quantise(jnp.array(-0.5), jnp.array(0.25), quantizer=TENSOR, mask=mask)
    assert after == -0.75


def test_empty_arrays_stay_empty():
    empty = {"kernel": jnp.zeros((0, 3))}
    assert quantise(empty, empty)["kernel"].shape == (0, 3)


def test_zeros_stay_zeros():
    zeros = {"kernel": jnp.zeros((2, 3))}
    np.testing.assert_array_equal(quantise(zeros, zeros)["kernel"], zeros["kernel"])


def test_a_nan_spoils_its_own_scale_group_and_nothing_else():
    gradients = GRADIENTS | {"kernel": GRADIENTS["kernel"].at[1, 0].set(jnp.nan)}
    after = quantise(PARAMS, gradients)
    np.testing.assert_array_equal(np.isnan(after["kernel"]), [[True, False]] * 3)
    assert np.all(np.isfinite(after["bias"]))


def test_extra_arguments_of_other_transforms_pass_by():
    optimizer = stam(ETA)
    state = optimizer.init(PARAMS)
    plain = optimizer.update(GRADIENTS, state, PARAMS)
    given = optimizer.update(GRADIENTS, state, PARAMS, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, given, plain)


# Masks.


@pytest.mark.parametrize(
    "mask",
    [
        {"a": {"kernel": True, "bias": False}, "b": {"kernel": False}},
        {"a": {"kernel": np.True_, "bias": jnp.array(False)}, "b": False},
        lambda params: {"a": {"kernel": True, "bias": False}, "b": False},
        lambda params: select(params, exclude="b/*"),
    ],
    ids=["tree", "prefix", "function", "function-to-selection"],
)
def test_masks_of_every_kind_say_the_same(mask):
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones((2, 2))}}
    assert list(quantized_leaves(stam(ETA, mask=mask).init(params), params)) == ["a/kernel"]
    assert list(quantized_leaves(stam(ETA, mask=select(params, exclude="b/*")).init(params), params)) == [
        "a/kernel"
    ]


@pytest.mark.parametrize("mask", [True, {"kernel": True, "bias": True}])
def test_a_mask_overrules_the_default_selection(mask):
    state = stam(ETA, quantizer=TENSOR, mask=mask).init(PARAMS)
    assert list(quantized_leaves(state, PARAMS)) == ["bias", "kernel"]


# Errors say what is wrong and where.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"learning_rate": -0.1}, ValueError, r"stam: learning_rate .*\[0, inf\).*-0\.1"),
        ({"learning_rate": math.inf}, ValueError, r"stam: learning_rate .*\[0, inf\).*inf"),
        ({"learning_rate": math.nan}, ValueError, r"stam: learning_rate .*nan"),
        ({"learning_rate": "fast"}, TypeError, r"stam: learning_rate must be a number.*'fast'"),
        ({"learning_rate": True}, TypeError, r"stam: learning_rate must be a number.*True"),
        ({"learning_rate": None}, TypeError, r"stam: learning_rate must be a number.*None"),
        ({"learning_rate": jnp.ones(2)}, ValueError, r"stam: learning_rate .*array of shape \(2,\)"),
        ({"learning_rate": np.float32(-1)}, ValueError, r"stam: learning_rate .*-1"),
        ({"inertia": 1.5}, ValueError, r"stam: inertia .*\[0, 1\].*1\.5"),
        ({"inertia": -0.1}, ValueError, r"stam: inertia .*\[0, 1\].*-0\.1"),
        ({"penalty": -1}, ValueError, r"stam: penalty .*\[0, inf\].*-1"),
        ({"penalty": "strong"}, TypeError, r"stam: penalty must be a number.*'strong'"),
        ({"regularizer": Box(), "regularizer_penalty": -1}, ValueError, r"stam: regularizer_penalty .*-1"),
        ({"penalty": 1.0, "relaxation": Hard()}, ValueError, r"penalty .* or relaxation, not both"),
        ({"regularizer_penalty": 2.0}, ValueError, r"regularizer_penalty needs a regularizer"),
        ({"regularizer_penalty": lambda k: 2.0}, ValueError, r"regularizer_penalty needs a regularizer"),
        ({"project": "middle"}, ValueError, r"project must be 'first', 'last' or None; got 'middle'"),
        ({"quantizer": Binary}, TypeError, r"quantizer must be an object with bits, project, contains"),
        ({"quantizer": "binary"}, TypeError, r"quantizer must be an object with .*'binary'"),
        ({"relaxation": 3.0}, TypeError, r"relaxation must be an object with at; got 3\.0"),
        ({"regularizer": 1e-4}, TypeError, r"regularizer must be an object with prox; got 0\.0001"),
    ],
)
def test_wrong_arguments_are_named_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        stam(**({"learning_rate": ETA} | settings))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (
            binary_relax,
            {"growth_every": 0, "hard_from": 1},
            r"growth_every must be a number in .1, inf.; got 0",
        ),
        (
            binary_relax,
            {"growth_every": 1, "hard_from": -1},
            r"hard_from must be a number in .0, inf.; got -1",
        ),
        (binary_relax, {"growth_every": 1, "hard_from": 1, "growth": 0.5}, r"binary_relax: growth .*0\.5"),
        (binary_relax, {"growth_every": 1, "hard_from": 1, "strength": -1.0}, r"binary_relax: strength .*-1"),
        (binary_connect, {"clip": -1.0}, r"Box: limit .*-1"),
        (prox_quant, {"growth": -1.0, "hard_from": 1}, r"prox_quant: growth .*-1"),
        (parq, {"hard_from": 5, "anneal_from": 5}, r"start must be below hard_from; got 5 and 5"),
        (parq, {"hard_from": 5, "steepness": 0.0}, r"parq: steepness must be .* in .0.001, inf.; got 0"),
        (md_tanh, {"hard_from": 5, "growth": 0.5}, r"md_tanh: growth .*0\.5"),
        (md_tanh, {"hard_from": -5}, r"md_tanh: hard_from .*-5"),
        (straight_through, {"clip": -1.0}, r"straight_through: clip .*-1"),
        (admm_quant, {"penalty": 1.0, "dual_every": 0, "hard_from": 1}, r"admm_quant: dual_every .* got 0"),
        (admm_quant, {"penalty": -1.0, "dual_every": 1, "hard_from": 1}, r"admm_quant: penalty .*-1"),
        (bop, {"adaptivity": 1.5}, r"bop: adaptivity .*\[0, 1\].*1\.5"),
        (bop, {"threshold": -1.0}, r"bop: threshold .*-1"),
        (bop, {"quantizer": Ternary()}, r"bop: quantizer must be one of binary weights; got Ternary"),
    ],
)
def test_wrong_arguments_of_the_methods_are_named_at_once(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(ETA, **settings)


@pytest.mark.parametrize("method", [partial(admm_quant, penalty=1.0, dual_every=1, hard_from=1), bop])
def test_the_quantizer_is_an_object_and_not_its_class(method):
    with pytest.raises(TypeError, match=r"quantizer must be an object with bits, project, contains"):
        method(ETA, quantizer=Binary)


def test_what_makes_the_direction_of_a_straight_through_gradient_is_a_transform():
    with pytest.raises(
        TypeError, match=r"straight_through: inner must be an object with init, update; got 0\.9"
    ):
        straight_through(ETA, inner=0.9)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("relaxation", [PiecewiseAffine(0.5), ScaledTanh(2.0)])
def test_a_relaxation_that_asks_for_levels_needs_a_quantizer_that_has_them(relaxation):
    class Rounded:
        bits = 8

        def project(self, v: jax.Array) -> jax.Array:
            return jnp.round(v)

        def contains(self, y: jax.Array) -> jax.Array:
            return jnp.all(y == jnp.round(y))

    optimizer = stam(ETA, quantizer=Rounded(), relaxation=relaxation)
    with pytest.raises(
        ValueError, match=r"leaf 'kernel' .* asks for the levels .*Rounded.* no method levels"
    ):
        optimizer.init(PARAMS)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"kernel": True}, ValueError, r"mask says nothing of the leaf 'bias'"),
        (
            {"kernel": True, "bias": False, "head": True},
            ValueError,
            r"mask speaks of 'head', which the parameters do not hold; they hold bias, kernel",
        ),
        (
            {"kernel": {"deeper": True}, "bias": False},
            ValueError,
            r"mask (speaks|says nothing) of .*'kernel",
        ),
        ({"kernel": 1, "bias": False}, TypeError, r"mask holds 1 at 'kernel'; it must be a boolean"),
        ({"kernel": jnp.array([True]), "bias": False}, TypeError, r"mask holds .* at 'kernel'"),
        ({"kernel": True, "bias": True}, ValueError, r"leaf 'bias' cannot be quantised: .*rank 2 or more"),
        (lambda params: 1.0, TypeError, r"mask holds 1\.0 at ''"),
    ],
)
def test_wrong_masks_are_named_with_the_leaf(mask, error, message):
    with pytest.raises(error, match=message):
        stam(ETA, mask=mask).init(PARAMS)


def test_a_leaf_of_integers_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"mask chooses 'steps', of dtype int32"):
        stam(ETA, mask=True).init({"steps": jnp.zeros((2, 2), jnp.int32)})


@pytest.mark.parametrize("tree", [{"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}])
def test_two_leaves_of_one_name_are_refused(tree):
    with pytest.raises(ValueError, match=r"Two leaves .* name 'a/b'"):
        stam(ETA).init(tree)


@pytest.mark.parametrize(
    ("updates", "params", "message"),
    [
        (GRADIENTS, None, r"update needs the parameters"),
        ({"kernel": GRADIENTS["kernel"]}, PARAMS, r"updates do not match .*missing \['bias'\]"),
        (GRADIENTS, PARAMS | {"head": jnp.ones(1)}, r"params do not match .*unexpected \['head'\]"),
        (
            GRADIENTS | {"kernel": jnp.ones((2, 2))},
            PARAMS,
            r"update of 'kernel' has shape \(2, 2\), the parameter \(3, 2\)",
        ),
    ],
)
def test_updates_that_do_not_fit_are_named(updates, params, message):
    optimizer = stam(ETA)
    with pytest.raises(ValueError, match=message):
        optimizer.update(updates, optimizer.init(PARAMS), params)


def test_a_penalty_without_a_regularizer_is_not_damped_by_an_injected_tau():
    x, d = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.full((2, 2), 0.5)}
    injected = optax.inject_hyperparams(stam)(
        0.1, penalty=2.0, inertia=0.0, regularizer_penalty=5.0, quantizer=Binary()
    )
    plain = stam(0.1, penalty=2.0, inertia=0.0)
    ours, expected = (
        helpers.take_step(optimizer, d, helpers.begin(optimizer, x), x)[0] for optimizer in (injected, plain)
    )
    np.testing.assert_allclose(ours["kernel"], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.float64(0)])
def test_any_plain_zero_saves_the_copy(zero):
    assert helpers.begin(stam(0.1, penalty=1.0, inertia=zero), {"kernel": jnp.ones((2, 2))}).latent is None


def test_a_selection_of_another_tree_is_refused():
    params = {"kernel": jnp.ones((2, 2))}
    mistaken = optax.inject_hyperparams(stam)(0.1, mask=lambda params: select(params))
    with pytest.raises(ValueError, match=r"static_args=\('mask',\)"):
        mistaken.init(params)
    with pytest.raises(ValueError, match="mask says nothing of the leaf 'kernel'"):
        stam(0.1, mask=select({"other": jnp.ones((2, 2))})).init(params)


WHOLE = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}


BY_LEAVES = {"a": {"kernel": True}, "b": {"kernel": False, "bias": False}}
BY_PREFIX = {"a": True, "b": False}


@pytest.mark.parametrize(
    ("mask", "part"),
    [
        (select(WHOLE), BY_LEAVES),
        (select(WHOLE), BY_PREFIX),
        (select(WHOLE).mask, BY_LEAVES),
        (select(WHOLE).mask, BY_PREFIX),
        # Rules are about leaves: they need the names of those that are masked away.
        (lambda params: select(params, exclude="b/*"), BY_LEAVES),
    ],
)
def test_a_mask_of_the_whole_tree_serves_a_part_of_it(mask, part):
    optimizer = optax.masked(stam(ETA, mask=mask), part)
    assert list(quantized_leaves(optimizer.init(WHOLE), WHOLE)) == ["a/kernel"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("falls", [0.0, 1.0])
def test_by_default_float_weights_decay_towards_the_relaxed_ones(falls):
    relax, expected = RELAXATIONS["blend-schedule"]
    eta = lambda k: 0.1 / (1.0 + falls * k)
    advance = reference.general(eta, relax=expected, kappa=lambda k: 1 / (1 + 0.01 * eta(k)), order="last")
    assert_follows(stam(eta if falls else 0.1, relaxation=relax), advance, eta)


@pytest.mark.parametrize("eta", [0.5, 0.05])
def test_by_default_a_sign_turns_where_the_direction_outweighs_a_hundredth_of_its_scale_at_any_step_size(eta):
    # Without a scale alpha is 1.
    params = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
    direction = 0.01 * jnp.array([[0.8, 1.25], [0.0, 0.0]])
    optimizer = stam(eta, relaxation=Hard(), quantizer=Binary(scale=None))
    step = lambda carry, _: (helpers.take_step(optimizer, direction, carry[1], carry[0]), None)
    (params, state), _ = jax.lax.scan(
        step, (params, helpers.begin(optimizer, params)), length=round(400 / eta)
    )
    np.testing.assert_array_equal(jnp.sign(hard_params(state, params)), [[1, -1], [-1, -1]])


def test_a_penalty_makes_the_proximal_method():
    # At inertia 1 a penalty would not pull the weights at all, and fade with the step size.
    state = helpers.begin(stam(0.1, penalty=1.0), {"kernel": jnp.ones((2, 2))})
    assert state.latent is None


def test_without_inertia_something_must_pull():
    with pytest.raises(ValueError, match=r"without inertia, give a penalty .* or a relaxation"):
        stam(0.1, inertia=0.0)


def test_the_default_does_not_move_pretrained_weights_at_its_first_step():
    x = {"kernel": jnp.array([[1.0, 3.0], [-0.1, 2.0]])}
    optimizer = stam(0.1)
    moved, _ = helpers.take_step(optimizer, {"kernel": jnp.zeros((2, 2))}, optimizer.init(x), x)
    np.testing.assert_array_equal(moved["kernel"], x["kernel"])


def test_in_a_hard_phase_the_network_trained_is_the_one_that_ships():
    x = {"kernel": jnp.array([[1.0, 3.0], [-0.1, 2.0]])}
    optimizer = stam(0.1, relaxation=Hard())
    x, state = helpers.take_step(optimizer, {"kernel": jnp.full((2, 2), -2.0)}, optimizer.init(x), x)
    np.testing.assert_allclose(x["kernel"], hard_params(state, x)["kernel"], rtol=1e-6)


def test_the_numbers_of_binary_relax_can_be_injected():
    x = {"kernel": jnp.array([[1.0, 3.0]])}
    injected = optax.inject_hyperparams(binary_relax)(0.1, growth_every=3, hard_from=10)
    plain = binary_relax(0.1, growth_every=3, hard_from=10)
    ours, expected = (
        helpers.take_step(optimizer, {"kernel": jnp.ones((1, 2))}, helpers.begin(optimizer, x), x)[0]
        for optimizer in (injected, plain)
    )
    np.testing.assert_allclose(ours["kernel"], expected["kernel"], rtol=1e-6)
