"""A decoder-only language model as pure functions of its parameters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from bilevel_jax.lm.models.blocks import LayerContext
from bilevel_jax.lm.models.cache import EMPTY_POSITION, KVCache, make_cache_mask, read_layer_cache
from bilevel_jax.lm.models.config import DecoderConfig, RopeConfig, rope_frequencies
from bilevel_jax.lm.models.families import FAMILIES, AbstractModules, make_abstract_modules, projection_shapes

Params = dict[str, Any]
"""`embed` [vocab, width]; `positions` [max_length, width] where they are learned; `layers`: name -> {kernel
[layers, in, out], bias} or {scale, bias}; `norm`; `head` if untied; `lora` if joined with adapters."""


Remat = Literal["full", "selective", "none"]
REMAT_POLICIES = {"full": None, "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
"""What a layer's forward pass stores for its backward pass, in addition to the layer's input."""


class Decoder(NamedTuple):
    """A decoder-only language model. logits = hidden(params, ...) @ head(params)."""

    config: DecoderConfig
    hidden: Callable[[Params, Array, Array, Array], Array]
    """(params, tokens, positions, segments), all int32[rows, len] -> float[rows, len, width], after the final norm."""
    head: Callable[[Params], Array]
    """params -> float[width, vocab]."""
    extend: Callable[[Params, Sequence[KVCache], Array, Array], tuple[Array, KVCache]]
    """(params, caches, tokens, positions) -> `hidden` of a block of tokens that follow what the caches hold, and the
    block's own cache. One sequence to a row; its tokens, in the caches and then in the block, stand at consecutive
    positions. `EMPTY_POSITION`: padding, on any side. Without caches it reads a sequence from its start."""
    reduce_hidden_states: Callable[[Params, Array, Array, Array, Callable[[Array], Array]], Array]
    """(params, tokens, positions, segments, reduce) -> reduce(x) of each hidden state x [rows, len, width], stacked
    [layers + 1, ...]: what enters each layer, and at the end `hidden`. They are the hidden_states of `transformers`;
    reduced one by one, so that they are never all there."""


def make_decoder(
    config: DecoderConfig,
    *,
    remat: Remat = "selective",
    compute_dtype: Any = None,
    gather_params: Callable[[Params], Params] = lambda p: p,
) -> Decoder:
    """The functions of a decoder.

    Attention is causal and inside equal nonzero segments, so packed sequences give what separate sequences give; a
    padding token (segment 0) attends to itself only, so nothing is 0/0. Arithmetic is in the widest dtype of the
    parameters and float32: a base stored in bfloat16 is upcast one layer at a time.

    Args:
        config: the architecture, for example from `load_model`.
        remat: what the backward pass recomputes. "full": each layer as a whole, for the memory of one layer and a third
            more arithmetic; "selective": all but the products with weights, whose outputs stay in memory; "none".
        compute_dtype: dtype of the factors of the matrix products, accumulated in float32 (jnp.bfloat16); None: no
            cast. It is for forward passes: a backward pass gains little, and hypergradients in bfloat16 can be noise.
        gather_params: gets a part of the tree where it is used, one layer (without its leading axis) or what stands
            outside of the layers, and returns it: parameters that are sharded over devices are gathered there, layer
            by layer.

    Returns:
        Pure functions of the parameters, not yet compiled.

    Raises:
        ValueError: the family of `config` is not supported.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilevel_jax.lm import models
        >>> config = models.DecoderConfig(
        ...     vocab_size=11, width=8, mlp_width=16, layers=1, heads=2, kv_heads=1, head_dim=4, max_length=16
        ... )
        >>> decoder, params = models.make_decoder(config), models.init_params(config, jax.random.key(0))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> positions, segments = jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32)
        >>> (decoder.hidden(params, tokens, positions, segments) @ decoder.head(params)).shape
        (1, 3, 11)
    """
    functions = _DecoderFunctions(config, make_abstract_modules(config), remat, compute_dtype, gather_params)
    return Decoder(config, functions.hidden, functions.head, functions.extend, functions.reduce_hidden_states)


@dataclass(frozen=True, eq=False)
class _DecoderFunctions:
    """What `make_decoder` returns, as methods: the settings are read, never written."""

    config: DecoderConfig
    modules: AbstractModules
    remat: Remat
    compute_dtype: Any
    gather_params: Callable[[Params], Params]

    def hidden(self, params: Params, tokens: Array, positions: Array, segments: Array) -> Array:
        return self._run_layers(params, tokens, positions, segments, lambda x: None)[0]

    def reduce_hidden_states(
        self, params: Params, tokens: Array, positions: Array, segments: Array, reduce: Callable[[Array], Array]
    ) -> Array:
        final_hidden, reduced_inputs = self._run_layers(params, tokens, positions, segments, reduce)
        return jnp.concatenate([reduced_inputs, reduce(final_hidden)[None]])

    def head(self, params: Params) -> Array:
        name = "embed" if self.config.tied_embeddings else "head"
        kernel = self.gather_params({name: params[name]})[name]
        kernel = kernel.T if self.config.tied_embeddings else kernel
        return kernel.astype(_arithmetic_dtype(params))

    def extend(
        self, params: Params, caches: Sequence[KVCache], tokens: Array, positions: Array
    ) -> tuple[Array, KVCache]:
        rows, length = tokens.shape
        dtype = _arithmetic_dtype(params)
        valid_positions = jnp.where(positions == EMPTY_POSITION, 0, positions)
        rotation_of = self._layer_rotation(valid_positions, dtype)
        self_mask = jnp.eye(length, dtype=bool)[None]  # padding sees something, so nothing is 0/0
        cached_positions = [
            cache.positions if cache.source_row is None else cache.positions[cache.source_row] for cache in caches
        ]

        def layer(x, xs):
            (weights, adapters, window, is_local), cached_key_values = xs
            weights, adapters = self._gather_layer(weights, adapters)
            past = tuple(
                read_layer_cache(cache, keys, values, make_cache_mask(positions, at, window))
                for cache, (keys, values), at in zip(caches, cached_key_values, cached_positions, strict=True)
            )
            layer_mask = make_cache_mask(positions, positions, window) | self_mask
            context = LayerContext(rotation_of(is_local), layer_mask, adapters, self.compute_dtype, past)
            x, key_values = nnx.merge(self.modules.layer, weights)(x, context)
            # what `compute_dtype` would cast in each product is stored in it: half of the memory, the same numbers
            return x, jax.tree.map(lambda part: part.astype(self.compute_dtype or dtype), key_values)

        x = self._embed_tokens(params, tokens, valid_positions, dtype)
        windows = _window_array(self.config, length + sum(at.shape[1] for at in cached_positions))
        cached_key_values = [(cache.keys, cache.values) for cache in caches]
        x, (keys, values) = jax.lax.scan(layer, x, (self._stack_layers(params, windows), cached_key_values))
        out = self._apply_final_norm(params, x).reshape(rows, length, self.config.width)
        return out, KVCache(keys, values, positions)

    def _run_layers(
        self, params: Params, tokens: Array, positions: Array, segments: Array, reduce_input: Callable[[Array], Any]
    ) -> tuple[Array, Any]:
        rows, length = tokens.shape
        dtype = _arithmetic_dtype(params)
        rotation_of = self._layer_rotation(positions, dtype)
        mask = make_causal_mask(segments)

        def layer(x, xs):
            weights, adapters, window, is_local = xs
            weights, adapters = self._gather_layer(weights, adapters)
            layer_mask = mask if window is None else mask & make_window_mask(length, window)[None]
            reduced_input = reduce_input(x.reshape(rows, length, self.config.width))
            x, _ = nnx.merge(self.modules.layer, weights)(
                x, LayerContext(rotation_of(is_local), layer_mask, adapters, self.compute_dtype)
            )
            return x, reduced_input

        body = layer
        if self.remat != "none":
            # scan keeps XLA from undoing it
            body = jax.checkpoint(layer, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        x = self._embed_tokens(params, tokens, positions, dtype)
        x, reduced_inputs = jax.lax.scan(body, x, self._stack_layers(params, _window_array(self.config, length)))
        return self._apply_final_norm(params, x).reshape(rows, length, self.config.width), reduced_inputs

    def _embed_tokens(self, params: Params, tokens: Array, positions: Array, dtype: Any) -> Array:
        params = self.gather_params({name: params[name] for name in ("embed", "positions") if name in params})
        x = params["embed"][tokens.reshape(-1)].astype(dtype)  # tokens flat: 2-D products are faster on CPU
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        if self.config.rope is None:
            learned = params["positions"].at[positions.reshape(-1)]
            x = x + learned.get(mode="fill", fill_value=jnp.nan).astype(dtype)  # beyond the last: not the last one's
        return x

    def _layer_rotation(self, positions: Array, dtype: Any) -> Callable[[Any], tuple[Array, ...]]:
        """Whether a layer's attention is local -> the cosines and sines of its rotary positions."""
        global_rotation = self._rotation(self.config.rope, positions, dtype)
        local_rotation = self._rotation(self.config.local_rope, positions, dtype) if any(self._is_local) else ()
        return lambda is_local: (
            jax.tree.map(partial(jnp.where, is_local), local_rotation, global_rotation)
            if local_rotation
            else global_rotation
        )

    def _rotation(self, rope: RopeConfig | None, positions: Array, dtype: Any) -> tuple[Array, ...]:
        if rope is None:
            return ()
        rotary = jnp.asarray(rope_frequencies(rope, self.config.head_dim), dtype)
        angles = positions[..., None].astype(dtype) * rotary[None, None, :]
        return jnp.cos(angles), jnp.sin(angles)

    @property
    def _is_local(self) -> list[bool]:
        # whether each layer has a window, and so the other rope
        return [window > 0 for window in self.config.windows] if self.config.local_rope else []

    def _stack_layers(self, params: Params, windows: Array | None) -> tuple:
        is_local = jnp.asarray(self._is_local) if any(self._is_local) else None
        return params["layers"], params.get("lora", {}), windows, is_local

    def _gather_layer(self, weights: Params, adapters: Params) -> tuple[Params, Params]:
        gathered = self.gather_params({"layers": weights, "lora": adapters})
        return gathered["layers"], gathered["lora"]

    def _apply_final_norm(self, params: Params, x: Array) -> Array:
        return nnx.merge(self.modules.norm, self.gather_params({"norm": params["norm"]})["norm"])(x)


