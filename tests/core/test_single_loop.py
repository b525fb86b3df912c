"""Penalty and mixing in one loop: a step, its laws, and a regression whose optimum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import single_loop, streams, weightings
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.types import PADDING, Stream
from tests.core.problems import ROWS, lora, normal, relative
from tests.core.test_training import equations

CONSTANT = optax.constant_schedule
SOURCE = jnp.arange(ROWS) % 3
SELECTORS = {
    "softmax": weightings.online_softmax(ROWS),
    "sigmoid": weightings.online_sigmoid(ROWS),
    "per_source": weightings.online_per_source(SOURCE, 3),
}
SOURCES = weightings.rater(jax.nn.one_hot(SOURCE, 3))
WEIGHTINGS = {
    "softmax": weightings.softmax(ROWS),
    "sigmoid": weightings.sigmoid(ROWS),
    "per_source": SOURCES._replace(weights=lambda h: SOURCES.weights(weightings.RaterVariable(h, ()))),
}


def made(toy, selector="softmax", second_model="copy", *, optimizer=None, **options):
    optimizer = optimizer or optax.adamw(1e-2)
    options = {"validation_share": CONSTANT(0.4), "weights_learning_rate": CONSTANT(0.5)} | options
    return single_loop.penalty(toy.problem, optimizer, SELECTORS[selector], second_model=second_model, **options)


def drive(method, toy, steps, state=None):
    """A Python loop, as the driver of long runs does it; donated states are never read again."""
    state = method.init(toy.params) if state is None else state
    for step in range(int(state.train_state.step), steps):
        state, _ = method.step(state, toy.fixed, toy.train.batch(step), toy.validation.batch(0))
    return state


# What a step does


@pytest.mark.parametrize("name", ["penalty", *(pytest.param(one, marks=pytest.mark.slow) for one in ("mixing", "bmo"))])
def test_the_terms_of_the_validation_loss_add_up_before_the_clip(name):
    """A batch of each: the step of the sum of their gradients, as steps of each term alone say without a clip."""
    toy, train = lora(), lora().train.batch(0)
    whole = toy.validation.batch(0)
    part = whole | {"index": jnp.where(jnp.arange(whole["index"].shape[-1]) % 2, PADDING, whole["index"])}

    def change(validation, share, *clips):
        optimizer = optax.chain(*clips, optax.sgd(1.0))
        method = {
            "penalty": lambda: made(toy, optimizer=optimizer, validation_share=CONSTANT(share)),
            "mixing": lambda: single_loop.mixing(toy.problem, optimizer, share, ROWS),
            "bmo": lambda: single_loop.bmo(
                toy.problem, optimizer, ROWS, validation_share=CONSTANT(share), temperature=CONSTANT(1.0)
            ),
        }[name]()
        state, metrics = method.step(method.init(toy.params), toy.fixed, train, validation)
        return optax.tree.sub(state.train_state.params, toy.params), metrics.validation_loss

    (first, one), (second, other) = change(whole, 0.4), change(part, 0.4)
    both = jax.tree.map(lambda a, b, c: a + b - 0.6 * c, first, second, change(whole, 0.0)[0])
    norm = optax.tree.norm(both)
    clipped, total = change((whole, part), 0.4, optax.clip_by_global_norm(0.1 * norm))
    assert relative(clipped, optax.tree.scale(0.1, both)) < 1e-5 and relative(first, second) > 0.01
    assert float(total) == pytest.approx(float(one + other), rel=1e-5)


def test_a_step_is_the_gradient_step_of_the_minimax_objective():
    """ScaleBiO's: min over theta and the sources' logits, max over u, of L_v + gamma (G(theta) - G(u))."""
    gamma, eta, rate = 3.0, 0.1, 0.7
    toy = lora()
    toy = toy._replace(
        problem=toy.problem._replace(prior=proximal(0.3, lambda fixed: jax.tree.map(jnp.ones_like, toy.params)))
    )
    batch, held_out = toy.train.batch(0), toy.validation.batch(0)
    method = made(
        toy,
        "per_source",
        optimizer=optax.sgd(eta),
        validation_share=single_loop.share_from_gamma(CONSTANT(gamma)),
        weights_learning_rate=CONSTANT(rate * gamma),
    )
    theta, u = (
        jax.tree.map(lambda leaf, seed=seed: leaf + 0.3 * normal(seed, *leaf.shape), toy.params) for seed in (1, 2)
    )
    h = normal(3, 3)

    def lower(params, h):
        w = WEIGHTINGS["per_source"].weights(h).at[batch["index"]].get(mode="fill", fill_value=0)
        losses = jax.lax.map(lambda m: toy.problem.inner(params, m[0], toy.fixed, m[1]), (w, batch)).sum()
        return losses + toy.problem.prior(params, toy.fixed)

    def objective(theta, u, h):
        upper = toy.problem.outer(theta, toy.fixed, jax.tree.map(lambda leaf: leaf[0], held_out))
        return upper + gamma * (lower(theta, h) - lower(u, h))

    down, up, outer = jax.grad(objective, argnums=(0, 1, 2))(theta, u, h)
    share = 1 / (1 + gamma)
    state = method.init(toy.params)
    state = state._replace(
        train_state=state.train_state._replace(params=theta),
        second_model=state.second_model._replace(params=u),
        weights_state=state.weights_state._replace(logits=h),
    )
    theta, u, h = jax.tree.map(np.array, (theta, u, h))  # the step donates its state
    after, info = method.step(state, toy.fixed, batch, held_out)
    assert relative(jax.tree.map(lambda p, g: p - eta * share * g, theta, down), after.train_state.params) < 1e-12
    assert relative(jax.tree.map(lambda p, g: p + eta / gamma * g, u, up), after.second_model.params) < 1e-12
    assert relative(h - rate * outer, after.weights_state.logits) < 1e-12
    assert float(info.validation_share) == share


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_steps_as_its_weighting_is_pulled_back(name):
    selector, batch = SELECTORS[name], jnp.arange(ROWS)[None]
    state, entries = selector.init(), normal(1, 1, ROWS)
    change = 0.8 * normal(2, *selector.batch_grad(state, batch, entries).shape)
    state = selector.update(state, batch, change)
    h = change.reshape(-1)
    assert relative(selector.weights(state), WEIGHTINGS[name].weights(h)) < 1e-13
    assert relative(selector.batch_weights(state, batch)[0], WEIGHTINGS[name].weights(h)) < 1e-13
    scale = ROWS if name == "per_source" else 1  # a mean over the rows of the batch, as many rows share one logit
    expected = weightings.weighting_vjp(WEIGHTINGS[name], h, entries[0] / scale)
    assert relative(selector.batch_grad(state, batch, entries).reshape(-1), expected) < 1e-12


@pytest.mark.parametrize("normalised", (False, True))
@pytest.mark.parametrize("name", ("softmax", "sigmoid"))
def test_absent_rows_do_not_move(name, normalised):
    toy = lora()
    method = made(toy, name, normalize_step=normalised)
    logits = lambda state: np.array(getattr(state.weights_state, "logits", state.weights_state))  # noqa: E731
    state = drive(method, toy, 2)
    for step in (2, 3, 4):  # the last step of the epoch is padded
        before, index = logits(state), np.array(toy.train.batch(step)["index"])
        state = drive(method, toy, step + 1, state)
        present = np.isin(np.arange(ROWS), index)
        np.testing.assert_array_equal(logits(state)[~present], before[~present])
        assert (logits(state)[present] != before[present]).all() and present.sum() == (index != PADDING).sum()


def test_normalised_steps_have_one_size_and_a_cap():
    toy = lora()
    for cap, size in ((float("inf"), 0.5), (0.2, None)):
        after = drive(made(toy, "sigmoid", "none", normalize_step=True, max_step=cap), toy, 1).weights_state
        moved = after[np.unique(toy.train.batch(0)["index"])]
        assert jnp.abs(moved).max() <= cap + 1e-15
        assert size is None or abs(jnp.sqrt(jnp.mean(moved**2)) - size) < 1e-12


def test_without_a_copy_the_entries_are_the_losses():
    toy = lora()
    batch = toy.train.batch(4)  # padded
    info = made(toy, second_model="none").step(
        made(toy, second_model="none").init(toy.params), toy.fixed, batch, toy.validation.batch(0)
    )[1]
    ones = jnp.ones_like(batch["index"][0], float)
    for micro in range(2):
        one = jax.tree.map(lambda leaf, micro=micro: leaf[micro], batch)
        losses = one["num_examples"] * jax.grad(toy.problem.inner, argnums=1)(toy.params, ones, toy.fixed, one)
        np.testing.assert_allclose(
            info.hypergradients[micro], jnp.where(one["index"] == PADDING, 0, losses), rtol=1e-12
        )


def test_the_validation_loss_is_the_mean_over_the_rows_of_its_batch():
    toy = lora()
    whole = toy.validation.batch(0)
    summed = whole | {"num_examples": 7 * whole["num_examples"]}  # as in a stream of seven such batches
    method = made(toy)
    told = [
        method.step(method.init(toy.params), toy.fixed, toy.train.batch(0), one)[1].validation_loss
        for one in (whole, summed)
    ]
    assert told[0] == told[1] == toy.problem.outer(toy.params, toy.fixed, jax.tree.map(lambda leaf: leaf[0], whole))


# Laws


@pytest.mark.parametrize("second", ("copy", "none"))
@pytest.mark.parametrize("name", SELECTORS)
def test_micro_batches_sum_to_the_whole(name, second):
    toy = lora()

    def joined(step):
        batch = toy.train.batch(step)
        return {k: v[:1] if k == "num_examples" else v.reshape(1, -1, *v.shape[2:]) for k, v in batch.items()}

    split, whole = (
        drive(made(one, name, second), one, 12) for one in (toy, toy._replace(train=Stream(joined, toy.train.steps)))
    )
    assert relative(split, whole) < 1e-11


@pytest.mark.parametrize("name", ("softmax", "sigmoid"))
def test_permuting_rows_permutes_weights(name):
    toy = lora()
    place = jax.random.permutation(jax.random.key(0), ROWS)

    def renamed(step):
        batch = toy.train.batch(step)
        index = place.at[batch["index"]].get(mode="fill", fill_value=PADDING).astype(jnp.int32)
        return batch | {"index": index}

    method = made(toy, name)
    plain, moved = drive(method, toy, 12), drive(method, toy._replace(train=Stream(renamed, 24)), 12)
    assert relative(method.weights(moved)[place], method.weights(plain)) < 1e-12
    assert relative(moved.train_state.params, plain.train_state.params) < 1e-12


@pytest.mark.parametrize("name", SELECTORS)
def test_a_saved_state_goes_on_bit_for_bit(name):
    toy = lora()
    share = single_loop.epoch_schedule(single_loop.OFFLINE_SELECTION_SHARES, 5)
    method = made(toy, name, validation_share=share)
    whole = drive(method, toy, 12)
    leaves, structure = jax.tree.flatten(drive(method, toy, 7))
    saved = [np.array(leaf) for leaf in leaves]
    fresh = made(toy, name, validation_share=share)  # another process
    resumed = drive(fresh, toy, 12, structure.unflatten([jnp.asarray(leaf) for leaf in saved]))
    for one, other in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("second", ("copy", "none"))
def test_is_traced_once(second):
    plain, traces = lora(), []

    def counted(params, weights, fixed, batch):
        traces.append(1)
        return plain.problem.inner(params, weights, fixed, batch)

    toy = plain._replace(problem=plain.problem._replace(inner=counted))
    method = made(toy, second_model=second, validation_share=single_loop.epoch_schedule(single_loop.SEAL_SHARES, 4))
    state = drive(method, toy, 2)
    first = len(traces)
    drive(method, toy, 12, state)
    assert len(traces) == first <= 4  # a scan body for each model, which jax may trace twice


@pytest.mark.parametrize("name", SELECTORS)
def test_only_scatters_make_arrays_as_long_as_the_table(name):
    """Everything else in a step is O(batch): no softmax, gradient or optimiser state over all rows."""
    rows = 1_000_003
    toy = lora()
    selector = {
        "softmax": lambda: weightings.online_softmax(rows),
        "sigmoid": lambda: weightings.online_sigmoid(rows),
        "per_source": lambda: weightings.online_per_source(jnp.zeros(rows, jnp.int32), 3),
    }[name]()
    method = single_loop.penalty(
        toy.problem, optax.adam(1e-2), selector, validation_share=CONSTANT(0.4), weights_learning_rate=CONSTANT(0.5)
    )
    args = (method.init(toy.params), toy.fixed, toy.train.batch(0), toy.validation.batch(0))
    makers = {
        equation.primitive.name
        for equation in equations(jax.make_jaxpr(method.step)(*args).jaxpr)
        if any(rows in var.aval.shape for var in equation.outvars)
    }
    assert makers <= {"scatter-add", "jit", "pjit"}


def test_the_running_normaliser_keeps_up():
    """In float32, over changes that are each far below what its sum resolves, with repeated rows and padding."""
    rows, steps, slots = 1_000_000, 2000, 16
    with jax.enable_x64(False):
        selector = weightings.online_softmax(rows)

        def step(state, key):
            index = jax.random.randint(key, (1, slots), 0, rows // 2).at[0, -1].set(PADDING)
            index = index.at[0, 1].set(index[0, 0])
            change = -0.001 * jax.random.uniform(jax.random.fold_in(key, 1), (1, slots))
            return selector.update(state, index, change), None

        run = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(0), steps))[0])
        state = run(selector.init())
        logits = np.array(state.logits, np.float64)
        exact, kept = (
            np.exp(logits - float(state.logit_bound)).sum(),
            float(state.exp_sum) - float(state.rounding_error),
        )
        assert rows - exact > 10  # and a single step changes it by less than .01, below half of float32's .06
        assert abs(kept - exact) < 1e-2 * (rows - exact)
        index = jnp.arange(slots)[None]
        assert (
            relative(selector.batch_weights(selector.renormalize(state), index), selector.batch_weights(state, index))
            < 1e-6
        )


def test_large_logits_do_not_overflow():
    selector, index = weightings.online_softmax(5), jnp.array([[0, 1]], jnp.int32)
    with jax.enable_x64(False):
        state = selector.init()
        for _ in range(4):
            state = selector.update(state, index, jnp.array([[60.0, 59.0]]))
        assert relative(selector.weights(state)[:2], selector.batch_weights(state, index)[0]) < 1e-6
        np.testing.assert_allclose(selector.batch_weights(state, index).sum(), 5, rtol=1e-6)


# Where it ends


def regression(seed: int):
    """The separable regression: 40 unknowns, 20 validation examples, 15 useful and 15 useless training examples.

    Rows are Gaussian of length about 1 and the validation answers are exact. Useful: other questions with exact
    answers. Useless, inside of the validation span: fifteen of the validation questions, each answered wrongly by
    +-1.78. The 30 training examples are independent, so one model fits all of them (another one than fits V). With the
    losses e^2 / 2, mixing at rho = 1/2 leaves each of the fifteen a validation error of .4 * 1.78, so
    L_v = (15 / 20) (.4 * 1.78)^2 / 2 = .19; 1.78 was chosen for that figure.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    target = jax.random.normal(keys[0], (40,), float)
    held_out, useful = (
        jax.random.normal(key, (count, 40), float) / 40**0.5 for key, count in zip(keys[1:3], (20, 15), strict=True)
    )
    wrong = held_out[:15] @ target + 1.78 * jax.random.rademacher(keys[3], (15,), float)
    train = jnp.concatenate([useful, held_out[:15]]), jnp.concatenate([useful @ target, wrong])
    return train, (held_out, held_out @ target)


