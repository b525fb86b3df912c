"""The report of `rank`: the pick or none, every metric of every strategy, how they agree, responses with their text."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bilevel_jax.commands.rank.metrics import METRICS
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
    truncate_text,
    verdict_banner,
)
from bilevel_jax.runs.report.numbers import MISSING, capitalize_first, format_number, format_percent
from bilevel_jax.runs.report.results import float_or_nan, write_report

JsonObject = dict[str, Any]
MAX_QUESTIONS_SHOWN = 24
"""Questions that are shown with their responses: those that set the strategies furthest apart, half of them, and the
first ones."""
MAX_RESPONSE_CHARACTERS = 700
"""Characters of a response."""
DIRECTION_LABELS = {1: "the largest wins", -1: "the least wins"}


def write_rank_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    responses = pq.read_table(folder / "rank.parquet").to_pylist()
    return write_report(folder, partial(render_rank_report, responses))


def render_rank_report(
    responses: Sequence[JsonObject], name: str, result: JsonObject, config_text: str, environment: JsonObject
) -> str:
    """The whole report as HTML."""
    verdict, pick_by = result["verdict"], next(iter(result["metrics"]))
    intro = join_html(
        "bilevel_jax rank, run ",
        html_element("b", name),
        ". A strategy is a way of generating responses. Each is judged by how the model, before any training, takes "
        "its responses to the same questions.",
    )
    lead = join_html(
        verdict_banner(
            "good" if verdict["use"] else "fair",
            "✓" if verdict["use"] else "?",
            f"Use {verdict['use']}" if verdict["use"] else verdict["sentence"].partition(":")[0],
            html_paragraph(verdict["sentence"]),
            html_note(describe_protocol(result, pick_by)),
        ),
        html_element(
            "div",
            *(
                html_figure(
                    plot_metric(result, metric, pick_by),
                    f"{METRICS[metric].title}: {METRICS[metric].meaning}.",
                    wide=True,
                )
                for metric in result["metrics"]
            ),
            class_="pair",
        ),
        *(html_note(f"{capitalize_first(text)}.", "warning") for text in result["remarks"]),
        html_note(
            f"Strategies stand in the order of {METRICS[pick_by].title}, the best at the top. Bars: 95 % bootstrap "
            "intervals over the questions. Small points: the blocks, each with its own answers of the model."
        ),
    )
    trial_section = [("trials", "Train-then-test", render_trials(result))] if result["tested"] else []
    sections = [
        ("ranking", "Every strategy", render_ranking_table(result, pick_by)),
        ("agreement", "Do the metrics agree?", render_agreement(result)),
        *trial_section,
        ("questions", "Question by question", render_questions(responses, result, pick_by)),
        ("costs", "What it cost", render_costs(result)),
        ("provenance", "Data, and how to see the same numbers", render_provenance(result, config_text, environment)),
    ]
    return html_document(f"{name}: rank", "Which responses will train this model best", intro, lead, sections)


# ---- in words


def describe_protocol(result: JsonObject, pick_by: str) -> str:
    """How the numbers were made, and what they cannot say."""
    counts = result["counts"]
    rest = (
        " SPPL was published with a gain over plain perplexity of 0.30 points of accuracy, 95 % interval −0.02 to 0.83."
        if pick_by == "sppl"
        else ""
    )
    return (
        f"{counts['blocks']} disjoint blocks of {counts['block']} questions, drawn by id from {counts['questions']:,}. "
        "A strategy's score is the mean over the blocks. The rule: the best two are compared on the same resampled "
        "questions; a pick takes a 95 % interval of their difference that does not reach 0. The interval knows how "
        "questions vary; not that the two were chosen after looking, nor how trainings, or other answers of the "
        f"model, vary. No metric sees whether a response is right.{rest}"
    )


def format_reading(values: Sequence[float | None] | None) -> str:
    """A value with its interval."""
    if values is None or values[0] is None:
        return MISSING
    value, low, high = (format_number(float_or_nan(item), 3) for item in values)
    return f"{value} [{low}, {high}]"


def order_strategies(result: JsonObject, metric: str) -> list[int]:
    """The strategies, the best by a metric first."""
    lines = result["metrics"][metric]
    return sorted(range(len(lines)), key=lambda at: -METRICS[metric].sign * float_or_nan(lines[at]["score"][0]))


# ---- tables


def render_ranking_table(result: JsonObject, pick_by: str) -> Html:
    """A line per strategy: every metric with its interval; of the deciding one the gap to the best, and the blocks."""
    order, names = order_strategies(result, pick_by), result["strategies"]
    lines = result["metrics"][pick_by]
    places = {
        metric: {at: place for place, at in enumerate(order_strategies(result, metric), 1)}
        for metric in result["metrics"]
    }
    columns = [
        Column(
            METRICS[metric].title,
            [_format_ranked_score(places[metric][at], result["metrics"][metric][at]["score"]) for at in order],
            DIRECTION_LABELS[METRICS[metric].sign],
            "tight",
        )
        for metric in result["metrics"]
    ]
    accuracy_columns = (
        [Column("accuracy", [result["known"][names[at]] for at in order], "given")] if result["known"] else []
    )
    title = METRICS[pick_by].title
    return join_html(
        html_table(
            Column("", [html_element("b", names[at]) for at in order]),
            *columns,
            *accuracy_columns,
            row_classes={
                at: "strong" for at, strategy in enumerate(order) if names[strategy] == result["verdict"]["use"]
            },
            css_class="bench",
        ),
        html_element("h3", f"{title}, block by block"),
        html_table(
            Column("", [html_element("b", names[at]) for at in order]),
            Column(
                "behind the best",
                [format_reading(lines[at]["behind"]) for at in order],
                "95 %, same questions",
                "tight",
            ),
            *(
                Column(f"block {block + 1}", [lines[at]["blocks"][block] for at in order])
                for block in range(result["counts"]["blocks"])
            ),
            Column("spread", [float_or_nan(lines[at]["spread"]) for at in order], "standard deviation"),
            Column("ranks", [", ".join(map(str, lines[at]["ranks"])) for at in order], "in the blocks", "tight"),
            css_class="bench",
        ),
    )


def _format_ranked_score(place: int, values: Sequence[float | None]) -> Html:
    """A score with its rank, its interval below."""
    value, low, high = (format_number(float_or_nan(item), 3) for item in values)
    return join_html(html_element("b", f"{place}. "), value, html_element("span", f"[{low}, {high}]", class_="sub"))


def render_agreement(result: JsonObject) -> Html:
    """Spearman's correlations of the metrics over the strategies, and with accuracies where there are any."""
    correlations = result["agreement"]
    metrics = list(correlations)

    def cell(value: float | None) -> str:
        return MISSING if value is None else f"{value:.2f}".replace("-", "−")

    truth_columns = [
        Column(title, [cell(line[metric]) for metric in metrics], "correlation with it", "tight")
        for title, line in result["against"].items()
    ]
    return join_html(
        html_table(
            Column("", [html_element("b", METRICS[metric].title) for metric in metrics]),
            *(
                Column(METRICS[other].title, [cell(correlations[one][other]) for one in metrics], "", "tight")
                for other in metrics
            ),
            *truth_columns,
        ),
        html_note(
            f"Spearman's rank correlation over {len(result['strategies'])} strategies, all metrics turned so that "
            "larger is better. Of so few it is rough: of 8 unrelated ones it lies beyond ±.74 in one case of twenty."
        ),
    )


