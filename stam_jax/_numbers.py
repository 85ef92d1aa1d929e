"""Numbers that may be schedules: checked when given, resolved when used."""

import math
import numbers
from typing import Any, cast

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
    schedule: bool = True,
) -> None:
    """Raise unless `value` is a schedule (where allowed), a traced scalar, or a number in [low, high].

    Values of schedules and of traced scalars are not known here; they are the caller's to keep in range.
    """
    bound = f"[{low:g}, {'inf' if math.isinf(high) else format(high, 'g')}{')' if finite else ']'}"
    expected = f"a number in {bound}" + (" or a schedule (step count -> number)" if schedule else "")
    if schedule and callable(value):
        return
    is_number = isinstance(value, (numbers.Real, np.ndarray, jax.Array))
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{where}: {name} must be {expected}; got {value!r}.")
    shape = np.shape(cast(Any, value))
    if shape:
        raise ValueError(f"{where}: {name} must be {expected}; got an array of shape {shape}.")
    if isinstance(value, jax.Array):
        return
    number = float(value)
    if not low <= number <= high or (finite and math.isinf(number)):
        raise ValueError(f"{where}: {name} must be {expected}; got {number!r}.")


def check_each(where: str, *options: tuple[str, Any, float]) -> None:
    """Raise unless each option, (name, value, least), is a finite number of at least that."""
    for name, value, low in options:
        check(where, name, value, low=low, finite=True, schedule=False)


def check_steps(where: str, *options: tuple[str, Any, int]) -> None:
    """Raise unless each option, (name, value, least), is a whole number of steps, of at least that."""
    check_each(where, *options)
    for name, value, _ in options:
        if not isinstance(value, jax.Array) and float(value) % 1:
            raise ValueError(f"{where}: {name} must be a whole number of steps; got {value!r}.")


def check_whole(where: str, name: str, value: Any, *, low: int = 1, high: float = math.inf) -> None:
    """Raise unless `value` is an integer in [low, high]."""
    expected = f"an integer of at least {low}" if math.isinf(high) else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{where}: {name} must be {expected}; got {value!r}.")
    if not low <= int(value) <= high:
        raise ValueError(f"{where}: {name} must be {expected}; got {value!r}.")


def is_fixed_at(value: Any, number: float) -> bool:
    """Whether a value is known to be that number before anything is traced."""
    return isinstance(value, numbers.Real) and float(value) == number


def at(value: Any, count: jax.typing.ArrayLike) -> Any:
    """The value of a number or schedule at a step count."""
    return value(count) if callable(value) else value


def check_has(where: str, name: str, value: Any, *members: str) -> None:
    """Raise unless the value is an object (not a class) with the members."""
    if isinstance(value, type) or not all(hasattr(value, member) for member in members):
        raise TypeError(f"{where}: {name} must be an object with {', '.join(members)}; got {value!r}.")
