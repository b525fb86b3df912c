"""Checkpointing plans (Revolve) for the backward pass within a memory budget.

The backward pass goes back through stored steps, whose states and gradients are in memory, and stores further ones by
replaying steps from a snapshot, a state that was kept. With all steps stored nothing is replayed; with about sqrt(T)
snapshots and sqrt(T) stored steps every step but the last ones is replayed once; with fewer, more often. What is stored
decides time and memory, and no bit of the result; where linearisations are stored, too, the steps back are other
programs, and the result is the same but for rounding.
"""

import math
from functools import lru_cache

from bilevel_jax.core.types import CheckpointPlan

NO_CHECKPOINTS = CheckpointPlan(0, 0)
"""For a training run whose end alone is read."""
NUM_BUDGET_TRIALS = 32
"""Numbers of stored steps that are tried, less one, where every plan replays some step twice."""

MAX_COUNTED_SEGMENTS = 1000
"""Segments of stored steps up to which a plan is tried, or as many as the most stored steps make: each is counted."""


def square_root_plan(steps: int) -> CheckpointPlan:
    """About sqrt(steps) snapshots and sqrt(steps) stored steps: the least memory with which a step is replayed once.

    Args:
        steps: of the training run.

    Returns:
        The plan.

    Example:
        >>> bj.checkpointing.square_root_plan(100)
        CheckpointPlan(snapshots=9, stored_steps=10, linearize=False)
    """
    return single_replay_plan(steps, math.isqrt(max(steps - 1, 0)) + 1)


