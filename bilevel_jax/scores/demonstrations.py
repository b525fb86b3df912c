"""Choice of in-context demonstrations from the holdout."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data.examples import hash_normalized_text
from bilevel_jax.scores.embedding import Embedding, cosine_similarities, iterate_blocks, spherical_kmeans, tfidf
from bilevel_jax.scores.random import hash_to_int
from bilevel_jax.scores.requests import TokenizedExamples

DemonstrationSelector = Callable[[TokenizedExamples, TokenizedExamples, int], Int[np.ndarray, "rows k"]]
"""(candidates, holdout, k) -> the holdout examples to show before each, the best first; -1 where there are no more."""
HoldoutPriority = Callable[[slice], Float[np.ndarray, "#block holdout"]]
"""A block of rows -> how much each holdout row is wanted; larger is better."""

MAX_SIMILARITY = 0.95
"""Cosine of TF-IDF vectors from which two questions are near-duplicates."""


def demonstration_selector(
    name: str, *, embedding: Embedding = tfidf, max_similarity: float = MAX_SIMILARITY, seed: int = 0
) -> DemonstrationSelector:
    """How demonstrations are chosen, by name.

    knn          the nearest to the row by the cosine of their questions; each row has a prompt of its own
    clustered:K  the nearest to the centroid of the row's cluster, of K clusters of the rows: one set for each cluster
    fixed        one set for all rows, drawn once
    random       a set drawn for each row

    A holdout example with the text of the candidate, or with its question (cosine ≥ `max_similarity`; above 1: never),
    is not shown to it, since it would give the answer away; the next best one is, and only that row's demonstrations
    change. Draws and clusters depend on ids and the seed, not on the order of the rows. Ties go to the earlier holdout
    row.

    Args:
        name: `knn`, `clustered:K`, `fixed` or `random`.
        embedding: vectors of questions, `tfidf`, `hidden_states` or `given_vectors`; read by `knn` and `clustered`.
        max_similarity: cosine of TF-IDF vectors from which two questions are near-duplicates.
        seed: of clusters and draws.

    Returns:
        (candidates, holdout, k) -> int[candidates, k]. It raises ValueError for fewer than k usable holdout examples.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> demonstration_selector("nearest")
        Traceback (most recent call last):
        ValueError: demonstrations are 'nearest'; they are 'knn', 'clustered:K' with K > 0 clusters, 'fixed' or
            'random'.
    """
    kind, colon, cluster_count = name.partition(":")
    has_cluster_count = cluster_count.isdigit() and int(cluster_count) > 0
    if kind not in PRIORITIES or has_cluster_count != (kind == "clustered") or bool(colon) != has_cluster_count:
        raise ValueError(
            f"demonstrations are {name!r}; they are 'knn', 'clustered:K' with K > 0 clusters, 'fixed' or 'random'."
        )

    def choose(candidates: TokenizedExamples, holdout: TokenizedExamples, k: int) -> Int[np.ndarray, "rows k"]:
        check_holdout_size(holdout, k)
        priority = PRIORITIES[kind](candidates, holdout, embedding, seed, int(cluster_count or 0))
        chosen = np.full((len(candidates.examples), k), -1)
        for block, banned in iterate_near_duplicates(candidates, holdout, max_similarity):
            block_priority = np.where(banned, -np.inf, priority(block))
            best = np.argsort(-block_priority, axis=1, kind="stable")[:, :k]
            chosen[block] = np.where(np.isneginf(np.take_along_axis(block_priority, best, axis=1)), -1, best)
        return chosen

    return choose


def split_into_sets(choose: DemonstrationSelector, num_sets: int) -> list[DemonstrationSelector]:
    """Choices of disjoint sets: of the num_sets * k examples that `choose` ranks first, set j has every num_sets-th
    from place j on, so no set has the better ones; -1 where there are no more."""

    def choose_set(place: int) -> DemonstrationSelector:
        return lambda candidates, holdout, k: choose(candidates, holdout, num_sets * k)[:, place::num_sets]

    return [choose_set(place) for place in range(num_sets)]


def check_holdout_size(holdout: TokenizedExamples, k: int) -> None:
    """Raises ValueError unless k rows of the holdout can be shown."""
    usable = int(holdout.is_kept.sum())
    if k < 1:
        raise ValueError(f"k is {k}; at least one demonstration is wanted.")
    if usable < k:
        raise ValueError(
            f"{usable} holdout rows, and k = {k} of them are to be shown. Give more holdout rows, or a smaller k."
        )


def iterate_near_duplicates(
    candidates: TokenizedExamples, holdout: TokenizedExamples, max_similarity: float = MAX_SIMILARITY
) -> Iterator[tuple[slice, Bool[np.ndarray, "block holdout"]]]:
    """By blocks of candidates, the holdout examples not to be shown to each: copies, near-duplicates, dropped ones."""
    candidate_vectors, holdout_vectors = tfidf(candidates, holdout)
    copies: dict[str, list[int]] = {}
    for j, example in enumerate(holdout.examples):
        copies.setdefault(hash_normalized_text(example), []).append(j)
    for block in iterate_blocks(len(candidates.examples), len(holdout.examples)):
        banned = (cosine_similarities(candidate_vectors[block], holdout_vectors) >= max_similarity) | ~holdout.is_kept[
            None
        ]
        for b, example in enumerate(candidates.examples[block]):
            banned[b, copies.get(hash_normalized_text(example), [])] = True
        yield block, banned


def _nearest_priority(
    candidates: TokenizedExamples, holdout: TokenizedExamples, embedding: Embedding, seed: int, count: int
) -> HoldoutPriority:
    candidate_vectors, holdout_vectors = embedding(candidates, holdout)
    return lambda block: cosine_similarities(candidate_vectors[block], holdout_vectors)


def _cluster_priority(
    candidates: TokenizedExamples, holdout: TokenizedExamples, embedding: Embedding, seed: int, count: int
) -> HoldoutPriority:
    candidate_vectors, holdout_vectors = embedding(candidates, holdout)
    order = np.argsort([example.id for example in candidates.examples], kind="stable")
    centroids, sorted_clusters = spherical_kmeans(candidate_vectors[order], count, seed)
    cluster = np.empty(len(order), int)
    cluster[order] = sorted_clusters
    nearness = cosine_similarities(centroids, holdout_vectors)
    return lambda block: nearness[cluster[block]]


def _fixed_priority(
    candidates: TokenizedExamples, holdout: TokenizedExamples, embedding: Embedding, seed: int, count: int
) -> HoldoutPriority:
    random_priority = np.array([hash_to_int(example.id, seed) for example in holdout.examples], float)
    return lambda block: random_priority[None]


def _random_priority(
    candidates: TokenizedExamples, holdout: TokenizedExamples, embedding: Embedding, seed: int, count: int
) -> HoldoutPriority:
    def draw_priority(block: slice) -> Float[np.ndarray, "block holdout"]:
        sources = (np.random.default_rng(hash_to_int(example.id, seed)) for example in candidates.examples[block])
        return np.stack([source.random(len(holdout.examples)) for source in sources])

    return draw_priority


PRIORITIES = {
    "knn": _nearest_priority,
    "clustered": _cluster_priority,
    "fixed": _fixed_priority,
    "random": _random_priority,
}
