"""Reliability of the hypergradients of outer steps: when it is measured, by what, and its JSON."""

import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from bilevel_jax.core.certify import (
    Reliability,
    average_reliability,
    measure_reliability,
    measure_reliability_against,
)
from bilevel_jax.core.certify.verdict import PRODUCT_TOLERANCE
from bilevel_jax.core.types import Checks, Estimate
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine.folds import Turn, count_judges
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.tasks.evaluation import judges_by_examples
from bilevel_jax.runs.tasks.protocol import Task

Evidence = Literal["", "halves", "dev"]
"""What the reliability of a step in a round of `refine` is measured by: nothing, halves of validation, or dev."""
FLOOR_REASON = "the reliability was at most outer.reliability_floor in two measurements in a row"


class RoundSizes(NamedTuple):
    """How many examples can judge in a round of `refine`."""

    validation: int
    dev: int


def measures_reliability(outer: OuterSection, step: int, last_step: int) -> bool:
    """Whether an outer step measures its reliability."""
    every = outer.reliability_every
    return every > 0 and (step % every == 0 or step == last_step)


def choose_round_evidence(outer: OuterSection, step: int, sizes: RoundSizes, *, is_fitted: bool) -> Evidence:
    """What an outer step of a round of `refine` measures its reliability by.

    Dev decides the round, so it is read beside the round's last hypergradient alone, when no choice is left that it
    could steer, and there only where halves of validation do not tell: where the weights, the model or the questions
    follow validation already (`is_fitted`), or it is one example.
    """
    last_step = outer.steps - 1
    if not measures_reliability(outer, step, last_step):
        return ""
    if step == last_step and sizes.dev > 1 and (is_fitted or sizes.validation < 2):
        return "dev"
    return "halves" if sizes.validation > 1 else ""


def measure_estimate_reliability(
    task: Task,
    trainer: Trainer,
    weights: jax.Array,
    estimate: Estimate,
    turn: Turn | None = None,
    *,
    trained: Int[np.ndarray, "trained"],
    is_learned: bool,
) -> Reliability | None:
    """The reliability over the examples that are `trained` on; None where neither halves nor dev were estimated, and
    without a number where there can be no halves.

    At weights that were not learned, halves of either set tell the validation set's noise. At learned ones dev does,
    which has not steered them; without dev nobody knows.
    """
    if not judges_by_examples(task):
        return None  # a function of the parameters: there are no other examples to speak for
    num_validation = count_judges(task, turn)
    fetch = lambda table: fetch_to_host(table)[trained]  # noqa: E731
    has_own = isinstance(estimate.half_difference, jax.Array)  # of several targets, whose sizes differ from dev's
    if estimate.independent and (is_learned or not has_own or len(task.outer_objective.targets) == 1):
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


def describe_product_error(outer: OuterSection, error: float) -> str:
    """What lower precision of the products in the steps back changes, in a sentence; "" where it was not measured."""
    if np.isnan(error):
        return ""
    words = f"outer.product_precision = {outer.product_precision} changes the hypergradient by {error:.2%} of its norm"
    if error > PRODUCT_TOLERANCE:
        words += ", too much to believe it: raise the precision, or lower optimizer.learning_rate"
    return f"{words}."


def reliability_to_record(draw: Reliability | None) -> dict[str, Any]:
    """What the record of an outer step holds of its reliability: the number where it is known, and the draw."""
    return {
        "reliability": known_reliability(draw),
        "fitted_reliability": draw.value if draw and draw.is_fitted and not np.isnan(draw.value) else None,
        "reliability_draw": draw and fields_to_json(draw),
    }


def known_reliability(draw: Reliability | None) -> float | None:
    """The reliability as a number; None where nobody knows it."""
    return None if draw is None or draw.is_fitted or np.isnan(draw.value) else draw.value


def is_reliability_at_floor(records: list[dict[str, Any]], floor: float) -> bool:
    """Whether the last two measurements, the second of them in the last step, were at most `floor`; never at 0."""
    measured = [record for record in records if record["reliability_draw"]]
    if floor == 0 or len(measured) < 2 or measured[-1] is not records[-1]:
        return False
    values = [_largest_reliability(record) for record in measured[-2:]]
    return all(value is not None and value <= floor for value in values)


def _largest_reliability(record: dict[str, Any]) -> float | None:
    """The reliability of what an outer step went by: of its hypergradient, or of the better part of a pooled one."""
    if record.get("pooling"):
        return float(np.sqrt(max(record["pooling"].values())))  # a share of energy is a correlation squared
    return record["fitted_reliability"] if record["reliability"] is None else record["reliability"]


def average_reliability_near(records: list[dict[str, Any]], step: int) -> Reliability | None:
    """The reliability at an outer step, or the mean of those nearest to it; that of step 0, where nothing was learned
    yet, stands for no other step. None without any."""
    measured = [record for record in records if record["reliability_draw"] and (record["step"] > 0) == (step > 0)]
    # of one validation example there are no halves, at any step: such a record tells less than a farther one by dev
    numbers = ("noise", "agreement")
    measured = [one for one in measured if any(one["reliability_draw"][key] is not None for key in numbers)] or measured
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
