"""The rate of the outer loop against its closed forms."""

import numpy as np
import pytest

from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine.outer_loop import outer_learning_rate, total_outer_learning_rate

SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: np.cos(np.pi * progress / 2) ** 2,
}


@pytest.mark.parametrize("schedule", SHAPES)
def test_the_rate_falls_as_the_schedule_says(schedule):
    outer = OuterSection(schedule=schedule, learning_rate=0.7)
    for progress in (0.0, 0.25, 0.5, 1.0):
        assert outer_learning_rate(outer, progress) == pytest.approx(
            0.7 * SHAPES[schedule](progress), abs=1e-6
        )  # in float32


@pytest.mark.parametrize("schedule, expected", [("constant", 8 * 0.7), ("linear", 9 * 0.35), ("cosine", 9 * 0.35)])
def test_travel_is_the_sum_of_the_rates(schedule, expected):
    assert total_outer_learning_rate(OuterSection(schedule=schedule, learning_rate=0.7, steps=8)) == pytest.approx(
        expected, rel=1e-6
    )
