"""Multi-objective training (BMO): every row is an objective, and L_v chooses on their weakly Pareto-optimal set.

    min over theta of L_v(theta)  s.t.  theta in WP(l_1 .. l_N): no theta' lowers all l_i at once

theta itself follows L_v, so the method *trains on the validation examples* (the optimistic estimand); the weights of rows
are a closed form of losses, and no table of weights is learned. arXiv 2511.21056 states the problem; the merit function
and its weights are reconstructed here, not read there, and the bounds below are derived here.

With gaps z_i = l_i(phi) - l_i(theta), in nats, over N rows, a temperature tau and a strength s:

    u(theta) = max_phi { min_i -z_i - (s/2) |phi - theta|^2 }          the merit function of weak Pareto optimality
    m(theta) = max_phi { -tau log mean_i exp(z_i / tau) - (s/2) |phi - theta|^2 }            its smooth form
    0 <= u <= m <= u + tau log N;   grad m = mean_i w_i grad l_i(theta) + s (phi* - theta);   w_i = N softmax_i(z / tau)

phi = theta shows u >= 0, and u = 0 where theta is weakly Pareto-optimal (only there, if the losses are convex); there
0 <= m <= tau log N. With a sum in the place of the mean, v = m - tau log N and -tau log N <= v <= u; its gradient and
weights are the same. As tau -> 0, m -> u. But m = 0 only where mean_i grad l_i = 0: at a fixed tau the minimiser of m
is the minimiser of the *mean* loss, and m alone pulls to it along the front, with a force of order tau.

If one model attains the least loss 0 on every row (*separable* data) and s = 0, then l_i(phi*) = 0, and
m = -tau log mean_i exp(-l_i(theta) / tau) is a soft minimum of the losses that needs no second model.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.problem import divide_by_multiplicity, get_multiplicity
from bilevel_jax.core.training import init_train_state, inner_loss_and_grad
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Frozen,
    HyperSlice,
    Params,
    Problem,
    Scalar,
    SingleLoop,
    Stream,
    TrainState,
)

BMO_ESTIMAND = (
    "multi-objective: min over the weakly Pareto-optimal theta of the training examples' losses of L_v; theta itself is "
    "pulled by L_v, so it trains on V"
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
    """theta, its optimiser's state and the number of steps done."""
    reference: Params
    """The parameters that theta is compared with; () in the separable form."""
    reference_opt_state: optax.OptState
    log_normalizer: Scalar
    """Running tau log mean_i exp(z_i / tau), nats: the normaliser of the weights."""
    num_measured: Scalar
    """Rows that went into the level; 0 = measure it on the next batch, before its weights are taken."""
    last_gaps: Float[Array, "examples"]
    """The gap that each row had when it was last seen, nats; -inf before. Written in O(batch), read by `weights`."""


class WeightNormalizer(NamedTuple):
    """What turns a gap into a weight, min(exp((z - level) / tau), largest), whatever else is in the batch."""

    log_normalizer: Scalar
    temperature: Scalar
    max_weight: Scalar


