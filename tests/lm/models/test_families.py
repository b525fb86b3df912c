"""Every family: logits of transformers, both spellings, packing, precision, second derivatives."""

import copy
import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.models import (
    DecoderConfig,
    RopeConfig,
    init_params,
    load_model,
    make_decoder,
    read_config,
    save_model,
)
from bilevel_jax.lm.models.config import rope_frequencies

LENGTH = 40
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64  # with heads of 8: one wave in each of the three ranges
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
FAMILIES = {  # id: (class of transformers' configuration, what differs from SMALL)
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied-theta-5e5": ("LlamaConfig", {"rope_parameters": PLAIN}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 5}),
    "ministral": (
        "MinistralConfig",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {
            **{"use_parallel_residual": False, "hidden_act": "gelu_new", "attention_bias": False},
            **{"tie_word_embeddings": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}},
        },
    ),
    "gpt-neox-linear-rope": ("GPTNeoXConfig", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
    "gpt2": ("GPT2Config", {}),
    "gpt2-untied": (
        "GPT2Config",
        {"n_inner": 24, "activation_function": "gelu", "tie_word_embeddings": False, "reorder_and_upcast_attn": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 12, "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
    ),
    "gemma3-linear-rope": (
        "Gemma3TextConfig",
        {
            **{"head_dim": 12, "sliding_window": 5, "sliding_window_pattern": 3, "attention_bias": True},
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {**PLAIN, "rope_theta": 3e3}},
        },
    ),
}
SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=[1, 2],
)
TINY = DecoderConfig(
    vocab_size=31, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_length=64, init_scale=0.3
)


# the same shape in the other families
NEOX_BIASES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
GPT2_BIASES = ("c_attn", "attn_c_proj", "c_fc", "mlp_c_proj")
NEOX = replace(
    TINY, family="gpt_neox", kv_heads=4, activation="gelu", parallel_residual=True, biased_projections=NEOX_BIASES
)
GPT2 = replace(
    TINY,
    family="gpt2",
    kv_heads=4,
    activation="gelu_new",
    rope=None,
    biased_projections=GPT2_BIASES,
    tied_embeddings=True,
)
GEMMA3 = replace(
    TINY, family="gemma3_text", activation="gelu_pytorch_tanh", qk_norm=True, tied_embeddings=True, query_scalar=9.0
)
CONFIGS = {
    "plain": TINY,
    "window": replace(TINY, family="mistral", windows=(3, 3)),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True, tied_embeddings=True, windows=(0, 4)),
    "llama3": replace(
        TINY, rope=RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 16), biased_projections=("q_proj", "o_proj", "down_proj")
    ),
    "neox": replace(NEOX, rope=RopeConfig(rotary_fraction=0.5)),
    "gpt2": GPT2,
    "gemma3": replace(GEMMA3, windows=(4, 0), rope=RopeConfig(1e6), local_rope=RopeConfig(100.0), embed_scale=4.0),
}


@functools.cache
def compiled(config, **options):
    model = make_decoder(config, **options)
    return jax.jit(lambda params, *data: model.hidden(params, *data) @ model.head(params))


def logits(config, params, tokens, segments=None, positions=None, **options):
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape) if positions is None else positions
    return np.asarray(compiled(config, **options)(params, tokens, positions, segments))


