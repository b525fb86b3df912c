"""Rules that turn weights into a selected subset."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import SelectionSection
from bilevel_jax.runs.stats import top_indices


def select_examples(
    weights: Float[np.ndarray, "examples"],
    candidates: Int[np.ndarray, "kept"],
    rule: SelectionSection,
    *,
    sources: Sequence[str],
    seed: int,
) -> Int[np.ndarray, "selected"]:
    """The examples to keep, in their order, out of `candidates`.

    - top_share: that share of the rows, those of the largest weights;
    - threshold: all rows of at least that weight;
    - resample: n rows, row i floor or ceil of n w_i / Σ w times (systematic resampling: the least noise that whole
      repeats allow, and each count right on average over seeds);
    - per_source: n rows, dealt to the sources by their total weight (largest remainders) and, inside a source, those of
      the largest weights; a source with fewer rows gives all it has.

    Raises ValueError where the rule leaves no row.
    """
    if rule.resample:
        return _resample(weights, candidates, rule.resample, seed)
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
    return top_indices(weights, max(1, round(rule.top_share * len(candidates))), candidates)


def describe_ties(
    weights: Float[np.ndarray, "examples"],
    candidates: Int[np.ndarray, "kept"],
    selected: Int[np.ndarray, "selected"],
    rule: SelectionSection,
    sources: Sequence[str],
) -> str:
    """What equal weights left to the order of the data in a selection by `select_examples`; "" where nothing."""
    names = np.asarray(sources) if rule.per_source else np.full(len(weights), "")
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
    where = " of each source" if rule.per_source else ""
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


def describe_selection_rule(rule: SelectionSection) -> str:
    """The rule in words."""
    if rule.resample:
        return f"{format_count('row', rule.resample)} drawn in proportion to their weight, as whole repeats"
    if rule.per_source:
        return f"{format_count('row', rule.per_source)}, each source in proportion to its total weight"
    if rule.threshold:
        return f"weight {rule.threshold:g} or more"
    return f"the top {rule.top_share:.1%} by weight".replace(".0%", "%")


def _resample(weights: np.ndarray, candidates: np.ndarray, count: int, seed: int) -> np.ndarray:
    total = weights[candidates].sum()
    if total <= 0:
        raise ValueError("every weight is 0, so no row can be drawn in proportion to it. Use selection.top_share.")
    cumulative = np.cumsum(weights[candidates]) / total
    points = (np.arange(count) + np.random.default_rng(seed).random()) / count
    return candidates[np.minimum(np.searchsorted(cumulative, points, side="right"), len(candidates) - 1)]


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
