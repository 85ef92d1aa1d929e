"""What the benchmarks with options have in common: their command line."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, CycloptsError

from experiments.config import SettingsError


def run(name: str, benchmark: Callable[..., Any], arguments: Sequence[str] | None) -> int:
    """Run a benchmark with the options given; return the exit code, 2 for a wrong setting."""
    app = App(name=name, default_command=benchmark, version_flags=[], suppress_keyboard_interrupt=False)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, SettingsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
