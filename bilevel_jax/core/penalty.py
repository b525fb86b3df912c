"""Value-function penalties, first order only: an estimator, single-loop training with weights, and direct mixing.

Bilevel as one objective, with lambda = 1 / (1 + gamma), G the weighted training loss and r its prior:

    F(theta, u, w) = L_v(theta) + gamma [(G + r)(theta, w) - (G + r)(u, w)],  minimised in theta and w, maximised in u

| method | `second` | selector | `share` (lambda) |
|---|---|---|---|
| V-PBGD (Shen & Chen, 2023), F2SA (Kwon et al., 2023) | copy | sigmoid | from_gamma(a growing gamma) |
| ScaleBiO (Pan et al., 2025) | copy | per source | from_gamma(optax.exponential_decay(..., staircase=True)) |
| SEAL (Shen et al., 2024), as its public code trains | none | softmax | by_epoch(SEAL, steps) |
| offline data selection (Xiao & Chen, 2025), memory-saving | none | softmax | by_epoch(OFFLINE, steps) |
| direct mixing | none | equal | constant rho: `mixing` |
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.implicit import subsample_stream
from bilevel_jax.core.problem import divide_by_multiplicity
from bilevel_jax.core.training import init_train_state, inner_loss_and_grad
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Checks,
    Estimate,
    Estimator,
    Frozen,
    Hyper,
    HyperSlice,
    Params,
    Problem,
    Scalar,
    SingleLoop,
    Stream,
    TrainState,
    Trajectory,
)
from bilevel_jax.core.unrolled import validation_loss_and_grad_fn
from bilevel_jax.core.weightings import OnlineWeights, inverse_rms, online_uniform

OPTIMISTIC_ESTIMAND = (
    "optimistic bilevel: min over weights and over theta in argmin G(., w) of L_v; theta itself is pulled by L_v, "
    "so it trains on V"
)
MIXING_ESTIMAND = (
    "direct mixing: min over theta of rho L_v + (1 - rho) (mean training loss + prior); it trains on V, unweighted"
)

OFFLINE_SELECTION_SHARES = (0.5, 0.4, 0.3)
"""lambda by epoch in the public code of offline data selection."""
SEAL_SHARES = (1.0, 0.97, 0.94)
"""lambda by epoch in SEAL: the first epoch trains on V alone, while the weights already move."""


class PenaltyState(NamedTuple):
    """All that the next step needs; plain arrays, so that saving and loading it is resuming."""

    train_state: TrainState
    """theta, its optimiser's state and the number of steps done."""
    second_model: TrainState | None
    """The second copy u, which follows the weighted training loss alone."""
    weights_state: Any
    """The selector's state."""


class PenaltyMetrics(NamedTuple):
    """What one step tells, all of it at the parameters that the step started from."""

    train_loss: Scalar
    """G + r of the training batch, nats."""
    validation_loss: Scalar
    """L_v of the validation batch, nats per row."""
    validation_share: Scalar
    """lambda."""
    grad_norm: Scalar
    """The norm of theta's gradient."""
    hypergradients: Float[Array, "micro examples"]
    """l_i(theta) - l_i(u), nats; 0 for padding."""


