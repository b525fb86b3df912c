"""optax's optimizers and wrappers: hypergradients agree with jax.grad through the same steps, or are refused truly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.solve.remedies import remedy_for_not_finite
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.streams import full_batch_stream, shuffled_stream
from tests.core.problems import relative

STEPS, BATCH, EXAMPLES = 6, 3, 5  # two steps an epoch, the second with an empty slot
RATE = 0.05
ROOT = {"eps_root": 1e-12}
EVEN, LAST = (lambda step, **_: step % 2 == 0), (lambda step, **_: step == STEPS - 1)
NEVER = lambda step, **_: step > STEPS  # noqa: E731
LABELS = {"w": "first", "b": "second"}
WARM_UP = optax.linear_schedule(0.0, 0.1, 3)


def late(count):
    return jnp.where(count < STEPS - 2, 0.0, 0.1)


def delayed(steps):
    """Each update is along the gradient that was met so many steps earlier."""

    def update(grad, state, params=None):
        return jax.tree.map(lambda leaf: -RATE * leaf, state[0]), (*state[1:], grad)

    return optax.GradientTransformation(lambda params: (optax.tree.zeros_like(params),) * steps, update)


def chain(*transformations):
    return optax.chain(*transformations, optax.sgd(RATE))


def adam(rate=RATE):
    return optax.adam(rate, **ROOT)


FAST = {
    "MultiSteps, all steps": lambda: optax.MultiSteps(optax.sgd(RATE, 0.9), STEPS),
}
OTHERS = {
    "lookahead": lambda: optax.lookahead(optax.sgd(RATE), 3, 0.5),
    "MultiSteps 2": lambda: optax.MultiSteps(optax.sgd(RATE), 2),
    "apply_every, all steps": lambda: chain(optax.apply_every(STEPS)),
    "rate 0 until the end": lambda: optax.sgd(late),
    "mask until the last step": lambda: optax.conditionally_mask(optax.sgd(RATE), LAST),
    "sign until the last step": lambda: chain(
        optax.conditionally_transform(optax.scale_by_sign(), lambda step, **_: step < STEPS - 1)
    ),
    "delayed": lambda: delayed(2),
    "MultiSteps, schedule": lambda: optax.MultiSteps(optax.sgd(RATE), lambda step: jnp.where(step < 1, 3, 2)),
    "MultiSteps, transformation": lambda: optax.MultiSteps(optax.sgd(RATE), 3).gradient_transformation(),
    "MultiSteps, then decay": lambda: optax.chain(
        optax.MultiSteps(adam(), 3).gradient_transformation(), optax.add_decayed_weights(-0.01)
    ),
    "apply_every after adam": lambda: optax.chain(adam(), optax.apply_every(4)),
    "apply_if_finite": lambda: optax.apply_if_finite(adam(), 3),
    "lookahead, adam": lambda: optax.lookahead(adam(), STEPS, 0.5),
    "warm-up from 0": lambda: optax.sgd(WARM_UP),
    "warm-up from 0, adamw": lambda: optax.adamw(WARM_UP, weight_decay=0.1, **ROOT),
    "conditional adam": lambda: chain(optax.conditionally_transform(optax.scale_by_adam(**ROOT), EVEN)),
    "conditional mask": lambda: optax.conditionally_mask(optax.sgd(RATE), EVEN),
    "masked": lambda: optax.masked(adam(), {"w": True, "b": False}),
    "partition": lambda: optax.partition({"first": adam(), "second": optax.sgd(RATE)}, LABELS),
    "partition, frozen": lambda: optax.partition({"first": adam(), "second": optax.set_to_zero()}, LABELS),
    "partition, lion and sgd": lambda: optax.partition({"first": optax.lion(RATE), "second": optax.sgd(RATE)}, LABELS),
    "selective": lambda: optax.selective_transform(optax.sgd(RATE), freeze_mask={"w": False, "b": True}),
    "freeze": lambda: optax.chain(optax.sgd(RATE), optax.freeze({"w": False, "b": True})),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=WARM_UP),
    "flatten": lambda: optax.flatten(adam()),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.1)), ("sgd", optax.sgd(RATE))),
    "snapshot": lambda: chain(optax.snapshot("norm", optax.tree.norm)),
    "nesterov": lambda: optax.sgd(RATE, 0.9, True),
    "nadamw": lambda: optax.nadamw(RATE, **ROOT),
    "adabelief": lambda: optax.adabelief(RATE),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2),
    "adagrad": lambda: optax.adagrad(RATE),
    "adamaxw": lambda: optax.adamaxw(RATE),
    "adan": lambda: optax.adan(RATE),
    "amsgrad": lambda: optax.amsgrad(RATE, **ROOT),
    "fromage": lambda: optax.fromage(RATE),
    "lamb": lambda: optax.lamb(RATE, **ROOT),
    "lars": lambda: optax.lars(RATE),
    "lbfgs": lambda: optax.lbfgs(RATE, linesearch=None),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE),
    "novograd": lambda: optax.novograd(RATE, **ROOT),
    "optimistic gradient": lambda: optax.optimistic_gradient_descent(RATE),
    "optimistic adam": lambda: optax.optimistic_adam_v2(RATE, **ROOT),
    "rmsprop, centered": lambda: optax.rmsprop(RATE, centered=True, eps=1e-6, eps_in_sqrt=True),
    "sm3": lambda: optax.sm3(RATE),
    "yogi": lambda: optax.yogi(RATE),
    "clip_by_global_norm": lambda: chain(optax.clip_by_global_norm(0.1)),
    "clip_by_block_rms": lambda: chain(optax.clip_by_block_rms(0.1)),
    "centralize": lambda: chain(optax.centralize()),
    "ema": lambda: chain(optax.ema(0.9)),
    "add_noise": lambda: chain(optax.add_noise(0.01, 0.55, 0)),
    "normalize_by_update_norm": lambda: chain(optax.normalize_by_update_norm()),
    "trust ratio": lambda: chain(optax.scale_by_trust_ratio()),
    "block norms": lambda: chain(optax.scale_by_param_block_norm()),
    "acprop": lambda: contrib.acprop(RATE),
    "ademamix": lambda: contrib.ademamix(RATE, **ROOT),
    "schedule_free": lambda: contrib.schedule_free_sgd(RATE),
}
SIGN, UNREACHED = "does not depend on the gradient's size", f"no gradient reaches the parameters in the {STEPS} steps"
NOT_FINITE = "derivative that is not finite"
REFUSED = {
    "rprop": (lambda: optax.rprop(RATE), SIGN),  # its step sizes live in the state, and depend on signs alone
    "MultiSteps, too many": (lambda: optax.MultiSteps(optax.sgd(RATE), STEPS + 1), UNREACHED),
}
REFUSED_OTHERS = {
    "adaptive_grad_clip": (
        lambda: chain(optax.adaptive_grad_clip(0.01)),
        f"{NOT_FINITE}.*In place of adaptive_grad_clip use clip_by_global_norm",
    ),
    "galore": (
        lambda: contrib.galore(RATE, rank=1),
        f"{NOT_FINITE}.*galore projects on singular vectors.*use adamw with eps_root",
    ),
    "madgrad": (lambda: contrib.madgrad(RATE), f"{NOT_FINITE}.*madgrad takes a cube root.*use optax.adagrad"),
    "muon": (lambda: contrib.muon(RATE), f"{NOT_FINITE}.*muon .*adam_eps_root=1e-12 and preconditioning="),
    "prodigy": (
        lambda: contrib.prodigy(RATE),
        f"{NOT_FINITE}.*prodigy has no eps inside its root.*use optax.contrib.dowg",
    ),
    "MultiSteps, adam without eps_root": (
        lambda: optax.MultiSteps(optax.adam(RATE), 2),
        f"{NOT_FINITE}.*Adam and its kin need eps_root > 0",
    ),
    "lion": (lambda: optax.lion(RATE), f"{SIGN}.*scale_by_lion"),
    "signum": (lambda: optax.signum(RATE), SIGN),
    "MultiSteps, lion": (lambda: optax.MultiSteps(optax.lion(RATE), 2), SIGN),
    "apply_every, lion": (lambda: optax.chain(optax.lion(RATE), optax.apply_every(4)), SIGN),
    "inject_hyperparams, lion": (lambda: optax.inject_hyperparams(optax.lion)(learning_rate=RATE), SIGN),
    "partition, lion and frozen": (
        lambda: optax.partition({"first": optax.lion(RATE), "second": optax.set_to_zero()}, LABELS),
        SIGN,
    ),
    "warm-up, lion": (lambda: optax.lion(WARM_UP), SIGN),
    "clip of every entry": (lambda: chain(optax.clip(1e-9)), SIGN),
    "rate 0": (lambda: optax.sgd(0.0), UNREACHED),
    "frozen": (optax.set_to_zero, UNREACHED),
    "mask, always": (lambda: optax.conditionally_mask(optax.sgd(RATE), NEVER), UNREACHED),
    "radam": (lambda: optax.radam(RATE, **ROOT), f"{NOT_FINITE}.*radam has none before it rectifies"),
}


@pytest.fixture(autouse=True)
def rank_promotion():
    """Some of optax's formulas rely on it."""
    with jax.numpy_rank_promotion("allow"):
        yield


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def losses(params, data):
    params = params.fast if isinstance(params, optax.LookaheadParams) else params
    return jnp.log1p((data[0] @ params["w"] + params["b"][None] - data[1]) ** 2).sum(-1)


