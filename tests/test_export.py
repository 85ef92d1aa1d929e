"""Packed networks for other programs: each form is read back by what is to read it."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import numpy_helper

import stam_jax
from experiments.cli import main
from experiments.config import SettingsError, TrainSettings
from experiments.data import image_sets, tfds
from experiments.deployment import export, onnx_network, packed_network
from experiments.reporting import run_folder
from tests.helpers import slow

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "experiments.md").read_text()
ACCURACY = 0.8125

# Networks of every part there is: convolutions, pools, both shortcuts, attention, all scales, a float head.
NETWORKS: dict[str, dict[str, Any]] = {
    "vgg11": {"width": 0.125, "quantizer": stam_jax.Binary(axis=())},
    "resnet8": {"width": 0.5},
    "resnet20": {"width": 0.25, "quantizer": stam_jax.Binary(scale=1.0), "exclude": ("head",)},
    "bfloat16": {"model": "resnet8", "width": 0.25, "precision": "bfloat16"},
    "vit6": {"width": 0.25, "exclude": ("head",)},
}


def filled(shapes: Any, quantizer: Any, exclude: tuple[str, ...]) -> Any:
    """Weights and statistics from NumPy, which need no training; kernels are packed."""
    draws = np.random.default_rng(0)
    quantizers = dict.fromkeys(exclude) | {"*": quantizer}
    rows = {row.path: row.quantizer for row in stam_jax.tabulate(shapes["params"], quantizers).rows}

    def fill(path: Any, leaf: Any) -> Any:
        name = "/".join(str(key.key) for key in path)
        if name.startswith("params/") and (chosen := rows[name.removeprefix("params/")]):
            return random_bits(leaf.shape, chosen, draws)
        spread = "var" in name or "scale" in name
        return (draws.uniform(0.5, 1.5, leaf.shape) if spread else draws.normal(size=leaf.shape) / 10).astype(
            np.float32
        )

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_bits(shape: tuple[int, ...], quantizer: Any, draws: np.random.Generator) -> stam_jax.Packed:
    """Random codes below 3 or 2, and scales that keep the size of the features."""
    bits = 1 if isinstance(quantizer, stam_jax.Binary) else 2
    codes = draws.integers(0, min(3, 2**bits), shape, np.uint8)
    flags = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    scales = jax.eval_shape(quantizer.scales, jax.ShapeDtypeStruct(shape, np.float32))
    size = np.sqrt(2 / math.prod(shape[:-1])) * draws.uniform(0.5, 1.5, scales.shape)
    return stam_jax.Packed(
        codes=np.packbits(flags.reshape(*shape[:-1], -1), axis=-1, bitorder="little"),
        scales=(np.ones(scales.shape) if quantizer.scale else size).astype(np.float32),
        shape=shape,
        dtype=np.dtype(np.float32),
        quantizer=quantizer,
    )


def save(
    path: Path,
    *,
    width: float = 0.25,
    model: Any = "resnet8",
    exclude: tuple[str, ...] = (),
    precision: Any = "float32",
    dataset: Any = "digits",
    quantizer: Any = stam_jax.Binary(),
) -> Path:
    """The packed file of a network with random weights."""
    images = image_sets.load("digits")
    _, params, stats = packed_network.abstract(model, images, width, precision)
    tree = filled({"params": params, "stats": stats}, quantizer, exclude)
    if quantizer.scale:  # Weights of +-1 make large features.
        tree["stats"] = jax.tree.map(lambda x: 50 * np.abs(x), tree["stats"])
    settings = TrainSettings(model=model, width=width, precision=precision, dataset=dataset, seed=3)
    packed_network.save(
        path, tree["params"], tree["stats"], settings=settings, images=images, accuracy=ACCURACY
    )
    return path


class OnDemand(dict):
    """A dictionary that makes what it lacks."""

    def __init__(self, make: Callable[[str], Path]):
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Path:
        self[name] = self._make(name)
        return self[name]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The packed file of each network, made when it is asked for."""
    folder = tmp_path_factory.mktemp("networks")
    return OnDemand(lambda name: save(folder / f"{name}.safetensors", **{"model": name, **NETWORKS[name]}))


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return image_sets.load("digits").test.images[:256]


