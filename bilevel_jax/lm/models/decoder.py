"""The decoder as two pure functions of a plain parameter tree; Flax NNX modules inside, layers stacked and scanned."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bilevel_jax.lm.models.config import PROJECTIONS, DecoderConfig, frequencies, projection_shape
from bilevel_jax.lm.models.lora import Adapter

Params = dict[str, Any]
"""`embed` [vocab, width]; `layers`: name -> {kernel [layers, in, out], bias} or {scale}; `norm`; `head` if untied;
`lora` if joined with adapters."""


class Decoder(NamedTuple):
    """A decoder-only language model. logits = hidden(params, ...) @ head(params)."""

    config: DecoderConfig
    hidden: Callable[[Params, Array, Array, Array], Array]
    """(params, tokens, positions, segments), all int32[rows, len] -> float[rows, len, width], after the final norm."""
    head: Callable[[Params], Array]
    """params -> float[width, vocab]."""


def decoder(config: DecoderConfig, *, remat: bool = True, compute: Any = None) -> Decoder:
    """The functions of a decoder.

    Attention is causal and inside equal nonzero segments, so packed rows give what separate rows give; a padding
    token (segment 0) sees itself only, so nothing is 0/0. Arithmetic is in the widest dtype of the parameters and
    float32: a base stored in bfloat16 is upcast one layer at a time. `remat` recomputes each layer in the backward
    pass: the memory of one layer for a third more arithmetic (on CPU no slower: less memory traffic). `compute`
    (jnp.bfloat16) is the dtype of the factors of the matrix products, accumulated in float32; None: no cast. It is for
    forward passes: a backward pass gains little, and hypergradients in bfloat16 can be noise.
    """
    layer_graph, norm_graph = _graphs(config)
    rotary = frequencies(config)

    def hidden(params: Params, tokens: Array, positions: Array, segments: Array) -> Array:
        rows, length = tokens.shape
        dtype = _dtype(params)
        angles = positions[..., None].astype(dtype) * jnp.asarray(rotary, dtype)[None, None, :]
        rotation = jnp.cos(angles), jnp.sin(angles)
        mask = visible(segments)
        windows = _windows(config, length)

        def layer(x, xs):
            weights, adapters, window = xs
            seen = mask if window is None else mask & near(length, window)[None]
            return nnx.merge(layer_graph, weights)(x, rotation, seen, adapters, compute), None

        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer  # scan keeps XLA from undoing it
        x = params["embed"][tokens.reshape(-1)].astype(dtype)  # tokens flat: 2-D products are faster on CPU
        x, _ = jax.lax.scan(body, x, (params["layers"], params.get("lora", {}), windows))
        return nnx.merge(norm_graph, params["norm"])(x).reshape(rows, length, config.width)

    def head(params: Params) -> Array:
        kernel = params["embed"].T if config.tied else params["head"]
        return kernel.astype(_dtype(params))

    return Decoder(config, hidden, head)


@partial(jax.jit, static_argnames=("config", "dtype"))  # eagerly, it would compile every operation by itself
def init(config: DecoderConfig, key: PRNGKeyArray, *, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters: matrices ~ N(0, init_scale²), norms 1, biases 0.

    Drawn in float32 and cast, so that a float32 and a float64 model are the same model.
    """

    def normal(key, *shape):
        return config.init_scale * jax.random.normal(key, shape, jnp.float32)

    def layer(numbers):
        numbers = iter(jnp.split(numbers, np.cumsum(sizes)[:-1]))
        return _arrays(Layer(config, lambda *shape: next(numbers).reshape(shape)))

    sizes = [math.prod(projection_shape(config, name)) for name in PROJECTIONS]
    keys = jax.random.split(key, 3)
    params = {
        "embed": normal(keys[0], config.vocab, config.width),
        "layers": jax.vmap(layer)(normal(keys[1], config.layers, sum(sizes))),
        "norm": _arrays(Norm(config.width, config.eps)),
    }
    if not config.tied:
        params["head"] = normal(keys[2], config.vocab, config.width).T
    return jax.tree.map(lambda x: x.astype(dtype), params)


def visible(segments: Int[Array, "rows len"]) -> Bool[Array, "rows len len"]:
    """mask[row, i, j]: token i sees token j. Causal, inside one nonzero segment; and every token sees itself."""
    length = segments.shape[1]
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return (same & (i >= j)[None]) | (i == j)[None]


def near(length: int, window: Int[Array, ""]) -> Bool[Array, "len len"]:
    """Whether token j is among the `window` tokens that end at i; window 0: always."""
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    return (i - j < window) | (window == 0)


