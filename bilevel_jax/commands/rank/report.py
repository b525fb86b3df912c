"""The report page of a `rank` run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.commands.rank.metrics import METRICS
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, make_table, render_page, shorten_text
from bilevel_jax.runs.report.numbers import MISSING, format_number
from bilevel_jax.runs.report.results import float_or_nan, write_report

JsonObject = dict[str, Any]
MAX_QUESTIONS_SHOWN = 24
"""Questions shown with their responses: half are those with the largest spread between strategies, half the first."""
MAX_RESPONSE_CHARACTERS = 700
"""Characters of a response."""
DIRECTION_LABELS = {1: "the largest wins", -1: "the least wins"}
COST_LABELS = {
    "answers": "answers of the model's own",
    "scores": "likelihoods",
    "self_similarity": "hidden states",
}


def write_rank_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    responses = run_dir.read_parquet(folder / "rank.parquet").to_pylist()
    return write_report(folder, partial(render_rank_report, responses))


def render_rank_report(
    responses: Sequence[JsonObject], name: str, result: JsonObject, config_text: str, environment: JsonObject
) -> str:
    """The whole report as HTML."""
    pick_by, costs = next(iter(result["metrics"])), result["costs"]
    return render_page(
        "rank.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        pick_by=pick_by,
        metrics=METRICS,
        pictures=[
            (plot_metric(result, metric, pick_by), f"{METRICS[metric].title}: {METRICS[metric].meaning}.")
            for metric in result["metrics"]
        ],
        ranking=ranking_table(result, pick_by),
        blocks=blocks_table(result, pick_by),
        agreement=agreement_table(result),
        trials=trials_table(result) if result["tested"] else None,
        questions=describe_questions(responses, result, pick_by),
        max_characters=MAX_RESPONSE_CHARACTERS,
        costs=costs_table(result),
        places_share=costs["places"] / costs["tokens"] if costs["tokens"] else None,
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


def ranking_table(result: JsonObject, pick_by: str) -> Table:
    """A line per strategy: its rank and score by every metric, with intervals, and its accuracy where it is given."""
    order, names = order_strategies(result, pick_by), result["strategies"]
    places = {
        metric: {at: place for place, at in enumerate(order_strategies(result, metric), 1)}
        for metric in result["metrics"]
    }
    return make_table(
        Column("", [bold_cell(names[at]) for at in order]),
        *(
            Column(
                METRICS[metric].title,
                [_ranked_cell(places[metric][at], result["metrics"][metric][at]["score"]) for at in order],
                DIRECTION_LABELS[METRICS[metric].sign],
                "tight",
            )
            for metric in result["metrics"]
        ),
        *([Column("accuracy", [result["known"][names[at]] for at in order], "given")] if result["known"] else []),
        row_classes={at: "strong" for at, index in enumerate(order) if names[index] == result["verdict"]["use"]},
        css_class="bench",
    )


def blocks_table(result: JsonObject, pick_by: str) -> Table:
    """A line per strategy, by the deciding metric: the gap to the best, and the score of each block."""
    order, names, lines = order_strategies(result, pick_by), result["strategies"], result["metrics"][pick_by]
    behind = [format_reading(lines[at]["behind"]) for at in order]
    return make_table(
        Column("", [bold_cell(names[at]) for at in order]),
        Column("behind the best", behind, "95 %, same questions", "tight"),
        *(
            Column(f"block {block + 1}", [lines[at]["blocks"][block] for at in order])
            for block in range(result["counts"]["blocks"])
        ),
        Column("spread", [float_or_nan(lines[at]["spread"]) for at in order], "standard deviation"),
        Column("ranks", [", ".join(map(str, lines[at]["ranks"])) for at in order], "in the blocks", "tight"),
        css_class="bench",
    )


def _ranked_cell(place: int, values: Sequence[float | None]) -> Cell:
    """A score with its rank, its interval below."""
    value, low, high = (format_number(float_or_nan(item), 3) for item in values)
    return Cell(f"{place}. ", "b", rest=value, sub=f"[{low}, {high}]")


def agreement_table(result: JsonObject) -> Table:
    """Spearman's correlations of the metrics over the strategies, and with accuracies where there are any."""
    correlations = result["agreement"]

    def format_correlation(value: float | None) -> str:
        return MISSING if value is None else f"{value:.2f}".replace("-", "−")

    return make_table(
        Column("", [bold_cell(METRICS[metric].title) for metric in correlations]),
        *(
            Column(
                METRICS[other].title, [format_correlation(line[other]) for line in correlations.values()], "", "tight"
            )
            for other in correlations
        ),
        *(
            Column(title, [format_correlation(line[metric]) for metric in correlations], "correlation with it", "tight")
            for title, line in result["against"].items()
        ),
    )


