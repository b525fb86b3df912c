"""The report page of metrics judged by known accuracies."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from bilevel_jax.commands.rank.records import format_percents, format_reading, title_of
from bilevel_jax.commands.rank.report import DIRECTION_LABELS
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Column, Table, isolated_cell, make_table, render_page, shorten_text
from bilevel_jax.runs.report.results import float_or_nan, write_report

JsonObject = dict[str, Any]
MAX_PAIRS_SHOWN = 200
"""Pairs of the last table."""
MAX_STRATEGIES_SHOWN = 20
"""Strategies of a table of those that are always used."""
MAX_NAME_CHARACTERS = 40
"""Characters of a name of a metric."""


def write_records_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_records_report)


def render_records_report(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    return render_page(
        "rank_records.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        picture=plot_accuracies(result),
        subsets=[
            (subset, metrics_table(result, subset), choices_table(subset))
            for subset in result["subsets"]
            if subset["pairs"]
        ],
        absent=[100 * subset["spread_above"] for subset in result["subsets"] if not subset["pairs"]],
        pairs=pairs_table(result),
        shown=min(MAX_PAIRS_SHOWN, len(result["pairs"])),
    )


def metrics_table(result: JsonObject, subset: JsonObject) -> Table:
    """A line per metric: what its pick is worth, and how it orders the strategies."""
    names, lines = result["metrics"], subset["metrics"]
    return make_table(
        Column("picked by", [isolated_cell(_title(name)) for name in names]),
        Column("", [DIRECTION_LABELS[result["signs"][name]] for name in names], "", "tight"),
        Column("accuracy", [format_percents(lines[name]["accuracy"]) for name in names], "%, 95 % interval", "tight"),
        Column(
            f"gain of {_title(names[0])}",
            [format_percents(lines[name]["gain"]) for name in names],
            "points, same pairs",
            "tight",
        ),
        Column("picks the best", [lines[name]["picks_the_best"] for name in names], f"of {subset['pairs']} pairs"),
        Column("rank correlation", [format_reading(lines[name]["correlation"]) for name in names], "mean", "tight"),
        Column(
            "weighted", [format_reading(lines[name]["weighted_correlation"]) for name in names], "by spread", "tight"
        ),
        Column("pairs with one", [lines[name]["pairs_with_correlation"] for name in names]),
        css_class="bench",
    )


def choices_table(subset: JsonObject) -> Table:
    """What choices without a metric reach."""
    always = sorted(subset["always"].items(), key=lambda item: (-item[1], item[0]))[:MAX_STRATEGIES_SHOWN]
    names = ["the best of each pair", "one drawn at random", *(f"always {name}" for name, _ in always)]
    return make_table(
        Column("strategy", [isolated_cell(name) for name in names]),
        Column("accuracy", [100 * value for value in (subset["best"], subset["mean"], *(v for _, v in always))], "%"),
    )


def pairs_table(result: JsonObject) -> Table:
    """A line per pair, the largest spread first: its best strategy, and what the first metric picks."""
    name = result["metrics"][0]
    pairs = sorted(result["pairs"], key=lambda pair: -pair["spread"])[:MAX_PAIRS_SHOWN]
    return make_table(
        Column("model", [isolated_cell(pair["model"]) for pair in pairs]),
        Column("task", [isolated_cell(pair["task"]) for pair in pairs]),
        Column("strategies", [pair["strategies"] for pair in pairs]),
        Column("spread", [100 * pair["spread"] for pair in pairs], "points"),
        Column("best", [isolated_cell(pair["best"]) for pair in pairs]),
        Column("accuracy of the best", [100 * pair["best_accuracy"] for pair in pairs], "%"),
        Column(f"picked by {_title(name)}", [isolated_cell(pair["picks"][name]) for pair in pairs]),
        Column("accuracy of that", [100 * pair["accuracies"][name] for pair in pairs], "%"),
        Column("rank correlation", [pair["correlations"][name] for pair in pairs]),
    )


def plot_accuracies(result: JsonObject) -> Markup:
    """A line per metric: the accuracy of its pick over all pairs, and what choices without a metric reach."""
    subset = result["subsets"][0]
    rows = []
    for at, name in enumerate(result["metrics"]):
        value, low, high = (100 * float_or_nan(item) for item in subset["metrics"][name]["accuracy"])
        rows.append(IntervalRow(_title(name), value, low, high, emphasized=not at, colour=0 if at else 3))
    others = [("best of each pair", subset["best"]), ("at random", subset["mean"])]
    if subset["always"]:
        name, value = max(subset["always"].items(), key=lambda item: item[1])
        others.insert(1, (f"always {name}", value))
    rows += [IntervalRow(name, 100 * value, colour=5) for name, value in others]
    return figures.plot_intervals(rows, "accuracy of what is picked, %", reference=100 * subset["best"])


def _title(name: str) -> str:
    return shorten_text(title_of(name), MAX_NAME_CHARACTERS)
