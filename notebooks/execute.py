"""Run the notebooks from their `.py` files, and write the `.ipynb` files with what comes out.

    python notebooks/execute.py              all of them
    python notebooks/execute.py 01 03        those whose names begin so

It takes `pip install -e ".[dev]"`. Notebooks run in an empty folder, so that the files they write are gone.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# What a notebook says of itself: nothing that changes with the machine.
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources(names: list[str] | None = None) -> list[Path]:
    """The notebooks' `.py` files, in order; those whose names begin with one of some texts, if given."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def read(path: Path) -> Any:
    """The notebook of a `.py` file, without outputs."""
    import jupytext

    notebook = jupytext.read(path)
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
        cell.metadata.clear()
    return notebook


def execute(notebook: Any, *, timeout: int = 300) -> Any:
    """A notebook, run in an empty folder.

    Args:
        notebook: what `read` returns; the outputs are put into it.
        timeout: seconds for each cell.

    Returns:
        The same notebook.
    """
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute()
    # The client writes down which Python it was.
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    return notebook


def main() -> None:
    """Run the notebooks named on the command line."""
    import nbformat

    for path in sources(sys.argv[1:]):
        start = time.perf_counter()
        notebook = execute(read(path))
        nbformat.write(notebook, path.with_suffix(".ipynb"))
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
