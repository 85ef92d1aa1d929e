"""The command `evaluate`: the accuracy of packed networks, measured anew."""

from pathlib import Path
from typing import Any, get_args

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.config import DatasetName, Reading, SettingsError
from experiments.data.devices import Layout
from experiments.data.image_sets import loaded
from experiments.deployment import packed_network
from experiments.networks import evaluation
from experiments.reporting import run_folder
from experiments.reporting.run_folder import Row


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
    files = [path] if path.is_file() else sorted(path.rglob(run_folder.PACKED))
    if not files and not path.is_dir():
        raise SettingsError(f"{path} is neither a packed file nor the folder of a run.")
    if not files:
        raise SettingsError(
            f"{path} holds no {run_folder.PACKED}: its runs are of the float network, or did not finish, "
            "or their weights were not kept."
        )
    rows: list[Row] = []
    for file in files:
        network = packed_network.load(file)
        name: Any = dataset or network.dataset
        if name not in get_args(DatasetName):
            raise SettingsError(f"{file} was trained on {name!r}, unknown here: name a --dataset.")
        images = loaded(name, reading.data_dir)
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
