"""The README keeps its word."""

import re
from pathlib import Path

import pytest

from experiments.reporting import pages

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_example_trains_a_binary_network():
    names = {}
    exec(BLOCKS[0], names)
    assert names["accuracy"] > 0.93


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda block: block.splitlines()[0])
def test_the_other_examples_run(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Some write files.
    exec(block, {})


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_the_results_are_those_of_the_kept_runs(page):
    text = page.read_text()
    assert pages.updated(text, page) == text, "run: python -m experiments report"


def test_every_public_name_is_documented():
    import stam_jax

    for name in stam_jax.__all__:
        assert getattr(stam_jax, name).__doc__, name
