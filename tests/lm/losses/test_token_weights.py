"""Losses with weights of tokens: closed forms, layouts, weights of one, slopes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core.problem import weighted
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.losses.importance import importance_weighted_losses
from bilevel_jax.lm.losses.sft import (
    LOSS_REDUCTIONS,
    assemble_params,
    sequence_log_likelihoods,
    sft_composite_loss,
    sft_losses,
    token_accuracy,
)
from bilevel_jax.lm.models import init_lora, init_params
from tests.lm.losses.test_sft import MODEL, TINY

RNG = np.random.default_rng(0)
LENGTHS = (3, 9, 5, 7, 4, 8)
IDS = [RNG.integers(0, TINY.vocab_size, n).astype(np.int32) for n in LENGTHS]
MASKS = [np.arange(n) >= n // 2 for n in LENGTHS]
WEIGHTS = [RNG.uniform(0.1, 3, n).astype(np.float32) for n in LENGTHS]


def make_corpus(weights):
    return corpus_from_sequences([TokenizedSequence(*row) for row in zip(IDS, MASKS, weights, strict=True)])


CORPUS, PLAIN = make_corpus(WEIGHTS), make_corpus([None] * len(IDS))


def micro_batches(corpus, *, num_micro_batches=1, packing=False):
    order = batches.sequential_order(corpus.kept_indices, corpus.num_examples, len(LENGTHS))
    shape = batches.fit_batch_shape(corpus, [order], 1, num_micro_batches=num_micro_batches, length=16, packing=packing)
    stream = batches.make_train_stream(corpus, order, 1, shape)
    return [jax.tree.map(lambda leaf, m=m: jnp.asarray(leaf[m]), stream.batch(0)) for m in range(num_micro_batches)]


@cache
def compiled_losses(reduction):
    return jax.jit(sft_losses(MODEL, reduction=reduction))


def losses_of(params, corpus, reduction, **layout):
    return np.concatenate([compiled_losses(reduction)(params, batch) for batch in micro_batches(corpus, **layout)])


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def nats_by_hand(params):
    """-log p of each target of each example, from logits over the whole sequence."""
    outputs = sft_composite_loss(MODEL, frozen_head=False).outputs
    (batch,) = micro_batches(PLAIN)
    log_probs = np.asarray(jax.nn.log_softmax(outputs(params, None, batch)))
    return [
        -log_probs[i, np.arange(n - 1), ids[1:]][mask[1:]]
        for i, (n, ids, mask) in enumerate(zip(LENGTHS, IDS, MASKS, strict=True))
    ]


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_each_reduction_is_its_formula(reduction, x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    sums = [(w[1:][m[1:]] * n).sum() for w, m, n in zip(WEIGHTS, MASKS, nats_by_hand(params), strict=True)]
    counts = np.array([mask[1:].sum() for mask in MASKS])  # tokens, not weights
    expected = {
        "example_mean": sums / counts,
        "token_sum": np.array(sums),
        "token_mean": np.array(sums) * len(LENGTHS) / counts.sum(),
    }[reduction]
    assert relative(losses_of(params, CORPUS, reduction), expected) < 1e-7  # the batch holds weights in float32


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_packed_is_unpacked_and_split_is_whole(reduction, x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    whole = losses_of(params, CORPUS, reduction)
    assert relative(whole, losses_of(params, PLAIN, reduction)) > 0.1
    for layout in ({"packing": True}, {"num_micro_batches": 3}, {"num_micro_batches": 2, "packing": True}):
        assert relative(losses_of(params, CORPUS, reduction, **layout), whole) < 1e-12  # float64, other order of sums


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_weights_of_one_are_none_bit_for_bit(reduction):
    assert make_corpus([np.ones(n) for n in LENGTHS]).token_weights is None
    params = init_params(TINY, jax.random.key(0))
    (batch,) = micro_batches(PLAIN)
    assert "token_weights" not in batch
    with_ones = batch | {"token_weights": jnp.ones(batch["tokens"].shape)}
    for losses in (
        sft_losses(MODEL, reduction=reduction),
        importance_weighted_losses(MODEL, ratio="none", reduction=reduction),
    ):
        run = jax.jit(jax.value_and_grad(lambda params, batch, losses=losses: losses(params, batch).sum()))
        for ours, plain in zip(*(jax.tree.leaves(run(params, one)) for one in (with_ones, batch)), strict=True):
            np.testing.assert_array_equal(ours, plain)


def test_the_slope_along_a_weight_is_the_loss_of_its_token(x64):
    """d Σ_i w_i loss_i / d v_t = w_i n_t / |y_i|; and a gradient by parameters is that of finite differences."""
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    (batch,) = micro_batches(CORPUS)
    batch["token_weights"] = batch["token_weights"].astype(jnp.float64)
    example_weights = jnp.arange(1.0, 7.0)
    losses = sft_losses(MODEL)

    def total(params, token_weights):
        return example_weights @ losses(params, batch | {"token_weights": token_weights})

    slopes = np.asarray(jax.grad(total, 1)(params, batch["token_weights"]))
    is_target = np.asarray(batch["slot"]) < len(LENGTHS)
    nats = nats_by_hand(params)
    expected = np.concatenate([w * n / len(n) for w, n in zip(example_weights, nats, strict=True)])
    assert relative(slopes[is_target], expected) < 1e-12 and not slopes[~is_target].any()
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    v = jax.random.normal(jax.random.key(1), flat.shape)
    step = 1e-5
    along = [total(unravel(flat + s * v), batch["token_weights"]) for s in (step, -step)]
    grad = jax.flatten_util.ravel_pytree(jax.grad(total)(params, batch["token_weights"]))[0]
    assert abs((along[0] - along[1]) / (2 * step) - grad @ v) < 1e-6 * abs(grad @ v)  # central differences: step²


@pytest.mark.parametrize("frozen_head", [True, False])
def test_the_composite_loss_reads_the_same_weights(frozen_head, x64):
    base = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    adapters = init_lora(TINY, jax.random.key(1), rank=2, alpha=4, dtype=jnp.float64)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    (batch,) = micro_batches(CORPUS, packing=True)
    composite = sft_composite_loss(MODEL, frozen_head=frozen_head, reduction="token_mean")
    ours = composite.link(composite.outputs(adapters, base, batch), base, batch)
    assert relative(ours, sft_losses(MODEL, reduction="token_mean")(assemble_params(adapters, base), batch)) < 1e-12


def test_importance_ratios_keep_the_weights_of_tokens(x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    nats = nats_by_hand(params)
    sampled = np.full(len(CORPUS.ids), np.nan)
    sampled[CORPUS.target_mask] = -np.concatenate(nats)  # the sampler is the model: every ratio is 1
    corpus = CORPUS.with_sampler_log_probs(sampled, np.ones(len(LENGTHS)))
    (batch,) = micro_batches(corpus)
    plain = sft_losses(MODEL)(params, batch)
    for ratio in ("token", "sequence", "none"):
        assert relative(importance_weighted_losses(MODEL, ratio=ratio)(params, batch), plain) < 1e-6  # q is float32


def test_likelihoods_and_accuracies_read_no_weights():
    params = init_params(TINY, jax.random.key(0))
    for measure in (sequence_log_likelihoods(MODEL), token_accuracy(MODEL)):
        ours, plain = (measure(params, micro_batches(corpus)[0]) for corpus in (CORPUS, PLAIN))
        np.testing.assert_array_equal(ours, plain)


def llama_factory_step(nats, token_weights, batch_of):
    """The loss of a step in LLaMA-Factory's v1 SFT trainer, restated from its source (commit ff6d4d1, August 2026).

    A micro-batch is Σ v n / (Σ v + 1e-6) over its tokens, weights of what is no target being 0; a step is the mean of
    its micro-batches by their number of labels. One weight for each message, which an example's multiplies.
    """
    totals = np.array([len(n) for n in nats])
    step = 0.0
    for rows in batch_of:
        weights, losses = (np.concatenate([parts[i] for i in rows]) for parts in (token_weights, nats))
        micro = (losses * weights).sum() / (weights.sum() + 1e-6)
        step += micro * totals[rows].sum() / (totals.sum() + 1e-6)
    return step


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_a_step_is_that_of_llama_factory_where_the_weights_of_its_tokens_have_mean_one(num_micro_batches, x64):
    """Its denominator is the sum of the weights in a micro-batch, ours the number of tokens in the step."""
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    nats = nats_by_hand(params)
    example_weights = np.array([0.5, 2.0, 1.0, 0.25, 3.0, 1.5])
    rows = np.arange(len(LENGTHS)).reshape(num_micro_batches, -1)
    raw = [w[1:][m[1:]].astype(float) for w, m in zip(WEIGHTS, MASKS, strict=True)]
    means = np.zeros(len(LENGTHS))  # of weight times weight over the tokens of each micro-batch
    for part in rows:
        means[part] = np.concatenate([example_weights[i] * raw[i] for i in part]).mean()
    theirs = llama_factory_step(nats, [example_weights[i] * raw[i] for i in range(len(LENGTHS))], rows)
    problem = weighted(lambda params, frozen, batch: compiled_losses("token_mean")(params, batch))

    def our_step(weights):
        split = micro_batches(CORPUS, num_micro_batches=num_micro_batches)
        return sum(problem.inner(params, jnp.asarray(weights)[batch["index"]], None, batch) for batch in split)

    assert abs(our_step(example_weights / means) - theirs) <= 1e-6 * abs(theirs)
    assert abs(our_step(example_weights) - theirs) > 0.1 * abs(theirs)
