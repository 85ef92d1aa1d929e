"""Accuracy, of the relaxed network and of the quantized one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stam_jax
from experiments.data.devices import Layout
from experiments.data.records import Split
from experiments.networks import models

_BATCH = 500
# What the scales of a quantized leaf, fitted anew, may differ by.
_ROUNDING = 1e-5


@functools.partial(jax.jit, static_argnames=("graph", "sharding"))
def _correct(graph: Any, params: Any, stats: Any, split: Split, sharding: Any) -> jax.Array:
    images, labels = jax.lax.with_sharding_constraint(split, sharding)
    network = nnx.merge(graph, params, stats, copy=True)
    return jnp.sum(jnp.argmax(network(images), axis=-1) == labels)


@functools.partial(jax.jit, static_argnames=("graph", "share", "sharding"))
def _add_statistics(
    total: Any, graph: Any, params: Any, stats: Any, images: jax.Array, share: float, sharding: Any
) -> Any:
    """A running sum of statistics, and that share of those of a batch."""
    network = nnx.merge(graph, params, stats, copy=True)
    # Without memory, the running statistics are those of the batch.
    network.set_attributes(nnx.BatchNorm, momentum=0.0)
    network(jax.lax.with_sharding_constraint(images, sharding), train=True)
    new = models.split(network)[2]
    return jax.tree.map(lambda total, new: total + share * new, total, new)


def accuracy(graph: Any, params: Any, stats: Any, split: Split, layout: Layout) -> float:
    """The share of images whose label has the largest logit, with batch-norm statistics as given."""
    batch = -(-_BATCH // jax.device_count()) * jax.device_count()
    correct = []
    for start in range(0, split.size, batch):
        images, labels = split.at(np.arange(start, min(start + batch, split.size)))
        # Batches of one size, so that one program serves all: what is missing in the last one has no label.
        missing = batch - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        part = Split(images, np.pad(labels, (0, missing), constant_values=-1))
        correct.append(_correct(graph, params, stats, part, layout.split))
    return sum(map(int, jax.device_get(correct))) / split.size


def batch_statistics(
    graph: Any, params: Any, stats: Any, images: np.ndarray, *, batch_size: int, layout: Layout
) -> Any:
    """Batch-norm statistics estimated anew for these weights.

    The means and variances are averages over whole batches. The images should be augmented as in training: as
    they are, the features have another spread than the network has learned to read.

    Args:
        graph: the network's graph.
        params: its weights.
        stats: statistics of the right shapes; their values do not matter.
        images: training images, augmented, at least one batch of them.
        batch_size: of each batch.
        layout: of the arrays on the devices.

    Returns:
        Statistics like `stats`.
    """
    if not jax.tree.leaves(stats):  # A network without batch normalization.
        return stats
    count = len(images) // batch_size
    total = layout.everywhere(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stats))
    for batch in np.split(images[: count * batch_size], count):
        total = _add_statistics(total, graph, params, stats, batch, 1 / count, layout.split)
    return total


def projection(
    shapes: Any, quantizer: Mapping[str, stam_jax.Quantizer | None]
) -> Callable[[Any], tuple[Any, dict[str, jax.Array]]]:
    """A function that gives the quantized network, and its quantized leaves by path.

    It raises an AssertionError if one of these is not quantized: if it has more values per scale than its
    quantizer has levels.

    Args:
        shapes: the parameters, or their shapes.
        quantizer: what is quantized, and how, by patterns.
    """
    rows = stam_jax.tabulate(shapes, quantizer).rows

    @jax.jit
    def project(params: Any) -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
        network = stam_jax.quantize(params, quantizer)
        pairs = zip(rows, jax.tree.leaves(network), strict=True)
        leaves = {row.path: leaf for row, leaf in pairs if row.quantizer is not None}
        # Of the numbers that are put out: their scales, fitted anew, leave nothing to move.
        again = jax.tree.leaves(stam_jax.quantize(network, quantizer))
        fitted = {row.path: leaf for row, leaf in zip(rows, again, strict=True)}
        stays = lambda leaf, other: jnp.linalg.norm(leaf - other) <= _ROUNDING * jnp.linalg.norm(leaf)
        return network, leaves, {path: stays(leaf, fitted[path]) for path, leaf in leaves.items()}

    def checked(params: Any) -> tuple[Any, dict[str, jax.Array]]:
        network, leaves, stay = project(params)
        for path, stays in jax.device_get(stay).items():
            if not stays:
                raise AssertionError(f"{path} is not quantized: {np.unique(np.asarray(leaves[path]))[:5]}...")
        return network, leaves

    return checked
