"""Losses and other per-example values of a model, and what is known of the examples' labels."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.core.types import PADDING, Batch, Frozen, Params, Stream
from bilevel_jax.lm.data.examples import normalize_name
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.stats import auc
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import PART_NAMES
from bilevel_jax.runs.tasks.targets import OuterObjective, split_by_target


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

    @jax.jit
    def map_batch(params: Params, frozen: Frozen, batch: Batch) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # as the loss that is differentiated
            return jax.lax.map(lambda micro: function(params, frozen, micro), batch)

    return map_batch


def held_out_indices(stream: Stream) -> Int[np.ndarray, "kept"]:
    """The indices of the examples that a stream holds, ascending."""
    index = np.concatenate([fetch_to_host(stream.batch(step)["index"]).ravel() for step in range(stream.steps)])
    return np.sort(index[index != PADDING])


def judge_places(task: Task) -> Int[np.ndarray, "judges"]:
    """The places in `held_out_examples` of the validation rows that judge: those that are not too long, and one for a
    target without examples."""
    if "validation" not in task.held_out_streams:
        return np.zeros(0, np.int64)
    return held_out_indices(task.held_out_streams["validation"])


def num_judges(task: Task) -> int:
    """How many validation rows judge."""
    return len(judge_places(task))


def judges_by_examples(task: Task) -> bool:
    """Whether the validation loss is a mean over examples, of which there are others; not of the parameters alone."""
    return any(target.has_examples for target in task.outer_objective.targets)


def is_validation_trainable(task: Task) -> bool:
    """Whether the validation examples judge by the training loss, so that models can be trained on them."""
    return len(task.validation_indices()) > 0


def is_one_trainable_set(task: Task) -> bool:
    """Whether, besides, they are one target."""
    return is_validation_trainable(task) and len(task.outer_objective.targets) == 1


def held_out_losses(
    task: Task,
    loss_fn: Callable[[Params, Frozen, Stream], jax.Array],
    params: Params,
    frozen: Frozen,
    validation: Stream | None = None,
) -> dict[str, float | None]:
    """The mean loss on validation, dev and test; None for a part without examples.

    `validation` replaces the stream of all validation examples.
    """
    streams = task.held_out_streams | ({} if validation is None else {"validation": validation})
    return {part: float(loss_fn(params, frozen, streams[part])) if part in streams else None for part in PART_NAMES}


def accuracy(task: Task, params: Params, frozen: Frozen, part: str) -> float | None:
    """The mean accuracy on one part of the held-out examples, of the first target that has one; None without any."""
    outer = task.outer_objective
    if not accuracy_name(task):
        return None
    stream, num_examples = task.held_out_streams[part], len(task.held_out_examples[part])
    values = evaluate_per_example(outer.accuracy, params, frozen, stream, num_examples)
    return next(
        float(values[rows].mean())
        for target, rows in zip(outer.targets, rows_by_target(task, part), strict=True)
        if target.accuracy is not None
    )


def accuracy_name(task: Task) -> str:
    """What `accuracy` is called, and of which target of several; nothing where no target has one."""
    targets = task.outer_objective.targets
    first = next((target for target in targets if target.accuracy is not None), None)
    if first is None:
        return ""
    return first.accuracy_name if len(targets) == 1 else f"{first.accuracy_name} of {first.name}"


def count_examples(task: Task) -> dict[str, int]:
    """The number of examples of each part; a target that reads the parameters alone has none."""
    targets = task.outer_objective.targets
    return {
        part: sum(size for target, size in zip(targets, sizes, strict=True) if target.has_examples)
        for part, sizes in task.target_sizes.items()
    }


def count_judging_examples(task: Task) -> int:
    """The number of validation examples that judge: those that are neither too long nor left out."""
    rows_of_targets = rows_by_target(task, "validation")
    targets = task.outer_objective.targets
    return sum(len(rows) for target, rows in zip(targets, rows_of_targets, strict=True) if target.has_examples)


def has_target_readings(task: Task) -> bool:
    """Whether there are several targets to read, judging or not."""
    return len(task.outer_objective.targets) > 1 or task.reported is not None


def list_target_facts(task: Task) -> list[dict[str, Any]]:
    """Name, coefficient, unit and name of the accuracy of each target, for result.json; those that judge nothing, of
    coefficient 0, last."""
    return [
        {
            "name": target.name,
            "coefficient": target.coefficient,
            "unit": target.unit,
            "accuracy_name": target.accuracy_name,
        }
        for target in (*task.outer_objective.targets, *(task.reported.objective.targets if task.reported else ()))
    ]


def read_targets(task: Task, params: Params, frozen: Frozen, part: str) -> list[dict[str, Any]]:
    """The mean loss and the accuracy of each target on one part, in its own unit, in the order of `list_target_facts`;
    None for one that is not read there."""
    places = range(len(task.outer_objective.targets))
    sizes = dict(zip(places, task.target_sizes[part], strict=True))
    readings = _read_stream(task.outer_objective, task.held_out_streams[part], sizes, params, frozen)
    if task.reported is None:
        return readings
    beside = task.reported
    sizes = {one.place: one.num_rows for one in beside.corpora.get(part, ())}
    return readings + _read_stream(beside.objective, beside.streams.get(part), sizes, params, frozen)


def _read_stream(
    objective: OuterObjective, stream: Stream | None, sizes: Mapping[int, int], params: Params, frozen: Frozen
) -> list[dict[str, Any]]:
    """`read_targets` of a stream; `sizes` are the numbers of rows of the targets that it holds, by their place."""
    readings: list[dict[str, Any]] = [
        {"name": target.name, "loss": None, "accuracy": None} for target in objective.targets
    ]
    if stream is None:
        return readings
    num_examples = sum(sizes.values())
    losses = evaluate_per_example(objective.unscaled_losses, params, frozen, stream, num_examples)
    accuracies = evaluate_per_example(objective.accuracy, params, frozen, stream, num_examples)
    rows_of_targets = split_by_target(held_out_indices(stream), list(sizes.values()))
    for place, rows in zip(sizes, rows_of_targets, strict=True):
        readings[place]["loss"] = float(losses[rows].mean())
        if objective.targets[place].accuracy is not None:
            readings[place]["accuracy"] = float(accuracies[rows].mean())
    return readings


def rows_by_target(task: Task, part: str) -> list[Int[np.ndarray, "kept"]]:
    """The rows of each target that the stream of a part holds: others have no value, and a nan among these is one."""
    return split_by_target(held_out_indices(task.held_out_streams[part]), task.target_sizes[part])


def headline_part(task: Task) -> str:
    """The part whose accuracy is reported: test, or validation where there is no test."""
    return "test" if "test" in task.held_out_streams else "validation"


class KnownLabels(NamedTuple):
    """Which training examples are labelled, and which of them are good. Of the others nobody knows: they count as
    neither."""

    good: Bool[np.ndarray, "examples"]
    labelled: Bool[np.ndarray, "examples"]
    """Of the examples that are trained on."""
    num_unlabelled: int
    """Examples that are trained on, without a label."""

    def auc(self, scores: Float[np.ndarray, "examples"]) -> float:
        """P(score of a good example > score of a labelled other one); nan unless both kinds are there."""
        return auc(scores[self.labelled], self.good[self.labelled])

    def f1(self, kept: Bool[np.ndarray, "examples"]) -> float:
        """2 |kept and good| / (|kept| + |good|) over the labelled examples."""
        kept = kept & self.labelled
        return float(2 * (kept & self.good).sum() / max(1, kept.sum() + self.good.sum()))

    def to_counts(self) -> dict[str, int]:
        """How many examples are good, labelled otherwise, and not labelled."""
        num_good = int(self.good.sum())
        return {"good": num_good, "other": int(self.labelled.sum()) - num_good, "unlabelled": self.num_unlabelled}


def read_labels(task: Task, data: DataSection) -> KnownLabels | None:
    """What data.label_field and data.good_label say of the training examples; None where the data have no labels."""
    labels = [example.label for example in task.examples]
    if not data.label_field or all(label is None for label in labels):
        return None
    trained = np.zeros(len(labels), bool)
    trained[task.trainable_indices()] = True
    good_label = normalize_name(data.good_label)
    has_label = np.array([label is not None for label in labels])
    return KnownLabels(
        good=np.array([label == good_label for label in labels]) & has_label & trained,
        labelled=has_label & trained,
        num_unlabelled=int((trained & ~has_label).sum()),
    )
