"""A network whose quantised weights take few bits in memory, and its making whole inside jit."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import _trees
from stam_jax.hard import hard_of, points
from stam_jax.quantizers import HasCodes, Quantizer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["shape", "dtype", "quantizer"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """One quantised array, a few bits per weight: a node of a pytree, which jit and `jax.device_put` take.

    A row of the array, along its last axis, is a string of bits: the code of its first weight, lowest bit
    first, then that of the second, and so on, filled up with zeros to whole bytes. The first bit of a byte is
    its lowest.

    Args:
        codes: the rows as bytes, uint8 of shape [..., ceil(n bits / 8)] for an array of shape [..., n]; of
            shape [1] for a scalar.
        scales: what `quantizer.scales` gives, in float32 at least.
        shape: of the array.
        dtype: of the array.
        quantizer: what the codes and scales mean; see `HasCodes`.
    """

    codes: Any
    scales: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    quantizer: HasCodes

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return sum(part.size * np.dtype(part.dtype).itemsize for part in (self.codes, self.scales))

    def unpack(self) -> jax.Array:
        """The array, whole.

        Raises:
            TypeError: if its dtype needs `jax_enable_x64`.
        """
        if jax.dtypes.canonicalize_dtype(self.dtype) != self.dtype:
            raise TypeError(f"An array of dtype {self.dtype} is unpacked with jax_enable_x64 only.")
        if math.prod(self.shape) == 0:
            return jnp.zeros(self.shape, self.dtype)
        bits, row = self.quantizer.bits, self.shape[-1] if self.shape else 1
        flags = jnp.unpackbits(jnp.asarray(self.codes), axis=-1, count=row * bits, bitorder="little")
        places = jnp.arange(bits, dtype=jnp.uint8)
        codes = jnp.sum(flags.reshape(*self.shape, bits) << places, axis=-1, dtype=jnp.uint8)
        return self.quantizer.decode(codes, jnp.asarray(self.scales)).astype(self.dtype)


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is an array in few bits."""
    return isinstance(node, Packed)


def _rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """The codes of an array as the rows of `Packed`."""
    flags = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    shape = codes.shape or (1,)
    return np.packbits(flags.reshape(*shape[:-1], shape[-1] * bits), axis=-1, bitorder="little")


def precision_of(leaves: Iterable[Packed]) -> contextlib.AbstractContextManager[Any]:
    """A context in which arrays of the dtypes of some leaves can be made."""
    wide = any(leaf.dtype == np.float64 for leaf in leaves)
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnames="quantizers")
def contained(hard: list[jax.Array], quantizers: tuple[Quantizer, ...]) -> list[jax.Array]:
    """Whether each array lies in its quantised set."""
    return [quantizer.contains(y) for y, quantizer in zip(hard, quantizers, strict=True)]


def pack(opt_state: Any, params: Any) -> Any:
    r"""The quantised network of `hard_params`, its quantised leaves in few bits.

    `unpack` gives back `hard_params(opt_state, params)`, bit for bit (where that is not itself inside jit,
    which may round scales otherwise). This is checked here for every leaf, and that it lies in its quantised
    set, so this is not for use inside jit. The packed arrays lie on the default device.

    Args:
        opt_state: an optimiser state that holds one or more states of `stam`; see `quantized_leaves`.
        params: the parameters it belongs to.

    Returns:
        A tree like `params`, with a `Packed` in the place of each quantised leaf.

    Raises:
        ValueError: as `quantized_leaves`; or, with its name, for a leaf whose hard weights are not what its
            quantiser promises: where training diverged they are not finite.
        TypeError: for a leaf whose quantiser has no codes; see `HasCodes`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import pack, stam, unpack
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]]), "bias": jnp.array([0.3, 0.4])}
        >>> packed = pack(stam(0.1).init(params), params)
        >>> print(packed["kernel"].codes.tolist(), packed["kernel"].scales.tolist())
        [[1], [2]] [[2.0, 1.0]]
        >>> print(unpack(packed)["kernel"])
        [[ 2. -1.]
         [-2.  1.]]
    """
    leaves = points(opt_state, params)
    for name, leaf in leaves.items():
        if not isinstance(leaf.quantizer, HasCodes):
            raise TypeError(
                f"pack: the leaf {name!r} cannot be packed: its quantiser {leaf.quantizer!r} has no scales, "
                "codes and decode."
            )
    quantizers: Any = tuple(leaf.quantizer for leaf in leaves.values())
    packed = {
        name: Packed(
            jnp.asarray(_rows(np.asarray(leaf.parts[0]), quantizer.bits)),
            jnp.asarray(np.asarray(leaf.parts[1])),
            leaf.latent.shape,
            leaf.dtype,
            quantizer,
        )
        for (name, leaf), quantizer in zip(leaves.items(), quantizers, strict=True)
    }
    hard = {name: np.asarray(y) for name, y in hard_of(leaves).items()}
    whole, held = unpacked(list(packed.values())), contained(list(hard.values()), quantizers)
    for name, array, holds in zip(leaves, whole, held, strict=True):
        if not holds or np.asarray(array).tobytes() != hard[name].tobytes():
            raise ValueError(
                f"pack: the hard weights of the leaf {name!r} are not what its quantiser "
                f"{leaves[name].quantizer!r} promises."
            )
    return _trees.map_named(lambda name, x: packed.get(name, x), params)


def unpack(tree: Any) -> Any:
    """A packed network made whole.

    Inside jit it lets the device hold nothing but the packed bits between calls. While a call lasts, the
    whole arrays are temporaries; on CPUs all of them at once.

    Args:
        tree: of arrays and `Packed`s.

    Returns:
        The tree with an array in the place of each `Packed`; all else as it is.

    Raises:
        TypeError: if an array's dtype needs `jax_enable_x64`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from stam_jax import pack, stam, unpack
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]])}
        >>> packed = pack(stam(0.1).init(params), params)
        >>> apply = jax.jit(lambda packed, x: x @ unpack(packed)["kernel"])
        >>> print(apply(packed, jnp.ones(2)))
        [0. 0.]
    """
    return jax.tree.map(lambda node: node.unpack() if is_packed(node) else node, tree, is_leaf=is_packed)


unpacked = jax.jit(unpack)  # One program for all leaves.
