"""Derivatives by the factors of tokens: their sums, finite differences by another path, packing, and errors."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.core.checkpointing import NO_CHECKPOINTS
from bilevel_jax.core.training import init_train_state, train
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.runs.infra.placement import place_table, replicate_unplaced
from bilevel_jax.runs.scoring.token_hypergradients import compute_token_hypergradients
from tests.language_model.conftest import SMALL

ADAMW = optax.adamw(1e-2, eps_root=1e-6)
WEIGHTS = np.array([1.0, 0.5, 2.0, 1.0, 0.0, 1.5, 1.0, 0.7])


@pytest.fixture(scope="module")
def lm64(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    config = models.read_config(cipher.make_cipher_config() | SMALL)
    models.save_model(
        folder, config, models.init_params(config, jax.random.key(0)), tokenizer=cipher.make_cipher_tokenizer()
    )
    with jax.enable_x64(True):
        return bj.lm.load(folder, dtype="float64")


@pytest.fixture(scope="module")
def rows():
    return bj.lm.builtin_rows("cipher", sizes={"clean": 4, "wrong": 2, "noise": 2})


@pytest.fixture(scope="module")
def held_out():
    return bj.lm.builtin_rows("cipher", "validation", sizes={"clean": 4, "wrong": 2, "noise": 2, "validation": 5})


@pytest.fixture(scope="module")
def found(lm64, rows, held_out):
    with jax.enable_x64(True):
        result = lm64.finetune(rows, held_out, ADAMW, steps=5, batch_size=4, weights=WEIGHTS, seed=3)
        return result, result.token_hypergradients()


def test_the_tokens_of_an_example_sum_to_its_weight_times_its_hypergradient(found, lm64):
    result, tokens = found
    assert tokens.examples.dtype == np.float64 and tokens.validation_loss == pytest.approx(result.value, rel=1e-13)
    np.testing.assert_allclose(tokens.examples, result.grad, rtol=1e-10, atol=1e-14)
    sums = [np.nansum(values) for values in tokens.values]
    np.testing.assert_allclose(sums, WEIGHTS * result.grad, rtol=1e-10, atol=1e-14)
    corpus = result.tuning.task.corpus
    for row, (ids, values) in enumerate(zip(tokens.tokens, tokens.values, strict=True)):
        first, last = corpus.offsets[row : row + 2]
        assert ids.tolist() == corpus.ids[first:last].tolist()
        assert (np.isfinite(values) == corpus.target_mask[first:last]).all() and 0 < np.isfinite(values).sum() < len(
            ids
        )


@pytest.mark.parametrize("row", (0, 2))
def test_it_equals_finite_differences_through_weights_of_the_corpus(found, row):
    """Central differences by the ordinary path: token weights of the corpus, and the training step without factors.

    The weights of a batch are float32, so the step is one that float32 holds.
    """
    result, tokens = found
    task, step = result.tuning.task, 2.0**-14
    first = int(task.corpus.offsets[row])
    with jax.enable_x64(True):
        table = place_table(task.mesh, WEIGHTS)
        for place in np.flatnonzero(np.isfinite(tokens.values[row]))[[0, -1]]:

            def value(factor, place=first + int(place)):
                factors = np.ones(len(task.corpus.ids), np.float32)
                factors[place] = factor
                other = task._replace(corpus=dataclasses.replace(task.corpus, token_weights=factors))
                state = replicate_unplaced(task.mesh, init_train_state(task.optimizer, task.init_params(0)))
                frozen = task.frozen(state.params)
                stream = other.training_stream(3, packed=False)
                run = train(task.train_step, state, table, frozen, stream, plan=NO_CHECKPOINTS)
                return float(
                    validation_loss_fn(task.problem)(run.end.params, frozen, task.held_out_streams["validation"])
                )

            slope = (value(1 + step) - value(1 - step)) / (2 * step)
            assert slope == pytest.approx(tokens.values[row][place], rel=1e-5)


def test_pairs_have_no_tokens_of_their_own_and_other_solvers_no_run(lm64, rows, held_out):
    with jax.enable_x64(True):
        plain = lm64.finetune(rows, held_out, ADAMW, steps=1, batch_size=4, solver=None)
        with pytest.raises(ValueError, match="solver is None; token hypergradients go back .* solver='unroll'"):
            plain.token_hypergradients()
        task = plain.tuning.task
        corpus = dataclasses.replace(task.corpus, offsets=np.array([0, 3, 6]), sequences_per_example=2)
        with pytest.raises(ValueError, match="preference pairs have no loss of a single token"):
            compute_token_hypergradients(task._replace(corpus=corpus), np.ones(1), {}, None, None, plan=NO_CHECKPOINTS)
