"""The parts of the experiments: images, networks, evaluation, files, the picture and the report."""

from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console
from sklearn.datasets import load_digits

import stam_jax
from experiments.cli import main
from experiments.config import METHODS, Relaxation, SettingsError, TrainSettings
from experiments.data import image_sets
from experiments.data.devices import Layout
from experiments.networks import evaluation, float_files, models
from experiments.reporting import pages, plots, results, run_folder, tables
from experiments.training import optimizers
from experiments.training.run import Trainer
from stam_jax import relaxations


@pytest.fixture(scope="module")
def digits() -> image_sets.Dataset:
    return image_sets.load("digits")


@pytest.fixture(scope="module")
def network(digits: image_sets.Dataset) -> models.Network:
    build = lambda key: models.build("resnet8", digits, width=0.25, key=key)
    graph = models.split(nnx.eval_shape(build, jax.random.key(0)))[0]
    return nnx.merge(graph, *jax.jit(lambda key: models.split(build(key))[1:])(jax.random.key(0)))


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
    np.testing.assert_array_equal(digits.test.images, image_sets.load("digits").test.images)


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
    still = image_sets.Dataset(**{**vars(digits), "shift": 0})
    np.testing.assert_array_equal(still.augment(jax.random.key(0), images), images)
    mirroring = image_sets.Dataset(**{**vars(still), "flip": True})
    moved = np.asarray(mirroring.augment(jax.random.key(0), images))
    same = np.all(moved == np.asarray(images), axis=(1, 2, 3))
    mirrored = np.all(moved == np.asarray(images)[:, :, ::-1], axis=(1, 2, 3))
    assert np.asarray(same | mirrored).all()
    assert 10 < np.sum(mirrored) < 54


def binary_leaves(params: Any, **settings: Any) -> dict[str, stam_jax.Quantizer]:
    """The quantizer of each leaf that has one, by path, at some settings."""
    rows = stam_jax.tabulate(params, optimizers.choose(params, TrainSettings(**settings))).rows
    return {row.path: row.quantizer for row in rows if row.quantizer is not None}


def kernels(params: Any) -> set[str]:
    return {path for path in float_files.to_arrays(params) if path.endswith("kernel")}


def test_every_kernel_is_binary_and_nothing_else(network):
    params = models.split(network)[1]
    assert binary_leaves(params).keys() == kernels(params)


@pytest.mark.parametrize("exclude", [("stem", "head"), ("stem/*", "head/kernel"), ("*stem*", "head", "head")])
def test_excluded_modules_stay_in_float(network, exclude):
    params = models.split(network)[1]
    kept = kernels(params) - binary_leaves(params, exclude=exclude).keys()
    assert kept == {"stem/conv/kernel", "head/kernel"}


