"""One-shot scores: what a row, shown as the only demonstration, does for the holdout."""

import numpy as np
from jaxtyping import Float

from bilevel_jax.scores.demonstrations import ALIKE, alike_to, check
from bilevel_jax.scores.incontext import Prompt
from bilevel_jax.scores.requests import Plan, Rows, Score, per_token, plan, targets


def oneshot(form: Prompt, *, max_length: int, alike: float = ALIKE) -> Score:
    """s_i = share of the holdout rows v with log p(y_v | (x_i, y_i), x_v) > log p(y_v | x_v), 0 to 1.

    The golden score of Nuggets (Li et al., arXiv 2312.10302). It asks rows x holdout likelihoods: take some tens of
    holdout rows; those of one candidate share their head. Holdout rows that are copies or near-duplicates of the
    candidate (cosine ≥ `alike`), or that do not fit into `max_length` tokens behind it, do not count; `held` is the
    number that did, and a row with none has score nan. Of a pair the chosen response is shown, and predicted. Wrong
    where any demonstration helps: then all scores are near 1.
    """

    def score(rows: Rows, holdout: Rows) -> Plan:
        check(holdout, 1)
        anchors = [holdout.sides(j)[0] for j in range(len(holdout.examples))]
        alone = [targets(anchor) for anchor in anchors]
        shown, asked, kept = np.zeros((len(rows.examples), len(anchors)), bool), list(alone), rows.kept
        for block, banned in alike_to(rows, holdout, alike):
            for i, out in zip(range(block.start, block.stop), banned, strict=True):
                head = form.head([form.piece(rows.sides(i)[0])])
                fits = [len(head) + len(anchor.ids) - form.skip(anchor) <= max_length for anchor in anchors]
                shown[i] = ~out & fits & kept[i]
                asked += [targets(anchors[j], head, form.skip(anchors[j])) for j in np.flatnonzero(shown[i])]

        def share(nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]) -> np.ndarray:
            rises = np.zeros(shown.shape)
            row, anchor = np.nonzero(shown)
            rises[row, anchor] = nats[len(anchors) :] > nats[anchor]
            return per_token(rises.sum(1), shown.sum(1))

        return plan(asked, share, shown.sum(1), len(anchors))

    return score
