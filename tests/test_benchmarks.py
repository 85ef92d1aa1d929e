"""The benchmarks of whole networks, end to end at their smallest; nothing is asked of how long it takes."""

import json
import math
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

import stam_jax
from benchmarks import flips, holding, inference, optimum, training
from experiments.config import TrainSettings
from experiments.data import image_sets
from experiments.training.run import Trainer

TINY = ("--models", "resnet8", "--width", "0.125", "--batch-sizes", "16", "--rounds", "1", "--steps", "2")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, Any]:
    """The rows of a tiny benchmark, by method."""
    path: Path = tmp_path_factory.mktemp("benchmark") / "rows.json"
    assert training.main([*TINY, "--methods", "float", "stam", "--scan", "--output", str(path)]) == 0
    return {row["method"]: row for row in json.loads(path.read_text())}


@pytest.mark.slow
def test_a_row_per_method_tells_what_was_measured(measured):
    assert list(measured) == ["float", "stam"]
    for row in measured.values():
        said = (row["model"], row["width"], row["precision"], row["batch_size"], row["rounds"], row["steps"])
        assert said == ("resnet8", 0.125, "float32", 16, 1, 2)
        assert "random" in row["images"]
        assert all(row[name] for name in ("device_kind", "platform", "devices", "jax"))


@pytest.mark.slow
def test_numbers_are_finite_and_within_what_is_possible(measured):
    for row in measured.values():
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        for name in ("seconds_per_step", "images_per_second", "flops_per_step", "memory_bytes"):
            assert row[name] > 0
        # Utilisation is of a peak that was measured, on a machine that may be busy.
        assert 0 < row["utilisation"] < 2
        assert 0 < row["optimizer_share"] < 1.5
        # The step reads and writes float32 weights and their momentum at least.
        assert row["memory_bytes"] > 2 * 4 * row["parameters"]
        assert row["ratio_to_float_least"] <= row["ratio_to_float"] <= row["ratio_to_float_most"]
    assert measured["stam"]["memory_bytes"] > measured["float"]["memory_bytes"]
    assert measured["stam"]["parameters"] == measured["float"]["parameters"]


@pytest.mark.slow
def test_flops_are_those_of_the_convolutions_and_little_else(measured):
    # Multiplications and additions of a forward pass per image, by hand: outputs x taps x channels in x out.
    forward = 2 * (
        32**2 * 9 * (3 * 2 + 2 * 2 * 2)
        + 16**2 * (9 * (2 * 4 + 4 * 4) + 2 * 4)
        + 8**2 * (9 * (4 * 8 + 8 * 8) + 4 * 8)
    )
    for row in measured.values():
        # Twice as much again goes backward; at this width the rest of the step is about as much as all that.
        assert 2 < row["flops_per_step"] / 16 / forward < 6


@pytest.mark.slow
def test_flops_are_the_same_where_xla_is_not_there_to_count_them(measured, monkeypatch):
    case = training.Case("resnet8", 0.125, "float32", 16)
    monkeypatch.setattr("jax.stages.Lowered.cost_analysis", lambda lowered: None)
    facts = training.subject(case, "float", 1, scan=False).facts
    assert facts["flops_per_step"] == pytest.approx(measured["float"]["flops_per_step"], rel=0.05)


@pytest.mark.slow
def test_float_is_what_the_others_are_compared_with(measured):
    assert measured["float"]["ratio_to_float"] == 1
    assert measured["stam"]["ratio_to_float"] > 0


@pytest.mark.slow
def test_scanned_steps_are_timed_once_per_network(measured):
    assert measured["float"]["scanned_to_single"] > 0
    assert "scanned_to_single" not in measured["stam"]


@pytest.mark.parametrize("wrong", [("--rounds", "0"), ("--methods", "none"), ("--width", "0")])
def test_a_wrong_setting_is_told_in_one_line(wrong, capsys):
    assert training.main([*TINY, *wrong]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert wrong[0] in printed.err
    assert not printed.out


@pytest.mark.slow
def test_every_form_of_a_packed_network_is_measured(capsys):
    assert (
        inference.main(["--models", "resnet8", "--width", "0.125", "--batch-sizes", "2", "--rounds", "1"])
        == 0
    )
    out = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:] for line in out.splitlines() if line.startswith("│")
    }
    assert list(rows) == ["float32", "bfloat16", "packed", "packed bfloat16", "folded", "folded bfloat16"]
    weights = {name: int(cells[0].replace(",", "")) for name, cells in rows.items()}
    assert weights["packed"] < weights["bfloat16"] < weights["float32"]
    assert rows["packed"][-2].strip() == "0e+00"
    assert float(rows["folded"][-2]) < 1e-5
    assert float(rows["folded bfloat16"][-2]) < 0.05
    assert "resnet8: a packed file of" in out


def test_the_parts_of_the_signs_and_of_their_sizes_add_up_to_the_change_of_a_loss():
    """Written out for a product of all weights: f(a) = 2, f(b) = -12, with the other's signs -2 and 12."""
    before, after = (
        {"chosen": np.array(w), "other": np.array(v)} for w, v in (([2.0, 1], 1.0), ([-3.0, 4], 1.0))
    )
    chosen = {"chosen": True, "other": False}
    product = lambda tree: float(np.prod(tree["chosen"]) * tree["other"])
    np.testing.assert_array_equal(flips.with_signs(before, after, chosen)["chosen"], [-2, 1])
    np.testing.assert_array_equal(flips.with_signs(after, before, chosen)["chosen"], [3, 4])
    assert flips.signs_part(product, before, after, chosen) == ((-2 - 2) + (-12 - 12)) / 2
    assert flips.turned(before, after, chosen) == 0.5


