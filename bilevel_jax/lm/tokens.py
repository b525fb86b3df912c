"""Examples -> token ids and which of them are the response: chat templates, exactly one BOS, EOS, length limits.

A chat template of the tokenizer's own renders dialogues; without one, a prompt and its response are joined by a plain
template. Either way the mask is found by comparing tokens: the tokens of everything before the response must be a
prefix of the tokens of the whole, since at generation time the model is given exactly that prefix.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bilevel_jax.lm.data import Example, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes seconds, so it waits for `load_tokenizer`

TEMPLATE = "{prompt}\n{response}"
TRUNCATE = ("error", "right", "drop")
CHUNK = 512
"""Examples handed to the tokenizer at once; it works on them in parallel."""


class Tokenized(NamedTuple):
    """One example: its ids, and whether each is a target, that is, part of a response (its end token included)."""

    ids: Int[np.ndarray, "length"]
    supervised: Bool[np.ndarray, "length"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """All examples in one flat array: row i is `ids[offsets[i]:offsets[i + 1]]`; a dropped row is there, but empty."""

    ids: Int[np.ndarray, "tokens"]
    supervised: Bool[np.ndarray, "tokens"]
    offsets: Int[np.ndarray, "rows+1"]

    @property
    def rows(self) -> int:
        """Number of rows, dropped ones included: the size of the weight table."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, "rows"]:
        """Tokens in each row."""
        return np.diff(self.offsets)

    @property
    def kept(self) -> Int[np.ndarray, "kept"]:
        """The rows that were not dropped."""
        return np.flatnonzero(self.lengths)

    def row(self, i: int) -> Tokenized:
        """One example."""
        part = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return Tokenized(self.ids[part], self.supervised[part])


class Report(NamedTuple):
    """What tokenizing did."""

    rows: int
    tokens: int
    supervised: int
    """Tokens that are targets."""
    longest: int
    """Tokens of the longest row, after truncation."""
    truncated: int
    """Rows cut at max_length."""
    dropped: int
    """Rows left empty because they are longer than max_length."""
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
            *([f"{self.truncated:,} rows cut"] if self.truncated else []),
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
) -> tuple[Corpus, Report]:
    """Ids and response masks of all examples; row i of the corpus is examples[i].

    Dialogues go through the tokenizer's chat template where it has one, and prompt/response rows through `template`
    where it has none; of text rows, every token but the first is a target. A row begins with exactly one BOS if the
    tokenizer has one, and its last response ends with EOS if the tokenizer has one. What follows the last target is
    cut off: no target sees it. `truncate` says what becomes of rows beyond max_length: an error, cut on the right,
    or dropped (left empty, so that rows keep their numbers).
    """
    if truncate not in TRUNCATE:
        raise ValueError(f"truncate is {truncate!r}; it is one of {list(TRUNCATE)}.")
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; at least 2 tokens are needed, one to read and one to predict.")
    _check_contents(examples, tokenizer)
    join = _joiner(template)
    counts: Counter[str] = Counter()
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    problems: list[str] = []
    for first in range(0, len(examples), CHUNK):
        chunk = examples[first : first + CHUNK]
        for example, (row, mask, merged) in zip(chunk, _encode(chunk, tokenizer, join), strict=True):
            row, mask = _finish(row, mask, tokenizer)
            whole = len(row)
            if whole > max_length:
                counts[truncate] += 1
                cut = 0 if truncate == "drop" else max_length
                row, mask = row[:cut], mask[:cut]
            if problem := _problem(example, whole, mask, max_length, truncate):
                problems.append(problem)
            counts["merged"] += merged
            ids.append(np.asarray(row, np.int32))
            masks.append(np.asarray(mask, bool))
    _raise(problems)
    lengths = np.array([len(row) for row in ids], np.int64)
    if not lengths.any():
        raise ValueError(
            f"none of {len(examples)} rows is within max_length = {max_length}. Raise it, or cut the rows."
        )
    corpus = Corpus(np.concatenate(ids), np.concatenate(masks), np.concatenate([[0], np.cumsum(lengths)]))
    single = [i for text, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x[0-9A-F]{2}>", text)]
    unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    return corpus, Report(
        rows=len(examples),
        tokens=len(corpus.ids),
        supervised=int(corpus.supervised.sum()),
        longest=int(lengths.max()),
        truncated=counts["right"],
        dropped=counts["drop"],
        unknown=float(np.isin(corpus.ids, unknown).mean()),
        bytes=float(np.isin(corpus.ids, single).mean()),
        merged=counts["merged"],
    )


def corpus_of(rows: Sequence[Tokenized]) -> Corpus:
    """A corpus of rows that were tokenized elsewhere."""
    offsets = np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])]).astype(np.int64)
    ids = np.concatenate([row.ids for row in rows]).astype(np.int32)
    return Corpus(ids, np.concatenate([row.supervised for row in rows]).astype(bool), offsets)


