"""Log-likelihoods of responses: one engine that scores each request once and reads shared beginnings once."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.inference.padding import make_buckets, pad_left, pick_bucket
from bilevel_jax.lm.inference.prefixes import find_shared_prefixes
from bilevel_jax.lm.losses.sft import negative_log_likelihood
from bilevel_jax.lm.models.cache import EMPTY_POSITION, KVCache
from bilevel_jax.lm.models.config import DecoderConfig
from bilevel_jax.lm.models.decoder import Decoder


class LogLikRequest(NamedTuple):
    """A response to be scored after its prefix; token ids of the model's vocabulary."""

    prefix: tuple[int, ...]
    """What stands before the response, BOS included."""
    response: tuple[int, ...]


class LogLik(NamedTuple):
    """Σ_t log p(response_t | prefix, response_<t)."""

    nats: float
    """At most 0; NaN where the model's own numbers are."""
    num_tokens: int
    """Of the response: nats / tokens is per token."""


class LogLikStore(NamedTuple):
    """What has been scored before, and where more goes: how an interrupted scoring goes on."""

    fingerprint: str
    """Of the model and its precision. Part of each key, so that another model's results are never read."""
    results: Mapping[str, float]
    """`key` of a request -> nats."""
    save: Callable[[dict[str, float]], None]
    """Appends new results; they must be there, whole or not at all, when it returns."""
    save_every: int = 4096
    """Requests to a save, about; the last save is smaller. What is finished is also saved when scoring is stopped."""


class LogLikScorer(NamedTuple):
    """Log-likelihoods of a list of requests, in its order."""

    score: Callable[[Params, Sequence[LogLikRequest]], list[LogLik]]
    resume: Callable[[Params, Sequence[LogLikRequest], LogLikStore], list[LogLik]]
    """The same, from and to a store. After an interruption the same list gives, on a CPU, the same bits as without."""


class RequestRow(NamedTuple):
    """A request as a row of a batch: what is read after the cached stem."""

    request: int
    """Its place among the distinct requests."""
    source_row: int
    """The row of the cache that it continues."""
    start: int
    """The position of the first token that is read."""


class PrefixGroup(NamedTuple):
    """Stems that are cached together (none: requests that share nothing), and the batches that continue them."""

    prefixes: list[np.ndarray]
    batches: list[list[RequestRow]]


