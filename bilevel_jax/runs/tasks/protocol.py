"""Common interface of text and array training tasks."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int

from bilevel_jax.core.types import Frozen, Params, Problem, Stream, TrainStep
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.tasks.objective import Objective
from bilevel_jax.runs.tasks.targets import OuterObjective, ReportedTargets


class ExampleTable(Protocol):
    """The examples of training and validation in one table."""

    @property
    def num_examples(self) -> int:
        """The number of training and validation examples together."""


class Task(Protocol):
    """The data, the model, the bilevel problem and the streams of batches of a run; every array lies on the mesh.

    `TextTask` and `ArrayTask` are the two implementations. The engine, the scores and the commands `compare` and
    `audit` use these members alone.
    """

    @property
    def examples(self) -> list[Example]:
        """The N training examples, which get weights: the first N of `corpus`."""

    @property
    def held_out_examples(self) -> dict[str, Any]:
        """The examples of validation (the last ones of `corpus`, where they are of the kind that is trained on), of dev
        and of test; only parts that have some."""

    @property
    def notes(self) -> list[str]:
        """Sentences about the data that a person should know: duplicates, leaks, truncation."""

    @property
    def corpus(self) -> ExampleTable:
        """The training examples, then those of validation."""

    @property
    def held_out_streams(self) -> dict[str, Stream]:
        """For each part in `held_out_examples` a stream that sums to the mean loss of its examples."""

    @property
    def base_params(self) -> Params | None:
        """The frozen base model under LoRA; None where all parameters are trained."""

    @property
    def init_params(self) -> Callable[[int], Params]:
        """seed -> parameters at the start of training."""

    @property
    def problem(self) -> Problem:
        """The inner (training) and the outer (validation) loss."""

    @property
    def objective(self) -> Objective:
        """The loss and the accuracy of one training example, and their names."""

    @property
    def outer_objective(self) -> OuterObjective:
        """What validation, dev and test examples judge by."""

    @property
    def reported(self) -> ReportedTargets | None:
        """The targets that dev and test read beside `outer_objective`, and that judge nothing."""

    @property
    def target_sizes(self) -> dict[str, list[int]]:
        """The number of rows of each target of `outer_objective` in each part, which stand in that order."""

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the parameters."""

    @property
    def train_step(self) -> TrainStep:
        """One compiled training step and its transpose."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one training run."""

    @property
    def batch_size(self) -> int:
        """Examples in one step, over all devices."""

    @property
    def mesh(self) -> Mesh:
        """The devices."""

    @property
    def num_examples(self) -> int:
        """N, the size of the weight table."""

    def frozen(self, start: Params) -> Frozen:
        """The constants of the losses: the base model and, with a proximal term, the start of training."""

    def training_stream(
        self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None, *, packed: bool = True
    ) -> Stream:
        """The batches of a training run: epochs over some examples of the corpus (default: all N with weights)."""

    def validation_stream(self, seed: int) -> Stream:
        """Batches of validation examples in epochs of their own, for methods that step on L_v as they train; of several
        targets tuples, a batch of each."""

    def full_pass_stream(self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None) -> Stream:
        """Some examples of the corpus (default: the N with weights) once, in random order, as a stream that sums to
        their mean loss."""

    def trainable_indices(self) -> Int[np.ndarray, "kept"]:
        """The training examples that are not dropped as too long."""

    def validation_indices(self) -> Int[np.ndarray, "kept"]:
        """The corpus indices of the validation examples; none where they are of another kind than is trained on."""
