"""The solvers against plain JAX: every outer variable, under every transformation, and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bilevel_jax.core.problem import problem as global_problem
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve import scanned
from bilevel_jax.core.solve.arrays import batch_order
from bilevel_jax.core.solve.solution import Status
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.streams import full_batch_stream
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.types import Stream
from bilevel_jax.core.unrolled import unrolled_estimator
from tests.core.problems import relative

RANDOM = np.random.default_rng(0)
TRAIN = (RANDOM.normal(size=(24, 3)), RANDOM.normal(size=24))
VALID = (RANDOM.normal(size=(8, 3)), RANDOM.normal(size=8))
START = {"w": RANDOM.normal(size=(3, 4)), "a": RANDOM.normal(size=4)}
WEIGHTS = RANDOM.uniform(0.2, 2, 24)
STEPS = 20
ADAM = optax.adam(1e-2, eps_root=1e-12)
OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": ADAM,
    "adamw, clipped, scheduled": optax.chain(
        optax.clip_by_global_norm(0.3),
        optax.adamw(optax.linear_schedule(1e-2, 0, STEPS), eps_root=1e-12, weight_decay=0.1),
    ),
    "accumulated": optax.MultiSteps(ADAM, 2),
}


def to_double(tree):
    """As arrays of JAX, which are float64 inside of a test alone."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def example_losses(params, frozen, batch):
    x, y = batch["data"]
    return (jnp.tanh(x @ params["w"]) @ params["a"] - y) ** 2


def data():
    return to_double(TRAIN), to_double(VALID), to_double(START), to_double(WEIGHTS)


def plain(optimizer, order=None):
    """L_v of the same training written down in plain JAX, to be differentiated by JAX."""
    train, valid, _, _ = data()

    def value(params, weights):
        def step(carry, t):
            params, state = carry
            rows = jnp.arange(24) if order is None else jnp.asarray(order)[t]

            def loss(params):
                return jnp.mean(
                    weights[rows] * example_losses(params, (), {"data": jax.tree.map(lambda leaf: leaf[rows], train)})
                )

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(STEPS))
        return example_losses(params, (), {"data": valid}).mean()

    return value


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("adamw") else [pytest.mark.slow]) for name in OPTIMIZERS]
)
def test_equals_reverse_mode_through_the_loop(name):
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), OPTIMIZERS[name], steps=STEPS, batch_size=7)
    key = jax.random.key(0)
    value, grads = jax.jit(jax.value_and_grad(plain(OPTIMIZERS[name], batch_order(24, 7, STEPS, key)), (0, 1)))(
        start, weights
    )
    solution = solver.run(start, weights, train, valid, key=key)
    assert relative(solution.value, value) < 1e-13
    assert relative((solution.grad_start, solution.grad), grads) < 1e-12  # two orders of summation in float64
    assert solution.checks.replayed and int(solution.status) == Status.OK


@pytest.mark.parametrize("memory", [pytest.param("sqrt", marks=pytest.mark.slow), 12])
def test_memory_changes_nothing_but_rounding(memory):
    train, valid, start, weights = data()
    whole = unroll(weighted(example_losses), ADAM, steps=37, memory="all").run(start, weights, train, valid)
    solution = unroll(weighted(example_losses), ADAM, steps=37, memory=memory).run(start, weights, train, valid)
    assert relative((solution.grad, solution.grad_start), (whole.grad, whole.grad_start)) < 1e-13
    assert solution.checks.replayed


@pytest.mark.slow
def test_equals_the_driver_of_long_runs():
    train_data, valid, start, weights = data()
    problem, key = weighted(example_losses), jax.random.key(3)
    solver = unroll(problem, ADAM, steps=STEPS, batch_size=7)
    order = batch_order(24, 7, STEPS, key)

    def batch(step):
        index = order[step]
        return {
            "data": jax.tree.map(lambda leaf: leaf[index][None], train_data),
            "index": jnp.asarray(index)[None],
            "num_examples": jnp.full((1,), 7.0),
        }

    step, stream = train_step(problem, ADAM), Stream(batch, STEPS)
    trajectory = train(step, init_train_state(ADAM, start), weights, (), stream)
    estimate = unrolled_estimator(problem, step)(trajectory, weights, (), stream, full_batch_stream(valid))
    solution = solver.run(start, weights, train_data, valid, key=key)
    assert relative(solution.grad, estimate.grad) < 1e-13
    assert relative(solution.grad_start, estimate.direction) < 1e-13
    assert float(solution.checks.growth) == pytest.approx(estimate.checks.growth, rel=1e-12)