def render_trials(result: JsonObject) -> Html:
    """What short trainings on each strategy did."""
    trial_results = result["tested"]
    by = trial_results["decided_by"]
    sign = 1 if by == "accuracy" else -1
    lines = sorted(trial_results["strategies"], key=lambda line: -sign * line["mean"][by][0])
    before = trial_results["before"]

    def mean(line: JsonObject, key: str) -> str:
        value, half = line["mean"][key]
        return f"{value:.4f}" + (f" ± {half:.4f}" if half is not None else "")

    accuracy_columns = (
        [Column("accuracy", [mean(line, "accuracy") for line in lines], "", "tight")] if by == "accuracy" else []
    )
    return join_html(
        html_table(
            Column("", [html_element("b", line["name"]) for line in lines]),
            Column("L_v", [mean(line, "loss") for line in lines], trial_results["unit"], "tight"),
            *accuracy_columns,
            Column("rows", [line["rows"] for line in lines]),
        ),
        html_note(
            f"{trial_results['steps']} steps of {trial_results['batch']} rows, {len(lines[0]['runs'])} seeds, 95 % intervals over "
            f"them; read on {trial_results['validation']:,} rows of data.validation. Before training: "
            + "; ".join(f"{key} {value:.4f}" for key, value in before.items())
            + "."
        ),
    )


