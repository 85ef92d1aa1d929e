"""The command line: `train`, `compare`, `evaluate` and `report`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts import config as cyclopts_config
from rich.console import Console

from experiments.config import CompareSettings, Output, SettingsError, TrainSettings

app = App(
    name="python -m experiments",
    help="Train networks with binary weights and see how the methods compare.",
    help_on_error=False,
    version_flags=[],
)

_TRAIN, _COMPARE = TrainSettings(), CompareSettings()


def _console() -> Console:
    # Where nobody looks at a screen, as in a log, a table is not to be folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140)


@app.command
def train(settings: Annotated[TrainSettings, Parameter(name="*")] = _TRAIN, *, output: Output = None) -> None:
    """Train one network with one method."""
    from experiments import compare as comparison

    comparison.train(settings, output, _console())


@app.command
def compare(
    settings: Annotated[CompareSettings, Parameter(name="*")] = _COMPARE, *, output: Output = None
) -> None:
    """Train a network once with each method, and compare them in a table and a picture."""
    from experiments import compare as comparison

    comparison.compare(settings, output, _console())


@app.command
def evaluate(folder: Path) -> int:
    """Measure the packed binary networks of a run anew, from their files alone.

    Parameters
    ----------
    folder
        Folder of a run of train or compare.
    """
    from experiments import compare as comparison

    rows = comparison.evaluate(folder, _console())
    return 0 if all(row["same"] for row in rows) else 1


@app.command
def report(page: Path = Path("README.md")) -> None:
    """Write the table of results of a page from the runs kept under experiments/results.

    Parameters
    ----------
    page
        Markdown page with the marks between which the table stands.
    """
    from experiments import report as reporting

    if not page.is_file():
        raise SettingsError(f"There is no page {page}.")
    reporting.write(page)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(help="JSON file of settings, such as a run's config.json; options override it."),
    ] = None,
) -> int:
    if config is not None:
        try:
            json.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"--config: cannot read {config}: {error}") from error
        app.config = (cyclopts_config.Json(config, must_exist=True, use_commands_as_keys=False),)
    else:
        app.config = ()
    return app(tokens, exit_on_error=False, print_error=False, result_action="return_value") or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for a wrong setting, told in one line."""
    try:
        return app.meta(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except (CycloptsError, SettingsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
