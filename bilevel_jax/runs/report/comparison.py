"""The comparison in a report: models trained again from cold with each choice of rows and weights."""

import math
from collections.abc import Sequence
from typing import Any

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Html, IntervalRow, html_element, join_html
from bilevel_jax.runs.report.html import Column, html_details, html_figure, html_note, html_paragraph, html_table
from bilevel_jax.runs.report.numbers import MISSING, MeanInterval, format_count, format_interval
from bilevel_jax.runs.report.results import PART_LABELS, RunResults, float_or_nan, most_independent_part
from bilevel_jax.runs.stats import mean_interval


def render_comparison(run: RunResults) -> Html:
    """Every arm, trained from cold under every seed."""
    rows = run.result["compare"]
    if not rows:
        return html_note(
            "Skipped: this run compared nothing (--fast, or retrain.enabled: false), so it holds no headline number "
            "and no evidence that the weights help. Run again without --fast to get one.",
            "warning",
        )
    rows = sorted(rows, key=lambda row: row["name"] != "oracle")  # first: does knowing the truth help at all?
    part = most_independent_part(run)
    parts = [one for one in PART_LABELS if any(one in row["mean"] for row in rows)]
    differences = [difference_from_uniform(run, row["name"], part) for row in rows]
    names = [
        join_html(
            html_element("b", row["name"]),
            html_element("span", "knows the labels", class_="tag") if row["name"] == "oracle" else None,
            html_element("span", row["meaning"], class_="sub"),
        )
        for row in rows
    ]
    summary_table = html_table(
        Column("trained on", names),
        *(
            Column(PART_LABELS[one], [variant_interval(row, one) for row in rows], f"L_v, {run.unit}")
            for one in reversed(parts)
        ),
        Column(
            f"{PART_LABELS[part]} less uniform's",
            [_format_difference(one) for one in differences],
            f"paired by seed, {run.unit}",
            "tight",
        ),
        Column(
            run.result["right"],
            [variant_interval(row, "accuracy") for row in rows],
            f"{run.accuracy_unit}, {PART_LABELS[part]}",
        ),
        Column("rows", [row["rows"] for row in rows]),
        Column("steps", [row["steps"] for row in rows]),
        Column("epochs", [row["epochs"] for row in rows]),
        row_classes={
            index: {"learned weights": "strong", "oracle": "oracle"}[row["name"]]
            for index, row in enumerate(rows)
            if row["name"] in ("learned weights", "oracle")
        },
    )
    trainings = [one for row in rows for one in row["runs"]]
    seeds_table = html_table(
        Column("trained on", [row["name"] for row in rows for _ in row["runs"]]),
        Column("seed", [seed for row in rows for seed, _ in enumerate(row["runs"])]),
        *(Column(PART_LABELS[one], [each[one] for each in trainings], f"L_v, {run.unit}") for one in reversed(parts)),
        Column(run.result["right"], [each["accuracy"] for each in trainings], run.accuracy_unit),
    )
    second_part = "validation" if part != "validation" else ""
    caption = f"Filled: {PART_LABELS[part]}, mean and 95 % interval; small dots below: single seeds. Dashed line: uniform weights."
    if second_part:
        caption += " Hollow: validation; a hollow dot far to the left of its filled one is over-fitting to validation."
    return join_html(
        html_paragraph(
            f"Cold retrains from fresh parameters and data orders that the weights have not seen, {describe_seeds(run)}, "
            "95\u00a0% interval by Student's t over the seeds. All make the same number of steps, so fewer rows "
            "means more "
            "epochs. " + " ".join([describe_oracle(run, part), _describe_headroom(run, part)])
        ),
        summary_table,
        html_figure(plot_comparison(run, rows, part, second_part), caption, wide=True),
        html_note(
            "▼ below and ▲ above uniform by more than the interval; ≈ not told apart. The intervals are for one row "
            "each: with many rows, one in twenty strays by chance. “validation only” and “train + validation” train "
            f"on validation, so their validation loss is a training loss. {MISSING}: no such number (an interval needs two seeds)."
        ),
        html_details(f"Each of the {len(trainings)} trainings", seeds_table),
    )


