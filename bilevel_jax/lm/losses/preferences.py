"""Per-example preference losses (DPO and SimPO).

A batch is one micro-batch as in `sft`, with two sequences for each example: slot 2e holds the chosen response y_w
of example e and slot 2e + 1 the rejected one y_l. An empty example is exactly 0 in every loss.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core.types import PADDING, Batch, CompositeLoss, Params
from bilevel_jax.lm.losses.sft import assemble_params, sequence_log_likelihoods
from bilevel_jax.lm.models.decoder import Decoder

PreferenceMethod = Literal["dpo", "simpo"]
MarginFn = Callable[[Params, Batch], Float[Array, "examples"]]
LinkFn = Callable[[Float[Array, "examples"], Batch], Float[Array, "examples"]]


def dpo_losses(
    decoder: Decoder, *, beta: float, label_smoothing: float = 0.0, chunk: int = 1024
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The DPO loss of each pair, nats (Rafailov et al., arXiv 2305.18290).

        -(1 - ε) log σ(z) - ε log σ(-z),   z = β [(log π(y_w) - log π(y_l)) - (log π_ref(y_w) - log π_ref(y_l))]

    Log-likelihoods are sums over the tokens of the response, given the prompt; those of the reference model come with
    the batch as one number, `reference`. Wrong when the reference was computed by another model, template or max_length
    than the one that training starts from.

    Args:
        decoder: the model, from `make_decoder`.
        beta: β, above 0.
        label_smoothing: ε in [0, 0.5), the share of pairs that are assumed to be the wrong way round (conservative DPO,
            Mitchell 2023).
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: beta or label_smoothing out of range; when called, a batch without `reference` or without pairs.

    Example:
        >>> import jax, numpy as np
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import batches, tokens
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> mask = np.array([False, False, True, True])
        >>> sides = [tokens.TokenizedSequence(np.array([1, 5, last, 2]), mask) for last in (6, 7)]
        >>> corpus = tokens.corpus_from_sequences(sides, sequences_per_example=2)
        >>> corpus = corpus.with_reference_margins(np.zeros(1))
        >>> shape = batches.fit_evaluation_batch_shape(corpus, 1, num_micro_batches=1, length=8, packing=False)
        >>> stream = batches.make_evaluation_stream(corpus, shape)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(0))  # the only micro-batch
        >>> jax.jit(dpo_losses(decoder, beta=0.1))(params, batch).shape
        (1,)
    """
    return _compose(preference_margins(decoder, chunk=chunk), _dpo_link(beta, label_smoothing))


def dpo_composite_loss(
    decoder: Decoder, *, beta: float, label_smoothing: float = 0.0, chunk: int = 1024
) -> CompositeLoss:
    """The losses of `dpo_losses` as link(outputs), for Gauss-Newton.

    The outputs are the margins log π(y_w) - log π(y_l), one for each pair; link'' = β² σ(z) σ(-z) > 0.

    Args:
        decoder: the model, from `make_decoder`.
        beta: β, above 0.
        label_smoothing: ε in [0, 0.5).
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        Outputs and link; both take the frozen parameters, to which `assemble_params` joins the trained ones.

    Raises:
        ValueError: beta or label_smoothing out of range.
    """
    return _make_composite_loss(preference_margins(decoder, chunk=chunk), _dpo_link(beta, label_smoothing))


