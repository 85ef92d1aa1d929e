"""Scales of binary kernels and batch norm folded into one multiplication and one addition per channel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks.models import EPSILON
from stam_jax import Binary, Packed

_SIGNS = Binary(scale=1.0)


def fold(tree: dict[str, Any]) -> dict[str, Any]:
    r"""The same network, its binary convolutions with weights of +-1 and its batch norm without statistics.

    A convolution with the kernel $\alpha s$ is $\alpha$ times the one with the signs s, where a whole output
    channel has one $\alpha$; so with $f = \gamma / \sqrt{v + \epsilon}$,

    $$\gamma \frac{\alpha (s * x) - m}{\sqrt{v + \epsilon}} + \beta = f \alpha (s * x) + (\beta - f m).$$

    That holds exactly in real numbers, and to rounding here; and the signs are exact in any precision, as the
    products of scales and signs are not.

    Args:
        tree: weights and statistics of a network of `experiments.models`, its kernels packed; see
            `experiments.stored`. Kernels whose scales are those of parts of a channel stay as they are.

    Returns:
        A tree of the same structure for the same network.

    Raises:
        TypeError: for weights in anything but dictionaries.
    """
    if not isinstance(tree["params"], dict):
        raise TypeError(f"fold: params must be nested dictionaries; got {type(tree['params']).__name__}.")
    params, stats = _folded(tree["params"], tree["stats"])
    return {"params": params, "stats": stats}


def _folded(params: Any, stats: Any) -> tuple[Any, Any]:
    """A module's weights and statistics, and those of the modules in it."""
    if not isinstance(params, dict):
        return params, stats
    if params.keys() == {"conv", "norm"}:
        foldable = _has_channel_scales(params["conv"]["kernel"])
        return (
            _folded_pair(params["conv"]["kernel"], params["norm"], stats["norm"])
            if foldable
            else (params, stats)
        )
    pairs = {name: _folded(each, stats.get(name, {})) for name, each in params.items()}
    return {name: new for name, (new, _) in pairs.items()}, {name: pairs[name][1] for name in stats}


def _has_channel_scales(kernel: Any) -> bool:
    """Whether a kernel has at most one scale for each output channel, its last axis."""
    if not isinstance(kernel, Packed) or not isinstance(kernel.quantizer, Binary):
        return False
    *rest, channels = np.shape(kernel.scales)
    return set(rest) <= {1} and channels in (1, kernel.shape[-1])


def _folded_pair(kernel: Packed, norm: dict[str, Any], stats: dict[str, Any]) -> tuple[Any, Any]:
    """A convolution and the batch norm behind it."""
    ones = jnp.ones((1,) * len(kernel.shape), jnp.float32)
    signs = Packed(kernel.codes, ones, kernel.shape, kernel.dtype, _SIGNS)
    factor = norm["scale"] / jnp.sqrt(stats["var"] + EPSILON)
    folded = {
        "scale": factor * jnp.reshape(jnp.asarray(kernel.scales), -1),
        "bias": norm["bias"] - factor * stats["mean"],
    }
    # With these statistics batch norm does nothing but multiply by its scale and add its bias.
    rest = {"mean": jnp.zeros_like(stats["mean"]), "var": jnp.full_like(stats["var"], 1 - EPSILON)}
    as_arrays = lambda tree: jax.tree.map(np.asarray, tree)
    return {"conv": {"kernel": signs}, "norm": as_arrays(folded)}, {"norm": as_arrays(rest)}
