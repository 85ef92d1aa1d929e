"""The table: every missing run is made up for, a failed one is told, and the rest stays."""

import csv
from pathlib import Path

import pytest

from experiments import runs, table
from experiments.cli import main
from experiments.config import CompareSettings
from experiments.training import Trainer

ARGUMENTS = "table --datasets digits --models resnet8 --methods float stam --seeds 2 --epochs 1 --width 0.125"
CELLS = [f"{method}-seed{seed}" for method in ("float", "stam") for seed in (0, 1)]


def make(folder: Path, *, batch_size: int = 128) -> int:
    return main([*ARGUMENTS.split(), "--batch-size", str(batch_size), "--output", str(folder)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table of which one run failed at first."""
    folder = tmp_path_factory.mktemp("table")
    with pytest.MonkeyPatch.context() as patch:
        run = Trainer.run

        def sometimes(self, seed, *rest, **options):
            if self.settings.method == "stam" and seed == 1:
                raise MemoryError("no memory left")
            return run(self, seed, *rest, **options)

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
    run = Trainer.run
    monkeypatch.setattr(
        Trainer,
        "run",
        lambda self, seed, *rest, **options: (
            trained.append((self.settings.method, seed)) or run(self, seed, *rest, **options)
        ),
    )
    assert make(folder) == 0
    assert trained == [("stam", 1)]
    text = (folder / "table.md").read_text()
    assert "Without a result" not in text
    assert text.count("(2) |") == 2
    assert not (folder / "digits-resnet8" / "stam-seed1" / runs.ERROR).exists()
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [f"{row['method']}-seed{row['seed']}" for row in rows] == CELLS
    for row in rows:
        (kept,) = runs.read_json(
            folder / "digits-resnet8" / f"{row['method']}-seed{row['seed']}" / runs.RESULT
        )
        assert float(row["relaxed_accuracy"]) == kept["relaxed_accuracy"]
        assert (row["dataset"], row["model"], row["width"]) == ("digits", "resnet8", "0.125")
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
    begin = lambda **asked: runs.begin(tmp_path, "compare", CompareSettings(**asked), resume=True)
    begin(methods=("float", "stam"), seeds=2, own={"stam": {"inertia": ["0.9"]}})
    begin(methods=("parq", "stam"), seeds=1, own={"parq": {"momentum": ["0.5"]}})
    kept = runs.read_json(tmp_path / runs.CONFIG)
    assert kept["methods"] == ["float", "stam", "parq"]
    assert kept["seeds"] == 2
    assert kept["own"] == {"stam": {"inertia": ["0.9"]}, "parq": {"momentum": ["0.5"]}}
    begin(methods=("all",))
    assert runs.read_json(tmp_path / runs.CONFIG)["methods"] == ["all"]
