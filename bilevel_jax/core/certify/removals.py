"""Metasmoothness, and retrains without some of the examples."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.certify.finite_differences import RetrainFn
from bilevel_jax.core.types import Hyper

REMOVED = (0.5, 0.2)
"""Shares of the examples that metasmoothness leaves out: for changes of half of the data, and for small ones."""
SMOOTH_LARGE = 0.8
"""The cosine from which on a share tells of all smaller ones, which are then not measured."""


class Metasmoothness(NamedTuple):
    """Cosines of the centred entries (weights times hypergradient) with those after a random share left."""

    removed: tuple[float, ...]
    """The shares of the examples that were left out."""
    cosines: tuple[float, ...]
    """For each share, over the examples that stay, the mean of several draws."""


class RemovalPrediction(NamedTuple):
    """Predicted and actual changes of L_v (nats) when random examples leave the training set."""

    fraction: float
    """The share of the examples that each retrain left out."""
    predicted: tuple[float, ...]
    actual: tuple[float, ...]
    rank: float
    """Spearman's rank correlation of the two: the linear-datamodelling score."""
    slope: float
    """Least-squares slope of actual on predicted."""


def drop_random_examples(key: Array, weights: Float[Array, "examples"], fraction: float) -> Float[Array, "examples"]:
    """The weights with a random `fraction` of the examples set to 0.

    Args:
        key: of the choice.
        weights: float[examples].
        fraction: of the examples, rounded to a whole number of them.

    Returns:
        float[examples].

    Example:
        >>> int(jnp.sum(bj.certify.drop_random_examples(jax.random.key(0), jnp.ones(10), 0.3) == 0))
        3
    """
    count = round(fraction * weights.shape[0])
    dropped = jax.random.permutation(key, weights.shape[0])[:count]
    return weights.at[dropped].set(0)


def metasmoothness(
    estimate: Callable[[Hyper], Hyper],
    key: Array,
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    removed: Sequence[float] = REMOVED,
    draws: int = 3,
) -> Metasmoothness:
    """Metasmoothness in its cosine form: how far the entries stay the same when random examples leave.

        cos(w * grad(w), w' * grad(w')), both centred, over the examples that stay; w' is w with a random share of the
        examples at 0; the mean over draws

    The entries count by their weight, as a change of the weights by shares of themselves does, and without their mean,
    which only tells what a change of the learning rate would do. Near 1 where the landscape is smooth at the size of
    the changes one makes; near 0 where it is noise. The largest share comes first; a smaller one follows only where the
    cosine is below SMOOTH_LARGE. Costs a training and an estimate for each draw.

    It is blind to what an example's own leaving does to its entry, which spoils predictions where single weights are
    large (`effective_share`).
    Wrong about changes larger than the shares removed, and about others than leaving examples out at random.

    Args:
        estimate: weights -> their hypergradient, float[examples].
        key: of the choices of examples.
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples].
        removed: shares of the examples left out.
        draws: choices of examples for each share.

    Returns:
        The mean cosine for each share that was measured; nan where an estimate is. A share has none where all entries
        that stay are equal, as those of a single example.

    Example:
        >>> weights, grad = jnp.ones(8), jnp.arange(8.0)
        >>> smooth = bj.certify.metasmoothness(lambda w: w @ grad * grad, jax.random.key(0), weights, grad, [0.25])
        >>> [round(cosine, 3) for cosine in smooth.cosines]
        [1.0]
    """
    return average_draws(
        lambda share, draw: smoothness_of_draw(estimate, draw_key(key, share, draw), weights, grad, share),
        removed,
        draws,
    )


def average_draws(
    cosine_of: Callable[[float, int], float | None], removed: Sequence[float], draws: int
) -> Metasmoothness:
    """The mean cosines by cosine_of(share, draw), the largest share first, until one is large enough.

    Draws without a cosine are left out, and so is a share that has none.
    """
    shares: list[float] = []
    cosines: list[float] = []
    for share in sorted(removed, reverse=True):
        some = [cosine for draw in range(draws) if (cosine := cosine_of(share, draw)) is not None]
        if some:
            shares.append(share)
            cosines.append(sum(some) / len(some))
        if some and cosines[-1] >= SMOOTH_LARGE:
            break
    return Metasmoothness(tuple(shares), tuple(cosines))


