"""The search of `tune`: which settings are trained and certified, in which order, against closed forms."""

import dataclasses
import math

import pytest

from bilevel_jax.commands.tune.search import Trained, search
from bilevel_jax.commands.tune.settings import (
    BATCH,
    CLIP_NORM,
    EPS_ROOT,
    LEARNING_RATE,
    PARTS,
    WARMUP,
    apply_setting,
    format_flags,
    list_changes,
)
from bilevel_jax.core.certify import Verdict
from bilevel_jax.runs.budget.work import TuneCosts
from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.load import TuneConfig

OWN_RATE = 1.0
COSTS = TuneCosts(training=1, draw=10, ratios=10, certificates=20)


class Landscape:
    """Loss and metasmoothness as functions of a setting; what was asked of it, in order."""

    def __init__(self, loss, smoothness):
        self.loss, self.smoothness = loss, smoothness
        self.trained, self.drawn, self.certified = [], [], []

    def train(self, setting):
        self.trained.append(setting)
        loss = self.loss(setting)
        return Trained({"validation": loss}, loss, "" if math.isfinite(loss) else "diverged")

    def draw(self, setting):
        self.drawn.append(setting)
        return self.smoothness(setting), ""

    def compare(self, setting):
        return None

    def certify(self, setting):
        self.certified.append(setting)
        return Verdict("BELIEVE" if self.smoothness(setting) >= 0.8 else "UNDECIDED", "", "", "")

    def cost_factor(self, setting):
        return setting.get(BATCH, 8) / 8


def make_config(**tune):
    return TuneConfig(
        tune=schema.TuneSection(**{"learning_rates": (0.5, 0.25), "batch_sizes": (2,)} | tune),
        optimizer=schema.OptimizerSection(learning_rate=OWN_RATE, warmup_steps=0),
        train=schema.TrainSection(max_steps=10, global_batch_size=8),
    )


def run(landscape, **tune):
    config = make_config(**tune)
    return search(config, list_changes(config, 100), landscape, COSTS)


def rate(setting):
    return setting.get(LEARNING_RATE, OWN_RATE)


def test_own_setting_that_holds_ends_the_search():
    landscape = Landscape(lambda s: 1.0, lambda s: 0.9)
    outcome = run(landscape)
    assert outcome.proposed.setting == {} and landscape.trained == [{}] and outcome.spent == 41


def test_the_first_that_holds_by_loss_is_the_best_of_its_round():
    """Half the rate has the least loss and is rough, a quarter holds: two draws, one of them certified."""
    losses = {1.0: 1.0, 0.5: 0.9, 0.25: 0.95}
    landscape = Landscape(lambda s: losses[rate(s)], lambda s: 1.05 - rate(s))
    outcome = run(landscape)
    assert outcome.proposed.setting == {LEARNING_RATE: 0.25}
    assert landscape.drawn == [{}, {LEARNING_RATE: 0.5}, {LEARNING_RATE: 0.25}]
    assert [rate(s) for s in landscape.certified] == [1.0, 0.25]
    assert not outcome.stopped_by_budget


@pytest.mark.parametrize("limit, is_found", [(0.05, False), (0.3, True)])
def test_a_loss_above_the_limit_is_not_proposed_but_told(limit, is_found):
    """A low rate holds trivially, with a loss that rises by a fifth."""
    landscape = Landscape(lambda s: 1.2 if rate(s) < 1 else 1.0, lambda s: 0.9 if rate(s) == 0.25 else 0.1)
    outcome = run(landscape, max_loss_increase=limit, eps_roots=(), warmup_shares=(), clip_norms=(), batch_sizes=())
    found = outcome.proposed if is_found else outcome.beyond
    assert found.setting == {LEARNING_RATE: 0.25} and (outcome.proposed is None) != is_found


def test_other_settings_are_changed_around_the_smoothest():
    """No rate holds alone; the smoothest of them does with a larger eps_root."""

    def smoothness(setting):
        return 0.7 - 0.4 * (rate(setting) - 0.25) + (0.2 if setting.get(EPS_ROOT) == 1e-6 else 0.0)

    landscape = Landscape(lambda s: 1.0, smoothness)
    outcome = run(landscape)
    assert outcome.proposed.setting == {LEARNING_RATE: 0.25, EPS_ROOT: 1e-6}
    added = [{key for key in s if key not in (LEARNING_RATE, PARTS)} for s in landscape.trained[3:]]
    assert {BATCH} in added and {WARMUP} in added and {CLIP_NORM} in added and all(len(keys) == 1 for keys in added)


def test_a_higher_rate_than_a_rough_one_is_passed_over():
    landscape = Landscape(lambda s: 2 - rate(s) / 2, lambda s: 0.1)
    run(landscape, learning_rates=(1.5, 2.0), eps_roots=(), warmup_shares=(), clip_norms=(), batch_sizes=())
    assert landscape.drawn == [{}]  # the config's own rate was rough


def test_a_training_that_diverges_does_not_end_the_search():
    landscape = Landscape(lambda s: math.inf if rate(s) == 1 else 1.0 + rate(s), lambda s: 0.9)
    outcome = run(landscape)
    assert outcome.trials[0].trained.failure and outcome.proposed.setting == {LEARNING_RATE: 0.25}
    assert outcome.limit == pytest.approx(1.25 * 1.05)  # of the least loss, where the config's own has none


def test_the_budget_counts_what_larger_batches_cost():
    landscape = Landscape(lambda s: 1.0, lambda s: 0.5)
    for budget in (41, 60, 100, 139):
        outcome = run(landscape, budget=budget)
        assert outcome.stopped_by_budget and outcome.spent <= budget
    whole = run(landscape, budget=140)
    # the config's own; both rates; two warmups, two of eps_root, a clip norm; twice the batch
    assert not whole.stopped_by_budget and whole.spent == 41 + 2 * 11 + 5 * 11 + 2 * 11


def test_values_that_the_config_cannot_use_are_left_out():
    config = make_config(eps_roots=(1e-8, 1e-14), warmup_shares=(0.1, 0.3), batch_sizes=(2, 20), clip_norms=(0.0, 1.0))
    changes = list_changes(config, num_examples=100)
    assert changes[EPS_ROOT] == [{EPS_ROOT: 1e-8}]
    assert changes[BATCH] == [{BATCH: 16, PARTS: 2}]
    assert changes[CLIP_NORM] == [{CLIP_NORM: 1.0}]
    assert [change[WARMUP] for change in changes[WARMUP]] == [0.1, 0.3]
    sgd = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="sgd", warmup_ratio=0.2))
    changes = list_changes(sgd, num_examples=100)
    assert EPS_ROOT not in changes and changes[WARMUP] == [{WARMUP: 0.3}] and "arrays.activation" not in changes
    setting = {LEARNING_RATE: 0.25, BATCH: 16, PARTS: 2}
    assert apply_setting(config, setting).train.gradient_accumulation_steps == 2
    assert format_flags(setting) == (
        "--optimizer.learning-rate 0.25 --train.global-batch-size 16 --train.gradient-accumulation-steps 2"
    )
