"""Similarity of two responses in the model's hidden states."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.core.types import Batch, Fetch, Params
from bilevel_jax.lm.models.decoder import Decoder

TokenIds = tuple[int, ...]
ResponseSimilarity = Callable[[Params, Sequence[TokenIds], Sequence[TokenIds]], Float[np.ndarray, "pairs"]]
"""(params, responses, as many other responses) -> a(y, y') of each pair."""


def response_similarity(
    decoder: Decoder,
    bos: int | None,
    *,
    max_batch_tokens: int = 4096,
    batch_size_multiple: int = 1,
    place_batch: Callable[[Batch], Batch] = lambda batch: batch,
    fetch: Fetch = np.asarray,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ResponseSimilarity:
    """a(y, y') = the mean, over the hidden states h of all layers, of cos(mean_t h(y)_t, mean_t h(y')_t), at most 1.

    D = 1 - E a(y, y') with y' drawn from the model is the distance of the alignment score of arXiv 2502.11779 v1 (not
    the `alignment` of gradients): with a = "is the same text" E a would be p(y|x), hence its kinship to perplexity.
    Each response is read alone, after `bos` and without its question; the states are those of
    `Decoder.reduce_hidden_states`, embeddings included. The means leave `bos` out: its state is many times longer than
    others in most models, and would make all texts alike. Wrong where length or language alone decides: any two texts
    of a kind have cosines near 1.

    Args:
        decoder: the model, from `make_decoder`.
        bos: the BOS token of the model; None where it has none.
        max_batch_tokens: tokens of a batch, padding included: this bounds the memory.
        batch_size_multiple: the rows of every batch are a multiple of it: the number of devices.
        place_batch: puts a batch, leaves [1, rows, len], on the devices.
        fetch: gets all of an array from them.
        on_progress: called with the number of distinct responses of each batch.

    Returns:
        (params, responses, others) -> float[pairs]. It raises ValueError for an empty response and one beyond the
        model's context.

    Example:
        >>> from bilevel_jax.lm import models
        >>> from bilevel_jax.lm.builtin import cipher
        >>> config = models.read_config(cipher.make_cipher_config())
        >>> similarity = response_similarity(models.make_decoder(config), config.bos)
        >>> params = models.init_params(config, jax.random.key(0))
        >>> similarity(params, [(5, 6)], [(5, 6)]).round(3)
        array([1.])
    """
    head = () if bos is None else (bos,)

    @jax.jit
    def mean_states(params: Params, batch: Batch) -> jax.Array:
        counted = batch["counted"][0]

        def mean(x: jax.Array) -> jax.Array:
            # not times `counted`: a padded place beyond the last learned position is nan
            total = jnp.where(counted[..., None], x, 0).sum(1)
            return total / jnp.maximum(counted.sum(1), 1)[:, None]

        return decoder.reduce_hidden_states(
            params, batch["tokens"][0], batch["positions"][0], batch["segments"][0], mean
        )

    def vectors(params: Params, texts: Sequence[TokenIds]) -> Float[np.ndarray, "texts states width"]:
        out = np.zeros((len(texts), decoder.config.layers + 1, decoder.config.width))
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
        while order:
            longest = len(head) + len(texts[order[0]])
            length = min(1 << max(5, (longest - 1).bit_length()), decoder.config.max_length)  # few shapes
            rows = max(1, max_batch_tokens // length // batch_size_multiple) * batch_size_multiple
            batch_indices, order = order[:rows], order[rows:]
            states = mean_states(
                params, place_batch(_make_batch([texts[i] for i in batch_indices], head, rows, length))
            )
            out[batch_indices] = np.moveaxis(fetch(states).astype(float), 0, 1)[: len(batch_indices)]
            on_progress(len(batch_indices))
        return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-30)

    def pairs(params: Params, responses: Sequence[TokenIds], others: Sequence[TokenIds]) -> Float[np.ndarray, "pairs"]:
        distinct = sorted({*responses, *others})
        _check_lengths(distinct, decoder.config.max_length - len(head))
        at = {text: i for i, text in enumerate(distinct)}
        unit_vectors = vectors(params, distinct)
        response_vectors, other_vectors = (unit_vectors[[at[text] for text in texts]] for texts in (responses, others))
        return (response_vectors * other_vectors).sum(-1).mean(-1)

    return pairs


def _make_batch(texts: Sequence[TokenIds], head: TokenIds, batch_size: int, length: int) -> Batch:
    out = {name: np.zeros((1, batch_size, length), np.int32) for name in ("tokens", "segments", "counted")}
    for row, text in enumerate(texts):
        stop = len(head) + len(text)
        out["tokens"][0, row, :stop] = head + text
        out["segments"][0, row, :stop] = 1
        out["counted"][0, row, len(head) : stop] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (1, batch_size, length))
    return out | {"positions": np.array(positions), "counted": out["counted"].astype(bool)}


def _check_lengths(texts: Sequence[TokenIds], max_tokens: int) -> None:
    lengths = [len(text) for text in texts]
    if texts and not min(lengths):
        raise ValueError("a response has no token; give responses with text.")
    if texts and max(lengths) > max_tokens:
        raise ValueError(
            f"a response has {max(lengths)} tokens, and the model's context holds {max_tokens}. Shorten it."
        )
