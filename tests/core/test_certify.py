"""Certificates on functions whose regime is known, and the verdict's words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bilevel_jax.core import certify
from bilevel_jax.core.types import Checks

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


def test_smooth_compares_the_rows_that_stay():
    weights, key = jnp.ones(40), jax.random.key(3)
    assert abs(certify.metasmoothness(lambda w: SLOPE * jnp.where(w > 0, 1, 9), key, weights, SLOPE) - 1) < 1e-12
    assert certify.metasmoothness(lambda w: -jnp.asarray(SLOPE), key, weights, SLOPE) < -0.99
    assert (certify.drop_random_examples(key, weights, 0.2) == 0).sum() == 8


def test_predictive_of_a_linear_function():
    out = certify.predict_removals(linear, jax.random.key(4), jnp.ones(40), SLOPE, linear(jnp.ones(40)), fraction=0.5)
    assert out.rank == pytest.approx(1) and abs(out.slope - 1) < 1e-9
    np.testing.assert_allclose(out.predicted, out.actual, rtol=1e-9, atol=1e-12)


def test_spearman_equals_scipy_with_ties():
    one, other = np.random.default_rng(0).integers(0, 9, (2, 30)).astype(float)
    expected = stats.spearmanr(one, other).statistic
    assert abs(certify.spearman(jnp.asarray(one), jnp.asarray(other)) - expected) < 1e-12


EXACT = (0.1, 0.03, 0.01, 0.003)
VERDICTS = [
    (1.00, 0.95, Checks(), "BELIEVE changes up to half of the data"),
    (0.98, 0.75, Checks(), "BELIEVE small changes"),
    (1.07, 0.95, Checks(), "UNDECIDED"),
    (1.00, 0.60, Checks(), "UNDECIDED"),
    (1.20, 0.95, Checks(), "DO NOT BELIEVE"),
    (1.00, 0.40, Checks(), "DO NOT BELIEVE"),
    (float("nan"), 0.95, Checks(), "DO NOT BELIEVE"),
    (1.00, float("nan"), Checks(), "DO NOT BELIEVE"),
    (1.00, 0.95, Checks(replayed=False), "DO NOT BELIEVE"),
    (1.00, 0.95, Checks(curvature=-0.1), "DO NOT BELIEVE"),
    (1.00, 0.95, Checks(residual=0.5), "DO NOT BELIEVE"),
    (None, None, Checks(), "UNDECIDED"),
]


@pytest.mark.parametrize("ratio, smooth, checks, level", VERDICTS)
def test_verdict(ratio, smooth, checks, level):
    exact = None if ratio is None else certify.FiniteDifferences(EXACT, (ratio,) * 4)
    verdict = certify.judge_certificates(certify.Certificates(exact, smooth, None, checks))
    assert str(verdict).startswith(f"{level}: ")
    assert verdict.level == "BELIEVE" or verdict.remedy
