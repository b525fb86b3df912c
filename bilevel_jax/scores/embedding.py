"""Questions as unit vectors, and which of them are alike: TF-IDF without a model, or mean hidden states of one."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from bilevel_jax.core.types import Params
from bilevel_jax.lm.data import Example, example_kind
from bilevel_jax.lm.models.decoder import Decoder
from bilevel_jax.scores.requests import Rows

Vectors = Any
"""Rows of unit length, or zero: float[rows, features], a numpy array or a scipy CSR array."""
Embedding = Callable[[Rows, Rows], tuple[Vectors, Vectors]]
"""(rows, holdout) -> their vectors."""

WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""Runs of letters and digits; where no spaces divide words (Chinese, Japanese), characters."""
BLOCK = 4_000_000
"""Similarities that are held at once."""


def question(example: Example) -> str:
    """What a row asks: the turns of the user; of a text row, the text."""
    return "\n".join(turn.content for turn in example.turns if turn.role in ("user", "text"))


def tfidf(rows: Rows, holdout: Rows) -> tuple[Vectors, Vectors]:
    """Counts of words in the question times log((1 + H)/(1 + h)) + 1, where h of the H holdout questions have the word.

    The words are the holdout's, so a row's vector depends on that row and the holdout alone; its other words count
    for its length (with h = 0) and match nothing. Word order and synonyms are not seen.
    """
    seen: Counter[str] = Counter()
    for example in holdout.examples:
        seen.update(set(_words(example)))
    column = {word: j for j, word in enumerate(sorted(seen))}
    weight = {word: float(np.log((1 + len(holdout.examples)) / (1 + count)) + 1) for word, count in seen.items()}
    rare = float(np.log(1 + len(holdout.examples)) + 1)

    def vectors(examples: Any) -> Vectors:
        data, indices, ends = [], [], [0]
        for example in examples:
            terms = {word: n * weight.get(word, rare) for word, n in Counter(_words(example)).items()}
            length = float(np.sqrt(sum(value**2 for value in terms.values()))) or 1.0
            known = sorted((column[word], value / length) for word, value in terms.items() if word in column)
            indices += [j for j, _ in known]
            data += [value for _, value in known]
            ends.append(len(data))
        shape = len(ends) - 1, len(column)
        return sparse.csr_array((np.array(data, float), np.array(indices, int), np.array(ends)), shape=shape)

    return vectors(rows.examples), vectors(holdout.examples)


def hidden_states(
    decoder: Decoder, params: Params, batch: int = 16, fetch: Callable[[jax.Array], np.ndarray] = np.asarray
) -> Embedding:
    """The mean of the last hidden states over the tokens before the first target; of a text row, over all its tokens.

    Their cosines are large for any two texts, so near-duplicates are found by `tfidf` whatever the embedding.
    """
    compiled = jax.jit(decoder.hidden)

    def vectors(rows: Rows) -> Vectors:
        prompts = [_prompt(rows, i) for i in range(len(rows.examples))]
        out = np.zeros((len(prompts), decoder.config.width))
        lengths = np.array([len(ids) for ids in prompts])
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            places = 8 << max(0, int(lengths[some].max() - 1) // 8).bit_length()  # few shapes, so few compilations
            tokens = np.zeros((batch, places), np.int32)
            for b, i in enumerate(some):
                tokens[b, : lengths[i]] = prompts[i]
            real = np.arange(places)[None] < np.pad(lengths[some], (0, batch - len(some)))[:, None]
            positions = np.broadcast_to(np.arange(places, dtype=np.int32), real.shape)
            states = compiled(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(real, jnp.int32))
            # not times `real`: a padded place beyond the last learned position is nan
            out[some] = np.where(real[..., None], fetch(states).astype(float), 0.0).sum(1)[: len(some)]
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-30)

    return lambda rows, holdout: (vectors(rows), vectors(holdout))


def cosines(one: Vectors, other: Vectors) -> Float[np.ndarray, "rows others"]:
    """Cosines of all of `one` with all of `other`; take `one` by `blocks`."""
    product = one @ other.T
    return product.toarray() if sparse.issparse(product) else np.asarray(product)


def blocks(rows: int, others: int) -> Iterator[slice]:
    """Slices of the rows such that BLOCK cosines at most are in memory at once."""
    size = max(1, BLOCK // max(1, others))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def clusters(
    vectors: Vectors, count: int, seed: int, rounds: int = 20
) -> tuple[Float[np.ndarray, "count features"], Int[np.ndarray, "rows"]]:
    """Spherical k-means from k-means++ starts: (unit centroids, the cluster of each row).

    Ends early where no row moves. A cluster that loses all its rows keeps its centroid.
    """
    rows = vectors.shape[0]
    if not 1 <= count <= rows:
        raise ValueError(f"{count} clusters of {rows} rows; between 1 and the number of rows are wanted.")
    rng = np.random.default_rng(seed)
    centroids = _dense(vectors, rng.integers(rows))[None]
    nearest = np.full(rows, -np.inf)
    while len(centroids) < count:
        nearest = np.maximum(nearest, vectors @ centroids[-1])
        far = np.cumsum(np.maximum(1 - nearest, 0) + 1e-12)
        centroids = np.vstack([centroids, _dense(vectors, np.searchsorted(far, rng.random() * far[-1]))])
    found = np.full(rows, -1)
    for _ in range(rounds):
        before, found = found, np.argmax(vectors @ centroids.T, axis=1)
        if (before == found).all():
            break
        members = sparse.csr_array((np.ones(rows), (found, np.arange(rows))), shape=(count, rows))
        sums = members @ vectors
        sums = sums.toarray() if sparse.issparse(sums) else sums
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 0, sums / np.maximum(lengths, 1e-30), centroids)
    return centroids, found


def _words(example: Example) -> list[str]:
    return WORDS.findall(question(example).casefold())


def _prompt(rows: Rows, i: int) -> Int[np.ndarray, "length"]:
    ids, supervised = rows.sides(i)[0]
    return ids if example_kind(rows.examples[i]) == "text" else ids[: int(np.argmax([*supervised, True]))]


def _dense(vectors: Vectors, i: Any) -> Float[np.ndarray, "features"]:
    row = vectors[[int(i)]]
    return (row.toarray() if sparse.issparse(row) else row)[0]
