"""Measures of every step, recorded by the optimiser itself."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, _state
from stam_jax._numbers import ScalarOrSchedule
from stam_jax.diagnostics import quantisation_gap, residual, sign_flips
from stam_jax.hard import quantized_leaves
from stam_jax.regularizers import Regularizer


class StepDiagnostics(NamedTuple):
    """What one step did; every field NaN before the first.

    Args:
        residual: |R| at the point that the step left, with the updates that came in for the gradient.
        gap: the `quantisation_gap` at the point that the step reached.
        flips: the share of quantised weights whose sign the step changed.
        moved: the norm of the update of all parameters.
    """

    residual: jax.Array
    gap: jax.Array
    flips: jax.Array
    moved: jax.Array


class TraceState(NamedTuple):
    """The state of `trace_diagnostics`.

    Args:
        count: the steps taken so far, an int32 scalar.
        diagnostics: of the last step that was recorded.
        inner: the state of the optimiser inside.
    """

    count: jax.Array
    diagnostics: StepDiagnostics
    inner: Any


def trace_diagnostics(
    optimizer: optax.GradientTransformation,
    *,
    penalty: ScalarOrSchedule = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: ScalarOrSchedule = math.inf,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that leaves in its state what each of its steps did.

    The updates are those of the optimiser inside, unchanged. Put it around the whole chain, so that the
    residual is that of the gradient and not of what momentum made of it; and read
    `optax.tree.get(opt_state, "diagnostics")`, under jit and scan too. A recorded step costs two projections
    and a few passes over the weights. Put it inside `optax.MultiSteps`, to record whole steps.

    Args:
        optimizer: a chain that ends in `stam`, or in one of its methods.
        penalty: the pull towards the quantised weights, as in `diagnostics.residual`; it and
            `regularizer_penalty` may be schedules, read at the step count of this transform.
        regularizer: h, as in `diagnostics.residual`.
        regularizer_penalty: as in `diagnostics.residual`.
        every: record the first step of so many; the others keep the last record, and cost nothing but under
            `vmap`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `TraceState`.

    Raises:
        ValueError: for a number out of range; in `init`, for an optimiser without a state of `stam`.
        TypeError: for an argument of the wrong kind, such as a fraction for `every`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import stam, trace_diagnostics
        >>> settings = {"penalty": 2.0}
        >>> optimizer = trace_diagnostics(optax.chain(optax.trace(0.9), stam(0.1, **settings)), **settings)
        >>> params = {"kernel": jnp.array([[0.2], [-0.2]])}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"kernel": jnp.array([[9.0], [0.0]])}, state, params)
        >>> found = optax.tree.get(state, "diagnostics")
        >>> print(found.residual, found.flips)
        9.0 0.5
    """
    where = "trace_diagnostics"
    _state.check_has(where, "optimizer", optimizer, "init", "update")
    _numbers.check(where, "penalty", penalty, finite=True)
    _numbers.check(where, "regularizer_penalty", regularizer_penalty)
    _numbers.check_whole(where, "every", every)
    if regularizer is not None:
        _state.check_has(where, "regularizer", regularizer, "prox")
        if _numbers.is_fixed_at(regularizer_penalty, math.inf):
            raise ValueError(f"{where}: regularizer_penalty must be finite where there is a regularizer.")
    chain = optax.with_extra_args_support(optimizer)

    def measured(
        state: TraceState, inner: Any, params: Any, updates: Any, moves: Any, rho: Any, tau: Any
    ) -> Any:
        left = residual(
            updates, state.inner, params, penalty=rho, regularizer=regularizer, regularizer_penalty=tau
        )
        reached = optax.apply_updates(params, moves)
        hard = [
            {name: leaf.hard for name, leaf in quantized_leaves(*pair).items()}
            for pair in ((state.inner, params), (inner, reached))
        ]
        found = StepDiagnostics(
            residual=left.whole.total,
            gap=quantisation_gap(inner, reached),
            flips=sign_flips(*hard),
            moved=optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(_state.wide(leaf)), moves)),
        )
        return jax.tree.map(lambda number: number.astype(jnp.float32), found)

    # Compiled once, also where the steps themselves are not.
    @jax.jit
    def record(state: TraceState, *reached: Any) -> StepDiagnostics:
        kept = lambda state, *_: state.diagnostics
        return jax.lax.cond(state.count % every == 0, measured, kept, state, *reached)

    def init(params: Any) -> TraceState:
        inner = chain.init(params)
        quantized_leaves(inner, params)  # Raises where there is none to measure.
        nothing = StepDiagnostics(*(jnp.full([], jnp.nan, jnp.float32) for _ in StepDiagnostics._fields))
        return TraceState(jnp.zeros([], jnp.int32), nothing, inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, TraceState]:
        _state.check_own(where, state, TraceState)
        moves, inner = chain.update(updates, state.inner, params, **extra_args)
        pulls = _numbers.at(penalty, state.count), _numbers.at(regularizer_penalty, state.count)
        recorded = record(state, inner, params, updates, moves, *pulls)
        count = jnp.asarray(optax.safe_increment(state.count))
        return moves, TraceState(count, recorded, inner)

    return optax.GradientTransformationExtraArgs(init, update)
