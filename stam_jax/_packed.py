"""One array in few bits per weight: a node of a pytree, and its unpacking inside jit."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from stam_jax.quantizers import Binary, LeastSquares, PowerOfTwo, Quantizer, Ternary, Uniform, decode, spread


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["shape", "dtype", "quantizer"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """One quantized array, a few bits per weight: a node of a pytree, for `jax.jit` and `jax.export`.

    A row of the array, along its last axis, is a string of bits: the code of its first weight, lowest bit
    first, then that of the second, and so on, filled up with zeros to whole bytes. The first bit of a byte is
    its lowest. A code is the index of a level, counted from the lowest.

    Args:
        codes: the rows as bytes, uint8 of shape [..., ceil(n bits / 8)] for an array of shape [..., n]; of
            shape [1] for a scalar.
        scales: what `quantizer.scales` gives, in float32 at least.
        shape: of the array.
        dtype: of the array.
        quantizer: what the codes and scales mean.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import pack
        >>> packed = pack({"kernel": jnp.array([[2.0, -1.0], [-2.0, 1.0]])})["kernel"]
        >>> print(packed.codes.tolist(), packed.scales.tolist(), packed.bits, packed.nbytes)
        [[1], [2]] [[2.0, 1.0]] 1 10
    """

    codes: Any
    scales: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    quantizer: Quantizer

    @property
    def bits(self) -> int:
        """Bits per weight, beside the scales."""
        return layout(self.quantizer, self.shape).bits

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return sum(part.size * np.dtype(part.dtype).itemsize for part in (self.codes, self.scales))

    @jax.jit
    def unpack(self) -> jax.Array:
        """The array, whole.

        Raises:
            TypeError: if its dtype needs `jax_enable_x64`.
        """
        if jax.dtypes.canonicalize_dtype(self.dtype) != self.dtype:
            raise TypeError(f"An array of dtype {self.dtype} is unpacked with jax_enable_x64 only.")
        if math.prod(self.shape) == 0:
            return jnp.zeros(self.shape, self.dtype)
        bits, row = self.bits, self.shape[-1] if self.shape else 1
        flags = jnp.unpackbits(jnp.asarray(self.codes), axis=-1, count=row * bits, bitorder="little")
        flags = flags.reshape(*self.shape, bits)
        codes = sum((flags[..., i] << i for i in range(bits)), jnp.zeros(self.shape, jnp.uint8))
        levels = [spread(level, self.shape) for level in self.quantizer.levels(jnp.asarray(self.scales))]
        return decode(codes, levels).astype(self.dtype)


class Layout(NamedTuple):
    """How an array is packed.

    Args:
        bits: per weight.
        levels: how many values a weight can take.
        scales: the shape of the scales.
    """

    bits: int
    levels: int
    scales: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def layout(quantizer: Quantizer, shape: tuple[int, ...]) -> Layout:
    """How a quantizer has an array of that shape packed."""
    scales = jax.eval_shape(quantizer.scales, jax.ShapeDtypeStruct(shape, np.float32))
    levels = len(jax.eval_shape(lambda s: list(quantizer.levels(s)), scales))
    return Layout(max((levels - 1).bit_length(), 1), levels, scales.shape)


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is an array in few bits."""
    return isinstance(node, Packed)


BUILT_IN: dict[str, type[Any]] = {
    cls.__name__: cls for cls in (Binary, Ternary, Uniform, PowerOfTwo, LeastSquares)
}


def options_of(quantizer: Any) -> dict[str, Any]:
    """The options of a quantizer as JSON says them.

    Raises:
        TypeError: for a quantizer that is no dataclass, whose class is called like one of the package, or
            with an option that JSON cannot say.
    """
    kind = type(quantizer)
    if not dataclasses.is_dataclass(quantizer):
        raise TypeError(f"the quantizer {quantizer!r} must be a dataclass for its options to be stored.")
    if BUILT_IN.get(kind.__name__, kind) is not kind:
        raise TypeError(
            f"the quantizer {quantizer!r} has the name of a class of stam_jax: rename {kind.__name__}."
        )
    options = {
        field.name: getattr(quantizer, field.name) for field in dataclasses.fields(quantizer) if field.init
    }
    for name, value in options.items():
        parts = value if isinstance(value, tuple) else (value,)
        if not all(type(part) in (int, float, str, bool, type(None)) for part in parts):
            raise TypeError(
                f"the quantizer {quantizer!r} has the option {name}={value!r}; only numbers, texts, "
                "booleans, None and tuples of them can be stored."
            )
    return options


def quantizer_of(kind: type[Any], options: Mapping[str, Any]) -> Quantizer:
    """The quantizer of a class with options as JSON has given them back, where tuples are lists."""
    quantizer = kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in options.items()})
    hash(quantizer)
    return quantizer


def described(shape: tuple[int, ...], dtype: Any, quantizer: Quantizer) -> dict[str, Any]:
    """What files and exported functions say of a `Packed` beside its arrays."""
    said = {"name": type(quantizer).__name__, "options": options_of(quantizer)}
    return {"shape": list(shape), "dtype": np.dtype(dtype).name, "quantizer": said}


def _to_bytes(auxiliary: tuple[Any, Any, Any]) -> bytes:
    quantizer = auxiliary[-1]
    if type(quantizer) not in BUILT_IN.values():
        raise ValueError(f"jax.export stores Packed with the quantizers of stam_jax only; got {quantizer!r}.")
    return json.dumps(described(*auxiliary)).encode()


def _from_bytes(data: bytes) -> tuple[Any, Any, Any]:
    said = json.loads(data)
    quantizer = quantizer_of(BUILT_IN[said["quantizer"]["name"]], said["quantizer"]["options"])
    return tuple(said["shape"]), np.dtype(jnp.dtype(said["dtype"])), quantizer


jax.export.register_pytree_node_serialization(
    Packed, serialized_name="stam_jax.Packed", serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
)
