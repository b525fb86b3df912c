"""Tables, answers side by side and the picture of models that answered prompts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.runs.evaluation.metrics import METRICS, format_difference, format_number_of, format_value
from bilevel_jax.runs.evaluation.summary import ANSWERS_FILE, JUDGEMENTS_FILE, QUESTIONS_FILE, RUN_FOLDER
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, make_table
from bilevel_jax.runs.report.numbers import MISSING
from bilevel_jax.runs.report.results import float_or_nan

JsonObject = dict[str, Any]
MAX_QUESTIONS_SHOWN = 24
"""Questions shown with their answers, of each kind: those that speak most for the model, and most for the baseline."""
MAX_TABLE_ROWS = 200
"""Questions in the table of numbers."""
MAX_CHARACTERS = 3000
"""Characters of an answer."""
LEVELS = {
    "better": ("good", "✓", "Better"),
    "worse": ("bad", "✗", "Worse"),
    "none": ("fair", "=", "No difference told"),
    "open": ("fair", "=", "Measured, not judged"),
    "undecided": ("fair", "?", "Undecided"),
    "single": ("fair", "=", "Measured"),
}
"""Level -> (colour, icon, headline)."""
LEVEL_WORDS = {
    "better": "better", "worse": "worse", "none": "no difference told", "open": "neither is better",
    "undecided": "undecided", "single": "",
}  # fmt: skip


def describe_run_evaluation(folder: Path, result: JsonObject) -> list[JsonObject]:
    """The values of evaluation.html: one entry for each comparison of a run's own models; none without prompts."""
    comparisons = (result.get("evaluate") or {"comparisons": {}})["comparisons"]
    return [
        describe_evaluation(folder / RUN_FOLDER / key, compared) | {"folder": f"{RUN_FOLDER}/{key}"}
        for key, compared in comparisons.items()
    ]


def describe_evaluation(folder: Path, result: JsonObject) -> JsonObject:
    """The values of the templates of evaluate, from what `result` says and from the tables in `folder`."""
    answers, questions = (run_dir.read_parquet(folder / name).to_pylist() for name in (ANSWERS_FILE, QUESTIONS_FILE))
    path = folder / JUDGEMENTS_FILE
    judgements = run_dir.read_parquet(path).to_pylist() if path.exists() else []
    picture, caption = plot_differences(result)
    return {
        "result": result,
        "level": LEVELS[result["level"]],
        "deciding": result["metrics"][result["metric"]],
        "picture": picture,
        "caption": caption,
        "metrics": metrics_table(result),
        "judge": judge_table(result),
        "details": [
            describe_question(questions[at], answers, judgements, result) for at in order_questions(questions, result)
        ],
        "table": questions_table(questions, result),
        "table_rows": min(len(questions), MAX_TABLE_ROWS),
        "total": len(questions),
        "max_characters": MAX_CHARACTERS,
        "models": models_table(result),
    }


# ---- tables


def metrics_table(result: JsonObject) -> Table:
    """A line for each metric: both models, their difference, which is better, the questions."""
    lines, names = result["metrics"], result["names"]

    def cell(line: JsonObject, role: str) -> Cell | str:
        if line[role] is None:
            return MISSING
        corpus = line["corpus"]
        sub = f"all answers together: {corpus[list(names).index(role)]:.1f}" if corpus else ""
        if line["unit"] == "nats per token" and line[role][0] is not None:
            sub = f"perplexity {math.exp(line[role][0]):.2f}"
        return Cell(format_value(line, line[role]), sub=sub)

    columns = [
        Column("", [bold_cell(line["title"], sub=f"{line['unit']}; {line['meaning']}") for line in lines.values()]),
        *(Column(names[role], [cell(line, role) for line in lines.values()], role, "tight") for role in names),
    ]
    if len(names) == 2:
        columns += [
            Column("difference", [_difference(name, line) for name, line in lines.items()], "paired, 95 %", "tight"),
            Column("the model is", [LEVEL_WORDS[line["level"]] for line in lines.values()], "", "tight"),
            Column("p", [_format_p(line["p"]) for line in lines.values()], "sign flips", "tight"),
        ]
    questions = [line["questions"] for line in lines.values()]
    return make_table(*columns, Column("questions", questions), row_classes={0: "strong"}, css_class="bench")


