"""Single-loop bilevel training of parameters and example weights.

Value-function penalties read the bilevel problem as one objective, with lambda = 1 / (1 + gamma), G the weighted
training loss and r its prior:

    F(theta, u, w) = L_v(theta) + gamma [(G + r)(theta, w) - (G + r)(u, w)],  minimised in theta and w, maximised in u

| method | `second_model` | weights | `validation_share` (lambda) |
|---|---|---|---|
| V-PBGD (Shen & Chen, 2023), F2SA (Kwon et al., 2023) | copy | sigmoid | share_from_gamma(a growing gamma) |
| ScaleBiO (Pan et al., 2025) | copy | per source | share_from_gamma(optax.exponential_decay(..., staircase=True)) |
| SEAL (Shen et al., 2024), as its public code trains | none | softmax | epoch_schedule(SEAL_SHARES, steps) |
| offline selection (Xiao & Chen, 2025) | none | softmax | epoch_schedule(OFFLINE_SELECTION_SHARES, steps) |
| direct mixing | none | uniform | constant rho: `mixing` |

Multi-objective training (`bmo`) makes every example an objective, and L_v chooses on their weakly Pareto-optimal set:

    min over theta of L_v(theta)  s.t.  theta in WP(l_1 .. l_N): no theta' lowers all l_i at once

theta itself follows L_v, so the method *trains on the validation examples* (the optimistic estimand); the weights of
examples are a closed form of losses, and no table of weights is learned. arXiv 2511.21056 states the problem; the
merit function and its weights are reconstructed here, not read there, and the bounds below are derived here.

With gaps z_i = l_i(phi) - l_i(theta), in nats, over N examples, a temperature tau and a strength s:

    u(theta) = max_phi { min_i -z_i - (s/2) |phi - theta|^2 }          the merit function of weak Pareto optimality
    m(theta) = max_phi { -tau log mean_i exp(z_i / tau) - (s/2) |phi - theta|^2 }            its smooth form
    0 <= u <= m <= u + tau log N;   grad m = mean_i w_i grad l_i(theta) + s (phi* - theta);   w_i = N softmax_i(z / tau)

phi = theta shows u >= 0, and u = 0 where theta is weakly Pareto-optimal (only there, if the losses are convex); there
0 <= m <= tau log N. With a sum in the place of the mean, v = m - tau log N and -tau log N <= v <= u; its gradient and
weights are the same. As tau -> 0, m -> u. But m = 0 only where mean_i grad l_i = 0: at a fixed tau the minimiser of m
is the minimiser of the *mean* loss, and m alone pulls to it along the front, with a force of order tau.

If one model attains the least loss 0 on every example (*separable* data) and s = 0, then l_i(phi*) = 0, and
m = -tau log mean_i exp(-l_i(theta) / tau) is a soft minimum of the losses that needs no second model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.problem import divide_by_multiplicity, get_multiplicity
from bilevel_jax.core.training import (
    Devices,
    apply_gradients,
    compute_update,
    init_train_state,
    loss_grad_and_example_losses,
    mix_gradients,
    validation_batch_loss_and_grad,
)
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Frozen,
    Hyper,
    HyperSlice,
    Params,
    Problem,
    Scalar,
    SingleLoop,
    Stream,
    TrainState,
)
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
    "raise_temperature",
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

MAX_FLOOR_EXAMPLES = 4096
"""Examples that the floor under the weights of `bmo` reads in a step at most."""
OFFLINE_SELECTION_SHARES = (0.5, 0.4, 0.3)
"""lambda by epoch in the public code of offline data selection."""
SEAL_SHARES = (1.0, 0.97, 0.94)
"""lambda by epoch in SEAL: the first epoch trains on the validation set alone, while the weights already move."""


class PenaltyState(NamedTuple):
    """All that the next step needs; plain arrays, so that saving and loading it is resuming."""

    train_state: TrainState
    """theta, its optimizer's state and the number of steps done."""
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
    axis_name: str | None = None,
) -> SingleLoop:
    """Train theta and the weights together by a value-function penalty: one step of each on every batch, first order
    only.

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
        axis_name: of a pmap or shard_map in which each device holds its share of the examples and of their weights;
            for weights that do not compete, such as `weightings.online_sigmoid`.

    Returns:
        The method, with states of type `PenaltyState` and metrics of type `PenaltyMetrics`.

    Raises:
        ValueError: if `second_model` is neither "copy" nor "none", or the weights of examples cannot be shared out
            along `axis_name`.

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

    if axis_name and (normalize_step or not online_weights.is_separate):
        raise ValueError(
            f"weights that compete and normalized steps read all examples of a batch, which axis {axis_name!r} shares "
            "out: use weightings.online_sigmoid without normalize_step, or arrays sharded on a mesh without axis_name."
        )
    devices = Devices(axis_name)

    def init(params: Params, logits: Hyper | None = None) -> PenaltyState:
        def fresh_state() -> TrainState:  # buffers of its own: the step donates them
            return init_train_state(optimizer, jax.tree.map(jnp.array, params))

        return PenaltyState(
            fresh_state(), fresh_state() if second_model == "copy" else None, online_weights.init(logits)
        )

    @partial(jax.jit, donate_argnums=0)
    def step(
        state: PenaltyState, frozen: Frozen, train: Batch, validation: Batch
    ) -> tuple[PenaltyState, PenaltyMetrics]:
        train_state, copy, index = state.train_state, state.second_model, train["index"]
        share = validation_share(train_state.step)
        weights = online_weights.batch_weights(state.weights_state, index)
        local, own_frozen = devices.share(problem), devices.make_local(frozen)

        def sum_devices(params: Params) -> tuple[Scalar, Params, HyperSlice]:
            *sums, example_losses = loss_grad_and_example_losses(
                local, devices.make_local(params), weights, own_frozen, train
            )
            return *devices.sum(sums), example_losses

        train_loss, train_grad, hypergradients = sum_devices(train_state.params)
        validation_loss, validation_grad = devices.mean(
            validation_batch_loss_and_grad(problem, devices.make_local(train_state.params), own_frozen, validation)
        )
        grad = mix_gradients(validation_grad, train_grad, share)
        if copy is not None:
            _, copy_grad, copy_losses = sum_devices(copy.params)
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

    return SingleLoop(
        init,
        step,
        lambda state: online_weights.weights(state.weights_state),
        OPTIMISTIC_ESTIMAND,
        lambda state: online_weights.logits(state.weights_state),
        axis_name,
    )


def mixing(
    problem: Problem, optimizer: optax.GradientTransformation, validation_share: float, num_examples: int
) -> SingleLoop:
    """Direct mixing, the baseline: train on rho L_v + (1 - rho) (mean training loss + prior), every weight 1.

        theta <- opt(grad [rho L_v + (1 - rho) (mean_i l_i + r)])

    Estimand: the minimiser of that sum. It **trains on the validation set**. Where training examples contradict that
    set (useless examples) it keeps a larger L_v than the bilevel optimum for every rho < 1; with rho = 1 it is
    training on the validation set alone.

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