@pytest.mark.parametrize(
    ("scale", "shape"), [("channel", (1, 1, 1, 4)), ("tensor", (1,) * 4), ("none", (1,) * 4)]
)
def test_the_scale_says_which_weights_share_one(network, scale, shape):
    params = models.split(network)[1]
    kernel = params["stem"]["conv"]["kernel"]
    scales = np.asarray(binary_leaves(params, scale=scale)["stem/conv/kernel"].scales(kernel))
    assert scales.shape == shape
    axes = {"channel": (0, 1, 2), "tensor": (0, 1, 2, 3)}
    expected = np.mean(np.abs(np.asarray(kernel, np.float64)), axis=axes[scale]) if scale in axes else 1.0
    np.testing.assert_allclose(scales.reshape(-1), expected, rtol=1e-6)


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
    arrays = float_files.to_arrays(new)
    np.testing.assert_allclose(arrays["stem/norm/mean"], np.mean(means, axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(arrays["stem/norm/var"], np.mean(variances, axis=0), rtol=1e-4)


def test_evaluation_leaves_the_network_as_it_was(digits, network):
    graph, params, stats = models.split(network)
    before = float_files.to_arrays(stats)
    evaluation.batch_statistics(
        graph, params, stats, digits.train.images[:64], batch_size=64, layout=Layout()
    )
    evaluation.accuracy(graph, params, stats, digits.validation, Layout())
    for name, array in float_files.to_arrays(stats).items():
        np.testing.assert_array_equal(array, before[name])


def test_accuracy_counts_every_image_once_across_batches(digits, network):
    graph, params, stats = models.split(network)
    apply = jax.jit(lambda params, stats, images: nnx.merge(graph, params, stats)(images))
    logits = np.asarray(apply(params, stats, digits.train.images))
    expected = np.mean(np.argmax(logits, axis=-1) == digits.train.labels)
    assert len(digits.train.labels) > 2 * 500
    assert evaluation.accuracy(graph, params, stats, digits.train, Layout()) == expected


def test_a_network_is_quantized_in_those_leaves_alone_that_are_to_be(network):
    params = models.split(network)[1]
    hard, leaves = evaluation.projection(params, {"head": None, "*": stam_jax.Binary()})(params)
    assert leaves.keys() == kernels(params) - {"head/kernel"}
    arrays = float_files.to_arrays(hard)
    for path, before in float_files.to_arrays(params).items():
        if path not in leaves:
            np.testing.assert_array_equal(arrays[path], before)
            continue
        np.testing.assert_array_equal(arrays[path], leaves[path])
        sizes = np.abs(arrays[path]).reshape(-1, before.shape[-1])
        np.testing.assert_array_equal(sizes, np.broadcast_to(sizes[0], sizes.shape))


def test_a_kernel_of_zeros_is_quantized():
    params = {"kernel": jnp.zeros((3, 2))}
    _, leaves = evaluation.projection(params, {"*": stam_jax.Binary()})(params)
    np.testing.assert_array_equal(leaves["kernel"], params["kernel"])


def test_hard_weights_that_are_not_binary_are_refused(network):
    class Liar(stam_jax.Binary):
        def levels(self, scales: jax.Array) -> Any:
            return -2 * scales, scales

    params = models.split(network)[1]
    project = evaluation.projection(params, {"*": Liar()})
    with pytest.raises(AssertionError, match="is not quantized"):
        project(params)


def test_state_is_not_filled_from_arrays_that_do_not_fit(network):
    params = nnx.state(network, nnx.Param)
    arrays = float_files.to_arrays(params)
    with pytest.raises(ValueError, match=r"head/bias .* is missing"):
        float_files.from_arrays({k: v for k, v in arrays.items() if k != "head/bias"}, params)
    with pytest.raises(ValueError, match=r"head/bias should have shape \(10,\) but is of shape \(9,\)"):
        float_files.from_arrays(arrays | {"head/bias": np.zeros(9)}, params)


@pytest.mark.parametrize("method", METHODS[1:])
def test_each_method_ends_at_its_binary_network(digits, method):
    """The relaxed weights of the last step are hard ones: nothing is left to round."""
    settings = TrainSettings(method=method)
    params = {"kernel": jax.random.normal(jax.random.key(1), (8, 4))}
    quantizer = optimizers.choose(params, settings)
    optimizer = optimizers.build(settings, quantizer, steps=100, epoch=10)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update({"kernel": jnp.full((8, 4), 1e-3)}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), stam_jax.diagnostics.quantization_gap(params, quantizer)

    _, gap = jax.lax.scan(step, (params, optimizer.init(params)), length=100)
    assert gap[-1] < 1e-3
    if method not in ("binary_connect", "straight_through", "straight_through_clipped", "bop"):
        assert gap[10] > 0.05


def _run(optimizer: optax.GradientTransformation, count: int) -> tuple[Any, Any]:
    """The weights and the optimizer's state after some steps along gradients that change."""
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
    params, _ = _run(optimizer, count)
    return params, stam_jax.quantize(params)


def _optimizer(*, steps: int = 20, epoch: int = 2, **settings: Any) -> optax.GradientTransformation:
    """The optimizer of a run that is hard for its last quarter: of 20 steps from step 15 on."""
    chosen = TrainSettings(momentum=0.0, weight_decay=0.0, nesterov=False, **settings)
    params = {"kernel": jnp.zeros((3, 4))}
    return optimizers.build(chosen, optimizers.choose(params, chosen), steps=steps, epoch=epoch)


@pytest.mark.parametrize("relaxation", get_args(Relaxation))
def test_each_relaxation_of_stam_is_soft_before_the_hard_phase_and_hard_in_it(relaxation):
    optimizer = _optimizer(relaxation=relaxation)
    params, hard = _steps(optimizer, 8)
    assert jnp.max(jnp.abs(params["kernel"] - hard["kernel"])) > 1e-3
    params, hard = _steps(optimizer, 16)
    np.testing.assert_allclose(params["kernel"], hard["kernel"], rtol=1e-6)


_COSINE = optax.cosine_decay_schedule(0.1, 20)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"hold": 0.5}, {"inertia": stam_jax.StepInertia(0.5)}),
        ({"project": "first"}, {"project": "first"}),
        ({"method": "linear_blend", "inertia": 0.9}, {"inertia": 0.9}),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_settings_of_stam_are_arguments_of_the_engine(settings, arguments):
    arguments = {"inertia": stam_jax.StepInertia(16.0)} | arguments
    blend = relaxations.LinearBlend(lambda k: jnp.minimum(k / 15, 1))
    expected = stam_jax.three_block_splitting(
        optax.sgd(_COSINE), quantizer=stam_jax.Binary(), relaxation=blend, **arguments
    )
    (params, hard), (wanted, wanted_hard) = _steps(_optimizer(**settings), 18), _steps(expected, 18)
    np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)
    np.testing.assert_allclose(hard["kernel"], wanted_hard["kernel"], rtol=2e-5)
    plain, _ = _steps(_optimizer(), 18)
    assert jnp.max(jnp.abs(plain["kernel"] - params["kernel"])) > 1e-5


