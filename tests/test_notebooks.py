"""The notebooks run, and their `.ipynb` files are what comes of their `.py` files."""

import importlib.metadata
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)

# Addresses from which something could be installed or opened.
FOREIGN = re.compile(r"(?:github\.com/stam-jax|git\+https|colab\.research\.google\.com)[^\s\"'<>)\]\\]*")
# What fits the width of a page.
WIDTH = 100
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
def test_it_begins_with_a_title_and_then_installs(source):
    title, install, *_ = [text for _, text in percent_cells(source.read_text(encoding="utf-8"))]
    assert title.startswith("# ")
    assert install == install_cell(source)


def install_cell(source):
    """The cell that installs the package; no other does."""
    (cell,) = [text for _, text in percent_cells(source.read_text(encoding="utf-8")) if "pip" in text]
    return cell


@pytest.fixture
def commands(monkeypatch):
    """What would have been run."""
    found = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: found.append(command))
    return found


@by_name
def test_nothing_is_installed_where_the_package_is_there(source, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(install_cell(source), {})
    assert commands == []


@by_name
@pytest.mark.parametrize("folder", [ROOT, FOLDER], ids=["root", "notebooks"])
def test_elsewhere_the_clone_is_installed(source, folder, commands, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: iter(()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.chdir(folder)
    exec(install_cell(source), {})
    extras = "experiments,export" if source.stem == "04_your_own" else "experiments"
    ((*pip, package, plugin),) = commands
    assert pip == [sys.executable, "-m", "pip", "install", "--quiet"]
    assert package == f"{ROOT}[{extras}]"
    assert plugin == "jax[tpu]"


@by_name
def test_without_a_clone_the_notebook_says_what_to_do(source, commands, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: iter(()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="Clone or upload the repository first"):
        exec(install_cell(source), {})
    assert commands == []


def test_no_file_names_an_address_that_is_not_the_repositorys():
    """Anyone could register such an address, and readers would install what is there."""
    places = ("notebooks", "docs", "experiments", "stam_jax", "README.md", "pyproject.toml", "CITATION.cff")
    listing = subprocess.run(["git", "ls-files", "-z", *places], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not in a clone")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    own = settings["project"].get("urls", {}).get("Repository", "").removeprefix("https://github.com/")
    for name in filter(None, listing.stdout.decode().split("\0")):
        text = (ROOT / name).read_bytes().decode(errors="ignore") if (ROOT / name).is_file() else ""
        assert [address for address in FOREIGN.findall(text) if not own or own not in address] == [], name


def test_all_install_alike():
    cells = [list(percent_cells(source.read_text(encoding="utf-8")))[1][1] for source in SOURCES]
    assert len({re.sub(r"\[experiments.*?\]", "[]", cell) for cell in cells}) == 1


@by_name
def test_links_lead_to_a_page_and_a_heading_of_it(source):
    prose = "\n".join(
        text for kind, text in percent_cells(source.read_text(encoding="utf-8")) if kind == "markdown"
    )
    links = re.findall(r"\]\((?!https:)([^)\s]+)\)", prose)
    assert links
    for link in links:
        place, _, anchor = link.partition("#")
        target = (FOLDER / place).resolve()
        assert target.is_file(), link
        # The site has no other files.
        assert target.parent == FOLDER or target.is_relative_to(ROOT / "docs"), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, link


@by_name
def test_no_printed_line_is_too_long_for_a_page(source):
    for line in printed(notebook_of(source)).splitlines():
        assert len(line) <= WIDTH, line


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
    notebook = script["read"](SOURCES[0])
    for cell in notebook.cells:
        cell["source"] = cell["source"].replace("epochs = 20", "epochs = 4")
    text = printed(script["execute"](notebook, timeout=300))
    assert text.startswith("8 x ")
    assert "on each device: 8 of the 64 images of a batch; all weights: True" in text
    accuracy = float(re.findall(r"accuracy of what was read: ([\d.]+)%", text)[0])
    assert accuracy > 80