def problem(name):
    """(start, training, validation)."""
    params = {"w": draw(3, 2, seed=0), "b": draw(2, seed=1)}
    start = optax.LookaheadParams.init_synced(params) if name.startswith("lookahead") else params
    return start, (draw(EXAMPLES, 3, seed=2), draw(EXAMPLES, 2, seed=3)), (draw(4, 3, seed=4), draw(4, 2, seed=5))


def grad_through_steps(optimizer, start, training, validation):
    """jax.grad of the validation loss after the same steps, written with optax alone."""
    stream = shuffled_stream(training, BATCH, STEPS, seed=0)

    @jax.jit
    def step(params, state, weights, batch):
        index, data = batch["index"][0], jax.tree.map(lambda leaf: leaf[0], batch["data"])

        def loss(params):
            return (
                jnp.where(index < EXAMPLES, weights[index] * losses(params, data), 0).sum() / batch["num_examples"][0]
            )

        grad = jax.grad(loss)(params)
        grad = grad.fast if isinstance(grad, optax.LookaheadParams) else grad
        updates, state = optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    def trained_loss(weights):
        params, state = start, optimizer.init(start)
        for t in range(STEPS):
            params, state = step(params, state, weights, stream.batch(t))
        return losses(params, validation).mean()

    return jax.grad(trained_loss)(jnp.ones(EXAMPLES))