def logits(path: Path, images: np.ndarray, **changes: Any) -> np.ndarray:
    """What the network in a packed file makes of images."""
    network = dataclasses.replace(packed_network.load(path), **changes)
    return np.asarray(jax.jit(packed_network.apply, static_argnums=0)(network.graph, network.tree, images))


def is_packed(node: Any) -> bool:
    return isinstance(node, stam_jax.Packed)


def bytes_of_codes(path: Path) -> int:
    return sum(
        x.codes.size
        for x in jax.tree.leaves(packed_network.load(path).tree, is_leaf=is_packed)
        if is_packed(x)
    )


def environment() -> dict[str, str]:
    """An environment in which nothing of this project is to be found."""
    jax_options = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    return {"PATH": "/usr/bin:/bin", **jax_options, "JAX_PLATFORMS": "cpu"}


def export_to(form: str, path: Path, output: Path, *options: str) -> int:
    return main(["export", str(path), "--to", form, "--output", str(output), *options])


# StableHLO


@pytest.fixture(scope="module")
def programs(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The StableHLO file of each network, made when it is asked for."""

    def make(name: str) -> Path:
        output = tmp_path_factory.mktemp("programs") / name
        assert export_to("stablehlo", files[name], output) == 0
        return output

    return OnDemand(make)


@pytest.mark.parametrize("name", ["resnet8", *slow(sorted(NETWORKS.keys() - {"resnet8"}))])
def test_a_program_gives_the_logits_of_the_packed_network_for_any_number_of_images(
    name, files, programs, digits
):
    program = jax.export.deserialize(bytearray(programs[name].read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    (images,) = program.in_avals
    assert (str(images.shape), images.dtype) == ("(batch, 8, 8, 1)", np.uint8)
    expected = logits(files[name], digits)
    tolerance = 1e-5 if name != "bfloat16" else 0.02 * np.max(np.abs(expected))
    actual = np.asarray(program.call(digits))
    np.testing.assert_allclose(actual, expected, atol=tolerance)
    if name != "bfloat16":
        np.testing.assert_array_equal(actual.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(program.call(digits[:3]), expected[:3], atol=tolerance)


CONSTANT = re.compile(r"stablehlo\.constant dense.*> : tensor<((?:\d+x)*)(\w+)>")


@pytest.mark.parametrize("name", ["resnet8", *slow(sorted(NETWORKS.keys() - {"resnet8"}))])
def test_a_program_holds_kernels_as_bits_alone(name, files, programs):
    program = jax.export.deserialize(bytearray(programs[name].read_bytes()))
    sizes = [
        (kind, math.prod(map(int, shape.split("x")[:-1])))
        for shape, kind in CONSTANT.findall(program.mlir_module())
    ]
    floats = max(size for kind, size in sizes if kind == "f32")
    tree = packed_network.load(files[name]).tree
    whole = [x for x in jax.tree.leaves(tree, is_leaf=is_packed) if not is_packed(x)]
    assert floats == max(x.size for x in whole)
    assert sum(size for kind, size in sizes if kind == "ui8") >= bytes_of_codes(files[name])
    # The packed file, and the operations, which do not grow with the weights.
    assert programs[name].stat().st_size < files[name].stat().st_size + 16_000


def test_a_compiled_program_holds_kernels_as_bits_alone(files, programs, digits):
    program = jax.export.deserialize(bytearray(programs["vgg11"].read_bytes()))
    compiled = jax.jit(program.call).lower(digits).compile().as_text()
    assert compiled is not None
    sizes = Counter()
    for kind, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* constant\(", compiled):
        sizes[kind] += math.prod(map(int, shape.split(","))) if shape else 1
    codes = bytes_of_codes(files["vgg11"])
    assert sizes["u8"] >= codes
    assert sizes["f32"] < codes  # Of eight times as many weights.


def test_a_program_does_not_tell_of_the_machine_that_it_was_made_on(files, programs, tmp_path, monkeypatch):
    source_lines = lambda: getattr(jax.config, "jax_traceback_in_locations_limit")  # noqa: B009
    before = source_lines()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert export_to("stablehlo", files["vgg11"], tmp_path / "program") == 0
    contents = programs["vgg11"].read_bytes()
    assert (tmp_path / "program").read_bytes() == contents
    assert source_lines() == before
    program = jax.export.deserialize(bytearray(contents)).mlir_module()
    assert ".py" not in program
    # Convolutions into few pixels have a way of their own on CPU: six of the eight here.
    assert program.count("stablehlo.dot_general") >= 6


def test_a_program_needs_nothing_but_jax_as_the_docs_show(files, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", DOCS[DOCS.index("## Export") :], flags=re.DOTALL)
    assert export_to("stablehlo", files["resnet8"], tmp_path / "network.stablehlo") == 0
    code = (
        f"{block}\nimport sys\nassert logits.shape == (2, 10)\n"
        "assert not {'flax', 'optax', 'stam_jax', 'experiments'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ONNX


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["vgg11", *slow(sorted(NETWORKS.keys() - {"vgg11", "vit6"}))])
def test_an_onnx_file_gives_the_logits_and_labels_of_jax(name, files, digits, tmp_path, capsys):
    output = tmp_path / "network.onnx"
    assert export_to("onnx", files[name], output) == 0
    said = capsys.readouterr().out
    assert "onnxruntime gives 256 test images of digits the labels that JAX gives" in said
    assert ("in float32, where it was trained in bfloat16" in said) == (name == "bfloat16")
    run = session(output)
    (images,) = run.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 8, 8, 1])
    expected = logits(files[name], digits, precision="float32")
    (actual,) = run.run(["logits"], {"images": digits})
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    np.testing.assert_array_equal(actual.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(run.run(None, {"images": digits[:1]})[0], expected[:1], atol=1e-4)
    properties = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert json.loads(properties.pop("labels")) == list("0123456789")
    assert properties == {"dataset": "digits", "method": "stam", "seed": "3", "test_accuracy": "0.8125"}


@pytest.mark.parametrize("name", ["vgg11", *slow(sorted(NETWORKS.keys() - {"vgg11", "vit6"}))])
def test_an_onnx_file_holds_kernels_as_bits_alone(name, files, tmp_path):
    output = tmp_path / "network.onnx"
    assert export_to("onnx", files[name], output) == 0
    constants = {x.name: numpy_helper.to_array(x) for x in onnx.load(output).graph.initializer}
    tree = packed_network.load(files[name]).tree
    leaves = jax.tree_util.tree_leaves_with_path(tree["params"], is_leaf=is_packed)
    for path, leaf in leaves:
        here = "/".join(str(key.key) for key in path)
        if not is_packed(leaf):
            assert constants[here].size == leaf.size
            continue
        assert constants[f"{here}/codes"].nbytes == -(-math.prod(leaf.shape) // 8)
        assert constants[f"{here}/scales"].size == leaf.scales.size
        assert here not in constants


def broken(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the graph that is made be another than it should."""
    build = onnx_network.build

    def changed(network: packed_network.Stored) -> onnx.ModelProto:
        model = build(network)
        for x in model.graph.initializer:
            if x.name == "head/bias":
                x.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(x)), x.name))
        return model

    monkeypatch.setattr(onnx_network, "build", changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda bias: bias + np.float32(2e-4),
            "gives 0 of 256 images other labels than JAX, and logits up to 2",
        ),
        (lambda bias: bias * np.float32(np.nan), "logits up to nan apart, where 1e-04 is allowed"),
        (lambda bias: bias + 1000 * np.eye(10, dtype=np.float32)[0], "of 256 images other labels than JAX"),
    ],
)
def test_an_onnx_file_that_computes_otherwise_is_not_written(
    change, said, files, tmp_path, monkeypatch, capsys
):
    broken(monkeypatch, change)
    assert export_to("onnx", files["resnet8"], tmp_path / "network.onnx") == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_random_images_take_the_place_of_a_set_that_is_not_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    for name in ("cifar10", "pets"):
        path = save(tmp_path / "network.safetensors", dataset=name)
        assert export_to("onnx", path, tmp_path / "network.onnx") == 0
        assert f"256 random images (the image set {name} is not here" in capsys.readouterr().out
    assert export_to("onnx", path, tmp_path / "network.onnx", "--data-dir", str(tmp_path)) == 0
    path = save(tmp_path / "network.safetensors", dataset="cifar10")
    assert export_to("onnx", path, tmp_path / "other.onnx", "--data-dir", str(tmp_path)) == 2
    assert f"--data-dir: {tmp_path} holds no cifar10" in capsys.readouterr().err
    assert not (tmp_path / "other.onnx").exists()


