"""Data sources of a task, and mixtures of them as example weights."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.tasks.protocol import Task

Mixture = Float[np.ndarray, "sources"]
"""The share of each source in the weight of all examples; at least 0, of sum 1."""
MAX_USAGE = 15.0
"""The largest share of a source over its natural one in a mixture that is not learned, so the largest weight of an
example.

RegMix draws none above it; and by the law of Muennighoff et al. 2023 (arXiv 2305.16264) about the fifteenth repeat of
data is worth 1/e of new ones, where the first four are worth nearly as much."""


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

    def stratified(self, max_usage: float = MAX_USAGE) -> Mixture:
        """The mixture in which all sources that are trained on have the same share, but for tiny ones.

        No share is above `max_usage` times the natural one; the others have the rest in equal parts (UniMax, Chung et
        al. 2023, arXiv 2304.09151).
        """
        most, shares, rest = max_usage * self.natural, np.zeros(len(self.names)), 1.0
        order = [place for place in np.argsort(most, kind="stable") if most[place]]  # the tiniest first
        for number, place in enumerate(order):
            shares[place] = min(most[place], rest / (len(order) - number))
            rest -= shares[place]
        return shares


def find_sources(task: Task) -> Sources:
    """The sources of a task's training examples."""
    names, indices = np.unique([example.source for example in task.examples], return_inverse=True)
    is_trained = np.zeros(len(indices), bool)
    is_trained[task.trainable_indices()] = True
    return Sources(names.tolist(), indices, is_trained)


def require_sources(task: Task, what: str) -> Sources:
    """`find_sources`, where `what` needs at least two, and one of each example.

    Raises ValueError for one source; where some examples of a file name none, as the name of the file, which they are
    given, would be a source of its own; and where two files that name none have one name.
    """
    sources = find_sources(task)
    if sources.num_trained < 2:
        raise ValueError(
            f"{what} needs two sources, and every example that is not too long comes from "
            f"{sources.names[int(np.argmax(sources.counts))]!r}. Set data.source_field to "
            "the key that tells sources apart, or leave it out."
        )
    naming = {example.file for example in task.examples if example.names_source}
    unnamed = [example for example in task.examples if not example.names_source]
    if in_naming := [example for example in unnamed if example.file in naming]:
        first = in_naming[0]
        raise ValueError(
            f"{what} needs the source of every example, and {format_count('example', len(in_naming))} of {first.file} "
            f"name none under data.source_field (the first in line {first.line}). Name it, or leave them out."
        )
    file_of: dict[str, str] = {}
    for example in unnamed:
        if (other := file_of.setdefault(example.source, example.file)) != example.file:
            raise ValueError(
                f"{what} tells sources apart by the names of files where rows name none, and {other} and "
                f"{example.file} have one name. Rename one, or set data.source_field."
            )
    return sources
