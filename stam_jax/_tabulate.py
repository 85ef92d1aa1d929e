"""The table of what is quantized, and how."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import _assignment, _paths
from stam_jax._assignment import Assigned, Quantizers
from stam_jax._packed import Packed, is_packed, layout
from stam_jax.packing._pack import gap_of
from stam_jax.quantizers import Binary, Quantizer


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a `Table`.

    Args:
        path: of the leaf.
        shape: of the leaf.
        quantizer: of the leaf; None where it stays in full precision.
        scales: the number of scales; 0 without a quantizer.
        bits: of the leaf in all when packed, scales included.
        bits_whole: of the leaf as an array of its dtype.
        gap: $|P_Q(x) - x| / |x|$; None without a quantizer, or where there are shapes alone.
        rule: what decided.
    """

    path: str
    shape: tuple[int, ...]
    quantizer: Quantizer | None
    scales: int
    bits: int
    bits_whole: int
    gap: float | None
    rule: str


@dataclasses.dataclass(frozen=True, repr=False)
class Table:
    """What `tabulate` returns; printing it shows a table.

    Args:
        rows: one `Row` per leaf, in the order of the tree.
    """

    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves when packed."""
        return sum(-(-row.bits // 8) for row in self.rows)

    @property
    def nbytes_whole(self) -> int:
        """Bytes of all leaves as arrays of their dtypes."""
        return sum(-(-row.bits_whole // 8) for row in self.rows)

    def __repr__(self) -> str:
        head = ("path", "shape", "quantizer", "scales", "bits", "gap", "rule")
        cells = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                "-" if row.quantizer is None else _short(row.quantizer),
                f"{row.scales:,}" if row.scales else "-",
                f"{row.bits:,}",
                "-" if row.gap is None else f"{row.gap:.2g}",
                row.rule,
            )
            for row in self.rows
        ]
        lines = _aligned(head, cells, right={"scales", "bits", "gap"})
        quantized = [row for row in self.rows if row.quantizer is not None]
        count = lambda rows: sum(math.prod(row.shape) for row in rows)
        less = f", {self.nbytes_whole / self.nbytes:.1f} times less" if self.nbytes else ""
        lines.append(
            f"{count(quantized):,} of {count(self.rows):,} numbers in {len(quantized)} of {len(self.rows)} "
            "leaves are quantized."
        )
        lines.append(f"Packed, {self.nbytes_whole:,} bytes are {self.nbytes:,}{less}.")
        return "\n".join(lines)


def tabulate(params: Any, quantizer: Quantizers = Binary()) -> Table:
    r"""A table of what is quantized, and how: look at it before training, and before shipping.

    The gap $|P_Q(x) - x| / |x|$ of a hard network is rounding alone, at most 2e-6 in float32 and 4e-3 in
    bfloat16; a larger one says that the quantizer is not that of the training, or that the network is not
    hard yet.

    Args:
        params: the parameters, any pytree; shapes alone do, as of `jax.eval_shape`, and the leaves may be
            `Packed`.
        quantizer: what is quantized, and how, as in `stam`; of no use where there are `Packed` leaves.

    Returns:
        A `Table`: print it, or read its `rows`.

    Raises:
        ValueError, TypeError: as `quantize`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import tabulate
        >>> params = {
        ...     "conv": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.ones(8)},
        ...     "head": {"kernel": jnp.ones((8, 10))},
        ... }
        >>> print(tabulate(params))
        path         shape    quantizer        scales  bits  gap  rule
        -----------  -------  ---------------  ------  ----  ---  -------
        conv/bias    8        -                     -   256    -  rank 1
        conv/kernel  3x3x1x8  Binary(axis=-1)       8   328    0  default
        head/kernel  8x10     Binary(axis=-1)      10   448    0  default
        152 of 160 numbers in 2 of 3 leaves are quantized.
        Packed, 640 bytes are 129, 5.0 times less.
    """
    _assignment.check_quantizer("tabulate", quantizer)
    leaves, _ = _paths.flatten_named(params, is_packed)
    if any(map(is_packed, leaves.values())):
        # What is whole beside packed leaves was left so when they were packed.
        assigned = {
            path: _assignment.default(path, leaf, None, "not packed") for path, leaf in leaves.items()
        }
    else:
        assigned = _assignment.assign("tabulate", quantizer, params)
    rows = [_packed_row(path, a.leaf) if is_packed(a.leaf) else _row(path, a) for path, a in assigned.items()]
    return Table(tuple(rows))


def _packed_row(path: str, leaf: Packed) -> Row:
    whole = 8 * math.prod(leaf.shape) * leaf.dtype.itemsize
    return Row(path, leaf.shape, leaf.quantizer, leaf.scales.size, 8 * leaf.nbytes, whole, 0.0, "packed")


def _row(path: str, assigned: Assigned) -> Row:
    leaf, quantizer, rule = assigned
    shape = tuple(getattr(leaf, "shape", ()))
    is_array = hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    whole = 8 * math.prod(shape) * np.dtype(leaf.dtype).itemsize if is_array else 0
    if quantizer is None:
        return Row(path, shape, None, 0, whole, whole, None, rule)
    with _assignment.naming("tabulate", path):
        scales = jax.eval_shape(quantizer.scales, jax.ShapeDtypeStruct(shape, leaf.dtype))
        gap = None
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            gap = float(gap_of(jnp.asarray(leaf), _assignment.project(quantizer, jnp.asarray(leaf))))
    row_bits = (shape[-1] if shape else 1) * layout(quantizer, shape).bits
    codes = 8 * -(-row_bits // 8) * math.prod(shape[:-1])
    bits = codes + 8 * scales.size * np.dtype(scales.dtype).itemsize
    return Row(path, shape, quantizer, scales.size, bits, whole, gap, rule)


def _short(quantizer: Any) -> str:
    """A quantizer with the options that are set."""
    if not dataclasses.is_dataclass(quantizer):
        return repr(quantizer)
    fields = [(field.name, getattr(quantizer, field.name)) for field in dataclasses.fields(quantizer)]
    options = ", ".join(f"{name}={value}" for name, value in fields if value is not None)
    return f"{type(quantizer).__name__}({options})"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str]) -> list[str]:
    """The lines of a table: its head, a rule and its rows, those columns to the right whose titles say so."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(
            cell.rjust(width) if title in right else cell.ljust(width)
            for cell, width, title in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in [head, rule, *rows]
    ]
