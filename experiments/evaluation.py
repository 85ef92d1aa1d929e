"""Accuracy, of the relaxed network and of the binary one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stam_jax
from experiments.data import Split

_BATCH = 500


@functools.partial(jax.jit, static_argnames="graph")
def _correct(graph: Any, params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    network = nnx.merge(graph, params, stats, copy=True)
    return jnp.sum(jnp.argmax(network(images), axis=-1) == labels)


@functools.partial(jax.jit, static_argnames="graph")
def _batch_statistics(graph: Any, params: Any, stats: Any, images: jax.Array) -> Any:
    network = nnx.merge(graph, params, stats, copy=True)
    # Without memory, the running statistics are those of the batch.
    network.set_attributes(nnx.BatchNorm, momentum=0.0)
    network(images, train=True)
    return nnx.state(network, nnx.BatchStat)


def accuracy(graph: Any, params: Any, stats: Any, split: Split) -> float:
    """The share of images whose label has the largest logit, with batch-norm statistics as given."""
    correct = 0
    for start in range(0, len(split.labels), _BATCH):
        part = slice(start, start + _BATCH)
        correct += int(_correct(graph, params, stats, split.images[part], split.labels[part]))
    return correct / len(split.labels)


def batch_statistics(
    graph: Any, params: Any, stats: Any, train: Split, *, images: int, batch_size: int
) -> Any:
    """Batch-norm statistics estimated anew for these weights.

    The means and variances are averages over whole batches of training images, as they are: neither
    augmented nor labelled.

    Args:
        graph: the network's graph.
        params: its weights.
        stats: statistics of the right shapes; their values do not matter.
        train: the training images.
        images: how many of them to look at, at most; no fewer than one batch.
        batch_size: of each batch.

    Returns:
        Statistics like `stats`.
    """
    count = max(min(images, len(train.labels)) // batch_size, 1)
    batches = [
        _batch_statistics(graph, params, stats, train.images[i * batch_size : (i + 1) * batch_size])
        for i in range(count)
    ]
    return jax.tree.map(lambda *values: sum(values) / count, *batches)


def checked_leaves(opt_state: Any, params: Any) -> dict[str, stam_jax.QuantizedLeaf]:
    """`stam_jax.quantized_leaves`, once every one is seen to hold two values per scale group.

    Raises:
        AssertionError: if one does not.
    """
    leaves = stam_jax.quantized_leaves(opt_state, params)
    for name, leaf in leaves.items():
        if not leaf.quantizer.contains(leaf.hard):
            raise AssertionError(f"{name} is not binary: {np.unique(np.asarray(leaf.hard))[:5]}...")
    return leaves
