"""The architecture of a decoder, read from config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from bilevel_jax.lm.checkpoint.config_keys import ConfigKeys

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
LAYER_TYPES = ("full_attention", "sliding_attention")


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


def read_windows(layer_types: Sequence[str], layers: int, window: int | None) -> tuple[int, ...]:
    """`layer_types` as windows."""
    unknown = sorted(set(layer_types) - set(LAYER_TYPES))
    if unknown or len(layer_types) != layers:
        raise ValueError(f"layer_types {list(layer_types)} for {layers} layers; known: {', '.join(LAYER_TYPES)}.")
    if window is None and "sliding_attention" in layer_types:
        raise ValueError("sliding_window None with layers of sliding_attention; give their window.")
    windows = tuple(window if window and kind == "sliding_attention" else 0 for kind in layer_types)
    return windows if any(windows) else ()


def windows_to_layer_types(config: DecoderConfig) -> list[str]:
    """Windows as `layer_types`."""
    return ["sliding_attention" if window else "full_attention" for window in config.windows or (0,) * config.layers]


def read_rope(
    name: str,
    parameters: Mapping[str, Any],
    max_length: int,
    *,
    full_rotation: bool,
    original_max_length: int | None = None,
) -> RopeConfig:
    """`rope_parameters` of transformers 5, or what transformers 4 spells otherwise put into that form.

    Args:
        name: the key of config.json that has them, for errors.
        parameters: with `rope_theta`.
        max_length: of the model.
        full_rotation: the family rotates every coordinate of a head.
        original_max_length: `original_max_position_embeddings` beside the parameters; goes before theirs.

    Returns:
        The rope.
    """
    keys = ConfigKeys(parameters, f"{name}: ")
    old_kind = keys.choice("type", "default", ROPE_SCALINGS)
    scaling = keys.choice("rope_type", old_kind, ROPE_SCALINGS)
    if "type" in keys and scaling != old_kind:
        raise ValueError(f"{name}: rope_type {scaling!r} and type {old_kind!r}; which one counts?")
    theta = keys.number("rope_theta", above=0)
    fraction = 1.0 if keys.value("partial_rotary_factor") is None else keys.number("partial_rotary_factor", above=0)
    if full_rotation and fraction != 1:
        raise ValueError(f"partial_rotary_factor {fraction} is not supported; every coordinate of a head is rotated.")
    factor, low, high = 1.0, RopeConfig.low_freq_factor, RopeConfig.high_freq_factor
    if scaling != "default":
        keys.require(["factor"], f"{name} of rope_type {scaling!r}")
        factor = keys.number("factor", above=0)
    original = RopeConfig.original_max_length
    if scaling == "llama3":
        keys.require(["low_freq_factor", "high_freq_factor"], f"{name} of rope_type 'llama3'")
        low, high = keys.number("low_freq_factor", above=0), keys.number("high_freq_factor", above=0)
        if low >= high:
            raise ValueError(f"{name}: low_freq_factor {low} is not below high_freq_factor {high}.")
        original = keys.integer("original_max_position_embeddings", max_length)
        original = original_max_length or original
    keys.refuse_others(of=f"{name} of rope_type {scaling!r}")
    return RopeConfig(theta, scaling, factor, low, high, original, fraction)


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
