"""One optimiser step, forward and backward, and the drivers that repeat it: the only code that is differentiated."""

from collections.abc import Callable, MutableMapping
from functools import partial

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core import schedule, tree
from bilevel_jax.core.types import (
    Adjoint,
    Batch,
    Fixed,
    Hyper,
    Info,
    Inner,
    Keep,
    Params,
    Problem,
    PyTree,
    Run,
    Scalar,
    Slice,
    Stream,
    Transition,
    Visit,
)


def transition(problem: Problem, optimizer: optax.GradientTransformation) -> Transition:
    """One step of training under `optimizer` and its transpose, both compiled.

        forward:   g = d(inner + prior)/d params;  params', opt' = update(g, opt, params)
        backward:  (g~, o~, p~) = vjp(update)(adjoint);  (H g~, entries) = jvp of grad(inner + prior) along g~;
                   adjoint = (p~ + H g~, o~)

    One forward-over-reverse product along g~ gives the Hessian product and the entry of every weight that the step
    touched, without a per-example gradient. Everything is traced at the highest matmul precision: JAX's default would
    multiply float32 as TF32 on a GPU and as bfloat16 on a TPU, which second derivatives do not survive.

    Micro-batches are summed in a scan, so that a step's memory is that of one of them.
    """
    forward, backward = steps(problem, optimizer)
    return Transition(
        jax.jit(forward), jax.jit(backward), jax.jit(problem.take), jax.jit(problem.add, donate_argnums=0)
    )


def steps(
    problem: Problem, optimizer: optax.GradientTransformation, total: Callable[[PyTree], PyTree] = lambda part: part
) -> tuple[Callable, Callable]:
    """(forward, backward) of `transition`, to be compiled; `total` sums further what was summed over micro-batches."""

    def product(params: Params, weights: Slice, fixed: Fixed, batch: Batch, v: Params) -> tuple[Params, Slice]:
        def add_micro(total, micro):
            def both(params):
                return jax.grad(problem.inner, argnums=(0, 1))(params, micro[0], fixed, micro[1])

            hessian, entries = jax.jvp(both, (params,), (v,))[1]
            return optax.tree.add(total, hessian), entries

        prior = jax.jvp(lambda params: jax.grad(problem.prior)(params, fixed), (params,), (v,))[1]
        return jax.lax.scan(add_micro, prior, (weights, batch))

    def forward(state: Inner, weights: Slice, fixed: Fixed, batch: Batch) -> tuple[Inner, Info]:
        with jax.default_matmul_precision("highest"):
            loss, grad = total(gradient(problem, state.params, weights, fixed, batch))
            updates, opt = optimizer.update(grad, state.opt, state.params)
            return Inner(optax.apply_updates(state.params, updates), opt, state.step + 1), Info(
                loss, grad, tree.norm(grad)
            )

    def backward(
        state: Inner, grad: Params, weights: Slice, fixed: Fixed, batch: Batch, adjoint: Adjoint
    ) -> tuple[Adjoint, Slice]:
        with jax.default_matmul_precision("highest"):
            grad_bar, params_bar, opt_bar = update_transpose(optimizer, grad, state, adjoint)
            hessian, entries = product(state.params, weights, fixed, batch, grad_bar)
            return Adjoint(optax.tree.add(params_bar, total(hessian)), opt_bar), entries

    return forward, backward


def gradient(problem: Problem, params: Params, weights: Slice, fixed: Fixed, batch: Batch) -> tuple[Scalar, Params]:
    """inner + prior and its gradient, over all micro-batches of a step; one of them in memory at a time."""

    def add_micro(total, micro):
        value = jax.value_and_grad(problem.inner)(params, micro[0], fixed, micro[1])
        return optax.tree.add(total, value), None

    prior = jax.value_and_grad(problem.prior)(params, fixed)
    return jax.lax.scan(add_micro, prior, (weights, batch))[0]


def descent(
    problem: Problem, optimizer: optax.GradientTransformation
) -> Callable[[Inner, Hyper, Fixed, Batch], tuple[Inner, Scalar]]:
    """The same step for training alone: (state, hyper, fixed, batch) -> (state', loss), compiled.

    Nothing of it is differentiated, so the products have JAX's default precision, the gradient is not kept, and the
    state that is given is donated: its memory becomes that of the state returned.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: Inner, hyper: Hyper, fixed: Fixed, batch: Batch) -> tuple[Inner, Scalar]:
        loss, grad = gradient(problem, state.params, problem.take(hyper, batch), fixed, batch)
        updates, opt = optimizer.update(grad, state.opt, state.params)
        return Inner(optax.apply_updates(state.params, updates), opt, state.step + 1), loss

    return step


def update_transpose(
    optimizer: optax.GradientTransformation, grad: Params, state: Inner, adjoint: Adjoint
) -> tuple[Params, Params, list[jax.Array]]:
    """The adjoint, pulled back through one optimiser update: (of the gradient, of the parameters, of the state)."""
    floats, join = tree.partition(state.opt)

    def update(grad, params, floats):
        updates, opt = optimizer.update(grad, join(floats), params)
        return optax.apply_updates(params, updates), tree.inexact(opt)

    return jax.vjp(update, grad, state.params, floats)[1]((adjoint.params, adjoint.opt))


def begin(optimizer: optax.GradientTransformation, params: Params) -> Inner:
    """The state before the first step."""
    return Inner(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def finished(params: Params) -> Run:
    """A run that ended at `params`, however they were found: for estimators that read a run's end only (`implicit`)."""
    state = begin(optax.identity(), params)
    return Run(state, state, 0, schedule.NOTHING, {}, {})


def train(
    step: Transition,
    start: Inner,
    hyper: Hyper,
    fixed: Fixed,
    stream: Stream,
    *,
    keep: Keep | None = None,
    since: int = 0,
    snapshots: MutableMapping[int, Inner] | None = None,
    resume: Inner | None = None,
    on_step: Callable[[Inner, Info], None] | None = None,
) -> Run:
    """Train over a stream with the driver of long runs, a Python loop, and return what the estimators read.

    Keeps what `keep` says (default: `schedule.square_root`) for a sweep back to step `since`. `snapshots` is where
    states go that should live elsewhere than in a dict; `resume` is a later state of the same run, whose earlier
    snapshots are then there already. `on_step` is called after each step with the state reached and what the step told,
    both still on the device.
    """
    keep = schedule.square_root(stream.steps - since) if keep is None else keep
    snapshots = {} if snapshots is None else snapshots
    kept = {since + place for place in schedule.placed(0, stream.steps - since, *keep)}  # the start is kept anyway
    tape: dict[int, Visit] = {}
    state = start if resume is None else resume
    for index in range(int(state.step), stream.steps):
        if index in kept and index:
            snapshots[index] = state
        batch = stream.batch(index)
        after, info = step.forward(state, step.take(hyper, batch), fixed, batch)
        if index >= max(since, stream.steps - keep.tape):
            tape[index] = Visit(state, info.grad)
        state = after
        if on_step:
            on_step(state, info)
    return Run(start, state, stream.steps, keep, snapshots, tape)


@partial(jax.jit, static_argnames="step")
def scan(step: Transition, start: Inner, hyper: Hyper, fixed: Fixed, batches: Batch) -> Inner:
    """Train over stacked batches (leaves [steps, micro, ...]) with `lax.scan`: the driver of small problems.

    The end of training as one differentiable function of `hyper`; `jax.grad` through it is the oracle of the tests.
    """

    def body(state, batch):
        return step.forward(state, step.take(hyper, batch), fixed, batch)[0], None

    return jax.lax.scan(body, start, batches)[0]
