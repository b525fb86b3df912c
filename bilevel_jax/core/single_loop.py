"""Single-loop bilevel training: parameters and example weights move together.

Value-function penalties read the bilevel problem as one objective, with lambda = 1 / (1 + gamma), G the weighted
training loss and r its prior:

    F(theta, u, w) = L_v(theta) + gamma [(G + r)(theta, w) - (G + r)(u, w)],  minimised in theta and w, maximised in u

| method | `second_model` | weights | `validation_share` (lambda) |
|---|---|---|---|
| V-PBGD (Shen & Chen, 2023), F2SA (Kwon et al., 2023) | copy | sigmoid | share_from_gamma(a growing gamma) |
| ScaleBiO (Pan et al., 2025) | copy | per source | share_from_gamma(optax.exponential_decay(..., staircase=True)) |
| SEAL (Shen et al., 2024), as its public code trains | none | softmax | epoch_schedule(SEAL_SHARES, steps) |
| offline data selection (Xiao & Chen, 2025), memory-saving | none | softmax | epoch_schedule(OFFLINE_SELECTION_SHARES, steps) |
| direct mixing | none | uniform | constant rho: `mixing` |

`bmo` is multi-objective training; see `bilevel_jax.core.multiobjective`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.multiobjective import (
    BMO_ESTIMAND,
    TrainedReference,
    bmo,
    compute_weights,
    geometric_schedule,
    replace_reference,
)
from bilevel_jax.core.problem import divide_by_multiplicity
from bilevel_jax.core.training import (
    apply_gradients,
    init_train_state,
    loss_grad_and_example_losses,
    mix_gradients,
    validation_batch_loss_and_grad,
)
from bilevel_jax.core.types import PADDING, Batch, Frozen, Params, Problem, Scalar, SingleLoop, TrainState
from bilevel_jax.core.weightings import OnlineWeights, inverse_rms, online_uniform

__all__ = [
    "BMO_ESTIMAND",
    "MIXING_ESTIMAND",
    "OFFLINE_SELECTION_SHARES",
    "OPTIMISTIC_ESTIMAND",
    "SEAL_SHARES",
    "PenaltyMetrics",
    "PenaltyState",
    "TrainedReference",
    "bmo",
    "compute_weights",
    "epoch_schedule",
    "geometric_schedule",
    "mixing",
    "penalty",
    "replace_reference",
    "share_from_gamma",
]

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
"""lambda by epoch in SEAL: the first epoch trains on the validation set alone, while the weights already move."""


class PenaltyState(NamedTuple):
    """All that the next step needs; plain arrays, so that saving and loading it is resuming."""

    train_state: TrainState
    """theta, its optimiser's state and the number of steps done."""
    second_model: TrainState | None
    """The second copy u, which follows the weighted training loss alone."""
    weights_state: Any
    """The state of the `OnlineWeights`."""


class PenaltyMetrics(NamedTuple):
    """What one step reports, all of it at the parameters that the step started from."""

    train_loss: Scalar
    """G + r of the training batch, nats."""
    validation_loss: Scalar
    """L_v of the validation batch, nats per example."""
    validation_share: Scalar
    """lambda."""
    grad_norm: Scalar
    """The norm of theta's gradient."""
    hypergradients: Float[Array, "micro examples"]
    """l_i(theta) - l_i(u), nats; 0 for padding."""


