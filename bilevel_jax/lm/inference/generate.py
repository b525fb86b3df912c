"""Responses that a language model writes: sampling and greedy, batched, with a cache, in one compiled program."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.inference.padding import make_buckets, pad_left, pick_bucket
from bilevel_jax.lm.inference.sampling import SamplingParams, log_probabilities, make_draw_keys, sample_tokens
from bilevel_jax.lm.models.cache import EMPTY_POSITION, KVCache, write_cache
from bilevel_jax.lm.models.decoder import Decoder


class Prompt(NamedTuple):
    """A question as a generator reads it; `prompts.prompts` makes it from an example."""

    id: str
    """Keys its draws: neither the other prompts nor their order, batches or devices change what is drawn."""
    tokens: tuple[int, ...] = ()
    """For a model in this process: BOS and template included; the response begins right after."""
    messages: tuple[dict[str, str], ...] = ()
    """The same as chat messages, {"role": ..., "content": ...}, for a service."""


class Response(NamedTuple):
    """What was written after a prompt."""

    text: str
    """Without the end token."""
    tokens: tuple[int, ...]
    """Ends with the end token if `ended`; () from a service, which gives none."""
    log_probs: tuple[float, ...]
    """Nats of each token under the sampler: after temperature, top-k and top-p; () if unknown."""
    ended: bool
    """False: cut at `max_new`."""


GenerateFn = Callable[[Sequence[Prompt], Sequence[int]], list[list[Response]]]
"""(prompts, numbers of the draws) -> responses, [prompt][draw]. The same prompt and draw is the same response."""


class ResponseStore(NamedTuple):
    """What has been written before, and where more goes: how an interrupted generation goes on."""

    fingerprint: str
    """Of the model and its precision. Part of each key, so that another model's responses are never read."""
    results: Mapping[str, Response]
    """`key` of a prompt and a draw -> its response."""
    save: Callable[[dict[str, Response]], None]
    """Keeps new responses; they must be there, whole or not at all, when it returns."""


class PromptDraw(NamedTuple):
    """A row of a batch: which of the distinct prompts, and which draw."""

    prompt: int
    draw: int


