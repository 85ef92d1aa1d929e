"""The straight-through estimator, clipped or plain."""

import math
from typing import Any

import jax.numpy as jnp
import optax

from stam_jax import _assignment, _numbers, _paths
from stam_jax._assignment import Quantizers
from stam_jax._splitting import inside, three_block_splitting
from stam_jax.quantizers import Binary
from stam_jax.relaxations import Hard


def straight_through(
    optimizer: optax.GradientTransformation,
    *,
    clip: float = 1.0,
    quantizer: Quantizers = Binary(scale=1.0),
) -> optax.GradientTransformationExtraArgs:
    r"""The straight-through estimator: the gradient at the quantized weights moves the latent ones.

    $$g = \nabla f(x) \cdot [\,|v| \le c\,], \qquad v \leftarrow v + u(g), \qquad x = P_Q(v).$$

    The gradient of a latent weight beyond c is 0, that of a hard tanh in the place of the sign. It is gated
    before the optimizer sees it, so this goes around the optimizer and not behind it. Without a clip, the
    plain estimator, it is `binary_connect` without a box.

    Args:
        optimizer: an Optax optimizer, whose step u starts from the latent weights.
        clip: c, in the units of the latent weights; infinity for the plain estimator. Where the quantizer has
            scales, choose it to go with them.
        quantizer: what is quantized, and how, as in `stam`; the papers' set is {-1, +1}.

    Returns:
        As `stam`.

    Raises:
        ValueError, TypeError: as `stam`; also for a negative `clip`, or without an optimizer.

    Example:
        >>> import optax
        >>> from stam_jax import Binary, straight_through
        >>> optimizer = straight_through(optax.adamw(1e-3), clip=float("inf"), quantizer=Binary())

    References:
        Bengio, Leonard and Courville, Estimating or propagating gradients through stochastic neurons,
        arXiv:1308.3432; Hubara et al., Binarized neural networks, arXiv:1602.02830 (the clipped one).
    """
    where = "straight_through"
    inner = inside(where, optimizer)
    _assignment.check_quantizer(where, quantizer)
    _numbers.check(where, "clip", clip, schedule=False)

    def gated(updates: Any, latent: Any) -> Any:
        """The gradients, 0 where a latent weight that is quantized is larger than the clip."""
        weights = _paths.named_leaves(latent)
        quantizers = _assignment.chosen(where, quantizer, latent)
        gate = lambda path, g: jnp.where(jnp.abs(weights[path]) > clip, 0, g) if path in quantizers else g
        return _paths.map_named(gate, updates)

    gate = optax.stateless(gated)
    gated_optimizer = inner if _numbers.is_fixed_at(clip, math.inf) else optax.chain(gate, inner)
    return three_block_splitting(
        gated_optimizer, name=where, quantizer=quantizer, relaxation=Hard(), inertia=1.0
    )
