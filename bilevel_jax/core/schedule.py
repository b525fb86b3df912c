"""Which states of a training its reverse sweep keeps: binomial checkpointing, within a memory budget.

A sweep goes back through the steps of a tape, on which their states and gradients stand, and fills the tape again by
replaying steps from a snapshot, a state that was kept. With a tape for all steps nothing is replayed; with about
sqrt(T) snapshots and a tape of sqrt(T) steps every step but the last tape's is replayed once; with fewer, more often.
What is kept decides time and memory, and no bit of the result; where the tape keeps linearisations, too, the steps back
are other programs, and the result is the same but for rounding.
"""

import math
from functools import lru_cache

from bilevel_jax.core.types import Keep

NOTHING = Keep(0, 0)
"""For a training whose end alone is asked for."""
GRID = 32
"""Tapes that are tried, less one, where no number of snapshots spares a second replay."""


def square_root(steps: int) -> Keep:
    """About sqrt(steps) snapshots and a tape of sqrt(steps): the least memory with which a step is replayed once."""
    return once(steps, math.isqrt(max(steps - 1, 0)) + 1)


def once(steps: int, tape: int) -> Keep:
    """A tape of so many steps, and as many snapshots as it takes to replay no step twice."""
    tape = max(1, min(tape, steps))
    return Keep(max(1, -(-steps // tape) - 1), tape)


def everything(steps: int) -> Keep:
    """Every state and gradient on the tape: nothing is replayed."""
    return once(steps, steps)


def within(steps: int, snapshot: float, visit: float, budget: float) -> Keep:
    """What replays the fewest steps in `budget` bytes, a snapshot and a step on the tape taking so many of them.

    Raises:
        ValueError: if one snapshot and a tape of one step are more than that.
    """

    def room(tape: int) -> int:
        return int((budget - tape * visit) // snapshot)

    longest = min(steps, int((budget - snapshot) // visit))
    if longest < 1:
        raise ValueError(
            f"a sweep keeps at least one state and one step, {snapshot + visit:,.0f} bytes; {budget:,.0f} are given."
        )
    for tape in range(longest, 0, -1):
        if once(steps, tape).snapshots <= room(tape):
            return once(steps, tape)
    tapes = sorted({round(longest ** (part / GRID)) for part in range(GRID + 1)})
    return min((Keep(room(tape), tape) for tape in tapes), key=lambda keep: replays(steps, keep))


def placed(begin: int, end: int, snapshots: int, tape: int) -> list[int]:
    """The steps before which to keep states on the way from `begin` (the first) to `end`, to go back replaying least.

    The last `tape` steps are taken to stand on the tape. The rest is the optimal schedule of Griewank and Walther
    ("Algorithm 799: revolve", 2000) for segments of `tape` steps, the first of which may be shorter.
    """
    left = -(-(end - begin) // tape) if tape else 0
    found: list[int] = []
    while snapshots > 0 and left > 1:
        found.append(max(begin, end - tape * left))
        left -= _split(left, snapshots)
        snapshots -= 1
    return found or [begin] * (snapshots > 0 and end > begin)


def refill(kept: set[int], end: int, keep: Keep) -> tuple[int, list[int]]:
    """(the kept step to replay from, further steps to keep on the way), to put the last steps before `end` on the tape.

    `kept` are steps before `end`; later ones have done their service, and their places are taken to be free.
    """
    begin = max(kept)
    return begin, placed(begin, end, keep.snapshots - len(kept) + 1, keep.tape)[1:]


def replays(steps: int, keep: Keep) -> int:
    """Training steps that a sweep over `steps` repeats."""
    kept, end, total = set(placed(0, steps, keep.snapshots, keep.tape)), steps - keep.tape, 0
    while end > 0:
        kept = {step for step in kept if step < end}
        begin, planned = refill(kept, end, keep)
        kept |= set(planned)
        total, end = total + end - begin, end - keep.tape
    return total


def _reach(snapshots: int, repeats: int) -> int:
    """Segments that so many snapshots go back through, if none is passed more than `repeats` times."""
    return math.comb(snapshots + repeats, snapshots) if repeats >= 0 else 0


@lru_cache(maxsize=4096)
def _split(segments: int, snapshots: int) -> int:
    """Segments between this snapshot and the next."""
    if snapshots == 1:
        return segments - 1
    repeats = 1
    while _reach(snapshots, repeats) < segments:
        repeats += 1
    return min(_reach(snapshots, repeats - 1), segments - _reach(snapshots - 1, repeats - 1))
