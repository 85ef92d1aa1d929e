"""Convolution and pooling without the traps of XLA's CPU backend; the same numbers as the plain ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Up to this many outputs per side XLA's convolution is up to fifty times slower on CPU than patches.
_FEW = 2


def _patches_times_kernel(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], shape: Sequence[int], precision: Any
) -> jax.Array:
    """The convolution of images already padded, into outputs of that height and width."""
    height, width, inputs, outputs = kernel.shape
    last = [stride * (extent - 1) + 1 for stride, extent in zip(strides, shape, strict=True)]
    patches = [
        images[:, i : i + last[0] : strides[0], j : j + last[1] : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    matrix = kernel.reshape(height * width * inputs, outputs)
    return jnp.matmul(jnp.concatenate(patches, axis=-1), matrix, precision=precision)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    precision: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, by another way on CPU where the output is 2 by 2 or smaller.

    Args:
        lhs: images.
        rhs: kernel.
        window_strides: per side.
        padding: "SAME", "VALID", or pixels before and after, per side.
        lhs_dilation: of the images, per side.
        rhs_dilation: of the kernel, per side.
        dimension_numbers: the meaning of the axes; the other way needs ("NHWC", "HWIO", "NHWC").
        precision: of the products.
        **options: all others of the function in JAX; the other way needs them at their defaults.

    Returns:
        The convolved images.
    """
    plain = lambda: lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        precision=precision,
        **options,
    )
    if jax.default_backend() != "cpu" or lhs.ndim != 4:
        return plain()
    axes = lambda numbers: lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
    if (
        axes(dimension_numbers) != axes(("NHWC", "HWIO", "NHWC"))
        or any(dilation != 1 for dilation in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        or any(value != (1 if name.endswith("group_count") else None) for name, value in options.items())
    ):
        return plain()
    sides, window = lhs.shape[1:3], rhs.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, window, window_strides, padding)
    shape = [
        (side + before + after - size) // stride + 1
        for side, size, stride, (before, after) in zip(sides, window, window_strides, padding, strict=True)
    ]
    if not all(1 <= extent <= _FEW for extent in shape):
        return plain()
    edges = [(0, 0, 0), *((before, after, 0) for before, after in padding), (0, 0, 0)]
    padded = lax.pad(lhs, jnp.zeros((), lhs.dtype), edges)
    return _patches_times_kernel(padded, rhs, window_strides, shape, precision)


def max_pool(images: jax.Array) -> jax.Array:
    """The largest value of every 2 by 2 pixels; an odd row or column at the end is left out.

    Its gradient takes a half of the time of `flax.nnx.max_pool` on CPU. Pixels that tie share it equally.

    Args:
        images: of shape [count, height, width, channels].

    Returns:
        Images of shape [count, height // 2, width // 2, channels].
    """
    count, height, width, channels = images.shape
    rows, columns = height // 2, width // 2
    even = images[:, : 2 * rows, : 2 * columns]
    return jnp.max(even.reshape(count, rows, 2, columns, 2, channels), axis=(2, 4))
