"""The report page of a `tune` run."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.commands.tune.search import PROMISING
from bilevel_jax.core.certify import Verdict
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Point, Shape
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import MISSING
from bilevel_jax.runs.report.results import float_or_nan, write_report

JsonObject = dict[str, Any]
MARKS: dict[str, tuple[int, Shape]] = {
    "BELIEVE": (3, "circle"),
    "UNDECIDED": (0, "square"),
    "DO NOT BELIEVE": (1, "cross"),
    "": (5, "diamond"),
}
"""Verdict -> the colour and the shape of its points; "": not all certificates were computed."""


def write_tune_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_tune_report)


def render_tune_report(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    return render_page(
        "tune.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        picture=plot_settings(result),
        table=settings_table(result),
        headline=choose_headline(result),
        costs=list_costs(result),
        certified=sum(row["verdict"] is not None for row in result["rows"]),
        failures=[f"{row['name']}: {row['failure']}" for row in result["rows"] if row["failure"]],
        verdicts=[(row["name"], describe_verdict(row)) for row in result["rows"] if row["verdict"]],
    )


# ---- sentences


def summarize_tuning(result: JsonObject) -> str:
    """What is proposed, and what it costs in loss; or the closest setting."""
    own, tolerance = result["rows"][0], f"{result['max_loss_increase']:.0%}"
    row = find_row(result, result["proposed"])
    if row is not None and row["name"] == own["name"]:
        return f"{format_level(row)}: the config's own setting holds, and nothing has to change."
    if row is not None:
        of_own = "failed" if own["verdict"] is None and own["failure"] else f"is {format_level(own)}"
        return (
            f"Use {result['flags']}: {format_level(row)}, with {describe_loss(result, row)}; the config's own setting "
            f"{of_own}. For other examples than those of validation: {row['verdict'].get('others_level', 'UNDECIDED')}."
        )
    end = " tune.budget ended the search." if result["stopped_by_budget"] else ""
    if (row := find_row(result, result["beyond"])) is not None:
        return (
            f"No setting within {tolerance} of the loss holds. {capitalize_name(row)} does, with "
            f"{describe_loss(result, row)}, more than tune.max_loss_increase allows.{end}"
        )
    closest = find_closest(result)
    if closest is None:
        return f"No setting holds, and none could be certified. The config's own: {own['failure'] or 'trained'}{end}"
    return (
        f"No setting that was tried holds. The closest is {closest['name']}: {format_level(closest)}, "
        f"{describe_smoothness(closest)}, with {describe_loss(result, closest)}.{end}"
    )


def describe_loss(result: JsonObject, row: JsonObject) -> str:
    """The loss of a setting that it is chosen by, against that of the config's own, and both on test."""
    parts = [result["part"], *(["test"] if row["losses"].get("test") is not None else [])]
    words = [f"a {part} loss of {row['losses'][part]:.4f}{_describe_change(result, row, part)}" for part in parts]
    return " and ".join(words)


def _describe_change(result: JsonObject, row: JsonObject, part: str) -> str:
    change = loss_change(result, row, part)
    return "" if change is None or row is result["rows"][0] else f" ({change:+.1%})".replace("-", "\u2212")


def loss_change(result: JsonObject, row: JsonObject, part: str) -> float | None:
    """By which share the loss of a setting is above that of the config's own; None where one has none."""
    own, loss = result["rows"][0]["losses"].get(part), row["losses"].get(part)
    return None if own is None or loss is None or own == 0 else (loss - own) / abs(own)


def describe_smoothness(row: JsonObject) -> str:
    """The metasmoothness of a setting, in words."""
    if (share_and_cosine := read_smoothness(row)) is None:
        return "of which metasmoothness could not be measured"
    share, cosine = share_and_cosine
    return f"metasmoothness {cosine:.2f} without {share:.0%} of the examples"


