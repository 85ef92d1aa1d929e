"""A penalty that is found on the way: it keeps what two blocks lack in balance, as in ADMM."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import stam_jax

# Boyd et al.'s numbers.
_FAR = 10.0
_FACTOR = 2.0
# Where nothing moves any more it would be doubled without end.
_RANGE = 1e-9, 1e9


class BalanceState(NamedTuple):
    """What the rule knows.

    Args:
        count: steps done.
        penalty: rho, as long as it is finite.
        hard: the quantised weights y at the last look, by name.
        method: state of the method.
    """

    count: jax.Array
    penalty: jax.Array
    hard: dict[str, jax.Array]
    method: Any


def balanced(
    method: Callable[..., optax.GradientTransformation], *, start: float, every: int, hard_from: int
) -> optax.GradientTransformation:
    r"""A method whose penalty is doubled or halved where one of two residuals is far from the other.

    Every so many steps it looks at $r = |x - y|$ and $s = \rho\,|y - y'|$, y' being y at the last look, where
    Boyd et al. have that of the last step. Where r is above 10 s it doubles rho, and where s is above 10 r it
    halves it.

    Args:
        method: makes the method of a `penalty`.
        start: rho at first.
        every: the steps between two looks.
        hard_from: the step from which on the penalty is infinite.

    Returns:
        An optimiser; its update needs the parameters.

    References:
        Boyd et al., Distributed optimization and statistical learning via the alternating direction method of
        multipliers, section 3.4.1.
    """
    injected = cast(Callable[..., optax.GradientTransformation], optax.inject_hyperparams(method))(
        penalty=start
    )
    hard_of = lambda leaves: {name: leaf.hard for name, leaf in leaves.items()}

    def init(params: Any) -> BalanceState:
        inner = injected.init(params)
        hard = hard_of(stam_jax.quantized_leaves(inner, params))
        return BalanceState(jnp.zeros([], int), jnp.float32(start), hard, inner)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, BalanceState]:
        penalty = jnp.where(state.count < hard_from, state.penalty, jnp.inf)
        given = state.method._replace(hyperparams={**state.method.hyperparams, "penalty": penalty})
        updates, inner = injected.update(updates, given, params)
        moved = optax.apply_updates(params, updates)
        count = state.count + 1

        def look() -> tuple[jax.Array, dict[str, jax.Array]]:
            leaves = stam_jax.quantized_leaves(inner, moved)
            hard = hard_of(leaves)
            r = optax.tree.norm({name: leaf.latent - leaf.hard for name, leaf in leaves.items()})
            s = state.penalty * optax.tree.norm(optax.tree.sub(hard, state.hard))
            factor = jnp.where(r > _FAR * s, _FACTOR, jnp.where(s > _FAR * r, 1 / _FACTOR, 1.0))
            return jnp.clip(state.penalty * factor, *_RANGE), hard

        is_due = (count % every == 0) & (count < hard_from)
        penalty, hard = jax.lax.cond(is_due, look, lambda: (state.penalty, state.hard))
        return updates, BalanceState(count, penalty, hard, inner)

    return optax.GradientTransformation(init, update)
