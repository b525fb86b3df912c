"""Which rows a selection keeps: each rule against a count by hand, repeats that are right on average."""

import dataclasses

import numpy as np
import pytest

from bilevel_jax.runs.config.schema import SelectionSection
from bilevel_jax.runs.engine.selection import (
    describe_selection_rule,
    describe_shortfall,
    describe_strata,
    describe_ties,
    divide_into_strata,
    list_further_strata,
    select_examples,
)

WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5, 1.0, 3.0])
SOURCES = ["a", "a", "b", "b", "b", "c"]
ALL = np.arange(6)


def kept(keep, weights=WEIGHTS, among=ALL, seed=0, sources=SOURCES):
    return select_examples(weights, among, keep, sources=sources, seed=seed).tolist()


@pytest.mark.parametrize(
    "keep, among, wanted",
    [
        (SelectionSection(top_share=0.5), ALL, [1, 3, 5]),
        (SelectionSection(top_share=1), ALL, [0, 1, 2, 3, 4, 5]),
        (SelectionSection(top_share=0.01), ALL, [5]),  # never none
        (SelectionSection(top_share=0.5), np.array([0, 2, 4, 5]), [4, 5]),  # of what may be kept
        (SelectionSection(threshold=1.5), ALL, [1, 3, 5]),
        (SelectionSection(threshold=1.5), np.array([0, 1, 2]), [1]),
        (SelectionSection(per_source=4), ALL, [1, 3, 5]),  # quotas 1.25, 1.25, 1.5; c has one row only
        (SelectionSection(per_source=3), ALL, [1, 3, 5]),
        (SelectionSection(per_source=1), ALL, [5]),  # the largest remainder
    ],
)
def test_rules(keep, among, wanted):
    assert kept(keep, among=among) == wanted


LENGTHS = np.array([3.0, 9.0, 4.0, 8.0, 7.0, 2.0])


def test_strata_are_equal_groups_in_order():
    assert divide_into_strata(LENGTHS, ALL, 2).tolist() == [0, 1, 0, 1, 1, 0]
    assert divide_into_strata(LENGTHS, np.array([0, 1, 3, 5]), 2).tolist() == [0, 1, -1, 1, -1, 0]
    values = np.random.default_rng(0).random(103)
    strata = divide_into_strata(values, np.arange(103), 5)
    assert np.ptp(np.bincount(strata)) <= 1
    for stratum in range(4):
        assert values[strata == stratum].max() < values[strata == stratum + 1].min()
    assert np.bincount(divide_into_strata(np.arange(4.0), np.arange(4), 6)).tolist() == [1] * 4  # more groups than rows


@pytest.mark.parametrize(
    "share, among, wanted",
    [
        (1 / 3, ALL, [1, 5]),  # the best of the three short and of the three long
        (2 / 3, ALL, [1, 3, 0, 5]),
        (1, ALL, [0, 1, 2, 3, 4, 5]),
        (0.5, np.array([0, 2, 3, 4]), [0, 3]),  # of what may be kept: 0 and 2 are short, 3 and 4 are long
    ],
)
def test_a_share_of_each_stratum(share, among, wanted):
    rule = SelectionSection(top_share=share, strata="length", num_strata=2)
    strata = divide_into_strata(LENGTHS, among, 2)
    assert select_examples(WEIGHTS, among, rule, sources=SOURCES, seed=0, strata=strata).tolist() == sorted(wanted)


def divide_by_hand(values, num_strata):
    """Each cut of equal sizes moved to the nearest place between two values, the lower of two that are as near."""
    places = np.array([0, *np.cumsum(np.unique(values, return_counts=True)[1])])
    cuts = [places[np.abs(places - len(values) * k / num_strata).argmin()] for k in range(1, num_strata)]
    strata = np.full(len(values), -1)
    strata[np.argsort(values, kind="stable")] = np.searchsorted(np.unique(cuts), np.arange(len(values)), side="right")
    return np.unique(strata, return_inverse=True)[1]


