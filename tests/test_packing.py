"""Packed networks give back every bit, from memory and from disk; damaged files give nothing."""

import concurrent.futures
import dataclasses
import enum
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import equinox as eqx
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import stam_jax
from experiments import models
from experiments.data import Images
from stam_jax import (
    Binary,
    LeastSquares,
    Packed,
    PackedFileError,
    PowerOfTwo,
    Ternary,
    Uniform,
    hard_params,
    load_packed,
    pack,
    packed_metadata,
    report,
    save_packed,
    stam,
    unpack,
)
from tests import packed_reader

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
QUANTIZERS = [
    Binary(),
    Binary(axis=0),
    Binary(scale="tensor"),
    Binary(scale=None),
    Binary(scale="group", group=2),
    Ternary(),
    Ternary(rule="heuristic", scale="tensor"),
    Ternary(scale="group", group=2, axis=0),
    Uniform(bits=2),
    Uniform(bits=3),
    Uniform(bits=4, scale=None),
    PowerOfTwo(bits=3, scale="tensor"),
    PowerOfTwo(bits=4),
    LeastSquares(bits=2),
    LeastSquares(bits=3, rule="greedy"),
    LeastSquares(bits=3, scale="group", group=4),
]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)


def trained(quantizer: Any, params: Any, mask: Any = None) -> tuple[Any, Any]:
    """An optimiser state whose latent weights are not the parameters, and the parameters."""
    optimizer = stam(0.3, quantizer=quantizer, mask=mask)
    state = optimizer.init(params)
    updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
    return state, jax.tree.map(jnp.add, params, updates)


