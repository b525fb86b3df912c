"""The table and the pictures of several targets, of which one judges nothing."""

import pytest

from bilevel_jax.runs.report.numbers import MeanInterval
from bilevel_jax.runs.report.targets import _is_dominated, describe_target_results

pytestmark = pytest.mark.fast
TARGETS = [
    {"name": "helpful", "coefficient": 1.0, "unit": "nats per pair", "accuracy_name": "pair accuracy"},
    {"name": "refusals", "coefficient": -0.5, "unit": "units of f", "accuracy_name": ""},
    {"name": "other", "coefficient": 0.0, "unit": "nats per token", "accuracy_name": "token accuracy"},
]


def readings(helpful, refusals, other, dev_other=None):
    """Of one seed, on dev and test."""

    def of_part(other):
        values = zip(TARGETS, (helpful, refusals, other), (0.7, None, None if other is None else 0.4), strict=True)
        return [{"name": target["name"], "loss": loss, "accuracy": right} for target, loss, right in values]

    return [{"validation": of_part(None), "dev": of_part(dev_other), "test": of_part(other)}]


def test_a_target_that_judges_nothing_is_in_the_table_and_not_in_the_sum():
    told = describe_target_results(TARGETS, {"uniform": readings(2.0, 1.0, 3.0), "learned": readings(1.5, 1.25, 3.5)})
    assert told["sum"] == "1 helpful − 0.5 refusals" and told["beside"] == "other" and told["part"] == "test"
    assert [part for part, _ in told["tables"]] == ["test", "dev"] and len(told["pictures"]) == 3
    test, dev = ([heading for heading, _, _ in table.heads] for _, table in told["tables"])
    assert test == dev == ["trained on", "helpful", "helpful", "refusals", "other", "other"]


def test_what_was_not_read_is_not_drawn():
    told = describe_target_results(TARGETS, {"uniform": readings(2.0, 1.0, None, 3.0)})
    assert len(told["pictures"]) == 1


def test_it_makes_no_choice_better_or_worse():
    """Less of the first and more of the second, whose coefficient is negative, is better; the third says nothing."""
    best = [MeanInterval(1.5, 0.1), MeanInterval(1.25, 0.1), MeanInterval(9.0, 0.1)]
    worse = [MeanInterval(2.0, 0.1), MeanInterval(1.0, 0.1), MeanInterval(3.0, 0.1)]
    assert _is_dominated(worse, [best, worse], TARGETS) and not _is_dominated(best, [best, worse], TARGETS)
    same = [*best[:2], MeanInterval(0.0, 0.1)]
    assert not _is_dominated(best, [same, best], TARGETS)
