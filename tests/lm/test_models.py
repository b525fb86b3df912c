"""The decoder: logits of transformers, packing, precision, second derivatives, folders in and out."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.models import DecoderConfig, Rope, decoder, init, load, read_config, save

LENGTH = 40
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64  # with heads of 8: one wave in each of the three ranges
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES = {  # id: (class of transformers' configuration, what differs from SMALL)
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied-theta-5e5": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
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
    vocab=31, width=16, inner=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_length=64, init_scale=0.3
)


def logits(config, params, tokens, segments=None, positions=None, **options):
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape) if positions is None else positions
    model = decoder(config, **options)
    return np.asarray(
        jax.jit(lambda p, *data: model.hidden(p, *data) @ model.head(p))(params, tokens, positions, segments)
    )


def draw_tokens(vocab, rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, vocab, (rows, length)).astype(np.int32)


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def difference(ours, theirs):
    """Relative to the largest logit where that is above 1: float32 has seven digits, whatever their unit."""
    return np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """A random model of each family, made and saved by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    name, options = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # transformers starts norms at 1 and biases at 0, which would hide a mistake
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def test_logits_equal_transformers(checkpoint):
    model, folder = checkpoint
    config, params = load(folder)
    tokens = draw_tokens(config.vocab)
    assert (
        difference(logits(config, params, tokens), torch_logits(model, tokens)) < 1e-5
    )  # float32, other order of sums


def test_saved_folder_loads_in_transformers(checkpoint, tmp_path):
    import transformers

    model, folder = checkpoint
    save(tmp_path / "saved", *load(folder))
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    tokens = draw_tokens(SMALL["vocab_size"])
    np.testing.assert_array_equal(
        torch_logits(loaded, tokens), torch_logits(model, tokens)
    )  # the same numbers: no arithmetic
    assert loaded.config.eos_token_id == [1, 2]


def test_both_spellings_of_config_json(checkpoint):
    raw = json.loads((checkpoint[1] / "config.json").read_text())
    old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(raw["rope_parameters"])
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw["dtype"], "rope_scaling": None}
    if rope["rope_type"] != "default":
        old["rope_scaling"] = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    assert read_config(old) == read_config(raw) == read_config(checkpoint[1])


@pytest.mark.parametrize("name", ["stories-260k", "babyllama-1m"])
def test_real_models(shared, name):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = load(shared / "models" / name)
    tokens = draw_tokens(config.vocab, length=200)
    theirs = torch_logits(transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name), tokens)
    # logits up to 25; transformers' own float32 rounding, seen from float64, is 1e-6 of that
    assert difference(logits(config, params, tokens), theirs) < 3e-6


def test_reads_shards(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    whole, shards = load(tmp_path / "whole"), load(tmp_path / "shards")
    assert whole[0] == shards[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1], shards[1])


CONFIGS = {
    "plain": TINY,
    "window": replace(TINY, family="mistral", windows=(3, 3)),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True, tied=True, windows=(0, 4)),
    "llama3": replace(TINY, rope=Rope(1e4, "llama3", 8.0, 1.0, 4.0, 16), biases=("q_proj", "o_proj", "down_proj")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_equals_separate(config, x64):
    params = init(config, jax.random.key(0), dtype=jnp.float64)
    one, two = draw_tokens(config.vocab, 2, 9)[:, :9]
    packed = np.concatenate([one[:7], two, [0, 0, 0]])[None]
    segments = jnp.asarray([[1] * 7 + [2] * 9 + [0] * 3])
    positions = jnp.asarray([[*range(7), *range(9), 0, 0, 0]])
    out = logits(config, params, packed, segments, positions)[0]
    np.testing.assert_allclose(
        out[:7], logits(config, params, one[None, :7])[0], atol=1e-12
    )  # float64, other order of sums
    np.testing.assert_allclose(out[7:16], logits(config, params, two[None])[0], atol=1e-12)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("config", [CONFIGS["plain"], CONFIGS["qwen3"]], ids=["plain", "qwen3"])
def test_hessian_product_is_the_slope_of_the_gradient(config, x64):
    model = decoder(config)
    params = init(config, jax.random.key(0), dtype=jnp.float64)
    direction = init(config, jax.random.key(1), dtype=jnp.float64)
    tokens = jnp.asarray(draw_tokens(config.vocab, 2, 8))
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]])  # with padding
    positions = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))

    @jax.jit
    def grad(step):  # at params + step * direction
        def loss(params):
            out = jax.nn.log_softmax(model.hidden(params, tokens, positions, segments) @ model.head(params))
            return -jnp.sum(jnp.where(segments[..., None] > 0, out, 0) ** 2) / 100

        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        return jax.flatten_util.ravel_pytree(jax.grad(loss)(moved))[0]

    product = jax.jvp(grad, (0.0,), (1.0,))[1]
    error = jnp.linalg.norm((grad(1e-5) - grad(-1e-5)) / 2e-5 - product) / jnp.linalg.norm(product)
    assert error < 1e-7  # step² = 1e-10 times the third derivative; a float32 cast anywhere stops at 1e-4


