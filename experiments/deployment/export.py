"""The command that gives a packed network to other programs: `export`."""

import contextlib
import dataclasses
import importlib
import json
import math
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from safetensors import safe_open

import stam_jax
from experiments.config import DatasetName, Form, Reading, SettingsError
from experiments.data.image_sets import loaded
from experiments.deployment import packed_network
from experiments.deployment.packed_network import Stored
from experiments.networks import convolutions

PLATFORMS = ("cpu", "cuda", "tpu")
# How many images an ONNX file is checked on, and how far a logit may be from JAX's.
_CHECKED, _TOLERANCE = 256, 1e-4
CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
_CARD = """---
${license}library_name: stam_jax
pipeline_tag: image-classification
tags: [jax, flax, binary-weights, quantization]
datasets: [$quoted]
metrics: [accuracy]
model-index:
- name: $model
  results:
  - task: {type: image-classification}
    dataset: {name: $quoted, type: $quoted, split: test}
    metrics: [{type: accuracy, value: $accuracy}]
---

# $model on $dataset, with binary weights

A network that tells $classes kinds of images apart, trained with stam_jax.

| | |
|---|--:|
| accuracy on the test images | $percent |
| trained by | $method, seed $seed |
| width, against the published network's | $width |
| share of weights that take one bit | $share |
| bytes of `$file` | $size |
| bytes of its arrays in float | $whole |

## Use

With stam_jax $version or newer, its extra `experiments`, and a clone of its repository on PYTHONPATH, in this
folder:

```python
from pathlib import Path

import numpy as np

from experiments.deployment import packed_network

network = packed_network.load(Path("$file"))
images = np.zeros((1, $shape), np.uint8)  # Yours: bytes from 0 to $brightest.
chances = packed_network.probabilities(network, images)
print([network.images.labels[k] for k in chances.argmax(axis=1)])
```

Or, without a program of your own:

```sh
python -m experiments predict $file picture.png
python -m experiments evaluate $file
```
"""


