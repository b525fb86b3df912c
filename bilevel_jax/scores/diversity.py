"""Greedy selection of high-scoring, dissimilar examples."""

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.scores.embedding import Vectors, cosine_similarities


def select_diverse(
    scores: Float[np.ndarray, "examples"], features: Vectors, count: int, *, strength: float
) -> Int[np.ndarray, "count"]:
    """`count` rows, best first: each has the largest s_i - λ ⟨φ_i, Σ_j φ_j⟩ - λ/2 |φ_i|², j over those chosen before.

    With s_i = ⟨∇ℓ_i, ∇L_v⟩, φ_i = ∇ℓ_i and λ = η, that is what a step of size η on row i adds to the decrease of L_v,
    over η, if the Hessian of L_v is the identity: the second order of GREATS (Wang et al., NeurIPS 2024). Other
    features (`tfidf`, `hidden_states`, projected gradients) keep alike rows apart and no more; choose λ by eye. Rows
    without a score are never chosen. O(count · rows) inner products; only the features are held.
    """
    usable = int(np.isfinite(scores).sum())
    if not 1 <= count <= usable or features.shape[0] != len(scores) or strength < 0:
        raise ValueError(
            f"{count} of {usable} rows with a score, features of {features.shape[0]} rows for {len(scores)} scores and "
            f"strength {strength}: at most all rows with a score, features of each row and strength >= 0 are wanted."
        )
    squares = np.asarray((features * features).sum(axis=1)).ravel()
    marginal_gain = np.where(np.isfinite(scores), scores, -np.inf) - strength / 2 * squares
    chosen = np.empty(count, int)
    for n in range(count):
        chosen[n] = best = int(np.argmax(marginal_gain))
        marginal_gain = marginal_gain - strength * cosine_similarities(features, features[[best]])[:, 0]
        marginal_gain[best] = -np.inf
    return chosen
