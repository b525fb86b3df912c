"""The report of `audit`: which score to use, quality against cost, every reading with its interval."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_jax.commands.audit.retrains import TARGET_LABELS
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report.figures import Html, html_element, join_html, make_scale
from bilevel_jax.runs.report.html import (
    Column,
    html_details,
    html_document,
    html_figure,
    html_note,
    html_paragraph,
    html_table,
    verdict_banner,
)
from bilevel_jax.runs.report.numbers import MISSING, format_number
from bilevel_jax.runs.report.results import PART_LABELS, float_or_nan, write_report

JsonObject = dict[str, Any]
CHECKPOINT_LABELS = {
    "through": "through the whole of uniform training",
    "start": "at the model before training",
    "end": "at the end of uniform training",
    "": "of no model",
}
TARGET_HEADINGS = {"validation": "L_v", "queries": "single queries, mean", "test": "test"}


def write_audit_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_audit_report)


def render_audit_report(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    use = result["verdict"]["use"]
    intro = join_html(
        "bilevel_jax audit, run ",
        html_element("b", name),
        f". L_v is a model's loss on the rows of validation, in {result['unit']}; lower is better. A score is one number "
        "for each training example; larger is better.",
    )
    pictures = (
        html_figure(plot_cost(result, at), format_caption(result, at), wide=True)
        for at in range(len(result["removed"]))
    )
    lead = join_html(
        verdict_banner(
            "good" if use and not result["verdict"]["instead"] else "fair",
            "✓" if use else "?",
            f"Use {use}" if use else "Use none of the cheap scores",
            html_paragraph(result["verdict"]["sentence"]),
            html_note(describe_protocol(result)),
        ),
        html_element("div", *pictures, class_="pair"),
    )
    packages = ", ".join(f"{key} {version}" for key, version in environment["packages"].items() if version)
    certificate = result["certificate"]
    sections = [
        ("table", "Every score", render_score_table(result)),
        ("others", "Other losses than L_v", render_other_targets(result)),
        (
            "certificate",
            "Are the exact entries to be believed?",
            html_paragraph(certificate["sentence"] if certificate else "The certificates were not computed."),
        ),
        (
            "provenance",
            "Data, and how to see the same numbers",
            join_html(
                *(html_paragraph(text) for text in result["notes"]),
                html_element("pre", f"bilevel-jax audit {run_dir.CONFIG_FILE} --out ANOTHER_FOLDER"),
                html_paragraph(
                    "bank.parquet holds every retrain: which rows left, and the losses then. scores.parquet holds "
                    "every score by id, larger is better; a column of it can be the weights.column of a training."
                ),
                html_paragraph(f"{', '.join(environment['devices'])}; {environment['platform']}; {packages}."),
                html_paragraph(f"All of it took {format_number(result['seconds'] / 60, 3)} minutes."),
                html_details(f"{run_dir.CONFIG_FILE}, all settings", html_element("pre", config_text)),
            ),
        ),
    ]
    return html_document(
        f"{name}: audit", "Which score tells what a training example is worth here", intro, lead, sections
    )


# ---- in words


def describe_protocol(result: JsonObject) -> str:
    """How the bank was made, and what the numbers are."""
    counts = ", ".join(f"{PART_LABELS.get(part, part)} {count:,}" for part, count in result["counts"].items())
    shares = " and ".join(format_share(share) for share in result["removed"])
    return (
        f"Rows: {counts}. One bank for all: {result['subsets']} retrains without a random {shares} of the rows each, "
        f"{result['steps']} steps of {result['batch']} rows, with the start (seed {result['seeds']['start']}) and the "
        f"data order (seed {result['seeds']['data']}) of the first training; rows that left have weight 0. LDS, the "
        "linear-datamodelling score: Spearman's rank correlation, over these retrains, of the loss then with the sum "
        "of the scores of the rows that left. In brackets 95 % bootstrap intervals: over the retrains and the queries "
        "for LDS, over the rows for the correlation with the exact entries. Passes: forward and backward over one "
        "batch (a swept step 1 to replay and 3 for its Hessian product); a score of the trained model pays for its "
        "training."
    )


def format_caption(result: JsonObject, at: int) -> str:
    """What the figure of a share of rows shows."""
    text = (
        f"LDS for L_v when {format_share(result['removed'][at])} of the rows leave, by cost; bars are 95 % intervals."
    )
    return text if at else f"{text} Dashed: no better than chance. What costs no pass is drawn at 1."


def format_share(share: float) -> str:
    """The share in per cent, as short as it was given."""
    return f"{100 * share:g}\u00a0%"


# ---- tables


def render_score_table(result: JsonObject) -> Html:
    """A line per score: how well it foretells L_v, whether it agrees with the exact entries, what it costs."""
    rows = sort_by_lds(result)
    columns = [
        Column(
            f"LDS, {format_share(share)} out",
            [format_reading(row["lds"]["validation"][at]) for row in rows],
            "for L_v",
            "tight",
        )
        for at, share in enumerate(result["removed"])
    ]
    if any("rank" in row for row in rows):
        columns.append(
            Column("exact entries", [format_reading(row.get("rank")) for row in rows], "correlation with it", "tight")
        )
    if result["labels"]:
        columns.append(Column("AUC", [row["auc"] for row in rows], "good rows against bad, by label"))
    names = [
        join_html(html_element("b", row["name"]), html_element("span", CHECKPOINT_LABELS[row["at"]], class_="sub"))
        for row in rows
    ]
    return join_html(
        html_table(
            Column("", names),
            *columns,
            Column("passes", [round(row["passes"]) for row in rows], "of L_v's score"),
            Column("seconds", [round(row["seconds"]) for row in rows], "with compilation"),
            row_classes={at: "strong" for at, row in enumerate(rows) if row["name"] == result["verdict"]["use"]},
            css_class="bench",
        ),
        *(html_note(f"{row['name']}: {text}.") for row in rows for text in row["notes"]),
    )  # fmt: skip


def render_other_targets(result: JsonObject) -> Html:
    """The same scores against single queries and against test."""
    rows, lds = sort_by_lds(result), result["rows"][0]["lds"]
    others = [target for target in TARGET_LABELS if target in lds and target != "validation"]
    if not others:
        return html_paragraph("Nothing but L_v was read: audit.queries is 0 and there is no test.")
    tables = [
        html_table(
            Column("", [html_element("b", row["name"]) for row in rows], TARGET_HEADINGS[target]),
            *(
                Column(
                    f"LDS, {format_share(share)} out",
                    [format_reading(row["lds"][target][at]) for row in rows],
                    "",
                    "tight",
                )
                for at, share in enumerate(result["removed"])
            ),
        )
        for target in others
    ]
    own = ", ".join(row["name"] for row in rows if row["own_queries"]) or "no score"
    return join_html(
        *tables,
        html_note(
            f"Queries are rows of validation. Entries of their own: {own}; the other scores foretell every query by one "
            "number per row. test is foretold by the scores for validation: what is lost is how validation differs from it."
        ),
    )


def sort_by_lds(result: JsonObject) -> list[JsonObject]:
    """The scores, those that foretell L_v best first."""
    return sorted(result["rows"], key=lambda row: -float_or_nan(row["lds"]["validation"][0][0]))


def format_reading(values: Sequence[float | None] | None) -> str:
    """A value with its interval."""
    if values is None or values[0] is None:
        return MISSING
    value, low, high = (float_or_nan(item) for item in values)
    digits = 2 if high - low > 0.02 else 3
    return f"{value:.3f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


# ---- the picture


def plot_cost(result: JsonObject, at: int) -> Html:
    """A point per score, LDS by passes on a log axis, with its interval and its name."""
    left, right, top, bottom = 52, 380, 12, 300
    rows = [row for row in result["rows"] if row["lds"]["validation"][at][0] is not None]
    if not rows:
        return html_element("p", "Every score foretells the same for every retrain.")
    x = make_scale([max(row["passes"], 1.0) for row in rows], left + 10, right - 10, log=True)
    y = make_scale([0.0, 1.0, *(end for row in rows for end in row["lds"]["validation"][at])], bottom, top, margin=0)
    parts = [_grid_line(left, y(tick), right, y(tick), f"{tick:g}", left - 6, y(tick) + 4, "end") for tick in y.ticks()]
    parts += [
        _grid_line(x(tick), top, x(tick), bottom, f"{tick:,.0f}", x(tick), bottom + 16, "middle") for tick in x.ticks()
    ]
    parts.append(
        html_element(
            "line", x1=left, y1=_format_coordinate(y(0)), x2=right, y2=_format_coordinate(y(0)), class_="reference"
        )
    )
    places = _spread_labels([y(row["lds"]["validation"][at][0]) for row in rows], 13, top + 4)
    for row, place in zip(rows, places, strict=True):
        value, low, high = row["lds"]["validation"][at]
        point_x, point_y = x(max(row["passes"], 1.0)), y(value)
        colour = {"unrolled": "k1", result["verdict"]["use"]: "k3", "random": "k5"}.get(row["name"], "k0")
        parts += [
            html_element(
                "line",
                x1=_format_coordinate(point_x),
                y1=_format_coordinate(y(low)),
                x2=_format_coordinate(point_x),
                y2=_format_coordinate(y(high)),
                class_=f"whisker {colour}",
            ),
            html_element(
                "circle", cx=_format_coordinate(point_x), cy=_format_coordinate(point_y), r=4, class_=f"dot {colour}"
            ),
            html_element(
                "line",
                x1=_format_coordinate(point_x + 6),
                y1=_format_coordinate(point_y),
                x2=right + 8,
                y2=_format_coordinate(place),
                class_="grid",
            ),
            html_element("text", row["name"], x=right + 11, y=_format_coordinate(place + 4), class_="label"),
        ]
    parts.append(
        html_element("text", "passes (LDS upwards)", x=(left + right) / 2, y=bottom + 34, class_="tick middle")
    )
    words = "; ".join(
        f"{row['name']}: {row['lds']['validation'][at][0]:.3g} for {row['passes']:,.0f} passes" for row in rows
    )
    return html_element("svg", *parts, viewBox=f"0 0 {right + 130} {bottom + 42}", role="img", aria_label=words)


def _spread_labels(places: Sequence[float], least: float, first: float) -> list[float]:
    """The places, from the top, moved down until they are `least` apart, and up again where they pass the end."""
    out, last = [0.0] * len(places), -math.inf
    for at in sorted(range(len(places)), key=places.__getitem__):
        last = out[at] = max(places[at], last + least, first)
    return out


def _grid_line(x1: float, y1: float, x2: float, y2: float, words: str, x: float, y: float, kind: str) -> Html:
    line = html_element(
        "line",
        x1=_format_coordinate(x1),
        y1=_format_coordinate(y1),
        x2=_format_coordinate(x2),
        y2=_format_coordinate(y2),
        class_="grid",
    )
    return join_html(
        line, html_element("text", words, x=_format_coordinate(x), y=_format_coordinate(y), class_=f"tick {kind}")
    )


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}"
