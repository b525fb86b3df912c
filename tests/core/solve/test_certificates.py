"""Certificates of every solver in one call: what is believed, what is not, and why."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import certify, single_loop
from bilevel_jax.core.certify import FiniteDifferences, check, has_kinks
from bilevel_jax.core.problem import problem as global_problem
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve.implicit import implicit
from bilevel_jax.core.solve.jointly import jointly
from bilevel_jax.core.solve.penalty import penalty
from bilevel_jax.core.solve.solution import Status
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.types import Checks

N = 20


def data():
    random = np.random.default_rng(1)
    x, xv, truth = random.normal(size=(N, 3)), random.normal(size=(8, 3)), random.normal(size=3)
    y = x @ truth + 0.3 * random.normal(size=N)
    return (jnp.asarray(x), jnp.asarray(y)), (jnp.asarray(xv), jnp.asarray(xv @ truth))


def losses(params, frozen, batch):
    return 0.5 * (batch["data"][0] @ params - batch["data"][1]) ** 2


RIDGE = weighted(losses, prior=proximal(0.3))
SGD = optax.sgd(0.3)


@pytest.mark.parametrize(
    "solver",
    [
        unroll(RIDGE, SGD, steps=40),
        implicit(RIDGE, optimizer=SGD, steps=200),
        penalty(RIDGE, SGD, gamma=1e3, steps=200),
    ],
    ids=["unroll", "implicit", "penalty"],
)
def test_a_smooth_convex_problem_is_believed(solver):
    train, valid = data()
    solution = solver.run(jnp.zeros(3), jnp.ones(N), train, valid)
    certificates = check(solver, solution, train, valid, num_retrains=4, fraction=0.1)
    assert certificates.verdict.level == "BELIEVE", str(certificates)
    assert abs(certificates.finite_differences.ratios[-1] - 1) < 1e-2  # penalty is right to O(1 / gamma)
    assert certificates.removal_prediction.rank > 0.5
    text = str(certificates)
    assert text.startswith("BELIEVE") and "change by 0.1 " in text and "4 retrains without 10%" in text


def test_a_wrong_gradient_is_not_believed():
    train, valid = data()
    solver = unroll(RIDGE, SGD, steps=10, window=1)  # an approximation, here a bad one
    solution = solver.run(jnp.zeros(3), jnp.ones(N), train, valid)
    verdict = check(solver, solution, train, valid, num_retrains=0).verdict
    assert verdict.level == "DO NOT BELIEVE"
    assert "is not its derivative" in verdict.reason and "Lengthen the window" in verdict.remedy


def test_what_the_solution_was_not_made_of_is_named():
    train, valid = data()
    solver = unroll(RIDGE, SGD, steps=10, batch_size=5)
    solution = solver.run(jnp.zeros(3), jnp.ones(N), train, valid, key=jax.random.key(0))
    for others in ((train, train, 0), ((2 * train[0], train[1]), valid, 0), (train, valid, 1)):
        verdict = check(solver, solution, *others[:2], key=jax.random.key(others[2])).verdict
        assert verdict.level == "UNDECIDED" and "Give check the train, valid, key" in verdict.reason


def test_weights_of_0_cannot_be_checked_by_shares_of_them():
    train, valid = data()
    solver = unroll(RIDGE, SGD, steps=10)
    solution = solver.run(jnp.zeros(3), jnp.zeros(N), train, valid)
    verdict = check(solver, solution, train, valid).verdict
    assert verdict.level == "UNDECIDED" and "no change by a share of a weight" in verdict.reason


def test_an_outer_variable_of_another_kind_has_differences_alone():
    def mean_loss(params, frozen, batch):
        return losses(params, frozen, batch).mean()

    def decayed(params, log_decay, frozen, batch):
        return mean_loss(params, frozen, batch) + jnp.exp(log_decay) * (params @ params)

    problem = global_problem(decayed, mean_loss)
    train, valid = data()
    solver = unroll(problem, SGD, steps=20)
    solution = solver.run(jnp.zeros(3), jnp.array(-1.0), train, valid)
    certificates = check(solver, solution, train, valid)
    assert certificates.metasmoothness is None and certificates.removal_prediction is None
    assert certificates.verdict.level == "BELIEVE" and "change of every entry by 0.1" in certificates.verdict.reason


def test_what_cannot_be_checked_says_why():
    train, valid = data()
    params = jnp.linalg.solve(train[0].T @ train[0] / N + 0.3 * jnp.eye(3), train[0].T @ train[1] / N)
    solver = implicit(RIDGE)
    verdict = check(solver, solver.run(params, jnp.ones(N), train, valid), train, valid).verdict
    assert verdict.level == "UNDECIDED" and "Give it an optimizer and steps" in str(verdict)

    method = single_loop.mixing(weighted(losses), SGD, 0.5, N)
    solver = jointly(weighted(losses), method, steps=5)
    verdict = check(solver, solver.run(jnp.zeros(3), (), train, valid), train, valid).verdict
    assert verdict.level == "UNDECIDED" and "no hypergradient" in str(verdict)

    solver = unroll(RIDGE, optax.sgd(1e6), steps=80)
    solution = solver.run(jnp.zeros(3), jnp.ones(N), train, valid, throw=False)
    assert int(solution.status) == Status.NOT_FINITE
    verdict = check(solver, solution, train, valid).verdict
    assert verdict.level == "DO NOT BELIEVE" and "training diverged" in verdict.reason


def network(activation):
    def example_losses(params, frozen, batch):
        hidden = activation(batch["data"][0] @ params["in"] + params["bias"][None])
        return (hidden @ params["out"] - batch["data"][1]) ** 2

    return weighted(example_losses)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_kinks_are_told_from_curvature(name):
    random = np.random.default_rng(0)
    x, xv = random.normal(size=(24, 4)), random.normal(size=(12, 4))
    train, valid = (jnp.asarray(x), jnp.asarray(np.sign(x[:, 0] * x[:, 1]))), (
        jnp.asarray(xv), jnp.asarray(np.sign(xv[:, 0] * xv[:, 1])),
    )  # fmt: skip
    start = {
        "in": jnp.asarray(random.normal(size=(4, 32)) / 2),
        "bias": jnp.zeros(32),
        "out": jnp.asarray(random.normal(size=32) / 6),
    }
    solver = unroll(network(getattr(jax.nn, name)), optax.sgd(0.2, momentum=0.9), steps=120)
    solution = solver.run(start, jnp.ones(24), train, valid)
    certificates = check(solver, solution, train, valid, num_retrains=0)
    print(certificates.finite_differences)
    assert has_kinks(certificates.finite_differences) == (name == "relu"), str(certificates)
    assert ("ReLU" in certificates.verdict.remedy) == (name == "relu")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.0, 1.0, 1.0, 1.0), False),
        ((0.5, 0.95, 0.995, 0.9995), False),  # curvature
        ((0.0, 1.7, 0.4, 0.99), False),  # chaotic, but smooth
        ((0.945, 0.896, 0.882, 0.99), True),
        ((1.0, 1.01, 1.02, 1.04), False),  # rounding
    ],
)
def test_trends_of_ratios(ratios, expected):
    differences = FiniteDifferences((0.1, 0.03, 0.01, 0.003), ratios, (1e-9,) * 4)
    assert has_kinks(differences) == expected
    assert not has_kinks(differences._replace(noise=()))
    assert not has_kinks(differences._replace(noise=(1.0,) * 4))


def test_a_jump_at_one_step_alone_is_a_kink_beside_curvature():
    ratios = (0.66, 1.1, 28.0, 1.0)
    assert has_kinks(FiniteDifferences((0.1, 3e-3, 3e-5, 3e-6), ratios, (1e-9,) * 4))
    assert not has_kinks(FiniteDifferences((0.1, 3e-3, 3e-5, 3e-6), ratios, (10.0,) * 4))  # rounding may do that


def test_a_bad_status_is_never_believed():
    good = FiniteDifferences((0.1,), (1.0,))
    for status in list(Status)[1:]:
        smooth = certify.Metasmoothness((0.5,), (0.99,))
        certificates = certify.Certificates(good, smooth, None, Checks(), status)
        assert certificates.verdict.level == "DO NOT BELIEVE"