def read_smoothness(row: JsonObject) -> tuple[float, float] | None:
    """(share, cosine) of the largest share: the mean over draws, or where not all were drawn the first."""
    certificates = row["certificates"]
    if certificates and certificates["smooth"] and certificates["smooth"]["removed"]:
        cosine = certificates["smooth"]["cosines"][0]
        return None if cosine is None else (certificates["smooth"]["removed"][0], cosine)
    return None if row["draw"] is None else (row["share"], row["draw"])


def find_row(result: JsonObject, name: str | None) -> JsonObject | None:
    """The row of a setting."""
    return next((row for row in result["rows"] if row["name"] == name), None)


def find_closest(result: JsonObject) -> JsonObject | None:
    """The setting within the limit that is nearest to holding: by its level, then by its metasmoothness."""
    levels = {"UNDECIDED": 2, "": 1, "DO NOT BELIEVE": 0}
    measured = [
        row
        for row in result["rows"]
        if row["losses"].get(result["part"]) is not None and read_smoothness(row) is not None
        and row["losses"][result["part"]] <= result["limit"]
    ]  # fmt: skip
    return max(measured, key=lambda row: (levels[level_of(row)], (read_smoothness(row) or (0, 0))[1]), default=None)


def level_of(row: JsonObject) -> str:
    """The level of a setting; nothing where not all certificates were computed."""
    return row["verdict"]["level"] if row["verdict"] else ""


def format_level(row: JsonObject) -> str:
    """The level with its scope, or how far the setting came."""
    if row["verdict"] is not None:
        return " ".join(filter(None, [row["verdict"]["level"], row["verdict"]["scope"]]))
    if row["failure"]:
        return "failed"
    if row["draw"] is None:
        return "trained alone"
    return "rough by one draw" if row["draw"] < PROMISING else "not certified"


def capitalize_name(row: JsonObject) -> str:
    """The name of a setting at the start of a sentence."""
    return row["name"][:1].upper() + row["name"][1:]


def describe_verdict(row: JsonObject) -> str:
    """The verdict of a setting in full, for other examples, too."""
    return str(Verdict(**row["verdict"]))


def choose_headline(result: JsonObject) -> tuple[str, str, str]:
    """(kind, icon, words) of the box at the top."""
    if result["proposed"] is None:
        return "bad", "✕", "No setting holds within the limit"
    if result["proposed"] == result["rows"][0]["name"]:
        return "good", "✓", "The config's own setting holds"
    return "good", "✓", f"Use {result['proposed']}"


def list_costs(result: JsonObject) -> list[str]:
    """Sentences on what choosing did to the numbers of the proposed setting."""
    row, sentences = find_row(result, result["proposed"]), []
    if row is None or row["name"] == result["rows"][0]["name"]:
        return []
    count = sum(trial["losses"].get(result["part"]) is not None for trial in result["rows"])
    chosen = f"The {result['part']} loss is the one that {count} settings were chosen by, so that of the chosen one is"
    if result["optimism"] is not None:
        share = abs(result["optimism"] / row["losses"][result["part"]])
        sentences.append(
            f"{chosen} too low, by about {result['optimism']:.2g} {result['unit']} ({share:.1%}; bootstrap over its "
            "examples, as if all settings within the limit held that were not found too rough)."
        )
    else:
        sentences.append(f"{chosen} too low by chance; how much was not estimated.")
    least = min(result["rows"], key=lambda trial: float_or_inf(trial["losses"].get(result["part"])))
    if least is not row:
        loss = least["losses"][result["part"]]
        sentences.append(f"The least {result['part']} loss of all is {loss:.4f}, with {least['name']}.")
    if result["part"] == "validation":
        sentences.append("Validation steers the weights, too: give data.dev for a loss that does not.")
    sentences.append(
        f"Of a setting whose first draw of metasmoothness is below {PROMISING} no more are made, and that draw is one "
        "of those that its verdict rests on: this can only take a BELIEVE away."
    )
    if row["losses"].get("test") is not None:
        sentences.append("Test has chosen nothing.")
    if row["cost_factor"] != 1:
        sentences.append(f"Every training costs {row['cost_factor']:g} times as much as with the config's own batches.")
    return sentences


