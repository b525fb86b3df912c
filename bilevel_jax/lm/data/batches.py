"""Shuffling, packing and batching of tokenized examples.

A global step takes `batch_size` examples and divides them, in order, into micro-batches of E example slots. An example
is one sequence or, for preference pairs, two; so there are S = E or S = 2E sequence slots, of which 2e and 2e + 1 are
the chosen and the rejected side of example e. A micro-batch is R rows of L token places; without packing R = S, with
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
    advantages  f32[M,R,L]   where the corpus has it: how much better than expected what follows the target was; 0
                             elsewhere
    token_weights f32[M,R,L] where the corpus has it: factor of the loss of the target; 1 elsewhere
    multiplicity f32[M,E]    where the corpus has it: how much the example counts before any weight; 0 for an empty slot
    num_examples f32[M]      real examples in the whole global step (in an evaluation stream: in the whole stream)
    targeted    f32[M]       supervised targets in the same, for losses per token

What a global step holds is the same packed or not, as 1 x 16 or as 16 x 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax import dtypes
from jaxtyping import Bool, Int

from bilevel_jax.core.types import PADDING, Batch, Stream
from bilevel_jax.lm.data.tokens import Corpus

BatchOrder = Callable[[int], Int[np.ndarray, "batch"]]
"""step -> the rows of the corpus of that global step; an empty slot holds the number of rows of the corpus."""

LocalRows = Bool[np.ndarray, "rows"]
"""Which rows of token places are built here; the others, which other processes build, stay empty."""

FEISTEL_ROUNDS = 16
"""Feistel rounds. At 5 to 12 rows 6 are visibly uneven (chi-square of pairs of places) and 10 are not."""


class BatchShape(NamedTuple):
    """The shape of every batch of a run: [micro, rows, length] token places and [micro, examples] slots."""

    num_micro_batches: int
    examples: int
    rows: int
    length: int
    sequences_per_example: int = 1
    """Sequences of an example: 2 for preference pairs."""

    @property
    def unpacked(self) -> "BatchShape":
        """The layout without packing: one row of token places for each sequence."""
        return self._replace(rows=self.examples * self.sequences_per_example)


def shuffled_order(num_examples: int, batch_size: int, seed: int) -> BatchOrder:
    """Epochs without replacement, each a new permutation of range(rows); O(batch) work and memory per call.

    A pure function of (seed, step) without tables, so that resuming needs no state and ten million rows cost what
    ten do. The last step of an epoch is filled up with `num_examples`, so every epoch covers every row exactly once.

    Args:
        num_examples: rows of the corpus.
        batch_size: examples of a global step.
        seed: another seed, other permutations.

    Returns:
        step -> rows of the corpus.

    Example:
        >>> order = shuffled_order(num_examples=3, batch_size=2, seed=0)
        >>> sorted([*order(0), *order(1)])[:3] == [0, 1, 2], int(max(order(1)))  # 3: an empty slot
        (True, 3)
    """
    return shuffled_subset_order(range(num_examples), num_examples, batch_size, seed)


def shuffled_subset_order(
    indices: Sequence[int] | Int[np.ndarray, "chosen"], corpus_size: int, batch_size: int, seed: int
) -> BatchOrder:
    """As `shuffled_order`, over the given rows of a corpus of `corpus_size` rows only."""
    steps = steps_per_epoch(len(indices), batch_size)
    lookup = _make_lookup(indices, corpus_size)

    def indices_at(step: int) -> Int[np.ndarray, "batch"]:
        epoch, part = divmod(step, steps)
        return lookup(
            _take_step(
                part, len(indices), batch_size, lambda places: permute_indices(places, len(indices), seed, epoch)
            )
        )

    return indices_at


def shuffled_group_order(
    groups: Int[np.ndarray, "groups size"], corpus_size: int, batch_size: int, seed: int
) -> BatchOrder:
    """As `shuffled_subset_order`, but whole groups are shuffled; the rows of a group are neighbours in a micro-batch.

    For losses that compare examples. A group that is not full holds `corpus_size` in its empty places. `batch_size`
    must be a multiple of the group size, and so must be the slots of a micro-batch.
    """
    size = groups.shape[1]
    if batch_size % size:
        raise ValueError(f"a batch of {batch_size} rows does not hold whole groups of {size}.")
    table = np.concatenate([groups, np.full((1, size), corpus_size)])
    of_groups = shuffled_order(len(groups), batch_size // size, seed)
    return lambda step: table[of_groups(step)].ravel()


def sequential_order(
    indices: Sequence[int] | Int[np.ndarray, "chosen"], corpus_size: int, batch_size: int
) -> BatchOrder:
    """The chosen rows one after another, without shuffling: one epoch of `steps_per_epoch` steps.

    Args:
        indices: rows of the corpus.
        corpus_size: all rows of the corpus.
        batch_size: examples of a global step.

    Returns:
        step -> rows of the corpus.
    """
    lookup = _make_lookup(indices, corpus_size)
    return lambda step: lookup(_take_step(step, len(indices), batch_size, lambda places: places))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """ceil(rows / batch): the last step of an epoch may be partly empty.

    Args:
        num_examples: at least 1.
        batch_size: examples of a global step, at least 1.

    Returns:
        Steps.

    Raises:
        ValueError: a number below 1.
    """
    if num_examples < 1 or batch_size < 1:
        raise ValueError(f"{num_examples} rows in batches of {batch_size}: both must be at least 1.")
    return -(-num_examples // batch_size)


def fit_batch_shape(
    corpus: Corpus, orders: Sequence[BatchOrder], steps: int, *, num_micro_batches: int, length: int, packing: bool
) -> BatchShape:
    """The one shape that holds every step of every given order (all seeds and subsets of a comparison).

    `length` is the token places in a row; a sequence of n tokens takes n - 1.
    With packing this counts, step by step, the rows that the fullest micro-batch needs.

    Args:
        corpus: from `tokenize`.
        orders: all that will be drawn from the corpus.
        steps: of each order.
        num_micro_batches: into which a global step is divided.
        length: token places of a row.
        packing: whether several sequences share a row.

    Returns:
        The shape.

    Raises:
        ValueError: a sequence longer than a row, or a batch size that does not divide into micro-batches.
    """
    longest = int(corpus.lengths.max()) - 1
    if longest > length:
        row = int(corpus.lengths.argmax()) // corpus.sequences_per_example
        raise ValueError(
            f"row {row} takes {longest} token places, but a row of the batch has {length}. "
            "Raise length, or tokenize with a smaller max_length."
        )
    batch = len(orders[0](0))
    if num_micro_batches < 1 or batch % num_micro_batches:
        raise ValueError(
            f"a batch of {batch} examples does not split into {num_micro_batches} micro-batches of equal size."
        )
    examples = batch // num_micro_batches
    unpacked = BatchShape(
        num_micro_batches, examples, examples * corpus.sequences_per_example, length, corpus.sequences_per_example
    )
    if not packing:
        return unpacked
    rows = max(
        _pack_first_fit(_sequence_lengths(corpus, indices), length)[-1]
        for order in orders
        for step in range(steps)
        for indices in order(step).reshape(num_micro_batches, examples)
    )
    return unpacked._replace(rows=rows)


def fit_evaluation_batch_shape(
    corpus: Corpus, batch_size: int, *, num_micro_batches: int, length: int, packing: bool
) -> BatchShape:
    """The shape of `make_evaluation_stream`: every row of the corpus once, in order."""
    steps = steps_per_epoch(len(corpus.kept_indices), batch_size)
    orders = [sequential_order(corpus.kept_indices, corpus.num_examples, batch_size)]
    return fit_batch_shape(corpus, orders, steps, num_micro_batches=num_micro_batches, length=length, packing=packing)


def padded_max_length(corpus: Corpus) -> int:
    """Token places of the longest sequence, the least `length` of a batch shape of this corpus: rounded up to a
    multiple of 8, below 64 of an eighth of a power of 2, so that short sequences are not padded by a half."""
    longest = max(int(corpus.lengths.max()) - 1, 1)
    multiple = max(1, 2 ** min(longest.bit_length() - 4, 3))
    return -(-longest // multiple) * multiple


def make_train_stream(
    corpus: Corpus,
    order: BatchOrder,
    steps: int,
    batch_shape: BatchShape,
    *,
    total_examples: int = 0,
    local_rows: LocalRows | None = None,
) -> Stream:
    """The batches of training: batch t holds the rows order(t), and `num_examples` counts the real ones among them.

    Args:
        corpus: from `tokenize`.
        order: step -> rows of the corpus; see `shuffled_order`.
        steps: number of batches.
        batch_shape: from `fit_batch_shape`.
        total_examples: for a stream that is summed rather than stepped on (what implicit estimators read): the number
            of all its examples, which takes the place of `num_examples`; its targets are then counted here, once. 0:
            none.
        local_rows: the rows that this process builds; None: all.

    Returns:
        A stream of numpy batches, leaves [micro-batches, ...]; `batch(step)` is a pure function of the step.

    Raises:
        ValueError: when a batch is built: rows that do not fit the shape, or that `tokenize` dropped.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples, tokens
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokens.tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> order = sequential_order(corpus.kept_indices, corpus.num_examples, 3)
        >>> shape = fit_batch_shape(corpus, [order], 1, num_micro_batches=1, length=16, packing=False)
        >>> stream = make_train_stream(corpus, order, 1, shape)
        >>> stream.batch(0)["tokens"].shape
        (1, 3, 16)
    """
    if not total_examples:
        return Stream(lambda step: _build_batch(corpus, order(step), batch_shape, None, local_rows), steps)
    indices = np.concatenate([order(step) for step in range(steps)])
    totals = total_examples, _count_targets(corpus, indices[indices < corpus.num_examples])
    return Stream(lambda step: _build_batch(corpus, order(step), batch_shape, totals, local_rows), steps)


def make_evaluation_stream(corpus: Corpus, batch_shape: BatchShape, *, local_rows: LocalRows | None = None) -> Stream:
    """Every row once, in order; `num_examples` is the number of all of them, so a sum over the stream is the mean.

    Args:
        corpus: from `tokenize`.
        batch_shape: from `fit_evaluation_batch_shape`.
        local_rows: the rows that this process builds; None: all.

    Returns:
        A stream of numpy batches, leaves [micro-batches, ...].

    Raises:
        ValueError: a shape of another corpus.
    """
    batch_size = batch_shape.num_micro_batches * batch_shape.examples
    order = sequential_order(corpus.kept_indices, corpus.num_examples, batch_size)
    totals = len(corpus.kept_indices), _count_targets(corpus, corpus.kept_indices)
    return Stream(
        lambda step: _build_batch(corpus, order(step), batch_shape, totals, local_rows),
        steps_per_epoch(totals[0], batch_size),
    )


def permute_indices(
    indices: Int[np.ndarray, "places"], size: int, seed: int, epoch: int = 0
) -> Int[np.ndarray, "places"]:
    """Where a pseudo-random permutation of range(size), keyed by (seed, epoch), sends the given places.

    An alternating Feistel network on a grid just above `size`: each round adds a keyed hash of one coordinate to the
    other, which is a bijection. What lands outside range(size) is sent on until it is back inside (cycle walking),
    which is again a bijection and happens to one place in sqrt(size).
    """
    across = math.isqrt(max(size - 1, 0)) + 1
    down = -(-size // across)
    key = _splitmix_int(_splitmix_int(seed) + epoch)  # not symmetric: seed 1, epoch 2 is not seed 2, epoch 1
    keys = [np.uint64(_splitmix_int(key + round_number)) for round_number in range(FEISTEL_ROUNDS)]
    out = np.asarray(indices).astype(np.uint64)
    outside = np.arange(out.size)
    while outside.size:
        left, right = out[outside] % np.uint64(across), out[outside] // np.uint64(across)
        for round_number in range(0, FEISTEL_ROUNDS, 2):
            left = (left + _splitmix(right ^ keys[round_number])) % np.uint64(across)
            right = (right + _splitmix(left ^ keys[round_number + 1])) % np.uint64(down)
        out[outside] = left + right * np.uint64(across)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


# ---- building


def _build_batch(
    corpus: Corpus,
    indices: Int[np.ndarray, "batch"],
    batch_shape: BatchShape,
    totals: tuple[int, int] | None,
    local_rows: LocalRows | None,
) -> Batch:
    """`totals` = (examples, targets) of the stream, for one that is summed; those of this step where it is None."""
    num_micro_batches, examples, rows, length, sequences_per_example = batch_shape
    if len(indices) != num_micro_batches * examples:
        raise ValueError(
            f"a step of {len(indices)} examples does not fit {num_micro_batches} micro-batches of {examples}."
        )
    if sequences_per_example != corpus.sequences_per_example:
        raise ValueError(
            f"the batch shape has {sequences_per_example} sequences for each example and the corpus "
            f"{corpus.sequences_per_example}; make the shape by `fit_batch_shape`, from this corpus."
        )
    slots = examples * sequences_per_example
    shape = (num_micro_batches, rows, length)
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    slot = np.full(shape, slots, np.int32)
    sampler_log_probs, token_weights = np.full(shape, np.nan, np.float32), np.ones(shape, np.float32)
    advantages = np.zeros(shape, np.float32)
    supervised = np.ones((num_micro_batches, slots), np.float32)
    real = indices < corpus.num_examples
    targeted = 0
    for m, part in enumerate(indices.reshape(num_micro_batches, examples)):
        lengths = _sequence_lengths(corpus, part)
        if rows >= slots:  # no packing, or packing that gains nothing; more where a mesh asks for a multiple
            row_of, start = np.arange(slots), np.zeros(slots, np.int64)
        else:
            row_of, start, needed = _pack_first_fit(lengths, length)
            if needed > rows:
                raise ValueError(
                    f"a micro-batch needs {needed} rows and has {rows}. Give its order to `fit_batch_shape` as well."
                )
        for s in np.flatnonzero(np.repeat(part < corpus.num_examples, sequences_per_example)):
            row, n = int(part[s // sequences_per_example]), int(lengths[s])
            if n < 1:
                raise ValueError(
                    f"row {row} was dropped by `tokenize`. "
                    "Draw from `corpus.kept_indices` with `shuffled_subset_order`."
                )
            first = int(corpus.offsets[row * sequences_per_example + s % sequences_per_example])
            ids, is_target = corpus.ids[first : first + n + 1], corpus.target_mask[first + 1 : first + n + 1]
            supervised[m, s] = is_target.sum()
            targeted += int(is_target.sum())
            if local_rows is not None and not local_rows[row_of[s]]:
                continue
            cell = (m, row_of[s], slice(start[s], start[s] + n))
            tokens[cell], targets[cell], positions[cell] = ids[:-1], ids[1:], np.arange(n)
            segments[cell] = segments[m, row_of[s]].max() + 1
            slot[cell] = np.where(is_target, s, slots)
            if corpus.sampler_log_probs is not None:
                sampler_log_probs[cell] = corpus.sampler_log_probs[first + 1 : first + n + 1]
            if corpus.advantages is not None:
                advantages[cell] = np.where(is_target, corpus.advantages[first + 1 : first + n + 1], 0)
            if corpus.token_weights is not None:
                token_weights[cell] = np.where(is_target, corpus.token_weights[first + 1 : first + n + 1], 1)
    count, targeted = totals or (int(real.sum()), targeted)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "slot": slot,
        "index": np.where(real, indices, PADDING).astype(np.int32).reshape(num_micro_batches, examples),
        "supervised": supervised,
        "num_examples": np.full(num_micro_batches, count, np.float32),
        "targeted": np.full(num_micro_batches, targeted, np.float32),
    }
    if corpus.reference_margins is not None:
        reference_margins = np.where(real, corpus.reference_margins[np.where(real, indices, 0)], 0)
        batch["reference"] = reference_margins.astype(dtypes.canonicalize_dtype(float)).reshape(
            num_micro_batches, examples
        )
    if corpus.sampler_log_probs is not None:
        batch["sampler"] = sampler_log_probs
    if corpus.advantages is not None:
        batch["advantages"] = advantages
    if corpus.token_weights is not None:
        batch["token_weights"] = token_weights
    if corpus.multiplicity is not None:
        multiplicity = np.where(real, corpus.multiplicity[np.where(real, indices, 0)], 0)
        batch["multiplicity"] = multiplicity.astype(np.float32).reshape(num_micro_batches, examples)
    return batch


def _sequence_lengths(corpus: Corpus, indices: Int[np.ndarray, "examples"]) -> Int[np.ndarray, "slots"]:
    """Token places that each sequence of the chosen rows takes; 0 for an empty slot."""
    real = (indices < corpus.num_examples)[:, None]
    sequence = np.where(
        real, indices[:, None] * corpus.sequences_per_example + np.arange(corpus.sequences_per_example), 0
    )
    return np.where(real, np.maximum(corpus.offsets[sequence + 1] - corpus.offsets[sequence] - 1, 0), 0).ravel()


def _count_targets(corpus: Corpus, indices: Int[np.ndarray, "chosen"]) -> int:
    """Supervised targets of the chosen rows; a sequence's first token has nothing before it to predict it from."""
    before = np.concatenate([[0], np.cumsum(corpus.target_mask)])
    first, last = np.minimum(corpus.offsets[:-1] + 1, corpus.offsets[1:]), corpus.offsets[1:]
    return int((before[last] - before[first]).reshape(-1, corpus.sequences_per_example).sum(1)[indices].sum())


