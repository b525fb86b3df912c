"""When outer steps measure their reliability, by what, and when validation is used up."""

import itertools

import pytest

from bilevel_jax.runs.budget.work import count_candidate_work
from bilevel_jax.runs.config.schema import OuterSection, SingleLoopSection
from bilevel_jax.runs.engine.reliability import RoundSizes, choose_round_evidence, is_reliability_at_floor

ENOUGH = RoundSizes(validation=64, dev=128)
EVIDENCE = [
    # outer.steps, outer.reliability_every, sizes, whether the round begins with what follows validation; by step
    (5, 2, ENOUGH, False, ["halves", "", "halves", "", "dev"]),
    (5, 2, ENOUGH, True, ["halves", "", "halves", "", "dev"]),
    (4, 3, ENOUGH, False, ["halves", "", "", "dev"]),
    (1, 2, ENOUGH, False, ["halves"]),
    (1, 2, ENOUGH, True, ["dev"]),
    (3, 1, RoundSizes(1, 128), False, ["", "", "dev"]),
    (1, 1, RoundSizes(1, 128), False, ["dev"]),
    (3, 1, RoundSizes(64, 1), False, ["halves", "halves", "halves"]),
    (1, 1, RoundSizes(64, 1), True, ["halves"]),
    (3, 1, RoundSizes(1, 1), False, ["", "", ""]),
    (3, 0, ENOUGH, False, ["", "", ""]),
]


def evidence(steps, every, sizes, is_fitted):
    outer = OuterSection(steps=steps, reliability_every=every)
    return [choose_round_evidence(outer, step, sizes, is_fitted=is_fitted or step > 0) for step in range(steps)]


@pytest.mark.parametrize("steps, every, sizes, is_fitted, expected", EVIDENCE)
def test_what_measures_the_steps_of_a_round(steps, every, sizes, is_fitted, expected):
    assert evidence(steps, every, sizes, is_fitted) == expected


def test_dev_is_read_beside_the_last_hypergradient_alone():
    """It decides the round, so no step may follow what it says."""
    for steps, every, validation, dev, is_fitted in itertools.product(
        (1, 2, 5), (0, 1, 2), (1, 2), (1, 2), (False, True)
    ):
        assert "dev" not in evidence(steps, every, RoundSizes(validation, dev), is_fitted)[:-1]


@pytest.mark.parametrize(
    "every, is_fitted, steps, work",
    [
        (0, False, 5, 60 * (1 + 5 * 5)),
        (2, False, 5, 60 * (1 + 5 * 5 + 2 * (1 + 1 + 2))),  # halves, halves, dev and its halves
        (2, False, 1, 60 * (1 + 5 + 2)),
        (2, True, 1, 60 * (1 + 5 + 2 * 2)),
    ],
)
def test_the_work_of_a_candidate_counts_what_is_measured(every, is_fitted, steps, work):
    outer = OuterSection(steps=steps, reliability_every=every)
    single_loop = SingleLoopSection()
    assert count_candidate_work("unrolled", outer, single_loop, 60, ENOUGH, is_fitted=is_fitted) == work
    assert count_candidate_work("uniform", outer, single_loop, 60, ENOUGH, is_fitted=is_fitted) == 60


def record(reliability=None, fitted=None, *, measured=True):
    draw = {"value": reliability or fitted} if measured else None
    return {"reliability": reliability, "fitted_reliability": fitted, "reliability_draw": draw}


@pytest.mark.parametrize(
    "records, is_at_floor",
    [
        ([record(0.01)], False),
        ([record(0.01), record(fitted=0.05)], True),
        ([record(0.01), record(measured=False), record(fitted=0.0)], True),
        ([record(0.01), record(fitted=0.05), record(measured=False)], False),  # not measured in the last step
        ([record(0.01), record(fitted=0.06)], False),
        ([record(0.5), record(fitted=0.01)], False),
        ([record(0.01), record()], False),  # the halves of dev agree on nothing: nobody knows
    ],
)
def test_validation_is_used_up_after_two_measurements_at_the_floor(records, is_at_floor):
    assert is_reliability_at_floor(records, 0.05) == is_at_floor
    assert not is_reliability_at_floor(records, 0.0)
