"""The architecture of a decoder, read from config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

_GELU_EXACT, _GELU_TANH = partial(jax.nn.gelu, approximate=False), partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _GELU_EXACT,
    "gelu_python": _GELU_EXACT,
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": jax.nn.relu,
}
"""The names are those of config.json."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: frequency j is theta^(-2j / rotated), then scaled by `kind`."""

    theta: float = 10000.0
    scaling: str = "default"
    """`default`, `linear` (all frequencies divided by `factor`) or `llama3` (only the long waves are)."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """llama3: waves longer than `original / low` tokens are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: waves shorter than `original / high` tokens are left alone; between the two, interpolated."""
    original_max_length: int = 8192
    """llama3: the length, in tokens, of the original training contexts."""
    rotary_fraction: float = 1.0
    """Share of a head's coordinates that are rotated, the first ones (GPT-NeoX)."""


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder-only model. Hashable. What a field does not say is the family's layer."""

    vocab_size: int
    width: int
    mlp_width: int
    """Width of the feed-forward layer."""
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; `heads` is a multiple of it."""
    head_dim: int
    max_length: int
    """Context length of pretraining, tokens. Longer inputs are not refused here; where positions are learned, a row
    with a position beyond it is NaN."""
    family: str = "llama"
    """Which layer: a key of `families.FAMILIES`, the `model_type` of config.json."""
    eps: float = 1e-6
    """Of the norms."""
    rope: RopeConfig | None = RopeConfig()
    """None: learned positions, one vector for each of `max_length` (GPT-2)."""
    local_rope: RopeConfig | None = None
    """That of the layers that have a window, where it is another one (Gemma 3)."""
    tied_embeddings: bool = False
    """The output head is the transposed embedding."""
    biased_projections: tuple[str, ...] = ()
    """Which projections have a bias."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before the rotation (Qwen3, Gemma 3)."""
    windows: tuple[int, ...] = ()
    """For each layer, how many tokens a token sees, itself included; 0 = all. Empty: all, in every layer."""
    activation: str = "silu"
    parallel_residual: bool = False
    """Attention and feed-forward both read the layer's input (GPT-NeoX)."""
    query_scalar: float | None = None
    """Attention scores are divided by its root; None: `head_dim`."""
    embed_scale: float = 1.0
    """The embedding of the input is multiplied by it (Gemma 3)."""
    init_scale: float = 0.02
    """Standard deviation of a fresh matrix."""
    bos: int | None = None
    eos: int | tuple[int, ...] | None = None
    pad: int | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads are not a multiple of {self.kv_heads} key-value heads.")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers; give one per layer, or none.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; supported: {sorted(ACTIVATIONS)}.")
        for rope in (self.rope, self.local_rope):
            if rope is None:
                continue
            if rope.scaling not in ROPE_SCALINGS:
                raise ValueError(f"rope_type {rope.scaling!r} is not supported; supported: {sorted(ROPE_SCALINGS)}.")
            if (rotated := int(self.head_dim * rope.rotary_fraction)) % 2 or not 0 < rotated <= self.head_dim:
                raise ValueError(
                    f"{rotated} of the {self.head_dim} coordinates of a head are rotated; rotary positions pair them, "
                    "so it must be an even number of them."
                )


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """The rotary frequencies, radians per token, float32[rotated / 2].

    Computed in float32 in the order of transformers, and used as they are in float64 too: one model, not two.
    """
    rotated = int(head_dim * rope.rotary_fraction)
    exponent = np.arange(0, rotated, 2).astype(np.float32) / np.float32(rotated)
    unscaled = np.float32(1) / np.power(np.float32(rope.theta), exponent)
    return ROPE_SCALINGS[rope.scaling](rope, unscaled).astype(np.float32)


def _scale_llama3(rope: RopeConfig, unscaled: np.ndarray) -> np.ndarray:
    wavelength = 2 * math.pi / unscaled  # tokens
    short_wave_share = np.clip(
        (rope.original_max_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor),
        0,
        1,
    )
    return (1 - short_wave_share) * unscaled / rope.factor + short_wave_share * unscaled


