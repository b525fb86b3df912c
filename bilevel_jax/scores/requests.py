"""What a score is: requests to a language model, and how its answers become one number per row.

A score is a function (rows, holdout) -> Plan. A plan asks nothing of a model: `loglik` answers its requests, and
`combine` turns the answers into scores. So the same plan is asked again each time the model has moved.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data import Example
from bilevel_jax.lm.loglik import LogLik, LogLikRequest
from bilevel_jax.lm.tokens import Corpus, TokenizedSequence, corpus_from_sequences


class Rows(NamedTuple):
    """Rows to score, or to show: examples, and their tokens as training reads them."""

    examples: Sequence[Example]
    corpus: Corpus
    at: Int[np.ndarray, "rows"]
    """examples[i] is row at[i] of the corpus."""

    @property
    def kept(self) -> Bool[np.ndarray, "rows"]:
        """False for a row that was dropped as too long: its score is nan, and it is never shown."""
        return np.isin(self.at, self.corpus.kept_indices)

    def sides(self, i: int) -> list[TokenizedSequence]:
        """The sequences of row i: one, or those of the chosen and the rejected response of a pair."""
        return [self.corpus.get_sequence(int(self.at[i]), side) for side in range(self.corpus.sequences_per_example)]


class Plan(NamedTuple):
    """What to ask, and what to make of the answers."""

    requests: list[LogLikRequest]
    combine: Callable[[Sequence[LogLik]], Float[np.ndarray, "rows"]]
    """The answers, in the order of the requests -> scores, larger is better; nan for a row without any target."""
    held: Int[np.ndarray, "rows"]
    """Holdout rows that each row's score rests on; 0 for scores that need none."""
    wanted: int
    """How many were asked for. `held` is less where rows did not fit the context or were too much alike."""


Score = Callable[[Rows, Rows], Plan]
"""(rows to score, holdout rows) -> plan."""
Answer = Callable[[Sequence[LogLikRequest]], Sequence[LogLik]]
"""What answers requests: an engine of `lm.loglik` under some parameters."""


def rows_of(examples: Sequence[Example], corpus: Corpus, first: int = 0) -> Rows:
    """examples[i] is row first + i of the corpus, as where training rows and holdout rows share one."""
    if first + len(examples) > corpus.num_examples:
        raise ValueError(
            f"{len(examples)} examples from row {first} of a corpus of {corpus.num_examples}: each example is a row of it. "
            "Tokenize the examples themselves."
        )
    return Rows(examples, corpus, first + np.arange(len(examples)))


def take(rows: Rows, chosen: Int[np.ndarray, "chosen"]) -> Rows:
    """Some of the rows, in the given order."""
    return Rows([rows.examples[i] for i in chosen], rows.corpus, rows.at[chosen])


def targets(sequence: TokenizedSequence, head: tuple[int, ...] = (), skip: int = 0) -> list[LogLikRequest]:
    """One request for each run of targets, which is an assistant turn, given all that stands before it.

    Together they ask for what training sums: nats of the same tokens after the same tokens. `head` goes in front, in
    place of the first `skip` tokens (the BOS, which the head has).
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sequence.target_mask, [False]]).astype(np.int8)))
    ids = sequence.ids.tolist()
    return [
        LogLikRequest((*head, *ids[skip:start]), tuple(ids[start:stop]))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]


def shortened(corpus: Corpus, ends: Collection[int], most: int = 0) -> tuple[Corpus, int]:
    """The rows without tokens of `ends` at their end, and without what follows `most` targets (0: nothing is cut).

    Also how many rows were cut.
    """
    rows, cut = [], 0
    for i in range(corpus.num_examples):
        ids, supervised = corpus.get_sequence(i)
        length = len(ids)
        while length and int(ids[length - 1]) in ends:
            length -= 1
        places = np.flatnonzero(supervised[:length])
        if most and len(places) > most:
            length, cut = int(places[most]), cut + 1
        rows.append(TokenizedSequence(ids[:length], supervised[:length]))
    return corpus_from_sequences(rows), cut


def plan(
    asked: Sequence[Sequence[LogLikRequest]],
    reduce: Callable[[Float[np.ndarray, "sequences"], Float[np.ndarray, "sequences"]], Float[np.ndarray, "rows"]],
    held: Int[np.ndarray, "rows"],
    wanted: int,
) -> Plan:
    """The plan that asks all requests of each sequence and reduces (nats, tokens) of the sequences to scores.

    nats is Σ_t log p of the targets of a sequence, ≤ 0; tokens is their number, 0 where nothing was asked.
    """
    requests = [request for some in asked for request in some]
    owner = np.repeat(np.arange(len(asked)), [len(some) for some in asked])

    def combine(answers: Sequence[LogLik]) -> Float[np.ndarray, "rows"]:
        if len(answers) != len(requests):
            raise ValueError(f"{len(answers)} answers to {len(requests)} requests; give one for each, in their order.")
        nats, tokens = (
            np.bincount(owner, np.array([answer[field] for answer in answers], float), minlength=len(asked))
            for field in (0, 1)
        )
        return reduce(nats, tokens)

    return Plan(requests, combine, held, wanted)


def per_token(
    nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]
) -> Float[np.ndarray, "sequences"]:
    """Nats per token; nan where there is no token."""
    return np.divide(nats, tokens, out=np.full_like(nats, np.nan), where=tokens > 0)
