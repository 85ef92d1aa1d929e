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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def is_shape(value: Any) -> bool:
    """Whether a value from a file can be the shape of an array."""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(type(n) is int and n >= 0 for n in value)
        # Also of an empty array: what computes with shapes multiplies the other sides.
        and math.prod(max(n, 1) for n in value) < 2**58
    )


def contents(array: np.ndarray) -> Any:
    """The bytes of an array as they are stored: in C order, little-endian."""
    stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return stored.reshape(-1).view(np.uint8).data


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
        ValueError: for a name that the format cannot store, or a header that is too long.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    # The widest first, so that all are aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    begin = 0
    for name in order:
        array = arrays[name]
        if name == _METADATA or name.encode(errors="replace").decode() != name:
            raise ValueError(f"the array {name!r} has a name that cannot be stored: rename it.")
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
                file.write(contents(arrays[name]))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path.stat().st_size


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read a file whose header holds water.

    Args:
        path: of the file.

    Returns:
        The metadata, and the arrays by name, which share the memory of the file.

    Raises:
        ValueError: if it is no such file, or was cut or altered.
        OSError: if it cannot be read.
    """
    data = np.fromfile(path, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(data.size - 8, _LONGEST_HEADER):
        raise ValueError("it is not a safetensors file, or was cut off.")
    header, data = data[8 : 8 + length].tobytes(), data[8 + length :]
    try:
        header = json.loads(header, object_pairs_hook=_unique)
        metadata = header.pop(_METADATA, {})
        is_told = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
        entries = [(*x["data_offsets"], _DTYPES[x["dtype"]], x["shape"], name) for name, x in header.items()]
        entries.sort(key=lambda entry: entry[:2])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not a safetensors file: its header cannot be read: {error!r}.") from error
    if not is_told:
        raise ValueError("its metadata are not texts by name.")
    at, arrays = 0, {}
    for *offsets, dtype, shape, name in entries:
        if not is_shape(shape) or offsets != [at, end := at + math.prod(shape) * dtype.itemsize]:
            raise ValueError(f"the bytes of the array {name!r} do not make its shape.")
        if end > data.size:
            raise ValueError(f"the array {name!r} is cut off.")
        array = data[at:end].view(dtype.newbyteorder("<")).astype(dtype, copy=False)
        arrays[name], at = array.reshape(shape), end
    if at != data.size:
        raise ValueError(f"it holds {data.size} bytes of arrays and should hold {at}.")
    return metadata, arrays


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose names comes twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice")
    return values
