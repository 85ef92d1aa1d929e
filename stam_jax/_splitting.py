"""Three-block splitting: the iteration of which `stam` and the published methods are configurations."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _assignment, _numbers, _paths
from stam_jax._assignment import Quantizers
from stam_jax._inertia import StepInertia, relative_step
from stam_jax._numbers import ScalarOrSchedule
from stam_jax.quantizers import Quantizer, levels_of, nearest, wide
from stam_jax.regularizers import Regularizer
from stam_jax.relaxations import Relaxation, shares


class SplittingState(NamedTuple):
    """The state of `three_block_splitting`, and so of `stam` and of most methods: arrays and nothing else.

    Args:
        count: the number of steps so far, an int32 scalar.
        latent: the latent weights v in float32 at least, a tree like the parameters with an
            `optax.MaskedNode` at each leaf that is not quantized; None with an inertia of 0, where v is the
            parameters themselves.
        relative_step: the mean so far of the steps relative to the weights, a scalar; None unless the inertia
            follows from it.
        inner: the state of the optimizer inside.
    """

    count: jax.Array
    latent: Any
    relative_step: Any
    inner: Any


def three_block_splitting(
    optimizer: optax.GradientTransformation | None = None,
    *,
    quantizer: Quantizers,
    relaxation: Relaxation,
    inertia: ScalarOrSchedule | StepInertia,
    project: Literal["first", "last"] = "last",
    regularizer: Regularizer | None = None,
    regularizer_step: ScalarOrSchedule = 1.0,
    regularizer_strength: ScalarOrSchedule = math.inf,
    name: str = "three_block_splitting",
) -> optax.GradientTransformationExtraArgs:
    r"""The general iteration, of which `stam` and the published methods are configurations.

    With u the step that the optimizer makes from the latent weights v, P the projection onto the quantized
    weights and h a regularizer,

    $$z = \mathrm{prox}_{s h}(v \text{ or } v + u), \qquad w = \frac{v + u + \lambda z}{1 + \lambda}, \qquad
      y = P(v \text{ or } w),$$
    $$x = \mathrm{relax}(w, y), \qquad v \leftarrow x + \kappa (w - x).$$

    The network runs on the relaxed weights x, the parameters. Without a regularizer w is v + u. Leaves that
    are not quantized take the optimizer's step as it is.

    Args:
        optimizer: an Optax optimizer whose step ends at the new weights: multiplied by minus the learning
            rate. It is given the latent weights as parameters, in float32 at least. None makes a link of a
            chain, which takes the step that the transforms before it have made of the gradient.
        quantizer: what is quantized, and how, as in `stam`.
        relaxation: the map from (w, y) to x, such as `relaxations.LinearBlend(0.5)`.
        inertia: $\kappa$ in [0, 1]. A step starts from v, so above 0 it undoes what else has moved the
            parameters. The number 0 makes x the latent weights, which takes no copy of them; 1 leaves the
            latent weights to the optimizer alone. It, and the numbers below, may be schedules: functions of
            the step count, from 0. A `StepInertia` follows from the size of the steps.
        project: where y and z are found: `"first"` at v, free of the noise of this step, or `"last"` after
            the step, so that the network trained in a hard phase is the one that ships.
        regularizer: h, such as `regularizers.Box(1.0)`; None for none.
        regularizer_step: the step s of its prox, above 0, in units of w^2 over those of h.
        regularizer_strength: $\lambda$ from 0 to infinity, where w is z.
        name: of the method that is configured, with which errors begin.

    Returns:
        An `optax.GradientTransformationExtraArgs` whose state is a `SplittingState`; its `update` needs the
        parameters.

    Raises:
        ValueError: for a number out of range or another word for `project`; in `init`, as `quantize`; in
            `update`, without parameters, for trees whose leaves differ, and for a state of other parameters
            or options.
        TypeError: for an argument of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from stam_jax import Binary, relaxations, three_block_splitting
        >>> optimizer = three_block_splitting(
        ...     optax.sgd(0.5), quantizer=Binary(), relaxation=relaxations.SquaredDistance(1.0), inertia=0.9
        ... )
        >>> params = {"kernel": jnp.array([[1.0], [-2.0]])}
        >>> updates, state = optimizer.update({"kernel": jnp.ones((2, 1))}, optimizer.init(params), params)
        >>> print(optax.apply_updates(params, updates)["kernel"].T, state.latent["kernel"].T)
        [[ 1. -2.]] [[ 0.55 -2.45]]

    References:
        This project's formulation, docs/theory.md, for the model of Bian, Liu and Zhang, arXiv:2204.11065,
        whose equations were not available.
    """
    inner = inside(name, optax.identity() if optimizer is None else optimizer)
    _assignment.check_quantizer(name, quantizer)
    _numbers.check_has(name, "relaxation", relaxation, "at")
    follows_steps = isinstance(inertia, StepInertia)
    if not follows_steps:
        _numbers.check(name, "inertia", inertia, high=1.0)
    if project not in ("first", "last"):
        raise ValueError(f"{name}: project must be 'first' or 'last'; got {project!r}.")
    if regularizer is not None:
        _numbers.check_has(name, "regularizer", regularizer, "prox")
    _numbers.check(name, "regularizer_step", regularizer_step)
    _numbers.check(name, "regularizer_strength", regularizer_strength)
    keeps_latent = not _numbers.is_fixed_at(inertia, 0)

    def init(params: Any) -> SplittingState:
        quantizers = _assignment.chosen(name, quantizer, params)
        _assignment.check_fits(name, params, quantizers)
        latent = _paths.holding(params, latents(params, quantizers)) if keeps_latent else None
        # Copies of its own for the optimizer, which may keep them: an alias could not be donated.
        seen = _paths.replaced(params, latents(params, quantizers))
        typical = jnp.zeros([]) if follows_steps else None
        return SplittingState(jnp.zeros([], jnp.int32), latent, typical, inner.init(seen))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, SplittingState]:
        check_state(name, state, SplittingState)
        _paths.check_alike(name, updates, "updates", params)
        quantizers = _assignment.chosen(name, quantizer, params)
        weights, gradients = _paths.named_leaves(params), _paths.named_leaves(updates)
        latent = kept(name, state.latent, weights, quantizers if keeps_latent else {})
        if follows_steps == (state.relative_step is None):
            raise ValueError(
                f"{name}: the state is of another inertia: its relative_step is {state.relative_step!r}, and "
                "must be a scalar for a StepInertia and None for any other."
            )
        v = latent if keeps_latent else widened(weights, quantizers)
        at = lambda value: _numbers.at(value, state.count)
        relax, typical = relaxation.at(state.count), state.relative_step
        kappa = inertia.at(state.count, typical) if isinstance(inertia, StepInertia) else at(inertia)
        step, (share_w, share_z) = at(regularizer_step), shares(at(regularizer_strength))

        def iterate(q: Quantizer, v: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The next x and v of one leaf: the equations of `three_block_splitting`."""
            w = v + u
            if regularizer is not None:
                z = regularizer.prox(v if project == "first" else w, step)
                w = share_w * w + share_z * z
            projected = v if project == "first" else w
            levels = levels_of(q, projected)
            x = relax(w, nearest(projected, levels), levels)
            # The same as x + kappa (w - x), but exact at 0 and 1; at the number 1 without computing x again.
            return x, w if _numbers.is_fixed_at(inertia, 1) else (1 - kappa) * x + kappa * w

        d = _paths.replaced(updates, {path: gradients[path].astype(v[path].dtype) for path in quantizers})
        steps, inner_state = inner.update(d, state.inner, _paths.replaced(params, v), **extra_args)
        taken = _paths.named_leaves(steps)
        u = {path: taken[path].astype(v[path].dtype) for path in quantizers}
        reached = {path: iterate(q, v[path], u[path]) for path, q in quantizers.items()}
        if follows_steps:
            now = relative_step(u, {path: v[path] + u[path] for path in u})
            typical += ((now - typical) / (state.count + 1)).astype(typical.dtype)
        moves = {path: move(weights[path], x) for path, (x, _) in reached.items()}
        latent = {path: new.astype(v[path].dtype) for path, (_, new) in reached.items()}
        return _paths.replaced(steps, moves), SplittingState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            latent=_paths.replaced(state.latent, latent) if keeps_latent else None,
            relative_step=typical,
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def inside(where: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer that is wrapped.

    Raises:
        TypeError: for something that is no optimizer, such as a learning rate.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{where}: optimizer must be an Optax optimizer such as optax.adamw(1e-3), with its learning "
            f"rate; got {optimizer!r}."
        )
    return optax.with_extra_args_support(optimizer)