def test_a_prepared_set_is_read_and_must_have_images_like_those_of_training(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "network.safetensors", dataset="mnist")
    images = image_sets.load("digits")
    monkeypatch.setattr(tfds, "find", lambda *arguments: tmp_path)
    monkeypatch.setattr(export, "loaded", lambda *rest, **options: images)
    assert export_to("onnx", path, tmp_path / "network.onnx") == 0
    assert "256 test images of mnist" in capsys.readouterr().out
    images = dataclasses.replace(images, shape=(8, 9, 1))
    assert export_to("onnx", path, tmp_path / "other.onnx") == 2
    assert "images of mnist are (8, 9, 1), and the network reads (8, 8, 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_onnx_does_not_unpack_are_refused_and_other_forms_take_them(digits, tmp_path, capsys):
    for quantizer in (stam_jax.Binary(group=2, group_axis=-2), stam_jax.Ternary()):
        path = save(tmp_path / "network.safetensors", quantizer=quantizer)
        assert export_to("onnx", path, tmp_path / "network.onnx") == 2
        assert "only binary weights with a scale per channel or layer" in capsys.readouterr().err
        assert not (tmp_path / "network.onnx").exists()
    assert export_to("stablehlo", path, tmp_path / "network") == 0
    program = jax.export.deserialize(bytearray((tmp_path / "network").read_bytes()))
    np.testing.assert_allclose(program.call(digits), logits(path, digits), atol=1e-5)
    assert export_to("folder", path, tmp_path / "folder") == 0
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert [(each["name"], each["bits"]) for each in config["quantizers"]] == [("Ternary", 2)]
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| share of weights that take one bit | 0.0% |" in card


