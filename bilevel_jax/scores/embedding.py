"""Embeddings of questions (TF-IDF, hidden states, the user's own) and clusters."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from bilevel_jax.core.types import Fetch, Params
from bilevel_jax.lm.data.examples import Example, example_kind
from bilevel_jax.lm.models.decoder import Decoder
from bilevel_jax.scores.requests import TokenizedExamples

Vectors = Any
"""Rows of unit length, or zero: float[rows, features], a numpy array or a scipy CSR array."""
Embedding = Callable[[TokenizedExamples, TokenizedExamples], tuple[Vectors, Vectors]]
"""(rows, holdout) -> their vectors."""

WORD_PATTERN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""Runs of letters and digits; where no spaces divide words (Chinese, Japanese), characters."""
MAX_BLOCK_COSINES = 4_000_000
"""Cosines that are in memory at the same time."""


def extract_question(example: Example) -> str:
    """The question of an example: the turns of the user; of plain text, the text."""
    return "\n".join(turn.content for turn in example.turns if turn.role in ("user", "text"))


class WordIndex(NamedTuple):
    """The words of some holdout questions with their weights; see `tfidf`."""

    words: list[str]
    weights: Float[np.ndarray, "words"]
    unseen_weight: float
    """Of a word that no holdout question has: it counts for the length of a vector alone."""

    def vectors(self, examples: Iterable[Example]) -> Vectors:
        """The vectors of the questions of some examples, which depend on nothing but each of them and the index."""
        column = {word: j for j, word in enumerate(self.words)}
        weight = dict(zip(self.words, self.weights.tolist(), strict=True))
        data, indices, ends = [], [], [0]
        for example in examples:
            terms = {
                word: n * weight.get(word, self.unseen_weight) for word, n in Counter(_split_words(example)).items()
            }
            length = float(np.sqrt(sum(value**2 for value in terms.values()))) or 1.0
            known = sorted((column[word], value / length) for word, value in terms.items() if word in column)
            indices += [j for j, _ in known]
            data += [value for _, value in known]
            ends.append(len(data))
        shape = len(ends) - 1, len(column)
        return sparse.csr_array((np.array(data, float), np.array(indices, int), np.array(ends)), shape=shape)


def index_words(holdout: Sequence[Example]) -> WordIndex:
    """The words of the holdout's questions; a word of h among H questions weighs log((1 + H)/(1 + h)) + 1."""
    document_counts: Counter[str] = Counter()
    for example in holdout:
        document_counts.update(set(_split_words(example)))
    words = sorted(document_counts)
    weights = [float(np.log((1 + len(holdout)) / (1 + document_counts[word])) + 1) for word in words]
    return WordIndex(words, np.array(weights), float(np.log(1 + len(holdout)) + 1))


def tfidf(candidates: TokenizedExamples, holdout: TokenizedExamples) -> tuple[Vectors, Vectors]:
    """Counts of words in the question times log((1 + H)/(1 + h)) + 1, where h of the H holdout questions have the word.

    The words are the holdout's, so a row's vector depends on that row and the holdout alone; its other words count
    for its length (with h = 0) and match nothing. Word order and synonyms are not seen.
    """
    index = index_words(holdout.examples)
    return index.vectors(candidates.examples), index.vectors(holdout.examples)


def hidden_states(decoder: Decoder, params: Params, batch_size: int = 16, fetch: Fetch = np.asarray) -> Embedding:
    """The mean of the last hidden states over the tokens before the first target; of a text row, over all its tokens.

    Their cosines are large for any two texts, so near-duplicates are found by `tfidf` whatever the embedding.
    """
    compute_hidden = jax.jit(decoder.hidden)

    def vectors(candidates: TokenizedExamples) -> Vectors:
        prompts = [_prompt_tokens(candidates, i) for i in range(len(candidates.examples))]
        out = np.zeros((len(prompts), decoder.config.width))
        lengths = np.array([len(ids) for ids in prompts])
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            batch_indices = order[start : start + batch_size]
            padded_length = (
                8 << max(0, int(lengths[batch_indices].max() - 1) // 8).bit_length()
            )  # few shapes, so few compilations
            tokens = np.zeros((batch_size, padded_length), np.int32)
            for b, i in enumerate(batch_indices):
                tokens[b, : lengths[i]] = prompts[i]
            real = (
                np.arange(padded_length)[None]
                < np.pad(lengths[batch_indices], (0, batch_size - len(batch_indices)))[:, None]
            )
            positions = np.broadcast_to(np.arange(padded_length, dtype=np.int32), real.shape)
            states = compute_hidden(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(real, jnp.int32))
            # not times `real`: a padded place beyond the last learned position is nan
            out[batch_indices] = np.where(real[..., None], fetch(states).astype(float), 0.0).sum(1)[
                : len(batch_indices)
            ]
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-30)

    return lambda candidates, holdout: (vectors(candidates), vectors(holdout))


