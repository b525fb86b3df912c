"""Building blocks of decoder layers, with linear maps, norms and attention."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

MatrixInit = Callable[[int, int], Array]
"""(in, out) -> a fresh matrix, float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """The factors of one projection in all layers: W + scale A B. A pytree whose leaves are `a` and `b`."""

    a: Float[Array, "layers in rank"]
    b: Float[Array, "layers rank out"]
    scale: float = field(metadata={"static": True})
    """alpha / rank. Static: no optimizer, decay or derivative can reach it."""


class PastKeyValues(NamedTuple):
    """Earlier tokens that the queries of a block also attend to."""

    keys: Float[Array, "rows kv_heads dim slots"]
    values: Float[Array, "rows kv_heads slots dim"]
    mask: Bool[Array, "rows len slots"]


KeyValues = tuple[Float[Array, "rows kv_heads dim len"], Float[Array, "rows kv_heads len dim"]]
"""The keys and values of a block of tokens, in the order in which attention takes them."""


class LayerContext(NamedTuple):
    """What a layer reads besides its input x: float[tokens, width], tokens = rows * len."""

    rotation: tuple[Array, ...]
    """cos, sin: [rows, len, rotated / 2]; empty where positions are learned."""
    mask: Bool[Array, "rows len len"]
    adapters: dict[str, Adapter]
    compute_dtype: Any
    """The dtype of the factors of the products; None: no cast."""
    past: tuple[PastKeyValues, ...] = ()
    """Earlier tokens than the block's."""


class Linear(nnx.Module):
    """x W + b, plus scale (x A) B where an adapter is given: W + AB is never formed."""

    def __init__(self, in_features: int, out_features: int, bias: bool, draw: MatrixInit):
        self.kernel = nnx.Param(draw(in_features, out_features))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if bias else None

    def __call__(self, x: Array, adapter: Adapter | None, compute_dtype: Any) -> Array:
        """float[tokens, in] -> float[tokens, out], in the dtype of x."""
        y = _matmul(x, self.kernel[...], compute_dtype)
        if adapter is not None:
            y = y + adapter.scale * _matmul(_matmul(x, adapter.a, compute_dtype), adapter.b, compute_dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, :]


def apply_projection(layer: nnx.Module, name: str, x: Array, context: LayerContext) -> Array:
    """x through the `Linear` of that name, with its adapter if there is one."""
    return getattr(layer, name)(x, context.adapters.get(name), context.compute_dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axis; a fresh norm multiplies by 1."""

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(width, 1.0 - offset, jnp.float32))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Array) -> Array:
        """Any leading axes."""
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(x.dtype)
        scale = scale + self.offset if self.offset else scale
        return normal * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        """In the dtype of x."""
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return normal * self.scale[...].astype(x.dtype)[None, :] + self.bias[...].astype(x.dtype)[None, :]


def attention(
    q: Float[Array, "rows len heads dim"],
    k: Float[Array, "rows len kv_heads dim"],
    v: Float[Array, "rows len kv_heads dim"],
    context: LayerContext,
    query_scalar: float | None = None,
) -> tuple[Float[Array, "rows len heads dim"], KeyValues]:
    """softmax(q kᵀ / √scalar) v where the mask allows, with heads / kv_heads queries to one key; scalar None: dim.

    Over the block's own tokens and, in the same softmax, those of `context.past`. Also the block's keys and values, for
    a cache. Plain products, and not a fused kernel, on purpose: it has a jvp, and a Hessian product in the dtype of its
    arguments. Every query must see some key.
    """
    rows, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # batch axes first, a group's queries in one matrix: on CPU a third faster than an einsum in the given layout
    q = (q * (query_scalar or dim) ** -0.5).reshape(rows, length, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * length, dim)

    def scores(keys, mask):
        out = _matmul(q, keys, context.compute_dtype).reshape(rows, kv_heads, group, length, keys.shape[-1])
        return jnp.where(mask[:, None, None], out, jnp.finfo(out.dtype).min / 2)  # finite: no inf - inf in a jvp

    def mix_values(shares, values):
        shares = shares.reshape(rows, kv_heads, group * length, values.shape[2])
        return _matmul(shares, values, context.compute_dtype).reshape(rows, kv_heads, group, length, dim)

    key_values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    if not context.past:
        out = mix_values(jax.nn.softmax(scores(key_values[0], context.mask), axis=-1), key_values[1])
    else:
        parts = (*context.past, PastKeyValues(*key_values, context.mask))
        shares = jax.nn.softmax(jnp.concatenate([scores(part.keys, part.mask) for part in parts], axis=-1), axis=-1)
        ends = itertools.accumulate(part.mask.shape[-1] for part in parts[:-1])
        pieces = jnp.split(shares, list(ends), axis=-1)
        out = sum(mix_values(piece, part.values) for piece, part in zip(pieces, parts, strict=True))
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim), key_values


def apply_rope(x: Float[Array, "rows len heads dim"], cos: Array, sin: Array) -> Float[Array, "rows len heads dim"]:
    """Rotate coordinate j against j + rotated / 2 by the angle of its position; the coordinates after them stay.

    cos, sin are [rows, len, rotated / 2].
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    low, high, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


def _matmul(x: Array, kernel: Array, compute_dtype: Any) -> Array:
    if compute_dtype is None:
        return x @ kernel.astype(x.dtype)
    return jnp.matmul(x.astype(compute_dtype), kernel.astype(compute_dtype), preferred_element_type=x.dtype)
