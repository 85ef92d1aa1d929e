"""What the default comparison promises, trained in full."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_binary_networks_read_digits_almost_as_well_as_float_ones(tmp_path):
    subprocess.run(
        f"{sys.executable} -m experiments compare --seeds 0 1 2 --output {tmp_path / 'run'}".split(),
        cwd=ROOT,
        check=True,
    )
    rows = json.loads((tmp_path / "run" / "result.json").read_text())
    mean = lambda method, name: statistics.mean(r[name] for r in rows if r["method"] == method)
    reference = mean("float", "relaxed_accuracy")
    for method in ("binary_connect", "binary_relax", "stam"):
        assert mean(method, "hard_accuracy") >= 0.975
        assert mean(method, "hard_accuracy") >= reference - 0.015
    for row in rows:
        if row["method"] != "float":
            assert row["hard_accuracy"] >= 0.965, row
