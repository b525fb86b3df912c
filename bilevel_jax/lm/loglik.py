"""Log-likelihoods of responses: one engine that scores each request once and reads shared beginnings once."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.losses import negative_log_likelihood
from bilevel_jax.lm.models.cache import EMPTY, Cache
from bilevel_jax.lm.models.config import DecoderConfig
from bilevel_jax.lm.models.decoder import Decoder
from bilevel_jax.lm.padding import buckets, fit, left_padded
from bilevel_jax.lm.stems import stems


class Request(NamedTuple):
    """A response to be scored after its prefix; token ids of the model's vocabulary."""

    prefix: tuple[int, ...]
    """What stands before the response, BOS included."""
    response: tuple[int, ...]


class LogLik(NamedTuple):
    """Σ_t log p(response_t | prefix, response_<t)."""

    nats: float
    """At most 0; NaN where the model's own numbers are."""
    tokens: int
    """Of the response: nats / tokens is per token."""


class Store(NamedTuple):
    """What has been scored before, and where more goes: how an interrupted scoring goes on."""

    fingerprint: str
    """Of the model and its precision. Part of each key, so that another model's results are never read."""
    done: Mapping[str, float]
    """`key` of a request -> nats."""
    save: Callable[[dict[str, float]], None]
    """Appends new results; they must be there, whole or not at all, when it returns."""
    every: int = 4096
    """Requests to a save, about; the last save is smaller. What is finished is also saved when scoring is stopped."""


class Engine(NamedTuple):
    """Log-likelihoods of a list of requests, in its order."""

    score: Callable[[Params, Sequence[Request]], list[LogLik]]
    resume: Callable[[Params, Sequence[Request], Store], list[LogLik]]
    """The same, from and to a store. After an interruption the same list gives, on a CPU, the same bits as without."""


class Row(NamedTuple):
    """A request as a row of a batch: what is read after the cached stem."""

    request: int
    """Its place among the distinct requests."""
    owner: int
    """The row of the cache that it continues."""
    start: int
    """The position of the first token that is read."""


class Part(NamedTuple):
    """Stems that are cached together (none: requests that share nothing), and the batches that continue them."""

    stems: list[np.ndarray]
    batches: list[list[Row]]


