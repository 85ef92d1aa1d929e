"""Names for the leaves of a pytree, the same in every framework."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey


def is_masked(node: Any) -> bool:
    """Whether a node is the hole that `optax.masked` and `optax.partition` leave in a tree."""
    return isinstance(node, optax.MaskedNode)


def _names(paths: list[tuple[Any, ...]]) -> list[str]:
    """Readable names of key paths: their keys joined by slashes.

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
    """The leaves of a tree by name, in the tree's order; with its holes (`MaskedNode`) if asked."""
    leaves, _ = flatten_named(tree, is_masked)
    return {name: leaf for name, leaf in leaves.items() if holes or not is_masked(leaf)}


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` for a function of a leaf's name and the leaf; holes stay as they are."""
    leaves, structure = flatten_named(tree, is_masked)
    mapped = [leaf if is_masked(leaf) else function(name, leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(structure, mapped)
