"""Studies: a question is put to the validation images, by all that the file lists, and by nothing twice."""

from pathlib import Path

import filelock
import pytest

from experiments.cli import main
from experiments.config import SettingsError, TrainSettings
from experiments.reporting import pages, results, run_folder
from experiments.training import study
from experiments.training.run import Trainer
from tests.helpers import run_without_training

STUDY = """
question = "Which learning rate?"
seeds = 2

[settings]
dataset = "digits"
model = "resnet8"
width = 0.125
epochs = 2
batch_size = 128

[settings.overrides.stam]
decay_from = 0.75

[[trials]]
method = ["float", "stam"]

[[trials]]
method = "stam"
learning_rate = [0.01, 0.03]

[[trials]]
method = "stam"
decay_from = 0.5

[[trials]]
method = "stam_proximal"
penalty = [[0.1, 10.0]]
"""
TRIALS = [
    "method=float",
    "method=stam",
    "method=stam learning_rate=0.01",
    "method=stam learning_rate=0.03",
    "method=stam decay_from=0.5",
    "method=stam_proximal penalty=0.1-10",
]
# Two trials.
SHORT = STUDY[: STUDY.index("[settings.overrides")] + '[[trials]]\nmethod = ["float", "stam"]\n'


@pytest.fixture
def asked(tmp_path) -> Path:
    (tmp_path / "asked.toml").write_text(STUDY)
    return tmp_path / "asked.toml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of a study that has been carried out."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "asked.toml").write_text(SHORT.replace('["float", "stam"]', '"stam"'))
    with pytest.MonkeyPatch.context() as patch:

        def judge(self, *arguments):
            raise AssertionError("a study has looked at the test images")

        patch.setattr(Trainer, "_judge", judge)
        assert main(["study", str(folder / "asked.toml"), "--output", str(folder / "kept")]) == 0
    return folder


def test_a_trial_stands_for_all_combinations_of_its_values(asked):
    trials = study.read(asked).trials
    assert [trial.name for trial in trials] == TRIALS
    found = [(t.settings.method, t.settings.learning_rate, t.settings.decay_from) for t in trials]
    assert found == [
        ("float", 0.1, None), ("stam", 0.1, 0.75), ("stam", 0.01, 0.75), ("stam", 0.03, 0.75),
        ("stam", 0.1, 0.5), ("stam_proximal", 0.1, None),
    ]  # fmt: skip
    assert trials[-1].settings.penalty == (0.1, 10.0)
    assert {(t.settings.width, t.settings.epochs, t.settings.seed) for t in trials} == {(0.125, 2, 0)}


def test_a_study_keeps_what_the_validation_images_say_of_each_trial_and_seed(place):
    kept = results.read(place / "kept")
    assert kept.config["question"] == "Which learning rate?"
    assert [(row["trial"], row["seed"]) for row in kept.rows] == [(TRIALS[1], seed) for seed in (0, 1)]
    for row in kept.rows:
        folder = study.place_of(place / "kept", row["trial"], row["seed"])
        last = run_folder.read_csv(folder / run_folder.METRICS)[-1]
        assert last.items() - {("seconds", last["seconds"])} <= row.items()
        kept_files = {run_folder.CONFIG, run_folder.ENVIRONMENT, run_folder.METRICS, run_folder.RESULTS}
        assert {path.name for path in folder.iterdir()} == kept_files | {run_folder.RELAXED}


