"""The documentation site: its pages keep their word, and the reference has every public name."""

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import stam_jax
from benchmarks import report
from tests import helpers

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
# What public modules lend to others of the package, and what is shown of private ones.
LENT = {
    "stam_jax.diagnostics.latent_weights",
    "stam_jax.regularizers.soft_threshold",
    "stam_jax.relaxations.shares",
}
TABLE = {"stam_jax._tabulate.Row", "stam_jax._tabulate.Table"}


def resolved(path: str) -> Any:
    """What a dotted path of the reference names."""
    owner, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(owner), name)


def public() -> dict[str, Any]:
    """All that is public, by its dotted path: the names of the package, and those of its public modules."""
    names = {f"stam_jax.{name}": getattr(stam_jax, name) for name in stam_jax.__all__}
    modules = [thing for thing in names.values() if isinstance(thing, ModuleType)]
    names = {path: thing for path, thing in names.items() if not isinstance(thing, ModuleType)}
    for module in modules:
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__:
                names[f"{module.__name__}.{name}"] = thing
    names = {path: thing for path, thing in names.items() if path not in LENT}
    # Once each, by the shortest of its names.
    kept = {id(thing): path for path, thing in sorted(names.items(), key=lambda item: -len(item[0]))}
    return {path: names[path] for path in kept.values()}


PUBLIC = public()
SHOWN_NAMES = [
    path for page in sorted((DOCS / "reference").glob("*.md")) for path in SHOWN.findall(page.read_text())
]
FUNCTIONS = sorted(path for path, thing in PUBLIC.items() if inspect.isfunction(thing))
CLASSES = sorted(path for path, thing in PUBLIC.items() if isinstance(thing, type)) + sorted(TABLE)


def described(docstring: str) -> set[str]:
    """The parameters that a docstring's section Args describes."""
    _, _, rest = docstring.partition("\nArgs:\n")
    section = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return set(re.findall(r"^    (\w+): ", section, flags=re.MULTILINE))


def test_the_reference_shows_every_public_name_once():
    names = {id(resolved(path)): path for path in TABLE} | {id(thing): path for path, thing in PUBLIC.items()}
    assert sorted(names[id(resolved(path))] for path in SHOWN_NAMES) == sorted({*PUBLIC, *TABLE})


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_says_what_it_takes_and_has_an_example(path):
    docstring = inspect.getdoc(PUBLIC[path]) or ""
    assert set(inspect.signature(PUBLIC[path]).parameters) == described(docstring)
    assert "\nExample:\n    >>> " in docstring


@pytest.mark.parametrize("path", CLASSES)
def test_a_class_and_its_methods_say_what_they_are(path):
    cls = resolved(path)
    docstring = inspect.getdoc(cls) or ""
    assert docstring
    fields = getattr(cls, "_fields", ())
    if dataclasses.is_dataclass(cls):
        fields = [field.name for field in dataclasses.fields(cls)]
    assert set(fields) == described(docstring)
    for name, member in inspect.getmembers(cls):
        if not name.startswith("_") and name not in fields and not hasattr(Exception, name):
            assert inspect.getdoc(member), name


PARTS = SHOWN.findall((DOCS / "reference" / "parts.md").read_text().split("## What is asked of them")[0])


@pytest.mark.parametrize("path", PARTS)
def test_what_is_put_together_has_an_example(path):
    assert "\nExample:\n    >>> " in (inspect.getdoc(PUBLIC[path]) or "")


# Pages that print accuracies on digits, and what the least of them exceeds, in percent. In the guides that is
# of a float network that is only rounded.
LEARNED = {"quickstart": 90, "howto": 70}


@pytest.mark.parametrize(
    "page", ["quickstart", "methods", "quantized", "deploy", *helpers.slow(["training", "howto"])]
)
def test_the_examples_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # Some write files.
    text, names = (DOCS / f"{page}.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    for table in re.findall(r"```text\n(path +shape.*?)```", text, flags=re.DOTALL):
        assert table in printed
    if page == "howto":  # Statistics of batch normalization are means over all batches.
        layer, norm, _ = names["model"].layers
        features = np.asarray(names["images"][:1300] @ layer.kernel[...] + layer.bias[...])
        np.testing.assert_allclose(norm.mean[...], features.mean(axis=0), rtol=1e-4, atol=1e-5)
    if page in LEARNED:
        accuracies = [float(accuracy) for accuracy in re.findall(r"([\d.]+)%", printed)]
        assert accuracies
        assert min(accuracies) > LEARNED[page]


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_of_it(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("part", report.PARTS, ids=lambda part: part.name)
def test_a_table_is_that_of_the_kept_measurements(part):
    text = part.page.read_text()
    assert report.updated(text, part) == text, "run: python -m benchmarks.report"


def test_the_page_of_benchmarks_has_every_benchmark():
    text = (DOCS / "benchmarks.md").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        if path.stem not in ("__init__", "command", "problems"):
            assert f"python -m benchmarks.{path.stem}" in text, path.name


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {
        path.parent.relative_to(tmp_path / "site").as_posix(): path.read_text()
        for path in (tmp_path / "site").rglob("index.html")
    }
    sources = [*DOCS.rglob("*.md"), *ROOT.glob("notebooks/*.ipynb"), ROOT / "CHANGELOG.md"]
    assert len(pages) == len(sources)
    for name, page in pages.items():
        foreign = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", page)
        assert not [tag for tag in foreign if 'rel="canonical"' not in tag], name
        assert "https://cdn" not in page, name
        assert "arithmatex" not in page, name
        assert "<!-- from README.md" not in page, name
    for path in SHOWN_NAMES:
        assert any(f'id="{path}"' in page for page in pages.values()), path
    for picture in re.findall(r'<img [^>]*src="([^":]+)"', pages["."]):
        assert (tmp_path / "site" / picture).is_file(), picture
    assert (tmp_path / "site" / "relaxations.png").is_file()
