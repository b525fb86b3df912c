"""What training would see of some rows, in numbers: lengths, targets, marks, what is cut, what stands twice."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from bilevel_jax.lm import data, tokens
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.encode import joiner
from bilevel_jax.lm.tokens import Corpus, Tokenized
from bilevel_jax.lm.turns import shared
from bilevel_jax.runs.sections import DataSection

WHOLE = 1 << 40
"""A length that no row has."""
TRIES = 200
"""How often the tokenizer is asked while rows that it refuses are searched for."""

Sides = tuple[Tokenized, ...]
"""The sequences of a row: one, or the chosen and the rejected side."""


class Reading(NamedTuple):
    """The rows that can be tokenized, and what keeps the others from it."""

    rows: list[int]
    """Which of the examples, in order."""
    sides: list[Sides]
    merged: int
    """Prompts that end in white space which the first token of the response takes in."""
    problems: list[str]
    """One sentence per row that cannot be read; it begins with file and line."""
    untried: int
    """Rows that were not looked at, since too many others could not be read."""


class Cut(NamedTuple):
    """What one way to shorten rows does."""

    sides: dict[int, Sides]
    """What becomes of the rows beyond the limit; without those that the way cannot help."""
    lost: int
    """Targets that go."""
    unusable: int
    """Rows that no target is left of, with which the other verbs stop."""


class Marks(NamedTuple):
    """How often a special token stands in a row."""

    counts: Counter[int]
    """Times -> sequences."""
    odd: list[int]
    """The rows in which it stands too seldom or too often."""


class Part(NamedTuple):
    """The rows of one part and what training would see of them."""

    name: str
    examples: list[Example]
    reading: Reading
    cuts: dict[str, Cut]
    """right, left and drop -> what they would do; empty where no row is too long."""
    over: list[int]
    """Rows beyond the limit, as places in `reading.rows`."""
    seen: list[Sides]
    """What training sees of each readable row: cut as configured; whole where it would stop."""
    flat: Corpus
    """All that can be read, uncut."""
    bos: Marks
    eos: Marks

    def example(self, place: int) -> Example:
        """The example of a readable row."""
        return self.examples[self.reading.rows[place]]

    @property
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Tokens of each readable row before any cut; of a pair, those of its longer side."""
        return self.flat.lengths.reshape(-1, self.flat.sequences).max(1)


class Copies(NamedTuple):
    """What stands in two places."""

    train: list[list[Example]]
    """Training rows that are the same, in groups."""
    trusted: list[list[Example]]
    leaks: list[tuple[Example, Example]]
    """(training row, trusted row)."""
    overlaps: dict[tuple[str, str], list[tuple[Example, Example]]]
    """Names of two parts of the trusted rows -> the rows that stand in both."""
    answers: list[list[Example]]
    """Training rows with one prompt and different responses, in groups."""
    prompts: list[tuple[Example, Example]]
    """(training row, trusted row) with one prompt and different responses; one for each training row."""


def survey(name: str, examples: Sequence[Example], tokenizer: Any, rows: DataSection, limit: int) -> Part:
    """Tokenize the rows as every verb does, without stopping at those that cannot be read or are too long."""
    reading = read(examples, tokenizer, rows)
    if not reading.rows:
        raise ValueError(reading.problems[0])
    flat = tokens.corpus_of([side for sides in reading.sides for side in sides], len(reading.sides[0]))
    over = [place for place, sides in enumerate(reading.sides) if max(len(side.ids) for side in sides) > limit]
    cuts = _cuts([examples[reading.rows[place]] for place in over], over, reading, tokenizer, rows, limit)
    seen = list(reading.sides)
    for place, sides in cuts[rows.truncation].sides.items() if rows.truncation in cuts else ():
        seen[place] = sides
    return Part(name, list(examples), reading, cuts, over, seen, flat, _begins(flat, tokenizer), _ends(flat, tokenizer))


def read(
    examples: Sequence[Example], tokenizer: Any, rows: DataSection, *, limit: int = WHOLE, truncate: str = "error"
) -> Reading:
    """Tokenize all rows that can be; the others are found by halving the sets that the tokenizer refuses.

    Texts, single answers and dialogues are sets of their own: a tokenizer may refuse all of one kind.
    """
    template = rows.template or tokens.TEMPLATE
    joiner(template)  # a template that is wrong is wrong for every row
    found: dict[int, Sides] = {}
    problems: dict[int, str] = {}
    merged = untried = tries = 0
    kinds: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        sides = [example, example._replace(turns=example.rejected)] if example.rejected else [example]
        kinds.setdefault(min(map(data.kind_of, sides)), []).append(i)
    waiting = [kinds[kind] for kind in sorted(kinds)]  # taken from the end: chat, refused most often, is last
    while waiting:
        some = waiting.pop()
        if tries >= TRIES and problems:
            untried += len(some)
            continue
        tries += 1
        try:
            corpus, report = tokens.tokenize(
                [examples[i] for i in some],
                tokenizer,
                max_length=limit,
                truncate=truncate,
                template=template,
                supervise=rows.train_on,
            )
        except ValueError as error:
            if len(some) == 1:
                problems[some[0]] = str(error)
            else:
                waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
            continue
        merged += report.merged
        found |= {i: tuple(corpus.row(at, side) for side in range(corpus.sequences)) for at, i in enumerate(some)}
    places = sorted(found)
    return Reading(places, [found[i] for i in places], merged, [problems[i] for i in sorted(problems)], untried)


