"""Examples -> token ids and which of them are the response: exactly one BOS, EOS, what counts, length limits.

A preference pair is two sequences, the chosen and the rejected side, in which only the responses that differ count.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm.data import Example
from bilevel_jax.lm.encode import TEMPLATE, Mask, Tokenizer, common, encode, joiner

TRUNCATE = ("error", "left", "right", "drop")
SUPERVISE = ("all_turns", "last_turn")
CHUNK = 512
"""Examples handed to the tokenizer at once; it works on them in parallel."""


class Tokenized(NamedTuple):
    """One sequence: its ids, and whether each is a target, that is, part of a response (its end token included)."""

    ids: Int[np.ndarray, "length"]
    supervised: Bool[np.ndarray, "length"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """All examples in one flat array: sequence j is `ids[offsets[j]:offsets[j + 1]]`.

    A row is one sequence, or two for preference pairs: 2i is the chosen side of row i and 2i + 1 the rejected one. A
    dropped row is there, but empty.
    """

    ids: Int[np.ndarray, "tokens"]
    supervised: Bool[np.ndarray, "tokens"]
    offsets: Int[np.ndarray, "rows*sequences+1"]
    sequences: int = 1
    """Sequences of a row."""
    reference: Float[np.ndarray, "rows"] | None = None
    """Of pairs, for DPO: log p(chosen) - log p(rejected) under the reference model, summed over the tokens of the
    responses, nats; anything for a dropped row."""
    sampler: Float[np.ndarray, "tokens"] | None = None
    """Log-probability of each token under the model that sampled it, nats; nan for a token that was not sampled."""
    base: Float[np.ndarray, "rows"] | None = None
    """How much each row counts before any weight; where it is not given, 1."""

    def __post_init__(self) -> None:
        if (len(self.offsets) - 1) % self.sequences:
            raise ValueError(f"{len(self.offsets) - 1} sequences do not make rows of {self.sequences}.")
        if self.sampler is not None and self.sampler.shape != self.ids.shape:
            raise ValueError(f"sampler {self.sampler.shape} for {len(self.ids)} tokens; give one number for each.")
        if self.base is not None and (self.base.shape != (self.rows,) or not (self.base >= 0).all()):
            raise ValueError(f"base {self.base.shape} for {self.rows} rows; give each a number of at least 0.")
        if self.reference is None:
            return
        if self.sequences != 2 or self.reference.shape != (self.rows,):
            raise ValueError(
                f"reference {self.reference.shape} for {self.rows} rows of {self.sequences} sequence(s); a reference "
                "is one margin for each preference pair."
            )
        if not np.isfinite(self.reference[self.kept]).all():
            row = int(self.kept[~np.isfinite(self.reference[self.kept])][0])
            raise ValueError(f"the reference of row {row} is {self.reference[row]}; give one for every row in `kept`.")

    @property
    def rows(self) -> int:
        """Number of rows, dropped ones included: the size of the weight table."""
        return (len(self.offsets) - 1) // self.sequences

    @property
    def lengths(self) -> Int[np.ndarray, "rows*sequences"]:
        """Tokens in each sequence."""
        return np.diff(self.offsets)

    @property
    def kept(self) -> Int[np.ndarray, "kept"]:
        """The rows that were not dropped."""
        return np.flatnonzero(self.lengths[:: self.sequences])

    def row(self, i: int, side: int = 0) -> Tokenized:
        """One example; of a pair, side 0 is the chosen and side 1 the rejected one."""
        sequence = i * self.sequences + side
        part = slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))
        return Tokenized(self.ids[part], self.supervised[part])

    def with_reference(self, reference: Float[np.ndarray, "rows"]) -> "Corpus":
        """The same pairs with `preferences.margins` under the reference model."""
        return replace(self, reference=np.asarray(reference))

    def with_sampler(self, sampler: Float[np.ndarray, "tokens"], base: Float[np.ndarray, "rows"]) -> "Corpus":
        """The same rows, with the sampler's log-probabilities of their tokens, and how much each row counts."""
        return replace(self, sampler=np.asarray(sampler, np.float32), base=np.asarray(base, np.float32))


