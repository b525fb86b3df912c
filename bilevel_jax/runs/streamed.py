"""Training rows that are read while training goes, for data too large to hold: one step's rows in memory at a time."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bilevel_jax.core.types import Batch
from bilevel_jax.lm import batches, data
from bilevel_jax.lm.batches import Layout
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.tokens import Corpus, Report
from bilevel_jax.runs.rows import reading
from bilevel_jax.runs.sections import DataSection

Weigh = Callable[[Example], float | None]
"""The weight of a row; None leaves it out."""


class Streamed:
    """Batches by step, in the order of the files, shuffled through a buffer; epoch after epoch.

    A pure function of the step all the same: a step that does not follow the last one reads again from the beginning,
    as resuming does, without tokenizing what it skips. Rows that also stand in validation are refused or left out, as
    data.leaks says.
    """

    def __init__(
        self,
        rows: DataSection,
        layout: Layout,
        *,
        weigh: Weigh,
        tokenize: Callable[[Sequence[Example]], tuple[Corpus, Report]],
        check: Callable[[list[Example]], None],
        trusted: Sequence[Example],
    ):
        self.rows, self.layout, self.weigh, self.tokenize, self.check = rows, layout, weigh, tokenize, check
        self.trusted = {data.gist(example): example for example in trusted}
        self.met: dict[str, Example] = {}
        """Every row that was read so far, by id, without its text."""
        self._next, self._source = -1, iter(())  # type: tuple[int, Iterator[Example]]

    def batch(self, step: int) -> tuple[np.ndarray, Batch]:
        """(the weight of each slot's row, the batch whose index points into them)."""
        size = self.layout.micro * self.layout.examples
        if step != self._next:
            self._source = itertools.islice(self._examples(), step * size, None)
        self._next = step + 1
        examples = list(itertools.islice(self._source, size))
        self.check(examples)
        corpus, _ = self.tokenize(examples)
        chosen = np.where(np.isin(np.arange(size), corpus.kept), np.arange(size), corpus.rows)
        weights = np.array([self.weigh(example) for example in examples], float)
        stream = batches.train_stream(corpus, lambda _: chosen, 1, self.layout)
        return weights, stream.batch(0)

    def _examples(self) -> Iterator[Example]:
        """Rows for ever, those without a weight left out."""
        for epoch in itertools.count():
            rows = self._checked(data.stream(self.rows.train, reading(self.rows)))
            yield from _shuffled(rows, self.rows.shuffle_buffer, self.rows.seed + epoch)

    def _checked(self, rows: Iterator[Example]) -> Iterator[Example]:
        any_left = False
        for example in rows:
            copy = self.trusted.get(data.gist(example))
            if copy is not None and self.rows.leaks == "error":
                raise ValueError(
                    f"{example.where} also stands in the trusted rows, at {copy.where}. The validation loss would "
                    "reward copying it. Remove it, or set data.leaks to drop."
                )
            if copy is None and self.weigh(example) is not None:
                any_left = True
                self.met.setdefault(example.id, example._replace(turns=(), rejected=()))
                yield example
        if not any_left:
            raise ValueError(f"{', '.join(self.rows.train)}: no row is left to train on.")


def _shuffled(rows: Iterator[Example], size: int, seed: int) -> Iterator[Example]:
    """Each row swaps places with a random one of the `size` before it; 0 leaves the order."""
    if not size:
        yield from rows
        return
    rng: Any = np.random.default_rng(seed)
    buffer = list(itertools.islice(rows, size))
    for example in rows:
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = example
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