def copies(train: Sequence[Example], trusted: dict[str, list[Example]]) -> Copies:
    """What stands twice among the training rows, among the trusted rows, and in both."""
    held = [row for part in trusted.values() for row in part]
    names = [part for part in trusted if trusted[part]]
    pairs = {(one, other): data.leaks(trusted[one], trusted[other]) for one in names for other in names if one < other}
    by_prompt: dict[str, list[Example]] = {}
    for example in train:
        by_prompt.setdefault(_prompt(example), []).append(example)
    by_prompt.pop("", None)
    answered = {_prompt(example): example for example in reversed(held)}
    leaks = data.leaks(train, held)
    leaked = {example.row for example, _ in leaks}
    return Copies(
        train=data.duplicates(train),
        trusted=data.duplicates(held),
        leaks=leaks,
        overlaps={parts: found for parts, found in pairs.items() if found},
        answers=[group for group in by_prompt.values() if len({_content(one) for one in group}) > 1],
        prompts=[
            (example, answered[prompt])
            for prompt, group in by_prompt.items()
            if prompt in answered
            for example in group
            if example.row not in leaked
        ],
    )


# ---- what is cut


def _cuts(
    examples: list[Example], over: list[int], reading: Reading, tokenizer: Any, rows: DataSection, limit: int
) -> dict[str, Cut]:
    if not over:
        return {}
    before = [reading.sides[place] for place in over]
    right = [tuple(Tokenized(side.ids[:limit], side.supervised[:limit]) for side in sides) for sides in before]
    left = read(examples, tokenizer, rows, limit=limit, truncate="left")
    none = [tuple(Tokenized(side.ids[:0], side.supervised[:0]) for side in sides) for sides in before]
    whole = sum(map(_targets, before))
    return {
        "right": Cut(
            dict(zip(over, right, strict=True)),
            whole - sum(map(_targets, right)),
            sum(not all(side.supervised.any() for side in sides) for sides in right),
        ),
        "left": Cut(
            {over[i]: sides for i, sides in zip(left.rows, left.sides, strict=True)},
            whole - sum(map(_targets, left.sides)),
            len(over) - len(left.rows),
        ),
        "drop": Cut(dict(zip(over, none, strict=True)), whole, 0),
    }


def _targets(sides: Sides) -> int:
    return sum(int(side.supervised.sum()) for side in sides)


# ---- BOS and EOS


def _begins(flat: Corpus, tokenizer: Any) -> Marks:
    """BOS: one in front is wanted, and none behind it."""
    wanted = int(tokenizer.bos_token_id is not None)
    is_bos = flat.ids == tokenizer.bos_token_id
    if tokenizer.bos_token_id == tokenizer.eos_token_id:  # one token for both: only the one in front begins
        is_bos = is_bos & np.isin(np.arange(len(flat.ids)), flat.offsets[:-1])
    counts = _each(is_bos, flat)
    return Marks(Counter(counts.tolist()), _rows(counts != wanted, flat))


def _ends(flat: Corpus, tokenizer: Any) -> Marks:
    """EOS: the last target of a row is one, and no answer holds two."""
    is_eos = flat.ids == tokenizer.eos_token_id
    before = np.concatenate([[False], flat.supervised[:-1]])
    before[flat.offsets[:-1]] = False
    answers = _each(flat.supervised & ~before, flat)
    taught = _each(flat.supervised & is_eos, flat)
    last = is_eos[flat.offsets[1:] - 1]  # nothing stands behind the last target
    return Marks(Counter(_each(is_eos, flat).tolist()), _rows(~last | (taught > answers), flat))


def _each(which: np.ndarray, flat: Corpus) -> np.ndarray:
    """How many there are in each sequence."""
    return np.add.reduceat(which.astype(np.int64), flat.offsets[:-1])


def _rows(odd: np.ndarray, flat: Corpus) -> list[int]:
    return np.flatnonzero(odd.reshape(-1, flat.sequences).any(1)).tolist()


# ---- copies


def _prompt(example: Example) -> str:
    """What the response answers, without case and white space; empty for a text."""
    at = shared(example.turns, example.rejected) if example.rejected else len(example.turns) - 1
    return " ".join(" ".join(turn.content for turn in example.turns[:at]).casefold().split())


def _content(example: Example) -> str:
    return example.id.split("#")[0]
