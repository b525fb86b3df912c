"""Left padding of sequences to a few bucket lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bilevel_jax.core.types import Batch
from bilevel_jax.lm.models.cache import EMPTY_POSITION
from bilevel_jax.lm.models.config import DecoderConfig


class BatchShapes(NamedTuple):
    """The few shapes that batches of sequences are padded to, so that few programs are compiled."""

    bucket_lengths: Sequence[int]
    """Lengths of rows in tokens, ascending."""
    max_batch_tokens: int
    """Tokens of a batch, padding and `num_new_tokens` included."""
    row_multiple: int
    """The rows of every batch are a multiple of it."""
    num_new_tokens: int = 0
    """Tokens that are generated after each row."""

    def pick_length(self, length: int) -> int:
        """The shortest bucket length that holds `length` tokens."""
        return pick_bucket(length, self.bucket_lengths)

    def max_rows(self, length: int) -> int:
        """Rows of a full batch of the bucket length `length`."""
        return max(1, self.max_batch_tokens // (length + self.num_new_tokens) // self.row_multiple) * self.row_multiple

    def pad_rows(self, count: int, length: int) -> int:
        """`count` rows rounded up to `row_multiple` times a power of 2, at most those of a full batch."""
        doublings = (-(-count // self.row_multiple) - 1).bit_length()
        return min(self.row_multiple * 2**doublings, self.max_rows(length))


def make_buckets(config: DecoderConfig, lengths: Sequence[int]) -> list[int]:
    """The lengths that rows are padded to, ascending; empty: 32, 48, 64, 96, 128 ... up to the context of the model.

    Args:
        config: its `max_length`, tokens, is always the longest.
        lengths: tokens; longer ones than the context are dropped.

    Returns:
        Lengths in tokens, ascending.

    Raises:
        ValueError: a length below 1.
    """
    if any(length < 1 for length in lengths):
        raise ValueError(f"lengths {list(lengths)}: each is at least 1 token.")
    powers = [2**power for power in range(5, config.max_length.bit_length())]
    chosen = lengths or [length for power in powers for length in (power, power + power // 2)]
    return sorted({length for length in chosen if length < config.max_length} | {config.max_length})


def pick_bucket(length: int, buckets: Sequence[int]) -> int:
    """The shortest bucket length that holds `length` tokens.

    Args:
        length: tokens.
        buckets: lengths in tokens, ascending; the last one holds `length`.

    Returns:
        One of `buckets`.
    """
    return next(size for size in buckets if size >= length)


def pad_left(sequences: Sequence[np.ndarray], starts: Sequence[int], rows: int, length: int) -> Batch:
    """Sequences that end where the rows end.

    Args:
        sequences: token ids, int[len] each.
        starts: the position of the first token of each.
        rows: rows of the batch, at least as many as sequences.
        length: tokens of a row.

    Returns:
        `tokens` and `positions`, int32[1, rows, length]; `EMPTY_POSITION` is the position of padding, and of rows
        without a sequence.
    """
    tokens, positions = np.zeros((1, rows, length), np.int32), np.full((1, rows, length), EMPTY_POSITION, np.int32)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[0, row, length - len(ids) :] = ids
        positions[0, row, length - len(ids) :] = np.arange(start, start + len(ids))
    return {"tokens": tokens, "positions": positions}
