"""Reading and writing safetensors files: checked before anything is believed, and the same bytes every time.

The `safetensors` package reads what is written here, and the tests hold the two against each other. It is not
used, as the library needs nothing but JAX, Optax and NumPy, and as its NumPy reader knows no bfloat16.

References:
    https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "C64": np.dtype("complex64"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
# What the safetensors package reads; what is longer is refused in writing too.
_LONGEST_HEADER = 100_000_000
_MOST_AXES = 64  # As many as NumPy knows.

T = TypeVar("T")


def is_shape(value: Any) -> bool:
    """Whether a value from a file can be the shape of an array."""
    if not isinstance(value, list | tuple) or len(value) > _MOST_AXES:
        return False
    if not all(type(n) is int and n >= 0 for n in value):
        return False
    # Also of an empty array: what computes with shapes multiplies the other sides.
    return math.prod(max(n, 1) for n in value) < 2**58


class Entry(NamedTuple):
    """What the header says of one array.

    Args:
        dtype: of the array.
        shape: of the array.
        begin: where its bytes begin, behind the header.
        end: where they end.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> int:
    """Write a file, whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        arrays: by name.
        metadata: text by name.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError: for an array of a dtype that the format has no name for.
        ValueError: for a name that the format cannot store.
    """
    for name in arrays:
        if name == _METADATA or not _is_text(name):
            raise ValueError(f"the array {name!r} has a name that cannot be stored: rename it.")
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    # The widest first, so that all are aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    begin = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise TypeError(f"the array {name!r} has the dtype {array.dtype}, which cannot be stored.")
        end = begin + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(
            f"the header takes {len(text):,} bytes, and may take {_LONGEST_HEADER:,}: shorten the metadata."
        )
    path = path.resolve()  # A link stays a link.
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                array = arrays[name]
                file.write(contents(array))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path.stat().st_size


def contents(array: np.ndarray) -> Any:
    """The bytes of an array as they are stored: in C order, little-endian."""
    stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return stored.reshape(-1).view(np.uint8).data


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read(
    path: Path, accept: Callable[[dict[str, str], dict[str, Entry]], T]
) -> tuple[T, dict[str, np.ndarray]]:
    """Read a file whose header holds water.

    Args:
        path: of the file.
        accept: called with the metadata and the entries before the arrays are read; it may raise.

    Returns:
        What `accept` has returned, and the arrays by name.

    Raises:
        ValueError: if it is no such file, or was cut or altered.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        metadata, entries, start = _header(file, size)
        accepted = accept(metadata, entries)
        data = bytearray(size - start)
        if file.readinto(data) != len(data):
            raise ValueError("it is shorter than it says.")
    arrays = {
        name: np.frombuffer(data, entry.dtype.newbyteorder("<"), math.prod(entry.shape), entry.begin)
        .astype(entry.dtype, copy=False)
        .reshape(entry.shape)
        for name, entry in entries.items()
    }
    return accepted, arrays


def _header(file: Any, size: int) -> tuple[dict[str, str], dict[str, Entry], int]:
    """The metadata and the entries of an open file of that size, and where its data start."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("it is not a safetensors file, or was cut off.")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not a safetensors file: its header is no JSON.") from error
    if not isinstance(header, dict):
        raise ValueError("it is not a safetensors file: its header is no JSON object.")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not texts by name.")
    entries = {name: _entry(name, value) for name, value in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != end:
            raise ValueError(f"the array {name!r} does not begin where the one before it ends.")
        end = entry.end
    if end != size - 8 - length:
        raise ValueError(f"it holds {size - 8 - length} bytes of arrays and should hold {end}.")
    return metadata, entries, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose names comes twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice")
    return values


def _entry(name: str, value: Any) -> Entry:
    """What the header says of one array, if that can be."""
    try:
        dtype, shape, (begin, end) = _DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what its header says of the array {name!r} cannot be read.") from error
    whole = is_shape(shape) and all(type(n) is int and n >= 0 for n in (begin, end))
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the bytes of the array {name!r} cannot make its shape.")
    return Entry(dtype, tuple(shape), begin, end)
