"""The table: every missing run is made up for, a failed one is told, and the rest stays."""

import csv
from pathlib import Path

import pytest

from experiments import compare, runs, table
from experiments.cli import main
from experiments.config import CompareSettings, SettingsError
from experiments.training import Trainer

ARGUMENTS = (
    "table --datasets digits --training-images 512 --models resnet8 --methods float stam --seeds 2 --epochs 1"
    " --width 0.125"
)
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
        assert row["training_images"] == "512"
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
    def begin(**asked):
        settings = CompareSettings(**asked)
        runs.begin(tmp_path, "compare", settings, resume=True)
        compare.jobs_of(settings, tmp_path, resume=True)
        return runs.read_json(tmp_path / runs.CONFIG)

    stam, parq = {"stam": {"inertia": ["0.9"]}}, {"parq": {"momentum": ["0.5"]}}
    begin(methods=("float", "stam"), seeds=2, own=stam)
    # What is said of a method that was not asked for is not yet settled.
    kept = begin(methods=("float",), seeds=1, own={"parq": {"momentum": ["0.7"]}})
    assert (kept["methods"], kept["seeds"]) == (["float", "stam"], 2)
    kept = begin(methods=("parq", "float"), seeds=1, own=parq)
    assert (kept["methods"], kept["seeds"], kept["own"]) == (["float", "stam", "parq"], 2, stam | parq)
    assert begin(methods=("parq", "stam"), own=parq | stam) == kept
    for methods, own in (
        (("stam", "bop"), {}),
        (("stam",), {"stam": {"momentum": ["0.5"]}}),
        (("all",), parq),
    ):
        with pytest.raises(SettingsError, match=r"own.stam was \{'inertia': \['0.9'\]\}, and is"):
            begin(methods=methods, own=own)
        assert runs.read_json(tmp_path / runs.CONFIG) == kept
    assert begin(methods=("all",), own=parq | stam)["methods"] == ["all"]
