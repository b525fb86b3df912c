"""Report section on retrains with each choice of examples and weights."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Column, Table, bold_cell, make_table
from bilevel_jax.runs.report.numbers import MISSING, MeanInterval, format_interval
from bilevel_jax.runs.report.results import RunResults, float_or_nan, most_independent_part
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks.splits import PART_NAMES


def describe_comparison(run: RunResults) -> dict[str, Any]:
    """The values of the template `comparison.html`: every variant, retrained from scratch under every seed."""
    rows = run.result["compare"]
    if not rows:
        return {}
    rows = sorted(rows, key=lambda row: row["name"] != "oracle")  # first: does knowing the truth help at all?
    part = most_independent_part(run)
    second_part = "validation" if part != "validation" else ""
    return {
        "part": part,
        "second_part": second_part,
        "seeds": describe_seeds(run),
        "oracle": describe_oracle(run, part),
        "headroom": _describe_headroom(run, part),
        "table": variants_table(run, rows, part),
        "absent": run.result["absent_arms"],
        "recommendation": run.result["recommendation"]["sentence"],
        "standings": standings_table(run),
        "reads_dev": _reads_dev(run),
        "trainings": sum(len(row["runs"]) for row in rows),
        "seed_table": seeds_table(run, rows),
        "picture": plot_comparison(run, rows, part, second_part),
    }


def variants_table(run: RunResults, rows: Sequence[dict[str, Any]], part: str) -> Table:
    """A line for each variant: means and intervals over the seeds, and the difference from uniform weights."""
    marks = {"learned": "strong", "oracle": "oracle"}
    tags = {"oracle": "knows the labels", run.result["recommendation"]["use"]: "recommended"}
    names = [bold_cell(row["name"], tag=tags.get(row["name"], ""), sub=row["meaning"]) for row in rows]
    return make_table(
        Column("trained on", names),
        *(Column(one, [variant_interval(row, one) for row in rows], f"loss, {run.unit}") for one in _parts(rows)),
        Column(
            f"{part} minus uniform's",
            [_format_difference(difference_from_uniform(run, row["name"], part)) for row in rows],
            f"paired by seed, {run.unit}",
            "tight",
        ),
        *(
            [
                Column(
                    run.result["right"],
                    [variant_interval(row, "accuracy") for row in rows],
                    f"{run.accuracy_unit}, {part}",
                )
            ]
            if run.result["right"]
            else []
        ),
        Column("examples", [row["rows"] for row in rows]),
        Column("steps", [row["steps"] for row in rows]),
        Column("epochs", [row["epochs"] for row in rows]),
        row_classes={index: marks[row["name"]] for index, row in enumerate(rows) if row["name"] in marks},
    )


def standings_table(run: RunResults) -> Table | None:
    """A line for each arm that may be recommended, the simplest first; None where nothing was chosen."""
    recommendation = run.result["recommendation"]
    standings = recommendation["standings"]
    if not standings:
        return None
    chosen = next(place for place, standing in enumerate(standings) if standing["name"] == recommendation["use"])
    return make_table(
        Column("arm, the simplest first", [standing["name"] for standing in standings]),
        Column(
            "dev" if _reads_dev(run) else "validation",
            [standing["dev_loss"] for standing in standings],
            f"loss, {run.unit}",
        ),
        Column("behind the best", [standing["behind"] for standing in standings], run.unit),
        Column("standard error", [standing["standard_error"] for standing in standings], "of that difference"),
        row_classes={chosen: "strong"},
    )


def _reads_dev(run: RunResults) -> bool:
    """Whether the recommendation is by dev examples, and not by a loss of the parameters alone, which reads none."""
    return run.result["rows"].get("dev", 0) > 0


def seeds_table(run: RunResults, rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each retrain."""
    trainings = [(row["name"], seed, losses) for row in rows for seed, losses in enumerate(row["runs"])]
    return make_table(
        Column("trained on", [name for name, _, _ in trainings]),
        Column("seed", [seed for _, seed, _ in trainings]),
        *(Column(part, [losses[part] for *_, losses in trainings], f"loss, {run.unit}") for part in _parts(rows)),
        *(
            [Column(run.result["right"], [losses["accuracy"] for *_, losses in trainings], run.accuracy_unit)]
            if run.result["right"]
            else []
        ),
    )


def _parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The validation examples that were read, the most independent part first."""
    return [part for part in reversed(PART_NAMES) if any(part in row["mean"] for row in rows)]


def find_variant(run: RunResults, name: str) -> dict[str, Any] | None:
    """A variant of the comparison, None where it was not retrained."""
    return next((row for row in run.result["compare"] if row["name"] == name), None)


def describe_oracle(run: RunResults, part: str) -> str:
    """Whether labels mean anything for this loss: AUCs do not unless the oracle beats uniform."""
    gap = difference_from_uniform(run, "oracle", part)
    if not gap:
        return ""
    amount = f"{format_interval(gap)} {run.unit} on {part}"
    if gap.mean + gap.half_width < 0:
        return (
            f"The oracle, which trains on the good examples alone, beats uniform ({amount}), so an AUC against the "
            "labels means something here."
        )
    if math.isnan(gap.half_width):
        return f"Oracle minus uniform: {amount}; with one seed this decides nothing, so do not read the AUCs."
    return (
        f"The oracle, which trains on the good examples alone, does not clearly beat uniform ({amount}), so an AUC "
        "against the labels means nothing here: examples labelled bad may help this model."
    )


def _describe_headroom(run: RunResults, part: str) -> str:
    gap, gain = difference_from_uniform(run, "oracle", part), difference_from_uniform(run, "learned", part)
    if not gap or not gain or not gap.mean + gap.half_width < 0:
        return ""
    closed = gain.mean / gap.mean
    share = f"{100 * closed:.0f} %" if closed > 0 else "nothing"
    return f"Of that headroom the learned weights close {share} on average."


def plot_comparison(run: RunResults, rows: Sequence[dict[str, Any]], part: str, second_part: str = "") -> Markup:
    """A dot and an interval per variant, read on one part of the validation examples, and hollow on a second."""
    uniform = next((row for row in rows if row["name"] == "uniform"), None)
    lines = []
    for row in rows:
        mean, half_width = variant_interval(row, part)
        seed_values = [float_or_nan(one[part]) for one in row["runs"]]
        second_value = variant_interval(row, second_part).mean if second_part else math.nan
        emphasized = row["name"] == "learned"
        lines.append(
            IntervalRow(row["name"], mean, mean - half_width, mean + half_width, seed_values, second_value, emphasized)
        )
    return figures.plot_intervals(
        lines,
        f"loss, {run.unit}" if second_part else f"{part} loss, {run.unit}",
        names=(f"{part} loss", "validation loss") if second_part else ("", ""),
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
    """Mean and interval of a variant over its seeds."""
    return MeanInterval(float_or_nan(row["mean"].get(part)), float_or_nan(row["interval"].get(part)))


def difference_from_uniform(run: RunResults, name: str, part: str) -> MeanInterval | None:
    """Mean and interval of a variant's loss minus that of uniform weights, seed by seed; None without both."""
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
    """How many seeds each variant has, in words."""
    return format_count("seed", len(run.result["compare"][0]["runs"]))
