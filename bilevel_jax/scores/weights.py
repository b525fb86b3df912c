"""Example weights between 0 and 1 from data scores."""

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.types import PADDING

ExampleScores = Float[np.ndarray, "examples"]


def minmax_weights(scores: ExampleScores) -> ExampleScores:
    """w_i = (s_i - min s)/(max s - min s) over the whole set; 0 for a score that is nan.

    Where all scores are equal they say nothing, and every weight is 1. One outlier pushes all others to one end; take
    `clipped` then.
    """
    known = np.isfinite(scores)
    if not known.any():
        raise ValueError(f"none of {scores.size} scores is a finite number, so there is nothing to weigh rows by.")
    low, high = scores[known].min(), scores[known].max()
    weights = np.ones(scores.shape) if low == high else (scores - low) / (high - low)
    return np.where(known, weights, 0.0)


def clipped_minmax_weights(scores: ExampleScores, low: float = 0.05, high: float = 0.95) -> ExampleScores:
    """As `minmax`, from the scores clipped to their quantiles `low` and `high`."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles {low} and {high}; two with 0 <= low < high <= 1 are wanted.")
    known = scores[np.isfinite(scores)]
    edges = np.quantile(known, [low, high]) if known.size else (0.0, 0.0)
    return minmax_weights(np.clip(scores, *edges))


def batch_minmax_weights(scores: ExampleScores, index: Int[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """`minmax` over the rows of one global step, as in arXiv 2510.14459. `index` are its rows; PADDING: an empty slot.

    All micro-batches and devices of the step at once: over a micro-batch of one row it would say nothing. An empty slot
    has weight 0. A row's weight then depends on the rows that it stands beside.
    """
    real = index != PADDING
    weights = np.zeros(index.shape)
    weights[real] = minmax_weights(scores[index[real]])
    return weights