@pytest.mark.parametrize("num_values", [1, 2, 4, 12, 300])
def test_equal_values_are_in_one_stratum_and_cuts_are_nearest_to_equal_sizes(num_values):
    rng = np.random.default_rng(num_values)
    for num_strata in (2, 5, 7):
        values = rng.integers(0, num_values, 60).astype(float)
        strata = divide_into_strata(values, np.arange(60), num_strata)
        assert strata.tolist() == divide_by_hand(values, num_strata).tolist()
        shuffled = rng.permutation(60)
        assert (divide_into_strata(values[shuffled], np.arange(60), num_strata) == strata[shuffled]).all()


FIVE = SelectionSection(top_share=0.1, strata="length")
LONG = np.repeat([5.0, 9.0], [97, 3])


@pytest.mark.parametrize(
    "lengths, wanted, told",
    [
        (np.full(100, 7.0), range(90, 100), "there is one, of all rows."),  # the largest weights of all
        (np.repeat([4.0, 8.0], 50), [*range(45, 50), *range(95, 100)], "there are 2, of 50 rows."),
        (np.tile([4.0, 8.0], 50), range(90, 100), "there are 2, of 50 rows."),
        (LONG, range(87, 97), "there are 2, of 3 to 97 rows; of 1 the share is less than one row, and none is"),
    ],
)
def test_of_equal_lengths_and_unequal_weights_the_largest_are_selected_and_it_is_told(lengths, wanted, told):
    strata = divide_into_strata(lengths, np.arange(100), 5)
    selected = select_examples(np.arange(100.0), np.arange(100), FIVE, sources=[""] * 100, seed=0, strata=strata)
    assert selected.tolist() == [*wanted]
    assert describe_strata(strata, selected, FIVE).startswith(
        f"selection.num_strata = 5: rows of equal length are in one stratum, so {told}"
    )


def test_of_different_values_every_stratum_gives_rows_and_nothing_is_told():
    for num_rows in (2, 3, 5, 7, 12, 17):
        values, rows = np.random.default_rng(num_rows).permutation(num_rows).astype(float), np.arange(num_rows)
        for num_strata in range(2, num_rows + 1):
            for count in range(num_strata, num_rows + 1):
                rule = SelectionSection(top_share=count / num_rows, strata="loss", num_strata=num_strata)
                strata = divide_into_strata(values, rows, num_strata)
                selected = select_examples(values, rows, rule, sources=[""] * num_rows, seed=0, strata=strata)
                assert len(selected) == count and describe_strata(strata, selected, rule) == ""
    assert describe_strata(None, rows, SelectionSection()) == ""


@pytest.mark.parametrize(
    "rule, wanted",
    [
        (
            FIVE,
            "selection.top_share = 0.1 of 44 rows selects 4, and selection.num_strata = 5 asks for at least one of "
            "each stratum: raise top_share, lower num_strata, or leave selection.strata empty.",
        ),
        (
            dataclasses.replace(FIVE, top_share=1.0, num_strata=45),
            "selection.top_share = 1 of 44 rows selects 44, and selection.num_strata = 45 asks for at least one of "
            "each stratum: lower num_strata, or leave selection.strata empty.",
        ),
    ],
)
def test_fewer_rows_than_strata_are_refused(rule, wanted):
    rows = np.arange(44)
    strata = divide_into_strata(rows.astype(float), rows, rule.num_strata)
    with pytest.raises(ValueError) as caught:
        select_examples(rows.astype(float), rows, rule, sources=[""] * 44, seed=0, strata=strata)
    assert str(caught.value) == wanted


@pytest.mark.parametrize(
    "rule, wanted",
    [
        (SelectionSection(), ["length", "loss"]),
        (FIVE, ["loss"]),
        (SelectionSection(resample=5), []),
        (SelectionSection(per_source=5), []),
        (SelectionSection(threshold=1), []),
    ],
)
def test_strata_that_could_be_set(rule, wanted):
    assert list_further_strata(rule) == wanted