def make_loglik_scorer(
    decoder: Decoder,
    *,
    max_batch_tokens: int = 4096,
    bucket_lengths: Sequence[int] = (),
    share_prefixes: bool = True,
    row_multiple: int = 1,
    chunk: int = 4096,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    fetch: Callable[[Array], np.ndarray] = np.asarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LogLikScorer:
    """The engine of a decoder: its compiled functions live as long as it does, whatever the parameters.

    Equal requests are scored once. With `share`, what prefixes have in common is read once and kept as keys and values
    (stems.py: demonstrations that many questions follow, a prompt that several responses answer); the numbers are those
    of reading everything, up to rounding (tested: 1e-5 nats per token in float32). They do not depend on the order of
    the requests, and on the batches and devices only by rounding.

    tokens    token places of a batch, and of the stems that are cached together: this bounds the memory
    lengths   the lengths that rows are padded to; empty: 32, 48, 64, 96, 128 ... up to the context of the model. A row
              of a batch is as long as the shortest of them that holds it, and each pair of a stem's and a row's length
              compiles once (reading stems once more for each power of 2 of their number)
    multiple  the rows of every batch are a multiple of it: the number of devices
    chunk     tokens whose logits live at the same time
    place     puts a batch, leaves [1, rows, ...] or [1], on the devices
    fetch     gets all of an array from them
    progress  called with (requests done, distinct requests) after every batch

    Scoring raises ValueError, with the request's index, for one that is longer than the model's context, that has a
    response after nothing, or a token that the vocabulary lacks. An empty response has 0 nats and 0 tokens.
    """
    sizes = make_buckets(decoder.config, bucket_lengths)
    if min(max_batch_tokens, row_multiple, chunk) < 1:
        raise ValueError(f"tokens {max_batch_tokens}, multiple {row_multiple}, chunk {chunk}: each must be at least 1.")

    def rows_per_batch(length: int) -> int:
        return max(1, max_batch_tokens // length // row_multiple) * row_multiple

    @jax.jit
    def read_prefixes(params: Params, batch: Batch) -> KVCache:
        cache = decoder.extend(params, (), batch["tokens"][0], batch["positions"][0])[1]
        count, length = cache.positions.shape
        missing_rows = (
            rows_per_batch(length) - count
        )  # rows of one number, so that `losses` compiles once for this length of stems
        keys, values = (
            jnp.pad(part, [(0, 0), (0, missing_rows), *[(0, 0)] * 3]) for part in (cache.keys, cache.values)
        )
        return KVCache(
            keys, values, jnp.pad(cache.positions, [(0, missing_rows), (0, 0)], constant_values=EMPTY_POSITION)
        )

    @jax.jit
    def losses(params: Params, cache: KVCache | None, batch: Batch) -> Array:
        caches = () if cache is None else (cache._replace(source_row=batch["source_row"][0]),)
        hidden, _ = decoder.extend(params, caches, batch["tokens"][0], batch["positions"][0])
        return _response_losses(hidden, decoder.head(params), batch["targets"][0], batch["scored"][0], chunk)

    def resume(params: Params, requests: Sequence[LogLikRequest], store: LogLikStore) -> list[LogLik]:
        _check_requests(requests, decoder.config)
        distinct = sorted({request for request in requests if request.response})
        keys = [hash_request(request, store.fingerprint) for request in distinct]
        nats_found = [store.results.get(request_key) for request_key in keys]
        unsaved: dict[str, float] = {}
        count = sum(nats is not None for nats in nats_found)

        def collect(batch: list[RequestRow], values: Array) -> None:
            nonlocal count
            for row, line in zip(batch, fetch(values).astype(np.float64), strict=False):  # then rows of padding
                if nats_found[row.request] is None:
                    count += 1
                    nats = -float(line[-len(distinct[row.request].response) :].sum())
                    nats_found[row.request] = unsaved[keys[row.request]] = nats
            progress(count, len(distinct))
            if len(unsaved) >= store.save_every:
                flush()

        def flush() -> None:
            if unsaved:
                store.save(dict(unsaved))
                unsaved.clear()

        try:
            in_flight = None  # one batch is made and sent while the one before it is computed
            for group in _plan_batches(distinct, share_prefixes, sizes, rows_per_batch):
                # whole batches, also where a part of one is known: what a row shares a batch with changes its rounding
                unfinished = [batch for batch in group.batches if any(nats_found[row.request] is None for row in batch)]
                cache = None
                for batch in unfinished:
                    if group.prefixes and cache is None:
                        cache = read_prefixes(
                            params, place(_build_prefix_batch(group.prefixes, sizes, rows_per_batch, row_multiple))
                        )
                    arrays = _build_request_batch(batch, distinct, sizes, rows_per_batch, cached=cache is not None)
                    values = losses(params, cache, place(arrays))
                    if in_flight is not None:
                        collect(*in_flight)
                    in_flight = batch, values
            if in_flight is not None:
                collect(*in_flight)
        finally:
            flush()
        nats_by_request = dict(zip(distinct, nats_found, strict=True))
        return [LogLik(nats_by_request.get(request, 0.0) or 0.0, len(request.response)) for request in requests]

    return LogLikScorer(lambda params, requests: resume(params, requests, NULL_LOGLIK_STORE), resume)


NULL_LOGLIK_STORE = LogLikStore("", {}, lambda results: None)
"""Reads and keeps nothing."""


def hash_request(request: LogLikRequest, fingerprint: str) -> str:
    """32 hex digits of a request and of the model that scores it."""
    ids = np.asarray([len(request.prefix), *request.prefix, *request.response], np.int32)
    return hashlib.sha256(fingerprint.encode() + b"\0" + ids.tobytes()).hexdigest()[:32]


def _plan_batches(
    requests: Sequence[LogLikRequest], share_prefixes: bool, sizes: Sequence[int], rows_per_batch: Callable[[int], int]
) -> Iterator[PrefixGroup]:
    """Stems and batches, all a function of the set of requests alone. `requests` are distinct and sorted.

    Longest first, so that a batch is filled with shorter rows and only the last, cheapest one is not full.
    """

    def tokens_to_read(row: RequestRow) -> int:
        prefix, response = requests[row.request]
        return len(prefix) + len(response) - 1 - row.start  # the last token is only predicted

    def split_into_batches(pending: list[RequestRow]) -> list[list[RequestRow]]:
        pending = sorted(pending, key=lambda row: (-tokens_to_read(row), row.request))
        out, at = [], 0
        while at < len(pending):
            count = rows_per_batch(pick_bucket(tokens_to_read(pending[at]), sizes))
            out.append(pending[at : at + count])
            at += count
        return out

    # the last token of a prefix predicts the response, so it is read again with each
    shared_prefixes = (
        find_shared_prefixes([np.asarray(request.prefix[:-1], np.int32) for request in requests])
        if share_prefixes
        else []
    )
    without_prefix = set(range(len(requests))).difference(
        *(range(shared_prefix.start, shared_prefix.stop) for shared_prefix in shared_prefixes)
    )
    shared_prefixes, at = (
        sorted(shared_prefixes, key=lambda shared_prefix: (-shared_prefix.length, shared_prefix.start)),
        0,
    )
    while at < len(shared_prefixes):
        group = shared_prefixes[at : at + rows_per_batch(pick_bucket(shared_prefixes[at].length, sizes))]
        yield PrefixGroup(
            [
                np.asarray(requests[shared_prefix.start].prefix[: shared_prefix.length], np.int32)
                for shared_prefix in group
            ],
            split_into_batches(
                [
                    RequestRow(request, source_row, shared_prefix.length)
                    for source_row, shared_prefix in enumerate(group)
                    for request in range(shared_prefix.start, shared_prefix.stop)
                ]
            ),
        )
        at += len(group)
    yield PrefixGroup([], split_into_batches([RequestRow(request, 0, 0) for request in sorted(without_prefix)]))


def _build_prefix_batch(
    prefixes: list[np.ndarray], sizes: Sequence[int], rows_per_batch: Callable[[int], int], row_multiple: int
) -> Batch:
    """Of as many rows as there are stems, rounded up to `multiple` times a power of 2: often there are few."""
    length = pick_bucket(max(map(len, prefixes)), sizes)
    doublings = (-(-len(prefixes) // row_multiple) - 1).bit_length()
    return pad_left(prefixes, [0] * len(prefixes), min(row_multiple * 2**doublings, rows_per_batch(length)), length)


def _build_request_batch(
    batch: list[RequestRow],
    requests: Sequence[LogLikRequest],
    sizes: Sequence[int],
    rows_per_batch: Callable[[int], int],
    *,
    cached: bool,
) -> Batch:
    pairs = [requests[row.request] for row in batch]
    ids = [
        np.asarray((prefix + response)[row.start : -1], np.int32)
        for row, (prefix, response) in zip(batch, pairs, strict=True)
    ]
    responses = [response for _, response in pairs]
    length = pick_bucket(max(map(len, ids)), sizes)
    count = rows_per_batch(length)
    targets = np.zeros((1, count, length), np.int32)
    for row, response in enumerate(responses):
        targets[0, row, length - len(response) :] = response
    scored = np.asarray([max(map(len, responses))], np.int32)
    out = pad_left(ids, [row.start for row in batch], count, length) | {"targets": targets, "scored": scored}
    if cached:
        source_row = [row.source_row for row in batch] + [0] * (count - len(batch))
        out["source_row"] = np.asarray([source_row], np.int32)
    return out


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
