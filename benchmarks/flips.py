"""Which sign changes pay: what the loss of the binary network owes to those of a step, and of a hundred.

    python -m benchmarks.flips --data-dir DIR
    python -m benchmarks.report

The first trains a network with three inertias, writes `benchmarks/results/flips.json` and prints a table of
it, in some forty minutes on one CPU core; the second puts the table into the page. At some points of each run
it looks at windows: single steps, and a hundred in a row. A window takes the binary network from weights a to
weights b. What of the change of the loss f is due to the signs is told by two networks between the two, a
with the signs of b and b with those of a:

    signs' part = ((f(a with signs of b) - f(a)) + (f(b) - f(b with signs of a))) / 2.

With the same part of all the rest (scales, biases, batch norm) it adds up to f(b) - f(a). Below 0 the signs
that changed paid. f is the mean loss on training images that are augmented once, with each batch's own
statistics, as in training. A sign that turns and turns back within a window has not changed; how many do is
told as well.
"""

import functools
import json
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import command
from experiments.config import DatasetName, ModelName, SettingsError, TrainSettings
from stam_jax import quantize, tabulate

if TYPE_CHECKING:
    from experiments.training.run import Trainer

RESULTS = Path(__file__).parent / "results" / "flips.json"
# By where the next step starts: from the relaxed weights, near the latent ones, from the latent ones.
TRIALS: dict[str, dict[str, Any]] = {
    "inertia 0": {"method": "stam_proximal"},
    "inertia 0.999": {"method": "linear_blend", "inertia": 0.999},
    "inertia 1": {"method": "linear_blend"},
}
POINTS = (0.4, 0.6, 0.8, 0.9)
SINGLE, LONG = 25, 100

_COUNT = Parameter(validator=Number(gte=1))


def with_signs(weights: Any, other: Any, chosen: Any) -> Any:
    """Weights with the signs of others in the leaves that are chosen, by a tree of booleans."""
    return jax.tree.map(
        lambda leaf, source, take: jnp.where(source < 0, -1, 1) * jnp.abs(leaf) if take else leaf,
        weights,
        other,
        chosen,
    )


def signs_part(loss: Callable[[Any], float], before: Any, after: Any, chosen: Any) -> float:
    """What of the change of a loss is due to the signs of some leaves."""
    first = loss(with_signs(before, after, chosen)) - loss(before)
    second = loss(after) - loss(with_signs(after, before, chosen))
    return (first + second) / 2


def turned(before: Any, after: Any, chosen: Any) -> float:
    """The share of the weights of some leaves whose sign changed."""
    pairs = jax.tree.map(
        lambda a, b, take: (jnp.sum((a < 0) != (b < 0)), a.size) if take else (0, 0), before, after, chosen
    )
    counts = np.array(jax.tree.leaves(pairs), float).reshape(-1, 2).sum(axis=0)
    return float(counts[0] / counts[1])


class Run:
    """A run of the experiments, to be taken step by step.

    Args:
        trainer: of the run.
        seed: of its weights, the order of the images and their augmentation, as in the experiments.
        told: called after each step.
    """

    def __init__(self, trainer: "Trainer", seed: int, told: Callable[[], None]):
        first, self._key = jax.random.split(jax.random.key(seed))
        self._trainer, self._told, self.step = trainer, told, 0
        self.state = trainer.initial_state(first)
        records = trainer.dataset.train
        self._train = trainer.layout.everywhere(records.at(np.arange(records.size)))

    def take(self) -> None:
        """The next step."""
        trainer = self._trainer
        epoch, index = divmod(self.step, trainer.steps_per_epoch)
        order_key, step_key = jax.random.split(jax.random.fold_in(self._key, epoch))
        if index == 0:
            order = jax.random.permutation(order_key, trainer.dataset.train.size)
            self._order = trainer.layout.everywhere(order)
        self.state, _ = trainer.advance(self.state, step_key, self._train, self._order)
        self.step += 1
        self._told()

    def quantized(self) -> Any:
        """The binary network's weights; copies, for what a step is given is gone after it."""
        return jax.tree.map(jnp.copy, quantize(self.state.params, self._trainer.quantizer))


