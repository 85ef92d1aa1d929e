"""Paths as names for the leaves of a pytree, the same in every framework."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey


def is_masked(node: Any) -> bool:
    """Whether a node is the hole that `optax.masked` and `optax.partition` leave in a tree."""
    return isinstance(node, optax.MaskedNode)


def _names(paths: list[tuple[Any, ...]]) -> list[str]:
    """Readable paths of keys: their keys joined by slashes.

    Flax NNX variables are pytree nodes with one child called `value`; that last key is dropped, so a leaf has
    one name whether its tree holds variables or plain arrays. A `value` among siblings keeps its name.
    """
    children = Counter(path[:-1] for path in paths)
    names = []
    for path in paths:
        if len(path) > 1 and path[-1] == GetAttrKey("value") and children[path[:-1]] == 1:
            path = path[:-1]
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return names


def flatten_named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by name, in the tree's order, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    names = _names([path for path, _ in leaves])
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(
                f"Two leaves of the tree have the name {name!r}: rename a key that contains '/'."
            )
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), structure


def named_leaves(tree: Any, *, holes: bool = False) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's order; with its holes (`MaskedNode`) if asked."""
    leaves, _ = flatten_named(tree, is_masked)
    return {path: leaf for path, leaf in leaves.items() if holes or not is_masked(leaf)}


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` for a function of a leaf's path and the leaf; holes stay as they are."""
    leaves, structure = flatten_named(tree, is_masked)
    mapped = [leaf if is_masked(leaf) else function(path, leaf) for path, leaf in leaves.items()]
    return jax.tree.unflatten(structure, mapped)


def replaced(tree: Any, leaves: dict[str, Any]) -> Any:
    """The tree with other leaves at some paths."""
    return map_named(lambda path, leaf: leaves.get(path, leaf), tree)


def holding(tree: Any, leaves: dict[str, Any]) -> Any:
    """A tree of the same structure that holds these leaves, and holes in the place of all others."""
    return map_named(lambda path, _: leaves.get(path, optax.MaskedNode()), tree)


def check_alike(where: str, tree: Any, name: str, params: Any) -> None:
    """Raise unless a tree has the leaves of the parameters, in shape too."""
    if params is None:
        raise ValueError(f"{where}: the parameters are missing: call update(updates, state, params).")
    shapes, expected = ({path: jnp.shape(x) for path, x in named_leaves(t).items()} for t in (tree, params))
    if shapes == expected:
        return
    differing = [path for path in [*expected, *shapes] if shapes.get(path) != expected.get(path)]
    path = differing[0]
    has = lambda found: f"shape {found[path]}" if path in found else "no such leaf"
    raise ValueError(
        f"{where}: {name} and params differ at the leaf {path!r}: {name} have {has(shapes)}, "
        f"params {has(expected)}."
    )
