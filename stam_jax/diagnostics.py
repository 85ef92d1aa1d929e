r"""Measures of a run: how far from quantized, how far from stationary, and what flipping signs costs.

The model is $\Phi(x, y, z) = f(x) + g(y) + h(z) + (\rho/2)|x-y|^2 + (\tau/2)|x-z|^2$ of docs/theory.md, at
$y = P_Q(v)$ and $z = \mathrm{prox}_{h/\tau}(v)$ of the latent weights v. Without inertia v is x, and these
are the minima over y and z.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from stam_jax import _assignment, _numbers, _paths
from stam_jax._assignment import Quantizers, quantized_leaves
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._splitting import SplittingState, check_state
from stam_jax.quantizers import Binary, wide
from stam_jax.regularizers import HasValue, Regularizer


@jax.jit
def _relative_distance(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """|x - y| / |x| over all pairs of x and y."""
    distance = norm = jnp.zeros([], jnp.float32)
    for x, y in pairs:
        x = x.astype(wide(x.dtype))
        distance += jnp.sum(jnp.square(x - y.astype(x.dtype)))
        norm += jnp.sum(jnp.square(x))
    return jnp.where(distance == 0, 0.0, jnp.sqrt(distance / jnp.where(norm == 0, 1, norm)))


@jax.jit
def _differing_signs(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """How many signs differ, over all arrays."""
    differ = lambda a, b: jnp.sum((jnp.asarray(a) >= 0) != (jnp.asarray(b) >= 0))
    return jnp.asarray(sum(map(differ, before, after)), jnp.float32)


def quantization_gap(params: Any, quantizer: Quantizers = Binary()) -> jax.Array:
    r"""The relative distance of the relaxed weights from the quantized ones, $|x - P_Q(x)| / |x|$.

    The norms run over all quantized leaves together, in float32 at least. Rounding alone, some 1e-7 in
    float32, says that the network that is trained is the one that is shipped.

    Args:
        params: the parameters x.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        A scalar of at least 0.

    Raises:
        ValueError, TypeError: as `quantize`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import diagnostics
        >>> print(round(float(diagnostics.quantization_gap({"kernel": jnp.array([[3.0], [1.0]])})), 4))
        0.4472
    """
    quantized = quantized_leaves("quantization_gap", quantizer, params)
    weights = _paths.named_leaves(params)
    return _relative_distance([(jnp.asarray(weights[path]), y) for path, y in quantized.items()])


def sign_flips(before: Any, after: Any) -> jax.Array:
    r"""The share of weights whose sign differs between two trees, with $\mathrm{sign}(0) = +1$.

    Args:
        before: a tree of arrays of real numbers, such as `quantize(params)` at one epoch.
        after: a tree of the same structure and shapes, at a later one.

    Returns:
        A scalar in [0, 1]; 0 for trees without weights.

    Raises:
        ValueError: if the structures or shapes differ.
        TypeError: for arrays that have no sign, such as booleans.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import diagnostics
        >>> print(diagnostics.sign_flips([jnp.array([1.0, -1.0])], [jnp.array([1.0, 1.0])]))
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
        quantized: of the pull towards the quantized weights y.
        constrained: of the regularizer, and of the pull towards its weights z.
    """

    total: jax.Array
    loss: jax.Array
    quantized: jax.Array
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
    quantizer: Quantizers = Binary(),
) -> Residual:
    r"""The theorem's distance from stationarity, $|R|$ with $R = \nabla f(x) + \rho (x - y) + \tau (x - z)$.

    With the full gradient it is what `theory.bound` bounds on average over a run, and without inertia the
    distance of 0 from the subdifferential of $\Phi$ at (x, y, z); with a minibatch's it has that gradient's
    noise on top. The parts do not add up to the whole: they are vectors that may cancel. Leaves that are not
    quantized count with their gradient alone.

    A small residual does not make a good network: every sign pattern with its best scales satisfies the
    condition on y. Look at the loss or the accuracy of the quantized network beside it.

    Args:
        gradients: $\nabla f(x)$, a tree like `params`.
        opt_state: an optimizer state that holds one or more `SplittingState`s, however deep.
        params: the parameters x it belongs to.
        penalty: $\rho$ of `stam_proximal`. With inertia $\kappa$ the pull that is left is $(1 - \kappa)\rho$:
            give that, 0 for the methods with inertia 1.
        regularizer: h of `stam_proximal`; None for none.
        regularizer_penalty: $\tau$ of `stam_proximal`, finite where there is a regularizer. (A traced
            infinity gives NaN.)
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        A `Residual`, its numbers in float32 at least.

    Raises:
        ValueError: as `quantize`; for a state that holds no `SplittingState`, or of other parameters; for
            gradients that do not match the parameters; for a negative or infinite `penalty`; for a
            regularizer that is enforced exactly, where $\tau$ is infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import diagnostics, stam_proximal
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> state = stam_proximal(0.1, penalty=2.0).init(params)
        >>> gradients = {"kernel": jnp.array([[1.0], [2.0]])}
        >>> found = diagnostics.residual(gradients, state, params, penalty=2.0)
        >>> print(found.whole.total, round(float(found.leaves["kernel"].quantized), 4))
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
    points = _points("residual", quantizer, opt_state, params)
    weights = _paths.named_leaves(params)
    return _residual(weights, directions, points, penalty, regularizer_penalty, regularizer)


