"""The command line, driven as a user drives it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import stam_jax
from experiments.cli import main
from experiments.config import DivergedError
from experiments.data import image_sets
from experiments.deployment import packed_network, predict
from experiments.reporting import results, run_folder

ROOT = Path(__file__).parent.parent
TINY = ("--epochs", "2", "--width", "0.125", "--batch-size", "128")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m experiments` in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments", *arguments],
        cwd=folder,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "HOME": str(folder),
            **{name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))},
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a tiny comparison, and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    done = run(folder, "compare", *TINY, "--methods", "float", "stam", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    (only,) = (folder / "runs").iterdir()
    return only, done.stdout


def test_compare_prints_one_table_and_where_the_files_are(comparison):
    folder, printed = comparison
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines if "99." not in line and " - " in line][:1] == ["float"]
    for words in ("quantized", "relaxed", "packed", "seconds", "over 2 seeds"):
        assert words in printed
    for name in ("curves.png", "results.csv"):
        assert any(line.endswith(f"runs/{folder.name}/{name}") for line in lines)
        assert (folder / name).is_file()


def test_compare_leaves_a_row_per_run_and_a_line_per_epoch(comparison):
    folder, _ = comparison
    rows = run_folder.read_csv(folder / "results.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("float", 0), ("float", 1), ("stam", 0), ("stam", 1),
    ]  # fmt: skip
    for row in rows:
        place = folder / f"{row['method']}-seed{row['seed']}"
        assert row["bytes_float"] == (place / "relaxed.safetensors").stat().st_size
        lines = run_folder.read_csv(place / "metrics.csv")
        assert [line["epoch"] for line in lines] == [1, 2]
        assert 0 <= row["relaxed_accuracy"] <= 1
        if row["method"] == "stam":
            assert row["bytes_packed"] == (place / "packed.safetensors").stat().st_size
            assert row["bytes_packed"] < row["bytes_float"]
            assert row["binary_share"] > 0.9
            assert lines[0]["sign_flips"] > 0
            assert lines[0]["quantization_gap"] > lines[1]["quantization_gap"]
        else:
            assert row["hard_accuracy"] is None


def test_every_run_says_what_it_was_run_with(comparison):
    folder, _ = comparison
    (environment,) = json.loads((folder / "environment.json").read_text())
    assert environment["arguments"][0] == "compare"
    assert {"jax", "optax", "flax", "stam-jax"} <= environment["packages"].keys()
    assert environment["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert {"commit", "changed"} == environment["git"].keys()
    config = json.loads((folder / "stam-seed1" / "config.json").read_text())
    assert (config["method"], config["seed"], config["epochs"]) == ("stam", 1, 2)


def test_a_config_repeats_its_run_to_the_last_bit(comparison, tmp_path, monkeypatch):
    folder, _ = comparison
    monkeypatch.chdir(tmp_path)
    before = folder / "stam-seed1"
    assert main(["train", "--config", str(before / "config.json"), "--output", "again"]) == 0
    for name in ("relaxed.safetensors", "packed.safetensors"):
        first, second = load_file(before / name), load_file(Path("again") / name)
        assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}
    assert Path("again/config.json").read_text() == (before / "config.json").read_text()


def test_other_seeds_give_other_networks(comparison):
    folder, _ = comparison
    first, second = (load_file(folder / f"stam-seed{i}" / "relaxed.safetensors") for i in (0, 1))
    assert any(first[name].tobytes() != second[name].tobytes() for name in first)


def test_evaluate_finds_the_recorded_accuracy_in_the_packed_files(comparison, capsys):
    folder, _ = comparison
    for place in (folder, folder.parent):  # As deep as the runs of a table lie.
        assert main(["evaluate", str(place)]) == 0
        printed = capsys.readouterr().out
        assert printed.count("the same") == 2
        assert "float" not in printed


IMAGES = {
    "labels": list("0123456789"),
    "shape": [8, 8, 1],
    "brightest": 16,
    "mean": [5.0],
    "deviation": [6.0],
}


def network_file(folder: Path) -> Path:
    return folder / "stam-seed0" / "packed.safetensors"


def altered(folder: Path, to: Path, **metadata: Any) -> str:
    """A copy of a run's packed file that says otherwise of itself."""
    path = network_file(folder)
    said = stam_jax.packed_metadata(path) | metadata
    stam_jax.save_packed(to / "altered.safetensors", stam_jax.load_packed(path), metadata=said)
    return str(to / "altered.safetensors")


