"""Metasmoothness, and retrains without some of the examples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.certify.finite_differences import RetrainFn
from bilevel_jax.core.types import Hyper


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
    removed: float = 0.2,
) -> float:
    """Metasmoothness in its cosine form: how far the hypergradient stays the same when random examples leave.

        cos(grad(w), grad(w with a random share `removed` of the examples left out)), over the examples that stay

    Near 1 where the landscape is smooth at the size of the changes one makes; near 0 where it is noise. Costs one more
    estimate.

    Args:
        estimate: weights -> their hypergradient, float[examples].
        key: of the choice of examples.
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples].
        removed: share of the examples left out.

    Returns:
        The cosine.

    Example:
        >>> weights = jnp.arange(1.0, 6.0)
        >>> round(bj.certify.metasmoothness(lambda w: 2 * w, jax.random.key(0), weights, 2 * weights), 3)
        1.0
    """
    subset_weights = drop_random_examples(key, weights, removed)
    remaining = subset_weights != 0
    return float(tree.cosine(jnp.where(remaining, grad, 0), jnp.where(remaining, estimate(subset_weights), 0)))


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
    p, a = jnp.array(predicted), jnp.array(actual)
    slope = jnp.vdot(p - p.mean(), a - a.mean()) / jnp.vdot(p - p.mean(), p - p.mean())
    return RemovalPrediction(fraction, tuple(predicted), tuple(actual), spearman(p, a), float(slope))


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