def objective(
    loss: jax.typing.ArrayLike,
    opt_state: Any,
    params: Any,
    *,
    penalty: jax.typing.ArrayLike = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: jax.typing.ArrayLike = math.inf,
    quantizer: Quantizers = Binary(),
) -> Terms:
    r"""The objective $\Phi$ and its three terms: $f(x)$, $(\rho/2)|x-y|^2$ and $h(z) + (\tau/2)|x-z|^2$.

    y lies in the quantized set, so its own term g is 0. With $\tau = \infty$ the regularizer acts on x
    itself, z = x. With constant finite penalties, the projection first, and without noise and inertia, it
    falls at every step of `stam_proximal` whose learning rate is at most 1 / L.

    Args:
        loss: f(x), the loss at `params`, a scalar.
        opt_state: an optimizer state that holds one or more `SplittingState`s, however deep.
        params: the parameters x it belongs to.
        penalty: $\rho$ of `stam_proximal`; with inertia, as in `residual`.
        regularizer: h of `stam_proximal`, with a method `value`; None for none.
        regularizer_penalty: $\tau$ of `stam_proximal`.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        The `Terms`, in float32 at least.

    Raises:
        ValueError: as `quantize`; for a state that holds no `SplittingState`, or of other parameters; for a
            negative or infinite `penalty`.
        TypeError: for a regularizer without `value`.

    Example:
        >>> import jax.numpy as jnp
        >>> from stam_jax import diagnostics, stam_proximal
        >>> params = {"kernel": jnp.array([[3.0], [1.0]])}
        >>> state = stam_proximal(0.1, penalty=2.0).init(params)
        >>> print(*diagnostics.objective(0.5, state, params, penalty=2.0))
        2.5 0.5 2.0 0.0

    References:
        docs/theory.md.
    """
    _check_model("objective", penalty, regularizer, regularizer_penalty)
    if regularizer is not None:
        _numbers.check_has("objective", "regularizer", regularizer, "prox", "value")
    points = _points("objective", quantizer, opt_state, params)
    weights = _paths.named_leaves(params)
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
    quantizer: Quantizers = Binary(),
) -> jax.Array:
    r"""What it cost to move the quantized weights in one step, $J_k$ of the theorem with inertia.

    With $\tilde\rho = (1 - \kappa)\rho$, $\hat\eta = \eta / (1 + \eta\rho)$ and the quantized weights
    $q_k = P_Q(v_k)$, let $M(x, q) = f(x) + (\tilde\rho/2)|x - q|^2$. The gradient and the pull alone would
    have led to $x' = x_k - \hat\eta\,(d_k + \tilde\rho\,(x_k - q_k))$. What is left of the step comes of
    new signs and scales:

    $$J_k = M(x_{k+1}, q_{k+1}) - M(x', q_k).$$

    The iteration is `three_block_splitting` behind plain gradients, with the relaxation
    `SquaredDistance(learning_rate * penalty)`. With constant numbers and no regularizer, `theory.bound`
    bounds the residual once the sum of $J_k$ over the run is added to its `decrease`, for every inertia and
    either order of projection. Without inertia, and with `project="first"`, no $J_k$ is positive. A negative
    sum says that carrying the weights along as signs flip paid for itself. It takes two losses, whose
    difference has their rounding.

    Args:
        loss: f, a function of the parameters to a scalar, on the data that matter; the same function object
            at every call, for it is compiled.
        gradients: $d_k$, the stochastic gradient that the step was taken with, a tree like the parameters.
        before: `(opt_state, params)` before the step.
        after: `(opt_state, params)` after it.
        learning_rate: $\eta$ of `stam_proximal`.
        penalty: $\rho$ of `stam_proximal`.
        inertia: $\kappa$.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        $J_k$, a scalar.

    Raises:
        ValueError: as `quantize`; for a state that holds no `SplittingState`, or of other parameters; for
            gradients that do not match the parameters, or a number out of range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from stam_jax import Binary, diagnostics, relaxations, three_block_splitting
        >>> loss = lambda params: jnp.sum((params["kernel"] + 1.0) ** 2)
        >>> relaxation = relaxations.SquaredDistance(0.25 * 2.0)
        >>> optimizer = three_block_splitting(
        ...     optax.sgd(0.25), quantizer=Binary(), relaxation=relaxation, inertia=1.0
        ... )
        >>> params = {"kernel": jnp.array([[0.5], [-2.0]])}
        >>> state = optimizer.init(params)
        >>> work = 0.0
        >>> for _ in range(20):
        ...     before, gradients = (state, params), jax.grad(loss)(params)
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     after = (state, params)
        ...     work += diagnostics.flip_work(
        ...         loss, gradients, before, after, learning_rate=0.25, penalty=2.0, inertia=1.0
        ...     )
        >>> print(work < 0, jnp.sign(params["kernel"]).T)
        True [[-1. -1.]]

    References:
        docs/theory.md.
    """
    _numbers.check("flip_work", "learning_rate", learning_rate, finite=True, schedule=False)
    _numbers.check("flip_work", "penalty", penalty, finite=True, schedule=False)
    _numbers.check("flip_work", "inertia", inertia, high=1.0, schedule=False)
    directions = _matching("flip_work", gradients, before[1])
    states = [_points("flip_work", quantizer, *pair) for pair in (before, after)]
    return _flip_work(before[1], after[1], directions, *states, learning_rate, penalty, inertia, loss)


