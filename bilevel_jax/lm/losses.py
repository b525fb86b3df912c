"""Per-example losses of supervised fine-tuning, and their split into outputs and a convex link.

A batch is one micro-batch: a dict of `tokens`, `targets`, `positions`, `segments` (0 = padding) and `slot`, all
int32[rows, len], and `supervised` float32[examples]. `slot` says which example a *target* counts for; `examples` (one
past the last) = none. `supervised` is the number of those targets, 1 for an empty slot. Packing changes nothing.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, Fixed, Loss, Params
from bilevel_jax.lm.models.decoder import Decoder
from bilevel_jax.lm.models.lora import join

Normalise = Literal["example_mean", "token_sum"]


def sft(
    decoder: Decoder, *, chunk: int = 1024, normalise: Normalise = "example_mean"
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """(params, batch) -> the loss of each example: -(1/|y|) Σ_t log p(y_t | x, y_<t), nats per supervised token.

    `token_sum` leaves out the 1/|y|: nats per example, so that long answers count for more. An empty slot is exactly 0.
    Logits live for `chunk` tokens at a time, in the forward and in the backward pass, never for the whole batch.
    A target outside the vocabulary gives NaN (or, if negative, counts from the end): check tokens where they are made.
    """
    _check(chunk, normalise)

    def losses(params: Params, batch: Batch) -> Array:
        per_token = _in_chunks(
            _negative_log_likelihood, _hidden(decoder, params, batch), decoder.head(params), batch, chunk
        )
        return _examples(per_token, batch, normalise)

    return losses


def accuracy(decoder: Decoder, *, chunk: int = 1024) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """(params, batch) -> the share of each example's supervised targets that are the likeliest token, 0 to 1.

    With the true tokens before each target given (teacher forcing): not the accuracy of generated text. An empty slot
    is 0.
    """
    _check(chunk, "example_mean")

    def right(params: Params, batch: Batch) -> Array:
        hits = _in_chunks(_is_likeliest, _hidden(decoder, params, batch), decoder.head(params), batch, chunk)
        return _examples(hits, batch, "example_mean")

    return right


def sft_loss(decoder: Decoder, *, frozen_head: bool, chunk: int = 1024, normalise: Normalise = "example_mean") -> Loss:
    """The losses of `sft` as link(outputs), for Gauss-Newton: params over fixed as `assemble` joins them.

    frozen_head=True: outputs are the hidden states [rows, len, width]; the link, log-sum-exp of an affine map, applies
    the head that lives in `fixed` and sees `chunk` tokens at a time. For LoRA, where no head is trained.
    frozen_head=False: outputs are the logits [rows, len, vocab], all of them at once.
    """
    _check(chunk, normalise)

    def hidden(params: Params, fixed: Fixed, batch: Batch) -> Array:
        if fixed is None:
            raise ValueError("frozen_head=True takes the head from `fixed`, which is None; use frozen_head=False.")
        return _hidden(decoder, assemble(params, fixed), batch)

    def affine_link(outputs: Array, fixed: Fixed, batch: Batch) -> Array:
        per_token = _in_chunks(_negative_log_likelihood, outputs, decoder.head(fixed), batch, chunk)
        return _examples(per_token, batch, normalise)

    def logits(params: Params, fixed: Fixed, batch: Batch) -> Array:
        whole = assemble(params, fixed)
        return _hidden(decoder, whole, batch) @ decoder.head(whole)

    def link(outputs: Array, fixed: Fixed, batch: Batch) -> Array:
        return _examples(_negative_log_likelihood(outputs, _targets(batch)), batch, normalise)

    return Loss(hidden, affine_link) if frozen_head else Loss(logits, link)


def assemble(params: Params, fixed: Fixed) -> Params:
    """The whole parameter tree: `params` themselves, or adapters `params` joined to the frozen base `fixed`."""
    return params if fixed is None else join(fixed, params)


def _hidden(decoder: Decoder, params: Params, batch: Batch) -> Array:
    return decoder.hidden(params, batch["tokens"], batch["positions"], batch["segments"])


def _in_chunks(
    measure: Callable[[Array, Array], Array],
    hidden: Float[Array, "rows len width"],
    head: Float[Array, "width vocab"],
    batch: Batch,
    chunk: int,
) -> Float[Array, "rows len"]:
    """measure(logits, targets) of every place, in pieces of about `chunk` tokens.

    The pieces cut the length and not the rows: on a mesh the rows are spread over devices, which share each piece.
    """
    rows, length, _ = hidden.shape
    pieces = -(-length // max(1, chunk // rows))
    size = -(-length // pieces)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, pieces, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(piece: tuple[Array, Array]) -> Array:
        return measure(piece[0] @ head.astype(piece[0].dtype), piece[1])

    out = jax.lax.map(one, (cut(hidden), cut(_targets(batch))))
    return jnp.moveaxis(out, 0, 1).reshape(rows, pieces * size)[:, :length]


def _is_likeliest(logits: Float[Array, "rows len vocab"], targets: Array) -> Float[Array, "rows len"]:
    return (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)


def _negative_log_likelihood(logits: Float[Array, "rows len vocab"], targets: Array) -> Float[Array, "rows len"]:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _targets(batch: Batch) -> Array:
    # a place that no example counts may hold anything (-100), and must not be NaN: NaN * 0 is NaN in a gradient
    return jnp.where(batch["slot"] < batch["supervised"].shape[0], batch["targets"], 0)


def _examples(token_losses: Float[Array, "rows len"], batch: Batch, normalise: Normalise) -> Float[Array, "examples"]:
    """Sum the tokens of each example. By masks and not by a scatter: the same order, so the same bits, on every run."""
    examples = jnp.arange(batch["supervised"].shape[0])[:, None, None]
    sums = jnp.sum(jnp.where(batch["slot"][None] == examples, token_losses[None], 0), axis=(1, 2))
    return sums / batch["supervised"] if normalise == "example_mean" else sums


def _check(chunk: int, normalise: Any) -> None:
    if chunk < 1:
        raise ValueError(f"chunk {chunk}; a chunk is at least one token.")
    if normalise not in ("example_mean", "token_sum"):
        raise ValueError(f"normalise {normalise!r}; choose 'example_mean' or 'token_sum'.")
