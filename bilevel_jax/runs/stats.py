"""AUC, rank correlation, confidence intervals and the bootstrap."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

NUM_RESAMPLES = 500
"""Resamples behind an interval; its ends are then good to about a tenth of its width."""
NUM_MEAN_RESAMPLES = 2000
"""Resamples behind a standard error of means, which is then good to 2 %."""
MAX_EXACT_FLIPS = 12
"""Differences whose signs are all tried; of more, some are drawn."""
MAX_BLOCK_ELEMENTS = 4_000_000
"""Largest number of array elements of one block of resamples."""


class BootstrapInterval(NamedTuple):
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


def auc(scores: Float[np.ndarray, "examples"], positive: Bool[np.ndarray, "examples"]) -> float:
    """P(score of a positive example > score of another), ties counting half; nan unless both kinds are there."""
    count = int(positive.sum())
    if not 0 < count < len(positive):
        return float("nan")
    return float((stats.rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def rank_correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation in O(n log n); ties take the mean of their ranks; nan where one is constant."""
    return float(bootstrap_rank_correlations(x[None], y[None], np.ones((1, len(x)), np.int32))[0, 0])


def mean_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % interval by Student's t over the seeds); half-width nan for one value."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    if min(values) == max(values):  # their mean is rounded, and so would be their spread
        return float(values[0]), 0.0
    return float(np.mean(values)), float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def jackknife_half_width(estimates: Float[np.ndarray, "groups values"]) -> Float[np.ndarray, "values"]:
    """Half-widths of 95 % intervals by the delete-a-group jackknife; nan for less than two groups.

    Of K estimates b_k, each without one of K groups of equal size, the variance of that on all of them is about
    (K - 1) / K sum (b_k - mean)^2, and the interval is Student's t of K - 1 degrees times its root (Tukey 1958; Kott
    2001). Right for estimates that are smooth in the shares of the groups; not for medians and ranks.
    """
    count = len(estimates)
    if count < 2:
        return np.full(estimates.shape[1:], np.nan)
    variance = (count - 1) / count * ((estimates - estimates.mean(0)) ** 2).sum(0)
    return stats.t.ppf(0.975, count - 1) * np.sqrt(variance)


def top_indices(
    scores: Float[np.ndarray, "examples"], count: int, candidates: Int[np.ndarray, "kept"]
) -> Int[np.ndarray, "count"]:
    """The `count` candidates with the largest scores, in their own order; ties go to the earlier one."""
    ranked = candidates[np.argsort(-scores[candidates], kind="stable")]
    return np.sort(ranked[:count])


def resample_counts(num_items: int, seed: tuple[int, ...]) -> Int[np.ndarray, "draws items"]:
    """How often each item stands in each resample; the first row is the sample itself, every item once."""
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
    """The value of the sample itself (the first draw) and the percentile interval of the resamples."""
    rest = draws[1:][np.isfinite(draws[1:])]
    low, high = np.quantile(rest, [0.025, 0.975]) if len(rest) else (np.nan, np.nan)
    return BootstrapInterval(float(draws[0]), float(low), float(high))


def bootstrap_paired_gain(
    before: Float[np.ndarray, "items"],
    after: Float[np.ndarray, "items"],
    level: float,
    seed: tuple[int, ...],
    groups: Sequence[int] = (),
) -> tuple[BootstrapInterval, float]:
    """The mean of before - after over items, with its 95 % interval, and its lower bound at a one-sided `level`.

    Items are resampled, both values of an item together; the bounds are quantiles of the means and too high for few
    items, whose resampled means have thinner tails. There are at least 4000 resamples, and enough for 25 below the
    bound. Items that stand in `groups` of these sizes, one behind the other, are resampled within their group.
    """
    gain = np.asarray(before - after, float)
    draws, random = max(4000, round(25 / level)), np.random.default_rng(seed)
    parts = np.split(gain, np.cumsum(groups or (len(gain),))[:-1])
    means = np.concatenate(
        [
            sum(
                random.choice(part, (min(NUM_RESAMPLES, draws - start), len(part))).mean(1) * (len(part) / len(gain))
                for part in parts
            )
            for start in range(0, draws, NUM_RESAMPLES)
        ]
    )
    low, high, bound = np.quantile(means, [0.025, 0.975, level])
    return BootstrapInterval(float(gain.mean()), float(low), float(high)), float(bound)


