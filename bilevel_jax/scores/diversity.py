"""Greedy selection of high-scoring, dissimilar examples."""

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.scores.embedding import Vectors, cosine_similarities


def select_diverse(
    scores: Float[np.ndarray, "examples"], features: Vectors, count: int, *, strength: float
) -> Int[np.ndarray, "count"]:
    """`count` examples, best first: each has the largest s_i - λ ⟨φ_i, Σ_j φ_j⟩ - λ/2 |φ_i|², j over those chosen
    before.

    With s_i = ⟨∇ℓ_i, ∇L_v⟩, φ_i = ∇ℓ_i and λ = η, that is what a step of size η on example i adds to the decrease of
    the validation loss L_v, over η, if the Hessian of L_v is the identity: the second order of GREATS (Wang et al.,
    NeurIPS 2024). Other features (`tfidf`, `hidden_states`, projected gradients) keep similar examples apart and no
    more; choose λ by eye. Examples without a score are never chosen. O(count · examples) inner products; only the
    features are in memory.

    Args:
        scores: larger is better; nan where an example has none.
        features: φ, one row for each example.
        count: how many examples to select.
        strength: λ, at least 0.

    Returns:
        Indices of the selected examples, best first.

    Raises:
        ValueError: more examples than have a score, features of another number, or a negative strength.

    Example:
        >>> features = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> select_diverse(np.array([3.0, 2.9, 2.0]), features, 2, strength=2.0)  # the second is like the first
        array([0, 2])
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
