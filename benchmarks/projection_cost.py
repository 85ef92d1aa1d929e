"""What a projection costs: each quantiser on the kernels of ResNet-18, against the binary one.

Run it with `python -m benchmarks.projection_cost`. The exact scales of more levels than two are found by
sorting, at every step; this tells what that takes beside a mean. Rounds of all quantisers are interleaved.
"""

import statistics
import time
from collections.abc import Callable

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.update_cost import resnet18
from stam_jax import Binary, LeastSquares, PowerOfTwo, Quantizer, Ternary, Uniform

ROUNDS = 5
QUANTIZERS: tuple[Quantizer, ...] = (
    Binary(),
    Binary(scale="tensor"),
    Binary(scale="group", group=64),
    Ternary(rule="heuristic"),
    Ternary(),
    Uniform(bits=3),
    Uniform(bits=4),
    PowerOfTwo(bits=4),
    LeastSquares(bits=2),
    LeastSquares(bits=4),
    LeastSquares(bits=4, rule="greedy"),
)


def projector(quantizer: Quantizer, kernels: list[jax.Array]) -> Callable[[], float]:
    """A function that projects all kernels and returns the seconds it took."""
    project = jax.jit(lambda kernels: [quantizer.project(kernel) for kernel in kernels])
    jax.block_until_ready(project(kernels))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(project(kernels))
        return time.perf_counter() - start

    return run


def main() -> None:
    """Time all quantisers and print the table."""
    # All but the stem, whose three inputs are no group of 64.
    kernels = [leaf for name, leaf in resnet18().items() if name.endswith("kernel") and leaf.shape[-2] >= 64]
    runs = [projector(quantizer, kernels) for quantizer in track(QUANTIZERS, description="compiling")]
    times: list[list[float]] = [[] for _ in runs]
    for _ in track(range(ROUNDS), description="rounds"):
        for run, measured in zip(runs, times, strict=True):
            measured.append(run())
    title = f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {ROUNDS} rounds"
    table = Table(title=title)
    for heading in ("quantiser", "ms", "ratio", "least", "most"):
        table.add_column(heading, justify="left" if heading == "quantiser" else "right")
    for quantizer, measured in zip(QUANTIZERS, times, strict=True):
        ratios = [value / base for value, base in zip(measured, times[0], strict=True)]
        table.add_row(
            str(quantizer),
            f"{1e3 * statistics.median(measured):.1f}",
            f"{statistics.median(ratios):.1f}",
            f"{min(ratios):.1f}",
            f"{max(ratios):.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
