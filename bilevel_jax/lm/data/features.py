"""Model-free features of examples: lengths, and shares of hashed tokens."""

import numpy as np
from jaxtyping import Float

from bilevel_jax.lm.data.tokens import Corpus

NUM_HASH_BUCKETS = 32
"""Buckets of the hashed vocabulary."""


def token_features(
    corpus: Corpus, num_examples: int
) -> tuple[Float[np.ndarray, "examples 2"], Float[np.ndarray, "examples 33"]]:
    """(log(1 + tokens) of prompt and response; type-token ratio and hashed token shares of the response) of each row.

    The shares are of `NUM_HASH_BUCKETS` buckets of response token ids: what the text is about, coarsely. All are 0 of
    an example that was dropped as too long. Of a preference pair the chosen response is read.

    Args:
        corpus: tokenized examples.
        num_examples: how many of its first rows are read.

    Returns:
        Two tables.
    """
    lengths = np.zeros((num_examples, 2))
    shares = np.zeros((num_examples, 1 + NUM_HASH_BUCKETS))
    for row in range(num_examples):
        ids, supervised, _ = corpus.get_sequence(row)
        response = ids[supervised].astype(np.int64)
        lengths[row] = np.log1p(len(ids) - len(response)), np.log1p(len(response))
        if len(response):
            buckets = np.bincount(response * 2654435761 % 2**32 % NUM_HASH_BUCKETS, minlength=NUM_HASH_BUCKETS)
            shares[row] = [len(np.unique(response)) / len(response), *(buckets / len(response))]
    return lengths, shares
