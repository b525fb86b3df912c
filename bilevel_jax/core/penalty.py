"""The value-function penalty estimator, first order only."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core import tree
from bilevel_jax.core.implicit import subsample_stream
from bilevel_jax.core.training import (
    apply_gradients,
    init_train_state,
    inner_loss_and_grad,
    loss_grad_and_example_losses,
    mix_gradients,
)
from bilevel_jax.core.types import Checks, Estimate, Estimator, Frozen, Hyper, Params, Problem, Stream, Trajectory
from bilevel_jax.core.unrolled import validation_loss_and_grad_fn


def penalty_estimator(
    problem: Problem, optimizer: optax.GradientTransformation, *, gamma: float, steps: int, batches: int | None = None
) -> Estimator:
    """The metagradient d L_v(theta*(w)) / dw up to O(1 / gamma), by two minimisers and no second derivative.

        theta_0 = argmin G + r,  theta_gamma = argmin L_v + gamma (G + r),
        hypergradient_i = gamma (l_i(theta_gamma) - l_i(theta_0)) / N

    Sign, units and (summed) streams are those of `implicit_estimator`. Each minimiser is sought by `steps` steps of
    `optimizer` over the whole streams, theta_0 from the end of the trajectory, theta_gamma from theta_0 on lambda L_v +
    (1 - lambda) (G + r), so that one learning rate suits every gamma.

    `validation_loss` is L_v(theta_0); `direction`, gamma (theta_0 - theta_gamma), tends to implicit's v.
    `checks.residual` is |grad L_v + gamma grad (G + r)| / |grad L_v| at theta_gamma, `gap` <direction, grad (G +
    r)(theta_0)>, nats.

    Wrong where the minimiser of G + r is not unique and curved (then it is the optimistic estimand's), where gamma is
    small (error O(1 / gamma)) or so large that rounding shows (in float32 keep it near 1e3: errors of .1 to .3 % were
    measured there, of 3 % at 1e5), and where a minimiser was not reached (`residual`, `gap`).
    Source: the value function of Kwon et al. (2023) and Shen & Chen (2023).

    Args:
        problem: as `weighted` or `shared` gives it.
        optimizer: of both minimisations.
        gamma: the penalty's strength, above 0.
        steps: of each minimisation, at least 1; each is a pass over the streams.
        batches: of the train stream, its first ones, for the minimisations; default all.

    Returns:
        The estimator: (trajectory, hyper, frozen, train stream, validation stream) -> `Estimate`.

    Raises:
        ValueError: if gamma is not positive or there are no steps.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> estimator = bj.penalty_estimator(problem, optax.sgd(0.9), gamma=100.0, steps=20)
        >>> train, validation = (bj.full_batch_stream(jnp.array(data)) for data in ([1.0, 3.0], [4.0]))
        >>> estimate = estimator(bj.trajectory_from_params(jnp.array(2.0)), jnp.ones(2), (), train, validation)
        >>> [round(float(grad), 1) for grad in estimate.grad]  # exact: 1, -1
        [1.0, -1.0]
    """
    if not gamma > 0 or steps < 1:
        raise ValueError(f"gamma {gamma} and {steps} steps; give a positive gamma and at least one step.")
    validation_share = 1 / (1 + gamma)
    loss_and_grad = validation_loss_and_grad_fn(problem)
    gather, scatter_add = jax.jit(problem.gather), jax.jit(problem.scatter_add, donate_argnums=0)

    problem_without_prior = problem._replace(prior=lambda params, frozen: jnp.zeros(()))
    prior_gradient, mixed_gradient, advance = (
        jax.jit(jax.grad(problem.prior)),
        jax.jit(mix_gradients),
        jax.jit(partial(apply_gradients, optimizer)),
    )

    @jax.jit
    def add_gradient(total, params, weights, frozen, batch):
        with jax.default_matmul_precision("highest"):
            return optax.tree.add(total, inner_loss_and_grad(problem_without_prior, params, weights, frozen, batch)[1])

    @jax.jit
    def loss_differences(penalized, unpenalized, weights, frozen, batch):
        with jax.default_matmul_precision("highest"):
            penalized_losses, unpenalized_losses = (
                loss_grad_and_example_losses(problem, params, weights, frozen, batch)[2]
                for params in (penalized, unpenalized)
            )
            return jax.tree.map(lambda a, b: gamma * (a - b), penalized_losses, unpenalized_losses)

    def inner_gradient(params: Params, hyper: Hyper, frozen: Frozen, stream: Stream) -> Params:
        total = prior_gradient(params, frozen)
        for index in range(stream.steps):
            batch = stream.batch(index)
            total = add_gradient(total, params, gather(hyper, batch), frozen, batch)
        return total

    def estimate(trajectory: Trajectory, hyper: Hyper, frozen: Frozen, train: Stream, validation: Stream) -> Estimate:
        sample = subsample_stream(train, min(batches or train.steps, train.steps))

        def minimise(params: Params, mix: float) -> Params:
            state = init_train_state(optimizer, params)
            for _ in range(steps):
                inner_grad = inner_gradient(state.params, hyper, frozen, sample)
                if mix:
                    validation_grad = loss_and_grad(state.params, frozen, validation)[1]
                    inner_grad = mixed_gradient(validation_grad, inner_grad, mix)
                state = advance(state, inner_grad)
            return state.params

        unpenalized = minimise(trajectory.end.params, 0.0)
        penalized = minimise(unpenalized, validation_share)
        direction = optax.tree.scale(gamma, optax.tree.sub(unpenalized, penalized))
        outer_grad = loss_and_grad(penalized, frozen, validation)[1]
        residual_grad = optax.tree.add_scale(outer_grad, gamma, inner_gradient(penalized, hyper, frozen, sample))
        checks = Checks(
            residual=float(tree.norm(residual_grad) / tree.norm(outer_grad)),
            gap=float(optax.tree.vdot(direction, inner_gradient(unpenalized, hyper, frozen, sample))),
            steps=2 * steps,
            batches=sample.steps,
        )
        grad = jax.tree.map(jnp.zeros_like, hyper)
        for index in range(train.steps):
            batch = train.batch(index)
            grad = scatter_add(
                grad, batch, loss_differences(penalized, unpenalized, gather(hyper, batch), frozen, batch)
            )
        return Estimate(grad, loss_and_grad(unpenalized, frozen, validation)[0], direction, checks, unpenalized)

    return estimate
