"""The table of docs/benchmarks.md, written from the kept measurements.

Run it with `python -m benchmarks.report`, after `python -m benchmarks.training --output FILE` has written the
file that the table is from.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.report import between

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results" / "training-cpu.json"
_BEGIN = "<!-- training: begin (written by `python -m benchmarks.report`) -->"
_END = "<!-- training: end -->"


def updated(text: str, results: Path = RESULTS) -> str:
    """The page with the part between its two marks written anew.

    Args:
        text: the page.
        results: what `benchmarks.training` wrote.

    Raises:
        SettingsError: if the page lacks the marks.
    """
    return between(text, _BEGIN, _END, ["\n".join(_table(json.loads(results.read_text())))])


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the table, and what was measured how."""
    first = rows[0]
    yield (
        f"{first['devices']} device of kind {first['device_kind']}, jax {first['jax']}; width "
        f"{first['width']:g}, {first['precision']}, batches of {first['batch_size']}; {first['rounds']} "
        f"rounds of {first['steps']} steps; medians, and in brackets the least and the most of the rounds:"
    )
    yield ""
    yield (
        "| network | method | images/s | share of the peak | memory of a step, MB "
        "| optimiser's share of the step | time against float |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|"
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
        yield f"| {' | '.join(cells)} |"


def _spread(row: dict[str, Any], name: str, form: str) -> str:
    """A median with the least and the most."""
    median, least, most = (format(row[name + end], form) for end in ("", "_least", "_most"))
    return f"{median} ({least} to {most})"


def main() -> None:
    """Write the page anew, in place."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
