"""Which weights of an array share one scale."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Scale = Literal["tensor", "channel", "group"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """A division of an array into groups that share one scale each; what the quantisers have in common.

    Args:
        scale: which weights share a scale; see `stam_jax.Binary`.
        axis: the output-channel axis.
        group: how many neighbours along the input axis share a scale where `scale="group"`.
    """

    scale: Scale = "channel"
    axis: int = -1
    group: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        if self.scale not in ("tensor", "channel", "group", None):
            raise ValueError(
                f"{name}: scale must be 'tensor', 'channel', 'group' or None; got {self.scale!r}."
            )
        if (self.scale == "group") != (self.group is not None):
            raise ValueError(
                f"{name}: scale='group' and group go together; "
                f"got scale={self.scale!r} and group={self.group!r}."
            )
        if self.group is not None and self.group < 1:
            raise ValueError(f"{name}: group must be at least 1 weight; got {self.group!r}.")
        if self.scale == "group" and self.axis not in (-1, 0):
            raise ValueError(
                f"{name}: scale='group' knows the input axis of kernels whose output axis is -1 or 0 "
                f"(-2 and 1); got axis={self.axis!r}."
            )

    def _split(self, v: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """The array, its input axis split into groups where asked, and the axes that share a scale."""
        if self.scale in ("tensor", None):
            return v, tuple(range(v.ndim))
        if v.ndim < 2 or not -v.ndim <= self.axis < v.ndim:
            raise ValueError(
                f"{type(self).__name__}(scale={self.scale!r}, axis={self.axis}) needs an array of rank 2 or "
                f"more with that axis; got shape {v.shape}. Use scale='tensor', or leave the array out of "
                "the mask."
            )
        if self.scale == "channel":
            return v, tuple(i for i in range(v.ndim) if i != self.axis % v.ndim)
        at = v.ndim - 2 if self.axis == -1 else 1
        inputs, size = v.shape[at], min(self.group or 1, max(v.shape[at], 1))
        if inputs % size:
            raise ValueError(
                f"{type(self).__name__}(scale='group', group={self.group}) cannot divide the {inputs} inputs "
                f"of an array of shape {v.shape}."
            )
        u = v.reshape(*v.shape[:at], inputs // size, size, *v.shape[at + 1 :])
        return u, (at + 1,)

    def by_group(self, v: jax.Array) -> jax.Array:
        """The array as groups by weights, [groups, weights]."""
        u, axes = self._split(v)
        return merged(u, axes)[0]


def merged(u: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """The array as groups by weights, [groups, weights], and the shape of one number per group in it."""
    kept = tuple(i for i in range(u.ndim) if i not in axes)
    count = 1
    for i in kept:
        count *= u.shape[i]
    keepdims = tuple(1 if i in axes else n for i, n in enumerate(u.shape))
    return jnp.transpose(u, (*kept, *axes)).reshape(count, -1 if count else 0), keepdims
