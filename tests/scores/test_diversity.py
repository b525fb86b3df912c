"""Greedy choices: exact for a quadratic validation loss, plain ranking without strength, alike rows apart."""

import numpy as np
import pytest

from bilevel_jax.scores.diversity import select_diverse
from bilevel_jax.scores.embedding import sparse

RNG = np.random.default_rng(0)
GRADIENTS = RNG.normal(size=(9, 4))
STEP = 0.3


def test_each_choice_is_the_best_step_for_a_quadratic_validation_loss():
    """L_v = |θ|²/2: the next row is the one whose gradient step, after those before it, lowers L_v the most."""
    theta = RNG.normal(size=4)
    chosen = select_diverse(GRADIENTS @ theta, GRADIENTS, 6, strength=STEP)
    left = list(range(9))
    for row in chosen:
        values = [np.sum((theta - STEP * GRADIENTS[j]) ** 2) for j in left]
        assert row == left[int(np.argmin(values))]
        theta = theta - STEP * GRADIENTS[row]
        left.remove(row)


def test_without_strength_it_is_the_ranking_and_sparse_equals_dense():
    scores = RNG.normal(size=9)
    np.testing.assert_array_equal(select_diverse(scores, GRADIENTS, 9, strength=0.0), np.argsort(-scores))
    dense, held = (select_diverse(scores, x, 9, strength=1.0) for x in (GRADIENTS, sparse.csr_array(GRADIENTS)))
    np.testing.assert_array_equal(dense, held)


def test_copies_wait_and_rows_without_a_score_stay_out():
    features, scores = np.eye(3)[[0, 0, 0, 1, 2]], np.array([1.0, 0.99, 0.98, 0.5, np.nan])
    assert select_diverse(scores, features, 4, strength=1.0).tolist() == [0, 3, 1, 2]
    for count, strength, rows in ((5, 1, 5), (0, 1, 5), (1, -1, 5), (1, 1, 4)):
        with pytest.raises(ValueError, match="at most all rows with a score, features of each row and strength"):
            select_diverse(scores, features[:rows], count, strength=strength)