def export(
    path: Path, form: Form, output: Path, license_name: str | None, reading: Reading, console: Console
) -> None:
    """Write a packed network in another form.

    Args:
        path: the packed file.
        form: what to write.
        output: the file, which is replaced if it is there, or the folder, which must be new or empty.
        license_name: for a folder's model card; None for none.
        reading: where image sets are, for the check of an ONNX file.
        console: told what was checked and written.

    Raises:
        SettingsError: if the file cannot be read, the output not be written, a package is missing, or what
            was made does not compute what JAX does; nothing is written then.
    """
    if license_name is not None and form != "folder":
        raise SettingsError("--license: only with --to folder.")
    _see_free(path, output, form)
    network = packed_network.load(path)
    match form:
        case "stablehlo":
            _need(form, "flatbuffers")
            size = _write(output, stablehlo(network))
        case "onnx":
            _need(form, "onnx", "onnxruntime")
            size = _write(output, _checked_onnx(network, reading, console))
        case "folder":
            size = write_folder(network, path, output, license_name)
    whole = stam_jax.tabulate(network.tree).nbytes_whole
    console.print(
        f"Written: {output}, {size:,} bytes; the network's arrays whole are {whole:,}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _see_free(path: Path, output: Path, form: Form) -> None:
    """Raise where nothing may be written."""
    try:
        above = next((parent for parent in output.absolute().parents if parent.exists()), output)
        if not above.is_dir():
            raise SettingsError(f"--output: {above} is a file, not a folder.")
        if form == "folder":
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise SettingsError(f"--output: {output} is not an empty folder; name a new one.")
        elif output.is_dir():
            raise SettingsError(f"--output: {output} is a folder; name a file.")
        elif output.exists() and path.exists() and output.samefile(path):
            raise SettingsError(f"--output: {output} is the packed file itself; name another.")
    except OSError as error:
        raise SettingsError(f"--output: cannot use {output}: {error.strerror}.") from error


def _need(form: Form, *packages: str) -> None:
    """Raise where a package of the extra is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise SettingsError(f'--to {form}: {error}: install "stam-jax[export]".') from error


@contextlib.contextmanager
def _placed(output: Path) -> Iterator[Path]:
    """Where to make a file or folder, which is moved to its place once it is whole.

    Raises:
        SettingsError: if it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as scratch:
            part = Path(scratch) / "part"
            yield part
            part.replace(output)
    except OSError as error:
        raise SettingsError(f"--output: cannot write {output}: {error.strerror}.") from error


def _write(output: Path, contents: bytes) -> int:
    """Write a file, whole or not at all; return its size."""
    with _placed(output) as part:
        part.write_bytes(contents)
    return len(contents)


def stablehlo(network: Stored) -> bytes:
    """A network as a serialized `jax.export.Exported`, for CPUs, NVIDIA GPUs and TPUs.

    It maps images of bytes, [batch, height, width, channels] with any batch, to logits. Its kernels are
    constants of packed bits, which it unpacks as it runs.
    """

    def logits(images: jax.Array) -> jax.Array:
        # Of constants alone XLA might compute the whole weights when it compiles, and keep those.
        whole = stam_jax.unpack(jax.lax.optimization_barrier(network.tree))
        module = nnx.merge(network.graph, whole["params"], whole["stats"], copy=True)
        module.set_attributes(
            nnx.Conv,
            conv_general_dilated=convolutions.portable_conv_general_dilated,
            raise_if_not_found=False,  # A transformer has none.
        )
        return module(images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.images.shape), jnp.uint8)
    with _without_source_lines():
        return bytes(jax.export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize())


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """While it is open, programs do not say on which lines of which files of this machine they were made."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _checked_onnx(network: Stored, reading: Reading, console: Console) -> bytes:
    """A network as an ONNX file that was seen to compute what JAX does.

    Raises:
        SettingsError: if it does not, or cannot be made.
    """
    from experiments.deployment import onnx_network

    note = ""
    if network.precision != "float32":
        # No bfloat16: onnxruntime has no such convolutions on CPU.
        note = f" in float32, where it was trained in {network.precision}"
        network = dataclasses.replace(network, precision="float32")
    images, what = _images_to_check(network, reading)
    contents = onnx_network.build(network).SerializeToString()
    difference = _difference(contents, network, images)
    console.print(
        f"Checked{note}: onnxruntime gives {len(images)} {what} the labels that JAX gives; the logits are at "
        f"most {difference:.1e} apart.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return contents


def _images_to_check(network: Stored, reading: Reading) -> tuple[np.ndarray, str]:
    """Images for a network to read, and what they are: test images of its own, or random where none are here.

    Raises:
        SettingsError: if the image set was said to be somewhere where it is not, or has other images.
    """
    name: Any = network.dataset
    if not _is_here(name, reading):
        random = np.random.default_rng(0)
        shape = (_CHECKED, *network.images.shape)
        images = random.integers(0, network.images.brightest, shape, np.uint8, endpoint=True)
        return images, f"random images (the image set {name} is not here; see --data-dir)"
    images = loaded(name, reading.data_dir, streamed=True)
    if images.shape != network.images.shape:
        raise SettingsError(
            f"the images of {name} are {images.shape}, and the network reads {network.images.shape}."
        )
    return images.test.images[:_CHECKED], f"test images of {name}"


def _is_here(name: str, reading: Reading) -> bool:
    """Whether an image set can be read without a download."""
    if name == "digits":
        return True
    if name not in get_args(DatasetName):
        return False
    from experiments.data import tfds

    found = tfds.find(name, reading.data_dir) is not None
    if not found and reading.data_dir is not None:
        raise SettingsError(f"--data-dir: {reading.data_dir} holds no {name} that is prepared.")
    return found


def _difference(contents: bytes, network: Stored, images: np.ndarray) -> float:
    """How far the logits of an ONNX file are from JAX's, at most.

    Raises:
        SettingsError: if that is too far, or a label is another.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    theirs = np.asarray(session.run(["logits"], {"images": images})[0])
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs round more by default.
        ours = np.asarray(
            jax.jit(packed_network.apply, static_argnums=0)(network.graph, network.tree, jnp.asarray(images))
        )
    difference = float(np.max(np.abs(theirs - ours)))
    others = int(np.sum(theirs.argmax(axis=1) != ours.argmax(axis=1)))
    if others or not difference <= _TOLERANCE:
        raise SettingsError(
            f"--to onnx: onnxruntime gives {others} of {len(images)} images other labels than JAX, and "
            f"logits up to {difference:.1e} apart, where {_TOLERANCE:.0e} is allowed. Nothing was written."
        )
    return difference


