"""Each method is its published iteration, that of version 0.1, and that of torchao where it has one."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stam_jax import (
    Binary,
    Ternary,
    admm_quant,
    binary_connect,
    binary_relax,
    bop,
    md_tanh,
    parq,
    prox_quant,
    quantize,
    regularizers,
    relaxations,
    schedules,
    stam,
    stam_proximal,
    straight_through,
    three_block_splitting,
)
from tests import helpers, reference
from tests.methods import blended
from tests.runs import ETA, PROBLEM, assert_follows, relaxed_at

CHANNEL, TENSOR, SIGNS = Binary(), Binary(axis=()), Binary(scale=1.0)
X = np.array([[1.0, 3.0]], np.float32)  # Its projection by one scale is (2, 2).

# The published iterations.

HEAVY_BALL = {"decay": 0.9}
NESTEROV = {"decay": 0.9, "nesterov": True}
any_momentum = pytest.mark.parametrize("momentum", [HEAVY_BALL, NESTEROV], ids=["heavy-ball", "nesterov"])


def sgd(momentum: dict[str, Any]) -> optax.GradientTransformation:
    return optax.sgd(ETA, momentum["decay"], momentum.get("nesterov", False))


def placed(method: Any, momentum: dict[str, Any]) -> Any:
    """The method around SGD, or behind it where that has Nesterov's momentum."""
    if momentum.get("nesterov"):
        return optax.chain(sgd(momentum), method())
    return method(sgd(momentum))


@pytest.mark.usefixtures("x64")
@any_momentum
@pytest.mark.parametrize("hold", [1.0, 1e4, lambda k: 0.1 * k], ids=["number", "firmest", "schedule"])
def test_stam_blends_in_a_straight_line_with_an_inertia_that_follows_from_the_steps(momentum, hold):
    advance = reference.held(ETA, hard_from=40, hold=hold)
    assert_follows(placed(partial(stam, hard_from=40, hold=hold), momentum), advance, **momentum)


def test_stam_is_hard_from_the_step_that_is_named_and_not_before():
    counts = [0, 1, 25, 50, 98, 99, 100, 101, 10**6]
    relaxed = relaxed_at(stam(hard_from=100, quantizer=TENSOR), X, counts)
    np.testing.assert_allclose(relaxed[:, 0, 0], 1 + np.minimum(np.array(counts) / 100, 1), rtol=1e-6)
    np.testing.assert_array_equal(relaxed[-3:], 2.0)
    assert np.all(relaxed[:-3, 0, 0] < 2)