def loss_on(trainer: "Trainer", count: int) -> Callable[[Any], float]:
    """The mean loss on so many training images, as a function of the weights."""
    from flax import nnx

    size = trainer.settings.batch_size
    split = trainer.dataset.train.at(np.arange(max(count // size, 1) * size))
    images = jax.jit(trainer.dataset.augment)(jax.random.key(0), split.images)
    stats = trainer.initial_state(jax.random.key(0)).stats

    @jax.jit
    def batch_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        # In training a batch's own statistics count, not those that run along.
        logits = nnx.merge(trainer.graph, params, stats, copy=True)(images, train=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def loss(params: Any) -> float:
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        found = [batch_loss(params, images[part], split.labels[part]) for part in parts]
        return float(np.mean(jax.device_get(found), dtype=np.float64))

    return loss


def layers(params: Any, quantizer: Any) -> dict[str, Any]:
    """For each leaf that is quantized, by its path, a tree of booleans that chooses it alone."""
    rows = tabulate(params, quantizer).rows
    alone = lambda row: jax.tree.unflatten(jax.tree.structure(params), [other is row for other in rows])
    return {row.path: alone(row) for row in rows if row.quantizer is not None}


def window(run: Run, loss: Callable[[Any], float], by_layer: dict[str, Any]) -> dict[str, Any]:
    """Take `LONG` steps; say what the signs did in them together, and in each of the first `SINGLE`."""
    chosen = functools.reduce(lambda a, b: jax.tree.map(operator.or_, a, b), by_layer.values())
    start = before = run.quantized()
    turns, changes, parts = [], [], []
    for index in range(LONG):
        run.take()
        after = run.quantized()
        turns.append(turned(before, after, chosen))
        if index < SINGLE:
            changes.append(loss(after) - loss(before))
            parts.append(signs_part(loss, before, after, chosen))
        before = after
    return {
        "turned_by_step": float(np.mean(turns)),
        "turned_by_window": turned(start, before, chosen),
        "change_by_step": float(np.mean(changes)),
        "signs_by_step": float(np.mean(parts)),
        "change_by_window": loss(before) - loss(start),
        "signs_by_window": signs_part(loss, start, before, chosen),
        "signs_by_layer": {path: signs_part(loss, start, before, layer) for path, layer in by_layer.items()},
        "loss": loss(before),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown, a line for each trial and share of the run: means over the seeds."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    # The spread has no sign.
    spread = lambda values, form: f" ± {np.std(values, ddof=1):{form.lstrip('+')}}" if seeds > 1 else ""
    text = lambda values, form, unit="": f"{np.mean(values):{form}}{spread(values, form)}{unit}"
    lines = [
        f"{first['model']} at width {first['width']:g} on {first['dataset']}, {first['epochs']} epochs, "
        f"batches of {first['batch_size']}, step size held for three quarters. Loss of the binary network on "
        f"{first['images']:,} training images, its changes in thousandths. Mean and standard deviation over "
        f"{seeds} seeds; {first['machine']}, jax {first['jax']}.",
        "",
        f"| inertia | share of the run | signs that turn in a step | that changed after {LONG} | change of "
        f"the loss by a step's signs | by the rest of it | by {LONG} steps' signs | by the rest of them "
        "| loss |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for trial, share in dict.fromkeys((row["trial"], row["share"]) for row in rows):
        those = [row for row in rows if (row["trial"], row["share"]) == (trial, share)]
        column = lambda name, those=those: np.array([row[name] for row in those])
        cells = [trial.removeprefix("inertia "), f"{share:.0%}"]
        cells += [text(100 * column(f"turned_by_{of}"), ".2f", "%") for of in ("step", "window")]
        for of in ("step", "window"):
            signs, change = column(f"signs_by_{of}"), column(f"change_by_{of}")
            cells += [text(1000 * values, "+.1f") for values in (signs, change - signs)]
        lines.append(f"| {' | '.join([*cells, text(column('loss'), '.3f')])} |")
    return lines


def benchmark(
    *,
    dataset: DatasetName = "cifar10",
    model: ModelName = "vgg11",
    width: Annotated[float, Parameter(validator=Number(gt=0))] = 0.125,
    epochs: Annotated[int, _COUNT] = 10,
    batch_size: Annotated[int, _COUNT] = 128,
    seeds: Annotated[int, _COUNT] = 2,
    images: Annotated[int, _COUNT] = 2048,
    data_dir: Path | None = None,
    output: Path = RESULTS,
) -> None:
    """Say what the loss of the binary network owes to sign changes, with three inertias.

    Args:
        dataset: images to learn from.
        model: network to train.
        width: channels of every layer, as a multiple of the published network's.
        epochs: of each run.
        batch_size: images per step.
        seeds: runs with each inertia.
        images: training images that the loss is measured on.
        data_dir: folder of prepared image sets; by default that of TensorFlow Datasets.
        output: JSON file for all that was measured.
    """
    # Flax takes its time to import, which those who only ask for help need not wait for.
    from experiments.config import Execution
    from experiments.reporting import run_folder
    from experiments.training import jobs

    common = {"dataset": dataset, "model": model, "width": width, "epochs": epochs, "batch_size": batch_size}
    facts = {"machine": run_folder.environment()["machine"], "jax": jax.__version__, "images": images}
    rows: list[dict[str, Any]] = []
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for trial, own in TRIALS.items():
            settings = TrainSettings(**common, decay_from=0.75, measure_every=epochs, **own)
            trainer = jobs.trainer(settings, Execution(data_dir=data_dir))
            points = [round(share * trainer.steps) for share in POINTS]
            if trainer.steps - points[-1] < LONG or min(np.diff(points)) < LONG:
                raise SettingsError(f"--epochs: {trainer.steps} steps have no room for windows of {LONG}.")
            loss = loss_on(trainer, images)
            for seed in range(seeds):
                bar = progress.add_task(f"{trial}, seed {seed}", total=points[-1] + LONG)
                run = Run(trainer, seed, lambda bar=bar: progress.advance(bar))
                for share, point in zip(POINTS, points, strict=True):
                    while run.step < point:
                        run.take()
                    measured = window(run, loss, layers(run.quantized(), trainer.quantizer))
                    rows.append({"trial": trial, "seed": seed, "share": share} | common | facts | measured)
                    output.write_text(json.dumps(rows, indent=1) + "\n")
                progress.remove_task(bar)
    print("\n".join(table(rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 for a wrong setting."""
    return command.run("python -m benchmarks.flips", benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
