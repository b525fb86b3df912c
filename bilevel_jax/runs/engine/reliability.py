"""Reliability of the hypergradients of outer steps, and its JSON."""

import math
from typing import Any

import jax
import numpy as np

from bilevel_jax.core.certify import (
    Reliability,
    average_reliability,
    measure_reliability,
    measure_reliability_against,
)
from bilevel_jax.core.types import Checks, Estimate
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine.folds import Turn, count_judges
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.tasks.protocol import Task


def measures_reliability(outer: OuterSection, step: int) -> bool:
    """Whether an outer step measures its reliability."""
    every = outer.reliability_every
    return every > 0 and (step % every == 0 or step == outer.steps)


def measure_estimate_reliability(
    task: Task,
    trainer: Trainer,
    weights: jax.Array,
    estimate: Estimate,
    turn: Turn | None = None,
    *,
    is_learned: bool,
) -> Reliability | None:
    """The reliability over the examples that are trained on; None where neither halves nor dev were estimated, and
    without a number where there can be no halves.

    At weights that were not learned, halves of either set tell the validation set's noise. At learned ones dev does,
    which has not steered them; without dev nobody knows.
    """
    kept, num_validation = task.trainable_indices(), count_judges(task, turn)
    fetch = lambda table: fetch_to_host(table)[kept]  # noqa: E731
    if estimate.independent:
        dev_grad, dev_halves = map(fetch, estimate.independent)
        if is_learned:
            return measure_reliability_against(
                fetch(weights), fetch(estimate.grad), dev_grad, dev_halves, num_validation
            )
        scale = (trainer.num_held_out("dev") / num_validation) ** 0.5  # the noise of one set from that of another
        return measure_reliability(fetch(weights), fetch(estimate.grad), scale * dev_halves, num_validation)
    if not isinstance(estimate.half_difference, jax.Array):
        is_impossible = trainer.outer.reliability_every > 0 and num_validation < 2
        return Reliability(math.nan, math.nan, num_validation) if is_impossible else None
    draw = measure_reliability(fetch(weights), fetch(estimate.grad), fetch(estimate.half_difference), num_validation)
    return draw._replace(is_fitted=is_learned)


def average_reliability_near(records: list[dict[str, Any]], step: int) -> Reliability | None:
    """The reliability at an outer step, or the mean of those nearest to it; that of step 0, where nothing was learned
    yet, stands for no other step. None without any."""
    measured = [record for record in records if record["reliability_draw"] and (record["step"] > 0) == (step > 0)]
    distance = min((abs(record["step"] - step) for record in measured), default=0)
    nearest = [record for record in measured if abs(record["step"] - step) == distance]
    draws = [reliability_from_json(record["reliability_draw"]) for record in nearest]
    return average_reliability(draws) if draws else None


def fields_to_json(measured: Reliability | Checks) -> dict[str, Any]:
    """The fields, None for nan."""
    fields = measured._asdict().items()
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in fields}


def reliability_from_json(fields: dict[str, Any]) -> Reliability:
    """The inverse of `fields_to_json`."""
    values: dict[str, Any] = {key: np.nan if value is None else value for key, value in fields.items()}
    return Reliability(**values)
