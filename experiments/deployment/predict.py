"""The command `predict`: what pictures show, by a packed network."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.config import SettingsError
from experiments.data.image_sets import Images
from experiments.deployment import packed_network
from experiments.reporting.run_folder import Row


def predict(path: Path, pictures: Sequence[Path], console: Console) -> list[Row]:
    """Print the likeliest labels of some pictures.

    Raises:
        SettingsError: if the file or a picture cannot be read.
    """
    network = packed_network.load(path)
    images = np.stack([read_picture(picture, network.images) for picture in pictures])
    chances = packed_network.probabilities(network, images)
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
