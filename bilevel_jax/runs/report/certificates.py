"""Report section on certificates, their thresholds and verdicts."""

import math
from typing import Any, NamedTuple

from markupsafe import Markup

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Series
from bilevel_jax.runs.report.html import Cell, Column, bold_cell, make_table
from bilevel_jax.runs.report.numbers import format_number
from bilevel_jax.runs.report.results import RunResults, float_or_nan

VERDICT_STYLES = {"BELIEVE": ("good", "✓"), "UNDECIDED": ("fair", "?"), "DO NOT BELIEVE": ("bad", "✕")}


class CheckRow(NamedTuple):
    """One line of the table of certificates."""

    name: str
    values: list[Any]
    """A number, text or None for each place."""
    threshold: str
    explanation: str
    states: list[str]
    """good, fair or bad for each place, or nothing."""


def describe_certificates(run: RunResults) -> dict[str, Any]:
    """The values of the template `certificates.html`: the checks at each place and the ratios."""
    places = run.result["certificates"]
    if not places:
        return {"places": 0}
    all_checks = _check_rows(run)
    checks = [check for check in all_checks if any(value is not None for value in check.values)]
    columns = [
        Column("check", [bold_cell("verdict"), *(bold_cell(check.name) for check in checks)]),
        *(
            Column(
                f"at {name}",
                [
                    _verdict_badge(run.result["verdicts"][name]),
                    *(_check_cell(check.values[index], check.states[index]) for check in checks),
                ],
            )
            for index, name in enumerate(places)
        ),
        Column("wanted", ["BELIEVE", *(check.threshold for check in checks)]),
        Column(
            "meaning",
            [
                "by the thresholds; the run's verdict is the one at uniform weights",
                *(check.explanation for check in checks),
            ],
        ),
    ]
    return {
        "places": len(places),
        "table": make_table(*columns, css_class="checks"),
        "picture": plot_ratios(run),
        "computed": any(place["exact"] or place["smooth"] is not None for place in places.values()),
        "unrolled": run.config["outer"]["method"] == "unrolled",
        "cold": run.config["outer"]["restart"] == "cold",
        "absent": [check.name for check in all_checks if check not in checks],
    }


def plot_ratios(run: RunResults) -> Markup | None:
    """Actual over predicted change of the validation loss by the size of the change; None without a ratio."""
    curves = [
        Series(
            name,
            certificate["exact"]["steps"],
            [float_or_nan(ratio) for ratio in certificate["exact"]["ratios"]],
            index,
        )
        for index, (name, certificate) in enumerate(run.result["certificates"].items())
        if certificate["exact"] and any(ratio is not None for ratio in certificate["exact"]["ratios"])
    ]
    if not curves:
        return None
    return figures.plot_lines(
        curves,
        "change of every weight",
        "actual / predicted change of validation loss",
        bands=[(0.95, 1.05), (0.9, 1.1)],
        log_x=True,
        x_ticks={step: f"{step:g}" for curve in curves for step in curve.x},
        y_values_shown=[0.88, 1.12],
    )


UNBOUNDED = (-math.inf, math.inf)
ESTIMATOR_CHECKS = (
    (
        "growth",
        "any; not judged",
        "largest norm of the adjoint over its norm at the end: how strongly early steps matter",
    ),
    ("residual", "at most .1", "what the linear solve left unsolved, relative to its right-hand side"),
    ("curvature", "above 0", "least curvature met by the solve; at or below 0 there is no minimum to differentiate"),
    (
        "gap",
        "near 0; not judged",
        "{unit} of validation loss that finishing the inner training would still change, to first order",
    ),
    ("sample", "above .95; not judged", "cosine of the solutions on half and on all of the curvature batches"),
    ("steps", "", "training steps of the backward pass, or products of the linear solve"),
    ("batches", "", "curvature batches of the linear solve"),
)
"""The checks that every estimator reports: (field, what is wanted, meaning)."""


def _check_rows(run: RunResults) -> list[CheckRow]:
    places = list(run.result["certificates"].values())
    exact, predicted = [one["exact"] for one in places], [one["predictive"] for one in places]
    estimator_checks = [one["checks"] for one in places]
    has_backward_pass = run.config["outer"]["method"] in ("unrolled", "window")
    checks = []
    for index, size in enumerate(next((one["steps"] for one in exact if one), [])):
        ratios = [one["ratios"][index] if one else None for one in exact]
        words = (
            f"actual over predicted change of validation loss when each weight moves by {size:g} along sign(gradient)"
        )
        if index == 0:  # the step that verdicts are made of
            threshold, good, fair = ".95 to 1.05; outside .9 to 1.1: do not believe", (0.95, 1.05), (0.9, 1.1)
            checks.append(_judge(f"exact, step {size:g}", ratios, threshold, words, good, fair))
        else:
            checks.append(_judge(f"exact, step {size:g}", ratios, "near 1; not judged", words))
    checks.append(
        _judge(
            "smooth",
            [one["smooth"] for one in places],
            ".7 or more, .9 for changes of half the data; below .5: do not believe",
            "metasmoothness: cosine between the hypergradient and the one without a random fifth of the examples",
            (0.7, math.inf),
            (0.5, math.inf),
        )
    )
    left_out_words = next(
        (f" when a random {one['fraction']:.0%} of the examples is left out" for one in predicted if one), ""
    )
    for key, words in (("rank", "rank correlation of predicted and actual"), ("slope", "actual per predicted")):
        values = [one[key] if one else None for one in predicted]
        words = f"{words} changes of validation loss{left_out_words}" + (
            "; with 8 retrains its error is about .35" if key == "rank" else ""
        )
        checks.append(_judge(f"predictive {key}", values, "near 1; not judged", words))
    replayed = [("yes" if one["replayed"] else "no") if has_backward_pass else None for one in estimator_checks]
    states = [{"yes": "good", "no": "bad"}.get(value or "", "") for value in replayed]
    words = "every replayed segment of training ended bit for bit where training did"
    checks.append(CheckRow("replayed", replayed, "yes", words, states))
    bounds_by_check = {"residual": (-math.inf, 0.1), "curvature": (math.ulp(0.0), math.inf)}
    for key, threshold, words in ESTIMATOR_CHECKS:
        bounds, values = bounds_by_check.get(key, UNBOUNDED), [one[key] for one in estimator_checks]
        checks.append(_judge(key, values, threshold, words.format(unit=run.unit), bounds, bounds))
    return checks


def _judge(
    name: str,
    values: list[float | None],
    threshold: str,
    explanation: str,
    good: tuple[float, float] = UNBOUNDED,
    fair: tuple[float, float] = UNBOUNDED,
) -> CheckRow:
    """A check with its state at each place; one without bounds has none."""

    def state(value: float | None) -> str:
        if value is None or good == UNBOUNDED:
            return ""
        return "good" if good[0] <= value <= good[1] else "fair" if fair[0] <= value <= fair[1] else "bad"

    return CheckRow(name, values, threshold, explanation, [state(value) for value in values])


def _check_cell(value: Any, state: str) -> Cell:
    text = value if isinstance(value, str) else format_number(value)
    icons = {"good": " ✓", "fair": " ~", "bad": " ✕"}
    return Cell(text + icons.get(state, ""), "span", f"figure {state}".strip())


def _verdict_badge(verdict: dict[str, Any]) -> Cell:
    kind, icon = VERDICT_STYLES[verdict["level"]]
    scope = f", {verdict['scope']}" if verdict["scope"] else ""
    return Cell(f"{icon} {verdict['level']}{scope}", "span", f"badge {kind}")
