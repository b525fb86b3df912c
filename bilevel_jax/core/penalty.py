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
from bilevel_jax.core.implicit import sampled
from bilevel_jax.core.problem import per_unit
from bilevel_jax.core.transition import begin, gradient
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Checks,
    Estimate,
    Estimator,
    Fixed,
    Hyper,
    Inner,
    Params,
    Problem,
    Run,
    Scalar,
    Single,
    Slice,
    Stream,
)
from bilevel_jax.core.unrolled import outer_gradient
from bilevel_jax.core.weighting import Selector, equal_selector, inverse_rms

OPTIMISTIC = (
    "optimistic bilevel: min over weights and over theta in argmin G(., w) of L_v; theta itself is pulled by L_v, "
    "so it trains on V"
)
MIXED = "direct mixing: min over theta of rho L_v + (1 - rho) (mean training loss + prior); it trains on V, unweighted"

OFFLINE = (0.5, 0.4, 0.3)
"""lambda by epoch in the public code of offline data selection."""
SEAL = (1.0, 0.97, 0.94)
"""lambda by epoch in SEAL: the first epoch trains on V alone, while the weights already move."""


class State(NamedTuple):
    """All that the next step needs; plain arrays, so that saving and loading it is resuming."""

    inner: Inner
    """theta, its optimiser's state and the number of steps done."""
    copy: Inner | None
    """The second copy u, which follows the weighted training loss alone."""
    outer: Any
    """The selector's state."""


class Info(NamedTuple):
    """What one step tells, all of it at the parameters that the step started from."""

    inner: Scalar
    """G + r of the training batch, nats."""
    outer: Scalar
    """L_v of the validation batch, nats per row."""
    share: Scalar
    """lambda."""
    norm: Scalar
    """The norm of theta's gradient."""
    entries: Float[Array, "micro examples"]
    """l_i(theta) - l_i(u), nats; 0 for padding."""


