"""Losses of supervised fine-tuning: against torch, packing, chunks, padding, and the split into outputs and link."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core.types import PADDING
from bilevel_jax.lm.losses.sft import assemble_params, sft_composite_loss, sft_losses
from bilevel_jax.lm.models import DecoderConfig, init_lora, init_params, make_decoder

TINY = DecoderConfig(
    vocab_size=31, width=16, mlp_width=24, layers=2, heads=4, kv_heads=2, head_dim=4, max_length=64, init_scale=0.3
)
MODEL = make_decoder(TINY)
EXAMPLES = [  # (prompt, response)
    ([5, 6, 7], [8, 9, 10, 11]),
    ([3], [4]),
    ([12, 13, 14, 15, 16], [17, 18]),
    ([1, 2], [3, 4, 5, 6, 7, 8]),
]


def batch_of(rows, length, slots):
    """One micro-batch from rows of numbers of examples; the example numbers are the slots; `slots` - 4 are empty."""
    shape = (len(rows), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    targets, slot = np.full(shape, -100, np.int32), np.full(shape, slots, np.int32)
    supervised = np.ones(slots, np.float32)
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, 1):
            prompt, response = EXAMPLES[example]
            whole = prompt + response
            place = slice(start, start + len(whole))
            tokens[row, place], positions[row, place], segments[row, place] = whole, range(len(whole)), segment
            answer = slice(start + len(prompt) - 1, start + len(whole) - 1)  # where the next token is of the response
            targets[row, answer], slot[row, answer] = response, example
            supervised[example] = len(response)
            start += len(whole)
    index = np.where(np.arange(slots) < len(EXAMPLES), np.arange(slots), PADDING).astype(np.int32)
    names = ("tokens", "targets", "positions", "segments", "slot", "supervised", "index")
    values = (tokens, targets, positions, segments, slot, supervised, index)
    return {name: jnp.asarray(value) for name, value in zip(names, values, strict=True)}


SEPARATE = batch_of([[0], [1], [2], [3], []], 11, 6)
PACKED = batch_of([[2, 0, 1], [3]], 17, 6)


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("normalise", ["example_mean", "token_sum"])
def test_equals_torch(normalise):
    torch = pytest.importorskip("torch")
    params = init_params(TINY, jax.random.key(0))
    out = np.asarray(jax.jit(sft_losses(MODEL, reduction=normalise))(params, SEPARATE))
    assert out.dtype == np.float32 and out.shape == (6,)
    logits = np.asarray(sft_composite_loss(MODEL, frozen_head=False).outputs(params, None, SEPARATE))
    for number, (prompt, response) in enumerate(EXAMPLES):
        answer = torch.tensor(logits[number, len(prompt) - 1 : len(prompt + response) - 1])
        reduction = "mean" if normalise == "example_mean" else "sum"
        expected = torch.nn.functional.cross_entropy(answer, torch.tensor(response), reduction=reduction)
        assert relative(out[number], expected) < 1e-5  # float32, other order of sums
    np.testing.assert_array_equal(out[4:], 0)  # empty slots: exactly


@pytest.mark.parametrize("batch", [SEPARATE, PACKED], ids=["separate", "packed"])
def test_chunks_change_nothing(batch, x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    hidden = jax.random.normal(jax.random.key(1), (*batch["tokens"].shape, TINY.width))

    @partial(jax.jit, static_argnums=0)
    def losses_and_slopes(chunk, hidden, params):
        link = sft_composite_loss(MODEL, frozen_head=True, chunk=chunk).link
        losses, pull = jax.vjp(lambda hidden, params: link(hidden, params, batch), hidden, params)
        hidden_slope, params_slope = pull(jnp.arange(1.0, 7.0))
        return losses, hidden_slope, params_slope["head"]

    expected = losses_and_slopes(4096, hidden, params)
    for chunk in (1, 7):
        for ours, whole in zip(losses_and_slopes(chunk, hidden, params), expected, strict=True):
            assert relative(ours, whole) < 1e-12  # float64, other order of sums


def test_packing_changes_nothing(x64):
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)

    @jax.jit
    def losses_and_slope(params, batch):
        losses, pull = jax.vjp(lambda params: sft_losses(MODEL)(params, batch), params)
        return losses, jax.flatten_util.ravel_pytree(pull(jnp.arange(1.0, 7.0)))[0]

    for packed, separate in zip(losses_and_slope(params, PACKED), losses_and_slope(params, SEPARATE), strict=True):
        assert np.isfinite(packed).all()
        assert relative(packed, separate) < 1e-12  # float64, other order of sums


def split(mode, dtype):
    """(Loss, params, fixed) of each way to train."""
    whole = init_params(TINY, jax.random.key(0), dtype=dtype)
    if mode == "full":
        return sft_composite_loss(MODEL, frozen_head=False), whole, None
    adapters = jax.tree.map(lambda x: x + 0.1, init_lora(TINY, jax.random.key(1), rank=2, alpha=4, dtype=dtype))
    return sft_composite_loss(MODEL, frozen_head=mode == "lora, hidden states", chunk=8), adapters, whole


MODES = ["full", "lora, logits", "lora, hidden states"]


@pytest.mark.parametrize("mode", MODES)
def test_link_of_outputs_is_the_loss(mode, x64):
    loss, params, fixed = split(mode, jnp.float64)
    outputs = loss.outputs(params, fixed, PACKED)
    assert outputs.shape == (2, 17, TINY.width if mode == "lora, hidden states" else TINY.vocab_size)
    assert (
        relative(loss.link(outputs, fixed, PACKED), sft_losses(MODEL)(assemble_params(params, fixed), PACKED)) < 1e-12
    )  # float64


@pytest.mark.parametrize("mode", MODES)
def test_link_is_convex(mode, x64):
    loss, params, fixed = split(mode, jnp.float64)
    outputs = loss.outputs(params, fixed, PACKED)

    @jax.jit
    def curvature(key):
        v = jax.random.normal(key, outputs.shape)
        slope = jax.grad(lambda outputs: loss.link(outputs, fixed, PACKED).sum())
        return jnp.vdot(v, jax.jvp(slope, (outputs,), (v,))[1])

    assert min(curvature(key) for key in jax.random.split(jax.random.key(2), 8)) > 0


@pytest.mark.slow
def test_hessian_product_is_the_slope_of_the_gradient(x64):
    _, params, fixed = split("lora, hidden states", jnp.float64)
    losses = sft_losses(MODEL, chunk=8)
    keys = iter(jax.random.split(jax.random.key(4), 99))
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)

    @jax.jit
    def grad(step):  # at params + step * direction
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        return jax.flatten_util.ravel_pytree(
            jax.grad(lambda p: losses(assemble_params(p, fixed), PACKED).sum())(moved)
        )[0]

    product = jax.jvp(grad, (0.0,), (1.0,))[1]
    # step² = 1e-10 times the third derivative; a float32 cast anywhere stops at 1e-4
    assert relative((grad(1e-5) - grad(-1e-5)) / 2e-5, product) < 1e-7


def test_logits_of_the_batch_never_live():
    params = init_params(TINY, jax.random.key(0))
    losses = sft_losses(MODEL, chunk=2)  # one place of each of the two rows
    program = jax.make_jaxpr(jax.grad(lambda p: losses(p, PACKED).sum()))(params)
    assert f"[2,17,{TINY.vocab_size}]" not in str(program) and f"[17,2,1,{TINY.vocab_size}]" not in str(program)
    assert f"[2,1,{TINY.vocab_size}]" in str(program)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="chunk 0; a chunk is at least one token"):
        sft_losses(MODEL, chunk=0)
    with pytest.raises(ValueError, match="reduction is 'batch'; it is one of .*'token_mean'"):
        sft_losses(MODEL, reduction="batch")
    with pytest.raises(ValueError, match="use frozen_head=False"):
        sft_composite_loss(MODEL, frozen_head=True).outputs(init_params(TINY, jax.random.key(0)), None, PACKED)


def test_one_row_of_positions_for_all_rows_is_refused():
    params = init_params(TINY, jax.random.key(0))
    with pytest.raises(AssertionError, match="assert_equal_shape"):
        sft_losses(MODEL)(params, SEPARATE | {"positions": SEPARATE["positions"][:1]})
