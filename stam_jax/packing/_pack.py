"""From a network to one whose quantized weights take few bits in memory, and back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import _assignment, _paths
from stam_jax._assignment import Quantizers, scales_of
from stam_jax._packed import Packed, is_packed, layout
from stam_jax.quantizers import Binary, Quantizer, decode, encode, spread, wide

# A quantized network is this far from its parameters at most: rounding of bfloat16 makes 4e-3.
_LARGEST_GAP = 1e-2


def _rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """The codes of an array as the rows of `Packed`."""
    flags = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    shape = codes.shape or (1,)
    return np.packbits(flags.reshape(*shape[:-1], shape[-1] * bits), axis=-1, bitorder="little")


@functools.partial(jax.jit, static_argnames="quantizer")
def _encoded(quantizer: Quantizer, w: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes of one leaf, and its gap."""
    levels = [spread(level, w.shape) for level in quantizer.levels(scales)]
    codes = encode(w.astype(wide(w.dtype)), levels)
    return codes, gap_of(w, decode(codes, levels).astype(w.dtype))


@jax.jit
def gap_of(x: jax.Array, y: jax.Array) -> jax.Array:
    """|y - x| / |x| of one leaf, in float32 at least; 0 where they are equal, NaN where x is not finite."""
    x = x.astype(wide(x.dtype))
    largest = jnp.max(jnp.abs(x), initial=0)
    unit = jnp.where(largest == 0, 1, largest)  # No square is too large or too small for the dtype.
    distance, norm = (jnp.sqrt(jnp.sum(jnp.square(a / unit))) for a in (y.astype(x.dtype) - x, x))
    return jnp.where(distance == 0, 0, distance / jnp.where(norm == 0, 1, norm))


def pack(params: Any, quantizer: Quantizers = Binary()) -> Any:
    r"""The quantized network of `quantize`, its quantized leaves in few bits per weight.

    `unpack` gives back `quantize(params, quantizer)`, bit for bit. The parameters must be those of a hard
    network, and the quantizer that of the training: a leaf that is further than 1% from its quantized weights
    is an error. To pack weights that were not trained to be quantized, quantize them first:
    `pack(quantize(params))`. Not for use inside jit.

    Args:
        params: the parameters, any pytree.
        quantizer: the one given in training; see `stam`.

    Returns:
        A tree like `params`, with a `Packed` in the place of each quantized leaf and copies of the others, on
        the default device.

    Raises:
        ValueError: as `quantize`; with its path, for a leaf with a gap $|P_Q(x) - x| / |x|$ above 0.01, with
            values that are not finite, or that spans processes.
        TypeError: as `quantize`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import pack, quantize, unpack
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]]), "bias": jnp.array([0.3, 0.4])}
        >>> packed = pack(quantize(params))
        >>> print(packed["kernel"].nbytes, unpack(packed)["kernel"].tolist())
        10 [[2.0, -1.0], [-2.0, 1.0]]
    """
    _assignment.check_quantizer("pack", quantizer)
    quantizers = _assignment.chosen("pack", quantizer, params)
    return _paths.map_named(lambda path, leaf: _pack_leaf(path, leaf, quantizers.get(path)), params)


def _pack_leaf(path: str, leaf: Any, quantizer: Quantizer | None) -> Any:
    """One leaf in few bits, or a copy of it, which a later step cannot donate."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"pack: the leaf {path!r} spans processes; gather the parameters first, by "
            "jax.experimental.multihost_utils.process_allgather(params, tiled=True)."
        )
    if quantizer is None:
        if isinstance(leaf, np.ndarray):
            return leaf.copy()
        is_array = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return jnp.asarray(np.array(leaf)) if is_array else leaf
    with _assignment.naming("pack", path):
        w = jnp.asarray(leaf)
        bits = layout(quantizer, w.shape).bits
        if bits > 8:
            raise ValueError(f"{quantizer!r} has more than 256 levels")
        # Where the array lies, as `quantize` does: sums over shards round otherwise than sums over the whole.
        scales = scales_of(quantizer, w)
        codes, gap = map(np.asarray, _encoded(quantizer, w, scales))
        scales = np.asarray(scales)
        if np.isnan(gap) or not np.all(np.isfinite(scales)):
            raise ValueError("it has weights or scales that are not finite")
    if gap > _LARGEST_GAP:
        raise ValueError(
            f"pack: the leaf {path!r} is {gap:.2g} of its norm away from its quantized weights: its "
            f"quantizer {quantizer!r} is not that of the training, or the network is not hard yet. To pack "
            "it all the same, quantize it first: pack(quantize(params, quantizer), quantizer)."
        )
    return Packed(jnp.asarray(_rows(codes, bits)), jnp.asarray(scales), w.shape, np.dtype(w.dtype), quantizer)


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
        >>> from stam_jax import pack, unpack
        >>> packed = pack({"kernel": jnp.array([[2.0, -1.0], [-2.0, 1.0]])})
        >>> apply = jax.jit(lambda packed, x: x @ unpack(packed)["kernel"])
        >>> print(apply(packed, jnp.ones(2)))
        [0. 0.]
    """
    return jax.tree.map(lambda node: node.unpack() if is_packed(node) else node, tree, is_leaf=is_packed)
