"""Online example weights from scores recomputed during training."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.types import PADDING, Hyper, Params, Problem
from bilevel_jax.runs.config.schema import DataSection, ScoresSection, WeightsSection
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.scores import (
    SCORES_FILE,
    ExampleScores,
    get_score,
    load_or_compute_score,
    read_scores_table,
)
from bilevel_jax.runs.stats import rank_correlation
from bilevel_jax.runs.tasks.evaluation import read_labels
from bilevel_jax.runs.tasks.text import TextTask
from bilevel_jax.scores.weights import batch_minmax_weights, clipped_minmax_weights, rank_weights

SCALING_DESCRIPTIONS = {
    "batch": "min-max over the examples of each step",
    "examples": "min-max over all examples",
    "quantiles": "min-max over all examples, cut at two quantiles",
    "ranks": "ranks over all examples",
}


class WeightSummary(NamedTuple):
    """What the rows got over a whole run."""

    weights: Float[np.ndarray, "examples"]
    """The mean over the steps that drew a row; of a row that no step drew, min-max over all rows at the last making."""
    num_drawn: int
    """Rows that a step drew."""
    num_equal_steps: int
    """Steps whose rows all had one score, and so weight 1."""


class Reweighting:
    """The weights of each step, from the last making of the scores at or before it.

    Scores are computed before the steps `refresh_steps` by the parameters then, and stored in the run's folder: a
    resumed run reads them there, so it goes on with the same numbers. A row without a score counts as the least.
    """

    def __init__(
        self,
        task: TextTask,
        session: Session,
        *,
        weights: WeightsSection,
        scores: ScoresSection,
        data: DataSection,
        param_dtype: str,
    ):
        self.task, self.session, self.param_dtype = task, session, param_dtype
        self.weights_config, self.scores_config, self._labels = weights, scores, read_labels(task, data)
        self.refresh_steps = plan_refresh_steps(task.num_steps, weights.refresh)
        self.scores_by_step: dict[int, ExampleScores] = {}
        self._values_by_step: dict[int, Float[np.ndarray, "examples"]] = {}
        """By start, what a step picks from: scores, of which it makes its own weights, or weights."""
        self._data_order = task.data_order(data.seed)

    @property
    def problem(self) -> Problem:
        """The task's, whose outer variable is `hyper`: one weight for each slot of a step."""
        return self.task.problem._replace(gather=lambda weights, batch: weights)

    @property
    def source(self) -> str:
        """Where the weights come from, in words."""
        weights = self.weights_config
        frequency = (
            "once, at the start"
            if len(self.refresh_steps) == 1
            else f"{len(self.refresh_steps)} times, before the steps "
        )
        steps = "" if len(self.refresh_steps) == 1 else ", ".join(f"{start:,}" for start in self.refresh_steps)
        normalization = ", divided by the mean" if weights.mean_one else ""
        scaling = SCALING_DESCRIPTIONS[weights.scaling]
        return f"the score {weights.score}, {scaling}{normalization}; made {frequency}{steps}"

    def restore(self, steps_done: int) -> None:
        """Read the scores that the steps before `steps_done` rest on, as the process that made the steps stored them.

        Raises FileNotFoundError where a column is missing: what it was made from is gone.
        """
        made_steps = [step for step in self.refresh_steps if step < steps_done]
        if not made_steps:
            return
        stored = read_scores_table(self.session.folder, self.task)
        for refresh_step in made_steps:
            column = self._column(refresh_step)
            if column not in stored.column_names:
                raise FileNotFoundError(
                    f"{self.session.folder / SCORES_FILE} has no column {column!r}, on which the steps after "
                    f"{refresh_step:,} rest: it was removed or changed since. Start the run anew, in another folder."
                )
            self._keep_scores(refresh_step, get_score(stored, column, self.task))

    def update_scores(self, step: int, params: Params) -> None:
        """Where scores are due before `step`, have `params`, those before it, make them."""
        if step not in self.refresh_steps or step in self.scores_by_step:
            return
        name = self.weights_config.score
        count = self.refresh_steps.index(step) + 1
        self.session.set_phase(f"scoring: {name}, {count} of {len(self.refresh_steps)}")
        scores = load_or_compute_score(self._column(step), name, self.task, params, self.scores_config, self.session)
        self._keep_scores(step, scores)
        record = self.score_records()[-1]
        self.session.log.write({"event": "scored", **record})
        self.session.print_line(_format_record(record))
        self.session.set_phase("training")

    def _column(self, refresh_step: int) -> str:
        name = self.weights_config.score
        return name if refresh_step == 0 else f"{name}_at_{refresh_step}"

    def _keep_scores(self, refresh_step: int, scores: ExampleScores) -> None:
        self.scores_by_step[refresh_step] = scores
        values = fill_missing_scores(scores.values)
        is_per_step = self.weights_config.scaling == "batch"
        self._values_by_step[refresh_step] = values if is_per_step else self._scale(values)

    def step_weights(self, step: int) -> Hyper:
        """What `problem` reads at a step, on the mesh."""
        weights = self._slot_weights(step)[1].reshape(self.task.layout.num_micro_batches, self.task.layout.examples)
        return replicate(self.task.mesh, weights.astype(self.param_dtype))

    def summarize_weights(self) -> WeightSummary:
        """The weights of the whole run, from its order and its scores."""
        total, count, num_equal_steps = np.zeros(self.task.num_examples), np.zeros(self.task.num_examples), 0
        for step in range(self.task.num_steps):
            index, weights = self._slot_weights(step)
            is_real = index != PADDING
            np.add.at(total, index[is_real], weights[is_real])
            np.add.at(count, index[is_real], 1)
            num_equal_steps += int(np.ptp(self._values_at(step)[index[is_real]]) == 0)
        final_weights = self._scale(self.scores_by_step[self.refresh_steps[-1]].values)
        return WeightSummary(
            np.divide(total, count, out=final_weights, where=count > 0), int((count > 0).sum()), num_equal_steps
        )

    def to_result(self, seconds: float) -> dict[str, Any]:
        """What result.json says; `seconds` are those of training."""
        records, summary = self.score_records(), self.summarize_weights()
        return {
            "score": self.weights_config.score,
            "records": records,
            "seconds": sum(record["seconds"] for record in records),
            "share": sum(record["seconds"] for record in records) / seconds if seconds else None,
            "passes": sum(record["passes"] for record in records),
            "drawn": summary.num_drawn,
            "equal": summary.num_equal_steps,
        }

    def score_records(self) -> list[dict[str, Any]]:
        """What the log and the report say of each making so far."""
        indices = self.task.trainable_indices()
        records: list[dict[str, Any]] = []
        for start, scored in self.scores_by_step.items():
            values = scored.values[indices]
            previous_values = self.scores_by_step[records[-1]["step"]].values[indices] if records else None
            quantiles = np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
            records.append(
                {
                    "step": start,
                    **dict(zip(("least", "lower", "median", "upper", "largest"), quantiles, strict=True)),
                    "with_first": score_correlation(
                        self.scores_by_step[0].values[indices] if records else None, values
                    ),
                    "with_previous": score_correlation(previous_values, values),
                    "auc": self._label_auc(scored.values),
                    "standard_error": _median_standard_error(scored, indices),
                    "passes": scored.passes,
                    "seconds": scored.seconds,
                    "notes": list(scored.notes),
                }
            )
        return records

    def _scale(self, scores: Float[np.ndarray, "examples"]) -> Float[np.ndarray, "examples"]:
        weights = scale_over_examples(scores, self.weights_config.scaling, self.weights_config.quantile)
        return weights / weights.mean() if self.weights_config.mean_one else weights

    def _values_at(self, step: int) -> Float[np.ndarray, "examples"]:
        return self._values_by_step[max(start for start in self.refresh_steps if start <= step)]

    def _slot_weights(self, step: int) -> tuple[Int[np.ndarray, "batch"], Float[np.ndarray, "batch"]]:
        """(the row of each slot of a step, PADDING for an empty one; its weight, 0 for those)."""
        corpus_indices, example_values = self._data_order(step), self._values_at(step)
        index = np.where(corpus_indices < self.task.num_examples, corpus_indices, PADDING)
        if self.weights_config.scaling != "batch":
            return index, np.where(
                index != PADDING, example_values[np.minimum(corpus_indices, self.task.num_examples - 1)], 0.0
            )
        weights = batch_minmax_weights(example_values, index)
        return index, weights / weights[index != PADDING].mean() if self.weights_config.mean_one else weights

    def _label_auc(self, scores: Float[np.ndarray, "examples"]) -> float | None:
        value = np.nan if self._labels is None else self._labels.auc(fill_missing_scores(scores))
        return None if np.isnan(value) else value  # of one kind alone there is nothing to tell apart


