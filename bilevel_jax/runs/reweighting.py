"""Weights that a score gives while the model trains: made again as it moves, scaled to 0 .. 1."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.core.types import PADDING, Hyper, Params, Problem
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs import scoring
from bilevel_jax.runs.config import TrainConfig
from bilevel_jax.runs.scoring import Scored
from bilevel_jax.runs.sections import WeightsSection
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.statistics import auc, rank_correlation
from bilevel_jax.runs.task import Task
from bilevel_jax.scores import weights as scaling

SCALES = {
    "batch": "min-max over the rows of each step",
    "rows": "min-max over all rows",
    "quantiles": "min-max over all rows, cut at two quantiles",
}


class Received(NamedTuple):
    """What the rows got over a whole run."""

    weights: Float[np.ndarray, "rows"]
    """The mean over the steps that drew a row; of a row that no step drew, min-max over all rows at the last making."""
    drawn: int
    """Rows that a step drew."""
    equal: int
    """Steps whose rows all had one score, and so weight 1."""


class Reweighting:
    """The weights of each step, from the last making of the scores at or before it.

    Scores are made before the steps `starts`, by the parameters then, and kept in the run's folder: a run that is
    resumed reads them there, so it goes on with the same numbers. A row without a score counts as the least.
    """

    def __init__(self, task: Task, config: TrainConfig, session: Session):
        self.task, self.config, self.session = task, config, session
        self.starts = starts(task.steps, config.weights.refresh)
        self.made: dict[int, Scored] = {}
        self._tables: dict[int, Float[np.ndarray, "rows"]] = {}
        """By start, what a step picks from: scores, of which it makes its own weights, or weights."""
        self._order = task.order(config.data.seed)

    @property
    def problem(self) -> Problem:
        """The task's, whose outer variable is `hyper`: one weight for each slot of a step."""
        return self.task.problem._replace(take=lambda weights, batch: weights)

    @property
    def source(self) -> str:
        """Where the weights come from, in words."""
        weights = self.config.weights
        often = "once, at the start" if len(self.starts) == 1 else f"{len(self.starts)} times, before the steps "
        steps = "" if len(self.starts) == 1 else ", ".join(f"{start:,}" for start in self.starts)
        mean = ", divided by the mean" if weights.mean_one else ""
        return f"the score {weights.score}, {SCALES[weights.scaling]}{mean}; made {often}{steps}"

    def renew(self, step: int, params: Params) -> None:
        """Have the scores that `step` rests on; where they are not there, `params`, those before it, make them."""
        name, folder = self.config.weights.score, self.session.folder
        for number, start in enumerate(self.starts):
            if start > step or start in self.made:
                continue
            column = name if start == 0 else f"{name}_at_{start}"
            if start < step and not scoring.has(column, folder):
                raise FileNotFoundError(
                    f"{folder / scoring.NAME} has no column {column!r}, on which the steps after {start:,} rest: it "
                    "was removed or changed since. Start the run anew, in another folder."
                )
            self.session.phase(f"scoring: {name}, {number + 1} of {len(self.starts)}")
            self.made[start] = scoring.once(column, name, self.task, params, self.config.scores, self.session)
            scores, scale = filled(self.made[start].values), self.config.weights.scaling
            self._tables[start] = scores if scale == "batch" else over_rows(scores, self.config.weights)
            record = self.records()[-1]
            self.session.log.write({"event": "scored", **record})
            self.session.say(_line(record))
            self.session.phase("training")

    def hyper(self, step: int) -> Hyper:
        """What `problem` reads at a step, on the mesh."""
        weights = self._of(step)[1].reshape(self.task.layout.micro, self.task.layout.examples)
        return placing.everywhere(self.task.mesh, weights.astype(self.config.model.param_dtype))

    def received(self) -> Received:
        """The weights of the whole run, from its order and its scores."""
        total, count, equal = np.zeros(self.task.rows), np.zeros(self.task.rows), 0
        for step in range(self.task.steps):
            index, weights = self._of(step)
            real = index != PADDING
            np.add.at(total, index[real], weights[real])
            np.add.at(count, index[real], 1)
            equal += int(np.ptp(self._table(step)[index[real]]) == 0)
        last = over_rows(self.made[self.starts[-1]].values, self.config.weights)
        return Received(np.divide(total, count, out=last, where=count > 0), int((count > 0).sum()), equal)

    def told(self, seconds: float) -> dict[str, Any]:
        """What result.json says; `seconds` are those of training."""
        records, got = self.records(), self.received()
        return {
            "score": self.config.weights.score,
            "records": records,
            "seconds": sum(record["seconds"] for record in records),
            "share": sum(record["seconds"] for record in records) / seconds if seconds else None,
            "passes": sum(record["passes"] for record in records),
            "drawn": got.drawn,
            "equal": got.equal,
        }

    def records(self) -> list[dict[str, Any]]:
        """What the log and the report say of each making so far."""
        rows, good = self.task.trainable(), self._good()
        out: list[dict[str, Any]] = []
        for start, scored in self.made.items():
            values = scored.values[rows]
            before = self.made[out[-1]["step"]].values[rows] if out else None
            spread = np.nanquantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
            out.append(
                {
                    "step": start,
                    **dict(zip(("least", "lower", "median", "upper", "largest"), spread, strict=True)),
                    "with_first": _correlation(self.made[0].values[rows] if out else None, values),
                    "with_previous": _correlation(before, values),
                    "auc": None if good is None else auc(filled(values), good),
                    "passes": scored.passes,
                    "seconds": scored.seconds,
                    "notes": list(scored.notes),
                }
            )
        return out

    def _table(self, step: int) -> Float[np.ndarray, "rows"]:
        return self._tables[max(start for start in self.starts if start <= step)]

    def _of(self, step: int) -> tuple[Int[np.ndarray, "batch"], Float[np.ndarray, "batch"]]:
        """(the row of each slot of a step, PADDING for an empty one; its weight, 0 for those)."""
        chosen, table = self._order(step), self._table(step)
        index = np.where(chosen < self.task.rows, chosen, PADDING)
        if self.config.weights.scaling != "batch":
            return index, np.where(index != PADDING, table[np.minimum(chosen, self.task.rows - 1)], 0.0)
        weights = scaling.by_batch(table, index)
        return index, weights / weights[index != PADDING].mean() if self.config.weights.mean_one else weights

    def _good(self) -> Bool[np.ndarray, "kept"] | None:
        labels = [self.task.examples[row].label for row in self.task.trainable()]
        good = np.array([label == self.config.data.good_label for label in labels])
        return good if 0 < good.sum() < len(good) else None  # of one kind alone there is nothing to tell apart