def test_a_selection_by_strata_has_the_composition_of_all_and_the_size_of_one_without():
    rng = np.random.default_rng(0)
    lengths, candidates = rng.random(200), np.delete(np.arange(200), [3, 77, 150])
    weights = lengths + 0.1 * rng.random(200)  # order by length alone
    strata = divide_into_strata(lengths, candidates, 7)
    plain = SelectionSection(top_share=0.3)
    rule = SelectionSection(top_share=0.3, strata="length", num_strata=7)
    selected = select_examples(weights, candidates, rule, sources=[""] * 200, seed=0, strata=strata)
    without = select_examples(weights, candidates, plain, sources=[""] * 200, seed=0)
    assert len(selected) == len(without) == 59 and set(np.bincount(strata[selected])) <= {8, 9}
    assert abs(lengths[selected].mean() - lengths[candidates].mean()) < 0.1 < lengths[without].mean() - 0.6
    for stratum in range(7):
        inside = candidates[strata[candidates] == stratum]
        assert weights[np.intersect1d(inside, selected)].min() > weights[np.setdiff1d(inside, selected)].max()


def test_strata_that_are_not_given_are_asked_for():
    with pytest.raises(ValueError, match="the strata of the rows are not given"):
        kept(SelectionSection(strata="loss"))


def test_ties_go_to_the_earlier_row():
    assert kept(SelectionSection(top_share=0.5), weights=np.ones(6)) == [0, 1, 2]


def test_a_source_with_too_few_rows_gives_all_it_has():
    weights = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 10.0])  # quotas .8, 1.2 and 4, of a source with one row
    assert kept(SelectionSection(per_source=6), weights=weights) == [0, 2, 5]


@pytest.mark.parametrize("count", [1, 5, 8, 100])
def test_repeats_are_whole_and_next_to_their_expectation(count):
    expected = count * WEIGHTS / WEIGHTS.sum()
    for seed in range(50):
        repeats = np.bincount(kept(SelectionSection(resample=count), seed=seed), minlength=6)
        assert repeats.sum() == count
        assert (repeats >= np.floor(expected - 1e-9)).all() and (repeats <= np.ceil(expected + 1e-9)).all()
        assert repeats[2] == 0  # weight 0
    assert kept(SelectionSection(resample=count), seed=1) == sorted(kept(SelectionSection(resample=count), seed=1))


def test_repeats_are_right_on_average_over_seeds():
    seeds = 4000
    total = sum(np.bincount(kept(SelectionSection(resample=4), seed=seed), minlength=6) for seed in range(seeds))
    # a count is floor or ceil of its expectation: standard deviation at most .5, of the mean .5 / sqrt(4000) = .008
    assert np.abs(total / seeds - 4 * WEIGHTS / WEIGHTS.sum()).max() < 5 * 0.008


def test_repeats_only_of_what_may_be_kept():
    assert set(kept(SelectionSection(resample=50), among=np.array([0, 3]))) == {0, 3}