def simpo_losses(
    decoder: Decoder, *, beta: float, gamma_ratio: float, chunk: int = 1024
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """The SimPO loss of each pair, nats (Meng, Xia & Chen, arXiv 2405.14734); no reference model.

        -log σ(β log π(y_w)/|y_w| - β log π(y_l)/|y_l| - γ)

    Wrong to compare with DPO at the same β: here it multiplies nats per token, there nats per response.

    Args:
        decoder: the model, from `make_decoder`.
        beta: β, above 0.
        gamma_ratio: γ/β, nats per token, at least 0.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: beta or gamma_ratio out of range; when called, a batch without pairs.

    Example:
        >>> import jax, numpy as np
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import batches, tokens
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> mask = np.array([False, False, True, True])
        >>> sides = [tokens.TokenizedSequence(np.array([1, 5, last, 2]), mask) for last in (6, 7)]
        >>> corpus = tokens.corpus_from_sequences(sides, sequences_per_example=2)
        >>> corpus = corpus.with_reference_margins(np.zeros(1))
        >>> shape = batches.fit_evaluation_batch_shape(corpus, 1, num_micro_batches=1, length=8, packing=False)
        >>> stream = batches.make_evaluation_stream(corpus, shape)
        >>> batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(0))  # the only micro-batch
        >>> jax.jit(simpo_losses(decoder, beta=2.0, gamma_ratio=0.5))(params, batch).shape
        (1,)
    """
    return _compose(preference_margins(decoder, per_token=True, chunk=chunk), _simpo_link(beta, gamma_ratio))


def simpo_composite_loss(decoder: Decoder, *, beta: float, gamma_ratio: float, chunk: int = 1024) -> CompositeLoss:
    """The losses of `simpo_losses` as link(outputs), for Gauss-Newton.

    The outputs are the margins log π(y_w)/|y_w| - log π(y_l)/|y_l|; link'' = β² σ(z) σ(-z) > 0.

    Args:
        decoder: the model, from `make_decoder`.
        beta: β, above 0.
        gamma_ratio: γ/β, nats per token, at least 0.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        Outputs and link; both take the frozen parameters, to which `assemble_params` joins the trained ones.

    Raises:
        ValueError: beta or gamma_ratio out of range.
    """
    return _make_composite_loss(
        preference_margins(decoder, per_token=True, chunk=chunk), _simpo_link(beta, gamma_ratio)
    )


def preference_margins(decoder: Decoder, *, per_token: bool = False, chunk: int = 1024) -> MarginFn:
    """log π(y_w) - log π(y_l) of each pair, nats. Under the reference model this is `Corpus.reference_margins`.

    Args:
        decoder: the model, from `make_decoder`.
        per_token: each log-likelihood is divided by its number of tokens.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: when called, a batch without pairs.
    """
    likelihoods = sequence_log_likelihoods(decoder, chunk=chunk)

    def differences(params: Params, batch: Batch) -> Array:
        _refuse_single(batch)
        values = likelihoods(params, batch)
        values = (values / batch["supervised"] if per_token else values).reshape(-1, 2)
        return values[:, 0] - values[:, 1]

    return differences


def pair_accuracy(
    decoder: Decoder, method: PreferenceMethod, *, chunk: int = 1024
) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    """1 for each pair that the model orders rightly, 0 if wrongly, 1/2 for a tie or an empty slot.

    By what the method's loss looks at: dpo the margin beyond the reference model's, simpo the margin per token (without
    the γ that training demands on top).

    Args:
        decoder: the model, from `make_decoder`.
        method: `dpo` or `simpo`.
        chunk: tokens whose logits are in memory at the same time.

    Returns:
        (params, batch) -> float[examples].

    Raises:
        ValueError: an unknown method; when called, a batch without pairs.
    """
    if method not in ("dpo", "simpo"):
        raise ValueError(f"method is {method!r}; it is one of ['dpo', 'simpo'].")
    differences = preference_margins(decoder, per_token=method == "simpo", chunk=chunk)

    def is_ordered(params: Params, batch: Batch) -> Array:
        margin_gain = differences(params, batch) - (_reference_margins(batch) if method == "dpo" else 0)
        return (jnp.sign(margin_gain) + 1) / 2

    return is_ordered


def _compose(outputs: MarginFn, link: LinkFn) -> Callable[[Params, Batch], Float[Array, "examples"]]:
    return lambda params, batch: link(outputs(params, batch), batch)


def _make_composite_loss(outputs: MarginFn, link: LinkFn) -> CompositeLoss:
    return CompositeLoss(
        lambda params, fixed, batch: outputs(assemble_params(params, fixed), batch),
        lambda values, fixed, batch: link(values, batch),
    )


def _dpo_link(beta: float, smoothing: float) -> LinkFn:
    _check_beta(beta)
    if not 0 <= smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {smoothing}; it is at least 0 and below 0.5, where both orders are equal."
        )

    def link(values: Array, batch: Batch) -> Array:
        z = beta * (values - _reference_margins(batch))
        return _zero_padding(-(1 - smoothing) * _log_sigmoid(z) - smoothing * _log_sigmoid(-z), batch)

    return link


def _simpo_link(beta: float, gamma_ratio: float) -> LinkFn:
    _check_beta(beta)
    if not (math.isfinite(gamma_ratio) and gamma_ratio >= 0):
        raise ValueError(f"gamma_ratio is {gamma_ratio}; it is a finite number of at least 0.")
    return lambda values, batch: _zero_padding(-_log_sigmoid(beta * (values - gamma_ratio)), batch)


@jax.custom_jvp
def _log_sigmoid(z: Array) -> Array:
    return jax.nn.log_sigmoid(z)


@jax.custom_jvp
def _sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z)


# jax differentiates these to σ (1 - σ), in which all digits cancel where σ is near 1: .3 % off in float32 at z = 9
@_log_sigmoid.defjvp
def _(primals, tangents):
    return _log_sigmoid(*primals), _sigmoid(-primals[0]) * tangents[0]


@_sigmoid.defjvp
def _(primals, tangents):
    return _sigmoid(*primals), _sigmoid(*primals) * _sigmoid(-primals[0]) * tangents[0]


def _zero_padding(values: Float[Array, "examples"], batch: Batch) -> Float[Array, "examples"]:
    return jnp.where(batch["index"] != PADDING, values, 0)


def _reference_margins(batch: Batch) -> Float[Array, "examples"]:
    if "reference" not in batch:
        raise ValueError(
            "DPO compares with a reference model, and the batch has no `reference`. Compute `preference_margins` under "
            "the reference model for every example and put them into the corpus by `with_reference_margins`."
        )
    return batch["reference"]


def _refuse_single(batch: Batch) -> None:
    examples, slots = batch["index"].shape[0], batch["supervised"].shape[0]
    if slots != 2 * examples:
        raise ValueError(
            f"a batch of {examples} examples with {slots} sequences; this loss compares two sequences of each example. "
            "Give preference pairs, with a rejected response in every example, or take `sft_losses`."
        )


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}; it is a finite number above 0.")