def test_stam_does_not_move_pretrained_weights_at_its_first_step():
    optimizer, params = stam(hard_from=10), {"kernel": jnp.array([[1.0, 3.0], [-0.1, 2.0]])}
    zeros = {"kernel": jnp.zeros((2, 2))}
    step = jax.jit(lambda params: helpers.take_step(optimizer, zeros, optimizer.init(params), params)[0])
    np.testing.assert_array_equal(step(params)["kernel"], params["kernel"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("settings", "clip", "momentum"),
    [
        ({"scale": 1.0}, 0.3, HEAVY_BALL),
        ({"axis": ()}, math.inf, NESTEROV),
        ({"axis": -1}, 0.3, NESTEROV),
    ],
)
def test_binary_connect_is_the_published_iteration(settings, clip, momentum):
    method = partial(binary_connect, clip=clip, quantizer=Binary(**settings))
    advance = reference.binary_connect(ETA, clip=clip, **settings)
    assert_follows(placed(method, momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@any_momentum
def test_binary_relax_is_the_published_iteration(momentum):
    settings = {"growth_every": 7, "hard_from": 35, "strength": 0.5}
    advance = reference.binary_relax(ETA, growth=1.04, **settings)
    assert_follows(placed(partial(binary_relax, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("clip", "momentum"), [(1.0, HEAVY_BALL), (math.inf, NESTEROV)])
def test_prox_quant_is_the_published_iteration(momentum, clip):
    settings = {"threshold": lambda k: ETA * 0.02 * k, "hard_from": 40, "clip": clip}
    advance = reference.prox_quant(ETA, **settings)
    assert_follows(placed(partial(prox_quant, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("settings", "momentum"),
    [
        ({"hard_from": 40}, NESTEROV),
        ({"hard_from": 45, "anneal_from": 10, "steepness": 3.0}, HEAVY_BALL),
    ],
)
def test_parq_is_the_published_iteration(momentum, settings):
    advance = reference.parq(ETA, **settings)
    assert_follows(placed(partial(parq, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@any_momentum
def test_md_tanh_is_the_published_iteration(momentum):
    settings = {"growth": 1.1, "growth_every": 3, "hard_from": 45}
    advance = reference.md_tanh(ETA, **settings)
    assert_follows(placed(partial(md_tanh, **settings), momentum), advance, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("clip", "momentum"), [(0.5, NESTEROV), (math.inf, HEAVY_BALL)])
def test_the_straight_through_estimator_gates_gradients_before_momentum(momentum, clip):
    gated = lambda v, g: np.where(np.abs(v) > clip, 0.0, g)
    advance = reference.binary_connect(ETA, clip=math.inf, scale=1.0)
    assert_follows(straight_through(sgd(momentum), clip=clip), advance, gradient=gated, **momentum)


def test_the_gate_of_the_straight_through_estimator_is_about_latent_weights_and_not_relaxed_ones():
    # The relaxed weights are all of size 1, beyond the clip; the latent ones of two of them are within it.
    params = {"kernel": jnp.array([[0.2, -0.3], [0.7, -0.9]])}
    optimizer = straight_through(optax.sgd(0.1), clip=0.5)
    state, ones = helpers.begin(optimizer, params), {"kernel": jnp.ones((2, 2))}
    relaxed, state = helpers.take_step(optimizer, jax.tree.map(jnp.zeros_like, ones), state, params)
    _, state = helpers.take_step(optimizer, ones, state, relaxed)
    np.testing.assert_allclose(state.latent["kernel"], [[0.1, -0.4], [0.7, -0.9]], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("clip", [0.3, math.inf])
def test_the_plain_straight_through_estimator_is_binary_connect_without_a_box(clip):
    estimated, _ = helpers.train(straight_through(optax.adam(0.1), clip=clip), PROBLEM)
    connected, _ = helpers.train(binary_connect(optax.adam(0.1), clip=math.inf), PROBLEM)
    differs = np.any(estimated["kernel"] != connected["kernel"])
    assert differs == math.isfinite(clip)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dual_every", "momentum"), [(1, NESTEROV), (4, HEAVY_BALL)])
def test_admm_steps_along_the_gradient_of_the_augmented_lagrangian(momentum, dual_every):
    settings = {"penalty": 1.5, "dual_every": dual_every, "hard_from": 42}
    advance = reference.Admm(PROBLEM.kernel, ETA, **settings)
    optimizer = admm_quant(sgd(momentum), **settings)
    assert_follows(optimizer, advance, gradient=advance.gradient, **momentum)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("adaptivity", "momentum"), [(0.1, HEAVY_BALL), (lambda k: 0.2 / (1 + k), {})])
def test_bop_is_the_published_iteration(momentum, adaptivity):
    settings = {"adaptivity": adaptivity, "threshold": 0.01}
    # Momentum in front of Bop is that of the binary weights too; that of its optimizer is not.
    optimizer = bop(optax.sgd(ETA), **settings)
    optimizer = optax.chain(optax.trace(**momentum), optimizer) if momentum else optimizer
    assert_follows(optimizer, reference.Bop(**settings), **momentum)


@pytest.mark.usefixtures("x64")
def test_the_optimizer_of_bop_moves_the_other_leaves_alone():
    settings: dict[str, Any] = {"adaptivity": 0.1, "threshold": 0.01}
    by_adam, _ = helpers.train(bop(optax.adamw(0.1), **settings), PROBLEM._replace(inputs=0 * PROBLEM.inputs))
    by_sgd, _ = helpers.train(bop(optax.sgd(0.1), **settings), PROBLEM._replace(inputs=0 * PROBLEM.inputs))
    assert np.any(by_adam["bias"] != by_sgd["bias"])
    np.testing.assert_array_equal(by_adam["kernel"], by_sgd["kernel"])
    assert np.any(by_adam["kernel"][0] != by_adam["kernel"][-1])


def test_the_flips_of_bop_keep_the_scales_of_the_start():
    optimizer = bop(optax.sgd(ETA), adaptivity=0.5, threshold=0.0, quantizer=CHANNEL)
    params = {"kernel": jnp.array([[0.5, -2.0], [1.0, 0.25], [-0.75, 1.5]])}
    gradient = {"kernel": jnp.array([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]])}
    sizes, state = np.abs(quantize(params)["kernel"]), helpers.begin(optimizer, params)
    signs = []
    for sign in [1.0, -1.0] * 10:
        gradients = jax.tree.map(lambda g, sign=sign: sign * g, gradient)
        params, state = helpers.take_step(optimizer, gradients, state, params)
        np.testing.assert_array_equal(np.abs(params["kernel"]), sizes)
        signs.append(np.sign(params["kernel"]))
    assert np.any(signs[0] != signs[1])


@pytest.mark.parametrize("growth_every", [1, 7, 41, 55, 390])
def test_binary_relax_grows_at_every_multiple_of_its_interval_and_never_late(growth_every):
    # Boundaries are where rounding shows: a step count times a rounded reciprocal may fall short of them.
    counts = sorted({n * growth_every + offset for n in range(1, 8) for offset in (-1, 0)})
    optimizer = binary_relax(growth_every=growth_every, hard_from=10**6, growth=2.0)
    strengths = np.array([2.0 ** (count // growth_every) for count in counts])
    relaxed = relaxed_at(optimizer, X, counts)
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
    optimizer = binary_relax(growth_every=1, hard_from=10**6, **settings)
    # Past the whole numbers of 32 bits, and past the end of float32.
    relaxed = relaxed_at(optimizer, X, [31, 32, 40, 126, 127, 128, 150, 5000])
    np.testing.assert_allclose(relaxed[:, 0, 0], expected, rtol=1e-5)


# The iterations of version 0.1.

OLD: dict[str, Any] = json.loads(Path(__file__).with_name("trajectories.json").read_text())
OLD.pop("what")


def falling(k: Any) -> Any:
    return 0.1 / (1 + 0.1 * k)


def rising(k: Any) -> Any:
    return 0.5 * 1.5**k


STEP = optax.sgd(falling)
L1, BOX = regularizers.L1(0.3), regularizers.Box(0.4)
BLEND = relaxations.LinearBlend(schedules.linear_to_hard(8))
# The settings that version 0.1 ran with, as they are written now, and what was quantized how.
NOW: dict[str, tuple[Any, Binary]] = {
    "stam": (blended(STEP, hard_from=8, inertia=0.9), CHANNEL),
    "stam_proximal": (stam_proximal(falling, rising), CHANNEL),
    "stam_proximal_regularized": (
        stam_proximal(falling, rising, regularizer=L1, regularizer_penalty=2.0),
        CHANNEL,
    ),
    "linear_blend": (stam(STEP, hard_from=8, hold=0.0), CHANNEL),
    "box_in_the_loop": (
        three_block_splitting(STEP, quantizer=CHANNEL, relaxation=BLEND, inertia=0.9, regularizer=BOX),
        CHANNEL,
    ),
    "projected_first": (
        three_block_splitting(
            STEP,
            quantizer=TENSOR,
            relaxation=relaxations.SquaredDistance(rising),
            inertia=0.5,
            project="first",
        ),
        TENSOR,
    ),
    "binary_connect": (binary_connect(STEP, clip=0.5), SIGNS),
    "binary_relax": (binary_relax(STEP, growth_every=3, hard_from=8), TENSOR),
    "prox_quant": (prox_quant(STEP, threshold=lambda k: falling(k) * 0.2 * k, hard_from=8), SIGNS),
    "parq": (parq(STEP, hard_from=8, anneal_from=2), CHANNEL),
    "md_tanh": (md_tanh(STEP, growth=1.2, growth_every=2, hard_from=8), SIGNS),
    "straight_through": (straight_through(optax.sgd(falling, momentum=0.9), clip=0.4), SIGNS),
    # The step was 0.1, and implicit: 0.1 / (1 + 0.1 * 2) times the gradient of the augmented Lagrangian.
    "admm_quant": (admm_quant(optax.sgd(0.1 / 1.2), penalty=2.0, dual_every=3, hard_from=8), TENSOR),
    "bop": (bop(STEP, adaptivity=0.3, threshold=0.2), SIGNS),
}


def follow(optimizer: Any, start: Any, gradient: Any, steps: int) -> tuple[Any, Any]:
    """The parameters after each step along gradients of the step count, stacked, and after the last."""

    def step(carry: Any, k: jax.Array) -> Any:
        params, state = helpers.take_step(optimizer, gradient(k), carry[1], carry[0])
        return (params, state), params

    run = helpers.quick_jit(
        lambda params: jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    )
    (last, _), history = run(start)
    return history, last


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OLD)
def test_it_makes_the_iterates_of_version_0_1(name):
    # In trajectories.json stands what was recorded with version 0.1 in float64, on CPU.
    i, j = np.mgrid[:4, :3]
    start = {"kernel": 0.5 * np.sin(1 + 3 * i + 7 * j), "bias": 0.1 * np.cos(j[0])}
    gradient = lambda k: {
        "kernel": jnp.cos(0.3 * k + 2 * i + 5 * j) + 0.4 * jnp.sin(1.7 * k + i * j),
        "bias": jnp.sin(k + jnp.asarray(j[0])),
    }
    (optimizer, quantizer), recorded = NOW[name], dict(OLD[name])
    history, last = follow(optimizer, start, gradient, 12)
    if "quantized" in recorded:  # Not where it was the projection of latent weights, before they are hard.
        quantized = np.ravel(quantize(last, quantizer)["kernel"])
        np.testing.assert_allclose(quantized, recorded.pop("quantized"), rtol=0, atol=1e-12)
    if "bias" in recorded:  # Not that of ADMM, whose float leaves take the optimizer's own step now.
        np.testing.assert_allclose(last["bias"], recorded.pop("bias"), rtol=0, atol=1e-12)
    assert list(recorded) == ["1", "3", "6", "8", "9", "12"]
    for count, kernel in recorded.items():
        np.testing.assert_allclose(np.ravel(history["kernel"][int(count) - 1]), kernel, rtol=0, atol=1e-12)


def test_every_method_of_version_0_1_is_among_them():
    assert set(NOW) == set(OLD)


# The iterations of torchao.

TORCHAO: dict[str, Any] = json.loads(Path(__file__).with_name("torchao.json").read_text())
TORCHAO.pop("what")
LINKS: dict[str, Any] = {
    "parq": partial(parq, hard_from=40),
    "binary_relax": partial(stam, hard_from=40, hold=0),
    "hard": partial(binary_connect, clip=math.inf),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["around", pytest.param("behind", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TORCHAO)
def test_it_makes_the_iterates_of_torchao(name, form):
    # In torchao.json stands what torchao 0.18 computed in float64, and with which of its optimizers and maps.
    prox, sharing = name.split("/")
    # A leaf called weight has its outputs first, as in PyTorch, and so its scales.
    quantizer = Binary() if sharing == "channel" else Binary(axis=())
    link, momentum = partial(LINKS[prox], quantizer=quantizer), optax.sgd(0.05, momentum=0.9)
    optimizer = link(momentum) if form == "around" else optax.chain(momentum, link())
    i, j = np.mgrid[:6, :4]
    start = {"weight": 0.5 * np.sin(1 + 3 * i + 7 * j)}
    gradient = lambda k: {"weight": jnp.cos(0.3 * k + 2 * i + 5 * j) + 0.4 * jnp.sin(1.7 * k + i * j)}
    history, _ = follow(optimizer, start, gradient, 60)
    assert list(TORCHAO[name]) == ["1", "2", "5", "10", "20", "39", "40", "41", "60"]
    for count, weight in TORCHAO[name].items():
        np.testing.assert_allclose(np.ravel(history["weight"][int(count) - 1]), weight, rtol=0, atol=1e-9)


# Errors say what is wrong at once.


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (stam, {"hard_from": -1}, "stam: hard_from"),
        (stam, {"hard_from": math.inf}, "stam: hard_from"),
        (stam, {"hard_from": 0.75}, "stam: hard_from must be a whole number of steps"),
        (stam, {"hard_from": 1, "hold": -1.0}, "stam: hold"),
        (binary_relax, {"growth_every": 0, "hard_from": 1}, "binary_relax: growth_every"),
        (binary_relax, {"growth_every": 1, "hard_from": -1}, "binary_relax: hard_from"),
        (binary_relax, {"growth_every": 1, "hard_from": 1, "growth": 0.5}, "binary_relax: growth"),
        (binary_relax, {"growth_every": 1, "hard_from": 1, "strength": -1.0}, "binary_relax: strength"),
        (binary_connect, {"clip": -1.0}, "binary_connect: clip"),
        (prox_quant, {"threshold": -1.0, "hard_from": 1}, "prox_quant: threshold"),
        (prox_quant, {"threshold": 1.0, "hard_from": -1}, "prox_quant: hard_from"),
        (prox_quant, {"threshold": 1.0, "hard_from": 1, "clip": -1.0}, "prox_quant: clip"),
        (prox_quant, {"threshold": 1.0, "hard_from": 0.5}, "prox_quant: hard_from"),
        (parq, {"hard_from": 5, "anneal_from": 2.5}, "parq: anneal_from"),
        (parq, {"hard_from": 5, "anneal_from": 6}, "start must be at most hard_from"),
        (parq, {"hard_from": 5, "steepness": 0.0}, "parq: steepness"),
        (md_tanh, {"hard_from": 5, "growth": 0.5}, "md_tanh: growth"),
        (md_tanh, {"hard_from": -5}, "md_tanh: hard_from"),
        (md_tanh, {"hard_from": 5, "growth_every": 1.5}, "md_tanh: growth_every"),
        (straight_through, {"clip": -1.0}, "straight_through: clip"),
        (admm_quant, {"penalty": 1.0, "dual_every": 0, "hard_from": 1}, "admm_quant: dual_every"),
        (admm_quant, {"penalty": 1.0, "dual_every": 1, "hard_from": 0.5}, "admm_quant: hard_from"),
        (admm_quant, {"penalty": -1.0, "dual_every": 1, "hard_from": 1}, "admm_quant: penalty"),
        (bop, {"adaptivity": 1.5}, "bop: adaptivity"),
        (bop, {"threshold": -1.0}, "bop: threshold"),
    ],
)
def test_numbers_out_of_range_are_named_at_once(method, settings, said):
    with pytest.raises(ValueError, match=said):
        method(optax.sgd(ETA), **settings)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"learning_rate": -0.1}, ValueError, "learning_rate"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate"),
        ({"learning_rate": np.float32(-1)}, ValueError, "learning_rate"),
        ({"learning_rate": jnp.ones(2)}, ValueError, "learning_rate"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate"),
        ({"learning_rate": True}, TypeError, "learning_rate"),
        ({"learning_rate": None}, TypeError, "learning_rate"),
        ({"penalty": -1}, ValueError, "penalty"),
        ({"penalty": "strong"}, TypeError, "penalty"),
        ({"regularizer": L1, "regularizer_penalty": -1}, ValueError, "regularizer_penalty"),
        ({"regularizer": L1, "regularizer_penalty": math.inf}, ValueError, "regularizer_penalty"),
        ({"regularizer": L1}, ValueError, "regularizer needs a regularizer_penalty"),
        ({"regularizer": 1e-4, "regularizer_penalty": 1.0}, TypeError, "regularizer"),
        ({"quantizer": "binary"}, TypeError, "quantizer"),
    ],
)
def test_wrong_arguments_of_the_proximal_form_are_named_at_once(settings, error, said):
    with pytest.raises(error, match=f"^stam_proximal: {said}"):
        stam_proximal(**({"learning_rate": ETA, "penalty": 1.0} | settings))


EVERY: dict[str, Any] = {
    "stam": partial(stam, hard_from=10),
    "three_block_splitting": partial(
        three_block_splitting, relaxation=relaxations.Hard(), inertia=1.0, quantizer=Binary()
    ),
    "binary_connect": binary_connect,
    "binary_relax": partial(binary_relax, growth_every=1, hard_from=10),
    "prox_quant": partial(prox_quant, threshold=0.1, hard_from=10),
    "parq": partial(parq, hard_from=10),
    "md_tanh": partial(md_tanh, hard_from=10),
    "straight_through": straight_through,
    "admm_quant": partial(admm_quant, penalty=1.0, dual_every=1, hard_from=10),
    "bop": bop,
}
every_method = pytest.mark.parametrize("name", EVERY)


@every_method
@pytest.mark.parametrize("optimizer", [0.1, optax.constant_schedule(0.1), optax.adam, "adam"])
def test_a_learning_rate_is_no_optimizer(name, optimizer):
    with pytest.raises(TypeError, match=f"^{name}: optimizer"):
        EVERY[name](optimizer)


@pytest.mark.parametrize("name", ["straight_through", "admm_quant", "bop"])
def test_those_that_need_the_gradient_go_around_an_optimizer(name):
    with pytest.raises(TypeError, match="optimizer"):
        EVERY[name](None)
    with pytest.raises(TypeError, match="optimizer"):
        EVERY[name]()


@every_method
@pytest.mark.parametrize("quantizer", [Binary, "binary", 1.0, None, {"kernel": Binary}])
def test_the_quantizer_is_an_object_and_not_its_class(name, quantizer):
    with pytest.raises(TypeError, match=f"^{name}: quantizer"):
        EVERY[name](optax.sgd(ETA), quantizer=quantizer)


def test_bop_flips_binary_weights_alone():
    with pytest.raises(ValueError, match=r"bop: the leaf 'kernel' .*Ternary"):
        bop(optax.sgd(ETA), quantizer=Ternary()).init({"kernel": jnp.ones((2, 2))})
