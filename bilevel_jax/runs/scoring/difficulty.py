"""Whether weights or scores merely order the examples by their length or by their loss before training."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core.types import Params
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.scores import example_losses
from bilevel_jax.runs.stats import rank_correlation
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.text import TextTask

LARGE_CORRELATION = 0.8
"""Rank correlation from which on an order is told as that of length or loss: of two Gaussian variables with it 58 % of
the upper tenth, 71 % of the upper three tenths and 80 % of the upper half are the same examples. The best examples can
lose to random ones without any such order: in tests/benchmarks/difficulty.py the correlations with length, with loss
before training and with loss at the end of training are .1 at most, in the mean over seeds, and yet the best tenth is
worse to train on than a random one. Its 26 examples are shorter, but by no more than 26 random ones could be by chance.
Retraining beside random examples tells."""
MIN_EXAMPLES = 10
"""Of fewer examples chance alone reaches it more often than once in 200 times."""
END_NAMES = {"length": ("longest", "shortest"), "loss": ("hardest", "easiest")}
MEASURE_NAMES = {"length": "length in tokens", "loss": "loss before training"}


class DifficultyCorrelation(NamedTuple):
    """Spearman's rank correlations of one number per example with what makes gradients large; nan where none exists."""

    length: float
    """With the tokens of the example, both sides of a pair."""
    loss: float
    """With its loss under the model before training."""
    num_examples: int

    def describe(self, what: str, strata: Sequence[str] = ()) -> str:
        """One sentence where a correlation is large, else nothing.

        Args:
            what: the plural that orders the examples.
            strata: values of selection.strata that the reader could set, and has not.
        """
        large = {
            name: value
            for name, value in (("length", self.length), ("loss", self.loss))
            if abs(value) > LARGE_CORRELATION and self.num_examples >= MIN_EXAMPLES
        }
        if not large:
            return ""
        orders = " and ".join(f"{MEASURE_NAMES[name]} ({value:+.2f})" for name, value in large.items())
        remedies = [
            f"; selection.strata: {name} selects the best of each group of like {name}"
            for name in large
            if name in strata
        ]
        ends = " and ".join(END_NAMES[name][value < 0] for name, value in large.items())
        return (
            f"{what[0].upper()}{what[1:]} order the examples nearly by {orders.replace('-', '−')}, as rank "
            f"correlation: the {ends} come first. Length and loss make gradients large whatever an example teaches, so "
            f"compare with {' or '.join(MEASURE_NAMES[name] for name in large)} alone, and with random examples"
            f"{''.join(remedies)}."
        )

    def to_json(self, what: str, strata: Sequence[str] = ()) -> dict[str, Any]:
        """The numbers, None where there is none, and the sentence; see `describe`."""
        values = {name: value if math.isfinite(value) else None for name, value in zip(END_NAMES, self, strict=False)}
        return values | {"sentence": self.describe(what, strata)}


class Difficulty(NamedTuple):
    """What is known of the examples before training."""

    lengths: Int[np.ndarray, "examples"] | None
    """Tokens, as training sees them; None for arrays."""
    losses: Float[np.ndarray, "examples"]
    """Under the model before training; nan for an example that is not trained on."""
    rows: Int[np.ndarray, "kept"]
    """The examples that are trained on."""

    def correlate(self, values: Float[np.ndarray, "examples"]) -> DifficultyCorrelation:
        """The rank correlations of `values` with length and loss; nan where one of the two is constant."""
        kept = np.asarray(values, float)[self.rows]
        finite = np.isfinite(kept) & np.isfinite(self.losses[self.rows])
        rows, kept = self.rows[finite], kept[finite]
        if not len(rows):
            return DifficultyCorrelation(math.nan, math.nan, 0)
        length = math.nan if self.lengths is None else rank_correlation(kept, self.lengths[rows].astype(float))
        return DifficultyCorrelation(length, rank_correlation(kept, self.losses[rows]), len(rows))


def measure_difficulty(task: Task, start: Params) -> Difficulty:
    """Tokens and losses of the training examples under the model before training: one forward pass over them."""
    return Difficulty(_count_tokens(task), example_losses(task, start), task.trainable_indices())


def measure_difficulty_once(task: Task, make_start: Callable[[], Params], session: Session) -> Difficulty:
    """As `measure_difficulty`, with the losses of the first process of a run: on another device they would be rounded
    otherwise on resume, and what is selected by them would change after its retrains."""
    losses = session.run_once("losses before training", lambda: example_losses(task, make_start()).tolist())
    return Difficulty(_count_tokens(task), np.array(losses, float), task.trainable_indices())


def _count_tokens(task: Task) -> Int[np.ndarray, "examples"] | None:
    if not isinstance(task, TextTask):
        return None
    return task.corpus.lengths.reshape(-1, task.corpus.sequences_per_example).sum(1)[: task.num_examples]
