"""Which leaves of a parameter tree are quantised, by rules, and the report of it."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from stam_jax import _trees
from stam_jax._tables import aligned

Rule = str | Callable[[str, Any], bool]

_BIAS = re.compile(r"^(.*_)?bias$")
_NORM = re.compile(r"(norm|^bn|^ln)(_?\d+)?$")
_EMBEDDING = re.compile(r"embed|(^|_)emb$|^w[tp]e$")
# Layer classes whose kernels are laid out (..., inputs, outputs), by the name they give them.
_INPUTS_THEN_OUTPUTS = re.compile(r"^(kernel|w)$")


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a `Selection`.

    Args:
        path: its name in the tree.
        shape: its shape.
        bits: what it takes in all, at one count of bits per quantised weight.
        quantized: whether it is quantised.
        why: the rule that decided.
    """

    path: str
    shape: tuple[int, ...]
    bits: int
    quantized: bool
    why: str


@dataclasses.dataclass(frozen=True, repr=False)
class Selection:
    """Which leaves are quantised, and why; printing it shows a table.

    Args:
        mask: a tree of booleans with the structure of the parameters.
        rows: one `Row` per leaf, in the tree's order.
        bits: bits per quantised weight, for the table.
    """

    mask: Any
    rows: tuple[Row, ...]
    bits: int = 1

    def __repr__(self) -> str:
        kind = "binary" if self.bits == 1 else f"{self.bits} bits"
        head = ("path", "shape", "weights", "bits", "why")
        cells = [
            (
                row.path,
                "x".join(map(str, row.shape)) or "scalar",
                kind if row.quantized else "float",
                f"{row.bits:,}",
                row.why,
            )
            for row in self.rows
        ]
        lines = aligned(head, cells, right={"bits"})
        weights = sum(math.prod(row.shape) for row in self.rows)
        chosen = sum(math.prod(row.shape) for row in self.rows if row.quantized)
        lines.append(
            f"{chosen:,} of {weights:,} weights in {sum(row.quantized for row in self.rows)} of "
            f"{len(self.rows)} leaves are {'binary' if self.bits == 1 else 'quantised'}."
        )
        return "\n".join(lines)


def select(
    params: Any,
    *,
    include: Rule | Sequence[Rule] = (),
    exclude: Rule | Sequence[Rule] = (),
    bits: int = 1,
) -> Selection:
    """Choose the leaves to quantise.

    By default these are the floating-point leaves of rank 2 or more, except biases, parameters of
    normalisation layers and embeddings. Those are told by the names of the leaf and its layer, which may err
    in networks that name them in their own ways: print the selection. Rules change it. A rule is

    * a pattern over paths, with the wildcards of the shell: `"head/*"`, `"*/conv1/kernel"`; `*` matches
      slashes too;
    * a predicate `(path, leaf) -> bool`;
    * among `exclude` only, `"first"` or `"last"`: the kernel at the network's input or output. Trees do not
      say the order of layers. It is read from the numbers where the kernels form one numbered sequence
      (`layers/0`, `layers/1`, ...), else from the shapes of kernels named `kernel` or `w`, laid out (...,
      inputs, outputs): the first is the one whose input size no other kernel puts out, the last the one
      whose output size no other takes in. Where neither decides, that is an error: name it by a pattern.

    Args:
        params: the parameters, any pytree; arrays or `jax.ShapeDtypeStruct`s.
        include: rules for leaves to quantise beyond the default.
        exclude: rules for leaves to leave in float.
        bits: bits per quantised weight, for the table alone.

    Returns:
        A `Selection`: hand it to `stam(mask=...)`, print it, or use its `mask`.

    Raises:
        ValueError: for a rule that matches no leaf, a leaf that two rules match, an included leaf that is
            not of a floating-point type, or `"first"` and `"last"` where neither names nor shapes decide.
        TypeError: for a rule that is neither text nor a predicate.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import select
        >>> params = {
        ...     "conv": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.ones(8)},
        ...     "head": {"kernel": jnp.ones((8, 10))},
        ... }
        >>> print(select(params, exclude="last"))
        path         shape    weights   bits  why
        -----------  -------  -------  -----  ----------------
        conv/bias    8        float      256  rank 1
        conv/kernel  3x3x1x8  binary      72  kernel of rank 4
        head/kernel  8x10     float    2,560  exclude 'last'
        72 of 160 weights in 1 of 3 leaves are binary.
    """
    everything = _trees.named_leaves(params, holes=True)
    leaves = {name: leaf for name, leaf in everything.items() if not _trees.is_masked(leaf)}
    holes = [name for name in everything if name not in leaves]
    decided = {name: _default(name, leaf) for name, leaf in leaves.items()}
    kernels = {name: leaves[name] for name, (chosen, _) in decided.items() if chosen}
    claims: dict[str, str] = {}
    for verb, rules in (("include", _as_rules(include)), ("exclude", _as_rules(exclude))):
        for rule in rules:
            label = f"{verb} {rule!r}" if isinstance(rule, str) else f"{verb} {_label(rule)}"
            for name in _matches(rule, verb, leaves, kernels, holes):
                if name in claims:
                    raise ValueError(
                        f"select: two rules claim the leaf {name!r}: {claims[name]} and {label}. "
                        "Make them disjoint."
                    )
                if verb == "include" and not jnp.issubdtype(leaves[name].dtype, jnp.floating):
                    raise ValueError(
                        f"select: {label} matches {name!r}, of dtype {leaves[name].dtype}; "
                        "only floating-point leaves can be quantised."
                    )
                claims[name] = label
                decided[name] = (verb == "include", label)
    rows = tuple(
        Row(
            path=name,
            shape=tuple(leaf.shape),
            bits=leaf.size * (bits if decided[name][0] else 8 * leaf.dtype.itemsize),
            quantized=decided[name][0],
            why=decided[name][1],
        )
        for name, leaf in leaves.items()
    )
    mask = _trees.map_named(lambda name, _: decided[name][0], params)
    return Selection(mask=mask, rows=rows, bits=bits)


