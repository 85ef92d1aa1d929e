"""The networks, in Flax NNX. Each maps images of bytes to logits."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.config import ModelName
from experiments.data import Dataset


class ConvNorm(nnx.Module):
    """A convolution without bias, and batch normalisation."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            kernel_size=(size, size),
            strides=stride,
            padding="SAME",
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height / stride, width / stride, outputs]."""
        return self.norm(self.conv(x), use_running_average=not train)


class Block(nnx.Module):
    """Two convolutions around which the input is carried, through a 1x1 one where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.first = ConvNorm(inputs, outputs, 3, stride, rngs=rngs)
        self.second = ConvNorm(outputs, outputs, 3, 1, rngs=rngs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = ConvNorm(inputs, outputs, 1, stride, rngs=rngs) if changes else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape [count, height / stride, width / stride, outputs]."""
        carried = x if self.shortcut is None else self.shortcut(x, train=train)
        x = nnx.relu(self.first(x, train=train))
        return nnx.relu(self.second(x, train=train) + carried)


class ResNet(nnx.Module):
    """A residual network for small images: a 3x3 stem, stages of blocks, the mean, a linear head.

    Args:
        stages: channels of each stage; every stage but the first halves the image.
        blocks: blocks per stage.
        classes: number of logits.
        mean: of the training images, per channel.
        deviation: standard deviation of the training images, per channel.
        rngs: where the initial weights come from.

    References:
        He et al., Deep residual learning for image recognition, arXiv:1512.03385, section 4.2.
    """

    def __init__(
        self,
        *,
        stages: Sequence[int],
        blocks: int,
        classes: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        rngs: nnx.Rngs,
    ):
        self.mean, self.deviation = tuple(mean), tuple(deviation)
        self.stem = ConvNorm(len(self.mean), stages[0], 3, 1, rngs=rngs)
        layers, inputs = [], stages[0]
        for stage, outputs in enumerate(stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(inputs, outputs, stride, rngs=rngs))
                inputs = outputs
        self.blocks = nnx.List(layers)
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of shape [count, classes] of images of bytes, [count, height, width, channels]."""
        x = (images.astype(jnp.float32) - jnp.asarray(self.mean)) / jnp.asarray(self.deviation)
        x = nnx.relu(self.stem(x, train=train))
        for block in self.blocks:
            x = block(x, train=train)
        return self.head(jnp.mean(x, axis=(1, 2)))


def _resnet8(dataset: Dataset, width: int, rngs: nnx.Rngs) -> nnx.Module:
    pixels = dataset.train.images.astype(np.float64)
    return ResNet(
        stages=(width, 2 * width, 4 * width),
        blocks=1,
        classes=dataset.classes,
        mean=pixels.mean(axis=(0, 1, 2)).tolist(),
        deviation=pixels.std(axis=(0, 1, 2)).tolist(),
        rngs=rngs,
    )


_BUILDERS: dict[ModelName, Callable[[Dataset, int, nnx.Rngs], nnx.Module]] = {"resnet8": _resnet8}


def build(name: ModelName, dataset: Dataset, *, width: int, key: jax.Array) -> nnx.Module:
    """The network of that name for an image set, with initial weights drawn from a key.

    Args:
        name: which network.
        dataset: the images it is for: their channels, classes, mean and deviation.
        width: channels of the first stage.
        key: random key of the initial weights.

    Returns:
        A network whose call takes images and the keyword `train`.
    """
    return _BUILDERS[name](dataset, width, nnx.Rngs(key))