@partial(jax.jit, static_argnames=("config", "dtype"))  # eagerly, it would compile every operation by itself
def init_params(config: DecoderConfig, key: PRNGKeyArray, *, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters: matrices ~ N(0, init_scale²), norms that multiply by 1, biases 0.

    Drawn in float32 and cast, so that a float32 and a float64 model are the same model.
    """

    def normal(key, *shape):
        return config.init_scale * jax.random.normal(key, shape, jnp.float32)

    def layer(numbers):
        start = 0

        def draw(*shape):
            nonlocal start
            start += math.prod(shape)
            return numbers[start - math.prod(shape) : start].reshape(shape)

        return _param_arrays(family.make_layer(config, draw))

    size = sum(math.prod(shape) for shape in projection_shapes(config).values())
    family = FAMILIES[config.family]
    keys = jax.random.split(key, 3)
    params = {
        "embed": normal(keys[0], config.vocab_size, config.width),
        "layers": jax.vmap(layer)(normal(keys[1], config.layers, size)),
        "norm": _param_arrays(family.make_norm(config)),
    }
    if not config.tied_embeddings:
        params["head"] = normal(keys[2], config.vocab_size, config.width).T
    if config.rope is None:
        params["positions"] = normal(jax.random.fold_in(key, 3), config.max_length, config.width)
    return jax.tree.map(lambda x: x.astype(dtype), params)


def make_causal_mask(segments: Int[Array, "rows len"]) -> Bool[Array, "rows len len"]:
    """mask[row, i, j]: token i sees token j. Causal, inside one nonzero segment; and every token sees itself."""
    length = segments.shape[1]
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
    return (same & (i >= j)[None]) | (i == j)[None]


def make_window_mask(length: int, window: Int[Array, ""]) -> Bool[Array, "len len"]:
    """Whether token j is among the `window` tokens that end at i; window 0: always."""
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    return (i - j < window) | (window == 0)


def _arithmetic_dtype(params: Params) -> Any:
    # never below float32, never a hard cast: float64 parameters stay float64
    return jnp.result_type(jnp.float32, *{leaf.dtype for leaf in jax.tree.leaves(params)})


def _window_array(config: DecoderConfig, length: int) -> Array | None:
    if all(window == 0 or window >= length for window in config.windows):
        return None  # the window reaches back to the start
    return jnp.asarray(config.windows, jnp.int32)


def _param_arrays(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
