"""What a packed network costs in use: memory and time against the same network whole.

Run it with `python -m benchmarks.inference`. The weights are random and so are the images: they serve for
timing and for nothing else. Six forms of one network classify the same images:

- `float32` and `bfloat16`: the weights whole, and computed with, in that precision;
- `packed`: the device holds the bits, and they are unpacked inside the compiled function, in float32;
- `packed bfloat16`: likewise, computed in bfloat16;
- `folded` and `folded bfloat16`: packed, its scales and batch norm folded into one multiplication and one
  addition per channel.

What is told of each form and batch size: the bytes of the weights that the device holds; the temporaries of
the compiled function, the unpacked weights among them; the median time, and the ratio to float32, of rounds
in which all forms take turns; and the largest difference of a logit from float32's, relative to the largest
logit. Last, the time that it takes to read the packed file.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import command
from experiments.config import ModelName, Precision

_SEVERAL = Parameter(consume_multiple=True, negative="")
_COUNT = Parameter(validator=Number(gte=1))
SEED = 0


class Form(NamedTuple):
    """One form of a network, compiled.

    Args:
        name: of the form.
        weights: bytes of its weights on the device.
        temporaries: bytes that its function needs beside them, its images and its logits.
        logits: what it makes of the images.
        run: classifies them once more and returns the seconds it took.
    """

    name: str
    weights: int
    temporaries: int | None
    logits: np.ndarray
    run: Callable[[], float]


def form(name: str, graph: Any, tree: Any, images: jax.Array) -> Form:
    """Compile one form."""
    from experiments.deployment import packed_network

    tree = jax.device_put(tree)
    compiled = (
        jax.jit(lambda tree, images: packed_network.apply(graph, tree, images)).lower(tree, images).compile()
    )
    sizes = compiled.memory_analysis()

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(tree, images))
        return time.perf_counter() - start

    return Form(
        name=name,
        weights=sum(leaf.nbytes for leaf in jax.tree.leaves(tree)),
        temporaries=None if sizes is None else sizes.temp_size_in_bytes,
        logits=np.asarray(compiled(tree, images), np.float32),
        run=run,
    )


def random_network(model: ModelName, width: float) -> tuple[Callable[[Precision], Any], dict[str, Any]]:
    """A function that gives the graph of a network in some precision; packed weights, and statistics."""
    import stam_jax
    from experiments.data.image_sets import Images
    from experiments.deployment import packed_network
    from experiments.networks import models

    images = Images(
        labels=tuple("0123456789"),
        shape=(32, 32, 3),
        brightest=255,
        mean=(127.5,) * 3,
        deviation=(73.9,) * 3,
    )
    draw = lambda key: models.split(models.build(model, images, width=width, key=key))[1:]
    params, stats = jax.jit(draw)(jax.random.key(SEED))
    packed = stam_jax.pack(stam_jax.quantize(params))
    graph = lambda precision: packed_network.abstract(model, images, width, precision)[0]
    return graph, {"params": packed, "stats": stats}


def forms(model: ModelName, width: float, batch_size: int) -> list[Form]:
    """All forms of a network, compiled for batches of a size."""
    import stam_jax
    from experiments.deployment.folding import fold

    images = jnp.asarray(
        np.random.default_rng(SEED).integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    )
    graph, tree = random_network(model, width)
    full, half = graph("float32"), graph("bfloat16")
    whole = stam_jax.unpack(tree)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, whole)
    folded = fold(tree)
    return [
        form("float32", full, whole, images),
        form("bfloat16", half, short, images),
        form("packed", full, tree, images),
        form("packed bfloat16", half, tree, images),
        form("folded", full, folded, images),
        form("folded bfloat16", half, folded, images),
    ]


def loading(model: ModelName, width: float, rounds: int) -> tuple[int, list[float]]:
    """The size of the packed file of a network, and the seconds that reading it took."""
    import stam_jax

    _, tree = random_network(model, width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        size = stam_jax.save_packed(path, tree)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            stam_jax.load_packed(path, like=tree)
            times.append(time.perf_counter() - start)
    return size, times


def table(found: Sequence[Form], times: Sequence[Sequence[float]], title: str) -> Table:
    """What came of all forms at one batch size."""
    printed = Table(title=title, title_justify="left")
    for heading in ("form", "weights, bytes", "temporaries, bytes", "ms", "ratio", "least", "most", "off by"):
        printed.add_column(heading, justify="left" if heading == "form" else "right")
    exact = found[0].logits
    for each, measured in zip(found, times, strict=True):
        ratios = [value / base for value, base in zip(measured, times[0], strict=True)]
        printed.add_row(
            each.name,
            f"{each.weights:,}",
            "-" if each.temporaries is None else f"{each.temporaries:,}",
            f"{1e3 * statistics.median(measured):.1f}",
            *(f"{number:.2f}" for number in (statistics.median(ratios), min(ratios), max(ratios))),
            f"{np.max(np.abs(each.logits - exact)) / np.max(np.abs(exact)):.0e}",
        )
    return printed


def benchmark(
    *,
    models: Annotated[tuple[ModelName, ...], _SEVERAL] = ("resnet18",),
    batch_sizes: Annotated[tuple[Annotated[int, _COUNT], ...], _SEVERAL] = (1, 128),
    width: Annotated[float, Parameter(validator=Number(gt=0))] = 1.0,
    rounds: Annotated[int, _COUNT] = 10,
) -> None:
    """Classify random images by packed networks and whole ones, and print tables.

    Args:
        models: networks to time.
        batch_sizes: images at a time.
        width: channels of every layer, as a multiple of the published network's.
        rounds: turns of each form.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {rounds} rounds"
    for model in models:
        for size in batch_sizes:
            found = forms(model, width, size)
            times: list[list[float]] = [[] for _ in found]
            for _ in track(
                range(rounds), description=f"{model}, {size} images", console=Console(stderr=True)
            ):
                for each, measured in zip(found, times, strict=True):
                    measured.append(each.run())
            console.print(table(found, times, f"{model}, width {width:g}, {size} images at a time; {where}"))
        size, seconds = loading(model, width, rounds)
        console.print(
            f"{model}: a packed file of {size:,} bytes is read in {statistics.median(seconds):.3f} s "
            f"({min(seconds):.3f} to {max(seconds):.3f})."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 for a wrong setting."""
    return command.run("python -m benchmarks.inference", benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
