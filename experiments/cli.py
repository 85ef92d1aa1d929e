"""The command line: `train`, `compare`, `evaluate` and `report`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts import config as cyclopts_config
from rich.console import Console

from experiments.config import CompareSettings, DivergedError, Output, SettingsError, TrainSettings

_TRAIN, _COMPARE = TrainSettings(), CompareSettings()


def _console() -> Console:
    # Where nobody looks at a screen, as in a log, a table is not to be folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140)


def train(settings: Annotated[TrainSettings, Parameter(name="*")] = _TRAIN, *, output: Output = None) -> None:
    """Train one network with one method."""
    from experiments import compare as comparison

    comparison.train(settings, output, _console())


def compare(
    settings: Annotated[CompareSettings, Parameter(name="*")] = _COMPARE, *, output: Output = None
) -> None:
    """Train a network once with each method, and compare them in a table and a picture."""
    from experiments import compare as comparison

    comparison.compare(settings, output, _console())


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


def _application() -> App:
    """The parser of the commands behind the one of `--config`."""
    app = App(
        name="python -m experiments",
        help="Train networks with binary weights and see how the methods compare.",
        version_flags=[],
        suppress_keyboard_interrupt=False,
    )
    app.meta.suppress_keyboard_interrupt = False
    for command in (train, compare, evaluate, report):
        app.command(command)

    @app.meta.default
    def launch(
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
        return _call(app, tokens)

    return app.meta


def _call(app: App, arguments: Sequence[str] | None) -> int:
    """Run a command; raise its errors; return its exit code."""
    code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    It is 2 for a wrong setting, told in one line; 1 where training diverged, or `evaluate` finds another
    accuracy than was recorded; 130 for an interrupt.
    """
    try:
        return _call(_application(), arguments)
    except (CycloptsError, SettingsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"error: training diverged. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was finished is in the run's folder.", file=sys.stderr)
        return 130
