"""Per-example supervised fine-tuning (SFT) losses.

A batch is one micro-batch: a dict of `tokens`, `targets`, `positions`, `segments` (0 = padding) and `slot`, all
int32[rows, len], and `supervised` float32[slots]. `slot` says which sequence a *target* counts for; `slots` (one past
the last) = none. `supervised` is the number of those targets, 1 for an empty slot. A batch may have `token_weights`
float32[rows, len], the factor of the loss of each target. Here an example is one sequence;
`preferences` compares two. Packing changes nothing.
"""

from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import Batch, CompositeLoss, Frozen, Params
from bilevel_jax.lm.models.decoder import Decoder
from bilevel_jax.lm.models.lora import join_adapters

LossReduction = Literal["example_mean", "token_sum", "token_mean"]
LOSS_REDUCTIONS = ("example_mean", "token_sum", "token_mean")


def sft_losses(
    decoder: Decoder, *, chunk: int = 1024, reduction: LossReduction = "example_mean"
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The loss of each example, from n_t = -log p(y_t | x, y_<t) of its supervised tokens t, times their weight v_t.

        example_mean  (1/|y|) Σ_t v_t n_t             nats per token; every example counts the same
        token_sum     Σ_t v_t n_t                     nats per example; long answers count for more
        token_mean    (examples/tokens) Σ_t v_t n_t   nats per token; every token counts the same. Both counts are those
                      of the global step, so that Σ_i w_i loss_i / examples = Σ_i w_i Σ_t v_t n_t / tokens, as trainers
                      that average over tokens do. The number then depends on the step that an example is in.

    v_t is 1 unless the batch has `token_weights`. |y| and tokens count supervised tokens and never sum their weights,
    so that a weight means the same beside any other: half of it is half of the token's gradient. A token of weight 0
    is not supervised and not counted, which makes a step at 0 under example_mean: there |y| loses the token.

    An empty slot is exactly 0. Logits are in memory for `chunk` tokens at a time, in the forward and in the backward
    pass, never for the whole batch. A target outside the vocabulary gives NaN (or, if negative, counts from the end):
    check tokens where they are read. Preference pairs are refused: their losses are in `preferences`.

    Args:
        decoder: the model, from `make_decoder`.
        chunk: tokens whose logits are in memory at the same time.
        reduction: `example_mean`, `token_sum` or `token_mean`.

    Returns:
        (params, batch) -> float[examples]; `batch` is one micro-batch.

    Raises:
        ValueError: a chunk below 1, or an unknown reduction.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples, tokens
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokens.tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> import jax
        >>> from bilevel_jax.lm import models
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> from bilevel_jax.lm.data import batches
        >>> order = batches.sequential_order(corpus.kept_indices, corpus.num_examples, 3)
        >>> shape = batches.fit_batch_shape(corpus, [order], 1, num_micro_batches=1, length=16, packing=False)
        >>> stream = batches.make_train_stream(corpus, order, 1, shape)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(0))  # the only micro-batch
        >>> jax.jit(sft_losses(decoder))(params, batch).shape
        (3,)
    """
    _check_options(chunk, reduction)
    tokens = token_losses(decoder, chunk)

    def losses(params: Params, batch: Batch) -> Array:
        _refuse_pairs(batch)
        return reduce_losses(sum_per_sequence(weigh_tokens(tokens(params, batch), batch), batch), batch, reduction)

    return losses


def sequence_log_likelihoods(
    decoder: Decoder, *, chunk: int = 1024
) -> Callable[[Params, Batch], Float[Array, "slots"]]:
    """Σ_t log p(y_t | x, y_<t) of each *sequence*, nats: of pairs 2e is chosen, 2e + 1 rejected. An empty slot is
    exactly 0. Token weights are no part of a likelihood and are not read.

    Args:
        decoder: the model, from `make_decoder`.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[slots], nats, at most 0.

    Raises:
        ValueError: a chunk below 1.

    Example:
        >>> import jax, numpy as np
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import batches, tokens
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> sequence = tokens.TokenizedSequence(np.array([1, 5, 6, 2]), np.array([False, False, True, True]))
        >>> corpus = tokens.corpus_from_sequences([sequence])
        >>> shape = batches.fit_evaluation_batch_shape(corpus, 1, num_micro_batches=1, length=8, packing=False)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], batches.make_evaluation_stream(corpus, shape).batch(0))
        >>> float(jax.jit(sequence_log_likelihoods(decoder))(params, batch)[0]) < 0
        True
    """
    _check_options(chunk, "token_sum")
    tokens = token_losses(decoder, chunk)
    return lambda params, batch: -sum_per_sequence(tokens(params, batch), batch)


def token_accuracy(decoder: Decoder, *, chunk: int = 1024) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The share of each example's supervised targets that are the likeliest token, 0 to 1.

    With the true tokens before each target given (teacher forcing): not the accuracy of generated text. An empty slot
    is 0.

    Args:
        decoder: the model, from `make_decoder`.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: a chunk below 1.
    """
    return mean_over_targets(decoder, _is_likeliest, chunk=chunk)


