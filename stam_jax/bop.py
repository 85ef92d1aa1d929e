"""Bop: binary weights that are flipped, without float ones behind them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, _state
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._state import Mask, StamState
from stam_jax.quantizers import Binary, Quantizer


class BopState(NamedTuple):
    """The state of `bop`.

    Args:
        momentum: the moving average m of the gradients, in float32 at least, in a tree like the parameters
            with an `optax.MaskedNode` at each leaf that is not quantised.
        weights: the steps so far and the quantisers; it holds no float block.
    """

    momentum: Any
    weights: StamState


def bop(
    learning_rate: ScalarOrSchedule,
    *,
    adaptivity: ScalarOrSchedule = 1e-4,
    threshold: ScalarOrSchedule = 1e-8,
    quantizer: Quantizer = Binary(scale=None),
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bop: a binary weight is flipped when the gradients have been against it for long enough.

    $$m^+ = (1 - \gamma) m + \gamma d, \qquad
      x^+ = -x \text{ where } |m^+| > \tau \text{ and } \mathrm{sign}(m^+) = \mathrm{sign}(x).$$

    There are no float weights: parameters that are not binary, as at the start, are set to $P_Q(x)$ (in
    dtypes narrower than float32 within two steps, by rounding), and from then on they change by flips alone;
    scales stay what they were. It is not a configuration of `stam`, which has a float block. The direction
    should be the plain gradient, with no momentum or Adam before it (the paper trains the other leaves with
    Adam: see the example).

    Args:
        learning_rate: the step size of the leaves that are not quantised, a number or a schedule.
        adaptivity: $\gamma$ in [0, 1], a number or a schedule. The default, and the next, are the paper's for
            CIFAR-10, where $\gamma$ falls by a factor of 10 every 100 epochs.
        threshold: $\tau$, at least 0, in the units of the gradient; a number or a schedule.
        quantizer: a set of binary weights, closed under flips; the paper's is {-1, +1}.
        mask: which leaves are quantised, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand last in a chain.

    Raises:
        ValueError, TypeError: as `stam`; also for an `adaptivity` outside [0, 1], a negative `threshold`, or
            a quantiser of more than one bit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import bop, select
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
        >>> kinds = {"kernel": "binary", "bias": "float"}
        >>> optimizer = optax.partition({"binary": bop(1e-3), "float": optax.adam(1e-2)}, kinds)
        >>> state = optimizer.init(params)

    References:
        Helwegen et al., Latent weights do not exist: rethinking binarized neural network optimization,
        arXiv:1906.02107.
    """
    _numbers.check("bop", "learning_rate", learning_rate, finite=True)
    _numbers.check("bop", "adaptivity", adaptivity, high=1.0)
    _numbers.check("bop", "threshold", threshold)
    _state.check_has("bop", "quantizer", quantizer, "bits", "project", "contains")
    if quantizer.bits != 1:
        raise ValueError(f"bop: quantizer must be one of binary weights; got {quantizer!r}.")

    def init(params: Any) -> BopState:
        state = _state.begin(
            "bop",
            params,
            mask=mask,
            quantizer=quantizer,
            memory=lambda x: jnp.zeros_like(x, _state.wide(x)),
        )
        return BopState(momentum=state.latent, weights=state._replace(latent=None))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, BopState]:
        del extra_args
        _state.check_own("bop", state, BopState)
        count = state.weights.count
        gamma, tau = _numbers.at(adaptivity, count), _numbers.at(threshold, count)

        def move(leaf_quantizer: Quantizer, x: jax.Array, m: Any, d: jax.Array) -> tuple[jax.Array, Any]:
            m = ((1 - gamma) * m + gamma * d.astype(m.dtype)).astype(m.dtype)
            # Projected only where need be: a scale projected again and again would drift by its rounding.
            y = jnp.where(leaf_quantizer.contains(x), x, leaf_quantizer.project(x))
            flipped = jnp.where((jnp.abs(m) > tau) & ((m >= 0) == (y >= 0)), -y, y)
            return flipped - x, m

        remembering = state.weights._replace(latent=state.momentum)
        eta = _numbers.at(learning_rate, count)
        updates, after = _state.advance("bop", remembering, updates, params, learning_rate=eta, move=move)
        return updates, BopState(momentum=after.latent, weights=after._replace(latent=None))

    return optax.GradientTransformationExtraArgs(init, update)