@pytest.mark.slow
def test_window_stops_early():
    train, valid, start, weights = data()
    whole = unroll(weighted(example_losses), ADAM, steps=STEPS)
    begin = unroll(weighted(example_losses), optax.sgd(0.05), steps=12).run(start, weights, train, valid).params
    window = unroll(weighted(example_losses), optax.sgd(0.05), steps=STEPS, window=8).run(start, weights, train, valid)
    rest = unroll(weighted(example_losses), optax.sgd(0.05), steps=8).run(begin, weights, train, valid)
    assert relative(window.grad, rest.grad) < 1e-13
    assert relative(window.grad, whole.run(start, weights, train, valid).grad) > 1e-3


# --- outer variables


def test_learning_rate_and_other_hyperparameters():
    train, valid, start, weights = data()

    def value(rate, b1):
        return plain(optax.adam(rate, b1=b1, eps_root=1e-12))(start, weights)

    optimizer = optax.inject_hyperparams(optax.adam)(1e-2, b1=0.9, eps_root=1e-12)
    solution = unroll(weighted(example_losses), optimizer, steps=STEPS).run(start, weights, train, valid)
    wanted = jax.jit(jax.grad(value, (0, 1)))(1e-2, 0.9)
    assert relative([solution.grad_optimizer[name] for name in ("learning_rate", "b1")], list(wanted)) < 1e-10
    assert set(solution.grad_optimizer) == {"learning_rate", "b1", "b2", "eps", "eps_root"}


def smoothed(params, hyper, frozen, batch):  # labels drawn towards their mean
    x, y = batch["data"]
    share = jax.nn.sigmoid(hyper)
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["a"] - (1 - share) * y - share * y.mean()) ** 2)


def decayed(params, hyper, frozen, batch):  # a strength for each parameter
    decay = sum(
        jnp.sum(jnp.exp(s) * p**2) for s, p in zip(jax.tree.leaves(hyper), jax.tree.leaves(params), strict=True)
    )
    return jnp.mean(example_losses(params, frozen, batch)) + decay


def augmented(params, hyper, frozen, batch):  # noise of a learned size on the inputs
    x, y = batch["data"]
    noisy = x + jnp.exp(hyper) * jax.random.normal(batch["key"], x.shape, x.dtype)
    return jnp.mean(example_losses(params, frozen, {"data": (noisy, y)}))


def rated(params, hyper, frozen, batch):  # a network weighs the examples
    x, y = batch["data"]
    rating = jax.nn.sigmoid(jnp.tanh(jnp.c_[x, y] @ hyper["in"]) @ hyper["out"])
    return jnp.mean(rating * example_losses(params, frozen, batch))


def distilled(params, hyper, frozen, batch):  # the training data are learned
    return jnp.mean(example_losses(params, frozen, {"data": hyper}))


OUTER = {
    "label smoothing": (smoothed, np.float64(-1)),
    "decay of each parameter": (decayed, {"w": np.full((3, 4), -4.0), "a": np.full(4, -5.0)}),
    "augmentation": (augmented, np.float64(-2)),
    "rating network": (rated, {"in": np.ones((4, 5)) / 3, "out": np.linspace(-1, 1, 5)}),
    "learned data": (distilled, (np.linspace(-1, 1, 6).reshape(2, 3), np.array([0.5, -0.5]))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "rating network" else [pytest.mark.slow]) for name in OUTER]
)
def test_any_outer_variable(name):
    inner, hyper = OUTER[name]
    train, valid, start, _ = data()
    hyper, key = to_double(hyper), jax.random.key(1)

    def value(hyper):
        def step(carry, t):
            params, state = carry
            batch = {"data": train, "key": jax.random.fold_in(key, t)}
            updates, state = ADAM.update(
                jax.grad(lambda params: inner(params, hyper, (), batch))(params), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, ADAM.init(start)), jnp.arange(STEPS))
        return example_losses(params, (), {"data": valid}).mean()

    problem = global_problem(inner, lambda params, frozen, batch: example_losses(params, frozen, batch).mean())
    solution = unroll(problem, ADAM, steps=STEPS).run(start, hyper, train, valid, key=key)
    assert relative(solution.grad, jax.jit(jax.grad(value))(hyper)) < 1e-10
    assert int(solution.status) == Status.OK


