"""The networks against the literature, and the convolutions against plain ones."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import stam_jax
from experiments.config import MODELS, ModelName
from experiments.data.image_sets import Images
from experiments.networks import convolutions, float_files, models

NHWC = ("NHWC", "HWIO", "NHWC")


def dataset(channels: int) -> Images:
    return Images(
        labels=tuple("0123456789"),
        shape=(32, 32, channels),
        brightest=255,
        mean=(120.0,) * channels,
        deviation=(60.0,) * channels,
    )


@functools.cache
def abstract(name: ModelName, *, channels: int = 3, width: float = 0.125, **options: Any) -> Any:
    """A network of shapes alone, in no time."""
    key = jax.random.key(0)
    return nnx.eval_shape(lambda: models.build(name, dataset(channels), width=width, key=key, **options))


def parameters(name: ModelName, **options: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path."""
    flat = nnx.to_flat_state(nnx.state(abstract(name, **options), nnx.Param))
    return {"/".join(map(str, path)): variable.shape for path, variable in flat}


def size(name: ModelName, **options: Any) -> int:
    return sum(math.prod(shape) for shape in parameters(name, **options).values())


def filled(name: ModelName, **options: Any) -> Any:
    """A network with weights from NumPy, which need no compiling."""
    graph, state = nnx.split(abstract(name, **options))
    draws = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> jax.Array:
        if "kernel" in jax.tree_util.keystr(path):
            return jnp.asarray(
                draws.normal(size=leaf.shape) * np.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.dtype
            )
        return jnp.full(leaf.shape, "scale" in str(path) or "var" in str(path), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def pictures(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Convolutions, as (inputs, outputs, size); each has a batch norm of 2 * outputs, the head a bias.
def total(convolutions: list[tuple[int, int, int]]) -> int:
    features = convolutions[-1][1]
    return sum(i * o * k * k + 2 * o for i, o, k in convolutions) + features * 10 + 10


def plain(*channels: int) -> list[tuple[int, int, int]]:
    return [(i, o, 3) for i, o in zip((3, *channels), channels, strict=False)]


def residual(stages: tuple[int, ...], blocks: int, *, projections: bool) -> list[tuple[int, int, int]]:
    between = list(itertools.pairwise(stages)) if projections else []
    body = [channels for stage in stages for channels in [stage] * (2 * blocks)]
    return [(i, o, 1) for i, o in between] + plain(stages[0], *body)


VGG11 = plain(64, 128, *[256] * 2, *[512] * 4)
VGG16 = plain(*[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6)
SIZES = [
    ("vgg11", VGG11, "9.2M"),
    ("vgg16", VGG16, "14.7M"),
    ("resnet8", residual((16, 32, 64), 1, projections=True), "0.08M"),
    ("resnet18", residual((64, 128, 256, 512), 2, projections=True), "11.2M"),
    ("resnet20", residual((16, 32, 64), 3, projections=False), "0.27M"),
    ("resnet56", residual((16, 32, 64), 9, projections=False), "0.85M"),
]


@pytest.mark.parametrize(("name", "layers", "published"), SIZES)
def test_parameters_are_those_of_the_literature(name, layers, published):
    digits = len(published.split(".")[1]) - 1
    assert size(name, width=1.0) == total(layers)
    assert f"{total(layers) / 1e6:.{digits}f}M" == published


def test_the_transformer_has_the_parameters_of_its_blocks():
    d = 192  # As DeiT-Tiny, with half of its twelve blocks and 4x4 patches of three colors.
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    assert size("vit6", width=1.0) == (48 * d + d) + 6 * block + 2 * d + (10 * d + 10)


def test_the_transformer_reads_its_patches_row_by_row():
    network, seen = filled("vit6"), []

    class Spy(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            seen.append(x)
            return jnp.zeros((12, 24))

    network.embed, network.blocks = Spy(), nnx.List([])
    x = normal(2, 8, 12, 3)
    assert network.features(x, train=False).shape == (2, 2, 3, 24)
    patches = [x[:, i : i + 4, j : j + 4].reshape(2, -1) for i in (0, 4) for j in (0, 4, 8)]
    np.testing.assert_array_equal(seen[0], np.concatenate(np.stack(patches, axis=1)))


def test_attention_is_that_of_its_equation():
    attention = models.Attention(12, 3, rngs=nnx.Rngs(0))
    kernels = np.random.default_rng(0).normal(size=(4, 12, 12))
    for layer, kernel in zip(
        (attention.query, attention.key, attention.value, attention.out), kernels, strict=True
    ):
        layer.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    x = np.asarray(normal(2, 5, 12), np.float64)
    query, key, value = ((x @ kernel).reshape(2, 5, 3, 4) for kernel in kernels[:3])
    logits = np.einsum("nqhc,nkhc->nhqk", query, key) / np.sqrt(4)
    weights = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)
    mixed = np.einsum("nhqk,nkhc->nqhc", weights, value).reshape(2, 5, 12)
    found = attention(jnp.asarray(x.reshape(10, 12), jnp.float32), tokens=5)
    np.testing.assert_allclose(found.reshape(x.shape), mixed @ kernels[3], rtol=2e-4, atol=2e-4)


def test_positions_tell_every_place_apart():
    places = models.positions(3, 4, 8)
    assert places.shape == (12, 8)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    assert np.all(distances + np.eye(12) > 0.1)
    # Half of the channels are of the row alone, half of the column.
    grid = places.reshape(3, 4, 8)
    np.testing.assert_array_equal(grid[:, 0, :4], grid[:, 3, :4])
    np.testing.assert_array_equal(grid[0, :, 4:], grid[2, :, 4:])


def test_resnet18_has_the_parameters_counted_elsewhere():
    assert size("resnet18", width=1.0) == 11_173_962


@pytest.mark.parametrize("name", MODELS)
def test_width_is_a_factor_of_all_channels_but_the_images_and_the_logits(name):
    half, whole = parameters(name, width=0.5), parameters(name, width=1.0)
    assert half.keys() == whole.keys()
    for path, shape in whole.items():
        *window, inputs, outputs = shape if len(shape) > 1 else (1, *shape)
        fixed = (1, 3, 10, 4 * 4 * 3)  # Of images, their patches and the logits.
        scaled = (*window, *(n if n in fixed else n // 2 for n in (inputs, outputs)))
        assert half[path] == scaled[-len(shape) :], path


def test_the_narrowest_network_has_a_channel():
    assert parameters("resnet8", width=0.01)["blocks/2/second/conv/kernel"] == (3, 3, 1, 1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (32, 32, 3)) for name in MODELS), ("vgg11", (8, 8, 1)), ("resnet8", (28, 28, 1))],
    ids=str,
)
def test_every_network_takes_every_image(name, shape):
    logits = nnx.eval_shape(
        lambda network, images: network(images, train=True),
        abstract(name, channels=shape[-1]),
        jax.ShapeDtypeStruct((2, *shape), jnp.uint8),
    )
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_is_selected_and_nothing_else(name):
    for row in stam_jax.tabulate(models.split(abstract(name))[1]).rows:
        is_chosen = row.path.endswith("kernel") and row.path != "embed/kernel"
        assert (row.quantizer is not None) == is_chosen, row


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("vit")])
def test_the_convolution_of_the_images_and_the_head_go_by_their_names(name):
    """Those that the help of --exclude gives."""
    stem = "stages/0/0" if name.startswith("vgg") else "stem"
    params = models.split(abstract(name))[1]
    rows = stam_jax.tabulate(params, {stem: None, "head": None, "*": stam_jax.Binary()}).rows
    kept = {row.path for row in rows if row.path.endswith("kernel") and row.quantizer is None}
    assert kept == {f"{stem}/conv/kernel", "head/kernel"}


