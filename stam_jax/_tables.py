"""Tables as text."""

from collections.abc import Collection, Sequence


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str]) -> list[str]:
    """The lines of a table: its head, a rule and its rows, those columns to the right whose titles say so."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(
            cell.rjust(width) if title in right else cell.ljust(width)
            for cell, width, title in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in [head, rule, *rows]
    ]
