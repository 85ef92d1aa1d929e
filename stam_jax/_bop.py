"""Bop: binary weights that are flipped, without latent ones behind them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _assignment, _numbers, _paths
from stam_jax._assignment import Quantizers
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._splitting import check_state, inside, kept, latents, move, widened
from stam_jax.quantizers import Binary, levels_of, nearest


class BopState(NamedTuple):
    """The state of `bop`.

    Args:
        count: the number of steps so far, an int32 scalar.
        momentum: the moving average m of the gradients, in float32 at least, a tree like the parameters with
            an `optax.MaskedNode` at each leaf that is not quantized.
        inner: the state of the optimizer inside, which sees the other leaves.
    """

    count: jax.Array
    momentum: Any
    inner: Any


def bop(
    optimizer: optax.GradientTransformation,
    *,
    adaptivity: ScalarOrSchedule = 1e-4,
    threshold: ScalarOrSchedule = 1e-8,
    quantizer: Quantizers = Binary(scale=1.0),
) -> optax.GradientTransformationExtraArgs:
    r"""Bop: a binary weight is flipped when the gradients have been against it for long enough.

    $$m \leftarrow (1 - \gamma) m + \gamma g, \qquad
      x \leftarrow -x \text{ where } |m| > \tau \text{ and } \mathrm{sign}(m) = \mathrm{sign}(x).$$

    There are no latent weights: the first step sets the parameters to $P_Q(x)$, and from then on they change
    by flips alone; scales stay what they were. The leaves that are not quantized are the optimizer's.

    Args:
        optimizer: an Optax optimizer for the leaves that are not quantized; the paper's is Adam.
        adaptivity: $\gamma$ in [0, 1], a number or a schedule. The default, and the next, are the paper's for
            CIFAR-10, where $\gamma$ falls by a factor of 10 every 100 epochs.
        threshold: $\tau$, at least 0, in the units of the gradient; a number or a schedule.
        quantizer: what is quantized, and how, as in `stam`; all of it `Binary`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `BopState`; its `update` needs the
        parameters.

    Raises:
        ValueError, TypeError: as `stam`; also for an `adaptivity` outside [0, 1], a negative `threshold`,
            without an optimizer, or, in `init`, for a quantizer that is not `Binary`.

    Example:
        >>> import optax
        >>> from stam_jax import bop
        >>> optimizer = bop(optax.adam(1e-2), threshold=1e-7)

    References:
        Helwegen et al., Latent weights do not exist: rethinking binarized neural network optimization,
        arXiv:1906.02107.
    """
    where = "bop"
    _assignment.check_quantizer(where, quantizer)
    _numbers.check(where, "adaptivity", adaptivity, high=1.0)
    _numbers.check(where, "threshold", threshold)

    def is_free(params: Any) -> Any:
        quantizers = _assignment.chosen(where, quantizer, params)
        return _paths.map_named(lambda path, _: path not in quantizers, params)

    inner = optax.with_extra_args_support(optax.masked(inside(where, optimizer), is_free))

    def init(params: Any) -> BopState:
        quantizers = _assignment.chosen(where, quantizer, params)
        _assignment.check_fits(where, params, quantizers)
        for path, q in quantizers.items():
            if not isinstance(q, Binary):
                raise ValueError(
                    f"{where}: the leaf {path!r} cannot have the quantizer {q!r}: bop flips Binary weights."
                )
        zeros = {path: jnp.zeros_like(x) for path, x in latents(params, quantizers).items()}
        return BopState(jnp.zeros([], jnp.int32), _paths.holding(params, zeros), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, BopState]:
        check_state(where, state, BopState)
        _paths.check_alike(where, updates, "updates", params)
        quantizers = _assignment.chosen(where, quantizer, params)
        weights = _paths.named_leaves(params)
        x, m = widened(weights, quantizers), kept(where, state.momentum, weights, quantizers)
        gamma, tau = _numbers.at(adaptivity, state.count), _numbers.at(threshold, state.count)

        def flip(q: Any, x: jax.Array, m: jax.Array) -> jax.Array:
            # Projected once: a scale projected again and again would drift by its rounding.
            y = jnp.where(state.count == 0, nearest(x, levels_of(q, x)), x)
            return jnp.where((jnp.abs(m) > tau) & ((m >= 0) == (y >= 0)), -y, y)

        gradients = widened(_paths.named_leaves(updates), quantizers)
        momentum = {
            path: ((1 - gamma) * m[path] + gamma * g).astype(g.dtype) for path, g in gradients.items()
        }
        moves = {
            path: move(weights[path], flip(q, x[path], momentum[path])) for path, q in quantizers.items()
        }
        steps, inner_state = inner.update(updates, state.inner, params, **extra_args)
        return _paths.replaced(steps, moves), BopState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            momentum=_paths.replaced(state.momentum, momentum),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)