def mean_over_targets(
    decoder: Decoder, measure: Callable[[Array, Array], Array], *, chunk: int = 1024
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The mean of measure(logits, targets) over each example's supervised targets. An empty slot is 0.

    Args:
        decoder: the model, from `make_decoder`.
        measure: (float[rows, len, vocab], int32[rows, len]) -> float[rows, len].
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: a chunk below 1.

    Example:
        The mean probability of an example's targets:

        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import batches, tokens
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> sequence = tokens.TokenizedSequence(np.array([1, 5, 6, 2]), np.array([False, False, True, True]))
        >>> corpus = tokens.corpus_from_sequences([sequence])
        >>> shape = batches.fit_evaluation_batch_shape(corpus, 1, num_micro_batches=1, length=8, packing=False)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], batches.make_evaluation_stream(corpus, shape).batch(0))
        >>> def probability(logits, targets):
        ...     return jnp.exp(-negative_log_likelihood(logits, targets))
        >>> 0 < float(mean_over_targets(decoder, probability)(params, batch)[0]) < 1
        True
    """
    _check_options(chunk, "example_mean")

    def values(params: Params, batch: Batch) -> Array:
        _refuse_pairs(batch)
        token_values = _map_chunks(measure, _hidden_states(decoder, params, batch), decoder.head(params), batch, chunk)
        return reduce_losses(sum_per_sequence(token_values, batch), batch, "example_mean")

    return values


def sft_composite_loss(
    decoder: Decoder, *, frozen_head: bool, chunk: int = 1024, reduction: LossReduction = "example_mean"
) -> CompositeLoss:
    """The losses of `sft_losses` as link(outputs), for Gauss-Newton.

    Args:
        decoder: the model, from `make_decoder`.
        frozen_head: True: the outputs are the hidden states [rows, len, width]; the link, log-sum-exp of an affine map,
            applies the head that is in the frozen parameters and sees `chunk` tokens at a time. For LoRA, where no head
            is trained. False: the outputs are the logits [rows, len, vocab], all of them at once.
        chunk: tokens whose logits are in memory at the same time.
        reduction: `example_mean`, `token_sum` or `token_mean`.

    Returns:
        Outputs and link; both take the frozen parameters, to which `assemble_params` joins the trained ones.

    Raises:
        ValueError: a chunk below 1, or an unknown reduction.
    """
    _check_options(chunk, reduction)

    def hidden(params: Params, frozen: Frozen, batch: Batch) -> Array:
        if frozen is None:
            raise ValueError("frozen_head=True takes the head from `frozen`, which is None; use frozen_head=False.")
        _refuse_pairs(batch)
        return _hidden_states(decoder, assemble_params(params, frozen), batch)

    def affine_link(outputs: Array, frozen: Frozen, batch: Batch) -> Array:
        per_token = _map_chunks(negative_log_likelihood, outputs, decoder.head(frozen), batch, chunk)
        return reduce_losses(sum_per_sequence(weigh_tokens(per_token, batch), batch), batch, reduction)

    def logits(params: Params, frozen: Frozen, batch: Batch) -> Array:
        _refuse_pairs(batch)
        all_params = assemble_params(params, frozen)
        return _hidden_states(decoder, all_params, batch) @ decoder.head(all_params)

    def link(outputs: Array, frozen: Frozen, batch: Batch) -> Array:
        per_token = negative_log_likelihood(outputs, _valid_targets(batch))
        return reduce_losses(sum_per_sequence(weigh_tokens(per_token, batch), batch), batch, reduction)

    return CompositeLoss(hidden, affine_link) if frozen_head else CompositeLoss(logits, link)


def assemble_params(params: Params, frozen: Frozen) -> Params:
    """The whole parameter tree.

    Args:
        params: all parameters, or adapters.
        frozen: the base that adapters are joined to; None where all parameters are trained.

    Returns:
        `params` themselves, or the base with the adapters.
    """
    return params if frozen is None else join_adapters(frozen, params)


def token_losses(decoder: Decoder, chunk: int) -> Callable[[Params, Batch], Float[Array, "rows len"]]:
    """-log p of the target at every place, nats; of token 0 where no example counts the place.

    Args:
        decoder: the model, from `make_decoder`.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[rows, len].
    """

    def tokens(params: Params, batch: Batch) -> Array:
        return _map_chunks(
            negative_log_likelihood, _hidden_states(decoder, params, batch), decoder.head(params), batch, chunk
        )

    return tokens


def _hidden_states(decoder: Decoder, params: Params, batch: Batch) -> Array:
    arrays = [batch[name] for name in ("tokens", "targets", "positions", "segments", "slot")]
    chex.assert_rank(arrays, 2)
    chex.assert_equal_shape(arrays)  # or one row of positions would broadcast over all, and the numbers be wrong
    return decoder.hidden(params, batch["tokens"], batch["positions"], batch["segments"])


def _map_chunks(
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

    def split_length(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, pieces, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def measure_chunk(piece: tuple[Array, Array]) -> Array:
        return measure(piece[0] @ head.astype(piece[0].dtype), piece[1])

    out = jax.lax.map(measure_chunk, (split_length(hidden), split_length(_valid_targets(batch))))
    return jnp.moveaxis(out, 0, 1).reshape(rows, pieces * size)[:, :length]


def _is_likeliest(logits: Float[Array, "rows len vocab"], targets: Array) -> Float[Array, "rows len"]:
    return (jnp.argmax(logits, axis=-1) == targets).astype(logits.dtype)


def negative_log_likelihood(logits: Float[Array, "rows len vocab"], targets: Array) -> Float[Array, "rows len"]:
    """-log softmax(logits) at the targets, nats; float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _valid_targets(batch: Batch) -> Array:
    # a place that no example counts may hold anything (-100), and must not be NaN: NaN * 0 is NaN in a gradient
    return jnp.where(batch["slot"] < batch["supervised"].shape[0], batch["targets"], 0)


