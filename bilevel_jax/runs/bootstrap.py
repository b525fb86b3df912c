"""Rank correlations and gains of resampled items: point values, bootstrap intervals, paired differences."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NUM_RESAMPLES = 500
"""Resamples behind an interval; its ends are then good to about a tenth of its width."""
MAX_BLOCK_ELEMENTS = 4_000_000
"""Numbers that are held at a time."""


class BootstrapInterval(NamedTuple):
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


def resample_counts(num_items: int, seed: tuple[int, ...]) -> Int[np.ndarray, "draws items"]:
    """How often each item stands in each resample; the first line is the sample itself, every item once."""
    counts = (
        np.random.default_rng(seed)
        .multinomial(num_items, np.full(num_items, 1 / num_items), size=NUM_RESAMPLES)
        .astype(np.int32)
    )
    return np.concatenate([np.ones((1, num_items), counts.dtype), counts])


def bootstrap_rank_correlations(
    x: Float[np.ndarray, "pairs n"], y: Float[np.ndarray, "pairs n"], counts: Int[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws pairs"]:
    """Spearman's rank correlation along n, of each resample, in which item i stands counts[i] times.

    Ties, among them those of an item with itself, take the mean of their ranks. nan where one of the two is constant.
    """
    positions = [_rank_positions(values) for values in (x, y)]
    step = max(1, MAX_BLOCK_ELEMENTS // x.size)
    parts = []
    for start in range(0, len(counts), step):
        block_counts = counts[start : start + step]
        a, b = (
            _resampled_ranks(value_positions, block_counts) - (block_counts.sum(1)[:, None, None] + 1) / 2
            for value_positions in positions
        )
        weight = block_counts[:, None, :]
        scale = np.sqrt((weight * a**2).sum(-1) * (weight * b**2).sum(-1))
        with np.errstate(invalid="ignore"):
            parts.append((weight * a * b).sum(-1) / scale)
    return np.concatenate(parts)


def percentile_interval(draws: Float[np.ndarray, "draws"]) -> BootstrapInterval:
    """The value on the sample itself (the first draw), and the percentile interval of the others."""
    rest = draws[1:][np.isfinite(draws[1:])]
    low, high = np.quantile(rest, [0.025, 0.975]) if len(rest) else (np.nan, np.nan)
    return BootstrapInterval(float(draws[0]), float(low), float(high))


def bootstrap_paired_gain(
    before: Float[np.ndarray, "items"], after: Float[np.ndarray, "items"], level: float, seed: tuple[int, ...]
) -> tuple[BootstrapInterval, float]:
    """The mean of before - after over items, with its 95 % interval, and its lower bound at a one-sided `level`.

    Items are resampled, both readings of one together; quantiles of the means. Bounds are too high for few items: their
    tails are thinner than a mean's. As many resamples as put 25 below the bound, and at least 4000.
    """
    gain = np.asarray(before - after, float)
    draws, random = max(4000, round(25 / level)), np.random.default_rng(seed)
    means = np.concatenate(
        [
            random.choice(gain, (min(NUM_RESAMPLES, draws - start), len(gain))).mean(1)
            for start in range(0, draws, NUM_RESAMPLES)
        ]
    )
    low, high, bound = np.quantile(means, [0.025, 0.975, level])
    return BootstrapInterval(float(gain.mean()), float(low), float(high)), float(bound)


RankPositions = tuple[Int[np.ndarray, "pairs n"], Int[np.ndarray, "pairs n"], Int[np.ndarray, "pairs n"]]


def _rank_positions(values: Float[np.ndarray, "pairs n"]) -> RankPositions:
    """The order of the values; of each, how many are less, and how many are not more."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    less = [
        np.searchsorted(sorted_row, row_values, "left") for sorted_row, row_values in zip(ordered, values, strict=True)
    ]
    most = [
        np.searchsorted(sorted_row, row_values, "right") for sorted_row, row_values in zip(ordered, values, strict=True)
    ]
    return order, np.array(less), np.array(most)


def _resampled_ranks(
    positions: RankPositions, counts: Int[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws pairs n"]:
    """Mean ranks from 1 in each resample; of items that are not in it, where they would stand."""
    order, less, most = positions
    cumulative_counts = np.cumsum(counts[:, order], axis=-1)
    cumulative_counts = np.concatenate([np.zeros_like(cumulative_counts[..., :1]), cumulative_counts], axis=-1)
    first, last = (np.take_along_axis(cumulative_counts, positions_at[None], -1) for positions_at in (less, most))
    return (first + last + 1) / 2
