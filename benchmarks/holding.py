"""How firmly each layer holds its signs: sizes of steps and pulls, and how many signs turn, by layer.

    python -m benchmarks.holding --data-dir DIR
    python -m benchmarks.holding --data-dir DIR --optimizer adamw --learning-rate 0.001 --inertia 0.9999

It trains a network with a linear blend and looks at windows of a hundred steps. In a step the optimizer moves
the latent weights by u to w, and the inertia pulls them by (1 - kappa) (w - x) toward the weights in use x.
For each layer, as means over the window:

    step = mean |u| / mean |w|
    walk = |u_1 + ... + u_L| / (sqrt(L) |w|)        the step's noise, with what momentum makes of it
    pull = (1 - kappa) mean |w - x| / mean |u|
    turned = share of the signs that turn in a step; changed = that differ after the window

The rows are added to `benchmarks/results/holding.json`, in the place of those of the same settings, and
printed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from benchmarks import command
from benchmarks.flips import Run
from experiments.config import DatasetName, ModelName, Optimizer, TrainSettings
from stam_jax import SplittingState

RESULTS = Path(__file__).parent / "results" / "holding.json"
POINTS = (0.05, 0.25, 0.5, 0.7, 0.8, 0.9)
WINDOW = 100

_COUNT = Parameter(validator=Number(gte=1))


def latent_weights(state: Any) -> dict[str, jax.Array]:
    """Copies of the latent weights in an optimizer's state, by path."""
    is_state = lambda node: isinstance(node, SplittingState)
    (found,) = [node for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]
    return _by_path(found.latent)


def _by_path(tree: Any) -> dict[str, jax.Array]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): jnp.copy(leaf)
        for path, leaf in named
    }


@jax.jit
def sizes(
    kappa: float, v: dict[str, jax.Array], x: dict[str, jax.Array], v_next: dict[str, jax.Array]
) -> dict[str, dict[str, jax.Array]]:
    """What one step did in each leaf, from the latent weights before it and the weights after it."""

    def leaf(v: jax.Array, x: jax.Array, v_next: jax.Array) -> dict[str, jax.Array]:
        w = (v_next - (1 - kappa) * x) / kappa
        u, pull = w - v, (1 - kappa) * (w - x)
        mean = lambda a: jnp.mean(jnp.abs(a))
        return {
            "step": mean(u) / mean(w),
            "pull": mean(pull) / mean(u),
            "turned": jnp.mean((v < 0) != (v_next < 0)),
            "u": u,
            "norm": jnp.linalg.norm(w),
        }

    return {path: leaf(v[path], x[path], v_next[path]) for path in v}


