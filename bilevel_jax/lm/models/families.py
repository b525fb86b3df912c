"""The supported model families, their config.json and parameter names."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from bilevel_jax.lm.models import gemma3, gpt2, llama, neox
from bilevel_jax.lm.models.blocks import MatrixInit
from bilevel_jax.lm.models.config import DecoderConfig, refuse_unsupported


class ModelFamily(NamedTuple):
    """What a family's file says."""

    read_config: Callable[[str, Mapping[str, Any]], DecoderConfig]
    """(where, contents of config.json) -> configuration; ValueError for what its layer does not compute."""
    config_to_dict: Callable[[DecoderConfig], dict[str, Any]]
    """The family's own keys of config.json."""
    make_layer: Callable[[DecoderConfig, MatrixInit], nnx.Module]
    make_norm: Callable[[DecoderConfig], nnx.Module]
    """The norm before the head."""
    top_names: dict[str, str]
    """Name in the parameter tree -> name in a checkpoint."""
    layer_names: dict[str, str]
    """The same inside a layer; projections first. The last part of a projection's name is what LoRA targets."""
    lora_targets: tuple[str, ...]
    """What LoRA targets if nobody says; peft's choice."""
    transposed: bool = True
    """The file has matrices as [out, in], the tree as [in, out]."""


LLAMA = ModelFamily(
    llama.read_llama_config,
    llama.llama_config_to_dict,
    llama.LlamaLayer,
    llama.make_llama_norm,
    llama.TOP_NAMES,
    llama.LAYER_NAMES,
    ("q_proj", "v_proj"),
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA._replace(
        read_config=gemma3.read_gemma3_config,
        config_to_dict=gemma3.gemma3_config_to_dict,
        make_layer=gemma3.Gemma3Layer,
        make_norm=gemma3.make_gemma3_norm,
        layer_names=gemma3.LAYER_NAMES,
    ),
    "gpt_neox": ModelFamily(
        neox.read_neox_config,
        neox.neox_config_to_dict,
        neox.NeoXLayer,
        neox.make_neox_norm,
        neox.TOP_NAMES,
        neox.LAYER_NAMES,
        ("query_key_value",),
    ),
    "gpt2": ModelFamily(
        gpt2.read_gpt2_config,
        gpt2.gpt2_config_to_dict,
        gpt2.GPT2Layer,
        gpt2.make_gpt2_norm,
        gpt2.TOP_NAMES,
        gpt2.LAYER_NAMES,
        ("c_attn",),
        transposed=False,
    ),
}
"""The supported values of `model_type`."""


class AbstractModules(NamedTuple):
    """A decoder's modules without arrays: graphs to merge arrays into, and the arrays' shapes."""

    layer: Any
    norm: Any
    layer_shapes: dict[str, dict[str, tuple[int, ...]]]
    """name -> {kernel: (in, out), bias} or {scale, bias}; of one layer."""
    norm_shapes: dict[str, tuple[int, ...]]


def read_config(source: str | Path | Mapping[str, Any]) -> DecoderConfig:
    """The configuration in `source`: a folder with a config.json, that file, or its contents.

    Reads the spellings of transformers 4 and 5. Defaults of missing keys are those of transformers. Raises ValueError
    for a model, or a feature of one, that the decoder does not compute: nothing is ignored that would change a logit.
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
    if family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported; supported: {sorted(FAMILIES)}.")
    refuse_unsupported(where, raw, {"quantization_config": None})
    return FAMILIES[family].read_config(where, raw)


def config_to_dict(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The contents of a config.json that transformers 4 and 5 both read; `dtype` is that of the weights' file."""
    raw = FAMILIES[config.family].config_to_dict(config) | {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_scale,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if isinstance(config.eos, tuple) else config.eos,
        "pad_token_id": config.pad,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if read_config(raw) != config:
        raise ValueError(f"a {config.family} config.json cannot express {config}; change `family` or the odd field.")
    return raw


@cache
def make_abstract_modules(config: DecoderConfig) -> AbstractModules:
    """The modules of a family without arrays: a pure function of `config`, memoized since each call traces a layer."""
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not supported; supported: {sorted(FAMILIES)}.")
    family = FAMILIES[config.family]
    layer = nnx.eval_shape(lambda: family.make_layer(config, lambda *shape: jnp.zeros(shape, jnp.float32)))
    norm = nnx.eval_shape(lambda: family.make_norm(config))
    (layer_graph, layer_state), (norm_graph, norm_state) = nnx.split(layer), nnx.split(norm)
    shapes = {
        name: {part: leaf.shape for part, leaf in parts.items()}
        for name, parts in nnx.to_pure_dict(layer_state).items()
    }
    ordered = {name: shapes[name] for name in family.layer_names if name in shapes}
    return AbstractModules(
        layer_graph,
        norm_graph,
        ordered,
        {part: leaf.shape for part, leaf in nnx.to_pure_dict(norm_state).items()},
    )


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer: name in the tree -> (in, out)."""
    return {
        name: parts["kernel"] for name, parts in make_abstract_modules(config).layer_shapes.items() if "kernel" in parts
    }


def peft_target_name(config: DecoderConfig, projection: str) -> str:
    """What peft calls a projection: the last part of its name, or all of it where two projections end alike."""
    names = [FAMILIES[config.family].layer_names[name] for name in projection_shapes(config)]
    full_name = FAMILIES[config.family].layer_names[projection]
    last = full_name.rpartition(".")[2]
    return full_name if [name.rpartition(".")[2] for name in names].count(last) > 1 else last


def find_target_projections(config: DecoderConfig, target_modules: Sequence[str]) -> list[str]:
    """The projections that `targets` mean, as peft reads them: all whose name ends so. No targets: the family's own."""
    family = FAMILIES[config.family]
    names = {name: f".{family.layer_names[name]}" for name in projection_shapes(config)}
    suffixes = [f".{end}" for end in target_modules or family.lora_targets]
    if unknown := sorted(end[1:] for end in suffixes if not any(name.endswith(end) for name in names.values())):
        known = ", ".join(peft_target_name(config, name) for name in names)
        raise ValueError(
            f"LoRA targets {list(target_modules)}: {config.family} has no {unknown}; the projections are {known}."
        )
    return [name for name, full_name in names.items() if full_name.endswith(tuple(suffixes))]
