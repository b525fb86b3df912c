"""The report page and Markdown table of a `compare` run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from bilevel_jax.commands.compare.report_answers import describe_arm_answers, format_answers_markdown
from bilevel_jax.commands.compare.report_mixtures import describe_mixtures, format_mixtures_markdown
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Series
from bilevel_jax.runs.report.html import Column, Table, bold_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import MeanInterval, format_number
from bilevel_jax.runs.report.results import float_or_nan, write_report
from bilevel_jax.runs.report.targets import describe_target_results
from bilevel_jax.runs.stats import mean_interval

JsonObject = dict[str, Any]
TABLE_COLUMNS = (
    ("auc", "AUC", "of the weights against the labels"),
    ("f1", "F1", "good examples = weight above 1"),
    ("test", "test loss", "retrained with the weights"),
    ("accuracy", "accuracy", "the same"),
    ("with_v test", "test loss, with validation", "retrained with the weights and validation"),
    ("with_v accuracy", "accuracy, with validation", "the same"),
    ("own test", "test loss, own model", "the method's own, trained on validation"),
    ("own accuracy", "accuracy, own model", "the same"),
    ("distance", "to oracle + V", "test loss minus that of oracle + validation, by seed"),
    ("ess", "ESS", "examples"),
    ("passes", "passes", "forward and backward, one batch"),
    ("seconds", "seconds", "one seed"),
)
"""(key, heading, unit); columns without a number are left out."""


def write_compare_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""

    def render(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
        answers = describe_arm_answers(folder, result)
        return render_compare_report(name, result, config_text, environment, answers)

    return write_report(folder, render)


def render_compare_report(
    name: str, result: JsonObject, config_text: str, environment: JsonObject, answers: JsonObject | None = None
) -> str:
    """The whole report as HTML; `answers` are those of all arms to evaluate.prompts."""
    return render_page(
        "compare.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        protocol=describe_protocol(result),
        picture=plot_cost_curves(result),
        table=comparison_table(result),
        reliability=describe_reliability(result),
        answers=answers,
        mixtures=describe_mixtures(result),
        estimands=estimand_table(result),
        targets=describe_target_results(
            result.get("targets", []),
            {row["name"]: [cell.get("targets") for cell in row["runs"]] for row in result["rows"]},
        ),
        ended=_list_ends(result["rows"]),
        left_out=_list_left_out(result["rows"]),
    )


# ---- in words


def _list_ends(rows: list[JsonObject]) -> list[str]:
    """Why methods stopped before their budget was spent: once for all seeds that ended alike."""
    ends = [f"{row['name']}: {cell['ended']}." for row in rows for cell in row["runs"] if cell.get("ended")]
    return list(dict.fromkeys(ends))


def _list_left_out(rows: list[JsonObject]) -> list[str]:
    """How many trainings diverged and were left out by each method and seed, and why the first did."""
    return [
        f"{row['name']}, seed {seed}: {format_count('training', len(failures))} diverged, which its fit leaves out. "
        f"The first is {failures[0]}."
        for row in rows
        for seed, cell in enumerate(row["runs"])
        if (failures := cell.get("failures"))
    ]


def summarize_comparison(result: JsonObject) -> str:
    """Which method leads, by how much, which others are not distinguishable, and whether labels matter for the loss."""
    methods = [row for row in result["rows"] if row["learns"] and "test" in row["mean"]]
    parts, labels = [], result["labels"]
    if labels:
        parts += _describe_leader(methods, "auc", -1, "ranks the examples best", "AUC")
        parts += _describe_leader(methods, "f1", -1, "sorts them best", "F1")
    parts += _describe_leader(
        methods, "with_v test", 1, "trained again with its weights and validation is lowest on test", "test loss"
    )
    rows = {row["name"]: row for row in result["rows"]}
    if ranked_texts := [
        f"{name} {_format_estimate(rows[name], 'auc')}"
        for name in ("top_alignment", "low_loss")
        if name in rows and labels
    ]:
        parts.append(f"Ranked once, after uniform training: AUC {', '.join(ranked_texts)}.")
    if "validation" in rows and "train+validation" in rows:
        pair = [f"{_format_estimate(rows[name], 'test')}" for name in ("validation", "train+validation")]
        parts.append(f"Validation alone reaches test loss {pair[0]}, all examples with validation {pair[1]}.")
    if "oracle" in rows and "uniform" in rows:
        gain, half = mean_interval([a["test"] - b["test"] for a, b in _pair_runs(rows["oracle"], rows["uniform"])])
        if gain + half < 0:
            parts.append("The oracle beats uniform, so the labels mean something here.")
        elif not math.isnan(half):
            parts.append("The oracle does not clearly beat uniform, so AUC and F1 mean little here.")
    if result["seeds"] == 1:
        parts.append("One seed tells nothing apart.")
    return " ".join(parts) or "No method was compared."


def describe_protocol(result: JsonObject) -> str:
    """The budget and the seeds that all methods share, and what a number is a mean of."""
    counts = ", ".join(f"{part} {count:,}" for part, count in result["counts"].items())
    return (
        f"Examples: {counts}. Budget of a method and seed: {result['budget']:,} forward-backward passes over a batch "
        f"of {result['batch']} (a training step 1, a step of the backward pass 1 to replay and 3 for its Hessian "
        "product, a product of implicit's solve 3 a batch, a single-loop step 2, or 3 with a second model). One "
        f"training is {result['steps']} steps, which is also what every retrain makes; "
        f"{RESTART_DESCRIPTIONS[result['restart']]}. Seeds: {result['seeds']}; ± is the half-width "
        "of the 95 % interval of their mean by Student's t. " + (F1_DEFINITION if result["labels"] else "")
    )


def describe_reliability(result: JsonObject) -> str:
    """How far the hypergradients of the first outer step speak for other examples, by a method that measured it; "" if
    none did."""
    for row in result["rows"]:
        values = [cell["trail"][0].get("reliability") for cell in row["runs"] if cell.get("trail")]
        known: list[float] = [value for value in values if value is not None]
        if known and len(known) == len(row["runs"]):
            mean, half = mean_interval(known)
            reliability = format_number(mean, 2) + ("" if math.isnan(half) else f" ± {format_number(half, 2)}")
            return (
                f"Where all weights are equal, the reliability of the hypergradients is {reliability} (measured by "
                f"{row['name']}): about their correlation with those by an endless validation set. Near 1 they speak "
                "for other validation examples, too; near 0 for these alone."
            )
    return ""


RESTART_DESCRIPTIONS = {
    "cold": "while weights are learned, each training begins at the first parameters",
    "warm": "while weights are learned, each training begins where the last one ended (retrains never do)",
}
F1_DEFINITION = (
    "F1 is the field's for hyper-cleaning: an example counts as called good where its weight is above 1, which for "
    "weights 2σ(h) is σ(h) > .5; examples of a subset count as called good. Subsets are given their share, which "
    "methods are not."
)


def _describe_leader(methods: Sequence[JsonObject], key: str, sign: int, what: str, name: str) -> list[str]:
    ranked = sorted((row for row in methods if key in row["mean"]), key=lambda row: sign * row["mean"][key])
    if not ranked:
        return []
    best, *others = ranked
    close = [row["name"] for row in others if not _is_distinguishable(best, row, key) and len(row["runs"]) > 1]
    ties = f", not told apart from {', '.join(close)}" if close else ""
    return [f"{_display_name(best['name'])} {what}: {name} {_format_estimate(best, key)}{ties}."]


def _display_name(name: str) -> str:
    return f"BMO{name[3:]}" if name.startswith("bmo") else name.replace("_", " ").capitalize()


def _is_distinguishable(row: JsonObject, other: JsonObject, key: str) -> bool:
    """Whether the two differ by more than the interval of their difference by seed."""
    outer, _, inner = key.rpartition(" ")
    pairs = [(a[outer][inner], b[outer][inner]) if outer else (a[key], b[key]) for a, b in _pair_runs(row, other)]
    mean, half = mean_interval([a - b for a, b in pairs])
    return abs(mean) > half  # false with one seed, whose interval is nan


def _pair_runs(row: JsonObject, other: JsonObject) -> list[tuple[JsonObject, JsonObject]]:
    return list(zip(row["runs"], other["runs"], strict=True))


def _format_estimate(row: JsonObject, key: str) -> str:
    mean, half = row["mean"].get(key), float_or_nan(row["interval"].get(key))
    return format_number(mean, 3) + ("" if math.isnan(half) else f" ± {format_number(half, 2)}")


# ---- tables


def comparison_table(result: JsonObject) -> Table:
    """A line per variant: baselines first, then methods that learn weights."""
    rows = result["rows"]
    return make_table(
        Column("", [bold_cell(row["name"], sub=row["of"]) for row in rows]),
        *(
            Column(heading, [_get_estimate(row, key) for row in rows], unit)
            for key, heading, unit in _nonempty_columns(result)
        ),
        row_classes={index: "strong" for index, row in enumerate(rows) if row["learns"]},
        css_class="bench",
    )


def estimand_table(result: JsonObject) -> Table:
    """A line per method: what its hypergradient is of, and what it is exact for."""
    rows = [row for row in result["rows"] if row["learns"]]
    return make_table(
        Column("method", [row["name"] for row in rows]),
        Column("its gradient, or its model, is of", [row["of"] for row in rows]),
        Column("exact for that", [row["exact"] for row in rows]),
    )


def format_markdown(result: JsonObject) -> str:
    """The table as Markdown, with the sentence before it and the protocol after it."""
    columns = _nonempty_columns(result)
    heads = ["", *(head for _, head, _ in columns)]
    names = [f"**{row['name']}**" if row["learns"] else row["name"] for row in result["rows"]]
    lines = [
        f"| {' | '.join([name, *(_format_estimate(row, key) for key, _, _ in columns)])} |"
        for name, row in zip(names, result["rows"], strict=True)
    ]
    exact = [f"| {row['name']} | {row['of']} | {row['exact']} |" for row in result["rows"] if row["learns"]]
    return "\n".join(
        [
            result["sentence"], "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines, "",
            describe_protocol(result), "", *format_mixtures_markdown(result), *format_answers_markdown(result),
            "| method | of | exact for that |", "|---|---|---|", *exact, "",
        ]
    )  # fmt: skip


def _nonempty_columns(result: JsonObject) -> list[tuple[str, str, str]]:
    columns = [column for column in TABLE_COLUMNS if any(column[0] in row["mean"] for row in result["rows"])]
    sources = sorted({key for row in result["rows"] for key in row["mean"] if key.startswith("weight of ")})
    return columns + [(key, key, "mean weight of its examples") for key in sources]


def _get_estimate(row: JsonObject, key: str) -> MeanInterval | None:
    return MeanInterval(float_or_nan(row["mean"].get(key)), float_or_nan(row["interval"].get(key)))


# ---- the picture


def plot_cost_curves(result: JsonObject) -> Markup:
    """A line per method: quality by passes spent, its name at the line's end."""
    lines = {row["name"]: _mean_curve(row, result["labels"]) for row in result["rows"] if row["learns"]}
    curves = [
        Series(name, [x for x, _ in points], [y for _, y in points], colour, "named")
        for colour, (name, points) in enumerate((name, points) for name, points in lines.items() if points)
    ]
    if not curves:
        return Markup("<p>No method made a step.</p>")
    unit = "AUC" if result["labels"] else f"test loss, {result['unit']}"
    return figures.plot_lines(curves, "passes spent", unit, x_values_shown=[0], height=370, width=710)


def _mean_curve(row: JsonObject, labels: bool) -> list[tuple[float, float]]:
    """(passes, quality), means over the seeds, as far as every seed went."""
    runs = [cell["trail"] for cell in row["runs"]]
    points = []
    for seed_points in zip(*runs, strict=False):
        values = [point["auc"] if labels else point["loss"].get("test") for point in seed_points]
        if all(value is not None for value in values):
            points.append((float(np.mean([point["passes"] for point in seed_points])), float(np.mean(values))))
    return points
