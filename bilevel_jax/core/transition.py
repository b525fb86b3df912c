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
    Linear,
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
    touched, without a per-example gradient. `linearize` and `pull` are the same two with what the product needs of the
    primal pass handed over (jax.linearize) instead of computed again: equal but for rounding. Everything is traced at
    the highest matmul precision: JAX's default would multiply float32 as TF32 on a GPU and as bfloat16 on a TPU, which
    second derivatives do not survive.

    Micro-batches are summed in a scan, so that a step's memory is that of one of them.
    """
    forward, backward, linearize, pull = map(jax.jit, steps(problem, optimizer))
    take, add = jax.jit(problem.take), jax.jit(problem.add, donate_argnums=0)
    return Transition(forward, backward, take, add, linearize, pull)


def steps(
    problem: Problem, optimizer: optax.GradientTransformation, total: Callable[[PyTree], PyTree] = lambda part: part
) -> tuple[Callable, Callable, Callable, Callable]:
    """`transition`'s four functions of a step, to be compiled; `total` sums further what micro-batches summed up to."""

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
            return updated(state, *total(gradient(problem, state.params, weights, fixed, batch)))

    def updated(state: Inner, loss: Scalar, grad: Params) -> tuple[Inner, Info]:
        updates, opt = optimizer.update(grad, state.opt, state.params)
        after = Inner(optax.apply_updates(state.params, updates), opt, state.step + 1)
        return after, Info(loss, grad, tree.norm(grad))

    def backward(
        state: Inner, grad: Params, weights: Slice, fixed: Fixed, batch: Batch, adjoint: Adjoint
    ) -> tuple[Adjoint, Slice]:
        with jax.default_matmul_precision("highest"):
            grad_bar, params_bar, opt_bar = update_transpose(optimizer, grad, state, adjoint)
            hessian, entries = product(state.params, weights, fixed, batch, grad_bar)
            return Adjoint(optax.tree.add(params_bar, total(hessian)), opt_bar), entries

    def linearize(state: Inner, weights: Slice, fixed: Fixed, batch: Batch) -> tuple[Inner, Info, Linear]:
        def slope(params: Params) -> tuple[tuple[Params, Slice], Scalar]:
            def add_micro(total, micro):
                loss, (grad, entries) = jax.value_and_grad(problem.inner, argnums=(0, 1))(
                    params, micro[0], fixed, micro[1]
                )
                return optax.tree.add(total, (loss, grad)), entries

            prior = jax.value_and_grad(problem.prior)(params, fixed)
            (loss, grad), entries = jax.lax.scan(add_micro, prior, (weights, batch))
            return (grad, entries), loss

        with jax.default_matmul_precision("highest"):
            (grad, _), linear, loss = jax.linearize(slope, state.params, has_aux=True)
            return *updated(state, *total((loss, grad))), _lean(linear, state, weights, fixed, batch)

    def pull(
        state: Inner, grad: Params, linear: Linear, weights: Slice, fixed: Fixed, batch: Batch, adjoint: Adjoint
    ) -> tuple[Adjoint, Slice]:
        with jax.default_matmul_precision("highest"):
            grad_bar, params_bar, opt_bar = update_transpose(optimizer, grad, state, adjoint)
            hessian, entries = linear(jax.tree.leaves((state, weights, fixed, batch)), grad_bar)
            return Adjoint(optax.tree.add(params_bar, total(hessian)), opt_bar), entries

    return forward, backward, linearize, pull


def _lean(linear: Callable, *given: PyTree) -> Linear:
    """The linearisation without the arrays that were given to the step: a compiled function would copy them, a frozen
    base model among them, for every step on the tape."""
    leaves, structure = jax.tree.flatten(linear)
    places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(given))}
    found = [places.get(id(leaf)) for leaf in leaves]

    def apply(own: list[jax.Array], given: list[jax.Array], v: Params) -> tuple[Params, Slice]:
        rest = iter(own)
        whole = [next(rest) if place is None else given[place] for place in found]
        return structure.unflatten(whole)(v)

    own = [leaf for leaf, place in zip(leaves, found, strict=True) if place is None]
    return jax.tree_util.Partial(apply, own)


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
    placed = schedule.placed(0, stream.steps - since, keep.snapshots, keep.tape)
    kept = {since + place for place in placed}  # the start is kept anyway
    tape: dict[int, Visit] = {}
    state = start if resume is None else resume
    for index in range(int(state.step), stream.steps):
        if index in kept and index:
            snapshots[index] = state
        taped = index >= max(since, stream.steps - keep.tape)
        state, info, visited = visit(step, state, hyper, fixed, stream.batch(index), linear=taped and keep.linear)
        if taped:
            tape[index] = visited
        if on_step:
            on_step(state, info)
    return Run(start, state, stream.steps, keep, snapshots, tape)


def visit(
    step: Transition, state: Inner, hyper: Hyper, fixed: Fixed, batch: Batch, *, linear: bool
) -> tuple[Inner, Info, Visit]:
    """One step, and what of it goes on a tape."""
    part = step.take(hyper, batch)
    if linear:
        after, info, derivatives = step.linearize(state, part, fixed, batch)
        return after, info, Visit(state, info.grad, derivatives)
    after, info = step.forward(state, part, fixed, batch)
    return after, info, Visit(state, info.grad)


def retreat(
    step: Transition, visited: Visit, hyper: Hyper, fixed: Fixed, batch: Batch, adjoint: Adjoint
) -> tuple[Adjoint, Slice]:
    """One step back: (the adjoint before it, the entries of its slice)."""
    part = step.take(hyper, batch)
    if visited.linear is not None:
        return step.pull(visited.state, visited.grad, visited.linear, part, fixed, batch, adjoint)
    return step.backward(visited.state, visited.grad, part, fixed, batch, adjoint)


@partial(jax.jit, static_argnames="step")
def scan(step: Transition, start: Inner, hyper: Hyper, fixed: Fixed, batches: Batch) -> Inner:
    """Train over stacked batches (leaves [steps, micro, ...]) with `lax.scan`: the driver of small problems.

    The end of training as one differentiable function of `hyper`; `jax.grad` through it is the oracle of the tests.
    """

    def body(state, batch):
        return step.forward(state, step.take(hyper, batch), fixed, batch)[0], None

    return jax.lax.scan(body, start, batches)[0]