@pytest.mark.parametrize(("settings", "own"), [({}, {}), ({"method": "linear_blend"}, {"hold": 0})], ids=str)
def test_stam_with_its_defaults_is_that_of_the_library_behind_sgd(settings, own):
    """To the last bit, with momentum and weight decay too."""
    chosen = TrainSettings(momentum=0.9, nesterov=True, weight_decay=0.1, **settings)
    params = {"kernel": jnp.zeros((3, 4))}
    optimizer = optimizers.build(chosen, optimizers.choose(params, chosen), steps=20, epoch=2)
    expected = optax.chain(
        optax.add_decayed_weights(0.1),
        optax.sgd(_COSINE, momentum=0.9, nesterov=True),
        stam_jax.stam(hard_from=15, **own),
    )
    for count in (8, 18):
        (params, _), (wanted, _) = _run(optimizer, count), _run(expected, count)
        np.testing.assert_array_equal(params["kernel"], wanted["kernel"])


@pytest.mark.parametrize(
    ("settings", "quantizer"),
    [
        ({"quantizer": "ternary"}, stam_jax.Ternary(axis=-1)),
        ({"quantizer": "uniform", "bits": 3, "scale": "tensor"}, stam_jax.Uniform(bits=3, axis=())),
        ({"quantizer": "power_of_two", "scale": "none"}, stam_jax.PowerOfTwo(axis=-1, scale=1.0)),
        ({"quantizer": "least_squares", "scale": "tensor"}, stam_jax.LeastSquares(axis=())),
    ],
    ids=lambda value: value.get("quantizer", "") if isinstance(value, dict) else "",
)
def test_the_quantizer_is_that_of_the_settings(settings, quantizer):
    assert binary_leaves({"kernel": jnp.ones((3, 4))}, **settings) == {"kernel": quantizer}


