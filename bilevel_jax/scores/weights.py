"""Example weights between 0 and 1 from data scores."""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from bilevel_jax.core.types import PADDING

ExampleScores = Float[np.ndarray, "examples"]


def minmax_weights(scores: ExampleScores) -> ExampleScores:
    """w_i = (s_i - min s)/(max s - min s) over the whole set; 0 for a score that is nan.

    Where all scores are equal they say nothing, and every weight is 1. One outlier pushes all others to one end; take
    `clipped_minmax_weights` then.

    Args:
        scores: nan where an example has none.

    Returns:
        Weights in [0, 1].

    Raises:
        ValueError: no finite score.

    Example:
        >>> minmax_weights(np.array([1.0, 2.0, 3.0, np.nan]))
        array([0. , 0.5, 1. , 0. ])
    """
    known = np.isfinite(scores)
    if not known.any():
        raise ValueError(f"none of {scores.size} scores is a finite number, so there is nothing to weigh examples by.")
    low, high = scores[known].min(), scores[known].max()
    weights = np.ones(scores.shape) if low == high else (scores - low) / (high - low)
    return np.where(known, weights, 0.0)


def clipped_minmax_weights(scores: ExampleScores, low: float = 0.05, high: float = 0.95) -> ExampleScores:
    """As `minmax_weights`, from the scores clipped to their quantiles `low` and `high`.

    Args:
        scores: nan where an example has none.
        low: quantile in [0, 1).
        high: quantile in (low, 1].

    Returns:
        Weights in [0, 1].

    Raises:
        ValueError: quantiles out of order, or no finite score.

    Example:
        >>> clipped_minmax_weights(np.array([0.0, 1.0, 2.0, 100.0]), low=0.0, high=0.5)
        array([0.        , 0.66666667, 1.        , 1.        ])
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles {low} and {high}; two with 0 <= low < high <= 1 are wanted.")
    known = scores[np.isfinite(scores)]
    edges = np.quantile(known, [low, high]) if known.size else (0.0, 0.0)
    return minmax_weights(np.clip(scores, *edges))


def rank_weights(scores: ExampleScores) -> ExampleScores:
    """Ranks, as weights: 0 for the least score, 1 for the largest, ties in the middle of their ranks; 0 for nan.

    No outlier moves the others, and every weight between 0 and 1 is given to equally many: half of all examples have
    more than 1/2, however many are good. Where all scores are equal they say nothing, and every weight is 1.

    Args:
        scores: nan where an example has none.

    Returns:
        Weights in [0, 1].

    Raises:
        ValueError: no finite score.

    Example:
        >>> rank_weights(np.array([1.0, 2.0, 300.0, np.nan]))
        array([0. , 0.5, 1. , 0. ])
    """
    known = np.isfinite(scores)
    ranks = np.full(scores.shape, np.nan)
    ranks[known] = rankdata(scores[known])
    return minmax_weights(ranks)


def batch_minmax_weights(scores: ExampleScores, index: Int[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """`minmax_weights` over the examples of one global step, as in arXiv 2510.14459.

    All micro-batches and devices of the step at once: over a micro-batch of one example it would say nothing. An empty
    slot has weight 0. An example's weight then depends on the others in its batch.

    Args:
        scores: of all examples.
        index: the batch's rows in `scores`; PADDING: an empty slot.

    Returns:
        Weights in [0, 1], in the shape of `index`.

    Raises:
        ValueError: no finite score in the batch.

    Example:
        >>> batch_minmax_weights(np.array([1.0, 2.0, 4.0]), np.array([[0, 2], [1, PADDING]]))
        array([[0.        , 1.        ],
               [0.33333333, 0.        ]])
    """
    real = index != PADDING
    weights = np.zeros(index.shape)
    weights[real] = minmax_weights(scores[index[real]])
    return weights
