"""Quantizers: the values that weights can take, and the nearest of them.

A quantizer is any hashable object with two methods:

* `scales(w)`: the scales that fit an array w best, in float32 at least, with the rank of w. An axis of
  length g of them covers an axis of length n of w in blocks of n / g neighbors, so 1 stands for the whole
  axis.
* `levels(scales)`: the values that a weight can take, in ascending order, each an array like one scale.

Everything else follows from these two: the nearest level, the codes, their decoding, and the bits.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from numpy.lib.array_utils import normalize_axis_tuple

from stam_jax import _numbers

Levels = Sequence[jax.Array]


@runtime_checkable
class Quantizer(Protocol):
    """What every function of the package asks of a quantizer; any hashable object with these methods serves.

    A quantizer that is a dataclass with a field `axis` is given the axis that goes with the name of its leaf
    where that field is None; see `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Quantizer, quantize
        >>> class Shifts:
        ...     def scales(self, w):
        ...         return jnp.exp2(jnp.round(jnp.log2(jnp.mean(jnp.abs(w), keepdims=True))))
        ...
        ...     def levels(self, scales):
        ...         return -scales, scales
        >>> isinstance(Shifts(), Quantizer)
        True
        >>> print(quantize({"kernel": jnp.array([[0.5, -0.7]])}, Shifts())["kernel"])
        [[ 0.5 -0.5]]
    """

    def scales(self, w: jax.Array) -> jax.Array:
        """The scales that fit w best, in float32 at least."""
        ...

    def levels(self, scales: jax.Array) -> Levels:
        """The values that a weight can take at these scales, in ascending order."""
        ...


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that arrays of a dtype are computed in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def spread(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array of one number per block, so that it broadcasts against an array of that shape."""
    for axis, (count, length) in enumerate(zip(blocks.shape, shape, strict=True)):
        if count not in (1, length):
            blocks = jnp.repeat(blocks, length // count, axis=axis)
    return blocks


def levels_of(quantizer: Quantizer, w: jax.Array) -> Levels:
    """The levels of the scales that fit w, each broadcasting against w."""
    return [spread(level, w.shape) for level in quantizer.levels(quantizer.scales(w))]


def _middles(levels: Levels) -> list[jax.Array]:
    """Halfway between neighboring levels: a weight there goes to the upper one."""

    def middle(low: jax.Array, high: jax.Array) -> jax.Array:
        # An infinite scale would make NaN of two opposite levels, and no middle that -inf lies below.
        opposite = low == -high
        half = jnp.where(opposite, 0, low / 2) + jnp.where(opposite, 0, high / 2)
        largest = float(jnp.finfo(half.dtype).max)
        return jnp.where(half < -largest, -largest, half)

    return [middle(low, high) for low, high in itertools.pairwise(levels)]


def nearest(w: jax.Array, levels: Levels) -> jax.Array:
    """The level nearest to each weight, the upper one of two; NaN stays NaN."""
    y = levels[0]
    for middle, level in zip(_middles(levels), levels[1:], strict=True):
        y = jnp.where(w >= middle, level, y)
    return jnp.where(jnp.isnan(w), w, y)


def encode(w: jax.Array, levels: Levels) -> jax.Array:
    """The index of the level nearest to each weight, counted from the lowest, as uint8."""
    return sum(
        ((w >= middle).astype(jnp.uint8) for middle in _middles(levels)), jnp.zeros(w.shape, jnp.uint8)
    )


def decode(codes: jax.Array, levels: Levels) -> jax.Array:
    """The levels with these indices."""
    y = jnp.broadcast_to(levels[0], codes.shape)
    for code, level in enumerate(levels[1:], start=1):
        y = jnp.where(codes == code, level, y)
    return y


# A reduction over the weights that share a scale: over(jnp.mean, a), with its axes kept.
Over = Callable[[Callable[..., jax.Array], jax.Array], jax.Array]


# A size so small that levels below it may be subnormal in float32, which processors may take for zero.
_LEAST = 1024 * float(jnp.finfo(jnp.float32).tiny)


def _power(a: jax.Array) -> jax.Array:
    """The power of two next to each number, from 2/3 to 4/3 of it: that number without bits of mantissa."""
    return jax.lax.reduce_precision(a, jnp.finfo(a.dtype).nexp, 0)


def _unit(top: jax.Array) -> jax.Array:
    """What weights that share a scale are measured in: the power of two next to the largest |w|."""
    power = jnp.clip(_power(top), _LEAST, 2.0 ** (jnp.finfo(top.dtype).maxexp - 1))
    return jnp.where(jnp.isfinite(top), power, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(abc.ABC):
    """Which weights of an array share a scale; what the quantizers of the package have in common.

    Args:
        axis: see `Binary`.
        group: see `Binary`.
        group_axis: see `Binary`.
    """

    axis: int | tuple[int, ...] | None = None
    group: int | None = None
    group_axis: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if self.axis is not None and not all(type(axis) is int for axis in axes):
            raise TypeError(
                f"{name}: axis must be an integer, a tuple of integers or None; got {self.axis!r}."
            )
        if self.group is not None:
            _numbers.check_whole(name, "group", self.group)
        if self.group_axis is not None and type(self.group_axis) is not int:
            raise TypeError(f"{name}: group_axis must be an integer or None; got {self.group_axis!r}.")
        if self.group_axis is not None and self.group is None:
            raise ValueError(f"{name}: group_axis needs group, the number of weights; got group=None.")

    @abc.abstractmethod
    def _fit(self, size: jax.Array, over: Over) -> jax.Array:
        """The scales that fit weights of these sizes |w| best."""

    def scales(self, w: jax.Array) -> jax.Array:
        """The scales that fit w best, in float32 at least, by blocks of w; see `Binary`."""
        w = jnp.asarray(w)
        blocks, shared = self._split(w)
        size = jnp.abs(blocks).astype(wide(w.dtype))

        def over(reduction: Callable[..., jax.Array], a: jax.Array) -> jax.Array:
            if w.size == 0:
                return jnp.ones([1 if i in shared else n for i, n in enumerate(a.shape)], a.dtype)
            # XLA sums in blocks on every backend, so one reduction is as accurate as a pairwise sum, and on
            # CPU it is 30 times faster than a reduction per axis.
            return reduction(a, axis=shared, keepdims=True)

        scales = self._fit(size, over)
        return scales if blocks.ndim == w.ndim else jnp.squeeze(scales, shared[-1] - blocks.ndim)

    def _split(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """The array, its grouped axis divided in two, and the axes of that array that share a scale."""
        channels = normalize_axis_tuple(-1 if self.axis is None else self.axis, w.ndim, "axis")
        shared = [axis for axis in range(w.ndim) if axis not in channels]
        if not shared and w.ndim:
            raise ValueError(
                f"{self!r} gives every weight of an array of shape {w.shape} a scale of its own; axis=() "
                "shares one scale among all."
            )
        if self.group is None:
            return w, tuple(shared)
        named = (
            shared if self.group_axis is None else normalize_axis_tuple(self.group_axis, w.ndim, "group_axis")
        )
        at = named[0]
        if at not in shared or len(named) > 1:
            raise ValueError(
                f"{self!r} cannot tell which axis of an array of shape {w.shape} to divide: name one by "
                f"group_axis that is not among the channels {channels}."
            )
        length = max(min(self.group, w.shape[at]), 1)
        if w.shape[at] % length:
            raise ValueError(
                f"{self!r} cannot divide the {w.shape[at]} weights of axis {at} of shape {w.shape}."
            )
        blocks = w.reshape(*w.shape[:at], w.shape[at] // length, length, *w.shape[at + 1 :])
        return blocks, (*(axis + (axis > at) for axis in shared if axis != at), at + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Shared):
    """Levels that are fixed but for one factor, the scale.

    Args:
        scale: see `Binary`.
    """

    scale: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.scale is not None:
            name = type(self).__name__
            _numbers.check(name, "scale", self.scale, low=0.0, finite=True, schedule=False)
            if isinstance(self.scale, jax.Array) or self.scale == 0:
                raise ValueError(f"{name}: scale must be a number above 0, or None; got {self.scale!r}.")

    def scales(self, w: jax.Array) -> jax.Array:
        """The scales that fit w best, in float32 at least, by blocks of w; see `Binary`."""
        if self.scale is None:
            return super().scales(w)
        return jnp.full((1,) * jnp.ndim(w), self.scale, wide(jnp.result_type(w)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary(Scaled):
    r"""Two values per scale, $\{-s, +s\}$: one bit per weight.

    The scale is the least-squares optimum $s = \mathrm{mean}|w|$ over the weights that share it, and a weight
    goes to the nearer value, with $\mathrm{sign}(0) = +1$. A NaN makes all weights of its scale NaN, an
    infinity makes them infinite.

    Args:
        axis: the axis, or the axes, that have a scale for each of their places, XNOR-Net's channels; the
            weights along the other axes share it. `()` shares one scale among all weights. By default it goes
            with the name of the leaf: 0 for `weight`, where outputs come first as in PyTorch and Equinox, and
            otherwise -1, as for the `kernel` of Flax and the `w` of Haiku. Attention kernels of shape
            (inputs, heads, size) want `axis=(-2, -1)`, layers stacked along the first axis `axis=(0, -1)`.
        group: how many neighbors along `group_axis` share a scale; None for all. An axis that is not longer
            is one group.
        group_axis: the axis that `group` divides; it may be left out where `axis` leaves but one.
        scale: a number that fixes the scale, in the units of the weights: 1.0 gives BinaryConnect's $\{-1,
            +1\}$.

    Raises:
        ValueError: for a `scale` or `group` that is not positive; when it meets an array without these axes,
            whose axis `group` does not divide, or each of whose weights would have a scale of its own.
        TypeError: for an axis that is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Binary, quantize
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]])}
        >>> print(quantize(params, Binary())["kernel"])
        [[ 2. -1.]
         [-2.  1.]]
        >>> print(quantize(params, Binary(axis=()))["kernel"])
        [[ 1.5 -1.5]
         [-1.5  1.5]]

    References:
        Rastegari et al., XNOR-Net, arXiv:1603.05279; Courbariaux et al., BinaryConnect, arXiv:1511.00363.
    """

    def _fit(self, size: jax.Array, over: Over) -> jax.Array:
        return over(jnp.mean, size)

    def levels(self, scales: jax.Array) -> Levels:
        """The two values."""
        return -scales, scales


class _Fitted(Scaled):
    """Zero and magnitudes with both signs, at the best of all scales that are powers of 2^(1/8)."""

    @property
    @abc.abstractmethod
    def _magnitudes(self) -> tuple[float, ...]:
        """The magnitudes above 0 in ascending order, the last one 1, at scale 1."""

    def levels(self, scales: jax.Array) -> Levels:
        """The values, zero in their middle."""
        above = [magnitude * scales for magnitude in self._magnitudes]
        return *(-level for level in reversed(above)), jnp.zeros_like(scales), *above

    def _code(self, size: jax.Array, scale: jax.Array) -> jax.Array:
        """The magnitude nearest to each |w|, at a scale."""
        gaps = itertools.pairwise((0.0, *self._magnitudes))
        steps = (jnp.where(size >= scale * (low + high) / 2, high - low, 0) for low, high in gaps)
        return sum(steps, jnp.zeros_like(size))

    def _fit(self, size: jax.Array, over: Over) -> jax.Array:
        """The power of 2^(1/8) with the least error, or the scale of weights that are quantized already.

        Below the mean of |w| the error falls as the scale grows. Above twice its maximum, half the scale has
        every level that is in use. So no power beyond these two is better, and trying those between finds a
        nearest point of a set that does not depend on w.
        """
        top = over(jnp.max, size)
        unit = _unit(top)
        size, peak = size / unit, top / unit
        mean, square = over(jnp.mean, size), over(jnp.mean, size * size)
        start = jnp.where(mean > 0, _power(mean), 1)
        # From below the mean; the maximum is at most as many times the mean as weights share the scale.
        octaves = (size.size // max(mean.size, 1)).bit_length() + 2
        factors = jnp.asarray([2.0 ** (i // 8 + i % 8 / 8) for i in range(-4, 8 * octaves)], size.dtype)
        count = jnp.sum(factors <= jnp.max(jnp.where(jnp.isfinite(top), 2 * peak / start, 0), initial=0))
        largest = jnp.stack([peak / magnitude for magnitude in self._magnitudes])
        rounding = (4 * jnp.finfo(size.dtype).eps) ** 2 * square

        def error(scale: jax.Array) -> jax.Array:
            return over(jnp.mean, jnp.square(size - scale * self._code(size, scale)))

        def tried(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            scale = start * factors[i]
            found = error(scale)
            return jnp.minimum(found, best[0]), jnp.where(found < best[0], scale, best[1])

        def kept(i: jax.Array, scale: jax.Array) -> jax.Array:
            return jnp.where(error(largest[i]) <= rounding, largest[i], scale)

        _, scale = jax.lax.fori_loop(0, count, tried, (jnp.full_like(mean, jnp.inf), mean))
        scale = jax.lax.fori_loop(0, len(largest), kept, scale)
        return jnp.where(jnp.isfinite(top), jnp.maximum(unit * scale, _LEAST), top)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(_Fitted):
    r"""Three values per scale, $\{-s, 0, +s\}$: two bits per weight.

    The scale is the power of $2^{1/8}$ with the least squared error, which exceeds that of the best scale of
    all by at most 0.2% of $|w|^2$; weights that are quantized already keep theirs. It is found in some thirty
    passes over the weights, without a sort. The projection is a nearest point of a fixed set, so it stays all
    the way from w to it.

    Args:
        axis: which weights share a scale, as in `Binary`.
        group: as in `Binary`.
        group_axis: as in `Binary`.
        scale: a number that fixes the scale; 1.0 gives $\{-1, 0, +1\}$.

    Raises:
        ValueError, TypeError: as `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Ternary, quantize
        >>> print(quantize({"kernel": jnp.array([[2.2], [-0.5], [0.2], [-1.8]])}, Ternary())["kernel"].T)
        [[ 2.  0.  0. -2.]]

    References:
        Li and Liu, Ternary weight networks, arXiv:1605.04711.
    """

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        return (1.0,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FewBits(_Fitted):
    """Levels that follow from a number of bits per weight."""

    bits: int = 4

    def __post_init__(self):
        super().__post_init__()
        _numbers.check_whole(type(self).__name__, "bits", self.bits, low=2, high=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(_FewBits):
    r"""Evenly spaced values, $s\,j/m$ with $j = -m, \dots, m$ and $m = 2^{\text{bits}-1} - 1$.

    These are the symmetric integers of low-bit arithmetic, 0 among them; 2 bits are `Ternary`, which says how
    the scale is found.

    Args:
        bits: bits per weight, from 2 to 4.
        axis: which weights share a scale, as in `Binary`.
        group: as in `Binary`.
        group_axis: as in `Binary`.
        scale: a number that fixes the scale, the largest value.

    Raises:
        ValueError, TypeError: as `Binary`; also for bits out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Uniform, quantize
        >>> print(quantize({"kernel": jnp.array([[0.9, -0.4, 0.1]])}, Uniform(bits=3, scale=1.0))["kernel"])
        [[ 1.         -0.33333334  0.        ]]
    """

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        top = 2 ** (self.bits - 1) - 1
        return tuple(j / top for j in range(1, top + 1))

    def _code(self, size: jax.Array, scale: jax.Array) -> jax.Array:
        top = len(self._magnitudes)
        return jnp.minimum(jnp.round(size * (top / jnp.where(scale == 0, 1, scale))), top) / top


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerOfTwo(_FewBits):
    r"""Zero and powers of two, $s\,\{0, \pm 2^{-j} : j = 0, \dots, 2^{\text{bits}-1} - 2\}$.

    Multiplication by such a weight is a shift, but for s. `Ternary` says how the scale is found.

    Args:
        bits: bits per weight, from 2 to 4; 2 bits are `Ternary`.
        axis: which weights share a scale, as in `Binary`.
        group: as in `Binary`.
        group_axis: as in `Binary`.
        scale: a number that fixes the scale, the largest value.

    Raises:
        ValueError, TypeError: as `Binary`; also for bits out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import PowerOfTwo, quantize
        >>> weights = {"kernel": jnp.array([[0.9, -0.4, 0.2, 0.1]])}
        >>> print(quantize(weights, PowerOfTwo(bits=3, scale=1.0))["kernel"])
        [[ 1.   -0.5   0.25  0.  ]]

    References:
        Zhou et al., Incremental network quantization, arXiv:1702.03044.
    """

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        return tuple(2.0**-j for j in reversed(range(2 ** (self.bits - 1) - 1)))

    def _code(self, size: jax.Array, scale: jax.Array) -> jax.Array:
        size = size / jnp.where(scale == 0, 1, scale)
        lowest = self._magnitudes[0]
        return jnp.where(size >= lowest / 2, jnp.clip(_power(size), lowest, 1), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastSquares(Shared):
    r"""Two magnitudes with both signs, $\{-b, -a, a, b\}$: two bits per weight.

    The magnitudes are the means of the smaller and of the larger |w|, divided at the best of some cuts, which
    is refined halfway between the two. These are the sums of two binary weights with scales $(b \pm a)/2$.
    The squared error exceeds that of the least-squares optimum by at most 2% of $|w|^2$.

    Args:
        axis: which weights share the magnitudes, as in `Binary`.
        group: as in `Binary`.
        group_axis: as in `Binary`.

    Raises:
        ValueError, TypeError: as `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import LeastSquares, quantize
        >>> print(quantize({"kernel": jnp.array([[3.0], [-1.0], [0.5], [-2.0]])}, LeastSquares())["kernel"].T)
        [[ 2.5  -0.75  0.75 -2.5 ]]

    References:
        Pouransari, Tu and Tuzel, Least squares binary quantization of neural networks, arXiv:2001.02786.
    """

    def levels(self, scales: jax.Array) -> Levels:
        """The two magnitudes with both signs."""
        low, high = scales
        return -high, -low, low, high

    def _fit(self, size: jax.Array, over: Over) -> jax.Array:
        """The best of some cuts between 0 and the maximum of |w|, refined by the means of its parts.

        The mean is among those tried: it divides weights that are quantized already.
        """
        top = over(jnp.max, size)
        unit = _unit(top)
        size = size / unit
        mean = over(jnp.mean, size)
        above = [(1.0, 1 - i / _TRIED) for i in range(_TRIED)]
        below = [(share, 1.0) for share in (0.25, 0.5, 0.75)]
        factors, exponents = jnp.asarray([*above, *below], size.dtype).T

        def tried(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            cut = factors[i] * mean ** exponents[i]
            is_high = size >= cut
            share = over(jnp.mean, is_high.astype(size.dtype))
            # What the cut explains of the variance, share (1 - share) (high - low)^2, from the sum of a part.
            excess = over(jnp.mean, jnp.where(is_high, size - mean, 0))
            gain = excess**2 / jnp.where((share > 0) & (share < 1), share * (1 - share), 1)
            return jnp.maximum(gain, best[0]), jnp.where(gain > best[0], cut, best[1])

        def parts(cut: jax.Array) -> tuple[jax.Array, jax.Array]:
            is_high = size >= cut

            def part(chosen: jax.Array) -> jax.Array:
                share = over(jnp.mean, chosen.astype(size.dtype))
                kept = over(jnp.mean, jnp.where(chosen, size, 0))
                return jnp.where(share > 0, kept / jnp.where(share > 0, share, 1), mean)

            return part(~is_high), part(is_high)

        _, cut = jax.lax.fori_loop(0, factors.size, tried, (jnp.zeros_like(mean), mean))
        found = jax.lax.fori_loop(0, _REFINED, lambda _, pair: parts((pair[0] + pair[1]) / 2), parts(cut))
        return jnp.stack([jnp.where(jnp.isfinite(top), unit * magnitude, top) for magnitude in found])


# How many cuts are tried from the mean up, and how often the best of all is refined.
_TRIED, _REFINED = 16, 12
