"""Packed networks on disk: safetensors files with a few bits per quantized weight. See docs/format.md."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import _assignment, _paths
from stam_jax._packed import BUILT_IN, Packed, described, is_packed, layout, quantizer_of
from stam_jax.packing import _safetensors
from stam_jax.quantizers import Quantizer, Scaled

VERSION = 2
_KEY, _CODES, _SCALES = "stam_jax", "#codes", "#scales"
_DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in ("float64", "float32", "float16", jnp.bfloat16)}


class PackedFileError(ValueError):
    """A file that is not what `save_packed` has written: foreign, cut, altered, or of another version."""


def save_packed(path: str | Path, tree: Any, *, metadata: Mapping[str, Any] | None = None) -> int:
    """Write a network, its quantized weights in few bits, to a safetensors file.

    `load_packed` gives back every leaf bit for bit. The file is there whole or, if writing fails, as it was
    before; the same tree makes the same bytes. Batch-norm statistics and the like belong into the tree too,
    for the network to be whole: `save_packed(path, {"params": pack(params), "stats": stats})`.

    Args:
        path: of the file; one that is there is replaced.
        tree: what `pack` returns, or a tree of such trees and arrays. Leaves are stored by the names of their
            paths, such as `"params/head/kernel"`.
        metadata: anything that JSON can say, by name, to be kept in the file; see `packed_metadata`.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: with its name, for a leaf that is not what its quantizer promises, or whose name is taken.
        TypeError: with its name, for a leaf that cannot be stored, as random keys; or for metadata that JSON
            cannot say.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from stam_jax import load_packed, pack, save_packed, unpack
        >>> params = {"kernel": jnp.array([[2.0, -1.0], [-2.0, 1.0]]), "bias": jnp.array([0.3, 0.4])}
        >>> packed = pack(params)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_packed(f"{folder}/network.safetensors", packed, metadata={"seed": 0})
        ...     loaded = load_packed(f"{folder}/network.safetensors", like=params)
        >>> print(unpack(loaded)["kernel"])
        [[ 2. -1.]
         [-2.  1.]]
    """
    arrays: dict[str, np.ndarray] = {}
    packed: dict[str, Any] = {}
    for name, leaf in _paths.flatten_named(tree, is_packed)[0].items():
        parts = {name: leaf}
        try:
            if is_packed(leaf):
                parts = {name + _CODES: leaf.codes, name + _SCALES: leaf.scales}
                packed[name] = described(leaf.shape, leaf.dtype, leaf.quantizer) | {"bits": leaf.bits}
            parts = {key: _array(part) for key, part in parts.items()}
            if is_packed(leaf):
                _check(dataclasses.replace(leaf, codes=parts[name + _CODES], scales=parts[name + _SCALES]))
        except (TypeError, ValueError, RuntimeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"save_packed: the leaf {name!r} cannot be stored: {error}") from error
        if not arrays.keys().isdisjoint(parts):
            raise ValueError(f"save_packed: the name of the leaf {name!r} is taken: rename it.")
        arrays |= parts
    body = {
        "version": VERSION,
        "bit_order": "little",
        "packed": packed,
        "metadata": dict(metadata or {}),
    }
    try:
        # As it will be read: keys that are numbers have become texts.
        body = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"save_packed: JSON cannot say the metadata: {error}") from error
    text = json.dumps(body | {"sha256": _digest(body, arrays)}, separators=(",", ":"))
    try:
        return _safetensors.write(Path(path), arrays, {_KEY: text})
    except (TypeError, ValueError) as error:
        raise type(error)(f"save_packed: {error}") from error


def load_packed(path: str | Path, like: Any = None, *, quantizers: Sequence[type[Quantizer]] = ()) -> Any:
    """Read a file of `save_packed`: `unpack` of what is returned gives the network, bit for bit.

    Nothing in the file is executed, and nothing of it is believed before it fits: a damaged or foreign file
    is an error before much memory is asked for.

    Args:
        path: of the file.
        like: a tree with the names, shapes and dtypes of the one that was saved, such as the parameters (or
            `jax.ShapeDtypeStruct`s, or packed ones): the result has its structure. By default the result is a
            dictionary by name.
        quantizers: classes of quantizers of your own that the file may name, with names of their own.

    Returns:
        The tree: a `Packed` for each leaf in few bits, a NumPy array for every other.

    Raises:
        PackedFileError: if the file is not what `save_packed` has written, or names an unknown quantizer.
        ValueError: with its name, if a leaf of `like` differs from the file's; or for two quantizers of one
            name.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from stam_jax import load_packed, pack, save_packed
        >>> params = {"kernel": jnp.array([[2.0, -1.0], [-2.0, 1.0]]), "bias": jnp.array([0.3, 0.4])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_packed(f"{folder}/network.safetensors", pack(params))
        ...     loaded = load_packed(f"{folder}/network.safetensors")
        >>> print(loaded["bias"], loaded["kernel"].bits)
        [0.3 0.4] 1
    """
    path = Path(path)
    names = [cls.__name__ for cls in quantizers]
    if len({*names, *BUILT_IN}) != len(names) + len(BUILT_IN):
        raise ValueError(f"load_packed: the quantizers {', '.join(names)} must have names of their own.")
    known = BUILT_IN | dict(zip(names, quantizers, strict=True))
    said, arrays = _read(path)
    packed: dict[str, Any] = {}
    for name, value in said["packed"].items():
        codes, scales = arrays.pop(name + _CODES, None), arrays.pop(name + _SCALES, None)
        try:
            packed[name] = _leaf(value, codes, scales, known)
        except (TypeError, KeyError, ValueError) as error:
            raise PackedFileError(f"{path}: the leaf {name!r} cannot be read: {error}") from error
    if twice := packed.keys() & arrays.keys():
        raise PackedFileError(f"{path}: it has the leaves {', '.join(twice)} twice, packed and whole.")
    leaves = packed | arrays
    return leaves if like is None else _in_shape_of(like, leaves, path)


def packed_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that were given to `save_packed`, from a file that is seen to be whole.

    Args:
        path: of the file.

    Returns:
        A dictionary, as JSON gives it back: its keys are texts.

    Raises:
        PackedFileError: as `load_packed`; but for the quantizers, which are not looked up.
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from stam_jax import packed_metadata, save_packed
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/network.safetensors"
        ...     size = save_packed(path, {"bias": jnp.zeros(2)}, metadata={"seed": 0})
        ...     print(packed_metadata(path))
        {'seed': 0}
    """
    return _read(Path(path))[0]["metadata"]


def _array(leaf: Any) -> np.ndarray:
    """A leaf as it is stored."""
    array = np.asarray(leaf)
    if array.dtype == object:
        raise TypeError(f"{leaf!r} is not an array: save the arrays of the tree, as eqx.filter leaves them.")
    return array


def _check(leaf: Packed) -> None:
    """Raise for codes and scales that are not what the quantizer gives an array of that shape."""
    quantizer, codes, scales = leaf.quantizer, leaf.codes, leaf.scales
    *rows, row = leaf.shape or (1,)
    try:
        bits, levels, shape = layout(quantizer, leaf.shape)
    except Exception as error:  # Whatever a quantizer says of shapes that it cannot use.
        raise ValueError(f"its quantizer cannot have its shape: {error}") from error
    expected = (*rows, -(-row * bits // 8))
    if codes.dtype != np.uint8 or codes.shape != expected:
        raise ValueError(f"its codes are {codes.dtype}{list(codes.shape)} and not uint8{list(expected)}.")
    if str(scales.dtype) not in ("float32", "float64") or scales.shape != shape:
        raise ValueError(f"its scales are {scales.dtype}{list(scales.shape)} and not float32{list(shape)}.")
    if not np.all(np.isfinite(scales)):
        raise ValueError("it has scales that are not finite.")
    fixed = quantizer.scale if isinstance(quantizer, Scaled) else None
    if type(quantizer) in BUILT_IN.values() and (
        np.any(scales < 0) or (fixed is not None and np.any(scales != scales.dtype.type(fixed)))
    ):
        raise ValueError(f"it has scales that {quantizer!r} does not have.")
    if codes.size and levels < 2**bits:
        flags = np.unpackbits(codes, axis=-1, count=row * bits, bitorder="little")
        largest = np.max(flags.reshape(-1, bits) @ (1 << np.arange(bits, dtype=np.uint8)))
        if largest >= levels:
            raise ValueError(f"it has a code {largest} that {quantizer!r} does not have.")


def _digest(body: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all that a file says, however it is laid out."""
    digest = hashlib.sha256()
    say = lambda value: digest.update(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
    say(body)
    for name in sorted(arrays):
        array = arrays[name]
        say([name, array.dtype.name, list(array.shape)])
        digest.update(_safetensors.contents(array))
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of itself, and its arrays; it is seen to be whole, but not yet to make sense."""
    try:
        texts, arrays = _safetensors.read(path)
        if _KEY not in texts:
            raise ValueError("it is a safetensors file, but none of save_packed.")
        try:
            said = json.loads(texts[_KEY])
            version = said["version"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError("what it says of itself cannot be read.") from error
        if type(version) is not int or version != VERSION:
            raise ValueError(f"it is of format version {version!r}; this release reads version {VERSION}.")
        if said.pop("sha256", None) != _digest(said, arrays):
            raise ValueError("its contents do not match its digest: it was altered or damaged.")
        if not isinstance(said.get("packed"), dict) or not isinstance(said.get("metadata"), dict):
            raise ValueError("what it says of itself is incomplete.")
        if said.get("bit_order") != "little":
            raise ValueError(f"its bit order is {said.get('bit_order')!r}, and not 'little'.")
    except ValueError as error:
        raise PackedFileError(f"{path}: {error}") from error
    return said, arrays


def _leaf(value: Any, codes: Any, scales: Any, known: Mapping[str, type[Any]]) -> Packed:
    """A packed leaf, which is seen to make sense."""
    if codes is None or scales is None:
        raise ValueError("its codes or its scales are missing.")
    kind, options = value["quantizer"]["name"], dict(value["quantizer"]["options"])
    shape, dtype = value["shape"], _DTYPES[value["dtype"]]
    if not _safetensors.is_shape(shape):
        raise ValueError("it cannot have the shape that it says.")
    if kind not in known:
        raise ValueError(
            f"it has the quantizer {kind!r}, which is unknown here; known are {', '.join(known)}. Name a "
            "class of your own in `quantizers`."
        )
    try:
        quantizer = quantizer_of(known[kind], options)
    except Exception as error:  # Whatever a class says of options that it does not know.
        raise ValueError(f"it has a quantizer that cannot be: {error}") from error
    leaf = Packed(codes=codes, scales=scales, shape=tuple(shape), dtype=dtype, quantizer=quantizer)
    _check(leaf)
    if value["bits"] != leaf.bits:
        raise ValueError(f"it has {value['bits']!r} bits, and its quantizer {leaf.bits}.")
    return leaf


def _in_shape_of(like: Any, leaves: dict[str, Any], path: Path) -> Any:
    """The leaves in the structure of another tree.

    Raises:
        ValueError: if a leaf is missing or left over, or of another shape or dtype.
    """
    wanted, structure = _paths.flatten_named(like, is_packed)
    if wanted.keys() != leaves.keys():
        only = lambda these, those: _assignment.listed(repr(n) for n in these if n not in those) or "none"
        raise ValueError(
            f"{path}: like must have the leaves of the file, by name. Leaves of the file alone: "
            f"{only(leaves, wanted)}. Of like alone: {only(wanted, leaves)}."
        )
    for name in wanted:
        other = wanted[name] if hasattr(wanted[name], "shape") else np.asarray(wanted[name])
        mine, theirs = (f"{np.dtype(x.dtype)}{list(x.shape)}" for x in (leaves[name], other))
        if mine != theirs:
            raise ValueError(f"{path}: the leaf {name!r} is {mine} in the file and {theirs} in like.")
    return jax.tree.unflatten(structure, [leaves[name] for name in wanted])
