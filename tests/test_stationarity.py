"""Residual, objective and flip work against NumPy, from their definitions; and the optimizer that records."""

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
    admm_quant,
    binary_connect,
    diagnostics,
    prox_quant,
    quantize,
    stam,
    stam_proximal,
    three_block_splitting,
)
from stam_jax.regularizers import L1, Box, GroupLasso, Ridge
from stam_jax.relaxations import LinearBlend, SquaredDistance
from tests import helpers, reference
from tests.helpers import quick_jit

pytestmark = pytest.mark.usefixtures("x64")

PROBLEM = reference.Problem.draw()
START = {"kernel": PROBLEM.kernel, "bias": PROBLEM.bias}
ETA, RHO = 0.05, 3.0
LOSS = lambda params: jnp.sum(params["kernel"])

# h as it is written down, and its prox, in NumPy.
REGULARIZERS = {
    "none": (None, lambda z: 0.0, lambda v, step: v),
    "box": (
        Box(0.4),
        lambda z: 0.0 if np.all(np.abs(z) <= 0.4) else math.inf,
        lambda v, step: np.minimum(np.maximum(v, -0.4), 0.4),
    ),
    "ridge": (Ridge(2.0), lambda z: np.sum(z**2), lambda v, step: v / (1 + 2 * step)),
    "l1": (
        L1(0.3),
        lambda z: 0.3 * np.sum(np.abs(z)),
        lambda v, step: np.sign(v) * np.maximum(np.abs(v) - 0.3 * step, 0),
    ),
    "group lasso": (
        GroupLasso(0.3),
        lambda z: 0.3 * sum(np.linalg.norm(z[:, c]) for c in range(z.shape[1])),
        lambda v, step: np.stack([shortened(v[:, c], 0.3 * step) for c in range(v.shape[1])], axis=1),
    ),
}


def shortened(v, by):
    length = np.linalg.norm(v)
    return v * max(length - by, 0) / length


def numpy_terms(kernel, regularizer, tau):
    """The pulls toward y and z, and the terms of Phi beyond the loss; the kernel is its own v."""
    _, h, prox = REGULARIZERS[regularizer]
    y = reference.project(kernel)
    z = prox(kernel, 1 / tau)
    pull, bounded = RHO * (kernel - y), tau * (kernel - z)
    return pull, bounded, RHO / 2 * np.sum((kernel - y) ** 2), h(z) + tau / 2 * np.sum((kernel - z) ** 2)


def a_few_steps(optimizer: optax.GradientTransformation, steps: int = 3) -> tuple[Any, Any]:
    gradient = jax.grad(lambda params: helpers.loss(PROBLEM, params))

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        return helpers.take_step(optimizer, gradient(params), state, params)

    run = lambda params: jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
    params, state = quick_jit(run)(helpers.start(PROBLEM))
    return state, params


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_the_residual_and_the_objective_are_those_of_the_model(regularizer):
    tau, h = 1.5, REGULARIZERS[regularizer][0]
    model: Any = {"penalty": RHO, "regularizer": h, "regularizer_penalty": tau if h else 0.0}
    state, params = a_few_steps(stam_proximal(ETA, **model))
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    kernel_gradient, bias_gradient = PROBLEM.gradient(kernel, bias)
    pull, bounded, quantized, constrained = numpy_terms(kernel, regularizer, tau)

    gradients = {"bias": jnp.asarray(bias_gradient), "kernel": jnp.asarray(kernel_gradient)}
    loss = PROBLEM.loss(kernel, bias)
    found, terms = quick_jit(
        lambda gradients, state, params: (
            diagnostics.residual(gradients, state, params, **model),
            diagnostics.objective(loss, state, params, **model),
        )
    )(gradients, state, params)
    whole = np.linalg.norm(kernel_gradient + pull + bounded)
    expected = {
        "kernel": (whole, *map(np.linalg.norm, (kernel_gradient, pull, bounded))),
        "bias": (np.linalg.norm(bias_gradient),) * 2 + (0.0, 0.0),
    }
    assert set(found.leaves) == {"kernel", "bias"}
    for name, numbers in expected.items():
        np.testing.assert_allclose(np.array(found.leaves[name]), numbers, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        np.array(found.whole), np.hypot(*(np.array(expected[name]) for name in expected)), rtol=1e-12
    )

    np.testing.assert_allclose(
        np.array(terms), [loss + quantized + constrained, loss, quantized, constrained], rtol=1e-12
    )