def bootstrap_mean(values: Float[np.ndarray, "items"], seed: tuple[int, ...], level: float = 0.05) -> BootstrapInterval:
    """The mean over items with its bootstrap interval of 1 - `level`; of paired items, give the differences.

    Percentiles of resampled means, taken further out by what an interval of Student's t is wider than a percentile one
    of n items: the quantile Phi(-sqrt(n / (n - 1)) t(.975, n - 1)) instead of .025 (the expanded percentile interval;
    Hesterberg, arXiv 1411.5279). There are NUM_MEAN_RESAMPLES of them, and enough for 25 beyond either end. nan at the
    ends for one item. Wrong, too narrow, where nearly all items are the same number: ask `sign_flip_p`, too.
    """
    count = len(values)
    if count < 2:
        return BootstrapInterval(float(np.mean(values)) if count else np.nan, np.nan, np.nan)
    tail = stats.norm.cdf(-np.sqrt(count / (count - 1)) * stats.t.ppf(1 - level / 2, count - 1))
    random, step = np.random.default_rng(seed), max(1, MAX_BLOCK_ELEMENTS // count)
    draws = max(NUM_MEAN_RESAMPLES, round(50 / level))
    means = np.concatenate(
        [random.choice(values, (min(step, draws - start), count)).mean(1) for start in range(0, draws, step)]
    )
    low, high = np.quantile(means, [tail, 1 - tail])
    return BootstrapInterval(float(np.mean(values)), float(low), float(high))


def crossed_half_width(values: Float[np.ndarray, "seeds items"], level: float = 0.05) -> float:
    """Half-width of the interval of 1 - `level` of a mean over seeds and items, each seed with a value of each item.

    Both are drawn from many: a value is mu + a_seed + b_item + rest. With the mean squares A of seeds, B of items and E
    of the rest, A / SQ estimates the variance that seeds give to the mean of S seeds and Q items, and (B - E) / SQ
    what items add. The seeds' part has S - 1 degrees of freedom, however many items there are:

        half^2 = max(t_{S-1}^2 A + t_{Q-1}^2 max(B - E, 0), t_{Q-1}^2 B) / SQ

    as half-widths of independent parts add (Graybill and Wang 1980). Right where either part dominates, else up to a
    half too wide; Satterthwaite's degrees of freedom are too narrow for 2 or 3 seeds. Resampling both (the pigeonhole
    bootstrap; Owen 2007) has up to three times the variance, and is too narrow for few seeds. The model is of values
    whose means are about normal. nan for less than two seeds or items.
    """
    num_seeds, num_items = values.shape
    if min(num_seeds, num_items) < 2:
        return float("nan")
    of_seeds, of_items, of_rest = _crossed_variances(values)
    t_seeds, t_items = (stats.t.ppf(1 - level / 2, count - 1) for count in (num_seeds, num_items))
    both = t_seeds**2 * of_seeds + t_items**2 * max(of_items - of_rest, 0.0)
    return float(np.sqrt(max(both, t_items**2 * of_items)))


def crossed_p(values: Float[np.ndarray, "seeds items"]) -> float:
    """The least level whose interval by `crossed_half_width` around the mean leaves out 0; nan where there is none."""
    distance = abs(float(values.mean()))
    if min(values.shape) < 2:
        return float("nan")
    least, most = -30.0, 0.0  # natural logarithms
    if distance <= crossed_half_width(values, 1.0):
        return 1.0
    if distance > crossed_half_width(values, np.exp(least)):
        return float(np.exp(least))
    while most - least > 1e-6:
        middle = (least + most) / 2
        least, most = (least, middle) if distance > crossed_half_width(values, np.exp(middle)) else (middle, most)
    return float(np.exp(most))


def _crossed_variances(values: Float[np.ndarray, "seeds items"]) -> tuple[float, float, float]:
    """Mean squares of seeds, of items and of the rest, each over the number of values."""
    num_seeds, num_items = values.shape
    by_seed, by_item = values.mean(1) - values.mean(), values.mean(0) - values.mean()
    rest = values - values.mean() - by_seed[:, None] - by_item
    return (
        float((by_seed**2).sum()) / (num_seeds - 1) / num_seeds,
        float((by_item**2).sum()) / (num_items - 1) / num_items,
        float((rest**2).sum()) / ((num_seeds - 1) * (num_items - 1) * values.size),
    )


def sidak_level(level: float, count: int) -> float:
    """The level of each of `count` intervals that all cover at once with a probability of at least 1 - `level`.

    1 - (1 - level)^(1 / count), which holds for independent intervals and, of means that are about normal, whatever
    their correlation (Sidak 1967). The p-value that corresponds to it is 1 - (1 - p)^count.
    """
    return float(-np.expm1(np.log1p(-level) / count))


def sidak_p(p: float, count: int) -> float:
    """The p-value of one of `count` tests, corrected for their number as `sidak_level` corrects intervals."""
    return 1.0 if p >= 1 else float(-np.expm1(count * np.log1p(-p)))


def sign_flip_p(differences: Float[np.ndarray, "items"], seed: tuple[int, ...]) -> float:
    """P(|sum of d_i s_i| >= |sum of d_i|) over random signs s_i: the two-sided p-value of paired differences.

    Exact for two things that could change their names (Fisher 1935), also for few items and for many that are 0: up
    to MAX_EXACT_FLIPS that are not 0 all signs are tried, of more NUM_MEAN_RESAMPLES draws and the given ones.
    """
    nonzero = differences[differences != 0]
    count = len(nonzero)
    if count <= MAX_EXACT_FLIPS:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (NUM_MEAN_RESAMPLES, count))
        bits[0] = 1
    sums = np.abs((2 * bits - 1) @ nonzero)
    return float(np.mean(sums >= abs(nonzero.sum()) - 1e-9 * max(1.0, np.abs(nonzero).sum())))