def draw_key(key: Array, removed: float, draw: int) -> Array:
    """The key of one choice of examples, the same whichever other shares are measured."""
    return jax.random.fold_in(jax.random.fold_in(key, round(1000 * removed)), draw)


def smoothness_of_draw(
    estimate: Callable[[Hyper], Hyper],
    key: Array,
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    removed: float,
) -> float | None:
    """The cosine of one choice of examples; None where all entries that stay are equal. See `metasmoothness`."""
    remaining_weights = drop_random_examples(key, weights, removed)
    is_left = remaining_weights != 0

    def center(entries):
        mean = jnp.sum(jnp.where(is_left, entries, 0)) / jnp.sum(is_left)
        return jnp.where(is_left, entries - mean, 0)

    entries, others = center(weights * grad), center(remaining_weights * estimate(remaining_weights))
    cosine = float(tree.cosine(entries, others))  # before the decision: of several processes all compute it
    return cosine if jnp.any(entries) & jnp.any(others) else None


def predict_removals(
    retrain: RetrainFn,
    key: Array,
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    validation_loss: float,
    *,
    fraction: float = 0.5,
    num_retrains: int = 8,
) -> RemovalPrediction:
    """How well <grad, change> predicts the change of L_v when a random `fraction` of the examples is left out.

    Ranks hold better than magnitudes, so read `rank` first (the linear datamodelling score, LDS). With 8 retrains its
    standard error is about .35 around 0: enough to tell .9 from noise, not .8 from .6.

    Args:
        retrain: weights -> L_v of the estimand, nats.
        key: of the choices of examples.
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples], nats per unit of weight.
        validation_loss: L_v at `weights`, nats.
        fraction: of the examples that each retrain leaves out.
        num_retrains: retrains, each without other examples.

    Returns:
        Predicted and actual changes, their rank correlation and slope.

    Example:
        >>> grad = jnp.array([-3.0, 1.0, 2.0, -0.5])
        >>> prediction = bj.certify.predict_removals(
        ...     lambda w: float(w @ grad), jax.random.key(0), jnp.ones(4), grad, validation_loss=-0.5
        ... )
        >>> round(prediction.rank, 3), round(prediction.slope, 3)
        (1.0, 1.0)
    """
    predicted, actual = [], []
    for subkey in jax.random.split(key, num_retrains):
        subset_weights = drop_random_examples(subkey, weights, fraction)
        predicted.append(float(jnp.vdot(grad, subset_weights - weights)))
        actual.append(retrain(subset_weights) - validation_loss)
    return compare_with_retrains(fraction, predicted, actual)


def compare_with_retrains(fraction: float, predicted: Sequence[float], actual: Sequence[float]) -> RemovalPrediction:
    """The rank correlation and the slope of predicted and actual changes of L_v.

    Args:
        fraction: of the examples that each retrain left out.
        predicted: changes of L_v by the hypergradient, nats.
        actual: by retraining, nats.

    Returns:
        The prediction; its slope is nan where all predicted changes are equal.

    Example:
        >>> bj.certify.compare_with_retrains(0.5, [0.0, 1.0, 2.0], [0.0, 2.0, 4.0]).slope
        2.0
    """
    p, a = np.asarray(predicted, float), np.asarray(actual, float)
    centred = p - p.mean()
    energy = float(centred @ centred)
    slope = float(centred @ (a - a.mean())) / energy if energy else math.nan
    return RemovalPrediction(
        fraction, tuple(p.tolist()), tuple(a.tolist()), spearman(jnp.asarray(p), jnp.asarray(a)), slope
    )


def spearman(first: Float[Array, "n"], second: Float[Array, "n"]) -> float:
    """Spearman's rank correlation; ties take the mean of their ranks.

    Args:
        first: float[n].
        second: float[n].

    Returns:
        Between -1 and 1; nan where one of the two is constant.

    Example:
        >>> round(bj.certify.spearman(jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0, 30.0, 20.0])), 3)
        0.5
    """

    def ranks(values):
        below = jnp.sum(values[:, None] > values[None, :], axis=1)
        ties = jnp.sum(values[:, None] == values[None, :], axis=1)
        return below + (ties - 1) / 2

    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
