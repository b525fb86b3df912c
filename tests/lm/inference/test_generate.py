"""Responses: those of transformers, of the right distribution, and the same however they are batched or placed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.stats import chisquare

from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.inference.generate import (
    Prompt,
    ResponseStore,
    SamplingParams,
    hash_generation,
    make_detokenizer,
    make_sampler,
)
from bilevel_jax.lm.inference.loglik import LogLikRequest, make_loglik_scorer
from bilevel_jax.lm.inference.sampling import log_probabilities
from bilevel_jax.lm.models import init_lora, init_params, join_adapters, load_model, make_decoder
from tests.lm.models.test_families import CONFIGS, FAMILIES, GPT2, TINY, make
from tests.runs.problems_lm import stories

END = (5, 9)
DRAWS = (0, 1, 7)
LIKE = SamplingParams(max_new_tokens=12, seed=3)


def words(prompt, response):
    """A decoder of tokens to text for models without a tokenizer."""
    return " ".join(map(str, response))


def prompts(count=11, longest=30):
    rng = np.random.default_rng(0)
    lengths = [1, longest, *rng.integers(2, longest, count - 2)]
    return [
        Prompt(f"row {row}", tuple(rng.integers(0, TINY.vocab_size, length).tolist()))
        for row, length in enumerate(lengths)
    ]


PROMPTS = prompts()


def tiny_sampler(config=TINY, sampling=LIKE, compute=None, **options):
    return make_sampler(
        make_decoder(config, compute_dtype=compute),
        sampling,
        words,
        **{"end_tokens": END, "max_batch_tokens": 400, "bucket_lengths": (32,), **options},
    )


@pytest.fixture(scope="module")
def params():
    return init_params(TINY, jax.random.key(0))


@pytest.fixture(scope="module")
def one():
    """A sampler of the tiny Llama, the shapes of its batches, those that were traced, and what progress calls."""
    model, shapes, traced = make_decoder(TINY), set(), []

    def extend(params, caches, tokens, positions):
        traced.append(tokens.shape)
        return model.extend(params, caches, tokens, positions)

    def place(batch):
        if "positions" in batch:  # of prompts
            shapes.add(batch["tokens"].shape[1:])
        if "busy_until" in batch:  # of places, each with one token
            shapes.add((batch["busy_until"].shape[1], 1))
        return batch

    hook = [lambda done, total: None]
    options = {
        "end_tokens": END,
        "max_batch_tokens": 400,
        "bucket_lengths": (32,),
        "progress": lambda done, total: hook[0](done, total),
    }
    return make_sampler(model._replace(extend=extend), LIKE, words, place=place, **options), shapes, traced, hook


@pytest.fixture(scope="module")
def expected(params, one):
    return one[0].sample(params, PROMPTS, DRAWS)


def tokens_of(out):
    return [[response.tokens for response in some] for some in out]


def log_probs_of(out):
    return np.concatenate([response.log_probs for some in out for response in some])


def test_log_probs_are_those_of_a_forward_pass(params, expected):
    requests = [
        LogLikRequest(prompt.tokens, response.tokens)
        for prompt, some in zip(PROMPTS, expected, strict=True)
        for response in some
    ]
    # one request for each token, behind all that stands before it: the engine tells sums
    single = [LogLikRequest((*a, *b[:t]), b[t : t + 1]) for a, b in requests for t in range(len(b))]
    scores = make_loglik_scorer(make_decoder(TINY), max_batch_tokens=2048, bucket_lengths=(48,)).score(params, single)
    np.testing.assert_allclose(log_probs_of(expected), [score.nats for score in scores], atol=1e-5)  # float32


def test_a_response_ends_once_and_holds_nothing_else(expected):
    ended = 0
    for response in itertools.chain(*expected):
        inner = response.tokens[:-1] if response.ended else response.tokens
        assert not set(inner) & set(END) and response.text == words((), inner)
        assert response.ended == (response.tokens[-1] in END) and (response.ended or len(response.tokens) == 12)
        assert len(response.log_probs) == len(response.tokens)
        ended += response.ended
    assert 0 < ended < len(PROMPTS) * len(DRAWS)


def test_order_batches_and_devices_change_no_token(params, one, expected, eight_devices):
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    mixed = one[0].sample(params, [PROMPTS[at] for at in order], DRAWS[::-1])
    assert [row[::-1] for row in mixed] == [expected[at] for at in order]  # the same bits
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices)
    spread = NamedSharding(mesh, P(None, "data"))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    eight = tiny_sampler(max_batch_tokens=1, row_multiple=8, place=lambda batch: jax.device_put(batch, spread))
    for other, where in ((tiny_sampler(max_batch_tokens=1, bucket_lengths=(64,)), params), (eight, everywhere)):
        out = other.sample(where, PROMPTS, DRAWS)
        assert tokens_of(out) == tokens_of(expected)
        np.testing.assert_allclose(log_probs_of(out), log_probs_of(expected), atol=1e-5)  # float32, other sums
    alone = one[0].sample(params, PROMPTS[2:3], DRAWS[1:2])
    assert tokens_of(alone) == [[expected[2][1].tokens]]


@pytest.mark.parametrize("places", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_the_number_of_places_changes_no_token(places, params, expected):
    """A place is filled again with another response; 16 places give up empty ones, too."""
    out = tiny_sampler(max_batch_tokens=places * 44).sample(params, PROMPTS, DRAWS)
    assert tokens_of(out) == tokens_of(expected)
    np.testing.assert_allclose(log_probs_of(out), log_probs_of(expected), atol=1e-5)  # float32, other sums


@pytest.mark.slow
def test_places_change_no_log_prob(x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    few, all_at_once = (tiny_sampler(max_batch_tokens=places * 44).sample(params, PROMPTS, DRAWS) for places in (4, 33))
    assert tokens_of(few) == tokens_of(all_at_once)
    np.testing.assert_allclose(log_probs_of(few), log_probs_of(all_at_once), atol=1e-12)  # float64


def test_known_responses_hold_their_places(params, one, expected):
    """Whatever part is known, the rest comes in the places that it had, and so with the same bits."""
    disk, again = {}, one[0]
    again.resume(params, PROMPTS, DRAWS, ResponseStore("model", disk, disk.update))
    rng = np.random.default_rng(2)
    for share in (0.1, 0.5, 0.9):
        part = {key: response for key, response in disk.items() if rng.random() < share}
        size, new = len(part), {}
        assert again.resume(params, PROMPTS, DRAWS, ResponseStore("model", part, new.update)) == expected
        assert len(new) == len(disk) - size


@pytest.mark.parametrize(
    "max_new_tokens, end_tokens", [(1, ()), (2, (5,)), pytest.param(7, (), marks=pytest.mark.slow)]
)
def test_short_and_endless_responses(max_new_tokens, end_tokens, params):
    sampling = LIKE._replace(max_new_tokens=max_new_tokens)
    few, many = (
        tiny_sampler(sampling=sampling, end_tokens=end_tokens, max_batch_tokens=tokens).sample(params, PROMPTS, DRAWS)
        for tokens in (3 * (32 + max_new_tokens), 10**4)
    )
    assert tokens_of(few) == tokens_of(many)
    assert all(len(response.tokens) == max_new_tokens or response.ended for some in few for response in some)


def test_draws_are_different_and_belong_to_the_id(params, one, expected):
    assert len({response.tokens for some in expected for response in some}) > 2 * len(PROMPTS)
    renamed = one[0].sample(params, [prompt._replace(id=f"{prompt.id}'") for prompt in PROMPTS], DRAWS)
    assert all(a != b for a, b in zip(tokens_of(renamed), tokens_of(expected), strict=True))


def test_compiles_once_for_each_shape(params, one, expected):
    sample, shapes, traced, _ = one
    sample.sample(jax.tree.map(lambda leaf: 2 * leaf, params), PROMPTS, (5, 6, 11))
    assert len(traced) == len(shapes) == len(set(traced)) and set(traced) == shapes
    assert len(shapes) <= 4  # prompts, all places, and few of them at the end


def test_an_interrupted_generation_goes_on(params, one, expected):
    class Stopped(Exception):
        pass

    disk, seen, stop = {}, [], [1]

    def progress(done, total):
        seen.append((done, total))
        if len(seen) == stop[0]:
            raise Stopped

    again, _, _, hook = one
    store = ResponseStore("model", disk, disk.update)
    hook[0] = progress
    with pytest.raises(Stopped):
        again.resume(params, PROMPTS, DRAWS, store)
    total = len(PROMPTS) * len(DRAWS)
    assert 0 < len(disk) < total
    stop[0] = 0
    assert again.resume(params, PROMPTS, DRAWS, store) == expected  # the same bits
    assert seen[-1] == (total, total) and len(disk) == total
    done = len(seen)
    assert again.resume(params, PROMPTS, DRAWS, store) == expected and len(seen) == done
    hook[0] = lambda done, total: None
    again.resume(params, PROMPTS, DRAWS, store._replace(fingerprint="other"))
    assert len(disk) == 2 * total


def test_a_store_that_fails_is_not_asked_again(params, one):
    """Nor is progress, which may itself raise, told on the way out."""
    saved, seen, (again, _, _, hook) = [], [], one

    def save(responses):
        saved.append(len(responses))
        raise OSError("No space left on device")

    hook[0] = lambda done, total: seen.append(done)
    with pytest.raises(OSError, match="No space left") as caught:
        again.resume(params, PROMPTS, DRAWS, ResponseStore("model", {}, save))
    hook[0] = lambda done, total: None
    assert len(saved) == 1 and not seen and caught.value.__context__ is None


def test_keys_tell_everything_apart():
    asked = [
        (PROMPTS[0], 0, LIKE, "a"),
        (PROMPTS[1], 0, LIKE, "a"),
        (PROMPTS[0], 1, LIKE, "a"),
        (PROMPTS[0], 0, LIKE, "b"),
    ]
    asked += [(PROMPTS[0]._replace(tokens=(1,)), 0, LIKE, "a"), (PROMPTS[0], 0, LIKE._replace(seed=4), "a")]
    assert len({hash_generation(*one) for one in asked}) == len(asked)


SAMPLING = SamplingParams(temperature=1.3, top_k=12, top_p=0.8, max_new_tokens=2)


def test_draws_follow_the_probabilities(params):
    """Both tokens of 6,000 draws, against the exact probabilities after temperature, top-k and top-p."""
    prompt, draws, model = PROMPTS[3], range(6000), make_decoder(TINY)
    (out,) = tiny_sampler(sampling=SAMPLING, end_tokens=(), max_batch_tokens=10**6).sample(params, [prompt], draws)

    @jax.jit
    def exact(tokens):
        hidden = model.hidden(params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
        return log_probabilities((hidden @ model.head(params))[0, -1:], SAMPLING)[0]

    drawn = np.asarray([response.tokens for response in out])
    common = np.bincount(drawn[:, 0]).argmax()
    after = drawn[drawn[:, 0] == common]
    for seen, before in ((drawn[:, 0], prompt.tokens), (after[:, 1], (*prompt.tokens, common))):
        log_p = np.asarray(exact(jnp.asarray([before], jnp.int32)), float)
        counts, kept = np.bincount(seen, minlength=TINY.vocab_size), np.isfinite(log_p)
        assert 4 <= kept.sum() <= 12 and counts[~kept].sum() == 0
        shares = np.exp(log_p[kept])
        assert chisquare(counts[kept], shares / shares.sum() * len(seen)).pvalue > 0.01
    first = np.asarray(exact(jnp.asarray([prompt.tokens], jnp.int32)))
    np.testing.assert_allclose([r.log_probs[0] for r in out], first[drawn[:, 0]], atol=1e-5)  # float32


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1.7, 20, 0.9),
        SamplingParams(0.7, top_p=0.6),
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (SamplingParams(0.3, 1, 0.5), SamplingParams(0.9, 500, 1e-6))
        ),
    ],
    ids=lambda one: f"{one.temperature}-{one.top_k}-{one.top_p}",
)
def test_probabilities_equal_those_of_transformers(sampling):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = 3 * np.random.default_rng(0).standard_normal((7, 200)).astype(np.float32)
    scores = transformers.TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(logits))
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = transformers.TopPLogitsWarper(sampling.top_p)(None, scores)
    log_p = jax.jit(log_probabilities, static_argnames="sampling")
    out = np.asarray(log_p(jnp.asarray(logits), sampling))
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(scores.numpy()))
    np.testing.assert_allclose(out, torch.log_softmax(scores, -1).numpy(), atol=2e-6)  # float32
    with jax.enable_x64(True):
        double = log_p(jnp.asarray(logits, jnp.float64), sampling)
    assert double.dtype == np.float64
    np.testing.assert_allclose(double, out, atol=2e-6)


def test_ties_stay_together_and_greedy_takes_the_first():
    logits = np.asarray([[0.0, 2.0, 2.0, 1.0, 2.0]], np.float32)
    log_p = jax.jit(log_probabilities, static_argnames="sampling")
    for sampling in (SamplingParams(top_k=2), SamplingParams(top_p=0.3)):
        np.testing.assert_allclose(np.exp(log_p(logits, sampling))[0], [0, 1 / 3, 1 / 3, 0, 1 / 3], atol=1e-6)
    np.testing.assert_array_equal(np.exp(log_p(logits, SamplingParams(0.0)))[0], [0, 1, 0, 0, 0])
    assert np.isnan(log_p(np.asarray([[0.0, 2.0, 2.0, np.nan, 2.0]], np.float32), SamplingParams(0.0))).all()


def in_transformers(model, prompts, max_new, end):
    """Greedy responses of transformers, from one batch with padding on the left; nothing after the end token."""
    import torch

    longest = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    options = dict(max_new_tokens=max_new, do_sample=False, eos_token_id=list(end), pad_token_id=0, use_cache=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: threads would wait for each other
    with torch.no_grad():
        out = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)[:, longest:].tolist()
    torch.set_num_threads(threads)
    cut = [next((at + 1 for at, token in enumerate(row) if token in end), len(row)) for row in out]
    return [tuple(row[:count]) for row, count in zip(out, cut, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family, tmp_path):
    reference = make(family, tmp_path)
    config, params = load_model(tmp_path)
    asked = [prompt._replace(tokens=tuple(3 * token + 4 for token in prompt.tokens)) for prompt in PROMPTS]
    options = dict(end_tokens=(1, 2), max_batch_tokens=4 * 52, bucket_lengths=(32,))  # 4 places, filled again
    out = tiny_sampler(config, SamplingParams(0.0, max_new_tokens=20), **options).sample(params, asked, (0, 1))
    assert [row[0] for row in out] == [row[1] for row in out]
    assert [row[0].tokens for row in out] == in_transformers(reference, [p.tokens for p in asked], 20, (1, 2))
    assert not log_probs_of(out).any()


@pytest.mark.parametrize("name", ["stories-260k", pytest.param("babyllama-1m", marks=pytest.mark.slow)])
def test_greedy_of_a_real_model_equals_transformers(name, shared):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = shared / "models" / name
    (config, params), tokenizer = load_model(folder), load_tokenizer(folder)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"][:30] for text in stories(shared, 8)]
    asked = [Prompt(str(at), (config.bos, *ids[: 5 + 3 * at])) for at, ids in enumerate(texts)]
    ends = (config.eos, tokenizer.convert_tokens_to_ids("."))  # a sentence: responses of very different lengths
    sample = make_sampler(
        make_decoder(config),
        SamplingParams(0.0, max_new_tokens=60),
        make_detokenizer(tokenizer),
        end_tokens=ends,
        max_batch_tokens=3 * 92,
        bucket_lengths=(32,),
    )
    out = sample.sample(params, asked, (0,))
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert [row[0].tokens for row in out] == in_transformers(reference, [p.tokens for p in asked], 60, ends)
    assert len({len(row[0].tokens) for row in out}) > 4 and max(len(row[0].text) for row in out) > 30
    for prompt, (response,) in zip(asked, out, strict=True):
        whole = (*prompt.tokens, *response.tokens[: len(response.tokens) - response.ended])
        assert tokenizer.decode(whole, skip_special_tokens=True).endswith(response.text)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_family_and_adapters(config, x64):
    adapters = init_lora(config, jax.random.key(1), rank=2, alpha=4.0, dtype=jnp.float64)
    base = init_params(config, jax.random.key(0), dtype=jnp.float64)
    params = join_adapters(base, jax.tree.map(lambda leaf: leaf + 0.1, adapters))
    out = tiny_sampler(config).sample(params, PROMPTS, DRAWS)  # 9 places for 33 responses
    requests = [LogLikRequest(a.tokens, r.tokens) for a, some in zip(PROMPTS, out, strict=True) for r in some]
    scores = make_loglik_scorer(make_decoder(config), max_batch_tokens=4096, bucket_lengths=(48,)).score(
        params, requests
    )
    sums = [sum(response.log_probs) for some in out for response in some]
    np.testing.assert_allclose(sums, [score.nats for score in scores], atol=1e-11)  # float64, up to 12 tokens


@pytest.mark.slow
def test_bfloat16_factors(params):
    out = tiny_sampler(compute=jnp.bfloat16, max_batch_tokens=10**4).sample(params, PROMPTS, DRAWS)
    requests = [LogLikRequest(a.tokens, r.tokens) for a, some in zip(PROMPTS, out, strict=True) for r in some]
    low = make_loglik_scorer(make_decoder(TINY, compute_dtype=jnp.bfloat16), max_batch_tokens=4096).score(
        params, requests
    )
    sums = np.asarray([sum(response.log_probs) for some in out for response in some])
    counts = np.asarray([score.num_tokens for score in low])
    assert np.abs((sums - [score.nats for score in low]) / counts).max() < 2e-2  # 8 bits of mantissa, other blocks
    assert np.isfinite(sums).all()


def test_the_context_is_used_to_its_end():
    """The last token of a response is not read, so it needs no place; a learned position beyond the last is NaN."""
    config_params, sampling = init_params(GPT2, jax.random.key(0)), SamplingParams(0.0, max_new_tokens=5)
    sample = tiny_sampler(GPT2, sampling, end_tokens=(), bucket_lengths=()).sample
    ((response,),) = sample(config_params, [Prompt("full", (1,) * 60)], (0,))
    assert len(response.tokens) == 5
    with pytest.raises(ValueError, match=r"long has 61 tokens; with max_new_tokens = 5 .* of 64 has room for 60"):
        sample(config_params, [Prompt("full", (1,) * 60), Prompt("long", (1,) * 61)], (0,))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, config_params)
    with pytest.raises(FloatingPointError, match="prompt full: the model's logits are not all finite"):
        sample(broken, [Prompt("full", (1,) * 60)], (0,))


@pytest.mark.parametrize(
    "bad, message",
    [
        (Prompt("a", ()), "prompt a is empty; begin it with the BOS token"),
        (Prompt("a", (31,)), "prompt a: a token lies outside of the vocabulary, 0 to 30"),
        (Prompt("row 0", (3, 3)), "two different prompts have the id 'row 0'"),
    ],
)
def test_errors_name_the_prompt(bad, message, params, one):
    with pytest.raises(ValueError, match=message):
        one[0].sample(params, [*PROMPTS, bad], (0,))


def test_options_are_checked(params, one):
    for sampling in (SamplingParams(-1.0), SamplingParams(top_k=-1), SamplingParams(top_p=0.0)):
        with pytest.raises(ValueError, match="temperature and top_k must be 0 or more, and top_p in"):
            tiny_sampler(sampling=sampling)
    with pytest.raises(ValueError, match="max_new_tokens 0: each must be at least 1"):
        tiny_sampler(sampling=SamplingParams(max_new_tokens=0))
    with pytest.raises(ValueError, match=r"end tokens \[31\] lie outside"):
        tiny_sampler(end_tokens=[31])
    with pytest.raises(ValueError, match=r"draws \[0, -1\]: numbers of draws are 0 or more"):
        one[0].sample(params, PROMPTS, [0, -1])
    assert one[0].sample(params, [], (0,)) == [] and one[0].sample(params, PROMPTS[:2], ()) == [[], []]
