"""A regression on plain trees, Flax Linen, Flax NNX and Equinox; and states as the frameworks save them."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from stam_jax import Binary, quantize, stam
from tests import helpers
from tests.methods import METHODS

STEPS, FEW = 60, 6
rng = np.random.default_rng(0)
INPUTS: Any = rng.normal(size=(64, 4)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.sign(np.float32(rng.normal(size=(4, 2)))))
START = {
    "body": {"kernel": 0.5 * rng.normal(size=(4, 8)), "bias": np.zeros(8)},
    "head": {"kernel": 0.5 * rng.normal(size=(8, 2)), "bias": np.zeros(2)},
}
START = jax.tree.map(lambda leaf: jnp.asarray(np.float32(leaf)), START)


def make_optimizer(**settings: Any) -> optax.GradientTransformation:
    sgd = optax.sgd(optax.linear_schedule(0.05, 0.0, STEPS), momentum=0.9)
    return stam(sgd, hard_from=STEPS // 2, **settings)


def mean_square(outputs: jax.Array) -> jax.Array:
    return jnp.mean((outputs - TARGETS) ** 2)


class Run(NamedTuple):
    """What a run leaves: its losses, the quantized weights, and the loss of the model with those put back."""

    losses: np.ndarray
    quantized: Any
    quantized_loss: float


Make = Callable[[], Any]


def plain(make: Make, steps: int) -> Run:
    def loss(params: Any) -> jax.Array:
        hidden = jnp.tanh(INPUTS @ params["body"]["kernel"] + params["body"]["bias"])
        return mean_square(hidden @ params["head"]["kernel"] + params["head"]["bias"])

    optimizer = make()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        return value, *helpers.take_step(optimizer, gradients, state, params)

    params, state, losses = START, optimizer.init(START), []
    for _ in range(steps):
        value, params, state = step(params, state)
        losses.append(value)
    quantized = quantize(params)
    return Run(np.array(losses), quantized, float(jax.jit(loss)(quantized)))


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(8, name="body")(x)))


def linen(make: Make, steps: int) -> Run:
    model: Any = LinenNetwork()
    shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(START)
    train_state = TrainState.create(apply_fn=model.apply, params=START, tx=make())

    @jax.jit
    def step(train_state: TrainState) -> Any:
        loss = lambda params: mean_square(model.apply({"params": params}, INPUTS))
        value, gradients = jax.value_and_grad(loss)(train_state.params)
        return value, train_state.apply_gradients(grads=gradients)

    losses = []
    for _ in range(steps):
        value, train_state = step(train_state)
        losses.append(value)
    quantized = quantize(train_state.params)
    loss = jax.jit(lambda params: mean_square(model.apply({"params": params}, INPUTS)))
    return Run(np.array(losses), quantized, float(loss(quantized)))


class NNXNetwork(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.body = nnx.Linear(4, 8, kernel_init=zeros, rngs=rngs)
        self.head = nnx.Linear(8, 2, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.body(x)))


def nnx_run(make: Make, steps: int) -> Run:
    model = NNXNetwork(nnx.Rngs(0))
    nnx.update(model, START)
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def step(model: NNXNetwork, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(lambda model: mean_square(model(INPUTS)))(model)
        optimizer.update(model, gradients)
        return value

    losses = [step(model, optimizer) for _ in range(steps)]
    params = nnx.state(model, nnx.Param)
    quantized = quantize(params)
    nnx.update(model, quantized)
    return Run(np.array(losses), nnx.to_pure_dict(quantized), float(mean_square(model(INPUTS))))


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
        empty: Any = eqx.filter_eval_shape(eqx.nn.Linear, inputs, outputs, key=jax.random.key(0))
        return eqx.tree_at(lambda layer: (layer.weight, layer.bias), empty, (kernel.T, bias))

    model: Any = EquinoxNetwork(layer("body"), layer("head"))
    optimizer = make()
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
    model = eqx.combine(quantize(params), static)
    quantized = {
        name: {"kernel": layer.weight.T, "bias": layer.bias}
        for name, layer in (("body", model.body), ("head", model.head))
    }
    return Run(np.array(losses), quantized, float(eqx.filter_jit(loss)(model)))


RUNS: dict[str, Callable[[Make, int], Run]] = {"linen": linen, "nnx": nnx_run, "equinox": equinox}


@pytest.fixture(scope="module")
def plain_run() -> Run:
    return plain(make_optimizer, STEPS)


def assert_same_run(run: Run, expected: Run) -> None:
    close = partial(np.testing.assert_allclose, rtol=1e-4)
    close(run.losses, expected.losses)
    jax.tree.map(partial(close, atol=1e-5), run.quantized, expected.quantized)
    close(run.quantized_loss, expected.quantized_loss)


def test_a_regression_is_learned_by_binary_weights(plain_run):
    assert plain_run.losses[-1] < 0.2 * plain_run.losses[0]
    assert plain_run.quantized_loss < 0.2 * plain_run.losses[0]
    for layer in plain_run.quantized.values():
        sizes = np.abs(layer["kernel"])
        np.testing.assert_array_equal(sizes, np.broadcast_to(sizes[:1], sizes.shape))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_framework_makes_the_run_of_plain_trees(run, plain_run):
    assert_same_run(run(make_optimizer, STEPS), plain_run)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_makes_the_same_run_in_every_framework(method):
    make = lambda: method(optax.sgd(0.05, momentum=0.9))
    expected = plain(make, FEW)
    assert expected.losses[-1] != expected.losses[0]
    for run in RUNS.values():
        assert_same_run(run(make, FEW), expected)


# The state goes where Optax's states go.

QUANTIZERS = {
    "default": Binary(),
    "patterns": {"head": None, "*": Binary()},
    "function": lambda path, leaf: Binary() if path == "body/kernel" else None,
}
every_kind = pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)


@every_kind
def test_functions_of_parameters_map_over_the_state(quantizer):
    optimizer = make_optimizer(quantizer=quantizer)
    filled: Any = optax.tree.map_params(optimizer, lambda leaf: leaf + 2, optimizer.init(START))
    np.testing.assert_array_equal(filled.latent["body"]["kernel"], START["body"]["kernel"] + 2)
    assert filled.count == 0


@every_kind
def test_specifications_for_parameters_carry_over_to_the_state(quantizer):
    # As one lays out the state of an optimizer over devices: what is not quantized has a hole there.
    optimizer = make_optimizer(quantizer=quantizer)
    names = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), START)
    laid_out: Any = optax.tree.map_params(
        optimizer,
        lambda _, name: name,
        optimizer.init(START),
        names,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert laid_out.latent["body"]["kernel"] == names["body"]["kernel"]


def by_path(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by the names and numbers that lead to them."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def pickled(state: Any, like: Any, folder: Path) -> Any:
    return pickle.loads(pickle.dumps(state))


def as_arrays_alone(state: Any, like: Any, folder: Path) -> Any:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def through_flax(state: Any, like: Any, folder: Path) -> Any:
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def through_equinox(state: Any, like: Any, folder: Path) -> Any:
    eqx.tree_serialise_leaves(folder / "state.eqx", state)
    return eqx.tree_deserialise_leaves(folder / "state.eqx", like)


def through_orbax(state: Any, like: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.eval_shape(lambda: like))


def through_orbax_without_a_target(state: Any, like: Any, folder: Path) -> Any:
    """Orbax makes dictionaries of named tuples then: of the same arrays under the same names."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "untold", state)
        checkpointer.wait_until_finished()
        restored = by_path(checkpointer.restore(folder / "untold"))
    assert list(restored) == sorted(by_path(state))
    return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in by_path(like)])


