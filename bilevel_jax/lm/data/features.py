"""Model-free features of examples for learned data weightings."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.tokens import Corpus

NUM_HASH_BUCKETS = 32
"""Buckets of the hashed vocabulary."""


def extract_features(examples: Sequence[Example], corpus: Corpus) -> Float[np.ndarray, "rows features"]:
    """Log lengths of prompt and response, the response's type-token ratio, source indicators, hashed token shares.

    Standardised over the rows; features that do not vary are left out. No model is needed, so a new row's weight is a
    dot product. The shares are of `NUM_HASH_BUCKETS` buckets of response token ids: what the text is about, coarsely.
    """
    rows = len(examples)
    columns = []
    for row in range(rows):
        ids, supervised = corpus.get_sequence(row)
        response = ids[supervised].astype(np.int64)
        buckets = np.bincount(response * 2654435761 % 2**32 % NUM_HASH_BUCKETS, minlength=NUM_HASH_BUCKETS) / max(
            1, len(response)
        )
        lengths = [np.log1p(len(ids) - len(response)), np.log1p(len(response))]
        columns.append([*lengths, len(set(response.tolist())) / max(1, len(response)), *buckets])
    table = np.array(columns)
    sources = sorted({example.source for example in examples})
    indicators = np.array([[example.source == source for source in sources] for example in examples], float)
    table = np.concatenate([table, indicators], axis=1)
    spread = table.std(axis=0)
    varies = spread > 1e-12
    return ((table - table.mean(axis=0)) / np.where(varies, spread, 1))[:, varies].astype(np.float32)
