"""Loss and perplexity of an example under the model."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from bilevel_jax.scores.requests import ScorePlan, TokenizedExamples, make_score_plan, make_target_requests, per_token


def loss_score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
    """s_i = ℓ_i = -(1/|y_i|) Σ_t log p(y_it | x_i, y_i<t), nats per token: rows that the model finds hard come first.

    The loss of `losses.sft` under the same tokens; of a pair, that of the chosen response. The holdout is not read.
    The order of online batch selection (Loshchilov & Hutter, arXiv 1511.06343). Wrong where labels are: noise is hard.
    """
    return _make_likelihood_plan(candidates, lambda mean: -mean)


def perplexity_score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
    """s_i = -exp(ℓ_i): rows that the model finds likely come first, with ℓ_i as in `loss`, whose order it reverses.

    The filter of CCNet (Wenzek et al., arXiv 1911.00359). Wrong where the model already knows what it likes.
    """
    return _make_likelihood_plan(candidates, lambda mean: -np.exp(-mean))


def _make_likelihood_plan(
    candidates: TokenizedExamples, score: Callable[[Float[np.ndarray, "examples"]], Float[np.ndarray, "examples"]]
) -> ScorePlan:
    requests_by_sequence = [make_target_requests(candidates.sequences(i)[0]) for i in range(len(candidates.examples))]
    return make_score_plan(
        requests_by_sequence,
        lambda nats, tokens: score(per_token(nats, tokens)),
        np.zeros(len(requests_by_sequence), int),
        0,
    )
