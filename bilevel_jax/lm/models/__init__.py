"""Decoder-only language models, LoRA adapters and Hugging Face checkpoints."""

from bilevel_jax.lm.models.config import DecoderConfig, RopeConfig
from bilevel_jax.lm.models.decoder import Decoder, init_params, make_decoder
from bilevel_jax.lm.models.families import FAMILIES, read_config
from bilevel_jax.lm.models.huggingface import load_model, save_model
from bilevel_jax.lm.models.lora import balance_adapters, init_lora, join_adapters, load_peft, merge_adapters, save_peft
from bilevel_jax.lm.models.source_files import read_source_files

__all__ = [
    "FAMILIES",
    "Decoder",
    "DecoderConfig",
    "RopeConfig",
    "balance_adapters",
    "make_decoder",
    "init_params",
    "init_lora",
    "join_adapters",
    "load_model",
    "load_peft",
    "merge_adapters",
    "read_config",
    "read_source_files",
    "save_model",
    "save_peft",
]
