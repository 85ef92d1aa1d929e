"""Image sets as arrays of bytes, split once and for all, and their augmentation."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import DatasetName
from experiments.data import devices
from experiments.data.downloads import RELEASES
from experiments.data.records import Records, Selected, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """What a network has to know of the images that it reads.

    Args:
        labels: the names of the labels, in order.
        shape: of an image: height, width and channels.
        brightest: the largest value of a pixel; 0 is the smallest.
        mean: of the training pixels, per channel.
        deviation: standard deviation of the training pixels, per channel.
    """

    labels: tuple[str, ...]
    shape: tuple[int, int, int]
    brightest: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def classes(self) -> int:
        """The number of labels."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(Images):
    """Images in three parts: to learn from, to watch the learning on, and to judge by at the end.

    Args:
        train: to learn from; in memory unless it was to be streamed.
        validation: held out of training, for the curves and for tuning.
        test: looked at once, after the last epoch.
        shift: how many pixels augmentation moves an image by, at most, each way.
        flip: whether augmentation mirrors images.
    """

    train: Records
    validation: Split
    test: Split
    shift: int
    flip: bool

    def with_fewer(self, count: int) -> "Dataset":
        """The same set with only some images to learn from: the same ones in every run, and among any more.

        Args:
            count: how many; not more than there are.
        """
        chosen = np.sort(np.random.default_rng(0).permutation(self.train.size)[:count])
        return dataclasses.replace(self, train=Selected(self.train, chosen))

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
    pixels = train.images.astype(np.float64)
    return Dataset(
        labels=tuple("0123456789"),
        shape=(8, 8, 1),
        brightest=16,
        train=train,
        validation=validation,
        test=test,
        mean=tuple(pixels.mean(axis=(0, 1, 2)).tolist()),
        deviation=tuple(pixels.std(axis=(0, 1, 2)).tolist()),
        shift=1,
        flip=False,
    )


def held_out(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of some training images to train on and which to hold out: the same ones in every run.

    Args:
        count: how many images there are.
        size: how many to hold out.

    Returns:
        The indices of the images to train on and of those held out, each in ascending order.
    """
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[size:]), np.sort(order[:size])


def _released(name: str, data_dir: Path | None, *, streamed: bool) -> Dataset:
    """A set that TensorFlow Datasets knows."""
    from experiments.data import tfds

    release = RELEASES[name]
    everything = tfds.open_records(name, "train", data_dir)
    if not streamed:
        everything = tfds.read_all(everything)
    kept, left = held_out(everything.size, release.held_out)
    return Dataset(
        labels=tfds.label_names(name, data_dir),
        shape=release.shape,
        brightest=255,
        train=Selected(everything, kept) if streamed else everything.at(kept),
        validation=everything.at(left),
        test=tfds.read_all(tfds.open_records(name, "test", data_dir)),
        mean=release.mean,
        deviation=release.deviation,
        shift=release.shift,
        flip=release.flip,
    )


def load(name: DatasetName, data_dir: Path | None = None, *, streamed: bool = False) -> Dataset:
    """The image set of that name; one that is not there yet is downloaded and tfds.

    Args:
        name: which set.
        data_dir: where TensorFlow Datasets keeps its sets; by default where it always does.
        streamed: whether to leave the training images on disk, to be read as they are asked for.

    Returns:
        The set, split as in every run.

    Raises:
        SettingsError: if the set is not there and cannot be downloaded.
    """
    return _digits() if name == "digits" else _released(name, data_dir, streamed=streamed)


@functools.cache
def loaded(name: DatasetName, data_dir: Path | None = None, *, streamed: bool = False) -> Dataset:
    """The image set of that name, loaded once; where it has to be prepared first, one process does it.

    Args:
        name: as of `load`, like the others.
        data_dir: where image sets are.
        streamed: whether to leave the training images on disk.
    """
    found = load(name, data_dir, streamed=streamed) if devices.is_first() else None
    devices.wait(f"{name} is there")
    return found or load(name, data_dir, streamed=streamed)
