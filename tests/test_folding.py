"""Scales and batch norm go into one multiplication and one addition, and nothing else changes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stam_jax
from experiments.config import ModelName
from experiments.data import image_sets
from experiments.deployment import packed_network
from experiments.deployment.folding import fold
from experiments.networks import models
from stam_jax import Binary, Packed, Ternary
from tests.helpers import slow


def network(name: ModelName, quantizer: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A graph, and packed weights and statistics of all kinds of sizes."""
    digits = image_sets.load("digits")
    build = lambda: models.build(name, digits, width=0.125, key=jax.random.key(0), **options)
    graph = models.split(nnx.eval_shape(build))[0]
    params, stats = jax.device_get(jax.jit(lambda: models.split(build())[1:])())
    draws = np.random.default_rng(0)
    noisy = lambda leaf: leaf if leaf.ndim > 1 else leaf + np.float32(draws.uniform(0.1, 1, leaf.shape))
    params, stats = jax.tree.map(noisy, params), jax.tree.map(noisy, stats)
    quantized = jax.jit(lambda params: stam_jax.quantize(params, quantizer))(params)
    return graph, {"params": stam_jax.pack(quantized, quantizer), "stats": stats}


def packed_leaves(tree: Any) -> list[Packed]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Packed))
    return [leaf for leaf in leaves if isinstance(leaf, Packed)]


@pytest.mark.parametrize("name", ["resnet8", *slow(["resnet20", "vgg11"])])
def test_the_folded_network_says_the_same(name):
    graph, tree = network(name, Binary())
    images = image_sets.load("digits").test.images[:64]
    before, after = (
        np.asarray(jax.jit(packed_network.apply, static_argnums=0)(graph, each, images))
        for each in (tree, fold(tree))
    )
    assert np.std(before) > 0.01
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.max(np.abs(before)))


def test_signs_take_the_place_of_scaled_weights_and_statistics_go():
    _, tree = network("resnet8", Binary())
    folded = fold(tree)
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(stam_jax.unpack, each)) for each in (tree, folded)]
    assert shapes[0] == shapes[1]
    kernel = folded["params"]["blocks"][0]["first"]["conv"]["kernel"]
    np.testing.assert_array_equal(np.unique(kernel.unpack()), [-1, 1])
    np.testing.assert_array_equal(kernel.codes, tree["params"]["blocks"][0]["first"]["conv"]["kernel"].codes)
    assert not np.any(folded["stats"]["stem"]["norm"]["mean"])
    # The head has no batch norm: its scales stay.
    assert folded["params"]["head"]["kernel"].quantizer == Binary(axis=-1)


@pytest.mark.parametrize(
    "quantizer", slow([Ternary(), Binary(group=1, group_axis=-2), Binary(axis=0)]), ids=repr
)
def test_kernels_with_other_scales_stay_as_they_are(quantizer):
    _, tree = network("resnet8", quantizer)
    pairs = zip(packed_leaves(tree), packed_leaves(fold(tree)), strict=True)
    # But those of one pixel, or of one input, for which that is a scale per channel.
    pairs = [(before, after) for before, after in pairs if min(before.shape[:-1]) > 1]
    assert len(pairs) == 7
    for before, after in pairs:
        assert after.quantizer == before.quantizer
        np.testing.assert_array_equal(after.scales, before.scales)


@pytest.mark.parametrize("quantizer", slow([Binary(axis=()), Binary(scale=1.0)]), ids=repr)
def test_scales_of_whole_kernels_are_folded_too(quantizer):
    graph, tree = network("resnet8", quantizer)
    images = image_sets.load("digits").test.images[:8]
    before, after = (
        np.asarray(jax.jit(packed_network.apply, static_argnums=0)(graph, each, images))
        for each in (tree, fold(tree))
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.max(np.abs(before)))
    assert {leaf.quantizer for leaf in packed_leaves(fold(tree)["params"]["blocks"])} == {Binary(scale=1.0)}
