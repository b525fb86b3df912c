"""Aggregates of response scores for each generation strategy."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

QuestionScores = Float[np.ndarray, "*some questions strategies"]
StrategyScores = Float[np.ndarray, "*some strategies"]
QuestionMean = Callable[[QuestionScores], StrategyScores]
"""Over the questions of a block."""

MAX_PERPLEXITY = 10.0
"""`alignment_score` clips the perplexity of a response to it."""


def arithmetic_mean(values: QuestionScores) -> StrategyScores:
    """The arithmetic mean over the questions: the published one."""
    return values.mean(-2)


def geometric_mean(values: QuestionScores) -> StrategyScores:
    """exp(mean log): of perplexities the geometric mean, which a few improbable responses move less."""
    return np.exp(np.log(values).mean(-2))


def trimmed_mean(share: float) -> QuestionMean:
    """The arithmetic mean without that share of the questions at either end, rounded down; for each strategy its own.

    Raises ValueError unless 0 <= share < 1/2.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"a trimmed mean leaves out a share in [0, 0.5) at either end; {share} was given.")

    def average(values: QuestionScores) -> StrategyScores:
        num_trimmed = int(share * values.shape[-2])
        return np.sort(values, axis=-2)[..., num_trimmed : values.shape[-2] - num_trimmed, :].mean(-2)

    return average


def scale_strategies(values: StrategyScores) -> StrategyScores:
    """(v - least) / (largest - least) over the strategies; 0 where all are equal."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return (values - low) / np.where(high > low, high - low, 1.0)


def alignment_score(
    perplexities: QuestionScores, distances: QuestionScores, beta: float | None = 0.5
) -> StrategyScores:
    """β minmax(mean of perplexities, each at most MAX_PERPLEXITY) + (1 - β) minmax(mean of D); the least wins.

    `beta` None: CV(PPL) / (CV(PPL) + CV(D)), where CV is the standard deviation over the strategies' means divided by
    their mean; 1/2 where neither varies. Where every response is at the cap, D alone is left. Source: arXiv 2502.11779
    v1; that the cap is on each response, and not on the mean, is our reading.

    Args:
        perplexities: of responses, at least 1.
        distances: D of responses; see `response_similarity`.
        beta: β in [0, 1], or None.

    Returns:
        One number for each strategy; smaller is better.

    Example:
        >>> perplexities = np.array([[1.0, 2.0], [1.0, 4.0]])  # two questions, two strategies
        >>> alignment_score(perplexities, np.array([[0.1, 0.3], [0.1, 0.5]]))
        array([0., 1.])
    """
    p, d = arithmetic_mean(np.minimum(perplexities, MAX_PERPLEXITY)), arithmetic_mean(distances)
    if beta is None:
        perplexity_cv, distance_cv = (
            v.std(-1, keepdims=True) / np.maximum(np.abs(v.mean(-1, keepdims=True)), 1e-30) for v in (p, d)
        )
        total = perplexity_cv + distance_cv
        weight = np.where(total > 0, perplexity_cv / np.where(total > 0, total, 1.0), 0.5)
    else:
        weight = np.array(beta)
    return weight * scale_strategies(p) + (1 - weight) * scale_strategies(d)


def car_score(rewards: QuestionScores, losses: QuestionScores) -> StrategyScores:
    """Mean reward / (1 + 3 mean ℓ), ℓ in nats per token: the largest wins. Wrong for rewards below 0.

    Args:
        rewards: of responses, at least 0.
        losses: ℓ of responses, nats per token.

    Returns:
        One number for each strategy; larger is better.

    Example:
        >>> car_score(np.array([[1.0, 1.0]]), np.array([[0.0, 1.0]]))
        array([1.  , 0.25])
    """
    return arithmetic_mean(rewards) / (1 + 3 * arithmetic_mean(losses))