def plan_refresh_steps(steps: int, count: int) -> tuple[int, ...]:
    """The steps before which scores are made: `count` of them, equally spaced, the first at 0."""
    return tuple(sorted({index * steps // count for index in range(count)}))


def scale_over_examples(
    scores: Float[np.ndarray, "examples"], scaling: str, quantile: float
) -> Float[np.ndarray, "examples"]:
    """Scores to weights over all rows at once, as `scaling` says; 0 for a row without a score."""
    cut = quantile if scaling == "quantiles" else 0.0
    return rank_weights(scores) if scaling == "ranks" else clipped_minmax_weights(scores, cut, 1 - cut)


def fill_missing_scores(scores: Float[np.ndarray, "examples"]) -> Float[np.ndarray, "examples"]:
    """The scores, with the least of them where there is none."""
    return np.where(np.isnan(scores), np.nanmin(scores), scores)


def score_correlation(
    first: Float[np.ndarray, "examples"] | None, second: Float[np.ndarray, "examples"]
) -> float | None:
    """Spearman's rank correlation of two scores of the same rows; None without a first one, or where one says nothing.

    A row without a score counts as the least.
    """
    value = np.nan if first is None else rank_correlation(fill_missing_scores(first), fill_missing_scores(second))
    return None if np.isnan(value) else value


def _median_standard_error(scores: ExampleScores, indices: Int[np.ndarray, "chosen"]) -> float | None:
    return None if scores.standard_errors is None else float(np.nanmedian(scores.standard_errors[indices]))


def _format_record(record: dict[str, Any]) -> str:
    label = "" if record["auc"] is None else f"   AUC {record['auc']:.3f}"
    correlation = record["with_previous"]
    correlation_text = "" if correlation is None else f"   rank correlation with those before {correlation:.3f}"
    spread_text = f"median {record['median']:.4g}, half of them in [{record['lower']:.4g}, {record['upper']:.4g}]"
    return (
        f"step {record['step']:>6}   scores made in {record['seconds']:.1f} s: {spread_text}{correlation_text}{label}"
    )