class Linear(nnx.Module):
    """x W + b, plus scale (x A) B where an adapter is given: W + AB is never formed."""

    def __init__(self, source: int, sink: int, bias: bool, draw: Callable[[int, int], Array]):
        self.kernel = nnx.Param(draw(source, sink))
        self.bias = nnx.Param(jnp.zeros(sink, jnp.float32)) if bias else None

    def __call__(self, x: Array, adapter: Adapter | None, compute: Any) -> Array:
        """float[tokens, in] -> float[tokens, out], in the dtype of x."""
        y = _product(x, self.kernel[...], compute)
        if adapter is not None:
            y = y + adapter.scale * _product(_product(x, adapter.a, compute), adapter.b, compute)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, :]


class Norm(nnx.Module):
    """x / rms(x) * scale over the last axis."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Any leading axes."""
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(x.dtype)
        return normal * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Layer(nnx.Module):
    """Attention and gated SiLU, each after its norm and added to the stream."""

    def __init__(self, config: DecoderConfig, draw: Callable[[int, int], Array]):
        def linear(name):
            return Linear(*projection_shape(config, name), name in config.biases, draw)

        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj, self.up_proj, self.down_proj = (
            linear(name) for name in PROJECTIONS
        )
        self.input_norm = Norm(config.width, config.eps)
        self.q_norm = Norm(config.head_dim, config.eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.eps) if config.qk_norm else None
        self.post_norm = Norm(config.width, config.eps)

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        rotation: tuple[Array, Array],
        mask: Bool[Array, "rows len len"],
        adapters: dict[str, Adapter],
        compute: Any = None,
    ) -> Float[Array, "tokens width"]:
        """One layer on flat tokens; tokens = rows * len."""

        def project(name, x):
            return getattr(self, name)(x, adapters.get(name), compute)

        rows, length = mask.shape[:2]

        def split(x, heads, norm):
            x = x.reshape(rows, length, heads, self.config.head_dim)
            return rotate(x if norm is None else norm(x), *rotation)

        normal = self.input_norm(x)
        q = split(project("q_proj", normal), self.config.heads, self.q_norm)
        k = split(project("k_proj", normal), self.config.kv_heads, self.k_norm)
        v = project("v_proj", normal).reshape(k.shape)
        x = x + project("o_proj", attention(q, k, v, mask, compute).reshape(rows * length, -1))
        normal = self.post_norm(x)
        gated = jax.nn.silu(project("gate_proj", normal)) * project("up_proj", normal)
        return x + project("down_proj", gated)


def attention(
    q: Float[Array, "rows len heads dim"],
    k: Float[Array, "rows keys kv_heads dim"],
    v: Float[Array, "rows keys kv_heads dim"],
    mask: Bool[Array, "rows len keys"],
    compute: Any = None,
) -> Float[Array, "rows len heads dim"]:
    """softmax(q kᵀ / √dim) v where the mask allows, with heads / kv_heads queries to one key.

    Plain products, and not a fused kernel, on purpose: it has a jvp, and a Hessian product in the dtype of its
    arguments. Every query must see some key.
    """
    rows, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # batch axes first, a group's queries in one matrix: on CPU a third faster than an einsum in the given layout
    q = (q * dim**-0.5).reshape(rows, length, kv_heads, group, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * length, dim)
    scores = _product(q, k.transpose(0, 2, 3, 1), compute).reshape(rows, kv_heads, group, length, keys)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min / 2)  # finite: no inf - inf in a jvp
    shares = jax.nn.softmax(scores, axis=-1).reshape(rows, kv_heads, group * length, keys)
    out = _product(shares, v.transpose(0, 2, 1, 3), compute).reshape(rows, kv_heads, group, length, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)


def rotate(x: Float[Array, "rows len heads dim"], cos: Array, sin: Array) -> Float[Array, "rows len heads dim"]:
    """Rotate coordinate j against j + dim / 2 by the angle of its position; cos, sin are [rows, len, dim / 2]."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _product(x: Array, kernel: Array, compute: Any) -> Array:
    if compute is None:
        return x @ kernel.astype(x.dtype)
    return jnp.matmul(x.astype(compute), kernel.astype(compute), preferred_element_type=x.dtype)


def _dtype(params: Params) -> Any:
    # never below float32, never a hard cast: float64 parameters stay float64
    return jnp.result_type(jnp.float32, *{leaf.dtype for leaf in jax.tree.leaves(params)})


def _windows(config: DecoderConfig, length: int) -> Array | None:
    if all(window == 0 or window >= length for window in config.windows):
        return None  # the window reaches back to the start
    return jnp.asarray(config.windows, jnp.int32)


def _arrays(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _graphs(config: DecoderConfig) -> tuple[Any, Any]:
    layer = nnx.eval_shape(lambda: Layer(config, lambda *shape: jnp.zeros(shape, jnp.float32)))
    norm = nnx.eval_shape(lambda: Norm(config.width, config.eps))
    return nnx.split(layer)[0], nnx.split(norm)[0]
