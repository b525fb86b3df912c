"""Losses and other per-example values of a model, read from a stream."""

from collections.abc import Callable
from functools import lru_cache

import jax
import numpy as np
from jaxtyping import Bool, Float

from bilevel_jax.core.types import PADDING, Batch, Frozen, Params, Stream
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import PART_NAMES


def evaluate_per_example(
    function: Callable[[Params, Frozen, Batch], Float[jax.Array, "examples *rest"]],
    params: Params,
    frozen: Frozen,
    stream: Stream,
    num_examples: int,
) -> Float[np.ndarray, "examples *rest"]:
    """`function` of each example of a stream, by its index; nan for examples that the stream does not hold."""
    compiled = _map_micro_batches(function)
    example_values: np.ndarray | None = None
    for step in range(stream.steps):
        batch = stream.batch(step)
        index, values = fetch_to_host(batch["index"]), fetch_to_host(compiled(params, frozen, batch))
        if example_values is None:
            example_values = np.full((num_examples, *values.shape[2:]), np.nan)
        example_values[index[index != PADDING]] = values[index != PADDING]
    assert example_values is not None  # a stream has at least one step
    return example_values


@lru_cache(maxsize=8)
def _map_micro_batches(function: Callable) -> Callable:
    """`function` of each micro-batch, compiled; cached, as a comparison evaluates the same function again and again."""
    return jax.jit(lambda params, frozen, batch: jax.lax.map(lambda micro: function(params, frozen, micro), batch))


def held_out_losses(
    task: Task, loss_fn: Callable[[Params, Frozen, Stream], jax.Array], params: Params, frozen: Frozen
) -> dict[str, float | None]:
    """The mean loss on validation, dev and test; None for a part without examples."""
    return {
        part: float(loss_fn(params, frozen, task.held_out_streams[part])) if part in task.held_out_streams else None
        for part in PART_NAMES
    }


def accuracy(task: Task, params: Params, frozen: Frozen, part: str) -> float:
    """The mean accuracy on one part of the held-out examples, as the objective defines it."""
    stream, num_examples = task.held_out_streams[part], len(task.held_out_examples[part])
    return float(np.nanmean(evaluate_per_example(task.objective.accuracy, params, frozen, stream, num_examples)))


def headline_part(task: Task) -> str:
    """The part whose accuracy is reported: test, or validation where there is no test."""
    return "test" if "test" in task.held_out_streams else "validation"


def good_label_mask(task: Task, data: DataSection) -> Bool[np.ndarray, "examples"] | None:
    """Which training examples have the label data.good_label; None where the data have no labels."""
    labels = [example.label for example in task.examples]
    if not data.label_field or all(label is None for label in labels):
        return None
    return np.array([label == data.good_label for label in labels])
