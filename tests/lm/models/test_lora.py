"""Adapters: against peft both ways, the gauge, folding, and what may be trained."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
        ("gpt-neox", ["query_key_value", "dense"], {}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        ("gemma3", ["o_proj", "up_proj"], {}),
    ],
    ids=["llama", "rslora", "neox", "gpt2", "gemma3"],
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


def test_load_peft_refuses(tmp_path):
    save_peft(tmp_path / "adapter", TINY, trained(TINY))
    path = tmp_path / "adapter" / "adapter_config.json"
    about = json.loads(path.read_text())
    with pytest.raises(ValueError, match=r"Missing 14: \['base_model.model.model.layers.2"):
        load_peft(tmp_path / "adapter", replace(TINY, layers=3))
    with pytest.raises(
        ValueError, match=r"lora_A.weight: the file has \(3, 16\), the configuration asks for \(3, 32\)"
    ):
        load_peft(tmp_path / "adapter", replace(TINY, width=32))
    path.write_text(json.dumps({**about, "use_dora": True}))
    with pytest.raises(ValueError, match=r"use_dora True \(supported: False\) is not supported in an adapter of"):
        load_peft(tmp_path / "adapter", TINY)
    with pytest.raises(FileNotFoundError, match="adapter_config.json: no such file"):
        load_peft(tmp_path, TINY)


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
