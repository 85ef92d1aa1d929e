"""The networks, in Flax NNX. Each maps images of bytes to logits."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.config import ModelName, Precision
from experiments.data.image_sets import Images
from experiments.networks import convolutions

# What batch norm adds to the variance.
EPSILON = 1e-5
# The standard deviation of a normal variable that is cut off at -2 and 2.
_CUT_DEVIATION = 0.87962566103423978


class ConvNorm(nnx.Module):
    """A convolution without bias, and batch normalisation.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        size: height and width of the kernel, odd.
        stride: pixels from one output to the next.
        dtype: of the products and of the features; parameters and statistics are float32.
        rngs: for Flax; the kernels are 0 until `build` draws them.
    """

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.conv = nnx.Conv(
            inputs,
            outputs,
            kernel_size=(size, size),
            strides=stride,
            # Not "SAME": with a stride of 2 that pads one side only, unlike the networks published.
            padding=size // 2,
            use_bias=False,
            dtype=dtype,
            kernel_init=nnx.initializers.zeros,
            conv_general_dilated=convolutions.conv_general_dilated,
            rngs=rngs,
        )
        # In bfloat16 it would round the running mean before subtracting it, though not a batch's own.
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height / stride, width / stride, outputs]."""
        return self.norm(self.conv(x), use_running_average=not train).astype(self.dtype)


class Projection(ConvNorm):
    """A shortcut through a 1x1 convolution; arguments as of `ConvNorm`."""

    def __init__(self, inputs: int, outputs: int, stride: int, **options: Any):
        super().__init__(inputs, outputs, 1, stride, **options)


class ZeroPadding(nnx.Module):
    """A shortcut without parameters: every `stride`-th pixel, and zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int, **options: Any):
        del options
        self.new, self.stride = outputs - inputs, stride

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height / stride, width / stride, outputs]."""
        del train
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.new)))


class Block(nnx.Module):
    """Two convolutions around which the input is carried, by a shortcut where shapes change."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        shortcut: Callable[..., Projection | ZeroPadding],
        **options: Any,
    ):
        self.first = ConvNorm(inputs, outputs, 3, stride, **options)
        self.second = ConvNorm(outputs, outputs, 3, 1, **options)
        changes = stride != 1 or inputs != outputs
        self.shortcut = shortcut(inputs, outputs, stride, **options) if changes else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height / stride, width / stride, outputs]."""
        carried = x if self.shortcut is None else self.shortcut(x, train=train)
        x = nnx.relu(self.first(x, train=train))
        return nnx.relu(self.second(x, train=train) + carried)


class Network(nnx.Module):
    """What all have in common: standardised images go in, and a linear head reads the features' mean.

    Args:
        channels: of the features.
        images: what it is to know of the images it is for.
        dtype: of the products.
        rngs: for Flax; the kernels are 0 until `build` draws them.
    """

    def __init__(self, channels: int, images: Images, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.mean, self.deviation = tuple(images.mean), tuple(images.deviation)
        self.dtype = dtype
        self.head = _linear(channels, images.classes, dtype=dtype, rngs=rngs)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height, width, channels] of standardised images."""
        raise NotImplementedError

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of shape [count, classes] of images of bytes, [count, height, width, channels]."""
        x = (images.astype(jnp.float32) - jnp.asarray(self.mean)) / jnp.asarray(self.deviation)
        x = self.features(x.astype(self.dtype), train=train)
        return self.head(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)