def test_resnet8_keeps_the_names_of_its_files():
    layers = ["stem", *[f"blocks/{i}/{part}" for i in range(3) for part in ("first", "second")]]
    layers += ["blocks/1/shortcut", "blocks/2/shortcut"]
    leaves = ("conv/kernel", "norm/scale", "norm/bias")
    expected = {f"{layer}/{leaf}" for layer in layers for leaf in leaves} | {"head/kernel", "head/bias"}
    assert set(parameters("resnet8")) == expected


@pytest.mark.parametrize("name", ["vgg11", "resnet8"])
def test_the_key_decides_the_initial_weights(name):
    # One channel throughout: few shapes, each of which takes a compilation.
    build = lambda seed: models.build(name, dataset(1), width=1 / 512, key=jax.random.key(seed))
    first, again, other = (float_files.to_arrays(nnx.state(build(seed), nnx.Param)) for seed in (0, 0, 1))
    for path, array in first.items():
        np.testing.assert_array_equal(array, again[path])
        assert np.array_equal(array, other[path]) != path.endswith("kernel")


def test_initial_kernels_are_normal_cut_at_two_deviations_with_the_variance_of_he():
    network = models.build("resnet8", dataset(3), width=4.0, key=jax.random.key(0))
    for path, array in float_files.to_arrays(nnx.state(network, nnx.Param)).items():
        if not path.endswith("kernel"):
            assert set(np.unique(array)) == {1.0 if path.endswith("scale") else 0.0}
            continue
        gain = 1 if path == "head/kernel" else 2
        standard = array.ravel() * np.sqrt(np.prod(array.shape[:-1]) / gain)
        assert abs(np.mean(standard)) < 5 / np.sqrt(array.size)
        assert np.var(standard) == pytest.approx(1, abs=5 / np.sqrt(array.size))
        # A normal variable that is cut off at +-2 has the deviation of 0.8796.
        assert 2 / 0.8796 - 0.1 < np.max(np.abs(standard)) <= 2 / 0.8796 + 1e-3


