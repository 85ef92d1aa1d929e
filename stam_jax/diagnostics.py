r"""Measures of a run: how far from quantised, how far from stationary, and what flipping signs costs.

The model is $\Phi(x, y, z) = f(x) + g(y) + h(z) + (\rho/2)|x-y|^2 + (\tau/2)|x-z|^2$ of docs/theory.md, at
$y = P_Q(v)$ and $z = \mathrm{prox}_{h/\tau}(v)$ of the float block v. Without inertia v is x, and these are
the minima over y and z.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from stam_jax import _numbers, _state, _trees
from stam_jax.hard import QuantizedLeaf, quantized_leaves
from stam_jax.regularizers import HasValue, Regularizer


@jax.jit
def _relative_distance(pairs: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """|x - y| / |y| over all pairs of x and y, in the dtype of the third of each."""
    distance = norm = jnp.zeros([], jnp.float32)
    for x, hard, latent in pairs:
        y = hard.astype(latent.dtype)
        distance += jnp.sum(jnp.square(x - y))
        norm += jnp.sum(jnp.square(y))
    return jnp.where(distance == 0, 0.0, jnp.sqrt(distance / norm))


@jax.jit
def _differing_signs(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """How many signs differ, over all arrays."""
    differ = lambda a, b: jnp.sum((jnp.asarray(a) >= 0) != (jnp.asarray(b) >= 0))
    return jnp.asarray(sum(map(differ, before, after)), jnp.float32)


def quantisation_gap(opt_state: Any, params: Any) -> jax.Array:
    r"""The relative distance of the relaxed weights from the hard ones, $|x - y| / |y|$.

    The norms run over all quantised leaves together, in float32 at least. 0 says that the network that is
    trained is the one that is shipped.

    Args:
        opt_state: an optimiser state that holds states of `stam`; see `quantized_leaves`.
        params: the parameters x it belongs to.

    Returns:
        A scalar of at least 0; 0 also where both norms are 0.

    Raises:
        ValueError: as `quantized_leaves`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import quantisation_gap, stam
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> print(quantisation_gap(stam(0.1).init(params), params))
        0.5
    """
    weights = _trees.named_leaves(params)
    leaves = quantized_leaves(opt_state, params)
    return _relative_distance([(weights[name], leaf.hard, leaf.latent) for name, leaf in leaves.items()])


def sign_flips(before: Any, after: Any) -> jax.Array:
    r"""The share of weights whose sign differs between two trees, with $\mathrm{sign}(0) = +1$.

    Args:
        before: a tree of arrays of real numbers, such as the hard leaves of `quantized_leaves` at one epoch.
        after: a tree of the same structure and shapes, at a later one.

    Returns:
        A scalar in [0, 1]; 0 for trees without weights.

    Raises:
        ValueError: if the structures or shapes differ.
        TypeError: for arrays that have no sign, such as booleans.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import sign_flips
        >>> print(sign_flips([jnp.array([1.0, -1.0])], [jnp.array([1.0, 1.0])]))
        0.5
    """

    def check(a: jax.Array, b: jax.Array) -> None:
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"sign_flips: the shapes {jnp.shape(a)} and {jnp.shape(b)} differ.")
        for dtype in (jnp.result_type(a), jnp.result_type(b)):
            if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.signedinteger):
                raise TypeError(f"sign_flips: arrays of dtype {dtype} have no sign.")

    structures = jax.tree.structure(before), jax.tree.structure(after)
    if structures[0] != structures[1]:
        raise ValueError(f"sign_flips: the structures {structures[0]} and {structures[1]} differ.")
    leaves = jax.tree.leaves(before), jax.tree.leaves(after)
    for a, b in zip(*leaves, strict=True):
        check(a, b)
    return _differing_signs(*leaves) / max(sum(map(jnp.size, leaves[1])), 1)


class Terms(NamedTuple):
    """One number for the whole, and for each of the three blocks it comes from.

    Args:
        total: of all three together.
        loss: of f, at the relaxed weights x.
        quantised: of the pull towards the quantised weights y.
        constrained: of the regulariser, and of the pull towards its weights z.
    """

    total: jax.Array
    loss: jax.Array
    quantised: jax.Array
    constrained: jax.Array


class Residual(NamedTuple):
    """How far a point is from stationary.

    Args:
        whole: the norm of the residual over all leaves, and of its three parts.
        leaves: the same for each leaf, by the name of its path.
    """

    whole: Terms
    leaves: dict[str, Terms]


def residual(
    gradients: Any,
    opt_state: Any,
    params: Any,
    *,
    penalty: jax.typing.ArrayLike = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: jax.typing.ArrayLike = math.inf,
) -> Residual:
    r"""The theorem's distance from stationarity, $|R|$ with $R = \nabla f(x) + \rho (x - y) + \tau (x - z)$.

    With the full gradient it is what `theory.bound` bounds on average over a run, and without inertia the
    distance of 0 from the subdifferential of $\Phi$ at (x, y, z); with a minibatch's it has that gradient's
    noise on top. The parts do not add up to the whole: they are vectors that may cancel. Leaves that are not
    quantised count with their gradient alone.

    A small residual does not make a good network: every sign pattern with its best scales satisfies the
    condition on y. Look at the loss or the accuracy of the quantised network beside it.

    Args:
        gradients: $\nabla f(x)$, a tree like `params`.
        opt_state: an optimiser state that holds states of `stam`; see `quantized_leaves`.
        params: the parameters x it belongs to.
        penalty: $\rho$ of `stam`. With inertia $\kappa$ the pull that is left is $(1 - \kappa)\rho$: give
            that, 0 for the methods with inertia 1.
        regularizer: h of `stam`; None for none.
        regularizer_penalty: $\tau$ of `stam`, finite where there is a regulariser. (A traced infinity gives
            NaN.)

    Returns:
        A `Residual`, its numbers in float32 at least.

    Raises:
        ValueError: as `quantized_leaves`; for gradients that do not match the parameters; for a negative
            or infinite `penalty`; for a regulariser that is enforced exactly, where $\tau$ is infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import diagnostics, stam
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> state = stam(0.1, penalty=2.0).init(params)
        >>> gradients = {"kernel": jnp.array([[1.0], [2.0]])}
        >>> found = diagnostics.residual(gradients, state, params, penalty=2.0)
        >>> print(found.whole.total, round(float(found.leaves["kernel"].quantised), 4))
        3.0 2.8284

    References:
        docs/theory.md.
    """
    _check_model("residual", penalty, regularizer, regularizer_penalty)
    if regularizer is not None and not _is_traced(regularizer_penalty) and np.isinf(regularizer_penalty):
        raise ValueError(
            "residual: regularizer_penalty must be finite where there is a regularizer; with inf it is "
            "enforced exactly, and the residual is not defined."
        )
    directions = _matching("residual", gradients, params)
    points = _points(opt_state, params)
    weights = _trees.named_leaves(params)
    return _residual(weights, directions, points, penalty, regularizer_penalty, regularizer)


def objective(
    loss: jax.typing.ArrayLike,
    opt_state: Any,
    params: Any,
    *,
    penalty: jax.typing.ArrayLike = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: jax.typing.ArrayLike = math.inf,
) -> Terms:
    r"""The objective $\Phi$ and its three terms: $f(x)$, $(\rho/2)|x-y|^2$ and $h(z) + (\tau/2)|x-z|^2$.

    y lies in the quantised set, so its own term g is 0. With $\tau = \infty$ the regulariser acts on x
    itself, z = x. With constant finite penalties, the projection first, and without noise and inertia, it
    falls at every step of `stam` whose learning rate is at most 1 / L.

    Args:
        loss: f(x), the loss at `params`, a scalar.
        opt_state: an optimiser state that holds states of `stam`; see `quantized_leaves`.
        params: the parameters x it belongs to.
        penalty: $\rho$ of `stam`; with inertia, as in `residual`.
        regularizer: h of `stam`, with a method `value`; None for none.
        regularizer_penalty: $\tau$ of `stam`.

    Returns:
        The `Terms`, in float32 at least.

    Raises:
        ValueError: as `quantized_leaves`; for a negative or infinite `penalty`.
        TypeError: for a regulariser without `value`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import diagnostics, stam
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> state = stam(0.1, penalty=2.0).init(params)
        >>> print(*diagnostics.objective(0.5, state, params, penalty=2.0))
        2.5 0.5 2.0 0.0

    References:
        docs/theory.md.
    """
    _check_model("objective", penalty, regularizer, regularizer_penalty)
    if regularizer is not None:
        _state.check_has("objective", "regularizer", regularizer, "prox", "value")
    points = _points(opt_state, params)
    weights = _trees.named_leaves(params)
    return _objective(loss, weights, points, penalty, regularizer_penalty, regularizer)


def flip_work(
    loss: Callable[[Any], jax.Array],
    gradients: Any,
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    *,
    learning_rate: jax.typing.ArrayLike,
    penalty: jax.typing.ArrayLike,
    inertia: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
    r"""What it cost to move the quantised weights in one step, $J_k$ of the theorem with inertia.

    With $\tilde\rho = (1 - \kappa)\rho$, $\hat\eta = \eta / (1 + \eta\rho)$ and the quantised weights
    $q_k = P_Q(v_k)$, let $M(x, q) = f(x) + (\tilde\rho/2)|x - q|^2$. The gradient and the pull alone would
    have led to $x' = x_k - \hat\eta\,(d_k + \tilde\rho\,(x_k - q_k))$. What is left of the step comes of
    new signs and scales:

    $$J_k = M(x_{k+1}, q_{k+1}) - M(x', q_k).$$

    With plain gradients, constant numbers and no regulariser, `theory.bound` bounds the residual once the
    sum of $J_k$ over the run is added to its `decrease`, for every inertia and either order of projection.
    Without inertia, and with `project="first"`, no $J_k$ is positive. A negative sum says that carrying the
    weights along as signs flip paid for itself. It takes two losses, whose difference has their rounding.

    Args:
        loss: f, a function of the parameters to a scalar, on the data that matter; the same function object
            at every call, for it is compiled.
        gradients: $d_k$, the stochastic gradient that the step was taken with, a tree like the parameters.
        before: `(opt_state, params)` before the step.
        after: `(opt_state, params)` after it.
        learning_rate: $\eta$ of `stam`.
        penalty: $\rho$ of `stam`.
        inertia: $\kappa$ of `stam`.

    Returns:
        $J_k$, a scalar.

    Raises:
        ValueError: as `quantized_leaves`; for gradients that do not match the parameters, or a number out of
            range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from stam_jax import diagnostics, stam
        >>> loss = lambda w: jnp.sum((w + 1.0) ** 2)
        >>> settings = {"learning_rate": 0.25, "penalty": 2.0, "inertia": 1.0}
        >>> optimizer = stam(**settings)
        >>> params = jnp.array([[0.5], [-2.0]])
        >>> state = optimizer.init(params)
        >>> work = 0.0
        >>> for _ in range(20):
        ...     before, gradients = (state, params), jax.grad(loss)(params)
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     work += diagnostics.flip_work(loss, gradients, before, (state, params), **settings)
        >>> print(work < 0, jnp.sign(params).T)
        True [[-1. -1.]]

    References:
        docs/theory.md.
    """
    _numbers.check("flip_work", "learning_rate", learning_rate, finite=True, schedule=False)
    _numbers.check("flip_work", "penalty", penalty, finite=True, schedule=False)
    _numbers.check("flip_work", "inertia", inertia, high=1.0, schedule=False)
    directions = _matching("flip_work", gradients, before[1])
    states = [_points(*pair) for pair in (before, after)]
    return _flip_work(before[1], after[1], directions, *states, learning_rate, penalty, inertia, loss)


def effective_step(
    learning_rate: jax.typing.ArrayLike,
    *,
    penalty: jax.typing.ArrayLike = 0.0,
    regularizer_penalty: jax.typing.ArrayLike = 0.0,
) -> Any:
    r"""How far proximal `stam` moves x along the residual, $\hat\eta = \eta / (1 + \eta (\rho + \tau))$.

    $\eta \le 1/L$ gives $\hat\eta \le 1/(L + \rho + \tau)$: the penalties never limit the learning rate.

    Args:
        learning_rate: $\eta$ of `stam`.
        penalty: $\rho$ of `stam`.
        regularizer_penalty: $\tau$ of `stam`; 0 without a regulariser.

    Returns:
        $\hat\eta$, a Python number of Python numbers and an array of arrays; they are not checked.

    Example:
        >>> from stam_jax import diagnostics
        >>> print(diagnostics.effective_step(0.5, penalty=6.0))
        0.125
    """
    return learning_rate / (1 + learning_rate * (penalty + regularizer_penalty))


class _Point(NamedTuple):
    """Where one quantised leaf stands: the float block v, and y, its projection."""

    v: jax.Array
    y: jax.Array


def _points(opt_state: Any, params: Any) -> dict[str, _Point]:
    """Where every quantised leaf stands, by name."""

    def point(leaf: QuantizedLeaf) -> _Point:
        return _Point(leaf.latent, leaf.hard.astype(leaf.latent.dtype))

    return {name: point(leaf) for name, leaf in quantized_leaves(opt_state, params).items()}


def _is_traced(value: Any) -> bool:
    """Whether a number is not known before the function runs."""
    return isinstance(value, jax.core.Tracer)


def _check_model(where: str, penalty: Any, regularizer: Any, regularizer_penalty: Any) -> None:
    """Raise for penalties out of range, or something else for a regulariser."""
    for name, value in (("penalty", penalty), ("regularizer_penalty", regularizer_penalty)):
        # The value of an array is known here, but inside jit.
        known = np.asarray(value) if isinstance(value, jax.Array) and not _is_traced(value) else value
        _numbers.check(where, name, known, finite=name == "penalty", schedule=False)
    if regularizer is not None:
        _state.check_has(where, "regularizer", regularizer, "prox")


def _matching(where: str, gradients: Any, params: Any) -> dict[str, jax.Array]:
    """The gradients by name, once they are seen to have the leaves of the parameters."""
    weights, directions = _trees.named_leaves(params), _trees.named_leaves(gradients)
    shapes = [{name: jnp.shape(leaf) for name, leaf in leaves.items()} for leaves in (weights, directions)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{where}: gradients must have the leaves of params, in shape too: {_shapes(weights)}; "
            f"got {_shapes(directions)}."
        )
    return directions


def _shapes(leaves: dict[str, jax.Array]) -> str:
    """Names with their shapes, for errors."""
    return ", ".join(f"{name} {jnp.shape(leaf)}" for name, leaf in leaves.items())


def _constrained(v: jax.Array, tau: Any, regularizer: Regularizer) -> jax.Array:
    """The best z for a float block; v itself where tau is infinite."""
    # The step of the engine: the prox wants a finite one.
    return jnp.where(jnp.isinf(tau), v, regularizer.prox(v, 1 / jnp.maximum(tau, 1e-30)))


def _square(x: jax.Array) -> jax.Array:
    """|x|^2."""
    return jnp.sum(jnp.square(x))


def _sum(terms: list[Terms]) -> Terms:
    """Each number summed over the leaves."""
    zero = Terms(*(jnp.zeros([], jnp.float32) for _ in Terms._fields))
    return jax.tree.map(lambda *numbers: jnp.sum(jnp.stack(numbers)), zero, *terms)


@functools.partial(jax.jit, static_argnames="regularizer")
def _residual(
    weights: dict[str, jax.Array],
    gradients: dict[str, jax.Array],
    points: dict[str, _Point],
    rho: jax.typing.ArrayLike,
    tau: jax.typing.ArrayLike,
    regularizer: Regularizer | None,
) -> Residual:
    """The norms of the residual and its parts."""

    def squares(name: str) -> Terms:
        x = jnp.asarray(weights[name])
        x = x.astype(_state.wide(x))
        d = gradients[name].astype(x.dtype)
        pull = bounded = jnp.zeros_like(x)
        if name in points:
            v, y = points[name]
            pull = jnp.asarray(rho * (x - y))
            if regularizer is not None:
                bounded = jnp.asarray(tau * (x - _constrained(v, tau, regularizer)))
        return Terms(_square(d + pull + bounded), _square(d), _square(pull), _square(bounded))

    of_leaves = {name: squares(name) for name in weights}
    root = lambda terms: jax.tree.map(jnp.sqrt, terms)
    return Residual(root(_sum(list(of_leaves.values()))), {name: root(t) for name, t in of_leaves.items()})


@functools.partial(jax.jit, static_argnames="regularizer")
def _objective(
    loss: jax.typing.ArrayLike,
    weights: dict[str, jax.Array],
    points: dict[str, _Point],
    rho: jax.typing.ArrayLike,
    tau: jax.typing.ArrayLike,
    regularizer: HasValue | None,
) -> Terms:
    """The terms of the objective."""
    quantised = constrained = jnp.zeros([], jnp.float32)
    for name, (v, y) in points.items():
        x = weights[name].astype(v.dtype)
        quantised += rho / 2 * _square(x - y)
        if regularizer is not None:
            z = _constrained(v, tau, regularizer)
            coupling = jnp.where(jnp.isinf(tau), 0.0, tau)
            # x itself in its own digits, which a box may be told to.
            value = jnp.where(jnp.isinf(tau), regularizer.value(weights[name]), regularizer.value(z))
            constrained += value + coupling / 2 * jnp.where(jnp.isinf(tau), 0.0, _square(x - z))
    loss = jnp.asarray(loss)
    loss = loss.astype(_state.wide(loss))
    return Terms(loss + quantised + constrained, loss, quantised, constrained)


@functools.partial(jax.jit, static_argnames="loss")
def _flip_work(
    weights: Any,
    new_weights: Any,
    gradients: dict[str, jax.Array],
    points: dict[str, _Point],
    new_points: dict[str, _Point],
    eta: jax.typing.ArrayLike,
    rho: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike,
    loss: Callable[[Any], jax.Array],
) -> jax.Array:
    """The cost of moving the quantised weights, and x along with them."""
    pull = (1 - kappa) * rho
    moved = effective_step(eta, penalty=rho)
    arrived = _trees.named_leaves(new_weights)

    def alone(name: str, x: jax.Array) -> jax.Array:
        if name not in points:
            return arrived[name]
        return (x - moved * (gradients[name] + pull * (x - points[name].y))).astype(x.dtype)

    def merit(params: Any, at: dict[str, _Point]) -> jax.Array:
        leaves = _trees.named_leaves(params)
        return loss(params) + pull / 2 * sum(_square(leaves[name] - point.y) for name, point in at.items())

    return merit(new_weights, new_points) - merit(_trees.map_named(alone, weights), points)
