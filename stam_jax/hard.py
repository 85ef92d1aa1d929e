"""The deliverable: the quantised weights, read from the optimiser state of a training run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from stam_jax import _state, _trees
from stam_jax._state import StamState, assigned_quantizers
from stam_jax.quantizers import HasCodes, Quantizer

T = TypeVar("T")


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


class Point(NamedTuple):
    """One quantised leaf before it is made whole.

    Args:
        latent: the float block v.
        parts: the codes and scales of its projection, or the projection itself where its quantiser has none.
        quantizer: Q.
        dtype: of the parameter.
    """

    latent: jax.Array
    parts: tuple[jax.Array, ...]
    quantizer: Quantizer
    dtype: np.dtype


# One program for all leaves: a program for each would have to be compiled for each shape.
@functools.partial(jax.jit, static_argnames="quantizers")
def _said(
    weights: list[jax.Array], kept: list[jax.Array | None], quantizers: tuple[Quantizer, ...]
) -> list[tuple[jax.Array, tuple[jax.Array, ...]]]:
    """The float block of each leaf, and what says its projection."""
    latents = [_state.float_block(x, latent) for x, latent in zip(weights, kept, strict=True)]
    return [
        (v, (q.codes(v), q.scales(v)) if isinstance(q, HasCodes) else (q.project(v),))
        for v, q in zip(latents, quantizers, strict=True)
    ]


# Another program, so that scales are rounded before they are put to use: XLA would join the last step of
# working them out with the first of decoding, and round once for twice.
@functools.partial(jax.jit, static_argnames=("quantizers", "dtypes"))
def _made_whole(
    latents: list[jax.Array],
    parts: list[tuple[jax.Array, ...]],
    quantizers: tuple[Quantizer, ...],
    dtypes: tuple[np.dtype, ...],
) -> list[jax.Array]:
    """The projection of each leaf in the dtype of the parameter."""

    def whole(v: jax.Array, part: tuple[jax.Array, ...], quantizer: Quantizer) -> jax.Array:
        if not isinstance(quantizer, HasCodes):
            return part[0]
        # A code cannot say NaN, and scales of 1 do not show it.
        return jnp.where(jnp.isnan(v), v, quantizer.decode(*part))

    leaves = zip(latents, parts, quantizers, dtypes, strict=True)
    return [whole(v, part, quantizer).astype(dtype) for v, part, quantizer, dtype in leaves]


def points(opt_state: Any, params: Any) -> dict[str, Point]:
    """Every quantised leaf by name, not yet whole; for arguments and errors see `quantized_leaves`."""
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
    results: dict[str, Point] = {}
    for leaves in _by_devices(found, lambda leaf: leaf[0]):
        xs, kepts, quantizers = zip(*leaves.values(), strict=True)
        said = _said(list(xs), list(kepts), quantizers)
        for name, x, quantizer, (latent, parts) in zip(leaves, xs, quantizers, said, strict=True):
            results[name] = Point(latent, parts, quantizer, np.dtype(x.dtype))
    return {name: results[name] for name in weights if name in results}


def _by_devices(leaves: dict[str, T], array_of: Callable[[T], jax.Array]) -> list[dict[str, T]]:
    """Leaves apart by the devices that they lie on: a program takes only such as lie together."""
    groups: dict[Any, dict[str, T]] = {}
    for name, leaf in leaves.items():
        array = array_of(leaf)
        devices = None if isinstance(array, jax.core.Tracer) else frozenset(array.sharding.device_set)
        groups.setdefault(devices, {})[name] = leaf
    return list(groups.values())


def hard_of(leaves: dict[str, Point]) -> dict[str, jax.Array]:
    """The hard weights of each leaf."""
    hard: dict[str, jax.Array] = {}
    for group in _by_devices(leaves, lambda leaf: leaf.latent):
        latents, parts, quantizers, dtypes = zip(*group.values(), strict=True)
        hard |= zip(group, _made_whole(list(latents), list(parts), quantizers, dtypes), strict=True)
    return {name: hard[name] for name in leaves}


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
    leaves = points(opt_state, params)
    hard = hard_of(leaves)
    return {
        name: QuantizedLeaf(latent=leaf.latent, hard=hard[name], quantizer=leaf.quantizer)
        for name, leaf in leaves.items()
    }


def hard_params(opt_state: Any, params: Any) -> Any:
    r"""The quantised network: $P_Q(v)$ at every quantised leaf, the parameter itself elsewhere.

    This is what to evaluate, save and ship. Every quantised leaf is projected afresh and so lies in Q, as
    `quantizer.contains` confirms: with `Binary` it is exactly alpha times +1 or -1, with one alpha per
    group. (The parameters themselves approach Q but round, and with `project="first"` they are a step
    behind: never test or ship those as binary.) Networks with batch normalisation want its statistics
    estimated anew at these weights. Inside jit, XLA may round the sums of `LeastSquares` otherwise than here.

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
