"""GPT-2 decoder layers and checkpoint names."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.models.blocks import (
    KeyValues,
    LayerContext,
    LayerNorm,
    Linear,
    MatrixInit,
    apply_projection,
    attention,
)
from bilevel_jax.lm.models.config import (
    ACTIVATIONS,
    DecoderConfig,
    read_activation,
    read_eos,
    refuse_unsupported,
    require_keys,
)

PROJECTIONS = ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")
TOP_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "layers": "transformer.h",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
LAYER_NAMES = {
    "c_attn": "attn.c_attn",
    "attn_c_proj": "attn.c_proj",
    "c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
    "input_norm": "ln_1",
    "post_norm": "ln_2",
}
# reorder_and_upcast_attn is left out: it changes the order of float32 arithmetic, not what is computed
SUPPORTED_VALUES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


class GPT2Layer(nnx.Module):
    """Attention and feed-forward, each after its norm and added to the stream."""

    def __init__(self, config: DecoderConfig, draw: MatrixInit):
        def linear(name, source, sink):
            return Linear(source, sink, name in config.biased_projections, draw)

        self.config = config
        self.c_attn = linear("c_attn", config.width, 3 * config.width)
        self.attn_c_proj = linear("attn_c_proj", config.width, config.width)
        self.c_fc = linear("c_fc", config.width, config.mlp_width)
        self.mlp_c_proj = linear("mlp_c_proj", config.mlp_width, config.width)
        self.input_norm, self.post_norm = make_gpt2_norm(config), make_gpt2_norm(config)

    def __call__(self, x: Float[Array, "tokens width"], context: LayerContext) -> tuple[Array, KeyValues]:
        """One layer on flat tokens: float[tokens, width], and its keys and values."""
        rows, length = context.mask.shape[:2]
        fused = apply_projection(
            self, "c_attn", self.input_norm(x), context
        )  # all queries, then all keys, then all values
        heads = rows, length, self.config.heads, self.config.head_dim
        q, k, v = (part.reshape(heads) for part in jnp.split(fused, 3, axis=-1))
        out, memory = attention(q, k, v, context)
        x = x + apply_projection(self, "attn_c_proj", out.reshape(rows * length, -1), context)
        inner = ACTIVATIONS[self.config.activation](apply_projection(self, "c_fc", self.post_norm(x), context))
        return x + apply_projection(self, "mlp_c_proj", inner, context), memory


def make_gpt2_norm(config: DecoderConfig) -> LayerNorm:
    """Each norm of the family."""
    return LayerNorm(config.width, config.eps)


def read_gpt2_config(where: str, raw: Mapping[str, Any]) -> DecoderConfig:
    """Of transformers 4 and 5, which spell it alike."""
    require_keys(where, raw, ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"))
    refuse_unsupported(where, raw, SUPPORTED_VALUES)
    width, heads = raw["n_embd"], raw["n_head"]
    if width % heads:
        raise ValueError(f"{where}: n_embd {width} is not a multiple of n_head {heads}.")
    return DecoderConfig(
        family="gpt2",
        vocab_size=raw["vocab_size"],
        width=width,
        mlp_width=raw.get("n_inner") or 4 * width,
        layers=raw["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        max_length=raw["n_positions"],
        eps=raw.get("layer_norm_epsilon", 1e-5),
        rope=None,
        tied_embeddings=raw.get("tie_word_embeddings", True),
        biased_projections=PROJECTIONS,
        activation=read_activation(where, raw, "activation_function", "gelu_new"),
        init_scale=raw.get("initializer_range", 0.02),
        bos=raw.get("bos_token_id", 50256),
        eos=read_eos(raw, 50256),
        pad=raw.get("pad_token_id"),
    )


def gpt2_config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """The family's keys."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.width,
        "n_inner": config.mlp_width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.max_length,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **SUPPORTED_VALUES,
    }
