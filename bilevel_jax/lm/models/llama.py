"""Llama, Mistral, Ministral, Qwen2 and Qwen3 decoder layers and checkpoint names."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.checkpoint.config_keys import MAX_LAYERS, ConfigKeys
from bilevel_jax.lm.models.blocks import (
    KeyValues,
    LayerContext,
    Linear,
    MatrixInit,
    RMSNorm,
    apply_projection,
    apply_rope,
    attention,
)
from bilevel_jax.lm.models.config import (
    ACTIVATIONS,
    DecoderConfig,
    RopeConfig,
    read_rope,
    read_windows,
    rope_to_dict,
    windows_to_layer_types,
)

QKV_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TOP_NAMES = {"embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "head": "lm_head"}
LAYER_NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


class LlamaLayer(nnx.Module):
    """Attention and gated feed-forward, each after its norm and added to the stream."""

    def __init__(self, config: DecoderConfig, draw: MatrixInit):
        self.config = config
        add_projections(self, draw)
        self.input_norm = RMSNorm(config.width, config.eps)
        self.post_norm = RMSNorm(config.width, config.eps)

    def __call__(self, x: Float[Array, "tokens width"], context: LayerContext) -> tuple[Array, KeyValues]:
        """One layer on flat tokens: float[tokens, width], and its keys and values."""
        attended, memory = apply_attention(self, self.input_norm(x), context)
        x = x + attended
        return x + apply_gated_mlp(self, self.post_norm(x), context), memory


def add_projections(layer: Any, draw: MatrixInit, offset: float = 0.0) -> None:
    """Give a layer its projections and the norms of its heads."""
    config = layer.config
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def linear(name, source, sink):
        return Linear(source, sink, name in config.biased_projections, draw)

    layer.q_proj = linear("q_proj", config.width, queries)
    layer.k_proj = linear("k_proj", config.width, keys)
    layer.v_proj = linear("v_proj", config.width, keys)
    layer.o_proj = linear("o_proj", queries, config.width)
    layer.gate_proj = linear("gate_proj", config.width, config.mlp_width)
    layer.up_proj = linear("up_proj", config.width, config.mlp_width)
    layer.down_proj = linear("down_proj", config.mlp_width, config.width)
    layer.q_norm = RMSNorm(config.head_dim, config.eps, offset) if config.qk_norm else None
    layer.k_norm = RMSNorm(config.head_dim, config.eps, offset) if config.qk_norm else None


def apply_attention(layer: Any, x: Array, context: LayerContext) -> tuple[Array, KeyValues]:
    """Grouped-query attention of normed tokens, with the projections of the layer."""
    config = layer.config
    rows, length = context.mask.shape[:2]

    def split(x, heads, norm):
        x = x.reshape(rows, length, heads, config.head_dim)
        return apply_rope(x if norm is None else norm(x), *context.rotation)

    q = split(apply_projection(layer, "q_proj", x, context), config.heads, layer.q_norm)
    k = split(apply_projection(layer, "k_proj", x, context), config.kv_heads, layer.k_norm)
    v = apply_projection(layer, "v_proj", x, context).reshape(k.shape)
    out, memory = attention(q, k, v, context, config.query_scalar)
    return apply_projection(layer, "o_proj", out.reshape(rows * length, -1), context), memory


def apply_gated_mlp(layer: Any, x: Array, context: LayerContext) -> Array:
    """down(activation(gate(x)) * up(x)) of normed tokens."""
    gate = ACTIVATIONS[layer.config.activation](apply_projection(layer, "gate_proj", x, context))
    return apply_projection(layer, "down_proj", gate * apply_projection(layer, "up_proj", x, context), context)


def make_llama_norm(config: DecoderConfig) -> RMSNorm:
    """The one before the head."""
    return RMSNorm(config.width, config.eps)


def read_llama_config(family: str, keys: ConfigKeys) -> DecoderConfig:
    """Of transformers 4 (`rope_theta`, `rope_scaling` at the top) and 5 (`rope_parameters`)."""
    keys.require((*REQUIRED_KEYS, *(() if family == "llama" else ("num_key_value_heads",))), f"a {family} config.json")
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    layers, max_length = keys.integer("num_hidden_layers", at_most=MAX_LAYERS), keys.integer("max_position_embeddings")
    if family == "qwen3":
        head_dim = keys.integer("head_dim", 128)  # transformers' default; not width / heads
    else:
        head_dim = keys.integer("head_dim", None, optional=True) or width // heads
    scaling, parameters = keys.mapping("rope_scaling"), keys.mapping("rope_parameters")
    rope_parameters = {
        "rope_theta": keys.value("rope_theta", 10000.0),
        "partial_rotary_factor": keys.value("partial_rotary_factor"),
        **(scaling or parameters or {}),
    }
    rope = read_rope(
        "rope_scaling" if scaling else "rope_parameters",
        rope_parameters,
        max_length,
        full_rotation=True,
        original_max_length=keys.integer("original_max_position_embeddings", None),
    )
    bos, eos = (None, None) if family.startswith("qwen") else (1, 2)
    return DecoderConfig(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        width=width,
        mlp_width=keys.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=keys.integer("num_key_value_heads", None, optional=True) or heads,
        head_dim=head_dim,
        max_length=max_length,
        eps=keys.number("rms_norm_eps", 1e-6, at_least=0),
        rope=rope,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        biased_projections=_read_biases(family, keys),
        qk_norm=family == "qwen3",
        windows=_read_windows(family, keys, layers),
        activation=keys.choice("hidden_act", "silu", ACTIVATIONS),
        init_scale=keys.number("initializer_range", 0.02, at_least=0),
        bos=keys.token("bos_token_id", bos),
        eos=keys.tokens("eos_token_id", eos),
        pad=keys.token("pad_token_id"),
    )


def llama_config_to_dict(config: DecoderConfig) -> dict[str, Any]:
    """The family's keys. Rotary parameters in both spellings: one that knew neither would take theta = 10000."""
    rope = config.rope or RopeConfig()
    raw = {
        "architectures": [ARCHITECTURES[config.family]],
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_act": config.activation,
        "rms_norm_eps": config.eps,
        "rope_parameters": rope_to_dict(rope),
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else rope_to_dict(rope),
        "attention_dropout": 0.0,
    }
    if config.family in ("llama", "qwen3"):
        raw["attention_bias"] = "q_proj" in config.biased_projections
    if config.family == "llama":
        raw["mlp_bias"] = "up_proj" in config.biased_projections
    if config.family != "llama":
        raw["sliding_window"] = max(config.windows, default=0) or None
    if config.family == "ministral":
        raw["sliding_window"] = max(config.windows, default=config.max_length)  # transformers asks for one in any case
        raw["layer_types"] = windows_to_layer_types(config)
    if config.family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = any(config.windows)
        raw["max_window_layers"] = config.layers - sum(window > 0 for window in config.windows)
        raw["layer_types"] = windows_to_layer_types(config)
    return raw


def _read_biases(family: str, keys: ConfigKeys) -> tuple[str, ...]:
    if family == "qwen2":
        return QKV_PROJECTIONS
    biased: tuple[str, ...] = ()
    if family in ("llama", "qwen3") and keys.flag("attention_bias", False):
        biased += (*QKV_PROJECTIONS, "o_proj")
    if family == "llama" and keys.flag("mlp_bias", False):
        biased += MLP_PROJECTIONS
    return biased


def _read_windows(family: str, keys: ConfigKeys, layers: int) -> tuple[int, ...]:
    window = None if family == "llama" else keys.integer("sliding_window", 4096, optional=True)
    if family == "mistral":
        return (window,) * layers if window else ()
    layer_types = keys.strings("layer_types")
    first = 0
    if family in ("qwen2", "qwen3"):
        first = keys.integer("max_window_layers", 28, at_least=0)
        if not keys.flag("use_sliding_window", False):
            window = None
            if "sliding_attention" in (layer_types or ()):
                raise ValueError("use_sliding_window is not true, with layer_types of sliding_attention; what counts?")
    if layer_types is None:
        layer_types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    return read_windows(layer_types, layers, window)
