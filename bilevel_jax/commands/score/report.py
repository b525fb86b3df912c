"""The report page of a `score` run."""

from pathlib import Path
from typing import Any

from bilevel_jax.runs.report.html import Column, bold_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import format_number, format_percent
from bilevel_jax.runs.report.raters import describe_bars, plot_coefficients
from bilevel_jax.runs.report.results import write_report

JsonObject = dict[str, Any]


def write_score_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_score_report)


def render_score_report(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    return render_page(
        "score.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        picture=plot_coefficients(result["coefficients"]),
        bars=describe_bars(result["coefficients"], result["intervals"]),
        key_numbers=list_key_numbers(result),
        drift=drift_table(result["drift"]),
        transform=result["transform"],
    )


def list_key_numbers(result: JsonObject) -> list[tuple[str, str, str]]:
    """(what it is, number, unit) of the tiles at the top."""
    counts, weights = result["counts"], result["weights"]
    training = result["training"]["logits"]
    shift = (result["logits"]["mean"] - training["mean"]) / (training["deviation"] or 1.0)
    share = format_percent(weights["ess"] / counts["scored"])
    return [
        ("rows scored", f"{counts['scored']:,}", f"of {counts['rows']:,}"),
        ("rows selected", f"{counts['selected']:,}", result["selection"]),
        ("effective sample size", share, f"of the rows scored; mean weight {format_number(weights['mean'], 3)}"),
        ("shift of the logits", f"{shift:+.2f}", "deviations of the training examples' logits"),
    ]


def drift_table(drift: list[JsonObject]) -> Any:
    """The features with what has moved, those that have drifted first."""
    columns = sorted(drift, key=lambda column: not column["sentence"])
    return make_table(
        Column("feature", [bold_cell(column["name"], tag="drift" if column["sentence"] else "") for column in columns]),
        Column("mean", [column["mean"] for column in columns], "deviations of training"),
        Column("spread", [column["deviation"] for column in columns], "times that of training"),
        Column("outside", [100 * column["outside"] for column in columns], "% of rows beyond training's range"),
        Column("range", [_format_range(column["range"]) for column in columns]),
        Column("range in training", [_format_range(column["training_range"]) for column in columns]),
        row_classes={index: "strong" for index, column in enumerate(columns) if column["sentence"]},
    )


def _format_range(ends: list[float]) -> str:
    return " to ".join(format_number(end, 3) for end in ends)
