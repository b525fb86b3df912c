"""Which rows a selection keeps, from their weights: a share, a threshold, whole repeats, or a mix of sources."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.runs.sections import SelectionSection
from bilevel_jax.runs.statistics import top


def keep_rows(
    weights: Float[np.ndarray, "rows"],
    among: Int[np.ndarray, "kept"],
    keep: SelectionSection,
    *,
    sources: Sequence[str],
    seed: int,
) -> Int[np.ndarray, "selected"]:
    """The rows to keep, in row order, out of `among`.

    - top_share: that share of the rows, those of the largest weights;
    - threshold: all rows of at least that weight;
    - resample: n rows, row i floor or ceil of n w_i / Σ w times (systematic resampling: the least noise that whole
      repeats allow, and each count right on average over seeds);
    - per_source: n rows, dealt to the sources by their total weight (largest remainders) and, inside a source, those of
      the largest weights; a source with fewer rows gives all it has.

    Raises ValueError where the rule leaves no row.
    """
    if keep.resample:
        return _resampled(weights, among, keep.resample, seed)
    if keep.per_source:
        return _mixed(weights, among, keep.per_source, np.asarray(sources))
    if keep.threshold:
        kept = among[weights[among] >= keep.threshold]
        if not len(kept):
            raise ValueError(
                f"no row has a weight of selection.threshold = {keep.threshold:g} or more; the largest is "
                f"{weights[among].max():.3g}. Lower it, or use selection.top_share."
            )
        return kept
    return top(weights, max(1, round(keep.top_share * len(among))), among)


def rule(keep: SelectionSection) -> str:
    """The rule in words."""
    if keep.resample:
        return f"{keep.resample:,} rows drawn in proportion to their weight, as whole repeats"
    if keep.per_source:
        return f"{keep.per_source:,} rows, each source in proportion to its total weight"
    if keep.threshold:
        return f"weight {keep.threshold:g} or more"
    return f"the top {keep.top_share:.1%} by weight".replace(".0%", "%")


def _resampled(weights: np.ndarray, among: np.ndarray, count: int, seed: int) -> np.ndarray:
    total = weights[among].sum()
    if total <= 0:
        raise ValueError("every weight is 0, so no row can be drawn in proportion to it. Use selection.top_share.")
    ends = np.cumsum(weights[among]) / total
    places = (np.arange(count) + np.random.default_rng(seed).random()) / count
    return among[np.minimum(np.searchsorted(ends, places, side="right"), len(among) - 1)]


def _mixed(weights: np.ndarray, among: np.ndarray, count: int, sources: np.ndarray) -> np.ndarray:
    names = sorted(set(sources[among]))
    members = {name: among[sources[among] == name] for name in names}
    total = weights[among].sum()
    if total <= 0:
        raise ValueError("every weight is 0, so no source has a share. Use selection.top_share.")
    quotas = {name: count * weights[rows].sum() / total for name, rows in members.items()}
    given = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(names, key=lambda name: given[name] - quotas[name])
    for name in by_remainder[: count - sum(given.values())]:
        given[name] += 1
    return np.sort(np.concatenate([top(weights, min(given[name], len(rows)), rows) for name, rows in members.items()]))
