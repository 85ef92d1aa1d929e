"""A pull on each float weight by the size of its directions: one way to flip signs only where it pays."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import stam_jax

# Of the sum of squares, what a step keeps.
_MEMORY = 0.99


class WeightedState(NamedTuple):
    """What the rule knows.

    Args:
        squares: running sums of the squared directions, for the weights that are quantised.
        method: state of the method.
    """

    squares: tuple[jax.Array, ...]
    method: stam_jax.StamState


def weighted(
    method: optax.GradientTransformation, *, inertia: float, selection: stam_jax.Selection
) -> optax.GradientTransformation:
    r"""A method with inertia 1 that takes some of it from each weight, in proportion to its curvature.

    A sign that turns moves its weight by $2\alpha$. To second order that pays where the gradient is larger
    than $\alpha$ times the curvature, whose usual estimate is the mean square of minibatch gradients. With
    inertia the direction has to overcome $(1-\kappa)\,\alpha/\eta$, so $1-\kappa$ follows the mean square of
    the directions d that come in:

    $$s^+ = 0.99\,s + d^2, \qquad
      v^+_i = w^+_i + \min\Bigl((1-\kappa)\,\frac{s^+_i}{\mathrm{mean}(s^+)},\, 1\Bigr)\,(x^+_i - w^+_i),$$

    with the mean over each kernel.

    Args:
        method: `stam` with inertia 1, by itself.
        inertia: kappa, the mean of the inertia over a kernel as long as no weight is bounded at 0.
        selection: the leaves that it quantises.

    Returns:
        An optimiser; its update needs the parameters.
    """

    def quantized(tree: Any) -> list[jax.Array]:
        return [
            leaf for leaf, row in zip(jax.tree.leaves(tree), selection.rows, strict=True) if row.quantized
        ]

    def init(params: Any) -> WeightedState:
        squares = tuple(jnp.zeros_like(leaf) for leaf in quantized(params))
        return WeightedState(squares, cast(stam_jax.StamState, method.init(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, WeightedState]:
        squares = tuple(
            _MEMORY * square + jnp.square(d)
            for square, d in zip(state.squares, quantized(updates), strict=True)
        )
        updates, after = method.update(updates, state.method, params)
        inner = cast(stam_jax.StamState, after)
        floats, structure = jax.tree.flatten(inner.latent)
        used = quantized(optax.apply_updates(params, updates))
        latent = [
            w + jnp.minimum((1 - inertia) * _by_mean(square), 1) * (x - w)
            for w, x, square in zip(floats, used, squares, strict=True)
        ]
        return updates, WeightedState(squares, inner._replace(latent=jax.tree.unflatten(structure, latent)))

    return optax.GradientTransformation(init, update)


def _by_mean(square: jax.Array) -> jax.Array:
    """Numbers divided by their mean; 1 where all are 0, as before the first gradient."""
    mean = jnp.mean(square)
    return jnp.where(mean > 0, square / jnp.where(mean > 0, mean, 1), 1)
