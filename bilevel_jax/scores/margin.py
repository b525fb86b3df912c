"""EL2N, the error norm of predicted probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.losses.sft import mean_over_targets
from bilevel_jax.lm.models.decoder import Decoder


def el2n(logits: Float[Array, "*rows classes"], labels: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """s_i = |p_i - y_i|_2, of softmax probabilities p and the one-hot label y, 0 to sqrt(2): large for hard examples.

    Source: Paul, Ganguli & Dziugaite, arXiv 2107.07075, who average over several models early in training. Wrong where
    labels are: wrong ones score highest.

    Args:
        logits: of the classes.
        labels: indices of the right classes.

    Returns:
        One norm for each row.

    Example:
        >>> el2n(jnp.zeros((1, 2)), jnp.array([0]))  # |(1/2, 1/2) - (1, 0)|
        Array([0.70710677], dtype=float32)
    """
    p = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    return jnp.linalg.norm(p - jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype), axis=-1)


def token_el2n(decoder: Decoder, *, chunk: int = 1024) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The mean of `el2n` over each example's targets; the vocabulary are the classes.

    Between 1 - p(y_t) and sqrt(2) (1 - p(y_t)) for each token: bounded, so unlike in the loss no token can outweigh the
    others. It takes all probabilities of a token, so it reads batches as losses do rather than asking for likelihoods.

    Args:
        decoder: the model, from `make_decoder`.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].
    """
    return mean_over_targets(decoder, el2n, chunk=chunk)
