"""Losses of self-sampled responses: against the field they are the potential of, slow references, and the identity."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import single_loop
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.types import PADDING, Stream
from bilevel_jax.core.unrolled import unrolled_estimator
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.tokens import TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.losses import sft
from bilevel_jax.lm.losses.importance import DEFAULT_MAX_RATIO, importance_weighted_losses
from bilevel_jax.runs.config.schema import OptimizerSection
from bilevel_jax.runs.tasks.optimizers import build_optimizer

pytestmark = pytest.mark.usefixtures("x64")
VOCAB, WIDTH, G = 11, 4, 3
MODEL = SimpleNamespace(  # the next token by the last one alone: what losses do with a model needs no attention
    hidden=lambda params, tokens, positions, segments: params["rows"][tokens], head=lambda params: params["head"]
)


def init(seed):
    rows, head = np.random.default_rng(seed).normal(size=(2, VOCAB, WIDTH))
    return {"rows": jnp.asarray(rows), "head": jnp.asarray(head.T)}


@pytest.fixture
def params():
    """(the model that sampled, another not far away)."""
    return init(0), jax.tree.map(lambda a, b: a + 0.4 * b, init(0), init(1))


def corpus(seed=0):
    """Three offline examples, then three responses to one question, with log-probabilities from -5 to -0.1."""
    random = np.random.default_rng(seed)
    rows, sampler = [], []
    for number in range(6):
        prompt = [1, 5] if number >= 3 else [1, 2 + number, 4]
        response = random.integers(3, 11, size=2 + number % 3).tolist()
        rows.append(TokenizedSequence(np.array(prompt + response), np.arange(len(prompt + response)) >= len(prompt)))
        own = random.uniform(-5, -0.1, size=len(response)) if number >= 3 else np.full(len(response), np.nan)
        sampler.append(np.concatenate([np.full(len(prompt), np.nan), own]))
    base = np.array([1, 1, 1, 1 / G, 1 / G, 1 / G]) * 6 / 4
    return corpus_from_sequences(rows).with_sampler_log_probs(np.concatenate(sampler), base)


DATA = corpus()
LAYOUT = batches.BatchShape(1, 6, 6, batches.padded_max_length(DATA))
BATCH = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches.make_evaluation_stream(DATA, LAYOUT).batch(0))


def tokens_of(params, row):
    """log pi of the targets of one row, by that row alone."""
    ids, supervised, _ = DATA.get_sequence(row)
    log_p = jax.nn.log_softmax(params["rows"][ids[:-1]] @ params["head"])
    return log_p[np.arange(len(ids) - 1), ids[1:]][np.flatnonzero(supervised[1:])]


def sampler_of(row):
    values = np.asarray(DATA.sampler_log_probs[DATA.offsets[row] : DATA.offsets[row + 1]], np.float64)
    return values[np.isfinite(values)]


def test_token_ratios_multiply_the_gradient_of_each_token_and_are_cut(params):
    """Against the field itself: mean over tokens of stop_gradient(min(rho, c)) times the gradient of log pi."""

    def field(p):
        values = []
        for row in range(6):
            log_p = tokens_of(p, row)
            ratio = 1.0 if row < 3 else jnp.minimum(jnp.exp(log_p - sampler_of(row)), DEFAULT_MAX_RATIO)
            values.append(-jnp.mean(jax.lax.stop_gradient(ratio) * log_p))
        return jnp.stack(values)

    ratios = np.concatenate([np.exp(np.asarray(tokens_of(params[1], row)) - sampler_of(row)) for row in (3, 4, 5)])
    assert 0 < (ratios > DEFAULT_MAX_RATIO).sum() < len(ratios)  # both sides of the cut
    mine = jax.jit(jax.jacrev(lambda p: importance_weighted_losses(MODEL)(p, BATCH)))(params[1])
    wanted = jax.jit(jax.jacrev(field))(params[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), mine, wanted)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_bmo_weighs_responses_by_powers_of_their_sequence_ratio(params, tau):
    """softmax((l(phi) - l(theta)) / tau) of summed losses, phi the sampler, is rho^(1/tau) over its mean; at tau = 1
    these are the ratios of `sequence`, and a step of BMO follows the same gradient."""
    sampler, theta = params
    rows = [DATA.get_sequence(row)[:2] for row in (3, 4, 5)]
    log_q = [np.asarray(tokens_of(sampler, row)) for row in (3, 4, 5)]
    stored = [np.concatenate([np.full(len(ids) - len(q), np.nan), q]) for (ids, _), q in zip(rows, log_q, strict=True)]
    responses = corpus_from_sequences([TokenizedSequence(*row) for row in rows])
    responses = responses.with_sampler_log_probs(np.concatenate(stored), np.ones(3))
    layout = batches.BatchShape(1, G, G, batches.padded_max_length(responses))
    batch = batches.make_evaluation_stream(responses, layout).batch(0)
    summed = weighted(lambda p, fixed, batch: sft.sft_losses(MODEL, reduction="token_sum")(p, batch))
    method = single_loop.bmo(
        summed, optax.sgd(1.0), G, reference="snapshot",
        validation_share=optax.constant_schedule(0.0), temperature=optax.constant_schedule(tau),
    )  # fmt: skip
    state = single_loop.replace_reference(method.init(theta), sampler)
    state, metrics = method.step(state, (), batch, batch)
    ratios = np.array([np.exp((tokens_of(theta, row) - q).sum()) for row, q in zip((3, 4, 5), log_q, strict=True)])
    wanted = ratios ** (1 / tau) / np.mean(ratios ** (1 / tau))
    np.testing.assert_allclose(metrics.weights[0], wanted, rtol=1e-6)  # the sampler's log-probabilities are float32
    if tau == 1:
        losses = importance_weighted_losses(
            MODEL, ratio="sequence", responses_per_prompt=G, max_ratio=1e6, reduction="token_sum"
        )
        one = jax.tree.map(lambda leaf: leaf[0], batch)
        slope = jax.grad(lambda p: losses(p, one).mean())(theta)
        moved = jax.tree.map(lambda a, b: a - b, theta, state.train_state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), moved, slope)


def test_second_derivatives_are_those_of_the_field(params):
    """jvp(grad) equals finite differences of the gradient; with the ratio stopped it does not."""
    v = init(2)
    slope = jax.jit(jax.grad(lambda p: importance_weighted_losses(MODEL)(p, BATCH)[3:].sum()))

    def at(step):
        return slope(jax.tree.map(lambda a, b: a + step * b, params[1], v))

    expected = jax.tree.map(lambda a, b: (a - b) / 2e-5, at(1e-5), at(-1e-5))
    mine = jax.jvp(slope, (params[1],), (v,))[1]
    flat, want = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(one)]) for one in (mine, expected))
    assert np.linalg.norm(flat - want) < 1e-6 * np.linalg.norm(want)  # central differences, step 1e-5


def test_unrolled_entries_are_finite_differences(params):
    """Of L_v after three steps of Adam, by the weight of each row: exact through the ratio and its cut."""
    problem = weighted(
        lambda p, fixed, batch: importance_weighted_losses(MODEL)(p, batch),
        outer=lambda p, fixed, batch: sft.sft_losses(MODEL)(p, batch),
    )
    adamw = build_optimizer(OptimizerSection(learning_rate=0.02, warmup_steps=0, schedule="constant", eps_root=1e-6), 3)
    step = train_step(problem, adamw)
    whole = {key: leaf[None] for key, leaf in BATCH.items()}
    stream = Stream(lambda step: whole, 3)
    held = corpus(1)
    validation = jax.tree.map(
        lambda leaf: jnp.asarray(leaf), batches.make_evaluation_stream(held, batches.BatchShape(1, 6, 6, 8)).batch(0)
    )
    start = init_train_state(adamw, params[1])

    def trained(weights):
        return train(step, start, weights, None, stream)

    found = unrolled_estimator(problem, step)(
        trained(jnp.ones(6)), jnp.ones(6), None, stream, Stream(lambda step: validation, 1)
    )

    def value(weights):
        end = trained(weights).end.params
        return float(jnp.mean(sft.sft_losses(MODEL)(end, jax.tree.map(lambda leaf: leaf[0], validation))))

    for row in (0, 3, 4, 5):
        away = jnp.zeros(6).at[row].set(1e-5)
        expected = (value(jnp.ones(6) + away) - value(jnp.ones(6) - away)) / 2e-5
        assert abs(float(found.grad[row]) - expected) < 1e-6 * np.abs(found.grad).max()  # central differences


def test_sequence_ratios_share_a_question_among_its_responses(params):
    logs = np.array([float((tokens_of(params[1], row) - sampler_of(row)).sum()) for row in (3, 4, 5)])
    ratios = np.minimum(np.exp(logs), DEFAULT_MAX_RATIO)
    found = np.asarray(importance_weighted_losses(MODEL, ratio="sequence", responses_per_prompt=G)(params[1], BATCH))
    plain = np.asarray(sft.sft_losses(MODEL)(params[1], BATCH))
    np.testing.assert_allclose(found[:3], plain[:3])
    np.testing.assert_allclose(found[3:], plain[3:] * G * ratios / ratios.sum(), rtol=1e-6)  # the sampler's is float32


@pytest.mark.parametrize("ratio", ["token", "sequence", "none"])
def test_at_the_sampler_every_ratio_is_one(params, ratio):
    """The loss and its gradient are the plain ones, for each row; labels were shifted once, or it could not be."""
    rows, sampler = [DATA.get_sequence(row) for row in range(6)], np.full(len(DATA.ids), np.nan)
    for row in (3, 4, 5):
        places = np.flatnonzero(rows[row].target_mask) + DATA.offsets[row]
        sampler[places] = np.asarray(tokens_of(params[0], row))
    data = corpus_from_sequences(rows).with_sampler_log_probs(sampler, np.ones(6))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches.make_evaluation_stream(data, LAYOUT).batch(0))
    mine = importance_weighted_losses(MODEL, ratio=ratio, responses_per_prompt=G)
    np.testing.assert_allclose(mine(params[0], batch), sft.sft_losses(MODEL)(params[0], BATCH), rtol=1e-6)
    slopes = (jax.jit(jax.jacrev(f))(params[0], b) for f, b in ((mine, batch), (sft.sft_losses(MODEL), BATCH)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *slopes)


def test_self_sampled_responses_alone_teach_nothing(params):
    """sum over all y of q(y) rho(y) grad log pi(y) = 0 at any pi: all responses of two tokens, token by token."""
    old, new = params
    rows = [
        TokenizedSequence(np.array([1, 5, a, b]), np.array([False, False, True, True]))
        for a in range(VOCAB)
        for b in range(VOCAB)
    ]
    data = corpus_from_sequences(rows)
    shape = batches.BatchShape(1, len(rows), len(rows), 3)
    plain = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batches.make_evaluation_stream(data, shape).batch(0))
    log_q = np.asarray(-sft.token_losses(MODEL, 1024)(old, plain))
    q = np.exp(log_q[:, 1:].sum(1))
    assert abs(q.sum() - 1) < 1e-12
    batch = plain | {"sampler": jnp.where(plain["slot"] < len(rows), log_q, jnp.nan)}
    cut = importance_weighted_losses(MODEL, max_ratio=1e6, reduction="token_sum")
    slope = jax.jit(jax.grad(lambda p: jnp.sum(q * cut(p, batch))))(new)
    size = jax.jit(jax.grad(lambda p: jnp.sum(q * sft.sft_losses(MODEL, reduction="token_sum")(p, plain))))(new)
    greatest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(size))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope)) < 1e-9 * greatest


def test_a_question_counts_once_and_weights_act_on_each_response(params):
    """The loss is the mean over questions of the mean over their responses: 1/G is in it once, and not in the rows."""
    problem = weighted(lambda p, fixed, batch: importance_weighted_losses(MODEL)(p, batch))
    each = np.asarray(importance_weighted_losses(MODEL)(params[1], BATCH))
    questions = [each[0], each[1], each[2], each[3:].mean()]
    assert float(problem.inner(params[1], jnp.ones(6), None, BATCH)) == pytest.approx(np.mean(questions), rel=1e-6)
    for row in (1, 4):
        weights = jnp.ones(6).at[row].set(3.0)
        more = float(problem.inner(params[1], weights, None, BATCH)) - np.mean(questions)
        assert more == pytest.approx(2 * each[row] * (1 if row < 3 else 1 / G) / 4, rel=1e-5)


def test_groups_stay_together_and_every_row_comes_once():
    groups = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 9], [8, 9, 9]])  # of a corpus of 9 rows: 9 is an empty place
    order = batches.shuffled_group_order(groups, 9, 6, seed=3)
    for epoch in range(3):
        drawn = np.concatenate([order(2 * epoch + part) for part in range(2)])
        assert sorted(drawn[drawn < 9]) == list(range(9))
        assert {tuple(row) for row in drawn.reshape(-1, 3)} == {tuple(row) for row in groups}
    assert any((order(0) != order(step)).any() for step in (2, 4))
    with pytest.raises(ValueError, match="does not hold whole groups of 3"):
        batches.shuffled_group_order(groups, 9, 4, seed=0)


def test_an_empty_slot_counts_nothing_and_what_is_wrong_is_told(params):
    with_empty = batches.make_evaluation_stream(DATA, batches.BatchShape(1, 9, 9, LAYOUT.length)).batch(0)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), with_empty)
    assert (batch["index"][6:] == PADDING).all() and (batch["multiplicity"][6:] == 0).all()
    for ratio in ("token", "sequence"):
        found = jax.jit(importance_weighted_losses(MODEL, ratio=ratio, responses_per_prompt=G))(params[1], batch)
        np.testing.assert_array_equal(found[6:], 0)
        np.testing.assert_allclose(
            found[:6], importance_weighted_losses(MODEL, ratio=ratio, responses_per_prompt=G)(params[1], BATCH)
        )
    with pytest.raises(ValueError, match="ratio is 'word'"):
        importance_weighted_losses(MODEL, ratio="word")
    with pytest.raises(ValueError, match="max_ratio is 0.5"):
        importance_weighted_losses(MODEL, max_ratio=0.5)
    plain = {key: leaf for key, leaf in BATCH.items() if key != "sampler"}
    with pytest.raises(ValueError, match="no `sampler`"):
        importance_weighted_losses(MODEL)(params[0], plain)