def trials_table(result: JsonObject) -> Table:
    """A line per strategy: validation loss and accuracy after short trainings on its responses, the best first."""
    by, unit = result["tested"]["decided_by"], result["tested"]["unit"]
    sign = 1 if by == "accuracy" else -1
    lines = sorted(result["tested"]["strategies"], key=lambda line: -sign * line["mean"][by][0])

    def format_mean(line: JsonObject, key: str) -> str:
        value, half = line["mean"][key]
        return f"{value:.4f}" + (f" ± {half:.4f}" if half is not None else "")

    accuracies = [format_mean(line, "accuracy") for line in lines] if by == "accuracy" else []
    return make_table(
        Column("", [bold_cell(line["name"]) for line in lines]),
        Column("validation loss", [format_mean(line, "loss") for line in lines], unit, "tight"),
        *([Column("accuracy", accuracies, "", "tight")] if accuracies else []),
        Column("examples", [line["rows"] for line in lines]),
    )


def costs_table(result: JsonObject) -> Table:
    """Seconds of each part of the run."""
    seconds = {title: result["costs"][key] for key, title in COST_LABELS.items() if key in result["costs"]}
    if result["tested"]:
        seconds["train-then-test"] = result["tested"]["seconds"]
    return make_table(Column("", list(seconds)), Column("seconds", list(seconds.values()), "with compilation"))


# ---- questions


def describe_questions(responses: Sequence[JsonObject], result: JsonObject, pick_by: str) -> dict[str, Any]:
    """Some questions with all responses and what was measured of each."""
    count = len(result["strategies"])
    groups = [list(responses[at : at + count]) for at in range(0, len(responses), count)]
    measures = [key for key in ("sppl", "perplexity", "ifd", "self_similarity", "rewards") if key in responses[0]]
    sort_measure = next(iter(METRICS[pick_by].inputs))
    by_spread = sorted(range(len(groups)), key=lambda at: -_spread_ratio([row[sort_measure] for row in groups[at]]))
    apart = by_spread[: MAX_QUESTIONS_SHOWN // 2]
    others = [at for at in range(len(groups)) if at not in apart][: MAX_QUESTIONS_SHOWN - len(apart)]
    return {
        "apart": len(apart),
        "others": len(others),
        "total": len(groups),
        "shown": [
            groups[at][0] | {"table": _responses_table(groups[at], measures, sort_measure, METRICS[pick_by].sign)}
            for at in (*apart, *others)
        ],
    }


def _responses_table(rows: Sequence[JsonObject], measures: Sequence[str], by: str, sign: int) -> Table:
    ordered = sorted(rows, key=lambda row: -sign * row[by])
    texts = [Cell(shorten_text(row["response"], MAX_RESPONSE_CHARACTERS), "div", "content") for row in ordered]
    return make_table(
        Column("", [bold_cell(row["strategy"]) for row in ordered]),
        *(Column(METRICS[key].title if key in METRICS else key, [row[key] for row in ordered]) for key in measures),
        Column("tokens", [row["tokens"] for row in ordered], "read"),
        Column("response", texts),
        css_class="bench",
    )


def _spread_ratio(values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return high / low if low > 0 else high - low


# ---- the picture


def plot_metric(result: JsonObject, metric: str, pick_by: str) -> Markup:
    """A line per strategy: its score with its interval, and its blocks; in the order of the deciding metric."""
    lines, best = result["metrics"][metric], order_strategies(result, metric)[0]
    rows = []
    for at in order_strategies(result, pick_by):
        value, low, high = (float_or_nan(item) for item in lines[at]["score"])
        blocks = [float_or_nan(item) for item in lines[at]["blocks"]]
        rows.append(IntervalRow(result["strategies"][at], value, low, high, blocks, colour=3 if at == best else 0))
    values = [value for row in rows for value in (row.value, row.low, row.high, *row.seed_values)]
    log = metric in ("sppl", "perplexity") and max(values) > 20 * min(values) > 0
    return figures.plot_intervals(rows, f"{METRICS[metric].title}, {DIRECTION_LABELS[METRICS[metric].sign]}", log=log)
