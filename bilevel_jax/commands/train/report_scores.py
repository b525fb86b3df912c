"""Data scores in the report of a `train` run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import NUM_COLOURS
from bilevel_jax.runs.report.html import Column, Table, make_table
from bilevel_jax.runs.report.results import RunResults
from bilevel_jax.runs.scoring import scores


class ScoreHistory(NamedTuple):
    """scores.parquet, read."""

    columns: list[Float[np.ndarray, "kept"]]
    """One for each time that the scores were computed, in order."""
    meaning: str


def read_score_history(folder: Path) -> ScoreHistory | None:
    """The scores of a run; None where its weights came from elsewhere."""
    if not (folder / scores.SCORES_FILE).exists():
        return None
    stored = run_dir.read_parquet(folder / scores.SCORES_FILE)
    about = {key.decode(): json.loads(value) for key, value in (stored.schema.metadata or {}).items()}
    return ScoreHistory([stored[key].to_numpy() for key in about], next(iter(about.values()))["meaning"])


def describe_scores(run: RunResults, history: ScoreHistory) -> dict[str, Any]:
    """The values of the section on scores: what they mean, their spread each time, rank correlations, and the cost."""
    records = run.result["scoring"]["records"]
    return {
        "meaning": history.meaning,
        "several": len(records) > 1,
        "picture": plot_scores(run, history),
        "table": scores_table(run),
        "never_drawn": run.result["rows"]["train"] - run.result["scoring"]["drawn"],
        "notes": list(dict.fromkeys(note for record in records for note in record["notes"])),
    }


def plot_scores(run: RunResults, history: ScoreHistory) -> Markup:
    """The scores of all examples each time that they were computed."""
    summary = run.result["scoring"]
    score_groups = [
        (f"before step {summary['records'][at]['step']:,}", drop_nonfinite(history.columns[at]))
        for at in figures.evenly_spaced_indices(len(summary["records"]), NUM_COLOURS)
    ]
    return figures.plot_strips(score_groups, f"score {summary['score']}")


def scores_table(run: RunResults) -> Table:
    """A line for each time that the scores were computed."""
    records = run.result["scoring"]["records"]
    has_labels = any(record["auc"] is not None for record in records)
    has_errors = any(record.get("standard_error") is not None for record in records)
    return make_table(
        Column("before step", [record["step"] for record in records]),
        *(Column(key, [record[key] for record in records], "score") for key in ("least", "median", "largest")),
        *(
            [Column("standard error", [record.get("standard_error") for record in records], "median over the examples")]
            if has_errors
            else []
        ),
        Column("with the first", [record["with_first"] for record in records], "rank correlation"),
        Column("with the previous", [record["with_previous"] for record in records], "rank correlation"),
        *([Column("AUC", [record["auc"] for record in records], "of the labels")] if has_labels else []),
        Column("time", [record["seconds"] for record in records], "seconds"),
        Column("work", [record["passes"] for record in records], "training steps"),
    )


def drop_nonfinite(values: np.ndarray) -> np.ndarray:
    """The finite scores."""
    return values[np.isfinite(values)]
