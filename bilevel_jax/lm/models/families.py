"""The supported model families, their config.json and parameter names."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from bilevel_jax.lm.checkpoint.config_keys import ConfigKeys
from bilevel_jax.lm.checkpoint.files import read_json_object
from bilevel_jax.lm.hub.downloads import CONFIG_FILES, find_model_files
from bilevel_jax.lm.models import gemma3, gpt2, llama, neox
from bilevel_jax.lm.models.blocks import MatrixInit
from bilevel_jax.lm.models.config import DecoderConfig


class ModelFamily(NamedTuple):
    """What a family's file says."""

    read_config: Callable[[str, ConfigKeys], DecoderConfig]
    """(family, keys of config.json) -> configuration; ValueError for what its layer does not compute."""
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
    "ministral": LLAMA,
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
NEUTRAL_KEYS = frozenset(
    # notes and how a model is run
    "architectures transformers_version dtype torch_dtype name_or_path _name_or_path _commit_hash use_cache "
    "return_dict use_return_dict output_attentions output_hidden_states torchscript pretraining_tp "
    "chunk_size_feed_forward gradient_checkpointing attn_implementation _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled _experts_implementation "
    "_experts_implementation_internal reorder_and_upcast_attn tokenizer_class prefix n_ctx max_sequence_length "
    "model_max_length unsloth_fixed unsloth_version transformers.js_config is_decoder tie_last_hidden_states "
    # tokens that a decoder does not read
    "sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id "
    # dropout: this decoder has none, neither in training
    "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
    # heads of other tasks
    "id2label label2id num_labels problem_type finetuning_task task_specific_params classifier_dropout "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout "
    # of generation, as transformers 4 wrote them here
    "assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty "
    "do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
    "no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams "
    "num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate "
    "suppress_tokens target_lookbehind temperature tf_legacy_loss top_k top_p typical_p use_bfloat16".split()
)
"""Keys of config.json that change no logit, whatever their value."""
INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "quantization_config": (None,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, None),
    "use_qk_norm": (False,),
    "sliding_window": (None,),
}
"""Keys that a family may not read, with the values under which they change nothing."""


class AbstractModules(NamedTuple):
    """A decoder's modules without arrays: graphs to merge arrays into, and the arrays' shapes."""

    layer: Any
    norm: Any
    layer_shapes: dict[str, dict[str, tuple[int, ...]]]
    """name -> {kernel: (in, out), bias} or {scale, bias}; of one layer."""
    norm_shapes: dict[str, tuple[int, ...]]


def read_config(source: str | Path | Mapping[str, Any]) -> DecoderConfig:
    """The configuration in `source`: a folder with a config.json, that file, its contents, or a name on the hub.

    Reads the spellings of transformers 4 and 5. Defaults of missing keys are those of transformers. Raises ValueError
    for a model, or a feature of one, that the decoder does not compute, and for any key that is neither read nor known
    to change nothing: nothing is ignored that could change a logit.
    """
    if isinstance(source, Mapping):
        return _read_raw_config("config", source)
    path = find_model_files(source, CONFIG_FILES)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        hint = "give a Hugging Face model folder"
        if (path.parent / "adapter_config.json").is_file():
            hint = "the folder holds an adapter, and not the model that it belongs to"
        raise FileNotFoundError(f"{path}: no such file; {hint}.")
    return _read_raw_config(str(path), read_json_object(path))


def _read_raw_config(where: str, raw: Mapping[str, Any]) -> DecoderConfig:
    family = raw.get("model_type")
    if "auto_map" in raw:
        raise ValueError(
            f"{where}: the model is a program of its own (auto_map names {_list_programs(raw['auto_map'])}), and code "
            "of a model's folder is never run. Take a model of one of the supported families: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported; supported: {sorted(FAMILIES)}.")
    if family == "mistral" and "layer_types" in raw:
        family = "ministral"  # as transformers' AutoConfig reads it: the layers alternate
    keys = ConfigKeys(raw)
    try:
        keys.value("model_type")
        config = FAMILIES[family].read_config(family, keys)
        keys.refuse_others(NEUTRAL_KEYS, INERT_VALUES, of=f"a {family} config.json")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config


def _list_programs(auto_map: Any) -> str:
    """The files of code that auto_map names."""
    names = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return ", ".join(sorted({f"{str(name).split('--')[-1].split('.')[0]}.py" for name in names}))


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