class VGG(Network):
    """A plain network: stages of 3x3 convolutions, each followed by a pool while there is more than a pixel.

    Args:
        stages: channels of each stage.
        depths: convolutions of each stage.
        images: what it is to know of the images it is for.
        **options: arguments of every layer.

    References:
        Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition,
        arXiv:1409.1556; with batch normalisation, and one linear layer for three, as is usual for CIFAR.
    """

    def __init__(self, stages: Sequence[int], depths: Sequence[int], images: Images, **options: Any):
        layers, inputs = [], len(images.mean)
        for outputs, depth in zip(stages, depths, strict=True):
            widths = (inputs, *[outputs] * depth)
            layers.append(nnx.List([ConvNorm(*pair, 3, 1, **options) for pair in itertools.pairwise(widths)]))
            inputs = outputs
        self.stages = nnx.List(layers)
        super().__init__(inputs, images, **options)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height, width, channels], a pixel each for images of 32 and less."""
        for stage in self.stages:
            for layer in stage:
                x = nnx.relu(layer(x, train=train))
            if min(x.shape[1:3]) > 1:
                x = convolutions.max_pool(x)
        return x


class ResNet(Network):
    """A residual network for small images: a 3x3 stem and stages of blocks.

    Args:
        stages: channels of each stage; every stage but the first halves the image.
        blocks: blocks per stage.
        images: what it is to know of the images it is for.
        shortcut: what carries the input where shapes change.
        **options: arguments of every layer.

    References:
        He et al., Deep residual learning for image recognition, arXiv:1512.03385, section 4.2.
    """

    def __init__(
        self,
        stages: Sequence[int],
        blocks: int,
        images: Images,
        *,
        shortcut: Callable[..., Projection | ZeroPadding],
        **options: Any,
    ):
        self.stem = ConvNorm(len(images.mean), stages[0], 3, 1, **options)
        layers, inputs = [], stages[0]
        for stage, outputs in enumerate(stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(inputs, outputs, stride, shortcut=shortcut, **options))
                inputs = outputs
        self.blocks = nnx.List(layers)
        super().__init__(inputs, images, **options)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height, width, channels]."""
        x = nnx.relu(self.stem(x, train=train))
        for block in self.blocks:
            x = block(x, train=train)
        return x


