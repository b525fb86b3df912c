"""config.json in many spellings: the logits of transformers, or a refusal that names the key."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.checkpoint.config_keys import ConfigKeys
from bilevel_jax.lm.models import load_model, make_decoder, read_config
from bilevel_jax.lm.models.families import FAMILIES, INERT_VALUES, NEUTRAL_KEYS
from tests.lm.models.test_families import draw_tokens, largest, torch_logits

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
GROUPED = {**SIZES, "num_key_value_heads": 2}
BASES = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 8, "head_dim": 8},
    "ministral": {**GROUPED, "sliding_window": 8, "head_dim": 8},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma3_text": {
        **{**GROUPED, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
        "query_pre_attn_scalar": 16,
    },
    "gpt_neox": SIZES,
    "gpt2": {"vocab_size": 97, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = ["sliding_attention", "full_attention"]
LAYERED = {"full_attention": {"rope_type": "default", "rope_theta": 300.0}}
EQUAL = {  # family -> what a file adds to its base; the logits are those of transformers
    "llama": [
        {"rope_theta": 500},
        {"rope_scaling": LINEAR},
        {"rope_scaling": {**LINEAR, "rope_type": "linear"}, "rope_theta": 500.0},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_theta": 300.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
        {"rope_parameters": {**LLAMA3, "rope_theta": 300.0}, "original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 32},
        {"num_key_value_heads": None, "head_dim": 12},
        {"hidden_act": "gelu_fast", "rms_norm_eps": 1e-3, "pad_token_id": -1},
        {"partial_rotary_factor": 1.0, "is_causal": True, "unknown": None, "layer_types": ["full_attention"] * 2},
        {"attention_dropout": 0.5, "pretraining_tp": 2, "temperature": 0.3, "architectures": ["GPT2LMHeadModel"]},
        {"is_decoder": True, "output_hidden_states": True, "num_labels": 5, "chunk_size_feed_forward": 3},
    ],
    "mistral": [
        {},
        {"sliding_window": None},
        {"layer_types": MIXED},
        {"layer_types": None},
        {"layer_types": ["full_attention"] * 2},
    ],
    "ministral": [{"layer_types": MIXED}, {"layer_types": ["sliding_attention"] * 2, "rope_scaling": LINEAR}],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"sliding_window": 4, "max_window_layers": 0, "attention_bias": False},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32, "head_dim": 12},
    ],
    "qwen3": [{"attention_bias": True, "use_sliding_window": True, "sliding_window": None}, {"head_dim": 12}],
    "gemma3_text": [
        {"sliding_window_pattern": 1},
        {"layer_types": MIXED, "_sliding_window_pattern": 6, "hidden_act": "gelu_pytorch_tanh"},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500.0, "rope_local_base_freq": 30.0},
        {"rope_parameters": LAYERED, "rope_scaling": LLAMA3, "rope_local_base_freq": 30.0},
    ],
    "gpt_neox": [
        {"rotary_emb_base": 300, "rope_theta": 300.0, "rotary_pct": 0.5, "head_dim": 8},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32, "rotary_pct": 1.0},
        {"use_parallel_residual": False, "is_decoder": True, "num_key_value_heads": 4},
    ],
    "gpt2": [
        {"hidden_size": 32, "n_ctx": 64, "n_inner": 24},
        {"summary_type": "last", "reorder_and_upcast_attn": True},
    ],
}
EVERY = [  # refused in every family: what a file adds, and what the error says
    ({"is_causal": False}, r"is_causal False \(supported: True\) is not supported in a \w+ config.json"),
    ({"is_causal": None}, r"is_causal None \(supported: True\)"),  # false, as transformers reads it
    ({"is_encoder_decoder": True}, "is_encoder_decoder True"),
    (
        {"auto_map": {"AutoConfig": "code.Config"}},
        "auto_map names code.py\\), and code of a model's folder is never run",
    ),
    ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "per_layer_config"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"attention_chunk_size": 8}, "attention_chunk_size 8"),
    ({"embedding_multiplier": 2.0, "logits_scaling": 3.0}, "embedding_multiplier 2.0, logits_scaling 3.0 are not"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it is true or false"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings is null; it is true or false"),
    ({"vocab_size": "97"}, "vocab_size is '97'; it is a whole number from 1 to"),
    ({"vocab_size": 97.0}, "vocab_size is 97.0; it is a whole number"),
    ({"vocab_size": True}, "vocab_size is True; it is a whole number"),
    ({"vocab_size": -97}, "vocab_size is -97; it is a whole number"),
    ({"vocab_size": 0}, "vocab_size is 0; it is a whole number"),
    ({"vocab_size": None}, "vocab_size is null; it is a whole number"),
    ({"vocab_size": [97]}, r"vocab_size is \[97\]; it is a whole number"),
    ({"vocab_size": 10**40}, "vocab_size is 1000.*; it is a whole number"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it is a whole number from -1 to .* or null"),
    ({"eos_token_id": []}, r"eos_token_id is \[\]; it is a token id or a list of token ids or null"),
    ({"eos_token_id": [1, "2"]}, r"eos_token_id is \[1, '2'\]"),
    ({"bos_token_id": 1.5}, "bos_token_id is 1.5"),
    ({"initializer_range": math.nan}, "initializer_range is nan; it is a finite number of at least 0"),
    ({"model_type": None}, "model_type None is not supported; supported: "),
    ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    ({"model_type": "\ud800"}, r"model_type '\\ud800' is not supported"),
    ({"\ud800\x1b[31m": 1}, r"\\ud800\\x1b\[31m 1 is not supported"),
]
REFUSED = {  # family -> what a file adds, and what the error says
    "llama": [
        ({"layer_types": MIXED}, "sliding_window None with layers of sliding_attention"),
        ({"layer_types": ["full_attention"]}, r"layer_types \['full_attention'\] for 2 layers"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; it is a list of strings"),
        ({"sliding_window": 4}, r"sliding_window 4 \(supported: None\)"),
        ({"num_hidden_layer": 2}, "num_hidden_layer 2 .is 'num_hidden_layers' meant"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it is a whole number from 1 to 10000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"hidden_size": 3}, "0 of the 0 coordinates of a head are rotated"),
        ({"head_dim": 7}, "7 of the 7 coordinates of a head are rotated"),
        ({"head_dim": 0}, "head_dim is 0; it is a whole number from 1 to .* or null"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it is a finite number of at least 0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\] is not supported; supported"),
        ({"attention_bias": 1}, "attention_bias is 1; it is true or false"),
        ({"rope_theta": None}, "rope_theta is null; it is a finite number above 0"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": [LINEAR]}, "rope_scaling is .*; it is a JSON object or null"),
        ({"rope_scaling": {"type": "linear"}}, "no factor; rope_scaling of rope_type 'linear' has them"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor is 0; it is a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling: factor is '4'"),
        ({"rope_scaling": {**LINEAR, "rope_type": "default"}}, "rope_type 'default' and type 'linear'; which one"),
        ({"rope_scaling": {**LINEAR, "attention_factor": 2.0}}, "rope_scaling: attention_factor 2.0 is not supported"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"type": "default", "factor": 4.0}}, "factor 4.0 is not supported in rope_scaling of"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor, high_freq_factor; rope"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "64"}}, "embeddings is '64'"),
        ({"rope_parameters": LAYERED}, "rope_parameters: full_attention .* is not supported"),
        ({"rotary_pct": 0.5}, "rotary_pct 0.5"),
        ({"mlp_bias": None}, "mlp_bias is null"),
    ],
    "mistral": [
        ({"sliding_window": 0}, "sliding_window is 0; it is a whole number from 1 to .* or null"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types .'chunked_attention'.* known: full_attention"),
        ({"layer_types": MIXED, "sliding_window": None}, "sliding_window None with layers of sliding_attention"),
        ({"attention_bias": True}, r"attention_bias True \(supported: False\)"),
    ],
    "qwen2": [
        ({"layer_types": MIXED}, "use_sliding_window is not true, with layer_types of sliding_attention"),
        ({"attention_bias": True}, r"attention_bias True \(supported: False\)"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
    ],
    "qwen3": [({"head_dim": None}, "head_dim is null"), ({"mlp_bias": True}, "mlp_bias True")],
    "gemma3_text": [
        ({"rope_scaling": LINEAR}, "rope_type 'default' and type 'linear'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported beside hidden_activation"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"rope_parameters": {"full_attention": [1]}}, "rope_parameters: full_attention is .1.; it is a JSON object"),
        ({"original_max_position_embeddings": 32}, "original_max_position_embeddings 32"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it is a finite number above 0"),
    ],
    "gpt_neox": [
        ({"rope_theta": 500.0}, "rope_theta 500.0 is not supported beside rotary_emb_base; supported: 10000.0"),
        ({"rotary_emb_base": 300, "rope_theta": 500.0}, "rope_theta 500.0 .*; supported: 300.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported beside rotary_pct"),
        ({"head_dim": 12}, "head_dim 12 is not supported; supported: 8"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not supported; supported: 4"),
    ],
    "gpt2": [
        ({"hidden_size": 48}, "hidden_size 48 is not supported beside n_embd 32"),
        ({"max_position_embeddings": 64}, "max_position_embeddings 64 is not supported beside n_positions 128"),
        ({"scale_attn_weights": None}, "scale_attn_weights None is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001 .is 'layer_norm_epsilon' meant"),
    ],
}


def rows(table, *, fast=None):
    """The rows of each family, those after the first `fast` marked slow."""
    return [
        pytest.param(
            family,
            *(row if isinstance(row, tuple) else (row,)),
            id=f"{family}-{i}",
            marks=[pytest.mark.slow] * (fast is not None and i >= fast),
        )
        for family, changes in table.items()
        for i, row in enumerate(changes)
    ]


@pytest.mark.parametrize("family, change", rows(EQUAL, fast=3))
def test_logits_equal_transformers(tmp_path, family, change):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    raw = json.dumps({"model_type": family, **BASES[family], **change})
    (tmp_path / "config.json").write_text(raw)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(raw)  # save_pretrained wrote it in its own spelling
    config, params = load_model(tmp_path)
    tokens = draw_tokens(config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    decoder = make_decoder(config)
    with jax.disable_jit():  # small arrays of the same shapes: what is compiled is shared by all rows
        out = decoder.hidden(params, jnp.asarray(tokens), positions, jnp.ones_like(positions)) @ decoder.head(params)
    expected = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens)
    assert largest(expected) > 1
    assert largest(out - expected) < 2e-5  # float32, other order of sums


@pytest.mark.parametrize("family, change, message", rows(REFUSED | {"llama": [*EVERY, *REFUSED["llama"]]}))
def test_refusals_name_the_key(family, change, message):
    raw = {"model_type": family, **BASES[family]}
    read_config(raw)
    with pytest.raises(ValueError, match=message) as caught:
        read_config({**raw, **change})
    assert str(caught.value).startswith("config: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refuses_what_none_computes(family):
    assert set(BASES) == set(FAMILIES)
    for change, message in EVERY:
        with pytest.raises(ValueError, match=message):
            read_config({"model_type": family, **BASES[family], **change})
    every = {**dict.fromkeys(NEUTRAL_KEYS, 3), "is_causal": True, "sep_token_id": None, "unheard_of": None}
    assert read_config({"model_type": family, **BASES[family], **every}) == read_config(
        {"model_type": family, **BASES[family]}
    )


def test_layers_that_alternate_are_saved_as_ministral():
    config = read_config({"model_type": "mistral", **BASES["mistral"], "layer_types": MIXED})
    assert (config.family, config.windows) == ("ministral", (8, 0))


def test_inert_values_are_true_to_their_type():
    keys = ConfigKeys({"is_encoder_decoder": 0, "partial_rotary_factor": 1})
    with pytest.raises(ValueError, match=r"^is_encoder_decoder 0 \(supported: False\) is not supported in it"):
        keys.refuse_others((), INERT_VALUES, of="it")
    keys = ConfigKeys({"is_encoder_decoder": False, "partial_rotary_factor": 1})
    keys.refuse_others((), INERT_VALUES, of="it")


def test_default_tokens_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        theirs = transformers.AutoConfig.for_model(family)
        ours = read_config({"model_type": family, **BASES[family]})
        assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id), family
        assert np.isclose(ours.eps, getattr(theirs, "rms_norm_eps", None) or
                          getattr(theirs, "layer_norm_eps", None) or theirs.layer_norm_epsilon)  # fmt: skip