def render_questions(responses: Sequence[JsonObject], result: JsonObject, pick_by: str) -> Html:
    """Some questions with all responses and what was measured of each."""
    count = len(result["strategies"])
    groups = [list(responses[at : at + count]) for at in range(0, len(responses), count)]
    measure_names = [key for key in ("sppl", "perplexity", "ifd", "self_similarity", "rewards") if key in responses[0]]
    sort_measure = next(iter(key for key in METRICS[pick_by].inputs))
    apart = sorted(range(len(groups)), key=lambda at: -_spread_ratio([row[sort_measure] for row in groups[at]]))[
        : MAX_QUESTIONS_SHOWN // 2
    ]
    others = [at for at in range(len(groups)) if at not in apart][: MAX_QUESTIONS_SHOWN - len(apart)]
    return join_html(
        html_paragraph(
            f"The {len(apart)} questions whose responses lie furthest apart in {METRICS[pick_by].title}, then the first "
            f"{len(others)} of the rest. rank.parquet has all {len(groups):,}."
        ),
        *(_render_question(groups[at], measure_names, sort_measure, METRICS[pick_by].sign) for at in (*apart, *others)),
    )


def _render_question(rows: Sequence[JsonObject], reads: Sequence[str], by: str, sign: int) -> Html:
    first_row = rows[0]
    ordered = sorted(rows, key=lambda row: -sign * row[by])
    kept_note = "" if first_row["own_answer_kept"] else " (judged wrong, so not shown to others)"
    return html_details(
        truncate_text(first_row["question"], 140),
        join_html(
            html_element(
                "p", f"{first_row['file']}:{first_row['line']}, block {first_row['block'] + 1}", class_="note"
            ),
            _render_turn("question", first_row["question"]),
            _render_turn(f"own answer{kept_note}", first_row["own_answer"]),
            html_table(
                Column("", [html_element("b", row["strategy"]) for row in ordered]),
                *(Column(_metric_title(key), [row[key] for row in ordered]) for key in reads),
                Column("tokens", [row["tokens"] for row in ordered], "read"),
                Column(
                    "response",
                    [
                        html_element("div", truncate_text(row["response"], MAX_RESPONSE_CHARACTERS), class_="content")
                        for row in ordered
                    ],
                ),
                css_class="bench",
            ),
        ),
    )


def _render_turn(role: str, text: str) -> Html:
    return html_element(
        "div",
        html_element("span", role, class_="role"),
        html_element("div", truncate_text(text, MAX_RESPONSE_CHARACTERS), class_="content"),
        class_="turn",
    )


def _metric_title(key: str) -> str:
    return METRICS[key].title if key in METRICS else key


