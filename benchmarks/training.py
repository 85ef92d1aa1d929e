"""What a step of training costs: each method against plain SGD with momentum, on whole networks.

Run it with `python -m benchmarks.training`. The steps are those of the experiments, augmentation and all; the
rounds of all methods of a network are interleaved, so that whatever else the machine does meets all alike,
and a ratio compares the two of one round. The images are random bytes in the shape of CIFAR's, with random
labels: they serve for timing and for nothing else.

What is told of each network, method, precision and batch size:

- images/s, from the median time of a step.
- Utilization: the FLOP/s of the step as a share of the peak. The FLOPs of the whole step are counted in the
  program as it was written, by XLA or, for devices that cannot ask it, by JAX: in the compiled one XLA cannot
  see into the libraries that GPUs call. The peak is
  the FLOP/s that a large square matrix product reaches in the same precision on this device, in the fastest
  of the same rounds, times the number of devices.
- Memory of the step on a device, as compiled: arguments, outputs and temporaries; what is donated counts
  once. Where the backend keeps count, also the most bytes ever in use on a device since the process began.
- The optimizer's share: the time of the update and its application alone, divided by that of the step.
- The ratio to the same step with the method "float", which is weight decay and `optax`'s SGD with momentum.
- With `--scan`: the time per step where some steps are scanned inside one call, as a ratio to single steps.
"""

import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cyclopts import Parameter
from cyclopts.validators import Number
from jax.experimental.roofline import roofline
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import command
from experiments.config import Method, ModelName, Precision, TrainSettings
from experiments.data.image_sets import Dataset
from experiments.data.records import Split

if TYPE_CHECKING:
    from experiments.training.run import Trainer

BASE: Method = "float"
# So long a run that all that is timed comes before the relaxed methods turn hard.
EPOCHS, STEPS_PER_EPOCH = 10_000, 4
# Products per round, enough to hide the way from the host to an accelerator; CPUs need no large ones.
PRODUCTS, CPU_PRODUCTS = 10, 2
SIDE, CPU_SIDE = 8192, 2048

_SEVERAL = Parameter(consume_multiple=True, negative="")
_COUNT = Parameter(validator=Number(gte=1))


class Case(NamedTuple):
    """What the methods are compared on.

    Args:
        model: the network.
        width: factor of its channels.
        precision: what it computes in.
        batch_size: images per step, over all devices together.
    """

    model: ModelName
    width: float
    precision: Precision
    batch_size: int


class Subject(NamedTuple):
    """A method on a network, compiled; each function takes some steps and returns the seconds per step.

    Args:
        facts: what is known of it without timing.
        timers: the "step", its "update" alone, and the steps "scanned" if that was asked for.
    """

    facts: dict[str, Any]
    timers: dict[str, Callable[[], float]]


def timer(take: Callable[[Any], Any], carry: Any, *, calls: int, steps: int) -> Callable[[], float]:
    """A function that hands a carry on from call to call, and returns the seconds per step; warmed up."""

    def run() -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(calls):
            carry = take(carry)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    run()
    return run


def stand_in(batch_size: int) -> Dataset:
    """Random bytes and labels in the shapes of CIFAR-10, a few batches of them."""
    draws, size = np.random.default_rng(0), STEPS_PER_EPOCH * batch_size
    images = draws.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    split = Split(images, draws.integers(0, 10, size, dtype=np.int32))
    return Dataset(
        labels=tuple("0123456789"),
        shape=(32, 32, 3),
        brightest=255,
        train=split,
        validation=split,
        test=split,
        mean=(127.5,) * 3,
        deviation=(73.9,) * 3,
        shift=4,
        flip=True,
    )


def product(precision: Precision) -> tuple[Callable[[], float], float]:
    """A function that multiplies large square matrices and returns the seconds each took; its FLOPs."""
    on_cpu = jax.default_backend() == "cpu"
    side, calls = (CPU_SIDE, CPU_PRODUCTS) if on_cpu else (SIDE, PRODUCTS)
    # Of that scale, products keep the size of their left factor from call to call.
    draw = lambda key: (jax.random.normal(key, (side, side)) / side**0.5).astype(precision)
    left, right = map(jax.jit(draw), jax.random.split(jax.random.key(0)))
    multiply = jax.jit(jnp.matmul, donate_argnums=0)
    run = timer(lambda matrix: multiply(matrix, right), left, calls=calls, steps=calls)
    return run, 2.0 * side**3


def random_state(trainer: "Trainer") -> Any:
    """A state to begin at, of random weights from NumPy: those of the experiments are slow to compile."""
    state = jax.eval_shape(trainer.initial_state, jax.random.key(0))
    draws = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(draws.normal(scale=0.05, size=leaf.shape), leaf.dtype)
    params = jax.tree.map(draw, state.params)
    filled = state._replace(
        params=params,
        stats=jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state.stats),
        opt_state=trainer.optimizer.init(params),
        loss=jnp.zeros([]),
        step=jnp.zeros([], jnp.int32),
    )
    return trainer.layout.everywhere(filled)


