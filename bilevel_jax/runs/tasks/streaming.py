"""Streaming training batches with a shuffle buffer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from bilevel_jax.core.types import Batch
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.batches import BatchShape
from bilevel_jax.lm.data.examples import Example, hash_normalized_text, stream_examples
from bilevel_jax.lm.data.tokens import TOKENIZER_CHUNK, Corpus, TokenizationReport
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.tasks.splits import make_data_options


class RowWeights(Protocol):
    """The weights of rows that are streamed."""

    def __call__(self, example: Example) -> float | None:
        """The weight of a row; None leaves it out."""
        ...

    def check_epoch(self, example: Example, total: float) -> None:
        """Raises ValueError if the weights of the rows of an epoch, of which `example` is one, sum to nothing."""
        ...


class StreamingBatches:
    """Batches by step, in the order of the files, shuffled through a buffer; epoch after epoch.

    A pure function of the step all the same: a step that does not follow the last one reads again from the beginning,
    as resuming does, without tokenizing what it skips. Rows that also stand in validation are refused or left out, as
    data.leaks says.
    """

    def __init__(
        self,
        config: DataSection,
        layout: BatchShape,
        *,
        weight_of: RowWeights,
        tokenize: Callable[[Sequence[Example]], tuple[Corpus, TokenizationReport]],
        check_examples: Callable[[list[Example]], None],
        held_out_examples: Sequence[Example],
    ):
        self.config, self.layout, self.weight_of, self.tokenize, self.check_examples = (
            config,
            layout,
            weight_of,
            tokenize,
            check_examples,
        )
        self.held_out_examples = {hash_normalized_text(example): example for example in held_out_examples}
        self.seen_examples: dict[str, Example] = {}
        """Every row that was read so far, by id, without its text."""
        self._next_step, self._source = -1, iter(())  # type: tuple[int, Iterator[Example]]

    def batch(self, step: int) -> tuple[np.ndarray, Batch]:
        """(the weight of each slot's row, the batch whose index points into them)."""
        if step != self._next_step:
            self.restore(step)
        self._next_step = step + 1
        examples = list(itertools.islice(self._source, self._batch_size))
        self.check_examples(examples)
        corpus, _ = self.tokenize(examples)
        slots = np.arange(self._batch_size)
        indices = np.where(np.isin(slots, corpus.kept_indices), slots, corpus.num_examples)
        weights = np.array([self.weight_of(example) for example in examples], float)
        stream = batches.make_train_stream(corpus, lambda _: indices, 1, self.layout)
        return weights, stream.batch(0)

    def check_tokens(self) -> None:
        """Read and tokenize every row once, so that one with a token that the model lacks is refused before training.

        Only where the tokenizer has more tokens than the model's embedding rows can there be such a row.
        """
        rows = self._drop_leaks(stream_examples(self.config.train, make_data_options(self.config)), lambda row: None)
        while chunk := list(itertools.islice(rows, TOKENIZER_CHUNK)):
            self.tokenize(chunk)

    def restore(self, steps_done: int) -> None:
        """Read the rows of the first `steps_done` steps again, without tokenizing: `seen_examples` is theirs, too."""
        self._source, self._next_step = self._iterate_examples(), steps_done
        for _ in itertools.islice(self._source, steps_done * self._batch_size):
            pass

    @property
    def _batch_size(self) -> int:
        return self.layout.num_micro_batches * self.layout.examples

    def _iterate_examples(self) -> Iterator[Example]:
        """Rows for ever, those without a weight left out."""
        for epoch in itertools.count():
            stream = stream_examples(self.config.train, make_data_options(self.config))
            rows = self._drop_leaks(stream, self._note_seen)
            yield from _shuffle_with_buffer(rows, self.config.shuffle_buffer, self.config.seed + epoch)

    def _note_seen(self, example: Example) -> None:
        self.seen_examples.setdefault(example.id, example._replace(turns=(), rejected=()))

    def _drop_leaks(self, examples: Iterator[Example], on_row: Callable[[Example], None]) -> Iterator[Example]:
        total, last = 0.0, None
        for example in examples:
            leaked_from = self.held_out_examples.get(hash_normalized_text(example))
            if leaked_from is not None and self.config.leaks == "error":
                raise ValueError(
                    f"{example.where} also stands in the validation examples, at {leaked_from.where}. The validation "
                    "loss would reward copying it. Remove it, or set data.leaks to drop."
                )
            weight = self.weight_of(example) if leaked_from is None else None
            if weight is not None:
                total, last = total + weight, example
                on_row(example)
                yield example
        if last is None:
            raise ValueError(f"{', '.join(self.config.train)}: no row is left to train on.")
        self.weight_of.check_epoch(last, total)


def _shuffle_with_buffer(examples: Iterator[Example], size: int, seed: int) -> Iterator[Example]:
    """Each row swaps places with a random one of the `size` before it; 0 leaves the order."""
    if not size:
        yield from examples
        return
    rng: Any = np.random.default_rng(seed)
    buffer = list(itertools.islice(examples, size))
    for example in examples:
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = example
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
