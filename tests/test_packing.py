"""Packed networks give back every bit, from memory and from disk; damaged and forged files give nothing."""

import concurrent.futures
import dataclasses
import enum
import hashlib
import json
import math
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import stam_jax
from stam_jax import (
    Binary,
    LeastSquares,
    Packed,
    PackedFileError,
    PowerOfTwo,
    Ternary,
    Uniform,
    load_packed,
    pack,
    packed_metadata,
    quantize,
    save_packed,
    stam,
    tabulate,
    unpack,
)
from tests import packed_reader

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "format.md").read_text()
BUILT_IN = [Binary(), Ternary(), Uniform(), PowerOfTwo(), LeastSquares(), Binary(axis=(0, -1))]
QUANTIZERS = [
    *BUILT_IN,
    Binary(axis=0),
    Binary(axis=()),
    Binary(scale=1.0),
    Binary(group=2, group_axis=-2),
    Ternary(group=2, group_axis=1, axis=0),
    Uniform(bits=2),
    Uniform(bits=3, scale=2.0),
    PowerOfTwo(bits=3, axis=()),
    LeastSquares(group=2, group_axis=0),
]
# Every quantizer, sharing and dtype once; among the slow tests, more of them together.
IN_DTYPES = [
    *((quantizer, "float32") for quantizer in BUILT_IN),
    (Binary(scale=1.0), "float32"),
    (Ternary(group=2, group_axis=1, axis=0), "float32"),
    (Uniform(bits=3, scale=2.0), "float16"),
    (PowerOfTwo(bits=3, axis=()), "bfloat16"),
    (LeastSquares(group=2, group_axis=0), "bfloat16"),
]
TOGETHER = [
    *((quantizer, "float32") for quantizer in QUANTIZERS),
    *((quantizer, "bfloat16") for quantizer in BUILT_IN[:5]),
    *((quantizer, "float16") for quantizer in (Binary(), Uniform(), PowerOfTwo())),
]
IN_DTYPES += [pytest.param(*pair, marks=pytest.mark.slow) for pair in TOGETHER if pair not in IN_DTYPES]