def check_state(where: str, state: Any, kind: type) -> None:
    """Raise unless the state is of the kind that the transform's `init` makes."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{where}: update takes the state of its own init, a {kind.__name__}; got {type(state).__name__}."
        )


def latents(params: Any, quantizers: dict[str, Quantizer]) -> dict[str, jax.Array]:
    """Copies of the leaves that are quantized, by path, in float32 at least."""
    weights = _paths.named_leaves(params)
    # Copies even where no cast is due: an alias of the parameters could not be donated with them.
    return {path: jnp.array(weights[path], wide(weights[path].dtype), copy=True) for path in quantizers}


def widened(leaves: dict[str, jax.Array], quantizers: dict[str, Quantizer]) -> dict[str, jax.Array]:
    """The leaves that are quantized, by path, in float32 at least."""
    return {path: leaves[path].astype(wide(leaves[path].dtype)) for path in quantizers}


def kept(
    where: str, tree: Any, weights: dict[str, jax.Array], quantizers: dict[str, Quantizer]
) -> dict[str, jax.Array]:
    """What a state keeps for each quantized leaf, by path.

    Raises:
        ValueError: with its path, for a leaf that the state lacks or has too many, or of another shape.
    """
    held = {} if tree is None else _paths.named_leaves(tree)
    for path in [*quantizers, *held]:
        if path not in held or path not in quantizers or held[path].shape != weights[path].shape:
            has = f"an array of shape {held[path].shape}" if path in held else "nothing"
            wants = f"one of shape {weights[path].shape}" if path in quantizers else "nothing"
            raise ValueError(
                f"{where}: the state is of other parameters or options: for the leaf {path!r} it holds {has} "
                f"in the place of {wants}."
            )
    return held


def move(x: jax.Array, new_x: jax.Array) -> jax.Array:
    """The update that leads a parameter to its next value."""
    return (new_x - x.astype(new_x.dtype)).astype(x.dtype)
