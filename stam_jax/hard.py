"""The deliverable: the quantised weights, read from the optimiser state of a training run."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stam_jax import _state, _trees
from stam_jax._state import StamState, assigned_quantizers
from stam_jax.quantizers import Quantizer


class QuantizedLeaf(NamedTuple):
    """One quantised leaf.

    Args:
        latent: the float block v, in float32 at least; the parameters themselves without inertia.
        hard: its projection P_Q(v), in the dtype of the parameter.
        quantizer: Q.
    """

    latent: jax.Array
    hard: jax.Array
    quantizer: Quantizer


# One program for all leaves: a program for each would have to be compiled for each shape.
@functools.partial(jax.jit, static_argnames="quantizers")
def _blocks(
    weights: list[jax.Array], kept: list[jax.Array | None], quantizers: tuple[Quantizer, ...]
) -> list[tuple[jax.Array, jax.Array]]:
    """The float block of each leaf, and its projection in the dtype of the parameter."""
    latents = [_state.float_block(x, latent) for x, latent in zip(weights, kept, strict=True)]
    return [
        (latent, quantizer.project(latent).astype(x.dtype))
        for x, latent, quantizer in zip(weights, latents, quantizers, strict=True)
    ]


def quantized_leaves(opt_state: Any, params: Any) -> dict[str, QuantizedLeaf]:
    """Every quantised leaf with its hard weights, by the name of its path.

    Args:
        opt_state: an optimiser state that holds one or more states of `stam`, however deep: in a chain,
            a partition, `masked`, `MultiSteps`, `inject_hyperparams`, or a Flax NNX optimiser.
        params: the parameters it belongs to; a whole tree, of which the states may cover a part each.

    Returns:
        A dictionary from names such as `"head/kernel"` to `QuantizedLeaf`, in the order of the parameters.

    Raises:
        ValueError: if there is no `StamState` in `opt_state`, if two of them hold the same leaf, or if one
            holds a leaf that `params` lacks or has in another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import quantized_leaves, stam
        >>> params = {"kernel": jnp.array([[0.5, -2.0]]), "bias": jnp.zeros(2)}
        >>> leaves = quantized_leaves(stam(0.1).init(params), params)
        >>> for name, leaf in leaves.items():
        ...     print(name, leaf.hard, leaf.quantizer.bits)
        kernel [[ 0.5 -2. ]] 1
    """
    weights = _trees.named_leaves(params)
    is_state = lambda node: isinstance(node, StamState)
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not states:
        raise ValueError(
            "There is no StamState in opt_state. It must come from stam or one of its methods, and if it was "
            "saved and restored, restored into a state of the same structure."
        )
    found: dict[str, tuple[jax.Array, jax.Array | None, Quantizer]] = {}
    for state in states:
        latents = None if state.latent is None else _trees.named_leaves(state.latent)
        for name, quantizer in assigned_quantizers(state).items():
            if quantizer is None:
                continue
            if name in found:
                raise ValueError(f"Two states of stam hold the leaf {name!r}; one must leave it out.")
            if name not in weights:
                raise ValueError(
                    f"opt_state holds the leaf {name!r}, which params lack; they hold {', '.join(weights)}."
                )
            x = jnp.asarray(weights[name])
            kept = None if latents is None else latents[name]
            if kept is not None and kept.shape != x.shape:
                raise ValueError(
                    f"The leaf {name!r} has shape {kept.shape} in opt_state and {x.shape} in params."
                )
            found[name] = x, kept, quantizer
    names = [name for name in weights if name in found]
    xs, latents, quantizers = zip(*(found[name] for name in names), strict=True) if names else ((), (), ())
    blocks = _blocks(list(xs), list(latents), quantizers)
    return {
        name: QuantizedLeaf(latent=latent, hard=hard, quantizer=quantizer)
        for name, (latent, hard), quantizer in zip(names, blocks, quantizers, strict=True)
    }


def hard_params(opt_state: Any, params: Any) -> Any:
    r"""The quantised network: $P_Q(v)$ at every quantised leaf, the parameter itself elsewhere.

    This is what to evaluate, save and ship. Every quantised leaf is projected afresh and so lies in Q, as
    `quantizer.contains` confirms: with `Binary` it is exactly alpha times +1 or -1, with one alpha per
    group. (The parameters themselves approach Q but round, and with `project="first"` they are a step
    behind: never test or ship those as binary.) Networks with batch normalisation want its statistics
    estimated anew at these weights.

    Args:
        opt_state: an optimiser state that holds one or more states of `stam`, however deep; see
            `quantized_leaves`.
        params: the parameters it belongs to.

    Returns:
        A tree like `params`.

    Raises:
        ValueError: as `quantized_leaves`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import hard_params, stam
        >>> params = {"kernel": jnp.array([[1.0, -2.0], [-3.0, 0.0]]), "bias": jnp.array([0.3, 0.4])}
        >>> state = stam(0.1).init(params)
        >>> print(hard_params(state, params)["kernel"])
        [[ 2. -1.]
         [-2.  1.]]
    """
    leaves = quantized_leaves(opt_state, params)
    return _trees.map_named(lambda name, x: leaves[name].hard if name in leaves else x, params)
