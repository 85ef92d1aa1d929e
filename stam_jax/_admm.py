"""ADMM for quantized weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _assignment, _numbers, _paths
from stam_jax._assignment import Quantizers
from stam_jax._splitting import check_state, inside, kept, latents, move, widened
from stam_jax.quantizers import Binary, levels_of, nearest


class AdmmState(NamedTuple):
    """The state of `admm_quant`.

    Args:
        count: the number of steps so far, an int32 scalar.
        dual: v = x + u as it was at the last update of the multipliers, in float32 at least, a tree like the
            parameters with an `optax.MaskedNode` at each leaf that is not quantized.
        inner: the state of the optimizer inside.
    """

    count: jax.Array
    dual: Any
    inner: Any


def admm_quant(
    optimizer: optax.GradientTransformation,
    *,
    penalty: float,
    dual_every: int,
    hard_from: int,
    quantizer: Quantizers = Binary(axis=()),
) -> optax.GradientTransformationExtraArgs:
    r"""ADMM: float weights, quantized weights, and multipliers that make the two agree.

    It splits $\min f(x)$ over x in Q into $\min f(x) + g(y)$ with x = y. With scaled multipliers u, the
    optimizer takes its steps along the gradient of the augmented Lagrangian,

    $$d = \nabla f(x) + \rho\,(x - y + u),$$

    and every so many steps $y = P_Q(x + u)$ and $u \leftarrow u + x - y$. Both follow from one array, v = x +
    u as it was then: y = P_Q(v) and u = v - y. It starts at v = x. From step `hard_from`, x = y is fixed, and
    only the leaves that are not quantized go on learning. The paper's minimization over x takes extragradient
    steps.

    Args:
        optimizer: an Optax optimizer. In dtypes narrower than float32 small steps of x are lost to rounding.
        penalty: $\rho$, at least 0; a number, since scaled multipliers belong to one.
        dual_every: the steps between two updates of the multipliers.
        hard_from: the step from which the network is hard.
        quantizer: what is quantized, and how, as in `stam`; the paper has one scale per layer.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is an `AdmmState`; its `update` needs the
        parameters.

    Raises:
        ValueError, TypeError: as `stam`; also for a `dual_every` below 1, a negative `penalty`, or without an
            optimizer.

    Example:
        >>> import optax
        >>> from stam_jax import admm_quant
        >>> sgd = optax.sgd(0.1, momentum=0.9)
        >>> optimizer = admm_quant(sgd, penalty=0.1, dual_every=390, hard_from=60_000)

    References:
        Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, arXiv:1707.09870.
    """
    where = "admm_quant"
    inner = inside(where, optimizer)
    _assignment.check_quantizer(where, quantizer)
    _numbers.check_each(where, ("penalty", penalty, 0))
    _numbers.check_steps(where, ("dual_every", dual_every, 1), ("hard_from", hard_from, 0))

    def init(params: Any) -> AdmmState:
        quantizers = _assignment.chosen(where, quantizer, params)
        _assignment.check_fits(where, params, quantizers)
        seen = _paths.replaced(params, latents(params, quantizers))
        return AdmmState(
            jnp.zeros([], jnp.int32), _paths.holding(params, latents(params, quantizers)), inner.init(seen)
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, AdmmState]:
        check_state(where, state, AdmmState)
        _paths.check_alike(where, updates, "updates", params)
        quantizers = _assignment.chosen(where, quantizer, params)
        weights = _paths.named_leaves(params)
        x, v = widened(weights, quantizers), kept(where, state.dual, weights, quantizers)
        y = {path: nearest(v[path], levels_of(q, v[path])) for path, q in quantizers.items()}
        gradients = widened(_paths.named_leaves(updates), quantizers)
        # With u = v - y, written so that XLA on CPU keeps no array of u.
        pulled = {path: g + penalty * (x[path] + v[path] - 2 * y[path]) for path, g in gradients.items()}
        steps, inner_state = inner.update(
            _paths.replaced(updates, pulled), state.inner, _paths.replaced(params, x), **extra_args
        )
        step = _paths.named_leaves(steps)
        is_hard, is_dual = state.count >= hard_from, (state.count + 1) % dual_every == 0
        new_x = {
            path: jnp.where(is_hard, y[path], x[path] + step[path].astype(x[path].dtype))
            for path in quantizers
        }
        dual = {
            path: jnp.where(is_dual & ~is_hard, new_x[path] + v[path] - y[path], v[path])
            for path in quantizers
        }
        return _paths.replaced(
            steps, {path: move(weights[path], new) for path, new in new_x.items()}
        ), AdmmState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            dual=_paths.replaced(state.dual, dual),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
