"""Numbers, intervals and counts as text."""

import math
from typing import NamedTuple

import numpy as np

MISSING = "–"
"""Stands where there is no number."""


class MeanInterval(NamedTuple):
    """A mean over seeds with the half-width of its 95 % interval; nan where there is none."""

    mean: float
    half_width: float


class SignedNumber(float):
    """A number that is shown with its sign."""


def format_number(value: float | None, digits: int = 4) -> str:
    """Four significant digits, whole numbers in full, a true minus; – for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int | np.integer) or abs(value) >= 10 ** (digits - 1) - 0.5:
        text = f"{value:,.0f}"
    elif value == 0:
        text = "0"
    else:
        text = f"{value:#.{digits if abs(value) >= 1e-3 else 3}g}".removesuffix(".")
    return text.replace("-", "−")


def format_signed(value: float) -> str:
    """The number with its sign."""
    return format_number(value) if value <= 0 or not math.isfinite(value) else f"+{format_number(value)}"


def format_interval(value: MeanInterval) -> str:
    """The signed mean and its half-width, both to the same place after the point."""
    if math.isnan(value.half_width) or not 1e-3 <= value.half_width < 100:
        return format_signed(value.mean) + _format_half_width(value.half_width)
    half = format_number(value.half_width, 3)
    return f"{value.mean:+.{len(half.partition('.')[2])}f} ± {half}".replace("-", "−")


def _format_half_width(half: float) -> str:
    return "" if math.isnan(half) else f" ± {format_number(half, 3)}"


def capitalize_first(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def format_percent(share: float | None) -> str:
    """The share in per cent; – for what is missing."""
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def engineering_exponent(largest: float) -> int:
    """The power of ten, a multiple of three, that brings the largest number near 1."""
    return 0 if not largest > 0 else 3 * math.floor(math.log10(largest) / 3)


def format_power_of_ten(power: int) -> str:
    """The power of ten in words, as it stands before a unit."""
    return "" if power == 0 else f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))} "