def _difference(name: str, line: JsonObject) -> str:
    return MISSING if line["difference"] is None else format_difference(name, line)


def _format_p(p: float | None) -> str:
    return MISSING if p is None else f"{p:.3f}"


def judge_table(result: JsonObject) -> Table | None:
    """Facts about the judge."""
    facts = result["judge"]
    if facts is None:
        return None
    tokens, lines = facts["tokens"], {"judge": f"{facts['name']} at {facts['url']}"}
    if pairs := facts["pairs"]:
        bias = {"is_share": True, "digits": 1}
        lines |= {
            "pairs of answers": f"{pairs['total']:,}; {pairs['asked']:,} were asked about, each in both orders",
            "position bias": f"{format_value(bias, pairs['position_bias'], signed=True)}: how much more often than "
            "half the answer shown first is preferred (cancelled by asking both orders)",
            "contradictions": f"{pairs['contradictions']:,}: another answer is better in the other order, so they tie",
            "without a verdict": f"{pairs['unjudged']:,}, left out",
        }
    lines |= {
        "requests": f"{facts['requests']:,}, {facts['asked_again']:,} of them again, as a reply was not understood",
        "tokens": f"{tokens['prompts']:,} of requests, {tokens['answers']:,} of replies"
        + (f"; the service does not count those of {tokens['not_counted']:,} replies" if tokens["not_counted"] else ""),
    }
    return make_table(
        Column("", [bold_cell(key) for key in lines]), Column("", list(lines.values())), css_class="facts"
    )


def models_table(result: JsonObject) -> Table:
    """What each model is and gave."""
    models = result["models"]

    def tokens(one: JsonObject) -> str:
        prompts = f" (prompts {one['tokens']['prompts']:,})" if "prompts" in one["tokens"] else ""
        return f"{one['tokens']['answers']:,}{prompts}"

    return make_table(
        Column("", [bold_cell(one["name"], sub=role) for role, one in models.items()]),
        Column("what", [one["kind"] for one in models.values()]),
        Column("fingerprint", [one["fingerprint"] for one in models.values()]),
        Column("answers", [one["answers"] for one in models.values()]),
        Column("cut", [one["cut"] for one in models.values()], "at max_new_tokens"),
        Column("missing", [one["missing"] for one in models.values()]),
        Column("characters", [one["characters"] for one in models.values()], "of an answer, mean"),
        Column("tokens", [tokens(one) for one in models.values()], "of answers", "tight"),
        Column("seconds", [result["seconds"][role] for role in models]),
    )


def questions_table(questions: Sequence[JsonObject], result: JsonObject) -> Table:
    """A line for each of the first questions: the value of each model by each metric."""
    shown, lines = questions[:MAX_TABLE_ROWS], result["metrics"]
    columns = [Column("question", [Cell(_one_line(item["prompt"]), "bdi", sub=_place(item)) for item in shown])]
    for name, line in lines.items():
        if name == "preference":
            columns.append(Column("win share", [_number(line, item[name]) for item in shown], "of the model", "tight"))
            continue
        for role in result["names"]:
            if (key := f"{name} of the {role}") in questions[0]:
                cells = [_number(line, item[key]) for item in shown]
                columns.append(Column(line["title"], cells, role, "tight"))
    return make_table(*columns)


def _number(line: JsonObject, value: float | None) -> str:
    number = float_or_nan(value)
    return MISSING if math.isnan(number) else format_number_of(line, number)


def _place(item: JsonObject) -> str:
    return f"{item['file']}:{item['line']}"


def _one_line(text: str) -> str:
    words = " ".join(text[:400].split())
    return words if len(words) <= 90 else f"{words[:89]}…"


