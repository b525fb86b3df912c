"""Sequences of all lengths in few shapes: the lengths that rows are padded to, and the padding, on the left."""

from collections.abc import Sequence

import numpy as np

from bilevel_jax.core.types import Batch
from bilevel_jax.lm.models.cache import EMPTY_POSITION
from bilevel_jax.lm.models.config import DecoderConfig


def make_buckets(config: DecoderConfig, lengths: Sequence[int]) -> list[int]:
    """The lengths that rows are padded to, ascending; empty: 32, 48, 64, 96, 128 ... up to the context of the model."""
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths {list(lengths)}: each is at least 1 token.")
    powers = [2**power for power in range(5, config.max_length.bit_length())]
    chosen = lengths or [length for power in powers for length in (power, power + power // 2)]
    return sorted({length for length in chosen if length < config.max_length} | {config.max_length})


def pick_bucket(length: int, buckets: Sequence[int]) -> int:
    """The shortest of them that holds `length` tokens."""
    return next(size for size in buckets if size >= length)


def pad_left(sequences: Sequence[np.ndarray], starts: Sequence[int], rows: int, length: int) -> Batch:
    """Sequences that end where the rows end; `starts`: the position of the first token of each.

    Leaves `tokens`, `positions` [1, rows, length]; `EMPTY` is the position of padding, and of rows without a sequence.
    """
    tokens, positions = np.zeros((1, rows, length), np.int32), np.full((1, rows, length), EMPTY_POSITION, np.int32)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[0, row, length - len(ids) :] = ids
        positions[0, row, length - len(ids) :] = np.arange(start, start + len(ids))
    return {"tokens": tokens, "positions": positions}
