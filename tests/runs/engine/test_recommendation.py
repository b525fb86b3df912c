"""The recommendation: closed forms of its standard errors, and the laws of the rule."""

import numpy as np
import pytest

from bilevel_jax.runs.engine.recommendation import SIMPLICITY, Recommendation, recommend
from bilevel_jax.runs.stats import bootstrap_means

pytestmark = pytest.mark.fast


def drawn(differences, *, seeds=3, dev=40, noise=0.1, seed=0):
    """Losses of each dev example under each seed, by arm: what all arms share, a difference, and noise."""
    random = np.random.default_rng(seed)
    shared = random.normal(3, 1, (seeds, dev))
    return {name: shared + gap + noise * random.normal(size=(seeds, dev)) for name, gap in differences.items()}


@pytest.mark.parametrize(("seeds", "dev"), [(1, 25), (3, 40), (2, 200)])
def test_standard_errors_are_those_of_a_crossed_mean(seeds, dev):
    """One seed: s / sqrt(n). More: the variances of the means by seed and by example, and that of the rest, add up."""
    values = np.random.default_rng(1).normal(size=(seeds, dev)) + np.random.default_rng(2).normal(size=(seeds, 1))
    draws = bootstrap_means(values[None], seed=(0,))[:, 0]
    assert draws[0] == pytest.approx(values.mean(), abs=1e-12)
    means = values.mean(1), values.mean(0)
    rest = values - means[0][:, None] - means[1] + values.mean()
    parts = means[1].var() / (dev - 1), 0.0 if seeds == 1 else means[0].var() / (seeds - 1)
    variance = sum(parts) + (0.0 if seeds == 1 else rest.var() / (dev - 1) / (seeds - 1))
    assert draws[1:].std() == pytest.approx(variance**0.5, rel=0.06)  # 2,000 draws: 1.6 % standard deviation
    if seeds == 1:
        assert variance == pytest.approx(values.var(ddof=1) / dev)


def test_takes_the_best_where_it_is_clear_and_says_what_it_gains():
    told = recommend(drawn({"learned": -0.5, "uniform": 0.0, "low_loss": -0.2}), "nats")
    assert (told.use, told.over) == ("learned", "uniform") and [one.name for one in told.standings][0] == "uniform"
    assert told.gain.low < 0.5 < told.gain.high and told.gain.value == pytest.approx(0.5, abs=0.05)
    assert told.sentence.startswith("Use learned: it gains 0.") and "40 dev examples, 3 seeds" in told.sentence
    assert Recommendation.from_json(told.to_json()) == told


def test_a_tie_goes_to_the_simpler_and_less_than_one_standard_error_is_a_tie():
    losses = drawn({"uniform": 0.0})
    assert recommend(losses | {"learned": losses["uniform"]}, "nats").use == "uniform"
    told = recommend(drawn({"uniform": 0.0, "low_loss": -0.3, "learned": -0.301}), "nats")
    assert told.use == "low_loss" and "within one standard error" in told.sentence
    assert recommend(drawn({"uniform": 0.0, "learned": 0.3}), "nats").sentence.startswith("Use uniform, the simplest")


def test_a_gain_whose_interval_holds_zero_is_said_to_be_perhaps_chance():
    """Better by 1.5 standard errors: the best is recommended, and not as if that were certain."""
    difference = np.array([[1.0, -1.0] * 20])
    difference -= 1.5 * difference.std() / 39**0.5
    told = recommend({"uniform": np.full((1, 40), 3.0), "learned": 3.0 + difference}, "nats")
    assert told.use == "learned" and told.gain.low < 0 < told.gain.value
    assert f"interval −{-told.gain.low:.4f} to" in told.sentence and "it may be chance" in told.sentence
    assert "chance" not in recommend(drawn({"learned": -0.5, "uniform": 0.0}), "nats").sentence


@pytest.mark.parametrize("seed", range(5))
def test_neither_the_order_of_arms_nor_that_of_examples_matters(seed):
    random = np.random.default_rng(seed)
    gaps = dict(zip(SIMPLICITY, random.normal(0, 0.02, len(SIMPLICITY)), strict=True))
    losses = drawn(gaps, seed=seed)
    places, seeds = random.permutation(40), random.permutation(3)
    shuffled = {name: losses[name][seeds][:, places] for name in random.permutation(list(losses))}
    assert recommend(losses, "nats") == recommend(shuffled, "nats")  # every number


def test_without_dev_or_arms_it_says_so():
    told = recommend({}, "nats")
    assert told.use is None and "Give data.dev, or a share of data.split" in told.sentence
    losses = drawn({"oracle": 0.0, "random": 0.0, "uniform": 1.0})
    assert recommend(losses, "nats").use is None  # the oracle and the control are never recommended
    assert Recommendation.from_json(told.to_json()) == told


def test_a_loss_without_examples_varies_by_its_seeds_alone():
    """One seed: the best arm is the best. More: within a standard error of the seeds the simpler one."""
    told = recommend({"uniform": np.array([[1.0]]), "learned": np.array([[0.9]])}, "nats", reads_examples=False)
    assert told.use == "learned" and told.standings[0].standard_error < 1e-12
    assert "a loss without examples, 1 seed, whose own spread retrain.seeds above 1 would tell" in told.sentence
    seeds = {"uniform": np.array([[1.0], [0.8], [1.2]]), "learned": np.array([[1.1], [0.7], [1.1]])}
    told = recommend(seeds, "nats", reads_examples=False)
    assert told.use == "uniform" and told.standings[0].standard_error > 0 and "dev" not in told.sentence