# ---- encoding: every path gives (ids, mask, 1 if the response begins inside a token)

Row = tuple[list[int], list[bool], int]
Joiner = Callable[[Example], tuple[str, list[int]]]
"""(text, [start, end, start, end, ...]): a text and the characters between which its responses lie."""


def _encode(examples: Sequence[Example], tokenizer: Tokenizer, join: Joiner) -> Iterator[Row]:
    chat = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if re.search(r"{%-?\s*generation\s*-?%}", chat):
        marked = {i for i, example in enumerate(examples) if kind_of(example) != "text"}
    else:
        marked = set()
    rendered = iter(_by_generation_block([examples[i] for i in sorted(marked)], tokenizer))
    plain = [e for i, e in enumerate(examples) if i not in marked]
    texts = [_whole_text(e) if kind_of(e) == "text" else _by_turns(e, tokenizer) if chat else join(e) for e in plain]
    compared = iter(_by_prefix(plain, texts, tokenizer))
    return (next(rendered) if i in marked else next(compared) for i in range(len(examples)))


def _by_generation_block(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Row]:
    """The template itself marks what the assistant says, by {% generation %} blocks."""
    rows: list[Row] = []
    for example in examples:
        messages = [turn._asdict() for turn in example.turns]
        with _refusals(example):
            out: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
        if not any(mask):
            raise ValueError(
                f"{example.where}: the chat template's {{% generation %}} blocks mark no token. "
                "Put them around what the assistant says."
            )
        for i in range(1, len(ids)):  # an end token that stands just behind the block belongs to the response
            mask[i] = mask[i] or (mask[i - 1] and ids[i] == tokenizer.eos_token_id)
        rows.append((ids, mask, 0))
    return rows


