"""Trained binary networks in files of their own, each with what it takes to use it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stam_jax
from experiments.config import ModelName, Precision, SettingsError, TrainSettings
from experiments.data.image_sets import Images
from experiments.networks import models

# What a file may ask for at most, lest a damaged one take all memory: sides of images, factors of channels.
_LARGEST, _WIDEST = 4096, 100.0


@dataclasses.dataclass(frozen=True)
class Stored:
    """A network from a file, its binary weights still packed.

    Args:
        model: which network.
        width: factor of its channels.
        precision: dtype of its products.
        images: what it reads.
        dataset: the image set that it was trained on.
        method: by which it was trained.
        seed: of its training.
        accuracy: on the test images, measured at the end of training.
        tree: its weights and statistics, `{"params": ..., "stats": ...}`, as from `stam_jax.load_packed`.
    """

    model: ModelName
    width: float
    precision: Precision
    images: Images
    dataset: str
    method: str
    seed: int
    accuracy: float
    tree: dict[str, Any] = dataclasses.field(repr=False)

    @functools.cached_property
    def graph(self) -> Any:
        """The network's graph, for `flax.nnx.merge`."""
        return abstract(self.model, self.images, self.width, self.precision)[0]

    def whole(self) -> tuple[Any, Any]:
        """The weights and the batch-norm statistics."""
        tree = stam_jax.unpack(self.tree)
        return tree["params"], tree["stats"]


def abstract(model: ModelName, images: Images, width: float, precision: Precision) -> tuple[Any, Any, Any]:
    """The graph, and the shapes of weights and statistics."""
    build = lambda: models.build(model, images, width=width, precision=precision, key=jax.random.key(0))
    return models.split(nnx.eval_shape(build))


def save(
    path: Path, packed: Any, stats: Any, *, settings: TrainSettings, images: Images, accuracy: float
) -> int:
    """Write a binary network with all that it takes to use it.

    Args:
        path: of the file.
        packed: its weights, from `stam_jax.pack`.
        stats: its batch-norm statistics.
        settings: of its training.
        images: what it reads.
        accuracy: on the test images.

    Returns:
        The size of the file in bytes.
    """
    said = {
        "model": settings.model,
        "width": settings.width,
        "precision": settings.precision,
        "dataset": settings.dataset,
        "method": settings.method,
        "seed": settings.seed,
        "test_accuracy": accuracy,
        "images": {field.name: getattr(images, field.name) for field in dataclasses.fields(Images)},
    }
    return stam_jax.save_packed(path, {"params": packed, "stats": stats}, metadata=said)


def load(path: Path) -> Stored:
    """The network in a file of `save`.

    Raises:
        SettingsError: if there is none, or the file is damaged, or holds something else.
    """
    try:
        said = stam_jax.packed_metadata(path)
        model, precision, width = said["model"], said["precision"], said["width"]
        if model not in get_args(ModelName) or precision not in get_args(Precision):
            raise SettingsError(f"{path} holds a network {model!r} in {precision!r}, unknown here.")
        if type(width) not in (int, float) or not 0 < width < _WIDEST:
            raise SettingsError(f"{path} holds a network of the width {width!r}.")
        images = _images(path, said["images"])
        _, params, stats = abstract(model, images, width, precision)
        kinds = {"dataset": str, "method": str, "seed": int, "test_accuracy": float}
        for name, kind in kinds.items():
            if type(said[name]) is not kind:
                raise SettingsError(f"{path} says that its {name} is {said[name]!r}.")
        return Stored(
            model=model,
            width=width,
            precision=precision,
            images=images,
            dataset=said["dataset"],
            method=said["method"],
            seed=said["seed"],
            accuracy=said["test_accuracy"],
            tree=stam_jax.load_packed(path, like={"params": params, "stats": stats}),
        )
    except SettingsError:
        raise
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}.") from error
    except KeyError as error:
        raise SettingsError(f"{path} does not say how its network is built: it lacks {error}.") from error
    except stam_jax.PackedFileError as error:
        raise SettingsError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{path} holds another network than it says: {error}") from error


def _images(path: Path, said: Any) -> Images:
    """What a network has to know of its images, from what a file says of them."""
    numbers = lambda values, count: (
        isinstance(values, list)
        and len(values) == count
        and all(type(x) in (int, float) and abs(x) < 1e6 for x in values)
    )
    try:
        shape, labels, brightest = said["shape"], said["labels"], said["brightest"]
        fits = (
            numbers(shape, 3)
            and all(type(n) is int and 1 <= n <= _LARGEST for n in shape)
            and shape[2] in (1, 3)
            and isinstance(labels, list)
            and all(isinstance(label, str) for label in labels)
            and type(brightest) is int
            and 1 <= brightest <= 255
            and numbers(said["mean"], shape[2])
            and numbers(said["deviation"], shape[2])
        )
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{path} does not say what images it reads: {error!r}.") from error
    if not fits:
        raise SettingsError(f"{path} says of its images what cannot be.")
    mean, deviation = tuple(said["mean"]), tuple(said["deviation"])
    return Images(
        labels=tuple(labels), shape=tuple(shape), brightest=brightest, mean=mean, deviation=deviation
    )


def is_whole(path: Path, params: Any, stats: Any) -> bool:
    """Whether a file gives back weights and statistics bit for bit."""
    stored = jax.jit(stam_jax.unpack)(stam_jax.load_packed(path, like={"params": params, "stats": stats}))
    pairs = zip(jax.tree.leaves(stored), jax.tree.leaves({"params": params, "stats": stats}), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def apply(graph: Any, tree: dict[str, Any], images: jax.Array) -> jax.Array:
    """The logits of images of bytes, from packed weights: for use inside jit, where they stay packed."""
    whole = stam_jax.unpack(tree)
    return nnx.merge(graph, whole["params"], whole["stats"], copy=True)(images)


def probabilities(stored: Stored, images: np.ndarray) -> np.ndarray:
    """The probability of each label for images of bytes: [count, classes]."""
    logits = jax.jit(apply, static_argnums=0)(stored.graph, stored.tree, jnp.asarray(images))
    return np.asarray(jax.nn.softmax(logits))