def test_weight_decay_may_see_the_latent_weights_of_any_method_that_has_them():
    def taken(method, decay_latent):
        chosen = TrainSettings(method=method, weight_decay=0.1, decay_latent=decay_latent)
        params = {"kernel": jnp.zeros((3, 4))}
        optimizer = optimizers.build(chosen, optimizers.choose(params, chosen), steps=20, epoch=2)
        return _run(optimizer, 8)[0]["kernel"]

    decayed = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(_COSINE, momentum=0.9, nesterov=True))
    expected, _ = _run(stam_jax.stam(decayed, hard_from=15), 8)
    np.testing.assert_allclose(taken("stam", True), expected["kernel"], rtol=1e-6)
    for method in ("stam", "binary_connect", "straight_through"):
        assert jnp.max(jnp.abs(taken(method, True) - taken(method, False))) > 1e-5


@pytest.mark.parametrize("decay_latent", [True, False])
def test_adamw_is_that_of_optax_around_or_before_the_method(decay_latent):
    chosen = TrainSettings(optimizer="adamw", weight_decay=0.1, nesterov=False, decay_latent=decay_latent)
    params = {"kernel": jnp.zeros((3, 4))}
    mine = optimizers.build(chosen, optimizers.choose(params, chosen), steps=20, epoch=2)
    adamw = optax.adamw(_COSINE, weight_decay=0.1)
    theirs = (
        stam_jax.stam(adamw, hard_from=15)
        if decay_latent
        else optax.chain(adamw, stam_jax.stam(hard_from=15))
    )
    np.testing.assert_allclose(_run(mine, 8)[0]["kernel"], _run(theirs, 8)[0]["kernel"], rtol=1e-6)