def effective_step(
    learning_rate: jax.typing.ArrayLike,
    *,
    penalty: jax.typing.ArrayLike = 0.0,
    regularizer_penalty: jax.typing.ArrayLike = 0.0,
) -> Any:
    r"""How far `stam_proximal` moves x along the residual, $\hat\eta = \eta / (1 + \eta (\rho + \tau))$.

    $\eta \le 1/L$ gives $\hat\eta \le 1/(L + \rho + \tau)$: the penalties never limit the learning rate.

    Args:
        learning_rate: $\eta$ of `stam_proximal`.
        penalty: $\rho$ of `stam_proximal`.
        regularizer_penalty: $\tau$ of `stam_proximal`; 0 without a regularizer.

    Returns:
        $\hat\eta$, a Python number of Python numbers and an array of arrays; they are not checked.

    Example:
        >>> from stam_jax import diagnostics
        >>> print(diagnostics.effective_step(0.5, penalty=6.0))
        0.125
    """
    return learning_rate / (1 + learning_rate * (penalty + regularizer_penalty))


class _Point(NamedTuple):
    """Where one quantized leaf stands: the latent weights v, and y, its projection."""

    v: jax.Array
    y: jax.Array


def _points(where: str, quantizer: Quantizers, opt_state: Any, params: Any) -> dict[str, _Point]:
    """Where every quantized leaf stands, by path."""
    v = latent_weights(where, quantizer, opt_state, params)
    quantizers = _assignment.chosen(where, quantizer, params)
    return {path: _Point(v[path], _assignment.project(q, v[path])) for path, q in quantizers.items()}


