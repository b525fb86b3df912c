"""Models of flax (linen and nnx) with batch normalization, dropout and averaged parameters, against plain JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

from bilevel_jax.core import single_loop
from bilevel_jax.core.problem import problem as global_problem
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve.arrays import batch_order
from bilevel_jax.core.solve.implicit import implicit
from bilevel_jax.core.solve.jointly import jointly
from bilevel_jax.core.solve.penalty import penalty
from bilevel_jax.core.solve.solution import Status
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.solvers import cg
from bilevel_jax.core.streams import full_batch_stream
from bilevel_jax.core.types import Stream
from tests.core.problems import relative

N, WIDTH, UNITS, STEPS, BATCH, MOMENTUM, RATE, DECAY = 16, 3, 4, 6, 8, 0.8, 0.3, 0.7
RANDOM = np.random.default_rng(0)
TRAIN = (RANDOM.normal(size=(N, WIDTH)), RANDOM.normal(size=N))
VALID = (RANDOM.normal(size=(8, WIDTH)), RANDOM.normal(size=8))
WEIGHTS = RANDOM.uniform(0.2, 2, N)
ADAM = optax.adam(1e-2, eps_root=1e-12)
TOLERANCE = 1e-10  # of two orders of summation in float64


class LinenNet(linen.Module):
    """A dense layer, batch normalization, dropout, and a dense layer."""

    momentum: Any = MOMENTUM
    axis_name: str | None = None
    rate: float = RATE

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(UNITS, use_bias=False, param_dtype=float)(x)
        x = linen.BatchNorm(not train, momentum=self.momentum, axis_name=self.axis_name, param_dtype=float)(x)
        x = linen.Dropout(self.rate, deterministic=not train)(jnp.tanh(x))
        return linen.Dense(1, param_dtype=float)(x)[:, 0]


class BatchNorm(nnx.BatchNorm):
    """With a derivative through the running averages, which flax.nnx stops."""

    def __call__(self, x):
        mean, var = self.mean[...], self.var[...]
        outputs = super().__call__(x)
        if not self.use_running_average:
            self.mean[...] = self.momentum * mean + (1 - self.momentum) * x.mean(0)
            self.var[...] = self.momentum * var + (1 - self.momentum) * x.var(0)
        return outputs


class NnxNet(nnx.Module):
    """The same for flax.nnx."""

    def __init__(self, norm: type[nnx.BatchNorm], rngs: nnx.Rngs):
        self.first = nnx.Linear(WIDTH, UNITS, use_bias=False, param_dtype=float, rngs=rngs)
        self.norm = norm(UNITS, momentum=MOMENTUM, param_dtype=float, rngs=rngs)
        self.dropout = nnx.Dropout(RATE, rngs=rngs)
        self.last = nnx.Linear(UNITS, 1, param_dtype=float, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x))), rngs=rngs))[:, 0]


class Model(NamedTuple):
    """What `weighted(..., has_state=True)` and `run` take."""

    losses: Callable
    outer: Callable
    params: Any
    state: Any


def double(tree):
    """Its floating-point leaves in float64; counters and keys as they are."""

    def cast(leaf):
        is_float = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
        return jnp.asarray(leaf, jnp.float64) if is_float else leaf

    return jax.tree.map(cast, tree)


def linen_model(momentum=MOMENTUM, axis_name=None, rate=RATE) -> Model:
    net = LinenNet(momentum, axis_name, rate)
    variables = double(LinenNet(rate=rate).init(jax.random.key(0), jnp.zeros((1, WIDTH)), train=False))

    def losses(params, state, frozen, batch):
        x, y = batch["data"]
        outputs, updated = net.apply(
            {"params": params, "batch_stats": state},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": batch["key"]} if "key" in batch else None,
        )
        return (outputs - y) ** 2, updated["batch_stats"]

    def outer(params, state, frozen, batch):
        x, y = batch["data"]
        return (net.apply({"params": params, "batch_stats": state}, x, train=False) - y) ** 2

    return Model(losses, outer, variables["params"], variables["batch_stats"])


def nnx_model(norm=BatchNorm) -> Model:
    """Dropout takes its keys from the batch."""
    net = NnxNet(norm, nnx.Rngs(0))
    graph, params, statistics, rest = nnx.split(net, nnx.Param, nnx.BatchStat, ...)

    def losses(params, statistics, frozen, batch):
        x, y = batch["data"]
        model = nnx.merge(graph, params, statistics, rest, copy=True)
        model.train()
        outputs = model(x, rngs=nnx.Rngs(dropout=batch["key"]))
        return (outputs - y) ** 2, nnx.state(model, nnx.BatchStat)

    def outer(params, statistics, frozen, batch):
        x, y = batch["data"]
        model = nnx.merge(graph, params, statistics, rest, copy=True)
        model.eval()
        return (model(x) - y) ** 2

    return Model(losses, outer, double(params), double(statistics))


def counting_nnx_model() -> Model:
    """Dropout takes its keys from the model's own counters, which are a part of its state."""
    net = NnxNet(BatchNorm, nnx.Rngs(0))
    graph, params, state = nnx.split(net, nnx.Param, ...)

    def losses(params, state, frozen, batch):
        x, y = batch["data"]
        model = nnx.merge(graph, params, state, copy=True)
        model.train()
        return (model(x) - y) ** 2, nnx.state(model, nnx.Not(nnx.Param))

    def outer(params, state, frozen, batch):
        x, y = batch["data"]
        model = nnx.merge(graph, params, state, copy=True)
        model.eval()
        return (model(x) - y) ** 2

    return Model(losses, outer, double(params), double(state))


