"""Gemma 3 (text) decoder layers and checkpoint names."""

from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.checkpoint.config_keys import MAX_LAYERS, ConfigKeys
from bilevel_jax.lm.models import llama
from bilevel_jax.lm.models.blocks import KeyValues, LayerContext, MatrixInit, RMSNorm
from bilevel_jax.lm.models.config import (
    ACTIVATIONS,
    LAYER_TYPES,
    DecoderConfig,
    RopeConfig,
    read_rope,
    read_windows,
    rope_to_dict,
    windows_to_layer_types,
)

LAYER_NAMES = {
    **llama.LAYER_NAMES,
    "attended_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "gated_norm": "post_feedforward_layernorm",
}
SUPPORTED_VALUES = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


class Gemma3Layer(nnx.Module):
    """Attention and gated feed-forward, each between two norms and added to the stream."""

    def __init__(self, config: DecoderConfig, draw: MatrixInit):
        self.config = config
        llama.add_projections(self, draw, offset=1.0)
        self.input_norm, self.attended_norm, self.post_norm, self.gated_norm = (
            make_gemma3_norm(config) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "tokens width"], context: LayerContext) -> tuple[Array, KeyValues]:
        """One layer on flat tokens: float[tokens, width], and its keys and values."""
        attended, memory = llama.apply_attention(self, self.input_norm(x), context)
        x = x + self.attended_norm(attended)
        return x + self.gated_norm(llama.apply_gated_mlp(self, self.post_norm(x), context)), memory


def make_gemma3_norm(config: DecoderConfig) -> RMSNorm:
    """The one before the head, and those over the width in a layer: files hold the scale minus 1."""
    return RMSNorm(config.width, config.eps, offset=1.0)


def read_gemma3_config(family: str, keys: ConfigKeys) -> DecoderConfig:
    """Of transformers 4 (`rope_theta`, `rope_local_base_freq`) and 5 (`rope_parameters` for each kind of layer)."""
    keys.require((*llama.REQUIRED_KEYS, "num_key_value_heads"), f"a {family} config.json")
    for key, value in SUPPORTED_VALUES.items():
        keys.expect(key, value)
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    layers, max_length = keys.integer("num_hidden_layers", at_most=MAX_LAYERS), keys.integer("max_position_embeddings")
    every, layer_types = keys.integer("sliding_window_pattern", 6), keys.strings("layer_types")
    keys.value("_sliding_window_pattern")  # where transformers 5 writes it, and the layer_types that it made
    if layer_types is None:
        layer_types = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    global_rope, local_rope = _read_ropes(keys, max_length)
    activation = keys.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS)
    keys.expect("hidden_act", activation, why=" beside hidden_activation")
    return DecoderConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        width=width,
        mlp_width=keys.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=keys.integer("num_key_value_heads", optional=True) or heads,
        head_dim=keys.integer("head_dim", 256),
        max_length=max_length,
        eps=keys.number("rms_norm_eps", 1e-6, at_least=0),
        rope=global_rope,
        local_rope=local_rope,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        biased_projections=(*llama.QKV_PROJECTIONS, "o_proj") if keys.flag("attention_bias", False) else (),
        qk_norm=True,
        windows=read_windows(layer_types, layers, keys.integer("sliding_window", 4096, optional=True)),
        activation=activation,
        query_scalar=keys.number("query_pre_attn_scalar", 256, above=0),
        embed_scale=float(np.float32(width**0.5)),  # as transformers rounds it in a float32 model
        init_scale=keys.number("initializer_range", 0.02, at_least=0),
        bos=keys.token("bos_token_id", 2),
        eos=keys.tokens("eos_token_id", 1),
        pad=keys.token("pad_token_id", 0),
    )


def _read_ropes(keys: ConfigKeys, max_length: int) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers without and with a window."""
    rope_parameters, scaling = keys.mapping("rope_parameters") or {}, keys.mapping("rope_scaling") or {}
    if unknown := sorted(set(rope_parameters) - set(LAYER_TYPES)):
        raise ValueError(f"rope_parameters has {unknown}; it has {LAYER_TYPES} in a gemma3_text model.")
    given = ConfigKeys(rope_parameters, "rope_parameters: ")
    default = {"rope_type": "default"}
    global_rope = {
        "rope_theta": keys.value("rope_theta", 1e6),
        **(given.mapping("full_attention") or default),
        **scaling,
    }
    local_rope = {
        "rope_theta": keys.value("rope_local_base_freq", 1e4),
        **(given.mapping("sliding_attention") or default),
    }
    return (
        read_rope("rope_scaling" if scaling else "rope_parameters", global_rope, max_length, full_rotation=True),
        read_rope("rope_parameters", local_rope, max_length, full_rotation=True),
    )


def gemma3_config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """The family's keys, ropes in both spellings; a query scalar that is whole is written as an int, as in files."""
    rope, local = config.rope or RopeConfig(), config.local_rope or RopeConfig()
    scalar = config.query_scalar or config.head_dim
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_activation": config.activation,
        "rms_norm_eps": config.eps,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "rope_parameters": {"full_attention": rope_to_dict(rope), "sliding_attention": rope_to_dict(local)},
        "rope_theta": rope.theta,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None if rope.scaling == "default" else rope_to_dict(rope),
        "sliding_window": max(config.windows, default=0) or None,
        "layer_types": windows_to_layer_types(config),
        "attention_bias": "q_proj" in config.biased_projections,
        "attention_dropout": 0.0,
        **SUPPORTED_VALUES,
    }
