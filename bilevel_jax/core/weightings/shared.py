"""A weight that further examples share, learned beside the table's own."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from bilevel_jax.core.types import Hyper, Scalar, Weighting


class SharedWeightVariable(NamedTuple):
    """The outer variable of `append_shared_weight`."""

    table: Hyper
    """Of the table's own weighting."""
    log_weight: Float[Array, ""]
    """Log of the shared weight."""
    stride: Float[Array, ""]
    """The part of the learning rate that the shared weight moves by; halved whenever it turns."""
    direction: Float[Array, ""]
    """The sign of its last move; 0 before the first."""


def append_shared_weight(weighting: Weighting, num_examples: int, num_shared: int, table_size: int = 0) -> Weighting:
    """Further examples behind those of a weighting, all with one weight a, which is learned, too.

        w = (weighting's w, a, ..., a)  with a = exp(v);  v <- v - min(rate, max_step) * s * sign(d L_v / d v)

    The step of the shared weight has a normalisation of its own: it is one number, so its gradient over its rms is a
    sign. So that it settles, s begins at 1 and is halved whenever the sign changes (as Rprop does, Riedmiller and Braun
    1993). The table's own step is that of its weighting, as if there were no others.

    Args:
        weighting: of the first N examples.
        num_examples: N.
        num_shared: examples that share the weight.
        table_size: more than N + num_shared where the table has entries of weight 0 at its end.

    Returns:
        The weighting; its variable is a `SharedWeightVariable`, of weight 1 for every example at first.

    Example:
        >>> weighting = bj.weightings.append_shared_weight(bj.weightings.softmax(2), 2, num_shared=3)
        >>> weighting.weights(weighting.init()).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]

    Wrong when:
        the further examples are not alike: a weight for each is what `weighting` gives.
    """
    initial = weighting.init()
    table_size = table_size or num_examples + num_shared
    places = np.arange(table_size)
    is_shared = ((places >= num_examples) & (places < num_examples + num_shared)).astype(float)
    is_own = (places < num_examples).astype(float)

    def start(table: Hyper) -> SharedWeightVariable:
        return SharedWeightVariable(table, jnp.zeros(()), jnp.ones(()), jnp.zeros(()))

    return Weighting(
        init=lambda: start(initial),
        weights=Partial(_weights, Partial(weighting.weights), is_own, is_shared),
        step=Partial(_step, Partial(weighting.step)),
        fit_logits=lambda logits: start(weighting.fit_logits(logits)),
    )


def _weights(
    weights: Partial,
    is_own: Float[np.ndarray, "table"],
    is_shared: Float[np.ndarray, "table"],
    variable: SharedWeightVariable,
) -> Float[Array, "table"]:
    own = weights(variable.table)
    size = is_own.shape[0]
    own = jnp.pad(own, (0, max(0, size - own.shape[0])))[:size]  # either table may have empty entries at its end
    return jnp.where(is_own > 0, own, jnp.asarray(is_shared, own.dtype) * jnp.exp(variable.log_weight))


def _step(
    step: Partial,
    variable: SharedWeightVariable,
    grad: SharedWeightVariable,
    learning_rate: Scalar | float,
    max_step: float,
) -> SharedWeightVariable:
    direction = jnp.sign(grad.log_weight)
    stride = jnp.where(direction * variable.direction < 0, variable.stride / 2, variable.stride)
    change = jnp.minimum(learning_rate, max_step) * stride * direction
    return SharedWeightVariable(
        step(variable.table, grad.table, learning_rate, max_step),
        variable.log_weight - change.astype(variable.log_weight.dtype),
        stride,
        jnp.where(direction == 0, variable.direction, direction),
    )
