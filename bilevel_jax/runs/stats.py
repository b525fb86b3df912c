"""Small statistics for tables: area under the ROC curve, rank correlation, intervals of a mean, the best rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

STUDENT_T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
"""The .975 quantile of Student's t for 1 .. 15 degrees of freedom; above them 2.131, slightly too wide."""


def auc(scores: Float[np.ndarray, "examples"], positive: Bool[np.ndarray, "examples"]) -> float:
    """P(score of a positive row > score of another), ties counting half; nan unless both kinds are there."""
    count = int(positive.sum())
    if not 0 < count < len(positive):
        return float("nan")
    return float((average_ranks(scores)[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def rank_correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation in O(n log n); ties take the mean of their ranks; nan where one is constant."""
    a, b = (average_ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float(a @ b) / scale if scale else float("nan")


def weighted_rank_correlation(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Σ SD ρ / Σ SD over pairs (scores, accuracies) of strategies; SD is that of the accuracies, ρ `rank_correlation`.

    So pairs whose strategies hardly differ count little: how arXiv 2502.11779 judges a metric over models and tasks.
    Scores are larger-is-better (give minus a perplexity). Pairs without a rank correlation do not count; nan for none.
    """
    spreads = np.array([np.std(accuracies) for _, accuracies in pairs])
    correlations = np.array([rank_correlation(*pair) for pair in pairs])
    is_finite = np.isfinite(correlations)
    total = float(spreads[is_finite].sum())
    return float((spreads * correlations)[is_finite].sum()) / total if total else float("nan")


def average_ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """1 for the least value; ties take the mean of their ranks."""
    _, inverse, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[inverse]


def mean_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % interval by Student's t over the seeds); half-width nan for one value."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    quantile = STUDENT_T_975[min(count - 1, len(STUDENT_T_975)) - 1]
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / np.sqrt(count))


def top_indices(
    scores: Float[np.ndarray, "examples"], count: int, candidates: Int[np.ndarray, "kept"]
) -> Int[np.ndarray, "count"]:
    """The `count` rows of `among` with the largest scores, in row order; ties go to the earlier row."""
    ranked = candidates[np.argsort(-scores[candidates], kind="stable")]
    return np.sort(ranked[:count])
