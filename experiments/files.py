"""Networks on disk, as safetensors: in float, and with one bit per binary weight."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from stam_jax import Binary, QuantizedLeaf

_SHAPE, _CODES, _SCALES = "#shape", "#codes", "#scales"


def name_of(path: tuple[Any, ...]) -> str:
    """The name of a leaf of Flax NNX state: its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def to_arrays(state: Any) -> dict[str, np.ndarray]:
    """The leaves of Flax NNX state by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {name_of(path): np.asarray(leaf) for path, leaf in leaves}


def from_arrays(arrays: dict[str, np.ndarray], like: Any) -> Any:
    """State like another, with leaves by name.

    Raises:
        ValueError: if a leaf is missing or of another shape.
    """

    def find(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = name_of(path)
        if name not in arrays or arrays[name].shape != leaf.shape:
            found = f"of shape {arrays[name].shape}" if name in arrays else "missing"
            raise ValueError(f"{name} should have shape {leaf.shape} but is {found}.")
        return jnp.asarray(arrays[name])

    return jax.tree_util.tree_map_with_path(find, like)


def save_float(path: Path, arrays: dict[str, np.ndarray]) -> int:
    """Write arrays as they are; return the size of the file in bytes."""
    return _save(path, {name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _save(path: Path, arrays: dict[str, np.ndarray]) -> int:
    """Write a file, whole or not at all; return its size in bytes."""
    part = path.with_name(path.name + ".part")
    save_file(arrays, part)
    part.replace(path)
    return path.stat().st_size


def load_float(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of `save_float`, by name."""
    return load_file(path)


def save_packed(path: Path, arrays: dict[str, np.ndarray], leaves: dict[str, QuantizedLeaf]) -> int:
    """Write arrays with a bit per weight of the binary leaves, float32 scales, and the rest as it is.

    Args:
        path: the file to write.
        arrays: all leaves of the network, by name.
        leaves: which of them are binary.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError: if a leaf is quantised otherwise than to binary.
    """
    packed = {}
    for name, array in arrays.items():
        if name in leaves:
            leaf = leaves[name]
            if not isinstance(leaf.quantizer, Binary):
                raise TypeError(f"{name}: only binary weights can be packed, not {leaf.quantizer}.")
            codes = np.asarray(leaf.quantizer.codes(leaf.latent))
            packed[name + _CODES] = np.packbits(codes)
            packed[name + _SCALES] = np.asarray(leaf.quantizer.scales(leaf.latent), np.float32)
            packed[name + _SHAPE] = np.asarray(array.shape, np.int32)
        else:
            packed[name] = np.ascontiguousarray(array)
    return _save(path, packed)


def load_packed(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of `save_packed`, bits and scales multiplied out."""
    stored = load_file(path)
    arrays = {}
    for key, value in stored.items():
        if "#" not in key:
            arrays[key] = value
        elif key.endswith(_CODES):
            name = key.removesuffix(_CODES)
            shape, scales = stored[name + _SHAPE], stored[name + _SCALES]
            codes = np.unpackbits(value, count=math.prod(shape)).reshape(shape).astype(bool)
            arrays[name] = np.where(codes, scales, -scales)
    return arrays


def binary_weights(path: Path) -> dict[str, int]:
    """How many weights of each leaf a file of `save_packed` holds as bits."""
    return {
        name.removesuffix(_SHAPE): math.prod(shape)
        for name, shape in load_file(path).items()
        if name.endswith(_SHAPE)
    }