def write_folder(network: Stored, path: Path, output: Path, license_name: str | None) -> int:
    """Write a folder as model hubs have them: a config, the packed file as it is, and a model card.

    Args:
        network: the network.
        path: its packed file.
        output: the folder, which must be new or empty.
        license_name: for the card's head; None for none.

    Returns:
        The size of the packed file.

    Raises:
        SettingsError: if it cannot be written.
    """
    with _placed(output) as part:
        part.mkdir()
        shutil.copyfile(path, part / MODEL)
        size = (part / MODEL).stat().st_size
        (part / CONFIG).write_text(
            json.dumps(folder_config(network, part / MODEL), indent=2) + "\n", encoding="utf-8"
        )
        (part / CARD).write_text(model_card(network, size, license_name), encoding="utf-8")
    return size


def folder_config(network: Stored, path: Path) -> dict[str, Any]:
    """What a program has to know to use the packed file.

    Args:
        network: which the file holds.
        path: of the file.
    """
    images = network.images
    with safe_open(path, "numpy") as file:
        said = json.loads(file.metadata()["stam_jax"])  # As docs/format.md has it.
    return {
        "library_name": "stam_jax",
        "library_version": stam_jax.__version__,
        "format_version": said["version"],
        "architecture": network.model,
        "width": network.width,
        "precision": network.precision,
        "image_shape": list(images.shape),
        "brightest": images.brightest,
        "mean": list(images.mean),
        "deviation": list(images.deviation),
        "id2label": {str(i): label for i, label in enumerate(images.labels)},
        "label2id": {label: i for i, label in enumerate(images.labels)},
        "quantizers": _quantizers(network),
        "dataset": network.dataset,
        "method": network.method,
        "seed": network.seed,
        "test_accuracy": network.accuracy,
    }


def _leaves(network: Stored) -> list[Any]:
    """The weights, layer by layer, packed or not."""
    is_packed = lambda node: isinstance(node, stam_jax.Packed)
    return jax.tree.leaves(network.tree["params"], is_leaf=is_packed)


def _quantizers(network: Stored) -> list[dict[str, Any]]:
    """Every quantizer of the network, with its options; most networks have one."""
    packed = (x for x in _leaves(network) if isinstance(x, stam_jax.Packed))
    used: Any = dict.fromkeys((x.quantizer, x.bits) for x in packed)
    return [
        {"name": type(quantizer).__name__, "bits": bits, **dataclasses.asdict(quantizer)}
        for quantizer, bits in used
    ]


def binary_share(network: Stored) -> float:
    """The share of the weights that take one bit."""
    sizes = [(math.prod(x.shape), isinstance(x, stam_jax.Packed) and x.bits == 1) for x in _leaves(network)]
    return sum(size for size, binary in sizes if binary) / sum(size for size, _ in sizes)


def model_card(network: Stored, size: int, license_name: str | None) -> str:
    """The README of a folder.

    Args:
        network: which the file holds.
        size: of the file in bytes.
        license_name: for the head; None for none.
    """
    quoted = json.dumps(network.dataset)
    return string.Template(_CARD).substitute(
        license="" if license_name is None else f"license: {json.dumps(license_name)}\n",
        model=network.model,
        dataset=network.dataset,
        quoted=quoted,
        accuracy=json.dumps(network.accuracy),
        classes=network.images.classes,
        version=stam_jax.__version__,
        percent=f"{network.accuracy:.2%}",
        method=network.method,
        seed=network.seed,
        width=f"{network.width:g}",
        share=f"{binary_share(network):.1%}",
        file=MODEL,
        size=f"{size:,}",
        whole=f"{stam_jax.tabulate(network.tree).nbytes_whole:,}",
        shape=", ".join(map(str, network.images.shape)),
        brightest=network.images.brightest,
    )
