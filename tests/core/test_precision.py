"""The precision of products in a step back: which they are, what error they make, and that training makes none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from bilevel_jax.core import tree
from bilevel_jax.core.certify import check
from bilevel_jax.core.certify.products import measure_product_error
from bilevel_jax.core.problem import problem as global_problem
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.streams import full_batch_stream, shuffled_stream
from bilevel_jax.core.training import (
    init_train_state,
    step_functions,
    train,
    train_step,
)
from bilevel_jax.core.types import Adjoint, Stream
from bilevel_jax.core.unrolled import backward_pass_of_each, unrolled_estimator
from tests.simulated_precision import simulated_precision

STEPS = 12
ADAM = optax.adamw(1e-2, eps_root=1e-8)


def losses(params, frozen, batch):
    x, y = batch["data"]
    hidden = jnp.tanh(x @ params["first"])
    return jnp.sum((hidden @ params["second"] - y) ** 2, -1)


PROBLEM = weighted(losses)


def data(rows, seed, dtype):
    x, y = np.random.default_rng(seed).normal(size=(2, rows, 8))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(y + x), dtype)


def start(dtype):
    random = np.random.default_rng(2)
    shapes = {"first": (8, 16), "second": (16, 8)}
    return {name: jnp.asarray(random.normal(size=shape) / 4, dtype) for name, shape in shapes.items()}


def divide(stream, micro):
    """The batches of a stream in several micro-batches."""

    def batch_at(index):
        batch = stream.batch(index)
        count = {"num_examples": jnp.repeat(batch.pop("num_examples"), micro)}
        return jax.tree.map(lambda leaf: leaf.reshape(micro, -1, *leaf.shape[2:]), batch) | count

    return Stream(batch_at, stream.steps)


def trained(precision, dtype=jnp.float32, micro=1):
    """(the step, the run, its stream, the validation stream, the weights)"""
    step = train_step(PROBLEM, ADAM, product_precision=precision)
    stream = divide(shuffled_stream(data(24, 0, dtype), 6, steps=STEPS, seed=0), micro)
    weights = jnp.ones(24, dtype)
    run = train(step, init_train_state(ADAM, start(dtype)), weights, (), stream)
    return step, run, stream, full_batch_stream(data(10, 1, dtype)), weights


def hypergradients(precision, dtype=jnp.float32, micro=1):
    step, run, stream, validation, weights = trained(precision, dtype, micro)
    return unrolled_estimator(PROBLEM, step)(run, weights, (), stream, validation).grad, run.end.params


def relative(one, other):
    return float(np.linalg.norm(np.asarray(one, float) - other) / np.linalg.norm(other))


def products(function, *arguments):
    """The precision of every matrix product in what a function is traced to."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.params["precision"][0].name)
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def test_simulated_products_round_their_operands():
    a, b = (jnp.asarray(np.random.default_rng(seed).normal(size=(5, 5)), jnp.float32) for seed in (0, 1))
    multiply = lambda a, b, precision: jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))(a, b)  # noqa: E731
    exact = multiply(a, b, "highest")
    rounded = [jax.lax.reduce_precision(operand, 8, 7) for operand in (a, b)]
    with simulated_precision("bfloat16", "tf32"):
        assert np.array_equal(multiply(a, b, "highest"), exact)
        assert relative(multiply(a, b, "default"), multiply(*rounded, "highest")) < 1e-6
        assert 1e-5 < relative(multiply(a, b, "high"), exact) < relative(multiply(a, b, "default"), exact) < 1e-2
        wide = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert relative(multiply(*wide, "default"), wide[0] @ wide[1]) < 1e-14
    assert np.array_equal(multiply(a, b, "default"), exact)


@pytest.mark.parametrize("precision", ["high", "default"])
def test_it_is_that_of_the_products_in_the_step_back_alone(precision):
    forward, backward, linearize, vjp_step = step_functions(PROBLEM, ADAM, product_precision=precision)
    step, run, stream, _, weights = trained("highest")
    stored, batch, given = (
        run.stored_steps[STEPS - 1],
        stream.batch(STEPS - 1),
        step.gather(weights, stream.batch(STEPS - 1)),
    )
    after = Adjoint(run.end.params, tree.inexact_leaves(run.end.opt_state))
    assert set(products(forward, stored.state, given, (), batch)) == {"HIGHEST"}
    assert set(products(linearize, stored.state, given, (), batch)) == {"HIGHEST"}
    linearization = step.linearize(stored.state, given, (), batch)[2]
    on_tape = products(vjp_step, stored.state, stored.grad, linearization, given, (), batch, after)
    assert set(on_tape) == {"HIGHEST"}
    back = products(backward, stored.state, stored.grad, given, (), batch, after)
    assert len(back) >= 8 and set(back) == {precision.upper()}


@pytest.mark.parametrize(
    ("kinds", "precision", "most"), [(("bfloat16", ""), "default", 0.05), (("", "tf32"), "high", 0.01)]
)
def test_the_error_is_that_of_the_steps_back_and_training_keeps_its_bits(kinds, precision, most):
    with jax.enable_x64(True):
        exact, _ = hypergradients("highest", jnp.float64)
    with jax.enable_x64(False):
        plain, end = hypergradients("highest")
        with simulated_precision(*kinds):
            lower, lower_end = hypergradients(precision)
            highest, _ = hypergradients("highest")
        with simulated_precision(highest=kinds[0] or kinds[1]):
            rounded_training, _ = hypergradients("highest")
    assert all(map(np.array_equal, jax.tree.leaves(end), jax.tree.leaves(lower_end)))
    assert np.array_equal(highest, plain) and relative(plain, exact) < 1e-4
    assert 3 * relative(plain, exact) < relative(lower, exact) < most
    assert relative(rounded_training, exact) > relative(lower, exact)


