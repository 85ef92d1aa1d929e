"""A method that the library does not know: a quantizer and a relaxation of one's own, and their use."""

import dataclasses

import jax.numpy as jnp
import optax

from stam_jax import schedules, three_block_splitting


class Shifts:
    def scales(self, w):
        return jnp.exp2(jnp.round(jnp.log2(jnp.mean(jnp.abs(w), keepdims=True, dtype=jnp.float32))))

    def levels(self, scales):
        return -scales, scales


@dataclasses.dataclass(frozen=True)
class Cubic:
    theta: optax.Schedule

    def at(self, count):
        share = self.theta(count) ** 3
        return lambda w, y, levels: (1 - share) * w + share * y


def home_made(optimizer=None, quantizer=Shifts()):  # noqa: B008
    relaxation = Cubic(schedules.linear_to_hard(300))
    return three_block_splitting(optimizer, quantizer=quantizer, relaxation=relaxation, inertia=0.99)