def test_smoothed_labels_share_a_part_of_the_weight_evenly(digits):
    trainer = Trainer(TrainSettings(width=0.125, label_smoothing=0.2), digits)
    logits = np.random.default_rng(0).normal(size=(5, 10))
    labels = np.array([0, 3, 3, 9, 1])
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.full((5, 10), 0.02) + 0.8 * np.eye(10)[labels]
    expected = -np.sum(targets * np.log(chances), axis=1)
    np.testing.assert_allclose(trainer._losses(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)


def _stam_by_hand(count: int) -> np.ndarray:
    """Float64: the relaxed weights of `stam` behind SGD with Nesterov momentum 0.9 and weight decay 0.1."""
    x = v = np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    trace = np.zeros((3, 4))
    sizes = []
    for k in range(count):
        d = np.sin(x + k) + 0.1 * x
        trace = d + 0.9 * trace
        w = v - 0.05 * (1 + np.cos(np.pi * k / 20)) * (d + 0.9 * trace)
        typical = np.mean(sizes) if sizes else 0.0
        kappa = 1 - min(16 * typical, 0.25) * typical
        sizes.append(np.mean(np.abs(w - v)) / np.mean(np.abs(w)))
        blend, y = min(k / 15, 1), np.where(w < 0, -1, 1) * np.abs(w).mean(0)
        x = (1 - blend) * w + blend * y
        v = x + kappa * (w - x)
    return x


def test_weight_decay_and_momentum_are_of_the_weights_in_use():
    chosen = TrainSettings(weight_decay=0.1)
    params = {"kernel": jnp.zeros((3, 4))}
    optimizer = optimizers.build(chosen, optimizers.choose(params, chosen), steps=20, epoch=2)
    for count in (1, 8, 18):
        np.testing.assert_allclose(_run(optimizer, count)[0]["kernel"], _stam_by_hand(count), rtol=2e-5)


def _admm_by_hand(count: int, momentum: float) -> np.ndarray:
    """Float64: the weights of ADMM along the gradients of `_run`, with multipliers anew every other step."""
    project = lambda v: np.where(v < 0, -1, 1) * np.abs(v).mean(0)
    x = v = np.linspace(-1.0, 1.0, 12).reshape(3, 4)
    trace = np.zeros((3, 4))
    for k in range(count):
        y = project(v)
        trace = np.sin(x + k) + (1 - momentum) * (x - y + (v - y)) + momentum * trace
        x = y if k >= 15 else x - 0.05 * (1 + np.cos(np.pi * k / 20)) * trace
        if k % 2 and k < 15:
            v = x + (v - y)
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_penalty_of_admm_is_1_whatever_the_momentum_sums_up(momentum):
    chosen = TrainSettings(method="admm_quant", momentum=momentum, nesterov=False, weight_decay=0.0)
    params = {"kernel": jnp.zeros((3, 4))}
    optimizer = optimizers.build(chosen, optimizers.choose(params, chosen), steps=20, epoch=2)
    for count in (1, 8, 15):
        expected = _admm_by_hand(count, momentum)
        np.testing.assert_allclose(_run(optimizer, count)[0]["kernel"], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_kernels_alone_decay_those_in_float_too(method):
    """Without gradients, what is in float moves by weight decay alone, and by the same in every method."""
    params = {name: {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.ones(2)} for name in ("a", "b")}
    chosen = TrainSettings(method=method, exclude=("b",), weight_decay=0.1, momentum=0.0, nesterov=False)
    optimizer = optimizers.build(chosen, optimizers.choose(params, chosen), steps=20, epoch=2)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.1 * 0.1 * 0.5, rtol=1e-6)
    for name in params:
        np.testing.assert_array_equal(updates[name]["bias"], 0)


def test_the_step_size_falls_in_a_straight_line_from_a_share_of_the_run_on():
    optimizer = _optimizer(method="float", decay_from=0.5)
    params = {"kernel": jnp.zeros((3, 4))}
    state, steps = optimizer.init(params), []
    for _ in range(20):
        updates, state = optimizer.update({"kernel": jnp.ones((3, 4))}, state, params)
        steps.append(-float(jax.tree.leaves(updates)[0][0, 0]))
    np.testing.assert_allclose(steps, [0.1] * 10 + [0.1 * (10 - k) / 10 for k in range(10)], rtol=1e-5)


def test_the_penalty_of_the_proximal_method_grows_from_the_first_number_to_the_second():
    optimizer = _optimizer(method="stam_proximal", penalty=(0.1, 10.0))
    penalty = lambda k: jnp.where(k < 15, 0.1 * 100.0 ** (k / 15), jnp.inf)
    expected = stam_jax.stam_proximal(_COSINE, penalty)
    for count in (8, 18):
        (params, _), (wanted, _) = _steps(optimizer, count), _steps(expected, count)
        np.testing.assert_allclose(params["kernel"], wanted["kernel"], rtol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"decay_from": 0.5}], ids=["cosine", "held"])
def test_the_thresholds_of_prox_quant_add_up_to_the_setting(settings):
    steps = np.arange(15)
    sizes = 0.1 * np.minimum(1, (20 - steps) / 10) if settings else 0.05 * (1 + np.cos(np.pi * steps / 20))
    rate = optax.linear_schedule(0.1, 0.0, 10, transition_begin=10) if settings else _COSINE
    growth = 0.2 / float(np.vdot(sizes, steps))
    expected = stam_jax.prox_quant(
        optax.sgd(rate),
        threshold=lambda k: rate(k) * growth * k,
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
        ({"method": "stam", "inertia": 0.9}, "--inertia: only with --method linear_blend; got --method stam"),
        ({"method": "parq", "hold": 9.0}, "--hold: only with --method stam; got --method parq"),
        ({"method": "stam", "penalty": (1.0, 2.0)}, "--penalty: only with --method stam_proximal"),
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
    for pattern in ("nowhere", "last", "*kernel", "*"):
        with pytest.raises(SettingsError, match="--exclude: "):
            Trainer(TrainSettings(exclude=(pattern,)), digits)


def test_a_comparison_says_which_differences_are_more_than_chance(capsys):
    rows = [
        {"method": method, "hard_accuracy": accuracy}
        for method, accuracy in (("float", None), ("stam", 0.99), ("parq", 0.985), ("prox_quant", 0.9))
    ]
    console = Console(width=200)
    tables.print_noise(rows, 450, console)
    printed = capsys.readouterr().out
    # Two standard deviations of a difference: 2 sqrt(2 x 0.99 x 0.01 / 450).
    assert "450 test images is 0.22 points. Less than 1.3 points" in printed
    assert "below the best: prox_quant by 9.0." in printed
    tables.print_noise(rows[:3], 450, console)
    assert "not told apart" in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [(2,), (1, 2)], ids=len)