def epoch_schedule(values: Sequence[float], steps_per_epoch: int) -> optax.Schedule:
    """step -> values[epoch], the last value for all epochs beyond the list.

    Raises:
        ValueError: if there are no values, or an epoch has no steps.
    """
    if not values or steps_per_epoch < 1:
        raise ValueError(f"{len(values)} values, {steps_per_epoch} steps per epoch; give at least one of each.")
    return lambda step: jnp.asarray(values)[jnp.minimum(step // steps_per_epoch, len(values) - 1)]


def share_from_gamma(gamma: optax.Schedule) -> optax.Schedule:
    """step -> lambda = 1 / (1 + gamma(step)): the share of L_v where the inner problem is penalised by gamma."""
    return lambda step: 1 / (1 + gamma(step))


def penalty(
    problem: Problem, optimizer: optax.GradientTransformation, *, gamma: float, steps: int, batches: int | None = None
) -> Estimator:
    """d L_v(theta*(w)) / dw up to O(1 / gamma), by two minimisers and no second derivative.

        theta_0 = argmin G + r,  theta_gamma = argmin L_v + gamma (G + r),
        entry_i = gamma (l_i(theta_gamma) - l_i(theta_0)) / rows

    Sign, units and (summed) streams are those of `implicit`. Each minimiser is sought by `steps` steps of `optimizer`
    over the whole streams (of the train stream: its first `batches`), theta_0 from the end of the run, theta_gamma from
    theta_0 on lambda L_v + (1 - lambda) (G + r), so that one learning rate suits every gamma.

    `value` is L_v(theta_0); `direction`, gamma (theta_0 - theta_gamma), tends to implicit's v. `checks.residual` is
    |grad L_v + gamma grad (G + r)| / |grad L_v| at theta_gamma, `gap` <direction, grad (G + r)(theta_0)>, nats.

    Wrong where the minimiser of G + r is not unique and curved (then it is the optimistic estimand's), where gamma is
    small (error O(1 / gamma)) or so large that rounding shows (in float32 keep it near 1e3: errors of .1 to .3 % were
    measured there, of 3 % at 1e5), and where a minimiser was not reached (`residual`, `gap`).
    Source: the value function of Kwon et al. (2023) and Shen & Chen (2023).

    Raises:
        ValueError: if gamma is not positive or there are no steps.
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
                slope = inner_gradient(state.params, hyper, frozen, sample)
                if mix:
                    slope = mixed_gradient(loss_and_grad(state.params, frozen, validation)[1], slope, mix)
                state = advance(state, slope)
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
        return Estimate(grad, loss_and_grad(unpenalized, frozen, validation)[0], direction, checks)

    return estimate


def penalty_single_loop(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    online_weights: OnlineWeights,
    *,
    validation_share: optax.Schedule,
    weights_learning_rate: optax.Schedule,
    second_model: Literal["copy", "none"] = "copy",
    normalize_step: bool = False,
    max_step: float = float("inf"),
) -> SingleLoop:
    """Train theta and the weights together: one step of each on every batch, first order only.

        theta <- opt(grad [lambda L_v + (1 - lambda) (G + r)]);   u <- opt(grad (G + r));
        h <- h - clip(rate * d/dh of sum_i w_i(h) (l_i(theta) - l_i(u)), -cap, cap)   on the rows of the batch

    Everything is read at the parameters before the step. `share` gives lambda = 1 / (1 + gamma) and `rate` the step on
    the selector's logits, both of the step's number. The entries l_i(theta) - l_i(u) are in nats per example, so that
    a row moves as much in a large batch as in a small one, and one that counts 1/G (`base`) as much as a whole one: G
    such rows go where the one they replace would. They lack the factor gamma (ScaleBiO and V-PBGD have it, SEAL does
    not): put it into `rate` where it is wanted. With `normalised` the slope is divided by the rms of its entries that
    are not 0; such steps never come to rest, and where all differences are rounding they follow rounding: let `rate`
    fall. Never Adam on the logits: it moves rows that are absent, and is blind to size.

    second="copy" is the minimax form: u ascends on -gamma (G + r)(u), so a row weighs less where following V costs it
    loss. With second="none" there is no u and l_i(u) = 0, the memory-saving form: it needs one model less and **only
    prefers rows of low loss** under a theta that V pulls; a useful row that is hard counts as a bad one.

    Estimand: optimistic bilevel, min over w and over theta in argmin G(., w) of L_v, as gamma grows: theta itself is
    pulled by L_v, that is, **it trains on V**; compare with training on V alone and with `mixing`, never on V itself.
    Work per step is O(batch), whatever the number of rows. L_v is the mean over the validation batch's own rows.
    Products have JAX's default precision, as in training.

    Source: theta and h as in SEAL's public code, u as in ScaleBiO's, which divides a source's weight by its count in
    the batch.

    Wrong: softmax weights end on few rows, at times on a useless one if `rate` is large while theta is still far off:
    watch the effective size, begin with rate 0. With gamma fixed, L_v and the weights are those of the penalised
    problem, not of its limit.

    Raises:
        ValueError: if `second` is neither "copy" nor "none".
    """
    if second_model not in ("copy", "none"):
        raise ValueError(f"second={second_model!r}; use 'copy' (a second model) or 'none' (the memory-saving form).")
    validation_problem = problem._replace(
        inner=lambda params, weights, frozen, batch: problem.outer(params, frozen, batch),
        prior=lambda params, frozen: jnp.zeros(()),
    )

    def init(params: Params) -> PenaltyState:
        def fresh_state() -> TrainState:
            return init_train_state(
                optimizer, jax.tree.map(jnp.array, params)
            )  # buffers of its own: the step donates them

        return PenaltyState(fresh_state(), fresh_state() if second_model == "copy" else None, online_weights.init())

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: PenaltyState, fixed: Frozen, train: Batch, validation: Batch
    ) -> tuple[PenaltyState, PenaltyMetrics]:
        train_state, copy, index = state.train_state, state.second_model, train["index"]
        lam, weights, present = (
            validation_share(train_state.step),
            online_weights.batch_weights(state.weights_state, index),
            index != PADDING,
        )
        value, slope, entries = loss_grad_and_example_losses(problem, train_state.params, weights, fixed, train)
        real = jnp.sum(validation["index"] != PADDING)
        seen = {**validation, "num_examples": jnp.full_like(validation["num_examples"], real)}
        validation_loss, pull = inner_loss_and_grad(validation_problem, train_state.params, None, fixed, seen)
        grad = mix_gradients(pull, slope, lam)
        if copy is not None:
            _, follow, losses = loss_grad_and_example_losses(problem, copy.params, weights, fixed, train)
            entries, copy = entries - losses, apply_gradients(optimizer, copy, follow)
        entries = jnp.where(present, divide_by_multiplicity(entries, train) * train["num_examples"][:, None], 0)
        change = online_weights.batch_grad(state.weights_state, index, entries)
        scale = -weights_learning_rate(train_state.step) * (inverse_rms(change) if normalize_step else 1)
        change = jax.tree.map(lambda leaf: jnp.clip(scale * leaf, -max_step, max_step), change)
        info = PenaltyMetrics(value, validation_loss, jnp.asarray(lam), tree.norm(grad), entries)
        return PenaltyState(
            apply_gradients(optimizer, train_state, grad),
            copy,
            online_weights.update(state.weights_state, index, change),
        ), info

    return SingleLoop(init, step, lambda state: online_weights.weights(state.weights_state), OPTIMISTIC_ESTIMAND)


def mixing(
    problem: Problem, optimizer: optax.GradientTransformation, validation_share: float, num_examples: int
) -> SingleLoop:
    """Direct mixing, the baseline: theta <- opt(grad [rho L_v + (1 - rho) (mean_i l_i + r)]), every weight 1.

    Estimand: the minimiser of that sum. It **trains on V**. Where training examples contradict V (useless rows) it keeps a
    larger L_v than the bilevel optimum for every rho < 1; with rho = 1 it is training on V alone.

    Raises:
        ValueError: if rho lies outside of [0, 1].
    """
    if not 0 <= validation_share <= 1:
        raise ValueError(
            f"rho {validation_share} is no share; give a number from 0 (training examples alone) to 1 (V alone)."
        )
    constant = optax.constant_schedule
    method = penalty_single_loop(
        problem,
        optimizer,
        online_uniform(num_examples),
        validation_share=constant(validation_share),
        weights_learning_rate=constant(0.0),
        second_model="none",
    )
    return method._replace(estimand=MIXING_ESTIMAND)


def loss_grad_and_example_losses(
    problem: Problem, params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch
) -> tuple[Scalar, Params, HyperSlice]:
    """inner + prior, its gradient, and d inner / d weights (l_i / rows), over all micro-batches in one pass."""

    def add_micro(total, micro):
        value, (grad, example_losses) = jax.value_and_grad(problem.inner, argnums=(0, 1))(
            params, micro[0], frozen, micro[1]
        )
        return optax.tree.add(total, (value, grad)), example_losses

    prior = jax.value_and_grad(problem.prior)(params, frozen)
    (value, grad), example_losses = jax.lax.scan(add_micro, prior, (weights, batch))
    return value, grad, example_losses


def mix_gradients(outer: Params, inner: Params, outer_share: Scalar | float) -> Params:
    """share * outer + (1 - share) * inner, in the type of the parameters."""
    return jax.tree.map(lambda a, b: (outer_share * a + (1 - outer_share) * b).astype(b.dtype), outer, inner)


def apply_gradients(optimizer: optax.GradientTransformation, state: TrainState, grad: Params) -> TrainState:
    """The state of training after one step along a gradient."""
    updates, opt = optimizer.update(grad, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt, state.step + 1)
