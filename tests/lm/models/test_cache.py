"""Reading in blocks with a cache gives the hidden states of reading everything at once, in every family."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.models import init_lora, init_params, join_adapters, load_model, make_decoder
from bilevel_jax.lm.models.cache import EMPTY_POSITION, init_cache, write_cache
from tests.lm.models.test_families import CONFIGS, GPT2, TINY

LENGTH, STEM = 14, 6  # the windows of CONFIGS are 3 and 4: shorter than both parts
TOKENS = np.random.default_rng(0).integers(0, 31, (4, LENGTH)).astype(np.int32)
TOKENS[:, :STEM] = TOKENS[[0, 0, 2, 2], :STEM]  # two rows to a stem


def params_of(config, dtype):
    """Parameters joined with adapters that are not 0."""
    adapters = init_lora(config, jax.random.key(1), rank=2, alpha=4.0, dtype=dtype)
    return join_adapters(
        init_params(config, jax.random.key(0), dtype=dtype), jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    )


@cache
def plain(config):
    model = make_decoder(config)

    def hidden(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        return model.hidden(params, tokens, positions, jnp.ones_like(tokens))

    return jax.jit(hidden)


def padded(tokens, start, left, right):
    """A block with its positions, padding on both sides."""
    rows, length = tokens.shape
    where = np.pad(np.arange(start, start + length), (left, right), constant_values=EMPTY_POSITION)
    block = jnp.pad(tokens, ((0, 0), (left, right)), constant_values=7)
    return block, jnp.broadcast_to(jnp.asarray(where, jnp.int32)[None], (rows, len(where)))


def in_blocks(model, params, tokens):
    """Stems cached once for two rows each, padded; a block after it; then one token at a time into a fixed cache."""
    _, stem = model.extend(params, (), *padded(tokens[::2, :STEM], 0, 2, 3))
    stem = stem._replace(source_row=jnp.asarray([0, 0, 1, 1]))
    middle, block = model.extend(params, (stem,), *padded(tokens[:, STEM:10], STEM, 1, 2))
    own = write_cache(init_cache(model.config, len(tokens), 12, block.keys.dtype), block, 0)

    def step(own, at):
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, 1)
        out, block = model.extend(params, (stem, own), token, jnp.full(token.shape, at))
        return write_cache(own, block, at - 3), out[:, 0]  # the block took 7 slots for 4 tokens

    _, last = jax.lax.scan(step, own, jnp.arange(10, LENGTH))
    return jnp.concatenate([middle[:, 1:5], jnp.moveaxis(last, 0, 1)], axis=1)


OFTEN = ("plain", "window", "gemma3", "neox")
"""Those whose caches differ most; the others are slow tests."""


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in OFTEN else pytest.mark.slow)
        for name, config in CONFIGS.items()
    ],
)
def test_blocks_equal_the_whole(config, x64):
    params = params_of(config, jnp.float64)
    out = jax.jit(lambda params, tokens: in_blocks(make_decoder(config), params, tokens))(params, jnp.asarray(TOKENS))
    whole = plain(config)(params, TOKENS)[:, STEM:]
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, whole, atol=1e-12)  # float64, other order of sums


def test_padding_and_other_rows_change_nothing():
    params, model = params_of(TINY, jnp.float32), make_decoder(TINY)
    run = jax.jit(lambda tokens, positions: model.extend(params, (), tokens, positions)[0])
    tokens, positions = padded(TOKENS, 0, 3, 2)
    out = run(tokens, positions)
    assert np.isfinite(out).all()
    other = tokens.at[:, :3].set(1).at[:, -2:].set(2).at[1:, 3:-2].set(3)
    np.testing.assert_array_equal(run(other, positions)[0, 3:-2], out[0, 3:-2])


def test_a_cache_is_kept_in_what_the_products_read():
    stored = init_params(TINY, jax.random.key(0), dtype=jnp.bfloat16)
    for compute, kept in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        model = make_decoder(TINY, compute_dtype=compute)
        _, block = jax.eval_shape(lambda tokens, model=model: model.extend(stored, (), tokens, tokens), TOKENS)
        assert block.keys.dtype == block.values.dtype == kept


def test_a_position_beyond_the_learned_ones_is_nan():
    config = replace(GPT2, max_length=LENGTH - 1)
    params = init_params(config, jax.random.key(0))
    run = jax.jit(lambda params, tokens, positions: make_decoder(config).extend(params, (), tokens, positions)[0])
    out = run(params, TOKENS[:2, :4], jnp.asarray([[9, 10, 11, 12], [10, 11, 12, 13]]))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("name", ["stories-260k", "babyllama-1m"])
def test_real_models(shared, name):
    config, params = load_model(shared / "models" / name)
    model = make_decoder(config)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 200)).astype(np.int32)
    tokens[:, :120] = tokens[0, :120]

    @jax.jit
    def blocks(params, tokens):
        _, stem = model.extend(params, (), *padded(tokens[:1, :120], 0, 8, 0))
        return model.extend(
            params, (stem._replace(source_row=jnp.zeros(2, int)),), *padded(tokens[:, 120:], 120, 16, 0)
        )[0]

    log_p = jax.jit(lambda hidden, params: jax.nn.log_softmax(hidden @ model.head(params)))
    out = log_p(blocks(params, tokens)[:, 16:], params)
    whole = log_p(plain(config)(params, tokens)[:, 120:], params)
    np.testing.assert_allclose(out, whole, atol=2e-4)