def find_variant(run: RunResults, name: str) -> dict[str, Any] | None:
    """A row of the comparison, None where it was not made."""
    return next((row for row in run.result["compare"] if row["name"] == name), None)


def describe_oracle(run: RunResults, part: str) -> str:
    """Whether labels mean anything for this loss: AUCs do not unless the oracle beats uniform."""
    gap = difference_from_uniform(run, "oracle", part)
    if not gap:
        return ""
    amount = f"{format_interval(gap)} {run.unit} on {PART_LABELS[part]}"
    if gap.mean + gap.half_width < 0:
        return (
            f"The oracle, which trains on the good rows alone, beats uniform ({amount}), so an AUC against the labels "
            "means something here."
        )
    if math.isnan(gap.half_width):
        return f"Oracle less uniform: {amount}; with one seed this decides nothing, so do not read the AUCs."
    return (
        f"The oracle, which trains on the good rows alone, does not clearly beat uniform ({amount}), so an AUC "
        "against the labels means nothing here: rows called bad may help this model."
    )


def _describe_headroom(run: RunResults, part: str) -> str:
    gap, gain = difference_from_uniform(run, "oracle", part), difference_from_uniform(run, "learned weights", part)
    if not gap or not gain or not gap.mean + gap.half_width < 0:
        return ""
    closed = gain.mean / gap.mean
    share = f"{100 * closed:.0f} %" if closed > 0 else "nothing"
    return f"Of that headroom the learned weights close {share} on average."


def plot_comparison(run: RunResults, rows: Sequence[dict[str, Any]], part: str, second_part: str = "") -> Html:
    """A dot and an interval per arm, read on one part of the validation examples, and hollow on a second."""
    uniform = next((row for row in rows if row["name"] == "uniform"), None)
    return figures.plot_intervals(
        [
            IntervalRow(
                row["name"],
                *variant_interval(row, part),
                [float_or_nan(one[part]) for one in row["runs"]],
                variant_interval(row, second_part).mean if second_part else math.nan,
                row["name"] == "learned weights",
            )
            for row in rows
        ],
        f"L_v, {run.unit}" if second_part else f"{PART_LABELS[part]} loss, {run.unit}",
        names=(f"{PART_LABELS[part]} loss", "validation loss") if second_part else ("", ""),
        width=780 if second_part else 520,
        reference=variant_interval(uniform, part).mean if uniform else math.nan,
    )


def _format_difference(difference: MeanInterval | None) -> str:
    if difference is None or (difference.mean == 0 and not difference.half_width > 0):
        return MISSING
    sign = (
        ""
        if math.isnan(difference.half_width)
        else "≈ "
        if abs(difference.mean) <= difference.half_width
        else "▼ "
        if difference.mean < 0
        else "▲ "
    )
    return f"{sign}{format_interval(difference)}"


def variant_interval(row: dict[str, Any], part: str) -> MeanInterval:
    """Mean and interval of an arm over its seeds."""
    return MeanInterval(float_or_nan(row["mean"].get(part)), float_or_nan(row["interval"].get(part)))


def difference_from_uniform(run: RunResults, name: str, part: str) -> MeanInterval | None:
    """Mean and interval of an arm's loss less that of uniform weights, seed by seed; None without both."""
    variant, uniform = find_variant(run, name), find_variant(run, "uniform")
    if variant is None or uniform is None:
        return None
    return MeanInterval(
        *mean_interval(
            [
                float_or_nan(a[part]) - float_or_nan(b[part])
                for a, b in zip(variant["runs"], uniform["runs"], strict=True)
            ]
        )
    )


def describe_seeds(run: RunResults) -> str:
    """How many seeds each arm has, in words."""
    return format_count("seed", len(run.result["compare"][0]["runs"]))