# ---- questions with their answers


def order_questions(questions: Sequence[JsonObject], result: JsonObject) -> list[int]:
    """The questions that are shown: by turns those that speak most for the model and most for the baseline."""
    name, sign = result["metric"], result["metrics"][result["metric"]]["sign"] or 1
    gains = [_gain(name, item) for item in questions]
    known = [at for at, gain in enumerate(gains) if not math.isnan(gain)]
    ranked = sorted(known, key=lambda at: -sign * gains[at])
    others = [at for at in range(len(questions)) if at not in set(known)]
    ends = [at for pair in zip(ranked, ranked[::-1], strict=True) for at in pair]
    return list(dict.fromkeys([*ends, *others]))[: 2 * MAX_QUESTIONS_SHOWN]


def _gain(name: str, item: JsonObject) -> float:
    if name == "preference":
        return float_or_nan(item[name]) - 0.5
    values = [float_or_nan(item.get(f"{name} of the {role}", 0.0)) for role in ("model", "baseline")]
    return values[0] - values[1]


def describe_question(
    question: JsonObject, answers: Sequence[JsonObject], judgements: Sequence[JsonObject], result: JsonObject
) -> JsonObject:
    """A question with the first answer of each model, what was measured of it, and the judge's words on it."""
    first = [row for row in answers if row["id"] == question["id"] and row["draw"] == 0]
    own = [row for row in judgements if row["id"] == question["id"] and row["draw"] == 0]
    return {
        "title": _one_line(question["prompt"]),
        "place": _place(question),
        "prompt": question["prompt"],
        "reference": question["reference"],
        "win_share": question.get("preference"),
        "answers": [
            {
                "name": result["names"][row["role"]],
                "text": row["answer"] or f"(no answer: {row['missing'] or 'empty'})",
                "facts": [
                    f"{line['title']} {_number(line, row[name])}"
                    for name, line in result["metrics"].items()
                    if name in row and row[name] is not None
                ]
                + ([] if row["ended"] or row["missing"] else ["cut"]),
            }
            for row in first
        ],
        "judgements": [
            (f"{row['metric']}, {row['shown']}: {row['verdict'] or 'no verdict'}", row["reply"]) for row in own
        ],
    }


# ---- the picture


def plot_differences(result: JsonObject) -> tuple[Markup | None, str]:
    """(a line for each metric that has a direction, turned so that the right is better; its caption).

    One metric stands in its own unit; several over the half-widths of their intervals, so that they share an axis.
    """
    lines = {name: line for name, line in result["metrics"].items() if line["difference"] is not None and line["sign"]}
    spans = {name: _turned(line) for name, line in lines.items()}
    shown = [name for name, (_, low, high) in spans.items() if high > low]
    if not shown:
        return None, ""
    unit = "half-widths of its interval"
    if len(shown) == 1:
        unit = "points" if lines[shown[0]]["is_share"] else lines[shown[0]]["unit"]
    rows = []
    for name in shown:
        value, low, high = spans[name]
        scale = 2 / (high - low) if len(shown) > 1 else 100 if lines[name]["is_share"] else 1
        ends = scale * value, scale * low, scale * high
        colour = {"better": 3, "worse": 4}.get(lines[name]["level"], 5)
        rows.append(IntervalRow(lines[name]["title"], *ends, emphasized=name == result["metric"], colour=colour))
    caption = (
        "Differences between the models with their 95 % intervals, turned so that the right side is better. An "
        "interval that reaches the dashed line tells no difference."
    )
    return figures.plot_intervals(rows, f"difference, {unit}; right of 0: the model is better", reference=0.0), caption


def _turned(line: JsonObject) -> tuple[float, float, float]:
    """(value, low, high) of a difference, so that more is better; of win rates that of the two."""
    factor = line["sign"] * (2 if line["unit"] == METRICS["preference"].unit else 1)
    value, *ends = (factor * float_or_nan(end) for end in line["difference"])
    return value, min(ends), max(ends)