def random_params(dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal
    return {
        "a": {"kernel": jnp.asarray(draw(size=(4, 4, 5)), dtype), "bias": jnp.asarray(draw(size=5), dtype)},
        "b": [jnp.asarray(draw(size=8), dtype), jnp.asarray(draw(), dtype)],
    }


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = [
        (np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_quantizer
def test_the_hard_network_comes_back_bit_for_bit(tmp_path, quantizer, dtype):
    state, params = trained(quantizer, random_params(dtype))
    hard = hard_params(state, params)
    packed = pack(state, params)
    assert same_bits(unpack(packed), hard)
    assert same_bits(jax.jit(unpack)(packed), hard)
    save_packed(tmp_path / "file", packed)
    assert same_bits(unpack(load_packed(tmp_path / "file", like=params)), hard)
    assert load_packed(tmp_path / "file").keys() == {"a/kernel", "a/bias", "b/0", "b/1"}


@pytest.mark.parametrize("quantizer", [Binary(), Uniform(bits=3), LeastSquares(bits=3, rule="greedy")])
def test_double_precision_comes_back_too(x64, tmp_path, quantizer):
    state, params = trained(quantizer, random_params("float64"))
    save_packed(tmp_path / "file", pack(state, params))
    loaded = load_packed(tmp_path / "file", like=params)
    assert same_bits(unpack(loaded), hard_params(state, params))
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(TypeError, match="float64 is unpacked with jax_enable_x64 only"):
        unpack(loaded)


@every_quantizer
def test_a_reader_in_plain_numpy_finds_the_same_network(tmp_path, quantizer):
    state, params = trained(quantizer, random_params())
    save_packed(tmp_path / "file", pack(state, params))
    hard = hard_params(state, params)
    named = {
        "a/kernel": hard["a"]["kernel"],
        "a/bias": hard["a"]["bias"],
        "b/0": hard["b"][0],
        "b/1": hard["b"][1],
    }
    assert same_bits(packed_reader.read(tmp_path / "file"), named)


def test_the_reader_on_the_page_has_twenty_lines_and_reads(tmp_path):
    _, block = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    body = block[block.index("def read") :].splitlines()
    assert len([line for line in body if line.strip()]) <= 20
    scope: dict[str, Any] = {}
    exec(block, scope)
    for quantizer in (
        Binary(),
        Binary(scale="tensor"),
        Binary(scale=None),
        Ternary(),
        Uniform(bits=3),
        Uniform(bits=4),
    ):
        state, params = trained(quantizer, random_params()["a"])
        save_packed(tmp_path / "file", pack(state, params))
        assert same_bits(scope["read"](tmp_path / "file"), dict(hard_params(state, params)))


# Few shapes, for each of which programs are compiled; the values, names and other leaves are many.
SHAPES = st.sampled_from([(2, 3, 5), (4, 9), (0, 2), (1, 8)])
FLOATS = st.floats(-1e4, 1e4, width=32)
PLAIN = hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.int32, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_side=3),
)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/#"), min_size=1, max_size=5)
TREES = st.recursive(PLAIN, lambda below: st.dictionaries(NAMES, below, max_size=3), max_leaves=4)


@pytest.mark.slow
@settings(max_examples=500)
@given(data=st.data())
def test_random_trees_come_back_bit_for_bit(tmp_path_factory, data):
    quantizer = data.draw(st.sampled_from([q for q in QUANTIZERS if q.scale != "group"]))
    shape = data.draw(SHAPES)
    tree = {data.draw(NAMES): data.draw(hnp.arrays(np.float32, shape, elements=FLOATS))}
    state = stam(0.1, quantizer=quantizer, mask=jax.tree.map(lambda _: True, tree)).init(tree)
    rest, metadata = data.draw(TREES), {"note": data.draw(st.text(max_size=5))}
    path = tmp_path_factory.getbasetemp() / "tree"
    size = save_packed(path, {"packed": pack(state, tree), "rest": rest}, metadata=metadata)
    assert size == path.stat().st_size
    loaded = load_packed(path, like={"packed": tree, "rest": rest})
    assert same_bits(unpack(loaded["packed"]), hard_params(state, tree))
    assert same_bits(loaded["rest"], rest)
    assert packed_metadata(path) == metadata


def test_networks_of_every_framework_are_saved_as_trees_of_their_own(tmp_path):
    class Nnx(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(11)])
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    model = Nnx()
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    # The tenth comes after the second, though not in the order of letters.
    state, params = trained(Binary(), params, stam_jax.select(params, exclude="layers/?/kernel"))
    save_packed(tmp_path / "nnx", {"params": pack(state, params), "stats": stats})
    loaded = unpack(load_packed(tmp_path / "nnx", like={"params": params, "stats": stats}))
    rebuilt = nnx.merge(graph, loaded["params"], loaded["stats"])
    kernel = rebuilt.layers[10].kernel[...]
    np.testing.assert_array_equal(kernel, hard_params(state, params)["layers"][10]["kernel"][...])

    module = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_array)
    state, arrays = trained(Binary(axis=0), arrays)
    save_packed(tmp_path / "equinox", pack(state, arrays))
    back = eqx.combine(unpack(load_packed(tmp_path / "equinox", like=arrays)), static)
    hard = eqx.combine(hard_params(state, arrays), static)
    np.testing.assert_array_equal(back(jnp.ones(3)), hard(jnp.ones(3)))


def test_jit_takes_packed_networks_and_keeps_them_packed():
    params = {"kernel": jax.random.normal(jax.random.key(0), (256, 64))}
    state = stam(0.1).init(params)
    packed = jax.device_put(pack(state, params))
    apply = jax.jit(lambda packed, x: x @ unpack(packed)["kernel"])
    x = jax.random.normal(jax.random.key(1), (5, 256))
    np.testing.assert_allclose(
        apply(packed, x), x @ hard_params(state, params)["kernel"], rtol=1e-5, atol=1e-5
    )
    sizes: Any = apply.lower(packed, x).compile().memory_analysis()
    assert sizes.argument_size_in_bytes == 256 * 64 // 8 + 64 * 4 + x.nbytes
    assert packed["kernel"].nbytes == 256 * 64 // 8 + 64 * 4


def test_a_wide_network_takes_little_more_than_a_bit_per_weight(tmp_path):
    params = {"kernel": jax.random.normal(jax.random.key(0), (1000, 800))}
    size = save_packed(tmp_path / "file", pack(stam(0.1).init(params), params))
    assert 800_000 / 8 + 800 * 4 < size < 800_000 / 8 + 800 * 4 + 700


