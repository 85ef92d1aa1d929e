"""The parts of the experiments: images, networks, evaluation, files, the picture and the report."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import stam_jax
from experiments import balance, data, evaluation, files, models, optimizers, plots, report, weighted
from experiments.config import METHODS, DivergedError, SettingsError, TrainSettings
from experiments.devices import Layout
from experiments.training import Progress, Trainer


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def network(digits: data.Dataset) -> models.Network:
    return models.build("resnet8", digits, width=0.25, key=jax.random.key(0))


def rows(images: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


def test_the_three_splits_are_the_digits_of_scikit_learn_each_once(digits):
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part.labels) for part in parts] == [1197, 150, 450]
    everything = np.asarray(load_digits(return_X_y=True)[0]).astype(np.uint8)
    assert rows(np.concatenate([part.images for part in parts])) == rows(everything)


def test_every_split_holds_every_class_in_proportion(digits):
    for part in (digits.train, digits.validation, digits.test):
        shares = np.bincount(part.labels, minlength=10) / len(part.labels)
        assert np.all(np.abs(shares - 0.1) < 0.01)


def test_the_split_is_the_same_each_time(digits):
    np.testing.assert_array_equal(digits.test.images, data.load("digits").test.images)


def test_augmentation_shifts_each_image_and_fills_up_with_zeros(digits):
    images = digits.train.images[:64]
    moved = np.asarray(digits.augment(jax.random.key(0), jnp.asarray(images)))
    assert moved.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for i in range(len(images)):
        shifts = {
            (r, c)
            for r in range(3)
            for c in range(3)
            if np.array_equal(moved[i], padded[i, r : r + 8, c : c + 8])
        }
        assert shifts
        seen |= shifts
    assert len(seen) == 9


def test_batch_statistics_are_estimated_on_whole_batches_of_images_augmented_as_in_training(digits):
    trainer = Trainer(TrainSettings(width=0.125, batch_size=100, calibration_images=350), digits)
    images = trainer._calibration_images
    assert images.shape == (300, 8, 8, 1)
    padded = np.pad(digits.train.images[:300], ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = np.stack([padded[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)])
    are_equal = (shifted == images).all(axis=(2, 3, 4))
    assert are_equal.any(axis=0).all()
    assert are_equal.mean(axis=1).max() < 0.3
    np.testing.assert_array_equal(Trainer(trainer.settings, digits)._calibration_images, images)
    few = Trainer(TrainSettings(width=0.125, batch_size=100, calibration_images=1), digits)
    assert len(few._calibration_images) == 100


def test_augmentation_mirrors_only_where_asked(digits):
    images = jnp.asarray(digits.train.images[:64])
    still = data.Dataset(**{**vars(digits), "shift": 0})
    np.testing.assert_array_equal(still.augment(jax.random.key(0), images), images)
    mirroring = data.Dataset(**{**vars(still), "flip": True})
    moved = np.asarray(mirroring.augment(jax.random.key(0), images))
    same = np.all(moved == np.asarray(images), axis=(1, 2, 3))
    mirrored = np.all(moved == np.asarray(images)[:, :, ::-1], axis=(1, 2, 3))
    assert np.asarray(same | mirrored).all()
    assert 10 < np.sum(mirrored) < 54


def test_every_kernel_is_binary_and_nothing_else(network):
    selection = optimizers.choose(nnx.state(network, nnx.Param), TrainSettings())
    for row in selection.rows:
        assert row.quantized == row.path.endswith("kernel"), row


def test_first_and_last_are_the_stem_and_the_head(network):
    settings = TrainSettings(exclude=("first", "last"))
    selection = optimizers.choose(nnx.state(network, nnx.Param), settings)
    kept = {row.path for row in selection.rows if row.path.endswith("kernel") and not row.quantized}
    assert kept == {"stem/conv/kernel", "head/kernel"}


def test_batch_statistics_are_the_mean_and_variance_of_training_features(digits, network):
    graph, params, stats = models.split(network)
    new = evaluation.batch_statistics(
        graph, params, stats, digits.train.images[:700], batch_size=300, layout=Layout()
    )
    stem: Any = network
    means, variances = [], []
    for start in (0, 300):  # Two whole batches fit into 700 images.
        pixels = digits.train.images[start : start + 300].astype(np.float32)
        standard = (pixels - np.asarray(stem.mean, np.float32)) / np.asarray(stem.deviation, np.float32)
        features = np.asarray(stem.stem.conv(standard), np.float64)
        means.append(features.mean(axis=(0, 1, 2)))
        variances.append(features.var(axis=(0, 1, 2)))
    arrays = files.to_arrays(new)
    np.testing.assert_allclose(arrays["stem/norm/mean"], np.mean(means, axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(arrays["stem/norm/var"], np.mean(variances, axis=0), rtol=1e-4)


def test_evaluation_leaves_the_network_as_it_was(digits, network):
    graph, params, stats = models.split(network)
    before = files.to_arrays(stats)
    evaluation.batch_statistics(
        graph, params, stats, digits.train.images[:64], batch_size=64, layout=Layout()
    )
    evaluation.accuracy(graph, params, stats, digits.validation, Layout())
    for name, array in files.to_arrays(stats).items():
        np.testing.assert_array_equal(array, before[name])


def test_accuracy_counts_every_image_once_across_batches(digits, network):
    graph, params, stats = models.split(network)
    model: Any = network
    logits = np.asarray(model(jnp.asarray(digits.train.images)))
    expected = np.mean(np.argmax(logits, axis=-1) == digits.train.labels)
    assert len(digits.train.labels) > 2 * 500
    assert evaluation.accuracy(graph, params, stats, digits.train, Layout()) == expected


def test_hard_weights_that_are_not_binary_are_refused(network):
    class Liar(stam_jax.Binary):
        def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
            return jnp.where(codes == 1, scales, -2 * scales)

    params = nnx.state(network, nnx.Param)
    state = stam_jax.stam(0.1, quantizer=Liar()).init(params)
    with pytest.raises(AssertionError, match="is not binary"):
        evaluation.checked_leaves(state, params)


def test_state_is_not_filled_from_arrays_that_do_not_fit(network):
    params = nnx.state(network, nnx.Param)
    arrays = files.to_arrays(params)
    with pytest.raises(ValueError, match=r"head/bias .* is missing"):
        files.from_arrays({k: v for k, v in arrays.items() if k != "head/bias"}, params)
    with pytest.raises(ValueError, match=r"head/bias should have shape \(10,\) but is of shape \(9,\)"):
        files.from_arrays(arrays | {"head/bias": np.zeros(9)}, params)


@pytest.mark.parametrize("method", METHODS[1:])
def test_each_method_ends_at_its_binary_network(digits, method):
    """The relaxed weights of the last step are hard ones: nothing is left to round."""
    settings = TrainSettings(method=method)
    params = {"kernel": jax.random.normal(jax.random.key(1), (8, 4))}
    selection = stam_jax.select(params)
    optimizer = optimizers.build(settings, selection, steps=100, epoch=10)
    state = optimizer.init(params)
    gradient = {"kernel": jnp.full((8, 4), 1e-3)}
    gap = []
    for _ in range(100):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        gap.append(float(stam_jax.quantisation_gap(state, params)))
    assert gap[-1] < 1e-3
    if method not in ("binary_connect", "straight_through", "straight_through_clipped", "bop"):
        assert gap[10] > 0.05


def _run(optimizer: optax.GradientTransformation, count: int) -> tuple[Any, Any]:
    """The weights and the optimiser's state after some steps along gradients that change."""
    params = {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
    state = optimizer.init(params)

    def step(carry, k):
        params, state = carry
        gradients = jax.tree.map(lambda leaf: jnp.sin(leaf + k), params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jnp.arange(count, dtype=jnp.float32))[0]


def _steps(optimizer: optax.GradientTransformation, count: int) -> tuple[Any, Any]:
    """The weights and their binary form after the same steps."""
    params, state = _run(optimizer, count)
    return params, stam_jax.hard_params(state, params)


def _optimizer(*, steps: int = 20, epoch: int = 2, **settings: Any) -> optax.GradientTransformation:
    """The optimiser of a run that is hard for its last quarter: of 20 steps from step 15 on."""
    chosen = TrainSettings(momentum=0.0, weight_decay=0.0, nesterov=False, **settings)
    params = {"kernel": jnp.zeros((3, 4))}
    return optimizers.build(chosen, optimizers.choose(params, chosen), steps=steps, epoch=epoch)


@pytest.mark.parametrize("relaxation", get_args(TrainSettings.__annotations__["relaxation"]))
def test_each_relaxation_of_stam_is_soft_before_the_hard_phase_and_hard_in_it(relaxation):
    optimizer = _optimizer(relaxation=relaxation)
    params, hard = _steps(optimizer, 8)
    assert jnp.max(jnp.abs(params["kernel"] - hard["kernel"])) > 1e-3
    params, hard = _steps(optimizer, 16)
    np.testing.assert_allclose(params["kernel"], hard["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"inertia": 0.9}, {"inertia": 0.9}),
        ({"pull": 2.0}, {"inertia": lambda k: 0.999 / (1 + 2.0 * 0.1 * (1 + jnp.cos(jnp.pi * k / 20)) / 2)}),
        (
            {"inertia": 0.1, "pull": 2.0},
            {"inertia": lambda k: 0.1 / (1 + 0.1 * (1 + jnp.cos(jnp.pi * k / 20)))},
        ),
        ({"project": "first"}, {"project": "first"}),
        ({"box": 0.5}, {"regularizer": stam_jax.Box(0.5)}),
        ({"ridge": 0.5}, {"regularizer": stam_jax.Ridge(0.5)}),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_settings_of_stam_are_arguments_of_the_engine(settings, arguments):
    blend = stam_jax.LinearBlend(lambda k: jnp.minimum(k / 15, 1))
    arguments = {"inertia": 0.999} | arguments
    expected = stam_jax.stam(optax.cosine_decay_schedule(0.1, 20), relaxation=blend, **arguments)
    (params, hard), (wanted, wanted_hard) = _steps(_optimizer(**settings), 18), _steps(expected, 18)
    np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)
    np.testing.assert_allclose(hard["kernel"], wanted_hard["kernel"], rtol=2e-5)
    plain, _ = _steps(_optimizer(), 18)
    assert jnp.max(jnp.abs(plain["kernel"] - params["kernel"])) > 1e-5


@pytest.mark.parametrize("start", [1.0, 0.99])
def test_annealed_inertia_ends_at_0(start):
    """One minus the inertia grows by the same factor each step, and the rest of the run is proximal."""
    first = max(1 - start, 1e-4)
    shares = [1 - start] * 5 + [first ** (1 - k / 5) for k in range(5)] + [1.0] * 10
    expected = stam_jax.stam(
        optax.cosine_decay_schedule(0.1, 20),
        relaxation=stam_jax.LinearBlend(lambda k: jnp.minimum(k / 15, 1)),
        inertia=lambda count: 1 - jnp.asarray(shares)[count],
    )
    annealed = _optimizer(inertia=start, anneal_inertia=(0.25, 0.5))
    for count in (5, 9, 12, 18):
        (params, hard), (wanted, wanted_hard) = _steps(annealed, count), _steps(expected, count)
        np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)
        np.testing.assert_allclose(hard["kernel"], wanted_hard["kernel"], rtol=2e-5)
    plain, _ = _steps(_optimizer(inertia=start), 18)
    assert jnp.max(jnp.abs(plain["kernel"] - params["kernel"])) > 1e-5


def _weighted_by_hand(inertia: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64: the weights in use and the float ones after steps along the gradients of `_steps`."""
    x = v = np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    squares = np.zeros((3, 4))
    for k in range(count):
        d = np.sin(x + k)
        squares = 0.99 * squares + d**2
        w = v - 0.05 * (1 + np.cos(np.pi * k / 20)) * d
        blend, y = min(k / 15, 1), np.where(w < 0, -1, 1) * np.abs(w).mean(0)
        x = (1 - blend) * w + blend * y
        v = w - np.minimum((1 - inertia) * squares / squares.mean(), 1) * (w - x)
    return x, v


@pytest.mark.parametrize("inertia", [0.999, 0.9, 0.2])
def test_weighted_inertia_is_less_where_directions_are_larger(inertia):
    optimizer = _optimizer(inertia=inertia, inertia_rule="weighted")
    for count in (1, 8, 18):
        params, state = _run(optimizer, count)
        expected, floats = _weighted_by_hand(inertia, count)
        np.testing.assert_allclose(params["kernel"], expected, rtol=2e-5)
        leaf = stam_jax.quantized_leaves(state, params)["kernel"]
        np.testing.assert_allclose(leaf.latent, floats, rtol=2e-5)
    same, _ = _steps(_optimizer(inertia=inertia), 18)
    assert jnp.max(jnp.abs(same["kernel"] - params["kernel"])) > 1e-6


def test_weighted_inertia_is_the_same_for_all_weights_until_there_is_a_gradient():
    params = {"kernel": jnp.array([[0.3, -0.5], [0.1, 0.2]]), "bias": jnp.ones(2)}
    still = jax.tree.map(jnp.zeros_like, params)
    method = stam_jax.stam(0.1, inertia=1.0, relaxation=stam_jax.Hard())
    optimizer = weighted.weighted(method, inertia=0.9, selection=stam_jax.select(params))
    _, state = optimizer.update(still, optimizer.init(params), params)
    y = np.array([[0.2, -0.35], [0.2, 0.35]])
    latent = stam_jax.quantized_leaves(state, params)["kernel"].latent
    np.testing.assert_allclose(latent, 0.9 * params["kernel"] + 0.1 * y, rtol=1e-6)


def test_averaged_weights_are_the_projection_of_the_mean_of_the_float_ones():
    latents = []
    for count in range(1, 21):
        params, state = _run(_optimizer(inertia=1.0), count)
        latents.append(np.asarray(stam_jax.quantized_leaves(state, params)["kernel"].latent, np.float64))
    averaged = _optimizer(inertia=1.0, average_from=0.5)
    params, state = _run(averaged, 19)
    np.testing.assert_allclose(
        stam_jax.quantized_leaves(state, params)["kernel"].latent, latents[18], rtol=1e-5
    )
    params, state = _run(averaged, 20)
    mean = np.mean(latents[9:], axis=0)
    expected = np.where(mean < 0, -1, 1) * np.abs(mean).mean(0)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(stam_jax.hard_params(state, params)["kernel"], expected, rtol=1e-5)
    assert np.max(np.abs(mean - latents[-1])) > 1e-3


def test_the_mean_of_float_weights_leaves_the_other_leaves_alone():
    params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, "b": {"kernel": jnp.ones((4, 2))}}
    gradients = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    found = []
    for average_from in (0.5, None):
        settings = TrainSettings(exclude=("last",), average_from=average_from)
        optimizer = optimizers.build(settings, optimizers.choose(params, settings), steps=8, epoch=2)
        moved, state = params, optimizer.init(params)
        for _ in range(8):
            updates, state = optimizer.update(gradients, state, moved)
            moved = optax.apply_updates(moved, updates)
        assert stam_jax.quantized_leaves(state, moved).keys() == {"a/kernel"}
        found.append(moved)
    averaged, plain = found
    np.testing.assert_allclose(averaged["a"]["bias"], plain["a"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(averaged["b"]["kernel"], plain["b"]["kernel"], rtol=1e-6)
    assert np.max(np.abs(averaged["a"]["kernel"] - plain["a"]["kernel"])) > 1e-3


def test_the_step_size_falls_in_a_straight_line_from_a_share_of_the_run_on():
    optimizer = _optimizer(method="float", decay_from=0.5)
    params = {"kernel": jnp.zeros((3, 4))}
    state, steps = optimizer.init(params), []
    for _ in range(20):
        updates, state = optimizer.update({"kernel": jnp.ones((3, 4))}, state, params)
        steps.append(-float(jax.tree.leaves(updates)[0][0, 0]))
    np.testing.assert_allclose(steps, [0.1] * 10 + [0.1 * (10 - k) / 10 for k in range(10)], rtol=1e-5)


def test_the_linear_blend_is_stam_with_inertia_1():
    (params, hard), (wanted, wanted_hard) = (
        _steps(optimizer, 18) for optimizer in (_optimizer(method="linear_blend"), _optimizer(inertia=1.0))
    )
    np.testing.assert_array_equal(params["kernel"], wanted["kernel"])
    np.testing.assert_array_equal(hard["kernel"], wanted_hard["kernel"])


def test_the_penalty_of_the_proximal_method_grows_from_the_first_number_to_the_second():
    optimizer = _optimizer(method="stam_proximal", penalty=(0.1, 10.0))
    penalty = lambda k: jnp.where(k < 15, 0.1 * 100.0 ** (k / 15), jnp.inf)
    expected = stam_jax.stam(optax.cosine_decay_schedule(0.1, 20), penalty=penalty)
    for count in (8, 18):
        (params, _), (wanted, _) = _steps(optimizer, count), _steps(expected, count)
        np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)


@pytest.mark.parametrize(
    ("steps", "hard_from", "period"), [(20, 15, 5), (17, 13, 5), (19, 14, 5), (24, 18, 6)]
)
def test_a_penalty_that_is_restarted_grows_three_times(steps, hard_from, period):
    optimizer = _optimizer(steps=steps, method="stam_proximal", penalty=(0.1, 10.0), penalty_rule="restarted")
    penalty = lambda k: jnp.where(k < hard_from, 0.1 * 100.0 ** (k % period / period), jnp.inf)
    expected = stam_jax.stam(optax.cosine_decay_schedule(0.1, steps), penalty=penalty)
    for count in (4, 8, 12, 16):
        (params, _), (wanted, _) = _steps(optimizer, count), _steps(expected, count)
        np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)


def test_a_layerwise_penalty_goes_by_the_root_of_the_inputs():
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in (("a", (3, 4)), ("b", (12, 4)))}
    params["a"]["bias"] = jnp.zeros(4)
    gradients = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    chosen = TrainSettings(
        method="stam_proximal", penalty_rule="layerwise", penalty=(1.0, 1.0), momentum=0.0, weight_decay=0.0
    )
    found = {}
    for rule in ("growing", "layerwise"):
        settings = dataclasses.replace(chosen, penalty_rule=rule)
        optimizer = optimizers.build(settings, optimizers.choose(params, settings), steps=20, epoch=2)
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        found[rule] = optax.apply_updates(params, updates)
        assert stam_jax.quantized_leaves(state, found[rule]).keys() == {"a/kernel", "b/kernel"}
    for name, penalty in (("a", 2 / 3), ("b", 4 / 3)):
        # The scale is 1, and the penalty draws towards it what the gradient has moved away.
        moved = 1 - 0.1 * np.asarray(gradients[name]["kernel"], np.float64)
        expected = (moved + 0.1 * penalty) / (1 + 0.1 * penalty)
        np.testing.assert_allclose(found["layerwise"][name]["kernel"], expected, rtol=1e-6)
        assert np.max(np.abs(found["growing"][name]["kernel"] - expected)) > 1e-3
    np.testing.assert_array_equal(found["layerwise"]["a"]["bias"], found["growing"]["a"]["bias"])
    alone, growing = (
        _steps(_optimizer(method="stam_proximal", penalty=(0.1, 10.0), penalty_rule=rule), 12)[0]
        for rule in ("layerwise", "growing")
    )
    np.testing.assert_allclose(alone["kernel"], growing["kernel"], rtol=1e-6)


def _balanced_by_hand(start: float, every: int, hard_from: int, count: int) -> tuple[np.ndarray, list[float]]:
    """Float64: the weights after steps of size 0.1 along the gradients of `_steps`, and the penalties."""
    x = np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    project = lambda v: np.where(v < 0, -1, 1) * np.abs(v).mean(0)
    seen, penalty, penalties = project(x), start, []
    for k in range(count):
        y, w = project(x), x - 0.1 * np.sin(x + k)
        x = (w + 0.1 * penalty * y) / (1 + 0.1 * penalty) if k < hard_from else y
        if (k + 1) % every == 0 and k + 1 < hard_from:
            now = project(x)
            r, s = np.linalg.norm(x - now), penalty * np.linalg.norm(now - seen)
            penalty *= 2 if r > 10 * s else 0.5 if s > 10 * r else 1
            seen = now
        penalties.append(penalty)
    return x, penalties


@pytest.mark.parametrize(("start", "grows"), [(1e-3, True), (300.0, False)])
def test_a_balanced_penalty_doubles_or_halves_where_one_residual_is_far_from_the_other(start, grows):
    method = lambda penalty: stam_jax.stam(0.1, penalty=penalty)
    optimizer = balance.balanced(method, start=start, every=2, hard_from=15)
    for count in (5, 12, 18):
        expected, penalties = _balanced_by_hand(start, 2, 15, count)
        params, _ = _steps(optimizer, count)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-4)
    assert penalties[-1] > 2 * start if grows else penalties[-1] < start / 2


def test_the_proximal_method_can_balance_its_penalty():
    optimizer = _optimizer(epoch=30, method="stam_proximal", penalty=(1e-3, 10.0), penalty_rule="balanced")
    method = lambda penalty: stam_jax.stam(optax.cosine_decay_schedule(0.1, 20), penalty=penalty)
    every_third, every_step = (
        balance.balanced(method, start=1e-3, every=every, hard_from=15) for every in (3, 1)
    )
    for count in (14, 18):
        (params, _), (wanted, _) = _steps(optimizer, count), _steps(every_third, count)
        np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)
    (params, _), (other, _) = _steps(optimizer, 14), _steps(every_step, 14)
    assert np.max(np.abs(params["kernel"] - other["kernel"])) > 1e-4


def test_a_balanced_penalty_stays_finite_where_nothing_moves():
    method = lambda penalty: stam_jax.stam(0.0, penalty=penalty)
    _, state = _run(balance.balanced(method, start=1.0, every=1, hard_from=1000), 100)
    assert 1e3 < state.penalty < 1e12


@pytest.mark.parametrize("settings", [{}, {"decay_from": 0.5}], ids=["cosine", "held"])
def test_the_thresholds_of_prox_quant_add_up_to_the_setting(settings):
    steps = np.arange(15)
    sizes = 0.1 * np.minimum(1, (20 - steps) / 10) if settings else 0.05 * (1 + np.cos(np.pi * steps / 20))
    expected = stam_jax.prox_quant(
        optax.linear_schedule(0.1, 0.0, 10, transition_begin=10)
        if settings
        else optax.cosine_decay_schedule(0.1, 20),
        growth=0.2 / float(np.vdot(sizes, steps)),
        hard_from=15,
        quantizer=stam_jax.Binary(),
    )
    optimizer = _optimizer(method="prox_quant", threshold=0.2, **settings)
    for count in (8, 18):
        (params, _), (wanted, _) = _steps(optimizer, count), _steps(expected, count)
        np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "stam", "threshold": 0.1}, "--threshold: only with --method prox_quant"),
        ({"method": "parq", "pull": 0.1}, "--pull: only with --method stam; got --method parq"),
        ({"method": "stam", "penalty": (1.0, 2.0)}, "--penalty: only with --method stam_proximal"),
        ({"penalty_rule": "balanced"}, "--penalty-rule: only with --method stam_proximal"),
        ({"method": "parq", "average_from": 0.9}, "--average-from: only with --method stam"),
        ({"method": "parq", "anneal_inertia": (0.5, 0.9)}, "--anneal-inertia: only with --method stam"),
        ({"anneal_inertia": (0.9, 0.5)}, "--anneal-inertia: the second .*got 0.9 and 0.5 of 20 steps"),
        ({"anneal_inertia": (0.5, 0.9), "pull": 0.1}, "--anneal-inertia and --pull: one of them"),
        ({"method": "parq", "inertia_rule": "weighted"}, "--inertia-rule: only with --method stam"),
        ({"inertia_rule": "weighted", "pull": 0.1}, "--inertia-rule and --pull: one of them"),
        ({"inertia_rule": "weighted", "average_from": 0.9}, "--inertia-rule and --average-from: one of them"),
        ({"average_from": 0.5, "inertia": 0.0}, "--average-from: needs .*got inertia 0.0, and 10 of 20"),
        ({"average_from": 0.99}, "--average-from: needs .*and 20 of 20 steps to begin after"),
        ({"box": 1.0, "ridge": 0.1}, "--box and --ridge: one of them"),
        ({"decay_epochs": (1,), "decay_from": 0.5}, "--decay-epochs and --decay-from: one of them"),
        ({"warmup_epochs": 40}, "--warmup-epochs: 40 should be less than --epochs, 40"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(SettingsError, match=said):
        _optimizer(**settings)


def test_settings_that_cannot_work_are_refused_before_training(digits):
    with pytest.raises(SettingsError, match="--batch-size: 1198 images are more than the 1197"):
        Trainer(TrainSettings(batch_size=1198), digits)
    with pytest.raises(SettingsError, match="--training-images: digits has 1197 to learn from; got 1198"):
        Trainer(TrainSettings(training_images=1198), digits)
    with pytest.raises(SettingsError, match="--batch-size: 64 images are more than the 63"):
        Trainer(TrainSettings(training_images=63), digits)
    with pytest.raises(SettingsError, match=r"--exclude: .*'nowhere' matches no leaf"):
        Trainer(TrainSettings(exclude=("nowhere",)), digits)
    with pytest.raises(SettingsError, match="leaves no kernel binary"):
        Trainer(TrainSettings(exclude=("*kernel",)), digits)


def test_float_runs_are_evaluated_like_binary_ones(digits, tmp_path):
    metrics = []
    row = Trainer(TrainSettings(method="float", width=0.125, epochs=1), digits).run(
        0, tmp_path, Progress(metrics=metrics.append)
    )
    for measured in (row, metrics[0]):
        assert measured["relaxed_accuracy"] is not None
        assert measured["relaxed_accuracy_running_statistics"] is not None
        assert measured["hard_accuracy"] is None


def test_a_run_that_diverges_says_so(digits, tmp_path):
    trainer = Trainer(TrainSettings(width=0.125, epochs=1, learning_rate=1e30), digits)
    with pytest.raises(DivergedError, match="stam: the loss is nan in epoch 1"):
        trainer.run(3, tmp_path)


def test_the_picture_is_drawn_for_float_and_binary_runs(tmp_path):
    def metrics(hard: float | None) -> list[dict[str, Any]]:
        return [
            {
                "epoch": epoch,
                "relaxed_accuracy": 0.9,
                "hard_accuracy": hard,
                "quantisation_gap": None if hard is None else 0.5,
                "sign_flips": None if hard is None else 0.1,
            }
            for epoch in (1, 2)
        ]

    plots.curves(tmp_path / "curves.png", {"float": [metrics(None)], "stam": [metrics(0.8)] * 2})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_accuracy_ends_above_every_curve_and_below_what_the_second_half_shows():
    row = lambda relaxed, hard: {"relaxed_accuracy": relaxed, "hard_accuracy": hard}
    early, late = [row(0.1, 0.1), row(0.7, 0.2)], [row(0.6, 0.4), row(0.6, 0.5)]
    ends = plots._accuracy_range({"float": [[row(0.3, None), row(0.65, None)]], "stam": [early + late]})
    assert ends == pytest.approx((0.35, 0.75))
    ends = plots._accuracy_range({"stam": [[row(0.02, 0.99)]]})
    assert ends[0] == 0.0
    assert 1.0 < ends[1] < 1.01, "no room is left above what can be, but for the line itself"


def _keep(folder: Path, contents: dict[str, Any]) -> None:
    """Write files of a run as they are kept."""
    folder.mkdir(parents=True)
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value))


SETTINGS = {
    "model": "vgg11", "dataset": "cifar10", "width": 1.0, "precision": "float32", "epochs": 3,
    "batch_size": 64, "exclude": ["last"],
}  # fmt: skip


def _marked(name: str) -> str:
    begin = f"<!-- {name}: begin (written by `python -m experiments report`) -->"
    return f"before\n{begin}\nold\n<!-- {name}: end -->\nafter"


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A folder of a comparison and of a study."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    common = {
        "method": "stam",
        "relaxed_accuracy": 0.9,
        "hard_accuracy_running_statistics": 0.7,
        "relaxed_accuracy_running_statistics": None,
        "binary_share": 0.5,
        "bytes_float": 1000,
        "bytes_packed": 100,
    }
    rows = [common | {"hard_accuracy": hard} for hard in (0.8, 0.9)]
    environment = {"machine": "2 CPU cores", "packages": {"jax": "0.10"}}
    contents = {"result.json": rows, "config.json": SETTINGS, "environment.json": environment}
    _keep(tmp_path / "results" / "one", contents)
    asked = {"question": "Which?", "trials": ["epochs=3", "epochs=4"], "settings": SETTINGS}
    _keep(tmp_path / "results" / "two", {"study.json": asked})
    for seed, row in enumerate(rows):
        _keep(tmp_path / "results" / "two" / f"epochs=3-seed{seed}", {"result.json": [row]})
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "headline",
            [
                "| method | vgg11 on cifar10,<br>all kernels but last binary, 3 epochs |",
                "| stam | 85.00 ± 7.07 (2) |",
            ],
        ),
        (
            "comparisons",
            [
                "### vgg11 on cifar10, all kernels but last binary",
                "| stam (2) | 85.00 ± 7.07 | 90.00 ± 0.00 | 70.00 ± 0.00 | - | 50.0% | 1,000 | 100 |",
            ],
        ),
        (
            "studies",
            ["### Which?", "| epochs=3 | 85.00 ± 7.07 | 90.00 ± 0.00 | 2 |", "| epochs=4 | - | - | 0 |"],
        ),
    ],
)
def test_the_report_says_mean_and_deviation_of_the_kept_runs(kept, name, lines):
    text = report.updated(_marked(name), kept.parent / "page.md", kept)
    for line in lines:
        assert line in text.splitlines()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter")


def test_the_report_sets_the_same_network_in_the_same_scope_beside_what_is_published(kept):
    text = report.updated(_marked("published"), kept.parent / "page.md", kept)
    (line,) = [line for line in text.splitlines() if line.startswith("| vgg11 | cifar10 ")]
    assert line.startswith("| vgg11 | cifar10 | all kernels but last binary | 89.21 |")
    assert line.endswith("| 85.00 ± 7.07 (2), 3 epochs |")
    assert text.count("| not run |") == 6


def test_the_report_tells_results_of_fewer_images_apart(kept):
    (config,) = kept.glob("*/config.json")
    config.write_text(json.dumps(SETTINGS | {"training_images": 2500}))
    assert "### vgg11 on 2,500 images of cifar10, all" in report.updated(
        _marked("comparisons"), kept.parent / "page.md", kept
    )
    text = report.updated(_marked("published"), kept.parent / "page.md", kept)
    assert text.count("| not run |") == 7


def test_a_page_without_marks_is_refused(kept):
    with pytest.raises(SettingsError, match=r"page\.md holds the marks of no part; there are headline, "):
        report.updated("a page without marks", kept.parent / "page.md", kept)
    with pytest.raises(SettingsError, match="holds no part"):
        report.updated(_marked("headline").replace(": end", ""), kept.parent / "page.md", kept)