def outcome(build, seed=0, steps=60_000):
    """L_v and the weights after `steps` steps of SGD with momentum on whole batches, from 0."""
    train, held_out = (streams.full_batch_stream(data).batch(0) for data in regression(seed))
    problem = weighted(lambda params, fixed, batch: 0.5 * (batch["data"][0] @ params - batch["data"][1]) ** 2)
    method = build(problem, optax.sgd(0.2, momentum=0.9, nesterov=True))

    @jax.jit
    def run(state, train, held_out):
        def body(state, _):
            return method.step(state, None, train, held_out)[0], None

        return jax.lax.scan(body, state, length=steps)[0]

    state = run(method.init(jnp.zeros(40)), train, held_out)
    value = problem.outer(state.train_state.params, None, jax.tree.map(lambda leaf: leaf[0], held_out))
    return float(value), np.array(method.weights(state))


@pytest.mark.parametrize("second", ("copy", "none"))
@pytest.mark.parametrize("seed", (0, 1))
def test_reaches_the_optimistic_optimum(second, seed):
    """The reference: L_v 4e-10, greatest useless weight 2e-5, where mixing ends at 1.9e-1."""

    def build(problem, optimizer):
        rate = lambda step: jnp.where(step < 5000, 0.0, 0.3)  # theta first: early losses would decide among useful rows  # noqa: E731
        selector = weightings.online_softmax(30)
        return single_loop.penalty(
            problem,
            optimizer,
            selector,
            validation_share=CONSTANT(0.5),
            weights_learning_rate=rate,
            second_model=second,
        )

    value, weights = outcome(build, seed)
    assert value < 1e-9  # measured: 1.1e-10 and 1.5e-10
    assert weights[15:].max() < 1e-5  # measured: 1.5e-6 and 2.1e-6; they fall as 1 / (rate * step)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-9)


