"""The report page of an `audit` run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.commands.audit.retrains import TARGET_LABELS, independent_part
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow, Point
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import MISSING
from bilevel_jax.runs.report.results import float_or_nan, write_report

JsonObject = dict[str, Any]
CHECKPOINT_LABELS = {
    "through": "through the whole of uniform training",
    "start": "at the model before training",
    "end": "at the end of uniform training",
    "": "of no model",
}
TARGET_HEADINGS = {
    "validation": "validation loss",
    "queries": "single queries, mean",
    "dev": "dev loss",
    "test": "test loss",
}


def write_audit_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_audit_report)


def render_audit_report(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    rows = sort_by_lds(result)
    return render_page(
        "audit.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        shares=[format_share(share) for share in result["removed"]],
        pictures=[plot_cost(result, at) for at in range(len(result["removed"]))],
        scores=score_table(result),
        targets=target_tables(result),
        extremes=describe_extremes(result),
        token_ends=describe_tokens(result),
        query_scores=[row["name"] for row in rows if row["own_queries"]],
        score_notes=[f"{row['name']}: {text}." for row in rows for text in row["notes"]],
    )


def format_share(share: float) -> str:
    """The share in per cent, as short as it was given."""
    return f"{100 * share:g}\u00a0%"


# ---- tables


def score_table(result: JsonObject) -> Table:
    """A line per score: its LDS for validation and for other examples, its correlation with the exact one, its cost."""
    rows = sort_by_lds(result)
    columns = _lds_columns(result, rows, "validation", "validation loss")
    if part := independent_part(rows[0]["lds"]):
        columns[1:1] = _lds_columns(result, rows, part, TARGET_HEADINGS[part])[:1]
    if any("rank" in row for row in rows):
        exact = [format_reading(row.get("rank")) for row in rows]
        columns.append(Column("exact hypergradient", exact, "rank correlation with it", "tight"))
    for name, unit in (("length", "tokens"), ("loss", "before training")):
        if any(row["difficulty"][name] is not None for row in rows):
            correlations = [row["difficulty"][name] for row in rows]
            columns.append(Column(name, correlations, f"{unit}; rank correlation with it"))
    if result["labels"]:
        columns.append(Column("AUC", [row["auc"] for row in rows], "good examples against bad, by label"))
    return make_table(
        Column("", [bold_cell(row["name"], sub=CHECKPOINT_LABELS[row["at"]]) for row in rows]),
        *columns,
        Column("passes", [round(row["passes"]) for row in rows], "of the score for validation loss"),
        Column("seconds", [round(row["seconds"]) for row in rows], "with compilation"),
        row_classes={at: "strong" for at, row in enumerate(rows) if row["name"] == result["verdict"]["use"]},
        css_class="bench",
    )


def target_tables(result: JsonObject) -> list[Table]:
    """The LDS of the same scores for the other targets: single queries, dev and test."""
    rows = sort_by_lds(result)
    return [
        make_table(
            Column("", [bold_cell(row["name"]) for row in rows], TARGET_HEADINGS[target]),
            *_lds_columns(result, rows, target, TARGET_HEADINGS[target]),
        )
        for target in TARGET_LABELS
        if target in rows[0]["lds"] and target != "validation"
    ]


def describe_extremes(result: JsonObject) -> list[JsonObject]:
    """For each share of audit.extremes its words, the table of changes, and the picture for validation loss."""
    found = result["extremes"]
    if not found or not found["rows"]:
        return []
    return [
        {
            "share": format_share(share),
            "count": count,
            "table": extremes_table(result, at),
            "picture": plot_extremes(result, at),
        }
        for at, (share, count) in enumerate(zip(found["shares"], found["counts"], strict=True))
    ]


def describe_tokens(result: JsonObject) -> list[tuple[str, list[JsonObject]]]:
    """The examples that help and that harm most: of each its tokens as (text, class, strength of 0 to 1, title).

    The strengths of all are relative to the largest one.
    """
    shown = result["tokens"]
    largest = max((abs(value) for one in shown for _, value in one["tokens"] if value is not None), default=0.0)

    def describe_token(text: str, value: float | None) -> tuple[str, str, str, str]:
        if value is None:
            return text, "", "", ""
        kind = "good" if value < 0 else "bad"
        return text, kind, f"{abs(value) / (largest or 1):.2f}", f"{value:+.3g}".replace("-", "\u2212")

    headings = {"help": "The examples that lower validation loss most", "harm": "The examples that raise it most"}
    ends = {
        heading: [
            one
            | {
                "hypergradient": f"{one['hypergradient']:+.3g}".replace("-", "\u2212"),
                "tokens": [describe_token(*token) for token in one["tokens"]],
            }
            for one in shown
            if one["end"] == end
        ]
        for end, heading in headings.items()
    }
    return [(heading, lines) for heading, lines in ends.items() if lines]


def sort_by_extremes(result: JsonObject, at: int) -> list[JsonObject]:
    """The scores, first those whose best examples validation loss misses most, against their worst."""
    return sorted(
        result["extremes"]["rows"], key=lambda row: row["worst"]["validation"][at] - row["best"]["validation"][at]
    )


def extremes_table(result: JsonObject, at: int) -> Table:
    """A line per score, and one of random removals: the change of each loss without the best and without the worst."""
    found = result["extremes"]
    rows, random = sort_by_extremes(result, at), found["random"]
    names = [bold_cell(row["name"]) for row in rows]
    columns = [Column("", [*names, bold_cell("random", sub="where 95 % of random removals fall")])]
    for target in (target for target in TARGET_HEADINGS if target in random):
        for end in ("best", "worst"):
            changes = [_change_cell(row[end][target][at], random[target][at]) for row in rows]
            heading = f"{TARGET_HEADINGS[target]}, {end} out"
            columns.append(Column(heading, [*changes, _format_range(random[target][at])], result["unit"], "tight"))
    if "queries" in random:
        for end in ("best", "worst"):
            risen = [sum(change > 0 for change in row[f"{end}_queries"][at]) for row in rows]
            count = len(rows[0][f"{end}_queries"][at])
            texts = [f"{number} of {count}" for number in risen]
            columns.append(Column(f"queries that rose, {end} out", [*texts, MISSING], "", "tight"))
    return make_table(*columns, css_class="bench")


def _change_cell(change: float | None, random: Sequence[float | None]) -> Cell:
    """A change with its sign, marked where it lies outside the range of random removals."""
    value, low, high = float_or_nan(change), float_or_nan(random[1]), float_or_nan(random[2])
    return Cell(_format_change(value) + (" *" if value < low or value > high else ""))


def _format_range(random: Sequence[float | None]) -> str:
    return " to ".join(_format_change(float_or_nan(end)) for end in random[1:])


def _format_change(value: float) -> str:
    return f"{value:+.2g}".replace("-", "\u2212")


def plot_extremes(result: JsonObject, at: int) -> Markup:
    """A line per score: the change of validation loss without its best and, hollow, without its worst examples."""
    mean, low, high = (float_or_nan(value) for value in result["extremes"]["random"]["validation"][at])
    lines = [
        IntervalRow(
            row["name"],
            float_or_nan(row["best"]["validation"][at]),
            second_value=float_or_nan(row["worst"]["validation"][at]),
            emphasized=row["name"] == result["verdict"]["use"],
        )
        for row in sort_by_extremes(result, at)
    ]
    lines.append(IntervalRow("random", mean, low, high, colour=5))
    label = f"change of validation loss, {result['unit']}"
    return figures.plot_intervals(lines, label, names=("without the best", "without the worst"), reference=0)


def _lds_columns(result: JsonObject, rows: Sequence[JsonObject], target: str, unit: str) -> list[Column]:
    return [
        Column(
            f"LDS, {format_share(share)} out",
            [format_reading(row["lds"][target][at]) for row in rows],
            f"for {unit}",
            "tight",
        )
        for at, share in enumerate(result["removed"])
    ]


def sort_by_lds(result: JsonObject) -> list[JsonObject]:
    """The scores, those with the largest LDS for validation loss first."""
    return sorted(result["rows"], key=lambda row: -float_or_nan(row["lds"]["validation"][0][0]))


def format_reading(values: Sequence[float | None] | None) -> str:
    """A value with its interval."""
    if values is None or values[0] is None:
        return MISSING
    value, low, high = (float_or_nan(item) for item in values)
    digits = 2 if high - low > 0.02 else 3
    return f"{value:.3f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


# ---- the picture


def plot_cost(result: JsonObject, at: int) -> Markup:
    """A point per score, LDS by passes on a log axis, with its interval and its name."""
    rows = [row for row in result["rows"] if row["lds"]["validation"][at][0] is not None]
    if not rows:
        return Markup("<p>Every score predicts the same for every retrain.</p>")
    colours = {"unrolled": 1, result["verdict"]["use"]: 3, "random": 5}
    points = [
        Point(max(row["passes"], 1.0), value, low, high, row["name"], colour=colours.get(row["name"], 0))
        for row in rows
        for value, low, high in [row["lds"]["validation"][at]]
    ]
    return figures.plot_lines(
        [], "passes", "LDS", points=points, log_x=True, y_values_shown=[0, 1], reference=0, height=340, width=510
    )
