"""The log-likelihood engine: equal to the plain forward however it is batched, shared, placed or interrupted."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.inference.loglik import LogLik, LogLikRequest, LogLikStore, hash_request, make_loglik_scorer
from bilevel_jax.lm.inference.prefixes import find_shared_prefixes
from bilevel_jax.lm.models import init_params, load_model, make_decoder
from bilevel_jax.lm.models.cache import EMPTY_POSITION
from tests.lm.models.test_families import CONFIGS, GPT2, TINY
from tests.runs.problems_lm import stories

CONTEXT = TINY.max_length
SMALL = dict(max_batch_tokens=96, bucket_lengths=(24, 48))


def draw(rng, length):
    return tuple(rng.integers(0, TINY.vocab_size, length).tolist())


def requests(count=14):
    """Rows after two sets of demonstrations, two answers to one question, one row alone, one twice, one empty."""
    rng = np.random.default_rng(0)
    sets = [draw(rng, 20), draw(rng, 31)]
    rows = [
        LogLikRequest(sets[row % 2] + draw(rng, rng.integers(1, 9)), draw(rng, rng.integers(1, 9)))
        for row in range(count)
    ]
    question = draw(rng, 25)
    rows += [
        LogLikRequest(question, draw(rng, 3)),
        LogLikRequest(question, draw(rng, 7)),
        LogLikRequest(draw(rng, 1), draw(rng, 1)),
    ]
    return [*rows, rows[3], LogLikRequest(draw(rng, 5), ())]


REQUESTS = requests()


@cache
def whole(config):
    model = make_decoder(config)

    def log_p(params, tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return jax.nn.log_softmax(model.hidden(params, tokens, positions, segments) @ model.head(params))

    return jax.jit(log_p)


def slowly(config, params, rows, context=CONTEXT):
    """Each request read whole, by the plain forward; all its logits at once."""
    out = []
    for prefix, response in rows:
        ids = prefix + response
        tokens = np.pad(np.asarray(ids, np.int32), (0, context - len(ids)))[None]
        log_p = np.asarray(whole(config)(params, tokens, (np.arange(context)[None] < len(ids)).astype(np.int32)))
        out.append(sum(log_p[0, len(prefix) + t - 1, token] for t, token in enumerate(response)))
    return np.asarray(out)


def nats(scores):
    return np.asarray([score.nats for score in scores])


def per_token(one, two):
    """The largest difference, nats per token."""
    return np.abs((nats(one) - nats(two)) / np.maximum([score.num_tokens for score in one], 1)).max()


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def shared_engine():
    """An engine of the tiny Llama, and the batches that it was given."""
    seen = []
    one = make_loglik_scorer(make_decoder(TINY), **SMALL, place=lambda batch: seen.append(batch) or batch)
    return one, seen


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("window", "gpt2")), "gemma3"]
)
def test_equals_the_plain_forward(name, x64):
    config = CONFIGS[name]
    params = init_params(config, jax.random.key(0), dtype=jnp.float64)
    out = make_loglik_scorer(make_decoder(config), max_batch_tokens=256, bucket_lengths=(CONTEXT,)).score(
        params, REQUESTS
    )
    assert [score.num_tokens for score in out] == [len(request.response) for request in REQUESTS]
    np.testing.assert_allclose(nats(out), slowly(config, params, REQUESTS), atol=1e-12)  # float64, other order of sums
    assert out[-1] == LogLik(0.0, 0)


def test_sharing_batches_and_order_change_rounding_only(params, shared_engine):
    one, _ = shared_engine
    out = one.score(params, REQUESTS)
    order = np.random.default_rng(1).permutation(len(REQUESTS))
    assert one.score(params, [REQUESTS[place] for place in order]) == [out[place] for place in order]
    apart = [
        make_loglik_scorer(make_decoder(TINY), max_batch_tokens=200, bucket_lengths=(16,), chunk=3).score(
            params, REQUESTS
        ),
        make_loglik_scorer(
            make_decoder(TINY), max_batch_tokens=1, bucket_lengths=(CONTEXT,), share_prefixes=False
        ).score(params, REQUESTS),
    ]
    assert all(per_token(other, out) < 1e-5 for other in apart)  # float32
    assert nats(out)[:-1].max() < 0


def test_what_is_shared_is_read_once(params, shared_engine):
    one, seen = shared_engine
    seen.clear()
    one.score(params, REQUESTS)
    read = sum(int((batch["positions"] != EMPTY_POSITION).sum()) for batch in seen)
    distinct = set(REQUESTS[:-1])
    apart = sum(len(prefix) + len(response) - 1 for prefix, response in distinct)
    # 7 rows to each set of demonstrations; two answers to a question, whose last token is read with each
    assert read == apart - 6 * 20 - 6 * 31 - 1 * 24
    rows = [int((batch["positions"][0, :, -1] != EMPTY_POSITION).sum()) for batch in seen if "targets" in batch]
    assert sum(rows) == len(distinct)  # so equal requests are scored once, too
    assert one.count_positions(REQUESTS) == sum(batch["tokens"].size for batch in seen)
    assert one.count_positions([]) == 0


def test_compiles_once_for_each_shape(params):
    model, traced, shapes = make_decoder(TINY), [], set()

    def extend(params, caches, tokens, positions):
        traced.append(tokens.shape)
        return model.extend(params, caches, tokens, positions)

    def place(batch):
        if "targets" not in batch:
            place.stem = batch["tokens"].shape[2]
        stem = place.stem if "source_row" in batch else None
        shapes.add((batch["tokens"].shape, "targets" in batch, stem))
        return batch

    one = make_loglik_scorer(model._replace(extend=extend), **SMALL, place=place)
    one.score(params, REQUESTS)
    lengths = 3  # 24, 48 and the context: of stems (one or two numbers of them), and of rows after each of them or none
    assert len(traced) == len(shapes) <= 2 * lengths + lengths * (lengths + 1)
    one.score(jax.tree.map(lambda leaf: leaf + 1, params), REQUESTS[::-1])
    assert len(traced) == len(shapes)


class Stopped(Exception):
    pass


def test_an_interrupted_scoring_goes_on(params):
    disk, batches, stop = {}, [], [None]

    def progress(done, total):
        batches.append(done)
        if len(batches) == stop[0]:
            raise Stopped

    one = make_loglik_scorer(make_decoder(TINY), **SMALL, progress=progress)
    store = LogLikStore("model", disk, disk.update, save_every=1)
    expected = one.score(params, REQUESTS)
    total, distinct = len(batches), len(set(REQUESTS)) - 1
    batches.clear()
    stop[0] = 2
    with pytest.raises(Stopped):
        one.resume(params, REQUESTS, store)
    assert 0 < len(disk) < distinct
    batches.clear()
    stop[0] = None
    assert one.resume(params, REQUESTS, store) == expected  # the same bits
    assert len(batches) == total - 2 and batches[-1] == len(disk) == distinct
    batches.clear()
    assert one.resume(params, REQUESTS, store) == expected and batches == []
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert one.resume(other, REQUESTS, store._replace(fingerprint="other")) == one.score(other, REQUESTS) != expected


def test_results_are_saved_in_pieces(params, shared_engine):
    pieces = []
    shared_engine[0].resume(params, REQUESTS, LogLikStore("", {}, pieces.append, save_every=7))
    assert len(pieces) > 1 and all(len(piece) >= 7 for piece in pieces[:-1])
    distinct = set(REQUESTS[:-1])
    assert sorted(name for piece in pieces for name in piece) == sorted(
        hash_request(request, "") for request in distinct
    )


def test_keys_tell_requests_and_models_apart():
    keys = {
        hash_request(LogLikRequest((1, 2), (3,)), "a"),
        hash_request(LogLikRequest((1,), (2, 3)), "a"),
        hash_request(LogLikRequest((1, 2), (3,)), "b"),
    }
    assert len(keys) == 3


def test_eight_devices_equal_one(params, shared_engine, eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices)

    def place(batch):
        spread = {name: P() if np.ndim(leaf) == 1 else P(None, "data") for name, leaf in batch.items()}
        return {name: jax.device_put(leaf, NamedSharding(mesh, spread[name])) for name, leaf in batch.items()}

    spread = make_loglik_scorer(
        make_decoder(TINY), max_batch_tokens=256, bucket_lengths=(CONTEXT,), row_multiple=8, place=place
    )
    out = spread.score(jax.device_put(params, NamedSharding(mesh, P())), REQUESTS)
    assert per_token(out, shared_engine[0].score(params, REQUESTS)) < 1e-5  # float32, other order of sums


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            LogLikRequest((), (1,)),
            r"request 1 \(0 tokens of prefix, 1 of response\): nothing stands before the response",
        ),
        (LogLikRequest((1,) * 60, (2,) * 6), r"request 1 \(60 .*, 6 .*\) takes 65 token places, .* context has 64"),
        (LogLikRequest((1, 31), (2,)), "outside of the vocabulary, 0 to 30"),
        (LogLikRequest((1, 2), (-1,)), "outside of the vocabulary, 0 to 30"),
    ],
)
def test_errors_name_the_request(bad, message, params, shared_engine):
    with pytest.raises(ValueError, match=message):
        shared_engine[0].score(params, [LogLikRequest((1,), (2,)), bad])


def test_options_are_checked():
    with pytest.raises(ValueError, match="max_batch_tokens 0, row_multiple 1"):
        make_loglik_scorer(make_decoder(TINY), max_batch_tokens=0)
    with pytest.raises(ValueError, match="each is at least 1 token"):
        make_loglik_scorer(make_decoder(TINY), bucket_lengths=(0, 8))


def test_the_longest_request_fits_and_no_request_is_no_work(params, shared_engine):
    full = LogLikRequest((1,) * 60, (2,) * 5)
    config_params = init_params(GPT2, jax.random.key(0))
    out = make_loglik_scorer(make_decoder(GPT2), max_batch_tokens=64, share_prefixes=False).score(config_params, [full])
    assert np.isfinite(out[0].nats)  # 64 learned positions
    assert shared_engine[0].score(params, []) == []
    assert shared_engine[0].score(params, [LogLikRequest((), ())]) == [LogLik(0.0, 0)]


def test_nan_parameters_are_seen_in_the_result(params, shared_engine):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    assert np.isnan(nats(shared_engine[0].score(broken, REQUESTS))[:-1]).all()


def test_a_prefix_tree_by_hand():
    rows = [np.asarray(row) for row in ([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6], [1, 7], [8, 9, 9, 9], [8, 9, 9, 9])]
    # three share 3 tokens (6 saved) rather than four 1 (3 saved); the last two are equal
    assert [tuple(stem) for stem in find_shared_prefixes(rows, min_length=1)] == [(0, 3, 3), (4, 6, 4)]
    assert [tuple(stem) for stem in find_shared_prefixes(rows, min_length=4)] == [(4, 6, 4)]
    assert find_shared_prefixes([], min_length=1) == find_shared_prefixes(rows[:1], min_length=1) == []


def best(rows, left):
    """The most tokens that stems can save: the first row left continues none, or any beginning of it that is free."""
    if not left:
        return 0
    first, options = left[0], [best(rows, left[1:])]
    for length in range(1, len(first) + 1):
        apart = [row for row in left if row[:length] != first[:length]]
        size = sum(row[:length] == first[:length] for row in rows)
        if len(left) - len(apart) == size:
            options.append((size - 1) * length + best(rows, apart))
    return max(options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 1), max_size=5).map(tuple), max_size=6))
def test_stems_save_the_most(rows):
    rows = sorted(rows)
    found = find_shared_prefixes([np.asarray(row, np.int32) for row in rows], min_length=1)
    places = [place for start, stop, _ in found for place in range(start, stop)]
    assert len(places) == len(set(places))
    for start, stop, length in found:
        assert min(map(len, rows[start:stop])) >= length and len({row[:length] for row in rows[start:stop]}) == 1
    assert sum((stop - start - 1) * length for start, stop, length in found) == best(rows, rows)


@pytest.mark.parametrize("name", ["stories-260k", pytest.param("babyllama-1m", marks=pytest.mark.slow)])
def test_real_models(shared, name):
    config, params = load_model(shared / "models" / name)
    tokenizer = load_tokenizer(shared / "models" / name)
    texts = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"])[:40] for text in stories(shared, 24)]
    demonstrations = (config.bos, *texts[0], *texts[1], *texts[2])
    rows = [LogLikRequest(demonstrations + text[: len(text) // 2], text[len(text) // 2 :]) for text in texts[3:]]
    out = make_loglik_scorer(make_decoder(config), max_batch_tokens=1024).score(params, rows)
    apart = (nats(out) - slowly(config, params, rows, 164)) / [score.num_tokens for score in out]
    assert np.abs(apart).max() < 1e-5  # nats per token, float32
    assert -4 < sum(nats(out)) / sum(score.num_tokens for score in out) < -0.5  # stories are what it has learned
