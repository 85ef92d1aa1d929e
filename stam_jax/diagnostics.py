"""Measures of how far a network is from its quantised one, and of how it gets there."""

from typing import Any

import jax
import jax.numpy as jnp

from stam_jax import _trees
from stam_jax.hard import quantized_leaves


@jax.jit
def _relative_distance(pairs: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """|x - y| / |y| over all pairs of x and y, in the dtype of the third of each."""
    distance = norm = jnp.zeros([], jnp.float32)
    for x, hard, latent in pairs:
        y = hard.astype(latent.dtype)
        distance += jnp.sum(jnp.square(x - y))
        norm += jnp.sum(jnp.square(y))
    return jnp.where(distance == 0, 0.0, jnp.sqrt(distance / norm))


@jax.jit
def _differing_signs(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """How many signs differ, over all arrays."""
    differ = lambda a, b: jnp.sum((jnp.asarray(a) >= 0) != (jnp.asarray(b) >= 0))
    return jnp.asarray(sum(map(differ, before, after)), jnp.float32)


def quantisation_gap(opt_state: Any, params: Any) -> jax.Array:
    r"""The relative distance of the relaxed weights from the hard ones, $|x - y| / |y|$.

    The norms run over all quantised leaves together, in float32 at least. 0 says that the network that is
    trained is the one that is shipped.

    Args:
        opt_state: an optimiser state that holds states of `stam`; see `quantized_leaves`.
        params: the parameters x it belongs to.

    Returns:
        A scalar of at least 0; 0 also where both norms are 0.

    Raises:
        ValueError: as `quantized_leaves`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import quantisation_gap, stam
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> print(quantisation_gap(stam(0.1).init(params), params))
        0.5
    """
    weights = _trees.named_leaves(params)
    leaves = quantized_leaves(opt_state, params)
    return _relative_distance([(weights[name], leaf.hard, leaf.latent) for name, leaf in leaves.items()])


def sign_flips(before: Any, after: Any) -> jax.Array:
    r"""The share of weights whose sign differs between two trees, with $\mathrm{sign}(0) = +1$.

    Args:
        before: a tree of arrays of real numbers, such as the hard leaves of `quantized_leaves` at one epoch.
        after: a tree of the same structure and shapes, at a later one.

    Returns:
        A scalar in [0, 1]; 0 for trees without weights.

    Raises:
        ValueError: if the structures or shapes differ.
        TypeError: for arrays that have no sign, such as booleans.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import sign_flips
        >>> print(sign_flips([jnp.array([1.0, -1.0])], [jnp.array([1.0, 1.0])]))
        0.5
    """

    def check(a: jax.Array, b: jax.Array) -> None:
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"sign_flips: the shapes {jnp.shape(a)} and {jnp.shape(b)} differ.")
        for dtype in (jnp.result_type(a), jnp.result_type(b)):
            if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.signedinteger):
                raise TypeError(f"sign_flips: arrays of dtype {dtype} have no sign.")

    structures = jax.tree.structure(before), jax.tree.structure(after)
    if structures[0] != structures[1]:
        raise ValueError(f"sign_flips: the structures {structures[0]} and {structures[1]} differ.")
    leaves = jax.tree.leaves(before), jax.tree.leaves(after)
    for a, b in zip(*leaves, strict=True):
        check(a, b)
    return _differing_signs(*leaves) / max(sum(map(jnp.size, leaves[1])), 1)
