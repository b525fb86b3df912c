"""Batched text generation with a key-value cache."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.inference.padding import BatchShapes, make_buckets, pad_left
from bilevel_jax.lm.inference.sampling import SamplingParams, log_probabilities, make_draw_keys, sample_tokens
from bilevel_jax.lm.models.cache import EMPTY_POSITION, KVCache, write_cache
from bilevel_jax.lm.models.decoder import Decoder


class Prompt(NamedTuple):
    """A question to respond to; `make_prompts` builds it from a training example."""

    id: str
    """Keys its draws: neither the other prompts nor their order, batches or devices change what is drawn."""
    tokens: tuple[int, ...] = ()
    """For a model in this process: BOS and template included; the response begins right after."""
    messages: tuple[dict[str, str], ...] = ()
    """The same as chat messages, {"role": ..., "content": ...}, for a service."""


class Response(NamedTuple):
    """A response that a model generated to a prompt."""

    text: str
    """Without the end token."""
    tokens: tuple[int, ...]
    """Ends with the end token if `ended`; () from a service, which gives none."""
    log_probs: tuple[float, ...]
    """Nats of each token under the sampler, after temperature, top-k and top-p; () if unknown."""
    ended: bool
    """False: cut off at `max_new_tokens`."""
    missing: str = ""
    """Why a service gave no answer, in words: then the text is empty; "" for an answer."""
    usage: tuple[int, int] | tuple[()] = ()
    """(tokens of the prompt, of the response) as a service counts them; () where it does not."""


GenerateFn = Callable[[Sequence[Prompt], Sequence[int]], list[list[Response]]]
"""(prompts, indices of the draws) -> responses, [prompt][draw]. The same prompt and draw give the same response."""


class ResponseStore(NamedTuple):
    """Earlier responses, and where new ones are stored: how an interrupted generation resumes."""

    fingerprint: str
    """Of the model and its precision. Part of each key, so that another model's responses are never read."""
    results: Mapping[str, Response]
    """`hash_generation` of a prompt and a draw -> its response."""
    save: Callable[[dict[str, Response]], None]
    """Stores new responses; when it returns they are there, whole or not at all."""


class PromptDraw(NamedTuple):
    """A row of a batch: the index of a distinct prompt, and of a draw."""

    prompt: int
    draw: int


class Sampler(NamedTuple):
    """Generates responses with a model in this process."""

    sample: Callable[[Params, Sequence[Prompt], Sequence[int]], list[list[Response]]]
    """(params, prompts, draws) -> responses, [prompt][draw]; with its params bound, a `GenerateFn`."""
    resume: Callable[[Params, Sequence[Prompt], Sequence[int], ResponseStore], list[list[Response]]]
    """The same, from and to a store. After an interruption the same call gives, on a CPU, the same bits as without."""