def given_vectors(rows: Callable[[Sequence[Example]], Float[np.ndarray, "examples features"]]) -> Embedding:
    """Vectors that were made elsewhere, as by a sentence encoder; scaled to unit length.

    Args:
        rows: examples -> their vectors, none of them zero.

    Returns:
        The embedding.
    """

    def vectors(examples: Sequence[Example]) -> Vectors:
        given = rows(examples)
        return given / np.linalg.norm(given, axis=1, keepdims=True)

    return lambda candidates, holdout: (vectors(candidates.examples), vectors(holdout.examples))


def cosine_similarities(first: Vectors, second: Vectors) -> Float[np.ndarray, "rows others"]:
    """Cosines of all of `first` with all of `second`; take `first` by `iterate_blocks`."""
    product = first @ second.T
    return product.toarray() if sparse.issparse(product) else np.asarray(product)


def iterate_blocks(rows: int, others: int) -> Iterator[slice]:
    """Slices of the rows such that at most MAX_BLOCK_COSINES cosines are in memory."""
    size = max(1, MAX_BLOCK_COSINES // max(1, others))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def spherical_kmeans(
    vectors: Vectors, count: int, seed: int, rounds: int = 20
) -> tuple[Float[np.ndarray, "count features"], Int[np.ndarray, "examples"]]:
    """Spherical k-means from k-means++ starts: (unit centroids, the cluster of each row).

    Ends early where no row moves. A cluster that loses all its rows keeps its centroid.
    """
    num_vectors = vectors.shape[0]
    if not 1 <= count <= num_vectors:
        raise ValueError(f"{count} clusters of {num_vectors} rows; between 1 and the number of rows are wanted.")
    rng = np.random.default_rng(seed)
    centroids = _dense_row(vectors, rng.integers(num_vectors))[None]
    nearest = np.full(num_vectors, -np.inf)
    while len(centroids) < count:
        nearest = np.maximum(nearest, vectors @ centroids[-1])
        cumulative_distance = np.cumsum(np.maximum(1 - nearest, 0) + 1e-12)
        centroids = np.vstack(
            [
                centroids,
                _dense_row(vectors, np.searchsorted(cumulative_distance, rng.random() * cumulative_distance[-1])),
            ]
        )
    assignments = np.full(num_vectors, -1)
    for _ in range(rounds):
        previous, assignments = assignments, np.argmax(vectors @ centroids.T, axis=1)
        if (previous == assignments).all():
            break
        members = sparse.csr_array(
            (np.ones(num_vectors), (assignments, np.arange(num_vectors))), shape=(count, num_vectors)
        )
        sums = members @ vectors
        sums = sums.toarray() if sparse.issparse(sums) else sums
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 0, sums / np.maximum(lengths, 1e-30), centroids)
    return centroids, assignments


def _split_words(example: Example) -> list[str]:
    return WORD_PATTERN.findall(extract_question(example).casefold())


def _prompt_tokens(candidates: TokenizedExamples, i: int) -> Int[np.ndarray, "length"]:
    ids, supervised, _ = candidates.sequences(i)[0]
    return ids if example_kind(candidates.examples[i]) == "text" else ids[: int(np.argmax([*supervised, True]))]


def _dense_row(vectors: Vectors, i: Any) -> Float[np.ndarray, "features"]:
    row = vectors[[int(i)]]
    return (row.toarray() if sparse.issparse(row) else row)[0]
