"""The parts of the README and of the page of results that are written from the kept results."""

import os
import statistics
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import SettingsError
from experiments.reporting import results as kept
from experiments.reporting.run_folder import CONFIG, CURVES
from experiments.reporting.tables import cells, headline

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
# What the headline compares.
_COMPARISONS = ("cifar10-resnet8", "cifar10-vgg16", "cifar10-vgg16-full-width")
_BINARY = ("binary_connect", "parq", "md_tanh", "linear_blend", "stam")
PUBLISHED = ROOT / "experiments" / "published.toml"


def updated(text: str, page: Path, results: Path = RESULTS) -> str:
    """A page with each part that it has the marks of written anew.

    Args:
        text: of the page.
        page: its file, for the links.
        results: a folder with the folders of comparisons and studies.

    Raises:
        SettingsError: if the page has the marks of no part, or only one of a part's two.
    """
    parts = [name for name in _PARTS if f"<!-- {name}: " in text]
    if not parts:
        raise SettingsError(f"{page} holds the marks of no part; there are {', '.join(_PARTS)}.")
    for name in parts:
        begin = f"<!-- {name}: begin (written by `python -m experiments report`) -->"
        sections = ["\n".join(lines) for lines in _PARTS[name](results, page)]
        text = between(text, begin, f"<!-- {name}: end -->", sections)
    return text


def between(text: str, begin: str, end: str, parts: Sequence[str]) -> str:
    """A page with what stands between two marks replaced by other parts.

    Raises:
        SettingsError: if the page lacks the marks.
    """
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise SettingsError(f"The page holds no part from {begin!r} to {end!r}.")
    return before + "\n\n".join([begin, *parts, end]) + after


def write(page: Path) -> None:
    """Write a page's parts anew, in place."""
    page.write_text(updated(page.read_text(), page, RESULTS))


def _network(settings: Mapping[str, Any]) -> str:
    """A comparison's network and images, in words."""
    width = "" if settings["width"] == 1 else f" at width {settings['width']:g}"
    count = settings.get("training_images")  # Results from before there was a choice are of all.
    images = "" if count is None else f"{count:,} images of "
    return f"{settings['model']}{width} on {images}{settings['dataset']}"


def _scope(settings: Mapping[str, Any]) -> str:
    """Which kernels are quantized, and how, in words."""
    # The embedding of a transformer is left in float without being asked for.
    excluded = [*(["embed"] if settings["model"] == "vit6" else []), *settings["exclude"]]
    which = f"all kernels but {' and '.join(excluded)}" if excluded else "every kernel"
    return f"{which} {_quantizer(settings)}"


def _quantizer(settings: Mapping[str, Any]) -> str:
    """The quantizer's name: binary, for what others report."""
    return settings.get("quantizer", "binary")


def _headline(results: Path, page: Path) -> Iterator[list[str]]:
    """A row per method of the headline and a column per comparison of it, the best binary network in bold."""
    found = [kept.read(results / name) for name in _COMPARISONS]
    groups = [each.by("method") for each in found]
    best = [max(_BINARY, key=lambda method: _accuracy(each.get(method, ()))) for each in groups]
    titles = (f"{_network(each.config)},<br>{each.config['epochs']} epochs" for each in found)

    def cell(method: str, column: int) -> str:
        said = headline(groups[column].get(method, ()))
        return f"**{said}**" if method == best[column] else said

    yield [
        f"| method | {' | '.join(titles)} |",
        f"|---|{'--:|' * len(found)}",
        *(
            f"| {method} | {' | '.join(cell(method, column) for column in range(len(found)))} |"
            for method in ("float", *_BINARY)
        ),
    ]


def _accuracy(group: Sequence[Mapping[str, Any]]) -> float:
    """The mean accuracy of the binary networks of a method, -1 if there are none."""
    return statistics.mean(row["hard_accuracy"] for row in group) if group else -1.0


def _tables(results: Path, page: Path) -> Iterator[list[str]]:
    """Each comparison: what was run on what, the table and the picture."""
    for folder in kept.folders(results, studies=False):
        found = kept.read(folder)
        settings = found.config
        made_with = {f"{each['machine']}, jax {each['packages']['jax']}": None for each in found.environments}
        place = folder.relative_to(ROOT).as_posix()
        yield [f"### {_network(settings)}, {_scope(settings)}"]
        yield [
            f"{settings['epochs']} epochs, batches of {settings['batch_size']}, {settings['precision']}; "
            f"{'; '.join(made_with)}; `python -m experiments compare --config {place}/{CONFIG}`"
        ]
        yield [
            "| method | quantized | running statistics | quantized weights | bytes, float | bytes, packed |",
            "|---|--:|--:|--:|--:|--:|",
            *(_row(method, group) for method, group in found.by("method").items()),
        ]
        if (folder / CURVES).is_file():
            yield [f"![Accuracy, gap and sign flips over the epochs]({_link(folder / CURVES, page)})"]


def _row(method: str, group: Sequence[Mapping[str, Any]]) -> str:
    """A method's row of a comparison; the accuracies of `float` are those of the float network."""
    name, hard, relaxed, hard_running, relaxed_running, *sizes = cells(f"{method} ({len(group)})", group)
    accuracies = (relaxed, relaxed_running) if group[0]["hard_accuracy"] is None else (hard, hard_running)
    return f"| {' | '.join((name, *accuracies, *sizes))} |"


def _link(target: Path, page: Path) -> str:
    """Where a file is, seen from a page."""
    return Path(os.path.relpath(target, page.absolute().parent)).as_posix()


def _published(results: Path, page: Path) -> Iterator[list[str]]:
    """What others report, beside what comes of the same network in the same scope here."""
    ours = []
    for folder in kept.folders(results, studies=False):
        found = kept.read(folder)
        ours.append((found.config, headline(found.by("method").get("stam", ()))))
    lines = []
    for entry in tomllib.loads(PUBLISHED.read_text())["published"]:
        same = [
            f"{accuracy}, {settings['epochs']} epochs"
            for settings, accuracy in ours
            if settings["width"] == 1
            and settings.get("training_images") is None
            and _quantizer(settings) == "binary"
            and all(settings[key] == entry[key] for key in ("model", "dataset", "exclude"))
        ]
        lines.append(
            f"| {entry['model']} | {entry['dataset']} | {_scope(entry)} | {entry['accuracy']} "
            f"| [{entry['source']}]({entry['link']}) | {entry['selection']} "
            f"| {'; '.join(same) or 'not run'} |"
        )
    yield [
        "| network | images | scope | published | source | which epoch, which seeds | `stam` here |",
        "|---|---|---|--:|---|---|--:|",
        *lines,
    ]


_PARTS: Mapping[str, Callable[[Path, Path], Iterator[list[str]]]] = {
    "headline": _headline,
    "comparisons": _tables,
    "published": _published,
}
