"""The penalty estimator: its error against closed forms falls as one over gamma."""

import numpy as np
import optax
import pytest

from bilevel_jax.core import penalty, solvers
from bilevel_jax.core.curvature import hessian
from bilevel_jax.core.implicit import implicit_estimator
from tests.core.problems import logistic, relative, ridge


@pytest.mark.parametrize("make", (pytest.param(ridge, marks=pytest.mark.slow), logistic))
def test_the_error_falls_as_one_over_gamma(make):
    closed = make()
    problem, streams = closed.problem(), closed.streams()
    optimizer = optax.sgd(0.3, momentum=0.8, nesterov=True)
    gammas, errors, apart = (10.0, 100.0, 1000.0, 10000.0), [], []
    exact = implicit_estimator(problem, hessian(problem), solvers.dense())(
        closed.run(), closed.weights, closed.params, *streams
    )
    for gamma in gammas:
        estimator = penalty.penalty_estimator(problem, optimizer, gamma=gamma, steps=160)
        estimate = estimator(closed.run(), closed.weights, closed.params, *streams)
        errors.append(relative(estimate.grad, closed.gradient()))
        apart.append(relative(estimate.direction, exact.direction))
        assert estimate.checks.residual < 1e-8 and abs(estimate.checks.gap) < 1e-10  # both minimisers were reached
        assert abs(estimate.validation_loss - exact.validation_loss) < 1e-12
    for series in (errors, apart):
        slope = np.polyfit(np.log(gammas[1:]), np.log(series[1:]), 1)[0]
        assert -1.1 < slope < -0.9, series
    assert errors[-1] < 1e-3


def test_minimisers_that_were_not_reached_are_told():
    closed = ridge()
    away = closed._replace(params=closed.params + 1.0)
    estimator = penalty.penalty_estimator(closed.problem(), optax.sgd(0.01), gamma=100.0, steps=3)
    checks = estimator(away.run(), closed.weights, closed.params, *closed.streams()).checks
    assert checks.residual > 0.1 and abs(checks.gap) > 1e-3


@pytest.mark.parametrize(
    "gamma, steps, words",
    [(0.0, 1, "gamma 0.0 and 1 steps; give a positive gamma"), (1.0, 0, "at least one step")],
)
def test_wrong_settings_are_refused(gamma, steps, words):
    with pytest.raises(ValueError, match=words):
        penalty.penalty_estimator(ridge().problem(), optax.sgd(0.1), gamma=gamma, steps=steps)