# --- transformations


@pytest.mark.slow
def test_composes_with_transformations_of_jax():
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), ADAM, steps=STEPS)
    value, (start_grad, weights_grad) = jax.jit(jax.value_and_grad(plain(ADAM), (0, 1)))(start, weights)
    run = partial(solver.run, train=train, valid=valid)
    many_weights, many_starts = jnp.stack([weights, 2 * weights]), jax.tree.map(lambda p: jnp.stack([p, 2 * p]), start)
    grads = {
        "jit": jax.jit(run)(start, weights).grad,
        "vmap over weights": jax.vmap(lambda w: run(start, w).grad)(many_weights)[0],
        "vmap over starts": jax.vmap(lambda p: run(p, weights).grad)(many_starts)[0],
        "map": jax.lax.map(lambda w: run(start, w).grad, many_weights)[0],
        "scan": jax.lax.scan(lambda c, w: (c, run(start, w).grad), 0, many_weights)[1][0],
        "grad of value": jax.grad(lambda w: solver.value(start, w, train, valid))(weights),
        "jit of grad of value": jax.jit(jax.grad(lambda w: solver.value(start, w, train, valid)))(weights),
        "vmap of grad of value": jax.vmap(jax.grad(lambda w: solver.value(start, w, train, valid)))(many_weights)[0],
    }
    for name, grad in grads.items():
        assert relative(grad, weights_grad) < 1e-12, name
    assert relative(jax.grad(lambda p: solver.value(p, weights, train, valid))(start), start_grad) < 1e-12
    assert relative(solver.value(start, weights, train, valid), value) < 1e-13


def test_a_search_of_fifty_steps_inside_one_jit():
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), ADAM, steps=STEPS)

    @jax.jit
    def search(weights):
        def outer_step(weights, _):
            solution = solver.run(start, weights, train, valid)
            return jnp.maximum(weights - 0.5 * solution.grad, 0), (solution.value, solution.status)

        return jax.lax.scan(outer_step, weights, length=50)

    values, status = search(weights)[1]
    assert (np.diff(values) < 0).all() and (status == Status.OK).all()


def cut(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), tree)


@pytest.fixture(scope="module")
def prior():
    return proximal(0.1, lambda frozen: optax.tree.zeros_like(START))


@pytest.mark.slow
def test_data_parallel(eight_devices, prior):
    train, valid, start, weights = data()
    one = unroll(weighted(example_losses, prior=prior), ADAM, steps=STEPS).run(start, weights, train, valid)
    solver = unroll(weighted(example_losses, prior=prior), ADAM, steps=STEPS, axis_name="devices")
    by_pmap = jax.pmap(lambda w, *rows: solver.run(start, w, *rows), "devices")(cut(weights), cut(train), cut(valid))
    assert relative(by_pmap.grad.reshape(-1), one.grad) < 1e-12
    assert relative(jax.tree.map(lambda leaf: leaf[5], by_pmap.grad_start), one.grad_start) < 1e-12
    assert relative(by_pmap.value, jnp.full(8, one.value)) < 1e-12

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, common = PartitionSpec("devices"), PartitionSpec()
    parallel = jax.shard_map(
        lambda w, train, valid: (lambda s: (s.grad, s.value, s.grad_start))(solver.run(start, w, train, valid)),
        mesh=mesh, in_specs=(rows, rows, rows), out_specs=(rows, common, common),
    )  # fmt: skip
    assert relative(jax.jit(parallel)(weights, train, valid), (one.grad, one.value, one.grad_start)) < 1e-12

    placed = jax.device_put((weights, train, valid), NamedSharding(mesh, rows))
    by_sharding = unroll(weighted(example_losses, prior=prior), ADAM, steps=STEPS).run(start, *placed)
    assert relative(by_sharding.grad, one.grad) < 1e-12


