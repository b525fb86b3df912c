import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bilevel_jax.core import certify
from bilevel_jax.runs.stats import auc, jackknife_half_width, mean_interval, rank_correlation

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The .975 quantile of Student's t for 1 to 15 degrees of freedom, to three decimals, from printed tables."""


def draw(seed, kind, size=40):
    random = np.random.default_rng(seed)
    return random.normal(size=size) if kind == "distinct" else random.integers(0, 5, size).astype(float)


@pytest.mark.parametrize("kind", ["distinct", "with ties"])
def test_rank_correlation_is_spearmans(kind):
    """Ranks are whole or half numbers, so all sums are exact: implementations differ in the last division alone."""
    x, y = draw(0, kind), draw(1, kind)
    assert rank_correlation(x, x) == 1.0 and rank_correlation(x, -x) == -1.0
    assert abs(rank_correlation(x, y) - stats.spearmanr(x, y).statistic) < 1e-14
    assert abs(rank_correlation(x, y) - certify.spearman(jnp.asarray(x), jnp.asarray(y))) < 1e-6  # float32


def test_rank_correlation_of_two_points_is_exact_and_of_a_constant_is_nan():
    assert rank_correlation(np.array([1.0, 2.0]), np.array([5.0, 3.0])) == -1.0
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


@pytest.mark.parametrize("kind", ["distinct", "with ties"])
def test_auc_counts_pairs_with_ties_half(kind):
    scores, positive = draw(2, kind), draw(3, "distinct") > 0
    pairs = scores[positive][:, None] - scores[~positive]
    assert auc(scores, positive) == np.mean((pairs > 0) + (pairs == 0) / 2)
    assert np.isnan(auc(scores, np.ones(40, bool)))


def half_width_in_standard_errors(count):
    values = list(np.random.default_rng(count).normal(size=count))
    return mean_interval(values)[1] / (np.std(values, ddof=1) / np.sqrt(count))


def test_intervals_of_few_seeds_agree_with_the_printed_table():
    for degrees, quantile in enumerate(T_975, start=1):
        assert abs(half_width_in_standard_errors(degrees + 1) - quantile) < 6e-4  # the table's last digit


def test_intervals_of_many_seeds_narrow_towards_the_normal_quantile():
    widths = [half_width_in_standard_errors(count) for count in (16, 17, 31, 10_001)]
    assert widths == sorted(widths, reverse=True)
    assert abs(widths[2] - 2.042) < 6e-4 and abs(widths[3] - 1.960) < 1e-3
    mean, half_width = mean_interval([2.0])
    assert mean == 2.0 and np.isnan(half_width)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_the_jackknife_of_means_is_students_interval(count):
    values = np.random.default_rng(count).normal(size=(count, 3))
    without_one = (values.sum(0) - values) / (count - 1)
    expected = [mean_interval(column.tolist())[1] for column in values.T]
    np.testing.assert_allclose(jackknife_half_width(without_one), expected, rtol=1e-10)
    assert np.isnan(jackknife_half_width(values[:1])).all()