def test_a_network_without_a_graph_is_an_error(files):
    with pytest.raises(SettingsError, match="--to onnx: this is for networks of convolutions; vit6"):
        onnx_network.build(packed_network.load(files["vit6"]))


# Folders


@pytest.fixture(scope="module")
def folder(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network."""
    output = tmp_path_factory.mktemp("hub") / "network"
    assert export_to("folder", files["resnet20"], output, "--license", "apache-2.0") == 0
    return output


def test_a_folder_holds_the_packed_file_as_it_is_and_a_config(folder, files):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == files["resnet20"].read_bytes()
    config = json.loads((folder / "config.json").read_text())
    images = image_sets.load("digits")
    assert config == {
        "library_name": "stam_jax",
        "library_version": stam_jax.__version__,
        "format_version": 2,
        "architecture": "resnet20",
        "width": 0.25,
        "precision": "float32",
        "image_shape": [8, 8, 1],
        "brightest": 16,
        "mean": list(images.mean),
        "deviation": list(images.deviation),
        "id2label": {str(i): str(i) for i in range(10)},
        "label2id": {str(i): i for i in range(10)},
        "quantizers": [
            {"name": "Binary", "bits": 1, "scale": 1.0, "axis": -1, "group": None, "group_axis": None}
        ],
        "dataset": "digits",
        "method": "stam",
        "seed": 3,
        "test_accuracy": ACCURACY,
    }


def test_the_head_of_a_model_card_says_what_hubs_ask_for(folder, files, tmp_path):
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(head)
    (model,) = said.pop("model-index")
    assert said == {
        "license": "apache-2.0",
        "library_name": "stam_jax",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "binary-weights", "quantization"],
        "datasets": ["digits"],
        "metrics": ["accuracy"],
    }
    assert model == {
        "name": "resnet20",
        "results": [
            {
                "task": {"type": "image-classification"},
                "dataset": {"name": "digits", "type": "digits", "split": "test"},
                "metrics": [{"type": "accuracy", "value": ACCURACY}],
            }
        ],
    }
    (tmp_path / "empty").mkdir()
    assert export_to("folder", files["resnet20"], tmp_path / "empty") == 0
    assert "license" not in (tmp_path / "empty" / "README.md").read_text()


def test_a_model_card_has_the_numbers_of_the_file(folder, files):
    text = (folder / "README.md").read_text()
    table = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE))
    leaves = jax.tree.leaves(packed_network.load(files["resnet20"]).whole())
    params = jax.tree.leaves(packed_network.load(files["resnet20"]).whole()[0])
    binary = sum(x.size for x in params if x.ndim == 4)  # The head is float here.
    assert table == {
        "accuracy on the test images": "81.25%",
        "trained by": "stam, seed 3",
        "width, against the published network's": "0.25",
        "share of weights that take one bit": f"{binary / sum(x.size for x in params):.1%}",
        "bytes of `model.safetensors`": f"{files['resnet20'].stat().st_size:,}",
        "bytes of its arrays in float": f"{sum(x.nbytes for x in leaves):,}",
    }


@pytest.mark.slow
def test_a_model_card_shows_how_to_use_the_network(folder):
    text = (folder / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    zeros = logits(folder / "model.safetensors", np.zeros((1, 8, 8, 1), np.uint8))
    assert done.stdout == f"{[str(zeros.argmax())]}\n"
    # What the card tells to type, but for the picture.
    assert re.findall(r"python -m experiments (\w+) model.safetensors", text) == ["predict", "evaluate"]
    assert run_folder.PACKED not in text


# Errors


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["stablehlo", "onnx", "folder"])
def test_what_is_no_packed_network_is_refused(form, files, tmp_path, capsys):
    contents = files["resnet8"].read_bytes()
    (tmp_path / "damaged").write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    (tmp_path / "foreign").write_bytes(b"no network")
    stam_jax.save_packed(tmp_path / "nameless", stam_jax.load_packed(files["resnet8"]))
    before = untouched(tmp_path)
    for name, said in (
        ("damaged", "it was altered or damaged"),
        ("foreign", "it is not a safetensors file"),
        ("nameless", "does not say how its network is built"),
        ("missing", "No such file"),
    ):
        assert export_to(form, tmp_path / name, tmp_path / "output") == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
    assert untouched(tmp_path) == before


def test_outputs_that_cannot_be_are_refused(files, tmp_path, capsys):
    path = tmp_path / "network.safetensors"
    path.write_bytes(files["resnet8"].read_bytes())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("precious")
    before = untouched(tmp_path)
    for form, output, said in (
        ("stablehlo", "full", "is a folder; name a file"),
        ("stablehlo", "/", "is a folder; name a file"),
        ("stablehlo", "network.safetensors", "is the packed file itself"),
        ("onnx", "network.safetensors", "is the packed file itself"),
        ("stablehlo", "network.safetensors/program", "network.safetensors is a file, not a folder"),
        ("folder", "full", "is not an empty folder"),
        ("folder", "network.safetensors", "is not an empty folder"),
        ("folder", "full/precious.txt/new/network", "precious.txt is a file, not a folder"),
    ):
        assert export_to(form, path, tmp_path / output) == 2
        printed = capsys.readouterr().err
        assert said in printed, printed
        assert printed.count("\n") == 1
    assert export_to("onnx", path, tmp_path / "output", "--license", "mit") == 2
    assert "--license: only with --to folder" in capsys.readouterr().err
    assert export_to("pickle", path, tmp_path / "output") == 2
    assert '"stablehlo", "onnx", "folder"' in capsys.readouterr().err
    assert untouched(tmp_path) == before


@pytest.mark.parametrize(
    ("form", "package"), [("stablehlo", "flatbuffers"), ("onnx", "onnx"), ("onnx", "onnxruntime")]
)
def test_a_missing_package_is_told_with_what_to_install(form, package, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert export_to(form, files["resnet8"], tmp_path / "output") == 2
    printed = capsys.readouterr().err
    assert f"--to {form}: import of {package} halted" in printed
    assert 'install "stam-jax[export]"' in printed
    assert not list(tmp_path.iterdir())


def test_what_fails_on_its_way_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "output").write_text("before")
    with (
        pytest.raises(SettingsError, match=r"cannot write .*No space left"),
        export._placed(tmp_path / "output"),
    ):
        raise OSError(28, "No space left on device")
    assert untouched(tmp_path) == {str(tmp_path / "output"): b"before"}
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_file_is_replaced_and_its_folder_made(files, tmp_path, capsys):
    output = tmp_path / "new" / "folder" / "network.onnx"
    assert export_to("onnx", files["resnet8"], output) == 0
    before = output.read_bytes()
    output.write_bytes(b"old")
    assert export_to("onnx", files["resnet8"], output) == 0
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["network.onnx"]
    size = f"{output.stat().st_size:,}"
    assert f"Written: {output}, {size} bytes" in capsys.readouterr().out
