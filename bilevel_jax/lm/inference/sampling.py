"""Temperature, top-k and top-p sampling of the next token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class SamplingParams(NamedTuple):
    """How a response is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0: greedy, the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability; 1: all."""
    max_new_tokens: int = 256
    """Tokens of a response at most, the end token included."""
    seed: int = 0


def log_probabilities(logits: Float[Array, "rows vocab"], sampling: SamplingParams) -> Float[Array, "rows vocab"]:
    """log p of the next token under the sampler, nats; -inf for tokens that it never draws.

    log softmax of logits / temperature, over the `top_k` greatest, and of these over the fewest that together have
    probability `top_p` or more, in that order (as transformers: the probabilities of top-p are those that top-k
    leaves). Tokens as probable as the last one that stays stay, too. Temperature 0: 0 for the greatest logit, the first
    of equal ones. NaN where a row's logits are not all finite.

    Args:
        logits: of the next token.
        sampling: temperature, top_k and top_p are read.

    Returns:
        Nats.

    Example:
        >>> log_probabilities(jnp.array([[0.0, 2.0, 1.0]]), SamplingParams(temperature=0))
        Array([[-inf,   0., -inf]], dtype=float32)
    """
    finite = jnp.isfinite(logits).all(-1, keepdims=True)
    if sampling.temperature == 0:
        greatest = jnp.argmax(logits, -1)[:, None] == jnp.arange(logits.shape[-1])[None]
        log_p = jnp.where(greatest, 0.0, -jnp.inf).astype(logits.dtype)
    else:
        logits = logits / sampling.temperature
        if 0 < sampling.top_k < logits.shape[-1]:
            logits = jnp.where(_top_mass(logits, jnp.ones_like(logits), sampling.top_k), logits, -jnp.inf)
        log_p = jax.nn.log_softmax(logits, -1)
        if sampling.top_p < 1:
            log_p = jnp.where(_top_mass(log_p, jnp.exp(log_p), sampling.top_p), log_p, -jnp.inf)
            log_p = jax.nn.log_softmax(log_p, -1)
    return jnp.where(finite, log_p, jnp.nan)


def make_draw_keys(seed: int, words: Int[Array, "rows 2"], draws: Int[Array, "rows"]) -> PRNGKeyArray:
    """One key to a draw of a prompt."""
    root = jax.random.key(seed)

    def draw_key(words: Array, draw: Array) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(root, words[0]), words[1]), draw)

    return jax.vmap(draw_key)(words, draws)


def sample_tokens(
    log_p: Float[Array, "rows vocab"], keys: PRNGKeyArray, steps: Int[Array, "rows"]
) -> Int[Array, "rows"]:
    """Token number `steps` of each row: which of about √vocab groups of tokens, then which token of the group.

    Each by argmax(log p + Gumbel noise), which rounding moves least; a uniform number on the cumulative sum would fall
    into another token wherever one of the vocab edges moves. In two stages, since noise for every token costs more than
    a step of a small model.
    """
    rows, vocab = log_p.shape
    width = math.isqrt(vocab - 1) + 1
    groups = jnp.pad(log_p, [(0, 0), (0, width * width - vocab)], constant_values=-jnp.inf).reshape(rows, width, width)

    def noise(key: PRNGKeyArray, step: Array) -> Array:
        # float32 whatever the model, so that a float64 model draws the same; high: no cut at 2^-23
        return jax.random.gumbel(jax.random.fold_in(key, step), (2, width), jnp.float32, mode="high")

    first, second = jnp.moveaxis(jax.vmap(noise)(keys, steps).astype(log_p.dtype), 1, 0)
    group = jnp.argmax(jax.nn.logsumexp(groups, -1) + first, -1)
    within = jnp.take_along_axis(groups, group[:, None, None], 1)[:, 0]
    return group * width + jnp.argmax(within + second, -1)


def _top_mass(values: Float[Array, "rows vocab"], masses: Array, min_mass: float) -> Bool[Array, "rows vocab"]:
    """The greatest values of each row, the fewest whose masses sum to `min_mass`, with those equal to the last of them.

    The edge is found bit by bit, in unsigned integers that are ordered as the values are: sorting a vocabulary of
    32,000 takes 20 times as long on a CPU.
    """
    word = {4: jnp.uint32, 8: jnp.uint64}[values.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(values + 0.0, word)  # -0 is 0
    top = jnp.asarray(1, word) << jnp.asarray(8 * values.dtype.itemsize - 1, word)
    order = jnp.where(bits >= top, ~bits, bits | top)

    def refine_bit(number: Array, edge: Array) -> Array:
        higher = edge | (top >> number.astype(word))
        enough = jnp.sum(jnp.where(order >= higher, masses, 0), -1, keepdims=True) >= min_mass
        return jnp.where(enough, higher, edge)

    edge = jax.lax.fori_loop(0, 8 * values.dtype.itemsize, refine_bit, jnp.zeros((len(values), 1), word))
    return order >= edge
