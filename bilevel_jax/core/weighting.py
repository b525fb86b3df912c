"""From an outer variable to the weight table: softmax, sigmoid, per_source, by_features; and the step on it.

Every weighting starts at weight 1 for each row, and is pulled back once per estimate, outside the sweep.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bilevel_jax.core.types import Hyper, Scalar, Weighting

Table = Float[Array, "rows"]


def softmax(rows: int) -> Weighting:
    """w = rows * softmax(h), one logit for each row: the weights compete, their mean is 1 (the paper's default)."""
    return Weighting(lambda: jnp.zeros(rows), lambda h: rows * jax.nn.softmax(h))


def sigmoid(rows: int) -> Weighting:
    """w = 2 sigmoid(h), one logit for each row: the weights do not compete; between 0 and 2."""
    return Weighting(lambda: jnp.zeros(rows), lambda h: 2 * jax.nn.sigmoid(h))


def per_source(source: Int[Array, "rows"], sources: int) -> Weighting:
    """One weight for each source of data, w_i = p_s(i) / mean_j p_s(j) with p = softmax(h): their mean over rows is 1.

    `source` gives the source of each row, 0 .. sources-1 (the setting of ScaleBiO).
    """
    counts = jnp.bincount(source, length=sources)

    def weights(h: Float[Array, "sources"]) -> Table:
        p = jax.nn.softmax(h)
        return (p / (jnp.sum(p * counts) / source.shape[0]))[source]

    return Weighting(lambda: jnp.zeros(sources), weights)


def by_features(features: Float[Array, "rows features"]) -> Weighting:
    """w = rows * softmax(features h), one coefficient for each feature: weights that extend to unseen rows.

    Features should be standardised; a constant one has no effect, as softmax ignores a shift.
    """

    def weights(h: Float[Array, "features"]) -> Table:
        return features.shape[0] * jax.nn.softmax(features @ h)

    return Weighting(lambda: jnp.zeros(features.shape[1]), weights)


def pull_back(weighting: Weighting, hyper: Hyper, entries: Table) -> Hyper:
    """d L_v / d hyper from the entries d L_v / d w: one vector-Jacobian product of the weighting."""
    return jax.vjp(weighting.weights, hyper)[1](entries)[0]


def normalised_descent(rate: float, cap: float) -> Callable[[Hyper, Hyper], Hyper]:
    """(hyper, gradient) -> hyper - clip(rate * gradient / rms(gradient), -cap, cap).

    The rms is over the entries that are not 0, so that rows that no batch touched neither move nor change the scale.
    Not Adam: on one logit a row Adam moves rows that are absent, and is blind to the size of what it follows.
    """

    def step(hyper: Hyper, grad: Hyper) -> Hyper:
        leaves = jax.tree.leaves(grad)
        present = sum(jnp.sum(leaf != 0) for leaf in leaves)
        rms = optax.tree.norm(grad) / jnp.sqrt(jnp.maximum(present, 1))
        scale = jnp.where(rms > 0, rate / jnp.where(rms > 0, rms, 1), 0)
        return jax.tree.map(lambda h, g: h - jnp.clip(scale * g, -cap, cap), hyper, grad)

    return step


def effective_size(weights: Table) -> Scalar:
    """ESS = (sum w)^2 / sum w^2: how many equally weighted rows the weights amount to."""
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def entropy(weights: Table) -> Scalar:
    """Entropy of w / sum w, nats; at most log(rows)."""
    p = weights / jnp.sum(weights)
    return jnp.sum(jax.scipy.special.entr(p))
