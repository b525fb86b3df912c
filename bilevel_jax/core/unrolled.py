"""The resumable reverse sweep over a training run: exact for L_v(theta_T(w)), the run that really happened."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from bilevel_jax.core import schedule, tree
from bilevel_jax.core.transition import retreat, update_transpose, visit
from bilevel_jax.core.types import (
    Adjoint,
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
    Stream,
    Sweep,
    Transition,
)

PIECE = 32
"""Steps that are swept between two occasions to save: a copy of the outer variable is made for each."""


class Sweeper(NamedTuple):
    """A reverse sweep in pieces, for drivers that save between them."""

    begin: Callable[[Run, Hyper, Fixed, Stream], Sweep]
    """(run, hyper, fixed, validation stream): the adjoint is grad L_v, and 0 for the optimiser's state."""
    advance: Callable[[Run, Hyper, Fixed, Stream, Sweep], Sweep]
    """(run, hyper, fixed, train stream, sweep): at most `PIECE` steps further back."""
    done: Callable[[Run, Sweep], bool]
    finish: Callable[[Run, Sweep], Estimate]


def unrolled(problem: Problem, step: Transition, *, window: int | None = None) -> Estimator:
    """d L_v(theta_T(w)) / dw by reverse-mode differentiation through the last `window` training steps (default: all).

        lambda_T = grad L_v(theta_T);  for t = T-1 .. 0:  lambda_t = (d step_t / d theta)^T lambda_{t+1},
        grad += (d step_t / d w)^T lambda_{t+1}

    Exact for the run that happened: its steps, its optimiser, its batches. With a window it is an approximation (it
    stops early). Time: one Hessian product per step, and one more training step for each that is replayed. Memory:
    what the run's `keep` says; it changes no bit (`keep.linear`: nothing but rounding).

    Wrong when training is chaotic at this learning rate: the derivative is right and predicts nothing. Read
    `checks.growth`, and ask `certify`. `checks.replayed` is False where replayed steps missed the state that training
    reached (another device, another program): then the sweep differentiated another run. With `keep.linear` replayed
    steps are another program than trained ones: their states had the same bits in every case tried on CPUs; where a
    compiler orders sums otherwise there, `replayed` is False for a difference that is rounding.
    """
    sweeps = sweeper(problem, step, window=window)

    def estimate(run: Run, hyper: Hyper, fixed: Fixed, train: Stream, validation: Stream) -> Estimate:
        sweep = sweeps.begin(run, hyper, fixed, validation)
        while not sweeps.done(run, sweep):
            sweep = sweeps.advance(run, hyper, fixed, train, sweep)
        return sweeps.finish(run, sweep)

    return estimate


def each(
    problem: Problem, step: Transition, *, on_step: Callable[[int], None] | None = None
) -> Callable[[Run, Hyper, Fixed, Stream, Sequence[Stream]], Estimate]:
    """d L_q(theta_T(w)) / dw for several outer losses L_q, given as validation streams, by one reverse sweep.

    The adjoints go back side by side, so the replayed steps and the primal passes of the Hessian products are paid for
    once. Equal to `unrolled` for each stream; every leaf of the estimate leads with [losses]. Memory: that of one sweep
    and, for each loss more, an adjoint and the tangents of one step.
    """
    value_and_slope = outer_gradient(problem)
    several = step._replace(
        backward=jax.jit(jax.vmap(step.backward, in_axes=(None, None, None, None, None, 0))),
        pull=jax.jit(jax.vmap(step.pull, in_axes=(None, None, None, None, None, None, 0))),
        add=jax.jit(jax.vmap(problem.add, in_axes=(0, None, 0)), donate_argnums=0),
    )
    sweeps = sweeper(problem, several, on_step=on_step)

    def estimate(run: Run, hyper: Hyper, fixed: Fixed, train: Stream, validations: Sequence[Stream]) -> Estimate:
        found = [value_and_slope(run.end.params, fixed, validation) for validation in validations]
        values, slopes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

        def repeated(leaf):
            return jnp.zeros((len(validations), *leaf.shape), leaf.dtype)

        adjoint = Adjoint(slopes, [repeated(leaf) for leaf in tree.inexact(run.end.opt)])
        grad, size = jax.tree.map(repeated, hyper), tree.norm(slopes)
        sweep = Sweep(run.steps, run.end, adjoint, grad, values, size, size, jnp.array(True))
        while not sweeps.done(run, sweep):
            sweep = sweeps.advance(run, hyper, fixed, train, sweep)
        return sweeps.finish(run, sweep)

    return estimate


