"""Studies: a question is put to the validation images, by all that the file lists, and by nothing twice."""

import glob
from pathlib import Path

import filelock
import pytest

from experiments import report, runs, study
from experiments.cli import main
from experiments.config import SettingsError
from experiments.training import Trainer

STUDY = """
question = "Which step size?"
seeds = 2

[settings]
dataset = "digits"
model = "resnet8"
width = 0.125
epochs = 1
batch_size = 128

[[trials]]
method = ["float", "stam"]
learning_rate = 0.1

[[trials]]
method = "stam"
learning_rate = [0.01, 0.03]

[[trials]]
method = "stam_proximal"
penalty = [[0.1, 10.0]]
"""
TRIALS = [
    "method=float learning_rate=0.1",
    "method=stam learning_rate=0.1",
    "method=stam learning_rate=0.01",
    "method=stam learning_rate=0.03",
    "method=stam_proximal penalty=0.1-10",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of a study that has been carried out."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "asked.toml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:

        def judge(self, *arguments):
            raise AssertionError("a study has looked at the test images")

        patch.setattr(Trainer, "_judge", judge)
        assert main(["study", str(folder / "asked.toml"), "--output", str(folder / "kept")]) == 0
    return folder


def test_a_trial_stands_for_all_combinations_of_its_values(place):
    asked = study.read(place / "asked.toml")
    assert [trial.name for trial in asked.trials] == TRIALS
    assert [(t.settings.method, t.settings.learning_rate) for t in asked.trials] == [
        ("float", 0.1), ("stam", 0.1), ("stam", 0.01), ("stam", 0.03), ("stam_proximal", 0.1)
    ]  # fmt: skip
    assert asked.trials[-1].settings.penalty == (0.1, 10.0)
    assert {(t.settings.width, t.settings.epochs, t.settings.seed) for t in asked.trials} == {(0.125, 1, 0)}


def test_a_study_keeps_what_the_validation_images_say_of_each_trial_and_seed(place):
    kept, rows = study.answers(place / "kept")
    assert kept["question"] == "Which step size?"
    assert list(rows) == TRIALS
    for name, group in rows.items():
        assert [row["seed"] for row in group] == [0, 1]
        for row in group:
            folder = place / "kept" / f"{study.folder_name(name)}-seed{row['seed']}"
            (last,) = runs.read_metrics(folder / runs.METRICS)
            assert row == {"method": name.split()[0].removeprefix("method="), **last} | {
                "seed": row["seed"], "seconds": row["seconds"]
            }  # fmt: skip
            kept_files = {runs.CONFIG, runs.ENVIRONMENT, runs.METRICS, runs.RELAXED, runs.RESULT}
            assert {path.name for path in folder.iterdir()} == kept_files


def test_going_on_trains_nothing_twice_and_prints_the_table(place, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert main(["study", str(place / "asked.toml"), "--output", str(place / "kept")]) == 0
    printed = capsys.readouterr().out
    assert "Which step size?" in printed
    for name in TRIALS:
        assert name in printed


def test_a_run_that_another_process_trains_is_left_to_it(place, monkeypatch, capsys, tmp_path):
    (tmp_path / "asked.toml").write_text(STUDY.replace("seeds = 2", "seeds = 1"))
    trained = []

    def rehearse(self, seed, folder, *arguments, **options):
        trained.append(folder.name)
        return {"method": self.settings.method, "hard_accuracy": 0.5, "relaxed_accuracy": 0.5, "seconds": 1.0}

    monkeypatch.setattr(Trainer, "rehearse", rehearse)
    under_way = tmp_path / "kept" / f"{study.folder_name(TRIALS[1])}-seed0"
    command = ["study", str(tmp_path / "asked.toml"), "--output", str(tmp_path / "kept")]
    under_way.mkdir(parents=True)
    (asked,) = [t for t in study.read(tmp_path / "asked.toml").trials if t.name == TRIALS[1]]
    runs.write_json(under_way / runs.CONFIG, asked.settings.as_dict())
    with filelock.FileLock(under_way / runs.LOCK):
        assert main(command) == 0
    assert trained == [f"{study.folder_name(name)}-seed0" for name in TRIALS if name != TRIALS[1]]
    assert "left to other processes: 1 of 5 runs" in capsys.readouterr().out
    assert main(command) == 0  # The other process is gone: what it left undone is made up for.
    assert trained[4:] == [under_way.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("question =", "query ="), "a study has question, seeds, settings, trials; look at 'query'"),
        (("seeds = 2", "seeds = 0"), "seeds is the number of runs of each trial, at least 1; got 0"),
        (("epochs = 1", "epochs = 0"), "trial 1: .*epochs.*Must be >= 1"),
        (("width =", "breadth ="), "trial 1: .*breadth"),
        (("[0.01, 0.03]", "[0.01, 0.1]"), "trial 2: method=stam learning_rate=0.1 is there already"),
        (("[settings]", "[settings"), "cannot read the study"),
        (("[[trials]]", "[[settings.trials]]"), "a study has .*; look at 'trials'"),
        ((STUDY[STUDY.index("[[trials]]") :], "[trials]"), r"trials a list of at least one, \[\[trials\]\]"),
        (("epochs = 1", "seed = 1"), "trial 1: the seeds are counted by the study's seeds, not by seed"),
    ],
)
def test_a_study_that_is_not_well_formed_is_refused_with_the_place(tmp_path, change, words):
    assert change[0] in STUDY
    (tmp_path / "asked.toml").write_text(STUDY.replace(*change))
    with pytest.raises(SettingsError, match=words):
        study.read(tmp_path / "asked.toml")


