"""The table: every missing run is made up for, a failed one is told, and the rest stays."""

import csv
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.config import CompareSettings, Override, Overrides, SettingsError
from experiments.reporting import results, run_folder
from experiments.training import compare, table
from experiments.training.begin import begin
from experiments.training.run import Trainer
from tests.helpers import run_without_training

ARGUMENTS = "table --datasets digits --models resnet8 --methods float stam --seeds 2 --epochs 2 --width 0.125"
CELLS = [f"{method}-seed{seed}" for method in ("float", "stam") for seed in (0, 1)]


def make(folder: Path, *, batch_size: int = 128) -> int:
    return main([*ARGUMENTS.split(), "--batch-size", str(batch_size), "--output", str(folder)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table of which one run failed at first."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:

        def sometimes(self, seed, *rest, **options):
            if self.settings.method == "stam" and seed == 1:
                raise MemoryError("no memory left")
            return run_without_training(self, seed, *rest, **options)

        patch.setattr(Trainer, "run", sometimes)
        assert make(folder) == 1
    return folder


def test_a_failed_run_is_told_and_the_others_are_in_the_table(folder, tmp_path):
    text = (folder / "table.md").read_text()
    assert "| method | digits, resnet8 |" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == [
        "method", "float", "stam"
    ]  # fmt: skip
    assert "(2) |" in text
    assert "(1) |" in text
    assert "* digits-resnet8/stam-seed1: MemoryError: no memory left" in text


def test_going_on_trains_only_what_is_missing(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(
        Trainer,
        "run",
        lambda self, seed, *rest, **options: (
            trained.append((self.settings.method, seed)) or run_without_training(self, seed, *rest, **options)
        ),
    )
    assert make(folder) == 0
    assert trained == [("stam", 1)]
    text = (folder / "table.md").read_text()
    assert "Without a result" not in text
    assert text.count("(2) |") == 2
    assert not (folder / "digits-resnet8" / "stam-seed1" / run_folder.ERROR).exists()
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [f"{row['method']}-seed{row['seed']}" for row in rows] == CELLS
    for row in rows:
        (kept,) = run_folder.read_csv(
            folder / "digits-resnet8" / f"{row['method']}-seed{row['seed']}" / run_folder.RESULTS
        )
        assert float(row["relaxed_accuracy"]) == kept["relaxed_accuracy"]
        assert (row["dataset"], row["model"], row["width"]) == ("digits", "resnet8", "0.125")
        assert row["training_images"] == ""
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_written_from_the_folders_of_the_runs_alone(folder):
    make(folder)  # All there, whatever ran before this.
    before = {name: (folder / name).read_bytes() for name in (table.MARKDOWN, table.CSV)}
    for name in before:
        (folder / name).unlink()
    table.write(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_table_grows_but_does_not_change_its_settings(folder, capsys):
    assert make(folder, batch_size=64) == 2
    assert "batch_size was 128, and is 64 now" in capsys.readouterr().err


def test_the_config_of_a_comparison_says_all_that_was_asked_for(tmp_path):
    def asked_for(methods, seeds=1, overrides=None):
        settings = CompareSettings(methods=methods, seeds=seeds, overrides=Overrides(**(overrides or {})))
        begin(tmp_path, "compare", settings, resume=True)
        compare.jobs_of(settings, tmp_path, resume=True)
        return run_folder.read_json(tmp_path / run_folder.CONFIG)

    stam, parq = {"stam": Override(weight_decay=0.9)}, {"parq": Override(momentum=0.5)}
    asked_for(("float", "stam"), seeds=2, overrides=stam)
    # What is said of a method that was not asked for is not yet settled.
    kept = asked_for(("float",), overrides={"parq": Override(momentum=0.7)})
    assert (kept["methods"], kept["seeds"]) == (["float", "stam"], 2)
    kept = asked_for(("parq", "float"), overrides=parq)
    assert (kept["methods"], kept["seeds"]) == (["float", "stam", "parq"], 2)
    assert kept["overrides"] == {"stam": {"weight_decay": 0.9}, "parq": {"momentum": 0.5}}
    assert asked_for(("parq", "stam"), overrides=parq | stam) == kept
    for methods, overrides in (
        (("stam", "bop"), {}),
        (("stam",), {"stam": Override(momentum=0.5)}),
        (("all",), parq),
    ):
        with pytest.raises(SettingsError, match=r"overrides.stam was \{'weight_decay': 0.9\}, and is"):
            asked_for(methods, overrides=overrides)
        assert run_folder.read_json(tmp_path / run_folder.CONFIG) == kept
    assert asked_for(("all",), overrides=parq | stam)["methods"] == ["all"]


def test_a_comparison_is_collected_once_all_its_runs_are_there(folder, tmp_path, capsys):
    make(folder)
    assert main(["collect", str(folder / "digits-resnet8"), "--output", str(tmp_path)]) == 0
    kept = tmp_path / "digits-resnet8"
    assert {path.name for path in kept.iterdir()} == {
        "config.json", "environment.json", "results.csv", "metrics.csv", "curves.png",
    }  # fmt: skip
    before, after = results.read(folder / "digits-resnet8"), results.read(kept)
    assert after == before
    assert [f"{row['method']}-seed{row['seed']}" for row in after.rows] == CELLS
    assert len(after.metrics) == len(CELLS) * 2
    assert all(after.environments[row["environment"]]["packages"]["jax"] for row in after.rows)
    run_folder.write_json(kept / run_folder.CONFIG, {**after.config, "seeds": 3})
    assert main(["collect", str(kept), "--output", str(tmp_path / "again")]) == 2
    assert "is not complete: float has the seeds [0, 1]" in capsys.readouterr().err
    assert main(["collect", str(tmp_path), "--output", str(tmp_path / "again")]) == 2
    assert not (tmp_path / "again").exists()
