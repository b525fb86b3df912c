"""Solutions of bilevel problems, with the status that says what they are worth."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel_jax.core.types import Checks, Hyper, ModelState, Params, Scalar


class Status(enum.IntEnum):
    """What a solution is worth: the first that applies, from the worst."""

    OK = 0
    EMPTY = 1
    """No validation example: there is nothing to differentiate."""
    NOT_FINITE = 2
    """The validation loss or a derivative of it is infinite or not a number."""
    NOT_DIFFERENTIABLE = 3
    """No gradient passes through the optimizer: its update does not depend on the size of a gradient."""
    NOT_POSITIVE_DEFINITE = 4
    """The curvature is 0 or negative along a direction: the inner problem has no unique minimizer there."""
    NOT_SOLVED = 5
    """The linear system, or a minimization, was not solved."""
    NOT_STATIONARY = 6
    """The parameters do not minimize the inner problem, which implicit differentiation assumes."""
    UNRESOLVED = 7
    """The hypergradient is a difference of numbers that are equal to rounding: what is left is noise."""


STATUS_REMEDIES = {
    Status.EMPTY: "there are no validation examples. Give at least one.",
    Status.NOT_FINITE: "the validation loss or its hypergradient is not finite: an input is not finite, training "
    "diverged, or the optimizer's update has no derivative at a zero gradient. Look at the weights and the data; lower "
    "the learning rate; give Adam and its kin eps_root > 0 (1e-12).",
    Status.NOT_DIFFERENTIABLE: "the optimizer's update does not depend on the size of a gradient (sign methods such as "
    "lion), or no gradient reaches the parameters, so no weight changes anything. Use adamw(eps_root=1e-12) or sgd.",
    Status.NOT_POSITIVE_DEFINITE: "the curvature of the inner problem is not positive definite. Give the problem a "
    "prior or a stronger one (bj.proximal), keep the weights at or above 0, use curvature.gauss_newton, or unroll.",
    Status.NOT_SOLVED: "the linear system, or a minimization, was not solved to the tolerance asked for. Raise the "
    "number of its steps, or the strength of the prior.",
    Status.NOT_STATIONARY: "the parameters do not minimize the inner problem. Train longer, give implicit an optimizer "
    "and steps, or unroll.",
    Status.UNRESOLVED: "the hypergradient is below what rounding resolves: its terms cancel, as under an optimizer "
    "that does not feel the scale of a gradient that one weight multiplies. Use sgd there, or float64.",
}
"""Why a status is not OK, and what helps."""


class Solution(NamedTuple):
    """A trained model, its validation loss and the derivatives of that."""

    params: Params
    """The parameters at the end."""
    value: Scalar
    """L_v, nats: the mean of the outer losses."""
    grad: Hyper
    """d L_v / d hyper, shaped as hyper; () of a method that moves parameters and weights together."""
    grad_start: Params
    """unroll: d L_v / d (parameters before the first step differentiated); else 0, as a minimizer forgets its start."""
    grad_optimizer: dict[str, Array]
    """unroll: d L_v / d (each hyperparameter that `optax.inject_hyperparams` holds), by name; else empty. It is 0 for
    one that is a schedule: each step overwrites it."""
    checks: Checks
    """Numerical trouble, as arrays; nan where a field does not apply."""
    status: Int[Array, ""]
    """A `Status` as a number: `Status(int(solution.status)).name`."""
    model_state: ModelState = ()
    """The model's state at the end; () for a model without one."""
    weights: Float[Array, "examples"] | tuple[()] = ()
    """jointly: the weights at the end, mean about 1."""
    start: Params = ()
    """What `run` was given as params."""
    hyper: Hyper = ()
    """The outer variable that `grad` belongs to; jointly: its last value."""


class BilevelSolver(NamedTuple):
    """A bilevel method with its settings, built once and called often."""

    run: Callable[..., Solution]
    """(params, hyper, train, valid, *, frozen=(), model_state=(), key=None, throw=True) -> Solution."""
    value: Callable[..., Scalar]
    """(params, hyper, train, valid, *, frozen=(), model_state=(), key=None) -> L_v; jax.grad by params and hyper."""
    estimand: str
    """What `grad` is the derivative of, in words."""
    is_retrained: bool
    """Whether `value` trains (or minimizes) again for another outer variable, so that differences of it test `grad`."""
    is_per_example: bool
    """Whether the outer variable holds a number for each training example."""
    at_highest: "BilevelSolver | None" = None
    """The same with all matrix products of the highest precision; None where they have it."""


def raise_for_status(status: Int[Array, "..."]) -> None:
    """Raise where a solution is not OK, with the reason and the remedy.

    Args:
        status: of a `Solution`, or an array of several.

    Returns:
        Nothing.

    Raises:
        FloatingPointError: for the worst status that is not OK.

    Example:
        >>> bj.raise_for_status(jnp.array(0))
    """
    bad = np.asarray(status)
    if not bad.any():
        return
    worst = Status(int(bad[bad != Status.OK].min()))
    count = f" ({int((bad == worst).sum())} of {bad.size} solutions)" if bad.ndim else ""
    raise FloatingPointError(f"{worst.name}{count}: {STATUS_REMEDIES[worst]} throw=False returns the numbers.")


def first_status(*conditions: tuple[Status, Array]) -> Int[Array, ""]:
    """The first status whose condition holds; OK where none does."""
    codes = [jnp.asarray(status, jnp.int32) for status, _ in conditions]
    return jnp.select([condition for _, condition in conditions], codes, jnp.asarray(Status.OK, jnp.int32))


def judge_minimizer(
    is_finite: Array, checks: Checks, value: Scalar, *, max_residual: float, max_gap: float
) -> Int[Array, ""]:
    """The status of a hypergradient at a minimizer; what a method does not check is nan, and passes."""
    return first_status(
        (Status.NOT_FINITE, ~is_finite),
        (Status.NOT_POSITIVE_DEFINITE, jnp.asarray(checks.curvature <= 0)),
        (Status.NOT_SOLVED, jnp.asarray(checks.residual > max_residual)),
        (Status.NOT_STATIONARY, jnp.abs(checks.gap) > max_gap * jnp.abs(value)),
    )


def is_traced(status: Array) -> bool:
    """Whether the status is known only when the compiled program runs."""
    return isinstance(status, jax.core.Tracer)