def test_the_objective_falls_at_every_step_without_noise():
    model: Any = {"penalty": RHO, "regularizer": Ridge(0.2), "regularizer_penalty": 2.0}
    optimizer = stam_proximal(1 / PROBLEM.smoothness(), **model)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda params: helpers.loss(PROBLEM, params))(params)
        value = diagnostics.objective(loss, state, params, **model).total
        return helpers.take_step(optimizer, gradients, state, params), value

    run = lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=30)[1]
    assert np.all(np.diff(quick_jit(run)(helpers.start(PROBLEM))) < 0)


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if name != "none"])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_regularizer_says_what_it_costs(name, scale):
    regularizer, h, _ = REGULARIZERS[name]
    z = scale * np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(regularizer.value(jnp.asarray(z)), h(z), rtol=1e-12)


@pytest.mark.parametrize("regularizer", [Ridge(1.0), L1(1.0), GroupLasso(1.0)])
def test_costs_in_few_digits_are_summed_in_more(regularizer):
    z = jnp.full((1, 70_000), 0.5, jnp.bfloat16)
    found = regularizer.value(z)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, regularizer.value(z.astype(jnp.float32)), rtol=1e-6)


def test_the_box_allows_what_its_prox_gives_in_any_precision():
    box, v = Box(0.3), jnp.array([[1.0, -1.0]], jnp.bfloat16)
    assert box.value(box.prox(v, 1.0)) == 0
    assert box.value(v) == math.inf


@pytest.mark.parametrize("project", ["first", "last"])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.99, 1.0])
def test_the_flip_work_is_what_moving_the_binary_weights_costs(kappa, project):
    """In NumPy: x+ is x' carried along with y; the work is the cost of that, and of the change of y itself.

    With "first" the binary weights of a step are its y+, and x is carried by kappa lam / (1 + lam) of how y
    moved; with "last" they are the y+ of the step before, and the whole lam / (1 + lam) carries.
    """
    eta, rho = 0.1, 20.0
    optimizer = three_block_splitting(
        optax.sgd(eta),
        quantizer=Binary(),
        relaxation=SquaredDistance(eta * rho),
        inertia=kappa,
        project=project,
    )
    loss = lambda params: helpers.loss(PROBLEM, params)
    settings: Any = {"learning_rate": eta, "penalty": rho, "inertia": kappa}

    @quick_jit
    def step(params: Any, state: Any, noises: Any) -> Any:
        gradients = jax.tree.map(jnp.add, jax.grad(loss)(params), noises)
        before, after = (params, state), helpers.take_step(optimizer, gradients, state, params)
        return *after, diagnostics.flip_work(loss, gradients, before[::-1], after[::-1], **settings)

    params = helpers.start(PROBLEM)
    state = helpers.begin(optimizer, params)
    lam, pull = eta * rho, (1 - kappa) * rho
    x, bias = PROBLEM.kernel, PROBLEM.bias
    v, y = x, x
    merit = lambda x, bias, y: PROBLEM.loss(x, bias) + pull / 2 * np.sum((x - y) ** 2)
    works, flips = [], 0
    for k in range(20):
        noises = {"kernel": PROBLEM.kernel_noise[k], "bias": PROBLEM.bias_noise[k]}
        params, state, found = step(params, state, noises)

        d, bias_d = (g + noises[name] for name, g in zip(noises, PROBLEM.gradient(x, bias), strict=True))
        q = reference.project(v)
        w = v - eta * d
        new_y = reference.project(v if project == "first" else w)
        new_x, bias = (w + lam * new_y) / (1 + lam), bias - eta * bias_d
        v = new_x + kappa * (w - new_x)
        if project == "first":
            alone = new_x - kappa * lam / (1 + lam) * (new_y - y)
        else:
            # Before the first step x is its own y; from then on q is y.
            carried = kappa * lam * (q - y) if k == 0 else 0.0
            alone = new_x - (lam * (new_y - q) + carried) / (1 + lam)
        expected = merit(new_x, bias, reference.project(v)) - merit(alone, bias, q)
        np.testing.assert_allclose(float(found), expected, rtol=1e-9, atol=1e-13)
        flips += np.sum(new_y * y < 0)
        works.append(expected)
        x, y = new_x, new_y
    assert np.ptp(works) > 0
    if project == "first":
        # Without inertia q is at its best, and moving it never costs.
        assert (np.max(works) <= 1e-13) == (kappa == 0)
    if kappa > 0.9:
        assert flips > 0


