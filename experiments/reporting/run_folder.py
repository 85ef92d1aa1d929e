"""The folder of a run: what was run, on what, and its metrics as they come."""

import csv
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.config import SettingsError, TrainSettings, parsed

CONFIG, ENVIRONMENT, RESULTS = "config.json", "environment.json", "results.csv"
METRICS, CURVES = "metrics.csv", "curves.png"
CHECKPOINTS, TENSORBOARD, ERROR, LOCK = "checkpoints", "tensorboard", "error.txt", "run.lock"
RELAXED, PACKED = "relaxed.safetensors", "packed.safetensors"

Row = Mapping[str, Any]
# The columns that hold words; all others hold numbers.
_WORDS = frozenset({"trial", "method", "dataset", "model", "precision"})


def environment() -> dict[str, Any]:
    """The arguments, the packages and their versions, the devices, the flags of XLA, and what git says."""
    packages = ("stam-jax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    return {
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "machine": _machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed": (_git("status", "--porcelain") or "").splitlines(),
        },
    }


def _machine() -> str:
    """What computes, in words."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if jax.default_backend() == "cpu":
        return f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{count} x {kind}"


def _git(*arguments: str) -> str | None:
    """What git says of the folder of this code; None without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.rstrip("\n")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON for people to read."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, which is then there whole or as it was before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())


def as_csv(rows: Sequence[Row], *, header: bool = True) -> str:
    """Rows as CSV; the columns are all keys in the order in which they first come. None is an empty cell."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file; but for a last one that was cut off while it was written."""
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    value = lambda name, cell: None if cell == "" else cell if name in _WORDS else json.loads(cell)
    return [{name: value(name, cell) for name, cell in row.items()} for row in csv.DictReader(lines)]


def read_settings(path: Path) -> TrainSettings:
    """The settings of a single run.

    Raises:
        SettingsError: if the file is missing or does not hold them.
    """
    try:
        return parsed(read_json(path))
    except (OSError, AttributeError, ValueError) as error:
        raise SettingsError(f"{path} does not hold the settings of a run: {error}") from error


class Recorder:
    """The metrics of a run, a row each; a context. Only the first process writes.

    Args:
        folder: of the run.
        keep: rows of which epochs to keep, from 1 on, of a run that goes on.
        tensorboard: whether to write them for TensorBoard as well.
    """

    def __init__(self, folder: Path, *, keep: int, tensorboard: bool):
        self._path, self._writes = folder / METRICS, jax.process_index() == 0
        self._board: Any = None
        if not self._writes:
            return
        rows = read_csv(self._path) if self._path.is_file() else []
        kept = [row for row in rows if row["epoch"] <= keep]
        write_text(self._path, as_csv(kept) if kept else "")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / TENSORBOARD))

    def append(self, row: Row) -> None:
        """Add a row."""
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(as_csv([row], header=file.tell() == 0))
        if self._board is not None:
            for name, value in row.items():
                if value is not None:
                    self._board.add_scalar(name, value, row["step"])
            self._board.flush()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()
