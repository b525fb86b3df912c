"""The comparison in a report: models trained again from cold with each choice of rows and weights."""

import math
from collections.abc import Sequence
from typing import Any

from bilevel_jax.runs import figures
from bilevel_jax.runs.figures import Dot, Html, element, join
from bilevel_jax.runs.page import NONE, Column, Estimate, counted, details, figure, interval, note, paragraph, table
from bilevel_jax.runs.results import PARTS, Results, part_of, real
from bilevel_jax.runs.statistics import mean_interval


def comparison(run: Results) -> Html:
    """Every arm, trained from cold under every seed."""
    rows = run.result["compare"]
    if not rows:
        return note(
            "Skipped: this run compared nothing (--fast, or retrain.enabled: false), so it holds no headline number "
            "and no evidence that the weights help. Run again without --fast to get one.",
            "warning",
        )
    rows = sorted(rows, key=lambda row: row["name"] != "oracle")  # first: does knowing the truth help at all?
    part = part_of(run)
    parts = [one for one in PARTS if any(one in row["mean"] for row in rows)]
    differences = [difference(run, row["name"], part) for row in rows]
    names = [
        join(
            element("b", row["name"]),
            element("span", "knows the labels", class_="tag") if row["name"] == "oracle" else None,
            element("span", row["meaning"], class_="sub"),
        )
        for row in rows
    ]
    main = table(
        Column("trained on", names),
        *(Column(PARTS[one], [mean_of(row, one) for row in rows], f"L_v, {run.unit}") for one in reversed(parts)),
        Column(
            f"{PARTS[part]} less uniform's",
            [_against(one) for one in differences],
            f"paired by seed, {run.unit}",
            "tight",
        ),
        Column(run.result["right"], [mean_of(row, "accuracy") for row in rows], f"{run.share}, {PARTS[part]}"),
        Column("rows", [row["rows"] for row in rows]),
        Column("steps", [row["steps"] for row in rows]),
        Column("epochs", [row["epochs"] for row in rows]),
        marks={
            index: {"learned weights": "strong", "oracle": "oracle"}[row["name"]]
            for index, row in enumerate(rows)
            if row["name"] in ("learned weights", "oracle")
        },
    )
    trainings = [one for row in rows for one in row["runs"]]
    seeds = table(
        Column("trained on", [row["name"] for row in rows for _ in row["runs"]]),
        Column("seed", [seed for row in rows for seed, _ in enumerate(row["runs"])]),
        *(Column(PARTS[one], [each[one] for each in trainings], f"L_v, {run.unit}") for one in reversed(parts)),
        Column(run.result["right"], [each["accuracy"] for each in trainings], run.share),
    )
    second = "fit" if part != "fit" else ""
    caption = (
        f"Filled: {PARTS[part]}, mean and 95 % interval; small dots below: single seeds. Dashed line: uniform weights."
    )
    if second:
        caption += " Hollow: V_fit; a hollow dot far to the left of its filled one is over-fitting to V_fit."
    return join(
        paragraph(
            f"Cold retrains from fresh parameters and data orders that the weights have not seen, {seeds_of(run)}, "
            "95\u00a0% interval by Student's t over the seeds. All make the same number of steps, so fewer rows "
            "means more "
            "epochs. " + " ".join([oracle(run, part), _headroom(run, part)])
        ),
        main,
        figure(compared(run, rows, part, second), caption, wide=True),
        note(
            "▼ below and ▲ above uniform by more than the interval; ≈ not told apart. The intervals are for one row "
            "each: with many rows, one in twenty strays by chance. “validation only” and “train + validation” train "
            f"on V_fit, so their V_fit loss is a training loss. {NONE}: no such number (an interval needs two seeds)."
        ),
        details(f"Each of the {len(trainings)} trainings", seeds),
    )


def arm(run: Results, name: str) -> dict[str, Any] | None:
    """A row of the comparison, None where it was not made."""
    return next((row for row in run.result["compare"] if row["name"] == name), None)


def oracle(run: Results, part: str) -> str:
    """Whether labels mean anything for this loss: AUCs do not unless the oracle beats uniform."""
    gap = difference(run, "oracle", part)
    if not gap:
        return ""
    amount = f"{interval(gap)} {run.unit} on {PARTS[part]}"
    if gap.mean + gap.half < 0:
        return (
            f"The oracle, which trains on the good rows alone, beats uniform ({amount}), so an AUC against the labels "
            "means something here."
        )
    if math.isnan(gap.half):
        return f"Oracle less uniform: {amount}; with one seed this decides nothing, so do not read the AUCs."
    return (
        f"The oracle, which trains on the good rows alone, does not clearly beat uniform ({amount}), so an AUC "
        "against the labels means nothing here: rows called bad may help this model."
    )


def _headroom(run: Results, part: str) -> str:
    gap, gain = difference(run, "oracle", part), difference(run, "learned weights", part)
    if not gap or not gain or not gap.mean + gap.half < 0:
        return ""
    closed = gain.mean / gap.mean
    share = f"{100 * closed:.0f} %" if closed > 0 else "nothing"
    return f"Of that headroom the learned weights close {share} on average."


def compared(run: Results, rows: Sequence[dict[str, Any]], part: str, second: str = "") -> Html:
    """A dot and an interval per arm, read on one part of the trusted rows, and hollow on a second."""
    uniform = next((row for row in rows if row["name"] == "uniform"), None)
    return figures.dots(
        [
            Dot(
                row["name"],
                *mean_of(row, part),
                [real(one[part]) for one in row["runs"]],
                mean_of(row, second).mean if second else math.nan,
                row["name"] == "learned weights",
            )
            for row in rows
        ],
        f"L_v, {run.unit}" if second else f"L_v on {PARTS[part]}, {run.unit}",
        names=(f"L_v on {PARTS[part]}", "L_v on V_fit") if second else ("", ""),
        width=780 if second else 520,
        reference=mean_of(uniform, part).mean if uniform else math.nan,
    )


def _against(gain: Estimate | None) -> str:
    if gain is None or (gain.mean == 0 and not gain.half > 0):
        return NONE
    sign = "" if math.isnan(gain.half) else "≈ " if abs(gain.mean) <= gain.half else "▼ " if gain.mean < 0 else "▲ "
    return f"{sign}{interval(gain)}"


def mean_of(row: dict[str, Any], part: str) -> Estimate:
    """Mean and interval of an arm over its seeds."""
    return Estimate(real(row["mean"].get(part)), real(row["interval"].get(part)))


def difference(run: Results, name: str, part: str) -> Estimate | None:
    """Mean and interval of an arm's loss less that of uniform weights, seed by seed; None without both."""
    one, uniform = arm(run, name), arm(run, "uniform")
    if one is None or uniform is None:
        return None
    return Estimate(
        *mean_interval([real(a[part]) - real(b[part]) for a, b in zip(one["runs"], uniform["runs"], strict=True)])
    )


def seeds_of(run: Results) -> str:
    """How many seeds each arm has, in words."""
    return counted("seed", len(run.result["compare"][0]["runs"]))
