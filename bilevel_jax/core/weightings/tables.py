"""Maps from outer variables to the table of example weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import Hyper, Scalar, Weighting
from bilevel_jax.core.weightings.steps import normalized_gradient_step

WeightTable = Float[Array, "examples"]


def softmax(num_examples: int, table_size: int = 0) -> Weighting:
    """One logit for each example: the weights compete, and their mean is 1 (the paper's default).

        w = N softmax(h)

    Args:
        num_examples: N.
        table_size: more than N where the table has entries of weight 0 at its end, so that devices divide it evenly.

    Returns:
        The weighting; h is float[table_size].

    Example:
        >>> weighting = bj.weightings.softmax(2)
        >>> bool(jnp.allclose(weighting.weights(jnp.log(jnp.array([1.0, 3.0]))), jnp.array([0.5, 1.5])))
        True
    """
    table_size = table_size or num_examples

    def weights(h: WeightTable) -> WeightTable:
        return num_examples * jax.nn.softmax(
            h if table_size == num_examples else jnp.where(jnp.arange(table_size) < num_examples, h, -jnp.inf)
        )

    return Weighting(lambda: jnp.zeros(table_size), weights, _step, lambda logits: logits)


def sigmoid(num_examples: int, table_size: int = 0) -> Weighting:
    """One logit for each example: the weights do not compete, and lie between 0 and 2.

        w = 2 sigmoid(h)

    Args:
        num_examples: N.
        table_size: as in `softmax`.

    Returns:
        The weighting; h is float[table_size].

    Example:
        >>> weighting = bj.weightings.sigmoid(2)
        >>> weighting.weights(weighting.init()).tolist()
        [1.0, 1.0]
    """
    table_size = table_size or num_examples

    def weights(h: WeightTable) -> WeightTable:
        w = 2 * jax.nn.sigmoid(h)
        return w if table_size == num_examples else jnp.where(jnp.arange(table_size) < num_examples, w, 0)

    return Weighting(lambda: jnp.zeros(table_size), weights, _step, lambda logits: logits)


def weighting_vjp(weighting: Weighting, hyper: Hyper, hypergradients: WeightTable) -> Hyper:
    """d L_v / d hyper from the hypergradients d L_v / d w: one vector-Jacobian product of the weighting.

    Args:
        weighting: the map hyper -> w.
        hyper: where the product is taken.
        hypergradients: d L_v / d w, float[examples], nats per unit of weight.

    Returns:
        The gradient, shaped as `hyper`, nats per unit of hyper.

    Example:
        >>> weighting = bj.weightings.softmax(2)
        >>> bj.weightings.weighting_vjp(weighting, jnp.zeros(2), jnp.array([1.0, -1.0])).tolist()
        [1.0, -1.0]
    """
    return jax.vjp(weighting.weights, hyper)[1](hypergradients)[0]


def effective_sample_size(weights: WeightTable) -> Scalar:
    """How many equally weighted examples the weights amount to.

        ESS = (sum w)^2 / sum w^2

    Args:
        weights: float[examples].

    Returns:
        Between 1 and the number of examples.

    Example:
        >>> float(bj.weightings.effective_sample_size(jnp.array([1.0, 1.0, 0.0])))
        2.0
    """
    return jnp.sum(weights) ** 2 / jnp.sum(weights**2)


def entropy(weights: WeightTable) -> Scalar:
    """Entropy of w / sum w, nats; at most log(examples).

    Args:
        weights: float[examples], at least 0.

    Returns:
        A scalar, nats.

    Example:
        >>> round(float(bj.weightings.entropy(jnp.ones(4))), 4)  # log 4
        1.3863
    """
    p = weights / jnp.sum(weights)
    return jnp.sum(jax.scipy.special.entr(p))


def _step(hyper: Hyper, grad: Hyper, learning_rate: float | Scalar, max_step: float) -> Hyper:
    return normalized_gradient_step(learning_rate, max_step)(hyper, grad)