@pytest.mark.slow
def test_data_parallel_with_a_common_outer_variable(eight_devices):
    train, valid, start, _ = data()
    problem = global_problem(decayed, lambda params, frozen, batch: example_losses(params, frozen, batch).mean())
    hyper = jax.tree.map(lambda leaf: jnp.full_like(leaf, -4), start)
    one = unroll(problem, ADAM, steps=STEPS).run(start, hyper, train, valid)
    solver = unroll(problem, ADAM, steps=STEPS, axis_name="devices")
    many = jax.pmap(lambda *rows: solver.run(start, hyper, *rows), "devices")(cut(train), cut(valid))
    assert relative(jax.tree.map(lambda leaf: leaf[3], many.grad), one.grad) < 1e-12


@pytest.mark.slow
def test_pmap_over_seeds(eight_devices):
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), ADAM, steps=STEPS, batch_size=7)
    keys = jax.random.split(jax.random.key(0), 8)
    many = jax.pmap(lambda key: solver.run(start, weights, train, valid, key=key))(keys)
    one = solver.run(start, weights, train, valid, key=keys[2])
    assert relative(many.grad[2], one.grad) < 1e-12
    assert len(set(many.value.tolist())) == 8


def test_compiles_once():
    train, valid, start, weights = data()
    traces = []

    def losses(params, frozen, batch):
        traces.append(1)
        return example_losses(params, frozen, batch)

    solver = unroll(weighted(losses), ADAM, steps=STEPS)
    solver.run(start, weights, train, valid)
    first = len(traces)
    solver.run(start, 2 * weights, train, jax.tree.map(lambda leaf: leaf / 2, valid))
    assert len(traces) == first


# --- what is refused, and what is told


def test_batches_visit_every_example_once_an_epoch():
    order = batch_order(24, 7, 24, jax.random.key(0))
    epochs = order.reshape(-1).reshape(7, 24)
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1])


def test_what_rounding_cannot_resolve_is_told():
    """Under Adam a weight that scales a coordinate's whole gradient changes nothing: what is computed is noise."""
    problem = weighted(lambda theta, frozen, batch: 0.5 * (theta[batch["index"]] - batch["data"]) ** 2)
    solver = unroll(problem, optax.adam(1e-2, eps=1e-30, eps_root=1e-30), steps=STEPS)
    rows = jnp.arange(1.0, 6.0)
    solution = solver.run(jnp.zeros(5), jnp.ones(5), rows, rows, throw=False)
    assert int(solution.status) == Status.UNRESOLVED and float(solution.checks.resolution) < 1
    with pytest.raises(FloatingPointError, match="UNRESOLVED: the hypergradient is below what rounding resolves"):
        solver.run(jnp.zeros(5), jnp.ones(5), rows, rows)
    by_sgd = unroll(problem, optax.sgd(0.1), steps=STEPS).run(jnp.zeros(5), jnp.ones(5), rows, rows)
    assert int(by_sgd.status) == Status.OK


@pytest.mark.slow
def test_divergence_is_told():
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), optax.sgd(1e4), steps=60)
    with pytest.raises(FloatingPointError, match="NOT_FINITE.*lower the learning rate"):
        solver.run(start, weights, train, valid)
    many = jax.vmap(lambda w: solver.run(start, w, train, valid).status)(jnp.stack([weights, 0 * weights]))
    assert many.tolist()[0] == Status.NOT_FINITE


@pytest.mark.slow
def test_an_optimizer_without_a_derivative_at_zero_is_told():
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), optax.adam(1e-2), steps=3)
    rows = (train[0].at[:, 0].set(0), train[1])  # the gradient of w[0] is 0
    with pytest.raises(ValueError, match="not finite at a gradient of this run .step 0..*need eps_root"):
        solver.run(start, weights, rows, valid)
    assert int(solver.run(start, weights, rows, valid, throw=False).status) == Status.NOT_FINITE


def test_second_derivatives_are_refused():
    train, valid, start, weights = data()
    solver = unroll(weighted(example_losses), ADAM, steps=3)
    with pytest.raises(ValueError, match="a second derivative through a training run is not supported"):
        jax.hessian(lambda w: solver.value(start, w, train, valid))(weights)
    with pytest.raises(ValueError, match="Differentiate `solver.value`"):
        jax.grad(lambda w: solver.run(start, w, train, valid).value)(weights)


def test_nested_segments_keep_few_states():
    assert scanned.segment_lengths(10_000, 202) == (100,)
    for steps in (7, 100, 1000, 10_000):
        for states in (steps, 64, 40):
            lengths = scanned.segment_lengths(steps, states)
            assert scanned.count_stored_states(steps, lengths) <= max(states, 0)
