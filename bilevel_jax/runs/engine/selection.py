"""Rules that turn weights into a selected subset."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import SelectionSection
from bilevel_jax.runs.scoring.difficulty import Difficulty
from bilevel_jax.runs.stats import top_indices

STRATA_NAMES = {"length": "like length", "loss": "like loss before training"}
"""selection.strata -> the groups in words."""
STRATA_COLUMNS = {"length": "tokens", "loss": "start_loss"}
"""selection.strata -> the column of weights.parquet that it goes by."""


def select_examples(
    weights: Float[np.ndarray, "examples"],
    candidates: Int[np.ndarray, "kept"],
    rule: SelectionSection,
    *,
    sources: Sequence[str],
    seed: int,
    strata: Int[np.ndarray, "examples"] | None = None,
) -> Int[np.ndarray, "selected"]:
    """The examples to keep, in their order, out of `candidates`.

    - top_share: that share of the rows, those of the largest weights; under rule.strata that share of each of `strata`
      (the group of each row, by `divide_into_strata`), those of its largest weights, as many in all as without;
    - threshold: all rows of at least that weight;
    - resample: n rows, row i floor or ceil of n w_i / Σ w times (systematic resampling: the least noise that whole
      repeats allow, and each count right on average over seeds). With max_repeats = r row i is expected
      min(r, λ w_i) times, with the one λ for which these sum to n, and never taken more than r times; where the rows of
      a weight above 0 are too few for n, each is taken r times;
    - per_source: n rows, dealt to the sources by their total weight (largest remainders) and, inside a source, those of
      the largest weights; a source with fewer rows gives all it has.

    Raises ValueError where the rule leaves no row, or fewer than rule.num_strata.
    """
    if rule.resample:
        return _resample(weights, candidates, rule, seed)
    if rule.per_source:
        return _select_per_source(weights, candidates, rule.per_source, np.asarray(sources))
    if rule.threshold:
        selected = candidates[weights[candidates] >= rule.threshold]
        if not len(selected):
            raise ValueError(
                f"no row has a weight of selection.threshold = {rule.threshold:g} or more; the largest is "
                f"{weights[candidates].max():.3g}. Lower it, or use selection.top_share."
            )
        return selected
    count = _count_top(rule, len(candidates))
    if rule.strata:
        if strata is None:
            raise ValueError(f"selection.strata = {rule.strata}: the strata of the rows are not given.")
        check_strata(rule, len(candidates))
        return _select_per_stratum(weights, candidates, count, strata)
    return top_indices(weights, count, candidates)


def check_strata(rule: SelectionSection, num_candidates: int) -> None:
    """Refuse strata of which some would give no row, as fewer rows are selected; known before any weight is."""
    count = _count_top(rule, num_candidates)
    if rule.strata and count < rule.num_strata:
        larger_share = "raise top_share, " if num_candidates >= rule.num_strata else ""
        raise ValueError(
            f"selection.top_share = {rule.top_share:g} of {format_count('row', num_candidates)} selects {count:,}, and "
            f"selection.num_strata = {rule.num_strata} asks for at least one of each stratum: {larger_share}lower "
            "num_strata, or leave selection.strata empty."
        )


def list_further_strata(rule: SelectionSection) -> list[str]:
    """Values that selection.strata could have instead of its own; none where the rule selects by no share."""
    if rule.threshold or rule.resample or rule.per_source:
        return []
    return [name for name in STRATA_NAMES if name != rule.strata]


def divide_by_difficulty(difficulty: Difficulty, rule: SelectionSection) -> Int[np.ndarray, "examples"] | None:
    """The strata that selection.strata asks for; None where it is off."""
    values = {"length": difficulty.lengths, "loss": difficulty.losses}.get(rule.strata)
    return None if values is None else divide_into_strata(values, difficulty.rows, rule.num_strata)


def divide_into_strata(
    values: Float[np.ndarray, "examples"], candidates: Int[np.ndarray, "kept"], num_strata: int
) -> Int[np.ndarray, "examples"]:
    """The group of each row: `candidates` in order of their values, cut where the groups come nearest to equal sizes.

        stratum of v = floor(num_strata (rows below v + rows up to v) / 2N)

    Equal values are in one group, whatever the order of the data. So sizes differ by at most one where all values do,
    and by more where many rows share a value; groups that get none are left out, and the others numbered from 0. Rows
    that are no candidates have -1.
    Wrong where the value is what makes an example good or bad: of the lowest weights a group keeps as many as all do.
    """
    strata = np.full(len(values), -1)
    _, places, counts = np.unique(values[candidates], return_inverse=True, return_counts=True)
    up_to = np.cumsum(counts)
    groups = num_strata * (2 * up_to - counts) // (2 * max(1, len(candidates)))
    strata[candidates] = np.unique(groups, return_inverse=True)[1][places]
    return strata


def describe_ties(
    weights: Float[np.ndarray, "examples"],
    candidates: Int[np.ndarray, "kept"],
    selected: Int[np.ndarray, "selected"],
    rule: SelectionSection,
    sources: Sequence[str],
    strata: Int[np.ndarray, "examples"] | None = None,
) -> str:
    """What equal weights left to the order of the data in a selection by `select_examples`; "" where nothing."""
    names = np.asarray(sources) if rule.per_source else np.full(len(weights), "")
    names = strata if rule.strata and strata is not None else names
    is_selected, cuts = np.isin(candidates, selected), []
    for name in np.unique(names[candidates]):
        members = names[candidates] == name
        chosen = weights[candidates[members & is_selected]]
        equal = members & (weights[candidates] == chosen.min(initial=np.inf))
        cuts.append(Cut(int((equal & is_selected).sum()), int(equal.sum())))
    all_equal = bool((weights[candidates] == weights[candidates[0]]).all())
    return describe_cuts(cuts, rule, num_equal=len(candidates) if all_equal else 0)


class Cut(NamedTuple):
    """The rows whose weight is the least that is selected, of all rows or of one source."""

    taken: int
    """How many of them are selected."""
    equal: int
    """How many there are."""


def describe_cuts(cuts: Sequence[Cut], rule: SelectionSection, num_equal: int) -> str:
    """As `describe_ties`, from the cuts; `num_equal` is the number of rows if all of them weigh the same, or else 0."""
    if rule.threshold:
        return ""
    if num_equal > 1 and rule.resample:
        return (
            f"all {num_equal:,} rows weigh the same, so the weights choose nothing: rows are drawn evenly over the "
            "order of the data."
        )
    through = [cut for cut in cuts if cut.taken < cut.equal]
    if rule.resample or not through:
        return ""
    where = " of each source" if rule.per_source else " of each stratum" if rule.strata else ""
    if num_equal:
        return (
            f"all {num_equal:,} rows weigh the same, so the weights choose nothing: the selection is the first rows"
            f"{where} in the order of the data."
        )
    taken, equal = sum(cut.taken for cut in through), sum(cut.equal for cut in through)
    return (
        f"the cut of the selection goes through {equal:,} rows of equal weight{where}: {taken:,} of them are selected, "
        "the first in the order of the data."
    )


def describe_strata(
    strata: Int[np.ndarray, "examples"] | None,
    selected: Int[np.ndarray, "selected"],
    rule: SelectionSection,
) -> str:
    """That equal values made the strata fewer than asked for, or so unequal that some gave no row; "" otherwise."""
    if strata is None:
        return ""
    sizes = np.bincount(strata[strata >= 0])
    num_empty = int((np.bincount(strata[selected], minlength=len(sizes)) == 0).sum())
    if len(sizes) == rule.num_strata and not num_empty:
        return ""
    num_rows = f"{sizes.min():,} to {sizes.max():,} rows" if sizes.min() < sizes.max() else f"{sizes[0]:,} rows"
    told = f"there are {len(sizes)}, of {num_rows}" if len(sizes) > 1 else "there is one, of all rows"
    empty = f"; of {num_empty} the share is less than one row, and none is selected" if num_empty else ""
    equal = {"length": "rows of equal length", "loss": "rows of equal loss before training"}[rule.strata]
    return f"selection.num_strata = {rule.num_strata}: {equal} are in one stratum, so {told}{empty}."


def describe_shortfall(rule: SelectionSection, num_selected: int) -> str:
    """Why fewer rows were selected than the rule asks for; "" where there are as many."""
    if num_selected >= max(rule.resample, rule.per_source):
        return ""
    if rule.per_source:
        return (
            f"selection.per_source = {rule.per_source:,}: a source gave all it has, so "
            f"{format_count('row', num_selected)}."
        )
    return (
        f"selection.resample = {rule.resample:,}: {format_count('row', num_selected // rule.max_repeats)} weigh more "
        f"than 0, and selection.max_repeats = {rule.max_repeats:,} takes none more often, so "
        f"{format_count('row', num_selected)}."
    )


def describe_selection_rule(rule: SelectionSection) -> str:
    """The rule in words."""
    if rule.resample:
        cap = f", none more than {format_count('time', rule.max_repeats)}" if rule.max_repeats else ""
        return f"{format_count('row', rule.resample)} drawn in proportion to their weight, as whole repeats{cap}"
    if rule.per_source:
        return f"{format_count('row', rule.per_source)}, each source in proportion to its total weight"
    if rule.threshold:
        return f"weight {rule.threshold:g} or more"
    share = f"the top {rule.top_share:.1%} by weight".replace(".0%", "%")
    return f"{share} in each of up to {rule.num_strata} strata of {STRATA_NAMES[rule.strata]}" if rule.strata else share


class CappedDraw(NamedTuple):
    """What `max_repeats` makes of a draw in proportion to weight."""

    level: float
    """Rows of at least this weight are taken `max_repeats` times; infinity where the cap binds none."""
    total: float
    """Weight of the rows below the level."""
    num_drawn: int
    """Rows that are drawn among them, in proportion to weight."""


def cap_draw(weigh_rows: Callable[[float], tuple[int, float]], rule: SelectionSection, num_positive: int) -> CappedDraw:
    """The level above which rows are taken `rule.max_repeats` times, so that `rule.resample` rows are drawn in all.

    With r = max_repeats and n = resample, row i is expected min(r, λ w_i) times, and λ is where these sum to n. It is
    found from below: of the rows that the last λ leaves under the cap, λ = (n - r capped) / Σ w, until no other row is
    capped. Each λ is larger than the last, so a row that is capped stays so.

    Args:
        weigh_rows: level -> the number of rows of at least that weight, and the sum of the other weights.
        rule: its `resample` and `max_repeats`; max_repeats 0 caps nothing.
        num_positive: rows with a weight above 0.

    Returns:
        The level, and what is left to draw below it. Where r num_positive is at most n, every positive row is capped.
    """
    if rule.max_repeats and rule.max_repeats * num_positive <= rule.resample:
        return CappedDraw(math.ulp(0.0), 0.0, 0)
    level, num_capped = math.inf, 0
    while True:
        count, total = rule.resample - rule.max_repeats * num_capped, weigh_rows(level)[1]
        if not rule.max_repeats:
            return CappedDraw(level, total, count)
        next_level = rule.max_repeats * total / count if count else level
        now_capped = weigh_rows(next_level)[0]
        if now_capped <= num_capped:  # below: rounding, of a weight at the level itself
            return CappedDraw(level, total, count)
        level, num_capped = next_level, now_capped


def _count_top(rule: SelectionSection, num_candidates: int) -> int:
    return max(1, round(rule.top_share * num_candidates))


def _resample(weights: np.ndarray, candidates: np.ndarray, rule: SelectionSection, seed: int) -> np.ndarray:
    chances = weights[candidates]
    if chances.sum() <= 0:
        raise ValueError("every weight is 0, so no row can be drawn in proportion to it. Use selection.top_share.")
    draw = cap_draw(
        lambda level: (int((chances >= level).sum()), chances[chances < level].sum()), rule, int((chances > 0).sum())
    )
    below = candidates[chances < draw.level]
    drawn = below[:0]
    if draw.num_drawn:
        cumulative = np.cumsum(weights[below]) / draw.total
        points = (np.arange(draw.num_drawn) + np.random.default_rng(seed).random()) / draw.num_drawn
        drawn = below[np.minimum(np.searchsorted(cumulative, points, side="right"), len(below) - 1)]
    return np.sort(np.concatenate([drawn, np.repeat(candidates[chances >= draw.level], rule.max_repeats)]))


def _select_per_source(weights: np.ndarray, candidates: np.ndarray, count: int, sources: np.ndarray) -> np.ndarray:
    names = sorted(set(sources[candidates]))
    members = {name: candidates[sources[candidates] == name] for name in names}
    total = weights[candidates].sum()
    if total <= 0:
        raise ValueError("every weight is 0, so no source has a share. Use selection.top_share.")
    quotas = {name: count * weights[rows].sum() / total for name, rows in members.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(names, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: count - sum(counts.values())]:
        counts[name] += 1
    return np.sort(
        np.concatenate([top_indices(weights, min(counts[name], len(rows)), rows) for name, rows in members.items()])
    )


def _select_per_stratum(weights: np.ndarray, candidates: np.ndarray, count: int, strata: np.ndarray) -> np.ndarray:
    """`count` rows, the largest weights of each stratum, in proportion to its size by largest remainders; where these
    are equal, what is left of whole numbers is spread along the strata, so that neither end gains by it."""
    members = [candidates[strata[candidates] == stratum] for stratum in np.unique(strata[candidates])]
    quotas = count * np.array([len(rows) for rows in members])  # in units of 1 / len(candidates), where they are whole
    counts, remainders = np.divmod(quotas, len(candidates))
    is_spread = np.diff(np.round(np.cumsum(remainders) / len(candidates)), prepend=0)
    counts[np.lexsort((-is_spread, -remainders))[: count - counts.sum()]] += 1
    return np.sort(
        np.concatenate([top_indices(weights, size, rows) for size, rows in zip(counts, members, strict=True) if size])
    )
