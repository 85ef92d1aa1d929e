"""Quantised sets Q and the exact projections onto them: the prox of the indicator g of the model.

A quantiser is any hashable object with

* `bits`: the bits that one weight takes, an int;
* `project(v)`: the nearest point of Q, in the shape and dtype of v;
* `contains(y)`: whether y lies in Q, as a boolean scalar.

Those here have `levels(v)` too, the values that each weight could take, for the relaxations that ask for
them; and three that say a point of Q in few bits: `scales(v)` and `codes(v)`, a small whole number per
weight, and `decode(codes, scales)`.
"""

import abc
import dataclasses
import itertools
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from stam_jax._groups import Groups, merged


class Quantizer(Protocol):
    """What the engine asks of a quantised set; any hashable object with these members serves."""

    @property
    def bits(self) -> int:
        """Bits that one weight takes."""
        ...

    def project(self, v: jax.Array) -> jax.Array:
        """The point of Q nearest to v, in the shape and dtype of v."""
        ...

    def contains(self, y: jax.Array) -> jax.Array:
        """Whether y lies in Q, as a boolean scalar."""
        ...


@runtime_checkable
class HasLevels(Quantizer, Protocol):
    """A quantiser that can say the values between which a relaxation leads."""

    def levels(self, v: jax.Array) -> jax.Array:
        """The values that each weight could take at the scales of v's projection.

        They ascend along the first axis; the other axes broadcast against v.
        """
        ...


