"""Losses of responses that a model wrote itself: the likelihood of each against that under the model that wrote it.

With r_t = log π_θ(y_t | x, y_<t) − log q(y_t | x, y_<t), where q is the sampler, temperature, top-k and top-p included,
ρ_t = exp(r_t) is the importance ratio. It is cut at c, and what follows the ratio is never a scalar of the batch: each
response keeps a loss of its own, which a weight then multiplies.

If q is a model's own distribution, E_{y~q}[ρ ∇log π_θ] = ∇ Σ_y π_θ(y) = 0: such responses alone teach nothing, and all
signal comes from weights that look at something else (validation rows). With 1/|y| this holds where lengths are equal.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.losses import Normalise, normalised, per_sequence, token_losses
from bilevel_jax.lm.models.decoder import Decoder

Ratio = Literal["token", "sequence", "none"]
CLIP = 10.0
"""The largest ratio that a gradient is multiplied by, as in the public code of online selection."""


def self_sampled(
    decoder: Decoder,
    *,
    ratio: Ratio = "token",
    responses: int = 1,
    clip: float = CLIP,
    normalise: Normalise = "example_mean",
    chunk: int = 1024,
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """(params, batch) -> the loss of each example; where `sampler` is nan, that of `losses.sft`, n_t = -log π_θ(y_t).

    token     mean_t [1 − log q_t − ψ(r_t)],   ψ(r) = e^r up to r = log c, c (1 + r − log c) beyond,   nats per token.
              Its gradient is that of the plain loss times min(ρ_t, c) at each token, as ρ ∇log π = ∇ρ: ψ is the
              potential of the cut ratio, so that second derivatives are right (`unrolled` differentiates the gradient).
              A constant makes it the plain loss where θ is the sampler.
    sequence  sg(G ρ_j / Σ_k ρ_k) mean_t n_t,   ρ_j = min(exp Σ_t r_t, c) of response j of the G = `responses` to one
              question, which stand side by side in the batch (`batches.grouped`).
    none      mean_t n_t: every token counts, however unlikely it has become.

    Wrong: with "sequence" under `unrolled`, as its gradient field has no potential and the stopped gradient hides that
    the ratios move; with ratios of long responses, which are cut, or 0, nearly always.

    Source: the loss and its cut as in the public code of arXiv 2511.21056; the potential is derived here.

    Raises:
        ValueError: if `ratio` is no name, or `clip` is below 1 (then not even the sampler itself keeps its gradient).
    """
    if ratio not in get_args(Ratio):
        raise ValueError(f"ratio is {ratio!r}; it is one of {list(get_args(Ratio))}.")
    if not (math.isfinite(clip) and clip >= 1):
        raise ValueError(f"clip is {clip}; it is a finite number of at least 1.")
    tokens, top = token_losses(decoder, chunk), math.log(clip)

    def losses(params: Params, batch: Batch) -> Array:
        plain = tokens(params, batch)
        if ratio == "none":
            return normalised(per_sequence(plain, batch), batch, normalise)
        if "sampler" not in batch:
            raise ValueError("the batch has no `sampler`; give the corpus one by `with_sampler`.")
        sampled = jnp.isfinite(batch["sampler"])
        q = jnp.where(sampled, batch["sampler"], 0)
        if ratio == "token":
            values = jnp.where(sampled, 1 - q - _potential(-plain - q, top), plain)
            return normalised(per_sequence(values, batch), batch, normalise)
        logs = per_sequence(jnp.where(sampled, -plain - q, 0), batch)
        own = per_sequence(sampled.astype(plain.dtype), batch) > 0
        shares = jax.nn.softmax(jnp.minimum(logs, top).reshape(-1, responses), axis=1).ravel()
        weight = jnp.where(own, responses * jax.lax.stop_gradient(shares), 1)
        return weight * normalised(per_sequence(plain, batch), batch, normalise)

    return losses


def _potential(r: Float[Array, "rows len"], top: float) -> Float[Array, "rows len"]:
    """ψ: its derivative is min(exp r, exp top), continuous."""
    return jnp.where(r <= top, jnp.exp(jnp.where(r <= top, r, top)), math.exp(top) * (1 + r - top))
