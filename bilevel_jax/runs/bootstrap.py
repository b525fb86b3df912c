"""Rank correlations and gains of resampled items: point values, bootstrap intervals, paired differences."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

DRAWS = 500
"""Resamples behind an interval; its ends are then good to about a tenth of its width."""
BLOCK = 4_000_000
"""Numbers that are held at a time."""


class Reading(NamedTuple):
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


def resampled(items: int, seed: tuple[int, ...]) -> Int[np.ndarray, "draws items"]:
    """How often each item stands in each resample; the first line is the sample itself, every item once."""
    drawn = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=DRAWS).astype(np.int32)
    return np.concatenate([np.ones((1, items), drawn.dtype), drawn])


def rank_correlations(
    one: Float[np.ndarray, "pairs n"], other: Float[np.ndarray, "pairs n"], counts: Int[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws pairs"]:
    """Spearman's rank correlation along n, of each resample, in which item i stands counts[i] times.

    Ties, among them those of an item with itself, take the mean of their ranks. nan where one of the two is constant.
    """
    both = [_places(values) for values in (one, other)]
    step = max(1, BLOCK // one.size)
    parts = []
    for first in range(0, len(counts), step):
        some = counts[first : first + step]
        a, b = (_ranks(places, some) - (some.sum(1)[:, None, None] + 1) / 2 for places in both)
        weight = some[:, None, :]
        scale = np.sqrt((weight * a**2).sum(-1) * (weight * b**2).sum(-1))
        with np.errstate(invalid="ignore"):
            parts.append((weight * a * b).sum(-1) / scale)
    return np.concatenate(parts)


def reading(draws: Float[np.ndarray, "draws"]) -> Reading:
    """The value on the sample itself (the first draw), and the percentile interval of the others."""
    rest = draws[1:][np.isfinite(draws[1:])]
    low, high = np.quantile(rest, [0.025, 0.975]) if len(rest) else (np.nan, np.nan)
    return Reading(float(draws[0]), float(low), float(high))


def paired_gain(
    before: Float[np.ndarray, "items"], after: Float[np.ndarray, "items"], level: float, seed: tuple[int, ...]
) -> tuple[Reading, float]:
    """The mean of before - after over items, with its 95 % interval, and its lower bound at a one-sided `level`.

    Items are resampled, both readings of one together; quantiles of the means. Bounds are too high for few items: their
    tails are thinner than a mean's. As many resamples as put 25 below the bound, and at least 4000.
    """
    gain = np.asarray(before - after, float)
    draws, random = max(4000, round(25 / level)), np.random.default_rng(seed)
    means = np.concatenate(
        [random.choice(gain, (min(DRAWS, draws - first), len(gain))).mean(1) for first in range(0, draws, DRAWS)]
    )
    low, high, bound = np.quantile(means, [0.025, 0.975, level])
    return Reading(float(gain.mean()), float(low), float(high)), float(bound)


Places = tuple[Int[np.ndarray, "pairs n"], Int[np.ndarray, "pairs n"], Int[np.ndarray, "pairs n"]]


def _places(values: Float[np.ndarray, "pairs n"]) -> Places:
    """The order of the values; of each, how many are less, and how many are not more."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    less = [np.searchsorted(line, own, "left") for line, own in zip(ordered, values, strict=True)]
    most = [np.searchsorted(line, own, "right") for line, own in zip(ordered, values, strict=True)]
    return order, np.array(less), np.array(most)


def _ranks(places: Places, counts: Int[np.ndarray, "draws n"]) -> Float[np.ndarray, "draws pairs n"]:
    """Mean ranks from 1 in each resample; of items that are not in it, where they would stand."""
    order, less, most = places
    below = np.cumsum(counts[:, order], axis=-1)
    below = np.concatenate([np.zeros_like(below[..., :1]), below], axis=-1)
    first, last = (np.take_along_axis(below, at[None], -1) for at in (less, most))
    return (first + last + 1) / 2
