"""Training stops and goes on, on any number of devices and from any loader, as if nothing had happened."""

import dataclasses
import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from experiments.cli import RECIPES, main
from experiments.config import (
    CompareSettings,
    Execution,
    Override,
    Overrides,
    SettingsError,
    StoppedError,
    TrainSettings,
)
from experiments.data import devices, image_sets
from experiments.networks import float_files
from experiments.reporting import run_folder
from experiments.training import compare, optimizers
from experiments.training.run import Progress, Trainer
from tests.helpers import run_without_training

TINY = TrainSettings(width=0.125, epochs=3, batch_size=128)
QUICK = ("--width", "0.125", "--epochs", "2", "--batch-size", "128")
STEPS = 9  # An epoch of the 1,197 digits.


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(TINY, image_sets.load("digits"))


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    trainer.run(0, folder)
    return folder


def metrics(folder: Path) -> list[dict]:
    """The metrics of a run, but for how long it took."""
    return [row | {"seconds": None} for row in run_folder.read_csv(folder / run_folder.METRICS)]


def weights(folder: Path) -> dict[str, bytes]:
    """Every bit of a run's network."""
    return {name: array.tobytes() for name, array in load_file(folder / run_folder.RELAXED).items()}


def run_until(trainer: Trainer, folder: Path, stop: int, number: int = signal.SIGTERM) -> None:
    """A run that gets a signal at a step."""
    progress = Progress(step=lambda step: os.kill(os.getpid(), number) if step == stop else None)
    with devices.stop_requests() as stop_requested:
        trainer.run(0, folder, progress, stop_requested=stop_requested)


@pytest.mark.parametrize("stops", [[STEPS], [2, 2 * STEPS + 1], [STEPS + 4]], ids=str)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(trainer, whole, tmp_path, stops):
    for step in stops:
        with pytest.raises(StoppedError, match=f"after {step} of {3 * STEPS} steps"):
            run_until(trainer, tmp_path, step)
    trainer.run(0, tmp_path)
    assert weights(tmp_path) == weights(whole)
    assert metrics(tmp_path) == metrics(whole)


def test_a_run_goes_on_from_its_last_kept_state_when_it_was_cut_off(trainer, whole, tmp_path):
    class PowerCutError(Exception):
        """No time to save."""

    def cut(step: int) -> None:
        if step == STEPS + 4:
            raise PowerCutError

    keeping = Trainer(TINY, trainer.dataset, Execution(checkpoint_every=1))
    with pytest.raises(PowerCutError):
        keeping.run(0, tmp_path, Progress(step=cut))
    seen = []
    keeping.run(0, tmp_path, Progress(step=seen.append))
    assert seen[0] == STEPS
    assert weights(tmp_path) == weights(whole)
    assert metrics(tmp_path) == metrics(whole)
    kept = {int(path.name) for path in (tmp_path / run_folder.CHECKPOINTS).iterdir()}
    assert kept == {STEPS, 2 * STEPS, 3 * STEPS}


def test_a_line_of_metrics_that_was_cut_off_is_written_anew(trainer, whole, tmp_path):
    with pytest.raises(StoppedError):
        run_until(trainer, tmp_path, STEPS + 1)
    with (tmp_path / run_folder.METRICS).open("a") as file:
        file.write("2,18,0.5")
    trainer.run(0, tmp_path)
    assert metrics(tmp_path) == metrics(whole)


