"""The command line: what each command takes, and where it is carried out."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts import config as cyclopts_config
from rich.console import Console

from experiments import config
from experiments.config import (
    CompareSettings,
    DivergedError,
    Execution,
    Output,
    Reading,
    RecipeName,
    Resume,
    SettingsError,
    StoppedError,
    TableSettings,
    TrainSettings,
    updated,
)

RECIPES = Path(__file__).parent / "recipes"
_TRAIN, _COMPARE, _TABLE = TrainSettings(), CompareSettings(), TableSettings()
_AGAIN = "To go on, give the same command again; train and compare want the folder as --output, and --resume."
_EXECUTION, _READING = Execution(), Reading()


def _console(*, quiet: bool = False) -> Console:
    # Where nobody looks at a screen, as in a log, a table is not to be folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140, quiet=quiet)


def _joined(execution: Execution) -> Console:
    """The console of one of the processes that train together: only the first talks."""
    from experiments import devices

    devices.connect(execution)
    return _console(quiet=not devices.is_first())


def train(
    settings: Annotated[TrainSettings, Parameter(name="*")] = _TRAIN,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Output = None,
    resume: Resume = False,
) -> None:
    """Train one network with one method."""
    from experiments import compare as comparison

    comparison.train(settings, execution, output, _joined(execution), resume=resume)


def compare(
    settings: Annotated[CompareSettings, Parameter(name="*")] = _COMPARE,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Output = None,
    resume: Resume = False,
) -> int:
    """Train a network with each method, and compare them in a table and a picture."""
    settings.chosen()
    from experiments import compare as comparison

    return 1 if comparison.compare(settings, execution, output, _joined(execution), resume=resume) else 0


def table(
    settings: Annotated[TableSettings, Parameter(name="*")] = _TABLE,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Annotated[Path, Parameter(help="Folder of the table; what is finished in it stays.")] = Path(
        "runs/table"
    ),
) -> int:
    """Compare methods on several image sets and networks: train what is missing, and write one table."""
    settings.comparisons()
    settings.chosen()
    from experiments import table as tables

    return 1 if tables.table(settings, execution, output, _joined(execution)) else 0


def study(
    name: str,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Path | None = None,
) -> int:
    """Put a question to the validation images: train what a study lists, and leave the test images alone.

    Parameters
    ----------
    name
        A TOML file of a study, or the name of one in experiments/studies.
    output
        Folder for the results, by default runs/ and the study's name; what is finished in it stays.
    """
    from experiments import study as studies

    path = studies.named(name)
    folder = Path("runs") / path.stem if output is None else output
    return 1 if studies.study(path, execution, folder, _joined(execution)) else 0


def evaluate(
    path: Path,
    *,
    dataset: config.DatasetName | None = None,
    reading: Annotated[Reading, Parameter(name="*")] = _READING,
) -> int:
    """Measure packed binary networks anew, from their files alone.

    Parameters
    ----------
    path
        A packed file, or the folder of a run of train, compare or table.
    dataset
        Image set to measure on; by default that of the training.
    """
    from experiments import inference

    rows = inference.evaluate(path, dataset, reading, _console())
    return 0 if all(row["same"] for row in rows) else 1


def inspect(file: Path) -> None:
    """Say what a packed file holds, layer by layer.

    Parameters
    ----------
    file
        A file of stam_jax.save_packed, such as a run's packed.safetensors.
    """
    from experiments import inference

    inference.inspect(file, _console())


def predict(file: Path, pictures: Annotated[tuple[Path, ...], Parameter(negative="")]) -> None:
    """Say what pictures show, by a packed network.

    Parameters
    ----------
    file
        A run's packed.safetensors.
    pictures
        Pictures of any size and kind; their middle is resized to what the network reads.
    """
    from experiments import inference

    inference.predict(file, pictures, _console())


def export(
    file: Path,
    *,
    to: config.Form,
    output: Path,
    license_: Annotated[str | None, Parameter(name="--license")] = None,
    reading: Annotated[Reading, Parameter(name="*")] = _READING,
) -> None:
    """Write a packed network for other programs: a StableHLO or ONNX file, or a folder for a model hub.

    Parameters
    ----------
    file
        A run's packed.safetensors.
    to
        What to write.
    output
        File to write, replaced if it is there; or folder, which must be new or empty.
    license_
        License that the folder's model card names; by default none.
    """
    from experiments import export as exporting

    exporting.export(file, to, output, license_, reading, _console())


def prepare(
    dataset: config.DatasetName,
    *,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    reading: Annotated[Reading, Parameter(name="*")] = _READING,
) -> None:
    """Prepare an image set for reading: download it, or take the release's own files.

    Parameters
    ----------
    dataset
        Which one.
    from_
        The release's tarball, or the folder of its extracted files; downloaded by default.
    """
    if dataset == "digits":
        raise SettingsError("--dataset digits needs no preparation: scikit-learn brings it.")
    from experiments import prepared

    folder = prepared.prepare(dataset, reading.data_dir, from_)
    _console().print(f"Prepared: {folder}", soft_wrap=True, highlight=False)


def report(*pages: Path) -> None:
    """Write the results on pages from the runs kept under experiments/results.

    Parameters
    ----------
    pages
        Markdown pages with marks between which the results stand; by default README.md and docs/results.md.
    """
    from experiments import report as reporting

    for page in pages or reporting.PAGES:
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
    for command in (train, compare, table, study, evaluate, inspect, predict, export, report, prepare):
        app.command(command)

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None,
            Parameter(help="JSON file of settings, such as a run's config.json; options override it."),
        ] = None,
        recipe: RecipeName = None,
    ) -> int:
        sources = []
        if config is not None:
            try:
                values = updated(json.loads(config.read_text()))
            except (OSError, ValueError, AttributeError) as error:
                raise SettingsError(f"--config: cannot read {config}: {error}") from error
            sources.append(cyclopts_config.Dict(values, source=str(config), use_commands_as_keys=False))
        if recipe is not None:
            known = sorted(path.stem for path in RECIPES.glob("*.toml"))
            if recipe not in known:
                raise SettingsError(f"--recipe: there is no {recipe!r}; choose from {', '.join(known)}.")
            path = RECIPES / f"{recipe}.toml"
            sources.append(cyclopts_config.Toml(path, must_exist=True, use_commands_as_keys=False))
        app.config = tuple(sources)
        return _call(app, tokens)

    return app.meta


def _call(app: App, arguments: Sequence[str] | None) -> int:
    """Run a command; raise its errors; return its exit code."""
    code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    It is 2 for a wrong setting, told in one line; 1 where training diverged, or `evaluate` finds another
    accuracy than was recorded, or some runs of several failed; 130 for an interrupt; 143 where the process
    was asked to stop and saved its state.
    """
    try:
        return _call(_application(), arguments)
    except (CycloptsError, SettingsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"error: training diverged. {error}", file=sys.stderr)
        return 1
    except StoppedError as error:
        print(f"{error}; the state is saved. {_AGAIN}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"interrupted. {_AGAIN}", file=sys.stderr)
        return 130