def _by_turns(example: Example, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The characters of each assistant turn, with the mark that ends it, by rendering the dialogue up to there."""
    whole = _render(example, tokenizer, len(example.turns), ask=False)
    edges: list[int] = []
    for k, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        last = k + 1 == len(example.turns)
        asked = _render(example, tokenizer, k, ask=True)
        silent = _render(example, tokenizer, k, ask=False) if k else ""
        upto = whole if last else _render(example, tokenizer, k + 1, ask=False)
        if not (whole.startswith(upto) and upto.startswith(asked)):
            raise ValueError(
                f"{example.where}: the chat template changes what stands before message {k + 1} once it is answered, "
                "so its answer cannot be told from its prompt. Use a template with {% generation %} blocks."
            )
        said = upto[len(asked) :]
        place = said.rfind(turn.content.strip())
        if place < 0:
            raise ValueError(
                f"{example.where}: the chat template changes the text of message {k + 1}. "
                "Use a template with {% generation %} blocks."
            )
        begin = len(asked)
        if asked == silent and said[:place].strip():
            begin += place  # no generation prompt: what stands before the answer is a header, not an answer
        stop = len(asked) + place + len(turn.content.strip())
        mark = upto[stop:]
        if mark.strip():  # an end mark, after which white space only leads to the next turn
            stop += len(mark.rstrip())
        elif not last:  # white space is the end mark
            stop = len(upto)
        edges += [begin, stop]
    return whole[: edges[-1]], edges


def _joiner(template: str) -> Joiner:
    if template.count("{prompt}") != 1 or template.count("{response}") != 1 or not template.endswith("{response}"):
        raise ValueError(
            f"the template {template!r} must hold {{prompt}} once and {{response}} once, at its end. "
            f"Write, for instance, {TEMPLATE!r}."
        )
    head, tail = template.removesuffix("{response}").split("{prompt}")

    def join(example: Example) -> tuple[str, list[int]]:
        if kind_of(example) != "prompt":
            raise ValueError(
                f"{example.where}: a dialogue of {len(example.turns)} turns, and the tokenizer has no chat template. "
                "Use a tokenizer with one, or prompt/response rows."
            )
        prompt, response = (turn.content for turn in example.turns)
        before = head + prompt + tail
        return before + response, [len(before), len(before) + len(response)]

    return join


def _whole_text(example: Example) -> tuple[str, list[int]]:
    text = example.turns[0].content
    return text, [0, len(text)]


def _by_prefix(examples: Sequence[Example], texts: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer) -> list[Row]:
    """The mask by comparing tokens: those of the text up to each edge must be a prefix of those of the whole."""
    pieces = [piece for text, edges in texts for piece in (text, *(text[:edge] for edge in edges))]
    encoded = iter(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else [])
    rows: list[Row] = []
    for example, (_, edges) in zip(examples, texts, strict=True):
        ids, merged = list(next(encoded)), 0
        mask = [False] * len(ids)
        for _ in range(0, len(edges), 2):
            begin, end = next(encoded), next(encoded)
            start, stop = _shared(ids, begin), _shared(ids, end)
            if str(tokenizer.decode(begin[start:])).strip() or stop < len(end):
                raise ValueError(
                    f"{example.where}: a token holds the end of a prompt and the start of a response, or the reverse, "
                    "so the prompt alone would be read differently. Put white space or a special token between them."
                )
            merged |= start < len(begin)  # white space that the prompt ends with went into the first token
            mask[start:stop] = [True] * (stop - start)
        rows.append((ids, mask, merged))
    return rows


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _render(example: Example, tokenizer: Tokenizer, turns: int, ask: bool) -> str:
    """The first turns as text; with `ask`, up to where the assistant is to speak."""
    messages = [turn._asdict() for turn in example.turns[:turns]]
    with _refusals(example):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)  # type: ignore[return-value]


@contextmanager
def _refusals(example: Example) -> Iterator[None]:
    """Templates raise on roles that they do not know or expect; say in which row."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        roles = [turn.role for turn in example.turns]
        raise ValueError(
            f"{example.where}: the chat template refuses the roles {roles}: {error}. Change the row's roles."
        ) from None


# ---- borders


def _finish(ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Exactly one BOS in front, nothing after the last target, EOS at its end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        lead = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids, mask = [bos, *ids[lead:]], [False, *mask[lead:]]
    end = max((i + 1 for i, wanted in enumerate(mask) if wanted), default=0)
    ids, mask = ids[:end], mask[:end]
    if end and eos is not None and ids[-1] != eos:
        ids, mask = [*ids, eos], [*mask, True]
    if mask:
        mask[0] = False  # nothing stands before it to predict it from
    return ids, mask


def _problem(example: Example, whole: int, mask: Sequence[bool], max_length: int, truncate: str) -> str:
    if whole > max_length and truncate == "error":
        return (
            f"{example.where}: {whole} tokens, and max_length is {max_length}. "
            "Raise max_length, shorten the row, or set truncate to 'right' or 'drop'."
        )
    if whole > max_length and truncate == "right" and not any(mask):
        return (
            f"{example.where}: {whole} tokens, and its prompt alone fills max_length = {max_length}, so no token of "
            "the response is left. Raise max_length, shorten the prompt, or set truncate to 'drop'."
        )
    if whole <= max_length and not any(mask):
        return f"{example.where}: no token to predict among its {whole}. Remove the row."
    return ""


def _check_contents(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Text that the tokenizer would read as a special token could end a turn or start another one."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
    found = ((e, pattern.search(turn.content)) for e in examples for turn in e.turns)
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
