"""The coefficients of a rater in a report: what their intervals are over, and an axis that they set."""

import re

import numpy as np
import pytest

from bilevel_jax.runs.engine.raters import LEAST_STEPS, coefficient_intervals
from bilevel_jax.runs.report import raters
from bilevel_jax.runs.stats import jackknife_half_width

STEPS = np.random.default_rng(0).normal(size=(6, 2)).cumsum(0)
FOLDS = np.random.default_rng(1).normal(size=(5, 2))


def made(best_step, without_folds=None):
    return coefficient_intervals(["loss", "length"], STEPS.tolist(), best_step, without_folds)


def test_intervals_are_over_folds_where_there_are_some():
    for best_step in (2, 5):
        held = made(best_step, FOLDS)
        assert held["intervals"] == {"over": "folds", "count": 5}
        assert [one["half_width"] for one in held["coefficients"]] == jackknife_half_width(FOLDS).tolist()
        assert [one["value"] for one in held["coefficients"]] == STEPS[best_step].tolist()


@pytest.mark.parametrize("best_step", range(6))
def test_few_outer_steps_give_no_interval(best_step):
    held = made(best_step)
    told = raters.describe_rater(held["coefficients"], held["intervals"])
    assert told is not None
    if best_step >= LEAST_STEPS:
        assert held["intervals"] == {"over": "steps", "count": best_step}
        assert all(one["half_width"] > 0 for one in held["coefficients"])
        assert told["bars"].startswith("Bars: 95 % intervals over the outer steps.")
    else:
        assert held["intervals"] == {"over": "none", "count": best_step}
        assert all(one["half_width"] is None for one in held["coefficients"])
        assert told["bars"].startswith("No intervals: ") and ("before the first" in told["bars"]) == (best_step == 0)


def axis_numbers(picture):
    """The numbers at the ticks."""
    texts = re.findall(r">([−0-9.,]+)</text>", str(picture))
    return [float(text.replace("−", "-").replace(",", "")) for text in texts]


def test_a_huge_interval_does_not_flatten_the_picture():
    coefficients = [
        {"name": "loss", "value": -0.2, "half_width": 90.0},
        {"name": "length", "value": 0.1, "half_width": 0.05},
    ]
    told = raters.describe_rater(coefficients, {"over": "folds", "count": 2})
    numbers = axis_numbers(told["picture"])
    assert len(numbers) > 3 and max(map(abs, numbers)) <= 0.5
    assert "Arrows" in told["bars"]
    whole = raters.describe_rater([coefficients[1]], {"over": "folds", "count": 2})
    assert "Arrows" not in whole["bars"]


def test_an_interval_that_holds_0_is_said_to_in_the_table():
    def words(value, half):
        return raters._sign_words({"value": value, "half_width": half})

    assert words(1.0, 0.5) == words(1.0, None) == "more weight"
    assert words(-1.0, 0.5) == "less weight" and words(0.0, 0.5) == "nothing"
    assert words(-1.0, 2.0) == "less weight; the interval holds 0"
