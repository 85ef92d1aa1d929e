"""Numbers that may be schedules: checked when given, resolved when used."""

import math
import numbers
from typing import Any

import jax
import numpy as np
import optax

ScalarOrSchedule = optax.ScalarOrSchedule


def check(
    where: str,
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    finite: bool = False,
) -> None:
    """Raise unless `value` is a schedule, a traced or device scalar, or a number in [low, high].

    Values of schedules and of traced scalars are not known here; they are the caller's to keep in range.
    """
    bound = f"[{low:g}, {'inf' if math.isinf(high) else format(high, 'g')}{')' if finite else ']'}"
    expected = f"a number in {bound} or a schedule (step count -> number)"
    if callable(value):
        return
    if isinstance(value, jax.Array):
        if value.ndim:
            raise ValueError(f"{where}: {name} must be {expected}; got an array of shape {value.shape}.")
        return
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.ndarray)):
        raise TypeError(f"{where}: {name} must be {expected}; got {value!r}.")
    if np.ndim(value):
        raise ValueError(f"{where}: {name} must be {expected}; got an array of shape {np.shape(value)}.")
    number = float(value)
    if not low <= number <= high or (finite and math.isinf(number)):
        raise ValueError(f"{where}: {name} must be {expected}; got {number!r}.")


def at(value: Any, count: jax.typing.ArrayLike) -> Any:
    """The value of a number or schedule at a step count."""
    return value(count) if callable(value) else value
