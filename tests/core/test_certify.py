"""Certificates on functions whose regime is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bilevel_jax.core import certify
from bilevel_jax.core.certify import removals

SLOPE = np.random.default_rng(1).normal(size=40)


def linear(weights):
    return float(SLOPE @ weights)


def chaotic(weights):
    return float(jnp.sin(1e4 * (SLOPE @ weights)))


def test_exact_is_one_for_a_linear_function_and_not_for_a_chaotic_one():
    weights = jnp.ones(40)
    np.testing.assert_allclose(certify.check_finite_differences(linear, weights, SLOPE).ratios, 1, rtol=1e-9)
    slope = jax.grad(lambda w: jnp.sin(1e4 * (SLOPE @ w)))(weights)
    assert max(abs(ratio) for ratio in certify.check_finite_differences(chaotic, weights, slope).ratios) < 0.1
    assert (
        abs(certify.check_finite_differences(linear, weights, 2 * SLOPE).ratios[0] - 0.5) < 1e-9
    )  # a wrong gradient is told
    assert np.isnan(certify.check_finite_differences(linear, weights, 0 * SLOPE).ratios).all()


def test_smooth_compares_the_centred_entries_of_the_rows_that_stay():
    weights, key = jnp.linspace(0.5, 1.5, 40), jax.random.key(3)
    same = certify.metasmoothness(lambda w: SLOPE * jnp.where(w > 0, 3, 9), key, weights, SLOPE)
    assert same.removed == (0.5,) and abs(same.cosines[0] - 1) < 1e-12  # a smaller share has nothing to add
    shifted = certify.metasmoothness(lambda w: jnp.where(w > 0, SLOPE + 3 / w, 0), key, weights, SLOPE)
    assert abs(shifted.cosines[0] - 1) < 1e-12  # every entry times weight, moved by one number
    opposite = certify.metasmoothness(lambda w: -jnp.asarray(SLOPE), key, weights, SLOPE)
    assert opposite.removed == (0.5, 0.2) and max(opposite.cosines) < -0.99
    assert np.isnan(certify.metasmoothness(lambda w: SLOPE * np.nan, key, weights, SLOPE).cosines).all()
    assert certify.metasmoothness(lambda w: SLOPE * 0, key, weights, SLOPE).removed == ()  # nothing to compare
    assert (certify.drop_random_examples(key, weights, 0.2) == 0).sum() == 8


def test_smooth_is_the_mean_over_draws_of_what_numpy_computes():
    weights, key = jnp.linspace(0.5, 1.5, 40), jax.random.key(3)

    def estimate(w):
        return SLOPE * jnp.sin(3 * w * jnp.sum(w))

    expected = []
    for draw in range(4):
        fewer = np.asarray(certify.drop_random_examples(removals.draw_key(key, 0.25, draw), weights, 0.25))
        entries = np.asarray(weights * SLOPE), np.asarray(weights * estimate(jnp.asarray(fewer)))
        expected.append(np.corrcoef(*(part[fewer != 0] for part in entries))[0, 1])
    smooth = certify.metasmoothness(estimate, key, weights, SLOPE, (0.25,), draws=4)
    assert abs(smooth.cosines[0] - np.mean(expected)) < 1e-6


def test_predictive_of_a_linear_function():
    out = certify.predict_removals(linear, jax.random.key(4), jnp.ones(40), SLOPE, linear(jnp.ones(40)), fraction=0.5)
    assert out.rank == pytest.approx(1) and abs(out.slope - 1) < 1e-9
    np.testing.assert_allclose(out.predicted, out.actual, rtol=1e-9, atol=1e-12)


def test_spearman_equals_scipy_with_ties():
    one, other = np.random.default_rng(0).integers(0, 9, (2, 30)).astype(float)
    expected = stats.spearmanr(one, other).statistic
    assert abs(certify.spearman(jnp.asarray(one), jnp.asarray(other)) - expected) < 1e-12
