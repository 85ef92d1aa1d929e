"""The folder of a run: what was run, on what, and what came of it."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from experiments.config import Settings, SettingsError, TrainSettings

CONFIG, ENVIRONMENT, RESULT = "config.json", "environment.json", "result.json"
METRICS, CURVES = "metrics.jsonl", "curves.png"
RELAXED, PACKED = "relaxed.safetensors", "packed.safetensors"


def create(folder: Path | None, command: str, settings: Settings) -> Path:
    """Make the folder of a run and write down what is run, and on what.

    Raises:
        SettingsError: if the folder exists and is not empty, or cannot be made.
    """
    if folder is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{now}-{command}-{settings.dataset}"
    surroundings = environment()  # Before the folder changes what git says.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SettingsError(f"--output: the folder {folder} is not empty; name a new one.")
    except OSError as error:
        raise SettingsError(f"--output: cannot use {folder}: {error.strerror}.") from error
    write_json(folder / CONFIG, settings.as_dict())
    write_json(folder / ENVIRONMENT, surroundings)
    return folder


def environment() -> dict[str, Any]:
    """The arguments, the versions of Python and the packages, the devices, and the state of git."""
    packages = ("stam-jax", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")
    return {
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "machine": _machine(),
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
    path.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())


def read_settings(path: Path) -> TrainSettings:
    """The settings of a single run.

    Raises:
        SettingsError: if the file is missing or does not hold them.
    """
    try:
        values = read_json(path)
        return TrainSettings(**values | {"exclude": tuple(values["exclude"])})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path} does not hold the settings of a run: {error}") from error


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file of metrics."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def single_runs(folder: Path) -> Iterable[Path]:
    """The folders of single runs in, or at, a run's folder.

    Raises:
        SettingsError: if there is none.
    """
    if (folder / METRICS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if not found:
        raise SettingsError(f"{folder} is not the folder of a run: it holds no {METRICS}.")
    return found
