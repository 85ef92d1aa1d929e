"""Names for the leaves of a pytree, the same in every framework."""

from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey


def path_name(path: tuple[Any, ...]) -> str:
    """The readable name of a key path: its keys joined by slashes.

    Flax NNX variables are pytree nodes with one child called `value`; that last key is dropped, so a
    leaf has one name whether its tree holds variables or plain arrays.
    """
    if len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_masked(node: Any) -> bool:
    """Whether a node is the hole that `optax.masked` and `optax.partition` leave in a tree."""
    return isinstance(node, optax.MaskedNode)


def named_leaves(tree: Any, *, holes: bool = False) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order; with its holes (`MaskedNode`) if asked."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked if holes else None)
    names: dict[str, Any] = {}
    for path, leaf in leaves:
        name = path_name(path)
        if name in names:
            raise ValueError(
                f"Two leaves of the tree have the name {name!r}: rename a key that contains '/'."
            )
        names[name] = leaf
    return names


def map_named(function: Any, tree: Any) -> Any:
    """`jax.tree.map` for a function of a leaf's name and the leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), tree)
