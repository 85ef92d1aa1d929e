"""What a projection costs: each quantizer on the kernels of ResNet-18, against a copy of them.

Run it with `python -m benchmarks.projection_cost`. A projection finds the scales and goes to the nearest
levels. The rounds of all quantizers are interleaved, so that whatever else the machine does meets all alike,
and a ratio compares the two of one round.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.update_cost import resnet18
from stam_jax import Binary, LeastSquares, PowerOfTwo, Quantizer, Ternary, Uniform
from stam_jax.quantizers import levels_of, nearest

ROUNDS = 7
QUANTIZERS: dict[str, Quantizer | None] = {
    "a copy": None,
    "Binary()": Binary(),
    "Binary(axis=())": Binary(axis=()),
    "Binary(group=64)": Binary(group=64, group_axis=-2),
    "Binary(scale=1.0)": Binary(scale=1.0),
    "Ternary()": Ternary(),
    "Uniform(bits=3)": Uniform(bits=3),
    "Uniform(bits=4)": Uniform(bits=4),
    "PowerOfTwo(bits=4)": PowerOfTwo(bits=4),
    "LeastSquares()": LeastSquares(),
}


def projector(quantizer: Quantizer | None, kernels: list[jax.Array]) -> Callable[[], float]:
    """A function that projects all kernels, or copies them, and returns the seconds it took."""

    def one(w: jax.Array) -> jax.Array:
        return jnp.copy(w) if quantizer is None else nearest(w, levels_of(quantizer, w))

    project = jax.jit(lambda kernels: [one(kernel) for kernel in kernels])
    jax.block_until_ready(project(kernels))

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(project(kernels))
        return time.perf_counter() - start

    return run


def main() -> None:
    """Time all quantizers and print the table."""
    # All but the stem, whose three inputs are no group of 64, and the head.
    kernels = [leaf for leaf in resnet18().values() if leaf.ndim == 4 and leaf.shape[-2] >= 64]
    runs = {name: projector(q, kernels) for name, q in track(QUANTIZERS.items(), description="compiling")}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(ROUNDS), description="rounds"):
        for name, run in runs.items():
            times[name].append(run())
    table = Table(title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {ROUNDS} rounds")
    for heading in ("projection", "ms", "ratio", "least", "most"):
        table.add_column(heading, justify="left" if heading == "projection" else "right")
    for name, measured in times.items():
        ratios = [value / base for value, base in zip(measured, times["a copy"], strict=True)]
        table.add_row(
            name,
            f"{1e3 * statistics.median(measured):.1f}",
            f"{statistics.median(ratios):.1f}",
            f"{min(ratios):.1f}",
            f"{max(ratios):.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