def random_params(dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal
    return {
        "a": {"kernel": jnp.asarray(draw(size=(4, 4, 5)), dtype), "bias": jnp.asarray(draw(size=5), dtype)},
        "b": [jnp.asarray(draw(size=8), dtype), jnp.asarray(draw(), dtype)],
    }


def packed_of(params: Any, quantizer: Any = Binary()) -> Any:
    """The packed network of parameters that were not trained to be quantized."""
    return pack(quantize(params, quantizer), quantizer)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = [
        (np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


def named(params: Any) -> dict[str, Any]:
    return {
        "a/kernel": params["a"]["kernel"],
        "a/bias": params["a"]["bias"],
        "b/0": params["b"][0],
        "b/1": params["b"][1],
    }


@pytest.mark.parametrize(("quantizer", "dtype"), IN_DTYPES, ids=repr)
def test_the_quantized_network_comes_back_bit_for_bit(tmp_path, quantizer, dtype):
    params = quantize(random_params(dtype), quantizer)
    quantized = quantize(params, quantizer)
    packed = pack(params, quantizer)
    assert same_bits(unpack(packed), quantized)
    assert same_bits(jax.jit(unpack)(packed), quantized)
    save_packed(tmp_path / "file", packed)
    loaded = load_packed(tmp_path / "file", like=params)
    assert same_bits(unpack(loaded), quantized)
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)  # Quantizers with their axes among it.
    assert load_packed(tmp_path / "file").keys() == named(params).keys()
    if dtype != "bfloat16":
        assert same_bits(packed_reader.read(tmp_path / "file"), named(quantized))


@pytest.mark.parametrize(
    "quantizer",
    [Binary(), *(pytest.param(q, marks=pytest.mark.slow) for q in (LeastSquares(), Uniform(bits=3)))],
    ids=repr,
)
def test_double_precision_comes_back_too(x64, tmp_path, quantizer):
    params = quantize(random_params("float64"), quantizer)
    save_packed(tmp_path / "file", pack(params, quantizer))
    loaded = load_packed(tmp_path / "file", like=params)
    assert loaded["a"]["kernel"].scales.dtype == np.float64
    assert same_bits(unpack(loaded), quantize(params, quantizer))
    assert same_bits(packed_reader.read(tmp_path / "file"), named(quantize(params, quantizer)))
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(TypeError, match="jax_enable_x64"):
        unpack(loaded)


@pytest.mark.parametrize(
    ("quantizer", "dtype", "rounding"),
    [
        (Binary(), "float32", 1e-6),
        pytest.param(Ternary(axis=()), "bfloat16", 1e-3, marks=pytest.mark.slow),
        pytest.param(Binary(), "bfloat16", 1e-3, marks=pytest.mark.slow),
        pytest.param(LeastSquares(), "float32", 1e-6, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_what_is_packed_of_a_hard_network_is_its_quantized_network(quantizer, dtype, rounding):
    """Before the hard phase the same parameters are refused."""
    optimizer = stam(optax.sgd(0.1), hard_from=8, quantizer=quantizer)
    params = {"kernel": random_params(dtype)["a"]["kernel"][0], "bias": jnp.ones(5, dtype)}
    target = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), dtype)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss = lambda p: jnp.mean(jnp.square(p["kernel"] + p["bias"] - target))
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for k in range(12):
        params, state = step(params, state)
        if k == 2:
            with pytest.raises(ValueError, match="pack: the leaf 'kernel' is"):
                pack(params, quantizer)
    assert same_bits(unpack(pack(params, quantizer)), quantize(params, quantizer))
    (row,) = (row for row in tabulate(params, quantizer).rows if row.quantizer)
    assert row.gap is not None
    assert row.gap <= rounding


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_a_leaf_far_from_its_quantized_weights_is_refused_by_name(size):
    kernel = np.float32(size) * np.asarray(random_params()["a"]["kernel"])
    params = {"a": {"kernel": kernel, "bias": np.ones(5, np.float32)}}
    for quantizer in (Binary(), Uniform()):
        with pytest.raises(ValueError, match=r"pack: the leaf 'a/kernel' is .* hard"):
            pack(params, quantizer)
        hard = quantize(params, quantizer)
        assert same_bits(unpack(pack(hard, quantizer)), quantize(hard, quantizer))
    with pytest.raises(ValueError, match="pack: the leaf 'a/kernel'"):
        pack(quantize(params, Binary()), Binary(scale=1.0))


@pytest.mark.parametrize("share", [0.004, 0.04])
def test_the_bound_of_the_gap_is_one_percent_of_the_norm(share):
    """Binary weights of size 1, half of them 1 + e and half 1 - e: the gap is e / sqrt(1 + e^2)."""
    up_and_down = np.reshape([1, 1, -1, -1], (4, 1, 1))
    params = {"kernel": np.float32(1 + share * np.broadcast_to(up_and_down, (4, 4, 5)))}
    (row,) = tabulate(params).rows
    assert row.gap == pytest.approx(share / math.sqrt(1 + share**2), rel=1e-4)
    if share < 0.01:
        np.testing.assert_array_equal(unpack(pack(params))["kernel"], quantize(params)["kernel"])
    else:
        with pytest.raises(ValueError, match=r"0.04"):
            pack(params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantizer", [Binary(), Binary(scale=1.0), LeastSquares()], ids=repr)
def test_weights_that_are_not_finite_are_refused(quantizer, value):
    params = {"kernel": np.array(random_params()["a"]["kernel"])}
    params["kernel"][1, 2, 3] = value
    with pytest.raises(ValueError, match=r"the leaf 'kernel' .*not finite"):
        pack(params, quantizer)


def test_the_reader_on_the_page_reads(tmp_path):
    _, block = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block, scope)
    for quantizer in (Binary(), Binary(axis=(0, -1)), Ternary(group=2, group_axis=1, axis=0), Uniform()):
        params = quantize(random_params()["a"], quantizer)
        save_packed(tmp_path / "file", pack(params, quantizer))
        assert same_bits(scope["read"](tmp_path / "file"), quantize(params, quantizer))


# Few shapes, for each of which programs are compiled; the values, names and other leaves are many.
SHAPES = st.sampled_from([(2, 3, 5), (4, 9), (0, 2), (1, 8)])
FLOATS = st.floats(-1e4, 1e4, width=32)
PLAIN = hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.int32, np.int64, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_side=3),
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/#"), min_size=1, max_size=5)
TREES = st.recursive(PLAIN, lambda below: st.dictionaries(NAMES, below, max_size=3), max_leaves=4)


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
def test_random_trees_come_back_bit_for_bit(tmp_path_factory, data):
    of_every_shape = [q for q in QUANTIZERS if q.group is None and q.axis != (0, -1)]
    quantizer = data.draw(st.sampled_from(of_every_shape))
    weights = data.draw(hnp.arrays(np.float32, data.draw(SHAPES), elements=FLOATS))
    everything = lambda path, leaf: quantizer
    tree = quantize({data.draw(NAMES): weights}, everything)
    rest, metadata = data.draw(TREES), {"note": data.draw(st.text(max_size=5))}
    path = tmp_path_factory.getbasetemp() / "tree"
    size = save_packed(path, {"packed": pack(tree, everything), "rest": rest}, metadata=metadata)
    assert size == path.stat().st_size
    loaded = load_packed(path, like={"packed": tree, "rest": rest})
    assert same_bits(unpack(loaded["packed"]), quantize(tree, everything))
    assert same_bits(loaded["rest"], rest)
    assert packed_metadata(path) == metadata


def test_networks_of_every_framework_are_saved_as_trees_of_their_own(tmp_path):
    draw = np.random.default_rng(0).normal
    drawn: Any = lambda key, shape, *_: jnp.asarray(np.float32(draw(size=shape)))

    class Nnx(nnx.Module):
        def __init__(self):
            layers = [nnx.Linear(4, 4, kernel_init=drawn, rngs=nnx.Rngs(0)) for _ in range(11)]
            self.layers = nnx.List(layers)
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    graph, params, stats = nnx.split(Nnx(), nnx.Param, nnx.BatchStat)
    # The tenth comes after the second, though not in the order of letters.
    quantizer = {"layers/?": None, "*": Binary()}
    params = quantize(params, quantizer)
    save_packed(tmp_path / "nnx", {"params": pack(params, quantizer), "stats": stats})
    loaded = load_packed(tmp_path / "nnx", like={"params": params, "stats": stats})
    kinds = {name for name, leaf in load_packed(tmp_path / "nnx").items() if isinstance(leaf, Packed)}
    assert kinds == {"params/layers/10/kernel"}
    whole = unpack(loaded)
    rebuilt = nnx.merge(graph, whole["params"], whole["stats"])
    for i in (2, 10):
        np.testing.assert_array_equal(rebuilt.layers[i].kernel[...], params["layers"][i]["kernel"][...])

    module = eqx.nn.MLP(4, 4, 4, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_array)
    arrays = quantize(arrays)
    save_packed(tmp_path / "equinox", pack(arrays))
    back = eqx.combine(unpack(load_packed(tmp_path / "equinox", like=arrays)), static)
    hard = eqx.combine(quantize(arrays), static)
    np.testing.assert_array_equal(back(jnp.ones(4)), hard(jnp.ones(4)))


def test_jit_takes_packed_networks_and_keeps_them_packed():
    draw = np.random.default_rng(0).normal
    params = quantize({"kernel": np.float32(draw(size=(256, 64)))})
    packed = jax.device_put(pack(params))
    apply = jax.jit(lambda packed, x: x @ unpack(packed)["kernel"])
    x = np.float32(draw(size=(5, 256)))
    np.testing.assert_allclose(apply(packed, x), x @ np.asarray(params["kernel"]), rtol=1e-5, atol=1e-5)
    sizes: Any = apply.lower(packed, x).compile().memory_analysis()
    assert sizes.argument_size_in_bytes == 256 * 64 // 8 + 64 * 4 + x.nbytes
    assert packed["kernel"].nbytes == 256 * 64 // 8 + 64 * 4


@pytest.mark.parametrize("quantizer", [Binary(), LeastSquares()], ids=repr)
def test_stacks_of_packed_networks_go_through_vmap_and_scan(quantizer):
    members = [packed_of(random_params(seed=seed)["a"], quantizer) for seed in range(3)]
    stack = jax.tree.map(lambda *parts: np.stack(parts), *members)
    whole = jax.tree.map(lambda *leaves: np.stack(leaves), *map(unpack, members))
    assert same_bits(jax.jit(jax.vmap(unpack))(stack), whole)
    _, scanned = jax.lax.scan(lambda carry, member: (carry, unpack(member)), None, stack)
    assert same_bits(scanned, whole)


def test_exported_functions_take_packed_arguments():
    packed = {repr(quantizer): packed_of(random_params()["a"], quantizer) for quantizer in BUILT_IN}
    apply = jax.jit(lambda packed, x: {name: x @ leaf["kernel"] for name, leaf in unpack(packed).items()})
    x = np.float32(np.random.default_rng(0).normal(size=(2, 4)))
    data = jax.export.export(apply)(packed, x).serialize()
    # What a process does that has nothing but the bytes, and a packed network of its own.
    jax.tree.map(
        np.testing.assert_array_equal, jax.export.deserialize(data).call(packed, x), apply(packed, x)
    )


def test_a_wide_network_takes_little_more_than_a_bit_per_weight(tmp_path):
    params = {"kernel": np.float32(np.random.default_rng(0).normal(size=(1000, 800)))}
    size = save_packed(tmp_path / "file", packed_of(params))
    assert 800_000 / 8 + 800 * 4 < size < 800_000 / 8 + 800 * 4 + 700


def test_files_are_the_same_bytes_each_time_and_safetensors_like_any_other(tmp_path):
    tree = {
        "packed": packed_of(random_params(), Ternary()),
        "whole": jnp.arange(3),
        "narrow": jnp.ones(3, jnp.float16),
    }
    for name in ("one", "two"):
        save_packed(tmp_path / name, tree, metadata={"a": 1, "b": [1.5, None, "é"]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    arrays = safetensors.numpy.load_file(tmp_path / "one")
    for name, leaf in load_packed(tmp_path / "one").items():
        parts = {name: leaf}
        if isinstance(leaf, Packed):
            parts = {f"{name}#codes": leaf.codes, f"{name}#scales": leaf.scales}
        for key, part in parts.items():
            assert same_bits(arrays.pop(key), part)
    assert not arrays
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A file with nothing wrong."""
    path = tmp_path_factory.mktemp("good") / "file"
    save_packed(path, packed_of(random_params(), Ternary()), metadata={"seed": 0})
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file says of itself, and its arrays, by the safetensors package."""
    with safetensors.safe_open(path, framework="np") as file:
        said = json.loads(file.metadata()["stam_jax"])
    return said, safetensors.numpy.load_file(path)


def write(path: Path, said: Any, arrays: dict[str, np.ndarray]) -> None:
    """A file of the safetensors package that says so of itself."""
    safetensors.numpy.save_file(arrays, path, {"stam_jax": json.dumps(said)})


def signed(said: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is said, with the digest that goes with it, as docs/format.md has it."""
    compact = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    said = {key: value for key, value in said.items() if key != "sha256"}
    digest = hashlib.sha256(compact(said))
    for name in sorted(arrays):
        digest.update(compact([name, arrays[name].dtype.name, list(arrays[name].shape)]))
        digest.update(arrays[name].tobytes())
    return said | {"sha256": digest.hexdigest()}


def test_what_the_package_writes_is_read(tmp_path, good):
    """The reader takes any safetensors file that says of itself what it should."""
    said, arrays = contents(good)
    assert signed(said, arrays) == said
    write(tmp_path / "file", signed(said, arrays), arrays)
    assert (tmp_path / "file").read_bytes() != good.read_bytes()
    assert same_bits(load_packed(tmp_path / "file"), load_packed(good))
    assert packed_metadata(tmp_path / "file") == {"seed": 0}


def leaf_as(**values: Any) -> Callable[..., None]:
    return lambda said, arrays: said["packed"]["a/kernel"].update(values)


def quantizer_as(**values: Any) -> Callable[..., None]:
    return lambda said, arrays: said["packed"]["a/kernel"]["quantizer"].update(values)


def option_as(**values: Any) -> Callable[..., None]:
    return lambda said, arrays: said["packed"]["a/kernel"]["quantizer"]["options"].update(values)


def scales_as(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    return lambda said, arrays: arrays.update({"a/kernel#scales": change(arrays["a/kernel#scales"])})


def leaf_twice(said: Any, arrays: Any) -> None:
    arrays["a/kernel"] = arrays["b/0"]


FORGERIES = {
    "version of before": (lambda said, arrays: said.update(version=1), "version 1"),
    "version of truth": (lambda said, arrays: said.update(version=True), "version True"),
    "no version": (lambda said, arrays: said.pop("version"), "cannot be read"),
    "bit order": (lambda said, arrays: said.update(bit_order="big"), "bit order"),
    "no names": (lambda said, arrays: said.update(packed=[]), "incomplete"),
    "no metadata": (lambda said, arrays: said.pop("metadata"), "incomplete"),
    "shape bomb": (leaf_as(shape=[10**6, 10**5, 10**5]), "codes"),
    "empty bomb": (leaf_as(shape=[2**62, 0]), "cannot have the shape"),
    "endless shape": (leaf_as(shape=[10**30, 4, 5]), "cannot have the shape"),
    "many axes": (leaf_as(shape=[1] * 1000), "cannot have the shape"),
    "shape of text": (leaf_as(shape=["4", 4, 5]), "cannot have the shape"),
    "shape of truths": (leaf_as(shape=[True, 4, 5]), "cannot have the shape"),
    "shape of fractions": (leaf_as(shape=[4.0, 4, 5]), "cannot have the shape"),
    "negative shape": (leaf_as(shape=[-4, -4, 5]), "cannot have the shape"),
    "a number for a shape": (leaf_as(shape=80), "cannot have the shape"),
    "other shape": (leaf_as(shape=[5, 4, 4]), "codes"),
    "dtype": (leaf_as(dtype="os.system"), "cannot be read"),
    "structured dtype": (leaf_as(dtype="<f4,<f4"), "cannot be read"),
    "dtype that is code": (leaf_as(dtype="(,,f4,f4"), "cannot be read"),
    "dtype of nothing": (leaf_as(dtype=None), "cannot be read"),
    "dtype of integers": (leaf_as(dtype="int8"), "cannot be read"),
    "dtype of a list": (leaf_as(dtype=["float32"]), "cannot be read"),
    "bits": (leaf_as(bits=7), "7 bits"),
    "no bits": (lambda said, arrays: said["packed"]["a/kernel"].pop("bits"), "bits"),
    "quantizer": (quantizer_as(name="Eval"), "'Eval'.*unknown.*Binary, Ternary"),
    "quantizer of a list": (quantizer_as(name=["Ternary"]), "cannot be read"),
    "no quantizer": (leaf_as(quantizer=None), "cannot be read"),
    "a text for a leaf": (lambda said, arrays: said["packed"].update({"a/kernel": "x"}), "cannot be read"),
    "option": (option_as(color="red"), "cannot be"),
    "options of nothing": (quantizer_as(options=None), "cannot be read"),
    "wrong option": (option_as(scale="rainbow"), "scale"),
    "option of lists": (option_as(axis=[[1]]), "axis"),
    "other axis": (option_as(axis=7), "axis"),
    "axis of truth": (option_as(axis=True), "axis"),
    "other scales": (option_as(axis=[]), "its scales"),
    "scales of integers": (scales_as(lambda scales: scales.astype(np.int32)), "its scales"),
    "scales of another shape": (scales_as(lambda scales: scales[0]), "its scales"),
    "infinite scale": (scales_as(lambda scales: scales * np.float32(np.inf)), "not finite"),
    "scale that is no number": (scales_as(lambda scales: scales * np.float32(np.nan)), "not finite"),
    "negative scale": (scales_as(lambda scales: -scales), "scales that Ternary"),
    "other scale than fixed": (
        lambda said, arrays: [
            change(said, arrays)
            for change in (option_as(scale=1.0), scales_as(lambda scales: scales[:, :, :1] * np.float32(0.9)))
        ],
        "scales that Ternary",
    ),
    "code of no level": (
        lambda said, arrays: arrays.update({"a/kernel#codes": arrays["a/kernel#codes"] | 3}),
        "code 3 that Ternary",
    ),
    "codes of floats": (
        lambda said, arrays: arrays.update({"a/kernel#codes": arrays["a/kernel#codes"].astype(np.float32)}),
        "its codes",
    ),
    "leaf twice": (leaf_twice, "twice"),
    "missing": (lambda said, arrays: said["packed"].update(b=said["packed"]["a/kernel"]), "'b'.*missing"),
    "missing scales": (lambda said, arrays: arrays.pop("a/kernel#scales"), "missing"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused_though_the_digest_be_right(tmp_path, good, name):
    change, words = FORGERIES[name]
    said, arrays = contents(good)
    change(said, arrays)
    write(tmp_path / "file", signed(said, arrays), arrays)
    tracemalloc.start()
    with pytest.raises(PackedFileError, match=words) as caught:
        load_packed(tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(tmp_path / "file") in str(caught.value)
    assert peak < 20_000_000


UNSIGNED = {
    "digest": lambda said: said.update(sha256="0" * 64),
    "digest of nothing": lambda said: said.update(sha256=None),
    "no digest": lambda said: said.pop("sha256"),
    "metadata": lambda said: said["metadata"].update(seed=1),
    "leaf": lambda said: said["packed"].pop("a/kernel"),
    "quantizer": lambda said: said["packed"]["a/kernel"]["quantizer"].update(name="Uniform"),
    "more": lambda said: said.update(more=1),
}


@pytest.mark.parametrize("name", UNSIGNED)
def test_a_file_that_was_altered_is_refused(tmp_path, good, name):
    said, arrays = contents(good)
    UNSIGNED[name](said)
    write(tmp_path / "file", said, arrays)
    for read in (load_packed, packed_metadata):
        with pytest.raises(PackedFileError, match="digest"):
            read(tmp_path / "file")


def test_a_file_of_safetensors_that_is_none_of_ours_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}, {"stam_jax": "["}, {"stam_jax": "[" * 100_000}):
        safetensors.numpy.save_file({"x": np.ones(2)}, tmp_path / "file", metadata)
        with pytest.raises(PackedFileError, match=r"save_packed|cannot be read"):
            load_packed(tmp_path / "file")


def entry_as(**values: Any) -> Callable[[Any], None]:
    return lambda header: header["a/kernel#codes"].update(values)


HEADERS = {
    "entry bomb": (entry_as(shape=[10**12]), "'a/kernel#codes'"),
    "endless entry": (entry_as(data_offsets=[0, 10**40]), "'a/kernel#codes'"),
    "bomb of both": (entry_as(shape=[10**12], data_offsets=[72, 72 + 10**12]), "'a/kernel#codes'"),
    "entry dtype": (entry_as(dtype="F128"), "cannot be read"),
    "entry of list": (lambda header: header.update({"x": []}), "cannot be read"),
    "overlap": (entry_as(data_offsets=[0, 32]), "bytes"),
    "offset of text": (entry_as(data_offsets="ab"), "cannot be read"),
    "offset of nothing": (entry_as(data_offsets=[None, None]), "cannot be read"),
    "three offsets": (entry_as(data_offsets=[72, 104, 104]), "'a/kernel#codes'"),
    "axes": (entry_as(shape=[1] * 1000), "'a/kernel#codes'"),
    "metadata of lists": (lambda header: header["__metadata__"].update(a=[]), "metadata"),
    "metadata of list": (lambda header: header.update(__metadata__=[]), "metadata"),
}


def with_header(good: Path, change: Callable[[Any], None]) -> bytes:
    """The file with its header changed."""
    data = good.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_hold_water_is_refused(tmp_path, good, name):
    change, words = HEADERS[name]
    (tmp_path / "file").write_bytes(with_header(good, lambda header: None))
    assert same_bits(load_packed(tmp_path / "file"), load_packed(good))
    (tmp_path / "file").write_bytes(with_header(good, change))
    tracemalloc.start()
    with pytest.raises(PackedFileError, match=words):
        load_packed(tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_damage_anywhere_is_found(tmp_path, good):
    """Files cut at many lengths, with a bit flipped at many places, swollen, and foreign."""
    data = good.read_bytes()
    rng = np.random.default_rng(0)
    cuts = [data[:n] for n in range(0, len(data), max(1, len(data) // 100))]
    flips = []
    for at in rng.choice(len(data), 300, replace=False):
        flips.append(bytearray(data))
        flips[-1][at] ^= 1 << rng.integers(8)
    foreign = [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        b"{}",
        rng.bytes(1000),
        data + b"\x00",
        data * 2,
        b"PK\x03\x04" + data,
    ]
    foreign += [n.to_bytes(8, "little") + data[8:] for n in (0, 1, 2**63, 2**64 - 1)]
    entry = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    twice = b"{" + entry + b"," + entry + b"}"
    headers = (b"[" * 10_000, b'{"a":' * 10_000, b"[]", b"1", b'"a"', b"null", b"9" * 10_000, twice)
    foreign += [len(header).to_bytes(8, "little") + header for header in headers]
    damaged = [*cuts, *flips, *foreign]
    assert len(damaged) >= 400
    path = tmp_path / "file"
    for each in damaged:
        path.write_bytes(each)
        for read in (load_packed, packed_metadata):
            with pytest.raises(PackedFileError):
                read(path)


@pytest.mark.parametrize("quantizer", [Binary(), LeastSquares()], ids=repr)
def test_leaves_without_weights_are_stored(tmp_path, quantizer):
    params = {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in (("a", (0, 2)), ("b", (2, 0)))}
    save_packed(tmp_path / "file", pack(params, quantizer))
    assert same_bits(unpack(load_packed(tmp_path / "file", like=params)), params)


def test_scalars_and_vectors_are_packed_where_asked(tmp_path):
    params = {"s": jnp.array(-2.0), "v": jnp.array([1.0, -1.0, 1.0])}
    everything = lambda path, leaf: Binary(axis=())
    save_packed(tmp_path / "file", pack(params, everything))
    loaded = load_packed(tmp_path / "file", like=params)
    assert [leaf.codes.shape for leaf in loaded.values()] == [(1,), (1,)]
    assert same_bits(unpack(loaded), params)


def test_metadata_come_back_as_json_has_them(tmp_path):
    """Among them names that are numbers, whose order is another one than that of their texts."""
    save_packed(
        tmp_path / "file", {"x": np.ones(2)}, metadata={"by epoch": {8: 0.5, 9: 0.5, 10: 0.5, 11: 0.5}}
    )
    assert packed_metadata(tmp_path / "file") == {"by epoch": {"8": 0.5, "9": 0.5, "10": 0.5, "11": 0.5}}
    deep: Any = 0
    for _ in range(10_000):
        deep = [deep]
    for bad in (deep, object(), math.nan):
        with pytest.raises(TypeError, match="metadata"):
            save_packed(tmp_path / "file", {"x": np.ones(2)}, metadata={"bad": bad})


def test_metadata_may_be_long_but_never_so_long_that_nothing_reads_them(tmp_path):
    """A header takes 100 MB at most, as the safetensors package reads it."""
    path, tree = tmp_path / "file", {"x": np.ones(2)}
    tokenizer = "0123456789abcdef\n" * 100_000
    save_packed(path, tree, metadata={"tokenizer": tokenizer})
    assert packed_metadata(path) == {"tokenizer": tokenizer}
    assert load_packed(path, like=tree)["x"].tolist() == [1, 1]
    assert safetensors.numpy.load_file(path).keys() == {"x"}
    before = path.stat()
    with pytest.raises(ValueError, match="metadata"):
        save_packed(path, tree, metadata={"tokenizer": 60 * tokenizer})
    assert list(tmp_path.iterdir()) == [path]
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    assert packed_metadata(path) == {"tokenizer": tokenizer}


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_the_file_cannot_store_are_refused(tmp_path, name):
    for tree in ({name: np.ones(2)}, {"\ud800": packed_of({"kernel": jnp.ones((2, 2))})["kernel"]}):
        with pytest.raises(ValueError, match="name"):
            save_packed(tmp_path / "file", tree)
    assert list(tmp_path.iterdir()) == []


def test_names_that_look_like_parts_of_a_packed_leaf_are_read_or_refused(tmp_path):
    leaf = packed_of({"kernel": jnp.array([[2.0, -1.0], [-2.0, 1.0]])})["kernel"]
    path = tmp_path / "file"
    for tree in (
        {"a": leaf, "a#codes": leaf, "a#scales": leaf},
        {"a#codes": leaf, "a": leaf},
        {"b#codes": np.ones(2), "b#scales": leaf},
    ):
        save_packed(path, tree)
        assert same_bits(load_packed(path, like=tree), tree)
    path.unlink()
    for name in ("a#codes", "a#scales"):
        with pytest.raises(ValueError, match="taken"):
            save_packed(path, {"a": leaf, name: np.ones(2)})
    assert not path.exists()


def test_files_written_at_once_are_each_whole(tmp_path):
    path = tmp_path / "file"
    trees = [{"x": np.full(300_000, i, np.float32)} for i in range(3)]
    save_packed(path, trees[0])

    def write(tree: Any) -> None:
        for _ in range(5):
            save_packed(path, tree)
            assert np.ptp(load_packed(path)["x"]) == 0

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(write, trees))
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    save_packed(tmp_path / "link", {"x": np.ones(2)})
    assert (tmp_path / "link").is_symlink()
    assert load_packed(tmp_path / "there").keys() == {"x"}


@pytest.mark.parametrize(
    "quantizer", [PowerOfTwo(), pytest.param(Uniform(), marks=pytest.mark.slow)], ids=repr
)
def test_small_weights_of_half_precision_are_packed(quantizer):
    weights = {"kernel": (random_params()["a"]["kernel"] * 1e-5).astype(jnp.float16)}
    params = quantize(weights, quantizer)
    assert np.unique(np.abs(params["kernel"])).size > 8
    assert same_bits(unpack(pack(params, quantizer)), quantize(params, quantizer))


def test_a_leaf_that_spans_processes_is_refused_by_name(monkeypatch):
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    kind = type(params["a"]["bias"])
    for path, elsewhere in (
        ("a/kernel", lambda leaf: leaf.ndim == 2),
        ("a/bias", lambda leaf: leaf.ndim == 1),
    ):
        for name in ("is_fully_addressable", "is_fully_replicated"):
            monkeypatch.setattr(kind, name, property(lambda leaf, elsewhere=elsewhere: not elsewhere(leaf)))
        with pytest.raises(ValueError, match=f"'{path}' spans processes"):
            pack(params)


def test_what_is_packed_outlives_the_parameters_that_a_step_donates(tmp_path):
    params = quantize(random_params())
    expected = jax.tree.map(np.array, quantize(params))
    packed = pack(params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # As a step does to which they are donated.
    save_packed(tmp_path / "file", packed)
    assert same_bits(unpack(load_packed(tmp_path / "file", like=packed)), expected)
    with pytest.raises(ValueError, match=r"the leaf 'a/(bias|kernel)'"):
        save_packed(tmp_path / "file", params)


def test_arrays_of_numpy_stay_what_they_are(tmp_path):
    """Among them those of 64 bits, which JAX would narrow; later changes in place do not reach them."""
    params = {"kernel": jnp.ones((2, 2)), "steps": np.arange(3) + 2**40, "mean": np.full(2, 0.1)}
    packed = pack(params)
    assert same_bits(unpack(packed), params)
    params["steps"][0] = 0
    assert packed["steps"][0] == 2**40
    save_packed(tmp_path / "file", packed)
    assert same_bits(load_packed(tmp_path / "file", like=params), packed)


@pytest.mark.parametrize("quantizer", BUILT_IN, ids=repr)
def test_strict_settings_of_jax_are_kept(tmp_path, quantizer):
    """Also by channels of zeros."""
    params = jax.tree.map(np.array, random_params()["a"])
    params["kernel"][..., 0] = 0
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        params = quantize(params, quantizer)
        packed = pack(params, quantizer)
        save_packed(tmp_path / "file", packed)
        loaded = load_packed(tmp_path / "file", like=params)
        assert same_bits(unpack(loaded), quantize(params, quantizer))
        assert tabulate(packed).nbytes == tabulate(params, quantizer).nbytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": np.zeros((2, 2), np.uint8)}, r"codes are uint8\[2, 2\] and not uint8\[2, 1\]"),
        ({"codes": np.zeros((2, 1), np.int32)}, r"codes are int32\[2, 1\]"),
        ({"scales": np.ones((1, 2), np.int32)}, "scales are int32"),
        ({"scales": np.ones((3, 5, 2), np.float32)}, r"\[3, 5, 2\] and not .*\[1, 2\]"),
        ({"scales": np.full((1, 2), np.inf, np.float32)}, "finite"),
        ({"scales": np.full((1, 2), -1, np.float32)}, "scales"),
        ({"shape": (2,)}, r"codes|shape"),
        ({"quantizer": Binary(axis=5)}, "axis"),
        ({"quantizer": Binary(scale=2.0), "scales": np.ones((1, 1), np.float32)}, "scales"),
        ({"quantizer": Ternary(), "codes": np.full((2, 1), 3, np.uint8)}, "code 3"),
    ],
)
def test_a_packed_leaf_that_is_not_what_its_quantizer_promises_is_not_saved(tmp_path, change, words):
    parts = {"codes": np.zeros((2, 1), np.uint8), "scales": np.ones((1, 2), np.float32)}
    parts |= {"shape": (2, 2), "dtype": np.dtype("float32"), "quantizer": Binary()}
    save_packed(tmp_path / "right", {"kernel": Packed(**parts)})
    with pytest.raises(ValueError, match=f"save_packed: the leaf 'kernel'.*{words}"):
        save_packed(tmp_path / "file", {"kernel": Packed(**parts | change)})
    assert not (tmp_path / "file").exists()


def test_leaves_that_cannot_be_stored_are_named(tmp_path):
    path = tmp_path / "file"
    for leaf in (jax.random.key(0), stam, np.ones(2, np.complex128), np.array(["text"])):
        with pytest.raises(TypeError, match=r"save_packed: .*'rngs/key'"):
            save_packed(path, {"rngs": {"key": leaf}})
    with pytest.raises(TypeError, match="'x'"):
        jax.jit(lambda x: save_packed(path, {"x": x}))(jnp.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, good, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(good.read_bytes())

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_packed(path, {"x": np.ones(2)})
    assert path.read_bytes() == good.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none")


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"kernel": np.ones((2, 2))}, "of the file alone: 'odd'. Of like alone: none"),
        ({"net": {"kernel": 0, "odd": 0}}, "alone: 'kernel', 'odd'. Of like alone: 'net/kernel', 'net/odd'"),
        (
            {"kernel": np.ones((2, 3), np.float32), "odd": np.int64(0)},
            r"'kernel' is float32\[2, 2\] in the file and float32\[2, 3\]",
        ),
        (
            {"kernel": np.ones((2, 2)), "odd": np.int64(0)},
            r"'kernel' is float32\[2, 2\] in the file and float64\[2, 2\] in like",
        ),
    ],
)
def test_a_tree_that_differs_from_the_file_says_where(tmp_path, like, words):
    save_packed(tmp_path / "file", pack({"kernel": jnp.ones((2, 2)), "odd": np.int64(3)}))
    with pytest.raises(ValueError, match=words):
        load_packed(tmp_path / "file", like=like)


def test_the_structure_may_come_from_shapes_or_from_a_packed_tree(tmp_path):
    params = quantize(random_params())
    packed = pack(params)
    save_packed(tmp_path / "file", packed)
    for like in (params, jax.eval_shape(lambda: params), packed):
        assert same_bits(load_packed(tmp_path / "file", like=like), packed)


def test_holes_of_partitions_are_left_out(tmp_path):
    params = {"kernel": jnp.ones((2, 2)), "hole": optax.MaskedNode()}
    save_packed(tmp_path / "file", pack(params))
    assert load_packed(tmp_path / "file").keys() == {"kernel"}
    assert load_packed(tmp_path / "file", like=params)["hole"] == optax.MaskedNode()


@dataclasses.dataclass(frozen=True)
class Shifted:
    """Two values, 0 and a power of two: a quantizer of one's own."""

    def scales(self, w: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.abs(w), keepdims=True, dtype=jnp.float32)
        return jnp.exp2(jnp.round(jnp.log2(mean + 1e-9)) + 1)

    def levels(self, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros_like(scales), scales


@dataclasses.dataclass(frozen=True)
class Odd(Shifted):
    """One with an option."""

    option: Any = 0


def test_a_quantizer_of_ones_own_is_stored_by_its_name(tmp_path):
    # The mean of |w| is half of the upper level, so that the scales are found again.
    params = {"a": {"kernel": jnp.tile(jnp.array([[0.0, 4.0]]), (3, 2))}, "bias": jnp.ones(4)}
    packed = pack(params, Odd(option=(1, "a")))
    assert packed["a"]["kernel"].bits == 1
    save_packed(tmp_path / "file", packed)
    with pytest.raises(PackedFileError, match="'Odd'"):
        load_packed(tmp_path / "file")
    loaded = load_packed(tmp_path / "file", like=params, quantizers=[Shifted, Odd])
    assert same_bits(unpack(loaded), params)
    assert {row.quantizer for row in tabulate(loaded).rows} == {Odd(option=(1, "a")), None}
    assert packed_metadata(tmp_path / "file") == {}


@pytest.mark.parametrize("option", [Binary(), enum.StrEnum("Kind", "A").A, np.int64(2), ((1,),), math.inf])
def test_options_that_a_file_cannot_say_are_refused(tmp_path, option):
    packed = pack({"kernel": jnp.array([[0.0, 4.0]])}, Odd(option=option))
    with pytest.raises(TypeError, match=r"'kernel'.*option|JSON"):
        save_packed(tmp_path / "file", packed)
    assert list(tmp_path.iterdir()) == []


def test_quantizers_that_a_file_cannot_name_are_refused(tmp_path):
    params, path = {"kernel": jnp.array([[0.0, 4.0]])}, tmp_path / "file"
    plain: Any = type("Plain", (), {"scales": Shifted.scales, "levels": Shifted.levels})
    packed = pack(params, plain())
    np.testing.assert_array_equal(unpack(packed)["kernel"], params["kernel"])
    with pytest.raises(TypeError, match=r"'kernel'.*dataclass"):
        save_packed(path, packed)
    impostor: Any = type("Binary", (Shifted,), {})
    with pytest.raises(TypeError, match=r"'kernel'.*Binary"):
        save_packed(path, pack(params, impostor()))
    assert list(tmp_path.iterdir()) == []
    save_packed(path, pack(params, Shifted()))
    for quantizers in ([impostor], [Shifted, Shifted]):
        with pytest.raises(ValueError, match="names of their own"):
            load_packed(path, quantizers=quantizers)
    apply = jax.export.export(jax.jit(unpack))(pack(params, Shifted()))
    with pytest.raises(ValueError, match="Shifted"):
        apply.serialize()


@dataclasses.dataclass(frozen=True)
class Steps:
    """The whole numbers from 0, in fixed steps."""

    count: int

    def scales(self, w: jax.Array) -> jax.Array:
        return jnp.ones((1,) * w.ndim)

    def levels(self, scales: jax.Array) -> list[jax.Array]:
        return [i * scales for i in range(self.count)]


def test_levels_may_be_many_but_a_code_takes_a_byte_at_most(tmp_path):
    params = {"kernel": jnp.arange(20.0).reshape(2, 10) % 17}
    packed = pack(params, Steps(17))
    assert (packed["kernel"].bits, packed["kernel"].codes.shape) == (5, (2, 7))
    save_packed(tmp_path / "file", packed)
    assert same_bits(unpack(load_packed(tmp_path / "file", like=params, quantizers=[Steps])), params)
    with pytest.raises(ValueError, match=r"'kernel'.*256"):
        pack(params, Steps(257))


@pytest.mark.parametrize("quantizer", [LeastSquares(), Ternary(group=2, group_axis=1, axis=0)], ids=repr)
def test_the_table_counts_what_there_is(quantizer):
    params = quantize(random_params() | {"embedding": np.ones((3, 2), np.float32)}, quantizer)
    packed = pack(params, quantizer)
    table, of_params = tabulate(packed), tabulate(params, quantizer)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, Packed))]
    assert [8 * size for size in sizes] == [row.bits for row in table.rows]
    assert table.nbytes == of_params.nbytes == sum(sizes)
    assert table.nbytes_whole == of_params.nbytes_whole == sum(x.nbytes for x in jax.tree.leaves(params))
    for mine, theirs in zip(table.rows, of_params.rows, strict=True):
        assert dataclasses.replace(mine, gap=None, rule="") == dataclasses.replace(theirs, gap=None, rule="")
        assert mine.rule == ("packed" if theirs.quantizer else theirs.rule)
    assert "80 of 100 numbers in 1 of 5 leaves are quantized" in str(table)


def test_what_is_whole_in_a_packed_tree_was_left_so():
    params = {"conv": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    packed = pack(params, {"head": None, "*": Binary()})
    assert [row.rule for row in tabulate(packed).rows] == ["packed", "not packed"]


@pytest.mark.parametrize(
    "use", [quantize, pack, stam_jax.stam(optax.sgd(1.0), hard_from=1).init], ids=["quantize", "pack", "init"]
)
def test_a_packed_tree_must_be_unpacked_to_be_quantized_again(use):
    # Its codes and scales are leaves that no rule knows, so that nothing would be quantized but the rest.
    packed = {"conv": pack({"kernel": jnp.ones((2, 2))}), "head": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match="'conv/kernel' is packed already: unpack the tree first"):
        use(packed)


def test_everything_about_packing_is_public():
    names = {"Packed", "PackedFileError", "load_packed", "pack", "packed_metadata", "save_packed", "unpack"}
    assert names | {"tabulate"} <= set(stam_jax.__all__)


@pytest.mark.slow
def test_resnet18_with_every_kernel_binary_takes_a_29th(tmp_path):
    from experiments.data.image_sets import Images
    from experiments.networks import models

    images = Images(
        labels=tuple("0123456789"), shape=(32, 32, 3), brightest=255, mean=(0.0,) * 3, deviation=(1.0,) * 3
    )
    draw = lambda key: models.split(models.build("resnet18", images, width=1.0, key=key))[1:]
    params, stats = jax.jit(draw)(jax.random.key(0))
    params = quantize(params)
    whole = {"params": quantize(params), "stats": stats}
    size = save_packed(tmp_path / "file", {"params": pack(params), "stats": stats})
    assert 29 * size <= sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert f"{size:,} bytes" in (DOCS / "deploy.md").read_text()
    assert same_bits(unpack(load_packed(tmp_path / "file", like=whole)), whole)
    rows = tabulate(load_packed(tmp_path / "file")).rows
    assert all(row.quantizer for row in rows if row.path.endswith("kernel"))
    assert sum(math.prod(row.shape) for row in rows if row.path.startswith("params")) == 11_173_962


def test_what_is_left_whole_beside_packed_leaves_is_whole_in_the_table():
    weights = {"head": {"kernel": jnp.ones((2, 3))}, "body": {"kernel": jnp.ones((3, 2))}}
    table = tabulate(pack(weights, {"head": None, "*": Binary()}))
    assert [row.quantizer for row in table.rows] == [Binary(axis=-1), None]