BMO_ESTIMAND = (
    "multi-objective: min over the weakly Pareto-optimal theta of the training examples' losses of L_v; theta itself "
    "is pulled by L_v, so it trains on V"
)

LossGaps = Float[Array, "..."]
"""l_i(phi) - l_i(theta), nats; -inf where there is no row. Above 0 where theta fits a row better than phi does."""


class TrainedReference(NamedTuple):
    """phi is a second copy of the model, which follows its own minimisation from step to step."""

    optimizer: optax.GradientTransformation
    """Its rate should fall with tau: the curvature of what phi minimises grows as 1 / tau."""
    inner_steps: int = 1
    """Steps of phi for each step of theta, K; each costs a forward and a backward pass."""
    proximal: float = 1.0
    """s of (s/2) |phi - theta|^2; above minus the least curvature of the losses, the minimum over phi is unique."""


Reference = Literal["none", "snapshot"] | TrainedReference


class BMOState(NamedTuple):
    """All that the next step needs; plain arrays, so that saving and loading it is resuming."""

    train_state: TrainState
    """theta, its optimizer's state and the number of steps done."""
    reference: Params
    """The parameters that theta is compared with; () in the separable form."""
    reference_opt_state: optax.OptState
    log_normalizer: Scalar
    """Running tau log mean_i exp(z_i / tau), nats: the normaliser of the weights."""
    num_measured: Scalar
    """Rows that went into the level; 0 = measure it on the next batch, before its weights are taken."""
    last_gaps: Float[Array, "examples"]
    """The gap that each row had when it was last seen, nats; -inf before. Written in O(batch), read by `weights`."""
    recent_gaps: LossGaps | tuple[()] = ()
    """With a floor under the weights of more than `MAX_FLOOR_EXAMPLES` examples, the gaps that were seen last; else
    `last_gaps` has them."""


