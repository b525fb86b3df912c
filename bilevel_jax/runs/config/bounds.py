"""Bounds of config values, written next to their keys"""

import math
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen


@dataclass(frozen=True)
class Special:
    """A value with a meaning of its own; it is allowed even where the bounds exclude it."""

    value: float
    meaning: str


@dataclass(frozen=True)
class Because:
    """The reason for a bound or the remedy, added to the error message."""

    text: str


@dataclass(frozen=True)
class Unique:
    """No item of a tuple occurs twice."""


@dataclass(frozen=True)
class Required:
    """A text or tuple that must not be empty; `text` says what to give."""

    text: str


def violation(annotation: Any, value: Any) -> str | None:
    """What the bounds in an annotation demand, where a value does not satisfy them; else None.

    Args:
        annotation: the type of a config key, with its bounds: `Annotated[int, Ge(0), Special(0, "no limit")]`.
        value: the value of that key, of that type.

    Returns:
        The end of an error message, as "must be 0 (no limit) or more", or None.
    """
    base, bounds = _split_annotation(annotation)
    for bound in bounds:
        if isinstance(bound, Required) and not value:
            return bound.text
    if get_origin(base) is tuple:
        return _tuple_violation(base, bounds, value)
    if not isinstance(value, int | float) or any(isinstance(b, Special) and value == b.value for b in bounds):
        return None
    low, low_open, high, high_open = _limits(bounds)
    inside = (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    return None if inside else f"must be {_describe_limits(bounds)}{_reason(bounds)}"


def _tuple_violation(base: Any, bounds: tuple, values: tuple) -> str | None:
    item_type = get_args(base)[0]
    item_bounds = _split_annotation(item_type)[1]
    enough = all(len(values) >= bound.min_length for bound in bounds if isinstance(bound, MinLen))
    unique = len(set(values)) == len(values) or not any(isinstance(bound, Unique) for bound in bounds)
    if enough and unique and not any(violation(item_type, item) for item in values):
        return None
    demands = ["once"] if any(isinstance(bound, Unique) for bound in bounds) else []
    demands += [_describe_limits(item_bounds)] if item_bounds else []
    start = "name at least one" if any(isinstance(bound, MinLen) for bound in bounds) else ""
    each = f"each {' and '.join(demands)}" if demands else ""
    text = f"{start}, {each}" if start and each else start or ("name " + each if demands[:1] == ["once"] else each)
    return text + _reason(bounds)


def _split_annotation(annotation: Any) -> tuple[Any, tuple]:
    if hasattr(annotation, "__metadata__"):
        return get_args(annotation)[0], annotation.__metadata__
    return annotation, ()


def _limits(bounds: tuple) -> tuple[float, bool, float, bool]:
    """The lower limit, whether it is excluded, the upper limit, whether it is excluded."""
    low: Any = -math.inf
    high: Any = math.inf
    low_open = high_open = False
    for bound in bounds:
        if isinstance(bound, Gt | Interval) and bound.gt is not None:
            low, low_open = bound.gt, True
        if isinstance(bound, Ge | Interval) and bound.ge is not None:
            low, low_open = bound.ge, False
        if isinstance(bound, Lt | Interval) and bound.lt is not None:
            high, high_open = bound.lt, True
        if isinstance(bound, Le | Interval) and bound.le is not None:
            high, high_open = bound.le, False
    return low, low_open, high, high_open


def _describe_limits(bounds: tuple) -> str:
    low, low_open, high, high_open = _limits(bounds)
    specials = [bound for bound in bounds if isinstance(bound, Special)]
    meaning = "".join(f" ({special.meaning})" for special in specials if special.value == low)
    others = [f"{special.value:g} ({special.meaning})" for special in specials if special.value != low]
    if math.isfinite(high):
        limits = f"in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}{meaning}"
    else:
        limits = f"above {low:g}" if low_open else f"{low:g}{meaning} or more"
    return ", or ".join([*others, limits])


def _reason(bounds: tuple) -> str:
    return "".join(f": {bound.text}" for bound in bounds if isinstance(bound, Because))
