"""Float networks on disk, as safetensors."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file


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
    part = path.with_name(path.name + ".part")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)
    part.replace(path)
    return path.stat().st_size


def load_float(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of `save_float`, by name."""
    return load_file(path)