def test_evaluate_says_when_a_file_does_not_do_as_it_did(comparison, tmp_path, capsys):
    folder, _ = comparison
    (row,) = run_folder.read_csv(folder / "stam-seed0" / "results.csv")
    recorded = row["hard_accuracy"]
    assert main(["evaluate", altered(folder, tmp_path, test_accuracy=recorded)]) == 0
    # A single image of the 450 more.
    assert main(["evaluate", altered(folder, tmp_path, test_accuracy=recorded + 1 / 450)]) == 1
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--epochs", "0"], '"0" for --epochs'),
        (["train", "--epochs", "1.5"], '"1.5" is not a whole number'),
        (["train", "--learning-rate", "-1"], '"-1.0" for --learning-rate'),
        (["train", "--learning-rate", "nan"], '"nan" for --learning-rate'),
        (["train", "--hard-from", "1.5"], '"1.5" for --hard-from'),
        (["train", "--method", "magic"], '"float", "binary_connect", "straight_through", '),
        (["train", "--dataset", "imagenet"], '"digits"'),
        (["train", "--methd", "stam"], "Did you mean --method?"),
        (["train", "--batch-size", "5000"], "--batch-size: 5000 images are more than the 1197"),
        (["train", "--exclude", "nowhere/*"], "--exclude: "),
        (["train", "--exclude", "last"], "--exclude: "),
        (["train", "--config", "missing.json"], "--config: cannot read missing.json"),
        (["compare", "--methods", "stam", "stam"], "--methods: give at least one, and none twice"),
        (["compare", "--methods", "all", "stam"], '"all" stands alone'),
        (["compare", "--seeds", "0"], '"0" for --seeds'),
        (
            ["train", "--decay-epochs", "3", "2"],
            "--decay-epochs: 3, 2 should rise and end before --epochs, 40",
        ),
        (["train", "--decay-epochs", "40"], "--decay-epochs: 40 should rise and end before --epochs, 40"),
        (["train", "--width", "0"], '"0.0" for --width'),
        (["train", "--recipe", "magic"], "there is no 'magic'; choose from best, binary_relax, cpu, parq"),
        (["compare", "--overrides.part.learning-rate", "0.1"], "--overrides.part.learning-rate"),
        (["compare", "--overrides.stam.learning-rate", "0"], '"0.0" for --overrides.stam.learning-rate'),
        (["table", "--overrides.stam.seed", "1"], "--overrides.stam.seed"),
        (["train", "--bits", "5"], '"5" for --bits'),
        (["train", "--quantizer", "least_squares", "--scale", "none"], "--scale none: least_squares"),
        (["train", "--method", "stam_proximal", "--optimizer", "adamw"], "--method stam_proximal takes"),
        (["train", "--method", "admm_quant", "--optimizer", "adamw"], "say so by --decay-latent"),
        (["inspect", "--recipe", "cpu"], "--recipe"),
        (["collect"], "name the folders"),
        (["collect", "missing"], "missing holds no results"),
        (["train", "--resume"], "--output: name the folder"),
        (["train", "--coordinator", "localhost:1"], "give --processes and --process as well"),
        (["train", "--processes", "2"], "only with --coordinator HOST:PORT"),
        (["table", "--models", "resnet8", "resnet8"], "--models: give at least one, and none twice"),
        (["prepare", "digits"], "digits needs no preparation"),
        (["train", "--seed", "4294967296"], '"4294967296" for --seed'),
        (["train", "--exclude", "*kernel"], "--exclude: "),
        (["train", "--pull", "0.01"], "--pull"),
        (["evaluate", "missing"], "missing is neither a packed file nor the folder"),
        (["evaluate"], "requires an argument"),
        (["report", "missing.md"], "There is no page missing.md"),
        (["frobnicate"], "train, compare, table, study, evaluate, inspect, predict"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_gets_one_clear_line_and_writes_nothing(
    arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.removeprefix("Starting JAX ...\n").startswith("error: ")
    assert printed.err.removeprefix("Starting JAX ...\n").count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("contents", ["no json", '{"epochs": 0}', '{"epoch": 3}', "[1]"])
def test_a_wrong_config_gets_one_clear_line_and_writes_nothing(contents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(contents)
    assert main(["train", "--config", "config.json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_of_another_network_than_it_says_is_refused(comparison, tmp_path, capsys):
    folder, _ = comparison
    for said, words in (
        ({"width": 0.25}, "holds another network than it says"),
        ({"model": "resnet9"}, "holds a network 'resnet9' in 'float32', unknown here"),
        ({"images": {}}, "does not say what images it reads"),
        ({"images": IMAGES | {"labels": ["a", "b"]}}, "holds another network than it says"),
        ({"images": IMAGES | {"shape": [10**6, 10**6, 1]}}, "says of its images what cannot be"),
        ({"images": IMAGES | {"shape": [8, 8]}}, "says of its images what cannot be"),
        ({"images": IMAGES | {"mean": ["5"]}}, "says of its images what cannot be"),
        ({"images": IMAGES | {"labels": [1] * 10}}, "says of its images what cannot be"),
        ({"images": None}, "does not say what images it reads"),
        ({"width": 1e300}, "holds a network of the width 1e+300"),
        ({"dataset": "cifar11"}, "was trained on 'cifar11', unknown here: name a --dataset"),
        ({"test_accuracy": "good"}, "says that its test_accuracy is 'good'"),
    ):
        assert main(["evaluate", altered(folder, tmp_path, **said)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "altered.safetensors").write_bytes(b"not a network")
    assert main(["inspect", str(tmp_path / "altered.safetensors")]) == 2
    assert "it is not a safetensors file" in capsys.readouterr().err


def test_evaluate_wants_images_like_those_of_training(comparison, monkeypatch, capsys):
    folder, _ = comparison
    assert main(["evaluate", str(network_file(folder)), "--dataset", "digits"]) == 0
    wider = dataclasses.replace(image_sets.load("digits"), shape=(8, 9, 1))
    monkeypatch.setattr("experiments.deployment.evaluate.loaded", lambda *rest: wider)
    assert main(["evaluate", str(network_file(folder)), "--dataset", "mnist"]) == 2
    assert "--dataset mnist: its images are (8, 9, 1) of 10 kinds" in capsys.readouterr().err


def test_a_run_without_packed_networks_cannot_be_evaluated(comparison, capsys):
    folder, _ = comparison
    assert main(["evaluate", str(folder / "float-seed0")]) == 2
    assert "its runs are of the float network, or did not finish" in capsys.readouterr().err


def test_inspect_shows_that_every_kernel_is_packed_with_a_scale_per_channel(comparison, capsys):
    folder, _ = comparison
    assert main(["inspect", str(folder / "stam-seed0" / "packed.safetensors")]) == 0
    out = capsys.readouterr().out
    kernels = [line.split() for line in out.splitlines() if "/kernel " in line]
    assert len(kernels) == 10
    for line in kernels:
        _, shape, quantizer, scales, _, gap, why = line
        assert (quantizer, scales, gap, why) == ("Binary(axis=-1)", shape.split("x")[-1], "0", "packed")
    others = [line.split() for line in out.splitlines() if line.startswith(("params/", "stats/"))]
    assert {line[2] for line in others if "/kernel" not in line[0]} == {"-"}
    assert "method stam, seed 0, test_accuracy" in out


def test_predict_reads_pictures_of_any_size_as_the_network_read_its_own(comparison, tmp_path, capsys):
    folder, _ = comparison
    network = packed_network.load(folder / "stam-seed0" / "packed.safetensors")
    digits = image_sets.load("digits").test
    paths = []
    for i in range(10):
        grey = Image.fromarray(np.round(digits.images[i, :, :, 0] * (255 / 16)).astype(np.uint8))
        paths.append(tmp_path / f"{i}.png")
        # As large as a picture may be, with borders left and right, in color.
        wide = Image.new("RGB", (60, 40), "red")
        wide.paste(grey.resize((40, 40), Image.Resampling.NEAREST), (10, 0))
        wide.save(paths[-1])
        np.testing.assert_array_equal(predict.read_picture(paths[-1], network.images), digits.images[i])
    assert main(["predict", str(network_file(folder)), *map(str, paths)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
    chances = packed_network.probabilities(network, digits.images[:10])
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
    assert [line[1] for line in lines] == [network.images.labels[k] for k in chances.argmax(axis=1)]


def test_pictures_of_two_bytes_a_pixel_are_read_as_those_of_one(comparison, tmp_path):
    folder, _ = comparison
    images = packed_network.load(network_file(folder)).images
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(ramp).save(tmp_path / "one.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "two.png")
    one, two = (predict.read_picture(tmp_path / name, images) for name in ("one.png", "two.png"))
    np.testing.assert_array_equal(two, one)
    assert len(np.unique(one)) == 17


def test_names_with_brackets_are_names(comparison, tmp_path, capsys):
    folder, _ = comparison
    (tmp_path / "b[").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "b[" / "c].png")
    assert main(["predict", str(network_file(folder)), str(tmp_path / "b[" / "c].png")]) == 0
    assert "b[/c].png" in capsys.readouterr().out.replace("\n", "")


def test_predict_says_what_it_cannot_read(comparison, tmp_path, capsys):
    folder, _ = comparison
    (tmp_path / "text.png").write_text("no picture")
    assert main(["predict", str(network_file(folder)), str(tmp_path / "text.png")]) == 2
    assert "cannot read the picture" in capsys.readouterr().err
    assert main(["predict", str(network_file(folder))]) == 2
    assert "--pictures requires an argument" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "none.safetensors"), str(tmp_path / "text.png")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverges_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--method", "float", "--learning-rate", "1e30"]) == 1
    assert "error: training diverged. float: the loss is nan in epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(DivergedError("the loss is nan"), 1), (KeyboardInterrupt(), 130)], ids=str
)
def test_divergence_and_interrupts_have_exit_codes_of_their_own(error, code, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr("experiments.training.compare.train", fails)
    assert main(["train", *TINY]) == code
    assert ("diverged" if code == 1 else "interrupted") in capsys.readouterr().err


def test_inspect_shows_kernels_that_stay_in_float_as_such(comparison, tmp_path, capsys):
    folder, _ = comparison
    leaves = stam_jax.load_packed(network_file(folder))
    leaves["params/head/kernel"] = np.asarray(leaves["params/head/kernel"].unpack())
    stam_jax.save_packed(tmp_path / "mixed", leaves)
    assert main(["inspect", str(tmp_path / "mixed")]) == 0
    (line,) = (line.split() for line in capsys.readouterr().out.splitlines() if "head/kernel" in line)
    assert line[2:4] == ["-", "-"]


def test_inspect_refuses_a_file_in_which_nothing_is_packed(tmp_path, capsys):
    stam_jax.save_packed(tmp_path / "bare", {"bias": np.zeros(3, np.float32)})
    assert main(["inspect", str(tmp_path / "bare")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


KEPT = ROOT / "experiments" / "results"


@pytest.mark.parametrize("folder", results.folders(KEPT, studies=False), ids=lambda path: path.name)
def test_the_command_of_every_kept_comparison_is_one_of_this_version(folder, monkeypatch):
    given = []
    take = lambda settings, *rest, **options: given.append(settings)
    monkeypatch.setattr("experiments.training.compare.compare", take)
    assert main(["compare", "--config", str(folder / "config.json")]) == 0
    assert given[0].as_dict() == json.loads((folder / "config.json").read_text())


def test_options_win_over_the_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text('{"epochs": 3, "batch_size": 100}')
    assert main(["train", "--config", "config.json", "--batch-size", "5000"]) == 2
    assert "5000 images" in capsys.readouterr().err


def test_results_are_never_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/precious.txt").write_text("precious")
    assert main(["train", "--output", "full"]) == 2
    assert "is not empty" in capsys.readouterr().err
    Path("file").write_text("a file")
    assert main(["train", "--output", "file"]) == 2
    assert "cannot use file" in capsys.readouterr().err


def test_the_exit_code_reaches_the_shell_and_help_is_for_everyone(tmp_path):
    assert run(tmp_path, "train", "--epochs", "0").returncode == 2
    helped = run(tmp_path, "train", "--help")
    assert helped.returncode == 0
    assert "--learning-rate" in helped.stdout
    assert "--recipe" not in run(tmp_path, "inspect", "--help").stdout
    assert not list(tmp_path.iterdir())
