"""Model folders in and out: shards, names, the same arrays, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.models import init_params, load_model, read_config, save_model
from tests.lm.models.test_families import CONFIGS, PLAIN, SMALL, TINY, make


def test_names_without_their_first_part(tmp_path):
    """As in GPT-2's own files, which also hold the causal mask."""
    pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    make("gpt2", tmp_path / "whole").base_model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    assert "wte.weight" in tensors
    save_file({**tensors, "h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "base")[1], load_model(tmp_path / "whole")[1])


def test_reads_shards(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    whole, shards = load_model(tmp_path / "whole"), load_model(tmp_path / "shards")
    assert whole[0] == shards[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1], shards[1])


@pytest.mark.parametrize(
    "name, dtype", [(name, jnp.float32) for name in ("qwen3", "neox", "gpt2", "gemma3")] + [("gpt2", jnp.bfloat16)]
)
def test_save_and_load_give_the_same_arrays(tmp_path, name, dtype):
    config = replace(CONFIGS[name], bos=0, eos=1, pad=2)
    params = init_params(config, jax.random.key(0), dtype=dtype)
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    save_model(tmp_path / "model", config, params)
    again, loaded = load_model(tmp_path / "model", dtype=dtype)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder is left


def test_save_refuses(tmp_path):
    params = init_params(TINY, jax.random.key(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty; give another folder"):
        save_model(tmp_path / "full", TINY, params)
    with pytest.raises(ValueError, match="merge the adapters first"):
        save_model(tmp_path / "new", TINY, {**params, "lora": {}})
    with pytest.raises(ValueError, match="qwen2 config.json cannot express"):
        save_model(tmp_path / "new", replace(TINY, family="qwen2"), params)  # qwen2 has biases
    assert not (tmp_path / "new").exists()


HF = {"model_type": "llama", **SMALL}
NEOX_HF, GEMMA_HF = {**HF, "model_type": "gpt_neox"}, {**HF, "model_type": "gemma3_text", "head_dim": 8}
GPT2_HF = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
REFUSED = {
    "family": (HF, {"model_type": "bert"}, r"'bert' is not supported; supported: \['gemma3_text', 'gpt2', 'gpt_neox'"),
    "rope": (HF, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported"),
    "partial": (HF, {"partial_rotary_factor": 0.25}, "partial_rotary_factor is not supported"),
    "activation": (HF, {"hidden_act": "mish"}, r"hidden_act 'mish' is not supported; supported: \['gelu'"),
    "quantised": (HF, {"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
    "heads": (HF, {"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
    "neox-odd": (NEOX_HF, {"rotary_pct": 0.4}, "3 of the 8 coordinates of a head are rotated"),
    "neox-rope": (NEOX_HF, {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
    "neox-width": (NEOX_HF, {"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
    "gpt2-scale": (GPT2_HF, {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
    "gpt2-layers": (GPT2_HF, {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True is not supported"),
    "gpt2-cross": (GPT2_HF, {"add_cross_attention": True}, "add_cross_attention True is not supported"),
    "gpt2-width": (GPT2_HF, {"n_embd": 30}, "n_embd 30 is not a multiple of n_head 4"),
    "gemma-cap": (GEMMA_HF, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
    "gemma-both": (GEMMA_HF, {"use_bidirectional_attention": True}, "bidirectional_attention True is not supported"),
    "gemma-rope": (GEMMA_HF, {"rope_parameters": PLAIN}, r"rope_parameters has \['rope_theta', 'rope_type'\]"),
    "gemma-window": (GEMMA_HF, {"sliding_window": None}, "sliding_window None with layers of sliding_attention"),
}


@pytest.mark.parametrize("raw, change, message", REFUSED.values(), ids=REFUSED)
def test_read_config_refuses(raw, change, message):
    read_config(raw)
    with pytest.raises(ValueError, match=message):
        read_config({**raw, **change})


def test_read_config_names_missing_keys(tmp_path):
    with pytest.raises(ValueError, match="no vocab_size, hidden_size"):
        read_config({key: value for key, value in HF.items() if key not in ("vocab_size", "hidden_size")})
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        read_config(tmp_path)


def test_load_names_what_does_not_fit(tmp_path):
    save_model(tmp_path / "model", TINY, init_params(TINY, jax.random.key(0)))
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())

    def load_with(**changes):
        path.write_text(json.dumps({**raw, **changes}))
        return load_model(tmp_path / "model")

    with pytest.raises(ValueError, match=r"Missing 9: \['model.layers.2.input_layernorm.weight'"):
        load_with(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"unexpected 9: \['model.layers.1.input_layernorm.weight'"):
        load_with(num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight: the file has \(31, 16\), the configuration .*\(32, 16\)"
    ):
        load_with(vocab_size=32)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors; only safetensors are read"):
        load_with()