def update_timer(trainer: "Trainer", steps: int) -> Callable[[], float]:
    """Times the optimizer alone: the update and its application."""
    state = random_state(trainer)
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), state.params)

    def update(params: Any, opt_state: Any, gradient: Any) -> Any:
        updates, opt_state = trainer.optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    take = lambda carry: compiled(*carry, gradient)
    return timer(take, (state.params, state.opt_state), calls=steps, steps=steps)


def scan_timer(
    trainer: "Trainer", key: jax.Array, train: Split, order: jax.Array, steps: int
) -> Callable[[], float]:
    """Times steps that are scanned inside one call."""
    take = lambda state: trainer.advance(state, key, train, order, count=steps)[0]
    return timer(take, random_state(trainer), calls=1, steps=steps)


def flops_as_written(step: Callable[..., Any], *arguments: Any) -> float:
    """The FLOPs of a function, counted operation by operation as it is written."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # It would warn of what has no FLOPs.
    try:
        return float(roofline(step)(*arguments)[1].unfused_flops)
    finally:
        logger.setLevel(level)


def flops(lowered: Any, compiled: Any, step: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """The FLOPs of a step over all devices, and XLA's count in the program compiled for one of them."""
    counted = lambda stage: float((stage.cost_analysis() or {}).get("flops", 0.0))
    return {
        # Not every backend can count before it has compiled.
        "flops_per_step": counted(lowered) or flops_as_written(step, *arguments),
        "flops_compiled_per_device": counted(compiled),
    }


def memory(compiled: Any) -> dict[str, int | None]:
    """Bytes that a step needs on a device, in all and by kind; None where the backend does not tell."""
    sizes = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    parts = {kind: sizes and getattr(sizes, f"{kind}_size_in_bytes") for kind in kinds}
    total = sizes and parts["argument"] + parts["output"] - parts["alias"] + parts["temp"]
    return {"memory_bytes": total, **{f"memory_{kind}_bytes": size for kind, size in parts.items()}}


def peak_bytes_in_use() -> int | None:
    """The most bytes ever in use on a device, if the backend keeps count."""
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((size for size in used if size is not None), default=None)


def subject(case: Case, method: Method, steps: int, *, scan: bool) -> Subject:
    """A method on a network, compiled and warmed up."""
    # Flax takes its time to import, which those who only ask for help need not wait for.
    from experiments.training.run import Trainer

    settings = TrainSettings(**case._asdict(), method=method, epochs=EPOCHS)
    trainer = Trainer(settings, stand_in(case.batch_size))
    key = jax.random.key(0)
    records = trainer.dataset.train
    train = trainer.layout.everywhere(records.at(np.arange(records.size)))
    order = trainer.layout.everywhere(jnp.arange(records.size))
    key = trainer.layout.everywhere(key)
    state = random_state(trainer)
    facts = {
        "method": method,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }
    step = (state, key, train, order)
    lowered = trainer.advance.lower(*step)
    shapes = jax.eval_shape(lambda *step: step, *step)
    advance = lowered.compile()
    take = lambda state: advance(state, key, train, order)[0]
    timers = {"step": timer(take, state, calls=steps, steps=steps)}
    facts |= flops(lowered, advance, trainer.advance, *shapes) | memory(advance)
    facts["peak_bytes_in_use"] = peak_bytes_in_use()
    timers["update"] = update_timer(trainer, steps)
    if scan:
        timers["scanned"] = scan_timer(trainer, key, train, order, steps)
    return Subject(facts, timers)


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median of some values under a name, the least and the most."""
    return {name: statistics.median(values), f"{name}_least": min(values), f"{name}_most": max(values)}


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """The quotients, round by round."""
    return [value / base for value, base in zip(values, bases, strict=True)]


def row(
    case: Case,
    facts: dict[str, Any],
    times: dict[str, list[float]],
    base: Sequence[float],
    peak: float,
) -> dict[str, Any]:
    """What came of a method on a network.

    Args:
        case: the network.
        facts: of the method on it.
        times: seconds per step of each round, by timer.
        base: seconds per step of each round, of the method it is compared with.
        peak: FLOP/s of all devices.
    """
    seconds = statistics.median(times["step"])
    result = {
        "device_kind": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "images": "random bytes, 32x32x3",
        **case._asdict(),
        **facts,
        **spread("seconds_per_step", times["step"]),
        "images_per_second": case.batch_size / seconds,
        "peak_flops_per_second": peak,
        "utilisation": facts["flops_per_step"] / seconds / peak,
        "optimizer_seconds": statistics.median(times["update"]),
        **spread("optimizer_share", ratios(times["update"], times["step"])),
        **spread("ratio_to_float", ratios(times["step"], base)),
    }
    if "scanned" in times:
        result |= spread("scanned_to_single", ratios(times["scanned"], times["step"]))
    return result


def measure(
    case: Case, methods: Sequence[Method], *, rounds: int, steps: int, scan: bool, told: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time all methods on a network; a row each, that of the method they are compared with among them.

    Args:
        case: the network.
        methods: to time.
        rounds: how often each has its turn.
        steps: of each turn.
        scan: whether to time scanned steps of the method they are compared with as well.
        told: called before each part of the work, with its name.
    """
    subjects: dict[str, Subject] = {}
    for method in methods:
        told(f"{case.model} {case.precision} {case.batch_size}: compiling {method}")
        # Scanning is a matter of the network, not of the method.
        subjects[method] = subject(case, method, steps, scan=scan and method == BASE)
    multiply, product_flops = product(case.precision)
    times = {method: {name: [] for name in each.timers} for method, each in subjects.items()}
    products = []
    for index in range(rounds):
        told(f"{case.model} {case.precision} {case.batch_size}: round {index + 1} of {rounds}")
        products.append(multiply())
        for method, each in subjects.items():
            for name, run in each.timers.items():
                times[method][name].append(run())
    peak = product_flops / min(products) * jax.device_count()
    common = {"rounds": rounds, "steps": steps}
    base = times[BASE]["step"]
    return [row(case, common | each.facts, times[method], base, peak) for method, each in subjects.items()]


