"""Convolution and pooling without the traps of XLA's CPU backend; the same numbers as the plain ones."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

# Up to this many outputs per side XLA's convolution is up to fifty times slower on CPU than patches.
_FEW = 2
# Up to this many channels, as images have, it wants some 32 channels to go out, or is several times slower.
# More than four columns side by side multiply by more zeros than that gains.
_OF_IMAGES = 4
_FULL = 32
_MOST_COLUMNS = 4

_NHWC = ("NHWC", "HWIO", "NHWC")

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


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


def _columns_side_by_side(images: jax.Array, kernel: jax.Array, columns: int, precision: Any) -> jax.Array:
    """The convolution of images already padded, every so many columns of pixels taken for channels of one."""
    size, inputs, outputs = kernel.shape[1:]
    padded = jnp.pad(images, ((0, 0), (0, 0), (0, -images.shape[2] % columns), (0, 0)))
    count, height, width, _ = padded.shape
    # Each of the columns that go out sees the same kernel, one column further on.
    wide = -(-(size + columns - 1) // columns) * columns
    shifted = [
        jnp.pad(kernel, ((0, 0), (shift, wide - size - shift), (0, 0), (0, 0))) for shift in range(columns)
    ]
    joint = jnp.stack(shifted, axis=3).reshape(-1, wide // columns, columns * inputs, columns * outputs)
    convolved = lax.conv_general_dilated(
        padded.reshape(count, height, width // columns, columns * inputs),
        joint,
        (1, 1),
        "VALID",
        dimension_numbers=_NHWC,
        precision=precision,
    )
    return convolved.reshape(*convolved.shape[:2], -1, outputs)


def _with_derivatives_of(plain: Convolution, convolve: Convolution) -> Convolution:
    """The second, whose derivatives are worked out by the first."""
    convolve = jax.custom_jvp(convolve)

    @functools.partial(convolve.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        (images, kernel), (along, turned) = primals, tangents
        parts = [] if isinstance(along, SymbolicZero) else [plain(along, kernel)]
        parts += [] if isinstance(turned, SymbolicZero) else [plain(images, turned)]
        return convolve(images, kernel), sum(parts[1:], start=parts[0])

    return convolve


def _another_way(
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
) -> Convolution | None:
    """The other way to convolve such images with such a kernel, or None where the plain one is as good."""
    if lhs.ndim != 4:
        return None
    axes = lambda numbers: lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers)
    if (
        axes(dimension_numbers) != axes(_NHWC)
        or any(dilation != 1 for dilation in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        or any(value != (1 if name.endswith("group_count") else None) for name, value in options.items())
    ):
        return None
    sides, window = lhs.shape[1:3], rhs.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(sides, window, window_strides, padding)
    shape = [
        (side + before + after - size) // stride + 1
        for side, size, stride, (before, after) in zip(sides, window, window_strides, padding, strict=True)
    ]
    if min(shape) < 1:
        return None
    edges = [(0, 0, 0), *((before, after, 0) for before, after in padding), (0, 0, 0)]
    pad = lambda images: lax.pad(images, jnp.zeros((), images.dtype), edges)
    if max(shape) <= _FEW:
        return lambda images, kernel: _patches_times_kernel(
            pad(images), kernel, window_strides, shape, precision
        )
    inputs, outputs = rhs.shape[2:]
    if inputs > _OF_IMAGES or any(stride != 1 for stride in window_strides):
        return None
    most = min(_FULL // outputs, _MOST_COLUMNS)
    columns = max((count for count in range(1, most + 1) if shape[1] % count == 0), default=1)
    if columns == 1:
        return None
    plain = functools.partial(
        lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        dimension_numbers=_NHWC,
        precision=precision,
    )
    side_by_side = lambda images, kernel: _columns_side_by_side(pad(images), kernel, columns, precision)
    return _with_derivatives_of(plain, side_by_side)


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, by another way on CPU where XLA's is slow.

    That is so where the output is 2 by 2 or smaller, and where few channels come in, as of images, and few go
    out.

    Args:
        lhs: images.
        rhs: kernel.
        *arguments: the strides and the padding, as of the function in JAX.
        **options: all others of that function; the other way needs the axes ("NHWC", "HWIO", "NHWC"), and all
            but the precision at their defaults.

    Returns:
        The convolved images.
    """
    other = _another_way(lhs, rhs, *arguments, **options) if jax.default_backend() == "cpu" else None
    plain = lambda images, kernel: lax.conv_general_dilated(images, kernel, *arguments, **options)
    return (other or plain)(lhs, rhs)


def portable_conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, *arguments: Any, **options: Any
) -> jax.Array:
    """`conv_general_dilated` for a program that is made on one platform and run on others.

    Args:
        lhs: images.
        rhs: kernel.
        *arguments: as of `conv_general_dilated`.
        **options: as of `conv_general_dilated`.

    Returns:
        The convolved images.
    """
    other = _another_way(lhs, rhs, *arguments, **options)
    plain = lambda images, kernel: lax.conv_general_dilated(images, kernel, *arguments, **options)
    return plain(lhs, rhs) if other is None else lax.platform_dependent(lhs, rhs, cpu=other, default=plain)


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
