"""The notebooks run, and their `.ipynb` files are what comes of their `.py` files."""

import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)

REPOSITORY = "stam-jax/stam_jax"
# From the root on, over one folder at least; and with the letter of a drive.
ABSOLUTE_PATH = re.compile(r"(?:^|[\s\"'(=\[])(/[\w.+-]+/[\w.+/-]*|[A-Z]:\\\w+)", re.MULTILINE)


def percent_cells(text):
    """The kind and the source of each cell of a py:percent file."""
    _, *pieces = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    for mark, body in zip(pieces[::2], pieces[1::2], strict=True):
        lines = body.strip("\n").split("\n")
        if mark.strip() == "[markdown]":
            assert all(line == "#" or line.startswith("# ") for line in lines), lines
            yield "markdown", "\n".join(line[2:] for line in lines)
        else:
            assert mark == "", mark
            yield "code", "\n".join(lines)


def notebook_of(source):
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))


def outputs_of(notebook):
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def texts_of(output):
    """All that an output says, but for pictures."""
    yield from ["".join(output.get("text", ""))]
    yield from ("".join(data) for kind, data in output.get("data", {}).items() if kind.startswith("text/"))


def test_every_notebook_is_there_twice():
    assert [path.stem for path in SOURCES] == [
        "01_quickstart",
        "02_convergence",
        "03_relaxations",
        "04_your_own",
    ]
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]


@by_name
def test_the_pair_is_in_step(source):
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook_of(source)["cells"]]
    expected = list(percent_cells(source.read_text(encoding="utf-8")))
    assert cells == expected, f"run: python notebooks/execute.py {source.stem}"


@by_name
def test_every_cell_was_run_once_and_in_order_and_none_failed(source):
    notebook = notebook_of(source)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = outputs_of(notebook)
    assert outputs
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data"), output
        assert output.get("name", "stdout") == "stdout", output


@by_name
def test_the_notebook_says_nothing_of_the_machine(source):
    notebook = notebook_of(source)
    assert set(notebook["metadata"]) == {"jupytext", "kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert [cell["id"] for cell in notebook["cells"]] == [
        f"cell-{number:02}" for number in range(len(notebook["cells"]))
    ]
    for output in outputs_of(notebook):
        for text in texts_of(output):
            assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)


@by_name
def test_it_begins_with_a_title_and_its_own_badge(source):
    title, install, *_ = [text for _, text in percent_cells(source.read_text(encoding="utf-8"))]
    assert title.startswith("# ")
    place = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{source.stem}.ipynb"
    assert title.count("[![Open in Colab]") == title.count(f"]({place})") == 1
    # Where the package is there already, nothing is installed.
    assert 'if importlib.util.find_spec("stam_jax") is None:' in install
    assert f"@ git+https://github.com/{REPOSITORY}" in install


def test_all_install_alike():
    cells = [list(percent_cells(source.read_text(encoding="utf-8")))[1][1] for source in SOURCES]
    assert len({re.sub(r"\[experiments.*?\]", "[]", cell) for cell in cells}) == 1


@by_name
def test_links_between_notebooks_lead_to_notebooks(source):
    for link in re.findall(r"\]\(([^):]+\.ipynb)\)", source.read_text(encoding="utf-8")):
        assert (FOLDER / link).exists(), link


def printed(notebook):
    return "".join("".join(output.get("text", "")) for output in outputs_of(notebook))


@pytest.mark.slow
@by_name
def test_it_runs(source):
    script = runpy.run_path(str(FOLDER / "execute.py"))
    notebook = script["execute"](script["read"](source), timeout=300)
    kept = [text for _, text in percent_cells(source.read_text(encoding="utf-8"))]
    assert [cell["source"] for cell in notebook["cells"]] == kept
    assert all(output["output_type"] != "error" for output in outputs_of(notebook))


@pytest.mark.slow
def test_the_quickstart_runs_on_eight_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    script = runpy.run_path(str(FOLDER / "execute.py"))
    text = printed(script["execute"](script["read"](SOURCES[0]), timeout=300))
    assert text.startswith("8 x ")
    assert "on each device: 8 of the 64 images of a batch; all weights: True" in text
    accuracy = float(re.findall(r"accuracy of what was read: ([\d.]+)%", text)[0])
    assert accuracy > 95