def penalty(
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
    """Train theta and the weights together by a value-function penalty: one step of each on every batch, first order only.

        theta <- opt(grad [lambda L_v + (1 - lambda) (G + r)]);   u <- opt(grad (G + r));
        h <- h - clip(rate * d/dh of sum_i w_i(h) (l_i(theta) - l_i(u)), -cap, cap)   on the examples of the batch

    Everything is read at the parameters before the step. The differences l_i(theta) - l_i(u) are in nats per example,
    so that an example moves as much in a large batch as in a small one, and one that counts 1/G (`multiplicity`) as
    much as a whole one: G such examples go where the one they replace would. They lack the factor gamma (ScaleBiO and
    V-PBGD have it, SEAL does not): put it into `weights_learning_rate` where it is wanted. Never Adam on the logits: it
    moves examples that are absent, and is blind to size.

    second_model="copy" is the minimax form: u ascends on -gamma (G + r)(u), so an example weighs less where following
    the validation set costs it loss. With second_model="none" there is no u and l_i(u) = 0, the memory-saving form: it
    needs one model less and **only prefers examples of low loss** under a theta that the validation set pulls; a useful
    example that is hard counts as a bad one.

    Estimand: optimistic bilevel, min over w and over theta in argmin G(., w) of L_v, as gamma grows: theta itself is
    pulled by L_v, that is, **it trains on the validation set**; compare with training on that set alone and with
    `mixing`, never on the set itself. Work per step is O(batch), whatever the number of examples. L_v is the mean over
    the validation batch's own examples. Products have JAX's default precision, as in training.

    Source: theta and h as in SEAL's public code, u as in ScaleBiO's, which divides a source's weight by its count in
    the batch.

    Wrong: softmax weights end on few examples, at times on a useless one if the rate is large while theta is still far
    off: watch the effective sample size, begin with rate 0. With gamma fixed, L_v and the weights are those of the
    penalised problem, not of its limit.

    Args:
        problem: losses of examples and the validation loss, as `weighted` gives them.
        optimizer: of theta, and of u.
        online_weights: the map from logits h to weights and its step, such as `weightings.online_softmax`.
        validation_share: step -> lambda = 1 / (1 + gamma), between 0 and 1.
        weights_learning_rate: step -> the step size on the logits.
        second_model: "copy" (minimax) or "none" (memory-saving).
        normalize_step: divide the gradient of the logits by the rms of its entries that are not 0. Such steps never
            come to rest, and where all differences are rounding they follow rounding: let the rate fall.
        max_step: the cap of a logit's change in one step.

    Returns:
        The method, with states of type `PenaltyState` and metrics of type `PenaltyMetrics`.

    Raises:
        ValueError: if `second_model` is neither "copy" nor "none".

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> train = bj.full_batch_stream(jnp.array([1.0, 1.0, -1.0])).batch(0)
        >>> validation = bj.full_batch_stream(jnp.array([1.0])).batch(0)
        >>> method = bj.single_loop.penalty(
        ...     problem, optax.sgd(0.1), bj.weightings.online_softmax(3),
        ...     validation_share=optax.constant_schedule(0.5), weights_learning_rate=optax.constant_schedule(0.5),
        ... )
        >>> state = method.init(jnp.zeros(()))
        >>> for _ in range(50):
        ...     state, metrics = method.step(state, (), train, validation)
        >>> bool(method.weights(state)[2] < 0.5)  # the example that contradicts the validation set
        True
    """
    if second_model not in ("copy", "none"):
        raise ValueError(
            f"second_model={second_model!r}; use 'copy' (a second model) or 'none' (the memory-saving form)."
        )

    def init(params: Params) -> PenaltyState:
        def fresh_state() -> TrainState:  # buffers of its own: the step donates them
            return init_train_state(optimizer, jax.tree.map(jnp.array, params))

        return PenaltyState(fresh_state(), fresh_state() if second_model == "copy" else None, online_weights.init())

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: PenaltyState, frozen: Frozen, train: Batch, validation: Batch
    ) -> tuple[PenaltyState, PenaltyMetrics]:
        train_state, copy, index = state.train_state, state.second_model, train["index"]
        share = validation_share(train_state.step)
        weights = online_weights.batch_weights(state.weights_state, index)
        train_loss, train_grad, hypergradients = loss_grad_and_example_losses(
            problem, train_state.params, weights, frozen, train
        )
        validation_loss, validation_grad = validation_batch_loss_and_grad(
            problem, train_state.params, frozen, validation
        )
        grad = mix_gradients(validation_grad, train_grad, share)
        if copy is not None:
            _, copy_grad, copy_losses = loss_grad_and_example_losses(problem, copy.params, weights, frozen, train)
            hypergradients, copy = hypergradients - copy_losses, apply_gradients(optimizer, copy, copy_grad)
        per_example = divide_by_multiplicity(hypergradients, train) * train["num_examples"][:, None]
        hypergradients = jnp.where(index != PADDING, per_example, 0)
        change = online_weights.batch_grad(state.weights_state, index, hypergradients)
        scale = -weights_learning_rate(train_state.step) * (inverse_rms(change) if normalize_step else 1)
        change = jax.tree.map(lambda leaf: jnp.clip(scale * leaf, -max_step, max_step), change)
        new_state = PenaltyState(
            apply_gradients(optimizer, train_state, grad),
            copy,
            online_weights.update(state.weights_state, index, change),
        )
        return new_state, PenaltyMetrics(
            train_loss, validation_loss, jnp.asarray(share), tree.norm(grad), hypergradients
        )

    return SingleLoop(init, step, lambda state: online_weights.weights(state.weights_state), OPTIMISTIC_ESTIMAND)


