"""The command `inspect`: what a packed file holds."""

from pathlib import Path

from rich.console import Console

import stam_jax
from experiments.config import SettingsError


def inspect(path: Path, console: Console) -> None:
    """Print what a packed file holds, and what it says of itself.

    Raises:
        SettingsError: if it cannot be read.
    """
    try:
        table, metadata = stam_jax.tabulate(stam_jax.load_packed(path)), stam_jax.packed_metadata(path)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise SettingsError(str(error)) from error
    console.print(str(table), soft_wrap=True, highlight=False, markup=False)
    said = {name: value for name, value in metadata.items() if not isinstance(value, dict | list)}
    # What a file says of itself may hold what a terminal obeys.
    words = ", ".join(f"{name} {value}" for name, value in said.items())
    words = "".join(letter if letter.isprintable() else "?" for letter in words)
    size = path.stat().st_size
    console.print(
        f"The file has {size:,} bytes; its arrays whole have {table.nbytes_whole:,}. "
        f"It says of itself: {words or 'nothing'}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
