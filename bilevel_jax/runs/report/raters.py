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


def describe_rater(coefficients: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    """The values of the template `rater.html`; None of a run without a rater."""
    if coefficients is None:
        return None
    return {"picture": plot_coefficients(coefficients), "table": coefficients_table(coefficients)}


def plot_coefficients(coefficients: Sequence[dict[str, Any]]) -> Markup:
    """The largest coefficients with their intervals and the line at 0, the largest first."""
    return figures.plot_intervals(
        [IntervalRow(one["name"], one["value"], *_ends(one)) for one in _by_size(coefficients)[:MAX_COEFFICIENTS]],
        "change of the logit per deviation of the feature",
        reference=0.0,
    )


def coefficients_table(coefficients: Sequence[dict[str, Any]]) -> Table:
    """All coefficients with their signs in words."""
    ordered = _by_size(coefficients)
    return make_table(
        Column("feature", [bold_cell(one["name"]) for one in ordered]),
        Column("coefficient", [one["value"] for one in ordered], "logit per deviation"),
        Column("±", [one["half_width"] for one in ordered], "95 % over the outer steps"),
        Column("more of it means", [_sign_words(one["value"]) for one in ordered]),
    )


def _by_size(coefficients: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(coefficients, key=lambda one: -abs(one["value"]))


def _ends(one: dict[str, Any]) -> tuple[float, float]:
    half = one["half_width"]
    return (math.nan, math.nan) if half is None else (one["value"] - half, one["value"] + half)


def _sign_words(value: float) -> str:
    return "more weight" if value > 0 else "less weight" if value < 0 else "nothing"
