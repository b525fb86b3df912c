"""The report page of an `evaluate` run."""

from functools import partial
from pathlib import Path
from typing import Any

from bilevel_jax.runs.report.evaluation import describe_evaluation
from bilevel_jax.runs.report.html import render_page
from bilevel_jax.runs.report.results import write_report

JsonObject = dict[str, Any]


def write_evaluate_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, partial(render_evaluate_report, folder))


def render_evaluate_report(
    folder: Path, name: str, result: JsonObject, config_text: str, environment: JsonObject
) -> str:
    """The whole report as HTML."""
    return render_page(
        "evaluate.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        evaluation=describe_evaluation(folder, result),
    )
