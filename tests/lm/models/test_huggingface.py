"""Model folders in and out: shards, names, the same arrays, and what is refused."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.builtin.cipher import make_cipher_tokenizer
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.models import init_params, load_model, read_config, read_source_files, save_model
from bilevel_jax.lm.models.config import rope_frequencies
from bilevel_jax.lm.models.source_files import find_hub_name, write_tokenizer
from tests.lm.models.test_families import (
    CONFIGS,
    PLAIN,
    SMALL,
    TINY,
    draw_tokens,
    largest,
    logits,
    make,
    torch_logits,
)


def test_names_without_their_first_part(tmp_path):
    """As in GPT-2's own files, which also hold the causal mask."""
    pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    make("gpt2", tmp_path / "whole").base_model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    assert "wte.weight" in tensors
    save_file({**tensors, "h.0.attn.bias": np.tri(4, dtype=np.float32)[None, None]}, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "base")[1], load_model(tmp_path / "whole")[1])


HEADS = {
    "qwen2": "lm_head.weight",
    "gpt2": "lm_head.weight",
    "gemma3": "lm_head.weight",
    "llama-tied": "lm_head.weight",
}
HEADS["gpt-neox-sequential"] = "embed_out.weight"


@pytest.mark.parametrize("family, head", HEADS.items(), ids=HEADS)
def test_a_tied_model_with_a_head_of_its_own(tmp_path, family, head):
    """transformers 5 does not tie what differs; a head that equals the embeddings is the tied one."""
    pytest.importorskip("torch")
    import transformers
    from safetensors.numpy import load_file, save_file

    make(family, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, (config, params) = load_file(file), load_model(tmp_path)
    assert config.tied_embeddings and head not in tensors
    embed = np.asarray(params["embed"])
    save_file({**tensors, head: embed}, file, metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)
    own = embed + np.random.default_rng(0).normal(0, 0.1, embed.shape).astype(np.float32)
    save_file({**tensors, head: own}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors: {head} has other values than .*config.json ties it. Set"):
        load_model(tmp_path)
    tokens = draw_tokens(config.vocab_size)
    theirs = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))  # the remedy
    config, params = load_model(tmp_path)
    assert largest(logits(config, params, tokens) - theirs) < 1e-5  # float32, other order of sums
    save_file({**tensors, head: embed[:-1].copy()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{head}: the file has"):
        load_model(tmp_path)


def rotary(config, **changes):
    return rope_frequencies(replace(config.rope, **changes), config.head_dim)


BUFFERS = {  # id: (config, name, values, what the error says)
    "mask": ("gpt2", "transformer.h.0.attn.bias", lambda c: np.tri(9, dtype=bool)[None, None], None),
    "mask of bytes": ("neox", "gpt_neox.layers.1.attention.bias", lambda c: np.tri(9, dtype=np.uint8)[None], None),
    "masked score": ("neox", "gpt_neox.layers.1.attention.masked_bias", lambda c: np.float32([-1e9])[0], None),
    "frequencies": ("plain", "model.layers.0.self_attn.rotary_emb.inv_freq", rotary, None),
    "half": ("plain", "model.layers.0.self_attn.rotary_emb.inv_freq", lambda c: rotary(c).astype(np.float16), None),
    "before scaling": (
        "llama3",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        lambda c: rotary(c, scaling="default"),
        None,
    ),
    "partial": ("neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", rotary, None),
    "sees all": ("gpt2", "transformer.h.0.attn.bias", lambda c: np.ones((1, 1, 9, 9), bool), "a causal mask of other"),
    "sees later": ("gpt2", "transformer.h.0.attn.bias", lambda c: np.tri(9, dtype=bool).T[None, None], "a causal mask"),
    "window": ("gpt2", "transformer.h.0.attn.bias", lambda c: np.tri(9) - np.tri(9, k=-3), "a causal mask of other"),
    "learned": ("gpt2", "transformer.h.0.attn.bias", lambda c: np.ones(16, np.float32), "a causal mask of other value"),
    "weak mask": ("gpt2", "transformer.h.0.attn.masked_bias", lambda c: np.float32(-1.0), "a masked score of other va"),
    "theta": (
        "plain",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        lambda c: rotary(c, theta=5e5),
        "rotary frequencies of other values than the model of its config.json computes; correct config.json",
    ),
    "length": ("plain", "model.rotary_emb.inv_freq", lambda c: np.ones(3, np.float32), "rotary frequencies of other"),
    "rope of gpt2": ("gpt2", "transformer.rotary_emb.inv_freq", lambda c: np.ones(2, np.float32), "unexpected 1"),
    "mask of llama": ("plain", "model.layers.0.attn.bias", lambda c: np.tri(9, dtype=bool), "unexpected 1"),
}  # fmt: skip


@pytest.mark.parametrize("name, tensor, make_values, message", BUFFERS.values(), ids=BUFFERS)
def test_what_is_not_loaded_is_looked_at(tmp_path, name, tensor, make_values, message):
    from safetensors.numpy import load_file, save_file

    config = replace(CONFIGS[name], biased_projections=()) if name == "llama3" else CONFIGS[name]
    params = init_params(config, jax.random.key(0))
    save_model(tmp_path / "model", config, params)
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), tensor: np.array(make_values(config), order="C")}, file)
    if message is None:
        jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "model")[1], params)
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "model")
    assert tensor in str(caught.value)


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


