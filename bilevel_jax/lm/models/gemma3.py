"""Gemma 3 (text) decoder layers and checkpoint names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.models import llama
from bilevel_jax.lm.models.blocks import KeyValues, LayerContext, MatrixInit, RMSNorm
from bilevel_jax.lm.models.config import (
    DecoderConfig,
    RopeConfig,
    read_activation,
    read_eos,
    read_rope,
    read_windows,
    refuse_unsupported,
    require_keys,
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
LAYER_TYPES = ("full_attention", "sliding_attention")


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


def read_gemma3_config(where: str, raw: Mapping[str, Any]) -> DecoderConfig:
    """Of transformers 4 (`rope_theta`, `rope_local_base_freq`) and 5 (`rope_parameters` for each kind of layer)."""
    require_keys(where, raw, (*llama.REQUIRED_KEYS, "num_key_value_heads"))
    refuse_unsupported(where, raw, SUPPORTED_VALUES)
    layers, length = raw["num_hidden_layers"], raw["max_position_embeddings"]
    every = raw.get("sliding_window_pattern") or 6
    layer_types = raw.get("layer_types") or [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)
    ]
    window = raw.get("sliding_window", 4096)
    if not window and "sliding_attention" in layer_types:
        raise ValueError(f"{where}: sliding_window {window!r} with layers of sliding_attention; give their window.")
    rope_parameters = raw.get("rope_parameters") or {}
    if unknown := sorted(set(rope_parameters) - set(LAYER_TYPES)):
        raise ValueError(f"{where}: rope_parameters has {unknown}; it has {LAYER_TYPES} in a gemma3_text model.")
    global_rope = {"rope_theta": raw.get("rope_theta", 1e6), **(rope_parameters.get("full_attention") or {})}
    local_rope = {
        "rope_theta": raw.get("rope_local_base_freq", 1e4),
        **(rope_parameters.get("sliding_attention") or {}),
    }
    width = raw["hidden_size"]
    return DecoderConfig(
        family="gemma3_text",
        vocab_size=raw["vocab_size"],
        width=width,
        mlp_width=raw["intermediate_size"],
        layers=layers,
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim", 256),
        max_length=length,
        eps=raw.get("rms_norm_eps", 1e-6),
        rope=read_rope(where, global_rope | (raw.get("rope_scaling") or {}), length, full_rotation=True),
        local_rope=read_rope(where, local_rope, length, full_rotation=True),
        tied_embeddings=raw.get("tie_word_embeddings", True),
        biased_projections=(*llama.QKV_PROJECTIONS, "o_proj") if raw.get("attention_bias", False) else (),
        qk_norm=True,
        windows=read_windows(where, layer_types, layers, window),
        activation=read_activation(where, raw, "hidden_activation", "gelu_pytorch_tanh"),
        query_scalar=float(raw.get("query_pre_attn_scalar", 256)),
        embed_scale=float(np.float32(width**0.5)),  # as transformers rounds it in a float32 model
        init_scale=raw.get("initializer_range", 0.02),
        bos=raw.get("bos_token_id", 2),
        eos=read_eos(raw, 1),
        pad=raw.get("pad_token_id", 0),
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
