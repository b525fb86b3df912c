"""GPT-2 decoder layers and checkpoint names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.checkpoint.config_keys import MAX_LAYERS, ConfigKeys
from bilevel_jax.lm.models.blocks import (
    KeyValues,
    LayerContext,
    LayerNorm,
    Linear,
    MatrixInit,
    apply_projection,
    attention,
)
from bilevel_jax.lm.models.config import ACTIVATIONS, DecoderConfig

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
COMMON_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
"""Keys of the family -> those of the others, which transformers reads in their place where a file has both."""
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


def read_gpt2_config(family: str, keys: ConfigKeys) -> DecoderConfig:
    """Of transformers 4 and 5, which spell it alike."""
    keys.require(("vocab_size", *COMMON_NAMES), f"a {family} config.json")
    for key, value in SUPPORTED_VALUES.items():
        keys.expect(key, value)
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    layers, max_length = keys.integer("n_layer", at_most=MAX_LAYERS), keys.integer("n_positions")
    for (name, common), value in zip(COMMON_NAMES.items(), (max_length, width, layers, heads), strict=True):
        keys.expect(common, value, why=f" beside {name} {value}")
    keys.expect("num_key_value_heads", heads)
    if width % heads:
        raise ValueError(f"n_embd {width} is not a multiple of n_head {heads}.")
    keys.expect("head_dim", width // heads)
    return DecoderConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        width=width,
        mlp_width=keys.integer("n_inner", None, optional=True) or 4 * width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        max_length=max_length,
        eps=keys.number("layer_norm_epsilon", 1e-5, at_least=0),
        rope=None,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        biased_projections=PROJECTIONS,
        activation=keys.choice("activation_function", "gelu_new", ACTIVATIONS),
        init_scale=keys.number("initializer_range", 0.02, at_least=0),
        bos=keys.token("bos_token_id", 50256),
        eos=keys.tokens("eos_token_id", 50256),
        pad=keys.token("pad_token_id"),
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