@pytest.mark.parametrize("methods", [METHODS[:1], METHODS[:8], METHODS], ids=len)
def test_the_picture_has_a_line_for_each_method_whatever_their_number(tmp_path, methods, epochs):
    def metrics(hard: float | None) -> list[dict[str, Any]]:
        share = None if hard is None else 0.1
        row = {"relaxed_accuracy": 0.9, "hard_accuracy": hard, "quantization_gap": share, "sign_flips": share}
        return [row | {"epoch": epoch} for epoch in epochs]

    lines = {method: [metrics(None if method == "float" else 0.8)] * 2 for method in methods}
    plots.curves(tmp_path / "curves.png", lines)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len({plots._colors(lines)[method] for method in methods[:8]}) == len(methods[:8])


def test_the_picture_of_accuracy_ends_above_every_curve_and_below_what_the_second_half_shows():
    row = lambda relaxed, hard: {"relaxed_accuracy": relaxed, "hard_accuracy": hard}
    early, late = [row(0.1, 0.1), row(0.7, 0.2)], [row(0.6, 0.4), row(0.6, 0.5)]
    ends = plots._accuracy_range({"float": [[row(0.3, None), row(0.65, None)]], "stam": [early + late]})
    assert ends == pytest.approx((0.35, 0.75))
    ends = plots._accuracy_range({"stam": [[row(0.02, 0.99)]]})
    assert ends[0] == 0.0
    assert 1.0 < ends[1] < 1.01, "no room is left above what can be, but for the line itself"


SETTINGS = {
    "model": "vgg11", "dataset": "cifar10", "width": 1.0, "precision": "float32", "epochs": 3,
    "batch_size": 64, "exclude": ["head"], "methods": ["stam"], "seeds": 2,
}  # fmt: skip


def _marked(name: str) -> str:
    begin = f"<!-- {name}: begin (written by `python -m experiments report`) -->"
    return f"before\n{begin}\nold\n<!-- {name}: end -->\nafter"


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A folder of a comparison and of a study."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "_COMPARISONS", ("one",))
    common = {
        "method": "stam",
        "relaxed_accuracy": 0.9,
        "hard_accuracy_running_statistics": 0.7,
        "relaxed_accuracy_running_statistics": None,
        "binary_share": 0.5,
        "bytes_float": 1000,
        "bytes_packed": 100,
    }
    rows = [common | {"seed": seed, "hard_accuracy": hard} for seed, hard in enumerate((0.8, 0.9))]
    measured = {"epoch": 3, "quantization_gap": 0.1, "sign_flips": 0.1, "relaxed_accuracy": 0.9}
    metrics = [measured | {"method": "stam", "seed": seed, "hard_accuracy": 0.8} for seed in (0, 1)]
    environment = {"machine": "2 CPU cores", "packages": {"jax": "0.10"}}
    for name, config, label in (
        ("one", SETTINGS, {}),
        (
            "two",
            {"question": "Which?", "seeds": 2, "trials": ["epochs=3"], "settings": SETTINGS},
            {"trial": "epochs=3"},
        ),
    ):
        (tmp_path / "results" / name).mkdir(parents=True)
        labeled = [[label | row for row in each] for each in (rows, metrics)]
        results.write(tmp_path / "results" / name, results.Results(config, [environment], *labeled))
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "headline",
            [
                "| method | vgg11 on cifar10,<br>3 epochs |",
                "| float | - |",
                "| parq | - |",
                "| stam | **85.00 ± 7.07 (2)** |",
            ],
        ),
        (
            "comparisons",
            [
                "### vgg11 on cifar10, all kernels but head binary",
                "3 epochs, batches of 64, float32; 2 CPU cores, jax 0.10; "
                "`python -m experiments compare --config results/one/config.json`",
                "| stam (2) | 85.00 ± 7.07 | 70.00 ± 0.00 | 50.0% | 1,000 | 100 |",
            ],
        ),
    ],
)
def test_the_report_says_mean_and_deviation_of_the_kept_runs(kept, name, lines):
    text = pages.updated(_marked(name), kept.parent / "page.md", kept)
    for line in lines:
        assert line in text.splitlines()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter")


