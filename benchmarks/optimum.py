r"""How often each method finds the best signs of problems small enough to try them all.

    python -m benchmarks.optimum
    python -m benchmarks.report

Least squares in 16 weights with one scale: $|X \alpha s - b|^2 / (2 m)$ over the 65,536 sign patterns s and
all $\alpha \ge 0$. X has correlated columns. In the problems called planted, b comes from a pattern of signs
seen through noise; in those called arbitrary from real numbers, so that no binary weights fit well. Every
method takes 1,000 steps on minibatches of 8 of the 48 rows, with momentum 0.9 (but `bop`) and a cosine of the
step size from 0.05, otherwise at the settings of the experiments (`experiments/optimizers.py`), without
weight decay, untuned for this. What it found are its signs, at the scale that is best for them.
"float, rounded" is the signs of the least-squares solution.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from experiments.config import Method, TrainSettings
from experiments.training import optimizers
from stam_jax import quantize

RESULTS = Path(__file__).parent / "results" / "optimum.json"
WEIGHTS = 16
ROWS = 48
BATCH = 8
STEPS = 1000
EPOCHS = 50
PROBLEMS = 100
KINDS = ("planted", "arbitrary")
ROUNDED = "float, rounded"
METHODS = tuple(name for name in get_args(Method) if name != "float")


class Problem(NamedTuple):
    """One problem, or many along a leading axis: the inputs X, the targets b, and where runs begin."""

    inputs: Any
    targets: Any
    start: Any


def draw(kind: str, seed: int) -> Problem:
    """A problem, in NumPy."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(WEIGHTS) + 0.5 * rng.normal(size=(WEIGHTS, WEIGHTS)) / np.sqrt(WEIGHTS)
    inputs = (rng.normal(size=(ROWS, WEIGHTS)) + rng.normal(size=(ROWS, 1))) @ mixing / 2
    weights = rng.choice([-1.0, 1.0], size=WEIGHTS) if kind == "planted" else rng.normal(size=WEIGHTS)
    targets = inputs @ weights + 0.5 * rng.normal(size=ROWS)
    return Problem(inputs, targets, 0.3 * rng.normal(size=(WEIGHTS, 1)))


def losses(problem: Problem, signs: Any) -> Any:
    """The loss of each pattern, a row each, at the scale of at least 0 that is best for it."""
    fits = signs @ problem.inputs.T
    along, length = fits @ problem.targets, np.sum(fits**2, axis=1)
    scales = np.maximum(along, 0) / length
    return np.sum((scales[:, None] * fits - problem.targets) ** 2, axis=1) / (2 * ROWS)


def patterns() -> Any:
    """Every pattern of signs, a row each."""
    bits = (np.arange(2**WEIGHTS)[:, None] >> np.arange(WEIGHTS)) & 1
    return 2.0 * bits - 1


def train(method: str, problems: Problem) -> Any:
    """The signs that a method finds, a row for each problem."""
    settings = TrainSettings(
        method=method,  # pyright: ignore[reportArgumentType]
        scale="tensor",
        epochs=EPOCHS,
        learning_rate=0.05,
        weight_decay=0.0,
        exclude=(),
    )
    quantizer = optimizers.choose({"kernel": jnp.zeros((WEIGHTS, 1))}, settings)
    optimizer = optimizers.build(settings, quantizer, steps=STEPS, epoch=STEPS // EPOCHS)

    def one(problem: Problem, key: jax.Array) -> jax.Array:
        def loss(params: Any, rows: jax.Array) -> jax.Array:
            errors = problem.inputs[rows] @ params["kernel"][:, 0] - problem.targets[rows]
            return jnp.mean(errors**2) / 2

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, ROWS)
            updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": problem.start}
        begin = (params, optimizer.init(params))
        (params, _), _ = jax.lax.scan(step, begin, jax.random.split(key, STEPS))
        return jnp.where(quantize(params, quantizer)["kernel"][:, 0] >= 0, 1.0, -1.0)

    keys = jax.random.split(jax.random.key(0), len(problems.targets))
    return np.asarray(jax.jit(jax.vmap(one))(jax.tree.map(jnp.asarray, problems), keys), np.float64)


def rounded(problems: Problem) -> Any:
    """The signs of the best float weights, a row for each problem."""
    pairs = zip(problems.inputs, problems.targets, strict=True)
    return np.stack([np.where(np.linalg.lstsq(*pair, rcond=None)[0] >= 0, 1.0, -1.0) for pair in pairs])


def measure(count: int = PROBLEMS, methods: tuple[str, ...] = METHODS) -> list[dict[str, Any]]:
    """A row for each kind of problem and method."""
    everything = patterns()
    rows = []
    for kind in KINDS:
        singles = [draw(kind, seed) for seed in range(count)]
        least = np.array([np.min(losses(problem, everything)) for problem in singles])
        stacked = Problem(*(np.stack(field) for field in zip(*singles, strict=True)))
        for method in track((ROUNDED, *methods), description=f"Problems, {kind}"):
            signs = rounded(stacked) if method == ROUNDED else train(method, stacked)
            found = np.array(
                [losses(problem, row[None])[0] for problem, row in zip(singles, signs, strict=True)]
            )
            excess = found / least - 1
            rows.append(
                {
                    "kind": kind,
                    "method": method,
                    "problems": count,
                    "weights": WEIGHTS,
                    "steps": STEPS,
                    "optimal": int(np.sum(excess < 1e-9)),
                    "within_5_percent": int(np.sum(excess < 0.05)),
                    "excess_median": float(np.median(excess)),
                    "excess_most": float(np.max(excess)),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table in Markdown, a line for each method."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    heads = [f"{kind}: {what}" for kind in kinds for what in ("optimum", "within 5%", "excess")]
    lines = [f"| method | {' | '.join(heads)} |", f"|---{'|--:' * len(heads)}|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for kind in kinds:
            (row,) = (row for row in rows if (row["kind"], row["method"]) == (kind, method))
            cells += [
                f"{row['optimal']}/{row['problems']}",
                str(row["within_5_percent"]),
                f"{row['excess_median']:.1%} (to {row['excess_most']:.0%})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run everything, write the file, and print the table."""
    rows = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
