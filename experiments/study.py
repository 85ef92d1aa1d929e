"""The command `study`: a question put to the validation images, by runs that differ in a few settings."""

import dataclasses
import glob
import itertools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
from cyclopts import CycloptsError
from rich.console import Console
from rich.table import Table

from experiments import compare, config, devices, grid, runs
from experiments.config import Execution, SettingsError, TrainSettings
from experiments.grid import Job

STUDIES = Path(__file__).parent / "studies"
STUDY = "study.json"
_KEYS = ("question", "seeds", "settings", "trials")


class Trial(NamedTuple):
    """One answer to the question.

    Args:
        name: what it has that the study's common settings have not, as "setting=value", or "as given".
        settings: of its runs, which differ by their seeds alone.
    """

    name: str
    settings: TrainSettings


class Study(NamedTuple):
    """A question, and the runs that are to answer it.

    Args:
        question: in words.
        settings: of the first trial, for what they have in common.
        seeds: of each trial: 0, 1, and so on.
        trials: in the order of the file.
    """

    question: str
    settings: TrainSettings
    seeds: int
    trials: tuple[Trial, ...]


def read(path: Path) -> Study:
    """The study in a TOML file.

    It has a `question`, the number of `seeds`, common `settings` (as of the command `train`), and a list of
    `trials`: each is a mapping from settings to a value or to a list of values, and stands for all their
    combinations.

    Raises:
        SettingsError: if the file is missing or says something else, with what is wrong and where.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the study {path}: {error}") from error
    wrong = [key for key in content if key not in _KEYS] or [key for key in _KEYS if key not in content]
    if wrong:
        raise SettingsError(f"{path}: a study has {', '.join(_KEYS)}; look at {wrong[0]!r}.")
    common, listed, seeds = content["settings"], content["trials"], content["seeds"]
    if not isinstance(seeds, int) or seeds < 1:
        raise SettingsError(f"{path}: seeds is the number of runs of each trial, at least 1; got {seeds!r}.")
    if not isinstance(common, dict) or not isinstance(listed, list) or not listed:
        raise SettingsError(
            f"{path}: settings should be a table, and trials a list of at least one, [[trials]]."
        )
    trials: list[Trial] = []
    for number, mapping in enumerate(listed, 1):
        if "seed" in common or "seed" in mapping:
            raise SettingsError(
                f"{path}, trial {number}: the seeds are counted by the study's seeds, not by seed."
            )
        for values in _combinations(mapping):
            try:
                settings = config.parsed({**common, **values}).settled()
            except CycloptsError as error:
                raise SettingsError(f"{path}, trial {number}: {' '.join(str(error).split())}") from error
            name = " ".join(f"{key}={_text(value)}" for key, value in values.items()) or "as given"
            if any(settings == trial.settings for trial in trials):
                raise SettingsError(f"{path}, trial {number}: {name} is there already.")
            trials.append(Trial(name, settings))
    return Study(content["question"], trials[0].settings, seeds, tuple(trials))


def _combinations(mapping: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every way to choose a value for each setting of a trial."""
    choices = [value if isinstance(value, list) else [value] for value in mapping.values()]
    for chosen in itertools.product(*choices):
        yield dict(zip(mapping, chosen, strict=True))


def _text(value: Any) -> str:
    """A value in the name of a trial, and of its folders."""
    if isinstance(value, list):
        return "-".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def folder_name(trial: str) -> str:
    """What the folders of a trial's runs begin with."""
    return trial.replace(" ", ",")


def named(name: str) -> Path:
    """The file of a study: a path, or a name in `experiments/studies`.

    Raises:
        SettingsError: if there is neither.
    """
    known = {path.stem: path for path in sorted(STUDIES.glob("*.toml"))}
    path = known.get(name, Path(name))
    if not path.is_file():
        raise SettingsError(f"there is no study {name!r}; give a TOML file, or one of {', '.join(known)}.")
    return path


def study(path: Path, execution: Execution, folder: Path, console: Console) -> list[grid.Failure]:
    """Train every run of a study that is missing; print the table; return the runs that failed.

    Raises:
        SettingsError: if the study is not well-formed, or its settings do not go together.
    """
    asked = read(path)
    for trial in asked.trials:
        grid.trainer(trial.settings, execution)  # Finds what is wrong before the first run.
    jobs = []
    for trial in asked.trials:
        for seed in range(asked.seeds):
            settings = dataclasses.replace(trial.settings, seed=seed)
            place = folder / f"{folder_name(trial.name)}-seed{seed}"
            jobs += grid.with_warm_start(Job(settings, place, judged_on="validation"), place / "float")
    # The folder of a float run lies in that of the run which begins at it.
    for job in sorted(jobs, key=lambda job: len(job.folder.parts)):
        runs.begin(job.folder, "train", job.settings, resume=True)
    if devices.is_first():
        names = [trial.name for trial in asked.trials]
        kept = {"question": asked.question, "trials": names, "settings": asked.settings.as_dict()}
        runs.write_json(folder / STUDY, kept)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    failures = grid.run(jobs, execution, console, lambda job: None)
    for failure in failures:
        console.print(f"failed: {failure}", style="bold red", highlight=False, soft_wrap=True)
    _print(folder, console)
    return failures


def answers(folder: Path) -> tuple[Mapping[str, Any], dict[str, list[Mapping[str, Any]]]]:
    """The question of a study's folder with its settings, and the results of each trial, one per seed."""
    kept = runs.read_json(folder / STUDY)
    rows = {
        name: [
            row
            for place in sorted(folder.glob(f"{glob.escape(folder_name(name))}-seed*/{runs.RESULT}"))
            for row in runs.read_json(place)
        ]
        for name in kept["trials"]
    }
    return kept, rows


def _print(folder: Path, console: Console) -> None:
    kept, rows = answers(folder)
    table = Table(
        title=f"{kept['question']} Accuracy in % on the validation images, after the last epoch",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("trial")
    for title in ("hard", "relaxed", "seeds"):
        table.add_column(title, justify="right")
    for name, group in rows.items():
        percent = lambda column, group=group: compare.percent(group, column)
        table.add_row(name, percent("hard_accuracy"), percent("relaxed_accuracy"), str(len(group)))
    console.print(table)
