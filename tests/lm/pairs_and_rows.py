"""Random preference pairs and single rows, and decoders that compile fast: what the tests of losses share."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.lm.data.tokens import Corpus, TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.models import Decoder, DecoderConfig, make_decoder

VOCAB = 29
TINY = DecoderConfig(
    vocab_size=VOCAB, width=8, mlp_width=12, layers=1, heads=2, kv_heads=1, head_dim=4, max_length=64, init_scale=0.4
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
    made = corpus_from_sequences(
        [
            TokenizedSequence(np.array(prompt + response, np.int32), np.arange(len(prompt + response)) >= len(prompt))
            for prompt, responses in rows
            for response in responses
        ],
        sequences,
    )
    return made.with_reference_margins(np.random.default_rng(1).normal(size=len(rows))) if sequences == 2 else made


def mixer() -> Decoder:
    """A causal mean over each segment, then one layer: all of a decoder that batches and losses can tell."""

    def hidden(params, tokens, positions, segments):
        length = tokens.shape[1]
        seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(length, dtype=bool)[None]
        x = params["embed"][tokens] + params["place"][positions]
        return jnp.tanh((x + seen @ x / seen.sum(-1, keepdims=True)) @ params["mix"])

    return make_decoder(TINY)._replace(hidden=hidden, head=lambda params: params["head"])


def start(dtype, seed: int = 0):
    """Random parameters of the mixer."""
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    shapes = {"embed": (VOCAB, 8), "place": (16, 8), "mix": (8, 8), "head": (8, VOCAB)}
    return {name: 0.7 * jax.random.normal(next(keys), shape, dtype) for name, shape in shapes.items()}
