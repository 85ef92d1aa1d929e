"""The command `study`: a question put to the validation images, by runs that differ in a few settings."""

import dataclasses
import itertools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import rich.box
from rich.console import Console
from rich.table import Table

from experiments import config
from experiments.config import Execution, SettingsError, TrainSettings
from experiments.data import devices
from experiments.reporting import results, tables
from experiments.training import jobs
from experiments.training.begin import begin
from experiments.training.jobs import Job

STUDIES = Path(__file__).parent.parent / "studies"
_KEYS = ("question", "seeds", "settings", "trials")


class Trial(NamedTuple):
    """One answer to the question.

    Args:
        name: what it has that the study's common settings have not, as "setting=value", or "as given".
        settings: of its runs, which differ by their seeds alone.
        overrides: those of the settings that it has of its own.
    """

    name: str
    settings: TrainSettings
    overrides: Mapping[str, Any]


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
    combinations. The common settings may hold `overrides` by method, which give way to those of a trial.

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
    common = dict(common)
    overrides = common.pop("overrides", {})
    trials: list[Trial] = []
    for number, mapping in enumerate(listed, 1):
        if "seed" in common or "seed" in mapping:
            raise SettingsError(
                f"{path}, trial {number}: the seeds are counted by the study's seeds, not by seed."
            )
        for values in _combinations(mapping):
            method = values.get("method", common.get("method", TrainSettings.method))
            try:
                settings = config.parsed({**common, **overrides.get(method, {}), **values})
            except SettingsError as error:
                raise SettingsError(f"{path}, trial {number}: {error}") from error
            name = " ".join(f"{key}={_text(value)}" for key, value in values.items()) or "as given"
            if any(settings == trial.settings for trial in trials):
                raise SettingsError(f"{path}, trial {number}: {name} is there already.")
            trials.append(Trial(name, settings, values))
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


def place_of(folder: Path, trial: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / f"{trial.replace(' ', ',')}-seed{seed}"


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


def study(path: Path, execution: Execution, folder: Path, console: Console) -> list[jobs.Failure]:
    """Train every run of a study that is missing; print the table; return the runs that failed.

    Raises:
        SettingsError: if the study is not well-formed, or its settings do not go together.
    """
    asked = read(path)
    for trial in asked.trials:
        jobs.trainer(trial.settings, execution)  # Finds what is wrong before the first run.
    planned = []
    for trial in asked.trials:
        for seed in range(asked.seeds):
            settings = dataclasses.replace(trial.settings, seed=seed)
            place = place_of(folder, trial.name, seed)
            job = Job(settings, place, judged_on="validation")
            planned += jobs.with_warm_start(job, settings.float_start(), place / "float")
    # The folder of a float run lies in that of the run which begins at it.
    for job in sorted(planned, key=lambda job: len(job.folder.parts)):
        begin(job.folder, "train", job.settings, resume=True)
    console.print(f"Folder:  {folder}", soft_wrap=True, highlight=False)
    failures = jobs.run(planned, execution, folder, console, lambda job: gather(asked, folder))
    for failure in failures:
        console.print(f"failed: {failure}", style="bold red", highlight=False, soft_wrap=True)
    answers = gather(asked, folder)
    if answers.rows and devices.is_first():
        results.draw(folder, answers)
    _print(answers, console)
    return failures


def gather(asked: Study, folder: Path) -> results.Results:
    """Write the results of a study from the folders of its runs; return them."""
    config = {
        "question": asked.question,
        "seeds": asked.seeds,
        "settings": asked.settings.as_dict(),
        "trials": {trial.name: trial.overrides for trial in asked.trials},
    }
    runs = [(trial.name, seed) for trial in asked.trials for seed in range(asked.seeds)]
    gathered = results.gather(
        config, [(place_of(folder, name, seed), {"trial": name, "seed": seed}) for name, seed in runs]
    )
    if devices.is_first():
        results.write(folder, gathered)
    return gathered


def _print(answers: results.Results, console: Console) -> None:
    table = Table(
        title=f"{answers.config['question']} Accuracy in % on the validation images, after the last epoch",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("trial")
    for title in ("quantized", "relaxed", "seeds"):
        table.add_column(title, justify="right")
    for name, group in answers.by("trial", answers.config["trials"]).items():
        percent = lambda column, group=group: tables.percent(group, column)
        table.add_row(name, percent("hard_accuracy"), percent("relaxed_accuracy"), str(len(group)))
    console.print(table)