def sweeper(
    problem: Problem,
    step: Transition,
    *,
    window: int | None = None,
    on_step: Callable[[int], None] | None = None,
    on_replay: Callable[[int], None] | None = None,
) -> Sweeper:
    """The pieces of `unrolled`. A `Sweep` is plain arrays: save it after any piece, load it, and go on.

    `on_step` is called after each step swept with the step's number, `on_replay` after each step replayed.
    """
    value_and_slope = outer_gradient(problem)

    def first(run: Run) -> int:
        return 0 if window is None else max(0, run.steps - window)

    def begin(run: Run, hyper: Hyper, fixed: Fixed, validation: Stream) -> Sweep:
        if run.steps and not run.keep.tape:
            raise ValueError("this training kept nothing for a sweep; give `train` another `keep`.")
        value, slope = value_and_slope(run.end.params, fixed, validation)
        size = tree.norm(slope)
        adjoint = Adjoint(slope, [jnp.zeros_like(leaf) for leaf in tree.inexact(run.end.opt)])
        grad = jax.tree.map(jnp.zeros_like, hyper)
        return Sweep(run.steps, run.end, adjoint, grad, value, size, size, jnp.array(True))

    def replay(run: Run, hyper: Hyper, fixed: Fixed, train: Stream, end: int) -> Inner:
        """Put the last steps before `end` on the tape; the state that they lead to."""
        run.tape.clear()  # what stands there is swept, and these steps need its memory
        before = {kept for kept in run.snapshots if kept < end}
        if first(run) == 0 or not before:
            before.add(0)
        begin, planned = schedule.refill(before, end, run.keep)
        if planned:
            for used in [kept for kept in run.snapshots if kept >= end]:
                del run.snapshots[used]
        state = run.snapshots[begin] if begin else run.start
        for t in range(begin, end):
            if t in planned:
                run.snapshots[t] = state
            taped = t >= max(first(run), end - run.keep.tape)
            state, _, visited = visit(step, state, hyper, fixed, train.batch(t), linear=taped and run.keep.linear)
            if taped:
                run.tape[t] = visited
            if on_replay:
                on_replay(t)
        return state

    def advance(run: Run, hyper: Hyper, fixed: Fixed, train: Stream, sweep: Sweep) -> Sweep:
        t, replayed = sweep.step, sweep.replayed
        if t - 1 not in run.tape:
            replayed = jnp.logical_and(replayed, _same(replay(run, hyper, fixed, train, t), sweep.edge))
        adjoint, peak, grad = sweep.adjoint, sweep.peak, jax.tree.map(jnp.copy, sweep.grad)
        stop = max(first(run), t - PIECE)
        while t > stop and t - 1 in run.tape:
            t -= 1
            batch = train.batch(t)
            adjoint, entries = retreat(step, run.tape[t], hyper, fixed, batch, adjoint)
            grad, peak = step.add(grad, batch, entries), _larger(peak, adjoint)
            if on_step:
                on_step(t)
        return Sweep(t, run.tape[t].state, adjoint, grad, sweep.value, sweep.first, peak, replayed)

    def done(run: Run, sweep: Sweep) -> bool:
        return sweep.step <= first(run)

    def finish(run: Run, sweep: Sweep) -> Estimate:
        growth, replayed = float(sweep.peak / sweep.first), bool(sweep.replayed)
        checks = Checks(growth=growth, replayed=replayed, steps=run.steps - first(run))
        return Estimate(sweep.grad, sweep.value, sweep.adjoint.params, checks)

    return Sweeper(begin, advance, done, finish)


_same = jax.jit(tree.equal)
_larger = jax.jit(lambda peak, adjoint: jnp.maximum(peak, tree.norm(adjoint.params)))