class BMOMetrics(NamedTuple):
    """What one step tells, all of it at the theta that the step started from, and the phi that it used."""

    train_loss: Scalar
    """sum_i w_i l_i / rows + prior, of the training batch, nats."""
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
) -> SingleLoop:
    """theta <- opt(share grad L_v + (1 - share) grad m), one step for each pair of a training and a validation batch.

        grad m = sum_i w_i grad l_i(theta) / rows + grad prior + s (phi - theta);   w_i = exp((z_i - level) / tau)

    `phi`: "none" is the separable form, whose steps cost what plain training's do; "snapshot" compares with the
    parameters that training started from, or those of the last `refresh`, by the ratio (pi_theta / pi_phi)^(1/tau) of
    likelihoods, for one more forward pass; `Copy` takes K steps towards the maximiser phi*, and moves phi along with
    theta: phi* - theta varies slowly, and where phi stays behind, training diverges at small tau (measured).

    `level` is the normaliser over the last `memory` rows or so, at most an epoch (while there were fewer, the exact
    one over all of them), as it stood *before* the step: the weight of a row depends on no other row of its batch,
    except in the very first step. Rows that count less than others (`base`) count so in it, too. It is held in
    nats, which a falling tau moves least. It lags: while losses or tau fall, the mean weight is above 1. Measured
    on a regression (4096 rows, batches of 32, 4 epochs, three schedules of tau, two rates), the rms error of its
    log within an epoch is at most .25; that of the exact sum over `table` at most .73, as the gaps are an epoch
    old, but .005 at rest, and it costs O(rows) wherever tau moves. No weight is let above the number of rows that
    the level is measured on, with those of the batch: were the row among them, it could not be.

    `problem` must be linear in its slice, as `weighted` makes it. L_v of a validation batch is the mean over its own
    rows. Micro-batches are summed in a scan; no work of a step grows with the number of rows.

    Estimand: `ESTIMAND`, as share and tau tend to 0, tau faster (a fixed tau pulls to the mean loss along the front).

    Wrong: "none" where rows cannot be fitted (noise in an answer costs its row weight); "snapshot" where phi is far
    from phi* (m is then a lower bound); `Copy` with too few steps, which `merit` below 0 tells; memory so long that the
    losses change by more than tau within it, or so short that it misses the rows that hold the weight (the mean of
    `weights` leaves 1). Where few rows hold most of the weight, every minibatch is a noisy sample.

    Source: the problem is that of arXiv 2511.21056; merit function, weights and steps are reconstructed.

    Raises:
        ValueError: if phi is no form, tau does not start above 0, or memory, steps or strength are out of range.
    """
    trained_reference = reference if isinstance(reference, TrainedReference) else None
    if trained_reference is None and reference not in ("none", "snapshot"):
        raise ValueError(f"phi={reference!r}; use 'none', 'snapshot' or Copy(optimizer, steps, strength).")
    if trained_reference is not None and not (trained_reference.proximal > 0 and trained_reference.inner_steps >= 1):
        raise ValueError(
            f"{trained_reference.inner_steps} steps and strength {trained_reference.proximal} of phi; give at least 1, and above 0."
        )
    if not float(temperature(0)) > 0 or not normalizer_memory >= 0:
        raise ValueError(
            f"tau starts at {float(temperature(0))}, memory {normalizer_memory}; give a positive tau and no negative memory."
        )
    validation_problem = problem._replace(
        inner=lambda params, weights, frozen, batch: problem.outer(params, frozen, batch),
        prior=lambda params, frozen: jnp.zeros(()),
    )

    def init(params: Params) -> BMOState:
        train_state = init_train_state(
            optimizer, jax.tree.map(jnp.array, params)
        )  # buffers of its own: the step donates them
        other = () if reference == "none" else jax.tree.map(jnp.array, params)
        opt = trained_reference.optimizer.init(other) if trained_reference else ()
        return BMOState(train_state, other, opt, jnp.zeros(()), jnp.zeros(()), jnp.full(num_examples, -jnp.inf, float))

    @partial(jax.jit, donate_argnums=0)
    def step(state: BMOState, fixed: Frozen, train: Batch, validation: Batch) -> tuple[BMOState, BMOMetrics]:
        (params, opt, done), other, phi_opt = state.train_state, state.reference, state.reference_opt_state
        heat, lam = jnp.asarray(temperature(done), float), jnp.asarray(validation_share(done), float)
        counts = jnp.where(train["index"] != PADDING, get_multiplicity(train), 0)
        level = jax.lax.cond(
            state.num_measured > 0,
            lambda: state.log_normalizer,
            lambda: -smooth_merit(compute_gaps(problem, params, other, fixed, train), heat, counts),
        )
        seen, kept = jnp.sum(counts), jnp.minimum(state.num_measured, min(normalizer_memory, num_examples))
        normaliser = WeightNormalizer(level, heat, kept + seen)
        if trained_reference:
            own = batch_losses(problem, params, fixed, train)

            def follow(carry, _):
                at, opt = carry
                grad = weighted_loss_and_grad(problem, at, fixed, train, normaliser, own, -1)[1]
                grad = optax.tree.add_scale(grad, trained_reference.proximal, optax.tree.sub(at, params))
                updates, opt = trained_reference.optimizer.update(grad, opt, at)
                return (optax.apply_updates(at, updates), opt), None

            (other, phi_opt), _ = jax.lax.scan(follow, (other, phi_opt), length=trained_reference.inner_steps)
        theirs = batch_losses(problem, other, fixed, train)
        train_loss, slope, z, chosen = weighted_loss_and_grad(problem, params, fixed, train, normaliser, theirs, 1)
        both = jnp.stack([jnp.log(kept) + level / heat, jnp.log(seen) - smooth_merit(z, heat, counts) / heat])
        level = heat * (jax.nn.logsumexp(both) - jnp.log(kept + seen))

        value = problem.prior(params, fixed) - (0 if reference == "none" else problem.prior(other, fixed)) - level
        if trained_reference:
            apart = optax.tree.sub(other, params)
            value = value - trained_reference.proximal / 2 * optax.tree.norm(apart, squared=True)
            slope = optax.tree.add_scale(slope, trained_reference.proximal, apart)
        real = jnp.sum(validation["index"] != PADDING)
        held = {**validation, "num_examples": jnp.full_like(validation["num_examples"], real)}
        validation_loss, pull = inner_loss_and_grad(validation_problem, params, None, fixed, held)
        grad = jax.tree.map(lambda a, b: (lam * a + (1 - lam) * b).astype(b.dtype), pull, slope)
        updates, opt = optimizer.update(grad, opt, params)
        after = optax.apply_updates(params, updates)
        if trained_reference:
            other = optax.tree.add(other, optax.tree.sub(after, params))
        last_gaps = state.last_gaps.at[train["index"]].set(z, mode="drop")
        info = BMOMetrics(train_loss, validation_loss, lam, tree.norm(grad), heat, chosen, z, value)
        return BMOState(
            TrainState(after, opt, done + 1), other, phi_opt, level, state.num_measured + seen, last_gaps
        ), info

    def current_weights(state: BMOState) -> Float[Array, "examples"]:
        """By the gaps that were seen last; 1 for a row that no batch touched. `weights` gives the exact table."""
        return jnp.where(
            state.last_gaps > -jnp.inf, weights_from_gaps(state.last_gaps, temperature(state.train_state.step)), 1
        )

    return SingleLoop(init, step, current_weights, BMO_ESTIMAND)