class Attention(nnx.Module):
    """Self-attention, each head on a share of the channels.

    Args:
        channels: of the features, a multiple of the number of heads.
        heads: how many.
        **options: arguments of every layer.
    """

    def __init__(self, channels: int, heads: int, **options: Any):
        linear = lambda: _linear(channels, channels, **options)
        self.heads, self.query, self.key, self.value, self.out = heads, linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array, tokens: int) -> jax.Array:
        """Features of shape [count * tokens, channels]."""
        split = lambda features: features.reshape(-1, tokens, self.heads, features.shape[-1] // self.heads)
        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


class TransformerBlock(nnx.Module):
    """Attention, and two linear layers, both with layer normalization before and the input carried around."""

    def __init__(self, channels: int, heads: int, **options: Any):
        self.before_attention = nnx.LayerNorm(channels, rngs=options["rngs"])
        self.attention = Attention(channels, heads, **options)
        self.before_linear = nnx.LayerNorm(channels, rngs=options["rngs"])
        self.first = _linear(channels, 4 * channels, **options)
        self.second = _linear(4 * channels, channels, **options)

    def __call__(self, x: jax.Array, tokens: int) -> jax.Array:
        """Features of shape [count * tokens, channels]."""
        x = x + self.attention(self.before_attention(x).astype(x.dtype), tokens)
        return x + self.second(nnx.gelu(self.first(self.before_linear(x).astype(x.dtype))))


class ViT(Network):
    """A vision transformer for small images, whose features are averaged over the patches.

    Args:
        channels: of the features, a multiple of 4 and of the number of heads.
        heads: of each attention.
        depth: how many blocks.
        images: what it is to know of the images it is for.
        **options: arguments of every layer.

    References:
        Dosovitskiy et al., An image is worth 16x16 words, arXiv:2010.11929; with the average in the place of
        a class token and fixed positions, as Beyer et al., Better plain ViT baselines, arXiv:2205.01580.
    """

    def __init__(self, channels: int, heads: int, depth: int, images: Images, **options: Any):
        # Patches of 4x4 pixels make 64 of an image of CIFAR; of 2x2, 16 of a digit.
        self.patch = 4 if images.shape[0] >= 16 else 2
        self.embed = _linear(self.patch**2 * len(images.mean), channels, **options)
        self.blocks = nnx.List([TransformerBlock(channels, heads, **options) for _ in range(depth)])
        self.norm = nnx.LayerNorm(channels, rngs=options["rngs"])
        super().__init__(channels, images, **options)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height / patch, width / patch, channels]."""
        del train
        count, height, width, colors = x.shape
        grid = height // self.patch, width // self.patch
        x = x.reshape(count, grid[0], self.patch, grid[1], self.patch, colors).swapaxes(2, 3)
        tokens = grid[0] * grid[1]
        # All tokens of all images in one axis: XLA on CPU is slow with gradients of kernels over two.
        x = self.embed(x.reshape(count * tokens, -1))
        x = x + jnp.tile(positions(*grid, x.shape[-1]), (count, 1)).astype(x.dtype)
        for block in self.blocks:
            x = block(x, tokens)
        return self.norm(x).astype(x.dtype).reshape(count, *grid, -1)


def _linear(inputs: int, outputs: int, **options: Any) -> nnx.Linear:
    """A linear layer; its kernel is 0 until `build` draws it."""
    return nnx.Linear(inputs, outputs, kernel_init=nnx.initializers.zeros, **options)


def positions(height: int, width: int, channels: int) -> jax.Array:
    """Sines and cosines of the rows and columns of a grid, of shape [height * width, channels].

    References:
        Vaswani et al., Attention is all you need, arXiv:1706.03762, section 3.5; for two dimensions as in
        arXiv:2205.01580.
    """
    frequencies = 1e4 ** -jnp.linspace(0, 1, channels // 4)
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    angles = [side.reshape(-1, 1) * frequencies for side in (y, x)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1)


def _draw_kernels(network: Network, key: jax.Array) -> None:
    """Fill the kernels with random weights of variance 2 / inputs, those of linear layers of 1 / inputs.

    They are normal, cut off at two standard deviations. One draw serves them all: XLA compiles every draw by
    itself, which takes a second each on CPU.

    References:
        He et al., Delving deep into rectifiers, arXiv:1502.01852.
    """
    params = dict(nnx.to_flat_state(nnx.state(network, nnx.Param)))
    shapes = {path: leaf.shape for path, leaf in params.items() if path[-1] == "kernel"}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    drawn = jax.random.truncated_normal(key, -2.0, 2.0, (int(ends[-1]),))
    for (path, shape), values in zip(shapes.items(), jnp.split(drawn, ends[:-1]), strict=True):
        # A rectifier, which halves the variance, comes after convolutions alone.
        variance = (1.0 if len(shape) == 2 else 2.0) / math.prod(shape[:-1])
        params[path] = params[path].replace(values.reshape(shape) * (math.sqrt(variance) / _CUT_DEVIATION))
    nnx.update(network, nnx.from_flat_state(params))


def split(network: Network) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """A network's graph, weights and batch-norm statistics; `flax.nnx.merge` puts them together again.

    The weights and the statistics are nested dictionaries of arrays, which JAX takes apart ten times faster
    than Flax's own state: that counts where a step takes a few milliseconds.
    """
    graph, params, stats = nnx.split(network, nnx.Param, nnx.BatchStat)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def build(
    name: ModelName, images: Images, *, width: float, precision: Precision = "float32", key: jax.Array
) -> Network:
    """The network of that name for an image set, with initial weights drawn from a key.

    Args:
        name: which network.
        images: what it is to know of the images it is for.
        width: factor of the channels; 1 for those of the literature.
        precision: dtype of the products; parameters, statistics and logits are float32.
        key: random key of the initial weights.

    Returns:
        A network whose call takes images and the keyword `train`.
    """
    options: dict[str, Any] = {"dtype": jnp.dtype(precision), "rngs": nnx.Rngs(0)}
    scaled = lambda *channels: [max(1, round(width * each)) for each in channels]
    match name:
        case "vgg11":
            network = VGG(scaled(64, 128, 256, 512, 512), (1, 1, 2, 2, 2), images, **options)
        case "vgg16":
            network = VGG(scaled(64, 128, 256, 512, 512), (2, 2, 3, 3, 3), images, **options)
        case "resnet8":
            network = ResNet(scaled(16, 32, 64), 1, images, shortcut=Projection, **options)
        case "resnet18":
            network = ResNet(scaled(64, 128, 256, 512), 2, images, shortcut=Projection, **options)
        case "resnet20":
            network = ResNet(scaled(16, 32, 64), 3, images, shortcut=ZeroPadding, **options)
        case "resnet56":
            network = ResNet(scaled(16, 32, 64), 9, images, shortcut=ZeroPadding, **options)
        case "vit6":
            # Three heads, as DeiT-Tiny has; the sines take a multiple of four channels.
            network = ViT(12 * scaled(16)[0], 3, 6, images, **options)
    _draw_kernels(network, key)
    return network