def starts(steps: int, count: int) -> tuple[int, ...]:
    """The steps before which scores are made: `count` of them, equally spaced, the first at 0."""
    return tuple(sorted({index * steps // count for index in range(count)}))


def over_rows(scores: Float[np.ndarray, "rows"], config: WeightsSection) -> Float[np.ndarray, "rows"]:
    """Scores to weights over all rows at once, as the scale says; 0 for a row without a score."""
    cut = config.quantile if config.scaling == "quantiles" else 0.0
    weights = scaling.clipped(scores, cut, 1 - cut)
    return weights / weights.mean() if config.mean_one else weights


def filled(scores: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    """The scores, with the least of them where there is none."""
    return np.where(np.isnan(scores), np.nanmin(scores), scores)


def _correlation(one: Float[np.ndarray, "rows"] | None, other: Float[np.ndarray, "rows"]) -> float | None:
    value = np.nan if one is None else rank_correlation(filled(one), filled(other))
    return None if np.isnan(value) else value


def _line(record: dict[str, Any]) -> str:
    label = "" if record["auc"] is None else f"   AUC {record['auc']:.3f}"
    same = record["with_previous"]
    moved = "" if same is None else f"   rank correlation with those before {same:.3f}"
    middle = f"median {record['median']:.4g}, half of them in [{record['lower']:.4g}, {record['upper']:.4g}]"
    return f"step {record['step']:>6}   scores made in {record['seconds']:.1f} s: {middle}{moved}{label}"
