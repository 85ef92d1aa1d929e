"""The folder of a run: what was run, on what, and what came of it."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments import devices
from experiments.config import METHODS, Settings, SettingsError, TrainSettings, updated

CONFIG, ENVIRONMENT, RESULT = "config.json", "environment.json", "result.json"
METRICS, CURVES = "metrics.jsonl", "curves.png"
CHECKPOINTS, TENSORBOARD, ERROR, LOCK = "checkpoints", "tensorboard", "error.txt", "run.lock"
# What a comparison or a table may be given more of when it goes on.
_MAY_GROW = ("methods", "seeds", "own")
RELAXED, PACKED = "relaxed.safetensors", "packed.safetensors"


def begin(folder: Path | None, command: str, settings: Settings, *, resume: bool) -> Path:
    """Make the folder of a run and write down what is run, and on what; or find it there to go on with.

    Args:
        folder: where the run goes; None for a new one under runs/.
        command: that is run, for the name of a new folder.
        settings: of the run.
        resume: whether the folder may hold a run already.

    Raises:
        SettingsError: if the folder cannot be made, or holds something that is not this run.
    """
    if folder is None:
        if resume or jax.process_count() > 1:
            raise SettingsError("--output: name the folder, for a run to go on or to be shared by processes.")
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{now}-{command}"
    refused = None
    if devices.is_first():
        try:
            _begin(folder, settings, resume=resume)
        except SettingsError as error:
            refused = error
    if devices.agreed(refused is not None):
        raise refused or SettingsError(f"--output: the first process cannot use {folder}.")
    return folder


def _begin(folder: Path, settings: Settings, *, resume: bool) -> None:
    surroundings = environment()  # Before the folder changes what git says.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = all(path.suffix == ".part" for path in folder.iterdir())
    except OSError as error:
        raise SettingsError(f"--output: cannot use {folder}: {error.strerror}.") from error
    if not empty and not resume:
        raise SettingsError(
            f"--output: the folder {folder} is not empty; name a new one, or go on with it by --resume."
        )
    given = settings.as_dict()
    if (folder / CONFIG).is_file():
        try:
            # What was begun before a setting was thought of has its default.
            stored = type(settings)().as_dict() | updated(read_json(folder / CONFIG))
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingsError(f"--resume: cannot read {folder / CONFIG}: {error}") from error
        differing = [name for name in stored if stored[name] != given.get(name) and name not in _MAY_GROW]
        if differing:
            name = differing[0]
            raise SettingsError(
                f"--resume: {folder} was begun with other settings: {name} was {stored[name]}, "
                f"and is {given.get(name, 'no setting')} now."
            )
        if "methods" in stored:
            given |= _grown(folder, stored, given)
    elif not empty:
        raise SettingsError(f"--resume: {folder} is not the folder of a run: it holds no {CONFIG}.")
    write_json(folder / CONFIG, given)
    if not (folder / RESULT).is_file():  # What is finished was made where it was made.
        write_json(folder / ENVIRONMENT, surroundings)


def _grown(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All of what was asked of a comparison before and is now: the seeds, the methods, and settings of these.

    Raises:
        SettingsError: if a method that was asked for before is to have other settings of its own.
    """
    before, now = (METHODS if each["methods"] == ["all"] else each["methods"] for each in (stored, given))
    for method in before:
        own = [each["own"].get(method, {}) for each in (stored, given)]
        if method in now and own[0] != own[1]:
            raise SettingsError(
                f"--resume: {folder} was begun with other settings: own.{method} was {own[0]}, "
                f"and is {own[1]} now."
            )
    methods = list(dict.fromkeys([*stored["methods"], *given["methods"]]))
    return {
        "methods": ["all"] if "all" in methods else methods,
        "seeds": max(stored["seeds"], given["seeds"]),
        "own": stored["own"] | {key: value for key, value in given["own"].items() if key not in before},
    }


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
    _write(path, json.dumps(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file, which is then there whole or as it was before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())


def read_settings(path: Path) -> TrainSettings:
    """The settings of a single run.

    Settings that this version does not have any more are left out, whatever they did; the `environment.json`
    beside the file names the version that ran it.

    Raises:
        SettingsError: if the file is missing or does not hold them.
    """
    try:
        known = {field.name for field in dataclasses.fields(TrainSettings)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in updated(read_json(path)).items()
            if name in known
        }
        return TrainSettings(**values)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise SettingsError(f"{path} does not hold the settings of a run: {error}") from error


class Recorder:
    """The metrics of a run, a line each; a context. Only the first process writes.

    Args:
        folder: of the run.
        keep: lines of which epochs to keep, from 1 on, of a run that goes on.
        tensorboard: whether to write them for TensorBoard as well.
    """

    def __init__(self, folder: Path, *, keep: int, tensorboard: bool):
        self._path, self._writes = folder / METRICS, devices.is_first()
        self._board: Any = None
        if not self._writes:
            return
        rows = read_metrics(self._path) if self._path.is_file() else []
        _write(self._path, "".join(json.dumps(row) + "\n" for row in rows if row["epoch"] <= keep))
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / TENSORBOARD))

    def append(self, row: dict[str, Any]) -> None:
        """Add a line."""
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics; but for a last one that was cut off while it was written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


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
