"""The report of `audit`: which score to use, quality against cost, every reading with its interval."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_jax.runs import files
from bilevel_jax.runs.bank import TARGETS
from bilevel_jax.runs.figures import Html, element, join, scale
from bilevel_jax.runs.page import (
    NONE,
    Column,
    banner,
    details,
    document,
    figure,
    note,
    number,
    paragraph,
    table,
)
from bilevel_jax.runs.results import PARTS, real, write_page

Row = dict[str, Any]
MODELS = {
    "through": "through the whole of uniform training",
    "start": "at the model before training",
    "end": "at the end of uniform training",
    "": "of no model",
}
TOLD = {"fit": "L_v", "queries": "single queries, mean", "report": "V_report"}


def write(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_page(folder, page)


def page(name: str, result: Row, config_text: str, environment: Row) -> str:
    """The whole report as HTML."""
    use = result["verdict"]["use"]
    intro = join(
        "bilevel_jax audit, run ",
        element("b", name),
        f". L_v is a model's loss on the rows of V_fit, in {result['unit']}; lower is better. A score is one number "
        "for each training row; larger is better.",
    )
    pictures = (figure(cost(result, at), caption(result, at), wide=True) for at in range(len(result["removed"])))
    lead = join(
        banner(
            "good" if use and not result["verdict"]["instead"] else "fair",
            "✓" if use else "?",
            f"Use {use}" if use else "Use none of the cheap scores",
            paragraph(result["verdict"]["sentence"]),
            note(protocol(result)),
        ),
        element("div", *pictures, class_="pair"),
    )
    packages = ", ".join(f"{key} {version}" for key, version in environment["packages"].items() if version)
    certificate = result["certificate"]
    sections = [
        ("table", "Every score", main_table(result)),
        ("others", "Other losses than L_v", other_table(result)),
        (
            "certificate",
            "Are the exact entries to be believed?",
            paragraph(certificate["sentence"] if certificate else "The certificates were not computed."),
        ),
        (
            "provenance",
            "Data, and how to see the same numbers",
            join(
                *(paragraph(text) for text in result["notes"]),
                element("pre", f"bilevel-jax audit {files.RESOLVED} --out ANOTHER_FOLDER"),
                paragraph(
                    "bank.parquet holds every retrain: which rows left, and the losses then. scores.parquet holds "
                    "every score by id, larger is better; a column of it can be the weights.column of a training."
                ),
                paragraph(f"{', '.join(environment['devices'])}; {environment['platform']}; {packages}."),
                paragraph(f"All of it took {number(result['seconds'] / 60, 3)} minutes."),
                details(f"{files.RESOLVED}, all settings", element("pre", config_text)),
            ),
        ),
    ]
    return document(f"{name}: audit", "Which score tells what a training row is worth here", intro, lead, sections)


# ---- in words


def protocol(result: Row) -> str:
    """How the bank was made, and what the numbers are."""
    counts = ", ".join(f"{PARTS.get(part, part)} {count:,}" for part, count in result["counts"].items())
    shares = " and ".join(share_of(share) for share in result["removed"])
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


def caption(result: Row, at: int) -> str:
    """What the figure of a share of rows shows."""
    shown = f"LDS for L_v when {share_of(result['removed'][at])} of the rows leave, by cost; bars are 95 % intervals."
    return shown if at else f"{shown} Dashed: no better than chance. What costs no pass is drawn at 1."


def share_of(share: float) -> str:
    """The share in per cent, as short as it was given."""
    return f"{100 * share:g}\u00a0%"


# ---- tables


def main_table(result: Row) -> Html:
    """A line per score: how well it foretells L_v, whether it agrees with the exact entries, what it costs."""
    rows = ranked(result)
    columns = [
        Column(f"LDS, {share_of(share)} out", [reading(row["lds"]["fit"][at]) for row in rows], "for L_v", "tight")
        for at, share in enumerate(result["removed"])
    ]
    if any("rank" in row for row in rows):
        columns.append(
            Column("exact entries", [reading(row.get("rank")) for row in rows], "correlation with it", "tight")
        )
    if result["labels"]:
        columns.append(Column("AUC", [row["auc"] for row in rows], "good rows against bad, by label"))
    names = [join(element("b", row["name"]), element("span", MODELS[row["at"]], class_="sub")) for row in rows]
    return join(
        table(
            Column("", names),
            *columns,
            Column("passes", [round(row["passes"]) for row in rows], "of L_v's score"),
            Column("seconds", [round(row["seconds"]) for row in rows], "with compilation"),
            marks={at: "strong" for at, row in enumerate(rows) if row["name"] == result["verdict"]["use"]},
            name="bench",
        ),
        *(note(f"{row['name']}: {text}.") for row in rows for text in row["notes"]),
    )  # fmt: skip


def other_table(result: Row) -> Html:
    """The same scores against single queries and against V_report."""
    rows, found = ranked(result), result["rows"][0]["lds"]
    others = [target for target in TARGETS if target in found and target != "fit"]
    if not others:
        return paragraph("Nothing but L_v was read: audit.queries is 0 and there is no V_report.")
    tables = [
        table(
            Column("", [element("b", row["name"]) for row in rows], TOLD[target]),
            *(
                Column(f"LDS, {share_of(share)} out", [reading(row["lds"][target][at]) for row in rows], "", "tight")
                for at, share in enumerate(result["removed"])
            ),
        )
        for target in others
    ]
    own = ", ".join(row["name"] for row in rows if row["own_queries"]) or "no score"
    return join(
        *tables,
        note(
            f"Queries are rows of V_fit. Entries of their own: {own}; the other scores foretell every query by one "
            "number per row. V_report is foretold by the scores for V_fit: what is lost is how V_fit differs from it."
        ),
    )


def ranked(result: Row) -> list[Row]:
    """The scores, those that foretell L_v best first."""
    return sorted(result["rows"], key=lambda row: -real(row["lds"]["fit"][0][0]))


def reading(found: Sequence[float | None] | None) -> str:
    """A value with its interval."""
    if found is None or found[0] is None:
        return NONE
    value, low, high = (real(one) for one in found)
    digits = 2 if high - low > 0.02 else 3
    return f"{value:.3f} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


# ---- the picture


def cost(result: Row, at: int) -> Html:
    """A point per score, LDS by passes on a log axis, with its interval and its name."""
    left, right, top, bottom = 52, 380, 12, 300
    rows = [row for row in result["rows"] if row["lds"]["fit"][at][0] is not None]
    if not rows:
        return element("p", "Every score foretells the same for every retrain.")
    x = scale([max(row["passes"], 1.0) for row in rows], left + 10, right - 10, log=True)
    y = scale([0.0, 1.0, *(end for row in rows for end in row["lds"]["fit"][at])], bottom, top, margin=0)
    parts = [_rule(left, y(tick), right, y(tick), f"{tick:g}", left - 6, y(tick) + 4, "end") for tick in y.ticks()]
    parts += [
        _rule(x(tick), top, x(tick), bottom, f"{tick:,.0f}", x(tick), bottom + 16, "middle") for tick in x.ticks()
    ]
    parts.append(element("line", x1=left, y1=_n(y(0)), x2=right, y2=_n(y(0)), class_="reference"))
    places = _spaced([y(row["lds"]["fit"][at][0]) for row in rows], 13, top + 4)
    for row, place in zip(rows, places, strict=True):
        value, low, high = row["lds"]["fit"][at]
        here, there = x(max(row["passes"], 1.0)), y(value)
        colour = {"unrolled": "k1", result["verdict"]["use"]: "k3", "random": "k5"}.get(row["name"], "k0")
        parts += [
            element("line", x1=_n(here), y1=_n(y(low)), x2=_n(here), y2=_n(y(high)), class_=f"whisker {colour}"),
            element("circle", cx=_n(here), cy=_n(there), r=4, class_=f"dot {colour}"),
            element("line", x1=_n(here + 6), y1=_n(there), x2=right + 8, y2=_n(place), class_="grid"),
            element("text", row["name"], x=right + 11, y=_n(place + 4), class_="label"),
        ]
    parts.append(element("text", "passes (LDS upwards)", x=(left + right) / 2, y=bottom + 34, class_="tick middle"))
    words = "; ".join(f"{row['name']}: {row['lds']['fit'][at][0]:.3g} for {row['passes']:,.0f} passes" for row in rows)
    return element("svg", *parts, viewBox=f"0 0 {right + 130} {bottom + 42}", role="img", aria_label=words)


def _spaced(places: Sequence[float], least: float, first: float) -> list[float]:
    """The places, from the top, moved down until they are `least` apart, and up again where they pass the end."""
    out, last = [0.0] * len(places), -math.inf
    for at in sorted(range(len(places)), key=places.__getitem__):
        last = out[at] = max(places[at], last + least, first)
    return out


def _rule(x1: float, y1: float, x2: float, y2: float, words: str, x: float, y: float, kind: str) -> Html:
    line = element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_="grid")
    return join(line, element("text", words, x=_n(x), y=_n(y), class_=f"tick {kind}"))


def _n(value: float) -> str:
    return f"{value:.1f}"