def test_a_solver_on_arrays_has_the_same_products():
    with jax.enable_x64(False), simulated_precision("bfloat16"):
        step, run, stream, validation, weights = trained("default")
        rows = data(24, 0, jnp.float32)
        solve = lambda precision: unroll(  # noqa: E731
            PROBLEM, ADAM, steps=STEPS, product_precision=precision
        ).run(start(jnp.float32), weights, rows, data(10, 1, jnp.float32))
        low, high = solve("default"), solve("highest")
        whole = train(step, init_train_state(ADAM, start(jnp.float32)), weights, (), full_batch_stream_of(rows))
        by_stream = unrolled_estimator(PROBLEM, step)(whole, weights, (), full_batch_stream_of(rows), validation)
    assert np.array_equal(low.value, high.value) and 1e-4 < relative(low.grad, np.asarray(high.grad, float)) < 0.05
    assert relative(by_stream.grad, np.asarray(low.grad, float)) < 1e-3


def full_batch_stream_of(rows):
    return Stream(lambda step: full_batch_stream(rows).batch(0), STEPS)


def test_a_model_with_a_state_has_them_too():
    def inner(params, weight, model_state, frozen, batch):
        x, y = batch["data"]
        mean = 0.9 * model_state + 0.1 * x.mean(0)
        return jnp.mean((jnp.tanh((x - mean[None]) @ params) - y) ** 2) * weight, mean

    def outer(params, model_state, frozen, batch):
        return jnp.mean(((batch["data"][0] - model_state[None]) @ params) ** 2)

    stateful = global_problem(inner, outer, has_state=True)
    forward, backward, *_ = step_functions(stateful, ADAM, product_precision="default")
    state = init_train_state(ADAM, jnp.ones((8, 8), jnp.float32), jnp.zeros(8, jnp.float32))
    batch, weight = full_batch_stream(data(4, 0, jnp.float32)).batch(0), jnp.ones(1, jnp.float32)
    after = Adjoint(state.params, tree.inexact_leaves(state.opt_state), (state.model_state,))
    assert set(products(forward, state, weight, (), batch)) == {"HIGHEST"}
    assert set(products(backward, state, state.params, weight, (), batch, after)) == {"DEFAULT"}


@pytest.mark.parametrize("micro", [1, 2])
def test_the_last_of_several_losses_can_go_back_at_another_precision(micro):
    with jax.enable_x64(False), simulated_precision("bfloat16"):
        step, run, stream, validation, weights = trained("default", micro=micro)
        passes = backward_pass_of_each(PROBLEM, step, keep_bits=True, step_of_last=train_step(PROBLEM, ADAM))
        state = passes.init(run, weights, (), [validation, validation, validation])
        while not passes.is_done(run, state):
            state = passes.advance(run, weights, (), stream, state)
        beside = passes.finish(run, state).grad
        alone = [hypergradients(precision, micro=micro)[0] for precision in ("default", "highest")]
    assert relative(alone[0], np.asarray(alone[1], float)) > 1e-3
    for own, expected in zip(beside, [alone[0], alone[0], alone[1]], strict=True):
        assert relative(own, np.asarray(expected, float)) < 1e-5


def test_certificates_measure_what_lower_products_change():
    with jax.enable_x64(False), simulated_precision("bfloat16"):
        given = (start(jnp.float32), jnp.ones(24), data(24, 0, jnp.float32), data(10, 1, jnp.float32))
        low, high = (
            unroll(PROBLEM, ADAM, steps=STEPS, product_precision=precision) for precision in ("default", "highest")
        )
        solution, exact = low.run(*given), high.run(*given)
        certificates = check(low, solution, *given[2:], step_sizes=(0.1,), removed=(0.2,), draws=1, num_retrains=0)
    error = measure_product_error(solution.grad, exact.grad, is_per_example=True)
    assert error >= relative(solution.grad, np.asarray(exact.grad, float)) * (1 - 1e-6) > 1e-3  # the error is float32
    assert certificates.checks.product_error == pytest.approx(error, rel=1e-3)
    assert f"product_error {error:.3g}" in str(certificates)
    assert low.at_highest is not None and high.at_highest is None


def test_the_error_is_that_of_what_tells_entries_apart_and_never_hides_what_is_not_finite():
    exact = 100 + np.random.default_rng(0).normal(size=64)
    own = exact + 0.01 * np.random.default_rng(1).normal(size=64)
    centred = np.linalg.norm((own - own.mean()) - (exact - exact.mean())) / np.linalg.norm(exact - exact.mean())
    measure = lambda *grads, **named: measure_product_error(*map(jnp.asarray, grads), **named)  # noqa: E731
    assert measure(own, exact, is_per_example=True) == pytest.approx(centred, rel=1e-3)
    assert measure(own, exact, is_per_example=False) == pytest.approx(relative(own, exact), rel=1e-3)
    assert measure(exact, exact, is_per_example=True) == 0 == measure(0 * exact, 0 * exact, is_per_example=True)
    for broken in (own * np.nan, own * np.inf):
        assert measure(broken, exact, is_per_example=True) == np.inf == measure(exact, broken, is_per_example=False)


BUILDERS = [train_step, lambda problem, optimizer, **named: unroll(problem, optimizer, steps=2, **named)]


@pytest.mark.parametrize("build", BUILDERS)
def test_another_precision_is_refused_before_any_training(build):
    with pytest.raises(ValueError, match="product_precision is 'hihg'; choose 'highest', 'high' or 'default'"):
        build(PROBLEM, ADAM, product_precision="hihg")
