"""Weights spread over eight devices whose axes are part of types, and optimizers inside shard_map."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from stam_jax import (
    Binary,
    LeastSquares,
    PowerOfTwo,
    Ternary,
    Uniform,
    pack,
    quantize,
    stam,
    tabulate,
    unpack,
)
from tests import helpers, test_battery
from tests.methods import METHODS

rng = np.random.default_rng(0)
START = {"kernel": np.float32(rng.normal(size=(16, 8))), "bias": np.zeros(8, np.float32)}
INPUTS = np.float32(rng.normal(size=(32, 16)))
TARGETS = np.float32(rng.normal(size=(32, 8)))
# With inputs spread over eight devices, two to each.
TRAINED = (
    Binary(),
    Binary(axis=()),
    Binary(axis=0),
    Binary(axis=0, group=4),
    Binary(group=16),
    Ternary(),
    Uniform(bits=3),
    PowerOfTwo(bits=3),
    LeastSquares(),
)
FEW = (Binary(), Binary(axis=0, group=4), Ternary(), LeastSquares())
REST = tuple(quantizer for quantizer in TRAINED if quantizer not in FEW)
# Groups of inputs that are spread.
REFUSED = (Binary(group=2), Binary(group=4), Ternary(group=8), LeastSquares(group=2))


def loss(params: Any, inputs: Any = INPUTS, targets: Any = TARGETS) -> jax.Array:
    return jnp.mean((jnp.asarray(inputs) @ params["kernel"] + params["bias"] - targets) ** 2)


def trained(optimizer: optax.GradientTransformation, params: Any, steps: int = 4) -> Any:
    state = jax.jit(optimizer.init)(params)
    step = helpers.quick_jit(partial(step_of_one, optimizer))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def in_eight(check: str) -> None:
    """Calls a function of this module in a process with eight devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    code = f"import jax; assert jax.device_count() == 8; from tests import test_meshes as t; t.{check}()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def spread_over_inputs() -> Any:
    """The parameters on a mesh as `jax.make_mesh` makes it, the inputs of the kernel spread over its axis."""
    mesh = jax.make_mesh((8,), ("rows",))
    assert mesh.axis_types == (AxisType.Explicit,)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
    params = {"kernel": jax.device_put(START["kernel"], rows), "bias": jax.device_put(START["bias"], whole)}
    return mesh, params


def check_training(optimizers: dict[str, optax.GradientTransformation]) -> None:
    mesh, params = spread_over_inputs()
    for name, optimizer in optimizers.items():
        with jax.set_mesh(mesh):
            after, state = trained(optimizer, params)
        expected, _ = trained(optimizer, jax.tree.map(jnp.asarray, START))
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5, err_msg=name)
        jax.tree.map(close, jax.tree.map(np.asarray, after), jax.tree.map(np.asarray, expected))
        # What a state keeps of the kernel is spread like it.
        kernels = [leaf for leaf in jax.tree.leaves((after, state)) if leaf.shape == (16, 8)]
        assert kernels, name
        assert all(jax.typeof(leaf) == jax.typeof(params["kernel"]) for leaf in kernels), name


def with_quantizers(quantizers: Any) -> dict[str, optax.GradientTransformation]:
    return {str(q): stam(optax.sgd(0.1, momentum=0.9), hard_from=2, quantizer=q) for q in quantizers}


def check_quantizers() -> None:
    check_training(with_quantizers(FEW))


def check_methods() -> None:
    check_training({name: method(optax.sgd(0.1)) for name, method in METHODS.items()})


def check_shipping(quantizers: Any = FEW) -> None:
    mesh, params = spread_over_inputs()
    for quantizer in quantizers:
        with jax.set_mesh(mesh):
            y = quantize(params, quantizer)
            table, packed = tabulate(y, quantizer), pack(y, quantizer)
        expected = quantize(START, quantizer)["kernel"]
        np.testing.assert_allclose(y["kernel"], expected, rtol=1e-6, err_msg=str(quantizer))
        assert jax.typeof(y["kernel"]) == jax.typeof(params["kernel"])
        assert max(row.gap for row in table.rows if row.gap is not None) <= 2e-6
        with jax.set_mesh(mesh):
            again = quantize(y, quantizer)
        np.testing.assert_array_equal(packed["kernel"].unpack(), again["kernel"], err_msg=str(quantizer))


