"""Quantizers in float64 NumPy, from the math: what the fits of the library are compared with.

`optimal_error` is the least squared error of all assignments of weights to magnitudes, by sorting, and
`least_error` the same by trying them all.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray

BINARY = (1.0,)
TERNARY = (0.0, 1.0)


def uniform(bits: int) -> tuple[float, ...]:
    """The magnitudes of evenly spaced levels at scale 1, zero first."""
    top = 2 ** (bits - 1) - 1
    return tuple(j / top for j in range(top + 1))


def powers(bits: int) -> tuple[float, ...]:
    """The magnitudes of zero and powers of two at scale 1."""
    return (0.0, *sorted(2.0**-j for j in range(2 ** (bits - 1) - 1)))


def optimal_error(w: Array, magnitudes: Sequence[float]) -> Array:
    """The least squared error of each row of w, over all scales of these magnitudes.

    As the scale falls from infinity, each |w| passes from one magnitude to the next at a known scale. The
    passages in order make all assignments q that can be optimal. The best scale of one is <|w|, q> / <q, q>,
    and its error |w|^2 - <|w|, q>^2 / <q, q>.
    """
    size = np.abs(np.asarray(w, np.float64))
    products, norms = magnitudes[0] * size.sum(-1, keepdims=True), magnitudes[0] ** 2 * size.shape[-1]
    best = np.zeros(products.shape) if norms == 0 else products**2 / norms
    gaps = list(itertools.pairwise(magnitudes))
    if gaps:
        passage = np.concatenate([size / ((low + high) / 2) for low, high in gaps], -1)
        gain = np.concatenate([size * (high - low) for low, high in gaps], -1)
        square = np.concatenate([np.full(size.shape, high**2 - low**2) for low, high in gaps], -1)
        order = np.argsort(-passage, axis=-1)
        products = products + np.cumsum(np.take_along_axis(gain, order, -1), -1)
        norms = norms + np.cumsum(np.take_along_axis(square, order, -1), -1)
        best = np.maximum(best, np.max(products**2 / norms, -1, keepdims=True))
    return np.maximum(np.sum(size**2, -1) - best[..., 0], 0.0)


def optimal_error_of_two(w: Array) -> Array:
    """The least squared error of each row of w over all pairs of magnitudes: the best cut of sorted |w|."""
    size = np.sort(np.abs(np.asarray(w, np.float64)), -1)
    count = size.shape[-1]
    below, total = np.cumsum(size, -1), size.sum(-1, keepdims=True)
    low = np.arange(1, count + 1)
    high = np.maximum(count - low, 1)
    kept = below**2 / low + np.where(low < count, (total - below) ** 2 / high, 0.0)
    return np.maximum(np.sum(size**2, -1) - np.max(kept, -1), 0.0)


def least_error(w: Array, magnitudes: Sequence[float]) -> float:
    """The least squared error over every assignment of levels to weights, each at its best scale."""
    levels = sorted({sign * m for m in magnitudes for sign in (-1, 1)})
    errors = [math.fsum(w**2)]
    for assignment in itertools.product(levels, repeat=len(w)):
        q = np.array(assignment)
        if np.any(q):
            scale = max(np.dot(w, q) / np.dot(q, q), 0.0)
            errors.append(float(np.sum((w - scale * q) ** 2)))
    return min(errors)


def least_error_of_two(w: Array) -> float:
    """The least squared error over every division of the weights in two, each part at its mean |w|."""
    size, errors = np.abs(w), []
    for division in itertools.product([False, True], repeat=len(w)):
        parts = [part for part in (size[np.array(division)], size[~np.array(division)]) if part.size]
        errors.append(sum(float(np.sum((part - part.mean()) ** 2)) for part in parts))
    return min(errors)


def nearest(w: Array, levels: Sequence[float]) -> Array:
    """The nearest level of each weight, the upper one of two, by looking at each."""
    y = np.empty(np.shape(w))
    for i in np.ndindex(*np.shape(w)):
        y[i] = min(reversed(levels), key=lambda level: abs(level - w[i]))
    return y


def groups(
    shape: tuple[int, ...], axes: tuple[int, ...], group: int | None = None, group_axis: int = 0
) -> Iterator[tuple[Any, ...]]:
    """The indices, for NumPy, of the weights that share one scale, group by group."""
    channels = [axis % len(shape) for axis in axes]
    count = 1 if group is None else max(shape[group_axis] // group, 1)
    for place in itertools.product(*(range(shape[axis]) for axis in channels)):
        for block in range(count):
            index: list[Any] = [slice(None)] * len(shape)
            for axis, i in zip(channels, place, strict=True):
                index[axis] = i
            if group is not None:
                index[group_axis] = slice(block * group, (block + 1) * group)
            yield tuple(index)


def binary(w: Array) -> Array:
    """The mean of |w| with the sign of each weight, that of zero plus."""
    w = np.asarray(w, np.float64)
    scale = math.fsum(np.abs(w).ravel()) / w.size
    return np.where(w >= 0, scale, -scale)
