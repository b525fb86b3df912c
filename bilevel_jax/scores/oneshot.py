"""One-shot demonstration gain on the holdout (Nuggets golden score)."""

import numpy as np
from jaxtyping import Float

from bilevel_jax.scores.demonstrations import MAX_SIMILARITY, check_holdout_size, iterate_near_duplicates
from bilevel_jax.scores.incontext import DemonstrationFormat
from bilevel_jax.scores.requests import (
    ScoreFn,
    ScorePlan,
    TokenizedExamples,
    make_score_plan,
    make_target_requests,
    per_token,
)


def oneshot_score(
    demonstration_format: DemonstrationFormat, *, max_length: int, max_similarity: float = MAX_SIMILARITY
) -> ScoreFn:
    """s_i = share of the holdout v with log p(y_v | (x_i, y_i), x_v) > log p(y_v | x_v), 0 to 1.

    The golden score of Nuggets (Li et al., arXiv 2312.10302). It asks candidates x holdout likelihoods: take some tens
    of holdout examples; those of one candidate share their head. Holdout examples that are copies or near-duplicates of
    the candidate (cosine ≥ `max_similarity`), or that do not fit into `max_length` tokens after it, do not count;
    `num_holdout` is the number that did, and a candidate with none has score nan. Of a pair the chosen response is
    shown, and predicted. Wrong where any demonstration helps: then all scores are near 1.

    Args:
        demonstration_format: from `make_demonstration_format`.
        max_length: tokens of a prompt with its demonstration and response.
        max_similarity: cosine of TF-IDF vectors from which two questions are near-duplicates.

    Returns:
        A score, 0 to 1. It raises ValueError for an empty holdout.
    """

    def score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
        check_holdout_size(holdout, 1)
        anchors = [holdout.sequences(j)[0] for j in range(len(holdout.examples))]
        zero_shot_requests = [make_target_requests(anchor) for anchor in anchors]
        is_shown, requests_by_sequence, is_kept = (
            np.zeros((len(candidates.examples), len(anchors)), bool),
            list(zero_shot_requests),
            candidates.is_kept,
        )
        for block, banned in iterate_near_duplicates(candidates, holdout, max_similarity):
            for i, near_duplicate in zip(range(block.start, block.stop), banned, strict=True):
                head = demonstration_format.format_context(
                    [demonstration_format.format_demonstration(candidates.sequences(i)[0])]
                )
                fits = [
                    len(head) + len(anchor.ids) - demonstration_format.count_skipped(anchor) <= max_length
                    for anchor in anchors
                ]
                is_shown[i] = ~near_duplicate & fits & is_kept[i]
                requests_by_sequence += [
                    make_target_requests(anchors[j], head, demonstration_format.count_skipped(anchors[j]))
                    for j in np.flatnonzero(is_shown[i])
                ]

        def share_improved(nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]) -> np.ndarray:
            rises = np.zeros(is_shown.shape)
            row, anchor = np.nonzero(is_shown)
            rises[row, anchor] = nats[len(anchors) :] > nats[anchor]
            return per_token(rises.sum(1), is_shown.sum(1))

        return make_score_plan(requests_by_sequence, share_improved, is_shown.sum(1), len(anchors))

    return score