def test_with_inertia_the_pull_is_towards_the_projection_of_the_latent_weights():
    kappa, rho = 0.9, 40.0
    optimizer = three_block_splitting(
        optax.sgd(0.1), quantizer=Binary(), relaxation=SquaredDistance(4.0), inertia=kappa, project="first"
    )
    state, params = a_few_steps(optimizer, 20)
    x, v = np.asarray(params["kernel"]), np.asarray(state.latent["kernel"])
    assert not np.allclose(reference.project(v), reference.project(x), rtol=1e-4, atol=0)
    pull = (1 - kappa) * rho
    nothing = jax.tree.map(jnp.zeros_like, params)
    found = diagnostics.residual(nothing, state, params, penalty=pull)
    np.testing.assert_allclose(found.whole.total, pull * np.linalg.norm(x - reference.project(v)), rtol=1e-12)
    terms = diagnostics.objective(0.0, state, params, penalty=pull)
    np.testing.assert_allclose(terms.total, pull / 2 * np.sum((x - reference.project(v)) ** 2), rtol=1e-12)


def test_the_measures_work_inside_jit_for_part_of_a_network_and_for_few_digits():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), helpers.start(PROBLEM))
    model: Any = {"penalty": RHO}
    optimizer = optax.chain(optax.trace(0.9), stam_proximal(ETA, **model))
    state = helpers.begin(optimizer, params)
    gradients = jax.tree.map(jnp.ones_like, params)

    def measures(gradients, state, params):
        return (
            diagnostics.residual(gradients, state, params, **model),
            diagnostics.objective(jnp.bfloat16(1.0), state, params, **model),
        )

    found = jax.jit(measures)(gradients, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, measures(gradients, state, params)
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact = measures(jax.tree.map(jnp.ones_like, wide), helpers.begin(optimizer, wide), wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02), found, exact)


def test_the_effective_step_is_below_that_of_every_smoothness():
    for rho, tau in [(0.0, 0.0), (10.0, 0.5), (1e8, 1e8)]:
        step = diagnostics.effective_step(0.25, penalty=rho, regularizer_penalty=tau)
        assert step == pytest.approx(1 / (4 + rho + tau), rel=1e-12)


def test_what_is_quantized_is_what_is_asked_for():
    params = {"kernel": jnp.array([[3.0, 1.0]]), "embed": jnp.array([[2.0, 4.0]])}
    gradients = jax.tree.map(jnp.zeros_like, params)
    for quantizer, pulls in [
        (Binary(axis=()), {"kernel": 1.0, "embed": 0.0}),
        ({"embed": Binary(axis=()), "*": Binary(axis=())}, {"kernel": 1.0, "embed": 1.0}),
        ({"embed": Binary(scale=1.0)}, {"kernel": 0.0, "embed": np.sqrt((1 + 9) / 2)}),
    ]:
        state = stam_proximal(ETA, RHO, quantizer=quantizer).init(params)
        found = diagnostics.residual(gradients, state, params, penalty=RHO, quantizer=quantizer)
        expected = {path: RHO * np.sqrt(2) * pull for path, pull in pulls.items()}
        assert {path: leaf.quantized for path, leaf in found.leaves.items()} == pytest.approx(expected)
        terms = diagnostics.objective(0.0, state, params, penalty=RHO, quantizer=quantizer)
        assert terms.quantized == pytest.approx(RHO * sum(pull**2 for pull in pulls.values()))