@runtime_checkable
class HasCodes(Quantizer, Protocol):
    """A quantiser that can say a point of Q in few bits, for packing."""

    def scales(self, v: jax.Array) -> jax.Array:
        """The numbers that say the levels of v's projection, in float32 at least."""
        ...

    def codes(self, v: jax.Array) -> jax.Array:
        """A number below 2**bits for each weight of v's projection, as uint8 in the shape of v."""
        ...

    def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weights that codes and scales stand for: v's projection, in the dtype of the scales."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded(Groups, abc.ABC):
    """A quantised set whose points are said by codes and scales."""

    @property
    def level_count(self) -> int:
        """How many levels there are; codes are below that."""
        return 2**self.bits

    @property
    @abc.abstractmethod
    def bits(self) -> int:
        """Bits that one weight takes, beside the scales."""

    @abc.abstractmethod
    def _at_scales(self, scales: jax.Array) -> jax.Array:
        """The levels in ascending order along a new first axis, the other axes those of one scale."""

    def levels(self, v: jax.Array) -> jax.Array:
        """The values that each weight could take at the scales of v's projection, in float32 at least.

        They ascend along the first axis; the other axes broadcast against v.
        """
        v = jnp.asarray(v)
        levels = self._at_scales(self.scales(v))
        if self.scale != "group":
            return levels
        u, _ = self._split(v)
        return jnp.broadcast_to(levels, (levels.shape[0], *u.shape)).reshape(levels.shape[0], *v.shape)

    @abc.abstractmethod
    def _encode(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes and scales of the nearest point."""

    def scales(self, v: jax.Array) -> jax.Array:
        """The scale of each group, in float32 at least.

        Its shape is that of v with 1 for the axes that share a scale; for `scale="group"` the input axis
        stands as two, groups and 1. `LeastSquares` has one per bit, along another axis before these.
        """
        return self._encode(jnp.asarray(v))[1]

    def codes(self, v: jax.Array) -> jax.Array:
        """The index of each weight's level, counted from the lowest, as uint8 in the shape of v."""
        return self._encode(jnp.asarray(v))[0]

    @abc.abstractmethod
    def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weights that codes and scales stand for, in the dtype of the scales."""

    def project(self, v: jax.Array) -> jax.Array:
        """The point of Q nearest to v, in the shape and dtype of v."""
        v = jnp.asarray(v)
        codes, scales = self._encode(v)
        y = self.decode(codes, scales).astype(v.dtype)
        return jnp.where(jnp.isnan(v), v, y)  # A code cannot say NaN, and scales of 1 do not show it.

    def _mean(self, u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """The mean over each group, accumulated in float32 at least."""
        # XLA sums in blocks on every backend, so this one reduction is as accurate as a pairwise sum, and
        # on CPU it is 30 times faster than a reduction per axis.
        return jnp.mean(u, axis=axes, keepdims=True, dtype=jnp.promote_types(u.dtype, jnp.float32))

    def _ones(self, u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """A scale of 1 for each group."""
        shape = tuple(1 if i in axes else n for i, n in enumerate(u.shape))
        return jnp.ones(shape, jnp.promote_types(u.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary(Coded):
    r"""Two values per scale group, $Q = \{\alpha s : s \in \{-1,+1\}^n, \alpha \ge 0\}$.

    The projection is $P_Q(v) = \alpha\,\mathrm{sign}(v)$ with $\alpha = \mathrm{mean}|v|$ over the group
    (the least-squares optimum) and $\mathrm{sign}(0) = +1$. The mean accumulates in float32 at least,
    whatever the dtype of v. A NaN makes its whole group NaN (itself alone where `scale=None`), an infinity
    makes it infinite, a group of zeros projects to zeros, and an empty array to itself.

    Args:
        scale: which weights share one alpha: those of an output channel (`"channel"`, XNOR-Net's), of the
            whole array (`"tensor"`), of `group` neighbours along the input axis (`"group"`); or `None`:
            alpha = 1, BinaryConnect's.
        axis: the output-channel axis for `scale="channel"` and `"group"`: -1 for Flax's kernels (the
            default; their input axis is -2), 0 for Equinox's and PyTorch's weights (their input axis is 1). A
            channel's scale is shared along all other axes: by the heads of a kernel of shape (inputs, heads,
            size), and by the layers of a stack made by `vmap` or `scan`.
        group: how many neighbours for `scale="group"`, at one place of the other axes; an array with fewer
            inputs is one group along them.

    Raises:
        ValueError: if `scale` is none of the four, or `group` does not go with it; on projecting, if
            `"channel"` or `"group"` meets an array of rank below 2 (every entry would be its own channel),
            one without that axis, or one whose inputs do not divide into groups.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Binary
        >>> v = jnp.array([[1.0, -2.0], [-3.0, 0.0]])
        >>> print(Binary(scale="channel").project(v))
        [[ 2. -1.]
         [-2.  1.]]
        >>> print(Binary(scale="tensor").project(v))
        [[ 1.5 -1.5]
         [-1.5  1.5]]

    References:
        Rastegari et al., XNOR-Net, arXiv:1603.05279; Courbariaux et al., BinaryConnect, arXiv:1511.00363.
    """

    @property
    def bits(self) -> int:
        """Bits that one weight takes: one, beside the scales."""
        return 1

    def _encode(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, axes = self._split(v)
        is_given = self.scale is None or v.size == 0
        scales = self._ones(u, axes) if is_given else self._mean(jnp.abs(u), axes)
        return (v >= 0).astype(jnp.uint8), scales

    def _at_scales(self, scales: jax.Array) -> jax.Array:
        return jnp.stack([-scales, scales])

    def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weights that codes, 1 for +alpha and 0 for -alpha, and scales stand for."""
        u, _ = self._split(jnp.asarray(codes))
        return jnp.where(u == 1, scales, -scales).reshape(codes.shape)

    def contains(self, y: jax.Array) -> jax.Array:
        """Whether every group of y holds nothing but +alpha and -alpha, exactly, for one finite alpha."""
        u, axes = self._split(jnp.asarray(y))
        if u.size == 0:
            return jnp.array(True)
        size = jnp.abs(u)
        alpha = 1 if self.scale is None else jnp.max(size, axis=axes, keepdims=True)
        return jnp.all((size == alpha) & jnp.isfinite(u))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Levels(Coded):
    """Levels that are fixed but for one factor per group, symmetric about 0 and with 0 among them."""

    @property
    @abc.abstractmethod
    def _magnitudes(self) -> tuple[float, ...]:
        """The levels from 0 up to 1, at scale 1."""

    @property
    def level_count(self) -> int:
        """How many levels there are: 0, and the others with both signs."""
        return 2 * len(self._magnitudes) - 1

    @property
    def _bounds(self) -> tuple[float, ...]:
        """Halfway between neighbouring magnitudes."""
        return tuple((low + high) / 2 for low, high in itertools.pairwise(self._magnitudes))

    def _rank(self, size: jax.Array, scales: jax.Array) -> jax.Array:
        """Which magnitude is nearest to each |v|."""
        zero = jnp.zeros(size.shape, jnp.uint8)
        return sum(((size > bound * scales).astype(jnp.uint8) for bound in self._bounds), zero)

    def _pick(self, rank: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The magnitudes of those ranks, without a gather."""
        zero = jnp.zeros(rank.shape, dtype)
        terms = (jnp.where(rank == i, p, 0).astype(dtype) for i, p in enumerate(self._magnitudes))
        return sum(terms, zero)

    def _scales(self, u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        r"""The least-squares optimum, by sorting and prefix sums.

        As alpha falls from infinity, each |v| passes from one magnitude to the next at a known alpha. All
        these passages, in order, make all assignments of weights to magnitudes that can be optimal; for
        each, the best alpha is $\sum |v| q / \sum q^2$ and the gain $(\sum |v| q)^2 / \sum q^2$.
        """
        size = jnp.abs(u).astype(jnp.promote_types(u.dtype, jnp.float32))
        rows, shape = merged(size, axes)
        steps = list(itertools.pairwise(self._magnitudes))
        passage = jnp.concatenate([rows / bound for bound in self._bounds], axis=1)
        gained = jnp.concatenate([rows * (high - low) for low, high in steps], axis=1)
        squares = jnp.concatenate([jnp.full_like(rows, high**2 - low**2) for low, high in steps], axis=1)
        _, gained, squares = jax.lax.sort((-passage, gained, squares), dimension=1, num_keys=1)
        products, norms = jnp.cumsum(gained, axis=1), jnp.cumsum(squares, axis=1)
        # Divided by the group's largest sum, so that the square stays in range.
        top = jnp.maximum(products[:, -1:], jnp.finfo(products.dtype).tiny)
        best = jnp.argmax((products / top) ** 2 / norms, axis=1, keepdims=True)
        pick = lambda sums: jnp.take_along_axis(sums, best, axis=1).reshape(shape)
        alpha = pick(products) / pick(norms)
        # Sums anew over the assignment found: plain reductions round less than prefix sums.
        q = self._pick(self._rank(size, alpha), size.dtype)
        norm = self._mean(q * q, axes)
        return jnp.where(norm > 0, self._mean(size * q, axes) / jnp.where(norm > 0, norm, 1), alpha)

    def _encode(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, axes = self._split(v)
        is_given = self.scale is None or v.size == 0
        scales = self._ones(u, axes) if is_given else self._scales(u, axes)
        rank = self._rank(jnp.abs(u), scales)
        top = len(self._magnitudes) - 1
        codes = jnp.where(u < 0, top - rank, top + rank)
        return codes.astype(jnp.uint8).reshape(v.shape), scales

    def _at_scales(self, scales: jax.Array) -> jax.Array:
        positive = [magnitude * scales for magnitude in self._magnitudes[1:]]
        return jnp.stack([*(-level for level in reversed(positive)), 0 * scales, *positive])

    def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weights that codes, indices of the levels from the lowest, and scales stand for."""
        u, _ = self._split(jnp.asarray(codes))
        offset = u.astype(jnp.int8) - jnp.int8(len(self._magnitudes) - 1)
        size = self._pick(jnp.abs(offset), scales.dtype) * scales
        return jnp.where(offset < 0, -size, size).reshape(codes.shape)

    def contains(self, y: jax.Array) -> jax.Array:
        """Whether every group of y holds nothing but alpha times the levels, to rounding, for one alpha."""
        u, axes = self._split(jnp.asarray(y))
        if u.size == 0:
            return jnp.array(True)
        wide = jnp.promote_types(u.dtype, jnp.float32)
        size = jnp.abs(u).astype(wide)
        info = jnp.finfo(u.dtype)
        # Small numbers are rounded to multiples of the smallest one.
        slack, least = 4 * float(info.eps), 8 * float(info.smallest_subnormal)
        largest = jnp.max(size, axis=axes, keepdims=True)
        fits = jnp.zeros(largest.shape, bool)
        # The largest weight of the group may be any of the magnitudes.
        for magnitude in (1.0,) if self.scale is None else self._magnitudes[1:]:
            alpha = jnp.ones_like(largest) if self.scale is None else largest / magnitude
            q = self._pick(self._rank(size, alpha), wide)
            near = jnp.abs(size - q * alpha) <= slack * q * alpha + least * (q > 0)
            fits |= jnp.all(near, axis=axes, keepdims=True)
        return jnp.all(fits) & jnp.all(jnp.isfinite(u))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(_Levels):
    r"""Three values per scale group, $Q = \{\alpha q : q \in \{-1,0,+1\}^n, \alpha \ge 0\}$.

    With $|v|$ sorted from large to small and prefix sums $S_k$, the projection keeps the k largest that
    maximise $S_k^2/k$ and sets them to $\alpha = S_k/k$ times their signs: the exact least-squares optimum.

    Args:
        scale: which weights share one alpha, as in `Binary`.
        axis: the output-channel axis, as in `Binary`.
        group: how many neighbours for `scale="group"`, as in `Binary`.
        rule: `"exact"`, or `"heuristic"`: Ternary Weight Networks' threshold, 0.7 mean|v|, which needs no
            sort; then `project` is not quite a projection.

    Raises:
        ValueError: if `rule` is neither of the two; otherwise as `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Ternary
        >>> print(Ternary(scale="tensor").project(jnp.array([3.0, -1.0, 0.2, -2.0])))
        [ 2.5  0.   0.  -2.5]

    References:
        Li and Liu, Ternary weight networks, arXiv:1605.04711 (the heuristic).
    """

    rule: Literal["exact", "heuristic"] = "exact"

    def __post_init__(self):
        super().__post_init__()
        if self.rule not in ("exact", "heuristic"):
            raise ValueError(f"Ternary: rule must be 'exact' or 'heuristic'; got {self.rule!r}.")

    @property
    def bits(self) -> int:
        """Bits that one weight takes: two, beside the scales."""
        return 2

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    def _encode(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.rule == "exact" or v.size == 0:
            return super()._encode(v)
        u, axes = self._split(v)
        size = jnp.abs(u).astype(jnp.promote_types(u.dtype, jnp.float32))
        kept = (size > 0.7 * self._mean(size, axes)).astype(size.dtype)
        share = self._mean(kept, axes)
        mean = self._mean(size * kept, axes) / jnp.where(share > 0, share, 1)
        scales = self._ones(u, axes) if self.scale is None else mean
        signed = jnp.where(u < 0, -kept, kept)
        return (signed + 1).astype(jnp.uint8).reshape(v.shape), scales


def _check_bits(name: str, bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 4:
        raise ValueError(f"{name}: bits must be a whole number from 2 to 4; got {bits!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FewBits(_Levels):
    """Levels that follow from a number of bits per weight."""

    bits: int = 4

    def __post_init__(self):
        super().__post_init__()
        _check_bits(type(self).__name__, self.bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(_FewBits):
    r"""Evenly spaced values, $\alpha\,j/m$ with $j = -m, \dots, m$ and $m = 2^{\text{bits}-1} - 1$.

    These are the symmetric integers of low-bit arithmetic, 0 among them; 2 bits are `Ternary`. The scale is
    the exact least-squares optimum, found by sorting m numbers per weight.

    Args:
        bits: bits per weight, from 2 to 4.
        scale: which weights share one alpha, the largest value, as in `Binary`.
        axis: the output-channel axis, as in `Binary`.
        group: how many neighbours for `scale="group"`, as in `Binary`.

    Raises:
        ValueError: if `bits` is out of range; otherwise as `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Uniform
        >>> print(Uniform(bits=3, scale=None).project(jnp.array([0.9, -0.4, 0.1])))
        [ 1.         -0.33333334  0.        ]
    """

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        top = 2 ** (self.bits - 1) - 1
        return tuple(j / top for j in range(top + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerOfTwo(_FewBits):
    r"""Zero and powers of two, $\alpha\,\{0, \pm 2^{-j} : j = 0, \dots, 2^{\text{bits}-1} - 2\}$.

    Multiplication by such a weight is a shift, but for alpha. The scale is the exact least-squares optimum.

    Args:
        bits: bits per weight, from 2 to 4; 2 bits are `Ternary`.
        scale: which weights share one alpha, the largest value, as in `Binary`.
        axis: the output-channel axis, as in `Binary`.
        group: how many neighbours for `scale="group"`, as in `Binary`.

    Raises:
        ValueError: if `bits` is out of range; otherwise as `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import PowerOfTwo
        >>> print(PowerOfTwo(bits=3, scale=None).project(jnp.array([0.9, -0.4, 0.2, 0.1])))
        [ 1.   -0.5   0.25  0.  ]

    References:
        Zhou et al., Incremental network quantization, arXiv:1702.03044 (powers of two as levels).
    """

    @property
    def _magnitudes(self) -> tuple[float, ...]:
        return (0.0, *(2.0**-j for j in reversed(range(2 ** (self.bits - 1) - 1))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastSquares(Coded):
    r"""Sums of binary weights, $Q = \{\sum_i \alpha_i s_i : s_i \in \{-1,+1\}^n, \alpha_i \ge 0\}$.

    A weight takes one of $2^{\text{bits}}$ values, which the scales $\alpha_i$ place: closer where the
    weights are. There is a scale per bit and group.

    Args:
        bits: the number of summands, from 2 to 4.
        rule: `"best"`: with 2 bits the exact least-squares optimum, the best two magnitudes for |v|, by
            sorting and prefix sums; with 3 and 4, whose exact optimum takes a search over all pairs and
            triples of weights, codes and scales that improve each other in turn, 20 times, from two starts,
            greedy's the one. Or `"greedy"`: each summand alone fits what the ones before it left, and weights
            go to the nearest of all sums. Only the exact optimum is a projection.
        scale: which weights share scales, as in `Binary`, but for `None`: they are fitted here.
        axis: the output-channel axis, as in `Binary`.
        group: how many neighbours for `scale="group"`, as in `Binary`.

    Raises:
        ValueError: if `bits` is out of range, `rule` neither of the two, or `scale` is None; otherwise as
            `Binary`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import LeastSquares
        >>> print(LeastSquares(bits=2, scale="tensor").project(jnp.array([3.0, -1.0, 0.5, -2.0])))
        [ 2.5  -0.75  0.75 -2.5 ]

    References:
        Pouransari, Tu and Tuzel, Least squares binary quantization of neural networks, arXiv:2001.02786 (the
        greedy rule and the optimum of 2 bits); Xu et al., Alternating multi-bit quantization for recurrent
        neural networks, arXiv:1802.00150 (codes and scales in turn).
    """

    bits: int = 2
    rule: Literal["best", "greedy"] = "best"

    def __post_init__(self):
        super().__post_init__()
        _check_bits("LeastSquares", self.bits)
        if self.rule not in ("best", "greedy"):
            raise ValueError(f"LeastSquares: rule must be 'best' or 'greedy'; got {self.rule!r}.")
        if self.scale is None:
            raise ValueError("LeastSquares: scale=None leaves no scales to fit; give 'tensor' or another.")

    @property
    def _signs(self) -> tuple[tuple[int, ...], ...]:
        """The signs of the summands, the first +1: one row for each level but its opposite."""
        return tuple((1, *rest) for rest in itertools.product((-1, 1), repeat=self.bits - 1))

    def _sums(self, alphas: jax.Array) -> list[jax.Array]:
        """The sum of the scales at each row of signs; with their opposites these are the levels."""
        zero = jnp.zeros_like(alphas[0])
        return [sum((s * alpha for s, alpha in zip(row, alphas, strict=True)), zero) for row in self._signs]

    def _magnitudes(self, alphas: jax.Array) -> jax.Array:
        """The levels that are not negative, in ascending order."""
        return jnp.sort(jnp.abs(jnp.stack(self._sums(alphas))), axis=0)

    def _at_scales(self, scales: jax.Array) -> jax.Array:
        magnitudes = self._magnitudes(scales)
        return jnp.concatenate([-magnitudes[::-1], magnitudes])

    def _two_magnitudes(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The two magnitudes that fit each row best: its mean below and above the best of all cuts."""
        count = rows.shape[1]
        below = jnp.arange(1, count + 1, dtype=rows.dtype)
        mean = self._mean(rows, (1,))
        ordered = jnp.sort(rows, axis=1)
        # What a cut explains, from how far the sum below it is from its share of the whole.
        lack = jnp.cumsum(ordered - mean, axis=1)
        scale = jnp.maximum(jnp.max(jnp.abs(lack), axis=1, keepdims=True), jnp.finfo(rows.dtype).tiny)
        explained = jnp.where(below < count, (lack / scale) ** 2 / (below * jnp.maximum(count - below, 1)), 0)
        cut = jnp.argmax(explained, axis=1, keepdims=True)
        bound = jnp.take_along_axis(ordered, cut, axis=1)
        is_low = rows <= bound
        low = self._mean(jnp.where(is_low, rows, 0), (1,)) / self._mean(is_low.astype(rows.dtype), (1,))
        share = self._mean((~is_low).astype(rows.dtype), (1,))
        high = self._mean(jnp.where(is_low, 0, rows), (1,)) / jnp.where(share > 0, share, 1)
        return low, jnp.where(share > 0, high, low)

    def _nearest(self, rows: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which of the sums each weight lies next to, signs aside, and how far from it."""
        nearest = jnp.zeros(rows.shape, jnp.uint8)
        closest = jnp.abs(rows - jnp.abs(sums[0]))
        for j, total in enumerate(sums[1:], start=1):
            distance = jnp.abs(rows - jnp.abs(total))
            nearest = jnp.where(distance < closest, j, nearest).astype(jnp.uint8)
            closest = jnp.minimum(closest, distance)
        return nearest, closest

    def _improved(self, rows: jax.Array, alphas: jax.Array) -> jax.Array:
        """Scales that fit the rows better: those of the nearest codes, by their normal equations."""
        sums = jnp.stack(self._sums(alphas))
        nearest, _ = self._nearest(rows, sums)
        chosen = [(nearest == j).astype(rows.dtype) for j in range(len(sums))]
        share = jnp.stack([self._mean(c, (1,)) for c in chosen])[:, None]
        mean = jnp.stack([self._mean(c * rows, (1,)) for c in chosen])[:, None]
        signs = jnp.asarray(self._signs, rows.dtype)[:, :, None, None]
        signs = jnp.where(sums[:, None] < 0, -signs, signs)
        gram = jnp.sum(share[:, :, None] * signs[:, :, None] * signs[:, None], axis=0)
        moment = jnp.sum(mean * signs, axis=0)
        # Gauss-Seidel: the diagonal is 1, and codes that no weight takes make the equations singular.
        for _ in range(4):
            for i in range(self.bits):
                alphas = alphas.at[i].add(moment[i] - jnp.sum(gram[i] * alphas, axis=0))
        return jnp.abs(alphas)

    def _fit(self, rows: jax.Array) -> jax.Array:
        """The scales of each row of weights without signs: [bits, rows, 1]."""
        if self.rule == "best" and self.bits == 2:
            low, high = self._two_magnitudes(rows)
            return jnp.stack([(high + low) / 2, (high - low) / 2])
        alphas, left = [], rows
        for _ in range(self.bits):
            alphas.append(self._mean(left, (1,)))
            left = jnp.abs(left - alphas[-1])
        greedy = jnp.stack(alphas)
        return greedy if self.rule == "greedy" else self._refined(rows, greedy)

    def _refined(self, rows: jax.Array, greedy: jax.Array) -> jax.Array:
        """The better of two sets of scales that improve no more, or little; never worse than greedy."""
        top = jnp.max(rows, axis=1, keepdims=True)
        top = jnp.where(top == 0, 1, top)
        rows = rows / top  # So that squares stay in range.
        size = jnp.sqrt(self._mean(rows * rows, (1,)))
        spread = jnp.stack([0.7**i * size for i in range(self.bits)])
        improve = lambda _, start: self._improved(rows, start)
        first, second = (jax.lax.fori_loop(0, 20, improve, start) for start in (greedy / top, spread))

        def error(alphas: jax.Array) -> jax.Array:
            _, distance = self._nearest(rows, jnp.stack(self._sums(alphas)))
            return self._mean(distance**2, (1,))

        return top * jnp.where(error(second) < error(first), second, first)

    def _encode(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, axes = self._split(v)
        size = jnp.abs(u).astype(jnp.promote_types(u.dtype, jnp.float32))
        rows, shape = merged(size, axes)
        if v.size == 0:
            scales = jnp.ones((self.bits, *shape), size.dtype)
        else:
            scales = self._fit(rows).reshape(self.bits, *shape)
        magnitudes = self._magnitudes(scales)
        rank = jnp.zeros(size.shape, jnp.uint8)
        for low, high in itertools.pairwise(magnitudes):
            rank += (size > (low + high) / 2).astype(jnp.uint8)
        half = len(magnitudes)
        codes = jnp.where(u >= 0, half + rank, half - 1 - rank)
        return codes.astype(jnp.uint8).reshape(v.shape), scales

    def decode(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        """The weights that codes, indices of the levels from the lowest, and scales stand for."""
        u, _ = self._split(jnp.asarray(codes))
        levels = self._at_scales(scales)
        y = jnp.broadcast_to(levels[0], jnp.broadcast_shapes(levels[0].shape, u.shape))
        for i, level in enumerate(levels[1:], start=1):
            y = jnp.where(u == i, level, y)
        return y.reshape(codes.shape)

    def contains(self, y: jax.Array) -> jax.Array:
        """Whether no group of y holds more magnitudes than the bits can tell apart.

        With 2 bits that is all that Q asks. With 3 and 4 the magnitudes are also sums of few scales, which is
        not looked into.
        """
        u, axes = self._split(jnp.asarray(y))
        if u.size == 0:
            return jnp.array(True)
        rows, _ = merged(jnp.abs(u), axes)
        ordered = jnp.sort(rows, axis=1)
        distinct = 1 + jnp.sum(ordered[:, 1:] != ordered[:, :-1], axis=1)
        return jnp.all(distinct <= len(self._signs)) & jnp.all(jnp.isfinite(u))
