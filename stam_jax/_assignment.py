"""Which quantizer each leaf has, and the quantized network, which follows from that alone."""

import contextlib
import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stam_jax import _packed, _paths
from stam_jax.quantizers import Binary, Quantizer, levels_of, nearest, spread, wide

Rule = Callable[[str, jax.ShapeDtypeStruct], Quantizer | None]
Quantizers = Quantizer | Mapping[str, Quantizer | None] | Rule

_WEIGHTS = ("kernel", "weight", "w")
_OFFSET = re.compile(r"(?<![^/_])(bias|scale)$")
_NORMALIZATION = re.compile(r"norm(alization)?_?\d*$|^(bn|ln)(_|\d|$)")
_EMBEDDING = re.compile(r"embed|(^|_)emb(_|\d|$)|^w[tp]e$")


class Assigned(NamedTuple):
    """One leaf and its quantizer.

    Args:
        leaf: the array, or its shape and dtype.
        quantizer: of the leaf; None where it stays in full precision.
        rule: what decided.
    """

    leaf: Any
    quantizer: Quantizer | None
    rule: str


def check_quantizer(where: str, quantizer: Any) -> None:
    """Raise unless an argument says what is quantized, as far as can be seen without the parameters."""
    if isinstance(quantizer, Mapping):
        for pattern, value in quantizer.items():
            if not isinstance(pattern, str) or not (value is None or _is_quantizer(value)):
                raise TypeError(
                    f"{where}: quantizer maps patterns over paths to quantizers or None; "
                    f"got {pattern!r}: {value!r}."
                )
        if not quantizer:
            raise ValueError(f"{where}: quantizer has no pattern; got {quantizer!r}.")
    elif isinstance(quantizer, type) or not (_is_quantizer(quantizer) or callable(quantizer)):
        raise TypeError(
            f"{where}: quantizer must be a quantizer such as Binary(), a dictionary from patterns over paths "
            "to quantizers or None, or a function (path, jax.ShapeDtypeStruct) -> quantizer or None; "
            f"got {quantizer!r}. (optax.inject_hyperparams calls functions as schedules: name it in "
            "static_args.)"
        )


def _is_quantizer(value: Any) -> bool:
    return isinstance(value, Quantizer) and not isinstance(value, type)


def assign(where: str, quantizer: Quantizers, params: Any) -> dict[str, Assigned]:
    """The quantizer of each leaf, by path, in the order of the tree.

    Args:
        where: the name of the function that asks, for errors.
        quantizer: what is quantized, and how; see `stam`.
        params: the parameters; arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: as `quantize`, but for shapes.
    """
    nodes, _ = _paths.flatten_named(params, _packed.is_packed)
    if packed := [path for path, node in nodes.items() if _packed.is_packed(node)]:
        raise ValueError(f"{where}: the leaf {packed[0]!r} is packed already: unpack the tree first.")
    everything = _paths.named_leaves(params, holes=True)
    leaves = {path: leaf for path, leaf in everything.items() if not _paths.is_masked(leaf)}
    # Optax itself makes trees without leaves, and with holes where leaves are another transform's.
    is_whole = bool(leaves) and len(leaves) == len(everything)
    if isinstance(quantizer, Mapping):
        found = _by_patterns(where, quantizer, leaves, is_whole=is_whole)
    elif isinstance(quantizer, Quantizer):
        found = {path: default(path, leaf, quantizer) for path, leaf in leaves.items()}
    else:
        found = {path: _by_function(where, quantizer, path, leaf) for path, leaf in leaves.items()}
    if is_whole and all(a.quantizer is None for a in found.values()):
        raise ValueError(
            f"{where}: nothing is quantized. By default these are the leaves called kernel, weight or w of "
            f"rank 2 or more; name others by patterns, quantizer={{'*/name': Binary()}}. The leaves are "
            + listed(f"{path!r} ({a.rule})" for path, a in found.items())
        )
    return {path: a if a.quantizer is None else _fitted(where, path, a) for path, a in found.items()}


