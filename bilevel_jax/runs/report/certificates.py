"""Report section on certificates, their thresholds and verdicts."""

import math
from typing import Any, NamedTuple

from markupsafe import Markup

from bilevel_jax.core import certify
from bilevel_jax.core.certify import verdict
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
                "by the thresholds, from all numbers together; the run's verdict is the one at uniform weights",
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
    (
        "product_error",
        "at most .05; above .1: do not believe",
        "share of the hypergradient's norm that products below the highest precision change (outer.product_precision)",
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
    tolerated, limit = ((1 - width, 1 + width) for width in (verdict.RATIO_TOLERANCE, verdict.RATIO_LIMIT))
    judged = min((size for size in _sizes(exact, "steps") if size >= verdict.SMALL), default=None)
    for size in _sizes(exact, "steps"):
        ratios = [_value_at(one, "steps", "ratios", size) for one in exact]
        words = (
            f"actual over predicted change of validation loss when each weight moves by {size:g} along sign(gradient)"
        )
        if size == judged:
            threshold = f"{_range(tolerated)}; outside {_range(limit)}: do not believe"
            checks.append(_judge(f"exact, step {size:g}", ratios, threshold, words, tolerated, limit))
        elif size < verdict.SMALL:
            checks.append(_judge(f"exact, step {size:g}", ratios, f"{_range(limit)}", words, limit, limit))
        else:
            large = (1 - verdict.RATIO_LARGE, 1 + verdict.RATIO_LARGE)
            threshold = f"{_range(large)}, for {verdict.LARGE_CHANGES}"
            checks.append(_judge(f"exact, step {size:g}", ratios, threshold, words, large, large))
    smooth = [one["smooth"] for one in places]
    for share in _sizes(smooth, "removed") or certify.REMOVED:
        is_large = share >= verdict.LARGE
        wanted, least = verdict.SMOOTH_LARGE if is_large else verdict.SMOOTH_SMALL, verdict.SMOOTH_LIMIT
        threshold = f"{_short(wanted)} or more, for {verdict.LARGE_CHANGES if is_large else verdict.SMALL_CHANGES}"
        if share <= verdict.NEAR_SMALL:
            threshold += f", {_short(verdict.SMOOTH_UNEVEN)} at uneven weights"
            threshold += f"; below {_short(least)}: do not believe"
        checks.append(
            _judge(
                f"smooth without {share:.0%}",
                [_value_at(one, "removed", "cosines", share) for one in smooth],
                threshold,
                "metasmoothness: cosine of weight times hypergradient, centred, with those without a random "
                f"{share:.0%} of the examples, over those that stay; the mean of several draws",
                (wanted, math.inf),
                (least, math.inf),
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
        good = (verdict.RANK_WANTED, math.inf) if key == "rank" else verdict.SLOPE_RANGE
        fair = (verdict.RANK_LIMIT, math.inf) if key == "rank" else (0.0, math.inf)
        threshold = f"{_short(good[0])} or more" if key == "rank" else _range(good)
        checks.append(_judge(f"predictive {key}", values, threshold, words, good, fair))
    checks.append(
        _judge(
            "reliability",
            [one["reliability"]["value"] if one.get("reliability") else None for one in places],
            f"{_short(verdict.RELIABILITY_WANTED)} or more, to speak for other examples; below "
            f"{_short(verdict.RELIABILITY_LIMIT)}: mostly noise",
            "about the correlation of weight times hypergradient with those by an endless validation set",
            (verdict.RELIABILITY_WANTED, math.inf),
            (verdict.RELIABILITY_LIMIT, math.inf),
        )
    )
    checks.append(
        _judge(
            "effective share",
            [one.get("effective_share") for one in places],
            f"{_short(verdict.SHARE_SMALL)} or more, for {verdict.SMALL_CHANGES}; {_short(verdict.SHARE_LARGE)}, for "
            f"{verdict.LARGE_CHANGES}; retrains speak for any",
            "effective sample size of the weights over the number of examples",
            (verdict.SHARE_LARGE, math.inf),
            (verdict.SHARE_SMALL, math.inf),
        )
    )
    replayed = [("yes" if one["replayed"] else "no") if has_backward_pass else None for one in estimator_checks]
    states = [{"yes": "good", "no": "bad"}.get(value or "", "") for value in replayed]
    words = "every replayed segment of training ended bit for bit where training did"
    if "no" in replayed:  # an embedding's gradient may be summed in any order there
        words += "; on a GPU XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true asks for one order of sums"
    checks.append(CheckRow("replayed", replayed, "yes", words, states))
    residual, curvature = (-math.inf, 0.1), (math.ulp(0.0), math.inf)
    bounds_by_check = {
        "residual": (residual, residual),
        "curvature": (curvature, curvature),
        "product_error": ((-math.inf, verdict.PRODUCT_TOLERANCE), (-math.inf, verdict.PRODUCT_LIMIT)),
    }
    for key, threshold, words in ESTIMATOR_CHECKS:
        bounds = bounds_by_check.get(key, (UNBOUNDED, UNBOUNDED))
        values = [one.get(key) for one in estimator_checks]  # earlier runs lack some
        checks.append(_judge(key, values, threshold, words.format(unit=run.unit), *bounds))
    return checks


def _sizes(measured: list[dict[str, Any] | None], key: str) -> list[float]:
    """The sizes at which any of the places was measured, largest first."""
    return sorted({size for one in measured if one for size in one[key]}, reverse=True)


def _value_at(measured: dict[str, Any] | None, sizes: str, values: str, size: float) -> float | None:
    """What was measured at a size; None where it was not."""
    return dict(zip(measured[sizes], measured[values], strict=True)).get(size) if measured else None


def _range(bounds: tuple[float, float]) -> str:
    return f"{_short(bounds[0])} to {_short(bounds[1])}"


def _short(threshold: float) -> str:
    return f"{threshold:.3g}".removeprefix("0")


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


def _verdict_badge(judged: dict[str, Any]) -> Cell:
    kind, icon = VERDICT_STYLES[judged["level"]]
    scope = f", {judged['scope']}" if judged["scope"] else ""
    others = f"; for other examples {judged['others_level']}"
    return Cell(f"{icon} {judged['level']}{scope}{others}", "span", f"badge {kind}")
