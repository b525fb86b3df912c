"""Streams of batches: pure functions of the step, of one shape for a whole run, built in O(batch).

A global step draws `batch` examples and deals them, in order, to micro-batches of E example slots. An example is one
sequence or, for preference pairs, two; so there are S = E or S = 2E sequence slots, of which 2e and 2e + 1 are the
chosen and the rejected side of example e. A micro-batch is R rows of L token places; without packing R = S, with
packing several sequences share a row. Batches are numpy:

    tokens      i32[M,R,L]   what the model reads: ids[:-1]
    targets     i32[M,R,L]   what it should say next: ids[1:]
    positions   i32[M,R,L]   from 0 for each sequence
    segments    i32[M,R,L]   0 = padding, 1.. = the sequences packed in this row; attention stays within a segment
    slot        i32[M,R,L]   the sequence slot that a supervised target belongs to; S where not supervised
    index       i32[M,E]     the row of the weight table; PADDING for an empty slot
    supervised  f32[M,S]     number of supervised targets; 1 for an empty slot, so that it may be divided by
    reference   f32[M,E]     where the corpus has it: the reference model's margin of a pair, nats; 0 for an empty slot
    sampler     f32[M,R,L]   where the corpus has it: log-probability of the target under the model that sampled it,
                             nats; nan where it was not sampled
    base        f32[M,E]     where the corpus has it: how much the example counts before any weight; 0 for an empty slot
    rows        f32[M]       real examples in the whole global step (in an evaluation stream: in the whole stream)
    targeted    f32[M]       supervised targets in the same, for losses per token

What a global step holds is the same packed or not, as 1 x 16 or as 16 x 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bilevel_jax.core.types import PADDING, Batch, Stream
from bilevel_jax.lm.tokens import Corpus

Order = Callable[[int], Int[np.ndarray, "batch"]]
"""step -> the rows of the corpus of that global step; an empty slot holds the number of rows of the corpus."""

Own = Bool[np.ndarray, "rows"]
"""Which rows of token places are made here; the others, which other processes make, stay empty."""

ROUNDS = 16
"""Feistel rounds. At 5 to 12 rows 6 are visibly uneven (chi-square of pairs of places) and 10 are not."""


class Layout(NamedTuple):
    """The shape of every batch of a run: [micro, rows, length] token places and [micro, examples] slots."""

    micro: int
    examples: int
    rows: int
    length: int
    sequences: int = 1
    """Sequences of an example: 2 for preference pairs."""

    @property
    def flat(self) -> "Layout":
        """The layout without packing: one row of token places for each sequence."""
        return self._replace(rows=self.examples * self.sequences)


def order(rows: int, batch: int, seed: int) -> Order:
    """Epochs without replacement, each a new permutation of range(rows); O(batch) work and memory per call.

    A pure function of (seed, step) without tables, so that resuming needs no state and ten million rows cost what
    ten do. The last step of an epoch is filled up with `rows`, so every epoch covers every row exactly once.
    """
    return subset(range(rows), rows, batch, seed)


def subset(chosen: Sequence[int] | Int[np.ndarray, "chosen"], rows: int, batch: int, seed: int) -> Order:
    """As `order`, over the chosen rows only; `rows` is the size of the whole corpus, to which they refer."""
    steps = steps_per_epoch(len(chosen), batch)
    lookup = _lookup(chosen, rows)

    def at(step: int) -> Int[np.ndarray, "batch"]:
        epoch, part = divmod(step, steps)
        return lookup(_filled(part, len(chosen), batch, lambda places: permutation(places, len(chosen), seed, epoch)))

    return at


def grouped(groups: Int[np.ndarray, "groups size"], rows: int, batch: int, seed: int) -> Order:
    """As `subset`, but whole groups are shuffled, and the rows of one stand side by side, in one micro-batch.

    For losses that compare rows. A group that is not full holds `rows` in its empty places. `batch` must be a multiple
    of the size, and so must be the slots of a micro-batch.
    """
    size = groups.shape[1]
    if batch % size:
        raise ValueError(f"a batch of {batch} rows does not hold whole groups of {size}.")
    table = np.concatenate([groups, np.full((1, size), rows)])
    of_groups = order(len(groups), batch // size, seed)
    return lambda step: table[of_groups(step)].ravel()


def in_order(chosen: Sequence[int] | Int[np.ndarray, "chosen"], rows: int, batch: int) -> Order:
    """The chosen rows one after another, without shuffling: one epoch of `steps_per_epoch` steps."""
    lookup = _lookup(chosen, rows)
    return lambda step: lookup(_filled(step, len(chosen), batch, lambda places: places))


def steps_per_epoch(rows: int, batch: int) -> int:
    """ceil(rows / batch): the last step of an epoch may be partly empty."""
    if rows < 1 or batch < 1:
        raise ValueError(f"{rows} rows in batches of {batch}: both must be at least 1.")
    return -(-rows // batch)


def layout(corpus: Corpus, orders: Sequence[Order], steps: int, *, micro: int, length: int, packing: bool) -> Layout:
    """The one shape that holds every step of every given order (all seeds and subsets of a comparison).

    `micro` is the number of micro-batches and `length` the token places in a row; a sequence of n tokens takes n - 1.
    With packing this counts, step by step, the rows that the fullest micro-batch needs.
    """
    longest = int(corpus.lengths.max()) - 1
    if longest > length:
        row = int(corpus.lengths.argmax()) // corpus.sequences
        raise ValueError(
            f"row {row} takes {longest} token places, but a row of the batch has {length}. "
            "Raise length, or tokenize with a smaller max_length."
        )
    batch = len(orders[0](0))
    if micro < 1 or batch % micro:
        raise ValueError(f"a batch of {batch} examples does not split into {micro} micro-batches of equal size.")
    examples = batch // micro
    flat = Layout(micro, examples, examples * corpus.sequences, length, corpus.sequences)
    if not packing:
        return flat
    rows = max(
        _fit(_places(corpus, part), length)[-1]
        for one in orders
        for step in range(steps)
        for part in one(step).reshape(micro, examples)
    )
    return flat._replace(rows=rows)


def evaluation_layout(corpus: Corpus, batch: int, *, micro: int, length: int, packing: bool) -> Layout:
    """The layout of `evaluation_stream`: every row of the corpus once, in order."""
    steps = steps_per_epoch(len(corpus.kept), batch)
    orders = [in_order(corpus.kept, corpus.rows, batch)]
    return layout(corpus, orders, steps, micro=micro, length=length, packing=packing)


def longest(corpus: Corpus, multiple: int = 8) -> int:
    """Token places of the longest sequence, rounded up: the least `length` that a layout of this corpus may have."""
    return -(-(int(corpus.lengths.max()) - 1) // multiple) * multiple


def train_stream(
    corpus: Corpus, order: Order, steps: int, layout: Layout, *, total: int = 0, own: Own | None = None
) -> Stream:
    """Batch t holds the rows order(t); its `rows` is the number of real ones among them.

    A stream that is summed rather than stepped on (what implicit estimators read) gives `total`, the number of all its
    rows, which takes the place of `rows`; its targets are then counted here, once.
    """
    if not total:
        return Stream(lambda step: _batch(corpus, order(step), layout, None, own), steps)
    chosen = np.concatenate([order(step) for step in range(steps)])
    whole = total, _targeted(corpus, chosen[chosen < corpus.rows])
    return Stream(lambda step: _batch(corpus, order(step), layout, whole, own), steps)


def evaluation_stream(corpus: Corpus, layout: Layout, *, own: Own | None = None) -> Stream:
    """Every row once, in order; its `rows` is the number of all of them, so a sum over the stream is the mean."""
    batch = layout.micro * layout.examples
    one = in_order(corpus.kept, corpus.rows, batch)
    whole = len(corpus.kept), _targeted(corpus, corpus.kept)
    return Stream(lambda step: _batch(corpus, one(step), layout, whole, own), steps_per_epoch(whole[0], batch))


def permutation(places: Int[np.ndarray, "places"], size: int, seed: int, epoch: int = 0) -> Int[np.ndarray, "places"]:
    """Where a pseudo-random permutation of range(size), keyed by (seed, epoch), sends the given places.

    An alternating Feistel network on a grid just above `size`: each round adds a keyed hash of one coordinate to the
    other, which is a bijection. What lands outside range(size) is sent on until it is back inside (cycle walking),
    which is again a bijection and happens to one place in sqrt(size).
    """
    across = math.isqrt(max(size - 1, 0)) + 1
    down = -(-size // across)
    key = _mix_int(_mix_int(seed) + epoch)  # not symmetric: seed 1, epoch 2 is not seed 2, epoch 1
    keys = [np.uint64(_mix_int(key + turn)) for turn in range(ROUNDS)]
    out = np.asarray(places).astype(np.uint64)
    outside = np.arange(out.size)
    while outside.size:
        left, right = out[outside] % np.uint64(across), out[outside] // np.uint64(across)
        for turn in range(0, ROUNDS, 2):
            left = (left + _mix(right ^ keys[turn])) % np.uint64(across)
            right = (right + _mix(left ^ keys[turn + 1])) % np.uint64(down)
        out[outside] = left + right * np.uint64(across)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


# ---- building


def _batch(
    corpus: Corpus,
    chosen: Int[np.ndarray, "batch"],
    layout: Layout,
    whole: tuple[int, int] | None,
    own: Own | None,
) -> Batch:
    """`whole` = (examples, targets) of the stream, for one that is summed; those of this step where it is None."""
    micro, examples, rows, length, sequences = layout
    if len(chosen) != micro * examples:
        raise ValueError(f"a step of {len(chosen)} examples does not fit {micro} micro-batches of {examples}.")
    if sequences != corpus.sequences:
        raise ValueError(
            f"the layout has {sequences} sequences for each example and the corpus {corpus.sequences}; "
            "make the layout by `layout`, from this corpus."
        )
    slots = examples * sequences
    shape = (micro, rows, length)
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    slot = np.full(shape, slots, np.int32)
    sampler = np.full(shape, np.nan, np.float32)
    supervised = np.ones((micro, slots), np.float32)
    real = chosen < corpus.rows
    targeted = 0
    for m, part in enumerate(chosen.reshape(micro, examples)):
        places = _places(corpus, part)
        if rows >= slots:  # no packing, or packing that gains nothing; more where a mesh asks for a multiple
            at, start = np.arange(slots), np.zeros(slots, np.int64)
        else:
            at, start, needed = _fit(places, length)
            if needed > rows:
                raise ValueError(
                    f"a micro-batch needs {needed} rows and has {rows}. Give its order to `layout` as well."
                )
        for s in np.flatnonzero(np.repeat(part < corpus.rows, sequences)):
            row, n = int(part[s // sequences]), int(places[s])
            if n < 1:
                raise ValueError(f"row {row} was dropped by the tokenizer. Draw from `corpus.kept` with `subset`.")
            first = int(corpus.offsets[row * sequences + s % sequences])
            ids, wanted = corpus.ids[first : first + n + 1], corpus.supervised[first + 1 : first + n + 1]
            supervised[m, s] = wanted.sum()
            targeted += int(wanted.sum())
            if own is not None and not own[at[s]]:
                continue
            here = (m, at[s], slice(start[s], start[s] + n))
            tokens[here], targets[here], positions[here] = ids[:-1], ids[1:], np.arange(n)
            segments[here] = segments[m, at[s]].max() + 1
            slot[here] = np.where(wanted, s, slots)
            if corpus.sampler is not None:
                sampler[here] = corpus.sampler[first + 1 : first + n + 1]
    count, targeted = whole or (int(real.sum()), targeted)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "slot": slot,
        "index": np.where(real, chosen, PADDING).astype(np.int32).reshape(micro, examples),
        "supervised": supervised,
        "rows": np.full(micro, count, np.float32),
        "targeted": np.full(micro, targeted, np.float32),
    }
    if corpus.reference is not None:
        reference = np.where(real, corpus.reference[np.where(real, chosen, 0)], 0)
        batch["reference"] = reference.astype(np.float32).reshape(micro, examples)
    if corpus.sampler is not None:
        batch["sampler"] = sampler
    if corpus.base is not None:
        base = np.where(real, corpus.base[np.where(real, chosen, 0)], 0)
        batch["base"] = base.astype(np.float32).reshape(micro, examples)
    return batch


def _places(corpus: Corpus, chosen: Int[np.ndarray, "examples"]) -> Int[np.ndarray, "slots"]:
    """Token places that each sequence of the chosen rows takes; 0 for an empty slot."""
    real = (chosen < corpus.rows)[:, None]
    sequence = np.where(real, chosen[:, None] * corpus.sequences + np.arange(corpus.sequences), 0)
    return np.where(real, np.maximum(corpus.offsets[sequence + 1] - corpus.offsets[sequence] - 1, 0), 0).ravel()


def _targeted(corpus: Corpus, chosen: Int[np.ndarray, "chosen"]) -> int:
    """Supervised targets of the chosen rows; a sequence's first token has nothing before it to predict it from."""
    before = np.concatenate([[0], np.cumsum(corpus.supervised)])
    first, last = np.minimum(corpus.offsets[:-1] + 1, corpus.offsets[1:]), corpus.offsets[1:]
    return int((before[last] - before[first]).reshape(-1, corpus.sequences).sum(1)[chosen].sum())