@nnx.jit
def learn_then_tell(network: models.Network, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return network(images, train=True), network(images)


@pytest.mark.slow
def test_bfloat16_keeps_parameters_and_statistics_in_float32_and_the_logits_close():
    whole, short = filled("resnet8"), filled("resnet8", precision="bfloat16")
    images = pictures(64, 8, 8, 3)
    for logits, expected in zip(learn_then_tell(short, images), learn_then_tell(whole, images), strict=True):
        assert logits.dtype == jnp.float32
        error = np.sqrt(np.mean(np.square(logits - expected))) / np.std(expected)
        assert 0 < error < 0.05
    expected = float_files.to_arrays(nnx.state(whole, (nnx.Param, nnx.BatchStat)))
    for path, array in float_files.to_arrays(nnx.state(short, (nnx.Param, nnx.BatchStat))).items():
        assert array.dtype == np.float32, path
        np.testing.assert_allclose(array, expected[path], rtol=0.05, atol=0.02, err_msg=path)


def test_bfloat16_is_that_of_every_product():
    program = str(jax.make_jaxpr(filled("vgg11", precision="bfloat16"))(pictures(2, 32, 32, 3)))
    products = re.findall(r":(\w+)\[[\d,]+\] = (?:dot_general|conv_general_dilated)\[", program)
    assert products == 9 * ["bf16"]


def test_images_are_standardised_before_they_are_rounded():
    seen: list[jax.Array] = []

    class Spy(models.Network):
        def features(self, x: jax.Array, *, train: bool) -> jax.Array:
            seen.append(x)
            return x

    images = pictures(4, 2, 2, 3)
    Spy(3, dataset(3), dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))(images)
    np.testing.assert_array_equal(seen[0], ((images - 120.0) / 60.0).astype(jnp.bfloat16))


def test_a_shortcut_without_parameters_subsamples_and_fills_up_with_zeros():
    x = normal(2, 5, 4, 3)
    carried = models.ZeroPadding(3, 8, 2)(x, train=True)
    assert carried.shape == (2, 3, 2, 8)
    np.testing.assert_array_equal(carried[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(carried[..., 3:], 0)


def reference(x: jax.Array, kernel: Any, stride: int, pads: Sequence[tuple[int, int]]) -> np.ndarray:
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows[:, ::stride, ::stride], kernel)


def value_and_gradients(
    function: Callable[..., jax.Array], *arrays: jax.Array, along: jax.Array
) -> list[jax.Array]:
    def both(*arrays: jax.Array) -> list[jax.Array]:
        value, pullback = jax.vjp(function, *arrays)
        return [value, *pullback(along)]

    return jax.jit(both)(*arrays)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def is_plain(*shapes: tuple[int, ...], **options: Any) -> bool:
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, **options}
    call = lambda x, kernel: convolutions.conv_general_dilated(x, kernel, **options)
    operations = jax.make_jaxpr(call)(*map(jnp.ones, shapes)).jaxpr.eqns
    return [operation.primitive.name for operation in operations] == ["conv_general_dilated"]


# Outputs of 2 by 2 or smaller; the channels of images.
CONVOLUTIONS = [
    ((1, 1), 3, 1, [(1, 1), (1, 1)]),
    ((2, 2), 3, 1, [(1, 1), (1, 1)]),
    ((2, 2), 3, 1, "SAME"),
    ((1, 2), 3, 2, [(1, 1), (1, 1)]),
    ((4, 3), 3, 2, [(1, 1), (1, 1)]),
    ((4, 3), 3, 2, "SAME"),
    ((4, 3), 3, 1, "VALID"),
    ((4, 3), 1, 2, [(0, 0), (0, 0)]),
    ((2, 2), 3, 1, [(2, 0), (0, 1)]),
]
CONVOLUTIONS = [
    *[(5, *rest) for rest in CONVOLUTIONS],
    (3, (6, 8), 3, 1, [(1, 1), (1, 1)]),
    (3, (6, 8), 3, 1, "VALID"),
    (1, (5, 9), 5, 1, "SAME"),
    (4, (3, 4), 1, 1, "VALID"),
    (2, (3, 5), 3, 1, [(2, 0), (0, 1)]),
]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("channels", "sides", "size", "stride", "padding"), CONVOLUTIONS)
def test_convolutions_another_way_are_those_of_lax_and_of_numpy(channels, sides, size, stride, padding):
    options: Any = {"window_strides": (stride, stride), "padding": padding, "dimension_numbers": NHWC}
    x, kernel = normal(3, *sides, channels), normal(size, size, channels, 7, seed=1)
    assert not is_plain(x.shape, kernel.shape, **options)
    pads = (
        lax.padtype_to_pads(sides, (size, size), (stride, stride), padding)
        if isinstance(padding, str)
        else padding
    )
    value = reference(x, kernel, stride, pads)
    along = normal(*value.shape, seed=2)
    ours, plain = (
        value_and_gradients(functools.partial(convolve, **options), x, kernel, along=along)
        for convolve in (convolutions.conv_general_dilated, lax.conv_general_dilated)
    )
    for actual, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[0], value, rtol=1e-5, atol=1e-5)
    # The convolution is linear in either argument: its gradients are known from its values.
    u, v = normal(*x.shape, seed=3), normal(*kernel.shape, seed=4)
    np.testing.assert_allclose(
        np.vdot(ours[1], u), np.vdot(along, reference(u, kernel, stride, pads)), rtol=1e-4
    )
    np.testing.assert_allclose(np.vdot(ours[2], v), np.vdot(along, reference(x, v, stride, pads)), rtol=1e-4)


