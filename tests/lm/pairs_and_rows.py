"""Random preference pairs and single rows, and a decoder small enough for float64: what the tests of losses share."""

import numpy as np

from bilevel_jax.lm.models import DecoderConfig
from bilevel_jax.lm.tokens import Corpus, Tokenized, corpus_of

VOCAB = 29
TINY = DecoderConfig(
    vocab=VOCAB, width=8, inner=12, layers=1, heads=2, kv_heads=1, head_dim=4, max_length=64, init_scale=0.4
)


def texts(rows: int, sequences: int, seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt, its responses) of each row: one response, or a chosen and a rejected one."""
    rng = np.random.default_rng(seed)

    def draw(least: int, most: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(least, most + 1)).tolist()

    return [(draw(1, 6), [draw(1, 7) for _ in range(sequences)]) for _ in range(rows)]


def corpus(rows: list[tuple[list[int], list[list[int]]]]) -> Corpus:
    """The rows as a tokenizer would give them; pairs have a random reference."""
    sequences = len(rows[0][1])
    made = corpus_of(
        [
            Tokenized(np.array(prompt + response, np.int32), np.arange(len(prompt + response)) >= len(prompt))
            for prompt, responses in rows
            for response in responses
        ],
        sequences,
    )
    return made.with_reference(np.random.default_rng(1).normal(size=len(rows))) if sequences == 2 else made
