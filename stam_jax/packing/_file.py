"""Packed networks on disk: safetensors files with a few bits per quantized weight. See docs/format.md."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import _paths
from stam_jax.packing import _safetensors
from stam_jax.packing._packed import BUILT_IN, Packed, is_packed, options_of, quantizer_of
from stam_jax.quantizers import Quantizer, Scaled, bits_per_weight, level_count

VERSION = 2
_KEY, _CODES, _SCALES = "stam_jax", "#codes", "#scales"
_DTYPES = {
    np.dtype(dtype).name: np.dtype(dtype)
    for dtype in ("float64", "float32", "float16", jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
}


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
    leaves = {
        name: leaf for name, leaf in _paths.flatten_named(tree, is_packed)[0].items() if not _hole(leaf)
    }
    arrays: dict[str, np.ndarray] = {}
    packed: dict[str, Packed] = {}
    for name, leaf in leaves.items():
        parts = {name: leaf}
        if is_packed(leaf):
            packed[name] = leaf
            parts = {name + _CODES: leaf.codes, name + _SCALES: leaf.scales}
        for key, part in parts.items():
            if key in arrays:
                raise ValueError(f"save_packed: the name of the leaf {name!r} is taken: rename it.")
            arrays[key] = _array(name, part)
    described = {name: _described(name, leaf) for name, leaf in packed.items()}
    _see_promises_kept(packed)
    body = {
        "version": VERSION,
        "bit_order": "little",
        "packed": described,
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
    body, arrays = _read(path, quantizers)
    leaves: dict[str, Any] = {}
    for name, leaf in body["packed"].items():
        codes, scales = arrays.pop(name + _CODES), arrays.pop(name + _SCALES)
        leaves[name] = dataclasses.replace(leaf, codes=codes, scales=scales)
    leaves |= arrays
    if like is None:
        return leaves
    return _in_shape_of(like, leaves, path)


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
    return _read(Path(path), None)[0]["metadata"]


def _hole(leaf: Any) -> bool:
    return not is_packed(leaf) and _paths.is_masked(leaf)


def _array(name: str, leaf: Any) -> np.ndarray:
    """A leaf as it is stored."""
    try:
        array = np.asarray(leaf)
    except TypeError as error:
        raise TypeError(f"save_packed: the leaf {name!r} is not an array: {error}") from error
    if array.dtype == object:
        raise TypeError(f"save_packed: the leaf {name!r} is {leaf!r}, not an array.")
    return array


def _see_promises_kept(packed: dict[str, Packed]) -> None:
    """Raise for a packed leaf that is not what its quantizer promises."""
    for name, leaf in packed.items():
        try:
            _see_fit(leaf, leaf.codes, leaf.scales)
            _see_contents(leaf, np.asarray(leaf.codes), np.asarray(leaf.scales))
        except ValueError as error:
            raise ValueError(f"save_packed: the leaf {name!r}: {error}") from error


def _see_fit(leaf: Packed, codes: Any, scales: Any) -> None:
    """Raise for codes and scales that cannot be those of a leaf, by shapes and dtypes."""
    *rows, row = leaf.shape or (1,)
    try:
        shape = _shape_of_scales(leaf.quantizer, leaf.shape)
        expected = (*rows, -(-row * leaf.bits // 8))
    except Exception as error:  # Whatever a quantizer says of shapes that it cannot use.
        raise ValueError(f"its quantizer cannot have its shape: {error}") from error
    if codes.dtype != np.uint8 or codes.shape != expected:
        raise ValueError(f"its codes are {codes.dtype}{list(codes.shape)} and not uint8{list(expected)}.")
    if scales.dtype not in (np.float32, np.float64):
        raise ValueError(f"its scales are {scales.dtype} and neither float32 nor float64.")
    if scales.shape != shape:
        raise ValueError(f"its scales are of shape {list(scales.shape)} and not {list(shape)}.")


@functools.lru_cache(maxsize=1024)
def _shape_of_scales(quantizer: Quantizer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an array."""
    return jax.eval_shape(quantizer.scales, jax.ShapeDtypeStruct(shape, np.float32)).shape


