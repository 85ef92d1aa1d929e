"""Every method, at settings that suit a run of 400 steps: what the batteries run through.

Each is a function (optimizer=None, **settings) of an Optax optimizer; the settings are `quantizer=` only.
Those in `CHAINED` can go without the optimizer, as a link of a chain.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from stam_jax import (
    Binary,
    admm_quant,
    binary_connect,
    binary_relax,
    bop,
    md_tanh,
    parq,
    prox_quant,
    regularizers,
    relaxations,
    schedules,
    stam,
    stam_proximal,
    straight_through,
    three_block_splitting,
)
from tests.home_made import home_made

STEPS = 400
HARD_FROM = 300
Optimizer = optax.GradientTransformation | None
Method = Callable[..., optax.GradientTransformationExtraArgs]


def inertial(optimizer: Optimizer = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return stam(optimizer, hard_from=HARD_FROM, **settings)


def blended(
    optimizer: Optimizer = None, *, hard_from: Any, inertia: Any, quantizer: Any = Binary()
) -> optax.GradientTransformationExtraArgs:
    """`stam` with an inertia that is a number or a schedule."""
    blend = relaxations.LinearBlend(schedules.linear_to_hard(hard_from))
    return three_block_splitting(optimizer, quantizer=quantizer, relaxation=blend, inertia=inertia)


def proximal(optimizer: Optimizer = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    """`stam_proximal` multiplies by minus its learning rate, which the optimizer's step has in it already."""
    growing = schedules.geometric(5e-5, growth=2.0, every=STEPS // 16)
    rho = lambda count: jnp.where(count >= HARD_FROM, math.inf, growing(count))
    before = optax.scale(-1.0) if optimizer is None else optax.chain(optimizer, optax.scale(-1.0))
    return optax.chain(before, stam_proximal(1.0, rho, **settings))


def general(optimizer: Optimizer = None, quantizer: Any = Binary()) -> optax.GradientTransformationExtraArgs:
    """Whatever the other configurations leave out: everything found first, a ridge, a schedule of inertia."""
    return three_block_splitting(
        optimizer,
        quantizer=quantizer,
        relaxation=relaxations.LinearBlend(schedules.linear_to_hard(HARD_FROM)),
        inertia=optax.linear_schedule(1.0, 0.9, STEPS),
        project="first",
        regularizer=regularizers.Ridge(1e-3),
        regularizer_strength=0.1,
    )


def relaxed(optimizer: Optimizer = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return binary_relax(optimizer, growth_every=4, hard_from=HARD_FROM, **settings)


def shrunk(optimizer: Optimizer = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return prox_quant(optimizer, threshold=lambda count: 5e-4 * count, hard_from=HARD_FROM, **settings)


def piecewise(optimizer: Optimizer = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return parq(optimizer, hard_from=HARD_FROM, **settings)


def mirrored(optimizer: Optimizer = None, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return md_tanh(optimizer, growth=1.2, growth_every=20, hard_from=HARD_FROM, **settings)


def plain_estimator(
    optimizer: optax.GradientTransformation, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    return straight_through(optimizer, clip=math.inf, **settings)


def multiplied(
    optimizer: optax.GradientTransformation, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    return admm_quant(optimizer, penalty=1.0, dual_every=5, hard_from=HARD_FROM, **settings)


def flipped(
    optimizer: optax.GradientTransformation, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    return bop(optimizer, adaptivity=0.05, threshold=0.3, **settings)


METHODS: dict[str, Method] = {
    "stam": inertial,
    "stam_proximal": proximal,
    "three_block_splitting": general,
    "binary_connect": binary_connect,
    "binary_relax": relaxed,
    "prox_quant": shrunk,
    "parq": piecewise,
    "md_tanh": mirrored,
    "straight_through": plain_estimator,
    "straight_through_clipped": straight_through,
    "admm_quant": multiplied,
    "bop": flipped,
    "home_made": home_made,
}
AROUND_ONLY = ("straight_through", "straight_through_clipped", "admm_quant", "bop")
CHAINED: dict[str, Method] = {name: method for name, method in METHODS.items() if name not in AROUND_ONLY}