def chosen(where: str, quantizer: Quantizers, params: Any) -> dict[str, Quantizer]:
    """The quantizers of the leaves that are quantized, by path."""
    assigned = assign(where, quantizer, params)
    return {path: a.quantizer for path, a in assigned.items() if a.quantizer is not None}


def _fitted(where: str, path: str, assigned: Assigned) -> Assigned:
    """The quantizer with the axis that goes with the name of its leaf, once it is seen to suit the leaf."""
    leaf, quantizer, _ = assigned
    if getattr(quantizer, "axis", ...) is None:
        axis = 0 if path.rpartition("/")[2] == "weight" else -1
        quantizer = dataclasses.replace(quantizer, axis=axis)  # pyright: ignore[reportArgumentType]
    problem = None
    if not _is_float(leaf):
        problem = f"it is of dtype {leaf.dtype}, and must be of a floating-point type"
    elif isinstance(leaf, jax.Array) and _is_shard(leaf):
        problem = "its scales would be those of a shard inside jax.shard_map: put the optimizer outside of it"
    if problem:
        raise ValueError(f"{where}: the leaf {path!r} cannot be quantized: {problem}.")
    return assigned._replace(quantizer=quantizer)


def _is_shard(leaf: jax.Array) -> bool:
    """Whether an array differs between the devices of a `jax.shard_map` around it."""
    kind: Any = jax.typeof(leaf)
    # Newer versions of JAX have another name for it.
    return bool(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)


@contextlib.contextmanager
def naming(where: str, path: str) -> Iterator[None]:
    """A context in which errors about a leaf say which one it is."""
    try:
        yield
    except Exception as error:  # Whatever a quantizer says of a shape, or JAX of a mesh with explicit axes.
        raise ValueError(f"{where}: the leaf {path!r} cannot be quantized: {error}") from error


def check_fits(where: str, params: Any, quantizers: Mapping[str, Quantizer]) -> None:
    """Raise, with its path, for a leaf whose shape or sharding its quantizer cannot take."""
    leaves = _paths.named_leaves(params)
    for path, quantizer in quantizers.items():
        with naming(where, path):
            jax.eval_shape(lambda w, q=quantizer: nearest(w, levels_of(q, w)), leaves[path])


def listed(items: Iterable[str], most: int = 12) -> str:
    """Items for an error; the first ones where there are many."""
    items = list(items)
    return ", ".join(items[:most]) + f" and {len(items) - most} more" * (len(items) > most)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _unsuited(path: str, leaf: Any) -> str | None:
    """Why a leaf is not quantized unless a function says so."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return "not an array"
    if not _is_float(leaf):
        return f"dtype {leaf.dtype}"
    if len(leaf.shape) < 2:
        return f"rank {len(leaf.shape)}"
    # Of attention and of stacked layers these have two axes and more.
    name = _OFFSET.search(path.lower())
    return f"name {name[0]!r}" if name else None


def default(path: str, leaf: Any, quantizer: Quantizer | None, rule: str | None = None) -> Assigned:
    """What becomes of a leaf that no pattern names."""
    *modules, name = path.lower().split("/")
    why = _unsuited(path, leaf)
    if why is None and name not in _WEIGHTS:
        why = f"name {name!r}"
    # The layer itself: attention inside a module that normalizes first is no normalization.
    if why is None and any(map(_NORMALIZATION.search, modules[-1:])):
        why = "normalization"
    if why is None and any(map(_EMBEDDING.search, modules)):
        why = "embedding"
    return Assigned(leaf, None if why else quantizer, why or rule or "default")


def _by_function(where: str, rule: Any, path: str, leaf: Any) -> Assigned:
    if not hasattr(leaf, "dtype"):
        return Assigned(leaf, None, "not an array")
    quantizer = rule(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if quantizer is not None and not _is_quantizer(quantizer):
        raise TypeError(
            f"{where}: quantizer({path!r}, ...) must return a quantizer or None; got {quantizer!r}."
        )
    return Assigned(leaf, quantizer, "function")


def _by_patterns(
    where: str, patterns: Mapping[str, Quantizer | None], leaves: dict[str, Any], *, is_whole: bool
) -> dict[str, Assigned]:
    """The first pattern that covers a leaf decides; a leaf that none covers stays in full precision."""
    found: dict[str, Assigned] = {}
    for pattern, quantizer in patterns.items():
        if pattern == "*":
            named = [path for path, leaf in leaves.items() if default(path, leaf, Binary()).quantizer]
        else:
            named = [path for path in leaves if _covers(pattern, path)]
        suited = [path for path in named if _unsuited(path, leaves[path]) is None]
        covered = named if quantizer is None else suited
        free = [path for path in covered if path not in found]
        # A pattern that is to keep a layer whole comes too late where all but its bias is taken.
        if is_whole and found.keys() >= set(suited or covered):
            reason = "the patterns before it cover all that it matches; the first match wins"
            if not covered:
                reason = f"it matches no leaf to quantize; the leaves are {listed(leaves)}"
            raise ValueError(f"{where}: the pattern {pattern!r} of quantizer has no effect: {reason}.")
        found |= {path: Assigned(leaves[path], quantizer, f"pattern {pattern!r}") for path in free}
    rest = lambda path, leaf: Assigned(leaf, None, default(path, leaf, Binary(), "no pattern").rule)
    return {path: found[path] if path in found else rest(path, leaf) for path, leaf in leaves.items()}


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern matches a leaf's path, or that of a module around it."""
    keys = path.split("/")
    return any(fnmatch.fnmatchcase("/".join(keys[:n]), pattern) for n in range(1, len(keys) + 1))