def test_mixing_stays_above_it():
    value, weights = outcome(lambda problem, optimizer: single_loop.mixing(problem, optimizer, 0.5, 30))
    np.testing.assert_allclose(value, 15 / 20 * (0.4 * 1.78) ** 2 / 2, rtol=1e-9)  # .190
    assert (weights == 1).all()


def test_the_shares_are_those_of_the_schedules():
    share = single_loop.epoch_schedule(single_loop.SEAL_SHARES, 10)
    assert [round(float(share(step)), 6) for step in (0, 9, 10, 20, 1000)] == [1, 1, 0.97, 0.94, 0.94]
    growing = single_loop.share_from_gamma(optax.exponential_decay(1.0, 10, 3.0, staircase=True))
    np.testing.assert_allclose([growing(step) for step in (0, 9, 10, 25)], [1 / 2, 1 / 2, 1 / 4, 1 / 10], rtol=1e-6)


def test_says_what_it_solves():
    toy = lora()
    assert "trains on V" in made(toy).estimand and "optimistic" in made(toy).estimand
    assert "trains on V" in single_loop.mixing(toy.problem, optax.sgd(0.1), 0.5, ROWS).estimand


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda p, o: single_loop.mixing(p, o, 1.5, 3),
            r"validation_share 1.5 is no share; give a number from 0 .* to 1",
        ),
        (lambda p, o: single_loop.epoch_schedule((), 3), "0 values, 3 steps per epoch; give at least one of each"),
        (
            lambda p, o: single_loop.penalty(
                p,
                o,
                weightings.online_sigmoid(3),
                validation_share=CONSTANT(0.5),
                weights_learning_rate=CONSTANT(0.1),
                second_model="both",
            ),
            "second_model='both'; use 'copy' .* or 'none'",
        ),
    ],
)
def test_wrong_settings_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(lora().problem, optax.sgd(0.1))