def _default(name: str, leaf: Any) -> tuple[bool, str]:
    """Whether a leaf is quantised when no rule speaks of it, and why."""
    for attribute in ("shape", "dtype", "size"):
        if not hasattr(leaf, attribute):
            raise TypeError(f"select: the leaf {name!r} is {leaf!r}; it must be an array.")
    keys = name.lower().split("/")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False, f"dtype {leaf.dtype}"
    if len(leaf.shape) < 2:
        return False, f"rank {len(leaf.shape)}"
    if _BIAS.search(keys[-1]):
        return False, "bias"
    # By the leaf's own name and its layer's, not by those of the modules around; and a kernel is a kernel,
    # that of a patch embedding too.
    layer = keys[-2:] if keys[-1] != "kernel" else []
    if keys[-1] == "scale" or any(_NORM.search(key) for key in layer):
        return False, "normalisation"
    if any(_EMBEDDING.search(key) for key in layer):
        return False, "embedding"
    return True, f"kernel of rank {len(leaf.shape)}"


def _as_rules(rules: Rule | Sequence[Rule]) -> tuple[Rule, ...]:
    return (rules,) if isinstance(rules, str) or callable(rules) else tuple(rules)


def _label(rule: Any) -> str:
    return getattr(rule, "__name__", repr(rule))


def _matches(
    rule: Rule, verb: str, leaves: dict[str, Any], kernels: dict[str, Any], holes: list[str]
) -> tuple[str, ...]:
    """The names of the leaves that one rule matches."""
    if not (isinstance(rule, str) or callable(rule)):
        raise TypeError(
            f"select: a rule is a path pattern or a predicate (path, leaf) -> bool; got {rule!r}."
        )
    if rule in ("first", "last"):
        if verb == "include":
            raise ValueError(f"select: {rule!r} works with exclude only; kernels are included already.")
        return (_end(rule, kernels),)
    if isinstance(rule, str):
        found = tuple(name for name in leaves if fnmatch.fnmatchcase(name, rule))
        if not found and any(fnmatch.fnmatchcase(name, rule) for name in holes):
            return ()  # It speaks of a part that `optax.masked` or `optax.partition` keeps from here.
    else:
        found = tuple(name for name, leaf in leaves.items() if rule(name, leaf))
    if not found:
        what = repr(rule) if isinstance(rule, str) else _label(rule)
        raise ValueError(
            f"select: {verb} {what} matches no leaf; the leaves are {', '.join(leaves) or 'none'}."
        )
    return found


def _end(which: Any, kernels: dict[str, Any]) -> str:
    """The kernel at the network's input ("first") or output ("last")."""
    ordered = _in_numbered_order(kernels)
    if ordered:
        return ordered[0 if which == "first" else -1]
    if all(_INPUTS_THEN_OUTPUTS.search(name.split("/")[-1]) for name in kernels):
        own, other = (-2, -1) if which == "first" else (-1, -2)
        ends = [
            name
            for name, leaf in kernels.items()
            if all(leaf.shape[own] != rest.shape[other] for rest in kernels.values())
        ]
        if len(ends) == 1:
            return ends[0]
    raise ValueError(
        f"select: which kernel is {which!r} does not follow from names or shapes; name it by a pattern. "
        f"The kernels are {', '.join(kernels) or 'none'}."
    )


def _in_numbered_order(names: Any) -> list[str]:
    """The names by the one number in which they differ; empty where they are no such sequence."""
    parts = {name: re.split(r"(\d+)", name) for name in names}
    if len({len(split) for split in parts.values()}) != 1:
        return []
    columns = list(zip(*parts.values(), strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if not varying:
        return list(names)  # A single kernel is its own sequence.
    # re.split puts the numbers at the odd places.
    if len(varying) > 1 or varying[0] % 2 == 0:
        return []
    return sorted(parts, key=lambda name: int(parts[name][varying[0]]))
