"""What is quantized: the default in every framework, patterns, functions, their errors, and the table."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from stam_jax import (
    Binary,
    LeastSquares,
    Quantizer,
    Ternary,
    Uniform,
    pack,
    quantize,
    stam,
    tabulate,
)
from tests import helpers
from tests.methods import METHODS

rng = np.random.default_rng(0)
WHOLE, TENSOR, FOUR_BITS = Binary(scale=1.0), Binary(axis=()), Uniform(bits=4)

NETWORK = {
    "conv": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.ones(8)},
    "middle": {"kernel": jnp.ones((8, 16)), "table": jnp.ones((4, 4))},
    "head": {"kernel": jnp.ones((16, 10)), "bias": jnp.ones(10)},
    "steps": jnp.ones((2, 2), jnp.int32),
}

# Whatever takes `quantizer=` and meets parameters.
USES: dict[str, Callable[[Any, Any], Any]] = {
    "stam": lambda params, quantizer: stam(hard_from=1, quantizer=quantizer).init(params),
    "quantize": quantize,
    "pack": pack,
    "tabulate": tabulate,
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


def rows(params: Any, quantizer: Any = Binary()) -> dict[str, Any]:
    """The table, for which shapes do: values would be quantized to tell their gap."""
    is_weight = lambda leaf: isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
    shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_weight(leaf) else leaf
    return {row.path: row for row in tabulate(jax.tree.map(shape, params), quantizer).rows}


def gaps(params: Any, quantizer: Any = Binary()) -> list[float]:
    return [row.gap for row in tabulate(params, quantizer).rows if row.gap is not None]


def quantizers(params: Any, quantizer: Any = Binary()) -> dict[str, Quantizer]:
    """The quantized leaves, in the order of the tree."""
    return {path: row.quantizer for path, row in rows(params, quantizer).items() if row.quantizer}


def has_latent(params: Any, **settings: Any) -> list[str]:
    """The same, as the optimizer has it: the leaves of which it keeps latent weights."""
    latent: Any = jax.eval_shape(partial(helpers.begin, stam(hard_from=1, **settings)), params).latent
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(latent)
    ]


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


def test_linen_networks_have_their_kernels_quantized():
    variables: Any = jax.eval_shape(Linen().init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    params = variables["params"]
    # The biases of attention are matrices.
    assert params["attention"]["query"]["bias"].ndim == 2
    attention = [f"attention/{part}/kernel" for part in ("key", "out", "query", "value")]
    assert list(quantizers(params)) == [*attention, "head/kernel"]


@pytest.mark.parametrize("pure", [False, True], ids=["variables", "arrays"])
def test_nnx_networks_have_their_kernels_quantized(pure):
    params = nnx.state(nnx.eval_shape(lambda: NNX(nnx.Rngs(0))), nnx.Param)
    attention = [f"attention/{part}/kernel" for part in ("key", "out", "query", "value")]
    expected = [*attention, "conv/kernel", "head/kernel"]
    assert list(quantizers(nnx.to_pure_dict(params) if pure else params)) == expected


def test_equinox_networks_have_their_weights_quantized_a_scale_per_output():
    params: Any = eqx.filter_eval_shape(Equinox, jax.random.key(0))
    # The bias of a convolution has the rank of its kernel.
    assert params.conv.bias.ndim == 3
    attention = [f"attention/{part}_proj/weight" for part in ("query", "key", "value", "output")]
    assert quantizers(params) == dict.fromkeys(["conv/weight", *attention, "head/weight"], Binary(axis=0))
    assert (rows(params)["conv/weight"].scales, rows(params)["head/weight"].scales) == (4, 2)


@pytest.mark.parametrize("name", ["kernel", "w", "weight", "Kernel", "W"])
def test_the_weights_of_every_framework_go_by_their_names(name):
    assert list(quantizers({"dense": {name: jnp.ones((4, 8))}})) == [f"dense/{name}"]


def test_a_scale_belongs_to_an_output_whichever_axis_the_framework_keeps_outputs_on():
    """PyTorch and Equinox keep outputs first, Flax and Haiku last: (5 outputs, 3 inputs, 2 x 2) and so on."""
    shapes = {
        "torch": {"weight": (5, 3, 2, 2)},
        "flax": {"kernel": (2, 2, 3, 5)},
        "haiku": {"w": (2, 2, 3, 5)},
    }
    params = {
        module: {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in leaf.items()}
        for module, leaf in shapes.items()
    }
    assert {path: row.scales for path, row in rows(params).items()} == {
        "flax/kernel": 5,
        "haiku/w": 5,
        "torch/weight": 5,
    }
    y = quantize(params)
    for module, name, others in (
        ("torch", "weight", (1, 2, 3)),
        ("flax", "kernel", (0, 1, 2)),
        ("haiku", "w", (0, 1, 2)),
    ):
        x = np.float64(params[module][name])
        expected = np.where(x >= 0, 1, -1) * np.mean(np.abs(x), axis=others, keepdims=True)
        np.testing.assert_allclose(y[module][name], expected, rtol=1e-6)
    # An axis that is named is the same for all.
    assert {row.scales for row in rows(params, Binary(axis=1)).values()} == {2, 3}


@pytest.mark.parametrize(
    ("path", "keyword"),
    [
        ("dense/bias", "name"),
        ("attention/in_proj_bias", "name"),
        ("cls_token", "name"),
        ("vit/pos", "name"),
        ("block/layerscale", "name"),
        ("dense/lora_A", "name"),
        ("mamba/A_log", "name"),
        ("rms/scale", "name"),
        ("Embed_0/embedding", "name"),
        ("token_embedding/table", "name"),
        ("wte", "name"),
        ("LayerNorm_0/weight", "normalization"),
        ("batch_norm/weight", "normalization"),
        ("norm2/weight", "normalization"),
        ("bn1/weight", "normalization"),
        ("ln_2/weight", "normalization"),
        ("layer_normalization/kernel", "normalization"),
        ("token_embedding/weight", "embedding"),
        ("embed/weight", "embedding"),
        ("wte/weight", "embedding"),
        ("wpe/weight", "embedding"),
        ("pos_emb/weight", "embedding"),
        ("patch_embed/proj/kernel", "embedding"),
    ],
)
def test_all_else_stays_in_full_precision_by_its_name_or_that_of_its_module(path, keyword):
    # Matrices all: layers stacked by vmap or scan raise the rank of whatever they hold.
    params = {path: jnp.ones((4, 8)), "dense/kernel": jnp.ones((4, 8))}
    assert list(quantizers(params)) == ["dense/kernel"]
    assert keyword in rows(params)[path].rule
    assert quantize(params)[path] is params[path]
    assert has_latent(params) == ["dense/kernel"]


@pytest.mark.parametrize(
    "path",
    ["abnormal/kernel", "scale/kernel", "bias/w", "album/kernel", "kln/kernel", "gemberg/w", "bnorms/w"],
)
def test_a_part_of_a_word_does_not_make_a_norm_or_an_embedding(path):
    assert list(quantizers({path: jnp.ones((3, 3))})) == [path]


@pytest.mark.parametrize(
    ("leaf", "keyword"),
    [
        (jnp.ones(3), "rank"),
        (jnp.ones(()), "rank"),
        (jnp.ones((2, 2), jnp.int32), "int32"),
        (jnp.ones((2, 2), bool), "bool"),
        (jnp.ones((2, 2), jnp.complex64), "complex64"),
        (jax.random.split(jax.random.key(0), (2, 2)), "key"),
        (1.0, "array"),
        (jnp.tanh, "array"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(getattr(value, "dtype", value)),
)
def test_vectors_other_dtypes_and_what_is_no_array_stay_as_they_are(leaf, keyword):
    params = {"kernel": leaf, "dense": {"kernel": jnp.ones((2, 2))}}
    assert list(quantizers(params)) == ["dense/kernel"]
    assert keyword in rows(params)["kernel"].rule
    assert quantize(params)["kernel"] is leaf


def test_a_leaf_called_value_among_others_keeps_its_name():
    class Attention(NamedTuple):
        query: Any
        key: Any
        value: Any

    params = {"attention": Attention(*jnp.ones((3, 2, 2)))}
    assert list(rows(params, {"attention": TENSOR})) == [f"attention/{name}" for name in Attention._fields]
    patterns = {"attention/value": None, "attention": TENSOR}
    assert list(quantizers(params, patterns)) == ["attention/query", "attention/key"]


# Nothing quantized.


@every_use
@pytest.mark.parametrize(
    ("params", "quantizer"),
    [
        (jnp.ones((2, 2)), Binary()),
        ({"bias": jnp.ones(3), "table": jnp.ones((3, 3))}, Binary()),
        (NETWORK, {"head": None}),
        (NETWORK, {"*": None}),
        (NETWORK, lambda path, leaf: None),
    ],
    ids=["bare-array", "no-weights", "head-in-full", "all-in-full", "function"],
)
def test_nothing_quantized_is_an_error(use, params, quantizer):
    with pytest.raises(ValueError, match="nothing is quantized"):
        use(params, quantizer)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_quantized_is_an_error_of_every_method(method):
    optimizer = method(optax.sgd(0.1), quantizer=Binary())
    with pytest.raises(ValueError, match="nothing is quantized"):
        optimizer.init({"bias": jnp.ones(3)})


def test_a_flattened_tree_has_no_names_and_so_nothing_quantized():
    with pytest.raises(ValueError, match="nothing is quantized"):
        optax.flatten(stam(optax.sgd(0.1), hard_from=1)).init(NETWORK)


@pytest.mark.parametrize("nothing", [{}, (), {"none": None}, {"hole": optax.MaskedNode()}])
@pytest.mark.parametrize("quantizer", [Binary(), {"head": None, "*": Binary()}, lambda path, leaf: None])
def test_a_tree_without_leaves_has_nothing_to_quantize_and_is_no_error(nothing, quantizer):
    optimizer = stam(optax.sgd(0.1), hard_from=1, quantizer=quantizer)
    assert helpers.take_step(optimizer, nothing, optimizer.init(nothing), nothing)[0] == nothing
    assert quantize(nothing, quantizer) == pack(nothing, quantizer) == nothing
    assert tabulate(nothing, quantizer).rows == ()


# Patterns.

ALL = ["conv/kernel", "head/kernel", "middle/kernel"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"*": Binary()}, dict.fromkeys(ALL, Binary(axis=-1))),
        ({"head": None, "*": TENSOR}, dict.fromkeys(["conv/kernel", "middle/kernel"], TENSOR)),
        ({"head": TENSOR}, {"head/kernel": TENSOR}),
        ({"head/kernel": TENSOR}, {"head/kernel": TENSOR}),
        ({"*/kernel": TENSOR}, dict.fromkeys(ALL, TENSOR)),
        (
            {"h*": TENSOR, "[cm]*/kernel": WHOLE},
            {"conv/kernel": Binary(scale=1.0, axis=-1)}
            | {"head/kernel": TENSOR}
            | {"middle/kernel": Binary(scale=1.0, axis=-1)},
        ),
        (
            {"middle/kernel": None, "middle": FOUR_BITS, "*": TENSOR},
            {"conv/kernel": TENSOR, "head/kernel": TENSOR, "middle/table": Uniform(bits=4, axis=-1)},
        ),
        (
            {"middle/table": Ternary(), "*/kernel": TENSOR},
            dict.fromkeys(ALL, TENSOR) | {"middle/table": Ternary(axis=-1)},
        ),
        ({"steps": None, "conv": None, "*/bias": None, "*": TENSOR}, dict.fromkeys(ALL[1:], TENSOR)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_first_pattern_that_covers_a_leaf_decides(patterns, expected):
    assert quantizers(NETWORK, patterns) == expected
    assert sorted(has_latent(NETWORK, quantizer=patterns)) == sorted(expected)


def test_the_first_match_wins_in_either_order():
    head, kernels = {"head": TENSOR}, {"*/kernel": WHOLE}
    assert quantizers(NETWORK, head | kernels)["head/kernel"] == TENSOR
    # The other way round nothing is left for the second.
    with pytest.raises(ValueError, match="first match"):
        quantizers(NETWORK, kernels | head)


def test_a_pattern_covers_all_weights_below_a_module_whatever_they_are_called():
    weights = {"gate": jnp.ones((3, 3)), "norm": {"kernel": jnp.ones((2, 3, 3))}, "bias": jnp.ones(3)}
    params = {"block": [weights, weights], "dense": {"kernel": jnp.ones((3, 3))}}
    covered = quantizers(params, {"block/1": TENSOR})
    assert covered == {"block/1/gate": TENSOR, "block/1/norm/kernel": TENSOR}
    # Not a module whose name merely begins so.
    assert list(quantizers(params | {"block/10": jnp.ones((3, 3))}, {"block/1": TENSOR})) == list(covered)


def test_different_quantizers_in_different_layers_give_each_its_own_levels():
    params = {name: {"kernel": np.float32(rng.normal(size=(8, 6)))} for name in "abcd"}
    patterns = {"a": None, "b": TENSOR, "c": LeastSquares(axis=()), "*": WHOLE}
    y = quantize(params, patterns)
    assert y["a"]["kernel"] is params["a"]["kernel"]
    values = {name: np.unique(np.abs(np.asarray(layer["kernel"]))) for name, layer in y.items()}
    assert [values[name].size for name in "bcd"] == [1, 2, 1]
    np.testing.assert_allclose(values["b"], np.mean(np.abs(np.float64(params["b"]["kernel"]))), rtol=1e-6)
    assert values["d"] == 1
    # Trained so, each ends at its own levels, and packs by them alone.
    optimizer = stam(optax.sgd(0.1), hard_from=1, quantizer=patterns)
    state = jax.jit(optimizer.init)(params)
    step = helpers.quick_jit(partial(helpers.take_step, optimizer))
    for _ in range(3):
        params, state = step(params, state, params)
    assert max(gaps(params, patterns)) <= 2e-6
    pack(params, patterns)
    with pytest.raises(ValueError, match="'a/kernel'"):
        pack(params)


@every_use
@pytest.mark.parametrize(
    ("patterns", "keyword"),
    [
        ({"haed": None, "*": Binary()}, "'haed'"),
        ({"*/kernel": Binary(), "*": Binary()}, r"'\*'"),
        ({"mid": Binary()}, "'mid'"),
        ({"HEAD": None, "*": Binary()}, "'HEAD'"),
        ({"steps": Binary(), "*": Binary()}, "'steps'"),
        ({"*/bias": Binary(), "*": Binary()}, r"'\*/bias'"),
        (dict(sorted({"head": None, "*": Binary()}.items())), "'head'"),
    ],
    ids=str,
)
def test_a_pattern_without_effect_is_an_error(use, patterns, keyword):
    with pytest.raises(ValueError, match=f"{keyword}.*no effect"):
        use(NETWORK, patterns)


SPLIT = {"head": None, "*/kernel": TENSOR}


@pytest.mark.parametrize(
    "quantizer", [Binary(), SPLIT, lambda path, leaf: None if path[0] == "h" else TENSOR]
)
def test_a_tree_with_holes_may_leave_patterns_without_effect_or_nothing_to_quantize(quantizer):
    """Each transform of a partition sees holes in the place of the leaves of the others."""
    make = lambda: stam(optax.sgd(0.1), hard_from=1, quantizer=quantizer)
    params = {"head": NETWORK["head"], "middle": {"kernel": jnp.ones((8, 16))}}
    in_head = {"head": True, "middle": False}
    labels = {"head": "head", "middle": "rest"}
    deep = {"head": {"kernel": True, "bias": False}, "middle": {"kernel": False}}
    everything = jax.tree.map(lambda _: True, params)
    bias_alone = {"head": {"kernel": False, "bias": True}, "middle": False}
    for optimizer in (
        optax.chain(optax.masked(make(), in_head), optax.masked(make(), {"head": False, "middle": True})),
        optax.partition({"head": make(), "rest": make()}, labels),
        optax.partition({"head": make(), "rest": optax.sgd(0.1)}, labels),
        optax.masked(make(), deep),
        optax.masked(make(), everything),
        optax.masked(make(), bias_alone),
        optax.masked(make(), False),
    ):
        step = lambda optimizer=optimizer: helpers.take_step(
            optimizer, params, optimizer.init(params), params
        )
        after, _ = jax.eval_shape(step)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, params)


def test_a_prefix_mask_leaves_one_hole_for_a_whole_module_and_the_rest_is_quantized():
    optimizer = optax.masked(
        stam(optax.sgd(0.1), hard_from=1, quantizer=SPLIT), {"head": False, "body": True}
    )
    params = {"head": {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}, "body": {"kernel": jnp.ones((2, 2))}}
    state: Any = optimizer.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(state.inner_state.latent)] == [(2, 2)]
    assert isinstance(state.inner_state.latent["head"], optax.MaskedNode)


# Functions of path and shape.


def test_a_function_decides_by_path_and_shape_and_is_given_no_values():
    seen: dict[str, Any] = {}

    def rule(path, leaf):
        seen[path] = leaf
        if path == "conv/bias":
            return TENSOR
        return FOUR_BITS if len(leaf.shape) == 2 and leaf.shape[-1] >= 10 else None

    expected = {"conv/bias": TENSOR} | dict.fromkeys(
        ["head/kernel", "middle/kernel"], Uniform(bits=4, axis=-1)
    )
    assert quantizers(NETWORK, rule) == expected
    optimizer = stam(optax.sgd(0.1), hard_from=1, quantizer=rule)
    jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params), NETWORK)
    assert sorted(has_latent(NETWORK, quantizer=rule)) == sorted(expected)
    assert list(seen) == list(rows(NETWORK, rule))
    for path, leaf in seen.items():
        assert type(leaf) is jax.ShapeDtypeStruct
        assert leaf.shape == rows(NETWORK)[path].shape


@every_use
def test_a_function_that_reads_values_fails_outright(use):
    # It would decide one way at the start and another as training goes on.
    with pytest.raises((TypeError, AttributeError)):
        use(NETWORK, lambda path, leaf: TENSOR if jnp.max(leaf) > 0.5 else None)


@every_use
@pytest.mark.parametrize("answer", [True, Binary, "binary", 2, Binary().scales], ids=str)
def test_a_function_must_answer_with_a_quantizer_or_none(use, answer):
    with pytest.raises(TypeError, match="conv/bias"):
        use(NETWORK, lambda path, leaf: answer)


@every_use
def test_a_leaf_of_integers_that_a_function_names_is_an_error(use):
    with pytest.raises(ValueError, match=r"'steps'.*int32"):
        use(NETWORK, lambda path, leaf: TENSOR if path == "steps" else None)


def test_a_function_and_a_dictionary_can_say_the_same_as_the_default():
    default = quantizers(NETWORK)
    assert quantizers(NETWORK, {"*": Binary()}) == default
    assert quantizers(NETWORK, lambda path, leaf: Binary() if path in default else None) == default


def test_what_is_no_array_is_not_the_business_of_a_function():
    model = {"activation": jnp.tanh, "w": jnp.ones((2, 2))}
    assert list(quantizers(model, lambda path, leaf: TENSOR)) == ["w"]


# What cannot be meant.


@every_use
@pytest.mark.parametrize(
    "quantizer",
    [
        Binary,
        None,
        True,
        3,
        "*",
        "Binary",
        [Binary()],
        {"conv": {"kernel": Binary(), "bias": None}},
        jax.tree.map(lambda leaf: leaf.ndim > 1, NETWORK),
        {"*": Binary},
        {"*": True},
        {"*": "Binary"},
        {0: Binary()},
        {("head", "kernel"): Binary()},
    ],
    ids=str,
)
def test_what_says_nothing_of_what_is_quantized_is_a_type_error(use, quantizer):
    with pytest.raises(TypeError, match="quantizer"):
        use(NETWORK, quantizer)


@every_use
def test_a_dictionary_without_patterns_is_an_error(use):
    with pytest.raises(ValueError, match="quantizer"):
        use(NETWORK, {})


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_refuses_a_class_before_it_sees_parameters(method):
    with pytest.raises(TypeError, match="quantizer"):
        method(optax.sgd(0.1), quantizer=Binary)


@every_use
@pytest.mark.parametrize(
    "params",
    [
        {"a": {"kernel": jnp.ones((2, 2))}, "a/kernel": jnp.ones((2, 2))},
        {"a/b": {"kernel": jnp.ones((2, 2))}, "a": {"b/kernel": jnp.ones((2, 2))}},
    ],
)
def test_two_leaves_of_one_name_are_an_error(use, params):
    with pytest.raises(ValueError, match="kernel'"):
        use(params, Binary())


class Signs(NamedTuple):
    """A quantizer that Python takes for false, as it does any tuple without elements."""

    def scales(self, w):
        return jnp.ones((1,) * w.ndim)

    def levels(self, scales):
        return -scales, scales


@pytest.mark.parametrize("quantizer", [Signs(), {"*": Signs()}, lambda path, leaf: Signs()])
def test_whatever_has_scales_and_levels_is_a_quantizer(quantizer):
    y = quantize({"kernel": jnp.array([[0.5, -3.0]])}, quantizer)["kernel"]
    np.testing.assert_array_equal(y, [[1.0, -1.0]])


# The table.


GROUPS = Binary(group=2, group_axis=-2)
# Of the training, and of a call that gives another one.
PAIRS = {
    "channels": (Binary(), TENSOR),
    "no-scale": (Binary(), WHOLE),
    "groups": (GROUPS, Binary()),
    "three-levels": (Ternary(), Binary()),
    "fifteen-levels": (FOUR_BITS, Binary()),
    "four-levels": (LeastSquares(), Binary()),
}


@pytest.mark.parametrize(("quantizer", "other"), PAIRS.values(), ids=PAIRS)
def test_the_gap_tells_the_quantizer_of_the_training_from_another(quantizer, other):
    weights = {"kernel": np.float32(rng.normal(size=(3, 3, 4, 8))), "bias": np.ones(8, np.float32)}
    params = quantize(weights, quantizer)
    assert gaps(params, quantizer)[0] <= 2e-6
    assert gaps(params, other)[0] > 1e-2


def test_the_gap_is_the_distance_to_the_quantized_weights_relative_to_the_norm():
    x = rng.normal(size=(5, 7))
    s = np.mean(np.abs(x), axis=0)
    expected = np.linalg.norm(np.where(x >= 0, s, -s) - x) / np.linalg.norm(x)
    np.testing.assert_allclose(gaps({"kernel": np.float32(x)}), [expected], rtol=1e-5)
    assert gaps({"kernel": np.zeros((5, 7), np.float32)}) == [0]


@pytest.mark.parametrize(
    "quantizer",
    [
        GROUPS,
        *(
            pytest.param(q, marks=pytest.mark.slow)
            for q in (Binary(), Ternary(), Uniform(bits=3), LeastSquares())
        ),
    ],
    ids=str,
)
def test_the_table_counts_the_bits_that_packing_takes(quantizer):
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 11)), "bias": jnp.ones(11)},
        "dense": {"kernel": jnp.ones((12, 13), jnp.bfloat16)},
    }
    table, packed = tabulate(params, quantizer), pack(params, quantizer)
    by_path = {row.path: row for row in table.rows}
    for path, leaf, size in (
        ("conv/kernel", packed["conv"]["kernel"], 4),
        ("dense/kernel", packed["dense"]["kernel"], 2),
    ):
        assert (by_path[path].bits, by_path[path].scales) == (8 * leaf.nbytes, leaf.scales.size)
        assert by_path[path].quantizer == leaf.quantizer
        assert by_path[path].bits_whole == 8 * size * np.prod(leaf.shape)
    assert by_path["conv/bias"].bits == by_path["conv/bias"].bits_whole == 32 * 11
    assert table.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert table.nbytes_whole == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # And says the same of the packed network.
    keep = lambda row: (row.path, row.shape, row.quantizer, row.scales, row.bits, row.bits_whole)
    assert list(map(keep, tabulate(packed, quantizer).rows)) == list(map(keep, table.rows))


def test_shapes_do_for_parameters():
    head = {"head": NETWORK["head"], "steps": NETWORK["steps"]}
    of_shapes, of_values = tabulate(jax.eval_shape(lambda: head)).rows, tabulate(head).rows
    assert [row.gap for row in of_shapes] == [None] * len(of_values)
    assert any(row.gap is not None for row in of_values)
    for a, b in zip(of_shapes, of_values, strict=True):
        assert (a.path, a.shape, a.quantizer, a.scales, a.bits) == (
            b.path,
            b.shape,
            b.quantizer,
            b.scales,
            b.bits,
        )


def test_the_printed_table_has_a_line_per_leaf_and_the_totals():
    table = tabulate(jax.eval_shape(lambda: NETWORK), {"head": None, "*": FOUR_BITS})
    *lines, count, size = repr(table).splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(rows(NETWORK))
    assert ["Uniform" in line for line in lines] == [
        path in ("conv/kernel", "middle/kernel") for path in rows(NETWORK)
    ]
    assert "200 of 398 " in count
    assert "2 of 7 " in count
    assert f"{table.nbytes:,}" in size


RANKS = [WHOLE, Binary(group=2), LeastSquares()]


@pytest.mark.parametrize("quantizer", RANKS, ids=str)
def test_no_rank_is_promoted_on_the_way(quantizer):
    params = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    with jax.numpy_rank_promotion("raise"):
        tabulate(params, quantizer)
        pack(quantize(params, quantizer), quantizer)
        optimizer = stam(optax.sgd(0.1), hard_from=1, quantizer=quantizer)
        jax.eval_shape(lambda: helpers.take_step(optimizer, params, optimizer.init(params), params))


def test_a_layer_inside_a_module_that_normalizes_first_is_no_normalization():
    params = {
        "PreNorm_0": {"Attention_0": {"kernel": jnp.ones((2, 3))}, "LayerNorm_0": {"w": jnp.ones((2, 3))}}
    }
    assert [row.quantizer is None for row in tabulate(params).rows] == [False, True]


def test_a_pattern_for_a_module_leaves_its_biases_whole():
    params = {"query": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones((2, 3))}}
    rows = tabulate(params, {"query": Binary(axis=(-2, -1))}).rows
    assert [row.quantizer for row in rows] == [None, Binary(axis=(-2, -1))]