def _cells(result: dict[str, Any]) -> Iterator[str]:
    """A row of the table."""
    text = lambda name, form, factor=1.0: (
        "-" if result.get(name) is None else format(factor * result[name], form)
    )
    yield from (result["model"], f"{result['width']:g}", result["precision"], str(result["batch_size"]))
    yield result["method"]
    yield text("images_per_second", ".0f")
    yield text("peak_flops_per_second", ".1f", 1e-9)
    yield text("utilisation", ".1%")
    yield text("memory_bytes", ".1f", 1e-6)
    yield text("peak_bytes_in_use", ".0f", 1e-6)
    yield text("optimizer_share", ".1%")
    yield from (text(f"ratio_to_float{end}", ".3f") for end in ("", "_least", "_most"))
    yield text("scanned_to_single", ".2f")


def table(results: Sequence[dict[str, Any]]) -> Table:
    """What is printed."""
    first = results[0]
    printed = Table(
        title=(
            f"{first['devices']} x {first['device_kind']}, jax {first['jax']}; {first['rounds']} rounds of "
            f"{first['steps']} steps on random bytes for images\n"
            "peak: FLOP/s of a large square matrix product in the same precision on this device, times the "
            "number of devices\n"
            "used: share of the peak that the step reaches; ratio: to the step of the method float, by rounds"
        )
    )
    names = ("network", "width", "precision", "batch", "method")
    numbers = (
        "images/s",
        "peak GFLOP/s",
        "used",
        "step MB",
        "ever MB",
        "optimizer",
        "ratio",
        "least",
        "most",
    )
    for name in (*names, *numbers, "scanned"):
        printed.add_column(name, justify="left" if name in names else "right")
    for result in results:
        printed.add_row(*_cells(result))
    return printed


def benchmark(
    *,
    models: Annotated[tuple[ModelName, ...], _SEVERAL] = ("vgg11", "vgg16", "resnet18"),
    methods: Annotated[tuple[Method, ...], _SEVERAL] = ("float", "binary_connect", "stam"),
    precisions: Annotated[tuple[Precision, ...], _SEVERAL] = ("float32",),
    batch_sizes: Annotated[tuple[Annotated[int, _COUNT], ...], _SEVERAL] = (128,),
    width: Annotated[float, Parameter(validator=Number(gt=0))] = 1.0,
    rounds: Annotated[int, _COUNT] = 5,
    steps: Annotated[int, _COUNT] = 10,
    scan: Annotated[bool, Parameter(negative="")] = False,
    output: Path | None = None,
) -> None:
    """Time training steps on random bytes, and print a table.

    Args:
        models: networks to time.
        methods: to time; "float", with which all are compared, is always among them.
        precisions: what the networks compute in.
        batch_sizes: images per step, over all devices together.
        width: channels of every layer, as a multiple of the published network's.
        rounds: turns of each method.
        steps: of each turn.
        scan: time steps scanned inside one call as well, with the method "float".
        output: JSON file for all that was measured.
    """
    chosen = tuple(dict.fromkeys((BASE, *methods)))
    grid = itertools.product(dict.fromkeys(models), dict.fromkeys(precisions), dict.fromkeys(batch_sizes))
    cases = [Case(model, width, precision, size) for model, precision, size in grid]
    results: list[dict[str, Any]] = []
    # Where nobody looks at a screen, as in a log, the table is not to be folded to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(cases) * (len(chosen) + rounds))
        told = lambda text: progress.update(bar, description=text, advance=1)
        for case in cases:
            results += measure(case, chosen, rounds=rounds, steps=steps, scan=scan, told=told)
            if output is not None:
                output.write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 for a wrong setting."""
    return command.run("python -m benchmarks.training", benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
