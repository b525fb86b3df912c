"""Policy-gradient losses: against REINFORCE, a slow reference, and a divergence that is summed over all responses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.losses.policy import policy_losses, policy_terms
from bilevel_jax.lm.losses.sft import token_losses

pytestmark = pytest.mark.usefixtures("x64")
VOCAB, WIDTH = 7, 4
MODEL = SimpleNamespace(  # the next token by the last one alone
    hidden=lambda params, tokens, positions, segments: params["rows"][tokens], head=lambda params: params["head"]
)


def init(seed):
    rows, head = np.random.default_rng(seed).normal(size=(2, VOCAB, WIDTH))
    with jax.enable_x64(True):
        return {"rows": jnp.asarray(rows), "head": jnp.asarray(head.T)}


def log_probs(params, ids, first):
    """log pi of the tokens from `first` on, one after the other."""
    table = jax.nn.log_softmax(params["rows"] @ params["head"])
    return jnp.array([table[ids[at - 1], ids[at]] for at in range(first, len(ids))])


PARAMS, START = init(0), init(1)
SEQUENCES = [([1, 5, 6, 2, 3], 2), ([1, 4, 2], 1), ([2, 6, 6, 6, 0, 1], 3)]
ADVANTAGES = [np.array([1.0, -2.0, 0.5]), np.array([-1.0, 3.0]), np.array([2.0, 2.0, -1.0])]


def batch_of(sampler, packing=False):
    """One micro-batch; `sampler` gives log q of the tokens of each response."""
    rows, flat, advantages = [], [], []
    for (ids, first), own, values in zip(SEQUENCES, sampler, ADVANTAGES, strict=True):
        rows.append(TokenizedSequence(np.array(ids), np.arange(len(ids)) >= first))
        flat += [np.full(first, np.nan), np.asarray(own)]
        advantages += [np.zeros(first), values]
    corpus = corpus_from_sequences(rows).with_sampler_log_probs(np.concatenate(flat), np.ones(len(rows)))
    corpus = corpus.with_advantages(np.concatenate(advantages))
    shape = batches.fit_evaluation_batch_shape(corpus, 3, num_micro_batches=1, length=12, packing=packing)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches.make_evaluation_stream(corpus, shape).batch(0))


def own_samples(params):
    return [np.asarray(log_probs(params, ids, first)) for ids, first in SEQUENCES]


@pytest.mark.parametrize("reduction", ["example_mean", "token_sum"])
def test_where_the_model_is_the_sampler_the_gradient_is_that_of_reinforce(reduction):
    def reinforce(params):
        terms = [
            -jnp.asarray(values) * log_probs(params, ids, first)
            for (ids, first), values in zip(SEQUENCES, ADVANTAGES, strict=True)
        ]
        return sum(own.mean() if reduction == "example_mean" else own.sum() for own in terms)

    batch = batch_of(own_samples(PARAMS))
    exact = -token_losses(MODEL, 1024)(PARAMS, batch)  # a batch holds log q in float32
    batch["sampler"] = jnp.where(jnp.isfinite(batch["sampler"]), exact, jnp.nan)
    ours = jax.grad(lambda params: policy_losses(MODEL, reduction=reduction)(params, None, batch).sum())(PARAMS)
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.grad(reinforce)(PARAMS)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_ratios_are_clipped_where_that_is_the_smaller_and_the_penalty_is_added():
    sampler = [own + np.linspace(-0.8, 0.8, len(own)) for own in own_samples(PARAMS)]
    batch, eps, beta = batch_of(sampler), 0.2, 0.3
    expected = []
    for (ids, first), q, values in zip(SEQUENCES, sampler, ADVANTAGES, strict=True):
        own = np.asarray(log_probs(PARAMS, ids, first))
        ratio, d = np.exp(own - q), own - np.asarray(log_probs(START, ids, first))
        gain = np.minimum(ratio * values, np.clip(ratio, 1 - eps, 1 + eps) * values)
        expected.append((-gain + beta * ratio * d**2 / 2).mean())
    losses = policy_losses(MODEL, max_ratio_change=eps, kl_coefficient=beta, reduction="example_mean")
    np.testing.assert_allclose(losses(PARAMS, START, batch), expected, rtol=1e-6)
    packed = batch_of(sampler, packing=True)
    assert packed["tokens"].shape[0] < batch["tokens"].shape[0]
    np.testing.assert_allclose(losses(PARAMS, START, packed), expected, rtol=1e-6)
    terms = policy_terms(MODEL, max_ratio_change=eps, with_kl=False)(PARAMS, None, batch)
    slope = jax.grad(
        lambda params: policy_terms(MODEL, max_ratio_change=eps, with_kl=False)(params, None, batch).surrogate.sum()
    )
    assert 0 < terms.is_clipped.sum() < 8 and np.isfinite(jax.tree.leaves(slope(PARAMS))[0]).all()


@pytest.mark.parametrize("drawn_by", ["the model", "another"])
def test_the_penalty_has_the_slope_of_the_divergence(drawn_by):
    """sum_y q(y) grad of the penalty = grad KL(pi, pi_0), by every next token after one prompt; so for the value."""

    def table(params):
        return jax.nn.log_softmax(params["rows"] @ params["head"])[1]

    def divergence(params):
        return (jnp.exp(table(params)) * (table(params) - table(START))).sum()

    sampler = np.asarray(table(PARAMS if drawn_by == "the model" else init(2)))
    rows = [TokenizedSequence(np.array([1, token]), np.array([False, True])) for token in range(VOCAB)]
    corpus = corpus_from_sequences(rows).with_sampler_log_probs(
        np.stack([np.full(VOCAB, np.nan), sampler], 1).ravel(), np.ones(VOCAB)
    )
    corpus = corpus.with_advantages(np.zeros(2 * VOCAB))
    shape = batches.fit_evaluation_batch_shape(corpus, VOCAB, num_micro_batches=1, length=2, packing=False)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches.make_evaluation_stream(corpus, shape).batch(0))
    batch["sampler"] = jnp.asarray(sampler)[batch["targets"]]
    order = batch["targets"][jnp.arange(VOCAB), 0]

    def penalty(params):
        return (jnp.exp(sampler[order]) * policy_losses(MODEL, kl_coefficient=1.0)(params, START, batch)).sum()

    ours, wanted = jax.grad(penalty)(PARAMS), jax.grad(divergence)(PARAMS)
    for got, right in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-12)
    terms = policy_terms(MODEL, max_ratio_change=0.2, with_kl=True)(PARAMS, START, batch)
    np.testing.assert_allclose((np.exp(sampler[order]) * terms.kl[:, 0]).sum(), divergence(PARAMS), rtol=1e-12)


def test_a_ratio_that_overflows_leaves_a_finite_slope():
    sampler = [own - 200.0 for own in own_samples(PARAMS)]
    slope = jax.grad(lambda params: policy_losses(MODEL)(params, None, batch_of(sampler)).sum())(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_what_it_cannot_read_is_refused():
    batch = batch_of(own_samples(PARAMS))
    with pytest.raises(ValueError, match="max_ratio_change is 0"):
        policy_losses(MODEL, max_ratio_change=0)
    with pytest.raises(ValueError, match="kl_coefficient is -1"):
        policy_losses(MODEL, kl_coefficient=-1)
    with pytest.raises(ValueError, match="no `advantages`"):
        policy_losses(MODEL)(PARAMS, None, {key: leaf for key, leaf in batch.items() if key != "advantages"})
    with pytest.raises(ValueError, match="there are none"):
        policy_losses(MODEL, kl_coefficient=0.1)(PARAMS, None, batch)
    with pytest.raises(ValueError, match=r"advantages \(2,\) for 3 tokens"):
        corpus_from_sequences([TokenizedSequence(np.arange(3), np.arange(3) > 0)]).with_advantages(np.zeros(2))
