"""Steps of the outer variable along its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core.types import Hyper, Scalar


def normalized_gradient_step(learning_rate: float | Scalar, max_step: float) -> Callable[[Hyper, Hyper], Hyper]:
    """A gradient step of a size that does not depend on the gradient's scale, with a cap.

        hyper <- hyper - clip(learning_rate * gradient / rms(gradient), -max_step, max_step)

    The rms is over the entries that are not 0, so that examples that no batch touched neither move nor change the
    scale. Not Adam: on one logit an example Adam moves examples that are absent, and is blind to the size of what it
    follows.

    Args:
        learning_rate: the rms of the step.
        max_step: the largest change of an entry.

    Returns:
        (hyper, gradient) -> hyper.

    Example:
        >>> step = bj.weightings.normalized_gradient_step(0.5, max_step=10.0)
        >>> step(jnp.zeros(3), jnp.array([4.0, -4.0, 0.0])).tolist()
        [-0.5, 0.5, 0.0]
    """

    def step(hyper: Hyper, grad: Hyper) -> Hyper:
        scale = learning_rate * inverse_rms(grad)
        return jax.tree.map(lambda h, g: h - jnp.clip(scale * g, -max_step, max_step), hyper, grad)

    return step


def inverse_rms(grad: Hyper) -> Scalar:
    """1 / rms over the entries of grad that are not 0; 0 where there is none.

    Args:
        grad: any pytree.

    Returns:
        A scalar.

    Example:
        >>> float(bj.weightings.inverse_rms(jnp.array([2.0, -2.0, 0.0])))
        0.5
    """
    num_nonzero = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(grad))
    rms = optax.tree.norm(grad) / jnp.sqrt(jnp.maximum(num_nonzero, 1))
    return jnp.where(rms > 0, 1 / jnp.where(rms > 0, rms, 1), 0)
