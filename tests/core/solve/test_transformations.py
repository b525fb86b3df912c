"""Every solver under every transformation of JAX, equal to the method written down in plain JAX."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bilevel_jax.core import single_loop, solvers, weightings
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve.implicit import implicit
from bilevel_jax.core.solve.jointly import jointly
from bilevel_jax.core.solve.penalty import penalty
from bilevel_jax.core.solve.solution import BilevelSolver
from bilevel_jax.core.solve.unroll import unroll
from tests.core.problems import relative

N, WIDTH, STEPS, WINDOW, DELTA, RATE, GAMMA, MINIMIZING = 16, 3, 9, 4, 0.5, 0.4, 50.0, 60
RANDOM = np.random.default_rng(0)
TRAIN = (RANDOM.normal(size=(N, WIDTH)), RANDOM.normal(size=N))
VALID = (RANDOM.normal(size=(8, WIDTH)), RANDOM.normal(size=8))
START, HYPER = RANDOM.normal(size=WIDTH), RANDOM.uniform(0.5, 1.5, N)
MOMENTUM = optax.sgd(RATE, momentum=0.5)
TOLERANCE = 1e-10


def example_losses(params, data):
    return jnp.log(jnp.cosh(data[0] @ params - data[1]))


def inner(params, weights, train):
    return jnp.mean(weights * example_losses(params, train)) + DELTA / 2 * jnp.sum(params**2)


def outer(params, valid):
    return example_losses(params, valid).mean()


def train_plain(params, weights, train, steps, objective=inner):
    def step(carry, _):
        params, state = carry
        updates, state = MOMENTUM.update(jax.grad(objective)(params, weights, train), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, MOMENTUM.init(params)), length=steps)[0]


def plain_unrolled(start, weights, train, valid):
    return jax.grad(lambda weights: outer(train_plain(start, weights, train, STEPS)[0], valid))(weights)


def plain_window(start, weights, train, valid):
    begin = train_plain(start, weights, train, STEPS - WINDOW)

    def value(weights):
        def step(carry, _):
            params, state = carry
            updates, state = MOMENTUM.update(jax.grad(inner)(params, weights, train), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, begin, length=WINDOW)
        return outer(params, valid)

    return jax.grad(value)(weights)


def plain_implicit(start, weights, train, valid):
    params = train_plain(start, weights, train, MINIMIZING)[0]
    v = jnp.linalg.solve(jax.hessian(inner)(params, weights, train), jax.grad(outer)(params, valid))
    return -jax.grad(lambda weights: jax.grad(inner)(params, weights, train) @ v)(weights)


def plain_penalty(start, weights, train, valid):
    def mixed(params, weights, train):
        return (outer(params, valid) + GAMMA * inner(params, weights, train)) / (1 + GAMMA)

    low = train_plain(start, weights, train, MINIMIZING)[0]
    high = train_plain(low, weights, train, MINIMIZING, objective=mixed)[0]
    return GAMMA * (example_losses(high, train) - example_losses(low, train)) / N


def plain_single_loop(start, logits, train, valid):
    """theta, its copy u, and the logits of sigmoid weights, in turn."""

    def step(carry, _):
        params, copy, logits = carry
        weights = 2 * jax.nn.sigmoid(logits)
        grad = 0.3 * jax.grad(outer)(params, valid) + 0.7 * jax.grad(inner)(params, weights, train)
        difference = example_losses(params, train) - example_losses(copy, train)
        change = jax.grad(lambda h: jnp.sum(2 * jax.nn.sigmoid(h) * difference))(logits)
        copy = copy - RATE * jax.grad(inner)(copy, weights, train)
        return (params - RATE * grad, copy, logits - 0.5 * change), None

    logits = jax.lax.scan(step, (start, start, logits), length=STEPS)[0][2]
    return 2 * jax.nn.sigmoid(logits)


class Case(NamedTuple):
    """A solver, and what its result must be."""

    build: Callable[[str | None], BilevelSolver]
    plain: Callable
    result: Callable = lambda solution: solution.grad


def build_single_loop(axis_name):
    method = single_loop.penalty(
        PROBLEM, optax.sgd(RATE), weightings.online_sigmoid(N if axis_name is None else N // 8),
        validation_share=optax.constant_schedule(0.3), weights_learning_rate=optax.constant_schedule(0.5),
        axis_name=axis_name,
    )  # fmt: skip
    return jointly(PROBLEM, method, steps=STEPS)


PROBLEM = weighted(lambda params, frozen, batch: example_losses(params, batch["data"]), prior=proximal(DELTA))
ACCURATE = solvers.cg(tolerance=1e-13)
CASES = {
    "unrolled": Case(lambda axis: unroll(PROBLEM, MOMENTUM, steps=STEPS, axis_name=axis), plain_unrolled),
    "window": Case(lambda axis: unroll(PROBLEM, MOMENTUM, steps=STEPS, window=WINDOW, axis_name=axis), plain_window),
    "implicit": Case(
        lambda axis: implicit(PROBLEM, solver=ACCURATE, optimizer=MOMENTUM, steps=MINIMIZING, axis_name=axis),
        plain_implicit,
    ),
    "penalty": Case(
        lambda axis: penalty(PROBLEM, MOMENTUM, gamma=GAMMA, steps=MINIMIZING, axis_name=axis), plain_penalty
    ),
    "single loop": Case(build_single_loop, plain_single_loop, lambda solution: solution.weights),
}


NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in ("window", "penalty") else []) for name in CASES]
"""A window is the unrolled method with a shorter way back; penalty is made of the same steps as implicit."""


def data():
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (START, HYPER, TRAIN, VALID))


def cut(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), tree)


@pytest.mark.parametrize("name", NAMES)
def test_one_device(name):
    start, hyper, train, valid = data()
    solver, result = CASES[name].build(None), CASES[name].result
    plain = jax.jit(partial(CASES[name].plain, train=train, valid=valid))
    run = partial(solver.run, train=train, valid=valid)
    starts, hypers = jnp.stack([start, 0.5 * start]), jnp.stack([hyper, 0.5 * hyper])
    over_starts, several = jax.vmap(plain, (0, None))(starts, hyper), jax.vmap(plain, (None, 0))(start, hypers)
    found = {
        "called": (result(run(start, hyper)), plain(start, hyper)),
        "jit": (result(jax.jit(run)(start, hyper)), plain(start, hyper)),
        "vmap over starts": (jax.vmap(lambda p: result(run(p, hyper)))(starts), over_starts),
        "vmap over hypers": (jax.vmap(lambda h: result(run(start, h)))(hypers), several),
        "map": (jax.lax.map(lambda h: result(run(start, h)), hypers), several),
    }

    def outer_steps(one_step):
        def step(hyper, _):
            return hyper - 0.1 * one_step(hyper), None

        return jax.lax.scan(step, hyper, length=3)[0]

    found["scan over outer steps"] = (
        outer_steps(lambda h: result(run(start, h))),
        jax.jit(lambda: outer_steps(lambda h: plain(start, h)))(),
    )
    for transformation, (value, expected) in found.items():
        assert relative(value, expected) < TOLERANCE, transformation


@pytest.mark.parametrize("name", NAMES)
def test_grad_of_value(name):
    start, hyper, train, valid = data()
    solver = CASES[name].build(None)

    def value(hyper):
        return solver.value(start, hyper, train, valid)

    if name == "single loop":
        with pytest.raises(ValueError, match="moves parameters and weights together, so its end has no hypergradient"):
            jax.grad(value)(hyper)
        return
    expected = jax.jit(CASES[name].plain)(start, hyper, train, valid)
    assert relative(jax.grad(value)(hyper), expected) < TOLERANCE
    assert relative(jax.jit(jax.vmap(jax.grad(value)))(hyper[None])[0], expected) < TOLERANCE
    assert relative(value(hyper), solver.run(start, hyper, train, valid).value) < 1e-13
    with pytest.raises(ValueError, match="derivatives by params and hyper alone"):
        jax.grad(lambda train: solver.value(start, hyper, train, valid))(train)


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices(name, eight_devices):
    start, hyper, train, valid = data()
    result = CASES[name].result
    solver, alone = CASES[name].build("devices"), CASES[name].build(None)
    expected = jax.jit(CASES[name].plain)(start, hyper, train, valid)

    by_pmap = jax.pmap(lambda *own: result(solver.run(start, *own)), "devices")(cut(hyper), cut(train), cut(valid))
    assert relative(by_pmap.reshape(-1), expected) < TOLERANCE, "data-parallel pmap"

    starts = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,), jnp.float64))(jax.random.split(jax.random.key(0), 8))
    by_start = jax.pmap(lambda p: result(alone.run(p, hyper, train, valid)))(starts)
    other = jax.jit(CASES[name].plain)(starts[5], hyper, train, valid)
    assert relative(by_start[5], other) < TOLERANCE, "pmap over seeds"

    by_axis = jax.vmap(lambda *own: result(solver.run(start, *own)), axis_name="devices")
    assert relative(by_axis(cut(hyper), cut(train), cut(valid)).reshape(-1), expected) < TOLERANCE, "an axis of vmap"

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("devices")

    def share(*own):
        solution = solver.run(start, *own)
        return result(solution), solution.value, solution.status, solution.params

    common = PartitionSpec()
    sharded = jax.shard_map(share, mesh=mesh, in_specs=(rows, rows, rows), out_specs=(rows, common, common, common))
    values, _, status, _ = jax.jit(sharded)(hyper, train, valid)
    assert relative(values, expected) < TOLERANCE and not status, "shard_map"

    placed = jax.device_put((hyper, train, valid), NamedSharding(mesh, rows))
    assert relative(result(alone.run(start, *placed)), expected) < TOLERANCE, "sharded inputs"


def test_grad_of_value_over_devices(eight_devices):
    start, hyper, train, valid = data()
    solver = CASES["unrolled"].build("devices")
    expected = jax.jit(CASES["unrolled"].plain)(start, hyper, train, valid)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, common = PartitionSpec("devices"), PartitionSpec()
    specs = (common, rows, rows, rows)
    share_data = partial(jax.shard_map, mesh=mesh, in_specs=specs)
    inside = share_data(jax.grad(solver.value, 1), out_specs=rows)
    assert relative(jax.jit(inside)(start, hyper, train, valid), expected) < TOLERANCE
    outside = jax.grad(share_data(solver.value, out_specs=common), 1)
    assert relative(jax.jit(outside)(start, hyper, train, valid), expected) < TOLERANCE

    untyped = jax.grad(share_data(solver.value, out_specs=common, check_vma=False), 1)
    by_pmap = jax.pmap(jax.grad(solver.value, 1), "devices", in_axes=(None, 0, 0, 0))
    with pytest.raises(ValueError, match="would be wrong by that factor"):
        untyped(start, hyper, train, valid)
    with pytest.raises(ValueError, match="would be wrong by that factor"):
        by_pmap(start, cut(hyper), cut(train), cut(valid))
