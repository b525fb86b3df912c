import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bilevel_jax.core import certify
from bilevel_jax.runs.stats import (
    auc,
    bootstrap_mean,
    bootstrap_means,
    bootstrap_paired_gain,
    crossed_half_width,
    crossed_p,
    jackknife_half_width,
    mean_interval,
    rank_correlation,
    sidak_level,
    sidak_p,
    sign_flip_p,
)

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


def test_the_bootstrap_of_a_mean_is_as_wide_as_students_interval():
    for count in (5, 12, 100):
        values = np.random.default_rng(count).normal(size=count)
        interval, (mean, half) = bootstrap_mean(values, (1,)), mean_interval(list(values))
        assert interval.value == pytest.approx(mean) and interval == bootstrap_mean(values, (1,))
        assert (interval.high - interval.low) / 2 == pytest.approx(
            half, rel=0.15
        )  # resamples, and skew of a few values
    assert np.isnan(bootstrap_mean(np.ones(1), (1,)).low) and np.isnan(bootstrap_mean(np.ones(0), (1,)).value)


def test_sign_flips_are_the_sign_test_where_all_differences_are_equal():
    for wins, losses in ((5, 0), (6, 0), (9, 1), (3, 3)):
        differences = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 50)
        assert sign_flip_p(differences, (0,)) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    many = np.array([1.0] * 30 + [-1.0] * 12)
    assert sign_flip_p(many, (0,)) == pytest.approx(stats.binomtest(30, 42).pvalue, abs=0.006)  # 2,000 draws
    assert sign_flip_p(np.zeros(4), (0,)) == 1.0
    values = np.array([0.5, -0.2, 1.5, 0.7, 0.1])
    exact = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip_p(values, (0,)) == pytest.approx(exact)


def test_groups_are_resampled_apart():
    """A group of one item has no sampling error; the others keep theirs, at their share."""
    gain = np.r_[np.random.default_rng(0).normal(size=20), 5.0]
    interval, _ = bootstrap_paired_gain(gain, np.zeros(21), 0.025, (0,), [20, 1])
    alone, _ = bootstrap_paired_gain(gain[:20], np.zeros(20), 0.025, (0,))
    assert interval.value == pytest.approx(gain.mean())
    assert interval.high - interval.low == pytest.approx((alone.high - alone.low) * 20 / 21, rel=0.1)
    values = np.stack([np.tile(gain, (3, 1)), np.zeros((3, 21))])
    grouped, whole = (bootstrap_means(values, (0,), groups)[1:, 0].std() for groups in ((20, 1), ()))
    assert grouped == pytest.approx(gain[:20].std() / 20**0.5 * 20 / 21, rel=0.1) and whole > 1.3 * grouped
    assert np.array_equal(bootstrap_means(values, (0,), (21,)), bootstrap_means(values, (0,)))


def test_crossed_intervals_are_students_where_one_part_alone_varies():
    seeds, items = draw(0, "distinct", 4), draw(1, "distinct", 9)
    for level in (0.05, 0.01):
        t_seeds, t_items = (stats.t.ppf(1 - level / 2, count - 1) for count in (4, 9))
        by_seed = crossed_half_width(np.tile(seeds[:, None], 9), level)
        assert by_seed == pytest.approx(t_seeds * seeds.std(ddof=1) / 2, rel=1e-12)
        by_item = crossed_half_width(np.tile(items, (4, 1)), level)
        assert by_item == pytest.approx(t_items * items.std(ddof=1) / 3, rel=1e-12)
    assert np.isnan(crossed_half_width(items[None])) and np.isnan(crossed_p(items[None]))


def test_the_crossed_p_is_the_level_at_which_the_interval_ends_at_0():
    values = 0.3 + np.random.default_rng(0).normal(size=(3, 20))
    assert crossed_half_width(values, crossed_p(values)) == pytest.approx(values.mean(), rel=1e-4)
    assert crossed_p(values - values.mean()) == 1.0 and crossed_p(np.ones((3, 4))) < 1e-12


def simulate(seeds, items, by_seed, by_item, arms=1, shares=False):
    """Differences of arms from one baseline, all of the same quality: crossed effects and noise, [arm, seed, item]."""
    random = np.random.default_rng((seeds, items, round(10 * by_seed), round(10 * by_item)))
    while True:
        shape = arms + 1, seeds, items
        values = by_seed * random.normal(size=(*shape[:2], 1)) + by_item * random.normal(size=(shape[0], 1, items))
        difficulty = random.normal(size=items)
        if shares:  # right answers, by the model and the difficulty of the question
            values = (random.random(shape) < 1 / (1 + np.exp(-values - difficulty))).astype(float)
        else:
            values = values + difficulty + random.normal(size=shape)
        yield values[1:] - values[0]


@pytest.mark.parametrize("shares", [False, True], ids=["numbers", "right or wrong"])
@pytest.mark.parametrize("seeds, by_seed, by_item", [(2, 1, 1), (3, 0, 0), (3, 0.3, 1), (3, 1, 0), (5, 0.5, 0.5)])
def test_crossed_intervals_of_a_against_a_cover(seeds, by_seed, by_item, shares):
    """500 comparisons with 0 as the truth: at least .95 but for chance, of standard deviation .01."""
    draws = simulate(seeds, 40, by_seed, by_item, shares=shares)
    values = [next(draws)[0] for _ in range(500)]
    covered = np.mean([abs(one.mean()) <= crossed_half_width(one) for one in values])
    assert covered >= 0.95 - 0.02
    of_items_alone = np.mean(
        [abs(one.mean()) <= bootstrap_mean(one.mean(0), (0,)).high - one.mean() for one in values[:100]]
    )
    if by_seed == 1:  # what intervals would say that take the seeds for all that there are
        assert of_items_alone < 0.85


def test_sidak_intervals_of_arms_against_one_baseline_cover_at_once():
    """8 arms that are as good as the baseline: one is told apart in 5 % of comparisons, else in more."""
    draws = simulate(4, 30, 0.5, 0.5, arms=8)
    values = [next(draws) for _ in range(250)]
    for level, least, most in ((sidak_level(0.05, 8), 0.92, 1.0), (0.05, 0.0, 0.9)):
        at_once = np.mean([all(abs(arm.mean()) <= crossed_half_width(arm, level) for arm in arms) for arms in values])
        assert least <= at_once <= most
    assert sidak_level(0.05, 1) == pytest.approx(0.05) and 1 - (1 - sidak_level(0.05, 8)) ** 8 == pytest.approx(0.05)
    assert sidak_p(sidak_level(0.05, 8), 8) == pytest.approx(0.05) and sidak_p(1.0, 3) == 1.0


def test_a_bootstrap_interval_of_another_level_is_students():
    values = np.random.default_rng(3).normal(size=60)
    low, high = bootstrap_mean(values, (1,), 0.004)[1:]
    half = stats.t.ppf(0.998, 59) * values.std(ddof=1) / np.sqrt(60)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)  # 25 of 12,500 resamples beyond either end