def test_float64_has_no_float32_inside(x64):
    model = decoder(TINY)
    params = init(TINY, jax.random.key(0), dtype=jnp.float64)
    tokens = jnp.zeros((1, 8), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, tokens, tokens, tokens).sum()))(params))
    assert "f64[" in text and "f32[" not in text


def test_float32_stays_float32_in_x64_mode(x64):
    params = init(TINY, jax.random.key(0))
    assert logits(TINY, params, draw_tokens(31)).dtype == np.float32


def test_same_draws_in_both_precisions(x64):
    single, double = (init(TINY, jax.random.key(0), dtype=dtype) for dtype in (jnp.float32, jnp.float64))
    jax.tree.map(np.testing.assert_array_equal, single, double)  # float32 numbers are float64 numbers


def test_remat_changes_nothing():
    params = init(TINY, jax.random.key(0))
    tokens = jnp.asarray(draw_tokens(31, 2, 8))
    positions, segments = jnp.zeros_like(tokens), jnp.ones_like(tokens)

    def grad(remat):
        model = decoder(TINY, remat=remat)
        return jax.jit(jax.grad(lambda p: model.hidden(p, tokens, positions, segments).std()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad(True), grad(False))  # float32 rounding


def test_base_in_bfloat16_is_upcast():
    stored = init(TINY, jax.random.key(0), dtype=jnp.bfloat16)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    out = logits(TINY, stored, draw_tokens(31))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, logits(TINY, upcast, draw_tokens(31)), atol=1e-6)  # float32 rounding


def test_compute_in_bfloat16_is_near():
    params = init(TINY, jax.random.key(0))
    full, half = (logits(TINY, params, draw_tokens(31), compute=dtype) for dtype in (None, jnp.bfloat16))
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() / np.abs(full).max() < 0.05  # bfloat16 has 8 bits


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_and_load_give_the_same_arrays(tmp_path, dtype):
    config = CONFIGS["qwen3"]
    params = init(config, jax.random.key(0), dtype=dtype)
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    save(tmp_path / "model", config, params)
    again, loaded = load(tmp_path / "model", dtype=dtype)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder is left


def test_save_refuses(tmp_path):
    params = init(TINY, jax.random.key(0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty; give another folder"):
        save(tmp_path / "full", TINY, params)
    with pytest.raises(ValueError, match="merge the adapters first"):
        save(tmp_path / "new", TINY, {**params, "lora": {}})
    with pytest.raises(ValueError, match="qwen2 config.json cannot express"):
        save(tmp_path / "new", replace(TINY, family="qwen2"), params)  # qwen2 has biases
    assert not (tmp_path / "new").exists()


HF = {"model_type": "llama", **SMALL}
REFUSED = {
    "family": ({"model_type": "gpt_neox"}, r"'gpt_neox' is not supported; supported: \['llama', 'mistral', 'qwen2'"),
    "rope": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not supported"),
    "partial": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: 'silu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
    "heads": ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_read_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        read_config({**HF, **change})


def test_read_config_names_missing_keys(tmp_path):
    with pytest.raises(ValueError, match="no vocab_size, hidden_size"):
        read_config({key: value for key, value in HF.items() if key not in ("vocab_size", "hidden_size")})
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        read_config(tmp_path)


def test_load_names_what_does_not_fit(tmp_path):
    save(tmp_path / "model", TINY, init(TINY, jax.random.key(0)))
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())

    def load_with(**changes):
        path.write_text(json.dumps({**raw, **changes}))
        return load(tmp_path / "model")

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
