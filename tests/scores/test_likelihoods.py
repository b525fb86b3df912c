"""Scores from a row's own likelihood, one-shot scores, and what they ask: the tokens of training, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences, tokenize
from bilevel_jax.lm.inference import loglik
from bilevel_jax.lm.losses.sft import sft_losses
from bilevel_jax.lm.models import init_params, make_decoder
from bilevel_jax.scores.demonstrations import demonstration_selector
from bilevel_jax.scores.incontext import ica_score
from bilevel_jax.scores.margin import el2n, token_el2n
from bilevel_jax.scores.oneshot import oneshot_score
from bilevel_jax.scores.perplexity import loss_score, perplexity_score, reducible_loss
from bilevel_jax.scores.random import random_score
from bilevel_jax.scores.requests import make_tokenized_examples, take_examples
from tests.lm.data.test_tokens import CHATML, PAIR, TALK, bpe, example
from tests.lm.pairs_and_rows import TINY, VOCAB
from tests.scores.toy import PLAIN, engine, ids, log_p, rows, scores

MODEL = make_decoder(TINY, remat="none")
HOLDOUT = rows(("name a pet", "cat"), ("name a fish", "cod"), ("what is a tree", "oak"), ("what is red", "wine"))
ROWS = rows(("name a cat", "tac"), ("is a tree red", "zzz"), ("what is a fish", "doc"), ("xylo", "queue"))


def batch_of(corpus):
    layout = batches.fit_evaluation_batch_shape(
        corpus, corpus.num_examples, num_micro_batches=1, length=batches.padded_max_length(corpus), packing=False
    )
    batch = batches.make_evaluation_stream(corpus, layout).batch(0)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


def talks(seed=0):
    """Rows with one, two and three runs of targets."""
    rng = np.random.default_rng(seed)
    masks = ["0011", "0110011", "01", "001011011", "0001111"]
    tokens = [rng.integers(0, VOCAB, len(mask)).astype(np.int32) for mask in masks]
    corpus = corpus_from_sequences(
        [TokenizedSequence(t, np.array([*map(int, m)], bool)) for t, m in zip(tokens, masks, strict=True)]
    )
    return make_tokenized_examples([example(f"{i}", "x", line=i) for i in range(len(masks))], corpus)


def test_loss_is_that_of_training(params):
    some = talks()
    asked, reader = loss_score(some, some), loglik.make_loglik_scorer(MODEL, bucket_lengths=[16])
    answers = reader.score(params, asked.requests)
    trained = np.asarray(jax.jit(sft_losses(MODEL))(params, batch_of(some.corpus)))
    assert [len(asked.requests), asked.num_holdout_wanted] == [8, 0]
    np.testing.assert_allclose(asked.combine(answers), trained, atol=1e-5)
    np.testing.assert_allclose(perplexity_score(some, some).combine(answers), -np.exp(trained), rtol=1e-5)


def test_in_context_scores_do_not_depend_on_batches_or_on_what_is_shared(params):
    asked = ica_score(PLAIN, demonstration_selector("fixed"), k=2, max_length=TINY.max_length)(ROWS, HOLDOUT)
    readers = (
        loglik.make_loglik_scorer(MODEL, bucket_lengths=[64], share_prefixes=False),
        loglik.make_loglik_scorer(MODEL, bucket_lengths=[32, 64], max_batch_tokens=128),
    )
    whole, shared = (asked.combine(reader.score(params, asked.requests)) for reader in readers)
    assert np.abs(whole).min() > 1e-4
    np.testing.assert_allclose(shared, whole, atol=1e-5)


def test_requests_hold_the_tokens_of_the_tokenizer():
    tokenizer = bpe(CHATML)
    corpus, _ = tokenize([TALK, PAIR], tokenizer, max_length=99)
    asked = loss_score(make_tokenized_examples([TALK, PAIR], corpus), make_tokenized_examples([], corpus)).requests
    assert [tokenizer.decode(request.response) for request in asked] == [
        "A cat<|eot|>",
        "The cat\nis it.<|eot|>",
        "A cat, 猫!<|eot|>",
    ]
    assert [*asked[1].prefix, *asked[1].response] == corpus.get_sequence(0).ids.tolist()
    assert all(request.prefix.count(tokenizer.bos_token_id) == 1 for request in asked)


def test_loss_and_perplexity_of_a_pair_are_those_of_the_chosen_response():
    pairs = rows(("name a cat", "tac", "zzzz"))
    assert scores(loss_score, pairs, HOLDOUT) == scores(loss_score, rows(("name a cat", "tac")), HOLDOUT)


def test_reducible_is_the_difference_of_two_models():
    plan = loss_score(ROWS, HOLDOUT)
    answers = engine(plan.requests)
    better = [answer._replace(nats=answer.nats / 2) for answer in answers]
    np.testing.assert_allclose(reducible_loss(ROWS, answers, better), plan.combine(answers) / 2, rtol=1e-12)
    np.testing.assert_array_equal(reducible_loss(ROWS, answers, answers), 0)


def test_one_shot_counts_the_holdout_rows_that_become_likelier():
    plan = oneshot_score(PLAIN, max_length=99)(ROWS, HOLDOUT)
    anchors = [(ids(e.turns[0].content), ids(e.turns[1].content)) for e in HOLDOUT.examples]
    shown = [[0, *ids(e.turns[0].content), *ids(e.turns[1].content)] for e in ROWS.examples]
    expected = [np.mean([log_p(y, [*row, *x]) > log_p(y, [0, *x]) for x, y in anchors]) for row in shown]
    found = plan.combine(engine(plan.requests))
    assert found.tolist() == expected and len(set(expected)) > 1
    assert plan.num_holdout.tolist() == [4] * 4 and plan.num_holdout_wanted == 4 and len(plan.requests) == 4 + 16


def test_one_shot_leaves_out_copies_near_duplicates_and_what_does_not_fit():
    some = rows(("name a pet", "hat"), ("name a fish", "cod"), ("x" * 60, "y"), ("abc", "d"))
    asked = oneshot_score(PLAIN, max_length=40)(some, HOLDOUT)
    assert asked.num_holdout.tolist() == [3, 3, 0, 4]
    found = asked.combine(engine(asked.requests))
    assert np.isnan(found[2]) and np.isfinite(found[[0, 1, 3]]).all()
    with pytest.raises(ValueError, match="0 holdout rows, and k = 1 of them are to be shown"):
        oneshot_score(PLAIN, max_length=40)(some, take_examples(HOLDOUT, np.arange(0)))


def test_random_scores_are_uniform_and_follow_the_row():
    many = rows(*[(f"{a}{b}{c}", "x") for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz"])
    drawn = scores(random_score(3), many, HOLDOUT)
    assert abs(drawn.mean() - 0.5) < 4 * 12**-0.5 / len(drawn) ** 0.5 and drawn.min() >= 0 and drawn.max() < 1
    order = np.random.default_rng(0).permutation(len(drawn))
    np.testing.assert_array_equal(scores(random_score(3), take_examples(many, order), HOLDOUT), drawn[order])
    assert abs(np.corrcoef(drawn, scores(random_score(4), many, HOLDOUT))[0, 1]) < 4 / len(drawn) ** 0.5


EVERY = {
    "loss": loss_score,
    "perplexity": perplexity_score,
    "random": random_score(0),
    "oneshot": oneshot_score(PLAIN, max_length=99),
}


@pytest.mark.parametrize("score", EVERY.values(), ids=EVERY.keys())
def test_permuting_rows_permutes_scores_and_one_row_is_enough(score):
    order = np.array([2, 0, 3, 1])
    whole = scores(score, ROWS, HOLDOUT)
    np.testing.assert_array_equal(scores(score, take_examples(ROWS, order), HOLDOUT), whole[order])
    np.testing.assert_array_equal(scores(score, take_examples(ROWS, order[:1]), HOLDOUT), whole[2:3])


def test_answers_must_be_as_many_as_requests():
    with pytest.raises(ValueError, match="3 answers to 4 requests; give one for each, in their order"):
        loss_score(ROWS, HOLDOUT).combine(engine(loss_score(ROWS, HOLDOUT).requests)[:3])
    with pytest.raises(ValueError, match="4 examples from row 1 of a corpus of 4"):
        make_tokenized_examples(ROWS.examples, ROWS.corpus, first_row=1)


def test_el2n_is_its_formula_and_lies_between_multiples_of_one_minus_p():
    logits = jnp.asarray(3 * np.random.default_rng(0).normal(size=(50, 7)), jnp.float32)
    labels = jnp.asarray(np.arange(50) % 7)
    p = np.exp(np.asarray(logits, float)) / np.exp(np.asarray(logits, float)).sum(1, keepdims=True)
    expected = np.linalg.norm(p - np.eye(7)[np.arange(50) % 7], axis=1)
    compiled = jax.jit(el2n)
    found = np.asarray(compiled(logits, labels))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32
    miss = 1 - p[np.arange(50), np.arange(50) % 7]
    assert (miss <= expected + 1e-12).all() and (expected <= 2**0.5 * miss + 1e-12).all()
    sure = (
        np.asarray(compiled(jnp.asarray(200 * np.eye(7)[np.arange(50) % 7], jnp.float32), labels)),
        np.asarray(compiled(-logits * 1e3, labels)),
    )
    assert (sure[0] == 0).all() and np.isfinite(sure[1]).all() and sure[1].max() <= 2**0.5 + 1e-6


def test_token_el2n_is_the_mean_over_the_targets(params):
    some = talks()
    batch = batch_of(some.corpus)

    @jax.jit
    def both(params, batch):
        hidden = MODEL.hidden(params, batch["tokens"], batch["positions"], batch["segments"])
        return token_el2n(MODEL, chunk=8)(params, batch), el2n(hidden @ MODEL.head(params), batch["targets"])

    found, each = both(params, batch)
    expected = [np.asarray(each)[np.asarray(batch["slot"]) == i].mean() for i in range(len(some.examples))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32
