"""Importance-weighted fine-tuning losses of model-generated responses.

With r_t = log π_θ(y_t | x, y_<t) − log q(y_t | x, y_<t), where q is the sampler, temperature, top-k and top-p included,
ρ_t = exp(r_t) is the importance ratio. It is cut at c, and what follows the ratio is never a scalar of the batch: each
response keeps a loss of its own, which a weight then multiplies.

If q is a model's own distribution, E_{y~q}[ρ ∇log π_θ] = ∇ Σ_y π_θ(y) = 0: such responses alone teach nothing, and all
signal comes from weights that look at something else (validation examples). With 1/|y| this holds where lengths are
equal.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.losses.sft import LossReduction, reduce_losses, sum_per_sequence, token_losses, weigh_tokens
from bilevel_jax.lm.models.decoder import Decoder

RatioKind = Literal["token", "sequence", "none"]
DEFAULT_MAX_RATIO = 10.0
"""The largest ratio that a gradient is multiplied by, as in the public code of online selection."""


def importance_weighted_losses(
    decoder: Decoder,
    *,
    ratio: RatioKind = "token",
    responses_per_prompt: int = 1,
    max_ratio: float = DEFAULT_MAX_RATIO,
    reduction: LossReduction = "example_mean",
    chunk: int = 1024,
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The loss of each example; where `sampler` is nan, that of `sft_losses`, n_t = -log π_θ(y_t).

    Where the batch has `token_weights`, the term of each token is multiplied by its own, as in `sft_losses`; ratios are
    not.

        token     mean_t [1 − log q_t − ψ(r_t)],   ψ(r) = e^r up to r = log c, c (1 + r − log c) beyond,   nats per
                  token. Its gradient is that of the plain loss times min(ρ_t, c) at each token, as ρ ∇log π = ∇ρ: ψ is
                  the potential of the clipped ratio, so that second derivatives are right (`unrolled` differentiates
                  the gradient). A constant makes it the plain loss where θ is the sampler.
        sequence  sg(G ρ_j / Σ_k ρ_k) mean_t n_t,   ρ_j = min(exp Σ_t r_t, c) of response j of the G =
                  `responses_per_prompt` to one question, which are neighbours in the batch
                  (`batches.shuffled_group_order`).
        none      mean_t n_t: every token counts, however unlikely it has become.

    Wrong: with "sequence" under `unrolled`, as its gradient field has no potential and the stopped gradient hides that
        the
    ratios move; with ratios of long responses, which are clipped, or 0, nearly always.

    Source: the loss and its clipping as in the public code of arXiv 2511.21056; the potential is derived here.

    Args:
        decoder: the model, from `make_decoder`.
        ratio: `token`, `sequence` or `none`.
        responses_per_prompt: G, read by `sequence`.
        max_ratio: c, at least 1.
        reduction: `example_mean`, `token_sum` or `token_mean`.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: an unknown `ratio`, or `max_ratio` below 1 (then not even the sampler itself keeps its gradient);
            when called, a batch without `sampler`.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples, tokens
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokens.tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> import numpy as np
        >>> corpus = corpus.with_sampler_log_probs(np.full(len(corpus.ids), -1.0), np.ones(3))
        >>> import jax
        >>> from bilevel_jax.lm import models
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> from bilevel_jax.lm.data import batches
        >>> order = batches.sequential_order(corpus.kept_indices, corpus.num_examples, 3)
        >>> shape = batches.fit_batch_shape(corpus, [order], 1, num_micro_batches=1, length=16, packing=False)
        >>> stream = batches.make_train_stream(corpus, order, 1, shape)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(0))  # the only micro-batch
        >>> jax.jit(importance_weighted_losses(decoder))(params, batch).shape
        (3,)
    """
    if ratio not in get_args(RatioKind):
        raise ValueError(f"ratio is {ratio!r}; it is one of {list(get_args(RatioKind))}.")
    if not (math.isfinite(max_ratio) and max_ratio >= 1):
        raise ValueError(f"max_ratio is {max_ratio}; it is a finite number of at least 1.")
    tokens, max_log_ratio = token_losses(decoder, chunk), math.log(max_ratio)

    def losses(params: Params, batch: Batch) -> Array:
        nll = tokens(params, batch)
        if ratio == "none":
            return reduce_losses(sum_per_sequence(weigh_tokens(nll, batch), batch), batch, reduction)
        if "sampler" not in batch:
            raise ValueError("the batch has no `sampler`; give the corpus one by `with_sampler_log_probs`.")
        is_sampled = jnp.isfinite(batch["sampler"])
        sampler_log_probs = jnp.where(is_sampled, batch["sampler"], 0)
        if ratio == "token":
            values = jnp.where(
                is_sampled, 1 - sampler_log_probs - _potential(-nll - sampler_log_probs, max_log_ratio), nll
            )
            return reduce_losses(sum_per_sequence(weigh_tokens(values, batch), batch), batch, reduction)
        log_ratios = sum_per_sequence(jnp.where(is_sampled, -nll - sampler_log_probs, 0), batch)
        has_samples = sum_per_sequence(is_sampled.astype(nll.dtype), batch) > 0
        shares = jax.nn.softmax(
            jnp.minimum(log_ratios, max_log_ratio).reshape(-1, responses_per_prompt), axis=1
        ).ravel()
        weight = jnp.where(has_samples, responses_per_prompt * jax.lax.stop_gradient(shares), 1)
        return weight * reduce_losses(sum_per_sequence(weigh_tokens(nll, batch), batch), batch, reduction)

    return losses


def _potential(r: Float[Array, "rows len"], max_log_ratio: float) -> Float[Array, "rows len"]:
    """ψ: its derivative is min(exp r, exp max_log_ratio), continuous."""
    return jnp.where(
        r <= max_log_ratio,
        jnp.exp(jnp.where(r <= max_log_ratio, r, max_log_ratio)),
        math.exp(max_log_ratio) * (1 + r - max_log_ratio),
    )
