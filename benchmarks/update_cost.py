"""What an update costs: each method against Optax's SGD with momentum, side by side in one process.

Run it with `python benchmarks/update_cost.py`. The parameters have the shapes of ResNet-18 for small images
(11.2 million in 62 leaves); a step is the update and its application, jitted, with donated buffers. The
rounds of all methods are interleaved, so that whatever else the machine does meets all alike, and a ratio
compares the two of one round. Beside it stands the least that must move through memory: every array that the
step reads and writes, once.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import stam_jax

ROUNDS, STEPS = 7, 5
MOMENTUM = 0.9


def resnet18() -> dict[str, jax.Array]:
    """Random parameters in the shapes of ResNet-18 with a 3x3 stem and 10 classes."""
    shapes: dict[str, tuple[int, ...]] = {"stem/kernel": (3, 3, 3, 64)}
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name = f"stage{stage}/block{block}"
            shapes[f"{name}/first/kernel"] = (3, 3, inputs, outputs)
            shapes[f"{name}/second/kernel"] = (3, 3, outputs, outputs)
            if inputs != outputs:
                shapes[f"{name}/shortcut/kernel"] = (1, 1, inputs, outputs)
            inputs = outputs
    for name, shape in list(shapes.items()):
        shapes |= {name.replace("kernel", f"norm/{part}"): shape[-1:] for part in ("scale", "bias")}
    shapes |= {"head/kernel": (512, 10), "head/bias": (10,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: 0.1 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def methods() -> dict[str, optax.GradientTransformation]:
    """What is timed; the first is what the others are compared with."""
    sgd = optax.sgd(0.1, momentum=MOMENTUM)
    tensor = stam_jax.Binary(axis=())
    blend = stam_jax.relaxations.LinearBlend(stam_jax.schedules.linear_to_hard(1000))
    return {
        "optax.sgd(momentum)": sgd,
        "optax.adam": optax.adam(1e-3),
        "stam(sgd), per channel": stam_jax.stam(sgd, hard_from=1000),
        "stam(sgd), inertia of 0.999": stam_jax.three_block_splitting(
            sgd, quantizer=stam_jax.Binary(), relaxation=blend, inertia=0.999
        ),
        "stam(sgd), per tensor": stam_jax.stam(sgd, hard_from=1000, quantizer=tensor),
        "chain(sgd, stam)": optax.chain(sgd, stam_jax.stam(hard_from=1000)),
        "chain(trace, stam_proximal)": optax.chain(optax.trace(MOMENTUM), stam_jax.stam_proximal(0.1, 1.0)),
        "binary_connect(sgd)": stam_jax.binary_connect(sgd),
        "binary_relax(sgd)": stam_jax.binary_relax(sgd, growth_every=400, hard_from=60000),
        "prox_quant(sgd)": stam_jax.prox_quant(sgd, threshold=lambda count: 1e-7 * count, hard_from=60000),
        "parq(sgd)": stam_jax.parq(sgd, hard_from=60000),
        "md_tanh(sgd)": stam_jax.md_tanh(sgd, hard_from=60000),
        "straight_through(sgd)": stam_jax.straight_through(sgd),
        "admm_quant(sgd)": stam_jax.admm_quant(sgd, penalty=1.0, dual_every=400, hard_from=60000),
        "bop(sgd)": stam_jax.bop(sgd),
        "stam(sgd), ternary": stam_jax.stam(sgd, hard_from=1000, quantizer=stam_jax.Ternary()),
        "stam(sgd), 4 bits": stam_jax.stam(sgd, hard_from=1000, quantizer=stam_jax.Uniform(bits=4)),
    }


def stepper(optimizer: optax.GradientTransformation) -> tuple[Callable[[], float], int]:
    """A function that takes some steps and returns the seconds per step; the bytes of a step."""
    params = resnet18()
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    # Parameters and state are read and written, gradients are read.
    moved = 2 * size(params) + 2 * size(state) + size(grads)

    def run() -> float:
        nonlocal params, state
        start = time.perf_counter()
        for _ in range(STEPS):
            params, state = step(params, state, grads)
        jax.block_until_ready(params)
        return (time.perf_counter() - start) / STEPS

    return run, moved


def main() -> None:
    """Time all methods and print the table."""
    steppers = {name: stepper(optimizer) for name, optimizer in methods().items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in track(range(ROUNDS + 1), description="rounds"):
        for name, (run, _) in steppers.items():
            seconds = run()
            if round_ > 0:  # The first warms up.
                times[name].append(seconds)
    first, *_ = times
    table = Table(title=f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {ROUNDS} rounds of {STEPS}")
    for title in ("update", "ms", "ratio", "least", "most", "MB", "GB/s"):
        table.add_column(title, justify="left" if title == "update" else "right")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[first], strict=True)]
        moved = steppers[name][1]
        table.add_row(
            name,
            f"{1e3 * statistics.median(values):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            f"{moved / 1e6:.0f}",
            f"{moved / statistics.median(values) / 1e9:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
