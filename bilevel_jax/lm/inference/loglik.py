"""Log-likelihoods of responses, with shared prefixes cached."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Fetch, Params
from bilevel_jax.lm.inference.padding import BatchShapes, make_buckets, pad_left
from bilevel_jax.lm.inference.prefixes import find_shared_prefixes
from bilevel_jax.lm.losses.sft import negative_log_likelihood
from bilevel_jax.lm.models.cache import EMPTY_POSITION, KVCache
from bilevel_jax.lm.models.config import DecoderConfig
from bilevel_jax.lm.models.decoder import Decoder

MAX_BATCH_TOKENS = 4096
"""Tokens of a batch of requests, padding included, unless more are asked for."""


class LogLikRequest(NamedTuple):
    """A response to be scored after its prefix; token ids of the model's vocabulary."""

    prefix: tuple[int, ...]
    """What stands before the response, BOS included."""
    response: tuple[int, ...]


class LogLik(NamedTuple):
    """Σ_t log p(response_t | prefix, response_<t)."""

    nats: float
    """At most 0; NaN where the model's logits are."""
    num_tokens: int
    """Of the response: nats / num_tokens is the mean per token."""


class LogLikStore(NamedTuple):
    """Earlier results, and where new ones are stored: how an interrupted scoring resumes."""

    fingerprint: str
    """Of the model and its precision. Part of each key, so that another model's results are never read."""
    results: Mapping[str, float]
    """`hash_request` of a request -> nats."""
    save: Callable[[dict[str, float]], None]
    """Appends new results; when it returns they are there, whole or not at all."""
    save_every: int = 4096
    """Requests to a save, about; the last save is smaller. What is finished is also saved when scoring is stopped."""


class LogLikScorer(NamedTuple):
    """Log-likelihoods of a list of requests, in its order."""

    score: Callable[[Params, Sequence[LogLikRequest]], list[LogLik]]
    resume: Callable[[Params, Sequence[LogLikRequest], LogLikStore], list[LogLik]]
    """The same, from and to a store. After an interruption the same list gives, on a CPU, the same bits as without."""
    count_positions: Callable[[Sequence[LogLikRequest]], int]
    """The token places that scoring a list reads, padding included; an interruption reads some of them twice."""


class RequestRow(NamedTuple):
    """A request as a row of a batch: what is read after the cached prefix."""

    request: int
    """Its index among the distinct requests."""
    source_row: int
    """The row of the cache that it continues."""
    start: int
    """The position of the first token that is read."""


class PrefixGroup(NamedTuple):
    """Prefixes that are cached together (none: requests that share nothing), and the batches that continue them."""

    prefixes: list[np.ndarray]
    batches: list[list[RequestRow]]