class WeightNormalizer(NamedTuple):
    """What turns a gap into a weight, min(exp((z - level) / tau), largest), whatever else is in the batch."""

    log_normalizer: Scalar
    temperature: Scalar
    max_weight: Scalar


class BMOMetrics(NamedTuple):
    """What one step tells, all of it at the theta that the step started from, and the phi that it used."""

    train_loss: Scalar
    """sum_i w_i l_i / N + prior, of the training batch, nats."""
    validation_loss: Scalar
    """L_v of the validation batch, nats."""
    validation_share: Scalar
    """The part of L_v in the gradient."""
    grad_norm: Scalar
    """The norm of theta's gradient."""
    temperature: Scalar
    weights: HyperSlice
    """float[micro, examples], mean about 1; 0 for padding."""
    gaps: HyperSlice
    """z of each example, float[micro, examples], nats; -inf for padding."""
    merit: Scalar
    """Estimate of m(theta), nats, by the running level; a lower bound as far as phi is not the maximiser."""


def bmo(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    num_examples: int,
    *,
    validation_share: optax.Schedule,
    temperature: optax.Schedule,
    reference: Reference = "none",
    normalizer_memory: float = 512.0,
    min_effective_share: float = 0.0,
) -> SingleLoop:
    """Multi-objective training: theta follows L_v among the weakly Pareto-optimal models of the training losses.

        theta <- opt(share grad L_v + (1 - share) grad m),  one step for each pair of a training and a validation batch
        grad m = sum_i w_i grad l_i(theta) / N + grad prior + s (phi - theta);   w_i = exp((z_i - normalizer) / tau)

    `reference` gives phi: "none" is the separable form, whose steps cost what plain training's do; "snapshot" compares
    with the parameters that training started from, or those of the last `replace_reference`, by the ratio
    (pi_theta / pi_phi)^(1/tau) of likelihoods, for one more forward pass; `TrainedReference` takes K steps towards the
    maximiser phi*, and moves phi along with theta: phi* - theta varies slowly, and where phi stays behind, training
    diverges at small tau (measured).

    The normaliser is that of the last `normalizer_memory` examples or so, at most an epoch (while there were fewer, the
    exact one over all of them), as it stood *before* the step: the weight of an example depends on no other example of
    its batch, except in the very first step. Examples that count less than others (`multiplicity`) count so in it, too.
    It is held in nats, which a falling tau moves least. It lags: while losses or tau fall, the mean weight is above 1.
    Measured on a regression (4096 examples, batches of 32, 4 epochs, three schedules of tau, two rates), the rms error
    of its log within an epoch is at most .25; that of the exact sum over the table of gaps at most .73, as the gaps are
    an epoch old, but .005 at rest, and it costs O(examples) wherever tau moves. No weight is let above the number of
    examples that the normaliser is measured on, with those of the batch: were the example among them, it could not be.

    `min_effective_share` is a floor under the effective sample size of the weights, (sum w)^2 / sum w^2, as a share of
    the examples: where tau would put the weight on fewer, `raise_temperature` gives the least temperature that does
    not, by the gaps that each example had when it was last seen. What is separable does not need it: there the gaps of
    the examples that are fitted tend to 0, and share the weight at any tau. Where each example keeps a loss of its own,
    as text does, a tau far below the spread of the gaps leaves the few examples that are easiest.

    Micro-batches are summed in a scan; no work of a step grows with the number of examples: of more than
    `MAX_FLOOR_EXAMPLES` the floor goes by as many that were seen last. L_v of a validation batch is the mean over its
    own examples.

    Estimand: `BMO_ESTIMAND`, as share and tau tend to 0, tau faster (a fixed tau pulls to the mean loss along the
    front).

    Wrong: "none" where examples cannot be fitted (noise in an answer costs its example weight); "snapshot" where phi is
    far from phi* (m is then a lower bound); `TrainedReference` with too few steps, which a `merit` below 0 shows; a
    memory so long that the losses change by more than tau within it, or so short that it misses the examples that hold
    the weight (the mean of `weights` leaves 1). Where few examples hold most of the weight, every minibatch is a noisy
    sample.

    Source: the problem is that of arXiv 2511.21056; merit function, weights and steps are reconstructed.

    Args:
        problem: losses of examples and the validation loss; linear in its weights, as `weighted` makes it.
        optimizer: of theta.
        num_examples: N, the training examples.
        validation_share: step -> the share of L_v in the gradient.
        temperature: step -> tau, nats; above 0.
        reference: "none", "snapshot" or a `TrainedReference`.
        normalizer_memory: examples that the running normaliser averages over.
        min_effective_share: least effective sample size of the weights, as a share of the examples; 0 is no floor.

    Returns:
        The method, with states of type `BMOState` and metrics of type `BMOMetrics`.

    Raises:
        ValueError: if `reference` is unknown, the temperature does not start above 0, or the memory, share, steps or
            strength are out of range.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> train = bj.full_batch_stream(jnp.array([1.0, 1.0, -1.0])).batch(0)
        >>> validation = bj.full_batch_stream(jnp.array([1.0])).batch(0)
        >>> method = bj.single_loop.bmo(
        ...     problem, optax.sgd(0.1), 3,
        ...     validation_share=optax.constant_schedule(0.5), temperature=optax.constant_schedule(0.3),
        ... )
        >>> state = method.init(jnp.zeros(()))
        >>> for _ in range(50):
        ...     state, metrics = method.step(state, (), train, validation)
        >>> bool(method.weights(state)[2] < 0.1)  # no model fits this example and the validation set
        True
    """
    trained = isinstance(reference, TrainedReference)
    if not trained and reference not in ("none", "snapshot"):
        raise ValueError(
            f"reference={reference!r}; use 'none', 'snapshot' or TrainedReference(optimizer, inner_steps, proximal)."
        )
    if isinstance(reference, TrainedReference) and not (reference.proximal > 0 and reference.inner_steps >= 1):
        raise ValueError(
            f"{reference.inner_steps} inner steps and strength {reference.proximal} of the reference; give at least 1, "
            "and above 0."
        )
    if not float(temperature(0)) > 0 or not normalizer_memory >= 0:
        raise ValueError(
            f"temperature starts at {float(temperature(0))}, normalizer_memory {normalizer_memory}; give a positive "
            "temperature and no negative memory."
        )
    _check_effective_share(min_effective_share)
    method = _BMO(
        problem,
        optimizer,
        num_examples,
        validation_share,
        temperature,
        reference,
        normalizer_memory,
        min_effective_share,
    )
    return SingleLoop(
        method.init, jax.jit(method.step, donate_argnums=0), method.weights, BMO_ESTIMAND, lambda state: ()
    )


