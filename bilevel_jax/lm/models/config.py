"""What a decoder looks like: `DecoderConfig`, read from and written to the config.json of a Hugging Face folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""The supported values of `model_type`, with the class that `transformers` loads them into."""
QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*QKV, "o_proj", *MLP)
"""The matrices of a layer; the names are Hugging Face's, and are those that LoRA targets."""
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: frequency j is theta^(-2j / head_dim), then scaled by `kind`."""

    theta: float = 10000.0
    kind: str = "default"
    """`default`, `linear` (all frequencies divided by `factor`) or `llama3` (only the long waves are)."""
    factor: float = 1.0
    low: float = 1.0
    """llama3: waves longer than `original / low` tokens are divided by `factor`."""
    high: float = 4.0
    """llama3: waves shorter than `original / high` tokens are left alone; between the two, interpolated."""
    original: int = 8192
    """llama3: the length, in tokens, of the original training contexts."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only model (RMSNorm, rotary positions, grouped-query attention, gated SiLU). Hashable."""

    vocab: int
    width: int
    inner: int
    """Width of the gated layer."""
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; `heads` is a multiple of it."""
    head_dim: int
    max_length: int
    """Context length of pretraining, tokens; longer inputs are not refused here."""
    family: str = "llama"
    eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = False
    """The output head is the transposed embedding."""
    biases: tuple[str, ...] = ()
    """Which of `PROJECTIONS` have a bias."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation (Qwen3)."""
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens a token sees, itself included; 0 = all. Empty: all, in every layer."""
    init_scale: float = 0.02
    """Standard deviation of a fresh matrix."""
    bos: int | None = None
    eos: int | tuple[int, ...] | None = None
    pad: int | None = None

    def __post_init__(self):
        if self.family not in ARCHITECTURES:
            raise ValueError(f"model_type {self.family!r} is not supported; supported: {sorted(ARCHITECTURES)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key-value heads.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions pair the coordinates of a head.")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers; give one per layer, or none.")
        if self.rope.kind not in ROPES:
            raise ValueError(f"rope_type {self.rope.kind!r} is not supported; supported: {sorted(ROPES)}.")


def read_config(source: str | Path | Mapping[str, Any]) -> DecoderConfig:
    """The configuration in `source`: a folder with a config.json, that file, or its contents.

    Reads both spellings: transformers 4 (`rope_theta`, `rope_scaling` at the top) and 5 (`rope_parameters`).
    Defaults of missing keys are those of transformers. Raises ValueError for a model, or a feature of one, that the
    decoder does not compute: nothing is ignored that would change a logit.
    """
    if isinstance(source, Mapping):
        where, raw = "config", dict(source)
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a Hugging Face model folder.")
        where, raw = str(path), json.loads(path.read_text(encoding="utf-8"))
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type {family!r} is not supported; supported: {sorted(ARCHITECTURES)}.")
    required = (*REQUIRED, *(() if family == "llama" else ("num_key_value_heads",)))
    missing = [key for key in required if key not in raw]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}; a {family} config.json has them.")
    for key, wanted in {"hidden_act": "silu", "quantization_config": None}.items():
        if raw.get(key, wanted) != wanted:
            raise ValueError(f"{where}: {key} {raw[key]!r} is not supported; supported: {wanted!r}.")
    heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    eos = raw.get("eos_token_id")
    return DecoderConfig(
        family=family,
        vocab=raw["vocab_size"],
        width=raw["hidden_size"],
        inner=raw["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=_head_dim(raw),
        max_length=raw["max_position_embeddings"],
        eps=raw.get("rms_norm_eps", 1e-6),
        rope=_read_rope(where, raw),
        tied=raw.get("tie_word_embeddings", False),
        biases=_biases(raw),
        qk_norm=family == "qwen3",
        windows=_windows(where, raw),
        init_scale=raw.get("initializer_range", 0.02),
        bos=raw.get("bos_token_id"),
        eos=tuple(eos) if isinstance(eos, list) else eos,
        pad=raw.get("pad_token_id"),
    )


def write_config(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The contents of a config.json that transformers 4 and 5 both read; `dtype` is that of the weights' file.

    The rotary parameters are written in both spellings: a reader that knew neither would silently take theta = 10000.
    """
    rope = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = config.rope.low, config.rope.high
        rope["original_max_position_embeddings"] = config.rope.original
    raw = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "rope_parameters": rope,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.kind == "default" else rope,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_scale,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if isinstance(config.eos, tuple) else config.eos,
        "pad_token_id": config.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.family in ("llama", "qwen3"):
        raw["attention_bias"] = "q_proj" in config.biases
    if config.family == "llama":
        raw["mlp_bias"] = "up_proj" in config.biases
    if config.family == "mistral":
        raw["sliding_window"] = max(config.windows, default=0) or None
    if config.family in ("qwen2", "qwen3"):
        sliding = any(config.windows)
        windows = config.windows or (0,) * config.layers
        raw["use_sliding_window"] = sliding
        raw["sliding_window"] = max(windows) if sliding else None
        raw["max_window_layers"] = config.layers - sum(w > 0 for w in windows)
        raw["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    if read_config(raw) != config:
        raise ValueError(f"a {config.family} config.json cannot express {config}; change `family` or the odd field.")
    return raw


def projection_shape(config: DecoderConfig, projection: str) -> tuple[int, int]:
    """(in, out) of one of `PROJECTIONS`."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q_proj": (config.width, queries),
        "k_proj": (config.width, keys),
        "v_proj": (config.width, keys),
        "o_proj": (queries, config.width),
        "gate_proj": (config.width, config.inner),
        "up_proj": (config.width, config.inner),
        "down_proj": (config.inner, config.width),
    }[projection]


def frequencies(config: DecoderConfig) -> np.ndarray:
    """The rotary frequencies, radians per token, float32[head_dim / 2].

    Computed in float32 in the order of transformers, and used as they are in float64 too: one model, not two.
    """
    exponent = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    plain = np.float32(1) / np.power(np.float32(config.rope.theta), exponent)
    return ROPES[config.rope.kind](config.rope, plain).astype(np.float32)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / plain  # tokens
    smooth = np.clip((rope.original / wavelength - rope.low) / (rope.high - rope.low), 0, 1)
    return (1 - smooth) * plain / rope.factor + smooth * plain


ROPES = {"default": lambda rope, plain: plain, "linear": lambda rope, plain: plain / rope.factor, "llama3": _llama3}


def _head_dim(raw: dict[str, Any]) -> int:
    if raw["model_type"] == "qwen3" and "head_dim" not in raw:
        return 128  # transformers' default; not width / heads
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def _biases(raw: dict[str, Any]) -> tuple[str, ...]:
    if raw["model_type"] == "qwen2":
        return QKV
    attention = (*QKV, "o_proj") if raw["model_type"] != "mistral" and raw.get("attention_bias", False) else ()
    return attention + (MLP if raw["model_type"] == "llama" and raw.get("mlp_bias", False) else ())


def _windows(where: str, raw: dict[str, Any]) -> tuple[int, ...]:
    layers = raw["num_hidden_layers"]
    if raw["model_type"] == "llama":
        return ()
    window = raw.get("sliding_window", 4096)
    if raw["model_type"] == "mistral":
        return (window,) * layers if window else ()
    if not raw.get("use_sliding_window", False) or not window:
        return ()
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise ValueError(f"{where}: layer_types {kinds} for {layers} layers; known: full_attention, sliding_attention.")
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _read_rope(where: str, raw: dict[str, Any]) -> Rope:
    rope = {
        "rope_theta": raw.get("rope_theta", 10000.0),
        **(raw.get("rope_scaling") or raw.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        raise ValueError(f"{where}: rope_type {kind!r} is not supported; supported: {sorted(ROPES)}.")
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is not supported; every coordinate of a head is rotated.")
    theta = float(rope["rope_theta"])
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(rope["factor"]))
    original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    return Rope(theta, kind, float(rope["factor"]), low, high, original)
