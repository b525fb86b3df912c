"""The key-value cache of attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bilevel_jax.lm.models.blocks import PastKeyValues
from bilevel_jax.lm.models.config import DecoderConfig

EMPTY_POSITION = -1
"""The position of a slot, or of a place of a block, that holds no token."""


class KVCache(NamedTuple):
    """Tokens that were read, one sequence in each row; empty slots may lie anywhere.

    Both arrays are in the order in which the products of attention take them, so that no token is moved again.
    """

    keys: Float[Array, "layers rows kv_heads dim slots"]
    """After the rotation: a token keeps the position that it was read at."""
    values: Float[Array, "layers rows kv_heads slots dim"]
    positions: Int[Array, "rows slots"]
    """Of each token in its sequence; `EMPTY_POSITION` where there is none."""
    source_row: Int[Array, "batch"] | None = None
    """The row of this cache that each row of a batch continues, so that many rows share one; None: its own."""


def init_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> KVCache:
    """A cache without tokens, to be filled by `write`; `dtype` is that of a block's keys."""
    shape = (config.layers, rows, config.kv_heads)
    keys, values = (
        jnp.zeros((*shape, config.head_dim, slots), dtype),
        jnp.zeros((*shape, slots, config.head_dim), dtype),
    )
    return KVCache(keys, values, jnp.full((rows, slots), EMPTY_POSITION, jnp.int32))


def write_cache(cache: KVCache, block: KVCache, at: Int[Array, ""] | int) -> KVCache:
    """The cache with a block in slots at, at + 1, ... of every row. In place where the cache is a loop's or donated.

    A block that would reach beyond the last slot overwrites earlier ones instead: allocate as many as will be written.
    """
    update_slice = jax.lax.dynamic_update_slice_in_dim
    return cache._replace(
        keys=update_slice(cache.keys, block.keys.astype(cache.keys.dtype), at, 4),
        values=update_slice(cache.values, block.values.astype(cache.values.dtype), at, 3),
        positions=update_slice(cache.positions, block.positions.astype(cache.positions.dtype), at, 1),
    )


def read_layer_cache(cache: KVCache, keys: Array, values: Array, mask: Bool[Array, "batch len slots"]) -> PastKeyValues:
    """What one layer's attention reads of a cache: that layer's keys and values, a row for each row of the batch.

    Shared rows are copied here, one layer at a time: the whole cache is never there once for each row.
    """
    return (
        PastKeyValues(keys, values, mask)
        if cache.source_row is None
        else PastKeyValues(keys[cache.source_row], values[cache.source_row], mask)
    )


def make_cache_mask(
    positions: Int[Array, "rows len"], slot_positions: Int[Array, "rows slots"], window: Int[Array, ""] | None
) -> Bool[Array, "rows len slots"]:
    """mask[row, i, s]: token i sees slot s: it holds a token, not a later one, and one within the window (0: all)."""
    distance = positions[:, :, None] - slot_positions[:, None, :]
    mask = (slot_positions[:, None, :] != EMPTY_POSITION) & (distance >= 0)
    return mask if window is None else mask & ((distance < window) | (window == 0))
