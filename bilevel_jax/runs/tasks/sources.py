"""Data sources of a task, and mixtures of them as example weights."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.data.files import source_name
from bilevel_jax.runs.tasks.protocol import Task

Mixture = Float[np.ndarray, "sources"]
"""The share of each source in the weight of all examples; at least 0, of sum 1."""


class Sources(NamedTuple):
    """The sources of a task's training examples, in the order of their names."""

    names: list[str]
    indices: Int[np.ndarray, "examples"]
    """The place of each example's source in `names`."""
    is_trained: Bool[np.ndarray, "examples"]
    """False for an example that is dropped as too long."""

    @property
    def counts(self) -> Int[np.ndarray, "sources"]:
        """Examples of each source that are trained on."""
        return np.bincount(self.indices[self.is_trained], minlength=len(self.names))

    @property
    def num_trained(self) -> int:
        """Sources with an example that is trained on."""
        return int(np.sum(self.counts > 0))

    @property
    def natural(self) -> Mixture:
        """The mixture of equal weights: shares of examples."""
        return self.counts / self.counts.sum()

    def weights(self, mixture: Mixture) -> Float[np.ndarray, "examples"]:
        """The weight of each example, N p_s / n_s: their mean is 1, and examples of one source weigh the same.

        It is what outer.weighting = per_source learns: batches hold the sources as the data do, and the weights
        multiply losses.
        """
        counts = self.counts
        return (counts.sum() * np.asarray(mixture, float) / np.maximum(counts, 1))[self.indices]

    def mixture(self, weights: Float[np.ndarray, "examples"]) -> Mixture:
        """The share of each source in the weights of the examples that are trained on, some of them above 0."""
        totals = np.bincount(self.indices[self.is_trained], weights[self.is_trained], len(self.names))
        return totals / totals.sum()

    def stratified(self) -> Mixture:
        """The mixture in which all sources that are trained on have the same share."""
        return (self.counts > 0) / self.num_trained


def find_sources(task: Task) -> Sources:
    """The sources of a task's training examples."""
    names, indices = np.unique([example.source for example in task.examples], return_inverse=True)
    is_trained = np.zeros(len(indices), bool)
    is_trained[task.trainable_indices()] = True
    return Sources(names.tolist(), indices, is_trained)


def require_sources(task: Task, what: str) -> Sources:
    """`find_sources`, where `what` needs at least two, and one of each example.

    Raises ValueError for one source, and where some examples of a file name none: the name of the file, which they are
    given, would be a source of its own.
    """
    sources = find_sources(task)
    if sources.num_trained < 2:
        raise ValueError(
            f"{what} needs two sources, and every example that is not too long comes from "
            f"{sources.names[int(np.argmax(sources.counts))]!r}. Set data.source_field to "
            "the key that tells sources apart, or leave it out."
        )
    by_file: dict[str, set[str]] = {}
    for example in task.examples:
        by_file.setdefault(example.file, set()).add(example.source)
    unnamed = [
        example
        for example in task.examples
        if len(by_file[example.file]) > 1 and example.source == source_name(example.file)
    ]
    if unnamed:
        first = unnamed[0]
        raise ValueError(
            f"{what} needs the source of every example, and {format_count('example', len(unnamed))} of {first.file} "
            f"name none under data.source_field (the first in line {first.line}). Name it, or leave them out."
        )
    return sources
