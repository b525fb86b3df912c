"""Nested scans forward and back through a training run, with few states kept."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from bilevel_jax.core import tree
from bilevel_jax.core.solve.arrays import BatchAt
from bilevel_jax.core.training import optimizer_vjp
from bilevel_jax.core.types import Adjoint, Frozen, Hyper, Params, Problem, PyTree, Scalar, TrainState


class ScanResult(NamedTuple):
    """What one compiled pass forward and back through a training run gives."""

    end: TrainState
    value: Scalar
    grad: Hyper
    magnitude: Hyper
    """The sum over steps of the sizes of the terms that `grad` sums: what rounding is measured against."""
    start_adjoint: Adjoint
    """d L_v / d (state before the first step differentiated)."""
    growth: Scalar
    """The largest norm of the adjoint over its norm at the end of training."""
    replay_matches: Bool[Array, ""]
    has_derivative: Bool[Array, ""]
    """Whether the adjoint of some step's gradient was not 0: else nothing passes through the optimizer."""


def segment_lengths(steps: int, stored_states: int | None) -> tuple[int, ...]:
    """Lengths of nested segments, longest first, so that at most `stored_states` states are kept at once.

    None keeps every state: no segments, and no step is computed twice. Otherwise the fewest levels whose states fit:
    one level of segments of sqrt(steps) keeps 2 sqrt(steps) states and computes every step twice, k levels keep
    (k + 1) steps^(1 / (k + 1)) and compute every step k + 1 times.
    """
    if stored_states is None or stored_states >= steps:
        return ()
    fewest = steps
    for levels in range(1, steps.bit_length() + 1):
        root = steps ** (1 / (levels + 1))
        lengths = tuple(max(1, round(root ** (levels - level))) for level in range(levels))
        count = count_stored_states(steps, lengths)
        if count <= stored_states:
            return lengths
        fewest = min(fewest, count)
    raise ValueError(f"{stored_states} states are too few for {steps} steps; the fewest are {fewest}.")


