"""The scores in the report of `train`: each making of them, how they moved with the model, what they cost."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.runs import figures, scoring
from bilevel_jax.runs.figures import COLOURS, Html, element, join
from bilevel_jax.runs.page import Column, counted, figure, note, number, paragraph, percent, table
from bilevel_jax.runs.results import Results, real


class Scores(NamedTuple):
    """scores.parquet, read."""

    columns: list[Float[np.ndarray, "kept"]]
    """Of each making, in order."""
    meaning: str


def read_scores(folder: Path) -> Scores | None:
    """The scores of a run; None where its weights came from elsewhere."""
    if not (folder / scoring.NAME).exists():
        return None
    stored = pq.read_table(folder / scoring.NAME)
    about = {key.decode(): json.loads(value) for key, value in (stored.schema.metadata or {}).items()}
    return Scores([stored[key].to_numpy() for key in about], next(iter(about.values()))["meaning"])


def scores(run: Results, made: Scores) -> Html:
    """What the scores mean, how they spread each time, whether rows kept their ranks, and the cost."""
    told = run.result["scoring"]
    records, several = told["records"], len(told["records"]) > 1
    labelled = any(record["auc"] is not None for record in records)
    share = real(told["share"])
    cost = f"Making them took {number(told['seconds'])} seconds with compilation, {percent(share)} of the training's"
    cost += f" {number(real(run.result['seconds']))}; in work, {number(told['passes'])} training steps against "
    cost += f"{run.result['steps']:,}."
    shown = figures.evenly(len(records), COLOURS)
    clouds = [(f"before step {records[at]['step']:,}", finite(made.columns[at])) for at in shown]
    return join(
        paragraph(element("b", told["score"]), f": {made.meaning}. Larger is better."),
        figure(
            figures.strips(clouds, f"score {told['score']}"),
            "The scores of all rows each time that they were made. Bar: median." if several else "Bar: median.",
        ),
        table(
            Column("before step", [record["step"] for record in records]),
            *(Column(key, [record[key] for record in records], "score") for key in ("least", "median", "largest")),
            Column("same order as at first", [record["with_first"] for record in records], "rank correlation"),
            Column("as the time before", [record["with_previous"] for record in records], "rank correlation"),
            *([Column("AUC", [record["auc"] for record in records], "of the labels")] if labelled else []),
            Column("time", [record["seconds"] for record in records], "seconds"),
            Column("work", [record["passes"] for record in records], "training steps"),
        ),
        paragraph(cost),
        paragraph(_given(run)),
        element("ul", *(element("li", one) for one in _notes(records))) if _notes(records) else None,
        note("A score judges rows by its own idea of good; whether it helped is what the trusted rows above say."),
    )


def finite(values: np.ndarray) -> np.ndarray:
    """The numbers among the scores."""
    return values[np.isfinite(values)]


def _given(run: Results) -> str:
    told, total = run.result["scoring"], run.result["rows"]["train"]
    words = "The weights below are what each row got, averaged over the steps that drew it."
    if told["drawn"] < total:
        words += f" {counted('row', total - told['drawn'])} that no step drew: min-max over all rows, the last time."
    if told["equal"]:
        words += (
            f" In {counted('step', told['equal'])} all rows had one score, which tells none from another: weight 1."
        )
    return words


def _notes(records: list) -> list[str]:
    return list(dict.fromkeys(note for record in records for note in record["notes"]))
