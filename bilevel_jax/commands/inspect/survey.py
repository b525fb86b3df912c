"""Survey of tokenized examples with lengths, targets, truncation and duplicates."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.encode import make_template_renderer
from bilevel_jax.lm.data.examples import Example, example_kind, find_duplicates, find_leaks
from bilevel_jax.lm.data.tokens import Corpus, TokenizedSequence
from bilevel_jax.lm.data.turns import count_shared_turns
from bilevel_jax.runs.config.schema import DataSection

NO_LENGTH_LIMIT = 1 << 40
"""A length that no row has."""
MAX_TOKENIZER_CALLS = 200
"""How often the tokenizer is asked while rows that it refuses are searched for."""

TokenizedSequences = tuple[TokenizedSequence, ...]
"""The sequences of a row: one, or the chosen and the rejected side."""


class TokenizedRows(NamedTuple):
    """The rows that can be tokenized, and what keeps the others from it."""

    indices: list[int]
    """Which of the examples, in order."""
    sequences: list[TokenizedSequences]
    merged_spaces: int
    """Prompts that end in white space which the first token of the response takes in."""
    problems: list[str]
    """One sentence per row that cannot be read; it begins with file and line."""
    num_untried: int
    """Rows that were not looked at, since too many others could not be read."""


class TruncationEffect(NamedTuple):
    """What one way to shorten rows does."""

    sequences: dict[int, TokenizedSequences]
    """What becomes of the rows beyond the limit; without those that the way cannot help."""
    lost_targets: int
    """Targets that go."""
    num_unusable: int
    """Rows that no target is left of, with which the other commands stop."""


class SpecialTokenCounts(NamedTuple):
    """How often a special token stands in a row."""

    counts: Counter[int]
    """Times -> sequences."""
    odd_rows: list[int]
    """The rows in which it stands too seldom or too often."""


class PartSurvey(NamedTuple):
    """The rows of one part and what training would see of them."""

    name: str
    examples: list[Example]
    tokenized: TokenizedRows
    truncation_effects: dict[str, TruncationEffect]
    """right, left and drop -> what they would do; empty where no row is too long."""
    overlong: list[int]
    """Rows beyond the limit, as places in `tokenized`."""
    as_trained: list[TokenizedSequences]
    """What training sees of each readable row: cut as configured; whole where it would stop."""
    corpus: Corpus
    """All that can be read, uncut."""
    bos: SpecialTokenCounts
    eos: SpecialTokenCounts

    def example(self, place: int) -> Example:
        """The example of a readable row."""
        return self.examples[self.tokenized.indices[place]]

    @property
    def lengths(self) -> Int[np.ndarray, "examples"]:
        """Tokens of each readable row before any cut; of a pair, those of its longer side."""
        return self.corpus.lengths.reshape(-1, self.corpus.sequences_per_example).max(1)


class Duplicates(NamedTuple):
    """What stands in two places."""

    train: list[list[Example]]
    """Training examples that are the same, in groups."""
    trusted: list[list[Example]]
    leaks: list[tuple[Example, Example]]
    """(training example, validation example)."""
    overlaps: dict[tuple[str, str], list[tuple[Example, Example]]]
    """Names of two parts of the validation examples -> the rows that stand in both."""
    repeated_prompts: list[list[Example]]
    """Training examples with one prompt and different responses, in groups."""
    shared_prompts: list[tuple[Example, Example]]
    """(training example, validation example) with one prompt and different responses; one for each training example."""


def survey_part(
    name: str, examples: Sequence[Example], tokenizer: Any, section: DataSection, limit: int, vocab_size: int
) -> PartSurvey:
    """Tokenize the rows as every command does, without stopping at those that cannot be read or are too long."""
    tokenized = tokenize_readable(examples, tokenizer, section, vocab_size=vocab_size)
    if not tokenized.indices:
        raise ValueError(tokenized.problems[0])
    corpus = tokens.corpus_from_sequences(
        [side for sides in tokenized.sequences for side in sides], len(tokenized.sequences[0])
    )
    overlong = [
        place for place, sides in enumerate(tokenized.sequences) if max(len(side.ids) for side in sides) > limit
    ]
    truncation_effects = _compute_truncation_effects(
        [examples[tokenized.indices[place]] for place in overlong], overlong, tokenized, tokenizer, section, limit
    )
    as_trained = list(tokenized.sequences)
    for place, sides in (
        truncation_effects[section.truncation].sequences.items() if section.truncation in truncation_effects else ()
    ):
        as_trained[place] = sides
    return PartSurvey(
        name,
        list(examples),
        tokenized,
        truncation_effects,
        overlong,
        as_trained,
        corpus,
        _check_bos(corpus, tokenizer),
        _check_eos(corpus, tokenizer),
    )


def tokenize_readable(
    examples: Sequence[Example],
    tokenizer: Any,
    section: DataSection,
    *,
    limit: int = NO_LENGTH_LIMIT,
    truncate: str = "error",
    vocab_size: int | None = None,
) -> TokenizedRows:
    """Tokenize all rows that can be; the others are found by halving the sets that the tokenizer refuses.

    Texts, single answers and dialogues are sets of their own: a tokenizer may refuse all of one kind.
    """
    template = section.template or tokens.DEFAULT_TEMPLATE
    make_template_renderer(template)  # a template that is wrong is wrong for every row
    sequences_by_index: dict[int, TokenizedSequences] = {}
    problems: dict[int, str] = {}
    merged = untried = tries = 0
    kinds: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        sides = [example, example._replace(turns=example.rejected)] if example.rejected else [example]
        kinds.setdefault(min(map(example_kind, sides)), []).append(i)
    waiting = [kinds[kind] for kind in sorted(kinds)]  # taken from the end: chat, refused most often, is last
    while waiting:
        group = waiting.pop()
        if tries >= MAX_TOKENIZER_CALLS and problems:
            untried += len(group)
            continue
        tries += 1
        try:
            corpus, report = tokens.tokenize(
                [examples[i] for i in group],
                tokenizer,
                max_length=limit,
                truncation=truncate,
                template=template,
                train_on=section.train_on,
                vocab_size=vocab_size,
            )
        except ValueError as error:
            if len(group) == 1:
                problems[group[0]] = str(error)
            else:
                waiting += [group[len(group) // 2 :], group[: len(group) // 2]]
            continue
        merged += report.merged
        sequences_by_index |= {
            i: tuple(corpus.get_sequence(at, side) for side in range(corpus.sequences_per_example))
            for at, i in enumerate(group)
        }
    places = sorted(sequences_by_index)
    return TokenizedRows(
        places, [sequences_by_index[i] for i in places], merged, [problems[i] for i in sorted(problems)], untried
    )


def find_copies(train: Sequence[Example], trusted: dict[str, list[Example]]) -> Duplicates:
    """What stands twice among the training examples, among the validation examples, and in both."""
    trusted_examples = [row for part in trusted.values() for row in part]
    names = [part for part in trusted if trusted[part]]
    pairs = {(part, other): find_leaks(trusted[part], trusted[other]) for part, other in combinations(names, 2)}
    by_prompt: dict[str, list[Example]] = {}
    for example in train:
        by_prompt.setdefault(_normalize_prompt(example), []).append(example)
    by_prompt.pop("", None)
    trusted_by_prompt = {_normalize_prompt(example): example for example in reversed(trusted_examples)}
    leaks = find_leaks(train, trusted_examples)
    leaked = {example.row for example, _ in leaks}
    return Duplicates(
        train=find_duplicates(train),
        trusted=find_duplicates(trusted_examples),
        leaks=leaks,
        overlaps={parts: matches for parts, matches in pairs.items() if matches},
        repeated_prompts=[group for group in by_prompt.values() if len({_content_id(one) for one in group}) > 1],
        shared_prompts=[
            (example, trusted_by_prompt[prompt])
            for prompt, group in by_prompt.items()
            if prompt in trusted_by_prompt
            for example in group
            if example.row not in leaked
        ],
    )


# ---- what is cut


def _compute_truncation_effects(
    examples: list[Example],
    overlong: list[int],
    tokenized: TokenizedRows,
    tokenizer: Any,
    section: DataSection,
    limit: int,
) -> dict[str, TruncationEffect]:
    if not overlong:
        return {}
    before = [tokenized.sequences[place] for place in overlong]
    right = [tuple(TokenizedSequence(side.ids[:limit], side.target_mask[:limit]) for side in sides) for sides in before]
    left = tokenize_readable(examples, tokenizer, section, limit=limit, truncate="left")
    none = [tuple(TokenizedSequence(side.ids[:0], side.target_mask[:0]) for side in sides) for sides in before]
    whole = sum(map(_count_targets, before))
    return {
        "right": TruncationEffect(
            dict(zip(overlong, right, strict=True)),
            whole - sum(map(_count_targets, right)),
            sum(not all(side.target_mask.any() for side in sides) for sides in right),
        ),
        "left": TruncationEffect(
            {overlong[i]: sides for i, sides in zip(left.indices, left.sequences, strict=True)},
            whole - sum(map(_count_targets, left.sequences)),
            len(overlong) - len(left.indices),
        ),
        "drop": TruncationEffect(dict(zip(overlong, none, strict=True)), whole, 0),
    }


def _count_targets(sides: TokenizedSequences) -> int:
    return sum(int(side.target_mask.sum()) for side in sides)


# ---- BOS and EOS


def _check_bos(corpus: Corpus, tokenizer: Any) -> SpecialTokenCounts:
    """BOS: one in front is wanted, and none behind it."""
    expected = int(tokenizer.bos_token_id is not None)
    is_bos = corpus.ids == tokenizer.bos_token_id
    if tokenizer.bos_token_id == tokenizer.eos_token_id:  # one token for both: only the one in front begins
        is_bos = is_bos & np.isin(np.arange(len(corpus.ids)), corpus.offsets[:-1])
    counts = _count_per_sequence(is_bos, corpus)
    return SpecialTokenCounts(Counter(counts.tolist()), _rows_where(counts != expected, corpus))


def _check_eos(corpus: Corpus, tokenizer: Any) -> SpecialTokenCounts:
    """EOS: the last target of a row is one, and no answer holds two."""
    is_eos = corpus.ids == tokenizer.eos_token_id
    before = np.concatenate([[False], corpus.target_mask[:-1]])
    before[corpus.offsets[:-1]] = False
    answers = _count_per_sequence(corpus.target_mask & ~before, corpus)
    taught = _count_per_sequence(corpus.target_mask & is_eos, corpus)
    last = is_eos[corpus.offsets[1:] - 1]  # nothing stands behind the last target
    return SpecialTokenCounts(
        Counter(_count_per_sequence(is_eos, corpus).tolist()), _rows_where(~last | (taught > answers), corpus)
    )


def _count_per_sequence(mask: np.ndarray, corpus: Corpus) -> np.ndarray:
    """How many there are in each sequence."""
    return np.add.reduceat(mask.astype(np.int64), corpus.offsets[:-1])


def _rows_where(odd: np.ndarray, corpus: Corpus) -> list[int]:
    return np.flatnonzero(odd.reshape(-1, corpus.sequences_per_example).any(1)).tolist()


# ---- copies


def _normalize_prompt(example: Example) -> str:
    """What the response answers, without case and white space; empty for a text."""
    at = count_shared_turns(example.turns, example.rejected) if example.rejected else len(example.turns) - 1
    return " ".join(" ".join(turn.content for turn in example.turns[:at]).casefold().split())


def _content_id(example: Example) -> str:
    return example.id.split("#")[0]