def check_refusal() -> None:
    mesh, params = spread_over_inputs()
    for quantizer in REFUSED:
        # On one device it is fine.
        quantize(START, quantizer)
        optimizer = stam(hard_from=1, quantizer=quantizer)
        uses = [optimizer.init, jax.jit(optimizer.init)]
        uses += [partial(use, quantizer=quantizer) for use in (quantize, tabulate)]
        if quantizer == Binary(group=4):
            uses += [method(optax.sgd(0.1), quantizer=quantizer).init for method in METHODS.values()]
        for use in uses:
            with jax.set_mesh(mesh), pytest.raises(ValueError, match="'kernel'"):
                use(params)


def check_shards(names: Any = ("stam",)) -> None:
    """In shard_map the parameters may be whole on each device, but no shards: these have not all weights."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()
    params = jax.tree.map(jnp.asarray, START)
    for name in names:
        optimizer = METHODS[name](optax.sgd(0.1))

        def step(params, state, inputs, targets, optimizer=optimizer):
            gradients = jax.grad(lambda p: jax.lax.pmean(loss(p, inputs, targets), "data"))(params)
            return helpers.take_step(optimizer, gradients, state, params)

        mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, data, data), out_specs=whole))
        state = optimizer.init(params)
        after, expected = (params, state), (params, state)
        one = jax.jit(partial(step_of_one, optimizer))
        for _ in range(3):
            after, expected = mapped(*after, INPUTS, TARGETS), one(*expected)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5, err_msg=name)
        jax.tree.map(close, jax.tree.map(np.asarray, after), jax.tree.map(np.asarray, expected))

        for spec in (PartitionSpec("data"), PartitionSpec(None, "data")):
            specs = {"kernel": spec, "bias": whole}
            sharded = partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=specs)
            with pytest.raises(ValueError, match="'kernel'"):
                sharded(lambda p, optimizer=optimizer: optimizer.update(p, optimizer.init(p), p)[0])(params)
            with pytest.raises(ValueError, match="'kernel'"):
                sharded(quantize)(params)


def step_of_one(optimizer: optax.GradientTransformation, params: Any, state: Any) -> Any:
    return helpers.take_step(optimizer, jax.grad(loss)(params), state, params)


def check_devices_of_their_own() -> None:
    first, second, *_ = jax.devices()
    draw = lambda seed: np.float32(np.random.default_rng(seed).normal(size=(16, 8)))
    apart = {"kernel": jax.device_put(draw(0), first), "b": {"kernel": jax.device_put(draw(1), second)}}
    apart["bias"] = jax.device_put(np.ones(8, np.float32), second)
    apart = quantize(apart)
    packed = pack(apart)
    assert {device for leaf in jax.tree.leaves(packed) for device in leaf.devices()} == {first}
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), quantize(apart))
    for axes in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("d",), axis_types=(axes,))
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, PartitionSpec(None, "d"))
            spread = quantize({"kernel": jax.device_put(draw(0), sharding)})
            whole = np.asarray(unpack(pack(spread))["kernel"])
            np.testing.assert_array_equal(whole, np.asarray(quantize(spread)["kernel"]))


def check_representatives() -> None:
    check_quantizers()
    check_shipping()
    check_refusal()
    check_shards()
    check_devices_of_their_own()
    test_battery.check_sharding(("stam", "admm_quant"), (Binary(group=4), LeastSquares()))


def check_the_rest() -> None:
    test_battery.check_sharding()
    check_training(with_quantizers(REST))
    check_methods()
    check_shipping(REST)
    check_shards(("straight_through", "admm_quant", "bop"))


@pytest.mark.slow
@pytest.mark.parametrize("checks", [check_representatives, check_the_rest])
def test_on_eight_devices(checks):
    in_eight(checks.__name__)
