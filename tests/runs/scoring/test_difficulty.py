"""Weights that merely order examples by length or loss are told, and no others."""

import math

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.scoring import difficulty
from bilevel_jax.runs.scoring.difficulty import Difficulty, measure_difficulty
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.text import prepare_text_task

RNG = np.random.default_rng(0)
LENGTHS, LOSSES = RNG.integers(3, 90, 50), RNG.normal(2.0, 0.5, 50)
KNOWN = Difficulty(LENGTHS, np.where(np.arange(50) == 7, np.nan, LOSSES), np.delete(np.arange(50), 7))


def test_correlations_are_those_of_scipy_over_the_examples_that_train():
    weights = RNG.random(50)
    found = KNOWN.correlate(weights)
    kept = KNOWN.rows
    assert found.length == pytest.approx(spearmanr(weights[kept], LENGTHS[kept]).statistic)
    assert found.loss == pytest.approx(spearmanr(weights[kept], LOSSES[kept]).statistic)
    holes = KNOWN.correlate(np.where(np.arange(50) < 9, np.nan, weights))
    assert holes.num_examples == 41 and holes.length == pytest.approx(spearmanr(weights[9:], LENGTHS[9:]).statistic)
    assert found.num_examples == 49 and found.describe("the weights") == ""


CASES = {
    "the longest": (LENGTHS**2, ["length in tokens (+1.00)", "the longest come first"]),
    "the shortest": (-LENGTHS, ["length in tokens (−1.00)", "the shortest come first"]),
    "the hardest": (np.exp(LOSSES), ["loss before training (+1.00)", "the hardest come first"]),
    "the easiest": (-LOSSES, ["loss before training (−1.00)", "the easiest come first"]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_order_by_length_or_loss_is_told_in_one_sentence(name):
    values, words = CASES[name]
    told = KNOWN.correlate(values).describe("the weights")
    assert told.startswith("The weights order the examples nearly by") and all(word in told for word in words)
    assert told.count("length in tokens") in (0, 2) and "nan" not in told


def test_remedies_are_told_for_each_measure_that_is_large_and_could_be_set():
    both = difficulty.DifficultyCorrelation(-0.9, -0.95, 50)
    of_length = "selection.strata: length selects the best of each group of like length"
    of_loss = "selection.strata: loss selects the best of each group of like loss"
    alone = "alone, and with random examples"
    assert both.describe("w", ["length", "loss"]).endswith(f"{alone}; {of_length}; {of_loss}.")
    assert both.describe("w", ["loss"]).endswith(f"{alone}; {of_loss}.")
    assert both.describe("w").endswith(f"{alone}.")
    only_length = both._replace(loss=0.1)
    assert only_length.describe("w", ["length", "loss"]).endswith(f"{alone}; {of_length}.")
    assert only_length.to_json("w", ["loss"])["sentence"].endswith(f"{alone}.")


def test_what_is_not_told():
    assert KNOWN.correlate(np.ones(50)).to_json("the weights") == {"length": None, "loss": None, "sentence": ""}
    assert Difficulty(None, np.full(20, np.nan), np.arange(20)).correlate(np.ones(20)).num_examples == 0
    few = KNOWN._replace(rows=np.arange(9))
    assert few.correlate(LENGTHS).length == pytest.approx(1) and few.correlate(LENGTHS).describe("w") == ""
    assert math.isnan(KNOWN._replace(lengths=None).correlate(LENGTHS).length)
    mixed = LENGTHS + 30 * RNG.normal(size=50)
    assert abs(KNOWN.correlate(mixed).length) < difficulty.LARGE_CORRELATION
    assert KNOWN.correlate(mixed).describe("the weights") == ""


def test_lengths_and_losses_are_those_of_the_task(made, tmp_path):
    config = load_config(SelectConfig, made / "select.yaml")
    text = splits.load_splits(config.data)
    task = prepare_text_task(config, text, tmp_path, num_steps=2, seeds=[0])
    params = task.init_params(0)
    found = measure_difficulty(task, params)
    offsets = task.corpus.offsets[: len(text.train) + 1].tolist()
    assert found.lengths.tolist() == [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    stream = task.full_pass_stream(0)
    batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(0))
    index, losses = np.asarray(batch["index"]), task.objective.losses(params, task.frozen(params), batch)
    real = index >= 0
    np.testing.assert_allclose(found.losses[index[real]], np.asarray(losses)[real], rtol=1e-5)