def replace_reference(state: BMOState, reference: Params) -> BMOState:
    """Compare with other parameters from here on (a new sampling snapshot): level and table are measured afresh."""
    start = (
        jnp.zeros_like(state.log_normalizer),
        jnp.zeros_like(state.num_measured),
        jnp.full_like(state.last_gaps, -jnp.inf),
    )
    return BMOState(state.train_state, jax.tree.map(jnp.array, reference), state.reference_opt_state, *start)


def geometric_schedule(start: float, end: float, steps: int) -> optax.Schedule:
    """From `start` to `end` over `steps` steps, by the same factor each, and `end` from there on."""
    return lambda step: start * (end / start) ** jnp.minimum(step / steps, 1.0)


def smooth_merit(
    gaps: LossGaps, temperature: Scalar | float, multiplicities: Float[Array, "..."] | None = None
) -> Scalar:
    """m = -tau log mean_i exp(gaps_i / tau) over the rows that are there, nats: at a phi, without strength and prior.

    A lower bound of m(theta) at any phi. Minus tau log N it is v. Between min_i -gaps_i and that plus tau log N.
    `counts` (default: 1) says how much each row counts in the mean.
    """
    multiplicities = jnp.where(gaps > -jnp.inf, 1.0 if multiplicities is None else multiplicities, 0)
    return -temperature * (jax.nn.logsumexp(gaps / temperature, b=multiplicities) - jnp.log(jnp.sum(multiplicities)))


def weights_from_gaps(gaps: LossGaps, temperature: Scalar | float) -> LossGaps:
    """w_i = N softmax_i(gaps / tau): mean 1 over the N rows that are there, 0 for the others."""
    return jnp.exp((gaps + smooth_merit(gaps, temperature)) / temperature)


def compute_weights(
    problem: Problem,
    params: Params,
    reference: Params,
    frozen: Frozen,
    stream: Stream,
    num_examples: int,
    temperature: float,
) -> Float[Array, "examples"]:
    """The weight of every row at the end of training, by one pass over a stream that gives each row (at least) once.

    `phi` is that of the state; () is the separable form. Mean 1 over the rows that the stream gives, 0 for the others.
    """
    gap_table = jnp.full(num_examples, -jnp.inf, float)
    for index in range(stream.steps):
        gap_table = _record_gaps(problem, gap_table, params, reference, frozen, stream.batch(index))
    return weights_from_gaps(gap_table, temperature)


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
    """The losses of one micro-batch, nats: as `inner` is linear in the weights, its derivative by them times rows."""
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
    """(sum_i sg(w_i) l_i / rows + prior, its gradient, z, w) by one forward and one backward pass.

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