def by_epoch(values: Sequence[float], steps_per_epoch: int) -> optax.Schedule:
    """step -> values[epoch], the last value for all epochs beyond the list.

    Raises:
        ValueError: if there are no values, or an epoch has no steps.
    """
    if not values or steps_per_epoch < 1:
        raise ValueError(f"{len(values)} values, {steps_per_epoch} steps per epoch; give at least one of each.")
    return lambda step: jnp.asarray(values)[jnp.minimum(step // steps_per_epoch, len(values) - 1)]


def from_gamma(gamma: optax.Schedule) -> optax.Schedule:
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
    share = 1 / (1 + gamma)
    value_and_slope = outer_gradient(problem)
    take, add = jax.jit(problem.take), jax.jit(problem.add, donate_argnums=0)

    free = problem._replace(prior=lambda params, fixed: jnp.zeros(()))
    prior_slope, mixed, advance = jax.jit(jax.grad(problem.prior)), jax.jit(blend), jax.jit(partial(descend, optimizer))

    @jax.jit
    def add_slope(total, params, weights, fixed, batch):
        with jax.default_matmul_precision("highest"):
            return optax.tree.add(total, gradient(free, params, weights, fixed, batch)[1])

    @jax.jit
    def differences(high, low, weights, fixed, batch):
        with jax.default_matmul_precision("highest"):
            one, other = (losses_and_slope(problem, params, weights, fixed, batch)[2] for params in (high, low))
            return jax.tree.map(lambda a, b: gamma * (a - b), one, other)

    def inner_slope(params: Params, hyper: Hyper, fixed: Fixed, stream: Stream) -> Params:
        total = prior_slope(params, fixed)
        for index in range(stream.steps):
            batch = stream.batch(index)
            total = add_slope(total, params, take(hyper, batch), fixed, batch)
        return total

    def estimate(run: Run, hyper: Hyper, fixed: Fixed, train: Stream, validation: Stream) -> Estimate:
        sample = sampled(train, min(batches or train.steps, train.steps))

        def minimise(params: Params, mix: float) -> Params:
            state = begin(optimizer, params)
            for _ in range(steps):
                slope = inner_slope(state.params, hyper, fixed, sample)
                if mix:
                    slope = mixed(value_and_slope(state.params, fixed, validation)[1], slope, mix)
                state = advance(state, slope)
            return state.params

        low = minimise(run.end.params, 0.0)
        high = minimise(low, share)
        direction = optax.tree.scale(gamma, optax.tree.sub(low, high))
        pull = value_and_slope(high, fixed, validation)[1]
        rest = optax.tree.add_scale(pull, gamma, inner_slope(high, hyper, fixed, sample))
        checks = Checks(
            residual=float(tree.norm(rest) / tree.norm(pull)),
            gap=float(optax.tree.vdot(direction, inner_slope(low, hyper, fixed, sample))),
            steps=2 * steps,
            batches=sample.steps,
        )
        grad = jax.tree.map(jnp.zeros_like, hyper)
        for index in range(train.steps):
            batch = train.batch(index)
            grad = add(grad, batch, differences(high, low, take(hyper, batch), fixed, batch))
        return Estimate(grad, value_and_slope(low, fixed, validation)[0], direction, checks)

    return estimate


def single(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    selector: Selector,
    *,
    share: optax.Schedule,
    rate: optax.Schedule,
    second: Literal["copy", "none"] = "copy",
    normalised: bool = False,
    cap: float = float("inf"),
) -> Single:
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
    if second not in ("copy", "none"):
        raise ValueError(f"second={second!r}; use 'copy' (a second model) or 'none' (the memory-saving form).")
    held_out = problem._replace(
        inner=lambda params, weights, fixed, batch: problem.outer(params, fixed, batch),
        prior=lambda params, fixed: jnp.zeros(()),
    )

    def init(params: Params) -> State:
        def fresh() -> Inner:
            return begin(optimizer, jax.tree.map(jnp.array, params))  # buffers of its own: the step donates them

        return State(fresh(), fresh() if second == "copy" else None, selector.init())

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, fixed: Fixed, train: Batch, validation: Batch) -> tuple[State, Info]:
        inner, copy, index = state.inner, state.copy, train["index"]
        lam, weights, present = share(inner.step), selector.take(state.outer, index), index != PADDING
        value, slope, entries = losses_and_slope(problem, inner.params, weights, fixed, train)
        real = jnp.sum(validation["index"] != PADDING)
        seen = {**validation, "rows": jnp.full_like(validation["rows"], real)}
        outer, pull = gradient(held_out, inner.params, None, fixed, seen)
        grad = blend(pull, slope, lam)
        if copy is not None:
            _, follow, losses = losses_and_slope(problem, copy.params, weights, fixed, train)
            entries, copy = entries - losses, descend(optimizer, copy, follow)
        entries = jnp.where(present, per_unit(entries, train) * train["rows"][:, None], 0)
        change = selector.slope(state.outer, index, entries)
        scale = -rate(inner.step) * (inverse_rms(change) if normalised else 1)
        change = jax.tree.map(lambda leaf: jnp.clip(scale * leaf, -cap, cap), change)
        info = Info(value, outer, jnp.asarray(lam), tree.norm(grad), entries)
        return State(descend(optimizer, inner, grad), copy, selector.move(state.outer, index, change)), info

    return Single(init, step, lambda state: selector.weights(state.outer), OPTIMISTIC)


def mixing(problem: Problem, optimizer: optax.GradientTransformation, rho: float, rows: int) -> Single:
    """Direct mixing, the baseline: theta <- opt(grad [rho L_v + (1 - rho) (mean_i l_i + r)]), every weight 1.

    Estimand: the minimiser of that sum. It **trains on V**. Where training rows contradict V (useless rows) it keeps a
    larger L_v than the bilevel optimum for every rho < 1; with rho = 1 it is training on V alone.

    Raises:
        ValueError: if rho lies outside of [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho {rho} is no share; give a number from 0 (training rows alone) to 1 (V alone).")
    constant = optax.constant_schedule
    made = single(problem, optimizer, equal_selector(rows), share=constant(rho), rate=constant(0.0), second="none")
    return made._replace(estimand=MIXED)


def losses_and_slope(
    problem: Problem, params: Params, weights: Slice, fixed: Fixed, batch: Batch
) -> tuple[Scalar, Params, Slice]:
    """inner + prior, its gradient, and d inner / d weights (l_i / rows), over all micro-batches in one pass."""

    def add_micro(total, micro):
        value, (slope, losses) = jax.value_and_grad(problem.inner, argnums=(0, 1))(params, micro[0], fixed, micro[1])
        return optax.tree.add(total, (value, slope)), losses

    prior = jax.value_and_grad(problem.prior)(params, fixed)
    (value, slope), losses = jax.lax.scan(add_micro, prior, (weights, batch))
    return value, slope, losses


def blend(outer: Params, inner: Params, share: Scalar | float) -> Params:
    """share * outer + (1 - share) * inner, in the type of the parameters."""
    return jax.tree.map(lambda a, b: (share * a + (1 - share) * b).astype(b.dtype), outer, inner)


def descend(optimizer: optax.GradientTransformation, state: Inner, grad: Params) -> Inner:
    """The state of training after one step along a gradient."""
    updates, opt = optimizer.update(grad, state.opt, state.params)
    return Inner(optax.apply_updates(state.params, updates), opt, state.step + 1)