class Sampler(NamedTuple):
    """Responses of a model in this process."""

    sample: Callable[[Params, Sequence[Prompt], Sequence[int]], list[list[Response]]]
    """(params, prompts, draws) -> responses, [prompt][draw]; with its params, a `Generator`."""
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

    A batch of prompts, padded on the left, is read once; then one token after another, for all draws together, until
    every row has ended. Token t of a draw is found by adding Gumbel noise to log p (`log_probabilities`), a function of
    (seed, prompt id, draw, t) alone. So what is drawn depends on the order of the prompts not at all, and on batches
    and devices only through the rounding of log p: a token differs with a probability of about the total variation
    between the two, 1e-6 in float32 (bit-equal on the same batches). The log-probs of a response are those of every
    token of it, the end token included once; under temperature 0 they are 0, for nothing is drawn.

    decode    (tokens of a prompt, tokens of a response without its end token) -> text; `decoding` makes it
    end       the tokens that end a response; with none, each has `max_new` tokens
    tokens    token places of a batch, prompts and responses: this bounds the memory
    lengths   the lengths that prompts are padded to; empty: 32, 48, 64, 96, 128 ... up to the context of the model.
              Each of them compiles once, and once more for each power of 2 of the prompts or rows of a smaller batch
    multiple  the rows of every batch are a multiple of it: the number of devices
    place     puts a batch, leaves [1, rows, ...], on the devices
    fetch     gets all of an array from them
    progress  called with (responses done, responses to make) after every batch

    Raises ValueError, with the prompt's id, for a prompt that is empty, that leaves fewer than `max_new` places of the
    model's context, or that holds a token that the vocabulary lacks; for two prompts of one id; and
    FloatingPointError where the model's probabilities are not numbers.
    """
    _check_options(sampling, decoder, end_tokens, max_batch_tokens, row_multiple)
    max_new_tokens, sizes = sampling.max_new_tokens, make_buckets(decoder.config, bucket_lengths)

    def rows_per_batch(length: int) -> int:
        return max(1, max_batch_tokens // (length + max_new_tokens) // row_multiple) * row_multiple

    @jax.jit
    def generate_batch(params: Params, batch: Batch) -> tuple[Array, Array]:
        ids, source_row = batch["tokens"][0], batch["source_row"][0]
        keys = make_draw_keys(sampling.seed, batch["words"][0], batch["draws"][0])
        head = decoder.head(params)
        hidden, block = decoder.extend(params, (), ids, batch["positions"][0])
        cache, last_position = (
            _expand_cache(block, source_row, max_new_tokens - 1),
            batch["positions"][0][source_row, -1],
        )
        count, length = len(source_row), ids.shape[1]

        def choose(hidden: Array, step: Array | int) -> tuple[Array, Array]:
            log_p = log_probabilities(hidden @ head, sampling)
            token = sample_tokens(log_p, keys, step) if sampling.temperature else jnp.argmax(log_p, -1)
            return token.astype(jnp.int32), jnp.take_along_axis(log_p, token[:, None], 1)[:, 0]

        def is_end(token: Array) -> Array:
            return jnp.isin(token, jnp.asarray(end_tokens, jnp.int32)) if end_tokens else jnp.zeros_like(token, bool)

        def write_column(tokens: Array, column: Array, step: Array | int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(tokens, column[:, None], step, 1)

        def unfinished(state: tuple) -> Array:
            step, _, ended, *_ = state
            return (step < max_new_tokens) & ~ended.all()

        def generate_token(state: tuple) -> tuple:
            step, token, ended, cache, tokens, log_probs = state
            hidden, block = decoder.extend(params, (cache,), token[:, None], (last_position + step)[:, None])
            cache = write_cache(cache, block, length + step - 1)
            token, log_prob = choose(hidden[:, 0], step)
            return (
                step + 1,
                token,
                ended | is_end(token),
                cache,
                write_column(tokens, token, step),
                write_column(log_probs, log_prob, step),
            )

        token, log_prob = choose(hidden[source_row, -1], 0)
        tokens = write_column(jnp.zeros((count, max_new_tokens), jnp.int32), token, 0)
        log_probs = write_column(jnp.zeros((count, max_new_tokens), log_prob.dtype), log_prob, 0)
        padding = batch["draws"][0] < 0
        state = jnp.int32(1), token, padding | is_end(token), cache, tokens, log_probs
        *_, tokens, log_probs = jax.lax.while_loop(unfinished, generate_token, state)
        return tokens, log_probs

    def resume(
        params: Params, prompts: Sequence[Prompt], draws: Sequence[int], store: ResponseStore
    ) -> list[list[Response]]:
        unique_prompts = deduplicate_prompts(prompts)
        _check_prompts(unique_prompts, draws, sampling, decoder)
        unique_draws = sorted(set(draws)) if sampling.temperature else [0] * bool(draws)  # greedy has one response
        responses = {
            PromptDraw(prompt_index, draw): store.results.get(
                hash_generation(prompt, draw, sampling, store.fingerprint)
            )
            for prompt_index, prompt in enumerate(unique_prompts)
            for draw in unique_draws
        }
        count = sum(response is not None for response in responses.values())

        def collect(batch: list[PromptDraw], values: tuple[Array, Array]) -> None:
            nonlocal count
            new_responses = {}
            for row, ids, log_probs in zip(batch, *map(fetch, values), strict=False):  # then rows of padding
                prompt = unique_prompts[row.prompt]
                if responses[row] is None:
                    response = _make_response(prompt, ids.tolist(), log_probs.tolist(), set(end_tokens), detokenize)
                    responses[row] = new_responses[hash_generation(prompt, row.draw, sampling, store.fingerprint)] = (
                        response
                    )
            count += len(new_responses)
            store.save(new_responses)
            progress(count, len(responses))

        in_flight = None  # one batch is made and sent while the one before it is computed
        for batch in _plan_batches(unique_prompts, unique_draws, sizes, rows_per_batch):
            # whole batches, also where a part of one is known: what a row shares a batch with changes its rounding
            if all(responses[row] is not None for row in batch):
                continue
            values = generate_batch(
                params, place(_build_batch(batch, unique_prompts, sizes, rows_per_batch, row_multiple))
            )
            if in_flight is not None:
                collect(*in_flight)
            in_flight = batch, values
        if in_flight is not None:
            collect(*in_flight)
        prompt_index = {prompt.id: position for position, prompt in enumerate(unique_prompts)}
        requested_draws = draws if sampling.temperature else [0] * len(draws)
        return [
            [cast(Response, responses[PromptDraw(prompt_index[prompt.id], draw)]) for draw in requested_draws]
            for prompt in prompts
        ]

    return Sampler(lambda params, prompts, draws: resume(params, prompts, draws, NULL_RESPONSE_STORE), resume)


NULL_RESPONSE_STORE = ResponseStore("", {}, lambda responses: None)
"""Reads and keeps nothing."""


def make_detokenizer(tokenizer) -> Callable[[Sequence[int], Sequence[int]], str]:
    """(tokens of a prompt, of a response) -> the text that the response adds, special tokens left out.

    Decoded behind its prompt, since many tokenizers drop the white space that a text begins with.
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
    """32 hex digits of a prompt, a draw, how it is drawn and the model that writes."""
    return hashlib.sha256(json.dumps([fingerprint, prompt, draw, sampling]).encode()).hexdigest()[:32]


