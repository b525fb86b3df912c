"""The comparison table: cold retrains with the learned weights and with every simple alternative, read on V_report."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.unrolled import outer_value
from bilevel_jax.lm.batches import steps_per_epoch
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs import scoring
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.learn import Learned, good_rows
from bilevel_jax.runs.rows import PARTS
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.statistics import mean_interval, top
from bilevel_jax.runs.task import Task, per_row
from bilevel_jax.runs.training import Trainer

FIRST_SEED = 10_000
"""Data orders of the comparison begin here: the learned weights have seen none of them."""


class Arm(NamedTuple):
    """One row of the table: which corpus rows it trains on, with which weights."""

    name: str
    meaning: str
    rows: Int[np.ndarray, "chosen"]
    weights: Float[np.ndarray, "corpus"]


def arms(
    task: Task, config: SelectConfig, learned: Learned, selected: Int[np.ndarray, "selected"], session: Session
) -> list[Arm]:
    """The rows of the table that the config asks for and the data allow."""
    everything, fit = task.trainable(), task.fit_rows()
    ones = np.ones(task.corpus.rows)
    table = ones.copy()
    table[: task.rows] = learned.weights
    count = len(selected)
    share = f"{count} rows"
    drawn = np.sort(np.random.default_rng(config.data.seed).choice(everything, count, replace=False))
    good = good_rows(task, config)
    known = np.zeros(task.rows, bool) if good is None else good

    def scored(name: str) -> Arm:
        params = task.fresh(config.train.seed)
        values = scoring.once(name, name, task, params, config.scores, session).values
        return Arm(
            f"{name}, top", f"{share} of the largest {name} by the model before training",
            top(values, count, everything), ones,
        )  # fmt: skip

    available: dict[str, Callable[[], Arm]] = {
        "uniform": lambda: Arm("uniform", "every row with weight 1", everything, ones),
        "learned": lambda: Arm("learned weights", "every row with its learned weight", everything, table),
        "selected": lambda: Arm("selected subset", f"the {share} written to selected.jsonl, weight 1", selected, ones),
        "random": lambda: Arm("random subset", f"{share} drawn at random", drawn, ones),
        "alignment": lambda: Arm(
            "alignment, top", f"{share} best aligned with grad L_v after uniform training",
            top(-learned.alignment, count, everything), ones,
        ),
        "perplexity": lambda: Arm(
            "low loss, top", f"{share} with the least loss after uniform training",
            top(-learned.losses, count, everything), ones,
        ),
        "validation": lambda: Arm("validation only", "V_fit alone, weight 1", fit, ones),
        "train+validation": lambda: Arm(
            "train + validation", "all rows and V_fit, weight 1", np.concatenate([everything, fit]), ones
        ),
        "oracle": lambda: Arm(
            "oracle", f"the rows whose label is {config.data.good_label!r}", everything[known[everything]], ones
        ),
    }  # fmt: skip
    wanted = [name for name in config.retrain.variants if name != "oracle" or known.any()]
    return [available[name]() if name in available else scored(name) for name in wanted]


def compare(
    task: Task, config: SelectConfig, trainer: Trainer, session: Session, table: list[Arm]
) -> list[dict[str, Any]]:
    """Train every arm from cold under every seed; means with 95 % intervals over the seeds.

    The same number of steps for all: an arm with fewer rows makes more epochs, which the table states.
    """
    if not config.retrain.enabled:
        return []
    read = outer_value(task.problem)
    results = []
    for arm in table:
        session.phase(f"comparing: {arm.name}")
        train = partial(retrain, task, config, trainer, session, read, arm)
        runs = [
            session.once(f"compare/{arm.name}/{seed}", partial(train, seed)) for seed in range(config.retrain.seeds)
        ]
        columns = [*PARTS, "accuracy"]
        intervals = {
            column: mean_interval([run[column] for run in runs]) for column in columns if runs[0][column] is not None
        }
        results.append(
            {
                "name": arm.name,
                "meaning": arm.meaning,
                "rows": len(arm.rows),
                "steps": task.steps,
                "epochs": task.steps / steps_per_epoch(len(arm.rows), task.batch),
                "runs": runs,
                "mean": {column: mean for column, (mean, _) in intervals.items()},
                "interval": {column: half for column, (_, half) in intervals.items()},
            }
        )
        session.say(_line(results[-1], task.objective.right))
    return results


def retrain(task, config, trainer, session, read, arm: Arm, seed: int) -> dict[str, Any]:
    """Train once from cold on the arm's rows and weights: L_v on each part (nats), accuracy on V_report."""
    start = trainer.begin(task.fresh(config.train.seed + FIRST_SEED + seed))
    stream = task.stream(config.data.seed + FIRST_SEED + seed, arm.rows, packed=False)
    run = trainer.run(placing.table(task.mesh, arm.weights.astype(jnp.result_type(float))), start, stream)
    fixed = task.fixed(start.params)
    values = {
        part: float(read(run.end.params, fixed, task.held_out[part])) if part in task.held_out else None
        for part in PARTS
    }
    report = "report" if "report" in task.held_out else "fit"
    right = per_row(task.objective.accuracy, run.end.params, fixed, task.held_out[report], len(task.trusted[report]))
    return {**values, "accuracy": float(np.nanmean(right))}


def _line(result: dict[str, Any], right: str) -> str:
    mean, half = result["mean"].get("report"), result["interval"].get("report")
    loss = "" if mean is None else f"L_v on V_report {mean:.4f} ± {half:.4f}   "
    return f"{result['name']:<20}{loss}{right} {result['mean']['accuracy']:.3f}   {result['rows']} rows"