def averaging_model() -> Model:
    """Plain JAX: the state is an average of the parameters, and the outer loss is read there."""

    def predict(params, data):
        return (jnp.tanh(data[0] @ params["w"]) @ params["a"] - data[1]) ** 2

    def losses(params, average, frozen, batch):
        moved = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, average, params)
        return predict(params, batch["data"]), moved

    def outer(params, average, frozen, batch):
        return predict(average, batch["data"])

    random = np.random.default_rng(1)
    params = double({"w": random.normal(size=(WIDTH, UNITS)), "a": random.normal(size=UNITS)})
    return Model(losses, outer, params, params)


MODELS = {
    "linen": linen_model,
    "nnx": counting_nnx_model,
    "average of the parameters": averaging_model,
}


def data():
    return double((TRAIN, VALID, WEIGHTS))


def plain(model: Model, key, batch_size=None, optimizer=ADAM):
    """L_v after the same loop in plain JAX, the model's state included."""
    train, valid, _ = data()
    order = np.tile(np.arange(N), (STEPS, 1)) if batch_size is None else batch_order(N, batch_size, STEPS, key)

    def value(params, weights, state):
        def step(carry, t):
            params, opt, state = carry
            rows = jnp.asarray(order)[t]
            batch = {"data": jax.tree.map(lambda leaf: leaf[rows], train), "key": jax.random.fold_in(key, t)}

            def loss(params):
                losses, new_state = model.losses(params, state, (), batch)
                return jnp.mean(weights[rows] * losses), new_state

            grad, state = jax.grad(loss, has_aux=True)(params)
            updates, opt = optimizer.update(grad, opt, params)
            return (optax.apply_updates(params, updates), opt, state), None

        (params, _, state), _ = jax.lax.scan(step, (params, optimizer.init(params), state), jnp.arange(STEPS))
        return model.outer(params, state, (), {"data": valid}).mean(), (params, state)

    return value


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "nnx")) for name in MODELS])
def test_weights(name):
    train, valid, weights = data()
    model, key = MODELS[name](), jax.random.key(5)
    problem = weighted(model.losses, outer=model.outer, has_state=True)
    solver = unroll(problem, ADAM, steps=STEPS, batch_size=BATCH, memory="all")
    solution = solver.run(model.params, weights, train, valid, model_state=model.state, key=key)
    value_and_grads = jax.jit(jax.value_and_grad(plain(model, key, BATCH), (0, 1), has_aux=True))
    (value, (_, state)), grads = value_and_grads(model.params, weights, model.state)
    assert int(solution.status) == Status.OK and solution.checks.replayed
    assert np.isfinite(solution.checks.growth)
    assert relative(solution.value, value) < TOLERANCE
    assert relative((solution.grad_start, solution.grad), grads) < TOLERANCE
    same = jax.tree.map(lambda a, b: bool((a == b).all()) or relative(a, b) < TOLERANCE, solution.model_state, state)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_streams():
    train, valid, weights = data()
    model = averaging_model()
    solver = unroll(weighted(model.losses, outer=model.outer, has_state=True), ADAM, steps=STEPS)
    stream = Stream(full_batch_stream(train).batch, STEPS)
    on_stream = solver.run(model.params, weights, stream, full_batch_stream(valid), model_state=model.state)
    on_arrays = solver.run(model.params, weights, train, valid, model_state=model.state)
    assert relative((on_stream.grad, on_stream.grad_start), (on_arrays.grad, on_arrays.grad_start)) < 1e-12
    assert relative(on_stream.model_state, on_arrays.model_state) < 1e-12
    assert on_stream.checks.growth == pytest.approx(float(on_arrays.checks.growth))


