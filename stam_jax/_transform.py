"""`stam()`, the engine: every method of the package is a configuration of this one transform."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stam_jax import _numbers, _state, relaxations, schedules
from stam_jax._numbers import ScalarOrSchedule
from stam_jax._state import Mask, StamState
from stam_jax.quantizers import Binary, HasLevels, Quantizer
from stam_jax.regularizers import Regularizer
from stam_jax.relaxations import Relaxation, RelaxationMap, SquaredDistance


def _default_strength(count: jax.typing.ArrayLike) -> jax.Array:
    """The strength 1.01^k - 1: from float to 99.9% of the way in 700 steps; then hard."""
    return jnp.power(1.01, count) - 1


def stam(
    learning_rate: ScalarOrSchedule,
    *,
    penalty: ScalarOrSchedule | None = None,
    quantizer: Quantizer = Binary(),
    relaxation: Relaxation | None = None,
    regularizer: Regularizer | None = None,
    regularizer_penalty: ScalarOrSchedule = math.inf,
    inertia: ScalarOrSchedule | None = None,
    project: Literal["first", "last"] | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic three-block alternating minimisation, for weights from a quantised set Q.

    It minimises $f(x) + g(y) + h(z) + (\rho/2)|x-y|^2 + (\tau/2)|x-z|^2$, where f is the loss, g the
    indicator of Q and h a regulariser. One step, with d the direction that comes in (the gradient, or what
    the transforms before this one made of it) and v the float block, $v_0 = x_0$:

    $$z^+ = \mathrm{prox}_{h/\tau}(v), \qquad
      w^+ = \frac{v - \eta d + \eta\tau z^+}{1 + \eta\tau}, \qquad
      y^+ = P_Q(v) \text{ or } P_Q(w^+),$$
    $$x^+ = \mathrm{relax}(w^+, y^+), \qquad v^+ = x^+ + \kappa\,(w^+ - x^+).$$

    With $\tau = \infty$ the regulariser is enforced exactly, $w^+ = \mathrm{prox}_{\eta h}(v - \eta d)$.

    The parameters hold x, the relaxed weights: train and differentiate at them. The quantised network is
    `hard_params(opt_state, params)`: evaluate and ship that. The transform multiplies by the learning rate
    and the sign itself, so it stands last in a chain. Leaves that are not quantised take the plain step
    $-\eta d$.

    With a `penalty` this is proximal STAM: y and z are minimised exactly in turn, and x takes one proximal
    step along the stochastic gradient. For a smooth f, plain minibatch gradients, constant finite $\rho$ and
    $\tau$ and a step of order $K^{-1/2}$, an iterate drawn at random from $K = O(\varepsilon^{-4})$ steps has
    an expected stationarity residual of at most $\varepsilon$. The state is a counter.

    Without a penalty it is inertial STAM, which keeps a float copy of the weights; its default ends hard.
    With inertia and a constant finite $\rho$ the rate stands as far as what `docs/theory.md` calls flip work
    stays bounded; growing penalties are covered, under conditions, without inertia. The default, which has
    inertia and grows hard, is covered by neither, nor are momentum and Adam.

    The model as written here, the iteration and the theorems are this project's own, built to fit what the
    abstract of the publication says. Its equations were not available.

    Args:
        learning_rate: the step size $\eta$, at least 0. It, and every other number here, may be a schedule:
            a function from the step count (from 0) to a number.
        penalty: $\rho$, from 0 to infinity, of the squared-distance relaxation with
            $\lambda = \eta\rho/(1+\eta\tau)$, or $\eta\rho$ where $\tau = \infty$ or there is no
            regulariser: it fades with the step size. Give it or `relaxation`, not both. Without either the
            relaxation is the squared distance with $\lambda = 1.01^k - 1$ at step k, which is all but hard
            after some 700 steps; a longer anneal, told in steps of your run, is mostly worth its line.
        quantizer: the set Q and its projection.
        relaxation: the map from $(w^+, y^+)$ to $x^+$.
        regularizer: h; None for none.
        regularizer_penalty: $\tau$, from 0 to infinity.
        inertia: $\kappa$ in [0, 1], the share of $w - x$ carried over to the next step: 0 is the proximal
            method, 1 the lazy update of BinaryConnect and BinaryRelax. By default 0 with a `penalty`, which
            at 1 would not pull at all, and otherwise $1/(1 + 0.01\,\eta)$, by `schedules.inertia`: a little
            less than 1 keeps signs from turning with the noise. The number 0 saves the copy of v.
            Above 0 a step starts from v, not from the parameters: what else moves those, as
            `optax.lookahead` does, is undone.
        project: `"first"`, $y^+ = P_Q(v)$: no noise of this step enters the projection; or `"last"`,
            $y^+ = P_Q(w^+)$: the network trained in a hard phase is the one that ships, not the one of the
            step before. By default first with a `penalty`, last otherwise.
        mask: which leaves are quantised: a tree of booleans like the parameters or a prefix of it, a
            `Selection`, or a function from the parameters to one of these; by default what `select` chooses.
            `optax.inject_hyperparams` takes any function for a schedule: give it `static_args=("mask",)`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs the parameters.

    Raises:
        ValueError: for a number out of range, both `penalty` and `relaxation`, neither of them without
            inertia, a `regularizer_penalty` without a regulariser, or another word for `project`; in `init`,
            for a mask that does not cover the parameters, or a leaf that the quantiser cannot take; in
            `update`, without parameters, or with trees that do not match the one given to `init`.
        TypeError: for an argument of the wrong kind.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from stam_jax import hard_params, stam
        >>> target = jnp.array([[0.9, -0.2], [-1.1, 0.4]])
        >>> loss = lambda params: jnp.sum((params["kernel"] - target) ** 2)
        >>> params = {"kernel": jnp.zeros((2, 2))}
        >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), stam(0.1))
        >>> state = optimizer.init(params)
        >>> for _ in range(100):
        ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(jnp.sign(hard_params(state, params)["kernel"]))
        [[ 1. -1.]
         [-1.  1.]]

    References:
        Bian, Liu and Zhang, A stochastic three-block splitting algorithm and its application to quantized
        deep neural networks, arXiv:2204.11065 (a model with three blocks, and the O(eps^-4) claim).
    """
    _numbers.check("stam", "learning_rate", learning_rate, finite=True)
    if inertia is None:
        inertia = schedules.inertia(learning_rate) if penalty is None else 0.0
    _numbers.check("stam", "inertia", inertia, high=1.0)
    is_lazy = not _numbers.is_fixed_at(inertia, 0)
    if project is None:
        project = "last" if penalty is None else "first"
    _numbers.check("stam", "regularizer_penalty", regularizer_penalty)
    if project not in ("first", "last"):
        raise ValueError(f"stam: project must be 'first', 'last' or None; got {project!r}.")
    if penalty is not None and relaxation is not None:
        raise ValueError("stam: give penalty (rho of the squared distance) or relaxation, not both.")
    if penalty is not None:
        _numbers.check("stam", "penalty", penalty)
    elif relaxation is None and not is_lazy:
        raise ValueError(
            "stam: without inertia, give a penalty (rho of the squared distance) or a relaxation."
        )
    elif relaxation is None:
        relaxation = SquaredDistance(lam=_default_strength)
    # `inject_hyperparams` hands over even the default as an array, so an array says nothing here.
    is_known = callable(regularizer_penalty) or isinstance(regularizer_penalty, (int, float))
    if regularizer is None and is_known and regularizer_penalty != math.inf:
        raise ValueError("stam: regularizer_penalty needs a regularizer; got none.")
    _state.check_has("stam", "quantizer", quantizer, "bits", "project", "contains")
    if relaxation is not None:
        _state.check_has("stam", "relaxation", relaxation, "at")
    if regularizer is not None:
        _state.check_has("stam", "regularizer", regularizer, "prox")

    def probe(leaf_quantizer: Quantizer, v: jax.Array) -> jax.Array:
        y = leaf_quantizer.project(v)
        return y if relaxation is None else relaxation.at(0)(v, y, _levels(leaf_quantizer, v))

    def init(params: Any) -> StamState:
        return _state.begin(
            "stam",
            params,
            mask=mask,
            quantizer=quantizer,
            probe=probe,
            memory=_state.float_copy if is_lazy else None,
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, StamState]:
        del extra_args
        _state.check_own("stam", state, StamState)
        step = _Step.at(
            state.count,
            learning_rate=learning_rate,
            penalty=penalty,
            relaxation=relaxation,
            regularizer=regularizer,
            regularizer_penalty=regularizer_penalty,
            inertia=inertia,
            project=project,
        )

        def move(leaf_quantizer: Quantizer, x: jax.Array, latent: Any, d: jax.Array) -> Any:
            v = _state.float_block(x, latent)
            return _state.lead(x, latent, *step.advance(leaf_quantizer, v, d))

        return _state.advance("stam", state, updates, params, learning_rate=step.learning_rate, move=move)

    return optax.GradientTransformationExtraArgs(init, update)


