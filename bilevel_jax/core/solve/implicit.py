"""Implicit differentiation at the minimizer of an inner problem."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core import tree
from bilevel_jax.core.curvature import CurvatureProduct, hessian, over_streams_of
from bilevel_jax.core.implicit import hypergradients_along, implicit_estimator
from bilevel_jax.core.problem import hold_state
from bilevel_jax.core.solve.arrays import Inputs, check_counts, first_micro_batch, training_batch, validation_loss
from bilevel_jax.core.solve.interface import Method, build_solver
from bilevel_jax.core.solve.scanned import scan_forward
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, judge_minimizer
from bilevel_jax.core.solvers import cg
from bilevel_jax.core.training import (
    Devices,
    init_train_state,
    inner_loss_and_grad,
    step_functions,
    train,
    train_step,
    trajectory_from_params,
)
from bilevel_jax.core.types import Batch, Checks, LinearSolver, Params, Problem, Scalar, Stream, Trajectory
from bilevel_jax.core.unrolled import validation_loss_fn


def implicit(
    problem: Problem,
    *,
    curvature: CurvatureProduct | None = None,
    solver: LinearSolver | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int | None = None,
    max_residual: float = 1e-3,
    max_gap: float = 1e-2,
    axis_name: str | None = None,
) -> BilevelSolver:
    """d L_v(theta*(hyper)) / d hyper at the minimizer theta* of G + r, by the implicit function theorem.

        (curvature of G + r) v = grad L_v;   grad = -(d/d hyper) <grad G, v>

    `run` takes the minimizer as `params`. With `optimizer` and `steps` it looks for it first: so many steps of the
    whole training set from `params`; then `value` is a function of hyper that differences can test. On arrays it is a
    pure function, which composes with jit, vmap, scan, pmap and shard_map. On streams, which are summed, a Python loop
    does the same (see `implicit_estimator`).

    Exact where theta is stationary, the system is solved, and the curvature is the Hessian of a problem whose prior
    makes it positive definite. With the Gauss-Newton product it is the response of the proximal Bregman problem at
    theta. A model's state (batch normalization) is a constant: nothing is differentiated through it.

    Wrong, with a status that says so: theta not stationary (`checks.gap`, the nats of L_v that finishing the inner
    training would change, to first order), the system not solved (`checks.residual`) or not positive definite
    (`checks.curvature`).

    Args:
        problem: as `weighted` or `problem` gives it, in most cases with the prior `proximal`.
        curvature: `curvature.hessian` (default) or `curvature.gauss_newton` of the problem.
        solver: of the linear system; default `solvers.cg()`.
        optimizer: of the inner minimization; default none, `params` is the minimizer.
        steps: of the inner minimization, each over all examples.
        max_residual: of the linear system, relative; beyond it the status is NOT_SOLVED.
        max_gap: in shares of L_v; beyond it the status is NOT_STATIONARY.
        axis_name: of a pmap or shard_map in which each device holds its share of the examples and of their weights.

    Returns:
        The solver. Its `run` gives a `Solution`, and raises a FloatingPointError for one whose status is not OK, unless
        throw=False or inside a transformation, where the status is in the result.

    Raises:
        ValueError: if one of `optimizer` and `steps` is given without the other.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> solver = bj.implicit(problem)
        >>> theta = jnp.array(2.0)  # the mean minimizes the training loss
        >>> solver.run(theta, jnp.ones(2), jnp.array([1.0, 3.0]), jnp.array([4.0])).grad.tolist()
        [1.0, -1.0]
    """
    if (optimizer is None) != (steps is None):
        raise ValueError("give both optimizer and steps, for an inner minimization, or neither.")
    check_counts(steps=steps)
    for name, number in (("max_residual", max_residual), ("max_gap", max_gap)):
        if not number > 0:
            raise ValueError(f"{name} = {number!r}; give a number above 0.")
    product = hessian(problem) if curvature is None else curvature
    linear_solver = cg() if solver is None else solver
    devices = Devices(axis_name)

    def minimize(local: Problem, inputs: Inputs, batch: Batch) -> Params:
        if optimizer is None:
            return inputs.params
        forward = step_functions(local, optimizer, devices)[0]
        state = init_train_state(optimizer, inputs.params)
        return scan_forward(forward, local, state, inputs.hyper, inputs.frozen, lambda _: batch, steps or 0).params

    def prepare(inputs: Inputs) -> tuple[Problem, Batch, Params]:
        """(a device's share of the problem, its training examples, the minimizer)"""
        local = devices.share(hold_state(problem, inputs.model_state))
        batch = training_batch(inputs, devices)
        return local, batch, minimize(local, inputs, batch)

    def solve(inputs: Inputs) -> Solution:
        with jax.default_matmul_precision("highest"):
            local, batch, params = prepare(inputs)
            micro = first_micro_batch(batch)
            hyper = jax.tree.map(lambda leaf: leaf[0], local.gather(inputs.hyper, batch))
            own_params, own_hyper, frozen = devices.make_local((params, hyper, inputs.frozen))
            value, validation_grad = devices.sum(
                jax.value_and_grad(lambda params: validation_loss(local, inputs, devices, params))(own_params)
            )

            def matvec(v: Params) -> Params:
                v = devices.make_local(v)
                prior = jax.jvp(lambda params: jax.grad(local.prior)(params, frozen), (own_params,), (v,))[1]
                part = product.of_micro_batch(local, own_params, own_hyper, frozen, micro, v)
                return devices.sum(optax.tree.add(prior, part))

            result = linear_solver.solve_traced(matvec, validation_grad, None)
            v = devices.make_local(optax.tree.scale(-1.0, result.x))
            _, parts = hypergradients_along(local, own_params, own_hyper, frozen, micro, v)
            parts = parts if problem.per_example else devices.sum(parts)
            zeros = jax.tree.map(jnp.zeros_like, inputs.hyper)
            grad = local.scatter_add(zeros, batch, jax.tree.map(lambda leaf: leaf[None], parts))
            inner_grad = devices.sum(
                inner_loss_and_grad(local, own_params, jax.tree.map(lambda leaf: leaf[None], own_hyper), frozen, batch)
            )[1]
        gap = optax.tree.vdot(result.x, inner_grad)
        # a solve that met a nan gave up at x = 0, but its gap is nan
        is_finite = devices.all(tree.all_finite((value, grad, params, gap)))
        checks = Checks(residual=result.residual, curvature=result.min_curvature, gap=gap, steps=result.steps)
        status = judge_minimizer(is_finite, checks, value, max_residual=max_residual, max_gap=max_gap)
        return Solution(
            params, value, grad, jax.tree.map(jnp.zeros_like, params), {}, checks, status, inputs.model_state
        )

    def evaluate(inputs: Inputs) -> Scalar:
        with jax.default_matmul_precision("highest"):
            local, _, params = prepare(inputs)
            return devices.sum(validation_loss(local, inputs, devices, devices.make_local(params)))

    def minimize_on_stream(inputs: Inputs, held: Problem) -> Trajectory:
        if optimizer is None:
            return trajectory_from_params(inputs.params)
        if inputs.train.steps != 1:
            raise ValueError(
                f"the train stream has {inputs.train.steps} batches, and a step of the inner minimization takes all "
                "examples: give a stream of one batch of micro-batches, or the minimizer as params without optimizer."
            )
        repeated = Stream(lambda _: inputs.train.batch(0), steps or 0)
        start = init_train_state(optimizer, inputs.params)
        trajectory = train(train_step(held, optimizer), start, inputs.hyper, inputs.frozen, repeated)
        return trajectory_from_params(trajectory.end.params)

    def solve_streams(inputs: Inputs) -> Solution:
        held = hold_state(problem, inputs.model_state)
        trajectory = minimize_on_stream(inputs, held)
        product_of_held = product if held is problem else over_streams_of(held, product.of_micro_batch)
        estimate = implicit_estimator(held, product_of_held, linear_solver)(
            trajectory, inputs.hyper, inputs.frozen, inputs.train, inputs.valid
        )
        params, checks, value = trajectory.end.params, estimate.checks, estimate.validation_loss
        is_finite = tree.all_finite((value, estimate.grad, params, jnp.asarray(checks.gap)))
        status = judge_minimizer(is_finite, checks, value, max_residual=max_residual, max_gap=max_gap)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Solution(params, value, estimate.grad, zeros, {}, checks, status, inputs.model_state)

    def evaluate_streams(inputs: Inputs) -> Scalar:
        held = hold_state(problem, inputs.model_state)
        params = minimize_on_stream(inputs, held).end.params
        return validation_loss_fn(held)(params, inputs.frozen, inputs.valid)

    return build_solver(
        problem,
        Method(solve, evaluate, solve_streams, evaluate_streams),
        estimand="L_v at the minimizer of the inner problem",
        is_retrained=optimizer is not None,
        devices=devices,
    )