@pytest.mark.slow
def test_the_derivative_through_running_averages():
    """Differences of L_v tell whether it is there: flax.nnx stops it, flax.linen and the subclass do not."""
    train, valid, weights = data()
    direction, key, eps = double(np.random.default_rng(2).normal(size=N)), jax.random.key(5), 1e-5
    for norm, is_whole in ((BatchNorm, True), (nnx.BatchNorm, False)):
        model = nnx_model(norm)
        problem = weighted(model.losses, outer=model.outer, has_state=True)
        solver = unroll(problem, ADAM, steps=STEPS, memory="all")
        run = partial(solver.run, train=train, valid=valid, model_state=model.state, key=key)
        up, down = (run(model.params, weights + sign * eps * direction).value for sign in (1, -1))
        difference = (up - down) / (2 * eps)
        error = abs(run(model.params, weights).grad @ direction / difference - 1)
        assert (error < 1e-6) == is_whole and (error > 1e-2) != is_whole, (norm, error)


def normalized(x, state, momentum):
    """Batch normalization written down: (outputs, new averages)."""
    mean, var = x.mean(0), x.var(0)
    averages = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state, {"mean": mean, "var": var})
    return (x - mean[None]) / jnp.sqrt(var[None] + 1e-5), averages


@pytest.mark.slow
def test_momentum_of_the_averages_and_size_of_the_noise():
    """A global outer variable in the model's state and in the noise of its units."""
    train, valid, _ = data()
    hyper, key = double({"momentum": np.float64(1.0), "noise": np.float64(-1.0)}), jax.random.key(5)
    start = double({"in": RANDOM.normal(size=(WIDTH, UNITS)), "out": RANDOM.normal(size=UNITS)})
    averages = {"mean": jnp.zeros(UNITS), "var": jnp.ones(UNITS)}

    def inner(params, hyper, state, frozen, batch):
        x, y = batch["data"]
        hidden, state = normalized(x @ params["in"], state, jax.nn.sigmoid(hyper["momentum"]))
        noise = jax.random.normal(batch["key"], hidden.shape, hidden.dtype)
        hidden = jnp.tanh(hidden) * (1 + jnp.exp(hyper["noise"]) * noise)
        return jnp.mean((hidden @ params["out"] - y) ** 2), state

    def outer(params, state, frozen, batch):
        x, y = batch["data"]
        hidden = (x @ params["in"] - state["mean"][None]) / jnp.sqrt(state["var"][None] + 1e-5)
        return jnp.mean((jnp.tanh(hidden) @ params["out"] - y) ** 2)

    def value(hyper):
        def step(carry, t):
            params, opt, state = carry
            batch = {"data": train, "key": jax.random.fold_in(key, t)}
            grad, state = jax.grad(lambda params: inner(params, hyper, state, (), batch), has_aux=True)(params)
            updates, opt = ADAM.update(grad, opt, params)
            return (optax.apply_updates(params, updates), opt, state), None

        (params, _, state), _ = jax.lax.scan(step, (start, ADAM.init(start), averages), jnp.arange(STEPS))
        return outer(params, state, (), {"data": valid})

    expected = jax.jit(jax.grad(value))(hyper)
    solver = unroll(global_problem(inner, outer, has_state=True), ADAM, steps=STEPS, memory="all")
    solution = solver.run(start, hyper, train, valid, model_state=averages, key=key)
    assert relative(solution.grad, expected) < TOLERANCE