def engine(
    decoder: Decoder,
    *,
    tokens: int = 4096,
    lengths: Sequence[int] = (),
    share: bool = True,
    multiple: int = 1,
    chunk: int = 4096,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    fetch: Callable[[Array], np.ndarray] = np.asarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Engine:
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
    sizes = buckets(decoder.config, lengths)
    if min(tokens, multiple, chunk) < 1:
        raise ValueError(f"tokens {tokens}, multiple {multiple}, chunk {chunk}: each must be at least 1.")

    def rows(length: int) -> int:
        return max(1, tokens // length // multiple) * multiple

    @jax.jit
    def read(params: Params, batch: Batch) -> Cache:
        cache = decoder.extend(params, (), batch["tokens"][0], batch["positions"][0])[1]
        count, length = cache.positions.shape
        more = rows(length) - count  # rows of one number, so that `losses` compiles once for this length of stems
        keys, values = (jnp.pad(part, [(0, 0), (0, more), *[(0, 0)] * 3]) for part in (cache.keys, cache.values))
        return Cache(keys, values, jnp.pad(cache.positions, [(0, more), (0, 0)], constant_values=EMPTY))

    @jax.jit
    def losses(params: Params, cache: Cache | None, batch: Batch) -> Array:
        caches = () if cache is None else (cache._replace(owner=batch["owner"][0]),)
        hidden, _ = decoder.extend(params, caches, batch["tokens"][0], batch["positions"][0])
        return _tail_losses(hidden, decoder.head(params), batch["targets"][0], batch["scored"][0], chunk)

    def resume(params: Params, requests: Sequence[Request], store: Store) -> list[LogLik]:
        _check(requests, decoder.config)
        distinct = sorted({request for request in requests if request.response})
        keys = [key(request, store.fingerprint) for request in distinct]
        known = [store.done.get(one) for one in keys]
        waiting: dict[str, float] = {}
        count = sum(nats is not None for nats in known)

        def collect(batch: list[Row], values: Array) -> None:
            nonlocal count
            for row, line in zip(batch, fetch(values).astype(np.float64), strict=False):  # then rows of padding
                if known[row.request] is None:
                    count += 1
                    nats = -float(line[-len(distinct[row.request].response) :].sum())
                    known[row.request] = waiting[keys[row.request]] = nats
            progress(count, len(distinct))
            if len(waiting) >= store.every:
                flush()

        def flush() -> None:
            if waiting:
                store.save(dict(waiting))
                waiting.clear()

        try:
            last = None  # one batch is made and sent while the one before it is computed
            for part in _plan(distinct, share, sizes, rows):
                # whole batches, also where a part of one is known: what a row shares a batch with changes its rounding
                todo = [batch for batch in part.batches if any(known[row.request] is None for row in batch)]
                cache = None
                for batch in todo:
                    if part.stems and cache is None:
                        cache = read(params, place(_stem_batch(part.stems, sizes, rows, multiple)))
                    made = _row_batch(batch, distinct, sizes, rows, cached=cache is not None)
                    values = losses(params, cache, place(made))
                    if last is not None:
                        collect(*last)
                    last = batch, values
            if last is not None:
                collect(*last)
        finally:
            flush()
        table = dict(zip(distinct, known, strict=True))
        return [LogLik(table.get(request, 0.0) or 0.0, len(request.response)) for request in requests]

    return Engine(lambda params, requests: resume(params, requests, NOTHING), resume)


NOTHING = Store("", {}, lambda results: None)
"""Reads and keeps nothing."""


def key(request: Request, fingerprint: str) -> str:
    """32 hex digits of a request and of the model that scores it."""
    ids = np.asarray([len(request.prefix), *request.prefix, *request.response], np.int32)
    return hashlib.sha256(fingerprint.encode() + b"\0" + ids.tobytes()).hexdigest()[:32]


def _plan(requests: Sequence[Request], share: bool, sizes: Sequence[int], rows: Callable[[int], int]) -> Iterator[Part]:
    """Stems and batches, all a function of the set of requests alone. `requests` are distinct and sorted.

    Longest first, so that a batch is filled with shorter rows and only the last, cheapest one is not full.
    """

    def length(row: Row) -> int:
        prefix, response = requests[row.request]
        return len(prefix) + len(response) - 1 - row.start  # the last token is only predicted

    def batches(waiting: list[Row]) -> list[list[Row]]:
        waiting = sorted(waiting, key=lambda row: (-length(row), row.request))
        out, at = [], 0
        while at < len(waiting):
            count = rows(fit(length(waiting[at]), sizes))
            out.append(waiting[at : at + count])
            at += count
        return out

    # the last token of a prefix predicts the response, so it is read again with each
    found = stems([np.asarray(request.prefix[:-1], np.int32) for request in requests]) if share else []
    alone = set(range(len(requests))).difference(*(range(stem.start, stem.stop) for stem in found))
    found, at = sorted(found, key=lambda stem: (-stem.length, stem.start)), 0
    while at < len(found):
        together = found[at : at + rows(fit(found[at].length, sizes))]
        yield Part(
            [np.asarray(requests[stem.start].prefix[: stem.length], np.int32) for stem in together],
            batches(
                [
                    Row(request, owner, stem.length)
                    for owner, stem in enumerate(together)
                    for request in range(stem.start, stem.stop)
                ]
            ),
        )
        at += len(together)
    yield Part([], batches([Row(request, 0, 0) for request in sorted(alone)]))


def _stem_batch(stems: list[np.ndarray], sizes: Sequence[int], rows: Callable[[int], int], multiple: int) -> Batch:
    """Of as many rows as there are stems, rounded up to `multiple` times a power of 2: often there are few."""
    length = fit(max(map(len, stems)), sizes)
    doublings = (-(-len(stems) // multiple) - 1).bit_length()
    return left_padded(stems, [0] * len(stems), min(multiple * 2**doublings, rows(length)), length)


def _row_batch(
    batch: list[Row], requests: Sequence[Request], sizes: Sequence[int], rows: Callable[[int], int], *, cached: bool
) -> Batch:
    pairs = [requests[row.request] for row in batch]
    ids = [
        np.asarray((prefix + response)[row.start : -1], np.int32)
        for row, (prefix, response) in zip(batch, pairs, strict=True)
    ]
    responses = [response for _, response in pairs]
    length = fit(max(map(len, ids)), sizes)
    count = rows(length)
    targets = np.zeros((1, count, length), np.int32)
    for row, response in enumerate(responses):
        targets[0, row, length - len(response) :] = response
    scored = np.asarray([max(map(len, responses))], np.int32)
    out = left_padded(ids, [row.start for row in batch], count, length) | {"targets": targets, "scored": scored}
    if cached:
        owner = [row.owner for row in batch] + [0] * (count - len(batch))
        out["owner"] = np.asarray([owner], np.int32)
    return out


def _tail_losses(
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


def _check(requests: Sequence[Request], config: DecoderConfig) -> None:
    for index, (prefix, response) in enumerate(requests):
        about = f"request {index} ({len(prefix)} tokens of prefix, {len(response)} of response)"
        if not response:
            continue
        if not prefix:
            raise ValueError(f"{about}: nothing stands before the response; begin the prefix with the BOS token.")
        if (read := len(prefix) + len(response) - 1) > config.max_length:
            raise ValueError(
                f"{about} takes {read} token places, and the model's context has {config.max_length}. "
                "Shorten it, or use fewer demonstrations."
            )
        if min(min(prefix), min(response)) < 0 or max(max(prefix), max(response)) >= config.vocab:
            raise ValueError(f"{about}: a token lies outside of the vocabulary, 0 to {config.vocab - 1}.")
