"""The coefficients of a rater, as a picture and a table."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Column, Table, bold_cell, make_table

MAX_COEFFICIENTS = 24
"""Coefficients in the picture: those of the largest size."""


Intervals = dict[str, Any]
"""What the intervals of the coefficients are over, and of how many, as `raters.coefficient_intervals` says."""
OLD_INTERVALS: Intervals = {"over": "steps", "count": None}
"""Of a rater whose document says nothing of them."""


def describe_rater(
    coefficients: Sequence[dict[str, Any]] | None, intervals: Intervals | None = None
) -> dict[str, Any] | None:
    """The values of the template `rater.html`; None of a run without a rater."""
    if coefficients is None:
        return None
    intervals = intervals or OLD_INTERVALS
    return {
        "picture": plot_coefficients(coefficients),
        "bars": describe_bars(coefficients, intervals),
        "limits": INTERVAL_LIMITS[intervals["over"]],
        "table": coefficients_table(coefficients, intervals),
    }


INTERVAL_WORDS = {
    "folds": "Bars: 95 % intervals over validation sets, from {count} loops that each lack a fold of it.",
    "steps": "Bars: 95 % intervals over the outer steps.",
    "none": "No intervals: over fewer than 4 outer steps they say nothing. Set rater.folds to 5 or more.",
}
INTERVAL_LIMITS = {
    "folds": "The intervals are over validation sets (delete-a-group jackknife); all loops share the training "
    "examples, the data orders and the models that make features.",
    "steps": "The intervals are over the data orders of the outer steps and know nothing of other validation examples; "
    "with rater.folds they are over validation sets.",
    "none": "With rater.folds the coefficients have intervals over validation sets.",
}


def describe_bars(coefficients: Sequence[dict[str, Any]], intervals: Intervals) -> str:
    """What the bars of the picture are, in words."""
    count = intervals["count"]
    if not count and intervals["over"] == "none":
        return "No intervals: these are the coefficients before the first outer step."
    words = INTERVAL_WORDS[intervals["over"]].format(count=count)
    shown, (low, high) = _by_size(coefficients)[:MAX_COEFFICIENTS], _axis_ends(coefficients)
    is_cut = any(ends[0] < low or ends[1] > high for ends in map(_ends, shown))
    return words + " Arrows: the interval goes on beyond the picture; the table has it." * is_cut


def plot_coefficients(coefficients: Sequence[dict[str, Any]]) -> Markup:
    """The largest coefficients with their intervals and the line at 0, the largest first.

    The coefficients set the axis: an interval is cut where it is farther off all of them than the largest is from 0.
    """
    return figures.plot_intervals(
        [IntervalRow(one["name"], one["value"], *_ends(one)) for one in _by_size(coefficients)[:MAX_COEFFICIENTS]],
        "change of the logit per deviation of the feature",
        reference=0.0,
        ends=_axis_ends(coefficients),
    )


def _axis_ends(coefficients: Sequence[dict[str, Any]]) -> tuple[float, float]:
    values = [0.0, *(one["value"] for one in coefficients)]
    size = max(map(abs, values)) or math.inf
    return min(values) - size, max(values) + size


def coefficients_table(coefficients: Sequence[dict[str, Any]], intervals: Intervals) -> Table:
    """All coefficients with their signs in words."""
    ordered = _by_size(coefficients)
    over = {"folds": "95 % over validation sets", "steps": "95 % over the outer steps", "none": "95 %"}
    return make_table(
        Column("feature", [bold_cell(one["name"]) for one in ordered]),
        Column("coefficient", [one["value"] for one in ordered], "logit per deviation"),
        Column("±", [one["half_width"] for one in ordered], over[intervals["over"]]),
        Column("more of it means", [_sign_words(one) for one in ordered]),
    )


def _by_size(coefficients: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(coefficients, key=lambda one: -abs(one["value"]))


def _ends(one: dict[str, Any]) -> tuple[float, float]:
    half = one["half_width"]
    return (math.nan, math.nan) if half is None else (one["value"] - half, one["value"] + half)


def _sign_words(one: dict[str, Any]) -> str:
    value, half = one["value"], one["half_width"]
    words = "more weight" if value > 0 else "less weight" if value < 0 else "nothing"
    return words if half is None or abs(value) > half or not value else f"{words}; the interval holds 0"
