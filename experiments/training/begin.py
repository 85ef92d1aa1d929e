"""Beginning a run in a folder, or going on with the one that is there."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.config import METHODS, Settings, SettingsError
from experiments.data import devices
from experiments.reporting.run_folder import CONFIG, ENVIRONMENT, RESULTS, environment, read_json, write_json

# What a comparison or a table may be given more of when it goes on.
_MAY_GROW = ("methods", "seeds", "overrides")


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
            stored = type(settings)().as_dict() | read_json(folder / CONFIG)
        except (ValueError, TypeError) as error:
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
    if not (folder / RESULTS).is_file():  # What is finished was made where it was made.
        write_json(folder / ENVIRONMENT, surroundings)


def _grown(folder: Path, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All of what was asked of a comparison before and is now: the seeds, the methods, and their overrides.

    Raises:
        SettingsError: if a method that was asked for before is to have other overrides.
    """
    before, now = (METHODS if each["methods"] == ["all"] else each["methods"] for each in (stored, given))
    for method in before:
        own = [each["overrides"].get(method, {}) for each in (stored, given)]
        if method in now and own[0] != own[1]:
            raise SettingsError(
                f"--resume: {folder} was begun with other settings: overrides.{method} was {own[0]}, "
                f"and is {own[1]} now."
            )
    methods = list(dict.fromkeys([*stored["methods"], *given["methods"]]))
    new = {key: value for key, value in given["overrides"].items() if key not in before}
    return {
        "methods": ["all"] if "all" in methods else methods,
        "seeds": max(stored["seeds"], given["seeds"]),
        "overrides": stored["overrides"] | new,
    }
