"""Folds of the validation set that take turns to judge while the others train."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core import certify
from bilevel_jax.core.streams import halve_stream
from bilevel_jax.core.types import Stream
from bilevel_jax.runs.infra.placement import keep_batches, replicate
from bilevel_jax.runs.tasks.evaluation import num_judges
from bilevel_jax.runs.tasks.protocol import Task


class Turn(NamedTuple):
    """Who trains and who judges in one outer step."""

    trained: Int[np.ndarray, "trained"]
    """Indices in the corpus: the training examples, then the validation examples that do not judge."""
    judges: Int[np.ndarray, "judges"]
    """Places in the validation set, in order."""


def take_turn(task: Task, num_folds: int, seed: int, step: int, *, key: str = "outer.validation_folds") -> Turn | None:
    """The turn of an outer step: fold `step` modulo the number of folds judges; None without folds.

    The folds are drawn once, from the seed, and differ in size by one example at most. `key` is that which asks for
    them, for the error where there are fewer examples.
    """
    if not num_folds:
        return None
    kept = task.validation_indices()
    if len(kept) < num_folds:
        raise ValueError(
            f"{key} = {num_folds}, and each fold needs a validation example, of which there are {len(kept)}. Lower "
            "it, or give more."
        )
    order = np.random.default_rng((seed, 4)).permutation(len(kept))
    is_judge = np.zeros(len(kept), bool)
    is_judge[order[step % num_folds :: num_folds]] = True
    return Turn(np.concatenate([task.trainable_indices(), kept[~is_judge]]), kept[is_judge] - task.num_examples)


def end_turn(task: Task, num_folds: int) -> Turn | None:
    """The turn of a training after the steps: all of validation trains, and nobody judges; None without folds."""
    if not num_folds:
        return None
    return Turn(np.concatenate([task.trainable_indices(), task.validation_indices()]), np.zeros(0, int))


def leave_out_fold(task: Task, num_folds: int, seed: int, fold: int) -> Turn:
    """The turn in which all validation examples but those of one fold judge, and the training examples alone train."""
    kept, judges_of_fold = task.validation_indices(), take_turn(task, num_folds, seed, fold, key="rater.folds")
    assert judges_of_fold is not None
    others = np.setdiff1d(kept - task.num_examples, judges_of_fold.judges)
    return Turn(task.trainable_indices(), others)


def turn_training_stream(task: Task, seed: int, turn: Turn | None) -> Stream:
    """The batches of a training run in the outer loop, which reads them on its way back, too."""
    return keep_batches(
        task.training_stream(seed) if turn is None else task.training_stream(seed, turn.trained, packed=False)
    )


def turn_full_pass_stream(task: Task, turn: Turn | None) -> Stream:
    """All examples that are trained on once, as a stream that sums to their mean loss."""
    return task.full_pass_stream(0) if turn is None else task.full_pass_stream(0, turn.trained)


def turn_validation_stream(task: Task, turn: Turn | None) -> Stream:
    """A stream that sums to the mean loss of the validation examples that judge."""
    if turn is None:
        return task.held_out_streams["validation"]
    return _scale_validation(task, _spread(task, turn, np.ones(len(turn.judges))))


def halved_validation_stream(task: Task, seed: int, turn: Turn) -> Stream:
    """A stream that sums to half the difference of the mean losses of two halves of the judges, drawn from the seed."""
    return _scale_validation(task, judge_halves(task, seed, turn))


def judge_halves(task: Task, seed: int, turn: Turn) -> Float[np.ndarray, "validation"]:
    """The factors of the validation examples in that difference, in the order of `held_out_examples`; 0 for those that
    do not judge."""
    return _spread(task, turn, certify.validation_halves(len(turn.judges), seed))


def count_judges(task: Task, turn: Turn | None) -> int:
    """How many validation examples judge."""
    return num_judges(task) if turn is None else len(turn.judges)


def _spread(task: Task, turn: Turn, factors: Float[np.ndarray, "judges"]) -> Float[np.ndarray, "validation"]:
    """The factors at the places of the judges, for a stream whose denominator counts all validation examples."""
    spread = np.zeros(len(task.held_out_examples["validation"]))
    spread[turn.judges] = factors * (num_judges(task) / len(turn.judges))
    return spread


def _scale_validation(task: Task, factors: Float[np.ndarray, "validation"]) -> Stream:
    placed = replicate(task.mesh, factors.astype(jnp.result_type(float)))
    return halve_stream(task.held_out_streams["validation"], placed)
