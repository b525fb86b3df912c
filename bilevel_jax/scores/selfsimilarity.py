"""How like the model's own answer a response is, in the model's hidden states."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.core.types import Batch, Params
from bilevel_jax.lm.models.decoder import Decoder

Ids = tuple[int, ...]
Similarity = Callable[[Params, Sequence[Ids], Sequence[Ids]], Float[np.ndarray, "pairs"]]
"""(params, responses, as many other responses) -> a(y, y') of each pair."""


def similarity(
    decoder: Decoder,
    bos: int | None,
    *,
    tokens: int = 4096,
    multiple: int = 1,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    progress: Callable[[int], None] = lambda done: None,
) -> Similarity:
    """a(y, y') = the mean, over the hidden states h of all layers, of cos(mean_t h(y)_t, mean_t h(y')_t), at most 1.

    D = 1 - E a(y, y') with y' drawn from the model is the distance of the alignment score of arXiv 2502.11779 v1 (not
    the `alignment` of gradients): with a = "is the same text" E a would be p(y|x), hence its kinship to perplexity.
    Each response is read alone, after `bos` and without its question; the states are those of `Decoder.states`,
    embeddings included. The means leave `bos` out: its state is many times longer than others in most models, and
    would make all texts alike. `tokens`, `multiple` and `place` are those of `loglik.engine`; `progress` is told how
    many distinct responses each batch had. Raises ValueError for an empty response and one beyond the model's context.
    Wrong where length or language alone decides: any two texts of a kind have cosines near 1.
    """
    head = () if bos is None else (bos,)

    @jax.jit
    def read(params: Params, batch: Batch) -> jax.Array:
        counted = batch["counted"][0]

        def mean(x: jax.Array) -> jax.Array:
            # not times `counted`: a padded place beyond the last learned position is nan
            total = jnp.where(counted[..., None], x, 0).sum(1)
            return total / jnp.maximum(counted.sum(1), 1)[:, None]

        return decoder.reduce_hidden_states(params, batch["tokens"][0], batch["positions"][0], batch["segments"][0], mean)

    def vectors(params: Params, texts: Sequence[Ids]) -> Float[np.ndarray, "texts states width"]:
        out = np.zeros((len(texts), decoder.config.layers + 1, decoder.config.width))
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
        while order:
            longest = len(head) + len(texts[order[0]])
            length = min(1 << max(5, (longest - 1).bit_length()), decoder.config.max_length)  # few shapes
            rows = max(1, tokens // length // multiple) * multiple
            some, order = order[:rows], order[rows:]
            states = read(params, place(_batch([texts[i] for i in some], head, rows, length)))
            out[some] = np.moveaxis(np.asarray(states, float), 0, 1)[: len(some)]
            progress(len(some))
        return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-30)

    def pairs(params: Params, responses: Sequence[Ids], others: Sequence[Ids]) -> Float[np.ndarray, "pairs"]:
        distinct = sorted({*responses, *others})
        _check(distinct, decoder.config.max_length - len(head))
        at = {text: i for i, text in enumerate(distinct)}
        found = vectors(params, distinct)
        one, other = (found[[at[text] for text in some]] for some in (responses, others))
        return (one * other).sum(-1).mean(-1)

    return pairs


def _batch(texts: Sequence[Ids], head: Ids, rows: int, length: int) -> Batch:
    out = {name: np.zeros((1, rows, length), np.int32) for name in ("tokens", "segments", "counted")}
    for row, text in enumerate(texts):
        stop = len(head) + len(text)
        out["tokens"][0, row, :stop] = head + text
        out["segments"][0, row, :stop] = 1
        out["counted"][0, row, len(head) : stop] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (1, rows, length))
    return out | {"positions": np.array(positions), "counted": out["counted"].astype(bool)}


def _check(texts: Sequence[Ids], most: int) -> None:
    lengths = [len(text) for text in texts]
    if texts and not min(lengths):
        raise ValueError("a response has no token; give responses with text.")
    if texts and max(lengths) > most:
        raise ValueError(f"a response has {max(lengths)} tokens, and the model's context holds {most}. Shorten it.")
