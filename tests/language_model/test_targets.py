"""Validation examples that judge by another loss than that of training, or by several: against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.lm import models
from bilevel_jax.lm.losses.sft import negative_log_likelihood

OPTIMIZER = optax.adamw(1e-2, eps_root=1e-6)
STEPS = 2


@pytest.fixture(scope="module")
def lm64(small_folder):
    with jax.enable_x64(True):
        return bj.lm.load(small_folder, dtype="float64")


@pytest.fixture(scope="module")
def judges(held_out):
    """Five pairs of two sources: the right answers against ones without their first letter."""
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["response"],
            "rejected": "z" + row["response"][1:],
            "source": "helpful" if place < 3 else "harmless",
        }
        for place, row in enumerate(held_out)
    ]


# ---- plain JAX: without any of our batches; the rows of each set are of one length


def log_probs(lm, params, prompts, responses):
    """log p of each letter of each response and of its end."""
    ids = jnp.array(
        [
            [1, *(lm.tokenizer.convert_tokens_to_ids(letter) for letter in prompt + response), 2]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    inputs = ids[:, :-1]
    places = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
    hidden = lm.decoder.hidden(params, inputs, places, jnp.ones_like(inputs))
    log_p = jax.nn.log_softmax(hidden @ lm.decoder.head(params))
    return jnp.take_along_axis(log_p, ids[:, 1:, None], 2)[:, len(prompts[0]) :, 0]


def column(rows, key):
    return [row[key] for row in rows]


def mean_loss(lm, params, rows):
    return -log_probs(lm, params, column(rows, "prompt"), column(rows, "response")).mean(1)


def margins(lm, params, rows, reduce):
    chosen, rejected = (
        reduce(log_probs(lm, params, column(rows, "prompt"), column(rows, side)), 1) for side in ("chosen", "rejected")
    )
    return chosen - rejected


def simpo(lm, start, params, rows, beta=2.5, gamma_ratio=0.55):
    return -jax.nn.log_sigmoid(beta * (margins(lm, params, rows, jnp.mean) - gamma_ratio)).mean()


def dpo(lm, start, params, rows, beta=0.1):
    gains = margins(lm, params, rows, jnp.sum) - margins(lm, start, rows, jnp.sum)
    return -jax.nn.log_sigmoid(beta * gains).mean()


def distance(params):
    """Of some weights from a picture."""
    picture = jnp.linspace(-1, 1, 8)
    return jnp.mean((params["layers"]["q_proj"]["kernel"][0] - picture[None]) ** 2)


def response_losses(decoder):
    log_likelihoods = bj.lm.sequence_log_likelihoods(decoder)
    return lambda params, batch: -log_likelihoods(params, batch)


LABELS = ("b", "c", "z")


def label_losses(lm):
    """-log p of the right letter among those of a list: a classifier."""
    ids = jnp.array([lm.tokenizer.convert_tokens_to_ids(letter) for letter in LABELS])

    def among_labels(logits, targets):
        whole = negative_log_likelihood(logits, targets)
        return whole - jax.nn.logsumexp(logits, -1) + jax.nn.logsumexp(logits[..., ids], -1)

    return lambda decoder: bj.lm.mean_over_targets(decoder, among_labels)


def expected(lm, rows, outer, weights, *, lora=0):
    """(L_v, d L_v / d weights) by jax.grad through the whole training."""
    start = lm.params
    theta = (
        models.init_lora(
            lm.architecture, jax.random.key(0), rank=lora, alpha=16.0, target_modules=(), dtype=jnp.float64
        )
        if lora
        else start
    )

    def whole(theta):
        return models.join_adapters(start, theta) if lora else theta

    def value(weights):
        params, state = theta, OPTIMIZER.init(theta)
        for _ in range(STEPS):
            grad = jax.grad(lambda p: (weights * mean_loss(lm, whole(p), rows)).sum() / len(rows))(params)
            updates, state = OPTIMIZER.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return outer(params if not lora else models.merge_adapters(start, params))

    return jax.jit(jax.value_and_grad(value))(weights)


def assert_equals_plain_jax(lm, rows, validation, target, outer, *, lora=0):
    rows = rows[:4]
    weights = np.linspace(0.5, 1.5, len(rows))
    with jax.enable_x64(True):
        result = lm.finetune(
            rows, validation, OPTIMIZER, steps=STEPS, batch_size=len(rows), target=target, weights=weights, lora=lora
        )
        value, grad = expected(lm, rows, outer, jnp.asarray(weights), lora=lora)
    assert result.value == pytest.approx(float(value), rel=1e-12)
    np.testing.assert_allclose(result.grad, grad, rtol=1e-10, atol=1e-14)
    assert np.abs(result.grad).max() > 1e-5
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name, outer", [("simpo", simpo), ("dpo", dpo)])
def test_pairs_judge_supervised_examples(lm64, rows, judges, name, outer):
    assert_equals_plain_jax(lm64, rows, judges, name, lambda params: outer(lm64, lm64.params, params, judges))


@pytest.mark.slow
def test_supervised_examples_judge_pairs(lm64, pairs, held_out):
    with jax.enable_x64(True):
        result = lm64.finetune(pairs, held_out, OPTIMIZER, steps=2, batch_size=3, objective="simpo", target="sft")
        value = float(mean_loss(lm64, result.lm.params, held_out).mean())
    assert result.status is bj.Status.OK and (result.grad != 0).sum() == 6  # two steps of three pairs
    assert result.value == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_a_function_of_the_users_judges(lm64, rows, held_out):
    def outer(params):
        return -log_probs(lm64, params, column(held_out, "prompt"), column(held_out, "response")).sum(1).mean()

    assert_equals_plain_jax(lm64, rows, held_out, response_losses, outer)


@pytest.mark.slow
def test_a_classifier_judges(lm64, rows):
    validation = [
        {"prompt": f"{letters}>", "response": label} for letters, label in zip(("ab", "bc", "xy"), LABELS, strict=True)
    ]
    with jax.enable_x64(True):
        ids = jnp.array([lm64.tokenizer.convert_tokens_to_ids(letter) for letter in LABELS])
        target = label_losses(lm64)

    def outer(params):
        sequences = [
            [1, *(lm64.tokenizer.convert_tokens_to_ids(letter) for letter in row["prompt"] + row["response"]), 2]
            for row in validation
        ]
        inputs, targets = jnp.array(sequences)[:, :-1], jnp.array(sequences)[:, 1:]
        places = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
        logits = lm64.decoder.hidden(params, inputs, places, jnp.ones_like(inputs)) @ lm64.decoder.head(params)
        right = jnp.take_along_axis(logits, targets[..., None], 2)[..., 0]
        return (jax.nn.logsumexp(logits[..., ids], -1) - right)[:, 3:].mean()  # the label, and the end behind it

    assert_equals_plain_jax(lm64, rows, validation, target, outer)


@pytest.mark.slow
@pytest.mark.parametrize("lora", (0, 2))
def test_the_parameters_alone_judge(lm64, rows, lora):
    result = assert_equals_plain_jax(lm64, rows, None, distance, distance, lora=lora)
    assert [note for note in result.notes if "distance of the parameters" in note]


MIXED = {"helpful": (0.7, "simpo"), "harmless": (0.3, "dpo"), "parameters": (-0.5, distance)}


@pytest.mark.parametrize("order", (1, pytest.param(-1, marks=pytest.mark.slow)))
def test_several_targets_are_a_weighted_sum(lm64, rows, judges, order):
    """Whatever the order of the examples and of the targets."""

    def outer(params):
        return (
            0.7 * simpo(lm64, lm64.params, params, judges[:3])
            + 0.3 * dpo(lm64, lm64.params, params, judges[3:])
            - 0.5 * distance(params)
        )

    assert_equals_plain_jax(lm64, rows, judges[::order], dict(list(MIXED.items())[::order]), outer)


@pytest.mark.slow
def test_micro_batches_change_nothing(lm64, rows, judges):
    with jax.enable_x64(True):
        one, four = (
            lm64.finetune(
                rows, judges, OPTIMIZER, steps=2, batch_size=8, gradient_accumulation_steps=parts, target=MIXED
            )
            for parts in (1, 4)
        )
    np.testing.assert_allclose(four.grad, one.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
def test_the_training_loss_by_name_is_the_training_loss(lm, rows, held_out):
    named = lm.finetune(rows, held_out, OPTIMIZER, steps=2, batch_size=4, target="sft")
    plain = lm.finetune(rows, held_out, OPTIMIZER, steps=2, batch_size=4)
    np.testing.assert_array_equal(named.grad, plain.grad)


@pytest.mark.slow
def test_a_file_is_read_again_when_it_has_changed(lm, rows, held_out, tmp_path):
    text = (
        "from bilevel_jax.lm import sequence_log_likelihoods\n"
        "def f(decoder):\n    g = sequence_log_likelihoods(decoder)\n"
        "    return lambda params, batch: FACTOR * g(params, batch)\n"
    )
    values = []
    for factor in ("-1", "-3"):
        (tmp_path / "own.py").write_text(text.replace("FACTOR", factor))
        result = lm.finetune(rows, held_out, OPTIMIZER, steps=1, batch_size=4, target=f"{tmp_path}/own.py:f")
        values.append(result.value)
    assert values[1] == pytest.approx(3 * values[0], rel=1e-5)


def constant(decoder):
    return lambda params, batch: jnp.zeros(batch["index"].shape)


MISUSES = {
    "name": ("ppo", "target.losses = ('ppo',): each must be sft, dpo, simpo or path/to/file.py:function"),
    "single responses": ("dpo", "target.losses = dpo compares a chosen with a rejected one"),
    "no factor": ({"validation": "sft"}, "target['validation'] is 'sft'; wanted (a factor other than 0, a loss)"),
    "no such source": ({"helpful": (1.0, "sft")}, "its source is 'validation', which no target reads"),
    "no decoder": (lambda: None, "It is called with the model's decoder, and returns a function (params, batch)"),
    "no function": (lambda decoder: 3.0, "returned a float for the model's decoder; wanted a function"),
    "one number": (lambda decoder: lambda params, batch: jnp.ones(()), "gives losses of shape () for 4 examples"),
    "no jax": (lambda decoder: lambda params, batch: 1.0, "gives a float; wanted jax numbers of a float type"),
    "not of the parameters": (constant, "the target constant does not depend on the parameters"),
}


@pytest.mark.parametrize("target, said", MISUSES.values(), ids=MISUSES)
def test_a_misuse_is_one_sentence(lm, rows, held_out, target, said):
    with pytest.raises((ValueError, FloatingPointError)) as caught:
        lm.finetune(rows, held_out, OPTIMIZER, steps=1, batch_size=4, target=target)
    assert said in str(caught.value) and "\n" not in str(caught.value)