@dataclass(frozen=True)
class _BMO:
    """The settings of `bmo`, and the pieces of its step."""

    problem: Problem
    optimizer: optax.GradientTransformation
    num_examples: int
    validation_share: optax.Schedule
    temperature: optax.Schedule
    reference: Reference
    normalizer_memory: float
    min_effective_share: float

    def init(self, params: Params, hyper: Hyper = ()) -> BMOState:
        # buffers of its own: the step donates them
        train_state = init_train_state(self.optimizer, jax.tree.map(jnp.array, params))
        reference = () if self.reference == "none" else jax.tree.map(jnp.array, params)
        opt_state = self.reference.optimizer.init(reference) if isinstance(self.reference, TrainedReference) else ()
        last_gaps = jnp.full(self.num_examples, -jnp.inf, float)
        has_many = self.min_effective_share > 0 and self.num_examples > MAX_FLOOR_EXAMPLES
        recent_gaps = jnp.full(MAX_FLOOR_EXAMPLES, -jnp.inf, float) if has_many else ()
        return BMOState(train_state, reference, opt_state, jnp.zeros(()), jnp.zeros(()), last_gaps, recent_gaps)

    def step(self, state: BMOState, frozen: Frozen, train: Batch, validation: Batch) -> tuple[BMOState, BMOMetrics]:
        (params, opt_state, num_steps, _), reference = state.train_state, state.reference
        share = jnp.asarray(self.validation_share(num_steps), float)
        counts = jnp.where(train["index"] != PADDING, get_multiplicity(train), 0)
        normalizer, num_kept, num_seen = self._normalizer_before_step(state, frozen, train, counts)
        reference, reference_opt_state = self._advance_reference(state, frozen, train, normalizer)

        reference_losses = batch_losses(self.problem, reference, frozen, train)
        train_loss, train_grad, gaps, weights = weighted_loss_and_grad(
            self.problem, params, frozen, train, normalizer, reference_losses, 1
        )
        log_normalizer = _update_log_normalizer(normalizer, num_kept, num_seen, gaps, counts)
        merit, merit_grad = self._add_proximal_term(params, reference, frozen, log_normalizer, train_grad)

        validation_loss, validation_grad = validation_batch_loss_and_grad(self.problem, params, frozen, validation)
        grad = mix_gradients(validation_grad, merit_grad, share)
        updates, opt_state = compute_update(self.optimizer, grad, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        if isinstance(self.reference, TrainedReference):
            reference = optax.tree.add(reference, optax.tree.sub(new_params, params))
        new_state = BMOState(
            TrainState(new_params, opt_state, num_steps + 1),
            reference,
            reference_opt_state,
            log_normalizer,
            state.num_measured + num_seen,
            state.last_gaps.at[train["index"]].set(gaps, mode="drop"),
            _append_gaps(state.recent_gaps, jnp.where(train["index"] != PADDING, gaps, -jnp.inf)),
        )
        return new_state, BMOMetrics(
            train_loss, validation_loss, share, tree.norm(grad), normalizer.temperature, weights, gaps, merit
        )

    def weights(self, state: BMOState) -> Float[Array, "examples"]:
        """By the gaps that were seen last; 1 for an example that no batch touched. `compute_weights` gives the exact
        table."""
        weights = weights_from_gaps(state.last_gaps, self._temperature(state, state.last_gaps))
        return jnp.where(state.last_gaps > -jnp.inf, weights, 1)

    def _temperature(self, state: BMOState, gaps: LossGaps) -> Scalar:
        """tau of the next step: that of the schedule, or what the floor raises it to."""
        temperature = jnp.asarray(self.temperature(state.train_state.step), float)
        if self.min_effective_share == 0:
            return temperature
        return raise_temperature(gaps, temperature, self.min_effective_share)

    def _normalizer_before_step(
        self, state: BMOState, frozen: Frozen, train: Batch, counts: HyperSlice
    ) -> tuple[WeightNormalizer, Scalar, Scalar]:
        """(the normaliser, the examples that it stands for, those of the batch); measured on the batch in the first
        step."""

        def measure_on_batch() -> tuple[Scalar, Scalar]:
            gaps = compute_gaps(self.problem, state.train_state.params, state.reference, frozen, train)
            temperature = self._temperature(state, gaps)
            return -smooth_merit(gaps, temperature, counts), temperature

        log_normalizer, temperature = jax.lax.cond(
            state.num_measured > 0,
            lambda: (state.log_normalizer, self._temperature(state, _seen_gaps(state))),
            measure_on_batch,
        )
        num_seen = jnp.sum(counts)
        num_kept = jnp.minimum(state.num_measured, min(self.normalizer_memory, self.num_examples))
        return WeightNormalizer(log_normalizer, temperature, num_kept + num_seen), num_kept, num_seen

    def _advance_reference(
        self, state: BMOState, frozen: Frozen, train: Batch, normalizer: WeightNormalizer
    ) -> tuple[Params, optax.OptState]:
        """phi after its own steps on the batch; as it is where phi is not trained."""
        trained = self.reference
        if not isinstance(trained, TrainedReference):
            return state.reference, state.reference_opt_state
        params = state.train_state.params
        losses = batch_losses(self.problem, params, frozen, train)

        def inner_step(carry, _):
            reference, opt_state = carry
            grad = weighted_loss_and_grad(self.problem, reference, frozen, train, normalizer, losses, -1)[1]
            grad = optax.tree.add_scale(grad, trained.proximal, optax.tree.sub(reference, params))
            updates, opt_state = compute_update(trained.optimizer, grad, opt_state, reference)
            return (optax.apply_updates(reference, updates), opt_state), None

        start = (state.reference, state.reference_opt_state)
        return jax.lax.scan(inner_step, start, length=trained.inner_steps)[0]

    def _add_proximal_term(
        self, params: Params, reference: Params, frozen: Frozen, log_normalizer: Scalar, grad: Params
    ) -> tuple[Scalar, Params]:
        """m(theta) and its gradient, with the priors and the strength of phi."""
        reference_prior = 0 if self.reference == "none" else self.problem.prior(reference, frozen)
        merit = self.problem.prior(params, frozen) - reference_prior - log_normalizer
        if not isinstance(self.reference, TrainedReference):
            return merit, grad
        difference, strength = optax.tree.sub(reference, params), self.reference.proximal
        merit = merit - strength / 2 * optax.tree.norm(difference, squared=True)
        return merit, optax.tree.add_scale(grad, strength, difference)


def _update_log_normalizer(
    normalizer: WeightNormalizer, num_kept: Scalar, num_seen: Scalar, gaps: HyperSlice, counts: HyperSlice
) -> Scalar:
    """The running normaliser over the examples that it stood for and those of the batch, nats."""
    log_normalizer, temperature, total = normalizer
    log_sums = jnp.stack(
        [
            jnp.log(num_kept) + log_normalizer / temperature,
            jnp.log(num_seen) - smooth_merit(gaps, temperature, counts) / temperature,
        ]
    )
    return temperature * (jax.nn.logsumexp(log_sums) - jnp.log(total))


def replace_reference(state: BMOState, reference: Params) -> BMOState:
    """The state with other parameters to compare with; normaliser and table of gaps are measured afresh.

    Args:
        state: of `bmo` with reference="snapshot" or a `TrainedReference`.
        reference: phi from here on, such as a new sampling snapshot.

    Returns:
        The new state; `reference` is copied, since the step donates its state.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> constant = optax.constant_schedule(0.5)
        >>> method = bj.single_loop.bmo(
        ...     problem, optax.sgd(0.1), 3, validation_share=constant, temperature=constant, reference="snapshot"
        ... )
        >>> state = bj.single_loop.replace_reference(method.init(jnp.zeros(())), jnp.ones(()))
        >>> float(state.reference)
        1.0
    """
    start = (
        jnp.zeros_like(state.log_normalizer),
        jnp.zeros_like(state.num_measured),
        jnp.full_like(state.last_gaps, -jnp.inf),
    )
    return BMOState(state.train_state, jax.tree.map(jnp.array, reference), state.reference_opt_state, *start)


def geometric_schedule(start: float, end: float, steps: int) -> optax.Schedule:
    """From `start` to `end` over `steps` steps, by the same factor each, and `end` from there on.

    Args:
        start: the first value, above 0.
        end: the last value, above 0.
        steps: between the two.

    Returns:
        step -> value.

    Example:
        >>> temperature = bj.single_loop.geometric_schedule(1.0, 0.25, steps=2)
        >>> [float(temperature(step)) for step in (0, 1, 2, 3)]
        [1.0, 0.5, 0.25, 0.25]
    """
    return lambda step: start * (end / start) ** jnp.minimum(step / steps, 1.0)


def smooth_merit(
    gaps: LossGaps, temperature: Scalar | float, multiplicities: Float[Array, "..."] | None = None
) -> Scalar:
    """m = -tau log mean_i exp(gaps_i / tau) over the examples that are there, nats: at a phi, without strength and
    prior.

    A lower bound of m(theta) at any phi. Minus tau log N it is v. Between min_i -gaps_i and that plus tau log N.
    `multiplicities` (default: 1) says how much each example counts in the mean.
    """
    multiplicities = jnp.where(gaps > -jnp.inf, 1.0 if multiplicities is None else multiplicities, 0)
    return -temperature * (jax.nn.logsumexp(gaps / temperature, b=multiplicities) - jnp.log(jnp.sum(multiplicities)))


def weights_from_gaps(gaps: LossGaps, temperature: Scalar | float) -> LossGaps:
    """w_i = N softmax_i(gaps / tau): mean 1 over the N examples that are there, 0 for the others."""
    return jnp.exp((gaps + smooth_merit(gaps, temperature)) / temperature)


def effective_share_at(gaps: LossGaps, temperature: Scalar | float) -> Scalar:
    """(sum w)^2 / (N sum w^2) of the weights at a temperature, over the N examples that are there.

    Between 1/N and 1, and larger at a higher temperature.
    """
    log_share = 2 * jax.nn.logsumexp(gaps / temperature) - jax.nn.logsumexp(2 * gaps / temperature)
    return jnp.exp(log_share) / jnp.sum(gaps > -jnp.inf)


def raise_temperature(gaps: LossGaps, temperature: Scalar | float, min_effective_share: float) -> Scalar:
    """The least temperature, from the one given on, whose weights have that effective sample size, by bisection.

    The effective share grows with the temperature. With r the ratio of the least weight to the largest it is at least
    4 r / (1 + r)^2 (Kantorovich), which bounds the temperature from above; 40 halvings of its logarithm.

    Args:
        gaps: z of each example, nats; -inf where there is none.
        temperature: the least temperature, nats.
        min_effective_share: the least (sum w)^2 / (N sum w^2), at least 0 and below 1.

    Returns:
        A temperature, nats; that which is given where its weights are spread enough. No derivative passes through.

    Raises:
        ValueError: if the share is not at least 0 and below 1.

    Example:
        >>> gaps = jnp.array([0.0, 0.0, -1.0, -1.0])  # the weights of the last two are r = exp(-1 / tau) of the others'
        >>> temperature = bj.single_loop.raise_temperature(gaps, 0.1, min_effective_share=0.9)
        >>> round(float(jnp.exp(-1 / temperature)), 3)  # (1 + r)^2 / (2 + 2 r^2) = 0.9
        0.5
    """
    _check_effective_share(min_effective_share)
    gaps, low = jax.lax.stop_gradient(gaps), jnp.asarray(temperature, float)
    if min_effective_share == 0:
        return low
    spread = gaps.max() - jnp.min(gaps, where=gaps > -jnp.inf, initial=jnp.inf)
    high = spread / (2 * jnp.arccosh(1 / jnp.sqrt(min_effective_share)))

    def halve(_, bounds):
        low, high = bounds
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        is_enough = effective_share_at(gaps, middle) >= min_effective_share
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    raised = jax.lax.fori_loop(0, 40, halve, (low, jnp.maximum(low, high)))[1]
    return jnp.where(effective_share_at(gaps, low) >= min_effective_share, low, raised)


def _seen_gaps(state: BMOState) -> LossGaps:
    """What the floor under the weights of the next step goes by."""
    return state.last_gaps if isinstance(state.recent_gaps, tuple) else state.recent_gaps


def _append_gaps(recent_gaps: LossGaps | tuple[()], gaps: LossGaps) -> LossGaps | tuple[()]:
    """The last of both, as many as there were."""
    if isinstance(recent_gaps, tuple):
        return ()
    return jnp.concatenate([recent_gaps, gaps.ravel()])[-recent_gaps.size :]


def _check_effective_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"min_effective_share is {share}; give a share of the examples, at least 0 and below 1.")