def _see_contents(leaf: Packed, codes: np.ndarray, scales: np.ndarray) -> None:
    """Raise for codes and scales of a leaf that its quantizer does not have."""
    quantizer, bits = leaf.quantizer, leaf.bits
    if not np.all(np.isfinite(scales)):
        raise ValueError("it has scales that are not finite.")
    fixed = quantizer.scale if isinstance(quantizer, Scaled) else None
    if type(quantizer) in BUILT_IN.values() and (
        np.any(scales < 0) or (fixed is not None and np.any(scales != scales.dtype.type(fixed)))
    ):
        raise ValueError(f"it has scales that {quantizer!r} does not have.")
    levels = level_count(quantizer, leaf.shape)
    if codes.size and levels < 2**bits:
        flags = np.unpackbits(codes, axis=-1, bitorder="little")
        flags = flags[..., : flags.shape[-1] // bits * bits]
        fields = flags.reshape(*flags.shape[:-1], -1, bits)
        largest = np.max(fields @ (1 << np.arange(bits, dtype=np.uint8)), initial=0)
        if largest >= levels:
            raise ValueError(f"it has a code {largest} that {quantizer!r} does not have.")


def _described(name: str, leaf: Packed) -> dict[str, Any]:
    """What the file says of a packed leaf beside its codes and scales."""
    try:
        options = options_of(leaf.quantizer)
    except TypeError as error:
        raise TypeError(f"save_packed: the leaf {name!r}: {error}") from error
    return {
        "shape": list(leaf.shape),
        "dtype": leaf.dtype.name,
        "bits": leaf.bits,
        "quantizer": {"name": type(leaf.quantizer).__name__, "options": options},
    }


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


def _read(path: Path, quantizers: Sequence[type[Quantizer]] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of itself, packed leaves as `Packed` without contents, and its arrays.

    Quantisers are looked up unless they are None.
    """

    def accept(texts: dict[str, str], entries: dict[str, _safetensors.Entry]) -> tuple[Any, Any]:
        if _KEY not in texts:
            raise ValueError("it is a safetensors file, but none of save_packed.")
        try:
            said = json.loads(texts[_KEY])
            version = said["version"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError("what it says of itself cannot be read.") from error
        if type(version) is not int or version != VERSION:
            raise ValueError(f"it is of format version {version!r}; this release reads version {VERSION}.")
        if not isinstance(said.get("packed"), dict) or not isinstance(said.get("metadata"), dict):
            raise ValueError("what it says of itself is incomplete.")
        if said.get("bit_order") != "little":
            raise ValueError(f"its bit order is {said.get('bit_order')!r}, and not 'little'.")
        if quantizers is None:
            return said, {}
        known = BUILT_IN | {cls.__name__: cls for cls in quantizers}
        return said, {name: _leaf(name, value, entries, known) for name, value in said["packed"].items()}

    try:
        (said, packed), arrays = _safetensors.read(path, accept)
        found = said.pop("sha256", None)
        if found != _digest(said, arrays):
            raise ValueError("its contents do not match its digest: it was altered or damaged.")
        for name, leaf in packed.items():
            try:
                _see_contents(leaf, arrays[name + _CODES], arrays[name + _SCALES])
            except ValueError as error:
                raise ValueError(f"the leaf {name!r}: {error}") from error
    except ValueError as error:
        raise PackedFileError(f"{path}: {error}") from error
    return said | {"packed": packed}, arrays


def _leaf(
    name: str, value: Any, entries: dict[str, _safetensors.Entry], known: dict[str, type[Any]]
) -> Packed:
    """A packed leaf without its contents, which are seen to fit."""
    try:
        kind, options = value["quantizer"]["name"], dict(value["quantizer"]["options"])
        shape, dtype, bits = value["shape"], _DTYPES[value["dtype"]], value["bits"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what it says of the leaf {name!r} cannot be read: {error!r}.") from error
    if not _safetensors.is_shape(shape):
        raise ValueError(f"the leaf {name!r} cannot have the shape that it says.")
    shape = tuple(shape)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"the leaf {name!r} has the quantizer {kind!r}, which is unknown here; known are "
            f"{', '.join(known)}. Name a class of your own in `quantizers`."
        )
    try:
        quantizer = quantizer_of(known[kind], options)
        found = bits_per_weight(quantizer, shape)
    except Exception as error:  # Whatever a class says of options that it does not know.
        raise ValueError(f"the leaf {name!r} has a quantizer that cannot be: {error}") from error
    if type(bits) is not int or not 1 <= bits <= 8 or bits != found:
        raise ValueError(f"the leaf {name!r} has {bits!r} bits, and its quantizer {found}.")
    if name in entries:
        raise ValueError(f"it has the leaf {name!r} twice, packed and whole.")
    leaf = Packed(codes=None, scales=None, shape=shape, dtype=dtype, quantizer=quantizer)
    for part in (name + _CODES, name + _SCALES):
        if part not in entries:
            raise ValueError(f"it lacks the array {part!r}.")
    try:
        _see_fit(leaf, entries[name + _CODES], entries[name + _SCALES])
    except ValueError as error:
        raise ValueError(f"the leaf {name!r}: {error}") from error
    return leaf


def _in_shape_of(like: Any, leaves: dict[str, Any], path: Path) -> Any:
    """The leaves in the structure of another tree.

    Raises:
        ValueError: if a leaf is missing or left over, or of another shape or dtype.
    """
    wanted, structure = _paths.flatten_named(like, lambda node: is_packed(node) or _paths.is_masked(node))
    names = [name for name, leaf in wanted.items() if not _hole(leaf)]
    for name in [*names, *leaves]:
        if name not in leaves or name not in names:
            where = "like has but the file lacks" if name not in leaves else "the file has but like lacks"
            raise ValueError(f"{path}: there is a leaf {name!r} that {where}.")
    for name in names:
        other = wanted[name] if hasattr(wanted[name], "shape") else np.asarray(wanted[name])
        mine, theirs = ((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in (leaves[name], other))
        if mine != theirs:
            say = lambda leaf: f"{leaf[1]}{list(leaf[0])}"
            raise ValueError(
                f"{path}: the leaf {name!r} is {say(mine)} in the file and {say(theirs)} in like."
            )
    filled = [leaf if _hole(leaf) else leaves[name] for name, leaf in wanted.items()]
    return jax.tree.unflatten(structure, filled)