def latent_weights(where: str, quantizer: Quantizers, opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """The latent weights of each quantized leaf, by path: the parameters themselves without inertia."""
    _assignment.check_quantizer(where, quantizer)
    is_state = lambda node: isinstance(node, SplittingState)
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not states:
        raise ValueError(
            f"{where}: opt_state holds no SplittingState: it must be that of stam or of one of its relatives."
        )
    weights = {path: jnp.asarray(leaf) for path, leaf in _paths.named_leaves(params).items()}
    latent = {path: leaf for state in states for path, leaf in _paths.named_leaves(state.latent).items()}
    for path, leaf in latent.items():
        if path not in weights or leaf.shape != weights[path].shape:
            has = f"shape {weights[path].shape}" if path in weights else "no such leaf"
            raise ValueError(
                f"{where}: opt_state holds the leaf {path!r} of shape {leaf.shape}; params have {has}."
            )
    quantizers = _assignment.chosen(where, quantizer, params)
    return {path: latent.get(path, weights[path].astype(wide(weights[path].dtype))) for path in quantizers}


def _is_traced(value: Any) -> bool:
    """Whether a number is not known before the function runs."""
    return isinstance(value, jax.core.Tracer)


def _check_model(where: str, penalty: Any, regularizer: Any, regularizer_penalty: Any) -> None:
    """Raise for penalties out of range, or something else for a regularizer."""
    for name, value in (("penalty", penalty), ("regularizer_penalty", regularizer_penalty)):
        # The value of an array is known here, but inside jit.
        known = np.asarray(value) if isinstance(value, jax.Array) and not _is_traced(value) else value
        _numbers.check(where, name, known, finite=name == "penalty", schedule=False)
    if regularizer is not None:
        _numbers.check_has(where, "regularizer", regularizer, "prox")


def _matching(where: str, gradients: Any, params: Any) -> dict[str, jax.Array]:
    """The gradients by path, once they are seen to have the leaves of the parameters."""
    _paths.check_alike(where, gradients, "gradients", params)
    return _paths.named_leaves(gradients)


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
        x = x.astype(wide(x.dtype))
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
    quantized = constrained = jnp.zeros([], jnp.float32)
    for name, (v, y) in points.items():
        x = weights[name].astype(v.dtype)
        quantized += rho / 2 * _square(x - y)
        if regularizer is not None:
            z = _constrained(v, tau, regularizer)
            coupling = jnp.where(jnp.isinf(tau), 0.0, tau)
            # x itself in its own digits, which a box may be told to.
            value = jnp.where(jnp.isinf(tau), regularizer.value(weights[name]), regularizer.value(z))
            constrained += value + coupling / 2 * jnp.where(jnp.isinf(tau), 0.0, _square(x - z))
    loss = jnp.asarray(loss)
    loss = loss.astype(wide(loss.dtype))
    return Terms(loss + quantized + constrained, loss, quantized, constrained)


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
    """The cost of moving the quantized weights, and x along with them."""
    pull = (1 - kappa) * rho
    moved = effective_step(eta, penalty=rho)
    arrived = _paths.named_leaves(new_weights)

    def alone(name: str, x: jax.Array) -> jax.Array:
        if name not in points:
            return arrived[name]
        return (x - moved * (gradients[name] + pull * (x - points[name].y))).astype(x.dtype)

    def merit(params: Any, at: dict[str, _Point]) -> jax.Array:
        leaves = _paths.named_leaves(params)
        return loss(params) + pull / 2 * sum(_square(leaves[name] - point.y) for name, point in at.items())

    return merit(new_weights, new_points) - merit(_paths.map_named(alone, weights), points)


class StepRecord(NamedTuple):
    """What one step did; every field NaN before the first.

    Args:
        residual: |R| at the point that the step left, with the updates that came in for the gradient.
        gap: the `quantization_gap` at the point that the step reached.
        flips: the share of quantized weights whose sign the step changed.
        moved: the norm of the update of all parameters.
    """

    residual: jax.Array
    gap: jax.Array
    flips: jax.Array
    moved: jax.Array


class RecordState(NamedTuple):
    """The state of `record`.

    Args:
        count: the steps taken so far, an int32 scalar.
        diagnostics: of the last step that was recorded.
        inner: the state of the optimizer inside.
    """

    count: jax.Array
    diagnostics: StepRecord
    inner: Any


def record(
    optimizer: optax.GradientTransformation,
    *,
    penalty: ScalarOrSchedule = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: ScalarOrSchedule = math.inf,
    every: int = 1,
    quantizer: Quantizers = Binary(),
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves in its state what each of its steps did.

    The updates are those of the optimizer inside, unchanged. Put it around the whole chain, so that the
    residual is that of the gradient and not of what momentum made of it; and read
    `optax.tree.get(opt_state, "diagnostics")`, under jit and scan too. A recorded step costs two projections
    and a few passes over the weights. Put it inside `optax.MultiSteps`, to record whole steps.

    Args:
        optimizer: `stam` or one of its relatives around an optimizer, or a chain that ends in one.
        penalty: the pull towards the quantized weights, as in `diagnostics.residual`; it and
            `regularizer_penalty` may be schedules, read at the step count of this transform.
        regularizer: h, as in `diagnostics.residual`.
        regularizer_penalty: as in `diagnostics.residual`.
        every: record the first step of so many; the others keep the last record, and cost nothing but under
            `vmap`.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `RecordState`.

    Raises:
        ValueError: for a number out of range; in `init`, for an optimizer without a `SplittingState`.
        TypeError: for an argument of the wrong kind, such as a fraction for `every`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import diagnostics, stam_proximal
        >>> optimizer = diagnostics.record(stam_proximal(0.1, penalty=2.0), penalty=2.0)
        >>> params = {"kernel": jnp.array([[0.2], [-0.2]])}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"kernel": jnp.array([[9.0], [0.0]])}, state, params)
        >>> found = optax.tree.get(state, "diagnostics")
        >>> print(found.residual, found.flips)
        9.0 0.5
    """
    where = "record"
    _assignment.check_quantizer(where, quantizer)
    _numbers.check_has(where, "optimizer", optimizer, "init", "update")
    _numbers.check(where, "penalty", penalty, finite=True)
    _numbers.check(where, "regularizer_penalty", regularizer_penalty)
    _numbers.check_whole(where, "every", every)
    if regularizer is not None:
        _numbers.check_has(where, "regularizer", regularizer, "prox")
        if _numbers.is_fixed_at(regularizer_penalty, math.inf):
            raise ValueError(f"{where}: regularizer_penalty must be finite where there is a regularizer.")
    chain = optax.with_extra_args_support(optimizer)

    def measured(
        state: RecordState, inner: Any, params: Any, updates: Any, moves: Any, rho: Any, tau: Any
    ) -> Any:
        model = {"regularizer": regularizer, "regularizer_penalty": tau, "quantizer": quantizer}
        left = residual(updates, state.inner, params, penalty=rho, **model)
        reached = optax.apply_updates(params, moves)
        signs = (_points(where, quantizer, *pair) for pair in ((state.inner, params), (inner, reached)))
        found = StepRecord(
            residual=left.whole.total,
            gap=quantization_gap(reached, quantizer),
            flips=sign_flips(*({path: point.y for path, point in points.items()} for points in signs)),
            moved=optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), moves)),
        )
        return jax.tree.map(lambda number: number.astype(jnp.float32), found)

    # Compiled once, also where the steps themselves are not.
    @jax.jit
    def record(state: RecordState, *reached: Any) -> StepRecord:
        kept = lambda state, *_: state.diagnostics
        return jax.lax.cond(state.count % every == 0, measured, kept, state, *reached)

    def init(params: Any) -> RecordState:
        inner = chain.init(params)
        latent_weights(where, quantizer, inner, params)  # Raises where there is nothing to measure.
        nothing = StepRecord(*(jnp.full([], jnp.nan, jnp.float32) for _ in StepRecord._fields))
        return RecordState(jnp.zeros([], jnp.int32), nothing, inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, RecordState]:
        check_state(where, state, RecordState)
        moves, inner = chain.update(updates, state.inner, params, **extra_args)
        pulls = _numbers.at(penalty, state.count), _numbers.at(regularizer_penalty, state.count)
        recorded = record(state, inner, params, updates, moves, *pulls)
        count = jnp.asarray(optax.safe_increment(state.count))
        return moves, RecordState(count, recorded, inner)

    return optax.GradientTransformationExtraArgs(init, update)
