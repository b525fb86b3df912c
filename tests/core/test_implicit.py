"""Implicit hypergradients against dense closed forms, and what the checks say when the conditions fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import solvers, streams
from bilevel_jax.core.curvature import gauss_newton, hessian
from bilevel_jax.core.implicit import implicit_estimator, subsample_stream
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.solve.hypergradient import hypergradient
from bilevel_jax.core.training import trajectory_from_params
from bilevel_jax.core.types import CompositeLoss, Stream
from tests.core.problems import logistic, normal, relative, ridge

CLOSED = (ridge, logistic)
SOLVERS = {
    "cg": solvers.cg(tolerance=1e-12),
    "dense": solvers.dense(),
    "neumann": solvers.neumann(step_size=0.3, terms=2000),
}


@pytest.mark.parametrize("make", CLOSED)
@pytest.mark.parametrize("solver", [pytest.param("cg", marks=pytest.mark.slow), "dense", "neumann"])
def test_equals_closed_form(make, solver):
    closed = make()
    problem = closed.problem()
    estimator = implicit_estimator(problem, hessian(problem), SOLVERS[solver])
    estimate = estimator(closed.run(), closed.weights, closed.params, *closed.streams())
    assert relative(estimate.grad, closed.gradient()) < 1e-9  # systems solved to 1e-12, condition numbers below 1e2
    assert abs(estimate.checks.gap) < 1e-12  # stationary
    assert estimate.checks.residual < 1e-10
    assert not estimate.checks.curvature <= 0


def test_friendly_face_is_three_lines():
    closed = ridge()
    estimate = hypergradient(
        closed.losses, closed.params, closed.data, closed.held_out, weights=closed.weights, l2=closed.delta,
        solver=solvers.cg(tolerance=1e-12),
    )  # fmt: skip
    assert relative(estimate.grad, closed.gradient()) < 1e-9


def test_gauss_newton_is_the_hessian_where_outputs_are_linear():
    closed = logistic()
    problem = closed.problem()
    loss = CompositeLoss(
        lambda p, fixed, batch: batch["data"][0] @ p, lambda z, fixed, batch: jax.nn.softplus(-batch["data"][1] * z)
    )
    train, _ = closed.streams()
    v = normal(20, 5)
    exact, approximate = (
        product(closed.params, closed.weights, closed.params, train, v)
        for product in (hessian(problem), gauss_newton(problem, loss))
    )
    assert relative(approximate, exact) < 1e-13


def test_gauss_newton_is_positive_semidefinite_where_the_hessian_is_not():
    def outputs(p, fixed, batch):
        return jnp.tanh(batch["data"][0] @ p["in"]) @ p["out"]

    def link(z, fixed, batch):
        return 0.5 * (z - batch["data"][1]) ** 2

    problem = weighted(lambda p, fixed, b: link(outputs(p, fixed, b), fixed, b))
    params = {"in": normal(21, 4, 5), "out": normal(22, 5)}
    stream = streams.full_batch_stream((normal(23, 30, 4), 5 * normal(24, 30)))
    curvatures = {}
    for name, product in (("hessian", hessian(problem)), ("gn", gauss_newton(problem, CompositeLoss(outputs, link)))):
        estimate = implicit_estimator(problem, product, solvers.dense())(
            trajectory_from_params(params), jnp.ones(30), None, stream, stream
        )
        curvatures[name] = estimate.checks.curvature
    assert curvatures["hessian"] < -1e-3  # and the check says so
    assert curvatures["gn"] > -1e-12  # 0 up to rounding


def test_law_of_the_simplex_and_its_gap():
    """At a stationary point without prior w.g = 0; away from it, w.g is the gap that the checks report."""
    closed = ridge()._replace(delta=0.0)
    x, y = closed.data
    w = closed.weights
    best = jnp.linalg.solve(x.T @ (w[:, None] * x), x.T @ (w * y))
    for params, stationary in ((best, True), (best + 0.1, False)):
        at = closed._replace(params=params)
        problem = at.problem()
        estimate = implicit_estimator(problem, hessian(problem), solvers.dense())(at.run(), w, params, *at.streams())
        assert abs(float(w @ estimate.grad) + estimate.checks.gap) < 1e-12
        assert (abs(estimate.checks.gap) < 1e-12) == stationary


def test_entries_are_linear_in_the_outer_loss():
    closed = ridge()
    double = closed._replace(held_out=(jnp.sqrt(2.0) * closed.held_out[0], jnp.sqrt(2.0) * closed.held_out[1]))
    one, two = (
        implicit_estimator(closed.problem(), hessian(closed.problem()), solvers.dense())(
            c.run(), c.weights, c.params, *c.streams()
        ).grad
        for c in (closed, double)
    )
    assert relative(two, 2 * one) < 1e-12


def test_sampled_batches_double_until_they_agree():
    closed = ridge()
    problem = closed.problem()
    _, held_out = closed.streams()
    x, y = closed.data
    train = Stream(
        lambda step: {
            "data": (x[None, 5 * step : 5 * step + 5], y[None, 5 * step : 5 * step + 5]),
            "index": jnp.arange(5 * step, 5 * step + 5)[None],
            "num_examples": jnp.full((1,), 50.0),
        },
        10,
    )
    half = subsample_stream(train, 5)
    assert float(half.batch(0)["num_examples"][0]) == 25.0  # so that 5 of 10 batches still sum to a mean
    estimator = implicit_estimator(
        problem, hessian(problem), solvers.dense(), batches=2, min_cosine=1.1
    )  # never satisfied
    estimate = estimator(closed.run(), closed.weights, closed.params, train, held_out)
    assert estimate.checks.batches == 10
    assert relative(estimate.grad, closed.gradient()) < 1e-9
    early = implicit_estimator(problem, hessian(problem), solvers.dense(), batches=2, min_cosine=-1.0)
    assert early(closed.run(), closed.weights, closed.params, train, held_out).checks.batches == 4


def test_cg_stops_at_negative_curvature_and_says_so():
    matrix = jnp.diag(jnp.array([3.0, 1.0, -2.0]))
    solve = solvers.cg(tolerance=1e-12)(lambda v: matrix @ v, jnp.ones(3), None)
    assert solve.min_curvature <= 0 and solve.residual > 0.1
    assert jnp.isfinite(solve.x).all()


def test_cg_does_not_lose_to_scipy():
    from scipy.sparse.linalg import cg

    a = normal(30, 40, 40)
    matrix, b = a @ a.T / 40 + 0.05 * jnp.eye(40), normal(31, 40)
    ours = solvers.cg(tolerance=1e-10)(lambda v: matrix @ v, b, None)
    count = []
    theirs, _ = cg(np.asarray(matrix), np.asarray(b), rtol=1e-10, callback=count.append)
    assert relative(ours.x, theirs) < 1e-8
    assert ours.steps <= len(count) + 2


def test_dense_refuses_many_parameters():
    with pytest.raises(ValueError, match="5 parameters are too many for the dense solver.*use cg"):
        solvers.dense(max_params=4)(lambda v: v, jnp.ones(5), None)
