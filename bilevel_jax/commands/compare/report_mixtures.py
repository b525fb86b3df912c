"""The part of the report of `compare` on mixtures of sources."""

import math
from typing import Any

from markupsafe import Markup

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import IntervalRow
from bilevel_jax.runs.report.html import Column, Table, bold_cell, make_table
from bilevel_jax.runs.report.numbers import MeanInterval, format_number
from bilevel_jax.runs.report.results import float_or_nan

JsonObject = dict[str, Any]
SHARE_OF = "share of "
"""Before the name of a source: the key of its share in the means and intervals of a row."""


def describe_mixtures(result: JsonObject) -> JsonObject | None:
    """The values of compare_mixtures.html: a table of all mixtures, and a picture of the best one; None without."""
    rows = _rows_with_mixtures(result)
    if not rows:
        return None
    learned = [row for row in rows if row["learns"] and "test" in row["mean"]]
    best = min(learned, key=lambda row: row["mean"]["test"], default=None)
    return {
        "table": _mixtures_table(rows),
        "best": best["name"] if best else "",
        "picture": _plot_mixture(best, rows) if best else "",
    }


def format_mixtures_markdown(result: JsonObject) -> list[str]:
    """The lines of the table of mixtures, per cent with the interval over the seeds; none without sources."""
    rows = _rows_with_mixtures(result)
    if not rows:
        return []
    sources = _source_names(rows)
    lines = [
        f"| {' | '.join([_name_markdown(row), *(_format_share(row, source) for source in sources)])} |" for row in rows
    ]
    heads = [source.replace("|", "\\|") for source in sources]
    return [
        "Share of each source in the weight of all examples, per cent (uniform: the natural one):", "",
        f"| {' | '.join(['', *heads])} |", f"|{'---|' * (len(sources) + 1)}", *lines, "",
    ]  # fmt: skip


def _rows_with_mixtures(result: JsonObject) -> list[JsonObject]:
    """The methods and baselines that weigh sources, the natural mixture first."""
    rows = [row for row in result["rows"] if any(key.startswith(SHARE_OF) for key in row["mean"])]
    return sorted(rows, key=lambda row: (row["learns"], row["name"] not in ("uniform", "stratified")))


def _source_names(rows: list[JsonObject]) -> list[str]:
    return sorted({key.removeprefix(SHARE_OF) for row in rows for key in row["mean"] if key.startswith(SHARE_OF)})


def _share(row: JsonObject, source: str) -> MeanInterval:
    mean, half = (100 * float_or_nan(row[part].get(f"{SHARE_OF}{source}")) for part in ("mean", "interval"))
    return MeanInterval(mean, 0.0 if half < 1e-9 else half)  # shares that are equal but for rounding


def _reading(row: JsonObject, key: str) -> MeanInterval:
    return MeanInterval(*(float_or_nan(row[part].get(key)) for part in ("mean", "interval")))


def _mixtures_table(rows: list[JsonObject]) -> Table:
    return make_table(
        Column("", [bold_cell(row["name"]) for row in rows]),
        *(Column(source, [_share(row, source) for row in rows], "%") for source in _source_names(rows)),
        Column("ESS", [_reading(row, "ess") for row in rows], "examples"),
        Column("largest weight", [_reading(row, "max_weight") for row in rows], "of an example"),
        row_classes={index: "strong" for index, row in enumerate(rows) if row["learns"]},
        css_class="bench",
    )


def _plot_mixture(best: JsonObject, rows: list[JsonObject]) -> Markup:
    """The share of each source in the best mixture, with its interval and its seeds, beside the natural one."""
    natural = next((row for row in rows if row["name"] == "uniform"), None)
    lines = []
    for source in _source_names(rows):
        mean, half = _share(best, source)
        lines.append(
            IntervalRow(
                source,
                mean,
                mean - half,
                mean + half,
                [100 * cell["mixture"].get(source, 0.0) for cell in best["runs"]],
                math.nan if natural is None else _share(natural, source).mean,
            )
        )
    names = (best["name"], "natural" if natural else "")
    return figures.plot_intervals(lines, "share of the weight, per cent", names=names, ends=(0.0, 100.0))


def _name_markdown(row: JsonObject) -> str:
    return f"**{row['name']}**" if row["learns"] else row["name"]


def _format_share(row: JsonObject, source: str) -> str:
    mean, half = _share(row, source)
    return format_number(mean, 3) + ("" if math.isnan(half) else f" ± {format_number(half, 2)}")