SGD = stam(optax.sgd(ETA), hard_from=10)
OTHER = {"kernel": START["kernel"].T, "bias": START["bias"]}


class Nameless:
    def prox(self, v, step):
        return v


@pytest.mark.parametrize(
    ("measure", "error", "words"),
    [
        (lambda s, p: diagnostics.residual(p, s, p, penalty=-1.0), ValueError, "residual: penalty"),
        (lambda s, p: diagnostics.residual(p, s, p, penalty=math.inf), ValueError, "residual: penalty"),
        (
            lambda s, p: diagnostics.residual(p, s, p, penalty=jnp.array(-1.0)),
            ValueError,
            "residual: penalty",
        ),
        (
            lambda s, p: diagnostics.residual(
                p, s, p, regularizer=Ridge(), regularizer_penalty=jnp.array(jnp.inf)
            ),
            ValueError,
            "residual: regularizer_penalty",
        ),
        (
            lambda s, p: diagnostics.residual(p, s, p, regularizer=Ridge()),
            ValueError,
            "residual: .*regularizer_penalty",
        ),
        (
            lambda s, p: diagnostics.objective(0.0, s, p, regularizer=Ridge()),
            ValueError,
            "objective: .*regularizer_penalty",
        ),
        (lambda s, p: diagnostics.residual({"a": p["kernel"]}, s, p), ValueError, "gradients .*bias"),
        (lambda s, p: diagnostics.residual(OTHER, s, p), ValueError, "gradients .*kernel"),
        (lambda s, p: diagnostics.residual(p, (), p), ValueError, "no SplittingState"),
        (lambda s, p: diagnostics.objective(0.0, optax.sgd(ETA).init(p), p), ValueError, "SplittingState"),
        (
            lambda s, p: diagnostics.flip_work(LOSS, p, (s, p), ((), p), learning_rate=0.1, penalty=1.0),
            ValueError,
            "no SplittingState",
        ),
        (lambda s, p: diagnostics.residual(OTHER, SGD.init(p), OTHER), ValueError, "other .*kernel"),
        (
            lambda s, p: diagnostics.objective(0.0, SGD.init(p), {"a": {"kernel": p["kernel"]}}),
            ValueError,
            "other .*kernel",
        ),
        (
            lambda s, p: diagnostics.residual(p, s, p, quantizer={"bias": Binary()}),
            ValueError,
            "bias",
        ),
        (
            lambda s, p: diagnostics.residual(p, s, p, quantizer=Binary),  # pyright: ignore
            TypeError,
            "residual: quantizer",
        ),
        (
            lambda s, p: diagnostics.residual(p, s, p, penalty=lambda count: 1.0),  # pyright: ignore
            TypeError,
            "residual: penalty",
        ),
        (
            lambda s, p: diagnostics.residual(p, s, p, regularizer=Ridge, regularizer_penalty=1.0),  # pyright: ignore
            TypeError,
            "residual: regularizer",
        ),
        (
            lambda s, p: diagnostics.objective(0.0, s, p, regularizer=Nameless(), regularizer_penalty=1.0),
            TypeError,
            "objective: regularizer .*value",
        ),
        (
            lambda s, p: diagnostics.flip_work(LOSS, p, (s, p), (s, p), learning_rate=0.1, penalty=math.inf),
            ValueError,
            "flip_work: penalty",
        ),
        (
            lambda s, p: diagnostics.flip_work(LOSS, {}, (s, p), (s, p), learning_rate=0.1, penalty=1.0),
            ValueError,
            "flip_work: gradients",
        ),
        (
            lambda s, p: diagnostics.flip_work(
                LOSS, p, (s, p), (s, p), learning_rate=0.1, penalty=1.0, inertia=1.5
            ),
            ValueError,
            "flip_work: inertia",
        ),
    ],
)
def test_measures_of_what_is_not_there_are_refused(measure, error, words):
    with pytest.raises(error, match=words):
        measure(stam_proximal(ETA, RHO).init(START), START)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_what_is_recorded_is_what_one_would_measure_by_hand(every):
    model: Any = {"regularizer": Ridge(0.5), "regularizer_penalty": 2.0}
    blend = LinearBlend(optax.linear_schedule(0.0, 1.0, 10))
    plain = three_block_splitting(
        optax.sgd(ETA, momentum=0.9), quantizer=Binary(), relaxation=blend, inertia=0.999
    )
    recorder = diagnostics.record(plain, every=every, penalty=lambda count: 1.0 + count, **model)
    noise = {"bias": PROBLEM.bias_noise, "kernel": 10 * PROBLEM.kernel_noise}

    def step(carry: Any, gradients: Any) -> Any:
        params, state = helpers.take_step(recorder, gradients, carry[1], carry[0])
        return (params, state), state.diagnostics

    params = helpers.start(PROBLEM)
    begun = helpers.begin(recorder, params)
    _, recorded = quick_jit(lambda carry: jax.lax.scan(step, carry, noise))((params, begun))

    @quick_jit
    def by_hand(gradients: Any, state: Any, params: Any, penalty: Any) -> Any:
        new_params, new_state = helpers.take_step(plain, gradients, state, params)
        residual = diagnostics.residual(gradients, state, params, penalty=penalty, **model)
        before, after = (quantize(p)["kernel"] for p in (params, new_params))
        measured = (
            residual.whole.total,
            diagnostics.quantization_gap(new_params),
            diagnostics.sign_flips(before, after),
            optax.tree.norm(jax.tree.map(jnp.subtract, new_params, params)),
        )
        return new_params, new_state, measured

    params = helpers.start(PROBLEM)
    state = helpers.begin(plain, params)
    expected: Any = ()
    flips = []
    for k in range(7):
        gradients = jax.tree.map(lambda leaf, k=k: leaf[k], noise)
        params, state, measured = by_hand(gradients, state, params, 1.0 + k)
        if k % every == 0:
            expected = measured
            flips.append(float(expected[2]))
        found = [np.asarray(field)[k] for field in recorded]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert max(flips) > 0


