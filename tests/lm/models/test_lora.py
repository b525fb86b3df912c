"""Adapters: against peft both ways, the gauge, folding, and what may be trained."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bilevel_jax.lm.models import (
    balance_adapters,
    init_lora,
    init_params,
    join_adapters,
    load_model,
    load_peft,
    make_decoder,
    merge_adapters,
    save_peft,
)
from bilevel_jax.lm.models.lora import Adapter
from tests.lm.models.test_families import CONFIGS, NEOX_BIASES, TINY, compiled, make

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9)).astype(np.int32)


def logits(config, params, tokens=TOKENS):
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return np.asarray(compiled(config)(params, tokens, positions, jnp.ones_like(tokens)))


def trained(config, *, dtype=jnp.float32, **options):
    """Adapters away from their start: B is not zero."""
    options = {"rank": 3, "alpha": 6, "target_modules": ALL, **options}
    adapters = init_lora(config, jax.random.key(1), dtype=dtype, **options)
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(adapters["lora"])))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape, jnp.float32).astype(dtype), adapters)


def change(adapters, function):
    """Apply (a, b) -> (a, b) to every adapter."""
    return {"lora": {name: Adapter(*function(x.a, x.b), x.scale) for name, x in adapters["lora"].items()}}


def products(adapters):
    return {name: np.asarray(x.a @ x.b) for name, x in adapters["lora"].items()}


# peft asks a model for a property that transformers has renamed
PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """family -> the folder of a base model saved by transformers."""
    pytest.importorskip("peft")
    folders = {}

    def made(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            make(family, folders[family])
        return folders[family]

    return made


def peft_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS).long()).logits.numpy()


# id: (row of FAMILIES, what we target, what the saved configuration says)
TARGETS = {
    "llama": ("llama-untied-theta-5e5", (), ["q_proj", "v_proj"]),
    "llama-all": ("llama-untied-theta-5e5", ALL, sorted(ALL)),
    "neox": ("gpt-neox", (), ["query_key_value"]),
    "neox-all": ("gpt-neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), None),
    "gpt2": ("gpt2", (), ["c_attn"]),
    "gpt2-all": ("gpt2", ("c_attn", "c_proj", "c_fc"), ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]),
    "gpt2-one": ("gpt2", ("mlp.c_proj",), ["mlp.c_proj"]),
    "gemma3": ("gemma3", (), ["q_proj", "v_proj"]),
}


@PEFT
@pytest.mark.parametrize("family, targets, named", TARGETS.values(), ids=TARGETS)
def test_peft_reads_what_we_save(base, tmp_path, family, targets, named):
    import peft
    import transformers

    config, params = load_model(base(family))
    adapters = trained(config, target_modules=targets)
    save_peft(tmp_path / "adapter", config, adapters, base="someone/a-model")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["target_modules"] == (named or sorted(targets))
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base(family)), str(tmp_path / "adapter")
    )
    ours = logits(config, join_adapters(params, adapters))
    np.testing.assert_allclose(peft_logits(model), ours, atol=1e-5)  # float32, other order of sums
    assert np.abs(ours - logits(config, params)).max() > 0.1
    again = load_peft(tmp_path / "adapter", config)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@PEFT
@pytest.mark.parametrize(
    "family, targets, options",
    [
        ("llama-untied-theta-5e5", ["q_proj", "down_proj"], {}),
        ("llama-untied-theta-5e5", ["q_proj", "down_proj"], {"use_rslora": True}),
        ("llama-untied-theta-5e5", "all-linear", {"lora_dropout": 0.5}),
        ("llama-untied-theta-5e5", r".*\.(v|up)_proj", {"init_lora_weights": "gaussian"}),
        ("gpt-neox", ["query_key_value", "dense"], {}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        ("gemma3", ["o_proj", "up_proj"], {}),
    ],
    ids=["llama", "rslora", "all-linear", "regexp", "neox", "gpt2", "gemma3"],
)
def test_we_read_what_peft_saves(base, tmp_path, family, targets, options):
    import peft
    import torch
    import transformers

    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base(family)), options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    config, params = load_model(base(family))
    ours = logits(config, join_adapters(params, load_peft(tmp_path, config)))
    np.testing.assert_allclose(ours, peft_logits(model), atol=1e-5)  # float32, other order of sums


# id: (what adapter_config.json says besides, what the error says); the first ones change peft's logits
REFUSED = {
    **{
        kind: (
            {"init_lora_weights": kind},
            f"init_lora_weights '{kind}' is not supported .such an adapter may stand on a",
        )
        for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new")
    },
    "alora": ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens \[5, 6\] \(supported: None\)"),
    "dora": ({"use_dora": True}, r"use_dora True \(supported: False\) is not supported in an adapter of plain LoRA\.$"),
    "qalora": ({"use_qalora": True}, "use_qalora True"),
    "bias": ({"bias": "lora_only"}, "bias 'lora_only' is not supported; supported: 'none'"),
    "lora-bias": ({"lora_bias": True}, "lora_bias True"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save .'lm_head'."),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern .'q_proj': 2."),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "layers": ({"layers_to_transform": [0], "layers_pattern": "layers"}, "layers_to_transform .0.*, layers_pattern"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
    "excluded": ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying True"),
    "variants": ({"kasa_config": {}, "velora_config": {}}, "kasa_config .*, velora_config .* are not supported"),
    "unknown": (
        {"a_new_method": 3},
        "a_new_method 3 is not supported .* and could change what is computed; delete what",
    ),
    "near": ({"user_dora": True}, "user_dora True .is 'use_dora' meant.. is not supported"),
    "type": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported: 'LORA'"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported; supported: 'CAUSAL_LM' or None"),
    "rank-0": ({"r": 0}, "r is 0; it is a whole number from 1 to"),
    "rank-text": ({"r": "3"}, "r is '3'"),
    "alpha-text": ({"lora_alpha": "16"}, "lora_alpha is '16'; it is a finite number"),
    "alpha-null": ({"lora_alpha": None}, "lora_alpha is null; it is a finite number"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora is 'yes'; it is true or false"),
    "targets-number": ({"target_modules": [1]}, "target_modules is .1.; it is a list of names, a regular expression"),
    "targets-none": (
        {"target_modules": "nothing"},
        "target_modules 'nothing' matches no projection, such as model.lay",
    ),
    "targets-pattern": ({"target_modules": "("}, "target_modules '.' is no regular expression"),
    "targets-layer": ({"target_modules": ["0.self_attn.q_proj"]}, r"\['q_proj'\] in some of the 2 layers only"),
    "targets-head": ({"target_modules": ["q_proj", "lm_head"]}, r"llama has no \['lm_head'\]; the projections are"),
    "targets-fewer": ({"target_modules": ["q_proj"]}, "Missing 0: ..; unexpected 24"),
}


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    save_peft(folder, TINY, trained(TINY))
    return folder


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_load_peft_names_what_is_not_plain_lora(saved_adapter, tmp_path, change, message):
    shutil.copytree(saved_adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    about = json.loads(path.read_text())
    inert = {"init_lora_weights": "orthogonal", "rank_pattern": {}, "modules_to_save": None, "task_type": None}
    path.write_text(json.dumps({**about, **inert, "loftq_config": {}, "not_yet_known": None}))
    jax.tree.map(np.testing.assert_array_equal, load_peft(path.parent, TINY), load_peft(saved_adapter, TINY))
    path.write_text(json.dumps({**about, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        load_peft(path.parent, TINY)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)


@PEFT
@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"alora_invocation_tokens": [5, 6]}],
    ids=["pissa", "olora", "alora"],
)
def test_what_peft_computes_otherwise_is_refused(base, tmp_path, options):
    import peft
    import torch
    import transformers

    folder = base("llama-untied-theta-5e5")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), str(tmp_path))
    config, params = load_model(folder)
    path = tmp_path / "adapter_config.json"
    with pytest.raises(ValueError, match=f"{path}: .* is not supported"):
        load_peft(tmp_path, config)
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "init_lora_weights": True, "alora_invocation_tokens": None}))
    as_plain_lora = logits(config, join_adapters(params, load_peft(tmp_path, config)))
    assert np.abs(as_plain_lora - peft_logits(model)).max() > 0.1


def test_load_peft_refuses_files_that_do_not_fit(saved_adapter, tmp_path):
    shutil.copytree(saved_adapter, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def load_with(tensors, config=TINY):
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        return load_peft(tmp_path / "adapter", config)

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"Missing 14: \['base_model.model.model.layers.2"):
        load_peft(saved_adapter, replace(TINY, layers=3))
    with pytest.raises(ValueError, match=r"lora_A.weight: the file has \(3, 16\), .* asks for \(3, 32\)"):
        load_peft(saved_adapter, replace(TINY, width=32))
    for extra in ("base_model.model.lm_head.weight", name.replace("lora_A.weight", "lora_magnitude_vector")):
        with pytest.raises(ValueError, match=f"unexpected 1: .'{extra}'"):
            load_with({**tensors, extra: np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=f"Missing 1: .'{name}'"):
        load_with({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=f"{name} has 48 NaN or infinite values of 48"):
        load_with({**tensors, name: tensors[name] * np.nan})
    with pytest.raises(ValueError, match=f"{name} is I32, which is not supported"):
        load_with({**tensors, name: tensors[name].astype(np.int32)})
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file; give a PEFT adapter folder"):
        load_peft(tmp_path, TINY)
    for key in ("peft_type", "r", "lora_alpha", "target_modules"):
        about = json.loads((saved_adapter / "adapter_config.json").read_text())
        about.pop(key)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"no {key}; an adapter_config.json of LoRA has them"):
            load_peft(tmp_path / "adapter", TINY)


def test_fresh_adapters_change_nothing(x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    adapters = init_lora(TINY, jax.random.key(1), rank=3, alpha=6, dtype=jnp.float64)
    np.testing.assert_allclose(logits(TINY, join_adapters(params, adapters)), logits(TINY, params), atol=1e-13)  # B = 0
    single = init_lora(TINY, jax.random.key(1), rank=3, alpha=6)
    jax.tree.map(np.testing.assert_array_equal, single, adapters)  # drawn in float32, cast
    more = init_lora(TINY, jax.random.key(1), rank=3, alpha=6, target_modules=ALL)
    np.testing.assert_array_equal(more["lora"]["v_proj"].a, single["lora"]["v_proj"].a)  # a target does not move others


EVERY = {"plain": ALL, "neox": NEOX_BIASES, "gpt2": ("c_attn", "c_proj", "c_fc"), "gemma3": ALL}


@pytest.mark.parametrize("name", EVERY)
def test_merged_equals_joined(name, x64):
    config = CONFIGS[name]
    params = init_params(config, jax.random.key(0), dtype=jnp.float64)
    adapters = trained(config, dtype=jnp.float64, target_modules=EVERY[name])
    out = logits(config, join_adapters(params, adapters))
    np.testing.assert_allclose(
        logits(config, merge_adapters(params, adapters)), out, atol=1e-12
    )  # float64, other order of sums
    assert np.abs(out - logits(config, params)).max() > 0.1


def test_frozen_base_in_bfloat16_is_upcast():
    stored = init_params(TINY, jax.random.key(0), dtype=jnp.bfloat16)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    adapters = trained(TINY)
    out = logits(TINY, join_adapters(stored, adapters))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, logits(TINY, join_adapters(upcast, adapters)), atol=1e-6)  # float32 rounding
    folded = merge_adapters(stored, adapters)["layers"]["q_proj"]["kernel"]
    assert folded.dtype == jnp.float32  # in bfloat16 it would lose the adapter


def test_only_factors_are_trained():
    params, adapters = init_params(TINY, jax.random.key(0)), trained(TINY, target_modules=("q_proj", "up_proj"))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(adapters)]
    assert paths == [f"['lora']['{name}'].{part}" for name in ("q_proj", "up_proj") for part in "ab"]
    model = make_decoder(TINY)
    tokens = jnp.asarray(TOKENS)

    def loss(adapters, params):
        return model.hidden(join_adapters(params, adapters), tokens, tokens, jnp.ones_like(tokens)).std()

    grad = jax.jit(jax.grad(loss))(adapters, params)
    assert jax.tree.structure(grad) == jax.tree.structure(adapters)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grad))
    assert grad["lora"]["q_proj"].scale == 2.0


def test_the_gauge_does_not_change_the_model(x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    adapters = trained(TINY, dtype=jnp.float64)
    out = logits(TINY, join_adapters(params, adapters))
    for other in (change(adapters, lambda a, b: (5 * a, b / 5)), balance_adapters(adapters)):
        np.testing.assert_allclose(logits(TINY, join_adapters(params, other)), out, atol=1e-12)  # float64


@pytest.mark.parametrize("rank", [1, 3, 20], ids="rank {}".format)  # 20 is above the width
def test_balance_is_canonical(rank, x64):
    adapters = trained(TINY, rank=rank, target_modules=("k_proj", "down_proj"), dtype=jnp.float64)
    fixed_gauge = jax.jit(balance_adapters)
    balanced = fixed_gauge(adapters)
    mix = jnp.eye(rank) + 0.3 * jax.random.normal(jax.random.key(3), (rank, rank)) / rank
    other = fixed_gauge(change(adapters, lambda a, b: (a @ mix, jnp.linalg.inv(mix) @ b)))
    for name, adapter in balanced["lora"].items():
        a, b = np.asarray(adapter.a), np.asarray(adapter.b)
        assert a.shape == adapters["lora"][name].a.shape and b.shape == adapters["lora"][name].b.shape
        np.testing.assert_allclose(a @ b, products(adapters)[name], atol=1e-12)  # float64
        np.testing.assert_allclose(a.swapaxes(1, 2) @ a, b @ b.swapaxes(1, 2), atol=1e-12)
        if rank < 16:  # above the width the zero singular values have no directions of their own
            np.testing.assert_allclose(np.abs(other["lora"][name].a), np.abs(a), atol=1e-9)  # up to signs of columns


def test_balance_leaves_a_zero_product_alone():
    fresh = init_lora(TINY, jax.random.key(1), rank=3, alpha=6)
    jax.tree.map(np.testing.assert_array_equal, balance_adapters(fresh), fresh)
    half = change(fresh, lambda a, b: (a, b.at[1].set(1.0)))  # one layer zero, one of rank 1
    balanced = balance_adapters(half)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(balanced))
    for name, product in products(half).items():
        np.testing.assert_allclose(products(balanced)[name], product, atol=1e-5)  # float32
        np.testing.assert_array_equal(balanced["lora"][name].a[0], fresh["lora"][name].a[0])


def test_errors_say_what_to_do():
    params, adapters = init_params(TINY, jax.random.key(0)), trained(TINY)
    with pytest.raises(ValueError, match="give a base without 'lora'"):
        join_adapters(join_adapters(params, adapters), adapters)
    with pytest.raises(ValueError, match=r"adapter of q_proj: factors \(3, 16, 3\) and \(3, 3, 16\) do not fit"):
        join_adapters(params, trained(replace(TINY, layers=3), target_modules=("q_proj",)))
    with pytest.raises(ValueError, match=r"\['lm_head'\]; the projections are"):
        init_lora(TINY, jax.random.key(0), rank=2, alpha=2, target_modules=("q_proj", "lm_head"))
    with pytest.raises(
        ValueError,
        match=r"gpt2 has no \['q_proj', 'v_proj'\]; the projections are c_attn, attn.c_proj, c_fc, mlp.c_proj\.",
    ):
        init_lora(CONFIGS["gpt2"], jax.random.key(0), rank=2, alpha=2, target_modules=("q_proj", "v_proj"))
    with pytest.raises(ValueError, match="rank 0; an adapter has a rank of at least 1"):
        init_lora(TINY, jax.random.key(0), rank=0, alpha=2)
