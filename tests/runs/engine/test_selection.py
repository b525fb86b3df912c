"""Which rows a selection keeps: each rule against a count by hand, repeats that are right on average."""

import numpy as np
import pytest

from bilevel_jax.runs.config.schema import SelectionSection
from bilevel_jax.runs.engine.selection import describe_selection_rule, describe_ties, select_examples

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
        (SelectionSection(threshold=1.5), "weight 1.5 or more"),
        (SelectionSection(resample=5000), "5,000 rows drawn in proportion to their weight, as whole repeats"),
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
