"""The reverse sweep against plain reverse mode through a scan, and the laws that it keeps."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import certify, checkpointing, streams
from bilevel_jax.core.problem import problem as global_problem
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.solve.hypergradient import hypergradient
from bilevel_jax.core.training import init_train_state, scan, train, train_step
from bilevel_jax.core.types import PADDING, CheckpointPlan, Stream
from bilevel_jax.core.unrolled import (
    _direction,
    backward_pass,
    backward_pass_of_each,
    check_differentiable,
    each,
    unrolled_estimator,
    validation_loss_fn,
)
from tests.core.problems import ROWS, lora, relative, stacked, through_scan, trained


def schedule(count):
    """In float64: of a whole number optax makes it in float32, which two programs round differently."""
    return optax.warmup_cosine_decay_schedule(0.0, 3e-2, 4, 24)(jnp.asarray(count, float))


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2, eps_root=1e-12),
    "adamw, clipped, scheduled": optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(schedule, b2=0.99, eps_root=1e-12, weight_decay=0.1)
    ),
    "rmsprop, decayed": optax.chain(
        optax.add_decayed_weights(0.01), optax.rmsprop(1e-3, eps=1e-6, momentum=0.5, eps_in_sqrt=True)
    ),
}
ADAMW = OPTIMIZERS["adamw, clipped, scheduled"]
WEIGHTS = np.random.default_rng(0).uniform(0.2, 2, ROWS)


def estimate(toy, optimizer, *, plan=None, **options):
    step, run = trained(toy, optimizer, jnp.asarray(WEIGHTS), plan=plan)
    return unrolled_estimator(toy.problem, step, **options)(
        run, jnp.asarray(WEIGHTS), toy.fixed, toy.train, toy.validation
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_reverse_mode_through_a_scan(name):
    toy = lora()
    value, grad = through_scan(toy, OPTIMIZERS[name], jnp.asarray(WEIGHTS))
    out = estimate(toy, OPTIMIZERS[name])
    assert relative(out.grad, grad) < 1e-12  # two orders of summation of the same float64 numbers
    assert relative(out.validation_loss, value) < 1e-13
    assert out.checks.replayed and out.checks.growth >= 1


def test_equals_finite_differences():
    toy = lora()
    out = estimate(toy, ADAMW)
    value = validation_loss_fn(toy.problem)

    def retrained(weights):
        return value(trained(toy, ADAMW, weights)[1].end.params, toy.fixed, toy.validation)

    direction = jnp.sign(out.grad)
    for size, bound in ((1e-2, 1e-2), (1e-3, 1e-4), (1e-4, 1e-6)):  # falls 100 times for each 10 in the step
        slope = (retrained(WEIGHTS + size * direction) - retrained(WEIGHTS - size * direction)) / (2 * size)
        assert abs(float(slope / jnp.vdot(out.grad, direction)) - 1) < bound


@pytest.mark.parametrize(
    "plan",
    (
        CheckpointPlan(23, 1),
        CheckpointPlan(4, 5),
        CheckpointPlan(1, 12),
        CheckpointPlan(2, 3),
        CheckpointPlan(1, 5),
        CheckpointPlan(3, 1),
    ),
)
def test_what_is_kept_changes_no_bit(plan):
    """Nothing replayed, once, and many times; a second sweep of the same run, after the first used up what was kept."""
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    whole = estimate(toy, ADAMW, plan=checkpointing.store_all_plan(24))
    step, run = trained(toy, ADAMW, weights, plan=plan)
    steps_made = []
    counted = step._replace(forward=lambda *args: (steps_made.append(1), step.forward(*args))[1])
    for turn in range(2):
        out = unrolled_estimator(toy.problem, counted)(run, weights, toy.fixed, toy.train, toy.validation)
        np.testing.assert_array_equal(out.grad, whole.grad)
        assert out.checks == whole.checks and len(run.snapshots) < plan.snapshots
        if turn == 0:
            assert len(steps_made) == checkpointing.count_replayed_steps(24, plan)


@pytest.mark.parametrize("plan", (CheckpointPlan(1, 24, linearize=True), CheckpointPlan(2, 3, linearize=True)))
def test_linearisations_on_the_tape_change_nothing_but_rounding(plan):
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    whole = estimate(toy, ADAMW)
    step, run = trained(toy, ADAMW, weights, plan=plan)
    never = step._replace(backward=lambda *arguments: pytest.fail("the primal pass is made again"))
    out = unrolled_estimator(toy.problem, never)(run, weights, toy.fixed, toy.train, toy.validation)
    assert relative(out.grad, whole.grad) < 1e-13  # the same float64 sums in another program
    assert out.checks.replayed and out.validation_loss == whole.validation_loss
    both = each(toy.problem, never)(run, weights, toy.fixed, toy.train, [toy.validation] * 2)
    assert relative(both.grad[1], whole.grad) < 1e-13


def test_passes_of_several_losses_are_compiled_once_for_a_step():
    """Each trainer makes its own pass, with its own calls after a step."""
    toy, weights, traced, counts = lora(), jnp.asarray(WEIGHTS), [], []
    step = trained(toy, ADAMW, weights)[0]
    counted = step._replace(backward=lambda *arguments: traced.append(1) or step.backward(*arguments))
    for _ in range(2):
        run = trained(toy, ADAMW, weights)[1]
        passes = backward_pass_of_each(toy.problem, counted, keep_bits=True, on_step=lambda step: None)
        state = passes.init(run, weights, toy.fixed, [toy.validation] * 2)
        passes.advance(run, weights, toy.fixed, toy.train, state)
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0


def test_the_difference_of_halves_is_that_of_each_example():
    """d = (1/n) sum_i c_i g_i, the g_i by a pass of their own, in float64; an odd number of examples, with padding."""
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    step, run = trained(toy, ADAMW, weights)
    batches = [toy.validation.batch(place) for place in range(toy.validation.steps)]
    count = int(batches[0]["num_examples"][0])
    halves = certify.validation_halves(count, 3)
    alone = [streams.halve_stream(toy.validation, count * jnp.eye(count)[place]) for place in range(count)]
    each_example = each(toy.problem, step)(run, weights, toy.fixed, toy.train, alone).grad
    both = [toy.validation, streams.halve_stream(toy.validation, jnp.asarray(halves))]
    out = each(toy.problem, step)(run, weights, toy.fixed, toy.train, both)
    assert relative(out.grad[0], each_example.mean(0)) < 1e-12  # sums of the same float64 numbers in another order
    assert relative(out.grad[1], halves @ each_example / count) < 1e-12


@pytest.mark.parametrize(
    "plan, window",
    (
        (CheckpointPlan(2, 3), 7),
        pytest.param(CheckpointPlan(2, 3), None, marks=pytest.mark.slow),
        pytest.param(CheckpointPlan(1, 24, linearize=True), None, marks=pytest.mark.slow),
    ),
)
def test_two_outer_losses_in_one_pass_are_each_alone_and_are_resumed(plan, window):
    """Both adjoints side by side: each as alone; saved in the middle, written, read, gone on with: the same bits."""
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    count = int(toy.validation.batch(0)["num_examples"][0])
    halved = streams.halve_stream(toy.validation, jnp.asarray(certify.validation_halves(count, 0)))
    alone = []
    for validation in (toy.validation, halved):
        step, run = trained(toy, ADAMW, weights, plan=plan)
        alone.append(
            unrolled_estimator(toy.problem, step, window=window)(run, weights, toy.fixed, toy.train, validation)
        )

    def pass_back(between):
        step, run = trained(toy, ADAMW, weights, plan=plan)
        passes = backward_pass_of_each(toy.problem, step, window=window, keep_bits=True)
        state = passes.init(run, weights, toy.fixed, [toy.validation, halved])
        while not passes.is_done(run, state):
            state = between(passes.advance(run, weights, toy.fixed, toy.train, state))
        return passes.finish(run, state)

    def write_and_read(state):
        leaves, structure = jax.tree.flatten(state)
        file = io.BytesIO()
        np.savez(file, *leaves)
        file.seek(0)
        loaded = structure.unflatten([jnp.asarray(leaf) for leaf in np.load(file).values()])
        return loaded._replace(step=int(loaded.step))

    out, resumed = pass_back(lambda state: state), pass_back(write_and_read)
    np.testing.assert_array_equal(out.grad, resumed.grad)
    for place, estimate_alone in enumerate(alone):
        assert relative(out.grad[place], estimate_alone.grad) < 1e-13  # rounding in float64: two programs
        assert abs(out.checks.growth[place] / estimate_alone.checks.growth - 1) < 1e-13
        assert out.validation_loss[place] == estimate_alone.validation_loss
    assert out.checks.replayed


def test_halves_of_a_model_with_a_state():
    """The adjoint of the state begins with the halves, too."""

    def losses(params, state, frozen, batch):
        x, y = batch["data"]
        return (x @ params * (1 + state) - y) ** 2

    problem = weighted(
        lambda p, s, f, b: (losses(p, s, f, b), 0.9 * s + 0.1 * jnp.mean(p)), outer=losses, has_state=True
    )
    random = np.random.default_rng(0)
    x, y = jnp.asarray(random.normal(size=(12, 3))), jnp.asarray(random.normal(size=12))
    optimizer, weights = optax.sgd(0.05), jnp.ones(8)
    step = train_step(problem, optimizer)
    stream = streams.shuffled_stream((x[:8], y[:8]), 4, steps=6, seed=0)
    validation = streams.full_batch_stream((x[8:], y[8:]))
    halved = streams.halve_stream(validation, jnp.asarray(certify.validation_halves(4, 0)))
    start = init_train_state(optimizer, jnp.ones(3) / 3, jnp.array(0.2))
    run = train(step, start, weights, (), stream, plan=checkpointing.store_all_plan(6))
    out = each(problem, step)(run, weights, (), stream, [validation, halved])
    for place, one in enumerate((validation, halved)):
        assert relative(out.grad[place], unrolled_estimator(problem, step)(run, weights, (), stream, one).grad) < 1e-13


@pytest.mark.parametrize("plan", (CheckpointPlan(4, 5), CheckpointPlan(2, 3)))
@pytest.mark.parametrize(
    "after", [0, pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_interrupted_and_resumed_changes_no_bit(after, plan):
    """The sweep is saved after a tape, written to bytes, read by a program with cold caches, and gone on with."""
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    whole = estimate(toy, ADAMW)
    step, run = trained(toy, ADAMW, weights, plan=plan)
    sweeps = backward_pass(toy.problem, step)
    sweep = sweeps.init(run, weights, toy.fixed, toy.validation)
    for _ in range(after + 1):
        sweep = sweeps.advance(run, weights, toy.fixed, toy.train, sweep)
    leaves, structure = jax.tree.flatten(sweep)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    loaded = structure.unflatten(list(np.load(file).values()))
    loaded = jax.tree.map(jnp.asarray, loaded)._replace(step=int(loaded.step))
    jax.clear_caches()
    step, run = trained(toy, ADAMW, weights, plan=plan)
    sweeps = backward_pass(toy.problem, step)
    while not sweeps.is_done(run, loaded):
        loaded = sweeps.advance(run, weights, toy.fixed, toy.train, loaded)
    rest = sweeps.finish(run, loaded)
    np.testing.assert_array_equal(rest.grad, whole.grad)
    assert rest.checks == whole.checks


@pytest.mark.parametrize("window", (None, 12))
def test_snapshots_that_are_lost_are_made_again(window):
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    whole = estimate(toy, ADAMW, window=window)
    step, run = trained(
        toy, ADAMW, weights, plan=CheckpointPlan(4, 3), first_backward_step=0 if window is None else 24 - window
    )
    sweeps = backward_pass(toy.problem, step, window=window)
    sweep = sweeps.init(run, weights, toy.fixed, toy.validation)
    sweep = sweeps.advance(run, weights, toy.fixed, toy.train, sweep)
    run.snapshots.clear()
    while not sweeps.is_done(run, sweep):
        sweep = sweeps.advance(run, weights, toy.fixed, toy.train, sweep)
    np.testing.assert_array_equal(sweeps.finish(run, sweep).grad, whole.grad)


def test_window_sweeps_the_last_steps_only():
    toy = lora()
    weights = jnp.asarray(WEIGHTS)
    step, run = trained(toy, ADAMW, weights, plan=CheckpointPlan(4, 5))
    assert sorted(run.snapshots) == [4, 9, 14]

    def tail(weights):
        state = jax.lax.stop_gradient(run.snapshots[14])
        batches = jax.tree.map(lambda leaf: leaf[14:], stacked(toy.train))
        end = scan(step, state, weights, toy.fixed, batches)
        return toy.problem.outer(end.params, toy.fixed, jax.tree.map(lambda leaf: leaf[0], toy.validation.batch(0)))

    out = estimate(toy, ADAMW, window=10)
    assert relative(out.grad, jax.grad(tail)(weights)) < 1e-12
    assert out.checks.steps == 10
    assert relative(estimate(toy, ADAMW, window=7).grad, out.grad) > 1e-3  # a window inside a tape is no longer one
    last = trained(toy, ADAMW, weights, first_backward_step=14)[1]
    assert min(last.snapshots) == 14
    only = unrolled_estimator(toy.problem, step, window=10)(last, weights, toy.fixed, toy.train, toy.validation)
    np.testing.assert_array_equal(only.grad, out.grad)
    np.testing.assert_array_equal(estimate(toy, ADAMW, window=99).grad, estimate(toy, ADAMW).grad)


@pytest.mark.slow
def test_several_outer_losses_in_one_sweep_are_the_single_ones():
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    step, run = trained(toy, ADAMW, weights)
    rows = int((np.asarray(toy.validation.batch(0)["index"]) != PADDING).sum())

    def only(row):
        full = toy.validation.batch(0)
        return Stream(lambda _: {**full, "index": jnp.where(full["index"] == row, row, PADDING)}, 1)

    streams = [toy.validation, *(only(row) for row in range(rows))]
    swept = []
    out = each(toy.problem, step, on_step=swept.append)(run, weights, toy.fixed, toy.train, streams)
    assert sorted(swept) == list(range(run.steps)) and out.checks.replayed
    for index, stream in enumerate(streams):
        one = unrolled_estimator(toy.problem, step)(run, weights, toy.fixed, toy.train, stream)
        assert relative(out.grad[index], one.grad) < 1e-12  # the same float64 sums in another order
        assert relative(out.validation_loss[index], one.validation_loss) < 1e-13
    assert relative(out.grad[1:].sum(0), out.grad[0]) < 1e-12  # each row's loss is a share of L_v


def test_loop_and_scan_are_one_training():
    toy = lora()
    step, run = trained(toy, ADAMW, jnp.asarray(WEIGHTS))
    end = scan(step, run.start, jnp.asarray(WEIGHTS), toy.fixed, stacked(toy.train))
    assert relative(end.params, run.end.params) < 1e-14


def test_micro_batches_change_nothing():
    toy = lora()
    whole = toy._replace(train=Stream(lambda step: toy.train.batch(step, 1), toy.train.steps))
    one, two = estimate(whole, ADAMW), estimate(toy, ADAMW)
    assert relative(one.grad, two.grad) < 1e-13


def test_permuting_rows_permutes_entries():
    toy = lora()
    order = np.random.default_rng(5).permutation(ROWS)
    place = np.argsort(order)

    def batch(step):
        full = toy.train.batch(step)
        index = np.asarray(full["index"])
        renamed = np.where(index == PADDING, PADDING, place[np.minimum(index, ROWS - 1)])
        return {**full, "index": jnp.asarray(renamed)}

    renamed = toy._replace(train=Stream(batch, toy.train.steps))
    step, run = trained(renamed, ADAMW, jnp.asarray(WEIGHTS)[order])
    out = unrolled_estimator(toy.problem, step)(
        run, jnp.asarray(WEIGHTS)[order], toy.fixed, renamed.train, toy.validation
    )
    np.testing.assert_array_equal(out.grad, estimate(toy, ADAMW).grad[order])


def test_rows_that_no_batch_touched_have_entry_zero():
    toy = lora(steps=2)
    seen = np.unique(stacked(toy.train)["index"])
    grad = np.asarray(estimate(toy, ADAMW).grad)
    assert (grad[seen[seen != PADDING]] != 0).all()
    assert (np.delete(grad, seen[seen != PADDING]) == 0).all()


def test_an_example_in_two_halves_keeps_its_total():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(9, 3)))
    y = jnp.asarray(np.random.default_rng(2).normal(size=9))

    def losses(p, data):
        return (data[0] @ p - data[1]) ** 2

    def entries(rows, weights):
        return hypergradient(
            losses, jnp.zeros(3), (x[rows], y[rows]), (x[:3], y[:3]), weights=weights, steps=12,
            optimizer=optax.sgd(0.05 * len(rows)),  # the denominator counts rows; the rate takes it out
        ).grad  # fmt: skip

    whole = entries(np.arange(9), jnp.full(9, 0.8))
    halves = entries(np.append(np.arange(9), 8), jnp.full(10, 0.8).at[8].set(0.5).at[9].set(0.3))
    assert relative(halves[:8], whole[:8]) < 1e-12
    assert relative(0.5 * halves[8] + 0.3 * halves[9], 0.8 * whole[8]) < 1e-12


def test_a_global_outer_variable():
    """The strength of a penalty: the same transition, `take` broadcasts and `add` sums."""
    x, y = jnp.asarray(np.random.default_rng(3).normal(size=(12, 4))), jnp.ones(12)

    def squares(p, batch):
        return (batch["data"][0] @ p - batch["data"][1]) ** 2

    problem = global_problem(
        lambda p, strength, fixed, b: jnp.mean(squares(p, b)) + jnp.exp(strength["log"]) * jnp.sum(p**2),
        lambda p, fixed, b: jnp.mean(squares(p, b)),
    )
    optimizer = optax.sgd(0.05, momentum=0.9)
    stream, held_out = streams.shuffled_stream((x, y), 12, 10, 0), streams.full_batch_stream((x[:5], y[:5]))
    hyper = {"log": jnp.asarray(-1.0)}
    step = train_step(problem, optimizer)
    run = train(step, init_train_state(optimizer, jnp.zeros(4)), hyper, None, stream)
    out = unrolled_estimator(problem, step)(run, hyper, None, stream, held_out)

    def value(hyper):
        end = scan(step, init_train_state(optimizer, jnp.zeros(4)), hyper, None, stacked(stream))
        return problem.outer(end.params, None, jax.tree.map(lambda leaf: leaf[0], held_out.batch(0)))

    assert relative(out.grad["log"], jax.grad(value)(hyper)["log"]) < 1e-12


REFUSED = {
    "adam without eps_root": (optax.adam(1e-2), "not finite.*eps_root > 0"),
    "lion": (optax.lion(1e-3), "does not depend on the gradient's size.*lion takes a sign: use optax.scale_by_lion"),
    "sign": (optax.chain(optax.scale_by_sign(), optax.sgd(1e-3)), "its derivative is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_an_optimizer_without_derivative(name):
    optimizer, message = REFUSED[name]
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    step, run = trained(toy, optimizer, weights)
    with pytest.raises(ValueError, match=message):
        check_differentiable(step, optimizer, run, weights, toy.fixed, toy.train)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accepts_an_optimizer_with_one(name):
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    step, run = trained(toy, OPTIMIZERS[name], weights)
    assert check_differentiable(step, OPTIMIZERS[name], run, weights, toy.fixed, toy.train) is None


def test_directions_have_no_pattern():
    like = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64)), "c": jnp.zeros(()), "d": jnp.zeros(())}
    first, second = (_direction(like, number) for number in (0, 1))
    columns = np.stack([np.ravel(found[name]) for found in (first, second) for name in ("a", "b")])
    assert np.linalg.matrix_rank(first["a"]) == 64
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.06  # of 4,096 independent numbers: .016 each
    assert abs(columns.mean()) < 0.02 and 0.55 < columns.std() < 0.6  # uniform between -1 and 1
    assert len({float(found[name]) for found in (first, second) for name in ("c", "d")}) == 4


def test_accepts_an_update_by_the_difference_of_two_leaves():
    """Of equal directions of both its derivative would be 0."""

    def update(grad, state, params=None):
        return {"a": -0.1 * (grad["a"] - grad["b"]), "b": -0.1 * (grad["b"] - grad["a"])}, state

    optimizer = optax.GradientTransformation(lambda params: (), update)
    problem = weighted(lambda params, frozen, batch: (params["a"] - batch["data"]) ** 2 + params["b"] ** 2)
    stream, weights = streams.full_batch_stream(jnp.array([1.0, 3.0])), jnp.ones(2)
    step = train_step(problem, optimizer)
    run = train(step, init_train_state(optimizer, {"a": jnp.zeros(()), "b": jnp.zeros(())}), weights, (), stream)
    assert check_differentiable(step, optimizer, run, weights, (), stream) is None


def test_a_replay_that_misses_is_told():
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    step, run = trained(toy, ADAMW, weights, plan=CheckpointPlan(4, 5))
    run.snapshots[4] = jax.tree.map(lambda leaf: leaf + 1e-9 if leaf.ndim else leaf, run.snapshots[4])
    out = unrolled_estimator(toy.problem, step)(run, weights, toy.fixed, toy.train, toy.validation)
    assert not out.checks.replayed


def test_a_training_that_kept_nothing_is_refused():
    toy, weights = lora(), jnp.asarray(WEIGHTS)
    step, run = trained(toy, ADAMW, weights, plan=checkpointing.NO_CHECKPOINTS)
    with pytest.raises(ValueError, match="stored nothing"):
        unrolled_estimator(toy.problem, step)(run, weights, toy.fixed, toy.train, toy.validation)


def test_hypergradient_wants_one_estimand():
    with pytest.raises(ValueError, match="either optimizer .* or l2"):
        hypergradient(lambda p, d: d @ p, jnp.zeros(2), jnp.ones((3, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"weights \(4,\) for 3 training examples"):
        hypergradient(lambda p, d: d @ p, jnp.zeros(2), jnp.ones((3, 2)), jnp.ones((3, 2)), weights=jnp.ones(4), l2=1.0)