def draw_tokens(vocab, rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def torch_logits64(model, tokens, patch):
    """transformers in float64, with its casts to float32 (norms, rotary angles, softmax) made casts to float64."""
    import torch

    model = copy.deepcopy(model).double()
    with patch.context() as lifted:
        lifted.setattr(torch, "float32", torch.float64)
        lifted.setattr(torch, "float", torch.float64)
        lifted.setattr(torch.Tensor, "float", torch.Tensor.double)
        return torch_logits(model, tokens)


def with_our_frequencies(model, config):
    """A copy of a transformers model whose rotary buffers, within 4 float32 ulp of our frequencies, hold ours.

    float32 `pow` of torch differs by a few ulp from one kind of CPU to another; everything else is compared exactly.
    """
    import torch

    model = copy.deepcopy(model)
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
    assert len(buffers) == (config.rope is not None) + (config.family == "gemma3_text")
    for name, buffer in buffers.items():
        rope = config.local_rope if name.endswith("sliding_attention_inv_freq") else config.rope
        frequencies = rope_frequencies(rope, config.head_dim)
        np.testing.assert_array_max_ulp(buffer.numpy(), frequencies, maxulp=4)
        buffer.copy_(torch.from_numpy(frequencies))
    return model


def largest(difference):
    return np.abs(difference).max()


def make(family, folder):
    """A random model of a row of FAMILIES, made and saved by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    known = {*kind().to_dict(), "head_dim", *kind.attribute_map}
    small = {key: value for key, value in SMALL.items() if key in known}
    config = kind(**{**small, "bos_token_id": 0, **copy.deepcopy(options)})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # transformers starts norms at 1 and biases at 0, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder), folder


def test_logits_equal_transformers(checkpoint, monkeypatch):
    model, folder = checkpoint
    config, params = load_model(folder)
    model = with_our_frequencies(model, config)
    tokens = draw_tokens(config.vocab_size)
    out = logits(config, params, tokens)
    assert largest(out - torch_logits(model, tokens)) < 1e-5  # float32, other order of sums
    with jax.enable_x64(True):
        out = logits(config, jax.tree.map(lambda x: x.astype(jnp.float64), params), tokens)
    assert largest(out - torch_logits64(model, tokens, monkeypatch)) < 1e-12  # float64: the same function


def test_saved_folder_loads_in_transformers(checkpoint, tmp_path):
    import transformers

    model, folder = checkpoint
    save_model(tmp_path / "saved", *load_model(folder))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    tokens = draw_tokens(SMALL["vocab_size"])
    np.testing.assert_array_equal(
        torch_logits(loaded, tokens), torch_logits(model, tokens)
    )  # the same numbers: no arithmetic
    assert loaded.config.eos_token_id == [1, 2]


def old_spelling(raw):
    """The same config.json as transformers 4 would have written it."""
    new = ("rope_parameters", "dtype", *(() if raw["model_type"] == "ministral" else ("layer_types",)))
    old = {key: value for key, value in raw.items() if key not in new}
    old["torch_dtype"] = raw["dtype"]
    if "rope_parameters" not in raw:
        return old
    rope = dict(raw["rope_parameters"])
    kind = "type"
    if raw["model_type"] == "gemma3_text":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope, kind = dict(rope["full_attention"]), "rope_type"  # newer than the other spelling
    if raw["model_type"] == "gpt_neox":
        old |= {"rotary_emb_base": rope.pop("rope_theta"), "rotary_pct": rope.pop("partial_rotary_factor")}
    else:
        old["rope_theta"] = rope.pop("rope_theta")
    scaling = {(kind if key == "rope_type" else key): value for key, value in rope.items()}
    return old | {"rope_scaling": None if rope["rope_type"] == "default" else scaling}


def test_both_spellings_of_config_json(checkpoint, tmp_path):
    import transformers

    raw = json.loads((checkpoint[1] / "config.json").read_text())
    old = old_spelling(raw)
    assert read_config(old) == read_config(raw) == read_config(checkpoint[1])
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(transformers.AutoConfig.from_pretrained(tmp_path).to_dict()) == read_config(old)


@pytest.mark.parametrize("name", ["stories-260k", "babyllama-1m"])
def test_real_models(shared, name, monkeypatch):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = load_model(shared / "models" / name)
    tokens = draw_tokens(config.vocab_size, length=200)
    model = with_our_frequencies(transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name), config)
    # logits up to 25: in float32 both are 2e-5 away from what they are in float64
    assert largest(logits(config, params, tokens) - torch_logits(model, tokens)) < 3e-6 * 25
    with jax.enable_x64(True):
        out = logits(config, jax.tree.map(lambda x: x.astype(jnp.float64), params), tokens)
    assert largest(out - torch_logits64(model, tokens, monkeypatch)) < 1e-11  # so the distance above is rounding


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_equals_separate(config, x64):
    params = init_params(config, jax.random.key(0), dtype=jnp.float64)
    one, two = draw_tokens(config.vocab_size, 2, 9)
    packed = np.concatenate([one[:7], two, [0, 0, 0]])[None]
    segments = jnp.asarray([[1] * 7 + [2] * 9 + [0] * 3])
    positions = jnp.asarray([[*range(7), *range(9), 0, 0, 0]])
    out = logits(config, params, packed, segments, positions)[0]
    assert np.isfinite(out).all()
    for ids, part in ((one[:7], out[:7]), (two, out[7:16])):
        alone = np.pad(ids, (0, 19 - len(ids)))[None]  # of one shape: compiled once
        apart = logits(config, params, alone, jnp.asarray(np.arange(19)[None] < len(ids), jnp.int32))[0]
        np.testing.assert_allclose(part, apart[: len(ids)], atol=1e-12)  # float64, other order of sums
    packed[0, 16:] = 1  # other padding
    np.testing.assert_array_equal(logits(config, params, packed, segments, positions)[0, :16], out[:16])


SMOOTH = {name: CONFIGS[name] for name in ("qwen3", "neox", "gpt2", "gemma3")}


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, id=name, marks=[pytest.mark.slow] * (name in ("neox", "qwen3"))) for name, c in SMOOTH.items()],
)
def test_products_are_slopes_of_the_loss_and_its_gradient(config, x64):
    model = make_decoder(config)
    params = init_params(config, jax.random.key(0), dtype=jnp.float64)
    direction = init_params(config, jax.random.key(1), dtype=jnp.float64)
    tokens = jnp.asarray(draw_tokens(config.vocab_size, 2, 8))
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]])  # with padding
    positions = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))

    def both(step):  # at params + step * direction
        def loss(params):
            out = jax.nn.log_softmax(model.hidden(params, tokens, positions, segments) @ model.head(params))
            return -jnp.sum(jnp.where(segments[..., None] > 0, out, 0) ** 2) / 100

        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        value, grad = jax.value_and_grad(loss)(moved)
        return value, jax.flatten_util.ravel_pytree(grad)[0]

    run = jax.jit(lambda step: jax.jvp(both, (step,), (1.0,)))
    for ahead, behind, product in zip(run(1e-5)[0], run(-1e-5)[0], run(0.0)[1], strict=True):
        error = jnp.linalg.norm((ahead - behind) / 2e-5 - product) / jnp.linalg.norm(product)
        assert error < 1e-7  # step² = 1e-10 times the third derivative; a float32 cast anywhere stops at 1e-4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float64_has_no_float32_inside(config, x64):
    model = make_decoder(config)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype=jnp.float64))
    tokens = jnp.zeros((1, 8), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, tokens, tokens, tokens).sum()))(params))
    assert "f64[" in text and "f32[" not in text


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32_stays_float32_in_x64_mode(config, x64):
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jnp.zeros((1, 8), jnp.int32)
    assert jax.eval_shape(compiled(config), params, tokens, tokens, tokens).dtype == np.float32


def test_a_row_with_a_position_beyond_the_learned_ones_is_nan():
    params = init_params(GPT2, jax.random.key(0))
    positions = jnp.asarray([[0, 1, 2, 63], [0, 1, 2, 64]])
    out = logits(GPT2, params, draw_tokens(31, 2, 4), positions=positions)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_same_draws_in_both_precisions(x64):
    single, double = (init_params(TINY, jax.random.key(0), dtype=dtype) for dtype in (jnp.float32, jnp.float64))
    jax.tree.map(np.testing.assert_array_equal, single, double)  # float32 numbers are float64 numbers


@pytest.mark.parametrize("remat", (pytest.param("full", marks=pytest.mark.slow), "selective"))
def test_remat_changes_nothing(remat):
    params = init_params(TINY, jax.random.key(0))
    tokens = jnp.asarray(draw_tokens(31, 2, 8))
    positions, segments = jnp.zeros_like(tokens), jnp.ones_like(tokens)

    def grad(remat):
        model = make_decoder(TINY, remat=remat)
        return jax.jit(jax.grad(lambda p: model.hidden(p, tokens, positions, segments).std()))(params)

    # float32 rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad(remat), grad("none"))


def test_an_unknown_family_is_refused():
    for build in (make_decoder, lambda config: init_params(config, jax.random.key(0))):
        with pytest.raises(ValueError, match="family 'bert' is not supported; supported: "):
            build(replace(TINY, family="bert"))


def test_base_in_bfloat16_is_upcast():
    stored = init_params(TINY, jax.random.key(0), dtype=jnp.bfloat16)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    out = logits(TINY, stored, draw_tokens(31))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, logits(TINY, upcast, draw_tokens(31)), atol=1e-6)  # float32 rounding


def test_compute_in_bfloat16_is_near():
    params = init_params(TINY, jax.random.key(0))
    full, half = (logits(TINY, params, draw_tokens(31), compute_dtype=dtype) for dtype in (None, jnp.bfloat16))
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() / np.abs(full).max() < 0.05  # bfloat16 has 8 bits