class Report(NamedTuple):
    """What tokenizing did."""

    rows: int
    tokens: int
    supervised: int
    """Tokens that are targets."""
    longest: int
    """Tokens of the longest row, after truncation."""
    truncated: int
    """Rows whose end was cut at max_length; of a pair, that of either side."""
    truncated_left: int
    """Rows whose beginning was cut, so that the response fits into max_length."""
    dropped: int
    """Rows left empty because they, or a side of the pair, are longer than max_length."""
    unknown: float
    """Fraction of tokens that the tokenizer does not know."""
    bytes: float
    """Fraction of tokens that are single bytes, for want of a token for the character."""
    merged: int
    """Responses whose first token also holds white space that ends the prompt. The tokens before the first target are
    the prompt without it; a prompt tokenized for itself would end in a token that training never saw there."""

    def __str__(self) -> str:
        """One line for people."""
        parts = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised:,} of them targets; longest {self.longest}",
            *([f"{self.truncated:,} rows cut at the end"] if self.truncated else []),
            *([f"{self.truncated_left:,} rows cut at the beginning"] if self.truncated_left else []),
            *([f"{self.dropped:,} rows dropped as too long"] if self.dropped else []),
            *([f"{self.unknown:.1%} of the tokens are unknown to the tokenizer"] if self.unknown else []),
            *([f"{self.bytes:.1%} of the tokens are bytes of unknown characters"] if self.bytes else []),
            *(
                [f"{self.merged:,} prompts end in white space that the first token of the response takes in"]
                if self.merged
                else []
            ),
        ]
        return "; ".join(parts)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a local model folder; nothing is downloaded and no code of the folder is run."""
    folder = Path(folder)
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json or tokenizer_config.json. "
            "Name a folder in the Hugging Face layout, with the model and its tokenizer."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncate: str = "error",
    template: str = TEMPLATE,
    supervise: str = "all_turns",
) -> tuple[Corpus, Report]:
    """Ids and response masks of all examples; row i of the corpus is examples[i].

    Dialogues go through the tokenizer's chat template where it has one, and prompt/response rows through `template`
    where it has none; of text rows, every token but the first is a target. A row begins with exactly one BOS if the
    tokenizer has one, and its last response ends with EOS if the tokenizer has one. What follows the last target is
    cut off: no target sees it.

    `supervise` says which assistant turns of a dialogue are targets: all, or the last one. Of a pair only those count
    that stand behind the turns which both sides share. `truncate` says what becomes of rows beyond max_length:
        error   an error
        left    the beginning goes, after the BOS, and the last response stays; of a pair the same number of tokens
                of both sides, so that they still share one prompt. A response that is too long alone loses its end.
        right   the end goes
        drop    the row is left empty, so that rows keep their numbers
    """
    if truncate not in TRUNCATE:
        raise ValueError(f"truncate is {truncate!r}; it is one of {list(TRUNCATE)}.")
    if supervise not in SUPERVISE:
        raise ValueError(f"supervise is {supervise!r}; it is one of {list(SUPERVISE)}.")
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; at least 2 tokens are needed, one to read and one to predict.")
    sequences = _sequences(examples)
    _check_contents(examples, tokenizer)
    join = joiner(template)
    lead = int(tokenizer.bos_token_id is not None)
    counts: Counter[str] = Counter()
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    problems: list[str] = []
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        encoded = encode([side for example in chunk for side in _sides(example)], tokenizer, join)
        for example in chunk:
            sides = []
            for side in _sides(example):
                row, mask, merged = next(encoded)
                sides.append(_finish(row, _counted(mask, example, side, supervise), tokenizer))
                counts["merged"] += merged
            longest = max(len(row) for row, _ in sides)
            if longest > max_length:
                sides, done = _cut(sides, max_length, truncate, lead)
                counts.update(done)
            if problem := _problem(example, longest, sides, max_length, truncate):
                problems.append(problem)
            ids += [np.asarray(row, np.int32) for row, _ in sides]
            masks += [np.asarray(mask, bool) for _, mask in sides]
    _raise(problems)
    lengths = np.array([len(row) for row in ids], np.int64)
    if not lengths.any():
        raise ValueError(
            f"none of {len(examples)} rows is within max_length = {max_length}. Raise it, or cut the rows."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    corpus = Corpus(np.concatenate(ids), np.concatenate(masks), offsets, sequences)
    single = [i for text, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x[0-9A-F]{2}>", text)]
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    return corpus, Report(
        rows=len(examples),
        tokens=len(corpus.ids),
        supervised=int(corpus.supervised.sum()),
        longest=int(lengths.max()),
        truncated=counts["right"],
        truncated_left=counts["left"],
        dropped=counts["drop"],
        unknown=float(np.isin(corpus.ids, unknown).mean()),
        bytes=float(np.isin(corpus.ids, single).mean()),
        merged=counts["merged"],
    )


def corpus_of(sequences: Sequence[Tokenized], per_row: int = 1) -> Corpus:
    """A corpus of sequences that were tokenized elsewhere; per_row=2: chosen, rejected, chosen, ..."""
    offsets = np.concatenate([[0], np.cumsum([len(one.ids) for one in sequences])]).astype(np.int64)
    ids = np.concatenate([one.ids for one in sequences]).astype(np.int32)
    return Corpus(ids, np.concatenate([one.supervised for one in sequences]).astype(bool), offsets, per_row)


# ---- which targets count, and the length limit


def _sequences(examples: Sequence[Example]) -> int:
    """1, or 2 where the examples are preference pairs; and nothing between."""
    pairs = [bool(example.rejected) for example in examples]
    if any(pairs) and not all(pairs):
        odd = examples[pairs.index(not pairs[0])]
        this, others = ("a preference pair", "none") if odd.rejected else ("no preference pair", "pairs")
        raise ValueError(
            f"{odd.where}: {this}, and the rows before it are {others}. Keep the two in sets of their own."
        )
    return 2 if any(pairs) else 1


def _sides(example: Example) -> list[Example]:
    """The dialogues of an example: one, or the chosen and the rejected one."""
    return [example, example._replace(turns=example.rejected)] if example.rejected else [example]


def _counted(mask: Mask, example: Example, side: Example, supervise: str) -> Mask:
    """The mask without the assistant turns that do not count."""
    answers = sum(turn.role == "assistant" for turn in side.turns)
    skipped = _shared_answers(example) if example.rejected else 0
    if supervise == "last_turn":
        skipped = max(skipped, answers - 1)
    if skipped <= 0:
        return mask
    if max(mask) != answers:
        raise ValueError(
            f"{example.where}: {answers} messages of the assistant, and the chat template's {{% generation %}} blocks "
            f"mark {max(mask)}, so the last cannot be told from the others. Put one block around each."
        )
    return [turn if turn > skipped else 0 for turn in mask]


def _shared_answers(example: Example) -> int:
    """Assistant turns that both sides of a pair begin with; beyond them, both must answer."""
    shared = common(example.turns, example.rejected)
    differing = example.turns[shared : shared + 1] + example.rejected[shared : shared + 1]
    if not differing:
        raise ValueError(f"{example.where}: the chosen and the rejected response are the same. Remove the pair.")
    if [turn.role for turn in differing] != ["assistant", "assistant"]:
        raise ValueError(
            f"{example.where}: the two sides of the pair differ at message {shared + 1} before the assistant answers; "
            "a preference compares two responses to one prompt. Give both the same messages up to the response."
        )
    return sum(turn.role == "assistant" for turn in example.turns[:shared])


def _finish(ids: list[int], mask: Mask, tokenizer: Tokenizer) -> tuple[list[int], Mask]:
    """Exactly one BOS in front, nothing after the last target, EOS at its end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        lead = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids, mask = [bos, *ids[lead:]], [0, *mask[lead:]]
    end = len(mask) - next((i for i, wanted in enumerate(reversed(mask)) if wanted), len(mask))
    ids, mask = ids[:end], mask[:end]
    if end and eos is not None and ids[-1] != eos:
        ids, mask = [*ids, eos], [*mask, mask[-1]]
    if mask:
        mask[0] = 0  # nothing stands before it to predict it from
    return ids, mask