def mixing(
    problem: Problem, optimizer: optax.GradientTransformation, validation_share: float, num_examples: int
) -> SingleLoop:
    """Direct mixing, the baseline: train on rho L_v + (1 - rho) (mean training loss + prior), every weight 1.

        theta <- opt(grad [rho L_v + (1 - rho) (mean_i l_i + r)])

    Estimand: the minimiser of that sum. It **trains on the validation set**. Where training examples contradict that set
    (useless examples) it keeps a larger L_v than the bilevel optimum for every rho < 1; with rho = 1 it is training on
    the validation set alone.

    Args:
        problem: losses of examples and the validation loss, as `weighted` gives them.
        optimizer: of theta.
        validation_share: rho, between 0 and 1.
        num_examples: training examples: the length of the table of weights.

    Returns:
        The method, with states of type `PenaltyState` and metrics of type `PenaltyMetrics`.

    Raises:
        ValueError: if rho lies outside of [0, 1].

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> method = bj.single_loop.mixing(problem, optax.sgd(0.5), 0.5, num_examples=2)
        >>> state = method.init(jnp.zeros(()))
        >>> train = bj.full_batch_stream(jnp.array([1.0, 3.0])).batch(0)
        >>> validation = bj.full_batch_stream(jnp.array([4.0])).batch(0)
        >>> for _ in range(50):
        ...     state, metrics = method.step(state, (), train, validation)
        >>> round(float(state.train_state.params), 4)  # half way between the two means
        3.0
    """
    if not 0 <= validation_share <= 1:
        raise ValueError(
            f"validation_share {validation_share} is no share; give a number from 0 (the training examples alone) to 1 "
            "(the validation set alone)."
        )
    method = penalty(
        problem,
        optimizer,
        online_uniform(num_examples),
        validation_share=optax.constant_schedule(validation_share),
        weights_learning_rate=optax.constant_schedule(0.0),
        second_model="none",
    )
    return method._replace(estimand=MIXING_ESTIMAND)


def epoch_schedule(values: Sequence[float], steps_per_epoch: int) -> optax.Schedule:
    """A schedule with one value for each epoch, and the last value for all epochs beyond the list.

    Args:
        values: one value for each epoch.
        steps_per_epoch: optimiser steps of an epoch.

    Returns:
        step -> values[step // steps_per_epoch].

    Raises:
        ValueError: if there are no values, or an epoch has no steps.

    Example:
        >>> share = bj.single_loop.epoch_schedule((0.5, 0.25), steps_per_epoch=10)
        >>> [float(share(step)) for step in (0, 10, 99)]
        [0.5, 0.25, 0.25]
    """
    if not values or steps_per_epoch < 1:
        raise ValueError(f"{len(values)} values, {steps_per_epoch} steps per epoch; give at least one of each.")
    return lambda step: jnp.asarray(values)[jnp.minimum(step // steps_per_epoch, len(values) - 1)]


def share_from_gamma(gamma: optax.Schedule) -> optax.Schedule:
    """The share of L_v in the gradient where the inner problem is penalised by gamma: lambda = 1 / (1 + gamma).

    Args:
        gamma: step -> the penalty's strength, at least 0.

    Returns:
        step -> lambda.

    Example:
        >>> share = bj.single_loop.share_from_gamma(optax.constant_schedule(3.0))
        >>> share(0)
        0.25
    """
    return lambda step: 1 / (1 + gamma(step))