def test_files_are_the_same_bytes_each_time_and_safetensors_like_any_other(tmp_path):
    state, params = trained(Ternary(), random_params())
    tree = {"packed": pack(state, params), "whole": jnp.arange(3), "narrow": jnp.ones(3, jnp.float16)}
    for name in ("one", "two"):
        save_packed(tmp_path / name, tree, metadata={"a": 1, "b": [1.5, None, "é"]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    arrays = safetensors.numpy.load_file(tmp_path / "one")
    mine = load_packed(tmp_path / "one")
    for name, leaf in mine.items():
        parts = {name: leaf}
        if isinstance(leaf, Packed):
            parts = {f"{name}#codes": leaf.codes, f"{name}#scales": leaf.scales}
        for key, part in parts.items():
            assert same_bits(arrays.pop(key), part)
    assert not arrays
    assert list(tmp_path.glob("*.part")) == []


def test_what_the_package_writes_is_read(tmp_path):
    """The reader takes any safetensors file that says of itself what it should."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    save_packed(tmp_path / "mine", pack(stam(0.1).init(params), params))
    with safetensors.safe_open(tmp_path / "mine", framework="np") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata)
    assert same_bits(load_packed(tmp_path / "theirs"), load_packed(tmp_path / "mine"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A file with nothing wrong."""
    path = tmp_path_factory.mktemp("good") / "file"
    state, params = trained(Ternary(), random_params())
    save_packed(path, pack(state, params), metadata={"seed": 0})
    return path


def remade(good: Path, change: Any) -> bytes:
    """The file with its header and what it says of itself changed."""
    data = good.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    said = json.loads(header["__metadata__"]["stam_jax"])
    change(header, said)
    if "stam_jax" in header["__metadata__"]:
        header["__metadata__"]["stam_jax"] = json.dumps(said)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def packed_as(**values: Any) -> Any:
    return lambda header, said: said["packed"]["a/kernel"].update(values)


def quantizer_as(**values: Any) -> Any:
    return lambda header, said: said["packed"]["a/kernel"]["quantizer"].update(values)


def option_as(**values: Any) -> Any:
    return lambda header, said: said["packed"]["a/kernel"]["quantizer"]["options"].update(values)


def entry_as(**values: Any) -> Any:
    return lambda header, said: header["a/kernel#codes"].update(values)


NOTHING = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
CHANGES = {
    "version": (
        lambda header, said: said.update(version=2),
        "of format version 2; this release reads version 1",
    ),
    "version of truth": (lambda header, said: said.update(version=True), "of format version True"),
    "no version": (lambda header, said: said.pop("version"), "cannot be read"),
    "bit order": (lambda header, said: said.update(bit_order="big"), "its bit order is 'big'"),
    "no list": (lambda header, said: said.update(packed=[]), "incomplete"),
    "foreign": (lambda header, said: header["__metadata__"].pop("stam_jax"), "none of save_packed"),
    "digest": (lambda header, said: said.update(sha256="0" * 64), "do not match its digest"),
    "no digest": (lambda header, said: said.pop("sha256"), "do not match its digest"),
    "metadata": (lambda header, said: said["metadata"].update(seed=1), "do not match its digest"),
    "shape bomb": (packed_as(shape=[10**6, 10**6, 10**5]), "its codes are"),
    "empty bomb": (packed_as(shape=[2**62, 0]), "cannot have the shape that it says"),
    "endless shape": (packed_as(shape=[10**30, 4, 5]), "cannot have the shape that it says"),
    "many axes": (packed_as(shape=[1] * 1000), "cannot have the shape that it says"),
    "shape of text": (packed_as(shape=["3", 4, 5]), "cannot have the shape that it says"),
    "shape of truths": (packed_as(shape=[True, 4, 5]), "cannot have the shape that it says"),
    "negative shape": (packed_as(shape=[-3, -4, 5]), "cannot have the shape that it says"),
    "other shape": (packed_as(shape=[5, 4, 4]), "its codes are"),
    "dtype": (packed_as(dtype="os.system"), "cannot be read"),
    "structured dtype": (packed_as(dtype="<f4,<f4"), "cannot be read"),
    "dtype that is code": (packed_as(dtype="(,,f4,f4"), "cannot be read"),
    "dtype of nothing": (packed_as(dtype=None), "cannot be read"),
    "dtype of integers": (packed_as(dtype="int8"), "cannot be read"),
    "dtype of a list": (packed_as(dtype=["float32"]), "cannot be read"),
    "bits": (packed_as(bits=7), "has 7 bits, and its quantiser 2"),
    "quantiser": (quantizer_as(name="Eval"), "'Eval', which is unknown here; known are Binary, Ternary"),
    "quantiser of a list": (quantizer_as(name=["Ternary"]), "which is unknown here"),
    "no quantiser": (packed_as(quantizer=None), "cannot be read"),
    "option": (option_as(colour="red"), "a quantiser that cannot be"),
    "wrong option": (option_as(scale="rainbow"), "scale must be"),
    "list option": (option_as(axis=[1]), "a quantiser that cannot be|cannot have its shape"),
    "other axis": (option_as(axis=7), "its quantiser cannot have its shape"),
    "other scales": (option_as(scale="tensor"), r"its scales are of shape \[1, 1, 5\] and not \[1, 1, 1\]"),
    "leaf twice": (
        lambda header, said: said["packed"].update({"b/0": said["packed"]["a/kernel"]}),
        "lacks|twice",
    ),
    "entry bomb": (entry_as(shape=[10**12]), "the bytes of the array 'a/kernel#codes' cannot make its shape"),
    "endless entry": (entry_as(data_offsets=[0, 10**40]), "cannot make its shape"),
    "entry dtype": (entry_as(dtype="F128"), "cannot be read"),
    "entry of list": (lambda header, said: header.update({"x": []}), "cannot be read"),
    "overlap": (entry_as(data_offsets=[0, 32]), "does not begin where the one before it ends"),
    "axes": (entry_as(shape=[1] * 1000), "cannot make its shape"),
    "missing": (
        lambda header, said: said["packed"].update(b=said["packed"]["a/kernel"]),
        "lacks the array 'b#codes'",
    ),
    "metadata of lists": (lambda header, said: header["__metadata__"].update(a=[]), "not texts by name"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_was_altered_is_refused_before_it_is_believed(tmp_path, good, name):
    change, words = CHANGES[name]
    (tmp_path / "file").write_bytes(remade(good, change))
    tracemalloc.start()
    with pytest.raises(PackedFileError, match=words) as caught:
        load_packed(tmp_path / "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(tmp_path / "file") in str(caught.value)
    assert peak < 20_000_000


def test_the_untouched_file_is_read_after_the_same_handling(tmp_path, good):
    (tmp_path / "file").write_bytes(remade(good, lambda header, said: None))
    assert same_bits(load_packed(tmp_path / "file"), load_packed(good))


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
    foreign += [(n).to_bytes(8, "little") + data[8:] for n in (0, 1, 2**63, 2**64 - 1)]
    foreign += [
        (len(deep)).to_bytes(8, "little") + deep for deep in (b"[" * 10_000, b'{"a":' * 10_000, b"[]", b"1")
    ]
    entry = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    twice = b"{" + entry + b"," + entry + b"}"
    foreign.append(len(twice).to_bytes(8, "little") + twice)
    damaged = [*cuts, *flips, *foreign]
    assert len(damaged) >= 400
    path = tmp_path / "file"
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(PackedFileError):
            load_packed(path)
        with pytest.raises(PackedFileError):
            packed_metadata(path)


def signed(path: Path, **parts: Any) -> None:
    """A file with a digest that is right, as docs/format.md says, whatever its leaf `kernel` holds."""
    compact = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    arrays = {f"kernel#{part}": np.asarray(parts.pop(part)) for part in ("codes", "scales")}
    said = {"version": 1, "bit_order": "little", "packed": {"kernel": parts}, "metadata": {}}
    digest = hashlib.sha256(compact(said))
    for name in sorted(arrays):
        digest.update(compact([name, arrays[name].dtype.name, list(arrays[name].shape)]))
        digest.update(arrays[name].tobytes())
    text = json.dumps(said | {"sha256": digest.hexdigest()})
    safetensors.numpy.save_file(arrays, path, {"stam_jax": text})


TWO = {"shape": [2, 2], "dtype": "float32", "bits": 1, "codes": np.zeros((2, 1), np.uint8)}
THREE = {"shape": [2, 1], "dtype": "float32", "bits": 2, "scales": np.ones((1, 1), np.float32)}


@pytest.mark.parametrize("scales", [[1.0, np.inf], [np.nan, 1.0], [-1.0, 1.0]], ids=str)
def test_scales_that_no_network_has_are_refused_though_the_digest_be_right(tmp_path, scales):
    quantizer = {"name": "Binary", "options": {}}
    signed(tmp_path / "file", **TWO, quantizer=quantizer, scales=np.ones((1, 2), np.float32))
    assert load_packed(tmp_path / "file").keys() == {"kernel"}
    signed(tmp_path / "file", **TWO, quantizer=quantizer, scales=np.array([scales], np.float32))
    with pytest.raises(PackedFileError, match=r"the leaf 'kernel' has scales that"):
        load_packed(tmp_path / "file")
    without = {"name": "Binary", "options": {"scale": None}}
    signed(tmp_path / "file", **TWO, quantizer=without, scales=np.full((1, 1), 3, np.float32))
    with pytest.raises(PackedFileError, match="the leaf 'kernel' has scales that Binary"):
        load_packed(tmp_path / "file")


def test_codes_of_no_level_are_refused_though_the_digest_be_right(tmp_path):
    quantizer = {"name": "Ternary", "options": {}}
    signed(tmp_path / "file", **THREE, quantizer=quantizer, codes=np.array([[2], [0]], np.uint8))
    np.testing.assert_array_equal(unpack(load_packed(tmp_path / "file"))["kernel"], [[1], [-1]])
    signed(tmp_path / "file", **THREE, quantizer=quantizer, codes=np.array([[2], [3]], np.uint8))
    with pytest.raises(PackedFileError, match="the leaf 'kernel' has a code 3 that Ternary"):
        load_packed(tmp_path / "file")


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_leaves_without_weights_are_stored(tmp_path, shape):
    params = {"kernel": jnp.zeros(shape)}
    for quantizer in (Binary(), Ternary()):
        state = stam(0.1, quantizer=quantizer).init(params)
        save_packed(tmp_path / "file", pack(state, params))
        assert same_bits(unpack(load_packed(tmp_path / "file", like=params)), params)


def test_a_packed_leaf_with_scales_that_are_not_finite_is_not_saved(tmp_path):
    params = {"kernel": jnp.ones((2, 2))}
    packed = pack(stam(0.1).init(params), params)["kernel"]
    leaf = Packed(packed.codes, jnp.full((1, 2), jnp.inf), packed.shape, packed.dtype, packed.quantizer)
    with pytest.raises(ValueError, match="the leaf 'kernel' does not hold what its quantiser Binary"):
        save_packed(tmp_path / "file", {"kernel": leaf})


def test_metadata_come_back_as_json_has_them(tmp_path):
    """Among them names that are numbers, whose order is another one than that of their texts."""
    save_packed(
        tmp_path / "file", {"x": np.ones(2)}, metadata={"by epoch": {8: 0.5, 9: 0.5, 10: 0.5, 11: 0.5}}
    )
    assert packed_metadata(tmp_path / "file") == {"by epoch": {"8": 0.5, "9": 0.5, "10": 0.5, "11": 0.5}}
    deep: Any = 0
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(TypeError, match="JSON cannot say the metadata"):
        save_packed(tmp_path / "file", {"x": np.ones(2)}, metadata={"deep": deep})


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_the_file_cannot_store_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="has a name that cannot be stored: rename it"):
        save_packed(tmp_path / "file", {name: np.ones(2)})
    assert list(tmp_path.iterdir()) == []


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


def test_small_weights_of_half_precision_are_packed():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)) * 1e-5, jnp.float16)}
    for quantizer in (Uniform(bits=4), PowerOfTwo(bits=4)):
        state = stam(0.1, quantizer=quantizer).init(params)
        assert same_bits(unpack(pack(state, params)), hard_params(state, params))


