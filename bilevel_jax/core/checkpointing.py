"""Which states of a training its reverse sweep keeps: binomial checkpointing, within a memory budget.

A sweep goes back through the steps of a tape, on which their states and gradients stand, and fills the tape again by
replaying steps from a snapshot, a state that was kept. With a tape for all steps nothing is replayed; with about
sqrt(T) snapshots and a tape of sqrt(T) steps every step but the last tape's is replayed once; with fewer, more often.
What is kept decides time and memory, and no bit of the result; where the tape keeps linearisations, too, the steps back
are other programs, and the result is the same but for rounding.
"""

import math
from functools import lru_cache

from bilevel_jax.core.types import CheckpointPlan

NO_CHECKPOINTS = CheckpointPlan(0, 0)
"""For a training whose end alone is asked for."""
NUM_BUDGET_TRIALS = 32
"""Tapes that are tried, less one, where no number of snapshots spares a second replay."""


def square_root_plan(steps: int) -> CheckpointPlan:
    """About sqrt(steps) snapshots and a tape of sqrt(steps): the least memory with which a step is replayed once."""
    return single_replay_plan(steps, math.isqrt(max(steps - 1, 0)) + 1)


def single_replay_plan(steps: int, stored_steps: int) -> CheckpointPlan:
    """A tape of so many steps, and as many snapshots as it takes to replay no step twice."""
    stored_steps = max(1, min(stored_steps, steps))
    return CheckpointPlan(max(1, -(-steps // stored_steps) - 1), stored_steps)


def store_all_plan(steps: int) -> CheckpointPlan:
    """Every state and gradient on the tape: nothing is replayed."""
    return single_replay_plan(steps, steps)


def plan_within_budget(steps: int, state_bytes: float, step_bytes: float, budget_bytes: float) -> CheckpointPlan:
    """What replays the fewest steps in `budget` bytes, a snapshot and a step on the tape taking so many of them.

    Raises:
        ValueError: if one snapshot and a tape of one step are more than that.
    """

    def max_snapshots(stored_steps: int) -> int:
        return int((budget_bytes - stored_steps * step_bytes) // state_bytes)

    max_stored_steps = min(steps, int((budget_bytes - state_bytes) // step_bytes))
    if max_stored_steps < 1:
        raise ValueError(
            f"a sweep keeps at least one state and one step, {state_bytes + step_bytes:,.0f} bytes; {budget_bytes:,.0f} are given."
        )
    for stored_steps in range(max_stored_steps, 0, -1):
        if single_replay_plan(steps, stored_steps).snapshots <= max_snapshots(stored_steps):
            return single_replay_plan(steps, stored_steps)
    candidates = sorted(
        {round(max_stored_steps ** (trial / NUM_BUDGET_TRIALS)) for trial in range(NUM_BUDGET_TRIALS + 1)}
    )
    return min(
        (CheckpointPlan(max_snapshots(stored_steps), stored_steps) for stored_steps in candidates),
        key=lambda plan: count_replayed_steps(steps, plan),
    )


def place_snapshots(begin: int, end: int, snapshots: int, stored_steps: int) -> list[int]:
    """The steps before which to keep states on the way from `begin` (the first) to `end`, to go back replaying least.

    The last `tape` steps are taken to stand on the tape. The rest is the optimal schedule of Griewank and Walther
    ("Algorithm 799: revolve", 2000) for segments of `tape` steps, the first of which may be shorter.
    """
    segments_left = -(-(end - begin) // stored_steps) if stored_steps else 0
    snapshot_steps: list[int] = []
    while snapshots > 0 and segments_left > 1:
        snapshot_steps.append(max(begin, end - stored_steps * segments_left))
        segments_left -= _segments_to_next_snapshot(segments_left, snapshots)
        snapshots -= 1
    return snapshot_steps or [begin] * (snapshots > 0 and end > begin)


def plan_replay(snapshot_steps: set[int], end: int, plan: CheckpointPlan) -> tuple[int, list[int]]:
    """(the kept step to replay from, further steps to keep on the way), to put the last steps before `end` on the tape.

    `kept` are steps before `end`; later ones have done their service, and their places are taken to be free.
    """
    begin = max(snapshot_steps)
    return begin, place_snapshots(begin, end, plan.snapshots - len(snapshot_steps) + 1, plan.stored_steps)[1:]


def count_replayed_steps(steps: int, plan: CheckpointPlan) -> int:
    """Training steps that a sweep over `steps` repeats."""
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
