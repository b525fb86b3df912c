"""The scores in the report of `train`: each making of them, how they moved with the model, what they cost."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import NUM_COLOURS, Html, html_element, join_html
from bilevel_jax.runs.report.html import Column, html_figure, html_note, html_paragraph, html_table
from bilevel_jax.runs.report.numbers import format_count, format_number, format_percent
from bilevel_jax.runs.report.results import RunResults, float_or_nan
from bilevel_jax.runs.scoring import scores


class ScoreHistory(NamedTuple):
    """scores.parquet, read."""

    columns: list[Float[np.ndarray, "kept"]]
    """Of each making, in order."""
    meaning: str


def read_score_history(folder: Path) -> ScoreHistory | None:
    """The scores of a run; None where its weights came from elsewhere."""
    if not (folder / scores.SCORES_FILE).exists():
        return None
    stored = pq.read_table(folder / scores.SCORES_FILE)
    about = {key.decode(): json.loads(value) for key, value in (stored.schema.metadata or {}).items()}
    return ScoreHistory([stored[key].to_numpy() for key in about], next(iter(about.values()))["meaning"])


def render_scores(run: RunResults, history: ScoreHistory) -> Html:
    """What the scores mean, how they spread each time, whether rows kept their ranks, and the cost."""
    summary = run.result["scoring"]
    records, several = summary["records"], len(summary["records"]) > 1
    labelled = any(record["auc"] is not None for record in records)
    share = float_or_nan(summary["share"])
    cost = f"Making them took {format_number(summary['seconds'])} seconds with compilation, {format_percent(share)} of the training's"
    cost += f" {format_number(float_or_nan(run.result['seconds']))}; in work, {format_number(summary['passes'])} training steps against "
    cost += f"{run.result['steps']:,}."
    shown_indices = figures.evenly_spaced_indices(len(records), NUM_COLOURS)
    score_groups = [
        (f"before step {records[at]['step']:,}", drop_nonfinite(history.columns[at])) for at in shown_indices
    ]
    return join_html(
        html_paragraph(html_element("b", summary["score"]), f": {history.meaning}. Larger is better."),
        html_figure(
            figures.plot_strips(score_groups, f"score {summary['score']}"),
            "The scores of all rows each time that they were made. Bar: median." if several else "Bar: median.",
        ),
        html_table(
            Column("before step", [record["step"] for record in records]),
            *(Column(key, [record[key] for record in records], "score") for key in ("least", "median", "largest")),
            Column("same order as at first", [record["with_first"] for record in records], "rank correlation"),
            Column("as the time before", [record["with_previous"] for record in records], "rank correlation"),
            *([Column("AUC", [record["auc"] for record in records], "of the labels")] if labelled else []),
            Column("time", [record["seconds"] for record in records], "seconds"),
            Column("work", [record["passes"] for record in records], "training steps"),
        ),
        html_paragraph(cost),
        html_paragraph(_describe_score_weights(run)),
        html_element("ul", *(html_element("li", remark) for remark in _unique_notes(records)))
        if _unique_notes(records)
        else None,
        html_note(
            "A score judges rows by its own idea of good; whether it helped is what the validation examples above say."
        ),
    )


def drop_nonfinite(values: np.ndarray) -> np.ndarray:
    """The numbers among the scores."""
    return values[np.isfinite(values)]


def _describe_score_weights(run: RunResults) -> str:
    summary, total = run.result["scoring"], run.result["rows"]["train"]
    words = "The weights below are what each row got, averaged over the steps that drew it."
    if summary["drawn"] < total:
        words += (
            f" {format_count('row', total - summary['drawn'])} that no step drew: min-max over all rows, the last time."
        )
    if summary["equal"]:
        words += f" In {format_count('step', summary['equal'])} all rows had one score, which tells none from another: weight 1."
    return words


def _unique_notes(records: list) -> list[str]:
    return list(dict.fromkeys(note for record in records for note in record["notes"]))
