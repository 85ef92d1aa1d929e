r"""Measures of a run: how far from quantized, how far from stationary, and what flipping signs costs.

The model is $\Phi(x, y, z) = f(x) + g(y) + h(z) + (\rho/2)|x-y|^2 + (\tau/2)|x-z|^2$ of docs/theory.md, at
$y = P_Q(v)$ and $z = \mathrm{prox}_{h/\tau}(v)$ of the latent weights v. Without inertia v is x, and these
are the minima over y and z.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from stam_jax import _assignment, _numbers, _paths
from stam_jax._assignment import Quantizers, quantized_leaves
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._splitting import SplittingState, check_state
from stam_jax.quantizers import Binary, wide
from stam_jax.regularizers import Regularizer


def quantization_gap(params: Any, quantizer: Quantizers = Binary()) -> jax.Array:
    r"""The relative distance of the relaxed weights from the quantized ones, $|x - P_Q(x)| / |x|$.

    The norms run over all quantized leaves together, in float32 at least. Rounding alone, some 1e-7 in
    float32, says that the network that is trained is the one that is shipped.

    Args:
        params: the parameters x.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        A scalar of at least 0, infinite where x is 0 and its projection is not.

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
    return _relative_distance({path: jnp.asarray(weights[path]) for path in quantized}, quantized)


@jax.jit
def _relative_distance(weights: dict[str, jax.Array], quantized: dict[str, jax.Array]) -> jax.Array:
    """|x - y| / |x| over all leaves together."""
    x, y = _widened(weights), _widened(quantized)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, x, y))
    return distance / jnp.where(distance == 0, 1, optax.tree.norm(x))


def _widened(tree: Any) -> Any:
    """The leaves in float32 at least."""
    return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), tree)


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
    structures = jax.tree.structure(before), jax.tree.structure(after)
    if structures[0] != structures[1]:
        raise ValueError(f"sign_flips: the structures {structures[0]} and {structures[1]} differ.")

    def differing(a: jax.Array, b: jax.Array) -> jax.Array:
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"sign_flips: the shapes {jnp.shape(a)} and {jnp.shape(b)} differ.")
        for dtype in (jnp.result_type(a), jnp.result_type(b)):
            if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(dtype, jnp.signedinteger):
                raise TypeError(f"sign_flips: arrays of dtype {dtype} have no sign.")
        return jnp.sum((jnp.asarray(a) >= 0) != (jnp.asarray(b) >= 0))

    flips = optax.tree.sum(jax.tree.map(differing, before, after))
    return jnp.asarray(flips, jnp.float32) / max(sum(map(jnp.size, jax.tree.leaves(before))), 1)


class Terms(NamedTuple):
    """One number for the whole, and for each of the three blocks it comes from.

    Args:
        total: of all three together.
        loss: of f, at the relaxed weights x.
        quantized: of the pull toward the quantized weights y.
        constrained: of the regularizer, and of the pull toward its weights z.
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
    penalty: ArrayLike = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: ArrayLike = 0.0,
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
        penalty: $\rho$ of `stam_proximal`. With inertia $\kappa$ (where it changes, that of the step before)
            the pull that is left is $(1 - \kappa)\rho$: give that, 0 for the methods with inertia 1.
        regularizer: h of `stam_proximal`; None for none.
        regularizer_penalty: $\tau$ of `stam_proximal`, above 0 where there is a regularizer.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        A `Residual`, its numbers in float32 at least.

    Raises:
        ValueError: as `quantize`; for a state that holds no `SplittingState`, or of other parameters; for
            gradients that do not match the parameters; for a penalty that is negative or infinite; for a
            regularizer without a penalty.

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
    _paths.check_alike("residual", gradients, "gradients", params)
    points = _points("residual", quantizer, opt_state, params)
    return _residual(_paths.named_leaves(gradients), points, penalty, regularizer_penalty, regularizer)


def objective(
    loss: ArrayLike,
    opt_state: Any,
    params: Any,
    *,
    penalty: ArrayLike = 0.0,
    regularizer: Regularizer | None = None,
    regularizer_penalty: ArrayLike = 0.0,
    quantizer: Quantizers = Binary(),
) -> Terms:
    r"""The objective $\Phi$ and its three terms: $f(x)$, $(\rho/2)|x-y|^2$ and $h(z) + (\tau/2)|x-z|^2$.

    y lies in the quantized set, so its own term g is 0. With constant penalties and without noise it falls at
    every step of `stam_proximal` whose learning rate is at most 1 / L.

    Args:
        loss: f(x), the loss at `params`, a scalar.
        opt_state: an optimizer state that holds one or more `SplittingState`s, however deep.
        params: the parameters x it belongs to.
        penalty: $\rho$ of `stam_proximal`; with inertia, as in `residual`.
        regularizer: h of `stam_proximal`, with a method `value`; None for none.
        regularizer_penalty: as in `residual`.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        The `Terms`, in float32 at least.

    Raises:
        ValueError: as `residual`.
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
    return _objective(jnp.asarray(loss), points, penalty, regularizer_penalty, regularizer)


