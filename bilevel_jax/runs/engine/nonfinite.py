"""Locator of the first non-finite number in training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.training import inner_loss_and_grad
from bilevel_jax.core.types import PADDING, Batch, Frozen, Hyper, Params, Problem, TrainState
from bilevel_jax.runs.infra.distributed import fetch_from_first, fetch_to_host

ExampleLosses = Callable[[Params, Frozen, Batch], jax.Array]
MAX_NAMED_EXAMPLES = 3
"""Rows that a message names."""


def find_first_nonfinite(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    losses: ExampleLosses,
    state: TrainState,
    last_step: int,
    fixed: Frozen,
    step_inputs: Callable[[int], tuple[Hyper, Batch]],
    example_name: Callable[[int], str],
) -> str:
    """In words: the first number that is not finite when steps state.step .. last_step are taken again.

    Looks, in each step, at what is computed in this order: the parameters, the loss of each row (`losses`, as of a
    micro-batch), the gradient, the parameters after the update. `step_inputs` gives the weights and the batch of a
    step, `example_name` the name of an example by its index. Where nothing is found (another rounding than the first
    time, as may be on a GPU) it says so. Of several processes all look, and go by what the first one finds.
    """
    example_losses = jax.jit(
        lambda params, fixed, batch: jax.lax.map(lambda micro: losses(params, fixed, micro), batch)
    )
    loss_gradient = jax.jit(
        lambda params, part, fixed, batch: inner_loss_and_grad(problem, params, part, fixed, batch)[1]
    )
    update = jax.jit(optimizer.update)
    gather, apply_updates = jax.jit(problem.gather), jax.jit(optax.apply_updates)
    for step in range(int(state.step), last_step + 1):
        if leaf := _nonfinite_leaf(state.params):
            return f"{leaf} of the parameters is not finite before step {step}"
        hyper, batch = step_inputs(step)
        index, values = fetch_to_host(batch["index"]), fetch_from_first(example_losses(state.params, fixed, batch))
        present = index != PADDING
        nonfinite = index[present & ~np.isfinite(values)]
        if len(nonfinite):
            return f"at step {step} the loss of {_list_examples(nonfinite, example_name)} is not finite"
        grad = loss_gradient(state.params, gather(hyper, batch), fixed, batch)
        if leaf := _nonfinite_leaf(grad):
            examples = _describe_step(index[present], example_name)
            return f"at step {step} every loss is finite, and the gradient of {leaf} is not; {examples}"
        updates, opt = update(grad, state.opt_state, state.params)
        state = TrainState(apply_updates(state.params, updates), opt, jnp.asarray(step + 1))
        if leaf := _nonfinite_leaf(state.params):
            return f"the update of step {step} made {leaf} not finite; {_describe_step(index[present], example_name)}"
    return "taken again, those steps stayed finite: the numbers are not repeated to the bit here"


def _nonfinite_leaf(tree: Any) -> str:
    """The path of the first leaf that is not finite, or nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    fine = fetch_from_first(np.array(jax.device_get(_find_finite([leaf for _, leaf in leaves]))))
    broken = (path for (path, _), ok in zip(leaves, fine, strict=True) if not ok)
    return next((jax.tree_util.keystr(path, simple=True, separator="/") for path in broken), "")


@jax.jit
def _find_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    """Whether each is finite: one program, as those of several processes may wait for each other array by array."""
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _list_examples(indices: np.ndarray, example_name: Callable[[int], str]) -> str:
    more = f" and {len(indices) - MAX_NAMED_EXAMPLES} more" if len(indices) > MAX_NAMED_EXAMPLES else ""
    return ", ".join(example_name(int(row)) for row in indices[:MAX_NAMED_EXAMPLES]) + more


def _describe_step(indices: np.ndarray, example_name: Callable[[int], str]) -> str:
    return f"the step held {_list_examples(indices, example_name)}"