def _levels(quantizer: Quantizer, v: jax.Array) -> Callable[[], jax.Array]:
    """What gives the levels of the projection of v, to a relaxation that asks for them."""

    def levels() -> jax.Array:
        if not isinstance(quantizer, HasLevels):
            raise ValueError(
                f"the relaxation asks for the levels of the set, and {quantizer!r} has no method levels(v)."
            )
        return quantizer.levels(v)

    return levels


class _Step(NamedTuple):
    """One step's numbers, each worked out once for all leaves."""

    learning_rate: Any
    inertia: Any
    relax: RelaxationMap
    constrain: Callable[[jax.Array, jax.Array], jax.Array]
    project: str

    @classmethod
    def at(
        cls,
        count: jax.Array,
        *,
        learning_rate: ScalarOrSchedule,
        penalty: ScalarOrSchedule | None,
        relaxation: Relaxation | None,
        regularizer: Regularizer | None,
        regularizer_penalty: ScalarOrSchedule,
        inertia: ScalarOrSchedule,
        project: str,
    ) -> "_Step":
        eta = _numbers.at(learning_rate, count)
        tau = _numbers.at(regularizer_penalty, count)
        exact = jnp.isinf(tau)
        # Infinite tau takes the other branch of each `where`; 0 keeps this one finite, for gradients too.
        unbounded = exact if regularizer is not None else True
        damping = jnp.where(unbounded, 0.0, eta * jnp.where(unbounded, 0.0, tau))

        def constrain(v: jax.Array, forward: jax.Array) -> jax.Array:
            """The float block w+ from v and v - eta d: the mean of v - eta d and z+, weighted by tau."""
            if regularizer is None:
                return forward
            step = jnp.where(exact, eta, 1 / jnp.maximum(tau, 1e-30))  # The prox wants a finite step.
            z = regularizer.prox(jnp.where(exact, forward, v), step)
            return jnp.where(exact, z, (forward + damping * z) / (1 + damping))

        if relaxation is not None:
            relax = relaxation.at(count)
        else:
            relax = relaxations.from_penalty(_numbers.at(penalty, count), eta, damping)
        return cls(
            learning_rate=eta,
            inertia=_numbers.at(inertia, count),
            relax=relax,
            constrain=constrain,
            project=project,
        )

    def advance(self, quantizer: Quantizer, v: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x+ and v+ of one quantised leaf."""
        w = self.constrain(v, v - self.learning_rate * d.astype(v.dtype))
        projected = v if self.project == "first" else w
        x = self.relax(w, quantizer.project(projected), _levels(quantizer, projected))
        if _numbers.is_fixed_at(self.inertia, 1):
            return x, w  # The blend below would come to that, at the price of computing x once more.
        # The same as x + kappa (w - x), but exact at kappa = 0 and 1.
        return x, (1 - self.inertia) * x + self.inertia * w
