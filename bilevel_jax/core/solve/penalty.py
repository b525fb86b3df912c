"""The value-function penalty: hypergradients from two minimizers, first order only."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core import tree
from bilevel_jax.core.penalty import penalty_estimator
from bilevel_jax.core.problem import hold_state
from bilevel_jax.core.solve.arrays import Inputs, check_counts, training_batch, validation_loss
from bilevel_jax.core.solve.interface import Method, build_solver
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, judge_minimizer
from bilevel_jax.core.training import (
    Devices,
    apply_gradients,
    init_train_state,
    inner_loss_and_grad,
    loss_grad_and_example_losses,
    mix_gradients,
    trajectory_from_params,
)
from bilevel_jax.core.types import Batch, Checks, Params, Problem, Scalar


def penalty(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    gamma: float,
    steps: int,
    max_residual: float = 0.1,
    max_gap: float = 1e-2,
    axis_name: str | None = None,
) -> BilevelSolver:
    """d L_v(theta*(hyper)) / d hyper up to O(1 / gamma), by two minimizers and no second derivative.

        theta_0 = argmin G + r,  theta_gamma = argmin L_v + gamma (G + r),
        grad = gamma (d/d hyper) (G(theta_gamma, hyper) - G(theta_0, hyper))

    Each minimizer is sought by `steps` steps of `optimizer` over all examples, theta_0 from `params`, theta_gamma from
    theta_0 on lambda L_v + (1 - lambda) (G + r) with lambda = 1 / (1 + gamma), so that one learning rate suits every
    gamma. `value` and `params` are those of theta_0. On arrays, `run` is a pure function, which composes with jit,
    vmap, scan, pmap and shard_map; on streams, which are summed, a Python loop does the same.

    `checks.residual` is |grad L_v + gamma grad (G + r)| / |grad L_v| at theta_gamma, `checks.gap` the nats of L_v that
    finishing the search for theta_0 would change. A model's state is a constant.

    Wrong where the minimizer of G + r is not unique and curved (then it is the optimistic estimand's), where gamma is
    small (error O(1 / gamma)) or so large that rounding shows (in float32 keep it near 1e3: errors of .1 to .3 % were
    measured there, of 3 % at 1e5), and where a minimizer was not reached (NOT_SOLVED, NOT_STATIONARY).
    Source: the value function of Kwon et al. (2023) and Shen & Chen (2023).

    Args:
        problem: as `weighted` or `problem` gives it.
        optimizer: of both minimizations.
        gamma: the penalty's strength, above 0.
        steps: of each minimization, each over all examples.
        max_residual: beyond it the status is NOT_SOLVED.
        max_gap: in shares of L_v; beyond it the status is NOT_STATIONARY.
        axis_name: of a pmap or shard_map in which each device holds its share of the examples and of their weights.

    Returns:
        The solver. Its `run` gives a `Solution`, and raises a FloatingPointError for one whose status is not OK, unless
        throw=False or inside a transformation, where the status is in the result.

    Raises:
        ValueError: if gamma or steps is not positive.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> solver = bj.penalty(problem, optax.sgd(0.9), gamma=100.0, steps=20)
        >>> solution = solver.run(jnp.array(2.0), jnp.ones(2), jnp.array([1.0, 3.0]), jnp.array([4.0]))
        >>> [round(float(grad), 1) for grad in solution.grad]  # exact: 1, -1
        [1.0, -1.0]
    """
    check_counts(steps=steps)
    if not gamma > 0:
        raise ValueError(f"gamma = {gamma!r}; give a number above 0.")
    validation_share = 1 / (1 + gamma)
    devices = Devices(axis_name)

    def validation_grad(local: Problem, inputs: Inputs, params: Params) -> tuple[Scalar, Params]:
        own_params = devices.make_local(params)
        return devices.sum(
            jax.value_and_grad(lambda params: validation_loss(local, inputs, devices, params))(own_params)
        )

    def inner_grad(local: Problem, inputs: Inputs, batch: Batch, params: Params) -> Params:
        weights = devices.make_local(local.gather(inputs.hyper, batch))
        own_params, frozen = devices.make_local((params, inputs.frozen))
        return devices.sum(inner_loss_and_grad(local, own_params, weights, frozen, batch))[1]

    def minimize(local: Problem, inputs: Inputs, batch: Batch, start: Params, share: float) -> Params:
        def advance(state, _):
            grad = inner_grad(local, inputs, batch, state.params)
            if share:
                grad = mix_gradients(validation_grad(local, inputs, state.params)[1], grad, share)
            return apply_gradients(optimizer, state, grad), None

        return jax.lax.scan(advance, init_train_state(optimizer, start), length=steps)[0].params

    def prepare(inputs: Inputs) -> tuple[Problem, Batch, Params]:
        local = devices.share(hold_state(problem, inputs.model_state))
        batch = training_batch(inputs, devices)
        return local, batch, minimize(local, inputs, batch, inputs.params, 0.0)

    def solve(inputs: Inputs) -> Solution:
        with jax.default_matmul_precision("highest"):
            local, batch, unpenalized = prepare(inputs)
            penalized = minimize(local, inputs, batch, unpenalized, validation_share)
            weights, frozen = devices.make_local((local.gather(inputs.hyper, batch), inputs.frozen))
            at_penalized, at_unpenalized = (
                loss_grad_and_example_losses(local, devices.make_local(params), weights, frozen, batch)[2]
                for params in (penalized, unpenalized)
            )
            parts = jax.tree.map(lambda a, b: gamma * (a - b), at_penalized, at_unpenalized)
            parts = parts if problem.per_example else devices.sum(parts)
            grad = local.scatter_add(jax.tree.map(jnp.zeros_like, inputs.hyper), batch, parts)
            value = validation_grad(local, inputs, unpenalized)[0]
            outer_grad = validation_grad(local, inputs, penalized)[1]
            residual_grad = optax.tree.add_scale(outer_grad, gamma, inner_grad(local, inputs, batch, penalized))
            residual_norm, outer_norm = tree.norm(residual_grad), tree.norm(outer_grad)
            direction = optax.tree.scale(gamma, optax.tree.sub(unpenalized, penalized))
            gap = optax.tree.vdot(direction, inner_grad(local, inputs, batch, unpenalized))
        residual = jnp.where(residual_norm == 0, 0, residual_norm / outer_norm)
        is_finite = devices.all(tree.all_finite((value, grad, unpenalized)))
        checks = Checks(residual=residual, gap=gap, steps=jnp.asarray(2 * steps))
        zeros = jax.tree.map(jnp.zeros_like, unpenalized)
        status = judge_minimizer(is_finite, checks, value, max_residual=max_residual, max_gap=max_gap)
        return Solution(unpenalized, value, grad, zeros, {}, checks, status, inputs.model_state)

    def evaluate(inputs: Inputs) -> Scalar:
        with jax.default_matmul_precision("highest"):
            local, _, unpenalized = prepare(inputs)
            return devices.sum(validation_loss(local, inputs, devices, devices.make_local(unpenalized)))

    def solve_streams(inputs: Inputs) -> Solution:
        held = hold_state(problem, inputs.model_state)
        estimator = penalty_estimator(held, optimizer, gamma=gamma, steps=steps)
        estimate = estimator(
            trajectory_from_params(inputs.params), inputs.hyper, inputs.frozen, inputs.train, inputs.valid
        )
        value, checks, params = estimate.validation_loss, estimate.checks, estimate.params
        is_finite = tree.all_finite((value, estimate.grad, params))
        zeros = jax.tree.map(jnp.zeros_like, params)
        status = judge_minimizer(is_finite, checks, value, max_residual=max_residual, max_gap=max_gap)
        return Solution(params, value, estimate.grad, zeros, {}, checks, status, inputs.model_state)

    def evaluate_streams(inputs: Inputs) -> Scalar:
        return solve_streams(inputs).value

    return build_solver(
        problem,
        Method(solve, evaluate, solve_streams, evaluate_streams),
        estimand="L_v at the minimizer of the inner problem, up to O(1 / gamma)",
        devices=devices,
    )