def _pack_first_fit(
    lengths: Int[np.ndarray, "slots"], length: int
) -> tuple[Int[np.ndarray, "slots"], Int[np.ndarray, "slots"], int]:
    """First fit, longest first: (row, start) of each sequence, and the rows needed (at most one per sequence)."""
    row_of, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    used: list[int] = []
    for s in np.argsort(-lengths, kind="stable"):
        n = int(lengths[s])
        row = next((r for r, u in enumerate(used) if u + n <= length), len(used))
        if row == len(used):
            used.append(0)
        row_of[s], start[s] = row, used[row]
        used[row] += n
    return row_of, start, len(used)


def _take_step(
    step: int, num_examples: int, batch_size: int, permute: Callable[[np.ndarray], np.ndarray]
) -> Int[np.ndarray, "batch"]:
    """Places step * batch_size ... of an epoch, permuted; `num_examples` itself beyond its end."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    real = places < num_examples
    places[real] = permute(places[real])
    places[~real] = num_examples
    return places


def _make_lookup(indices: Sequence[int] | np.ndarray, corpus_size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Places in `indices` -> rows of the corpus, and len(indices) -> corpus_size."""
    if isinstance(indices, range) and indices == range(corpus_size):
        return lambda places: places  # all rows: no table of them
    table = np.append(np.asarray(indices, np.int64), corpus_size)
    if table[:-1].min(initial=0) < 0 or table[:-1].max(initial=0) >= corpus_size:
        raise ValueError(
            f"chosen rows lie in {table[:-1].min()}..{table[:-1].max()}; the corpus has 0..{corpus_size - 1}."
        )
    return lambda places: table[places]


def _splitmix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), cut to 32 bits so that sums stay below 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(32)


def _splitmix_int(value: int) -> int:
    """The same on one Python int, with the generator's increment before it and all 64 bits after it."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
