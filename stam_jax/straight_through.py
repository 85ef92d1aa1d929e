"""The straight-through estimator, plain and clipped."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, _state, _trees
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._state import Mask, StamState
from stam_jax._transform import stam
from stam_jax.quantizers import Binary, Quantizer
from stam_jax.relaxations import Hard


class StraightThroughState(NamedTuple):
    """The state of `straight_through`.

    Args:
        inner: of the transform that makes the direction.
        weights: of the float weights.
    """

    inner: Any
    weights: StamState


def straight_through(
    learning_rate: ScalarOrSchedule,
    *,
    inner: optax.GradientTransformation | None = None,
    clip: float | None = 1.0,
    quantizer: Quantizer = Binary(scale=None),
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The straight-through estimator: the gradient at the quantised weights moves the float ones.

    $$g = \nabla f(x) \cdot [\,|w| \le c\,], \qquad w^+ = w - \eta\,\mathrm{inner}(g), \qquad
      x^+ = P_Q(w^+).$$

    Clipped, the gradient of a float weight beyond c is 0, that of a hard tanh in the place of the sign. This
    stands before momentum, so the momentum is an argument here, and it is no configuration of `stam`, which
    sees a direction, not a gradient. Plain (`clip=None`) it is one: `stam` with inertia 1, the hard
    relaxation and projection last, that is `binary_connect` without its box.

    Args:
        learning_rate: the step size, a number or a schedule.
        inner: what makes a direction of the gradient, such as `optax.trace(0.9)` or `optax.scale_by_adam()`;
            it sees the quantised weights as parameters. By default the gradient is the direction.
        clip: the size c beyond which the gradient of a float weight is 0; None for the plain estimator.
        quantizer: the set Q; the papers' is {-1, +1}. With scales, choose c to go with them.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also for a negative `clip`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import hard_params, straight_through
        >>> params = {"kernel": jnp.array([[0.2, -3.0]])}
        >>> optimizer = straight_through(0.1, inner=optax.trace(0.9))
        >>> print(hard_params(optimizer.init(params), params)["kernel"])
        [[ 1. -1.]]

    References:
        Bengio, Leonard and Courville, Estimating or propagating gradients through stochastic neurons,
        arXiv:1308.3432; Hubara et al., Binarized neural networks, arXiv:1602.02830 (the clipped one).
    """
    if inner is None:
        inner = optax.identity()
    _state.check_has("straight_through", "inner", inner, "init", "update")
    if clip is not None:
        _numbers.check("straight_through", "clip", clip, schedule=False)
    weights = stam(
        learning_rate, quantizer=quantizer, relaxation=Hard(), inertia=1.0, project="last", mask=mask
    )
    direction = optax.with_extra_args_support(inner)

    def init(params: Any) -> StraightThroughState:
        return StraightThroughState(inner=direction.init(params), weights=cast(Any, weights.init(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _state.check_own("straight_through", state, StraightThroughState)
        if clip is not None:
            updates = _gated(updates, state.weights, params, clip)
        updates, inner_state = direction.update(updates, state.inner, params, **extra_args)
        updates, after = weights.update(updates, state.weights, params)
        return updates, StraightThroughState(inner=inner_state, weights=cast(Any, after))

    return optax.GradientTransformationExtraArgs(init, update)


def _gated(updates: Any, state: StamState, params: Any, clip: float) -> Any:
    """The gradients, 0 where the float weight is larger than the clip."""
    _state.check_trees("straight_through", state, updates, params)
    latents = _trees.named_leaves(state.latent)

    def gate(name: str, d: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(latents[name]) > clip, 0, d).astype(d.dtype) if name in latents else d

    return _trees.map_named(gate, updates)