@pytest.mark.parametrize(
    "inner",
    [
        stam_proximal(ETA, RHO),
        pytest.param(binary_connect(optax.adam(ETA)), marks=pytest.mark.slow),
        pytest.param(prox_quant(optax.sgd(ETA), threshold=1e-3, hard_from=40), marks=pytest.mark.slow),
        optax.chain(optax.sgd(ETA), SGD),
    ],
    ids=["proximal", "around an optimizer", "without latent weights", "behind an optimizer"],
)
def test_a_recorded_optimizer_does_what_it_does_alone(inner):
    recorder = diagnostics.record(inner)
    assert all(np.isnan(field) for field in helpers.begin(recorder, START).diagnostics)
    expected, inner_state = helpers.train(inner, PROBLEM)
    found, state = helpers.train(recorder, PROBLEM)
    agree = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(agree, found, expected)
    jax.tree.map(agree, state.inner, inner_state)
    assert state.count == len(PROBLEM.bias_noise)
    last = optax.tree.get(state, "diagnostics")
    assert last.residual > 0
    final, before = (jax.tree.map(lambda leaf, at=at: leaf[at], found) for at in (-1, -2))
    np.testing.assert_allclose(last.gap, diagnostics.quantization_gap(final), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        last.moved, optax.tree.norm(jax.tree.map(np.subtract, final, before)), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: diagnostics.record(len), TypeError, "record: optimizer"),  # pyright: ignore
        (lambda: diagnostics.record(SGD, penalty=-1.0), ValueError, "record: penalty"),
        (lambda: diagnostics.record(SGD, every=0), ValueError, "record: every"),
        (lambda: diagnostics.record(SGD, every=2.5), TypeError, "record: every"),  # pyright: ignore
        (lambda: diagnostics.record(SGD, quantizer="*"), TypeError, "record: quantizer"),  # pyright: ignore
        (
            lambda: diagnostics.record(SGD, regularizer=Box()),
            ValueError,
            "record: .*regularizer_penalty",
        ),
        (
            lambda: diagnostics.record(SGD, regularizer=Box(), regularizer_penalty=math.inf),
            ValueError,
            "record: .*regularizer_penalty",
        ),
        (lambda: diagnostics.record(optax.sgd(ETA)).init(START), ValueError, "no SplittingState"),
        (
            lambda: diagnostics.record(
                admm_quant(optax.sgd(ETA), penalty=1.0, dual_every=2, hard_from=40)
            ).init(START),
            ValueError,
            "no SplittingState",
        ),
        (
            lambda: diagnostics.record(SGD).update(START, SGD.init(START), START),
            ValueError,
            "RecordState; got SplittingState",
        ),
    ],
)
def test_a_recorder_with_nothing_to_record_is_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_step_that_is_not_compiled_is_recorded_by_one_that_is():
    recorder = diagnostics.record(stam_proximal(ETA, RHO), penalty=RHO)
    params = helpers.start(PROBLEM)
    state = helpers.begin(recorder, params)
    params, state = helpers.take_step(recorder, params, state, params)
    params, state = helpers.take_step(recorder, params, state, params)
    compilations = []
    note = lambda event, duration_secs, **_: (
        compilations.append(event) if "backend_compile" in event else None
    )
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for _ in range(3):
            params, state = helpers.take_step(recorder, params, state, params)
        assert compilations == []
        jax.jit(lambda x: 3 * x + len(compilations))(1.0)
        assert len(compilations) == 1  # It does count.
    finally:
        jax.monitoring.clear_event_listeners()


