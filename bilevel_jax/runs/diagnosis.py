"""Where a training first met a number that is not finite: the step, the tensor, the rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.transition import gradient
from bilevel_jax.core.types import PADDING, Batch, Fixed, Hyper, Inner, Params, Problem
from bilevel_jax.runs.processes import fetch

Losses = Callable[[Params, Fixed, Batch], jax.Array]
NAMED = 3
"""Rows that a message names."""


def first_broken(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    losses: Losses,
    state: Inner,
    upto: int,
    fixed: Fixed,
    at: Callable[[int], tuple[Hyper, Batch]],
    name: Callable[[int], str],
) -> str:
    """In words: the first number that is not finite when steps state.step .. upto are taken again.

    Looks, in each step, at what is computed in this order: the parameters, the loss of each row (`losses`, as of a
    micro-batch), the gradient, the parameters after the update. `at` gives a step's weights and batch, `name` a row's
    name by its index. Where nothing is found (another rounding than the first time, as may be on a GPU) it says so.
    """
    by_row = jax.jit(lambda params, fixed, batch: jax.lax.map(lambda micro: losses(params, fixed, micro), batch))
    slope = jax.jit(lambda params, part, fixed, batch: gradient(problem, params, part, fixed, batch)[1])
    update = jax.jit(optimizer.update)
    for step in range(int(state.step), upto + 1):
        if bad := _leaf(state.params):
            return f"{bad} of the parameters is not finite before step {step}"
        hyper, batch = at(step)
        index, values = fetch(batch["index"]), fetch(by_row(state.params, fixed, batch))
        present = index != PADDING
        rows = index[present & ~np.isfinite(values)]
        if len(rows):
            return f"at step {step} the loss of {_named(rows, name)} is not finite"
        grad = slope(state.params, problem.take(hyper, batch), fixed, batch)
        if bad := _leaf(grad):
            held = _held(index[present], name)
            return f"at step {step} every loss is finite, and the gradient of {bad} is not; {held}"
        updates, opt = update(grad, state.opt, state.params)
        state = Inner(optax.apply_updates(state.params, updates), opt, jnp.asarray(step + 1))
        if bad := _leaf(state.params):
            return f"the update of step {step} made {bad} not finite; {_held(index[present], name)}"
    return "taken again, those steps stayed finite: the numbers are not repeated to the bit here"


def _leaf(tree: Any) -> str:
    """The path of the first leaf that is not finite, or nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    fine = jax.device_get([jnp.isfinite(leaf).all() for _, leaf in leaves])
    broken = (path for (path, _), ok in zip(leaves, fine, strict=True) if not ok)
    return next((jax.tree_util.keystr(path, simple=True, separator="/") for path in broken), "")


def _named(rows: np.ndarray, name: Callable[[int], str]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(name(int(row)) for row in rows[:NAMED]) + more


def _held(rows: np.ndarray, name: Callable[[int], str]) -> str:
    return f"the step held {_named(rows, name)}"
