"""Batched text generation with a key-value cache."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int

from bilevel_jax.core.types import Batch, Fetch, Params
from bilevel_jax.lm.inference.continuous_batching import (
    ContinuousBatching,
    Programs,
    Request,
    Tokens,
    compile_programs,
    plan_batches,
)
from bilevel_jax.lm.inference.padding import BatchShapes, make_buckets
from bilevel_jax.lm.inference.sampling import SamplingParams
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
    fetch: Fetch = np.asarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sampler:
    """The sampler of a decoder: its compiled program lives as long as it does, whatever the parameters.

    A batch has a fixed number of places. Once a quarter of them is free, responses to waiting prompts begin there
    (`continuous_batching`); the last responses of each group of prompts of like length end without others. Token t of a
    draw is the argmax of log p (`log_probabilities`) plus Gumbel noise, a function of (seed, prompt id, draw, t) alone.
    So the responses do not depend on the order of the prompts, and on places and devices only through the rounding of
    log p: a token differs with a probability of about the total variation between the two, 1e-6 in float32 (bit-equal
    in the same places). The log-probs of a response are those of all its tokens, the end token included once; under
    temperature 0 they are 0, for nothing is drawn.

    Args:
        decoder: the model, from `make_decoder`.
        sampling: temperature, top-k, top-p, the most tokens of a response and the seed.
        detokenize: (tokens of a prompt, tokens of a response without its end token) -> text; see `make_detokenizer`.
        end_tokens: the tokens that end a response; with none, each has `max_new_tokens` tokens.
        max_batch_tokens: tokens of a batch, prompts and responses, padding included: this bounds the memory.
        bucket_lengths: the lengths in tokens that prompts are padded to; empty: 32, 48, 64, 96, 128 ... up to the
            context of the model. Each of them compiles once, and once more for each power of 2 of the prompts or places
            of a smaller batch.
        row_multiple: the rows of every batch are a multiple of it: the number of devices.
        place: puts a batch, leaves [1, rows, ...], on the devices.
        fetch: gets all of an array from them.
        progress: called with (responses done, responses in all) after as many responses as a batch has places.

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
    programs = compile_programs(Programs(decoder, sampling, tuple(end_tokens)))
    shapes = BatchShapes(buckets, max_batch_tokens, row_multiple, sampling.max_new_tokens)
    engine = _SamplerEngine(
        decoder,
        ContinuousBatching(programs, sampling, shapes, place, fetch),
        detokenize,
        frozenset(end_tokens),
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


# ---- on the host


@dataclass(frozen=True, eq=False)
class _SamplerEngine:
    """The settings of a sampler and its compiled programs; the state of a call is a `_ResponseCollector`."""

    decoder: Decoder
    batching: ContinuousBatching
    detokenize: Callable[[Sequence[int], Sequence[int]], str]
    end_tokens: frozenset[int]
    progress: Callable[[int, int], None]

    def resume(
        self, params: Params, prompts: Sequence[Prompt], draws: Sequence[int], store: ResponseStore
    ) -> list[list[Response]]:
        sampling, shapes = self.batching.sampling, self.batching.shapes
        unique_prompts = deduplicate_prompts(prompts)
        _check_prompts(unique_prompts, draws, sampling, self.decoder)
        is_greedy = not sampling.temperature  # then a prompt has one response, draw 0
        unique_draws = [0] * bool(draws) if is_greedy else sorted(set(draws))
        collector = _ResponseCollector(self, unique_prompts, unique_draws, store)
        plans = plan_batches(
            [prompt.tokens for prompt in unique_prompts],
            [prompt.id for prompt in unique_prompts],
            [_hash_id(prompt.id) for prompt in unique_prompts],
            unique_draws,
            shapes,
        )
        for plan in plans:
            try:
                for ended in self.batching.generate(params, plan, collector.count_tokens(plan.requests)):
                    collector.collect(ended)
                    if len(collector.unsaved) >= shapes.max_rows(plan.length):
                        collector.save()
                        collector.report()
            finally:
                collector.save()
            collector.report()
        prompt_index = {prompt.id: position for position, prompt in enumerate(unique_prompts)}
        requested_draws = [0] * len(draws) if is_greedy else draws
        return [
            [cast(Response, collector.responses[Request(prompt_index[prompt.id], draw)]) for draw in requested_draws]
            for prompt in prompts
        ]


class _ResponseCollector:
    """The responses of one call: those that the store has, and those that are generated."""

    def __init__(
        self, engine: _SamplerEngine, prompts: Sequence[Prompt], draws: Sequence[int], store: ResponseStore
    ) -> None:
        self.engine, self.prompts, self.store = engine, prompts, store
        self.responses: dict[Request, Response | None] = {}
        for prompt_index in range(len(prompts)):
            for draw in draws:
                request = Request(prompt_index, draw)
                self.responses[request] = store.results.get(self._hash(request))
        self.count = self.num_reported = sum(response is not None for response in self.responses.values())
        self.unsaved: dict[str, Response] = {}

    def count_tokens(self, requests: Sequence[Request]) -> dict[Request, int]:
        """The numbers of tokens of the responses that are there."""
        known = {request: self.responses[request] for request in requests}
        return {request: len(response.tokens) for request, response in known.items() if response is not None}

    def collect(self, ended: Sequence[tuple[Request, Tokens]]) -> None:
        for request, tokens in ended:
            response = _make_response(
                self.prompts[request.prompt], tokens, self.engine.end_tokens, self.engine.detokenize
            )
            self.responses[request] = self.unsaved[self._hash(request)] = response

    def save(self) -> None:
        """Stores the responses that are new, and then counts them; those that cannot be stored are not tried again."""
        if self.unsaved:
            new_responses, self.unsaved = self.unsaved, {}
            self.store.save(new_responses)
            self.count += len(new_responses)

    def report(self) -> None:
        """Tells the progress, where there is some."""
        if self.count > self.num_reported:
            self.num_reported = self.count
            self.engine.progress(self.count, len(self.responses))

    def _hash(self, request: Request) -> str:
        return hash_generation(
            self.prompts[request.prompt], request.draw, self.engine.batching.sampling, self.store.fingerprint
        )


def _hash_id(id: str) -> Int[np.ndarray, "2"]:
    """64 bits of an id."""
    return np.frombuffer(hashlib.sha256(id.encode()).digest()[:8], "<u4")


def _make_response(
    prompt: Prompt, tokens: Tokens, end_tokens: frozenset[int], detokenize: Callable[..., str]
) -> Response:
    if not np.isfinite(tokens.log_probs).all():
        raise FloatingPointError(
            f"prompt {prompt.id}: the model's logits are not all finite. Its parameters are broken or too large."
        )
    ended = tokens.ids[-1] in end_tokens
    text = detokenize(prompt.tokens, tokens.ids[: len(tokens.ids) - ended])
    return Response(text, tuple(tokens.ids), tuple(tokens.log_probs), ended)


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
