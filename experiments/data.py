"""Image sets as arrays of bytes, split once and for all, and their augmentation."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import DatasetName


class Split(NamedTuple):
    """Some images with their labels.

    Args:
        images: uint8, of shape [count, height, width, channels].
        labels: int32, of shape [count].
    """

    images: np.ndarray
    labels: np.ndarray

    def at(self, indices: np.ndarray) -> "Split":
        """The images of those indices, with their labels."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images in three parts: to learn from, to watch the learning on, and to judge by at the end.

    Args:
        classes: the number of labels.
        train: to learn from.
        validation: held out of training, for the curves and for tuning.
        test: looked at once, after the last epoch.
        shift: how many pixels augmentation moves an image by, at most, each way.
        flip: whether augmentation mirrors images.
    """

    classes: int
    train: Split
    validation: Split
    test: Split
    shift: int
    flip: bool

    def augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Images moved by a random shift, filled up with zeros, and mirrored where that keeps the label.

        Args:
            key: a random key.
            images: of shape [count, height, width, channels].

        Returns:
            Images of the same shape and dtype.
        """
        shift_key, flip_key = jax.random.split(key)
        count, *shape = images.shape
        edge = (self.shift, self.shift)
        padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))
        corners = jax.random.randint(shift_key, (count, 2), 0, 2 * self.shift + 1)
        crop = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)
        images = jax.vmap(crop)(padded, corners)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        return images


def _digits() -> Dataset:
    """Scikit-learn's 1,797 handwritten digits of 8 by 8 pixels, from 0 to 16; they ship with it."""
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int32)

    def split(part: Split, size: int) -> tuple[Split, Split]:
        # The split never depends on a run's seed: all runs are judged by the same images.
        kept, held_out = model_selection.train_test_split(
            np.arange(len(part.labels)), test_size=size, stratify=part.labels, random_state=0
        )
        return part.at(np.asarray(kept)), part.at(np.asarray(held_out))

    rest, test = split(Split(images, labels), 450)
    train, validation = split(rest, 150)
    return Dataset(classes=10, train=train, validation=validation, test=test, shift=1, flip=False)


_LOADERS: dict[DatasetName, Callable[[], Dataset]] = {"digits": _digits}


def load(name: DatasetName) -> Dataset:
    """The image set of that name."""
    return _LOADERS[name]()