def make_sampler(
    decoder: Decoder,
    sampling: SamplingParams,
    detokenize: Callable[[Sequence[int], Sequence[int]], str],
    *,
    end_tokens: Sequence[int],
    max_batch_tokens: int = 8192,
    bucket_lengths: Sequence[int] = (),
    row_multiple: int = 1,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    fetch: Callable[[Array], np.ndarray] = np.asarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sampler:
    """The sampler of a decoder: its compiled program lives as long as it does, whatever the parameters.

    A batch of prompts, padded on the left, is read once; then one token after another is sampled, for all draws
    together, until every row has ended. Token t of a draw is the argmax of log p (`log_probabilities`) plus Gumbel
    noise, a function of (seed, prompt id, draw, t) alone. So the responses do not depend on the order of the prompts,
    and on batches and devices only through the rounding of log p: a token differs with a probability of about the total
    variation between the two, 1e-6 in float32 (bit-equal on the same batches). The log-probs of a response are those of
    all its tokens, the end token included once; under temperature 0 they are 0, for nothing is drawn.

    Args:
        decoder: the model, from `make_decoder`.
        sampling: temperature, top-k, top-p, the most tokens of a response and the seed.
        detokenize: (tokens of a prompt, tokens of a response without its end token) -> text; see `make_detokenizer`.
        end_tokens: the tokens that end a response; with none, each has `max_new_tokens` tokens.
        max_batch_tokens: tokens of a batch, prompts and responses, padding included: this bounds the memory.
        bucket_lengths: the lengths in tokens that prompts are padded to; empty: 32, 48, 64, 96, 128 ... up to the
            context of the model. Each of them compiles once, and once more for each power of 2 of the prompts or rows
            of a smaller batch.
        row_multiple: the rows of every batch are a multiple of it: the number of devices.
        place: puts a batch, leaves [1, rows, ...], on the devices.
        fetch: gets all of an array from them.
        progress: called with (responses done, responses in all) after every batch.

    Returns:
        Sampling without and with a store of earlier responses. Both raise ValueError, with the prompt's id, for a
        prompt that is empty, that leaves fewer than `max_new_tokens` places of the model's context, or that holds a
        token that the vocabulary lacks; ValueError for two prompts of one id; and FloatingPointError where the model's
        probabilities are not finite.

    Raises:
        ValueError: a count below 1, a temperature, top_k or top_p out of range, or an end token that the vocabulary
            lacks.

    Example:
        >>> import jax
        >>> from bilevel_jax.lm import models
        >>> config = models.DecoderConfig(
        ...     vocab_size=11, width=8, mlp_width=16, layers=1, heads=2, kv_heads=1, head_dim=4, max_length=16
        ... )
        >>> sampler = make_sampler(
        ...     models.make_decoder(config), SamplingParams(max_new_tokens=4),
        ...     lambda prompt, response: " ".join(map(str, response)), end_tokens=(2,),
        ... )
        >>> params = models.init_params(config, jax.random.key(0))
        >>> [responses] = sampler.sample(params, [Prompt("question 1", tokens=(1, 5, 7))], [0, 1])
        >>> [len(response.tokens) <= 4 for response in responses]
        [True, True]
    """
    _check_options(sampling, decoder, end_tokens, max_batch_tokens, row_multiple)
    buckets = make_buckets(decoder.config, bucket_lengths)
    engine = _SamplerEngine(
        decoder,
        jax.jit(_Generator(decoder, sampling, tuple(end_tokens)).generate_batch),
        sampling,
        detokenize,
        frozenset(end_tokens),
        BatchShapes(buckets, max_batch_tokens, row_multiple, sampling.max_new_tokens),
        place,
        fetch,
        progress,
    )
    return Sampler(
        lambda params, prompts, draws: engine.resume(params, prompts, draws, NULL_RESPONSE_STORE), engine.resume
    )


NULL_RESPONSE_STORE = ResponseStore("", {}, lambda responses: None)
"""An empty store that saves nothing."""


def make_detokenizer(tokenizer) -> Callable[[Sequence[int], Sequence[int]], str]:
    """(tokens of a prompt, of a response) -> the text that the response adds, special tokens left out.

    A response is decoded together with its prompt, since many tokenizers drop the white space that a text begins with.

    Args:
        tokenizer: with the `decode` of transformers.

    Returns:
        A function for `make_sampler`.
    """

    def detokenize(prompt: Sequence[int], response: Sequence[int]) -> str:
        prompt_text, full_text = (
            str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (prompt, (*prompt, *response))
        )
        if full_text.startswith(prompt_text):
            return full_text[len(prompt_text) :]
        return str(tokenizer.decode(list(response), skip_special_tokens=True))  # a character begins in the prompt

    return detokenize


def hash_generation(prompt: Prompt, draw: int, sampling: SamplingParams, fingerprint: str) -> str:
    """32 hex digits of a prompt, a draw, the sampling parameters and the model.

    Args:
        prompt: hashed with its id, tokens and messages.
        draw: index of the draw.
        sampling: all of it is part of the hash.
        fingerprint: of the model, its parameters and its precision.

    Returns:
        The key of the response in a `ResponseStore`.
    """
    return hashlib.sha256(json.dumps([fingerprint, prompt, draw, sampling]).encode()).hexdigest()[:32]


# ---- on the device


class _LoopState(NamedTuple):
    """What the loop over the tokens of a batch carries."""

    step: Array
    """Tokens of each row so far."""
    token: Int[Array, "rows"]
    """The last of them."""
    ended: Bool[Array, "rows"]
    cache: KVCache
    tokens: Int[Array, "rows max_new_tokens"]
    log_probs: Float[Array, "rows max_new_tokens"]


@dataclass(frozen=True, eq=False)
class _Generator:
    """The program that generates one batch of responses."""

    decoder: Decoder
    sampling: SamplingParams
    end_tokens: tuple[int, ...]

    def generate_batch(self, params: Params, batch: Batch) -> tuple[Array, Array]:
        """Tokens and their log-probs, [rows, max_new_tokens]; anything after a row's end token."""
        ids, source_row = batch["tokens"][0], batch["source_row"][0]
        keys = make_draw_keys(self.sampling.seed, batch["words"][0], batch["draws"][0])
        head = self.decoder.head(params)
        hidden, block = self.decoder.extend(params, (), ids, batch["positions"][0])
        cache = _expand_cache(block, source_row, self.sampling.max_new_tokens - 1)
        last_position = batch["positions"][0][source_row, -1]
        length = ids.shape[1]

        def unfinished(state: _LoopState) -> Array:
            return (state.step < self.sampling.max_new_tokens) & ~state.ended.all()

        def generate_token(state: _LoopState) -> _LoopState:
            step, token, ended, cache, tokens, log_probs = state
            hidden, block = self.decoder.extend(params, (cache,), token[:, None], (last_position + step)[:, None])
            cache = write_cache(cache, block, length + step - 1)
            token, log_prob = self._choose(hidden[:, 0] @ head, keys, step)
            return _LoopState(
                step + 1,
                token,
                ended | self._is_end(token),
                cache,
                _write_column(tokens, token, step),
                _write_column(log_probs, log_prob, step),
            )

        token, log_prob = self._choose(hidden[source_row, -1] @ head, keys, 0)
        shape = (len(source_row), self.sampling.max_new_tokens)
        tokens = _write_column(jnp.zeros(shape, jnp.int32), token, 0)
        log_probs = _write_column(jnp.zeros(shape, log_prob.dtype), log_prob, 0)
        padding = batch["draws"][0] < 0
        state = _LoopState(jnp.int32(1), token, padding | self._is_end(token), cache, tokens, log_probs)
        state = jax.lax.while_loop(unfinished, generate_token, state)
        return state.tokens, state.log_probs

    def _choose(self, logits: Array, keys: PRNGKeyArray, step: Array | int) -> tuple[Array, Array]:
        """A token of each row, and its log-prob."""
        log_p = log_probabilities(logits, self.sampling)
        token = sample_tokens(log_p, keys, step) if self.sampling.temperature else jnp.argmax(log_p, -1)
        return token.astype(jnp.int32), jnp.take_along_axis(log_p, token[:, None], 1)[:, 0]

    def _is_end(self, token: Array) -> Array:
        if not self.end_tokens:
            return jnp.zeros_like(token, bool)
        return jnp.isin(token, jnp.asarray(self.end_tokens, jnp.int32))


def _write_column(tokens: Array, column: Array, step: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(tokens, column[:, None], step, 1)


def _expand_cache(block: KVCache, source_row: Int[Array, "rows"], free_slots: int) -> KVCache:
    """The cached prompts as the beginning of every row that continues them, with `free_slots` more slots.

    Copied once, and not in each step: the copy is a part of the cache that the loop would read anyway.
    """
    free = [(0, 0), (0, free_slots)]
    return KVCache(
        jnp.pad(block.keys[:, source_row], [(0, 0)] * 3 + free),
        jnp.pad(block.values[:, source_row], [(0, 0)] * 2 + [*free, (0, 0)]),
        jnp.pad(block.positions[source_row], free, constant_values=EMPTY_POSITION),
    )


# ---- on the host


@dataclass(frozen=True, eq=False)
class _SamplerEngine:
    """The settings of a sampler and its compiled program; the state of a call is a `_ResponseCollector`."""

    decoder: Decoder
    generate_batch: Callable[[Params, Batch], tuple[Array, Array]]
    sampling: SamplingParams
    detokenize: Callable[[Sequence[int], Sequence[int]], str]
    end_tokens: frozenset[int]
    shapes: BatchShapes
    place: Callable[[Batch], Batch]
    fetch: Callable[[Array], np.ndarray]
    progress: Callable[[int, int], None]

    def resume(
        self, params: Params, prompts: Sequence[Prompt], draws: Sequence[int], store: ResponseStore
    ) -> list[list[Response]]:
        unique_prompts = deduplicate_prompts(prompts)
        _check_prompts(unique_prompts, draws, self.sampling, self.decoder)
        is_greedy = not self.sampling.temperature  # then a prompt has one response, draw 0
        unique_draws = [0] * bool(draws) if is_greedy else sorted(set(draws))
        collector = _ResponseCollector(self, unique_prompts, unique_draws, store)
        in_flight = None  # one batch is prepared and sent while the one before it is computed
        for batch in _plan_batches(unique_prompts, unique_draws, self.shapes):
            # whole batches, also where a part of one is known: what a row shares a batch with changes its rounding
            if collector.has_all(batch):
                continue
            values = self.generate_batch(params, self.place(_build_batch(batch, unique_prompts, self.shapes)))
            if in_flight is not None:
                collector.collect(*in_flight)
            in_flight = batch, values
        if in_flight is not None:
            collector.collect(*in_flight)
        prompt_index = {prompt.id: position for position, prompt in enumerate(unique_prompts)}
        requested_draws = [0] * len(draws) if is_greedy else draws
        return [
            [cast(Response, collector.responses[PromptDraw(prompt_index[prompt.id], draw)]) for draw in requested_draws]
            for prompt in prompts
        ]


class _ResponseCollector:
    """The responses of one call: those that the store has, and those that batches add."""

    def __init__(
        self, engine: _SamplerEngine, prompts: Sequence[Prompt], draws: Sequence[int], store: ResponseStore
    ) -> None:
        self.engine, self.prompts, self.store = engine, prompts, store
        self.responses: dict[PromptDraw, Response | None] = {}
        for prompt_index in range(len(prompts)):
            for draw in draws:
                row = PromptDraw(prompt_index, draw)
                self.responses[row] = store.results.get(self._hash(row))
        self.count = sum(response is not None for response in self.responses.values())

    def has_all(self, batch: list[PromptDraw]) -> bool:
        return all(self.responses[row] is not None for row in batch)

    def collect(self, batch: list[PromptDraw], values: tuple[Array, Array]) -> None:
        """Fetches, stores and counts the responses of a batch that are new."""
        engine, new_responses = self.engine, {}
        for row, ids, log_probs in zip(batch, *map(engine.fetch, values), strict=False):  # then rows of padding
            if self.responses[row] is None:
                response = _make_response(
                    self.prompts[row.prompt], ids.tolist(), log_probs.tolist(), engine.end_tokens, engine.detokenize
                )
                self.responses[row] = new_responses[self._hash(row)] = response
        self.count += len(new_responses)
        self.store.save(new_responses)
        engine.progress(self.count, len(self.responses))

    def _hash(self, row: PromptDraw) -> str:
        return hash_generation(self.prompts[row.prompt], row.draw, self.engine.sampling, self.store.fingerprint)


def _plan_batches(prompts: Sequence[Prompt], draws: Sequence[int], shapes: BatchShapes) -> list[list[PromptDraw]]:
    """Batches, a function of the prompts and draws alone; longest prompts first, all draws of a prompt together."""
    order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at].tokens), prompts[at].id))
    pending = [PromptDraw(at, draw) for at in order for draw in draws]
    batches, at = [], 0
    while at < len(pending):
        count = shapes.max_rows(shapes.pick_length(len(prompts[pending[at].prompt].tokens)))
        count -= count % len(draws) if count >= len(draws) else 0  # whole prompts: each is read in one batch only
        batches.append(pending[at : at + count])
        at += count
    return batches