def bootstrap_means(
    values: Float[np.ndarray, "things seeds items"], seed: tuple[int, ...], groups: Sequence[int] = ()
) -> Float[np.ndarray, "draws things"]:
    """Means over seeds and items: the first row of the sample itself, then of NUM_MEAN_RESAMPLES resamples of both.

    Items that stand in `groups` of these sizes, one behind the other, are resampled within their group.

    Seeds and items are resampled independently, and the same for all things, so that their differences are paired. A
    resample has one seed and one item less than the sample, by which the variance of a mean is right on average also
    for two or three seeds (Rao and Wu 1988); one seed, or item, stays as it is.
    """
    _, num_seeds, num_items = values.shape
    random = np.random.default_rng(seed)
    seed_shares, *group_shares = (
        random.multinomial(max(1, count - 1), np.full(count, 1 / count), size=NUM_MEAN_RESAMPLES) / max(1, count - 1)
        for count in (num_seeds, *(groups or (num_items,)))
    )
    item_shares = np.concatenate([shares * (shares.shape[1] / num_items) for shares in group_shares], axis=1)
    by_seed = np.einsum("di,tsi->dts", item_shares, values, optimize=True)
    means = (by_seed * seed_shares[:, None]).sum(-1)
    return np.concatenate([values.mean((1, 2))[None], means])


RankPositions = tuple[Int[np.ndarray, "pairs n"], Int[np.ndarray, "pairs n"], Int[np.ndarray, "pairs n"]]


def _rank_positions(values: Float[np.ndarray, "pairs n"]) -> RankPositions:
    """The order of the values, and for each value how many are less and how many are not greater."""
    order = np.argsort(values, axis=1, kind="stable")
    return order, stats.rankdata(values, "min", axis=1) - 1, stats.rankdata(values, "max", axis=1)


def _resampled_ranks(
    positions: RankPositions, counts: Int[np.ndarray, "draws n"]
) -> Float[np.ndarray, "draws pairs n"]:
    """Mean ranks from 1 in each resample; of items that are not in it, where they would stand."""
    order, less, most = positions
    cumulative_counts = np.cumsum(counts[:, order], axis=-1)
    cumulative_counts = np.concatenate([np.zeros_like(cumulative_counts[..., :1]), cumulative_counts], axis=-1)
    first, last = (np.take_along_axis(cumulative_counts, positions_at[None], -1) for positions_at in (less, most))
    return (first + last + 1) / 2