def around(learning_rate: Any) -> Any:
    return diagnostics.record(stam_proximal(learning_rate, RHO), penalty=RHO)


def behind(learning_rate: Any) -> Any:
    return diagnostics.record(optax.chain(optax.sgd(learning_rate, momentum=0.9), stam(hard_from=3)))


WRAPPERS = {
    "several batches": lambda recorded: optax.MultiSteps(recorded(0.1), 2),
    "changeable numbers": lambda recorded: optax.inject_hyperparams(recorded)(learning_rate=0.1),
    "a part": lambda recorded: optax.partition(
        {"here": recorded(0.1), "there": optax.sgd(0.1)}, {"kernel": "here", "bias": "there"}
    ),
    "a mask": lambda recorded: optax.masked(recorded(0.1), {"kernel": True, "bias": False}),
    "a chain": lambda recorded: optax.chain(optax.clip_by_global_norm(1.0), recorded(0.1)),
}


@pytest.mark.parametrize(
    ("wrap", "recorded"),
    [
        *((wrap, around) for wrap in WRAPPERS.values()),
        *(pytest.param(wrap, behind, marks=pytest.mark.slow) for wrap in WRAPPERS.values()),
    ],
)
def test_a_recorder_records_inside_other_wrappers(wrap, recorded):
    optimizer = wrap(recorded)
    params = helpers.start(PROBLEM)
    state = helpers.begin(optimizer, params)
    step, gradients = quick_jit(partial(helpers.take_step, optimizer)), jax.tree.map(np.ones_like, params)
    for _ in range(4):
        params, state = step(gradients, state, params)
    found = optax.tree.get(state, "diagnostics")
    assert np.all(np.isfinite(np.array(found)))
    assert found.residual > 0
    assert found.moved > 0


def test_norms_of_moves_in_half_precision_do_not_overflow():
    params = {"kernel": jnp.full((4, 4), 100.0, jnp.float16)}
    gradients = {"kernel": jnp.full((4, 4), 300.0, jnp.float16)}
    recorder = diagnostics.record(stam_proximal(100.0, 0.0))
    state = helpers.begin(recorder, params)
    _, state = quick_jit(partial(helpers.take_step, recorder))(gradients, state, params)
    np.testing.assert_allclose(state.diagnostics.moved, 4 * 30_000, rtol=1e-3)


def test_a_network_without_leaves_is_stationary():
    state = stam_proximal(ETA, RHO).init({})
    assert diagnostics.residual({}, state, {}).whole.total == 0
    assert diagnostics.objective(0.0, state, {}, penalty=RHO).total == 0