# A program of its own, so that scales are rounded before they are put to use: `pack` stores them.
@functools.partial(jax.jit, static_argnames="quantizer")
def scales_of(quantizer: Quantizer, w: jax.Array) -> jax.Array:
    """The scales of one leaf."""
    return quantizer.scales(w)


@functools.partial(jax.jit, static_argnames="quantizer")
def _projected(quantizer: Quantizer, w: jax.Array, scales: jax.Array) -> jax.Array:
    levels = [spread(level, w.shape) for level in quantizer.levels(scales)]
    return nearest(w.astype(wide(w.dtype)), levels).astype(w.dtype)


def project(quantizer: Quantizer, w: jax.Array) -> jax.Array:
    """The nearest quantized weights of one leaf, in its dtype."""
    return _projected(quantizer, w, scales_of(quantizer, w))


def quantize(params: Any, quantizer: Quantizers = Binary()) -> Any:
    r"""The quantized network: each quantized leaf becomes the nearest point $P_Q(x)$ of its set.

    This is what to evaluate and ship. It needs the parameters alone, whatever has trained, averaged or frozen
    them, and works inside `jax.jit`; under `jax.vmap` each member of a stack has scales of its own. Networks
    with batch normalization want its statistics estimated anew at these weights.

    Args:
        params: the parameters, any pytree. Leaves that are not quantized are returned as they are; in an
            Equinox module these may be functions.
        quantizer: the one given in training; see `stam`.

    Returns:
        A tree like `params`, of the same dtypes.

    Raises:
        ValueError: if nothing is quantized, a pattern has no effect, or, with its path, for a leaf that its
            quantizer cannot take.
        TypeError: if `quantizer` is of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import Binary, quantize
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]]), "bias": jnp.array([0.3, 0.4])}
        >>> print(quantize(params)["kernel"])
        [[ 2. -1.]
         [-2.  1.]]
        >>> print(quantize(params, {"kernel": Binary(scale=1.0)})["kernel"])
        [[ 1. -1.]
         [-1.  1.]]
    """
    return _paths.replaced(params, quantized_leaves("quantize", quantizer, params))


def quantized_leaves(where: str, quantizer: Quantizers, params: Any) -> dict[str, jax.Array]:
    """The nearest quantized weights of each quantized leaf, by path."""
    check_quantizer(where, quantizer)
    leaves = _paths.named_leaves(params)
    quantized = {}
    for path, q in chosen(where, quantizer, params).items():
        with naming(where, path):
            quantized[path] = project(q, jnp.asarray(leaves[path]))
    return quantized
