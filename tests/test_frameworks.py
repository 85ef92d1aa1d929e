"""One small regression on plain trees, Flax Linen, Flax NNX and Equinox: the same maths, the same run."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from stam_jax import Binary, LinearBlend, StamState, hard_params, quantized_leaves, select, stam
from tests import helpers
from tests.methods import METHODS

STEPS, FEW = 60, 6
rng = np.random.default_rng(0)
INPUTS = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
TARGETS = jnp.tanh(INPUTS @ jnp.sign(jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)))
START = {
    "body": {"kernel": jnp.asarray(0.5 * rng.normal(size=(4, 8)), jnp.float32), "bias": jnp.zeros(8)},
    "head": {"kernel": jnp.asarray(0.5 * rng.normal(size=(8, 2)), jnp.float32), "bias": jnp.zeros(2)},
}


def make_optimizer(**settings: Any) -> optax.GradientTransformation:
    blend = LinearBlend(optax.linear_schedule(0.0, 1.0, STEPS // 2))
    return optax.chain(
        optax.trace(0.9), stam(optax.linear_schedule(0.05, 0.0, STEPS), relaxation=blend, **settings)
    )


def mean_square(outputs: jax.Array) -> jax.Array:
    return jnp.mean((outputs - TARGETS) ** 2)


class Run(NamedTuple):
    """What a run leaves: its losses, the hard weights, and the loss of the model with those put back."""

    losses: np.ndarray
    hard: Any
    hard_loss: float


Make = Callable[..., Any]


def plain(make: Make, steps: int) -> Run:
    def loss(params: Any) -> jax.Array:
        hidden = jnp.tanh(INPUTS @ params["body"]["kernel"] + params["body"]["bias"])
        return mean_square(hidden @ params["head"]["kernel"] + params["head"]["bias"])

    optimizer = make(quantizer=Binary())

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        return value, *helpers.take_step(optimizer, gradients, state, params)

    params, state, losses = START, optimizer.init(START), []
    for _ in range(steps):
        value, params, state = step(params, state)
        losses.append(value)
    hard = hard_params(state, params)
    return Run(np.array(losses), hard, float(loss(hard)))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(8, name="body")(x)))


def linen(make: Make, steps: int) -> Run:
    model: Any = LinenNetwork()
    assert jax.tree.structure(model.init(jax.random.key(0), INPUTS)["params"]) == jax.tree.structure(START)
    train_state = TrainState.create(apply_fn=model.apply, params=START, tx=make(quantizer=Binary()))

    @jax.jit
    def step(train_state: TrainState) -> Any:
        loss = lambda params: mean_square(model.apply({"params": params}, INPUTS))
        value, gradients = jax.value_and_grad(loss)(train_state.params)
        return value, train_state.apply_gradients(grads=gradients)

    losses = []
    for _ in range(steps):
        value, train_state = step(train_state)
        losses.append(value)
    hard = hard_params(train_state.opt_state, train_state.params)
    return Run(np.array(losses), hard, float(mean_square(model.apply({"params": hard}, INPUTS))))


class NNXNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Linear(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.body(x)))


def nnx_run(make: Make, steps: int) -> Run:
    model = NNXNetwork(nnx.Rngs(0))
    nnx.update(model, START)
    optimizer = nnx.Optimizer(model, make(quantizer=Binary()), wrt=nnx.Param)

    @nnx.jit
    def step(model: NNXNetwork, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(lambda model: mean_square(model(INPUTS)))(model)
        optimizer.update(model, gradients)
        return value

    losses = [step(model, optimizer) for _ in range(steps)]
    params = nnx.state(model, nnx.Param)
    hard = hard_params(optimizer.opt_state, params)
    assert list(quantized_leaves(optimizer, params)) == ["body/kernel", "head/kernel"]
    nnx.update(model, hard)
    return Run(np.array(losses), nnx.to_pure_dict(hard), float(mean_square(model(INPUTS))))


class EquinoxNetwork(eqx.Module):
    body: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.body(x)))


def equinox(make: Make, steps: int) -> Run:
    def layer(name: str) -> eqx.nn.Linear:
        """Equinox keeps (outputs, inputs)."""
        kernel, bias = START[name]["kernel"], START[name]["bias"]
        inputs, outputs = kernel.shape
        empty = eqx.nn.Linear(inputs, outputs, key=jax.random.key(0))
        return eqx.tree_at(lambda layer: (layer.weight, layer.bias), empty, (kernel.T, bias))

    model: Any = EquinoxNetwork(layer("body"), layer("head"))
    optimizer = make(quantizer=Binary(axis=0))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    loss = lambda model: mean_square(jax.vmap(model)(INPUTS))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        value, gradients = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return value, eqx.apply_updates(model, updates), state

    losses = []
    for _ in range(steps):
        value, model, state = step(model, state)
        losses.append(value)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(hard_params(state, params), static)
    hard = {
        name: {"kernel": layer.weight.T, "bias": layer.bias}
        for name, layer in (("body", model.body), ("head", model.head))
    }
    return Run(np.array(losses), hard, float(loss(model)))


RUNS: dict[str, Callable[[Make, int], Run]] = {"linen": linen, "nnx": nnx_run, "equinox": equinox}
every_framework = pytest.mark.parametrize("framework", RUNS)


@pytest.fixture(scope="module")
def plain_run() -> Run:
    return plain(make_optimizer, STEPS)


def assert_same_run(run: Run, expected: Run) -> None:
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run.hard, expected.hard)
    np.testing.assert_allclose(run.hard_loss, expected.hard_loss, rtol=1e-4)


def test_a_regression_is_learnt_by_binary_weights(plain_run):
    assert plain_run.losses[-1] < 0.2 * plain_run.losses[0]
    assert plain_run.hard_loss < 0.2 * plain_run.losses[0]
    for layer in plain_run.hard.values():
        assert Binary().contains(layer["kernel"])


@every_framework
def test_every_framework_makes_the_run_of_plain_trees(framework, plain_run):
    assert_same_run(RUNS[framework](make_optimizer, STEPS), plain_run)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_makes_the_same_run_in_every_framework(method):
    make = lambda **settings: optax.chain(optax.trace(0.9), method(0.05, **settings))
    expected = plain(make, FEW)
    assert expected.losses[-1] != expected.losses[0]
    for run in RUNS.values():
        assert_same_run(run(make, FEW), expected)


# The state goes where Optax's states go.

MASKS = {"default": None, "function": lambda params: select(params, exclude="head/*")}


def body_latent(state: Any) -> Any:
    (own,) = (node for node in state if isinstance(node, StamState))
    return own.latent["body"]["kernel"]


@pytest.mark.parametrize("mask", MASKS)
def test_functions_of_parameters_map_over_the_state(mask):
    optimizer = make_optimizer(mask=MASKS[mask])
    filled = optax.tree.map_params(optimizer, lambda leaf: leaf + 2, optimizer.init(START))
    np.testing.assert_array_equal(body_latent(filled), START["body"]["kernel"] + 2)


@pytest.mark.parametrize("mask", MASKS)
def test_specifications_for_parameters_carry_over_to_the_state(mask):
    # As one lays out the state of an optimiser over devices: what is masked away has a hole there.
    optimizer = make_optimizer(mask=MASKS[mask])
    names = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), START)
    laid_out = optax.tree.map_params(
        optimizer,
        lambda _, name: name,
        optimizer.init(START),
        names,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert body_latent(laid_out) == names["body"]["kernel"]


def pickled(state: Any, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def as_arrays_alone(state: Any, folder: Path) -> Any:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(make_optimizer().init(START)), arrays)


def through_orbax(state: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.eval_shape(make_optimizer().init, START))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_state_of_every_method_goes_through_orbax(method, tmp_path):
    optimizer = method(0.05)
    params, state = START, optimizer.init(START)
    for _ in range(2):
        params, state = helpers.take_step(optimizer, jax.tree.map(jnp.cos, params), state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "opt_state": state})
        checkpointer.wait_until_finished()
        target = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
        restored = checkpointer.restore(tmp_path / "state", target)
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": params, "opt_state": state})
    expected = hard_params(state, params)
    jax.tree.map(
        np.testing.assert_array_equal, hard_params(restored["opt_state"], restored["params"]), expected
    )


@pytest.mark.parametrize("saved", [pickled, as_arrays_alone, through_orbax])
def test_a_state_can_be_saved_and_restored(saved, tmp_path):
    state = make_optimizer().init(START)
    restored = saved(state, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert list(quantized_leaves(restored, START)) == ["body/kernel", "head/kernel"]


def test_the_library_needs_no_framework_and_no_experiments():
    code = (
        "import sys, stam_jax; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'flax', 'equinox', 'experiments'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
