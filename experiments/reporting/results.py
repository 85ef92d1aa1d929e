"""The results of a comparison or a study, in five files and no folder per run.

* `config.json`: what was asked for; `compare --config` takes that of a comparison.
* `environment.json`: a list of what the runs were made with, machine and versions.
* `results.csv`: a row per run; `environment` is the place in that list.
* `metrics.csv`: a row per run and measured epoch.
* `curves.png`: the picture of these.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import METHODS, SettingsError
from experiments.reporting import plots, run_folder
from experiments.reporting.run_folder import CONFIG, CURVES, ENVIRONMENT, METRICS, RESULTS, Row


class Results(NamedTuple):
    """What came of a comparison or a study.

    Args:
        config: what was asked for.
        environments: what the runs were made with.
        rows: the result of each run.
        metrics: what was measured of each run at the end of each epoch.
    """

    config: Mapping[str, Any]
    environments: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    metrics: Sequence[Row]

    @property
    def is_study(self) -> bool:
        """Whether a study was asked for, and not a comparison."""
        return "question" in self.config

    def by(self, name: str, wanted: Iterable[str] = ()) -> dict[str, list[Row]]:
        """The rows by their method or trial; those that are wanted come first, with or without rows."""
        return {each: [] for each in wanted} | by(name, self.rows)


def by(name: str, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what they have in a column, in the order in which it first comes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def gather(config: Mapping[str, Any], places: Iterable[tuple[Path, Row]]) -> Results:
    """The results of some runs, from their folders.

    Args:
        config: what was asked for.
        places: the folder of each run, and the columns that tell it from the others. Those that are not
            finished are left out.
    """
    environments: list[Any] = []
    rows, metrics = [], []
    for place, name in places:
        if not (place / RESULTS).is_file():
            continue
        made_with = run_folder.read_json(place / ENVIRONMENT)
        if made_with not in environments:
            environments.append(made_with)
        (row,) = run_folder.read_csv(place / RESULTS)
        rows.append({**name, **row, "environment": environments.index(made_with)})
        metrics += [{**name, **row} for row in run_folder.read_csv(place / METRICS)]
    return Results(config, environments, rows, metrics)


def write(folder: Path, results: Results) -> None:
    """Write all but the picture, for which there is `draw`."""
    run_folder.write_json(folder / CONFIG, results.config)
    run_folder.write_json(folder / ENVIRONMENT, results.environments)
    if results.rows:
        run_folder.write_text(folder / RESULTS, run_folder.as_csv(results.rows))
        run_folder.write_text(folder / METRICS, run_folder.as_csv(results.metrics))


def draw(folder: Path, results: Results) -> None:
    """Draw the picture."""
    name = "trial" if results.is_study else "method"
    curves = {line: list(by("seed", rows).values()) for line, rows in by(name, results.metrics).items()}
    plots.curves(folder / CURVES, curves)


def read(folder: Path) -> Results:
    """The results in a folder.

    Raises:
        SettingsError: if one of the files is missing, or does not hold what it should.
    """
    try:
        return Results(
            run_folder.read_json(folder / CONFIG),
            run_folder.read_json(folder / ENVIRONMENT),
            run_folder.read_csv(folder / RESULTS),
            run_folder.read_csv(folder / METRICS),
        )
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder} holds no results of a comparison or a study: {error}") from error


def collect(source: Path, target: Path) -> None:
    """Copy the results of a comparison or a study that is finished.

    Args:
        source: its folder, with those of its runs.
        target: the folder to write, replaced if it is there.

    Raises:
        SettingsError: if there are no results, or some run of a method or trial is missing.
    """
    results = read(source)
    asked = results.config
    if results.is_study:
        name, wanted = "trial", list(asked["trials"])
    else:
        name, wanted = "method", list(METHODS if asked["methods"] == ["all"] else asked["methods"])
    groups = results.by(name)
    for each in wanted:
        seeds = sorted(row["seed"] for row in groups.get(each, ()))
        if seeds != list(range(asked["seeds"])):
            raise SettingsError(
                f"{source} is not complete: {each} has the seeds {seeds}, not all {asked['seeds']}."
            )
    target.mkdir(parents=True, exist_ok=True)
    write(target, results)
    draw(target, results)


def folders(root: Path, *, studies: bool) -> list[Path]:
    """The folders of studies, or of comparisons, in another."""
    found = sorted(path.parent for path in root.glob(f"*/{RESULTS}"))
    return [folder for folder in found if read(folder).is_study == studies]