def _spread_ratio(values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return high / low if low > 0 else high - low


def render_costs(result: JsonObject) -> Html:
    """Seconds, and the token places that shared prompts saved."""
    spent, names = result["costs"], {
        "answers": "answers of the model's own", "scores": "likelihoods", "self_similarity": "hidden states",
    }  # fmt: skip
    rows = [(title, spent[key]) for key, title in names.items() if key in spent]
    if result["tested"]:
        rows.append(("train-then-test", result["tested"]["seconds"]))
    share = spent["places"] / spent["tokens"] if spent["tokens"] else math.nan
    return join_html(
        html_table(
            Column("", [title for title, _ in rows]), Column("seconds", [value for _, value in rows], "compiled anew")
        ),
        html_paragraph(
            f"Likelihoods: {spent['tokens']:,} tokens were asked about and {spent['places']:,} places read, padding "
            f"included ({format_percent(share)}): what a question's responses share, its prompt and the shown answers, is "
            "read once."
        ),
    )


def render_provenance(result: JsonObject, config_text: str, environment: JsonObject) -> Html:
    """What was read, and what another person needs."""
    packages = ", ".join(f"{key} {version}" for key, version in environment["packages"].items() if version)
    return join_html(
        *(html_paragraph(f"{capitalize_first(text)}.") for text in result["notes"]),
        html_element("pre", f"bilevel-jax rank {run_dir.CONFIG_FILE} --out ANOTHER_FOLDER"),
        html_paragraph(
            "rank.parquet holds every question and strategy: its text, the model's own answer, every number."
        ),
        html_paragraph(f"{', '.join(environment['devices'])}; {environment['platform']}; {packages}."),
        html_details(f"{run_dir.CONFIG_FILE}, all settings", html_element("pre", config_text)),
    )


# ---- the picture


def plot_metric(result: JsonObject, metric: str, pick_by: str) -> Html:
    """A line per strategy: its score with its interval, and its blocks; in the order of the deciding metric."""
    left, right, top, height = 190, 520, 6, 26
    names, lines, order = result["strategies"], result["metrics"][metric], order_strategies(result, pick_by)
    bottom = top + height * len(order)
    values = [float_or_nan(item) for line in lines for item in (*line["score"], *line["blocks"])]
    is_log = metric in ("sppl", "perplexity") and max(values) > 20 * min(values) > 0
    x = make_scale(values, left, right - 8, log=is_log)
    parts = [html_element("line", x1=left, y1=bottom, x2=right - 8, y2=bottom, class_="axis")]
    ticks = x.ticks()
    for tick in ticks[:: -(-len(ticks) // 6) or 1]:  # as many as there is room for, also over many decades
        parts.append(
            html_element(
                "line", x1=_format_coordinate(x(tick)), y1=top, x2=_format_coordinate(x(tick)), y2=bottom, class_="grid"
            )
        )
        parts.append(
            html_element("text", f"{tick:g}", x=_format_coordinate(x(tick)), y=bottom + 16, class_="tick middle")
        )
    best = order_strategies(result, metric)[0]
    for place, at in enumerate(order):
        y = top + height * (place + 0.5)
        value, low, high = (float_or_nan(item) for item in lines[at]["score"])
        colour = "k3" if at == best else "k0"
        words = names[at] if len(names[at]) <= 25 else names[at][:24] + "…"
        parts += [
            html_element("text", html_element("title", names[at]), words, x=left - 10, y=_format_coordinate(y + 4), class_="label end"),
            html_element("line", x1=_format_coordinate(x(low)), y1=_format_coordinate(y), x2=_format_coordinate(x(high)), y2=_format_coordinate(y), class_=f"whisker {colour}"),
            *(_svg_point(x(float_or_nan(item)), y + 8, 1.9, f"faint {colour}") for item in lines[at]["blocks"]),
            _svg_point(x(value), y, 4, f"dot {colour}"),
        ]  # fmt: skip
    label = f"{METRICS[metric].title}, {DIRECTION_LABELS[METRICS[metric].sign]}"
    parts.append(html_element("text", label, x=(left + right) / 2, y=bottom + 34, class_="tick middle"))
    description = "; ".join(f"{names[at]} {float_or_nan(lines[at]['score'][0]):.4g}" for at in order)
    return html_element(
        "svg", *parts, viewBox=f"0 0 {right} {bottom + 40}", role="img", aria_label=f"{label}: {description}"
    )


def _svg_point(x: float, y: float, radius: float, kind: str) -> Html:
    return html_element("circle", cx=_format_coordinate(x), cy=_format_coordinate(y), r=radius, class_=kind)


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}"
