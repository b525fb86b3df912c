"""The certificates in a report: what was checked, against which threshold, in plain words."""

import math
from typing import Any, NamedTuple

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Html, Series, html_element, join_html
from bilevel_jax.runs.report.html import Column, html_figure, html_note, html_paragraph, html_table
from bilevel_jax.runs.report.numbers import MISSING, format_number
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


def render_certificates(run: RunResults) -> Html:
    """What was checked at each place, against which threshold, in plain words."""
    places = run.result["certificates"]
    if not places:
        return html_paragraph(
            "This method moves the weights together with the parameters, by first-order steps. It has no "
            "hypergradient, so there is nothing to certify: judge it by what retraining with its weights measured, "
            "beside the same comparison under outer.method: unrolled."
        )
    method_note = (
        ""
        if run.config["outer"]["method"] == "unrolled"
        else " The retrains measure the training run that really happens, so a ratio off 1 also tells how far this "
        "method's estimate is from it."
    )
    computed = any(certificate["exact"] or certificate["smooth"] is not None for certificate in places.values())
    all_checks = _check_rows(run)
    checks = [check for check in all_checks if any(value is not None for value in check.values)]
    absent = [check.name for check in all_checks if check not in checks]
    cells = [
        [_check_cell(check.values[index], check.states[index]) for check in checks] for index in range(len(places))
    ]
    verdicts = [run.result["verdicts"][name] for name in places]
    heads = [join_html(html_element("b", "verdict")), *(join_html(html_element("b", check.name)) for check in checks)]
    columns = [
        Column("check", heads),
        *(
            Column(f"at {name}", [_verdict_badge(verdict), *cells[index]])
            for index, (name, verdict) in enumerate(zip(places, verdicts, strict=True))
        ),
        Column("wanted", ["BELIEVE", *(check.threshold for check in checks)]),
        Column(
            "in plain words",
            [
                "by the thresholds; the run's verdict is that at uniform weights",
                *(check.explanation for check in checks),
            ],
        ),
    ]
    curves = [
        Series(
            name,
            certificate["exact"]["steps"],
            [float_or_nan(ratio) for ratio in certificate["exact"]["ratios"]],
            index,
        )
        for index, (name, certificate) in enumerate(places.items())
        if certificate["exact"] and any(ratio is not None for ratio in certificate["exact"]["ratios"])
    ]
    picture = None
    if curves:
        picture = html_figure(
            figures.plot_lines(
                curves,
                "change of every weight",
                "actual / predicted change of L_v",
                bands=[(0.95, 1.05), (0.9, 1.1)],
                log_x=True,
                y_values_shown=[0.88, 1.12],
            ),
            "Shaded: [.95, 1.05], and lighter [.9, 1.1]. On the right the changes are large and training may bend "
            "away from its slope; on the left they are small, and a ratio off 1 there is rounding or an estimate of "
            "something else.",
        )
    return join_html(
        html_paragraph(
            "An exact gradient can still be useless where training is chaotic. So it was checked by training again "
            "with changed weights, and by estimating it again without some rows. The thresholds come from ten "
            "calibrated settings of small "
            "language models, not from a theorem." + method_note
        ),
        html_note(
            "The certificates were not computed (--fast, or certify.enabled: false); below: the estimate's own.",
            "warning",
        )
        if not computed
        else None,
        html_note(_single_place_note(run)) if computed and len(places) == 1 else None,
        html_table(*columns, css_class="checks"),
        html_note(
            "✓ in the wanted range, ~ between the bars, ✕ beyond the outer one. "
            + (f"Without a number in this run: {', '.join(absent)}. " if absent else "")
            + "Residual, curvature, gap, sample, and batches belong to a linear solve (outer.method: implicit), growth "
            "and replayed to a reverse sweep (unrolled, window), predictive to runs with certify.retrains above 0. "
            f"{MISSING}: does not apply at this place, or was not finite."
        ),
        picture,
    )


UNBOUNDED = (-math.inf, math.inf)


ESTIMATOR_CHECKS = (
    (
        "growth",
        "any; not judged",
        "largest norm of the adjoint over its norm at the end: how strongly early steps matter",
    ),
    ("residual", "at most .1", "what the linear solve left unsolved, relative to its right-hand side"),
    ("curvature", "above 0", "least curvature that the solve met; at or below 0 there is no minimum to differentiate"),
    (
        "gap",
        "near 0; not judged",
        "{unit} of L_v that finishing the inner training would still change, to first order",
    ),
    ("sample", "above .95; not judged", "cosine of the solutions on half and on all of the curvature batches"),
    ("steps", "", "training steps swept, or products of the linear solve"),
    ("batches", "", "curvature batches of the linear solve"),
)
"""The checks that every estimate makes of itself: (field, what is wanted, in plain words)."""


def _check_rows(run: RunResults) -> list[CheckRow]:
    places = list(run.result["certificates"].values())
    exact, predicted = [one["exact"] for one in places], [one["predictive"] for one in places]
    estimator_checks = [one["checks"] for one in places]
    has_backward_pass = run.config["outer"]["method"] in ("unrolled", "window")
    checks = []
    for index, size in enumerate(next((one["steps"] for one in exact if one), [])):
        ratios = [one["ratios"][index] if one else None for one in exact]
        words = f"actual over predicted change of L_v when each weight moves by {size:g} along sign(gradient)"
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
            "cosine between the gradient and the gradient without a random fifth of the rows",
            (0.7, math.inf),
            (0.5, math.inf),
        )
    )
    left_out_words = next(
        (f" when a random {one['fraction']:.0%} of the rows is left out" for one in predicted if one), ""
    )
    for key, words in (("rank", "rank correlation of predicted and actual"), ("slope", "actual per predicted")):
        values = [one[key] if one else None for one in predicted]
        words = f"{words} changes of L_v{left_out_words}" + (
            "; with 8 trainings its error is about .35" if key == "rank" else ""
        )
        checks.append(_judge(f"predictive {key}", values, "near 1; not judged", words))
    replayed = [("yes" if one["replayed"] else "no") if has_backward_pass else None for one in estimator_checks]
    states = [{"yes": "good", "no": "bad"}.get(value or "", "") for value in replayed]
    words = "every replayed piece of training ended bit for bit where training did"
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
    """A check with its state at each place; one that is wanted anyhow has none."""

    def state(value: float | None) -> str:
        if value is None or good == UNBOUNDED:
            return ""
        return "good" if good[0] <= value <= good[1] else "fair" if fair[0] <= value <= fair[1] else "bad"

    return CheckRow(name, values, threshold, explanation, [state(value) for value in values])


def _check_cell(value: Any, state: str) -> Html:
    text = value if isinstance(value, str) else format_number(value)
    words = {"good": "✓", "fair": "~", "bad": "✕"}
    return html_element("span", text, f" {words[state]}" if state else None, class_=f"figure {state}".strip())


def _verdict_badge(verdict: dict[str, Any]) -> Html:
    kind, icon = VERDICT_STYLES[verdict["level"]]
    scope = f", {verdict['scope']}" if verdict["scope"] else ""
    return html_element("span", f"{icon} {verdict['level']}{scope}", class_=f"badge {kind}")


def _single_place_note(run: RunResults) -> str:
    if run.config["outer"]["restart"] != "cold":
        return "Only the gradient at uniform weights was checked: a later warm restart cannot be repeated alone."
    return "Only the gradient at uniform weights was checked: the weights written are the uniform ones, of step 0."
