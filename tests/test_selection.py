"""Which leaves are quantised: the default in every framework, the rules, and the printed report."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stam_jax import quantized_leaves, select, stam


def tree(**shapes):
    """A flat tree of zeros; `__` in a name stands for a slash."""
    return {name.replace("__", "/"): jnp.zeros(shape) for name, shape in shapes.items()}


def chosen(params, **rules):
    return [row.path for row in select(params, **rules).rows if row.quantized]


NETWORK = {
    "conv": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)},
    "middle": {"kernel": jnp.zeros((8, 16))},
    "head": {"kernel": jnp.zeros((16, 10)), "bias": jnp.zeros(10)},
    "steps": jnp.zeros((2, 2), jnp.int32),
}


# The default.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="tokens")(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(2, name="head")(nn.BatchNorm(use_running_average=True)(x))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(5, 4, rngs=rngs)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.head = nnx.Linear(4, 2, rngs=rngs)


class Equinox(eqx.Module):
    embedding: eqx.nn.Embedding
    conv: eqx.nn.Conv2d
    norms: list[eqx.Module]
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(5, 4, key=key)
        self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.norms = [eqx.nn.LayerNorm(4), eqx.nn.GroupNorm(2, 4)]
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=key)
        self.head = eqx.nn.Linear(4, 2, key=key)


def test_linen_networks_have_their_kernels_chosen():
    variables: Any = Linen().init(jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    params = variables["params"]
    # The biases of attention are matrices.
    assert params["attention"]["query"]["bias"].ndim == 2
    attention = [f"attention/{part}/kernel" for part in ("key", "out", "query", "value")]
    assert chosen(params) == [*attention, "head/kernel"]


@pytest.mark.parametrize("pure", [False, True], ids=["variables", "arrays"])
def test_nnx_networks_have_their_kernels_chosen(pure):
    params = nnx.state(NNX(nnx.Rngs(0)), nnx.Param)
    attention = [f"attention/{part}/kernel" for part in ("key", "out", "query", "value")]
    assert chosen(nnx.to_pure_dict(params) if pure else params) == [*attention, "conv/kernel", "head/kernel"]


def test_equinox_networks_have_their_weights_chosen():
    params = eqx.filter(Equinox(jax.random.key(0)), eqx.is_inexact_array)
    # The bias of a convolution has the rank of its kernel.
    assert params.conv.bias.ndim == 3
    attention = [f"attention/{part}_proj/weight" for part in ("query", "key", "value", "output")]
    assert chosen(params) == ["conv/weight", *attention, "head/weight"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("dense/kernel", "kernel of rank 2"),
        ("dense/w", "kernel of rank 2"),
        ("abnormal/kernel", "kernel of rank 2"),
        ("dense/bias", "bias"),
        ("attention/in_proj_bias", "bias"),
        ("LayerNorm_0/weight", "normalisation"),
        ("batch_norm/weight", "normalisation"),
        ("norm2/weight", "normalisation"),
        ("bn1/weight", "normalisation"),
        ("ln_2/weight", "normalisation"),
        ("rms/scale", "normalisation"),
        ("token_embedding/weight", "embedding"),
        ("Embed_0/embedding", "embedding"),
    ],
)
def test_stacked_leaves_are_told_by_their_names(path, why):
    # Layers stacked by vmap or scan raise the rank of all that they hold.
    (row,) = select({path: jnp.zeros((4, 8))}).rows
    assert (row.quantized, row.why) == (why.startswith("kernel"), why)


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (jnp.zeros(3), "rank 1"),
        (jnp.zeros(()), "rank 0"),
        (jnp.zeros((2, 2), jnp.int32), "dtype int32"),
        (jnp.zeros((2, 2), bool), "dtype bool"),
        (jnp.zeros((2, 2), jnp.complex64), "dtype complex64"),
    ],
)
def test_vectors_and_other_dtypes_stay_as_they_are(leaf, why):
    (row,) = select({"kernel": leaf}).rows
    assert (row.quantized, row.why) == (False, why)


def test_the_mask_has_the_structure_of_the_parameters():
    mask = select(NETWORK).mask
    assert jax.tree.structure(mask) == jax.tree.structure(NETWORK)
    assert mask["conv"] == {"kernel": True, "bias": False}


def test_shapes_do_for_parameters():
    shapes = jax.eval_shape(lambda: NETWORK)
    assert select(shapes).rows == select(NETWORK).rows


def test_a_tree_without_leaves_has_nothing_to_choose():
    assert select({}).rows == ()


# Rules.


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, ["conv/kernel", "head/kernel", "middle/kernel"]),
        ({"exclude": "head/*"}, ["conv/kernel", "middle/kernel"]),
        ({"exclude": ["head/*", "conv/kernel"]}, ["middle/kernel"]),
        ({"exclude": "*"}, []),
        ({"exclude": lambda path, leaf: leaf.shape[-1] == 10}, ["conv/kernel", "middle/kernel"]),
        ({"exclude": ("first", "last")}, ["middle/kernel"]),
        ({"include": "head/bias"}, ["conv/kernel", "head/bias", "head/kernel", "middle/kernel"]),
        (
            {"include": lambda path, leaf: path == "conv/bias", "exclude": "middle/*"},
            ["conv/bias", "conv/kernel", "head/kernel"],
        ),
    ],
)
def test_rules_change_the_default(rules, expected):
    assert chosen(NETWORK, **rules) == expected


def is_large(path, leaf):
    return leaf.size > 1000


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"exclude": "haed/*"}, ValueError, r"exclude 'haed/\*' matches no leaf; the leaves are conv/bias,"),
        ({"include": is_large}, ValueError, r"include is_large matches no leaf"),
        (
            {"include": "head/*", "exclude": "*/bias"},
            ValueError,
            r"two rules claim the leaf 'head/bias': include 'head/\*' and exclude '\*/bias'",
        ),
        ({"exclude": ["head/*", "last"]}, ValueError, r"'head/kernel': exclude 'head/\*' and exclude 'last'"),
        ({"include": "steps"}, ValueError, r"include 'steps' matches 'steps', of dtype int32"),
        ({"include": "first"}, ValueError, r"'first' works with exclude only"),
        ({"exclude": [3]}, TypeError, r"a rule is a path pattern or a predicate .*; got 3"),
    ],
)
def test_rules_that_cannot_be_meant_are_errors(rules, error, message):
    with pytest.raises(error, match=message):
        select(NETWORK, **rules)


@pytest.mark.parametrize("leaf", [1.0, "weights"])
def test_a_leaf_that_is_no_array_is_named(leaf):
    with pytest.raises(TypeError, match=r"the leaf 'gain' is .*; it must be an array"):
        select({"gain": leaf})


# The first and the last kernel.


@pytest.mark.parametrize(
    ("params", "first", "last"),
    [
        pytest.param(
            {f"layers/{n}/weight": jnp.zeros((4, 4)) for n in range(12)},
            "layers/0/weight",
            "layers/11/weight",
            id="ten-or-more-are-counted-not-spelled",
        ),
        pytest.param(
            {"layers": [{"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)} for _ in range(3)]},
            "layers/0/kernel",
            "layers/2/kernel",
            id="lists",
        ),
        pytest.param(
            tree(conv7__w=(4, 4), conv30__w=(4, 4), conv200__w=(4, 4)), "conv7/w", "conv200/w", id="gaps"
        ),
        pytest.param(
            tree(b__kernel=(3, 3, 1, 8), c__kernel=(8, 4), a__kernel=(4, 10)),
            "b/kernel",
            "a/kernel",
            id="shapes",
        ),
        pytest.param(
            tree(block1__conv1__kernel=(3, 8), block1__conv2__kernel=(8, 8), block2__conv1__kernel=(8, 5)),
            "block1/conv1/kernel",
            "block2/conv1/kernel",
            id="two-numbers-so-shapes",
        ),
        pytest.param(tree(kernel=(8, 8)), "kernel", "kernel", id="one-kernel-is-both"),
    ],
)
def test_the_first_and_the_last_kernel_are_found(params, first, last):
    (first_row,) = (row for row in select(params, exclude="first").rows if row.why == "exclude 'first'")
    (last_row,) = (row for row in select(params, exclude="last").rows if row.why == "exclude 'last'")
    assert (first_row.path, last_row.path) == (first, last)


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize(
    "params",
    [
        pytest.param(tree(a__kernel=(8, 8), b__kernel=(8, 8)), id="square-and-unnumbered"),
        pytest.param(
            tree(a__kernel=(3, 8), b__kernel=(4, 8), c__kernel=(8, 5), d__kernel=(8, 6)), id="two-ends"
        ),
        pytest.param(tree(a__weight=(8, 3), b__weight=(5, 8)), id="layout-unknown"),
        pytest.param(tree(b1__conv1__w=(8, 8), b1__conv2__w=(8, 8), b2__conv1__w=(8, 8)), id="two-numbers"),
    ],
)
def test_where_neither_names_nor_shapes_decide_that_is_an_error(params, end):
    with pytest.raises(
        ValueError, match=rf"which kernel is '{end}' does not follow .*The kernels are {next(iter(params))}"
    ):
        select(params, exclude=end)


@pytest.mark.parametrize("end", ["first", "last"])
def test_a_network_without_kernels_has_no_ends(end):
    with pytest.raises(ValueError, match=rf"which kernel is '{end}' .*The kernels are none"):
        select({"bias": jnp.zeros(3)}, exclude=end)


# The report.


def test_the_printed_table_says_it_all():
    params = NETWORK | {"temperature": np.zeros((), np.float16)}
    assert repr(select(params, include="head/bias", exclude="first", bits=2)) == (
        "path           shape    weights   bits  why\n"
        "-------------  -------  -------  -----  -------------------\n"
        "conv/bias      8        float      256  rank 1\n"
        "conv/kernel    3x3x1x8  float    2,304  exclude 'first'\n"
        "head/bias      10       2 bits      20  include 'head/bias'\n"
        "head/kernel    16x10    2 bits     320  kernel of rank 2\n"
        "middle/kernel  8x16     2 bits     256  kernel of rank 2\n"
        "steps          2x2      float      128  dtype int32\n"
        "temperature    scalar   float       16  rank 0\n"
        "298 of 383 weights in 3 of 7 leaves are quantised."
    )


def test_a_name_alone_does_not_make_a_bias_or_an_embedding_of_a_kernel():
    params = {
        "lora": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))},
        "patch_embed": {"kernel": jnp.ones((3, 3, 3, 8))},
    }
    assert all(row.quantized for row in select(params).rows)


@pytest.mark.parametrize(
    "path", ["prenorm/attention/kernel", "conv_norm/conv/kernel", "scale/kernel", "embedder/mlp/weight"]
)
def test_the_modules_around_a_layer_do_not_make_its_kernel_a_norm_or_an_embedding(path):
    assert select({path: jnp.ones((3, 3))}).rows[0].quantized


@pytest.mark.parametrize(
    "path", ["wte", "wpe", "pos_emb", "embedding", "embed/weight", "token_embedding/table"]
)
def test_tables_are_embeddings(path):
    assert select({path: jnp.ones((3, 3))}).rows[0].why == "embedding"


def test_a_leaf_called_value_among_others_keeps_its_name():
    class Attention(NamedTuple):
        query: Any
        key: Any
        value: Any

    params = {"attention": Attention(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2)))}
    selection = select(params, exclude="attention/value")
    assert [row.path for row in selection.rows] == ["attention/query", "attention/key", "attention/value"]
    assert list(quantized_leaves(stam(0.1, mask=selection).init(params), params)) == [
        "attention/query",
        "attention/key",
    ]


def test_one_bit_is_called_binary():
    printed = str(select({"kernel": jnp.ones((4, 8))}))
    assert " binary " in printed
    assert printed.endswith("32 of 32 weights in 1 of 1 leaves are binary.")
