"""Pooled steps of the weights, with losses under models of the validation set as features."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from bilevel_jax.core.weightings import (
    PartReliability,
    Parts,
    PoolingFeatures,
    measure_part_reliability,
    pool_contributions,
    rank_curves,
    split_contributions,
)
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.infra.distributed import fetch_from_first
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.scores import example_losses, steps_per_epoch, train_side_model
from bilevel_jax.runs.tasks.evaluation import is_one_trainable_set, num_judges
from bilevel_jax.runs.tasks.protocol import Task

LEAST_VALIDATION_EXAMPLES = 4
"""With fewer, a half of the validation set would be one example."""


class PoolingState(NamedTuple):
    """What pooled steps keep from one outer step to the next."""

    losses: "ValidationModelLosses"
    earlier: Parts
    """Of the last step that measured two halves of the validation set."""


class ValidationModelLosses(NamedTuple):
    """The loss of each training example, nats, under models trained on validation alone; nan for a dropped one."""

    first_half: Float[np.ndarray, "examples"]
    second_half: Float[np.ndarray, "examples"]
    whole: Float[np.ndarray, "examples"]


def why_not_pooled(outer: OuterSection, num_validation: int, *, is_trainable: bool = True) -> str:
    """Why the steps of a run cannot be pooled, in words; nothing where they can.

    `is_trainable`: models can be trained on the validation examples, which are one set.
    """
    if outer.weighting not in ("softmax", "sigmoid"):
        return f"a step is pooled over logits of single examples, and outer.weighting is {outer.weighting}"
    if outer.validation_folds:
        return "pooling compares two halves of the validation set, and with outer.validation_folds they also train"
    if not is_trainable:
        return (
            "pooling compares examples by models of two halves of one validation set, and here its examples judge by "
            "another loss than that of training, or are several targets"
        )
    if num_validation < LEAST_VALIDATION_EXAMPLES:
        return (
            f"pooling compares two halves of the validation set, and it has {format_count('example', num_validation)}; "
            f"{LEAST_VALIDATION_EXAMPLES} or more are needed"
        )
    if outer.reliability_every == 0:
        return "pooling compares two halves of the validation set, which outer.reliability_every = 0 never measures"
    return ""


def pools_steps(task: Task, outer: OuterSection) -> bool:
    """Whether the steps of the weights are pooled; a ValueError where outer.estimate wants what cannot be."""
    if outer.estimate == "per_example":
        return False
    reason = why_not_pooled(outer, num_judges(task), is_trainable=is_one_trainable_set(task))
    if reason and outer.estimate == "pooled":
        raise ValueError(f"outer.estimate = pooled: {reason}. Set outer.estimate to per_example, or to auto.")
    return not reason


def describe_fallback(task: Task, outer: OuterSection) -> str:
    """That outer.estimate = auto makes per-example steps, and why, in words; nothing where it pools."""
    if outer.estimate != "auto":
        return ""
    reason = why_not_pooled(outer, num_judges(task), is_trainable=is_one_trainable_set(task))
    return f"outer.estimate = auto makes per-example steps: {reason}." if reason else ""


def pooling_work(task: Task, outer: OuterSection) -> float:
    """What the models of pooled steps take, in training steps; 0 where steps are not pooled."""
    return count_validation_models_work(task.num_steps, steps_per_epoch(task)) if pools_steps(task, outer) else 0.0


class StepPooling:
    """The pooled steps of one outer loop, with the features that they share."""

    def __init__(
        self,
        task: Task,
        session: Session,
        halves: Float[np.ndarray, "validation"],
        *,
        estimate: str,
        train_seed: int,
        multiplicity: Float[np.ndarray, "table"] | None = None,
    ):
        """`multiplicity` says how often each example counts; None: once. Contributions and directions are then those
        of one whole example."""
        self.task, self.session, self.halves = task, session, halves
        self.estimate, self.train_seed, self.multiplicity = estimate, train_seed, multiplicity
        self._features: PoolingFeatures | None = None

    def take(
        self,
        state: PoolingState,
        hyper_grad: Float[Array, "table"],
        difference: Float[Array, "table"] | None,
        uniform_losses: Float[Array, "table"],
        last: PartReliability | None,
    ) -> tuple[Float[Array, "table"], PartReliability, PoolingState]:
        """(the direction of a step, how reliable its parts are, the next state).

        `difference` is that of the halves of the validation set, None in a step that did not measure it, which goes by
        the reliability of the `last` step; that is None in the first, which trains the models of the validation set.
        """
        if last is None:
            losses = measure_validation_model_losses(self.task, self.halves, self.session, train_seed=self.train_seed)
            self.session.advance(count_validation_models_work(self.task.num_steps, steps_per_epoch(self.task)))
            state = state._replace(losses=losses)
        if self._features is None:
            features = make_pooling_features(
                fetch_from_first(uniform_losses), state.losses, len(hyper_grad), self.multiplicity
            )
            self._features = replicate(self.task.mesh, features)
        factors = np.array([self.halves.max(), self.halves.min()], hyper_grad.dtype)
        half = jnp.zeros_like(hyper_grad) if difference is None else difference
        if self.multiplicity is not None:  # sums over examples count each by its multiplicity: the root in each factor
            root = np.sqrt(np.asarray(self.multiplicity, hyper_grad.dtype))
            hyper_grad, half = root * hyper_grad, root * half
        parts = split_halves(self._features, factors, hyper_grad, half)
        reliability = last or PartReliability(0.0, 0.0)
        if difference is not None:
            measured = measure_part_reliability(parts, state.earlier) if last else measure_first_reliability(parts)
            reliability = PartReliability(*fetch_from_first(jnp.stack(measured)).tolist())
            state = state._replace(earlier=replicate(self.task.mesh, parts))
        relied_on = PartReliability(1.0, 0.0) if self.estimate == "pooled" else reliability
        direction = pool_contributions(parts, relied_on)
        if self.multiplicity is not None:
            direction = direction / np.maximum(root, np.finfo(root.dtype).tiny)  # 0 where it counts nothing
        return direction, reliability, state


def empty_pooling_state(mesh: Mesh, num_examples: int, table: Float[Array, "table"]) -> PoolingState:
    """The state before the first step, shaped and placed as all later ones: a checkpoint is restored to its places."""
    unknown, halves = np.zeros(num_examples), jnp.zeros((2, *table.shape), table.dtype)
    return PoolingState(ValidationModelLosses(unknown, unknown, unknown), replicate(mesh, Parts(halves, halves, table)))


@jax.jit
def split_halves(
    features: PoolingFeatures,
    half_factors: Float[Array, "2"],
    contributions: Float[Array, "table"],
    difference: Float[Array, "table"],
) -> Parts:
    """The parts of a step whose half h of the validation set contributes `contributions + half_factors[h] difference`.

    Where no difference of halves was measured it is 0: both halves contribute the same.
    """
    return split_contributions(features, contributions[None] + half_factors[:, None] * difference[None])


def measure_first_reliability(parts: Parts) -> PartReliability:
    """Where nothing is known of another training: the shared part counts as far as the halves agree, own parts not."""
    return PartReliability(measure_part_reliability(parts, parts).shared, jnp.zeros(()))


def measure_validation_model_losses(
    task: Task, halves: Float[np.ndarray, "validation"], session: Session, *, train_seed: int
) -> ValidationModelLosses:
    """Train a model on each half of the validation set and one on all of it, and read the training examples' losses.

    Each is trained as the run trains, from the same start, and resumed where it was stopped. `halves` is above 0 for
    the examples of the first half and below 0 for those of the second.
    """
    of_validation = task.num_examples + np.arange(len(halves))
    sets = {
        "first_half": of_validation[halves > 0],
        "second_half": of_validation[halves < 0],
        "whole": of_validation[halves != 0],
    }
    losses = {}
    for name, indices in sets.items():
        session.set_phase(f"training a model on validation ({name.replace('_', ' ')})")
        params = train_side_model(
            task, f"validation_{name}", indices, seed=train_seed, steps=task.num_steps, session=session
        )
        losses[name] = fetch_from_first(example_losses(task, params))
    return ValidationModelLosses(**losses)


def count_validation_models_work(num_steps: int, epoch_steps: float) -> float:
    """What `measure_validation_model_losses` takes, in training steps, of which an epoch has `epoch_steps`."""
    return len(ValidationModelLosses._fields) * (num_steps + epoch_steps / 3)


def make_pooling_features(
    uniform_losses: Float[np.ndarray, "table"],
    losses: ValidationModelLosses,
    table_size: int,
    multiplicity: Float[np.ndarray, "examples"] | None = None,
) -> PoolingFeatures:
    """Curves of two losses of an example: after uniform training, and under a model of the validation set.

    Entries beyond the examples, to `table_size`, are padding. With `multiplicity` each row is multiplied by its root,
    so that sums of squares over the examples count each as often as it says.
    """
    num_examples = len(losses.whole)
    known = np.isfinite(losses.whole)
    uniform = rank_curves(np.where(known, np.asarray(uniform_losses)[:num_examples], np.nan), multiplicity=multiplicity)

    def columns(validation_losses: Float[np.ndarray, "examples"]) -> np.ndarray:
        curves = np.concatenate([uniform, rank_curves(validation_losses, multiplicity=multiplicity)], axis=1)
        if multiplicity is not None:
            curves = np.sqrt(np.asarray(multiplicity, float))[:, None] * curves
        return np.pad(curves, ((0, table_size - num_examples), (0, 0)))

    by_half = np.stack([columns(losses.second_half), columns(losses.first_half)])
    dtype = jnp.result_type(float)
    return PoolingFeatures(jnp.asarray(by_half, dtype), jnp.asarray(columns(losses.whole), dtype))
