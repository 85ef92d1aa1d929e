"""The tables of the documentation, written from the kept measurements.

Run it with `python -m benchmarks.report`, after a benchmark has written the file that a table is from.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import flips, holding, optimum, theorems
from experiments.reporting.pages import between

ROOT = Path(__file__).parent.parent


class Part(NamedTuple):
    """A part of a page.

    Args:
        page: the file that it is in.
        name: in the marks that it stands between.
        results: what a benchmark wrote.
        lines: the part's lines, from the rows of that.
    """

    page: Path
    name: str
    results: Path
    lines: Callable[[list[dict[str, Any]]], list[str]]


def updated(text: str, part: Part) -> str:
    """A page with a part between its two marks written anew.

    Raises:
        SettingsError: if the page lacks the marks.
    """
    begin = f"<!-- {part.name}: begin (written by `python -m benchmarks.report`) -->"
    lines = part.lines(json.loads(part.results.read_text()))
    return between(text, begin, f"<!-- {part.name}: end -->", ["\n".join(lines)])


def _training(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table of training, and what was measured how."""
    first = rows[0]
    yield (
        f"{first['devices']} device of kind {first['device_kind']}, jax {first['jax']}; width "
        f"{first['width']:g}, {first['precision']}, batches of {first['batch_size']}; {first['rounds']} "
        f"rounds of {first['steps']} steps; medians, and in brackets the least and the most of the rounds:"
    )
    yield ""
    scanned = any("scanned_to_single" in row for row in rows)
    yield (
        "| network | method | images/s | share of the peak | memory of a step, MB "
        "| optimizer's share of the step | time against float |"
        + (f" {first['steps']} steps in one call against single ones |" if scanned else "")
    )
    yield "|---|---|--:|--:|--:|--:|--:|" + ("--:|" if scanned else "")
    for row in rows:
        cells = (
            row["model"],
            row["method"],
            f"{row['images_per_second']:.0f}",
            f"{row['utilisation']:.1%}",
            f"{row['memory_bytes'] / 1e6:.1f}",
            _spread(row, "optimizer_share", ".2%"),
            "1" if row["method"] == "float" else _spread(row, "ratio_to_float", ".2f"),
        )
        if scanned:
            cells += (_spread(row, "scanned_to_single", ".2f") if "scanned_to_single" in row else "-",)
        yield f"| {' | '.join(cells)} |"


def _spread(row: dict[str, Any], name: str, form: str) -> str:
    """A median with the least and the most."""
    median, least, most = (format(row[name + end], form) for end in ("", "_least", "_most"))
    return f"{median} ({least} to {most})"


_DOCS, _RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PARTS = (
    *(
        Part(_DOCS / "benchmarks.md", name, _RESULTS / f"{name}.json", lambda rows: [*_training(rows)])
        for name in ("training-cpu", "training-gpu")
    ),
    Part(_DOCS / "theory.md", "theorems", theorems.RESULTS, theorems.table),
    Part(_DOCS / "theory.md", "optimum", optimum.RESULTS, optimum.table),
    Part(_DOCS / "benchmarks.md", "flips", flips.RESULTS, flips.table),
    Part(_DOCS / "benchmarks.md", "holding", holding.RESULTS, holding.table),
)


def main() -> None:
    """Write every part anew, in place."""
    for part in PARTS:
        part.page.write_text(updated(part.page.read_text(), part))


if __name__ == "__main__":
    main()
