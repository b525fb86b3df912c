"""GPT-NeoX (Pythia) decoder layers and checkpoint names."""

from typing import Any

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
    apply_rope,
    attention,
)
from bilevel_jax.lm.models.config import (
    ACTIVATIONS,
    DecoderConfig,
    RopeConfig,
    read_rope,
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


def read_neox_config(family: str, keys: ConfigKeys) -> DecoderConfig:
    """Of transformers 4 (`rotary_pct`, `rotary_emb_base`, `rope_scaling`) and 5 (`rope_parameters`)."""
    keys.require(REQUIRED_KEYS, f"a {family} config.json")
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    layers, max_length = keys.integer("num_hidden_layers", at_most=MAX_LAYERS), keys.integer("max_position_embeddings")
    if width % heads:
        raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}.")
    scaling, parameters = keys.mapping("rope_scaling"), keys.mapping("rope_parameters")
    rope = read_rope(
        "rope_scaling" if scaling else "rope_parameters",
        {
            "rope_theta": keys.value("rotary_emb_base", 10000.0),
            "partial_rotary_factor": keys.value("rotary_pct", 0.25),
            **(scaling or parameters or {}),
        },
        max_length,
        full_rotation=False,
        original_max_length=keys.integer("original_max_position_embeddings", None),
    )
    # transformers does not read these, or reads them without need
    keys.expect("rope_theta", rope.theta, why=" beside rotary_emb_base")
    keys.expect("partial_rotary_factor", rope.rotary_fraction, why=" beside rotary_pct")
    keys.expect("head_dim", width // heads)
    keys.expect("num_key_value_heads", heads)
    return DecoderConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        width=width,
        mlp_width=keys.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        max_length=max_length,
        eps=keys.number("layer_norm_eps", 1e-5, at_least=0),
        rope=rope,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        biased_projections=(*(ATTENTION_PROJECTIONS if keys.flag("attention_bias", True) else ()), *MLP_PROJECTIONS),
        activation=keys.choice("hidden_act", "gelu", ACTIVATIONS),
        parallel_residual=keys.flag("use_parallel_residual", True),
        init_scale=keys.number("initializer_range", 0.02, at_least=0),
        bos=keys.token("bos_token_id", 0),
        eos=keys.tokens("eos_token_id", 2),
        pad=keys.token("pad_token_id"),
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
