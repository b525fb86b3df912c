"""Gemma 3 (text): Llama's blocks between four norms, with heads normed, and nearer layers with a rope of their own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bilevel_jax.lm.models import llama
from bilevel_jax.lm.models.blocks import Context, Draw, Memory, Norm
from bilevel_jax.lm.models.config import (
    DecoderConfig,
    Rope,
    read_activation,
    read_eos,
    read_rope,
    read_windows,
    refuse,
    require,
    write_rope,
    write_windows,
)

INSIDE = {
    **llama.INSIDE,
    "attended_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "gated_norm": "post_feedforward_layernorm",
}
COMPUTED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
KINDS = ("full_attention", "sliding_attention")


class Layer(nnx.Module):
    """Attention and gated feed-forward, each between two norms and added to the stream."""

    def __init__(self, config: DecoderConfig, draw: Draw):
        self.config = config
        llama.matrices(self, draw, offset=1.0)
        self.input_norm, self.attended_norm, self.post_norm, self.gated_norm = (norm(config) for _ in range(4))

    def __call__(self, x: Float[Array, "tokens width"], context: Context) -> tuple[Array, Memory]:
        """One layer on flat tokens: float[tokens, width], and its keys and values."""
        attended, memory = llama.attend(self, self.input_norm(x), context)
        x = x + self.attended_norm(attended)
        return x + self.gated_norm(llama.gated(self, self.post_norm(x), context)), memory


def norm(config: DecoderConfig) -> Norm:
    """The one before the head, and those over the width in a layer: files hold the scale minus 1."""
    return Norm(config.width, config.eps, offset=1.0)


def read(where: str, raw: Mapping[str, Any]) -> DecoderConfig:
    """Of transformers 4 (`rope_theta`, `rope_local_base_freq`) and 5 (`rope_parameters` for each kind of layer)."""
    require(where, raw, (*llama.REQUIRED, "num_key_value_heads"))
    refuse(where, raw, COMPUTED)
    layers, length = raw["num_hidden_layers"], raw["max_position_embeddings"]
    every = raw.get("sliding_window_pattern") or 6
    kinds = raw.get("layer_types") or [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)
    ]
    window = raw.get("sliding_window", 4096)
    if not window and "sliding_attention" in kinds:
        raise ValueError(f"{where}: sliding_window {window!r} with layers of sliding_attention; give their window.")
    spelled = raw.get("rope_parameters") or {}
    if unknown := sorted(set(spelled) - set(KINDS)):
        raise ValueError(f"{where}: rope_parameters has {unknown}; it has {KINDS} in a gemma3_text model.")
    far = {"rope_theta": raw.get("rope_theta", 1e6), **(spelled.get("full_attention") or {})}
    near = {"rope_theta": raw.get("rope_local_base_freq", 1e4), **(spelled.get("sliding_attention") or {})}
    width = raw["hidden_size"]
    return DecoderConfig(
        family="gemma3_text",
        vocab=raw["vocab_size"],
        width=width,
        inner=raw["intermediate_size"],
        layers=layers,
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim", 256),
        max_length=length,
        eps=raw.get("rms_norm_eps", 1e-6),
        rope=read_rope(where, far | (raw.get("rope_scaling") or {}), length, whole=True),
        local_rope=read_rope(where, near, length, whole=True),
        tied=raw.get("tie_word_embeddings", True),
        biases=(*llama.QKV, "o_proj") if raw.get("attention_bias", False) else (),
        qk_norm=True,
        windows=read_windows(where, kinds, layers, window),
        activation=read_activation(where, raw, "hidden_activation", "gelu_pytorch_tanh"),
        query_scalar=float(raw.get("query_pre_attn_scalar", 256)),
        embed_scale=float(np.float32(width**0.5)),  # as transformers rounds it in a float32 model
        init_scale=raw.get("initializer_range", 0.02),
        bos=raw.get("bos_token_id", 2),
        eos=read_eos(raw, 1),
        pad=raw.get("pad_token_id", 0),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The family's keys, ropes in both spellings; a query scalar that is whole is written as an int, as in files."""
    rope, local = config.rope or Rope(), config.local_rope or Rope()
    scalar = config.query_scalar or config.head_dim
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_activation": config.activation,
        "rms_norm_eps": config.eps,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "rope_parameters": {"full_attention": write_rope(rope), "sliding_attention": write_rope(local)},
        "rope_theta": rope.theta,
        "rope_local_base_freq": local.theta,
        "rope_scaling": None if rope.kind == "default" else write_rope(rope),
        "sliding_window": max(config.windows, default=0) or None,
        "layer_types": write_windows(config),
        "attention_bias": "q_proj" in config.biases,
        "attention_dropout": 0.0,
        **COMPUTED,
    }