def test_going_on_trains_nothing_twice_and_prints_the_table(place, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert main(["study", str(place / "asked.toml"), "--output", str(place / "kept")]) == 0
    printed = capsys.readouterr().out
    for words in ("Which learning rate?", TRIALS[1]):
        assert words in printed


def test_a_run_that_another_process_trains_is_left_to_it(asked, monkeypatch, capsys):
    asked.write_text(SHORT.replace("seeds = 2", "seeds = 1"))
    trained = []

    def rehearse(self, seed, folder, *arguments, **options):
        trained.append(folder.name)
        return run_without_training(self, seed, folder)

    monkeypatch.setattr(Trainer, "rehearse", rehearse)
    kept = asked.parent / "kept"
    places = [study.place_of(kept, trial, 0) for trial in TRIALS[:2]]
    under_way = places[1]
    command = ["study", str(asked), "--output", str(kept)]
    under_way.mkdir(parents=True)
    (trial,) = [t for t in study.read(asked).trials if t.name == TRIALS[1]]
    run_folder.write_json(under_way / run_folder.CONFIG, trial.settings.as_dict())
    with filelock.FileLock(under_way / run_folder.LOCK):
        assert main(command) == 0
    assert trained == [place.name for place in places if place != under_way]
    assert "left to other processes: 1 of 2 runs" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="not complete: method=stam has the seeds"):
        results.collect(kept, asked.parent / "collected")
    assert main(command) == 0  # The other process is gone: what it left undone is made up for.
    assert trained[1:] == [under_way.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("question =", "query ="), "a study has question, seeds, settings, trials; look at 'query'"),
        (("seeds = 2", "seeds = 0"), "seeds is the number of runs of each trial, at least 1; got 0"),
        (("epochs = 2", "epochs = 0"), "trial 1: .*epochs.*Must be >= 1"),
        (("width =", "breadth ="), "trial 1: .*breadth"),
        (("[0.01, 0.03]", "[0.01, 0.1]"), "trial 2: method=stam learning_rate=0.1 is there already"),
        (("[settings]", "[settings"), "cannot read the study"),
        (("[[trials]]", "[[settings.trials]]"), "a study has .*; look at 'trials'"),
        ((STUDY[STUDY.index("[[trials]]") :], "[trials]"), r"trials a list of at least one, \[\[trials\]\]"),
        (("epochs = 2", "seed = 1"), "trial 1: the seeds are counted by the study's seeds, not by seed"),
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


NOT_RUN = {path.stem for path in study.STUDIES.glob("*.toml")} - {
    path.name for path in pages.RESULTS.iterdir()
}


@pytest.mark.parametrize("name", sorted(NOT_RUN))
def test_every_study_that_was_not_run_can_be_read(name):
    assert study.read(study.named(name)).question.endswith("?")


# Of settings that this version has not got any more.
EARLIER = {
    "annealing", "annealing_longer", "blend", "blocks", "cooling", "digits", "few_images", "hold",
    "hold_scan", "inertia", "penalty", "proportional", "pull", "relaxation", "rivals", "tuning",
    "weighted", "width",
}  # fmt: skip


@pytest.mark.parametrize("folder", results.folders(pages.RESULTS, studies=True), ids=lambda path: path.name)
def test_every_kept_study_is_one_that_can_be_asked_again_or_one_of_an_earlier_version(folder):
    kept = results.read(folder)
    assert {row["trial"] for row in kept.rows} == set(kept.config["trials"])
    if folder.name in EARLIER:
        with pytest.raises(SettingsError, match="there is no study"):
            study.named(folder.name)
        return
    asked = study.read(study.named(folder.name))
    assert (kept.config["question"], kept.config["seeds"]) == (asked.question, asked.seeds)
    for trial in asked.trials:
        values = kept.config["settings"] | kept.config["trials"][trial.name]
        assert TrainSettings().as_dict() | values | {"seed": 0} == trial.settings.as_dict()


def test_a_trial_may_begin_at_a_float_network(asked, monkeypatch):
    begun = {}

    def rehearse(self, seed, folder, *arguments, start, **options):
        begun[folder] = self.settings.method, start
        (folder / run_folder.RELAXED).touch()
        return run_without_training(self, seed, folder)

    monkeypatch.setattr(Trainer, "rehearse", rehearse)
    asked.write_text(SHORT.replace("seeds = 2", "seeds = 1").replace('["float", "stam"]', '"stam"'))
    with asked.open("a") as file:
        file.write("warm_start = true\n")
    assert main(["study", str(asked), "--output", str(asked.parent / "kept")]) == 0
    (row,) = results.read(asked.parent / "kept").rows
    folder = study.place_of(asked.parent / "kept", row["trial"], 0)
    assert begun == {
        folder / "float": ("float", None), folder: ("stam", folder / "float" / run_folder.RELAXED)
    }  # fmt: skip