def weigh_tokens(token_losses: Float[Array, "rows len"], batch: Batch) -> Float[Array, "rows len"]:
    """The losses times the weights of their tokens, where the batch has any."""
    return token_losses * batch["token_weights"] if "token_weights" in batch else token_losses


def sum_per_sequence(token_losses: Float[Array, "rows len"], batch: Batch) -> Float[Array, "slots"]:
    """Sums over the tokens of each sequence. By masks, not by a scatter: one order, so the same bits, on every run."""
    slots = jnp.arange(batch["supervised"].shape[0])[:, None, None]
    return jnp.sum(jnp.where(batch["slot"][None] == slots, token_losses[None], 0), axis=(1, 2))


def reduce_losses(sums: Float[Array, "examples"], batch: Batch, reduction: LossReduction) -> Float[Array, "examples"]:
    """Sums over the tokens of examples, reduced as `sft_losses` says.

    Args:
        sums: nats, one for each example.
        batch: one micro-batch, whose counts divide the sums.
        reduction: `example_mean`, `token_sum` or `token_mean`.

    Returns:
        One loss for each example.
    """
    if reduction == "example_mean":
        return sums / batch["supervised"]
    if reduction == "token_mean":
        return sums * batch["num_examples"] / batch["targeted"]
    return sums


def _refuse_pairs(batch: Batch) -> None:
    examples, slots = batch["index"].shape[0], batch["supervised"].shape[0]
    if slots != examples:
        raise ValueError(
            f"a batch of {examples} examples with {slots} sequences: these are preference pairs, and this loss takes "
            "one sequence for each example. Take `dpo_losses` or `simpo_losses`, or tokenize the chosen alone."
        )


def _check_options(chunk: int, reduction: Any) -> None:
    if chunk < 1:
        raise ValueError(f"chunk {chunk}; a chunk is at least one token.")
    if reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it is one of {list(LOSS_REDUCTIONS)}.")