def solve(optimizer, start, training, validation):
    solver = unroll(weighted(lambda params, frozen, batch: losses(params, batch["data"])), optimizer, steps=STEPS)
    stream = shuffled_stream(training, BATCH, STEPS, seed=0)
    return solver.run(start, jnp.ones(EXAMPLES), stream, full_batch_stream(validation))


def cases(fast, others):
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.mark.parametrize("name", cases(FAST, OTHERS))
def test_equals_jax_grad_through_the_same_steps(name):
    optimizer, (start, training, validation) = (FAST | OTHERS)[name](), problem(name)
    out = solve(optimizer, start, training, validation)
    expected = grad_through_steps(optimizer, start, training, validation)
    assert np.abs(expected).max() > 1e-6
    assert relative(out.grad, expected) < 1e-10  # lbfgs divides by small curvatures


@pytest.mark.parametrize("name", cases(REFUSED, REFUSED_OTHERS))
def test_refused_with_the_true_reason(name):
    make, message = (REFUSED | REFUSED_OTHERS)[name]
    optimizer, (start, training, validation) = make(), problem(name)
    with pytest.raises(ValueError, match=message):
        solve(optimizer, start, training, validation)
    expected = grad_through_steps(optimizer, start, training, validation)
    if name == "radam":
        assert not np.isfinite(expected).all()
    elif not message.startswith(NOT_FINITE):  # of a gradient entry that is 0, and this run has none
        assert not np.any(expected)


ADAM, MUON = "eps_root > 0", "contrib.muon"
AT_FAULT = {  # the optimizer, the leaves of its state whose derivative is not finite, what is named
    "adam": (lambda: optax.adam(RATE), ".nu", ADAM),
    "adam in MultiSteps in partition": (
        lambda: optax.partition({"first": optax.MultiSteps(optax.adam(RATE), 2), "second": optax.sgd(RATE)}, LABELS),
        ".nu",
        ADAM,
    ),
    "Adam inside muon": (lambda: contrib.muon(RATE), ".inner_states['adam'].inner_state[0].nu", MUON),
    "muon": (lambda: contrib.muon(RATE), ".inner_states['muon'].inner_state[0].mu", MUON),
    "adafactor": (lambda: optax.adafactor(RATE), ".v['", "adafactor .* eps=1e-16"),
    "galore": (lambda: contrib.galore(RATE, rank=1), ".nu", "contrib.galore"),
    "galore, of the gradient alone": (lambda: contrib.galore(RATE, rank=1), "nothing", "contrib.galore"),
    "schedule_free": (lambda: contrib.schedule_free_adamw(RATE), ".nu", r"schedule_free\(optax.adamw\(rate, b1=0.0"),
    "mechanize around adam": (lambda: contrib.mechanize(optax.adam(RATE)), ".s", "contrib.mechanize"),
    "after adam": (lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()), "u['", "radam"),
    "no state": (lambda: chain(optax.adaptive_grad_clip(0.1)), "nothing", "In place of adaptive_grad_clip"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", AT_FAULT)
def test_the_transformation_at_fault_is_named(name):
    make, fault, words = AT_FAULT[name]
    params = problem(name)[0]
    state = make().init(params)
    floats = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    is_finite = [fault not in path for path in floats]
    assert fault == "nothing" or not all(is_finite), floats
    sentence = remedy_for_not_finite({"w": False, "b": True}, state, is_finite)
    assert sentence.startswith(" for the parameters['w']: ")
    assert re.search(words, sentence), sentence
