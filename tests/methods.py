"""Every method, each at settings that suit a run of 400 steps: what the batteries run through."""

from collections.abc import Callable
from typing import Any

import optax

from stam_jax import (
    LinearBlend,
    admm_quant,
    binary_connect,
    binary_relax,
    bop,
    md_tanh,
    parq,
    prox_quant,
    schedules,
    stam,
    straight_through,
)
from tests.home_made import home_made

STEPS = 400
HARD_FROM = 300
Method = Callable[..., optax.GradientTransformationExtraArgs]


def relaxed(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return binary_relax(learning_rate, growth_every=4, hard_from=HARD_FROM, **settings)


def shrunk(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return prox_quant(learning_rate, growth=0.01, hard_from=HARD_FROM, **settings)


def piecewise(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return parq(learning_rate, hard_from=HARD_FROM, **settings)


def mirrored(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return md_tanh(learning_rate, growth=1.2, growth_every=20, hard_from=HARD_FROM, **settings)


def plain_estimator(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return straight_through(learning_rate, clip=None, **settings)


def clipped_estimator(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return straight_through(learning_rate, **settings)


def multiplied(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return admm_quant(learning_rate, penalty=1.0, dual_every=5, hard_from=HARD_FROM, **settings)


def flipped(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    return bop(learning_rate, adaptivity=0.05, threshold=0.3, **settings)


def proximal(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    rho = schedules.geometric(1e-3, growth=2.0, every=STEPS // 16)
    return stam(learning_rate, penalty=rho, **settings)


def inertial(learning_rate: Any, **settings: Any) -> optax.GradientTransformationExtraArgs:
    blend = LinearBlend(schedules.linear_to_hard(HARD_FROM))
    return stam(learning_rate, relaxation=blend, inertia=0.99, **settings)


METHODS: dict[str, Method] = {
    "binary_connect": binary_connect,
    "binary_relax": relaxed,
    "prox_quant": shrunk,
    "parq": piecewise,
    "md_tanh": mirrored,
    "straight_through": plain_estimator,
    "straight_through_clipped": clipped_estimator,
    "admm_quant": multiplied,
    "bop": flipped,
    "proximal": proximal,
    "inertial": inertial,
    "default": stam,
    "home_made": home_made,
}
