"""The commands that use a packed network: `inspect`, `predict` and `evaluate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import stam_jax
from experiments import evaluation, grid, runs, stored
from experiments.config import DatasetName, Reading, SettingsError
from experiments.data import Images
from experiments.devices import Layout

Row = Mapping[str, Any]


def inspect(path: Path, console: Console) -> None:
    """Print what a packed file holds, and what it says of itself.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        table, metadata = stam_jax.tabulate(stam_jax.load_packed(path)), stam_jax.packed_metadata(path)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
    console.print(str(table), soft_wrap=True, highlight=False, markup=False)
    said = {name: value for name, value in metadata.items() if not isinstance(value, dict | list)}
    # What a file says of itself may hold what a terminal obeys.
    words = ", ".join(f"{name} {value}" for name, value in said.items())
    words = "".join(letter if letter.isprintable() else "?" for letter in words)
    size = path.stat().st_size
    console.print(
        f"The file has {size:,} bytes, {table.nbytes_whole / size:.1f} times less than its arrays whole. "
        f"It says of itself: {words or 'nothing'}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def predict(path: Path, pictures: Sequence[Path], console: Console) -> list[Row]:
    """Print the likeliest labels of some pictures.

    Raises:
        SettingsError: if the file or a picture cannot be read.
    """
    network = stored.load(path)
    images = np.stack([read_picture(picture, network.images) for picture in pictures])
    chances = stored.probabilities(network, images)
    best = np.argsort(-chances, axis=1)[:, :3]
    rows: list[Row] = [
        {"picture": str(picture), "labels": [(network.images.labels[k], float(chance[k])) for k in order]}
        for picture, chance, order in zip(pictures, chances, best, strict=True)
    ]
    table = Table(box=rich.box.SIMPLE_HEAD)
    for title in ("picture", "label", "", "or"):
        table.add_column(title)
    for row in rows:
        (label, chance), *others = row["labels"]
        rest = ", ".join(f"{name} {share:.1%}" for name, share in others)
        table.add_row(escape(row["picture"]), escape(label), f"{chance:.1%}", escape(rest))
    console.print(table)
    return rows


def read_picture(path: Path, images: Images) -> np.ndarray:
    """A picture from a file as a network reads it: resized, in gray where it knows no colors, as bytes.

    Raises:
        SettingsError: if it cannot be read.
    """
    from PIL import Image

    height, width, channels = images.shape
    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            # The middle of the picture, in the proportions of the images trained on.
            side = min(image.width / width, image.height / height)
            left, top = (image.width - side * width) / 2, (image.height - side * height) / 2
            box = (left, top, left + side * width, top + side * height)
            mode = "L" if channels == 1 else "RGB"
            if image.mode.startswith("I;16"):  # Pillow would cut what is above 255 off.
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise SettingsError(f"cannot read the picture {path}: its pixels are not bytes.")
            resized = image.convert(mode).resize((width, height), Image.Resampling.BOX, box)
    except SettingsError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingsError(f"cannot read the picture {path}: {error}") from error
    pixels = np.asarray(resized, np.float64).reshape(images.shape) * images.brightest / 255
    return np.round(pixels).astype(np.uint8)


def evaluate(path: Path, dataset: DatasetName | None, reading: Reading, console: Console) -> list[Row]:
    """Measure packed networks anew, from their files alone; say whether they do as they did.

    Args:
        path: a packed file, or the folder of a run.
        dataset: to measure on; by default that of the training.
        reading: where image sets are.
        console: for the table.

    Raises:
        SettingsError: if there is no packed network, or it reads other images.
    """
    files = [path]
    if not path.is_file():
        files = [place / runs.PACKED for place in runs.single_runs(path) if (place / runs.PACKED).is_file()]
    if not files:
        raise SettingsError(
            f"{path} holds no {runs.PACKED}: its runs are of the float network, or did not finish, "
            "or their weights were not kept."
        )
    rows: list[Row] = []
    for file in files:
        network = stored.load(file)
        name: Any = dataset or network.dataset
        if name not in get_args(DatasetName):
            raise SettingsError(f"{file} was trained on {name!r}, unknown here: name a --dataset.")
        images = grid.dataset(name, reading.data_dir, False)
        if (images.shape, images.classes) != (network.images.shape, network.images.classes):
            raise SettingsError(
                f"--dataset {dataset}: its images are {images.shape} of {images.classes} kinds, and "
                f"{file} reads {network.images.shape} of {network.images.classes}."
            )
        accuracy = evaluation.accuracy(network.graph, *network.whole(), images.test, Layout())
        recorded = network.accuracy if dataset in (None, network.dataset) else None
        same = recorded is None or accuracy == recorded
        rows.append({"file": str(file), "accuracy": accuracy, "recorded": recorded, "same": same})
    table = Table(box=rich.box.SIMPLE_HEAD)
    for title in ("file", "accuracy on the test images", "recorded", ""):
        table.add_column(title, overflow="fold")
    for row in rows:
        recorded = "-" if row["recorded"] is None else f"{row['recorded']:.2%}"
        same = "" if row["recorded"] is None else "the same" if row["same"] else "[bold red]differs"
        table.add_row(escape(row["file"]), f"{row['accuracy']:.2%}", recorded, same)
    console.print(table)
    return rows
