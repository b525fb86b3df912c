"""GPT-NeoX (Pythia): LayerNorm, a part of each head rotated, attention and feed-forward side by side."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.models.blocks import Context, Draw, LayerNorm, Linear, Memory, attention, project, rotate
from bilevel_jax.lm.models.config import (
    ACTIVATIONS,
    DecoderConfig,
    Rope,
    read_activation,
    read_eos,
    read_rope,
    require,
    write_rope,
)

ATTENTION = ("query_key_value", "dense")
MLP = ("dense_h_to_4h", "dense_4h_to_h")
TOP = {
    "embed": "gpt_neox.embed_in",
    "layers": "gpt_neox.layers",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
INSIDE = {
    "query_key_value": "attention.query_key_value",
    "dense": "attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


class Layer(nnx.Module):
    """Attention and feed-forward, both of the layer's input if `parallel`, else one after the other."""

    def __init__(self, config: DecoderConfig, draw: Draw):
        def linear(name, source, sink):
            return Linear(source, sink, name in config.biases, draw)

        self.config = config
        self.query_key_value = linear("query_key_value", config.width, 3 * config.width)
        self.dense = linear("dense", config.width, config.width)
        self.dense_h_to_4h = linear("dense_h_to_4h", config.width, config.inner)
        self.dense_4h_to_h = linear("dense_4h_to_h", config.inner, config.width)
        self.input_norm, self.post_norm = norm(config), norm(config)

    def __call__(self, x: Float[Array, "tokens width"], context: Context) -> tuple[Array, Memory]:
        """One layer on flat tokens: float[tokens, width], and its keys and values."""
        out, memory = self.attend(self.input_norm(x), context)
        attended = x + out
        inner = project(self, "dense_h_to_4h", self.post_norm(x if self.config.parallel else attended), context)
        return attended + project(self, "dense_4h_to_h", ACTIVATIONS[self.config.activation](inner), context), memory

    def attend(self, x: Array, context: Context) -> tuple[Array, Memory]:
        """Attention of normed tokens."""
        rows, length = context.mask.shape[:2]
        fused = project(self, "query_key_value", x, context)  # of each head: its query, its key, its value
        fused = fused.reshape(rows, length, self.config.heads, 3, self.config.head_dim)
        q, k, v = (fused[:, :, :, part] for part in range(3))
        q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        out, memory = attention(q, k, v, context)
        return project(self, "dense", out.reshape(rows * length, -1), context), memory


def norm(config: DecoderConfig) -> LayerNorm:
    """Each norm of the family."""
    return LayerNorm(config.width, config.eps)


def read(where: str, raw: Mapping[str, Any]) -> DecoderConfig:
    """Of transformers 4 (`rotary_pct`, `rotary_emb_base`, `rope_scaling`) and 5 (`rope_parameters`)."""
    require(where, raw, REQUIRED)
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
        vocab=raw["vocab_size"],
        width=width,
        inner=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        max_length=length,
        eps=raw.get("layer_norm_eps", 1e-5),
        rope=read_rope(where, rope, length, whole=False),
        tied=raw.get("tie_word_embeddings", False),
        biases=(*(ATTENTION if raw.get("attention_bias", True) else ()), *MLP),
        activation=read_activation(where, raw, "hidden_act", "gelu"),
        parallel=raw.get("use_parallel_residual", True),
        init_scale=raw.get("initializer_range", 0.02),
        bos=raw.get("bos_token_id", 0),
        eos=read_eos(raw, 2),
        pad=raw.get("pad_token_id"),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The family's keys, rotary parameters in both spellings."""
    rope = config.rope or Rope()
    written = write_rope(rope) | {"partial_rotary_factor": rope.part}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_length,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "use_parallel_residual": config.parallel,
        "attention_bias": "dense" in config.biases,
        "rope_parameters": written,
        "rotary_pct": rope.part,
        "rotary_emb_base": rope.theta,
        "rope_scaling": None if rope.kind == "default" else written,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
