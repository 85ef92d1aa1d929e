"""The command line: what each command takes, and where it is carried out."""

import json
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, CycloptsError, Group, Parameter
from cyclopts import config as cyclopts_config
from rich.console import Console

from experiments import config
from experiments.config import (
    OUTPUT,
    CompareSettings,
    DivergedError,
    Execution,
    Output,
    Reading,
    Resume,
    SettingsError,
    Sources,
    StoppedError,
    TableSettings,
    TrainSettings,
)

RECIPES = Path(__file__).parent / "recipes"
_TRAIN, _COMPARE, _TABLE = TrainSettings(), CompareSettings(), TableSettings()
_EXECUTION, _READING, _SOURCES = Execution(), Reading(), Sources()


def _console(*, quiet: bool = False) -> Console:
    # Where nobody looks at a screen, as in a log, a table is not to be folded to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140, quiet=quiet)


def _joined(execution: Execution) -> Console:
    """The console of one of the processes that train together: only the first talks."""
    print("Starting JAX ...", file=sys.stderr, flush=True)  # It takes seconds.
    from experiments.data import devices

    devices.connect(execution)
    return _console(quiet=not devices.is_first())


def train(
    settings: Annotated[TrainSettings, Parameter(name="*")] = _TRAIN,
    sources: Annotated[Sources, Parameter(name="*")] = _SOURCES,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Output = None,
    resume: Resume = False,
) -> None:
    """Train one network with one method."""
    from experiments.training import compare as comparison

    comparison.train(settings, execution, output, _joined(execution), resume=resume)


def compare(
    settings: Annotated[CompareSettings, Parameter(name="*")] = _COMPARE,
    sources: Annotated[Sources, Parameter(name="*")] = _SOURCES,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Output = None,
    resume: Resume = False,
) -> int:
    """Train a network with each method, and compare them in a table and a picture."""
    settings.chosen()
    from experiments.training import compare as comparison

    return 1 if comparison.compare(settings, execution, output, _joined(execution), resume=resume) else 0


def table(
    settings: Annotated[TableSettings, Parameter(name="*")] = _TABLE,
    sources: Annotated[Sources, Parameter(name="*")] = _SOURCES,
    execution: Annotated[Execution, Parameter(name="*")] = _EXECUTION,
    *,
    output: Annotated[Path, Parameter(help="Folder of the table; what is finished in it stays.")] = Path(
        "runs/table"
    ),
) -> int:
    """Compare methods on several image sets and networks: train what is missing, and write one table."""
    settings.comparisons()
    settings.chosen()
    from experiments.training import table as tables

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
    from experiments.training import study as studies

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
    from experiments.deployment import evaluate as measure

    rows = measure.evaluate(path, dataset, reading, _console())
    return 0 if all(row["same"] for row in rows) else 1


def inspect(file: Path) -> None:
    """Say what a packed file holds, layer by layer.

    Parameters
    ----------
    file
        A file of stam_jax.save_packed, such as a run's packed.safetensors.
    """
    from experiments.deployment import inspect as look

    look.inspect(file, _console())


def predict(file: Path, pictures: Annotated[tuple[Path, ...], Parameter(negative="")]) -> None:
    """Say what pictures show, by a packed network.

    Parameters
    ----------
    file
        A run's packed.safetensors.
    pictures
        Pictures of any size and kind; their middle is resized to what the network reads.
    """
    from experiments.deployment import predict as prediction

    prediction.predict(file, pictures, _console())


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
    from experiments.deployment import export as exporting

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
    from experiments.data import tfds

    folder = tfds.prepare(dataset, reading.data_dir, from_)
    _console().print(f"Prepared: {folder}", soft_wrap=True, highlight=False)


def report(*pages: Path) -> None:
    """Write the results on pages from what is kept under experiments/results.

    Parameters
    ----------
    pages
        Markdown pages with marks between which the results stand; by default README.md and docs/results.md.
    """
    from experiments.reporting import pages as writing

    for page in pages or writing.PAGES:
        if not page.is_file():
            raise SettingsError(f"There is no page {page}.")
        writing.write(page)


def collect(*folders: Path, output: Annotated[Path | None, OUTPUT] = None) -> None:
    """Keep the results of finished comparisons and studies, without the folders of their runs.

    Parameters
    ----------
    folders
        Folders of compare or study, or of a comparison in one of table.
    output
        Folder to keep them in, by default experiments/results, each by the name of its folder; one that is
        there is replaced.
    """
    if not folders:
        raise SettingsError("collect: name the folders of comparisons or studies.")
    from experiments.reporting import pages, results

    for folder in folders:
        target = (output or pages.RESULTS) / folder.name
        results.collect(folder, target)
        _console().print(f"Kept: {target}", soft_wrap=True, highlight=False)


_COMMANDS = {
    "Train": (train, compare, table, study),
    "Use a trained network": (evaluate, inspect, predict, export),
    "Images and results": (prepare, collect, report),
}


def _application() -> App:
    """The parser of the commands."""
    app = App(
        name="python -m experiments",
        help="Train networks with quantized weights and see how the methods compare.",
        version_flags=[],
        suppress_keyboard_interrupt=False,
        config=_read_files,
    )
    for place, (title, commands) in enumerate(_COMMANDS.items()):
        group = Group(title, sort_key=place)
        for command in commands:
            app.command(command, group=group)
    return app


def _read_files(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Take from files what the command line does not say: what Cyclopts calls before it converts values.

    Raises:
        SettingsError: if there is no such file, or it cannot be read.
    """

    def said(option: str) -> str | None:
        tokens = arguments.get(option).tokens if option in arguments else ()
        return tokens[-1].value if tokens else None

    def take(source: str, values: Mapping[str, Any]) -> None:
        # Without a value, as JSON says it, a setting has its default.
        given = {name: value for name, value in values.items() if value is not None}
        cyclopts_config.Dict(given, source=source, use_commands_as_keys=False)(app, commands, arguments)

    if (path := said("--config")) is not None:
        try:
            take(path, json.loads(Path(path).read_text()))
        except (OSError, ValueError, AttributeError) as error:
            raise SettingsError(f"--config: cannot read {path}: {error}") from error
    if (recipe := said("--recipe")) is not None:
        values = _recipe(recipe)
        if commands == ("train",):
            # One run has one method: what that has of its own is as any other setting.
            overrides = values.pop("overrides", {})
            values |= overrides.get(said("--method") or TrainSettings.method, {})
        take(f"{recipe}.toml", values)


def _recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        SettingsError: if there is none of that name.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name not in known:
        raise SettingsError(f"--recipe: there is no {name!r}; choose from {', '.join(known)}.")
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


def _call(app: App, arguments: Sequence[str] | None) -> int:
    """Run a command; raise its errors; return its exit code."""
    code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return code or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    It is 2 for a wrong setting, told in one line; 1 where training diverged, or `evaluate` finds another
    accuracy than was recorded, or some runs of several failed; 130 or 143 where Ctrl-C or SIGTERM asked it to
    stop.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _call(_application(), given)
    except (CycloptsError, SettingsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"error: training diverged. {error}", file=sys.stderr)
        return 1
    except StoppedError as error:
        print(f"{error}. To go on:\n  {_again(given, error.folder)}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _again(given: Sequence[str], folder: Path) -> str:
    """The command that goes on with what was stopped."""
    command = ["python", "-m", "experiments", *given]
    if not any(each.split("=")[0] == "--output" for each in given):
        command += ["--output", str(folder)]
    if given[0] in ("train", "compare") and "--resume" not in given:
        command.append("--resume")
    return shlex.join(command)