def _fit(
    places: Int[np.ndarray, "slots"], length: int
) -> tuple[Int[np.ndarray, "slots"], Int[np.ndarray, "slots"], int]:
    """First fit, longest first: (row, start) of each sequence, and the rows needed (at most one per sequence)."""
    at, start = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
    used: list[int] = []
    for s in np.argsort(-places, kind="stable"):
        n = int(places[s])
        row = next((r for r, u in enumerate(used) if u + n <= length), len(used))
        if row == len(used):
            used.append(0)
        at[s], start[s] = row, used[row]
        used[row] += n
    return at, start, len(used)


def _filled(part: int, rows: int, batch: int, permute: Callable[[np.ndarray], np.ndarray]) -> Int[np.ndarray, "batch"]:
    """Places part * batch ... of an epoch of `rows`, permuted; `rows` itself beyond its end."""
    places = np.arange(part * batch, (part + 1) * batch)
    real = places < rows
    places[real] = permute(places[real])
    places[~real] = rows
    return places


def _lookup(chosen: Sequence[int] | np.ndarray, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """places in `chosen` -> rows of the corpus, and len(chosen) -> rows."""
    if isinstance(chosen, range) and chosen == range(rows):
        return lambda places: places  # all rows: no table of them
    table = np.append(np.asarray(chosen, np.int64), rows)
    if table[:-1].min(initial=0) < 0 or table[:-1].max(initial=0) >= rows:
        raise ValueError(f"chosen rows lie in {table[:-1].min()}..{table[:-1].max()}; the corpus has 0..{rows - 1}.")
    return lambda places: table[places]


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), cut to 32 bits so that sums stay below 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(32)


def _mix_int(value: int) -> int:
    """The same on one Python int, with the generator's increment before it and all 64 bits after it."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