@pytest.mark.slow
def test_a_run_whose_signs_are_looked_at_is_that_of_the_experiments(tmp_path):
    trainer = Trainer(TrainSettings(width=0.125, epochs=2, decay_from=0.75), image_sets.load("digits"))
    expected = trainer.train(1, tmp_path).state
    run = flips.Run(trainer, 1, lambda: None)
    for _ in range(trainer.steps):
        run.take()
    chex.assert_trees_all_equal(run.quantized(), stam_jax.quantize(expected.params, trainer.quantizer))


def test_layers_are_chosen_one_by_one_and_are_those_that_are_quantized():
    params = {"body": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "head": {"kernel": np.ones((3, 2))}}
    nothing = {"body": {"kernel": False, "bias": False}, "head": {"kernel": False}}
    body = nothing | {"body": {"kernel": True, "bias": False}}
    head = nothing | {"head": {"kernel": True}}
    binary = stam_jax.Binary()
    assert flips.layers(params, binary) == {"body/kernel": body, "head/kernel": head}
    assert flips.layers(params, {"head": None, "*": binary}) == {"body/kernel": body}


@pytest.mark.slow
def test_what_sign_changes_pay_is_told_by_inertia_and_part_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flips, "LONG", 3)
    monkeypatch.setattr(flips, "SINGLE", 2)
    tiny = ("--dataset", "digits", "--model", "resnet8", "--width", "0.125", "--images", "128")
    output = tmp_path / "rows.json"
    assert flips.main([*tiny, "--epochs", "4", "--seeds", "2", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        assert row["turned_by_window"] <= 3 * row["turned_by_step"] + 1e-9
        if row["turned_by_window"] == 0:
            assert row["signs_by_window"] == pytest.approx(0, abs=1e-6)
        assert len(row["signs_by_layer"]) == 10
    assert any(row["turned_by_window"] for row in rows if row["trial"] == "inertia 1")
    assert capsys.readouterr().out.strip().splitlines() == flips.table(rows)
    assert flips.main([*tiny, "--epochs", "1"]) == 2
    assert "--epochs: 9 steps have no room" in capsys.readouterr().err


def test_the_size_of_a_step_and_of_a_pull_are_those_of_their_equations():
    kappa, v, u = 0.9, np.array([0.5, -0.02]), np.array([0.1, 0.05])
    w = v + u
    x = 0.5 * w + 0.5 * np.array([0.4, 0.4])
    v_next = x + kappa * (w - x)
    trees = [{"kernel": a.astype(np.float32)} for a in (v, x, v_next)]
    found = holding.sizes(kappa, *trees)["kernel"]
    np.testing.assert_allclose(found["u"], u, rtol=1e-5)
    assert found["step"] == pytest.approx(np.mean(np.abs(u)) / np.mean(np.abs(w)), rel=1e-5)
    pull = np.mean(np.abs((1 - kappa) * (w - x))) / np.mean(np.abs(u))
    assert found["pull"] == pytest.approx(pull, rel=1e-5)
    assert found["turned"] == 0.5


@pytest.mark.slow
def test_how_firmly_signs_are_held_is_told_layer_by_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(holding, "WINDOW", 3)
    tiny = ("--dataset", "digits", "--model", "resnet8", "--width", "0.125", "--epochs", "4")
    output = tmp_path / "rows.json"
    for inertia in ("0.9", "1", "0.9"):  # The third takes the place of the first.
        command = [*tiny, "--batch-size", "64", "--inertia", inertia, "--output", str(output)]
        assert holding.main(command) == 0
    rows = json.loads(output.read_text())
    assert [row["inertia"] for row in rows] == 6 * [1.0] + 6 * [0.9]
    assert all(len(row["layers"]) == 10 for row in rows)
    assert all(layer["pull"] == 0 for row in rows[:6] for layer in row["layers"].values())
    assert all(layer["pull"] > 0 for row in rows[6:] for layer in row["layers"].values())
    assert "\n".join(holding.table(rows)) in capsys.readouterr().out


def test_the_packed_forms_refuse_a_wrong_setting(capsys):
    assert inference.main(["--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err


def test_the_best_signs_are_the_best_of_all():
    """By trying scales as well, for the first three patterns and the best."""
    problem = optimum.draw("arbitrary", 3)
    everything = optimum.patterns()
    assert len(np.unique(everything, axis=0)) == 2**optimum.WEIGHTS
    found = optimum.losses(problem, everything)
    scales = np.linspace(0, 3, 3001)
    for row in (0, 1, 2, int(np.argmin(found))):
        fits = scales[:, None] * (problem.inputs @ everything[row])
        tried = np.sum((fits - problem.targets) ** 2, axis=1) / (2 * optimum.ROWS)
        assert found[row] <= np.min(tried) + 1e-12
        assert found[row] == pytest.approx(np.min(tried), rel=1e-3)


@pytest.mark.slow
def test_the_table_of_optima_can_be_made_anew():
    kept = {(row["kind"], row["method"]): row for row in json.loads(optimum.RESULTS.read_text())}
    assert {method for _, method in kept} == {optimum.ROUNDED, *optimum.METHODS}
    for row in optimum.measure(count=10, methods=("stam_proximal", "binary_connect")):
        before = kept[row["kind"], row["method"]]
        assert 0 <= row["optimal"] <= row["within_5_percent"] <= 10
        # The first ten problems are the same ones.
        assert row["optimal"] <= before["optimal"]
        assert 10 - row["optimal"] <= before["problems"] - before["optimal"]
