"""Which holdout rows are shown before a row: the nearest, those of its cluster, the same for all, or random ones."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data import hash_normalized_text
from bilevel_jax.scores.embedding import Embedding, blocks, clusters, cosines, tfidf
from bilevel_jax.scores.random import number
from bilevel_jax.scores.requests import Rows

Choice = Callable[[Rows, Rows, int], Int[np.ndarray, "rows k"]]
"""(rows, holdout, k) -> the holdout rows to show before each row, the best first; -1 where there are no more."""
Priority = Callable[[slice], Float[np.ndarray, "#block holdout"]]
"""A block of rows -> how much each holdout row is wanted; larger is better."""

ALIKE = 0.95
"""Cosine of TF-IDF vectors from which two questions are near-duplicates."""


def choice(name: str, *, embedding: Embedding = tfidf, alike: float = ALIKE, seed: int = 0) -> Choice:
    """How demonstrations are chosen, by name.

    knn          the nearest to the row by the cosine of their questions; each row has a prompt of its own
    clustered:K  the nearest to the centroid of the row's cluster, of K clusters of the rows: one set for each cluster
    fixed        one set for all rows, drawn once
    random       a set drawn for each row

    A holdout row that says what the row says, or asks what it asks (cosine ≥ `alike`; above 1: never), is not shown to
    it, since it would give the answer away; the next best one is, and only that row's demonstrations change. Draws and
    clusters depend on ids and the seed, not on the order of the rows. Ties go to the earlier holdout row.
    """
    kind, colon, number_of = name.partition(":")
    clustered = number_of.isdigit() and int(number_of) > 0
    if kind not in KINDS or clustered != (kind == "clustered") or bool(colon) != clustered:
        raise ValueError(
            f"demonstrations are {name!r}; they are 'knn', 'clustered:K' with K > 0 clusters, 'fixed' or 'random'."
        )

    def choose(rows: Rows, holdout: Rows, k: int) -> Int[np.ndarray, "rows k"]:
        check(holdout, k)
        priority = KINDS[kind](rows, holdout, embedding, seed, int(number_of or 0))
        chosen = np.full((len(rows.examples), k), -1)
        for block, banned in alike_to(rows, holdout, alike):
            worth = np.where(banned, -np.inf, priority(block))
            best = np.argsort(-worth, axis=1, kind="stable")[:, :k]
            chosen[block] = np.where(np.isneginf(np.take_along_axis(worth, best, axis=1)), -1, best)
        return chosen

    return choose


def check(holdout: Rows, k: int) -> None:
    """Raises ValueError unless k rows of the holdout can be shown."""
    usable = int(holdout.kept.sum())
    if k < 1:
        raise ValueError(f"k is {k}; at least one demonstration is wanted.")
    if usable < k:
        raise ValueError(
            f"{usable} holdout rows, and k = {k} of them are to be shown. Give more holdout rows, or a smaller k."
        )


def alike_to(
    rows: Rows, holdout: Rows, alike: float = ALIKE
) -> Iterator[tuple[slice, Bool[np.ndarray, "block holdout"]]]:
    """By blocks of rows, the holdout rows that must not stand beside each: copies, near-duplicates, dropped ones."""
    one, other = tfidf(rows, holdout)
    copies: dict[str, list[int]] = {}
    for j, example in enumerate(holdout.examples):
        copies.setdefault(hash_normalized_text(example), []).append(j)
    for block in blocks(len(rows.examples), len(holdout.examples)):
        banned = (cosines(one[block], other) >= alike) | ~holdout.kept[None]
        for b, example in enumerate(rows.examples[block]):
            banned[b, copies.get(hash_normalized_text(example), [])] = True
        yield block, banned


def _knn(rows: Rows, holdout: Rows, embedding: Embedding, seed: int, count: int) -> Priority:
    one, other = embedding(rows, holdout)
    return lambda block: cosines(one[block], other)


def _clustered(rows: Rows, holdout: Rows, embedding: Embedding, seed: int, count: int) -> Priority:
    one, other = embedding(rows, holdout)
    order = np.argsort([example.id for example in rows.examples], kind="stable")
    centroids, found = clusters(one[order], count, seed)
    cluster = np.empty(len(order), int)
    cluster[order] = found
    nearness = cosines(centroids, other)
    return lambda block: nearness[cluster[block]]


def _fixed(rows: Rows, holdout: Rows, embedding: Embedding, seed: int, count: int) -> Priority:
    drawn = np.array([number(example.id, seed) for example in holdout.examples], float)
    return lambda block: drawn[None]


def _random(rows: Rows, holdout: Rows, embedding: Embedding, seed: int, count: int) -> Priority:
    def drawn(block: slice) -> Float[np.ndarray, "block holdout"]:
        sources = (np.random.default_rng(number(example.id, seed)) for example in rows.examples[block])
        return np.stack([source.random(len(holdout.examples)) for source in sources])

    return drawn


KINDS = {"knn": _knn, "clustered": _clustered, "fixed": _fixed, "random": _random}
