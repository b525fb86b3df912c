"""Clipped policy-gradient losses of a generator's own responses.

With rho_t = pi_theta(y_t | x, y_<t) / q(y_t | x, y_<t), where q is the sampler, and A_t the advantage of token t,

    loss = sum_t [ -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta sg(rho_t) d_t^2 / 2 ]

and d_t = log pi_theta(y_t) - log pi_0(y_t), where pi_0 is the model at its start and sg stops the gradient. The mean of
sg(rho) d grad d over samples of q is the gradient of the divergence KL(pi_theta, pi_0) of the next token, wherever q
is; that of the often used e^-d + d - 1 would be the gradient of KL(pi_0, pi_theta). The divergence itself is measured
by rho (e^-d + d - 1), which is never below 0 and has its mean.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.losses.sft import LossReduction, reduce_losses, sum_per_sequence, token_losses
from bilevel_jax.lm.models.decoder import Decoder

MAX_LOG_RATIO = 20.0
"""Log ratios are cut here before exp, which would overflow; a clipped ratio has no gradient there in any case."""


def policy_losses(
    decoder: Decoder,
    *,
    max_ratio_change: float = 0.2,
    kl_coefficient: float = 0.0,
    reduction: LossReduction = "token_sum",
    chunk: int = 1024,
) -> Callable[[Params, Params | None, Batch], Float[Array, "examples"]]:
    """The clipped policy-gradient loss of each response, with a penalty for leaving the model at its start.

        loss = sum_t [ -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + beta sg(rho_t) d_t^2 / 2 ]

    At rho = 1 and beta = 0 its gradient is sum_t [ -A_t grad log pi_theta(y_t) ], that of REINFORCE. A batch carries
    `sampler` (log q, nan for what was not sampled) and `advantages`, both float[rows, len]. Tokens that were not
    sampled count nothing, but |y| counts them.

    Wrong: for responses that were drawn at another temperature or with top-k or top-p, as rho then compares the model
    with another distribution than its own.

    Source: PPO's clipped ratio (arXiv 1707.06347) with the advantages of a group in place of a critic's (GRPO, arXiv
    2402.03300); no equation was copied.

    Args:
        decoder: the model, from `make_decoder`.
        max_ratio_change: eps, above 0; `inf` never clips.
        kl_coefficient: beta, nats; 0: no penalty, and the model at its start is not read.
        reduction: `token_sum`, the gradient of the expected reward; or `example_mean`, over the tokens of a response,
            which makes short responses of positive advantage and long ones of negative advantage likelier than that.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, params at the start, batch) -> float[examples].

    Raises:
        ValueError: an eps that is not above 0, or a beta below 0; when called, a batch without `sampler` or
            `advantages`, or no start where beta is above 0.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import batches, tokens
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> sequence = tokens.TokenizedSequence(np.array([1, 5, 6, 2]), np.array([False, False, True, True]))
        >>> corpus = tokens.corpus_from_sequences([sequence])
        >>> corpus = corpus.with_sampler_log_probs(np.array([np.nan, np.nan, -1.0, -2.0]), np.ones(1))
        >>> corpus = corpus.with_advantages(np.array([0.0, 0.0, 1.0, 1.0]))
        >>> shape = batches.fit_evaluation_batch_shape(corpus, 1, num_micro_batches=1, length=8, packing=False)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], batches.make_evaluation_stream(corpus, shape).batch(0))
        >>> policy_losses(decoder)(params, None, batch).shape
        (1,)
    """
    if not max_ratio_change > 0:
        raise ValueError(f"max_ratio_change is {max_ratio_change}; it is a number above 0, inf for none.")
    if not (math.isfinite(kl_coefficient) and kl_coefficient >= 0):
        raise ValueError(f"kl_coefficient is {kl_coefficient}; it is a finite number of at least 0.")
    compute_terms = policy_terms(decoder, max_ratio_change=max_ratio_change, with_kl=kl_coefficient > 0, chunk=chunk)

    def losses(params: Params, start: Params | None, batch: Batch) -> Array:
        terms = compute_terms(params, start, batch)
        values = -terms.surrogate + (kl_coefficient * terms.penalty if kl_coefficient else 0)
        return reduce_losses(sum_per_sequence(values, batch), batch, reduction)

    return losses


class PolicyTerms(NamedTuple):
    """The terms of a policy-gradient loss at every place of a batch; 0 where no token was sampled."""

    surrogate: Float[Array, "rows len"]
    """min(rho A, clip(rho) A)."""
    penalty: Float[Array, "rows len"]
    """sg(rho) d^2 / 2, whose gradient is that of the divergence from the start; 0 where it was not asked for."""
    kl: Float[Array, "rows len"]
    """rho (e^-d + d - 1), whose mean is the divergence, nats; 0 where it was not asked for."""
    log_ratio: Float[Array, "rows len"]
    """log rho, nats."""
    is_clipped: Float[Array, "rows len"]
    """1 where the clipped ratio is the smaller, so that the token has no gradient."""


def policy_terms(
    decoder: Decoder, *, max_ratio_change: float, with_kl: bool, chunk: int = 1024
) -> Callable[[Params, Params | None, Batch], PolicyTerms]:
    """The terms that `policy_losses` sums, token by token.

    Args:
        decoder: the model, from `make_decoder`.
        max_ratio_change: eps, above 0.
        with_kl: whether the divergence from the start is computed, for a forward pass of the model at its start.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, params at the start, batch) -> the terms.
    """
    tokens = token_losses(decoder, chunk)

    def terms(params: Params, start: Params | None, batch: Batch) -> PolicyTerms:
        if missing := [name for name in ("sampler", "advantages") if name not in batch]:
            raise ValueError(
                f"the batch has no `{missing[0]}`; give the corpus `with_sampler_log_probs` and `with_advantages`."
            )
        if with_kl and start is None:
            raise ValueError("the divergence from the start needs the parameters at the start, and there are none.")
        log_probs = -tokens(params, batch)
        is_sampled = jnp.isfinite(batch["sampler"])
        advantages = jnp.where(is_sampled, batch["advantages"], 0)
        log_ratio = jnp.where(is_sampled, log_probs - jnp.where(is_sampled, batch["sampler"], 0), 0)
        ratios = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        clipped = jnp.clip(ratios, 1 - max_ratio_change, 1 + max_ratio_change) * advantages
        surrogate = jnp.minimum(ratios * advantages, clipped)
        penalty = kl = jnp.zeros_like(log_probs)
        if with_kl:
            start_log_probs = -jax.lax.stop_gradient(tokens(start, batch))
            difference = jnp.where(is_sampled, log_probs - start_log_probs, 0)
            penalty = jax.lax.stop_gradient(ratios) * difference**2 / 2
            kl = ratios * (jnp.expm1(-difference) + difference)
        is_clipped = (clipped < ratios * advantages).astype(log_probs.dtype)
        return PolicyTerms(surrogate, penalty, kl, log_ratio, is_clipped)

    return terms