def _build_batch(batch: list[PromptDraw], prompts: Sequence[Prompt], shapes: BatchShapes) -> Batch:
    prompt_indices = list(dict.fromkeys(row.prompt for row in batch))
    length = shapes.pick_length(max(len(prompts[at].tokens) for at in prompt_indices))
    num_rows = shapes.pad_rows(len(batch), length)
    source_row, draws = np.zeros((1, num_rows), np.int32), np.full((1, num_rows), -1, np.int32)
    words = np.zeros((1, num_rows, 2), np.uint32)
    for at, row in enumerate(batch):
        source_row[0, at], draws[0, at] = prompt_indices.index(row.prompt), row.draw
        words[0, at] = _hash_id(prompts[row.prompt].id)
    ids = [np.asarray(prompts[at].tokens, np.int32) for at in prompt_indices]
    padding = pad_left(ids, [0] * len(ids), shapes.pad_rows(len(prompt_indices), length), length)
    return padding | {"source_row": source_row, "draws": draws, "words": words}


def _hash_id(id: str) -> Int[np.ndarray, "2"]:
    """64 bits of an id."""
    return np.frombuffer(hashlib.sha256(id.encode()).digest()[:8], "<u4")


def _make_response(
    prompt: Prompt, ids: list[int], log_probs: list[float], end_tokens: frozenset[int], detokenize: Callable[..., str]
) -> Response:
    count = next((at + 1 for at, token in enumerate(ids) if token in end_tokens), len(ids))
    ended = ids[count - 1] in end_tokens
    ids, log_probs = ids[:count], log_probs[:count]
    if not np.isfinite(log_probs).all():
        raise FloatingPointError(
            f"prompt {prompt.id}: the model's logits are not all finite. Its parameters are broken or too large."
        )
    return Response(detokenize(prompt.tokens, ids[: count - ended]), tuple(ids), tuple(log_probs), ended)