def compute_weights(
    problem: Problem,
    params: Params,
    reference: Params,
    frozen: Frozen,
    stream: Stream,
    num_examples: int,
    temperature: float,
    min_effective_share: float = 0.0,
) -> Float[Array, "examples"]:
    """The weight of every example at the end of `bmo`, by one pass over a stream that gives each example (at least)
    once.

        w_i = N softmax_i((l_i(phi) - l_i(theta)) / tau)

    Args:
        problem: as `bmo` was given it.
        params: theta.
        reference: phi, that of the state; () is the separable form.
        frozen: what training does not change.
        stream: of all training examples.
        num_examples: the length of the table.
        temperature: tau, nats.
        min_effective_share: raise tau until the weights have that effective sample size, as a share of the examples.

    Returns:
        float[examples], mean 1 over the examples that the stream gives, 0 for the others.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> stream = bj.full_batch_stream(jnp.array([1.0, 1.0, -1.0]))
        >>> weights = bj.single_loop.compute_weights(problem, jnp.array(1.0), (), (), stream, 3, temperature=0.1)
        >>> [round(float(weight), 3) for weight in weights]
        [1.5, 1.5, 0.0]
    """
    gap_table = jnp.full(num_examples, -jnp.inf, float)
    for index in range(stream.steps):
        gap_table = _record_gaps(problem, gap_table, params, reference, frozen, stream.batch(index))
    return weights_from_gaps(gap_table, raise_temperature(gap_table, temperature, min_effective_share))