ROPE_SCALINGS = {
    "default": lambda rope, plain: plain,
    "linear": lambda rope, plain: plain / rope.factor,
    "llama3": _scale_llama3,
}


# ---- what the families' readers and writers share


def require_keys(where: str, raw: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError that names the keys which are not there."""
    if missing := [key for key in keys if key not in raw]:
        raise ValueError(f"{where}: no {', '.join(missing)}; a {raw['model_type']} config.json has them.")


def refuse_unsupported(where: str, raw: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Raise ValueError where a key has another value than the one that is computed; an absent key is right."""
    for key, wanted in supported.items():
        if raw.get(key, wanted) != wanted:
            raise ValueError(f"{where}: {key} {raw[key]!r} is not supported; supported: {wanted!r}.")


def read_activation(where: str, raw: Mapping[str, Any], key: str, default: str) -> str:
    """The name of a function in `ACTIVATIONS`."""
    name = raw.get(key, default)
    if name not in ACTIVATIONS:
        raise ValueError(f"{where}: {key} {name!r} is not supported; supported: {sorted(ACTIVATIONS)}.")
    return name


def read_eos(raw: Mapping[str, Any], default: int | None = None) -> int | tuple[int, ...] | None:
    """One token that ends a text, or several."""
    eos = raw.get("eos_token_id", default)
    return tuple(eos) if isinstance(eos, list) else eos


def read_windows(where: str, layer_types: Sequence[str], layers: int, window: int) -> tuple[int, ...]:
    """`layer_types` as windows."""
    unknown = sorted(set(layer_types) - {"sliding_attention", "full_attention"})
    if unknown or len(layer_types) != layers:
        raise ValueError(
            f"{where}: layer_types {layer_types} for {layers} layers; known: full_attention, sliding_attention."
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    return windows if any(windows) else ()


def windows_to_layer_types(config: DecoderConfig) -> list[str]:
    """Windows as `layer_types`."""
    return ["sliding_attention" if window else "full_attention" for window in config.windows or (0,) * config.layers]


def read_rope(where: str, parameters: Mapping[str, Any], length: int, *, full_rotation: bool) -> RopeConfig:
    """`rope_parameters` of transformers 5, or what transformers 4 spells otherwise put into that form.

    `full_rotation`: the family rotates every coordinate of a head.
    """
    scaling = parameters.get("rope_type", parameters.get("type", "default"))
    if scaling not in ROPE_SCALINGS:
        raise ValueError(f"{where}: rope_type {scaling!r} is not supported; supported: {sorted(ROPE_SCALINGS)}.")
    partial_rotary_factor = parameters.get("partial_rotary_factor")
    theta, rotary_fraction = (
        float(parameters["rope_theta"]),
        1.0 if partial_rotary_factor is None else float(partial_rotary_factor),
    )
    if full_rotation and rotary_fraction != 1:
        raise ValueError(f"{where}: partial_rotary_factor is not supported; every coordinate of a head is rotated.")
    if scaling == "default":
        return RopeConfig(theta, rotary_fraction=rotary_fraction)
    if scaling == "linear":
        return RopeConfig(theta, scaling, float(parameters["factor"]), rotary_fraction=rotary_fraction)
    original_max_length = parameters.get("original_max_position_embeddings", length)
    low_freq_factor, high_freq_factor = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    return RopeConfig(
        theta,
        scaling,
        float(parameters["factor"]),
        low_freq_factor,
        high_freq_factor,
        original_max_length,
        rotary_fraction,
    )


def rope_to_dict(rope: RopeConfig) -> dict[str, Any]:
    """A rope as `rope_parameters`."""
    raw: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.rotary_fraction != 1:
        raw["partial_rotary_factor"] = rope.rotary_fraction
    if rope.scaling != "default":
        raw["factor"] = rope.factor
    if rope.scaling == "llama3":
        raw["low_freq_factor"], raw["high_freq_factor"] = rope.low_freq_factor, rope.high_freq_factor
        raw["original_max_position_embeddings"] = rope.original_max_length
    return raw
