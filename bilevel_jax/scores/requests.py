"""Score plans from likelihood requests to one number per example.

A score is a function (candidates, holdout) -> ScorePlan. A plan does not call a model: a log-likelihood scorer answers
its requests, and `combine` turns the answers into scores. So the same plan serves again after each training step.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.tokens import Corpus, TokenizedSequence, corpus_from_sequences
from bilevel_jax.lm.inference.loglik import LogLik, LogLikRequest


class TokenizedExamples(NamedTuple):
    """Examples to score or to show, and their tokens as training reads them."""

    examples: Sequence[Example]
    corpus: Corpus
    corpus_rows: Int[np.ndarray, "examples"]
    """examples[i] is row corpus_rows[i] of the corpus."""

    @property
    def is_kept(self) -> Bool[np.ndarray, "examples"]:
        """False for an example that was dropped as too long: its score is nan, and it is never shown."""
        return np.isin(self.corpus_rows, self.corpus.kept_indices)

    def sequences(self, i: int) -> list[TokenizedSequence]:
        """The sequences of example i: one, or those of the chosen and the rejected response of a pair."""
        return [
            self.corpus.get_sequence(int(self.corpus_rows[i]), side)
            for side in range(self.corpus.sequences_per_example)
        ]


class ScorePlan(NamedTuple):
    """Requests to a language model, and how its answers become scores."""

    requests: list[LogLikRequest]
    combine: Callable[[Sequence[LogLik]], Float[np.ndarray, "examples"]]
    """The answers, in the order of the requests -> scores, larger is better; nan without any target."""
    num_holdout: Int[np.ndarray, "examples"]
    """Holdout examples that each score is computed from; 0 for scores that need none."""
    num_holdout_wanted: int
    """The number asked for. `num_holdout` is less where examples did not fit the context or were too similar."""


ScoreFn = Callable[[TokenizedExamples, TokenizedExamples], ScorePlan]
"""(examples to score, holdout) -> plan."""
LoglikFn = Callable[[Sequence[LogLikRequest]], Sequence[LogLik]]
"""Answers requests: a `LogLikScorer.score` with its parameters bound."""


def make_tokenized_examples(examples: Sequence[Example], corpus: Corpus, first_row: int = 0) -> TokenizedExamples:
    """Examples with the rows of a corpus from `first_row` on, as where training examples and holdout share a corpus.

    Args:
        examples: examples[i] is row first_row + i.
        corpus: from `tokenize`.
        first_row: row of the first example.

    Returns:
        The examples and their rows.

    Raises:
        ValueError: more examples than rows.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples, tokens
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokens.tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> make_tokenized_examples(train, corpus).is_kept
        array([ True,  True,  True])
    """
    if first_row + len(examples) > corpus.num_examples:
        raise ValueError(
            f"{len(examples)} examples from row {first_row} of a corpus of {corpus.num_examples}: each example is a "
            "row of it. Tokenize the examples themselves."
        )
    return TokenizedExamples(examples, corpus, first_row + np.arange(len(examples)))


def take_examples(candidates: TokenizedExamples, indices: Int[np.ndarray, "chosen"]) -> TokenizedExamples:
    """Some of the examples, in the given order.

    Args:
        candidates: examples.
        indices: places in `candidates`.

    Returns:
        As many examples as indices.
    """
    return TokenizedExamples(
        [candidates.examples[i] for i in indices], candidates.corpus, candidates.corpus_rows[indices]
    )


def make_target_requests(sequence: TokenizedSequence, head: tuple[int, ...] = (), skip: int = 0) -> list[LogLikRequest]:
    """One request for each run of targets, which is an assistant turn, given all tokens before it.

    Together they ask for what training sums: nats of the same tokens after the same tokens.

    Args:
        sequence: token ids and target mask.
        head: tokens in front, in place of the first `skip` tokens (the BOS, which the head has).
        skip: number of tokens that the head replaces.

    Returns:
        Requests in the order of the targets.

    Example:
        >>> ids, mask = np.array([1, 5, 6, 2]), np.array([False, False, True, True])
        >>> make_target_requests(TokenizedSequence(ids, mask))
        [LogLikRequest(prefix=(1, 5), response=(6, 2))]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sequence.target_mask, [False]]).astype(np.int8)))
    ids = sequence.ids.tolist()
    return [
        LogLikRequest((*head, *ids[skip:start]), tuple(ids[start:stop]))
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]


def trim_responses(corpus: Corpus, end_tokens: Collection[int], max_targets: int = 0) -> tuple[Corpus, int]:
    """The sequences without end tokens, and without what follows `max_targets` targets.

    Args:
        corpus: single sequences, not pairs.
        end_tokens: removed from the end of each sequence.
        max_targets: 0: no limit.

    Returns:
        The new corpus, and how many sequences were cut by `max_targets`.
    """
    trimmed, num_cut = [], 0
    for i in range(corpus.num_examples):
        ids, supervised, _ = corpus.get_sequence(i)
        length = len(ids)
        while length and int(ids[length - 1]) in end_tokens:
            length -= 1
        target_positions = np.flatnonzero(supervised[:length])
        if max_targets and len(target_positions) > max_targets:
            length, num_cut = int(target_positions[max_targets]), num_cut + 1
        trimmed.append(TokenizedSequence(ids[:length], supervised[:length]))
    return corpus_from_sequences(trimmed), num_cut


def make_score_plan(
    requests_by_sequence: Sequence[Sequence[LogLikRequest]],
    reduce: Callable[[Float[np.ndarray, "sequences"], Float[np.ndarray, "sequences"]], Float[np.ndarray, "examples"]],
    num_holdout: Int[np.ndarray, "examples"],
    num_holdout_wanted: int,
) -> ScorePlan:
    """The plan that asks all requests of each sequence and reduces (nats, tokens) of the sequences to scores.

    Args:
        requests_by_sequence: requests, one list for each sequence.
        reduce: (nats, tokens) -> scores; nats is Σ_t log p of the targets of a sequence, at most 0; tokens is their
            number, 0 where nothing was asked.
        num_holdout: holdout examples that each score is computed from.
        num_holdout_wanted: the number asked for.

    Returns:
        The plan; `combine` raises ValueError for another number of answers than requests.
    """
    requests = [request for sequence_requests in requests_by_sequence for request in sequence_requests]
    owner = np.repeat(
        np.arange(len(requests_by_sequence)), [len(sequence_requests) for sequence_requests in requests_by_sequence]
    )

    def combine(answers: Sequence[LogLik]) -> Float[np.ndarray, "examples"]:
        if len(answers) != len(requests):
            raise ValueError(f"{len(answers)} answers to {len(requests)} requests; give one for each, in their order.")
        nats, tokens = (
            np.bincount(
                owner, np.array([answer[field] for answer in answers], float), minlength=len(requests_by_sequence)
            )
            for field in (0, 1)
        )
        return reduce(nats, tokens)

    return ScorePlan(requests, combine, num_holdout, num_holdout_wanted)


def per_token(
    nats: Float[np.ndarray, "sequences"], tokens: Float[np.ndarray, "sequences"]
) -> Float[np.ndarray, "sequences"]:
    """Nats per token; nan where there is no token.

    Args:
        nats: sums over tokens.
        tokens: their numbers.

    Returns:
        nats / tokens.
    """
    return np.divide(nats, tokens, out=np.full_like(nats, np.nan), where=tokens > 0)
