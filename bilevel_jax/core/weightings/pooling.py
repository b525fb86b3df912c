"""Steps of per-example weights that pool what examples share."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core.types import Scalar

SMALLEST_SHARE = 1e-6
"""Directions of the features whose second moment is below this share of the largest are left out."""


class PoolingFeatures(NamedTuple):
    """What examples share, as columns of mean 0: see `rank_curves`."""

    by_half: Float[Array, "2 table columns"]
    """For half A of the validation set and for half B: what judges the contributions of a half must not have seen it,
    so the first is made with a model of B and the second with a model of A."""
    whole: Float[Array, "table columns"]
    """The same columns, made with a model of the whole validation set: what the step is a function of."""


class Parts(NamedTuple):
    """Contributions to a step of the weights, split in two, for half A of the validation set and for half B."""

    shared: Float[Array, "2 table"]
    """Their projection on the features: what an example contributes because it is like others."""
    own: Float[Array, "2 table"]
    """The rest."""
    pooled: Float[Array, "table"]
    """The mean of the two halves' functions of the features, read at the features of the whole set."""


class PartReliability(NamedTuple):
    """How far each part of the contributions would be found again, between 0 and 1."""

    shared: Scalar | float
    own: Scalar | float


def rank_curves(
    scores: Float[np.ndarray, "examples"],
    num_pieces: int = 4,
    multiplicity: Float[np.ndarray, "examples"] | None = None,
) -> Float[np.ndarray, "examples pieces"]:
    """Features in which a linear function is a continuous, piecewise-linear curve over the rank of a score.

        column k: max(0, 1 - |num_pieces r - k|) - its mean,  k = 1 .. num_pieces;  r the rank of the score, from 0 to 1

    Args:
        scores: a number for each example, such as its loss in nats; nan of an example that has none.
        num_pieces: pieces of equal length in rank.
        multiplicity: m, how often each example counts in ranks and means; None: once. One that counts 0 is as one
            without a score.

    Returns:
        float[examples, num_pieces], zeros for an example without a score. Equal scores share their middle rank, so that
        any rising map of the scores gives the same columns, and equal scores for all give zeros. So do G parts of an
        example, each of multiplicity 1/G, get what the whole one would, as long as another example stays whole.

    Example:
        >>> bj.weightings.rank_curves(jnp.array([3.0, 1.0, 2.0]), num_pieces=1).tolist()
        [[0.5], [-0.5], [0.0]]
    """
    scores = np.asarray(scores, float)
    counts = np.ones(len(scores)) if multiplicity is None else np.asarray(multiplicity, float)
    known = np.isfinite(scores) & (counts > 0)
    counts, columns = counts[known], np.zeros((len(scores), num_pieces))
    order = np.argsort(scores[known], kind="stable")
    ordered, mass = scores[known][order], np.concatenate([[0.0], np.cumsum(counts[order])])
    whole = counts.max(initial=0)
    if len(ordered) < 2 or mass[-1] <= whole:
        return columns
    below, up_to = (mass[np.searchsorted(ordered, scores[known], side)] for side in ("left", "right"))
    place = num_pieces * ((below + up_to - whole) / 2)[:, None] / (mass[-1] - whole)
    curves = np.maximum(0, 1 - np.abs(place - np.arange(1, num_pieces + 1)))
    columns[known] = curves - (counts[:, None] * curves).sum(0) / counts.sum()
    return columns


def split_contributions(features: PoolingFeatures, contributions: Float[Array, "2 table"]) -> Parts:
    """What the examples' features explain of their contributions, by least squares, and the rest.

        shared_h = X_h b_h,  b_h = argmin |c_h - X_h b|^2;  own_h = c_h - shared_h;  pooled = X (b_A + b_B) / 2

    with X_h the features that judge half h and X those of the whole validation set.

    Args:
        features: of the training examples; rows of 0 take part in nothing that is shared.
        contributions: of halves A and B, d L_v / d logit, nats: `weighting_vjp` of g + d and of g - d, with d half the
            difference of the halves. Where no halves were measured, the same contributions twice.

    Returns:
        The parts.

    Example:
        >>> curves = jnp.array([[-1.0], [0.0], [1.0]])
        >>> features = bj.weightings.PoolingFeatures(jnp.stack([curves, curves]), curves)
        >>> parts = bj.weightings.split_contributions(features, jnp.array([[-2.0, 1.0, 1.0], [-1.0, 0.0, 1.0]]))
        >>> parts.shared.tolist(), parts.own.tolist(), parts.pooled.tolist()
        ([[-1.5, 0.0, 1.5], [-1.0, 0.0, 1.0]], [[-0.5, 1.0, -0.5], [0.0, 0.0, 0.0]], [-1.25, 0.0, 1.25])
    """
    by_half = jnp.asarray(features.by_half, contributions.dtype)
    coefficients = jnp.stack([_fit(columns, values) for columns, values in zip(by_half, contributions, strict=True)])
    shared = jnp.einsum("hec,hc->he", by_half, coefficients)
    whole = jnp.asarray(features.whole, contributions.dtype)
    return Parts(shared, contributions - shared, whole @ coefficients.mean(0))