def single_replay_plan(steps: int, stored_steps: int) -> CheckpointPlan:
    """A plan with so many stored steps, and as many snapshots as it takes to replay no step twice.

    Args:
        steps: of the training run.
        stored_steps: at the same time; between 1 and `steps`.

    Returns:
        The plan.

    Example:
        >>> bj.checkpointing.single_replay_plan(100, stored_steps=25)
        CheckpointPlan(snapshots=3, stored_steps=25, linearize=False)
    """
    stored_steps = max(1, min(stored_steps, steps))
    return CheckpointPlan(max(1, -(-steps // stored_steps) - 1), stored_steps)


def store_all_plan(steps: int) -> CheckpointPlan:
    """Every state and gradient stored: nothing is replayed.

    Args:
        steps: of the training run.

    Returns:
        The plan.

    Example:
        >>> bj.checkpointing.store_all_plan(100)
        CheckpointPlan(snapshots=1, stored_steps=100, linearize=False)
    """
    return single_replay_plan(steps, steps)


def plan_within_budget(steps: int, state_bytes: float, step_bytes: float, budget_bytes: float) -> CheckpointPlan:
    """The plan that replays the fewest steps in so much memory.

    Args:
        steps: of the training run.
        state_bytes: memory of a snapshot.
        step_bytes: memory of a stored step, its state and gradient.
        budget_bytes: memory for both kinds together.

    Returns:
        The plan.

    Raises:
        ValueError: if one snapshot and one stored step take more than the budget.

    Example:
        >>> bj.checkpointing.plan_within_budget(100, state_bytes=3.0, step_bytes=4.0, budget_bytes=67.0)
        CheckpointPlan(snapshots=9, stored_steps=10, linearize=False)
    """

    def max_snapshots(stored_steps: int) -> int:
        return int((budget_bytes - stored_steps * step_bytes) // state_bytes)

    max_stored_steps = min(steps, int((budget_bytes - state_bytes) // step_bytes))
    if max_stored_steps < 1:
        raise ValueError(
            f"a backward pass keeps at least one state and one step, {state_bytes + step_bytes:,.0f} bytes; "
            f"{budget_bytes:,.0f} are given."
        )
    for stored_steps in range(max_stored_steps, 0, -1):
        if single_replay_plan(steps, stored_steps).snapshots <= max_snapshots(stored_steps):
            return single_replay_plan(steps, stored_steps)
    most_segments = max(MAX_COUNTED_SEGMENTS, -(-steps // max_stored_steps))
    candidates = sorted(
        stored_steps
        for stored_steps in {
            round(max_stored_steps ** (trial / NUM_BUDGET_TRIALS)) for trial in range(NUM_BUDGET_TRIALS + 1)
        }
        if -(-steps // stored_steps) <= most_segments
    )
    return min(
        (CheckpointPlan(max_snapshots(stored_steps), stored_steps) for stored_steps in candidates),
        key=lambda plan: count_replayed_steps(steps, plan),
    )


def place_snapshots(begin: int, end: int, snapshots: int, stored_steps: int) -> list[int]:
    """The steps before which to keep states on the way from `begin` to `end`, to go back replaying least.

    The last `stored_steps` steps are taken to be stored. The rest is the optimal schedule of Griewank and Walther
    ("Algorithm 799: revolve", 2000) for segments of `stored_steps` steps, the first of which may be shorter.

    Args:
        begin: the first step.
        end: one more than the last step.
        snapshots: states that may be kept.
        stored_steps: steps that are stored at the same time.

    Returns:
        The steps, ascending; `begin` is the first.

    Example:
        >>> bj.checkpointing.place_snapshots(0, 100, snapshots=3, stored_steps=25)
        [0, 25, 50]
    """
    segments_left = -(-(end - begin) // stored_steps) if stored_steps else 0
    snapshot_steps: list[int] = []
    while snapshots > 0 and segments_left > 1:
        snapshot_steps.append(max(begin, end - stored_steps * segments_left))
        segments_left -= _segments_to_next_snapshot(segments_left, snapshots)
        snapshots -= 1
    return snapshot_steps or [begin] * (snapshots > 0 and end > begin)


def plan_replay(snapshot_steps: set[int], end: int, plan: CheckpointPlan) -> tuple[int, list[int]]:
    """From which snapshot to replay, and which further states to keep, to store the last steps before `end`.

    Args:
        snapshot_steps: steps before `end` whose states are kept; the places of later ones are taken to be free.
        end: one more than the last step to store.
        plan: as the run was trained with.

    Returns:
        (the step to replay from, further steps to keep on the way).

    Example:
        >>> plan = bj.checkpointing.square_root_plan(100)
        >>> bj.checkpointing.plan_replay({0, 10, 20}, 30, plan)
        (20, [])
    """
    begin = max(snapshot_steps)
    return begin, place_snapshots(begin, end, plan.snapshots - len(snapshot_steps) + 1, plan.stored_steps)[1:]


def count_replayed_steps(steps: int, plan: CheckpointPlan) -> int:
    """Training steps that a backward pass repeats.

    Args:
        steps: of the training run.
        plan: as it is trained with.

    Returns:
        The number of steps.

    Example:
        >>> bj.checkpointing.count_replayed_steps(100, bj.checkpointing.square_root_plan(100))
        90
    """
    snapshot_steps, end, total = (
        set(place_snapshots(0, steps, plan.snapshots, plan.stored_steps)),
        steps - plan.stored_steps,
        0,
    )
    while end > 0:
        snapshot_steps = {step for step in snapshot_steps if step < end}
        begin, new_snapshot_steps = plan_replay(snapshot_steps, end, plan)
        snapshot_steps |= set(new_snapshot_steps)
        total, end = total + end - begin, end - plan.stored_steps
    return total


def _max_segments(snapshots: int, repeats: int) -> int:
    """Segments that so many snapshots go back through, if none is passed more than `repeats` times."""
    return math.comb(snapshots + repeats, snapshots) if repeats >= 0 else 0


@lru_cache(maxsize=4096)
def _segments_to_next_snapshot(segments: int, snapshots: int) -> int:
    """Segments between this snapshot and the next."""
    if snapshots == 1:
        return segments - 1
    repeats = 1
    while _max_segments(snapshots, repeats) < segments:
        repeats += 1
    return min(_max_segments(snapshots, repeats - 1), segments - _max_segments(snapshots - 1, repeats - 1))
