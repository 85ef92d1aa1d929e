"""What comparisons promise, trained in full."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import METHODS
from experiments.reporting import run_folder
from tests import helpers

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_binary_networks_read_digits_almost_as_well_as_float_ones(tmp_path):
    subprocess.run(
        f"{sys.executable} -m experiments compare --methods float binary_connect stam "
        f"--seeds 3 --output {tmp_path / 'run'}".split(),
        cwd=ROOT,
        env=helpers.environment_of_users(),
        check=True,
    )
    rows = run_folder.read_csv(tmp_path / "run" / "results.csv")
    mean = lambda method, name: statistics.mean(r[name] for r in rows if r["method"] == method)
    reference = mean("float", "relaxed_accuracy")
    for method in ("binary_connect", "stam"):
        assert mean(method, "hard_accuracy") >= 0.975
        assert mean(method, "hard_accuracy") >= reference - 0.02
    for row in rows:
        if row["method"] != "float":
            assert row["hard_accuracy"] >= 0.965, row


@pytest.mark.slow
def test_a_comparison_of_all_methods_ends_with_one_table_of_them(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m experiments compare --methods all --epochs 2 --width 0.125 "
        f"--output {tmp_path / 'run'}".split(),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    (table,) = done.stdout.split("Accuracy in % on the test images")[1:]
    lines = [line.split() for line in table.splitlines()]
    named = [words[0] for words in lines if words and words[0] in METHODS]
    assert named == list(METHODS)
    rows = run_folder.read_csv(tmp_path / "run" / "results.csv")
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(0 <= row["hard_accuracy"] <= 1 for row in rows[1:])