def test_leaves_may_lie_on_devices_of_their_own(tmp_path):
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from stam_jax import hard_params, pack, stam, unpack

first, second, *_ = jax.devices()
draw = lambda seed: jax.random.normal(jax.random.key(seed), (16, 8))
apart = {"a": jax.device_put(draw(0), first), "b": jax.device_put(draw(1), second)}
state = stam(0.1).init(apart)
hard = hard_params(state, apart)
for name, whole in unpack(pack(state, apart)).items():
    np.testing.assert_array_equal(whole, hard[name])
for axes in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        spread = {"a": jax.device_put(draw(0), NamedSharding(mesh, PartitionSpec(None, "d")))}
        state = stam(0.1).init(spread)
        whole = np.asarray(unpack(pack(state, spread))["a"])
        np.testing.assert_array_equal(whole, np.asarray(hard_params(state, spread)["a"]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"})


def test_weights_that_are_not_numbers_are_not_packed():
    params = {"kernel": jnp.array([[1.0, jnp.nan], [1.0, 2.0]])}
    for scale in ("channel", None):
        state = stam(0.1, quantizer=Binary(scale=scale)).init(params)
        with pytest.raises(
            ValueError, match="the hard weights of the leaf 'kernel' are not what its quantiser"
        ):
            pack(state, params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": np.zeros((2, 2), np.uint8)}, r"its codes are uint8\[2, 2\] and not uint8\[2, 1\]"),
        ({"codes": np.zeros((2, 1), np.int32)}, r"its codes are int32\[2, 1\]"),
        ({"scales": np.ones((1, 2), np.int32)}, "its scales are int32"),
        ({"scales": np.ones((3, 5, 2), np.float32)}, r"its scales are of shape \[3, 5, 2\] and not \[1, 2\]"),
    ],
)
def test_a_packed_leaf_that_does_not_fit_is_not_saved(tmp_path, change, words):
    parts = {"codes": np.zeros((2, 1), np.uint8), "scales": np.ones((1, 2), np.float32)} | change
    leaf = Packed(**parts, shape=(2, 2), dtype=np.dtype("float32"), quantizer=Binary())
    with pytest.raises(ValueError, match=f"save_packed: the leaf 'kernel': {words}"):
        save_packed(tmp_path / "file", {"kernel": leaf})
    assert not (tmp_path / "file").exists()


def test_leaves_that_cannot_be_stored_are_named(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(TypeError, match="save_packed: the leaf 'rngs/key' is not an array"):
        save_packed(path, {"rngs": {"key": jax.random.key(0)}})
    with pytest.raises(TypeError, match="save_packed: the leaf 'f' is <"):
        save_packed(path, {"f": stam})
    with pytest.raises(TypeError, match="the array 'x' has the dtype complex128, which cannot be stored"):
        save_packed(path, {"x": np.ones(2, np.complex128)})
    with pytest.raises(TypeError, match="JSON cannot say the metadata"):
        save_packed(path, {"x": np.ones(2)}, metadata={"x": object()})
    with pytest.raises(TypeError, match="JSON cannot say the metadata"):
        save_packed(path, {"x": np.ones(2)}, metadata={"x": math.nan})
    params = {"kernel": jnp.ones((2, 2)), "kernel#codes": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"the name of the leaf 'kernel(#codes)?' is taken"):
        save_packed(path, pack(stam(0.1).init(params), params))
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
        ({"kernel": np.ones((2, 2))}, "a leaf 'odd' that the file has but like lacks"),
        ({"kernel": 0, "odd": np.int64(0), "more": 0}, "a leaf 'more' that like has but the file lacks"),
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
    params = {"kernel": jnp.ones((2, 2)), "odd": np.int64(3)}
    save_packed(tmp_path / "file", pack(stam(0.1).init(params), params))
    with pytest.raises(ValueError, match=words):
        load_packed(tmp_path / "file", like=like)


def test_the_structure_may_come_from_shapes_or_from_a_packed_tree(tmp_path):
    params = random_params()
    packed = pack(stam(0.1).init(params), params)
    save_packed(tmp_path / "file", packed)
    for like in (params, jax.eval_shape(lambda: params), packed):
        assert same_bits(load_packed(tmp_path / "file", like=like), packed)


def test_holes_of_partitions_are_left_out(tmp_path):
    import optax

    params = {"kernel": jnp.ones((2, 2)), "hole": optax.MaskedNode()}
    save_packed(tmp_path / "file", pack(stam(0.1).init(params), params))
    assert load_packed(tmp_path / "file").keys() == {"kernel"}
    assert load_packed(tmp_path / "file", like=params)["hole"] == optax.MaskedNode()


@dataclasses.dataclass(frozen=True)
class Shifted:
    """Two values, 0 and a power of two: a quantiser of one's own with codes."""

    bits: int = 1

    def scales(self, v: jax.Array) -> jax.Array:
        return jnp.exp2(jnp.round(jnp.log2(jnp.mean(jnp.abs(v)) + 1e-9))).astype(jnp.float32)

    def codes(self, v: jax.Array) -> jax.Array:
        return (v > self.scales(v) / 2).astype(jnp.uint8)

    def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        return codes * scales

    def project(self, v: jax.Array) -> jax.Array:
        return self.decode(self.codes(v), self.scales(v)).astype(v.dtype)

    def contains(self, y: jax.Array) -> jax.Array:
        return jnp.all((y == 0) | (y == jnp.max(y)))


@dataclasses.dataclass(frozen=True)
class Odd(Shifted):
    """One with an option that no file can say."""

    option: Any = ()


def test_quantisers_that_a_file_cannot_say_are_refused(tmp_path):
    class Kind(enum.StrEnum):
        A = "a"

    params = {"kernel": jnp.ones((2, 2))}
    for option in ((), Kind.A, np.int64(2)):
        parts = {"codes": np.zeros((2, 1), np.uint8), "scales": np.ones((), np.float32)}
        leaf = Packed(**parts, shape=(2, 2), dtype=np.dtype("float32"), quantizer=Odd(option=option))
        with pytest.raises(TypeError, match=r"of the leaf 'kernel' has the option option=.*; only whole"):
            save_packed(tmp_path / "file", {"kernel": leaf})
    impostor = type("Binary", (Shifted,), {})
    with pytest.raises(TypeError, match="of the leaf 'kernel' is called Binary, as one of stam_jax is"):
        save_packed(tmp_path / "file", pack(stam(0.1, quantizer=impostor()).init(params), params))
    save_packed(tmp_path / "file", pack(stam(0.1).init(params), params))
    with pytest.raises(ValueError, match="must have names of their own"):
        load_packed(tmp_path / "file", quantizers=[impostor])


def test_a_quantiser_of_ones_own_is_stored_by_its_name(tmp_path):
    state, params = trained(Shifted(), random_params())
    save_packed(tmp_path / "file", pack(state, params))
    with pytest.raises(PackedFileError, match="the quantiser 'Shifted', which is unknown here"):
        load_packed(tmp_path / "file")
    loaded = load_packed(tmp_path / "file", like=params, quantizers=[Shifted])
    assert same_bits(unpack(loaded), hard_params(state, params))
    assert {row.why for row in report(loaded).rows if row.groups} == {"Shifted"}


def test_quantisers_without_codes_or_options_say_so(tmp_path):
    class Thirds:
        bits = 2

        def project(self, v: jax.Array) -> jax.Array:
            return jnp.round(v * 3) / 3

        def contains(self, y: jax.Array) -> jax.Array:
            return jnp.all(y == self.project(y))

    class Loose(Thirds):
        def scales(self, v: jax.Array) -> jax.Array:
            return jnp.ones(())

        def codes(self, v: jax.Array) -> jax.Array:
            return jnp.round(jnp.clip(v, 0, 1) * 3).astype(jnp.uint8)

        def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
            return codes / 3 * scales

    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"'kernel' cannot be packed: its quantiser .* has no scales"):
        pack(stam(0.1, quantizer=Thirds()).init(params), params)
    packed = pack(stam(0.1, quantizer=Loose()).init(params), params)
    with pytest.raises(TypeError, match=r"the quantiser of the leaf 'kernel', .* must be a dataclass"):
        save_packed(tmp_path / "file", packed)


def test_the_report_counts_what_there_is():
    params = random_params() | {"embedding": jnp.ones((3, 2)), "odd": jnp.ones((2, 2))}
    mask = jax.tree.map(lambda x: x.ndim > 1, params) | {"odd": False, "embedding": False}
    state = stam(0.1, quantizer=Ternary(), mask=mask).init(params)
    told = report(pack(state, params))
    rows = {row.path: row for row in told.rows}
    kernel, bias = rows["a/kernel"], rows["a/bias"]
    assert (kernel.bits, kernel.groups, kernel.values, kernel.why) == (2, 5, 3, "Ternary per channel")
    assert (kernel.bytes_whole, kernel.bytes_packed) == (80 * 4, 16 * 2 + 5 * 4)
    assert (bias.bits, bias.groups, bias.values, bias.bytes_packed, bias.why) == (32, 0, 5, 20, "rank 1")
    assert rows["odd"].why == "left in float by choice"
    assert rows["embedding"].why == "embedding"
    assert told.bytes_whole == sum(x.nbytes for x in jax.tree.leaves(params))
    assert told.bytes_packed == sum(row.bytes_packed for row in told.rows)
    assert "80 of 104 numbers in 1 of 6 leaves are packed" in str(told)


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [
        (Binary(scale=None), "Binary without scales"),
        (Binary(scale="group", group=2), "Binary per group of 2"),
        (LeastSquares(bits=2, scale="tensor"), "LeastSquares per tensor"),
    ],
)
def test_the_report_says_how_weights_share_scales(quantizer, words):
    params = {"kernel": random_params()["a"]["kernel"], "empty": jnp.zeros((0, 4))}
    told = report(pack(stam(0.1, quantizer=quantizer).init(params), params))
    assert {row.why for row in told.rows} == {words}
    (kernel,) = (row for row in told.rows if row.path == "kernel")
    assert kernel.values == 2**quantizer.bits
    assert "times less" not in str(report({}))


def test_everything_about_packing_is_public():
    assert {"pack", "unpack", "save_packed", "load_packed", "packed_metadata", "report"} <= set(
        stam_jax.__all__
    )


@pytest.mark.slow
def test_resnet18_with_every_kernel_binary_takes_a_29th(tmp_path):
    images = Images(
        labels=tuple("0123456789"), shape=(32, 32, 3), brightest=255, mean=(0.0,) * 3, deviation=(1.0,) * 3
    )
    draw = lambda key: models.split(models.build("resnet18", images, width=1.0, key=key))[1:]
    params, stats = jax.jit(draw)(jax.random.key(0))
    state = stam(0.1).init(params)
    whole = {"params": hard_params(state, params), "stats": stats}
    size = save_packed(tmp_path / "file", {"params": pack(state, params), "stats": stats})
    assert 29 * size <= sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert same_bits(unpack(load_packed(tmp_path / "file", like=whole)), whole)
    rows = report(load_packed(tmp_path / "file")).rows
    assert all((row.bits, row.values) == (1, 2) for row in rows if row.path.endswith("kernel"))
    assert sum(math.prod(row.shape) for row in rows if row.path.startswith("params")) == 11_173_962