def make_loglik_scorer(
    decoder: Decoder,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    bucket_lengths: Sequence[int] = (),
    share_prefixes: bool = True,
    row_multiple: int = 1,
    chunk: int = 4096,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    fetch: Fetch = np.asarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LogLikScorer:
    """The scorer of a decoder: its compiled functions live as long as it does, whatever the parameters.

    Equal requests are scored once. With `share_prefixes`, what prefixes have in common is read once and kept as keys
    and values (prefixes.py: demonstrations that many questions follow, a prompt that several responses answer); the
    numbers are those of reading everything, up to rounding (tested: 1e-5 nats per token in float32). They do not depend
    on the order of the requests, and on the batches and devices only by rounding.

    Args:
        decoder: the model, from `make_decoder`.
        max_batch_tokens: tokens of a batch, padding included, and of the prefixes that are cached together: this bounds
            the memory.
        bucket_lengths: the lengths in tokens that rows are padded to; empty: 32, 48, 64, 96, 128 ... up to the context
            of the model. A row is as long as the shortest of them that holds it, and each pair of a prefix's and a
            row's length compiles once (reading prefixes once more for each power of 2 of their number).
        share_prefixes: whether shared prefixes are read once.
        row_multiple: the rows of every batch are a multiple of it: the number of devices.
        chunk: tokens whose logits are in memory at the same time.
        place: puts a batch, leaves [1, rows, ...] or [1], on the devices.
        fetch: gets all of an array from them.
        progress: called with (requests done, distinct requests) after every batch.

    Returns:
        Scoring without and with a store of earlier results, and its work. All raise ValueError, with the request's
        index, for a request that is longer than the model's context, that has a response after nothing, or a token that
        the vocabulary lacks. An empty response has 0 nats and 0 tokens.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> import jax
        >>> from bilevel_jax.lm import models
        >>> config = models.DecoderConfig(
        ...     vocab_size=11, width=8, mlp_width=16, layers=1, heads=2, kv_heads=1, head_dim=4, max_length=16
        ... )
        >>> scorer = make_loglik_scorer(models.make_decoder(config))
        >>> params = models.init_params(config, jax.random.key(0))
        >>> [loglik] = scorer.score(params, [LogLikRequest(prefix=(1, 5, 7), response=(4, 2))])
        >>> loglik.nats < 0, loglik.num_tokens
        (True, 2)
    """
    buckets = make_buckets(decoder.config, bucket_lengths)
    if min(max_batch_tokens, row_multiple, chunk) < 1:
        raise ValueError(
            f"max_batch_tokens {max_batch_tokens}, row_multiple {row_multiple}, chunk {chunk}: each must be at least 1."
        )
    shapes = BatchShapes(buckets, max_batch_tokens, row_multiple)
    programs = _ScoringPrograms(decoder, shapes, chunk)
    engine = _LogLikEngine(
        decoder.config,
        jax.jit(programs.read_prefixes),
        jax.jit(programs.losses),
        shapes,
        share_prefixes,
        place,
        fetch,
        progress,
    )
    return LogLikScorer(
        lambda params, requests: engine.resume(params, requests, NULL_LOGLIK_STORE),
        engine.resume,
        engine.count_positions,
    )


NULL_LOGLIK_STORE = LogLikStore("", {}, lambda results: None)
"""An empty store that saves nothing."""


def hash_request(request: LogLikRequest, fingerprint: str) -> str:
    """32 hex digits of a request and of the model that scores it.

    Args:
        request: hashed with its prefix and response.
        fingerprint: of the model, its parameters and its precision.

    Returns:
        The key of the result in a `LogLikStore`.
    """
    ids = np.asarray([len(request.prefix), *request.prefix, *request.response], np.int32)
    return hashlib.sha256(fingerprint.encode() + b"\0" + ids.tobytes()).hexdigest()[:32]


# ---- on the host


@dataclass(frozen=True, eq=False)
class _LogLikEngine:
    """The settings of a scorer and its compiled programs; the state of a call is a `_LogLikCollector`."""

    config: DecoderConfig
    read_prefixes: Callable[[Params, Batch], KVCache]
    losses: Callable[[Params, KVCache | None, Batch], Array]
    shapes: BatchShapes
    share_prefixes: bool
    place: Callable[[Batch], Batch]
    fetch: Fetch
    progress: Callable[[int, int], None]

    def resume(self, params: Params, requests: Sequence[LogLikRequest], store: LogLikStore) -> list[LogLik]:
        _check_requests(requests, self.config)
        collector = _LogLikCollector(_distinct_requests(requests), store)
        try:
            in_flight = None  # one batch is prepared and sent while the one before it is computed
            for batch, values in self._score_batches(params, collector):
                if in_flight is not None:
                    self._collect(collector, *in_flight)
                in_flight = batch, values
            if in_flight is not None:
                self._collect(collector, *in_flight)
        finally:
            collector.save()
        return collector.loglik_of(requests)

    def count_positions(self, requests: Sequence[LogLikRequest]) -> int:
        _check_requests(requests, self.config)
        distinct, total = _distinct_requests(requests), 0
        for group in _plan_batches(distinct, self.share_prefixes, self.shapes):
            if group.prefixes and group.batches:
                total += _build_prefix_batch(group.prefixes, self.shapes)["tokens"].size
            for batch in group.batches:
                length = self.shapes.pick_length(max(_num_tokens_to_read(row, distinct) for row in batch))
                total += self.shapes.max_rows(length) * length
        return total

    def _score_batches(self, params: Params, collector: "_LogLikCollector") -> Iterator[tuple[list[RequestRow], Array]]:
        """The batches that the store does not have whole, and their losses, perhaps still being computed."""
        for group in _plan_batches(collector.requests, self.share_prefixes, self.shapes):
            cache = None
            # whole batches, also where a part of one is known: what a row shares a batch with changes its rounding
            for batch in [batch for batch in group.batches if not collector.has_all(batch)]:
                if group.prefixes and cache is None:
                    cache = self.read_prefixes(params, self.place(_build_prefix_batch(group.prefixes, self.shapes)))
                arrays = _build_request_batch(batch, collector.requests, self.shapes, cached=cache is not None)
                yield batch, self.losses(params, cache, self.place(arrays))

    def _collect(self, collector: "_LogLikCollector", batch: list[RequestRow], values: Array) -> None:
        collector.collect(batch, self.fetch(values).astype(np.float64))
        self.progress(collector.count, len(collector.requests))
        collector.save_if_due()


class _LogLikCollector:
    """The results of one call: those that the store has, and those that batches add."""

    def __init__(self, requests: list[LogLikRequest], store: LogLikStore) -> None:
        self.requests, self.store = requests, store
        self.keys = [hash_request(request, store.fingerprint) for request in requests]
        self.nats = [store.results.get(key) for key in self.keys]
        self.count = sum(nats is not None for nats in self.nats)
        self.unsaved: dict[str, float] = {}

    def has_all(self, batch: list[RequestRow]) -> bool:
        return all(self.nats[row.request] is not None for row in batch)

    def collect(self, batch: list[RequestRow], losses: Float[np.ndarray, "rows len"]) -> None:
        """Sums the losses of each response that is new."""
        for row, row_losses in zip(batch, losses, strict=False):  # then rows of padding
            if self.nats[row.request] is None:
                nats = -float(row_losses[-len(self.requests[row.request].response) :].sum())
                self.nats[row.request] = self.unsaved[self.keys[row.request]] = nats
                self.count += 1

    def save_if_due(self) -> None:
        if len(self.unsaved) >= self.store.save_every:
            self.save()

    def save(self) -> None:
        if self.unsaved:
            self.store.save(dict(self.unsaved))
            self.unsaved.clear()

    def loglik_of(self, requests: Sequence[LogLikRequest]) -> list[LogLik]:
        nats = dict(zip(self.requests, self.nats, strict=True))
        return [LogLik(nats.get(request, 0.0) or 0.0, len(request.response)) for request in requests]


def _plan_batches(
    requests: Sequence[LogLikRequest], share_prefixes: bool, shapes: BatchShapes
) -> Iterator[PrefixGroup]:
    """Prefixes and batches, all a function of the set of requests alone. `requests` are distinct and sorted.

    Longest first, so that a batch is filled with shorter rows and only the last, cheapest one is not full.
    """
    # the last token of a prefix predicts the response, so it is read again with each
    prefix_tokens = [np.asarray(request.prefix[:-1], np.int32) for request in requests]
    shared_prefixes = find_shared_prefixes(prefix_tokens) if share_prefixes else []
    shared_prefixes = sorted(shared_prefixes, key=lambda shared_prefix: (-shared_prefix.length, shared_prefix.start))
    at = 0
    while at < len(shared_prefixes):
        group = shared_prefixes[at : at + shapes.max_rows(shapes.pick_length(shared_prefixes[at].length))]
        rows = [
            RequestRow(request, source_row, shared_prefix.length)
            for source_row, shared_prefix in enumerate(group)
            for request in range(shared_prefix.start, shared_prefix.stop)
        ]
        prefixes = [prefix_tokens[shared_prefix.start][: shared_prefix.length] for shared_prefix in group]
        yield PrefixGroup(prefixes, _split_into_batches(rows, requests, shapes))
        at += len(group)
    with_prefix = {
        request for shared_prefix in shared_prefixes for request in range(shared_prefix.start, shared_prefix.stop)
    }
    rows = [RequestRow(request, 0, 0) for request in range(len(requests)) if request not in with_prefix]
    yield PrefixGroup([], _split_into_batches(rows, requests, shapes))


def _split_into_batches(
    rows: list[RequestRow], requests: Sequence[LogLikRequest], shapes: BatchShapes
) -> list[list[RequestRow]]:
    rows = sorted(rows, key=lambda row: (-_num_tokens_to_read(row, requests), row.request))
    batches, at = [], 0
    while at < len(rows):
        count = shapes.max_rows(shapes.pick_length(_num_tokens_to_read(rows[at], requests)))
        batches.append(rows[at : at + count])
        at += count
    return batches


def _distinct_requests(requests: Sequence[LogLikRequest]) -> list[LogLikRequest]:
    return sorted({request for request in requests if request.response})


def _num_tokens_to_read(row: RequestRow, requests: Sequence[LogLikRequest]) -> int:
    prefix, response = requests[row.request]
    return len(prefix) + len(response) - 1 - row.start  # the last token is only predicted


def _build_prefix_batch(prefixes: list[np.ndarray], shapes: BatchShapes) -> Batch:
    length = shapes.pick_length(max(map(len, prefixes)))
    return pad_left(prefixes, [0] * len(prefixes), shapes.pad_rows(len(prefixes), length), length)


def _build_request_batch(
    batch: list[RequestRow], requests: Sequence[LogLikRequest], shapes: BatchShapes, *, cached: bool
) -> Batch:
    pairs = [requests[row.request] for row in batch]
    ids = [
        np.asarray((prefix + response)[row.start : -1], np.int32)
        for row, (prefix, response) in zip(batch, pairs, strict=True)
    ]
    responses = [response for _, response in pairs]
    length = shapes.pick_length(max(map(len, ids)))
    count = shapes.max_rows(length)
    targets = np.zeros((1, count, length), np.int32)
    for row, response in enumerate(responses):
        targets[0, row, length - len(response) :] = response
    scored = np.asarray([max(map(len, responses))], np.int32)
    out = pad_left(ids, [row.start for row in batch], count, length) | {"targets": targets, "scored": scored}
    if cached:
        source_row = [row.source_row for row in batch] + [0] * (count - len(batch))
        out["source_row"] = np.asarray([source_row], np.int32)
    return out


# ---- on the device


@dataclass(frozen=True, eq=False)
class _ScoringPrograms:
    """The two programs of a scorer: reading prefixes into a cache, and the losses of what follows them."""

    decoder: Decoder
    shapes: BatchShapes
    chunk: int

    def read_prefixes(self, params: Params, batch: Batch) -> KVCache:
        cache = self.decoder.extend(params, (), batch["tokens"][0], batch["positions"][0])[1]
        count, length = cache.positions.shape
        # a full batch of rows, so that `losses` compiles once for this length of prefixes
        missing_rows = self.shapes.max_rows(length) - count
        keys, values = (
            jnp.pad(part, [(0, 0), (0, missing_rows), *[(0, 0)] * 3]) for part in (cache.keys, cache.values)
        )
        positions = jnp.pad(cache.positions, [(0, missing_rows), (0, 0)], constant_values=EMPTY_POSITION)
        return KVCache(keys, values, positions)

    def losses(self, params: Params, cache: KVCache | None, batch: Batch) -> Array:
        caches = () if cache is None else (cache._replace(source_row=batch["source_row"][0]),)
        hidden, _ = self.decoder.extend(params, caches, batch["tokens"][0], batch["positions"][0])
        head = self.decoder.head(params)
        return _response_losses(hidden, head, batch["targets"][0], batch["scored"][0], self.chunk)


def _response_losses(
    hidden: Float[Array, "rows len width"], head: Array, targets: Array, scored: Array, chunk: int
) -> Float[Array, "rows len"]:
    """-log p of the targets in the last `scored` columns (before them: anything), in pieces of about `chunk` tokens.

    The number of pieces is data: logits are made of the responses only, and one program serves every length of them.
    """
    rows, length, _ = hidden.shape
    size = min(length, max(1, chunk // rows))

    def piece(number: Array, out: Array) -> Array:
        start = jnp.maximum(length - (number + 1) * size, 0)
        part = jax.lax.dynamic_slice_in_dim(hidden, start, size, 1)
        values = negative_log_likelihood(part @ head, jax.lax.dynamic_slice_in_dim(targets, start, size, 1))
        return jax.lax.dynamic_update_slice_in_dim(out, values, start, 1)

    return jax.lax.fori_loop(0, -(-scored // size), piece, jnp.zeros((rows, length), hidden.dtype))


def _check_requests(requests: Sequence[LogLikRequest], config: DecoderConfig) -> None:
    for index, (prefix, response) in enumerate(requests):
        description = f"request {index} ({len(prefix)} tokens of prefix, {len(response)} of response)"
        if not response:
            continue
        if not prefix:
            raise ValueError(f"{description}: nothing stands before the response; begin the prefix with the BOS token.")
        if (num_read := len(prefix) + len(response) - 1) > config.max_length:
            raise ValueError(
                f"{description} takes {num_read} token places, and the model's context has {config.max_length}. "
                "Shorten it, or use fewer demonstrations."
            )
        if min(min(prefix), min(response)) < 0 or max(max(prefix), max(response)) >= config.vocab_size:
            raise ValueError(f"{description}: a token lies outside of the vocabulary, 0 to {config.vocab_size - 1}.")
