"""What a packed network holds, layer by layer."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stam_jax import _trees
from stam_jax._groups import Groups
from stam_jax._tables import aligned
from stam_jax.packing import Packed, is_packed, precision_of
from stam_jax.selection import select


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf of a `Report`.

    Args:
        path: its name in the tree.
        shape: its shape.
        bits: of each of its numbers.
        groups: how many groups of weights have scales of their own; 0 where it is not packed.
        values: the most distinct values found in one group; in the whole leaf where it is not packed.
        bytes_whole: what it takes as an array of its dtype.
        bytes_packed: what it takes here.
        why: its quantiser, or why it is not packed.
    """

    path: str
    shape: tuple[int, ...]
    bits: int
    groups: int
    values: int
    bytes_whole: int
    bytes_packed: int
    why: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What a network holds, leaf by leaf; printing it shows a table.

    Args:
        rows: one for each leaf, in the tree's order.
    """

    rows: tuple[LeafReport, ...]

    @property
    def bytes_whole(self) -> int:
        """What all leaves take as arrays of their dtypes."""
        return sum(row.bytes_whole for row in self.rows)

    @property
    def bytes_packed(self) -> int:
        """What all leaves take here."""
        return sum(row.bytes_packed for row in self.rows)

    def __repr__(self) -> str:
        head = ("path", "shape", "bits", "groups", "values", "bytes whole", "packed", "why")
        cells = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                str(row.bits),
                f"{row.groups:,}" if row.groups else "-",
                f"{row.values:,}",
                f"{row.bytes_whole:,}",
                f"{row.bytes_packed:,}",
                row.why,
            )
            for row in self.rows
        ]
        lines = aligned(head, cells, right=head[2:7])
        packed = [row for row in self.rows if row.groups]
        weights = lambda rows: sum(math.prod(row.shape) for row in rows)
        lines.append(
            f"{weights(packed):,} of {weights(self.rows):,} numbers in {len(packed)} of {len(self.rows)} "
            f"leaves are packed; {self.bytes_whole:,} bytes are {self.bytes_packed:,}"
            + (f", {self.bytes_whole / self.bytes_packed:.1f} times less." if self.bytes_packed else ".")
        )
        return "\n".join(lines)


def report(tree: Any) -> Report:
    """Say of every leaf of a packed network what it holds, and why it is in float if it is.

    The values are counted in the network made whole: two of them in every group prove that it is binary.

    Args:
        tree: what `pack` or `load_packed` returns, or a tree of such trees and arrays.

    Returns:
        A `Report`: print it, or read its `rows`.

    Raises:
        TypeError: with its name, for a leaf that is not an array of numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import pack, report, stam
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.5]]), "bias": jnp.array([0.3, 0.4])}
        >>> print(report(pack(stam(0.1).init(params), params)))
        path    shape  bits  groups  values  bytes whole  packed  why
        ------  -----  ----  ------  ------  -----------  ------  ------------------
        bias    2        32       -       2            8       8  rank 1
        kernel  2x2       1       2       2           16      10  Binary per channel
        4 of 6 numbers in 1 of 2 leaves are packed; 24 bytes are 18, 1.3 times less.
    """
    leaves, _ = _trees.flatten_named(tree, lambda node: is_packed(node) or _trees.is_masked(node))
    leaves = {name: leaf for name, leaf in leaves.items() if is_packed(leaf) or not _trees.is_masked(leaf)}
    return Report(tuple(_row(name, leaf) for name, leaf in leaves.items()))


def _row(name: str, leaf: Any) -> LeafReport:
    """What one leaf holds."""
    if isinstance(leaf, Packed):
        groups = _groups(leaf)
        return LeafReport(
            path=name,
            shape=leaf.shape,
            bits=leaf.quantizer.bits,
            groups=len(groups),
            values=_most_values(groups),
            bytes_whole=math.prod(leaf.shape) * leaf.dtype.itemsize,
            bytes_packed=leaf.nbytes,
            why=_said(leaf.quantizer),
        )
    if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(f"report: the leaf {name!r} is {leaf!r}, not an array of numbers.")
    array = np.asarray(leaf)
    row = select({name: array}).rows[0]
    return LeafReport(
        path=name,
        shape=array.shape,
        bits=8 * array.dtype.itemsize,
        groups=0,
        values=_most_values(array.reshape(1, -1)),
        bytes_whole=array.nbytes,
        bytes_packed=array.nbytes,
        why="left in float by choice" if row.quantized else row.why,
    )


def _groups(leaf: Packed) -> np.ndarray:
    """The weights of a leaf by the group that shares scales: [groups, weights]."""
    quantizer = leaf.quantizer
    with precision_of([leaf]):
        whole = leaf.unpack()
        grouped = quantizer.by_group(whole) if isinstance(quantizer, Groups) else whole.reshape(1, -1)
        return np.asarray(grouped)


def _most_values(groups: np.ndarray) -> int:
    """The most distinct values in one row."""
    if groups.size == 0:
        return 0
    ordered = np.sort(groups, axis=1)
    return int(np.max(1 + np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1)))


def _said(quantizer: Any) -> str:
    """A quantiser in a few words."""
    name, scale = type(quantizer).__name__, getattr(quantizer, "scale", ...)
    if scale is ...:
        return name
    if scale is None:
        return f"{name} without scales"
    return f"{name} per {scale}" + (f" of {quantizer.group}" if scale == "group" else "")