@pytest.mark.usefixtures("on_cpu")
def test_only_ordinary_convolutions_of_few_outputs_or_of_images_take_another_way():
    small, kernel = (2, 2, 2, 4), (3, 3, 4, 6)
    assert not is_plain(small, kernel)
    assert not is_plain((2, 4, 4, 4), kernel, window_strides=(2, 2))
    assert is_plain((2, 3, 3, 5), (3, 3, 5, 6))
    assert not is_plain((2, 3, 4, 4), kernel)
    assert is_plain((2, 3, 7, 4), kernel)  # No two to four columns side by side make up seven.
    assert is_plain((2, 3, 4, 4), (3, 3, 4, 17))  # More channels than half of what it takes go out.
    assert is_plain((2, 7, 7, 4), kernel, window_strides=(2, 2))
    assert is_plain(small, (3, 3, 2, 6), feature_group_count=2)
    assert is_plain(small, kernel, lhs_dilation=(1, 2), padding=((1, 1), (1, 1)))
    assert is_plain(small, kernel, rhs_dilation=(2, 2))
    assert is_plain((2, 3, 4, 4), kernel, rhs_dilation=(2, 2))
    assert is_plain(small, kernel, preferred_element_type=jnp.float32)
    assert is_plain((2, 4, 2, 2), (6, 4, 3, 3), dimension_numbers=("NCHW", "OIHW", "NCHW"))
    assert is_plain((2, 2, 4), (3, 4, 6), window_strides=(1,), dimension_numbers=("NHC", "HIO", "NHC"))


def test_other_backends_take_the_plain_way(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert is_plain((2, 2, 2, 4), (3, 3, 4, 6))


@pytest.mark.usefixtures("on_cpu")
def test_convolutions_of_images_can_be_differentiated_forwards_and_twice():
    x, kernel, u, v = (
        normal(2, 3, 4, 3),
        normal(3, 3, 3, 5, seed=1),
        normal(2, 3, 4, 3, seed=2),
        normal(3, 3, 3, 5, seed=3),
    )
    options: Any = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
    ours, plain = (
        functools.partial(convolve, **options)
        for convolve in (convolutions.conv_general_dilated, lax.conv_general_dilated)
    )
    squared = lambda convolve: lambda x, kernel: jnp.sum(convolve(x, kernel) ** 2)
    for derive in (
        lambda f: jax.jvp(f, (x, kernel), (u, v))[1],
        lambda f: jax.jvp(lambda kernel: f(x, kernel), (kernel,), (v,))[1],
        lambda f: jax.jvp(jax.grad(squared(f), argnums=(0, 1)), (x, kernel), (u, v))[1],
        lambda f: jax.grad(lambda x: jnp.vdot(jax.grad(squared(f))(x, kernel), u))(x),
    ):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), derive(ours), derive(plain)
        )


@pytest.mark.parametrize("sides", [(2, 2), (5, 4), (7, 7)])
def test_pools_are_those_of_flax(sides):
    # A permutation: no two pixels tie.
    x = jnp.asarray(np.random.default_rng(0).permutation(2 * sides[0] * sides[1] * 3), jnp.float32)
    x = x.reshape(2, *sides, 3)
    along = normal(2, sides[0] // 2, sides[1] // 2, 3)
    ours, plain = (
        value_and_gradients(pool, x, along=along)
        for pool in (convolutions.max_pool, lambda x: nnx.max_pool(x, (2, 2), (2, 2)))
    )
    for actual, expected in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(actual, expected)