def deduplicate_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once, sorted by id.

    Args:
        prompts: equal prompts may come more than once.

    Returns:
        The distinct prompts.

    Raises:
        ValueError: two different prompts have one id.
    """
    by_id: dict[str, Prompt] = {}
    for prompt in prompts:
        if by_id.setdefault(prompt.id, prompt) != prompt:
            raise ValueError(
                f"two different prompts have the id {prompt.id!r}, and would be drawn with the same noise."
            )
    return [by_id[id] for id in sorted(by_id)]


def _check_options(
    sampling: SamplingParams, decoder: Decoder, end_tokens: Sequence[int], max_batch_tokens: int, row_multiple: int
) -> None:
    if min(max_batch_tokens, row_multiple, sampling.max_new_tokens) < 1:
        raise ValueError(
            f"max_batch_tokens {max_batch_tokens}, row_multiple {row_multiple}, "
            f"max_new_tokens {sampling.max_new_tokens}: each must be at least 1."
        )
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"{sampling}: temperature and top_k must be 0 or more, and top_p in (0, 1].")
    if any(not 0 <= token < decoder.config.vocab_size for token in end_tokens):
        raise ValueError(
            f"end tokens {list(end_tokens)} lie outside of the vocabulary, 0 to {decoder.config.vocab_size - 1}."
        )


def _check_prompts(prompts: Sequence[Prompt], draws: Sequence[int], sampling: SamplingParams, decoder: Decoder) -> None:
    config = decoder.config
    if min(draws, default=0) < 0:
        raise ValueError(f"draws {list(draws)}: numbers of draws are 0 or more.")
    room = config.max_length - sampling.max_new_tokens + 1  # the last token of a response is not read
    long = [prompt for prompt in prompts if len(prompt.tokens) > room]
    if long:
        raise ValueError(
            f"prompt {long[0].id} has {len(long[0].tokens)} tokens; with max_new_tokens = {sampling.max_new_tokens} "
            f"the model's context of {config.max_length} has room for {room}. "
            "Lower max_new_tokens, or leave the prompt out"
            f"{f' ({len(long) - 1} more are too long)' if len(long) > 1 else ''}."
        )
    for prompt in prompts:
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id} is empty; begin it with the BOS token.")
        if min(prompt.tokens) < 0 or max(prompt.tokens) >= config.vocab_size:
            raise ValueError(
                f"prompt {prompt.id}: a token lies outside of the vocabulary, 0 to {config.vocab_size - 1}."
            )