@lru_cache(maxsize=8)  # so that a run which comes back to a problem with other rows compiles nothing again
def outer_gradient(problem: Problem) -> Callable[[Params, Fixed, Stream], tuple[Scalar, Params]]:
    """(params, fixed, validation stream) -> L_v and its gradient, over *all* of the stream."""

    @jax.jit
    def add(total, params, fixed, batch):
        def add_micro(total, micro):
            return optax.tree.add(total, jax.value_and_grad(problem.outer)(params, fixed, micro)), None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add_micro, total, batch)[0]

    @jax.jit  # or each call would trace the model to learn the dtypes
    def zero(params, fixed, batch):
        micro = jax.tree.map(lambda leaf: leaf[0], batch)
        shapes = jax.eval_shape(jax.value_and_grad(problem.outer), params, fixed, micro)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def value_and_slope(params: Params, fixed: Fixed, stream: Stream) -> tuple[Scalar, Params]:
        total = zero(params, fixed, stream.batch(0))
        for index in range(stream.steps):
            total = add(total, params, fixed, stream.batch(index))
        return total

    return value_and_slope


@lru_cache(maxsize=8)
def outer_value(problem: Problem) -> Callable[[Params, Fixed, Stream], Scalar]:
    """(params, fixed, validation stream) -> L_v in nats, over all of the stream."""

    @jax.jit
    def share(params, fixed, batch):
        with jax.default_matmul_precision("highest"):
            return jax.lax.map(lambda micro: problem.outer(params, fixed, micro), batch).sum()

    def value(params: Params, fixed: Fixed, stream: Stream) -> Scalar:
        return sum((share(params, fixed, stream.batch(i)) for i in range(stream.steps)), start=jnp.zeros(()))

    return value


def check_differentiable(
    step: Transition,
    optimizer: optax.GradientTransformation,
    run: Run,
    hyper: Hyper,
    fixed: Fixed,
    train: Stream,
) -> None:
    """Refuse an optimiser whose update has no usable derivative, with the remedy, before a sweep is begun.

    Pulls a vector back through the update at the first step and near the middle, at the gradient met there and at the
    same gradient with half of its entries set to exactly 0 (what rows of an embedding get before their first use).

    Raises:
        ValueError: if a derivative is not finite (Adam with eps_root = 0 at a zero entry) or is 0 at both places
            (lion and other sign methods: no weight would change anything).
    """
    probe, halved = jax.jit(partial(_probe, optimizer)), jax.jit(_half_zero)  # one by one, their operations take longer
    reached = False
    for state in (run.start, _middle(run)):
        index = int(state.step)
        batch = train.batch(index)
        grad = step.forward(state, step.take(hyper, batch), fixed, batch)[1].grad
        for place, one in (("a gradient of this run", grad), ("a gradient with zero entries", halved(grad))):
            ok, alive = probe(one, state)
            if not ok:
                raise ValueError(
                    f"the optimiser's update has a derivative that is not finite at {place} (step {index}). Adam and "
                    "its kin need eps_root > 0 (1e-12 is enough); a clip by a norm needs one that is safe at 0."
                )
            reached |= bool(alive)
    if not reached:
        raise ValueError(
            "the optimiser's update does not depend on the gradient's size (its derivative is 0), as with lion or "
            "signSGD: no weight would change anything. Use sgd, momentum, adam or adamw."
        )


def _middle(run: Run) -> Inner:
    """The kept state nearest to the middle of a run."""
    middle = run.steps // 2
    if middle in run.tape:
        return run.tape[middle].state
    kept = min(run.snapshots, key=lambda step: abs(step - middle), default=0)
    return run.snapshots[kept] if kept else run.start


def _probe(
    optimizer: optax.GradientTransformation, grad: Params, state: Inner
) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    keys = optax.tree.split_key_like(jax.random.key(0), grad)
    cotangent = jax.tree.map(lambda key, leaf: jax.random.normal(key, leaf.shape, leaf.dtype), keys, grad)
    adjoint = Adjoint(cotangent, [jnp.zeros_like(leaf) for leaf in tree.inexact(state.opt)])
    grad_bar, params_bar, opt_bar = update_transpose(optimizer, grad, state, adjoint)
    alive = jnp.logical_or(tree.norm(grad_bar) > 0, (tree.norm(opt_bar) > 0) if opt_bar else False)
    return tree.finite((grad_bar, params_bar, opt_bar)), alive


def _half_zero(grad: Params) -> Params:
    def halve(leaf):
        return leaf * jnp.asarray(np.arange(leaf.size) % 2, leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(halve, grad)
