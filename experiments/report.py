"""The README's table of results, written from the kept runs."""

from collections.abc import Sequence
from pathlib import Path

from experiments import runs
from experiments.compare import by_method, cells
from experiments.config import SettingsError

ROOT = Path(__file__).parent.parent
_BEGIN = "<!-- results: begin (written by `python -m experiments report`) -->"
_END = "<!-- results: end -->"


def updated(text: str, results: Path = ROOT / "experiments" / "results") -> str:
    """A page with the part between its two marks written anew.

    Args:
        text: the page.
        results: a folder of folders of `compare` runs.

    Raises:
        SettingsError: if the page lacks the marks.
    """
    parts = [_section(path.parent) for path in sorted(results.glob(f"*/{runs.RESULT}"))]
    return between(text, _BEGIN, _END, parts)


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


def _section(folder: Path) -> str:
    """One comparison: what was run on what, the table and the picture."""
    rows = runs.read_json(folder / runs.RESULT)
    settings = runs.read_json(folder / runs.CONFIG)
    environment = runs.read_json(folder / runs.ENVIRONMENT)
    groups = by_method(rows)
    place = folder.relative_to(ROOT).as_posix()
    lines = [
        f"**{settings['model']} on {settings['dataset']}**, {settings['epochs']} epochs, batches of "
        f"{settings['batch_size']}; accuracy in % on the test images, after the last epoch; mean and "
        f"standard deviation over {settings['seeds']} seeds on one split; "
        f"{environment['machine']}, jax {environment['packages']['jax']}. `python -m experiments compare "
        f"--config {place}/{runs.CONFIG}`:",
        "",
        "| method | hard (binary) | relaxed (as trained) | hard, running statistics "
        "| relaxed, running statistics | binary weights | bytes, float | bytes, packed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(f"| {' | '.join(cells(method, group))} |" for method, group in groups.items()),
    ]
    if (folder / runs.CURVES).is_file():
        lines += ["", f"![Accuracy, gap and sign flips over the epochs]({place}/{runs.CURVES})"]
    return "\n".join(lines)


def write(page: Path) -> None:
    """Write a page's table anew, in place."""
    page.write_text(updated(page.read_text()))