def flip_work(
    loss: Callable[[Any], jax.Array],
    gradients: Any,
    before: tuple[Any, Any],
    after: tuple[Any, Any],
    *,
    learning_rate: ArrayLike,
    penalty: ArrayLike,
    inertia: ArrayLike = 0.0,
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
        inertia: $\kappa$; where it changes, that of the step before.
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
    _paths.check_alike("flip_work", gradients, "gradients", before[1])
    points = [_points("flip_work", quantizer, *pair) for pair in (before, after)]
    directions = _paths.named_leaves(gradients)
    return _flip_work(after[1], directions, *points, learning_rate, penalty, inertia, loss)


def effective_step(
    learning_rate: ArrayLike,
    *,
    penalty: ArrayLike = 0.0,
    regularizer_penalty: ArrayLike = 0.0,
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
    """Where one quantized leaf stands, in float32 at least: x, the latent weights v, and y = P(v)."""

    x: jax.Array
    v: jax.Array
    y: jax.Array


_Points = dict[str, _Point]


def _points(where: str, quantizer: Quantizers, opt_state: Any, params: Any) -> _Points:
    """Where every quantized leaf stands, by path."""
    latent = latent_weights(where, quantizer, opt_state, params)
    weights, quantizers = _paths.named_leaves(params), _assignment.chosen(where, quantizer, params)
    return {
        path: _Point(jnp.asarray(weights[path], v.dtype), v, _assignment.project(quantizers[path], v))
        for path, v in latent.items()
    }


def latent_weights(where: str, quantizer: Quantizers, opt_state: Any, params: Any) -> dict[str, jax.Array]:
    """The latent weights of each quantized leaf, by path: the parameters themselves without inertia."""
    _assignment.check_quantizer(where, quantizer)
    is_state = lambda node: isinstance(node, SplittingState)
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not states:
        raise ValueError(
            f"{where}: opt_state holds no SplittingState: it must be that of stam or of one of its relatives."
        )
    weights = _paths.named_leaves(params)
    latent = {path: leaf for state in states for path, leaf in _paths.named_leaves(state.latent).items()}
    for path, leaf in latent.items():
        if path not in weights or leaf.shape != jnp.shape(weights[path]):
            raise ValueError(
                f"{where}: opt_state is of other parameters: it holds a leaf {path!r} of shape {leaf.shape}, "
                "which params lack."
            )
    chosen = {path: jnp.asarray(weights[path]) for path in _assignment.chosen(where, quantizer, params)}
    return _widened(chosen) | {path: leaf for path, leaf in latent.items() if path in chosen}


def _check_model(where: str, penalty: Any, regularizer: Any, tau: Any, *, schedule: bool = False) -> None:
    """Raise for penalties out of range, or something else for a regularizer."""
    for name, value in (("penalty", penalty), ("regularizer_penalty", tau)):
        # The value of an array is known here, but inside jit.
        is_known = isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)
        known = np.asarray(value) if is_known else value
        _numbers.check(where, name, known, finite=True, schedule=schedule)
    if regularizer is not None:
        _numbers.check_has(where, "regularizer", regularizer, "prox")
        if _numbers.is_fixed_at(tau, 0):
            raise ValueError(f"{where}: regularizer needs a regularizer_penalty above 0; got {tau!r}.")


def _constrained(point: _Point, tau: Any, regularizer: Regularizer | None) -> jax.Array:
    """The best z; x itself without a regularizer."""
    # The step of `stam_proximal`: the prox wants a finite one.
    return point.x if regularizer is None else regularizer.prox(point.v, 1 / jnp.maximum(tau, 1e-30))


@functools.partial(jax.jit, static_argnames="regularizer")
def _residual(
    gradients: dict[str, jax.Array], points: _Points, rho: ArrayLike, tau: ArrayLike, regularizer: Any
) -> Residual:
    """The norms of the residual and its parts."""

    def norms(path: str, d: jax.Array) -> Terms:
        pull = bounded = jnp.zeros_like(d)
        if path in points:
            x, _, y = points[path]
            pull, bounded = rho * (x - y), tau * (x - _constrained(points[path], tau, regularizer))
        return Terms(*map(optax.tree.norm, (d + pull + bounded, d, pull, bounded)))

    leaves = {path: norms(path, d) for path, d in _widened(gradients).items()}
    nothing = Terms(*jnp.zeros(4, jnp.float32))
    return Residual(Terms(*map(optax.tree.norm, zip(nothing, *leaves.values(), strict=True))), leaves)


@functools.partial(jax.jit, static_argnames="regularizer")
def _objective(loss: jax.Array, points: _Points, rho: ArrayLike, tau: ArrayLike, regularizer: Any) -> Terms:
    """The terms of the objective."""
    loss = _widened(loss)
    quantized = constrained = jnp.zeros([], jnp.float32)
    for point in points.values():
        quantized += rho / 2 * _square(point.x - point.y)
        if regularizer is not None:
            z = _constrained(point, tau, regularizer)
            constrained += regularizer.value(z) + tau / 2 * _square(point.x - z)
    return Terms(loss + quantized + constrained, loss, quantized, constrained)


def _square(a: jax.Array) -> jax.Array:
    """|a|^2."""
    return jnp.sum(jnp.square(a))


@functools.partial(jax.jit, static_argnames="loss")
def _flip_work(
    new_params: Any,
    gradients: dict[str, jax.Array],
    before: _Points,
    after: _Points,
    eta: ArrayLike,
    rho: ArrayLike,
    kappa: ArrayLike,
    loss: Callable[[Any], jax.Array],
) -> jax.Array:
    """The cost of moving the quantized weights, and x along with them."""
    pull, moved = (1 - kappa) * rho, effective_step(eta, penalty=rho)

    def merit(params: Any, points: _Points) -> jax.Array:
        leaves = _paths.named_leaves(params)
        return loss(params) + pull / 2 * sum(_square(leaves[path] - p.y) for path, p in points.items())

    def alone(path: str, leaf: jax.Array) -> jax.Array:
        """Where the gradient and the pull would have led."""
        if path not in before:
            return leaf
        x, _, y = before[path]
        return (x - moved * (gradients[path] + pull * (x - y))).astype(leaf.dtype)

    return merit(new_params, after) - merit(_paths.map_named(alone, new_params), before)


class StepRecord(NamedTuple):
    """What one step did; every field NaN before the first.

    Args:
        residual: |R| at the point that the step left, with the updates that came in for the gradient.
        gap: the `quantization_gap` at the point that the step reached.
        flips: the share of weights of the quantized network, `quantize(params)`, whose sign the step changed.
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
    regularizer_penalty: ScalarOrSchedule = 0.0,
    every: int = 1,
    quantizer: Quantizers = Binary(),
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves in its state what each of its steps did.

    The updates are those of the optimizer inside, unchanged. Put it around the whole chain, so that the
    residual is that of the gradient and not of what momentum made of it; and read
    `optax.tree.get(opt_state, "diagnostics")`, under jit and scan too. A recorded step costs up to three
    projections and a few passes over the weights. Put it inside `optax.MultiSteps`, to record whole steps.

    Args:
        optimizer: `stam` or one of its relatives around an optimizer, or a chain that ends in one.
        penalty: the pull toward the quantized weights, as in `diagnostics.residual`; it and
            `regularizer_penalty` may be schedules, read at the step count of this transform.
        regularizer: h, as in `diagnostics.residual`.
        regularizer_penalty: as in `diagnostics.residual`.
        every: record the first step of so many; the others keep the last record, and cost nothing but under
            `vmap`.
        quantizer: what is quantized, and how, as in `stam`.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `RecordState`.

    Raises:
        ValueError: for a number out of range or a regularizer without a penalty; in `init`, for an optimizer
            without a `SplittingState`.
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
    _numbers.check_whole(where, "every", every)
    _check_model(where, penalty, regularizer, regularizer_penalty, schedule=True)
    chain = optax.with_extra_args_support(optimizer)

    def measured(
        state: RecordState, inner: Any, params: Any, updates: Any, moves: Any, rho: Any, tau: Any
    ) -> Any:
        model = {"regularizer": regularizer, "regularizer_penalty": tau, "quantizer": quantizer}
        left = residual(updates, state.inner, params, penalty=rho, **model)
        reached = optax.apply_updates(params, moves)
        found = StepRecord(
            residual=left.whole.total,
            gap=quantization_gap(reached, quantizer),
            flips=sign_flips(*(quantized_leaves(where, quantizer, tree) for tree in (params, reached))),
            moved=optax.tree.norm(_widened(moves)),
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