# --- devices


def cut(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), tree)


def run_on_devices(model: Model):
    """Hypergradients of all weights, with the examples shared by two devices."""
    train, valid, weights = data()
    problem = weighted(model.losses, outer=model.outer, has_state=True)
    solver = unroll(problem, ADAM, steps=STEPS, memory="all", axis_name="devices")

    def share(*own):
        return solver.run(model.params, *own, model_state=model.state)

    return jax.pmap(share, "devices", devices=jax.devices()[:2])(cut(weights), cut(train), cut(valid))


DATA_PARALLEL = {
    "average of the parameters": (averaging_model, True),
    "batch normalization of a device": (partial(linen_model, rate=0.0), False),
    "batch normalization over devices": (partial(linen_model, rate=0.0, axis_name="devices"), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_data_parallel(name, eight_devices):
    """The state is averaged over devices. An average of parameters is that of one device; batch normalization is so
    where its statistics are those of all devices."""
    build, is_equal = DATA_PARALLEL[name]
    model, (_, _, weights) = build(), data()
    alone = build(axis_name=None) if "axis_name" in getattr(build, "keywords", {}) else model
    (value, (_, state)), grad = jax.jit(jax.value_and_grad(plain(alone, jax.random.key(0)), 1, has_aux=True))(
        alone.params, weights, alone.state
    )
    solution = run_on_devices(model)
    assert (solution.status == Status.OK).all()
    errors = [
        relative(solution.value[1], value),
        relative(solution.grad.reshape(-1), grad),
        relative(jax.tree.map(lambda leaf: leaf[1], solution.model_state), state),
    ]
    assert (max(errors) < TOLERANCE) == is_equal and (max(errors) > 1e-3) != is_equal, errors


@pytest.mark.slow
def test_keys_and_counters_on_devices(eight_devices):
    """What is no number to average is the same on each device."""
    model, key = averaging_model(), jax.random.key(3)

    def losses(params, state, frozen, batch):
        average, key, count = state
        scale = 1 + 0.1 * jax.random.normal(jax.random.fold_in(key, count), (), jnp.float64)
        values, average = model.losses(params, average, frozen, batch)
        return scale * values, (average, key, count + 1)

    def outer(params, state, frozen, batch):
        return model.outer(params, state[0], frozen, batch)

    counting = Model(losses, outer, model.params, (model.state, key, jnp.zeros((), jnp.int32)))
    solution = run_on_devices(counting)
    grad = jax.jit(jax.grad(lambda *given: plain(counting, key)(*given)[0], 1))(model.params, data()[2], counting.state)
    assert relative(solution.grad.reshape(-1), grad) < TOLERANCE
    assert solution.model_state[2].tolist() == [STEPS, STEPS] and (solution.model_state[1] == key).all()


# --- implicit differentiation holds the state


@pytest.mark.slow
def test_implicit_differentiation_holds_the_state():
    train, valid, weights = data()
    start = double({"in": RANDOM.normal(size=(WIDTH, UNITS)), "out": RANDOM.normal(size=UNITS)})
    averages = {"mean": jnp.full(UNITS, 0.1)}

    def losses(params, state, frozen, batch):
        x, y = batch["data"]
        hidden = x @ params["in"]
        moved = {"mean": hidden.mean(0)}
        return (jnp.tanh(hidden - state["mean"][None]) @ params["out"] - y) ** 2, moved

    def outer(params, state, frozen, batch):
        x, y = batch["data"]
        return (jnp.tanh(x @ params["in"] - state["mean"][None]) @ params["out"] - y) ** 2

    problem = weighted(losses, outer=outer, prior=proximal(0.5), has_state=True)
    solver = implicit(problem, solver=cg(tolerance=1e-13), optimizer=optax.sgd(0.2, momentum=0.8), steps=300)
    solution = solver.run(start, weights, train, valid, model_state=averages)
    params, unravel = ravel_pytree(solution.params)

    def total(params, weights):
        losses_now, _ = losses(unravel(params), averages, (), {"data": train})
        return jnp.mean(weights * losses_now) + 0.25 * jnp.sum(params**2)

    @jax.jit
    def expected(params, weights):
        slope = jax.grad(lambda params: outer(unravel(params), averages, (), {"data": valid}).mean())(params)
        v = jnp.linalg.solve(jax.hessian(total)(params, weights), slope)
        return -jax.jacfwd(jax.grad(total), 1)(params, weights).T @ v

    assert relative(solution.grad, expected(params, weights)) < TOLERANCE
    assert solution.model_state["mean"].tolist() == averages["mean"].tolist()


@pytest.mark.slow
def test_penalty_holds_the_state_and_jointly_refuses_it():
    train, valid, weights = data()
    model, average = averaging_model(), jax.tree.map(lambda leaf: leaf / 2, averaging_model().state)
    stateful = weighted(model.losses, outer=model.outer, prior=proximal(0.5), has_state=True)
    held = weighted(
        lambda params, frozen, batch: model.losses(params, average, frozen, batch)[0],
        outer=lambda params, frozen, batch: model.outer(params, average, frozen, batch),
        prior=proximal(0.5),
    )
    settings = {"gamma": 20.0, "steps": 100, "max_gap": 1.0}
    by_state = penalty(stateful, optax.sgd(0.1), **settings).run(
        model.params, weights, train, valid, model_state=average, throw=False
    )
    by_closure = penalty(held, optax.sgd(0.1), **settings).run(model.params, weights, train, valid, throw=False)
    assert relative(by_state.grad, by_closure.grad) < 1e-12
    method = single_loop.mixing(held, optax.sgd(0.1), 0.5, N)
    with pytest.raises(ValueError, match="single-loop methods weigh examples, of a model without a state"):
        jointly(stateful, method, steps=3)


STATE = {"mean": np.zeros(WIDTH)}
STATE_FAULTS = {
    "not returned": (lambda values, state: values, r"returns an array \(16,\); of a model with a state"),
    "too much returned": (lambda values, state: (values, state, state), "returns tuple; of a model with a state"),
    "another structure": (lambda values, state: (values, {"var": state["mean"]}), "return the whole state"),
    "another shape": (
        lambda values, state: (values, {"mean": jnp.zeros(2)}), r"model_state\['mean'\], float64\[3\], a float64\[2\]"
    ),
    "another type": (
        lambda values, state: (values, {"mean": jnp.zeros(WIDTH, jnp.float32)}), r"float64\[3\], a float32\[3\]"
    ),
}  # fmt: skip


def linear(params, data):
    return (data[0] @ params - data[1]) ** 2


@pytest.mark.parametrize("name", STATE_FAULTS)
def test_a_state_that_does_not_go_round_is_one_sentence(name):
    train, valid, weights = data()
    returned, words = STATE_FAULTS[name]
    outer = lambda params, state, frozen, batch: linear(params, batch["data"])  # noqa: E731
    weighing = weighted(
        lambda params, state, frozen, batch: returned(linear(params, batch["data"]), state), outer=outer, has_state=True
    )
    state = double(STATE)
    with pytest.raises(ValueError, match=words):
        unroll(weighing, ADAM, steps=2).run(jnp.zeros(WIDTH), weights, train, valid, model_state=state)
    sharing = global_problem(
        lambda params, hyper, state, frozen, batch: returned(hyper * linear(params, batch["data"]), state),
        lambda params, state, frozen, batch: outer(params, state, frozen, batch).mean(),
        has_state=True,
    )
    with pytest.raises(ValueError, match=words):
        unroll(sharing, ADAM, steps=2).run(jnp.zeros(WIDTH), jnp.ones(()), train, valid, model_state=state)


def test_a_key_that_is_not_there_is_one_sentence():
    train, valid, weights = data()

    def noisy(params, frozen, batch):
        return linear(params, batch["data"]) * jax.random.normal(batch["key"], ())

    solver = unroll(weighted(noisy), ADAM, steps=2)
    for key in (None, jax.random.key(0)):
        for call in (solver.run, solver.value):
            with pytest.raises(ValueError, match="training batches have it where run is given key"):
                call(jnp.zeros(WIDTH), weights, train, valid, key=key)
