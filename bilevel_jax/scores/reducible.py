"""Reducible holdout loss (RHO-loss)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from bilevel_jax.lm.inference.loglik import LogLik
from bilevel_jax.scores.perplexity import loss_score
from bilevel_jax.scores.requests import TokenizedExamples


def reducible_loss(
    candidates: TokenizedExamples, model_logliks: Sequence[LogLik], holdout_model_logliks: Sequence[LogLik]
) -> Float[np.ndarray, "examples"]:
    """s_i = ℓ_i(θ) - ℓ_i(θ_holdout), nats per token: hard now, and not hard for a model that learned what is wanted.

    Both answer the requests of `loss(rows, ...)`, which are the same. Low for what is known already (ℓ(θ) is small) and
    for noise (ℓ(θ_holdout) is as large). Source: Mindermann et al., arXiv 2206.07137. Wrong where the holdout is too
    small to train on: θ_holdout must generalise to the rows.
    """
    score = loss_score(candidates, candidates).combine
    return score(model_logliks) - score(holdout_model_logliks)