def window(run: Run, kappa: float) -> dict[str, dict[str, float]]:
    """Take `WINDOW` steps; say what they did in each leaf."""
    first = latent_weights(run.state.opt_state)
    v, walked = first, {path: jnp.zeros_like(leaf) for path, leaf in first.items()}
    rows: dict[str, list[dict[str, float]]] = {path: [] for path in first}
    for _ in range(WINDOW):
        run.take()
        v_next = latent_weights(run.state.opt_state)
        x = {path: leaf for path, leaf in _by_path(run.state.params).items() if path in v}
        for path, found in sizes(kappa, v, x, v_next).items():
            walked[path] = walked[path] + found.pop("u")
            rows[path].append({name: float(value) for name, value in found.items()})
        v = v_next
    layers = {}
    for path, those in rows.items():
        means = {name: float(np.mean([row[name] for row in those])) for name in those[0]}
        means["walk"] = float(jnp.linalg.norm(walked[path])) / (WINDOW**0.5 * means.pop("norm"))
        means["changed"] = float(jnp.mean((first[path] < 0) != (v[path] < 0)))
        rounded = {name: float(f"{value:.4g}") for name, value in means.items()}
        layers[path] = rounded | {"weights": first[path].size}
    return layers


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown: means over the weights, of the layers the least and the most."""
    first = rows[0]
    lines = [
        f"{first['dataset']}, batches of {first['batch_size']}, one seed; {first['machine']}, jax "
        f"{first['jax']}. Means over windows of {first['window']} steps and over the weights; in brackets "
        "the least and the most of the layers.",
        "",
        "| network | optimizer | inertia | share of the run | step | walk | pull | signs that turn in a step "
        f"| that changed after {first['window']} |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        layers = row["layers"].values()
        weights = [layer["weights"] for layer in layers]
        mean = lambda name, layers=layers, weights=weights: np.average(
            [layer[name] for layer in layers], weights=weights
        )
        extremes = lambda name, layers=layers: [f([layer[name] for layer in layers]) for f in (min, max)]
        span = lambda name, extremes=extremes: "({:.2%} to {:.2%})".format(*extremes(name))
        schedule = "a cosine" if row["decay_from"] is None else f"held to {row['decay_from']:.0%}"
        cells = (
            f"{row['model']} at width {row['width']:g}, {row['epochs']} epochs",
            f"{row['optimizer']} at {row['learning_rate']:g}, {schedule}",
            f"{row['inertia']:g}",
            f"{row['share']:.0%}",
            f"{mean('step'):.2%} {span('step')}",
            f"{mean('walk'):.1%}",
            f"{mean('pull'):.2%} {span('pull')}",
            f"{mean('turned'):.3%}",
            f"{mean('changed'):.2%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def benchmark(
    *,
    dataset: DatasetName = "cifar10",
    model: ModelName = "vgg11",
    width: Annotated[float, Parameter(validator=Number(gt=0))] = 0.125,
    optimizer: Optimizer = "sgd",
    learning_rate: Annotated[float, Parameter(validator=Number(gt=0))] = 0.1,
    decay_from: Annotated[float | None, Parameter(validator=Number(gte=0, lt=1))] = None,
    inertia: Annotated[float, Parameter(validator=Number(gt=0, lte=1))] = 0.999,
    epochs: Annotated[int, _COUNT] = 7,
    batch_size: Annotated[int, _COUNT] = 128,
    seed: int = 0,
    data_dir: Path | None = None,
    output: Path = RESULTS,
) -> None:
    """Say how firmly each layer holds its signs.

    Args:
        dataset: images to learn from.
        model: network to train.
        width: channels of every layer, as a multiple of the published network's.
        optimizer: SGD with Nesterov momentum, or AdamW.
        learning_rate: at the start.
        decay_from: share of the run from which on the learning rate falls linearly; by default it falls along
            a cosine.
        inertia: of the linear blend.
        epochs: of the run.
        batch_size: images per step.
        seed: of the run.
        data_dir: folder of prepared image sets; by default that of TensorFlow Datasets.
        output: JSON file that the rows are added to.
    """
    # Flax takes its time to import, which those who only ask for help need not wait for.
    from experiments.config import Execution
    from experiments.reporting import run_folder
    from experiments.training import jobs

    settings = TrainSettings(
        dataset=dataset,
        model=model,
        width=width,
        method="linear_blend",
        optimizer=optimizer,
        learning_rate=learning_rate,
        decay_from=decay_from,
        nesterov=optimizer == "sgd",
        inertia=inertia,
        epochs=epochs,
        batch_size=batch_size,
        measure_every=epochs,
    )
    names = ("dataset", "model", "width", "optimizer", "learning_rate", "decay_from", "inertia", "epochs")
    common = {name: getattr(settings, name) for name in (*names, "batch_size")} | {"seed": seed}
    facts = {"machine": run_folder.environment()["machine"], "jax": jax.__version__, "window": WINDOW}
    trainer = jobs.trainer(settings, Execution(data_dir=data_dir))
    rows = [] if not output.exists() else json.loads(output.read_text())
    rows = [row for row in rows if any(row[name] != value for name, value in common.items())]
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("steps", total=trainer.steps)
        run = Run(trainer, seed, lambda: progress.advance(bar))
        for share in POINTS:
            while run.step < round(share * trainer.steps):
                run.take()
            rows.append(common | facts | {"share": share, "layers": window(run, inertia)})
    output.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 for a wrong setting."""
    return command.run("python -m benchmarks.holding", benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
