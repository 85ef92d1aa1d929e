"""The theorems of docs/theory.md against runs: the residual, its bound, the flip work.

    python -m benchmarks.theorems
    python -m benchmarks.report

The first writes `benchmarks/results/theorems.json` and prints a table of it, in two minutes; the second puts
the table into the page. Every cell is the mean of 20 seeds in float64.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from benchmarks.problems import PROBLEMS, Problem
from stam_jax import Binary, Quantizer, diagnostics, quantize, stam_proximal, theory, three_block_splitting
from stam_jax.relaxations import SquaredDistance

RESULTS = Path(__file__).parent / "results" / "theorems.json"
SEEDS = 20
STEPS = 1000
PENALTY = 30.0
# The pull that an inertia of 0.99 leaves of that.
WEAK = 0.3
TENSOR = Binary(axis=())
INERTIAS = (0.0, 0.5, 0.9, 0.99, 1.0)


class Run(NamedTuple):
    """What runs from several seeds came to, an array each.

    Args:
        residual: the mean over the steps of |R|^2, R being how the iteration moved less its noise.
        measured: the same of the library's residual.
        work: the sum over the steps of the flip work.
        late_work: of it, the part of the second half of the steps.
        flips: how many signs changed.
        quantized_loss: the loss of the quantized weights at the end.
    """

    residual: Any
    measured: Any
    work: Any
    late_work: Any
    flips: Any
    quantized_loss: Any


def everywhere(quantizer: Quantizer) -> Callable[[str, Any], Quantizer]:
    """The rule that gives every leaf this quantizer, whatever its name and rank."""
    return lambda path, leaf: quantizer


def build(
    learning_rate: float,
    penalty: float,
    *,
    quantizer: Quantizer,
    inertia: float | optax.Schedule = 0.0,
    project: Any = "first",
    **pulls: Any,
) -> optax.GradientTransformationExtraArgs:
    """The iteration of theorem 1; that of theorem 2 with inertia or with the projection last."""
    if inertia == 0 and project == "first":
        return stam_proximal(learning_rate, penalty, quantizer=everywhere(quantizer), **pulls)
    return three_block_splitting(
        optax.sgd(learning_rate),
        quantizer=everywhere(quantizer),
        relaxation=SquaredDistance(learning_rate * penalty),
        inertia=inertia,
        project=project,
    )


def run(
    problem: Problem,
    steps: int,
    learning_rate: float,
    *,
    penalty: float,
    inertia: float = 0.0,
    seeds: int = SEEDS,
    with_work: bool = False,
    take: Callable[[Any, Any], Any] | None = None,
    quantizer: Quantizer = TENSOR,
    pulls: dict[str, Any] | None = None,
    project: str = "first",
) -> Run:
    """Runs of the iteration of the theorems, or of another, from several seeds at once.

    Args:
        problem: the problem.
        steps: of each run.
        learning_rate: eta.
        penalty: rho.
        inertia: kappa.
        seeds: how many runs.
        with_work: whether to measure the flip work, 0 otherwise.
        take: the next x, from x and a stochastic gradient, in place of the step of the theorems.
        quantizer: of the weights.
        pulls: regularizer and its penalty.
        project: where the projection is found.
    """
    pulls = pulls or {}
    optimizer = build(learning_rate, penalty, quantizer=quantizer, inertia=inertia, project=project, **pulls)
    moved = diagnostics.effective_step(
        learning_rate, penalty=penalty, regularizer_penalty=pulls.get("regularizer_penalty", 0.0)
    )
    rule = everywhere(quantizer)
    model: Any = {"penalty": (1 - inertia) * penalty, "quantizer": rule, **pulls}

    def one(key: jax.Array) -> Run:
        def step(carry: Any, key: jax.Array) -> Any:
            x, state = carry
            gradient, d = jax.grad(problem.loss)(x), problem.draw(x, key)
            measured = diagnostics.residual(gradient, state, x, **model).whole.total
            new_x, new_state = _take_step(optimizer, d, state, x)
            if take is not None:
                new_x = take(x, d)
            residual = (x - new_x) / moved - (d - gradient)
            work = jnp.zeros([])
            if with_work:
                work = diagnostics.flip_work(
                    problem.loss,
                    d,
                    (state, x),
                    (new_state, new_x),
                    learning_rate=learning_rate,
                    penalty=penalty,
                    inertia=inertia,
                    quantizer=rule,
                )
            flips = jnp.sum((x >= 0) != (new_x >= 0))
            return (new_x, new_state), (jnp.sum(residual**2), measured**2, work, flips)

        begin: Any = (problem.start, optimizer.init(problem.start))
        (x, state), found = jax.lax.scan(step, begin, jax.random.split(key, steps))
        squares, measured, work, flips = found
        return Run(
            residual=jnp.mean(squares),
            measured=jnp.mean(measured),
            work=jnp.sum(work),
            late_work=jnp.sum(work[steps // 2 :]),
            flips=jnp.sum(flips),
            quantized_loss=problem.loss(quantize(x if state.latent is None else state.latent, rule)),
        )

    keys = jax.random.split(jax.random.key(1), seeds)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))


def decrease(problem: Problem, *, quantizer: Quantizer = TENSOR, **model: Any) -> float:
    """How far the objective can fall from the start, at most."""
    start = problem.start
    state = build(0.1, 1.0, quantizer=quantizer).init(start)
    loss, rule = problem.loss(start), everywhere(quantizer)
    return float(diagnostics.objective(loss, state, start, quantizer=rule, **model).total) - problem.least


def _take_step(optimizer: optax.GradientTransformation, d: Any, state: Any, x: Any) -> Any:
    """The weights and the state after one step."""
    updates, state = optimizer.update(d, state, x)
    return optax.apply_updates(x, updates), state


def measure(name: str, inertia: float, project: str, penalty: float = PENALTY) -> dict[str, Any]:
    """One cell of the table."""
    problem = PROBLEMS[name]()
    learning_rate = 1 / problem.smoothness
    settings: Any = {"penalty": penalty, "inertia": inertia, "project": project}
    found = run(problem, STEPS, learning_rate, with_work=True, **settings)
    fall = decrease(problem, penalty=(1 - inertia) * penalty)
    known: Any = {
        "smoothness": problem.smoothness,
        "noise": problem.noise,
        "steps": STEPS,
        "penalty": penalty,
        "inertia": inertia,
    }
    falls = fall + found.work
    allowed = np.array([theory.bound(learning_rate, decrease=float(fall), **known) for fall in falls])
    return {
        "problem": name,
        "inertia": inertia,
        "project": project,
        "residual": float(np.mean(found.measured)),
        "bound": float(np.mean(allowed)),
        "kept": int(np.sum(found.measured < allowed)),
        "seeds": SEEDS,
        "work": float(np.mean(found.work)),
        "work_deviation": float(np.std(found.work, ddof=1)),
        "late_work": float(np.mean(found.late_work)),
        "flips": float(np.mean(found.flips)),
        "hard_loss": float(np.mean(found.quantized_loss)),
        "steps": STEPS,
        "penalty": penalty,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown."""
    lines = [
        "| problem | project | inertia | mean \\|R\\|² | bound | flip work | of it late | flips "
        "| quantized loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row["problem"],
            row["project"],
            f"{row['inertia']:g}" + f", penalty {row['penalty']:g}" * (row["penalty"] != PENALTY),
            f"{row['residual']:.3g}",
            f"{row['bound']:.3g}",
            f"{row['work']:.3g} ± {row['work_deviation']:.2g}",
            f"{row['late_work']:.3g}",
            f"{row['flips']:.0f}",
            f"{row['hard_loss']:.3g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run every cell, write the file, and print the table."""
    jax.config.update("jax_enable_x64", True)
    cells = [
        (name, inertia, project, penalty)
        for name in PROBLEMS
        for project in ("first", "last")
        for inertia, penalty in [(0.0, WEAK), *((inertia, PENALTY) for inertia in INERTIAS)]
    ]
    rows = [measure(*cell) for cell in track(cells, description="Theorems")]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
