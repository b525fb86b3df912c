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
      (the group of each row, by `divide_into_strata`), those of its largest weights;
    - threshold: all rows of at least that weight;
    - resample: n rows, row i floor or ceil of n w_i / Σ w times (systematic resampling: the least noise that whole
      repeats allow, and each count right on average over seeds). With max_repeats = r row i is expected
      min(r, λ w_i) times, with the one λ for which these sum to n, and never taken more than r times; where the rows of
      a weight above 0 are too few for n, each is taken r times;
    - per_source: n rows, dealt to the sources by their total weight (largest remainders) and, inside a source, those of
      the largest weights; a source with fewer rows gives all it has.

    Raises ValueError where the rule leaves no row.
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
    count = max(1, round(rule.top_share * len(candidates)))
    if rule.strata:
        if strata is None:
            raise ValueError(f"selection.strata = {rule.strata}: the strata of the rows are not given.")
        return _select_per_stratum(weights, candidates, count, strata)
    return top_indices(weights, count, candidates)


def divide_by_difficulty(difficulty: Difficulty, rule: SelectionSection) -> Int[np.ndarray, "examples"] | None:
    """The strata that selection.strata asks for; None where it is off."""
    values = {"length": difficulty.lengths, "loss": difficulty.losses}.get(rule.strata)
    return None if values is None else divide_into_strata(values, difficulty.rows, rule.num_strata)


def divide_into_strata(
    values: Float[np.ndarray, "examples"], candidates: Int[np.ndarray, "kept"], num_strata: int
) -> Int[np.ndarray, "examples"]:
    """The group of each row: `candidates` in order of their values, cut into groups whose sizes differ by at most one.

        stratum_i = floor(num_strata rank_i / N)

    Equal values keep the order of the data, and may so fall on both sides of a cut. Other rows have -1.
    Wrong where the value is what makes an example good or bad: of the lowest weights a group keeps as many as all do.
    """
    strata = np.full(len(values), -1)
    ordered = candidates[np.argsort(values[candidates], kind="stable")]
    strata[ordered] = np.arange(len(ordered)) * num_strata // max(1, len(ordered))
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
    return f"{share} in each of {rule.num_strata} strata of {STRATA_NAMES[rule.strata]}" if rule.strata else share


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
    """`count` rows, the largest weights of each stratum, in proportion to its size; what is left of whole numbers is
    spread along the strata, so that neither end gains by it."""
    members = [candidates[strata[candidates] == stratum] for stratum in np.unique(strata[candidates])]
    ends = np.round(np.cumsum([len(rows) for rows in members]) * count / len(candidates)).astype(int)
    counts = np.diff(ends, prepend=0)
    return np.sort(
        np.concatenate([top_indices(weights, size, rows) for size, rows in zip(counts, members, strict=True) if size])
    )
