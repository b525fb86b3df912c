"""Streaming training batches with a shuffle buffer."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from bilevel_jax.core.types import Batch
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.batches import BatchShape
from bilevel_jax.lm.data.examples import Example, hash_normalized_text, stream_examples
from bilevel_jax.lm.data.tokens import TOKENIZER_CHUNK, Corpus
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.infra.distributed import gather_numbers, num_processes, process_number
from bilevel_jax.runs.infra.placement import local_rows
from bilevel_jax.runs.tasks.splits import make_data_options


class RowWeights(Protocol):
    """The weights of rows that are streamed."""

    def __call__(self, example: Example) -> float | None:
        """The weight of a row; None leaves it out."""
        ...

    def check_epoch(self, example: Example, total: float) -> None:
        """Raises ValueError if the weights of the rows of an epoch, of which `example` is one, sum to nothing."""
        ...


class Tokenize(Protocol):
    """What makes the tokens of some rows."""

    def __call__(self, examples: Sequence[Example], allow_empty: bool) -> Corpus:
        """The tokens; a ValueError where all rows are too long and dropped, unless `allow_empty`."""
        ...


class StreamingBatches:
    """Batches by step, in the order of the files, shuffled through a buffer; epoch after epoch.

    A pure function of the step all the same: a step that does not follow the last one reads again from the beginning,
    as resuming does, without tokenizing what it skips. Rows that also stand in validation are refused or left out, as
    data.leaks says.

    Of several processes each reads all rows, whose order, weights and leaks are those of all, and tokenizes those that
    its own devices hold; what it has of the others is empty. All make the same calls.
    """

    def __init__(
        self,
        config: DataSection,
        layout: BatchShape,
        mesh: Mesh,
        *,
        weight_of: RowWeights,
        tokenize: Tokenize,
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
        is_local = local_rows(mesh, layout.examples)
        self._local_slots = None if is_local is None else np.flatnonzero(np.tile(is_local, layout.num_micro_batches))
        """The slots whose rows are tokenized here; None: all."""
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
        weights = np.array([self.weight_of(example) for example in examples], float)
        return weights, self._make_batch(examples)

    def _make_batch(self, examples: list[Example]) -> Batch:
        local_slots = self._local_slots
        if local_slots is None:
            corpus = self.tokenize(examples, allow_empty=False)
        else:
            corpus = self.tokenize([examples[slot] for slot in local_slots], allow_empty=True)
            corpus = corpus.place_examples(local_slots, len(examples))
        slots = np.arange(len(examples))
        indices = np.where(np.isin(slots, corpus.kept_indices), slots, corpus.num_examples)
        batch = batches.make_train_stream(corpus, lambda _: indices, 1, self.layout).batch(0)
        return batch if local_slots is None else self._complete_batch(batch, examples)

    def _complete_batch(self, batch: Batch, examples: list[Example]) -> Batch:
        """The batch with what it needs to know of the rows of other processes: the counts of the whole step, and
        whether any token has a weight."""
        own = [batch["num_examples"][0], batch["targeted"][0], "token_weights" in batch]
        num_examples, targeted, weighted = gather_numbers("the rows of a step", [int(one) for one in own]).sum(0)
        if not num_examples:
            self.tokenize(examples, allow_empty=False)  # raises: says so of all rows
        token_weights = {"token_weights": np.ones(batch["tokens"].shape, np.float32)} if weighted else {}
        counts = {"num_examples": num_examples, "targeted": targeted}
        return token_weights | batch | {name: np.full_like(batch[name], count) for name, count in counts.items()}

    def check_tokens(self) -> None:
        """Read and tokenize every row once, so that one with a token that the model lacks is refused before training.

        Only where the tokenizer has more tokens than the model's embedding rows can there be such a row.
        """
        rows = self._drop_leaks(stream_examples(self.config.train, make_data_options(self.config)), lambda row: None)
        for number in itertools.count():
            chunk = list(itertools.islice(rows, TOKENIZER_CHUNK))
            if not chunk:
                return
            if number % num_processes() == process_number():
                self.tokenize(chunk, allow_empty=True)

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
