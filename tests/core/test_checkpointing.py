"""Checkpointing plans against the best schedule by dynamic programming."""

from functools import cache

import pytest

from bilevel_jax.core import checkpointing
from bilevel_jax.core.types import CheckpointPlan


@cache
def fewest(steps: int, snapshots: int) -> int:
    """Forward steps, the training's among them, of the best way back with a tape of one step."""
    if steps <= 1:
        return steps
    if snapshots == 1:
        return steps * (steps + 1) // 2
    return min(k + fewest(steps - k, snapshots - 1) + fewest(k, snapshots) for k in range(1, steps))


@pytest.mark.parametrize("snapshots", (1, 2, 3, 5, 8))
def test_replays_as_few_steps_as_the_best_schedule(snapshots):
    for steps in range(1, 50):
        assert (
            checkpointing.count_replayed_steps(steps, CheckpointPlan(snapshots, 1)) == fewest(steps, snapshots) - steps
        )


@pytest.mark.parametrize("budget", (7, 15, 40, 87, 150, 399, 400, 403, 10_000))
def test_a_budget_is_kept_and_used(budget):
    """100 steps; a snapshot takes 3 and a step on the tape 4."""
    keep = checkpointing.plan_within_budget(100, 3, 4, budget)
    assert 3 * keep.snapshots + 4 * keep.stored_steps <= budget
    others = (CheckpointPlan(s, tape) for tape in range(1, 101) for s in range(1, 34) if 3 * s + 4 * tape <= budget)
    fewest_of_all = min(checkpointing.count_replayed_steps(100, other) for other in others)
    assert (
        checkpointing.count_replayed_steps(100, keep) <= 1.1 * fewest_of_all
    )  # a grid of tapes is tried below the budget of sqrt(T)
    if budget >= 87:
        assert checkpointing.count_replayed_steps(100, keep) == fewest_of_all <= 90


def test_named_schedules():
    assert (
        checkpointing.store_all_plan(100) == CheckpointPlan(1, 100)
        and checkpointing.count_replayed_steps(100, CheckpointPlan(1, 100)) == 0
    )
    assert (
        checkpointing.square_root_plan(100) == CheckpointPlan(9, 10)
        and checkpointing.count_replayed_steps(100, CheckpointPlan(9, 10)) == 90
    )
    assert checkpointing.place_snapshots(0, 100, 9, 10) == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert checkpointing.place_snapshots(0, 24, 4, 5) == [0, 4, 9, 14]
    assert checkpointing.place_snapshots(0, 100, 0, 0) == []
    with pytest.raises(ValueError, match="7 bytes; 6 are given"):
        checkpointing.plan_within_budget(100, 3, 4, 6)


def test_of_many_steps_only_plans_of_few_segments_are_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(checkpointing, "count_replayed_steps", lambda steps, plan: tried.append(plan) or len(tried))
    plan = checkpointing.plan_within_budget(1_000_000, state_bytes=1.0, step_bytes=2.0, budget_bytes=2000.0)
    assert plan in tried and all(1_000_000 / plan.stored_steps <= 1002 for plan in tried)
    assert all(plan.snapshots + 2 * plan.stored_steps <= 2000 for plan in tried)