CARRIED = {  # what lies beside config and weights in folders on the hub, with bytes that no parser would keep
    "tokenizer.json": b'{"version":"1.0" }',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast",\r\n "chat_template": "{{ a }}"}',
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b'{"<|tool|>":400}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\na b",
    "tokenizer.model": bytes(range(256)),
    "sentencepiece.bpe.model": b"\x00\xff",
    "qwen.tiktoken": b"IQ== 0\n",
    "tekken.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [0, 2], "temperature": 0.6}',
    "chat_template.jinja": b"{{ messages }}\n\n",
    "chat_template.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"tools",
    "LICENSE": b"terms",
    "NOTICE.txt": b"notice",
}
NOT_CARRIED = ("README.md", "pytorch_model.bin", "optimizer.pt", "modeling_own.py", "trainer_state.json")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002], ids=oct)
def test_a_saved_model_carries_the_source_files(tmp_path, umask):
    source, out = tmp_path / "source", tmp_path / "out"
    params = init_params(TINY, jax.random.key(0))
    save_model(source, TINY, params)
    (source / "additional_chat_templates").mkdir()
    for name, contents in {**CARRIED, **dict.fromkeys(NOT_CARRIED, b"of the source alone")}.items():
        (source / name).write_bytes(contents)
        (source / name).chmod(0o400)
    own = {"_name_or_path": "/home/someone/model", "transformers_version": "4.40.0", "attention_dropout": 0.1}
    raw = json.loads((source / "config.json").read_text()) | own | {"eos_token_id": [1, 2], "pretraining_tp": 1}
    (source / "config.json").write_text(json.dumps(raw))
    before = os.umask(umask)
    try:
        save_model(out, read_config(source), params, source_files=read_source_files(source))
    finally:
        os.umask(before)
    written = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert set(written) == {"config.json", "model.safetensors", *CARRIED}
    assert {name: written[name].read_bytes() for name in CARRIED} == CARRIED
    assert json.loads(written["config.json"].read_text()) == {
        key: value for key, value in raw.items() if key != "_name_or_path"
    }
    modes = {path.stat().st_mode & 0o777 for path in written.values()}
    assert modes == {0o666 & ~umask} and out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_config_says_what_the_tensors_are(tmp_path):
    """Where a checkpoint overrules its config, or lacks a spelling, what is written holds."""
    save_model(tmp_path / "source", TINY, init_params(TINY, jax.random.key(0)))
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    raw |= {"tie_word_embeddings": True, "dtype": "bfloat16"}
    del raw["rope_theta"], raw["torch_dtype"]  # as transformers 5 writes it
    files = {"config.json": json.dumps(raw).encode()}
    save_model(tmp_path / "out", TINY, init_params(TINY, jax.random.key(0)), source_files=files)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["rope_theta"] == 10000.0
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert read_config(tmp_path / "out") == TINY
    with pytest.raises(ValueError, match="a tokenizer and source_files"):
        save_model(tmp_path / "no", TINY, {}, tokenizer=object(), source_files=files)


def test_a_tokenizer_is_written_for_both_versions_of_transformers(tmp_path):
    write_tokenizer(tmp_path, make_cipher_tokenizer())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # version 4 knows no TokenizersBackend
    assert not {"is_local", "local_files_only", "backend"} & set(settings)
    assert load_tokenizer(tmp_path)("ab")["input_ids"] == make_cipher_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize(
    "folder, name",
    [
        ("hub/models--someone--a-model/snapshots/0123abcd", "someone/a-model"),
        ("hub/models--gpt2/snapshots/0123abcd", "gpt2"),
        ("snapshots/checkpoint-500", None),
        ("models--someone--a-model", None),
    ],
)
def test_only_a_name_on_the_hub_names_a_base(tmp_path, folder, name):
    found = find_hub_name(tmp_path / folder)
    assert (found and (found.repo, found.revision)) == (name and (name, "0123abcd"))


HF = {"model_type": "llama", **SMALL}
GEMMA_HF = {**HF, "model_type": "gemma3_text", "head_dim": 8}
NEOX_HF = {**HF, "model_type": "gpt_neox", "num_key_value_heads": 4}
GPT2_HF = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
REFUSED = {
    "family": (HF, {"model_type": "bert"}, r"'bert' is not supported; supported: \['gemma3_text', 'gpt2', 'gpt_neox'"),
    "rope": (HF, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: type 'yarn' is not supported"),
    "partial": (HF, {"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25 is not supported"),
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
