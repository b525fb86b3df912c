"""Decoder families as pure functions of a plain parameter tree, LoRA adapters, and Hugging Face folders in and out."""

from bilevel_jax.lm.models.config import DecoderConfig, Rope
from bilevel_jax.lm.models.decoder import Decoder, decoder, init
from bilevel_jax.lm.models.families import FAMILIES, read_config
from bilevel_jax.lm.models.huggingface import load, save
from bilevel_jax.lm.models.lora import balance, init_lora, join, load_peft, merge, save_peft

__all__ = [
    "FAMILIES",
    "Decoder",
    "DecoderConfig",
    "Rope",
    "balance",
    "decoder",
    "init",
    "init_lora",
    "join",
    "load",
    "load_peft",
    "merge",
    "read_config",
    "save",
    "save_peft",
]