# ---- on the device


def _expand_cache(block: KVCache, source_row: Int[Array, "rows"], free_slots: int) -> KVCache:
    """Prompts that were read once as the beginning of every row that continues them, with slots for `more` tokens.

    Copied once, and not in each step: the copy is a part of the cache that the loop would read anyway.
    """
    free = [(0, 0), (0, free_slots)]
    return KVCache(
        jnp.pad(block.keys[:, source_row], [(0, 0)] * 3 + free),
        jnp.pad(block.values[:, source_row], [(0, 0)] * 2 + [*free, (0, 0)]),
        jnp.pad(block.positions[source_row], free, constant_values=EMPTY_POSITION),
    )


# ---- on the host


def _plan_batches(
    prompts: Sequence[Prompt], draws: Sequence[int], sizes: Sequence[int], rows_per_batch: Callable[[int], int]
) -> list[list[PromptDraw]]:
    """Batches, a function of the prompts and draws alone; longest prompts first, all draws of a prompt side by side."""
    order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at].tokens), prompts[at].id))
    pending = [PromptDraw(at, draw) for at in order for draw in draws]
    batches, at = [], 0
    while at < len(pending):
        count = rows_per_batch(pick_bucket(len(prompts[pending[at].prompt].tokens), sizes))
        count -= count % len(draws) if count >= len(draws) else 0  # whole prompts: each is read in one batch only
        batches.append(pending[at : at + count])
        at += count
    return batches


def _build_batch(
    batch: list[PromptDraw],
    prompts: Sequence[Prompt],
    sizes: Sequence[int],
    rows_per_batch: Callable[[int], int],
    row_multiple: int,
) -> Batch:
    prompt_indices = list(dict.fromkeys(row.prompt for row in batch))
    length = pick_bucket(max(len(prompts[at].tokens) for at in prompt_indices), sizes)

    def pad_count(count: int) -> int:
        return min(row_multiple * 2 ** (-(-count // row_multiple) - 1).bit_length(), rows_per_batch(length))

    source_row, draws = (
        np.zeros((1, pad_count(len(batch))), np.int32),
        np.full((1, pad_count(len(batch))), -1, np.int32),
    )
    words = np.zeros((*draws.shape, 2), np.uint32)
    for at, row in enumerate(batch):
        source_row[0, at], draws[0, at], words[0, at] = (
            prompt_indices.index(row.prompt),
            row.draw,
            _hash_id(prompts[row.prompt].id),
        )
    ids = [np.asarray(prompts[at].tokens, np.int32) for at in prompt_indices]
    padding = pad_left(ids, [0] * len(ids), pad_count(len(prompt_indices)), length)
    return padding | {"source_row": source_row, "draws": draws, "words": words}


def _hash_id(id: str) -> Int[np.ndarray, "2"]:
    """64 bits of an id."""
    return np.frombuffer(hashlib.sha256(id.encode()).digest()[:8], "<u4")


def _make_response(
    prompt: Prompt, ids: list[int], log_probs: list[float], end_tokens: set[int], detokenize: Callable[..., str]
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
    """Each prompt once, in an order that does not depend on theirs."""
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
            f"tokens {max_batch_tokens}, multiple {row_multiple}, max_new {sampling.max_new_tokens}: each must be at least 1."
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
            f"prompt {long[0].id} has {len(long[0].tokens)} tokens; with max_new = {sampling.max_new_tokens} the model's "
            f"context of {config.max_length} has room for {room}. Lower max_new, or leave the prompt out"
            f"{f' ({len(long) - 1} more are too long)' if len(long) > 1 else ''}."
        )
    for prompt in prompts:
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id} is empty; begin it with the BOS token.")
        if min(prompt.tokens) < 0 or max(prompt.tokens) >= config.vocab_size:
            raise ValueError(
                f"prompt {prompt.id}: a token lies outside of the vocabulary, 0 to {config.vocab_size - 1}."
            )
