"""DPO and SimPO against torch, their curvature, pair accuracy, extremes, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bilevel_jax.core.curvature import gauss_newton
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.types import PADDING
from bilevel_jax.lm.data.batches import BatchShape, fit_evaluation_batch_shape, make_evaluation_stream
from bilevel_jax.lm.losses.preferences import (
    dpo_composite_loss,
    dpo_losses,
    pair_accuracy,
    preference_margins,
    simpo_composite_loss,
    simpo_losses,
)
from bilevel_jax.lm.losses.sft import (
    assemble_params,
    sequence_log_likelihoods,
    sft_composite_loss,
    sft_losses,
    token_accuracy,
)
from bilevel_jax.lm.models import init_lora, init_params, load_model, make_decoder
from tests.lm.pairs_and_rows import TINY, VOCAB, corpus, texts

MODEL = make_decoder(TINY)
TEXTS = texts(7, 2)
PAIRS = corpus(TEXTS)
LOSSES = {
    "dpo": (dpo_losses, dpo_composite_loss, {"beta": 0.7}),
    "dpo, smoothed": (dpo_losses, dpo_composite_loss, {"beta": 0.7, "label_smoothing": 0.2}),
    "simpo": (simpo_losses, simpo_composite_loss, {"beta": 2.5, "gamma_ratio": 0.55}),
}


def batch_of(data=PAIRS, **options):
    """All pairs in one micro-batch of 8 slots."""
    shape = fit_evaluation_batch_shape(data, 8, num_micro_batches=1, length=16, packing=False)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), make_evaluation_stream(data, shape).batch(0)) | options


def relative(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


# ---- against torch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(torch model in float64, its folder) twice: a policy and a reference, random, made by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = []
    for name in ("policy", "reference"):
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made.append((model.double(), folder))
    return made


def torch_likelihoods(model):
    """[pair, side]: the log-probability of every response, one sequence at a time."""
    import torch

    out = torch.zeros(len(TEXTS), 2, dtype=torch.float64)
    with torch.no_grad():
        for i, (prompt, responses) in enumerate(TEXTS):
            for side, response in enumerate(responses):
                steps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
                for t, token in enumerate(response):
                    out[i, side] += steps[len(prompt) + t - 1, token]
    return out


def test_equals_torch(models, x64):
    import torch

    policy, reference = (torch_likelihoods(model) for model, _ in models)
    lengths = torch.tensor([[len(response) for response in responses] for _, responses in TEXTS])
    config, params = load_model(models[0][1], dtype=jnp.float64)
    _, start = load_model(models[1][1], dtype=jnp.float64)
    model, batch = make_decoder(config), batch_of()
    chosen_over_rejected = np.asarray(jax.jit(preference_margins(model))(start, batch))
    assert relative(chosen_over_rejected[:7], reference[:, 0] - reference[:, 1]) < 1e-6  # it rotates in float32
    batch = batch_of(PAIRS.with_reference_margins(chosen_over_rejected[:7]))  # stored in float32

    beta, smoothing, gamma = 0.3, 0.1, 1.2
    z = beta * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
    log_sigmoid, per_token = torch.nn.functional.logsigmoid, policy / lengths
    expected = {
        dpo_losses(model, beta=beta): -log_sigmoid(z),
        dpo_losses(model, beta=beta, label_smoothing=smoothing): -(1 - smoothing) * log_sigmoid(z)
        - smoothing * log_sigmoid(-z),
        simpo_losses(model, beta=2.0, gamma_ratio=gamma / 2.0): -log_sigmoid(
            2.0 * per_token[:, 0] - 2.0 * per_token[:, 1] - gamma
        ),
        pair_accuracy(model, "dpo"): (z > 0).double(),
        pair_accuracy(model, "simpo"): (per_token[:, 0] > per_token[:, 1]).double(),
    }
    for ours, theirs in expected.items():
        out = np.asarray(jax.jit(ours)(params, batch))
        assert out.shape == (8,)
        np.testing.assert_allclose(out[:7], theirs, rtol=1e-6)
    alone = batch_of(corpus([(prompt, responses[:1]) for prompt, responses in TEXTS]))
    for normalise, lengths_or_mean in (("example_mean", lengths[:, 0]), ("token_mean", lengths[:, 0].double().mean())):
        out = jax.jit(sft_losses(model, reduction=normalise))(params, alone)
        np.testing.assert_allclose(out[:7], -policy[:, 0] / lengths_or_mean, rtol=1e-6)
    likelihoods = np.asarray(jax.jit(sequence_log_likelihoods(model))(params, batch)).reshape(8, 2)
    assert relative(likelihoods[:7], policy) < 1e-6 and (likelihoods[7] == 0).all()


# ---- the split, and curvature


def adapters():
    """(adapters that are not 0, base)."""
    base = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    start = init_lora(TINY, jax.random.key(1), rank=1, alpha=2, dtype=jnp.float64)
    return jax.tree.map(lambda x: x + 0.1, start), base


@pytest.mark.parametrize("name", ["dpo, smoothed", "simpo"])
@pytest.mark.slow
def test_gauss_newton_is_the_dense_product(name, x64):
    whole, split, options = LOSSES[name]
    params, fixed = adapters()
    loss, plain = split(MODEL, **options), whole(MODEL, **options)
    problem = weighted(lambda p, fixed, batch: plain(assemble_params(p, fixed), batch))
    stream = make_evaluation_stream(PAIRS, BatchShape(2, 2, 4, 16, 2))
    table = jnp.asarray(np.random.default_rng(0).uniform(0.2, 2, 7))
    flat, unravel = ravel_pytree(params)
    batch = batch_of()

    @jax.jit
    def outputs_and_slopes(flat):
        def outputs(flat):
            return loss.outputs(unravel(flat), fixed, batch)

        return outputs(flat), jax.jacrev(outputs)(flat)

    values, jacobian = outputs_and_slopes(flat)
    assert relative(loss.link(values, fixed, batch), plain(assemble_params(params, fixed), batch)) < 1e-13  # float64
    beta = options["beta"]
    z = beta * (values - (options["gamma_ratio"] if name == "simpo" else batch["reference"]))
    bend = beta**2 / ((1 + jnp.exp(-z)) * (1 + jnp.exp(z)))
    dense = jnp.einsum("ei,e,ej->ij", jacobian[:7], table * bend[:7] / 7, jacobian[:7])
    product = gauss_newton(problem, loss)
    for key in jax.random.split(jax.random.key(2), 3):
        v = jax.random.normal(key, flat.shape)
        out = ravel_pytree(product(params, table, fixed, stream, unravel(v)))[0]
        assert relative(out, dense @ v) < 1e-11  # float64, other order of sums
        assert jnp.vdot(v, out) > 0
    least, most = jnp.linalg.eigvalsh(dense)[jnp.array([0, -1])]
    assert least > -1e-14 * most  # rank 7 of 7 pairs: the rest is 0 to rounding


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [0.0, 3.0, 60.0, 1e4, -3.0, -60.0, -1e4])
def test_slope_and_bend_are_finite_however_large_the_margin(name, margin):
    _, split, options = LOSSES[name]
    link = split(MODEL, **options).link
    batch = {"index": jnp.zeros(1, jnp.int32), "reference": jnp.zeros(1)}

    def slope(x):
        return jax.grad(lambda x: link(x, None, batch)[0])(x)

    x = jnp.full(1, margin)
    first, second = jax.jvp(slope, (x,), (jnp.ones(1),))
    beta, smoothing = options["beta"], options.get("label_smoothing", 0.0)
    z = np.float64(beta * (margin - options.get("gamma_ratio", 0.0)))
    up, down = (1 / (1 + np.exp(np.clip(sign * z, -700, 700))) for sign in (-1, 1))  # sigma(z), sigma(-z)
    assert link(x, None, batch)[0] == pytest.approx(
        (1 - smoothing) * np.logaddexp(0, -z) + smoothing * np.logaddexp(0, z), rel=1e-6, abs=1e-30
    )
    # float32, in which what is below 1e-38 is 0; a slope that is the difference of two has the digits of the larger
    assert first[0] == pytest.approx(
        beta * (smoothing * up - (1 - smoothing) * down), rel=1e-5, abs=max(1e-30, 1e-7 * smoothing)
    )
    assert second[0] == pytest.approx(beta**2 * up * down, rel=1e-5, abs=1e-30)


# ---- single pairs


def test_ties_count_half():
    same = corpus([(prompt, [chosen, chosen]) for prompt, (chosen, _) in TEXTS]).with_reference_margins(np.zeros(7))
    params = init_params(TINY, jax.random.key(0))
    for method in ("dpo", "simpo"):
        assert (pair_accuracy(MODEL, method)(params, batch_of(same)) == 0.5).all()


def test_swapping_the_sides_flips_the_margin(x64):
    swapped = corpus([(prompt, responses[::-1]) for prompt, responses in TEXTS])
    params = init_params(TINY, jax.random.key(0), dtype=jnp.float64)
    for per_token in (False, True):
        value = jax.jit(preference_margins(MODEL, per_token=per_token))
        assert relative(value(params, batch_of(swapped)), -value(params, batch_of())) < 1e-13  # float64


@pytest.mark.parametrize("name", LOSSES)
def test_empty_pair_is_exactly_nothing(name):
    whole, _, options = LOSSES[name]
    params = init_params(TINY, jax.random.key(0))
    values, pull = jax.vjp(lambda p: whole(MODEL, **options)(p, batch_of()), params)
    assert batch_of()["index"][7] == PADDING and values[7] == 0 and (values[:7] > 0).all()
    slope = ravel_pytree(pull(jnp.zeros(8).at[7].set(1.0)))[0]
    assert (slope == 0).all()


def test_errors_say_what_to_do():
    params, pairs = init_params(TINY, jax.random.key(0)), batch_of()
    single = batch_of(corpus(texts(7, 1)))
    for one in (sft_losses(MODEL), token_accuracy(MODEL)):
        with pytest.raises(
            ValueError, match="8 examples with 16 sequences: these are preference pairs.*`dpo_losses` or `simp"
        ):
            one(params, pairs)
    for frozen in (True, False):  # before it looks at the parameters
        with pytest.raises(ValueError, match="these are preference pairs"):
            sft_composite_loss(MODEL, frozen_head=frozen).outputs(params, params if frozen else None, pairs)
    for one in (dpo_losses(MODEL, beta=1), simpo_losses(MODEL, beta=1, gamma_ratio=0), pair_accuracy(MODEL, "dpo")):
        with pytest.raises(
            ValueError, match="8 examples with 8 sequences; this loss compares two.*or take `sft_losses`"
        ):
            one(params, single)
    del pairs["reference"]
    for one in (dpo_losses(MODEL, beta=1), pair_accuracy(MODEL, "dpo")):
        with pytest.raises(ValueError, match="no `reference`. Compute `preference_margins` under the reference model"):
            one(params, pairs)
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        for one in (lambda: dpo_losses(MODEL, beta=beta), lambda: simpo_losses(MODEL, beta=beta, gamma_ratio=0)):  # noqa: B023
            with pytest.raises(ValueError, match="beta is .*; it is a finite number above 0"):
                one()
    with pytest.raises(ValueError, match="label_smoothing is 0.5; it is at least 0 and below 0.5"):
        dpo_losses(MODEL, beta=1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="gamma_ratio is -1; it is a finite number of at least 0"):
        simpo_losses(MODEL, beta=1, gamma_ratio=-1)
    with pytest.raises(ValueError, match=r"method is 'ipo'; it is one of \['dpo', 'simpo'\]"):
        pair_accuracy(MODEL, "ipo")
