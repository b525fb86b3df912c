"""Laws that every objective keeps: one step in every layout, weights as counts, hypergradients of a whole run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core.checkpointing import single_replay_plan
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.types import PADDING, Stream
from bilevel_jax.core.unrolled import unrolled_estimator
from bilevel_jax.lm.data.batches import (
    BatchShape,
    fit_batch_shape,
    make_evaluation_stream,
    make_train_stream,
    shuffled_order,
)
from bilevel_jax.lm.losses.preferences import dpo_losses, simpo_losses
from bilevel_jax.lm.losses.sft import sft_losses
from bilevel_jax.lm.models import init_params, make_decoder
from bilevel_jax.runs.infra.placement import align_layout, make_mesh, place_stream, replicate
from tests.core.problems import Toy, relative, through_scan, trained
from tests.lm.pairs_and_rows import TINY, corpus, mixer, start, texts

ROWS = 13
"""Of a step of 16 slots, so that some are empty."""
MODEL = mixer()
SINGLE, PAIRS = corpus(texts(ROWS, 1)), corpus(texts(ROWS, 2))
OBJECTIVES = {  # id: (loss, rows)
    "sft": (sft_losses(MODEL), SINGLE),
    "sft, token mean": (sft_losses(MODEL, reduction="token_mean"), SINGLE),
    "dpo": (dpo_losses(MODEL, beta=0.5, label_smoothing=0.1), PAIRS),
    "simpo": (simpo_losses(MODEL, beta=2.5, gamma_ratio=0.55), PAIRS),
}
WEIGHTS = np.random.default_rng(0).uniform(0.2, 2, ROWS)


def problem_of(loss):
    return weighted(lambda params, fixed, batch: loss(params, batch))


@partial(jax.jit, static_argnums=0)
def step(loss, params, table, batch, direction):
    """(losses by row, gradient of the step's loss, entries along a direction by row)."""
    problem = problem_of(loss)
    index = batch["index"]

    def total(params, weights):
        def add(value, micro):
            return value + problem.inner(params, micro[0], None, micro[1]), None

        return jax.lax.scan(add, jnp.zeros((), table.dtype), (weights, batch))[0]

    def slope(weights):
        return jax.jvp(lambda p: total(p, weights), (params,), (direction,))[1]

    weights = problem.gather(table, batch)
    losses = jax.lax.map(lambda micro: loss(params, micro), batch)
    by_row = jnp.zeros_like(table).at[index].add(losses, mode="drop")
    entries = problem.scatter_add(jnp.zeros_like(table), batch, jax.grad(slope)(weights))
    return by_row, jax.grad(total)(params, weights), entries


def streams(data):
    """The same global step, in five layouts."""
    draw = shuffled_order(ROWS, 16, 3)
    shape = partial(fit_batch_shape, data, [draw], 1, length=24)
    mesh = make_mesh(8)
    packed = shape(num_micro_batches=1, packing=True)
    assert packed.rows < packed.examples * data.sequences_per_example / 2
    return {
        "1 x 16": make_train_stream(data, draw, 1, shape(num_micro_batches=1, packing=False)),
        "16 x 1": make_train_stream(data, draw, 1, shape(num_micro_batches=16, packing=False)),
        "packed": make_train_stream(data, draw, 1, packed),
        "1 x 16, 8 devices": place_stream(
            mesh, make_train_stream(data, draw, 1, align_layout(mesh, shape(num_micro_batches=1, packing=False)))
        ),
        "packed, 8 devices": place_stream(mesh, make_train_stream(data, draw, 1, align_layout(mesh, packed))),
    }


EVERY = ("1 x 16", "16 x 1", "packed", "1 x 16, 8 devices", "packed, 8 devices")
FAR = ("16 x 1", "packed, 8 devices")


@pytest.mark.parametrize(
    "name, dtype, bound, layouts",  # other orders of summation
    [
        pytest.param("sft, token mean", "float64", 1e-12, EVERY, marks=pytest.mark.slow),
        ("dpo", "float64", 1e-12, FAR),
        pytest.param("dpo", "float64", 1e-12, EVERY, marks=pytest.mark.slow),
        pytest.param("simpo", "float64", 1e-12, EVERY, marks=pytest.mark.slow),
        pytest.param("sft", "float32", 1e-6, FAR, marks=pytest.mark.slow),
        pytest.param("dpo", "float32", 1e-6, FAR, marks=pytest.mark.slow),
    ],
)
def test_step_is_the_same_in_every_layout(name, dtype, bound, layouts, eight_devices):
    loss, data = OBJECTIVES[name]
    with jax.enable_x64(dtype == "float64"):
        params, direction = start(jnp.dtype(dtype)), start(jnp.dtype(dtype), seed=1)
        table = jnp.asarray(WEIGHTS, dtype)
        out = []
        for where in layouts:
            given, batch = (params, table, direction), streams(data)[where].batch(0)
            if "devices" in where:
                given = replicate(make_mesh(8), given)
            out.append(jax.tree.map(np.asarray, step(loss, given[0], given[1], batch, given[2])))
        assert (out[0][0] > 0).all() and (out[0][2] != 0).all()
        for where, one in zip(layouts[1:], out[1:], strict=True):
            for ours, first in zip(one, out[0], strict=True):
                assert distance(ours, first) < bound, where


def distance(one, other):
    """The largest over the leaves, relative to the largest entry of the leaf."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(np.abs(np.asarray(a) - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("simpo", "sft, token mean"))) for name in OBJECTIVES],
)
def test_weights_count_rows(name, x64):
    """Weight 0 = the row is not there, weight 2 = it is there twice, under one denominator."""
    loss, data = OBJECTIVES[name]
    params, direction = start(jnp.float64), start(jnp.float64, seed=1)
    gone, doubled = 4, 9
    chosen = np.arange(8) + 3
    shape = BatchShape(2, 4, 4 * data.sequences_per_example, 24, data.sequences_per_example)
    weighted_batch = make_train_stream(data, lambda _: chosen, 1, shape).batch(0)
    counted_batch = make_train_stream(data, lambda _: np.where(chosen == gone, doubled, chosen), 1, shape).batch(0)
    counted_batch |= {"num_examples": weighted_batch["num_examples"], "targeted": weighted_batch["targeted"]}
    weights = jnp.asarray(WEIGHTS)
    _, grad, entries = step(loss, params, weights.at[gone].set(0).at[doubled].set(2), weighted_batch, direction)
    _, counted, twice = step(loss, params, weights.at[doubled].set(1), counted_batch, direction)
    assert distance(counted, grad) < 1e-14  # the same terms, of which two are summed in another place
    assert twice[gone] == 0 and entries[gone] != 0
    assert float(twice[doubled] / entries[doubled]) == pytest.approx(2, rel=1e-13)  # two slots, one row of the table
    others = np.setdiff1d(chosen, [gone, doubled])
    np.testing.assert_allclose(twice[others], entries[others], rtol=1e-13)


@pytest.mark.parametrize("kind", ["mixer", pytest.param("decoder", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_hypergradient_equals_reverse_mode_through_a_scan(kind, x64):
    """Of a model that learns even pairs by DPO and odd ones by SimPO, packed, judged by the loss of responses."""
    model = MODEL if kind == "mixer" else make_decoder(TINY, remat="none")
    params = start(jnp.float64) if kind == "mixer" else init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    even, odd = dpo_losses(model, beta=0.5, label_smoothing=0.1), simpo_losses(model, beta=2.5, gamma_ratio=0.55)
    judge = sft_losses(model)
    problem = weighted(
        lambda params, fixed, batch: jnp.where(batch["index"] % 2 == 0, even(params, batch), odd(params, batch)),
        outer=lambda params, fixed, batch: judge(params, batch),
    )
    draw = shuffled_order(ROWS, 8, 0)
    train = make_train_stream(
        PAIRS, draw, 4, fit_batch_shape(PAIRS, [draw], 4, num_micro_batches=2, length=24, packing=True)
    )
    whole = make_evaluation_stream(SINGLE, BatchShape(1, 16, 16, 24))
    toy = Toy(problem, None, params, on_device(train), on_device(whole))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, eps_root=1e-12))
    weights = jnp.asarray(WEIGHTS)
    transition, run = trained(toy, optimizer, weights, plan=single_replay_plan(4, 2))
    out = unrolled_estimator(problem, transition)(run, weights, None, toy.train, toy.validation)
    value, grad = through_scan(toy, optimizer, weights)
    assert relative(out.validation_loss, value) < 1e-12 and (grad != 0).all()
    assert relative(out.grad, grad) < 1e-11  # two orders of summation of the same float64 numbers
    assert out.checks.replayed


def on_device(stream):
    return Stream(lambda index: jax.tree.map(jnp.asarray, stream.batch(index)), stream.steps)


@pytest.mark.parametrize("normalise", ["example_mean", "token_sum", "token_mean"])
def test_sft_is_what_trainers_average(normalise, x64):
    """Against torch's cross entropy: its mean over all tokens of the step is the mean loss under token_mean."""
    torch = pytest.importorskip("torch")
    params = start(jnp.float64)
    stream = make_train_stream(SINGLE, shuffled_order(ROWS, 16, 3), 1, BatchShape(2, 8, 8, 24))
    batch = stream.batch(0)
    loss, out = sft_losses(MODEL, reduction=normalise), np.zeros(ROWS + 1)
    by_slot = jax.jit(lambda params, batch: jax.lax.map(lambda micro: loss(params, micro), batch))(params, batch)
    out[np.minimum(batch["index"], ROWS)] = by_slot
    assert (batch["index"] == PADDING).sum() == 3 and out[ROWS] == 0
    out = out[:ROWS]
    logits, targets = [], []
    weights = {name: torch.tensor(np.asarray(leaf)) for name, leaf in params.items()}
    for prompt, (response,) in texts(ROWS, 1):
        tokens = torch.tensor(prompt + response)
        x = weights["embed"][tokens] + weights["place"][: len(tokens)]
        mean = x.cumsum(0) / torch.arange(1, len(tokens) + 1)[:, None]
        logits.append((torch.tanh((x + mean) @ weights["mix"]) @ weights["head"])[len(prompt) - 1 : -1])
        targets.append(torch.tensor(response))
    entropy = torch.nn.functional.cross_entropy
    pairs = list(zip(logits, targets, strict=True))
    if normalise == "token_mean":
        assert out.sum() / batch["num_examples"][0] == pytest.approx(
            float(entropy(torch.cat(logits), torch.cat(targets)))
        )
        ratio = ROWS / sum(len(t) for t in targets)
        expected = [ratio * entropy(x, t, reduction="sum") for x, t in pairs]
    else:
        expected = [entropy(x, t, reduction="mean" if normalise == "example_mean" else "sum") for x, t in pairs]
    np.testing.assert_allclose(out, expected, rtol=1e-12)  # float64, other order of sums
