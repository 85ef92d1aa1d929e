"""Networks for digits, trained in `stam` by many an optimizer: binary ones against their float twins."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from stam_jax import quantize, stam
from tests import helpers

STEPS, HARD_FROM, BATCH, SEEDS, TRAINED = 300, 225, 64, 2, 1347
WIDTHS = (64, 192, 192, 10)
POINTS = 1.5


class Images(NamedTuple):
    images: Any
    labels: Any


@functools.cache
def digits() -> tuple[Images, Images]:
    """The training images and the held-out ones, standardized."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    images = (images - np.mean(images[:TRAINED])) / np.std(images[:TRAINED])
    part = lambda rows: Images(np.float32(images[rows]), labels[rows])
    return part(slice(0, TRAINED)), part(slice(TRAINED, None))


def begin(rng: np.random.Generator) -> Any:
    """The parameters of a dense network, all of whose kernels are quantized, the first and the last too."""
    return {
        f"layer{i}": {
            "kernel": np.float32(rng.normal(size=shape) * np.sqrt(2 / shape[0])),
            "bias": np.zeros(shape[1], np.float32),
        }
        for i, shape in enumerate(itertools.pairwise(WIDTHS))
    }


def outputs(params: Any, images: jax.Array) -> jax.Array:
    *hidden, last = (params[name] for name in sorted(params))
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ last["kernel"] + last["bias"]


def loss(params: Any, data: Images) -> jax.Array:
    logits = outputs(params, data.images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data.labels))


def accuracy(params: Any) -> float:
    """Of the held-out images, in percent."""
    _, held_out = digits()
    logits = helpers.quick_jit(outputs)(params, held_out.images)
    return 100 * float(np.mean(np.argmax(logits, axis=-1) == held_out.labels))


def train(optimizer: optax.GradientTransformation, seeds: int = SEEDS, steps: int = STEPS) -> list[Any]:
    """Parameters and state at the end, for each seed."""

    @helpers.quick_jit
    def run(params: Any, data: Images, batches: jax.Array) -> Any:
        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            gradients = jax.grad(loss)(params, Images(data.images[rows], data.labels[rows]))
            return helpers.take_step(optimizer, gradients, state, params), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0]

    def start(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return begin(rng), digits()[0], rng.integers(TRAINED, size=(steps, BATCH))

    return [run(*start(seed)) for seed in range(seeds)]


def falling(learning_rate: float) -> optax.Schedule:
    return optax.linear_schedule(learning_rate, 0.0, STEPS)


RECIPES = {
    "sgd": optax.sgd(falling(0.1), momentum=0.9),
    "adam": optax.adam(falling(2e-3)),
    "adamw": optax.adamw(falling(2e-3)),
    "lion": optax.lion(falling(5e-4)),
    "adafactor": optax.adafactor(falling(1e-2)),
    "lamb": optax.lamb(falling(1e-2)),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(4e-3, warmup_steps=STEPS // 10),
    "muon": optax.contrib.muon(falling(1e-2)),
}


# One default suits all but one, whose average is of the latent weights as it has moved them: nothing should
# pull at those.
HOLD = dict.fromkeys(RECIPES, 16.0) | {"schedule_free_adamw": 0.0}


def always(*fast: str, others: Any = ()) -> Any:
    """Some always, the others among the slow tests."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in others if name not in fast]
    return pytest.mark.parametrize("name", [*fast, *slow])


@functools.cache
def float_accuracies(name: str) -> tuple[float, float]:
    """Of the float twin, which has the same steps, and of the same once its weights are rounded to binary."""
    runs = train(RECIPES[name])
    evaluated = [
        optax.contrib.schedule_free_eval_params(state, params) if name.startswith("schedule_free") else params
        for params, state in runs
    ]
    return np.mean([(accuracy(p), accuracy(quantize(p))) for p in evaluated], axis=0)


def assert_binary_as_good_as_float(name: str, optimizer: optax.GradientTransformation) -> None:
    binary = [quantize(params) for params, _ in train(optimizer)]
    for params in binary:
        for layer in params.values():
            assert np.all(np.isclose(np.abs(layer["kernel"]), np.max(np.abs(layer["kernel"]), axis=0)))
    as_float, rounded = float_accuracies(name)
    found = np.mean([accuracy(params) for params in binary])
    assert as_float > 97
    assert found > as_float - POINTS
    assert rounded < as_float - 2 * POINTS  # Without training for it there is no binary network.


@always("adamw", others=RECIPES)
def test_a_binary_network_is_as_good_as_its_float_twin_by_any_optimizer(name):
    optimizer = stam(RECIPES[name], hard_from=HARD_FROM, hold=HOLD[name])
    assert_binary_as_good_as_float(name, optimizer)


@always(others=("sgd", "adamw"))
def test_so_it_is_with_stam_behind_the_optimizer(name):
    optimizer = optax.chain(RECIPES[name], stam(hard_from=HARD_FROM))
    assert_binary_as_good_as_float(name, optimizer)


DOCUMENTED = {
    "around": stam(optax.adamw(1e-3), hard_from=90),
    "behind": optax.chain(optax.sgd(0.1), stam(hard_from=90)),
    "behind more": optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9), stam(hard_from=90)
    ),
}


@always("behind more", others=DOCUMENTED)
def test_the_forms_that_the_documentation_names_train(name):
    data, _ = digits()
    ((params, _),) = train(DOCUMENTED[name], seeds=1, steps=120)
    np.testing.assert_allclose(quantize(params)["layer0"]["kernel"], params["layer0"]["kernel"], rtol=1e-5)
    quantized_loss = helpers.quick_jit(lambda params: loss(quantize(params), data))
    assert quantized_loss(params) < 0.15 * quantized_loss(begin(np.random.default_rng(0)))