def test_a_signal_after_the_run_means_what_it_meant_before(trainer, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with pytest.raises(StoppedError):
            run_until(trainer, tmp_path, 1, number)
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_interrupt_does_not_wait_for_the_state(trainer, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # As in a process of one's own.

    def interrupt(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), devices.stop_requests() as stop_requested:
        trainer.run(0, tmp_path, Progress(step=interrupt), stop_requested=stop_requested)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_saves_the_state_and_prints_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    learn = Trainer._measure

    def interrupted(self, epoch, *rest):
        os.kill(os.getpid(), signal.SIGINT)
        return learn(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "_measure", interrupted)
    assert main(["train", *QUICK]) == 130
    (folder,) = Path("runs").iterdir()
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith("stopped in epoch 1, after 9 of 18 steps; the state is saved")
    assert said[-1].split() == [
        "python", "-m", "experiments", "train", *QUICK, "--output", str(folder), "--resume",
    ]  # fmt: skip
    monkeypatch.setattr(Trainer, "run", run_without_training)
    assert main(said[-1].split()[3:]) == 0
    assert "no checkpoint" not in capsys.readouterr().out
    assert not (folder / run_folder.CHECKPOINTS).exists()  # It only served to go on.


def test_an_interrupt_that_does_not_wait_prints_the_command_too(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", interrupted)
    assert main(["train", *QUICK, "--output", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == "interrupted. To go on:"
    assert said[-1].split()[-3:] == ["--output", str(tmp_path / "run"), "--resume"]


def test_a_run_without_a_checkpoint_says_that_it_starts_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "run", run_without_training)
    arguments = ["train", *QUICK, "--output", str(tmp_path / "run"), "--resume"]
    assert main(arguments) == 0
    assert "no checkpoint yet" not in capsys.readouterr().out
    (tmp_path / "run" / run_folder.RESULTS).unlink()
    assert main(arguments) == 0
    assert "no checkpoint yet: starting over" in capsys.readouterr().out


def test_streamed_images_train_the_same_network(trainer, whole, tmp_path):
    streaming = Trainer(TINY, trainer.dataset, Execution(loader="stream"))
    with pytest.raises(StoppedError):
        run_until(streaming, tmp_path, STEPS + 2)
    streaming.run(0, tmp_path)
    for mine, other in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_steps_that_devices_take_on_their_own_are_the_same_steps(trainer, whole, tmp_path):
    # Four at most, and so that the nine of an epoch are whole calls; stopped amid one, it goes on to its end.
    by_threes = Trainer(TINY, trainer.dataset, Execution(steps_per_call=4))
    with pytest.raises(StoppedError):
        run_until(trainer, tmp_path, STEPS + 2)
    seen = []
    by_threes.run(0, tmp_path, Progress(step=seen.append))
    assert seen == [STEPS + 2, STEPS + 3, *range(STEPS + 6, 3 * STEPS + 1, 3)]
    for row, expected in zip(metrics(tmp_path), metrics(whole), strict=True):
        assert row == pytest.approx(expected, abs=0.01, nan_ok=True)


def test_gpus_take_whole_calls_of_steps_on_their_own_unless_the_images_are_streamed(trainer, monkeypatch):
    assert trainer.steps_per_call == 1
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    executions = (Execution(), Execution(steps_per_call=8), Execution(loader="stream"))
    counts = [Trainer(TINY, trainer.dataset, execution).steps_per_call for execution in executions]
    assert counts == [STEPS, 3, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", "2"), "--workers: only with --loader stream"),
        (("--loader", "stream", "--steps-per-call", "2"), "--steps-per-call: only with --loader memory"),
    ],
    ids=["workers", "steps per call"],
)
def test_an_option_of_one_loader_is_refused_with_the_other(options, said, tmp_path, capsys):
    assert main(["train", *QUICK, *options, "--output", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_measuring_seldom_changes_nothing_but_what_is_measured(trainer, whole, tmp_path):
    seldom = Trainer(dataclasses.replace(TINY, measure_every=2), trainer.dataset)
    seldom.run(0, tmp_path)
    assert weights(tmp_path) == weights(whole)
    assert [row["epoch"] for row in metrics(tmp_path)] == [2, 3]


def test_a_warm_start_begins_at_the_weights_of_a_run(trainer, whole):
    import jax

    state = trainer.initial_state(jax.random.key(5), whole / run_folder.RELAXED)
    begun = {**float_files.to_arrays(state.params), **float_files.to_arrays(state.stats)}
    assert {name: array.tobytes() for name, array in begun.items()} == weights(whole)


def test_a_method_has_its_own_settings_in_the_place_of_those_for_all():
    overrides = Overrides(
        parq=Override(learning_rate=0.3, decay_from=0.5), stam=Override(exclude=("stem", "head"))
    )
    settings = CompareSettings(learning_rate=0.05, overrides=overrides)
    assert settings.run("parq", 0) == TrainSettings(method="parq", learning_rate=0.3, decay_from=0.5)
    expected = TrainSettings(method="stam", learning_rate=0.05, exclude=("stem", "head"), seed=2)
    assert settings.run("stam", 2) == expected
    assert settings.run("float", 0) == TrainSettings(method="float", learning_rate=0.05)


def test_the_float_run_of_a_warm_start_has_the_settings_of_float_and_not_those_of_the_method(tmp_path):
    overrides = Overrides(parq=Override(learning_rate=0.3, decay_from=0.5), float=Override(momentum=0.7))
    settings = CompareSettings(methods=("parq",), learning_rate=0.05, warm_start=True, overrides=overrides)
    start, warm = compare.jobs_of(settings, tmp_path, resume=False)
    assert (start.settings, warm.settings) == (settings.run("float", 0), settings.run("parq", 0))
    assert (start.settings.learning_rate, start.settings.decay_from) == (0.05, None)
    assert (start.settings.momentum, warm.settings.momentum) == (0.7, 0.9)
    assert warm.start == start.folder


def test_train_runs_the_float_network_of_a_warm_start_first(tmp_path, monkeypatch):
    begun = []

    def run(self, seed, folder, *arguments, start, **options):
        begun.append((self.settings.method, start))
        (folder / run_folder.RELAXED).touch()
        return run_without_training(self, seed, folder)

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--warm-start", *QUICK, "--output", "warm"]) == 0
    assert begun == [("float", None), ("stam", Path("warm/float") / run_folder.RELAXED)]
    assert run_folder.read_settings(Path("warm/float") / run_folder.CONFIG).method == "float"


def test_metrics_go_to_tensorboard_on_request(tmp_path):
    with run_folder.Recorder(tmp_path, keep=0, tensorboard=True) as recorder:
        recorder.append({"epoch": 1, "step": 9, "hard_accuracy": 0.5, "sign_flips": None})
    (file,) = (tmp_path / run_folder.TENSORBOARD).iterdir()
    assert b"hard_accuracy" in file.read_bytes()
    assert run_folder.read_csv(tmp_path / run_folder.METRICS)[0]["hard_accuracy"] == 0.5


def test_the_step_size_falls_tenfold_after_each_of_some_epochs():
    settings = TrainSettings(
        method="float", epochs=10, decay_epochs=(4, 8), learning_rate=0.5, momentum=0.0, weight_decay=0.0
    )
    params = {"kernel": np.ones((2, 2), np.float32)}
    optimizer = optimizers.build(settings, optimizers.choose(params, settings), steps=30, epoch=3)
    state, taken = optimizer.init(params), []
    for _ in range(30):
        updates, state = optimizer.update({"kernel": np.ones((2, 2), np.float32)}, state, params)
        taken.append(-float(updates["kernel"][0, 0]))
    np.testing.assert_allclose(taken, [0.5] * 12 + [0.05] * 12 + [0.005] * 6, rtol=1e-6)


@pytest.mark.parametrize("decay", [{}, {"decay_from": 0.5}, {"decay_epochs": (5,)}], ids=str)
def test_a_warm_up_leads_in_a_straight_line_to_the_step_size_as_it_is_otherwise(decay):
    params = {"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    gradients = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}

    def sizes(warmup_epochs: int) -> np.ndarray:
        common = {"method": "float", "momentum": 0.0, "weight_decay": 0.0, "epochs": 8, **decay}
        settings = TrainSettings(warmup_epochs=warmup_epochs, **common)
        optimizer = optimizers.build(settings, optimizers.choose(params, settings), steps=40, epoch=5)
        state, taken = optimizer.init(params), []
        for _ in range(40):
            updates, state = optimizer.update(gradients, state, params)
            taken.append(-float(updates["bias"][0]))
        return np.array(taken)

    growth = np.minimum(np.arange(1, 41) / 10, 1)
    np.testing.assert_allclose(sizes(2), growth * sizes(0), rtol=1e-6)


def test_plain_momentum_is_that_of_optax_sgd():
    settings = TrainSettings(method="float", nesterov=False, weight_decay=0.0, epochs=1)
    params = {"kernel": np.ones((2, 2), np.float32)}
    mine = optimizers.build(settings, optimizers.choose(params, settings), steps=5, epoch=5)
    theirs = optax.sgd(optax.cosine_decay_schedule(0.1, 5), momentum=0.9)
    states = [mine.init(params), theirs.init(params)]
    for i in range(5):
        gradient = {"kernel": np.full((2, 2), 1.0 + i, np.float32)}
        steps: list[Any] = [
            optimizer.update(gradient, state, params)
            for optimizer, state in zip((mine, theirs), states, strict=True)
        ]
        (a, states[0]), (b, states[1]) = steps
        np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_and_runs(path, tmp_path, monkeypatch):
    text = path.read_text()
    assert "Expected score: " in text
    assert f"python -m experiments train --recipe {path.stem} " in text
    values = tomllib.loads(text)
    monkeypatch.chdir(tmp_path)
    given = []
    monkeypatch.setattr(
        "experiments.training.compare.train", lambda settings, *rest, **options: given.append(settings)
    )
    assert main(["train", "--recipe", path.stem, "--model", "vgg11"]) == 0
    (settings,) = given
    assert settings.model == "vgg11"
    overrides = values.pop("overrides", {})
    wanted = values | overrides.get("stam", {})
    assert {name: settings.as_dict()[name] for name in wanted} == wanted
    for method, wanted in overrides.items():
        assert main(["train", "--recipe", path.stem, "--method", method]) == 0
        assert {name: given[-1].as_dict()[name] for name in wanted} == wanted


def test_options_win_over_the_recipe(monkeypatch):
    given = []
    monkeypatch.setattr(
        "experiments.training.compare.train", lambda settings, *rest, **options: given.append(settings)
    )
    assert main(["train", "--recipe", "cpu", "--epochs", "7", "--decay-from", "0.4"]) == 0
    assert (given[0].epochs, given[0].batch_size, given[0].decay_from) == (7, 128, 0.4)


def test_a_batch_that_the_devices_cannot_share_is_refused(trainer, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 3)
    with pytest.raises(SettingsError, match="--batch-size: 128 images cannot be shared evenly by 3 devices"):
        Trainer(TINY, trainer.dataset)


def test_what_is_finished_stays_as_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", run_without_training)
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--methods", "float", *QUICK, "--output", "run"]
    assert main(arguments) == 0
    before = Path("run/float-seed0/environment.json").read_text()
    Path("run/float-seed0-old").mkdir()  # Of no concern.
    Path("run/float-seed0-old/results.csv").write_text("method\n")
    monkeypatch.setattr("sys.argv", ["experiments", "another", "command"])
    assert main([*arguments, "--resume"]) == 0
    assert Path("run/float-seed0/environment.json").read_text() == before


def test_resuming_with_other_settings_says_which(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    run_folder.write_json(Path("run/config.json"), TINY.as_dict())
    assert main(["train", "--resume", "--output", "run", "--width", "0.125", "--batch-size", "128"]) == 2
    assert "epochs was 3, and is 40 now" in capsys.readouterr().err
    run_folder.write_json(Path("run/config.json"), TrainSettings().as_dict() | {"pull": 0.01})
    assert main(["train", "--resume", "--output", "run"]) == 2
    assert "pull was 0.01, and is no setting now" in capsys.readouterr().err
    Path("run/config.json").write_text("")
    assert main(["train", "--resume", "--output", "run"]) == 2
    assert "cannot read run/config.json" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/note.txt").write_text("not a run")
    assert main(["train", "--resume", "--output", "other"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