def float_or_inf(value: float | None) -> float:
    """The number; infinity for None."""
    return math.inf if value is None else value


# ---- table and picture


def settings_table(result: JsonObject) -> Table:
    """A line per setting, in the order in which they were tried."""
    rows, part = result["rows"], result["part"]
    tags = {result["proposed"]: "proposed", result["beyond"]: "above the limit"}
    parts = [part, *(name for name in ("validation", "test") if name != part and rows_have(result, name))]
    columns = [Column("setting", [bold_cell(row["name"], tag=tags.get(row["name"], "")) for row in rows])]
    for name in parts:
        columns.append(Column(f"{name} loss", [row["losses"].get(name) for row in rows], result["unit"]))
    changes = [loss_change(result, row, part) for row in rows]
    texts = [MISSING if change is None else f"{100 * change:+.1f}\u00a0%".replace("-", "\u2212") for change in changes]
    columns += [
        Column("change", texts, f"of {part} loss", "tight"),
        Column("ratio", [read_ratio(row) for row in rows], "actual / predicted, at .1"),
        Column("metasmoothness", [_smoothness_cell(row) for row in rows], "largest share first", "tight"),
        Column("verdict", [format_level(row) for row in rows]),
    ]
    proposed = {at: "strong" for at, row in enumerate(rows) if row["name"] == result["proposed"]}
    return make_table(*columns, row_classes=proposed, css_class="bench")


def rows_have(result: JsonObject, part: str) -> bool:
    """Whether a setting has a loss on a part."""
    return any(row["losses"].get(part) is not None for row in result["rows"])


def read_ratio(row: JsonObject) -> float | None:
    """The ratio of the finite differences at the least step from .1 on, or else the largest."""
    exact = row["certificates"] and row["certificates"]["exact"]
    if not exact or not exact["steps"]:
        return None
    return exact["ratios"][min(range(len(exact["steps"])), key=lambda at: abs(exact["steps"][at] - 0.1))]


def _smoothness_cell(row: JsonObject) -> Cell:
    certificates = row["certificates"]
    if certificates and certificates["smooth"] and certificates["smooth"]["removed"]:
        pairs = zip(certificates["smooth"]["removed"], certificates["smooth"]["cosines"], strict=True)
        words = [f"{float_or_nan(cosine):.2f} ({share:.0%} out)" for share, cosine in pairs]
        return Cell(", ".join(words).replace("-", "\u2212"))
    if row["draw"] is None:
        return Cell(MISSING)
    return Cell(f"{row['draw']:.2f}".replace("-", "\u2212"), sub=f"one draw, {row['share']:.0%} out")


def plot_settings(result: JsonObject) -> Markup | None:
    """A point per setting: its loss by its metasmoothness."""
    part, points = result["part"], []
    for row in result["rows"]:
        smooth, loss = read_smoothness(row), row["losses"].get(result["part"])
        if smooth is None or loss is None:
            continue
        colour, shape = MARKS[level_of(row)]
        is_named = row is result["rows"][0] or row["name"] in (result["proposed"], result["beyond"])
        title = f"{row['name']}: {format_level(row)}, {part} loss {loss:.4g}, metasmoothness {smooth[1]:.2f}"
        points.append(
            Point(smooth[1], loss, name=row["name"] if is_named else "", title=title, colour=colour, shape=shape)
        )
    if not points:
        return None
    return figures.plot_lines(
        [],
        "metasmoothness",
        f"{part} loss, {result['unit']}",
        points=points,
        x_values_shown=[0, 1],
        x_ticks={tenth / 10: f"{tenth / 10:g}".replace("-", "\u2212") for tenth in range(-10, 11, 2)},
        reference=float_or_nan(result["limit"]),
        height=340,
        width=560,
    )