def capped_expectation(weights, count, cap):
    """min(cap, λ w) with the λ at which these sum to count, by bisection."""
    low, high = 0.0, cap / weights[weights > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(cap, middle * weights).sum() > count else (middle, high)
    return np.minimum(cap, low * weights)


@pytest.mark.parametrize("cap", [1, 2, 4, 50])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0], ids=["equal", "unequal", "very unequal"])
def test_no_row_is_repeated_more_than_max_repeats_and_the_others_take_its_rest(spread, cap):
    weights = np.exp(spread * np.random.default_rng(int(spread)).normal(size=60))
    weights[::7] = 0
    num_positive = int((weights > 0).sum())
    for count in {cap, num_positive * cap // 3, num_positive * cap - 1, num_positive * cap}:
        expected = capped_expectation(weights, count, cap)
        for seed in range(20):
            rule = SelectionSection(resample=count, max_repeats=cap)
            repeats = np.bincount(kept(rule, weights, np.arange(60), seed), minlength=60)
            assert repeats.sum() == count and repeats.max() <= cap and not repeats[weights == 0].any()
            assert (repeats >= np.floor(expected - 1e-6)).all() and (repeats <= np.ceil(expected + 1e-6)).all()
            if expected.max() < cap - 1e-6:  # the cap binds nobody: the same rows as without it
                assert kept(rule, weights, np.arange(60), seed) == kept(
                    SelectionSection(resample=count), weights, np.arange(60), seed
                )


def test_capped_repeats_of_weights_by_hand():
    weights = np.array([8.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    # the first is expected 16 times of 24, takes 6, and the others share 18 evenly: 4.5 each
    for seed in range(20):
        repeats = np.bincount(kept(SelectionSection(resample=24, max_repeats=6), weights, seed=seed), minlength=6)
        assert repeats[0] == 6 and repeats[5] == 0 and sorted(repeats[1:5]) == [4, 4, 5, 5]
    for scale in (1e-3, 1e6):  # as without a cap, only shares count
        assert kept(SelectionSection(resample=24, max_repeats=6), scale * weights) == kept(
            SelectionSection(resample=24, max_repeats=6), weights
        )


def test_capped_repeats_are_right_on_average_over_seeds():
    rule, seeds = SelectionSection(resample=7, max_repeats=2), 4000
    total = sum(np.bincount(kept(rule, seed=seed), minlength=6) for seed in range(seeds))
    expected = capped_expectation(WEIGHTS, 7, 2)
    assert expected[5] == 2 and np.abs(total / seeds - expected).max() < 5 * 0.008  # as above


def test_too_few_rows_for_the_cap_are_told():
    rule = SelectionSection(resample=24, max_repeats=4)
    repeats = np.bincount(kept(rule), minlength=6)
    assert repeats.tolist() == [4, 4, 0, 4, 4, 4]
    assert describe_shortfall(rule, 20) == (
        "selection.resample = 24: 5 rows weigh more than 0, and selection.max_repeats = 4 takes none more often, so 20 "
        "rows."
    )
    assert describe_shortfall(rule, 24) == describe_shortfall(SelectionSection(), 3) == ""


@pytest.mark.parametrize("keep", [SelectionSection(resample=3), SelectionSection(per_source=3)])
def test_weights_that_are_all_zero_choose_nothing(keep):
    with pytest.raises(ValueError, match="every weight is 0"):
        kept(keep, weights=np.zeros(6))


def test_a_threshold_above_all_weights_is_an_error():
    with pytest.raises(ValueError, match="selection.threshold = 4 or more; the largest is 3"):
        kept(SelectionSection(threshold=4))


@pytest.mark.parametrize(
    "keep, words",
    [
        (SelectionSection(), "the top 80% by weight"),
        (SelectionSection(top_share=0.125), "the top 12.5% by weight"),
        (
            SelectionSection(top_share=0.1, strata="loss", num_strata=4),
            "the top 10% by weight in each of up to 4 strata of like loss before training",
        ),
        (SelectionSection(threshold=1.5), "weight 1.5 or more"),
        (SelectionSection(resample=5000), "5,000 rows drawn in proportion to their weight, as whole repeats"),
        (
            SelectionSection(resample=5000, max_repeats=4),
            "5,000 rows drawn in proportion to their weight, as whole repeats, none more than 4 times",
        ),
        (SelectionSection(per_source=5), "5 rows, each source in proportion to its total weight"),
    ],
)
def test_the_rule_in_words(keep, words):
    assert describe_selection_rule(keep) == words


SAME, TIED = np.ones(6), np.array([2.0, 1.0, 1.0, 1.0, 0.0, 0.0])
FIRST = "all 6 rows weigh the same, so the weights choose nothing: the selection is the first rows"


@pytest.mark.parametrize(
    "rule, weights, wanted",
    [
        (SelectionSection(top_share=0.5), SAME, f"{FIRST} in the order of the data."),
        (SelectionSection(per_source=3), SAME, f"{FIRST} of each source in the order of the data."),
        (SelectionSection(resample=3), SAME, "all 6 rows weigh the same, so the weights choose nothing: rows are drawn "
         "evenly over the order of the data."),
        (SelectionSection(top_share=0.5), TIED, "the cut of the selection goes through 3 rows of equal weight: 2 of "
         "them are selected, the first in the order of the data."),
        (SelectionSection(top_share=1), SAME, ""),
        (SelectionSection(threshold=1), SAME, ""),
        (SelectionSection(top_share=2 / 3), TIED, ""),
        (SelectionSection(top_share=0.5), WEIGHTS, ""),
        (SelectionSection(resample=3), TIED, ""),
    ],
)  # fmt: skip
def test_what_equal_weights_leave_to_the_order_is_told(rule, weights, wanted):
    selected = select_examples(weights, ALL, rule, sources=SOURCES, seed=0)
    assert describe_ties(weights, ALL, selected, rule, SOURCES) == wanted