def test_a_study_that_is_not_there_is_told_with_those_that_are(capsys):
    assert main(["study", "missing"]) == 2
    assert "there is no study 'missing'; give a TOML file, or one of " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(study.STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_of_the_project_can_be_read(path):
    assert study.read(path).question.endswith("?")


# Of settings that this version has not got any more.
EARLIER = {"annealing", "annealing_longer", "blocks", "penalty", "proportional", "pull", "weighted"}


@pytest.mark.parametrize(
    "kept", sorted(report.RESULTS.glob(f"*/{study.STUDY}")), ids=lambda path: path.parent.name
)
def test_every_kept_study_is_one_that_can_be_asked_again_or_one_of_an_earlier_version(kept):
    if kept.parent.name in EARLIER:
        asked, rows = study.answers(kept.parent)
        assert asked["question"].endswith("?")
        assert all(rows.values())
        with pytest.raises(SettingsError, match="there is no study"):
            study.named(kept.parent.name)
        return
    asked = study.read(study.named(kept.parent.name))
    assert runs.read_json(kept)["trials"] == [trial.name for trial in asked.trials]
    assert runs.read_json(kept)["question"] == asked.question
    for trial in asked.trials:
        for config in kept.parent.glob(f"{glob.escape(study.folder_name(trial.name))}-seed*/{runs.CONFIG}"):
            assert runs.read_settings(config).without_seed() == trial.settings


def test_a_trial_may_begin_at_a_float_network(tmp_path):
    asked = STUDY.split("[[trials]]")[0].replace("seeds = 2", "seeds = 1")
    (tmp_path / "asked.toml").write_text(f'{asked}method = "stam"\n\n[[trials]]\nwarm_start = true\n')
    assert main(["study", str(tmp_path / "asked.toml"), "--output", str(tmp_path / "kept")]) == 0
    folder = tmp_path / "kept" / "warm_start=True-seed0"
    assert runs.read_settings(folder / runs.CONFIG).method == "stam"
    assert runs.read_settings(folder / "float" / runs.CONFIG).method == "float"
    assert (folder / "float" / runs.RELAXED).is_file()
    _, rows = study.answers(tmp_path / "kept")
    assert {name: len(group) for name, group in rows.items()} == {"warm_start=True": 1}
