"""All certificates of a solution in one call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from bilevel_jax.core.certify.finite_differences import STEP_SIZES, check_finite_differences, sign_direction
from bilevel_jax.core.certify.products import measure_product_error
from bilevel_jax.core.certify.reliability import (
    Reliability,
    measure_reliability,
    measure_reliability_against,
    validation_halves,
)
from bilevel_jax.core.certify.removals import REMOVED, metasmoothness, predict_removals
from bilevel_jax.core.certify.verdict import Certificates, effective_share, shares_to_remove
from bilevel_jax.core.solve.arrays import count_rows
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, Status
from bilevel_jax.core.streams import halve_stream
from bilevel_jax.core.types import PADDING, Frozen, Hyper, ModelState, PyTree, Stream


def check(
    solver: BilevelSolver,
    solution: Solution,
    train: PyTree,
    valid: PyTree,
    *,
    dev: PyTree = None,
    key: Any = None,
    frozen: Frozen = (),
    model_state: ModelState = (),
    step_sizes: Sequence[float] = STEP_SIZES,
    removed: Sequence[float] = REMOVED,
    draws: int = 3,
    num_retrains: int = 8,
    fraction: float = 0.5,
    seed: int = 0,
) -> Certificates:
    """All certificates of a solution in one call, with a verdict; `print` shows them.

    Differences of the estimand along the signs of the gradient, at the step sizes given and, where their ratios are
    not near 1 yet, at ever smaller ones down to rounding; metasmoothness; and retrains without a part of the examples.
    A weight of 0 does not move in the differences, so that they say nothing of its derivative.
    The reliability tells how far the entries speak for other examples: by halves of the validation set, which at
    weights that are not all equal tells nothing of others (they may have been learned from it), or against `dev`.
    Where the solver's `product_precision` is below the highest, one solution at the highest tells what that changes.
    With the defaults it costs 9 to 19 trainings for the differences, 5 to 8 more solutions, and 8 trainings. For an
    outer variable that is not one weight for each example only the differences apply: every entry then moves by the
    step itself, not by a share of it.

    Args:
        solver: as it made the solution.
        solution: of `solver.run`, outside of transformations.
        train: as `run` was given it.
        valid: likewise.
        dev: a second validation set that the weights were not learned from, of the same kind; default none.
        key: likewise.
        frozen: likewise.
        model_state: likewise.
        step_sizes: of the differences, largest first.
        removed: shares of the examples that metasmoothness leaves out; at uneven weights, where it cannot speak for
            changes of half of the data, those below a half alone.
        draws: choices of examples for each of them.
        num_retrains: retrains without some examples; 0 for none.
        fraction: of the examples that each of them leaves out.
        seed: of the choices of examples and of halves.

    Returns:
        The certificates; `verdict` is their sentence. Where the solver has no gradient, or does not train again, it is
        UNDECIDED and says why.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> train, valid = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), jnp.array([4.0])
        >>> solver = bj.unroll(problem, optax.sgd(0.1), steps=5)
        >>> solution = solver.run(jnp.array(0.0), jnp.ones(5), train, valid)
        >>> bj.certify.check(solver, solution, train, valid, num_retrains=0).verdict.level
        'BELIEVE'
    """
    if jnp.ndim(solution.status):
        raise ValueError(
            f"the solution holds {jnp.size(solution.status)} solutions; give one of them: "
            "jax.tree.map(lambda leaf: leaf[0], solution)."
        )
    checks, status = jax.tree.map(np.asarray, solution.checks), Status(int(solution.status))
    given = {"key": key, "frozen": frozen, "model_state": model_state}
    without = Certificates(None, None, None, checks, status, solver.is_per_example)
    if not jax.tree.leaves(solution.grad):
        return without._replace(missing="the method has no hypergradient. Use unroll, implicit or penalty for one.")
    if not solver.is_retrained:
        return without._replace(
            missing="the solver was given the minimizer and cannot find another one. Give it an optimizer and steps."
        )
    if status in (Status.EMPTY, Status.NOT_FINITE):
        return without

    if solver.at_highest is not None:
        exact = solver.at_highest.run(solution.start, solution.hyper, train, valid, throw=False, **given).grad
        error = measure_product_error(solution.grad, exact, is_per_example=solver.is_per_example)
        checks = checks._replace(product_error=error)
        without = without._replace(checks=checks)

    def retrain(hyper: Hyper) -> float:
        return float(solver.value(solution.start, hyper, train, valid, **given))

    hyper, grad, value = solution.hyper, solution.grad, float(solution.value)
    direction = sign_direction(hyper, grad, is_relative=solver.is_per_example)
    slope = float(optax.tree.vdot(grad, direction))
    if slope == 0:
        return without._replace(
            missing="the gradient is 0 wherever the outer variable is not: no change by a share of a weight tests it. "
            "Compute it at weights above 0."
            if solver.is_per_example
            else "the gradient is 0: it predicts no change that a difference could test."
        )
    again = retrain(hyper)
    if not abs(again - value) <= max(0.05 * step_sizes[0] * abs(slope), 1e-6 * abs(value)):
        return without._replace(
            missing=f"the same outer variable gives L_v = {again:.6g} now, and {value:.6g} in the solution. Give check "
            "the train, valid, key, frozen and model_state that run was given; if it has them, training amplifies "
            "rounding: lower the learning rate, or use float64."
        )
    differences = check_finite_differences(
        retrain, hyper, grad, step_sizes, is_relative=solver.is_per_example, value=value
    )
    if not solver.is_per_example:
        return without._replace(finite_differences=differences)

    def estimate(weights: Hyper, validation: PyTree = valid) -> Hyper:
        return solver.run(solution.start, weights, train, validation, throw=False, **given).grad

    share = effective_share(hyper)
    smoothness_key, removal_key = jax.random.split(jax.random.key(seed))
    removal = None
    if num_retrains:
        removal = predict_removals(
            retrain, removal_key, hyper, grad, value, fraction=fraction, num_retrains=num_retrains
        )
    return without._replace(
        finite_differences=differences,
        metasmoothness=metasmoothness(estimate, smoothness_key, hyper, grad, shares_to_remove(removed, share), draws),
        removal_prediction=removal,
        effective_share=share,
        reliability=_measure_reliability(partial(estimate, hyper), hyper, grad, valid, dev, seed),
    )


def _measure_reliability(
    estimate: Callable[[PyTree], Hyper], weights: Hyper, grad: Hyper, valid: PyTree, dev: PyTree, seed: int
) -> Reliability:
    """By halves of the validation set, or against an independent one; `estimate` takes a validation set."""
    num_validation = len(_examples(valid))
    if dev is not None and len(_examples(dev)) > 1:
        dev_grad, dev_difference = _estimate_halves(estimate, dev, seed)
        return measure_reliability_against(weights, grad, dev_grad, dev_difference, num_validation)
    if num_validation < 2:
        return measure_reliability(weights, grad, jnp.zeros_like(grad), num_validation)
    difference = _estimate_halves(estimate, valid, seed)[1]
    reliability = measure_reliability(weights, grad, difference, num_validation)
    return reliability._replace(is_fitted=bool(jnp.any(weights != weights[0])))


def _estimate_halves(estimate: Callable[[PyTree], Hyper], validation: PyTree, seed: int) -> tuple[Hyper, Hyper]:
    """(the hypergradient of a validation set, the difference of its halves), each by a solution of its own."""
    examples = _examples(validation)
    halves = validation_halves(len(examples), seed)
    if isinstance(validation, Stream):
        table = jnp.zeros(int(examples.max()) + 1).at[examples].set(jnp.asarray(halves, jnp.result_type(float)))
        return estimate(validation), estimate(halve_stream(validation, table))
    above, below = (estimate(_take_twice(validation, np.flatnonzero(side))) for side in (halves > 0, halves < 0))
    share = float((halves > 0).mean())
    return share * above + (1 - share) * below, (share * (1 - share)) ** 0.5 * (above - below)


def _take_twice(data: PyTree, chosen: Int[np.ndarray, "half"]) -> PyTree:
    """The chosen examples, each twice: the same mean, and for a half the shape of the whole, which is compiled."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[np.tile(chosen, 2)], data)


def _examples(validation: PyTree) -> Int[np.ndarray, "examples"]:
    """The indices of the examples of a validation set."""
    if not isinstance(validation, Stream):
        return np.arange(count_rows(validation))
    index = np.concatenate([np.asarray(validation.batch(at)["index"]).ravel() for at in range(validation.steps)])
    return np.sort(index[index != PADDING])