def measure_part_reliability(parts: Parts, earlier: Parts) -> PartReliability:
    """The share of each part's energy that one half of V after one training has in common with the other after another.

        reliability = max(0, (<A, B'> + <B, A'>) / (2 |(A + B) / 2| |(A' + B') / 2|)),  at most 1

    A, B are a part for the two halves, A', B' the same part in an earlier step, which trained on another order of the
    examples. The products share neither validation examples nor a data order, so noise of either kind has expectation
    0 in them: of two random halves alone one sees the noise of V, and not that an entry is about one order of the data.

    Args:
        parts: of this step.
        earlier: of an earlier step, with the same division into halves. With `parts` again it is the agreement of the
            two halves in one training, 1 - |(A - B) / 2|^2 / |(A + B) / 2|^2.

    Returns:
        The reliability of the shared part and of the examples' own part.

    Example:
        >>> shared, own = jnp.array([[1.0, 1.0], [1.0, 1.0]]), jnp.array([[1.0, -1.0], [-1.0, 1.0]])
        >>> parts = bj.weightings.Parts(shared, own, shared[0])
        >>> reliability = bj.weightings.measure_part_reliability(parts, parts)
        >>> float(reliability.shared), float(reliability.own)
        (1.0, 0.0)

    Wrong when:
        the validation examples are not independent draws, and too low where the weights moved far between the steps. It
        is one draw: with few validation examples it varies by .1 and more from step to step.
    """

    def agreement(now: Float[Array, "2 table"], before: Float[Array, "2 table"]) -> Scalar:
        common = (jnp.vdot(now[0], before[1]) + jnp.vdot(now[1], before[0])) / 2
        energy = jnp.linalg.norm(now.mean(0)) * jnp.linalg.norm(before.mean(0))
        return jnp.clip(common / jnp.where(energy > 0, energy, 1), 0, 1)

    return PartReliability(agreement(parts.shared, earlier.shared), agreement(parts.own, earlier.own))


def pool_contributions(parts: Parts, reliability: PartReliability) -> Float[Array, "table"]:
    """The direction of a step in which each part counts as far as it is reliable.

        direction = reliability_shared * pooled + reliability_own * (own_A + own_B) / 2

    For noise that is independent of the signal this is the estimate of least squared error that multiplies each part by
    a number (empirical Bayes). With reliability 1 and 1 it is the per-example gradient where all features are the same,
    with 1 and 0 a function of the features alone, and 0 where nothing is reliable.

    Args:
        parts: of `split_contributions`.
        reliability: of `measure_part_reliability`, or fixed numbers.

    Returns:
        float[table], nats: a gradient for a step that divides by its own root mean square.

    Example:
        >>> parts = bj.weightings.Parts(jnp.ones((2, 2)), jnp.array([[1.0, -1.0], [3.0, -3.0]]), jnp.array([1.0, 1.0]))
        >>> bj.weightings.pool_contributions(parts, bj.weightings.PartReliability(1.0, 0.5)).tolist()
        [2.0, 0.0]

    Wrong when:
        what makes an example good is no function of the features, and the own part is too noisy to show it.
    """
    return reliability.shared * parts.pooled + reliability.own * parts.own.mean(0)


def _fit(features: Float[Array, "table columns"], values: Float[Array, "table"]) -> Float[Array, "columns"]:
    """Least squares, of least norm where columns are collinear."""
    moments, directions = jnp.linalg.eigh(features.T @ features)
    is_kept = moments > SMALLEST_SHARE * jnp.maximum(moments[-1], jnp.finfo(moments.dtype).tiny)
    inverse = jnp.where(is_kept, 1 / jnp.where(is_kept, moments, 1), 0)
    return directions @ (inverse * (directions.T @ (features.T @ values)))
