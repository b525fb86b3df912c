"""Scores to weights: min-max over a global batch or the whole set, clipped quantiles; nan, ties and empty slots."""

import numpy as np
import pytest

from bilevel_jax.core.types import PADDING
from bilevel_jax.scores.weights import batch_minmax_weights, clipped_minmax_weights, minmax_weights, rank_weights

SCORES = np.array([-1.0, 3.0, 1.0, np.nan, 100.0, 0.0])


def test_minmax():
    np.testing.assert_allclose(minmax_weights(SCORES), [0, 4 / 101, 2 / 101, 0, 1, 1 / 101], rtol=1e-12)
    np.testing.assert_array_equal(minmax_weights(np.array([2.0, np.nan, 2.0])), [1, 0, 1])
    with pytest.raises(ValueError, match="none of 2 scores is a finite number"):
        minmax_weights(np.array([np.nan, np.inf]))


def test_clipped_quantiles_bound_an_outlier():
    weights = clipped_minmax_weights(SCORES, 0, 0.75)
    np.testing.assert_allclose(weights, [0, 1, 0.5, 0, 1, 0.25], rtol=1e-12)
    np.testing.assert_array_equal(clipped_minmax_weights(SCORES, 0, 1), minmax_weights(SCORES))
    for low, high in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="two with 0 <= low < high <= 1 are wanted"):
            clipped_minmax_weights(SCORES, low, high)


def test_ranks_know_no_outlier():
    np.testing.assert_array_equal(rank_weights(SCORES), [0, 0.75, 0.5, 0, 1, 0.25])
    np.testing.assert_array_equal(rank_weights(np.exp(SCORES)), rank_weights(SCORES))  # any rising function
    np.testing.assert_array_equal(rank_weights(np.array([3.0, 1.0, 3.0, 5.0])), [0.5, 0, 0.5, 1])
    np.testing.assert_array_equal(rank_weights(np.array([2.0, np.nan, 2.0])), [1, 0, 1])
    with pytest.raises(ValueError, match="none of 1 scores is a finite number"):
        rank_weights(np.array([np.nan]))


def test_by_batch_is_over_the_whole_step_however_it_is_cut():
    index = np.array([4, 1, PADDING, 0, 2, PADDING])
    weights = batch_minmax_weights(SCORES, index)
    np.testing.assert_allclose(weights, [1, 4 / 101, 0, 0, 2 / 101, 0], rtol=1e-12)
    for shape in ((1, 6), (6, 1), (2, 3)):
        np.testing.assert_array_equal(batch_minmax_weights(SCORES, index.reshape(shape)).ravel(), weights)
    np.testing.assert_array_equal(batch_minmax_weights(SCORES, np.array([[1], [PADDING]])), [[1], [0]])
