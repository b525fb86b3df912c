"""The part of the report of `compare` on answers to prompts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.runs.evaluation.metrics import format_difference, format_number_of, format_value
from bilevel_jax.runs.evaluation.summary import ANSWERS_FILE, JUDGEMENTS_FILE, QUESTIONS_FILE, RUN_FOLDER
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.evaluation import (
    LEVEL_WORDS,
    LEVELS,
    MAX_CHARACTERS,
    describe_question,
    judge_table,
    models_table,
    order_questions,
)
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, make_table
from bilevel_jax.runs.report.numbers import MISSING
from bilevel_jax.runs.report.results import float_or_nan

JsonObject = dict[str, Any]
MAX_QUESTIONS_SHOWN = 8
"""Questions shown with their answers, of each arm."""


def describe_arm_answers(folder: Path, result: JsonObject) -> JsonObject | None:
    """The values of compare_answers.html, from result.json and the tables in `folder`; None without prompts."""
    found = result.get("evaluate")
    if not found:
        return None
    comparisons = found["comparisons"]
    first = next(iter(comparisons.values()))
    one_metric = {"is_share": True, "digits": 1}
    return {
        "result": found,
        "level": _choose_level([one["level"] for one in comparisons.values()], found["baseline"]),
        "confidence": format_number_of(one_metric, 1 - found["level_of_each"]),
        "total": first["counts"]["questions"],
        "metrics": [
            {
                "title": first["metrics"][name]["title"],
                "table": metric_table(result, name),
                "picture": plot_arm_differences(result, name),
            }
            for name in first["metrics"]
        ],
        "signatures": [
            f"{line['title']}: {line['signature']}" for line in first["metrics"].values() if line["signature"]
        ],
        "arms": [
            {"arm": arm, **_describe_arm(folder / RUN_FOLDER / arm, compared)} for arm, compared in comparisons.items()
        ],
        "refusal_by": first["refusal_by"],
    }


def _choose_level(levels: Sequence[str], baseline: str) -> tuple[str, str, str]:
    """(colour, icon, headline) of the deciding metric, of which every arm has a level."""
    better, worse, undecided = (levels.count(level) for level in ("better", "worse", "undecided"))
    rest = f", {undecided} undecided" if undecided else ""
    if better or worse:
        colour, icon, _ = LEVELS["better" if better > worse else "worse" if worse > better else "none"]
        counts = f"{better or 'None'} of {len(levels)} better than {baseline}"
        return colour, icon, counts + (f", {worse} worse" if worse else "") + rest
    colour, icon, headline = LEVELS[levels[0] if len(set(levels)) == 1 else "none"]
    return colour, icon, headline + ("" if headline == LEVELS["undecided"][2] else rest)


def metric_table(result: JsonObject, name: str) -> Table:
    """A line for each arm, the baseline among them: its value, its difference from the baseline, what that tells."""
    found, rows = result["evaluate"], [row for row in result["rows"] if _answers(result, row["name"])]
    lines = {arm: compared["metrics"][name] for arm, compared in found["comparisons"].items()}
    baseline_line = max(lines.values(), key=lambda line: line["questions"])

    def cells(make: Any) -> list[Any]:
        return [make(lines[row["name"]]) if row["name"] in lines else MISSING for row in rows]

    def value(row: JsonObject) -> Cell:
        line = lines.get(row["name"], baseline_line)
        reading = line["model" if row["name"] in lines else "baseline"]
        has_perplexity = line["unit"] == "nats per token" and reading[0] is not None
        sub = f"perplexity {math.exp(reading[0]):.2f}" if has_perplexity else ""
        return Cell(format_value(line, reading), sub=sub)

    def difference(key: str) -> Any:
        return lambda line: MISSING if line[key] is None else format_difference(name, line, key)

    unit, title = baseline_line["unit"], baseline_line["title"]
    valued = {*lines} if name == "preference" else {*lines, found["baseline"]}
    columns = [
        Column("", [bold_cell(row["name"], tag=_tag(row, found)) for row in rows]),
        Column(title, [value(row) if row["name"] in valued else MISSING for row in rows], unit, "tight"),
        Column(f"minus {found['baseline']}", cells(difference("difference")), "interval for all arms at once", "tight"),
        Column("that is", cells(lambda line: LEVEL_WORDS[line["level"]]), "", "tight"),
        Column("p", cells(lambda line: MISSING if line["p"] is None else f"{line['p']:.3f}"), "corrected", "tight"),
    ]
    columns.append(Column("these models", cells(difference("for_these_models")), "this arm alone, 95 %", "tight"))
    counts = [(lines.get(row["name"]) or baseline_line)["questions"] for row in rows]
    return make_table(
        *columns,
        Column("prompts", counts),
        row_classes={at: "strong" for at, row in enumerate(rows) if row["learns"]},
        css_class="bench",
    )


def _answers(result: JsonObject, arm: str) -> bool:
    found = result["evaluate"]
    return arm == found["baseline"] or arm in found["comparisons"]


def _tag(row: JsonObject, found: JsonObject) -> str:
    return "the baseline" if row["name"] == found["baseline"] else ""


def plot_arm_differences(result: JsonObject, name: str) -> Markup | None:
    """A line for each arm: its difference from the baseline, turned so that the right is better; seeds below it."""
    found = result["evaluate"]
    rows = []
    for row in result["rows"]:
        if row["name"] not in found["comparisons"]:
            continue
        line = found["comparisons"][row["name"]]["metrics"][name]
        if line["difference"] is None:
            continue
        factor = (line["sign"] or 1) * (2 if name == "preference" else 1) * (100 if line["is_share"] else 1)
        value, *ends = (factor * float_or_nan(end) for end in line["difference"])
        rows.append(
            IntervalRow(
                row["name"],
                value,
                min(ends),
                max(ends),
                [factor * of_seed for of_seed in line["by_seed"]] if len(line["by_seed"]) > 1 else (),
                emphasized=row["learns"],
                colour={"better": 3, "worse": 4}.get(line["level"], 5),
            )
        )
    if not rows:
        return None
    unit = "points" if line["is_share"] else line["unit"]
    side = "right of the line: better" if line["sign"] else "neither side is better"
    label = f"{line['title']}, difference from {found['baseline']}, {unit}; {side}"
    return figures.plot_intervals(rows, label, reference=0.0, width=710)


def _describe_arm(folder: Path, compared: JsonObject) -> JsonObject:
    """The values of evaluation_parts.html on one arm and the baseline."""
    answers, questions = (run_dir.read_parquet(folder / name).to_pylist() for name in (ANSWERS_FILE, QUESTIONS_FILE))
    path = folder / JUDGEMENTS_FILE
    judgements = run_dir.read_parquet(path).to_pylist() if path.exists() else []
    shown = order_questions(questions, compared)[:MAX_QUESTIONS_SHOWN]
    return {
        "result": compared,
        "deciding": compared["metrics"][compared["metric"]],
        "details": [describe_question(questions[at], answers, judgements, compared) for at in shown],
        "total": len(questions),
        "max_characters": MAX_CHARACTERS,
        "judge": judge_table(compared),
        "models": models_table(compared),
    }


def format_answers_markdown(result: JsonObject) -> list[str]:
    """The lines of the Markdown table of answers by the deciding metric; none without prompts."""
    found = result.get("evaluate")
    if not found:
        return []
    name = found["metric"]
    lines: Sequence[tuple[str, JsonObject]] = [
        (arm, compared["metrics"][name]) for arm, compared in found["comparisons"].items()
    ]
    title = lines[0][1]["title"]
    rows = [
        f"| {arm} | {format_value(line, line['model'])} | "
        f"{MISSING if line['difference'] is None else format_difference(name, line)} | {LEVEL_WORDS[line['level']]} |"
        for arm, line in lines
    ]
    head = f"| | {title} | minus {found['baseline']}, for all arms at once | that is |"
    return [found["sentence"], "", head, "|---|---|---|---|", *rows, ""]