@partial(jax.jit, static_argnames="problem", donate_argnums=1)
def _record_gaps(
    problem: Problem, gap_table: LossGaps, params: Params, reference: Params, frozen: Frozen, batch: Batch
) -> LossGaps:
    return gap_table.at[batch["index"]].set(compute_gaps(problem, params, reference, frozen, batch), mode="drop")


def compute_gaps(problem: Problem, params: Params, reference: Params, frozen: Frozen, batch: Batch) -> LossGaps:
    """l_i(phi) - l_i(theta) of a batch, float[micro, examples], nats; -inf in padding. Two forward passes at most."""
    z = batch_losses(problem, reference, frozen, batch) - batch_losses(problem, params, frozen, batch)
    return jnp.where(batch["index"] != PADDING, z, -jnp.inf)


def batch_losses(problem: Problem, params: Params, frozen: Frozen, batch: Batch) -> HyperSlice:
    """The losses of a batch, float[micro, examples], nats, one micro-batch in memory at a time; 0 for params ()."""
    if not jax.tree.leaves(params):
        return jnp.zeros(batch["index"].shape)
    return jax.lax.map(lambda micro: micro_batch_losses(problem, params, frozen, micro), batch)


def micro_batch_losses(problem: Problem, params: Params, frozen: Frozen, micro: Batch) -> Float[Array, "examples"]:
    """The losses of one micro-batch, nats: as `inner` is linear in the weights, its derivative by them times N."""
    weights_grad = jax.grad(problem.inner, argnums=1)(params, jnp.ones(micro["index"].shape), frozen, micro)
    return micro["num_examples"] * divide_by_multiplicity(weights_grad, micro)


