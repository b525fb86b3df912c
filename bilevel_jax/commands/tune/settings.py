"""Settings of training that `tune` varies, as keys of a config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bilevel_jax.runs.config.load import TuneConfig
from bilevel_jax.runs.config.rules import reads_array_data

Setting = Mapping[str, Any]
"""Keys of the config and their values, where these differ from the config's own; {} is the config itself."""

LEARNING_RATE, WARMUP, EPS_ROOT = "optimizer.learning_rate", "optimizer.warmup_ratio", "optimizer.eps_root"
CLIP_NORM, ACTIVATION = "optimizer.max_grad_norm", "arrays.activation"
BATCH, PARTS = "train.global_batch_size", "train.gradient_accumulation_steps"


def list_changes(config: TuneConfig, num_examples: int) -> dict[str, list[Setting]]:
    """The key of each setting that is varied -> the changes of it that are tried, in the order of the config.

    Values that the config has already, that would make training rougher (a shorter warmup, a smaller eps_root), or that
    it cannot use (eps_root without Adam, an activation of a checkpoint, a batch of more than all examples) are left
    out.
    """
    tune, optimizer, train = config.tune, config.optimizer, config.train
    own_warmup = optimizer.warmup_ratio or optimizer.warmup_steps / train.max_steps
    has_eps = optimizer.name in ("adam", "adamw")
    has_activation = reads_array_data(config) and bool(config.arrays.hidden_sizes)
    changes: dict[str, list[Setting]] = {
        LEARNING_RATE: [
            {LEARNING_RATE: optimizer.learning_rate * factor} for factor in tune.learning_rates if factor != 1
        ],
        WARMUP: [{WARMUP: share} for share in tune.warmup_shares if share > own_warmup],
        EPS_ROOT: [{EPS_ROOT: value} for value in tune.eps_roots if has_eps and value > optimizer.eps_root],
        CLIP_NORM: [{CLIP_NORM: norm} for norm in tune.clip_norms if norm != optimizer.max_grad_norm],
        BATCH: [
            {BATCH: train.global_batch_size * factor, PARTS: train.gradient_accumulation_steps * factor}
            for factor in tune.batch_sizes
            if train.global_batch_size * factor <= num_examples
        ],
        ACTIVATION: [
            {ACTIVATION: name} for name in tune.activations if has_activation and name != config.arrays.activation
        ],
    }
    return {key: some for key, some in changes.items() if some}


def apply_setting(config: Any, setting: Setting) -> Any:
    """The config with the values of a setting."""
    for key, value in setting.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def name_setting(setting: Setting) -> str:
    """A setting in words, as `learning_rate 0.001, eps_root 1e-08`."""
    words = [f"{key.partition('.')[2]} {_format(value)}" for key, value in sorted(setting.items()) if key != PARTS]
    return ", ".join(words) or "the config's own"


def format_flags(setting: Setting) -> str:
    """The flags of the command line that make a setting."""
    return " ".join(f"--{key.replace('_', '-')} {_format(value)}" for key, value in sorted(setting.items()))


def count_batch_factor(config: TuneConfig, setting: Setting) -> float:
    """How many times more a training costs than with the config's own batches."""
    return setting.get(BATCH, config.train.global_batch_size) / config.train.global_batch_size


def find_rate(config: TuneConfig, setting: Setting) -> float:
    """The learning rate of a setting."""
    return setting.get(LEARNING_RATE, config.optimizer.learning_rate)


def drop_rate(setting: Setting) -> frozenset[tuple[str, Any]]:
    """All of a setting but its learning rate, to compare with."""
    return frozenset((key, value) for key, value in setting.items() if key != LEARNING_RATE)


def _format(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
