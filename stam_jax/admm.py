"""ADMM for quantised weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, _state
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._state import Mask, StamState
from stam_jax.quantizers import Binary, Quantizer


def admm_quant(
    learning_rate: ScalarOrSchedule,
    *,
    penalty: float,
    dual_every: int,
    hard_from: int,
    quantizer: Quantizer = Binary(scale="tensor"),
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ADMM: float weights, quantised weights, and multipliers that make the two agree.

    It splits $\min f(x)$ over $x \in Q$ into $\min f(x) + g(y)$ with $x = y$. With scaled multipliers u,

    $$x^+ = \arg\min_a\ \langle d, a\rangle + \frac{|a - x|^2}{2\eta} + \frac{\rho}{2}|a - y + u|^2
          = \frac{x - \eta d + \eta\rho\,(y - u)}{1 + \eta\rho}$$

    at every step, and every so many steps $y^+ = P_Q(x^+ + u)$ and $u^+ = u + x^+ - y^+$. Both follow from
    one array, $v = x^+ + u$ as it was then: $y = P_Q(v)$, $u = v - y$, and the next is $x^+ + v - P_Q(v)$. So
    the state is a single copy, and `hard_params` gives y. It starts at $v = x$, as after a dual step. x lives
    in the parameters alone: in dtypes narrower than float32 small steps are lost to rounding.

    From step `hard_from` on x = y is fixed, and only the leaves that are not quantised go on learning. Where
    the paper takes an extragradient step, this takes one step along the direction that comes in.

    It is not a configuration of `stam`, which has no multipliers.

    Args:
        learning_rate: the step size, a number or a schedule.
        penalty: $\rho$, at least 0; a number, since scaled multipliers belong to one.
        dual_every: the steps between two updates of the multipliers; the paper's minimisation over x.
        hard_from: the step from which on the weights are quantised.
        quantizer: the set Q; the paper's has one scale per layer.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also for a `dual_every` below 1, or a negative `penalty` or
            `hard_from`.

    Example:
        >>> import optax
        >>> from stam_jax import admm_quant
        >>> steps_per_epoch = 390
        >>> optimizer = optax.chain(
        ...     optax.trace(0.9),
        ...     admm_quant(0.1, penalty=0.1, dual_every=steps_per_epoch, hard_from=60_000),
        ... )

    References:
        Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, arXiv:1707.09870.
    """
    _numbers.check("admm_quant", "learning_rate", learning_rate, finite=True)
    _numbers.check_each(
        "admm_quant", ("penalty", penalty, 0), ("dual_every", dual_every, 1), ("hard_from", hard_from, 0)
    )
    _state.check_has("admm_quant", "quantizer", quantizer, "bits", "project", "contains")

    def init(params: Any) -> StamState:
        return _state.begin("admm_quant", params, mask=mask, quantizer=quantizer, memory=_state.float_copy)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, StamState]:
        del extra_args
        _state.check_own("admm_quant", state, StamState)
        eta = _numbers.at(learning_rate, state.count)
        is_hard = state.count >= hard_from
        is_dual = (state.count + 1) % dual_every == 0

        def move(leaf_quantizer: Quantizer, x: jax.Array, latent: Any, d: jax.Array) -> Any:
            v = _state.float_block(x, latent)
            y = leaf_quantizer.project(v)
            u = v - y
            pulled = x.astype(v.dtype) - eta * d.astype(v.dtype) + eta * penalty * (y - u)
            new_x = jnp.where(is_hard, y, pulled / (1 + eta * penalty))
            new_v = jnp.where(is_dual & ~is_hard, new_x + u, v)
            return _state.lead(x, latent, new_x, new_v)

        return _state.advance("admm_quant", state, updates, params, learning_rate=eta, move=move)

    return optax.GradientTransformationExtraArgs(init, update)
