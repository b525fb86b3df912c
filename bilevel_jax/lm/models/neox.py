"""GPT-NeoX (Pythia) decoder layers and checkpoint names."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.models.blocks import (
    KeyValues,
    LayerContext,
    LayerNorm,
    Linear,
    MatrixInit,
    apply_projection,
    apply_rope,
    attention,
)
from bilevel_jax.lm.models.config import (
    ACTIVATIONS,
    DecoderConfig,
    RopeConfig,
    read_activation,
    read_eos,
    read_rope,
    require_keys,
    rope_to_dict,
)

ATTENTION_PROJECTIONS = ("query_key_value", "dense")
MLP_PROJECTIONS = ("dense_h_to_4h", "dense_4h_to_h")
TOP_NAMES = {
    "embed": "gpt_neox.embed_in",
    "layers": "gpt_neox.layers",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
LAYER_NAMES = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


class NeoXLayer(nnx.Module):
    """Attention and feed-forward, both of the layer's input if `parallel_residual`, else one after the other."""

    def __init__(self, config: DecoderConfig, draw: MatrixInit):
        def linear(name, source, sink):
            return Linear(source, sink, name in config.biased_projections, draw)

        self.config = config
        self.query_key_value = linear("query_key_value", config.width, 3 * config.width)
        self.dense = linear("dense", config.width, config.width)
        self.dense_h_to_4h = linear("dense_h_to_4h", config.width, config.mlp_width)
        self.dense_4h_to_h = linear("dense_4h_to_h", config.mlp_width, config.width)
        self.input_norm, self.post_norm = make_neox_norm(config), make_neox_norm(config)

    def __call__(self, x: Float[Array, "tokens width"], context: LayerContext) -> tuple[Array, KeyValues]:
        """One layer on flat tokens: float[tokens, width], and its keys and values."""
        out, memory = self.apply_attention(self.input_norm(x), context)
        attended = x + out
        inner = apply_projection(
            self, "dense_h_to_4h", self.post_norm(x if self.config.parallel_residual else attended), context
        )
        return attended + apply_projection(
            self, "dense_4h_to_h", ACTIVATIONS[self.config.activation](inner), context
        ), memory

    def apply_attention(self, x: Array, context: LayerContext) -> tuple[Array, KeyValues]:
        """Attention of normed tokens."""
        rows, length = context.mask.shape[:2]
        fused = apply_projection(self, "query_key_value", x, context)  # of each head: its query, its key, its value
        fused = fused.reshape(rows, length, self.config.heads, 3, self.config.head_dim)
        q, k, v = (fused[:, :, :, part] for part in range(3))
        q, k = apply_rope(q, *context.rotation), apply_rope(k, *context.rotation)
        out, memory = attention(q, k, v, context)
        return apply_projection(self, "dense", out.reshape(rows * length, -1), context), memory


def make_neox_norm(config: DecoderConfig) -> LayerNorm:
    """Each norm of the family."""
    return LayerNorm(config.width, config.eps)


def read_neox_config(where: str, raw: Mapping[str, Any]) -> DecoderConfig:
    """Of transformers 4 (`rotary_pct`, `rotary_emb_base`, `rope_scaling`) and 5 (`rope_parameters`)."""
    require_keys(where, raw, REQUIRED_KEYS)
    width, heads, length = raw["hidden_size"], raw["num_attention_heads"], raw["max_position_embeddings"]
    if width % heads:
        raise ValueError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}.")
    rope = {
        "rope_theta": raw.get("rotary_emb_base", raw.get("rope_theta", 10000.0)),
        "partial_rotary_factor": raw.get("rotary_pct", raw.get("partial_rotary_factor", 0.25)),
        **(raw.get("rope_scaling") or raw.get("rope_parameters") or {}),
    }
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=raw["vocab_size"],
        width=width,
        mlp_width=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        max_length=length,
        eps=raw.get("layer_norm_eps", 1e-5),
        rope=read_rope(where, rope, length, full_rotation=False),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        biased_projections=(*(ATTENTION_PROJECTIONS if raw.get("attention_bias", True) else ()), *MLP_PROJECTIONS),
        activation=read_activation(where, raw, "hidden_act", "gelu"),
        parallel_residual=raw.get("use_parallel_residual", True),
        init_scale=raw.get("initializer_range", 0.02),
        bos=raw.get("bos_token_id", 0),
        eos=read_eos(raw, 2),
        pad=raw.get("pad_token_id"),
    )


def neox_config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """The family's keys, rotary parameters in both spellings."""
    rope = config.rope or RopeConfig()
    rope_parameters = rope_to_dict(rope) | {"partial_rotary_factor": rope.rotary_fraction}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_length,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": "dense" in config.biased_projections,
        "rope_parameters": rope_parameters,
        "rotary_pct": rope.rotary_fraction,
        "rotary_emb_base": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else rope_parameters,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