def count_stored_states(steps: int, lengths: tuple[int, ...]) -> int:
    """States that the backward pass of `scan_forward_and_back` keeps at the same time."""
    wholes = (steps, *lengths[:-1])
    ends = [whole // part + bool(whole % part) for whole, part in zip(wholes, lengths, strict=True)] if lengths else []
    return sum(ends) + (lengths[-1] if lengths else steps)


def scan_forward(
    forward: Callable, problem: Problem, state: TrainState, hyper: Hyper, frozen: Frozen, batch_at: BatchAt, steps: int
) -> TrainState:
    """The state `steps` steps after `state`."""

    def advance(state, _):
        batch = batch_at(state.step)
        new_state = forward(state, problem.gather(hyper, batch), frozen, batch)[0]
        _check_structure(state, new_state)
        return new_state, None

    return jax.lax.scan(advance, state, length=steps)[0] if steps else state


def scan_forward_and_back(
    step_functions: tuple[Callable, Callable],
    problem: Problem,
    start: TrainState,
    hyper: Hyper,
    frozen: Frozen,
    batch_at: BatchAt,
    end_loss_and_adjoint: Callable[[TrainState], tuple[Scalar, Adjoint]],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    window: int,
    lengths: tuple[int, ...],
) -> ScanResult:
    """Train `steps` steps from `start`, and go back through the last `window` of them.

    The backward pass is the transpose of each step, written out, never differentiation through the loop: a segment's
    states and gradients are kept while the pass goes through it, and the states at its ends before.
    """
    forward, backward = step_functions

    def advance(state: TrainState) -> tuple[TrainState, Params]:
        batch = batch_at(state.step)
        new_state, metrics = forward(state, problem.gather(hyper, batch), frozen, batch)
        _check_structure(state, new_state)
        return new_state, metrics.grad

    def run(state: TrainState, count: int) -> TrainState:
        return scan_forward(forward, problem, state, hyper, frozen, batch_at, count)

    def step_back(carry, stored):
        adjoint, grad, magnitude, max_norm, has_derivative = carry
        state, inner_grad = stored
        batch = batch_at(state.step)
        grad_bar = optimizer_vjp(optimizer, inner_grad, state, adjoint)[0]  # as `backward` does: XLA computes it once
        has_derivative |= jnp.stack([(leaf != 0).any() for leaf in jax.tree.leaves(grad_bar)]).any()
        adjoint, parts = backward(state, inner_grad, problem.gather(hyper, batch), frozen, batch, adjoint)
        grad = problem.scatter_add(grad, batch, parts)
        magnitude = problem.scatter_add(magnitude, batch, jax.tree.map(jnp.abs, parts))
        max_norm = jnp.maximum(max_norm, tree.norm((adjoint.params, adjoint.model_state)))
        return (adjoint, grad, magnitude, max_norm, has_derivative), None

    def store(state: TrainState, count: int, lengths: tuple[int, ...]) -> tuple[TrainState, PyTree]:
        """The state after `count` steps, and what going back through them needs."""
        if not lengths:

            def keep(state, _):
                new_state, inner_grad = advance(state)
                return new_state, (state, inner_grad)

            return jax.lax.scan(keep, state, length=count)
        whole, rest = divmod(count, lengths[0])
        first, state = state, run(state, rest)
        state, starts = jax.lax.scan(lambda state, _: (run(state, lengths[0]), state), state, length=whole)
        return state, (first, starts)

    def back(stored: PyTree, end: TrainState, carry: PyTree, count: int, lengths: tuple[int, ...]) -> tuple:
        """(carry before, whether every replayed segment ended where training did)."""
        if not lengths:
            return jax.lax.scan(step_back, carry, stored, reverse=True)[0], jnp.array(True)
        whole, rest = divmod(count, lengths[0])
        first, starts = stored

        def replay_and_back(carry, begin, end, count):
            state, stored = store(begin, count, lengths[1:])
            carry, matches = back(stored, state, carry, count, lengths[1:])
            return carry, jnp.logical_and(matches, tree.bitwise_equal(state, end))

        def segment_back(carry, begin):
            carry, end, matches = carry
            carry, segment_matches = replay_and_back(carry, begin, end, lengths[0])
            return (carry, begin, jnp.logical_and(matches, segment_matches)), None

        (carry, end, matches), _ = jax.lax.scan(segment_back, (carry, end, jnp.array(True)), starts, reverse=True)
        if rest:
            carry, rest_matches = replay_and_back(carry, first, end, rest)
            matches = jnp.logical_and(matches, rest_matches)
        return carry, matches

    with jax.default_matmul_precision("highest"):
        begin = run(start, steps - window)
        end, stored = store(begin, window, lengths)
        value, adjoint = end_loss_and_adjoint(end)
        norm = tree.norm((adjoint.params, adjoint.model_state))
        zeros = jax.tree.map(jnp.zeros_like, hyper)
        carry, matches = back(stored, end, (adjoint, zeros, zeros, norm, norm == 0), window, lengths)
        adjoint, grad, magnitude, max_norm, has_derivative = carry
    return ScanResult(end, value, grad, magnitude, adjoint, max_norm / norm, matches, has_derivative)


def _check_structure(before: TrainState, after: TrainState) -> None:
    if jax.tree.structure(before.opt_state) != jax.tree.structure(after.opt_state):
        raise ValueError(
            "the optimizer's state changes its structure at the first update, as optax.monitor's does, which one "
            "compiled loop cannot: use optax.snapshot, or give streams."
        )


def start_and_hyperparameter_gradients(
    optimizer: optax.GradientTransformation, start: TrainState, adjoint: Adjoint
) -> tuple[Params, dict[str, Array]]:
    """(d L_v / d params at the start, d L_v / d each hyperparameter that the optimizer's state holds).

    The optimizer's first state is a function of the parameters (an average of them, say); its derivative is part of the
    first. The second has the leaves of `optax.inject_hyperparams`, by name.
    """
    _, pull = jax.vjp(lambda params: tree.inexact_leaves(optimizer.init(params)), start.params)
    grad_start = optax.tree.add(adjoint.params, pull(adjoint.opt_state)[0])
    named: dict[str, Array] = {}
    paths = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(start.opt_state)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    for path, leaf in zip(paths, adjoint.opt_state, strict=True):
        places = [i for i, key in enumerate(path) if getattr(key, "name", None) == "hyperparams"]
        if places:
            name = ".".join(str(getattr(key, "key", key)) for key in path[places[-1] + 1 :])
            named[name if name not in named else jax.tree_util.keystr(path)] = leaf
    return grad_start, named