Sides = list[tuple[list[int], Mask]]


def _cut(sides: Sides, max_length: int, truncate: str, lead: int) -> tuple[Sides, list[str]]:
    """The sides of an example within max_length, and which cuts were made; `lead` = 1 where a BOS stands in front."""
    if truncate == "drop":
        return [([], []) for _ in sides], ["drop"]
    done = []
    if truncate == "left" and all(any(mask) for _, mask in sides):
        # up to the response that must stay: of a pair the first target, of a dialogue the last answer's. Without BOS
        # one token stays before it, to predict it from.
        stays = [mask.index(max(mask) if len(sides) == 1 else next(filter(None, mask))) for _, mask in sides]
        gone = min(max(len(ids) for ids, _ in sides) - max_length, min(stays) - 1)
        if gone:
            sides = [_without(ids, mask, lead, lead + gone) for ids, mask in sides]
            done.append("left")
    if any(len(ids) > max_length for ids, _ in sides):
        sides = [(ids[:max_length], mask[:max_length]) for ids, mask in sides]
        done.append("error" if truncate == "error" else "right")
    return sides, done


def _without(ids: list[int], mask: Mask, start: int, stop: int) -> tuple[list[int], Mask]:
    """The sequence without some tokens. An answer that loses its first words is no target: only something to read."""
    torn = mask[stop - 1] if mask[stop - 1] == mask[stop] else 0
    kept = mask[:start] + [0 if turn == torn else turn for turn in mask[stop:]]
    kept[0] = 0
    return ids[:start] + ids[stop:], kept


def _problem(example: Example, longest: int, sides: Sides, max_length: int, truncate: str) -> str:
    targets = all(any(mask) for _, mask in sides)
    if longest > max_length and truncate == "error":
        return (
            f"{example.where}: {longest} tokens, and max_length is {max_length}. "
            "Raise max_length, shorten the row, or set truncate to 'left', 'right' or 'drop'."
        )
    if longest > max_length and truncate == "right" and not targets:
        return (
            f"{example.where}: {longest} tokens, and its prompt alone fills max_length = {max_length}, so no token of "
            "the response is left. Raise max_length, shorten the prompt, or set truncate to 'left' or 'drop'."
        )
    if (longest <= max_length or truncate == "left") and not targets:
        return f"{example.where}: no token to predict among its {longest}. Remove the row."
    return ""


def _check_contents(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Text that the tokenizer would read as a special token could end a turn or start another one."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
    found = ((e, pattern.search(turn.content)) for e in examples for turn in e.turns + e.rejected)
    _raise(
        [
            f"{example.where}: the text holds {match.group()!r}, which the tokenizer reads as a special token. "
            "Remove it from the row."
            for example, match in found
            if match
        ]
    )


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = f" ({len(problems) - 1} more rows have such a problem.)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
