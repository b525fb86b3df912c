"""What a compiled step is made of: precision, sizes, traces, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.core import tree
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.core.types import Adjoint, CheckpointPlan, Stream
from bilevel_jax.core.unrolled import unrolled_estimator, validation_loss_and_grad_fn
from tests.core.problems import ROWS, lora, relative

ADAMW = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-2, eps_root=1e-12))


def jaxprs(toy, weights):
    """The traced steps, forward and backward, and the same two with a linearisation between them."""
    step = train_step(toy.problem, ADAMW)
    state, batch = init_train_state(ADAMW, toy.params), toy.train.batch(0)
    part = toy.problem.gather(weights, batch)
    adjoint = Adjoint(toy.params, tree.inexact_leaves(state.opt_state))
    yield jax.make_jaxpr(step.forward)(state, part, toy.fixed, batch)
    yield jax.make_jaxpr(step.backward)(state, toy.params, part, toy.fixed, batch, adjoint)
    linear = step.linearize(state, part, toy.fixed, batch)[2]
    yield jax.make_jaxpr(step.linearize)(state, part, toy.fixed, batch)
    yield jax.make_jaxpr(step.vjp_step)(state, toy.params, linear, part, toy.fixed, batch, adjoint)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_every_product_is_traced_at_the_highest_precision():
    count = 0
    for traced in jaxprs(lora(), jnp.ones(ROWS)):
        for equation in equations(traced.jaxpr):
            if equation.primitive.name == "dot_general":
                count += 1
                assert equation.params["precision"] == (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert count > 10


def test_no_array_of_a_step_grows_with_the_number_of_rows():
    toy = lora()
    few, many = ([str(traced) for traced in jaxprs(toy, jnp.ones(rows))] for rows in (ROWS, 10_000_019))
    assert few == many


def test_a_linearisation_copies_nothing_that_the_step_was_given():
    toy = lora()
    *_, linearize, _ = jaxprs(toy, jnp.ones(ROWS))
    assert not set(map(id, linearize.jaxpr.outvars)) & set(map(id, linearize.jaxpr.invars))
    step, state, batch = train_step(toy.problem, ADAMW), init_train_state(ADAMW, toy.params), toy.train.batch(0)
    linear = step.linearize(state, toy.problem.gather(jnp.ones(ROWS), batch), toy.fixed, batch)[2]
    assert not {leaf.shape for leaf in jax.tree.leaves(linear)} & {leaf.shape for leaf in jax.tree.leaves(toy.fixed)}


@pytest.mark.parametrize("linear", (False, True))
def test_each_step_compiles_once(linear):
    toy = lora()
    traces = []

    def counted(params, weights, fixed, batch):
        traces.append(1)
        return toy.problem.inner(params, weights, fixed, batch)

    problem = toy.problem._replace(inner=counted)
    step = train_step(problem, ADAMW)
    estimator = unrolled_estimator(problem, step)

    def once(weights):
        keep = CheckpointPlan(3, 6, linear)
        run = train(step, init_train_state(ADAMW, toy.params), weights, toy.fixed, toy.train, plan=keep)
        return estimator(run, weights, toy.fixed, toy.train, toy.validation)

    once(jnp.ones(ROWS))
    first = len(traces)
    once(0.5 * jnp.ones(ROWS))
    assert len(traces) == first  # a second run and sweep trace nothing
    # forward and backward or linearise, each through a scan body that jax may trace more than once
    assert first <= 6


def test_eight_devices_equal_one(eight_devices):
    """Rows spread over the devices, parameters on each of them: the same entries."""
    toy = lora(steps=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=eight_devices)
    weights = jnp.ones(48)  # divisible by 8; the last rows are never touched

    def spread(step):
        """Ten example slots padded to sixteen, two for each device."""
        batch = toy.train.batch(step)
        padded = {
            "index": np.full((1, 16), 2**31 - 1, np.int32), "x": np.zeros((1, 16, 6)), "y": np.zeros((1, 16)),
        }  # fmt: skip
        for name in padded:
            flat = np.asarray(batch[name]).reshape(1, 10, *batch[name].shape[2:])
            padded[name][:, :10] = flat
        rows = jax.device_put(np.asarray(batch["num_examples"])[:1], NamedSharding(mesh, P()))
        return {k: jax.device_put(v, NamedSharding(mesh, P(None, "data"))) for k, v in padded.items()} | {
            "num_examples": rows
        }

    put = lambda value, spec: jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), value)  # noqa: E731
    validation = put(toy.validation.batch(0), P())
    distributed = toy._replace(
        params=put(toy.params, P()),
        fixed=put(toy.fixed, P()),
        train=Stream(spread, toy.train.steps),
        validation=Stream(lambda step: validation, 1),
    )
    results = []
    for where, table in ((toy, weights), (distributed, put(weights, P("data")))):
        step = train_step(toy.problem, ADAMW)
        run = train(step, init_train_state(ADAMW, where.params), table, where.fixed, where.train)
        results.append(
            unrolled_estimator(toy.problem, step)(run, table, where.fixed, where.train, where.validation).grad
        )
    assert len(results[1].sharding.device_set) == 8
    assert relative(np.asarray(results[1]), np.asarray(results[0])) < 1e-12


def test_the_outer_gradient_sums_over_all_of_the_stream():
    toy = lora()
    full = toy.validation.batch(0)

    def half(step):
        part = slice(0, 7) if step == 0 else slice(7, 20)
        return {name: leaf[:, part] if leaf.ndim > 1 else leaf for name, leaf in full.items()}

    pieces = Stream(half, 2)
    function = validation_loss_and_grad_fn(toy.problem)
    for whole, split in zip(
        jax.tree.leaves(function(toy.params, toy.fixed, toy.validation)),
        jax.tree.leaves(function(toy.params, toy.fixed, pieces)),
        strict=True,
    ):
        np.testing.assert_allclose(split, whole, rtol=1e-12, atol=1e-15)


def test_losses_of_another_shape_are_refused():
    toy = lora()
    with pytest.raises(ValueError, match=r"losses \(5,\) and weights \(4,\) differ; give one loss per example"):
        batch = jax.tree.map(lambda leaf: leaf[0], toy.train.batch(0))
        toy.problem.inner(toy.params, jnp.ones(4), toy.fixed, batch)
