r"""The numbers of the theorems: the step, the bound, and the smoothness they ask for.

With an L-smooth loss, stochastic gradients of variance $\sigma^2$, penalties $\rho$ and $\tau$ and
$L_\Phi = L + \rho + \tau$, a step $\eta \le 1/L$ moves x by $\hat\eta = \eta / (1 + \eta (\rho + \tau))$
times the residual R, and

$$\frac1K \sum_{k<K} E|R_k|^2 \le \frac{2 (\Phi_0 - \Phi_{\inf})}{\hat\eta K} + L_\Phi \hat\eta \sigma^2 .$$

That is for weights that are all quantized. Those of a tree that are not move by $\eta$ itself, and their
noise $\sigma_f^2$ adds $L \eta^2 \sigma_f^2 / \hat\eta$. With inertia $\kappa$ the pull that is left,
$(1 - \kappa)\rho$, stands for $\rho$ in $L_\Phi$, $\Phi$ and R, and the flip work joins the decrease. The
statements, their assumptions and proofs are this project's own; see docs/theory.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stam_jax import _numbers
from stam_jax.diagnostics import effective_step


def bound(
    learning_rate: float,
    *,
    smoothness: float,
    noise: float,
    decrease: float,
    steps: int,
    penalty: float = 0.0,
    inertia: float = 0.0,
    regularizer_penalty: float = 0.0,
    float_noise: float = 0.0,
) -> float:
    r"""What the theorem allows the squared residual to be on average over a run.

    $$\frac{2 \Delta}{\hat\eta K} + (L + (1 - \kappa)\rho + \tau)\,\hat\eta\,\sigma^2
      + \frac{L\eta^2\sigma_f^2}{\hat\eta}, \qquad \hat\eta = \frac{\eta}{1 + \eta (\rho + \tau)}.$$

    Args:
        learning_rate: the step $\eta$ of `stam_proximal`, at most 1 / `smoothness`.
        smoothness: L, of the loss: its gradient's Lipschitz constant.
        noise: $\sigma$, the root of the mean squared distance of a stochastic gradient from the gradient,
            over the quantized weights.
        decrease: $\Delta = \Phi_0 - \Phi_{\inf}$, how far the objective can fall. With inertia, that of the
            objective with $(1 - \kappa)\rho$, and the sum of the `diagnostics.flip_work` of all steps, which
            may make it negative.
        steps: K, of the run.
        penalty: $\rho$ of `stam_proximal`.
        inertia: $\kappa$.
        regularizer_penalty: $\tau$ of `stam_proximal`; 0 with inertia.
        float_noise: $\sigma_f$, the same root over the weights that are not quantized.

    Returns:
        The right-hand side of the theorem.

    Raises:
        ValueError: for a number out of range, or a step above 1 / `smoothness`, where the theorem is silent.
        TypeError: for something that is not a number.

    Example:
        >>> from stam_jax import theory
        >>> print(theory.bound(0.5, smoothness=2.0, noise=0.0, decrease=1.0, steps=1000))
        0.004

    References:
        docs/theory.md.
    """
    _check("bound", smoothness, noise, steps, penalty, inertia, regularizer_penalty)
    _numbers.check("bound", "decrease", decrease, low=-math.inf, finite=True, schedule=False)
    _numbers.check("bound", "float_noise", float_noise, finite=True, schedule=False)
    _numbers.check("bound", "learning_rate", learning_rate, finite=True, schedule=False)
    # To rounding: 1 / L itself is allowed.
    if not 0 < learning_rate * smoothness <= 1 + 1e-9:
        raise ValueError(
            f"bound: learning_rate must be in (0, 1 / smoothness] = (0, {1 / smoothness:g}]; "
            f"got {learning_rate!r}."
        )
    moved = effective_step(learning_rate, penalty=penalty, regularizer_penalty=regularizer_penalty)
    left = smoothness + (1 - inertia) * penalty + regularizer_penalty
    of_floats = smoothness * learning_rate**2 / moved * float_noise**2
    return 2 * decrease / (moved * steps) + left * moved * noise**2 + of_floats


def step_size(
    *,
    smoothness: float,
    noise: float,
    decrease: float,
    steps: int,
    penalty: float = 0.0,
    inertia: float = 0.0,
    regularizer_penalty: float = 0.0,
) -> float:
    r"""The step for which the theorem's bound is least, where all weights are quantized.

    $\hat\eta = \min\{1/(L + \rho + \tau),\ \sqrt{2 \Delta / (K L_\Phi \sigma^2)}\}$ with
    $L_\Phi = L + (1 - \kappa)\rho + \tau$, and $\eta = \hat\eta / (1 - \hat\eta (\rho + \tau))$. With noise
    it falls as $K^{-1/2}$, and the bound with it: an $\epsilon$-stationary point takes $O(\epsilon^{-4})$
    steps.

    Args:
        smoothness: L, as in `bound`.
        noise: $\sigma$, as in `bound`.
        decrease: $\Delta$, as in `bound`, above 0. Flip work depends on the step, and so is no part of it.
        steps: K, as in `bound`.
        penalty: $\rho$ of `stam_proximal`.
        inertia: $\kappa$.
        regularizer_penalty: $\tau$ of `stam_proximal`; 0 with inertia.

    Returns:
        The learning rate, at most 1 / `smoothness`.

    Raises:
        ValueError: for a number out of range.
        TypeError: for something that is not a number.

    Example:
        >>> from stam_jax import theory
        >>> print(theory.step_size(smoothness=2.0, noise=1.0, decrease=1.0, steps=100))
        0.1

    References:
        docs/theory.md.
    """
    _check("step_size", smoothness, noise, steps, penalty, inertia, regularizer_penalty)
    _numbers.check("step_size", "decrease", decrease, finite=True, schedule=False)
    if decrease == 0:
        raise ValueError(f"step_size: decrease must be above 0; got {decrease!r}.")
    pull = penalty + regularizer_penalty
    total = smoothness + pull
    moved = 1 / total
    if noise > 0:
        left = smoothness + (1 - inertia) * penalty + regularizer_penalty
        moved = min(moved, math.sqrt(2 * decrease / (steps * left)) / noise)
    # 1 - moved * pull, without the cancellation that a large pull would bring.
    return moved / (smoothness / total + (1 / total - moved) * pull)


def _check(
    where: str,
    smoothness: float,
    noise: float,
    steps: int,
    penalty: float,
    inertia: float,
    regularizer_penalty: float,
) -> None:
    """Raise for constants that no problem has."""
    _numbers.check_each(
        where,
        ("smoothness", smoothness, 0),
        ("noise", noise, 0),
        ("steps", steps, 1),
        ("penalty", penalty, 0),
        ("regularizer_penalty", regularizer_penalty, 0),
    )
    if smoothness == 0:
        raise ValueError(f"{where}: smoothness must be above 0; got {smoothness!r}.")
    _numbers.check(where, "inertia", inertia, high=1.0, schedule=False)
    if inertia > 0 and regularizer_penalty > 0:
        raise ValueError(f"{where}: no theorem covers inertia together with a regularizer_penalty.")


class Smoothness(NamedTuple):
    """An estimate of how fast a gradient turns.

    Args:
        value: the largest |eigenvalue| of the Hessian that was found.
        change: by what share the last iteration changed it; small once it has settled.
    """

    value: jax.Array
    change: jax.Array


def estimate_smoothness(
    loss: Callable[[Any], jax.Array], params: Any, *, key: jax.Array, iterations: int = 50
) -> Smoothness:
    r"""The largest |eigenvalue| of a loss's Hessian at a point, by power iteration.

    $u \leftarrow H u / |H u|$ from a random start, with Hessian-vector products: about two gradients each,
    and no Hessian in memory. The result rises toward the eigenvalue. It says how smooth the loss is *at this
    point*: L of the theorem is the largest such number over all points that a run visits, so take the largest
    of several, and know it for an estimate from below.

    Args:
        loss: a function of the parameters to a scalar, on the data that matter; twice differentiable.
        params: the point, a pytree of arrays of floating-point numbers.
        key: random key of the start.
        iterations: Hessian-vector products to take.

    Returns:
        A `Smoothness`.

    Raises:
        ValueError: if `iterations` is below 1.
        TypeError: if `iterations` is not a whole number.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from stam_jax import theory
        >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 5.0, -8.0]) * w**2)
        >>> print(round(float(theory.estimate_smoothness(loss, jnp.ones(3), key=jax.random.key(0)).value), 4))
        8.0

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6 (1994).
    """
    _numbers.check_whole("estimate_smoothness", "iterations", iterations)
    return _power_iteration(loss, params, key, iterations)


@functools.partial(jax.jit, static_argnames=("loss", "iterations"))
def _power_iteration(
    loss: Callable[[Any], jax.Array], params: Any, key: jax.Array, iterations: int
) -> Smoothness:
    """The estimate after some Hessian-vector products."""
    product = lambda u: jax.jvp(jax.grad(loss), (params,), (u,))[1]
    norm = lambda u: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(u)))

    def scaled(u: Any) -> Any:
        size = norm(u)
        size_or_1 = jnp.where(size > 0, size, 1)
        return jax.tree.map(lambda leaf: jnp.where(size > 0, leaf / size_or_1, 0).astype(leaf.dtype), u)

    def step(_: jax.Array, carry: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
        u, value, _ = carry
        turned = product(u)
        return scaled(turned), norm(turned), value

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    start = [
        jax.random.normal(k, jnp.shape(x), jnp.result_type(x)) for k, x in zip(keys, leaves, strict=True)
    ]
    zero = jnp.zeros((), jnp.result_type(*leaves))
    carry = (scaled(jax.tree.unflatten(structure, start)), zero, zero)
    _, value, before = jax.lax.fori_loop(0, iterations, step, carry)
    return Smoothness(
        value, jnp.where(value > 0, jnp.abs(value - before) / jnp.where(value > 0, value, 1), 0)
    )