def test_the_report_says_of_float_the_accuracies_of_the_float_network(kept):
    found = results.read(kept / "one")
    binary = {"hard_accuracy": None, "hard_accuracy_running_statistics": None, "bytes_packed": None}
    trained = {"method": "float", "relaxed_accuracy_running_statistics": 0.8, "binary_share": 0.0}
    rows = [{**found.rows[0], **binary, **trained}, *found.rows]
    results.write(kept / "one", found._replace(rows=rows))
    lines = pages.updated(_marked("comparisons"), kept.parent / "page.md", kept).splitlines()
    assert "| float (1) | 90.00 | 80.00 | 0.0% | 1,000 | - |" in lines


def test_the_report_sets_the_same_network_in_the_same_scope_beside_what_is_published(kept):
    text = pages.updated(_marked("published"), kept.parent / "page.md", kept)
    (line,) = [line for line in text.splitlines() if line.startswith("| vgg11 | cifar10 ")]
    assert line.startswith("| vgg11 | cifar10 | all kernels but head binary | 89.21 |")
    assert line.endswith("| 85.00 ± 7.07 (2), 3 epochs |")
    assert text.count("| not run |") == 6


def test_the_report_tells_results_of_fewer_images_apart(kept):
    run_folder.write_json(kept / "one" / "config.json", SETTINGS | {"training_images": 2500})
    assert "### vgg11 on 2,500 images of cifar10, all" in pages.updated(
        _marked("comparisons"), kept.parent / "page.md", kept
    )
    text = pages.updated(_marked("published"), kept.parent / "page.md", kept)
    assert text.count("| not run |") == 7


def test_the_report_tells_quantizers_apart(kept):
    run_folder.write_json(kept / "one" / "config.json", SETTINGS | {"quantizer": "ternary"})
    text = pages.updated(_marked("comparisons"), kept.parent / "page.md", kept)
    assert "### vgg11 on cifar10, all kernels but head ternary" in text
    text = pages.updated(_marked("published"), kept.parent / "page.md", kept)
    assert text.count("| not run |") == 7


def test_the_command_writes_pages_in_place(kept, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", kept)
    page = kept.parent / "page.md"
    page.write_text(_marked("headline"))
    assert main(["report", str(page)]) == 0
    assert "| stam | **85.00 ± 7.07 (2)** |" in page.read_text()


def test_a_page_without_marks_is_refused(kept):
    with pytest.raises(SettingsError, match=r"page\.md holds the marks of no part; there are headline, "):
        pages.updated("a page without marks", kept.parent / "page.md", kept)
    with pytest.raises(SettingsError, match="holds no part"):
        pages.updated(_marked("headline").replace(": end", ""), kept.parent / "page.md", kept)


def test_what_is_kept_says_which_version_made_it():
    for folder in (path.parent for path in pages.RESULTS.glob("*/config.json")):
        kept = results.read(folder)
        assert all(kept.environments[row["environment"]]["git"]["commit"] for row in kept.rows)
        assert (folder / run_folder.CURVES).is_file()