def weighted_loss_and_grad(
    problem: Problem,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    normalizer: WeightNormalizer,
    other_losses: HyperSlice,
    sign: int,
) -> tuple[Scalar, Params, LossGaps, HyperSlice]:
    """(sum_i sg(w_i) l_i / N + prior, its gradient, z, w) by one forward and one backward pass.

    z = sign (others - l): sign is 1 where params is theta, -1 where it is phi. The weights of a micro-batch are known
    between its two passes.
    """
    log_normalizer, temperature, max_weight = normalizer

    def add_micro(total, inputs):
        micro, other_losses = inputs
        values, pull = jax.vjp(lambda params: micro_batch_losses(problem, params, frozen, micro), params)
        z = jnp.where(micro["index"] != PADDING, sign * (other_losses - values), -jnp.inf)
        chosen = jnp.minimum(jnp.exp((z - log_normalizer) / temperature), max_weight)
        part = chosen * get_multiplicity(micro) / micro["num_examples"]
        return optax.tree.add(total, (jnp.sum(part * values), pull(part)[0])), (z, chosen)

    prior = jax.value_and_grad(problem.prior)(params, frozen)
    (value, grad), (z, example_weights) = jax.lax.scan(add_micro, prior, (batch, other_losses))
    return value, grad, z, example_weights


def epoch_schedule(values: Sequence[float], steps_per_epoch: int) -> optax.Schedule:
    """A schedule with one value for each epoch, and the last value for all epochs beyond the list.

    Args:
        values: one value for each epoch.
        steps_per_epoch: optimizer steps of an epoch.

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