SAVED = (
    pickled,
    as_arrays_alone,
    through_flax,
    through_equinox,
    through_orbax,
    through_orbax_without_a_target,
)


def assert_training_goes_on(method: Callable[..., Any], folder: Path) -> None:
    """The same, bit for bit, from a state that has been saved and restored, in whichever way."""
    # A new optimizer goes on, as in another process.
    make = lambda: method(optax.adam(0.05))
    step = jax.jit(
        lambda params, state: helpers.take_step(make(), jax.tree.map(jnp.cos, params), state, params)
    )
    params, state = START, make().init(START)
    for _ in range(2):
        params, state = step(params, state)
    expected = step(*step(params, state))
    assert len(by_path(expected[1])) > 3
    for saved in SAVED:
        restored = saved(state, make().init(START), folder)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        jax.tree.map(np.testing.assert_array_equal, step(*step(params, restored)), expected)


def test_training_goes_on_from_a_state_that_was_saved(tmp_path):
    assert_training_goes_on(METHODS["stam"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_goes_on_from_the_state_of_every_method(method, tmp_path):
    assert_training_goes_on(method, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_of_every_method_holds_arrays_and_no_options(name):
    make = lambda quantizer: METHODS[name](optax.adam(0.05), quantizer=quantizer).init
    state = make(Binary())(START)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    # Whatever the options, the structure is that of any state of Optax: named tuples, and trees like params.
    assert jax.tree.structure(state) == jax.tree.structure(make({"*": Binary(axis=(), scale=0.5)})(START))
    keys = {type(key) for path, _ in jax.tree.leaves_with_path(state) for key in path}
    assert keys <= {jax.tree_util.GetAttrKey, jax.tree_util.SequenceKey, jax.tree_util.DictKey}
    assert jax.tree.structure(pickle.loads(pickle.dumps(state))) == jax.tree.structure(state)


def test_a_train_state_of_linen_goes_through_its_serialization():
    make = lambda: TrainState.create(apply_fn=None, params=START, tx=make_optimizer())
    step = jax.jit(lambda train_state, grads: train_state.apply_gradients(grads=grads))
    train_state = step(make(), jax.tree.map(np.cos, START))
    restored: Any = flax.serialization.from_bytes(make(), flax.serialization.to_bytes(train_state))
    assert restored.step == 1
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, train_state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, restored.params, train_state.params)


def test_an_optimizer_of_nnx_goes_through_orbax(tmp_path):
    model = NNXNetwork(nnx.Rngs(0))
    make = lambda: nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)
    optimizer, new = make(), make()
    nnx.update(model, START)
    step = nnx.jit(lambda optimizer, model, gradients: optimizer.update(model, gradients))
    step(optimizer, model, jax.tree.map(np.cos, nnx.state(model, nnx.Param)))
    pure = nnx.to_pure_dict(nnx.state(optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "optimizer", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "optimizer", jax.eval_shape(lambda: pure))
    state = nnx.state(new)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(new, state)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(new)), pure)
    assert any(np.any(leaf != 0) for path, leaf in by_path(pure).items() if "trace" in path)


def test_the_library_needs_no_framework_and_no_experiments():
    code = (
        "import sys, stam_jax; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'flax', 'equinox', 'experiments'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
