"""Tokenization of examples, with response masks and length limits.

A preference pair is two sequences, the chosen and the rejected side, in which only the responses that differ count.
"""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from bilevel_jax.lm import models
from bilevel_jax.lm.checkpoint.files import TOKENIZER_FILES, require_whole_files
from bilevel_jax.lm.data.encode import (
    DEFAULT_TEMPLATE,
    encode_examples,
    make_template_renderer,
)
from bilevel_jax.lm.data.examples import Example, format_count
from bilevel_jax.lm.data.render import Tokenizer, get_chat_template, list_special_tokens
from bilevel_jax.lm.data.targets import (
    EncodedSide,
    TokenWeights,
    add_bos_and_eos,
    choose_targets,
    leave_out_weightless,
    truncate_sides,
    weigh_targets,
)
from bilevel_jax.lm.data.vocabulary import check_token_ids
from bilevel_jax.lm.hub.downloads import SMALL_FILES, find_model_files

TRUNCATION_MODES = ("error", "left", "right", "drop")
TRAIN_ON_MODES = ("all_turns", "last_turn")
SURROGATE = re.compile("[\ud800-\udfff]")
TOKENIZER_CHUNK = 512
"""Examples handed to the tokenizer at once; it works on them in parallel."""


class TokenizedSequence(NamedTuple):
    """One sequence: its ids, and whether each is a target, that is, part of a response (its end token included)."""

    ids: Int[np.ndarray, "length"]
    target_mask: Bool[np.ndarray, "length"]
    token_weights: Float[np.ndarray, "length"] | None = None
    """Factor of the loss of each target; None: 1."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """All examples in one flat array: sequence j is `ids[offsets[j]:offsets[j + 1]]`.

    A row is one sequence, or two for preference pairs: 2i is the chosen side of row i and 2i + 1 the rejected one. A
    dropped row is there, but empty.
    """

    ids: Int[np.ndarray, "tokens"]
    target_mask: Bool[np.ndarray, "tokens"]
    offsets: Int[np.ndarray, "rows*sequences+1"]
    sequences_per_example: int = 1
    """Sequences of a row."""
    reference_margins: Float[np.ndarray, "rows"] | None = None
    """Of pairs, for DPO: log p(chosen) - log p(rejected) under the reference model, summed over the tokens of the
    responses, nats; anything for a dropped row."""
    sampler_log_probs: Float[np.ndarray, "tokens"] | None = None
    """Log-probability of each token under the model that sampled it, nats; nan for a token that was not sampled."""
    multiplicity: Float[np.ndarray, "rows"] | None = None
    """How much each row counts before any weight; where it is not given, 1."""
    token_weights: Float[np.ndarray, "tokens"] | None = None
    """Factor of the loss of each token that is a target, above 0; anything elsewhere. None: 1 for all."""
    advantages: Float[np.ndarray, "tokens"] | None = None
    """Of each token that was sampled, for `policy_losses`: how much better than expected what follows it was."""

    def __post_init__(self) -> None:
        if self.token_weights is not None and (
            self.token_weights.shape != self.ids.shape
            or not (np.isfinite(self.token_weights) & (self.token_weights > 0))[self.target_mask].all()
        ):
            raise ValueError(
                f"token_weights {self.token_weights.shape} for {len(self.ids)} tokens; give each one number, and each "
                "target a finite one above 0."
            )
        if self.token_weights is not None and self.sequences_per_example != 1:
            raise ValueError("token_weights of preference pairs, whose losses compare whole responses: leave them out.")
        if (len(self.offsets) - 1) % self.sequences_per_example:
            raise ValueError(f"{len(self.offsets) - 1} sequences do not make rows of {self.sequences_per_example}.")
        if self.sampler_log_probs is not None and self.sampler_log_probs.shape != self.ids.shape:
            raise ValueError(
                f"sampler_log_probs {self.sampler_log_probs.shape} for {len(self.ids)} tokens; give each one number."
            )
        if self.advantages is not None and self.advantages.shape != self.ids.shape:
            raise ValueError(f"advantages {self.advantages.shape} for {len(self.ids)} tokens; give each one number.")
        if self.multiplicity is not None and (
            self.multiplicity.shape != (self.num_examples,) or not (self.multiplicity >= 0).all()
        ):
            raise ValueError(
                f"multiplicity {self.multiplicity.shape} for {self.num_examples} rows; give each one of at least 0."
            )
        if self.reference_margins is None:
            return
        if self.sequences_per_example != 2 or self.reference_margins.shape != (self.num_examples,):
            raise ValueError(
                f"reference {self.reference_margins.shape} for {self.num_examples} rows of "
                f"{self.sequences_per_example} sequence(s); a reference is one margin for each preference pair."
            )
        if not np.isfinite(self.reference_margins[self.kept_indices]).all():
            row = int(self.kept_indices[~np.isfinite(self.reference_margins[self.kept_indices])][0])
            raise ValueError(
                f"the reference of row {row} is {self.reference_margins[row]}; "
                "give one for every row in `kept_indices`."
            )

    @property
    def num_examples(self) -> int:
        """Number of rows, dropped ones included: the size of the weight table."""
        return (len(self.offsets) - 1) // self.sequences_per_example

    @property
    def lengths(self) -> Int[np.ndarray, "rows*sequences"]:
        """Tokens in each sequence."""
        return np.diff(self.offsets)

    @property
    def kept_indices(self) -> Int[np.ndarray, "kept"]:
        """The rows that were not dropped."""
        return np.flatnonzero(self.lengths[:: self.sequences_per_example])

    def get_sequence(self, i: int, side: int = 0) -> TokenizedSequence:
        """One example; of a pair, side 0 is the chosen and side 1 the rejected one."""
        sequence = i * self.sequences_per_example + side
        part = slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))
        weights = None if self.token_weights is None else self.token_weights[part]
        return TokenizedSequence(self.ids[part], self.target_mask[part], weights)

    def without_examples(self, rows: Int[np.ndarray, "rows"]) -> "Corpus":
        """The same rows, of which some are dropped: there, but empty."""
        is_dropped = np.zeros(self.num_examples, bool)
        is_dropped[rows] = True
        is_dropped = np.repeat(is_dropped, self.sequences_per_example)
        is_kept_token = np.repeat(~is_dropped, self.lengths)
        of_tokens = {
            name: values[is_kept_token]
            for name in ("ids", "target_mask", "sampler_log_probs", "token_weights", "advantages")
            if (values := getattr(self, name)) is not None
        }
        offsets = np.concatenate([[0], np.cumsum(np.where(is_dropped, 0, self.lengths))]).astype(self.offsets.dtype)
        return replace(self, offsets=offsets, **of_tokens)

    def place_examples(self, indices: Int[np.ndarray, "rows"], num_examples: int) -> "Corpus":
        """A corpus of so many rows, of which these are the ones at `indices`, ascending; the others are dropped."""
        lengths = np.zeros((num_examples, self.sequences_per_example), self.offsets.dtype)
        lengths[indices] = self.lengths.reshape(-1, self.sequences_per_example)
        return replace(self, offsets=np.concatenate([[0], np.cumsum(lengths)]))

    def with_reference_margins(self, reference_margins: Float[np.ndarray, "rows"]) -> "Corpus":
        """The same pairs with `preference_margins` under the reference model."""
        return replace(self, reference_margins=np.asarray(reference_margins))

    def with_sampler_log_probs(
        self, sampler_log_probs: Float[np.ndarray, "tokens"], multiplicity: Float[np.ndarray, "rows"]
    ) -> "Corpus":
        """The same rows, with the sampler's log-probabilities of their tokens, and how much each row counts."""
        return replace(
            self,
            sampler_log_probs=np.asarray(sampler_log_probs, np.float32),
            multiplicity=np.asarray(multiplicity, np.float32),
        )

    def with_advantages(self, advantages: Float[np.ndarray, "tokens"]) -> "Corpus":
        """The same rows, with the advantages of their tokens; what was not sampled may have anything but nan."""
        return replace(self, advantages=np.asarray(advantages, np.float32))


class TokenizationReport(NamedTuple):
    """What tokenizing did."""

    num_examples: int
    num_tokens: int
    num_targets: int
    """Tokens that are targets."""
    max_length: int
    """Tokens of the longest row, after truncation."""
    truncated: int
    """Rows whose end was cut at max_length; of a pair, that of either side."""
    truncated_left: int
    """Rows whose beginning was cut, so that the response fits into max_length."""
    dropped: int
    """Rows left empty because they, or a side of the pair, are longer than max_length."""
    unknown_share: float
    """Fraction of tokens that the tokenizer does not know."""
    byte_share: float
    """Fraction of tokens that are single bytes, for want of a token for the character."""
    merged: int
    """Responses whose first token also holds white space that ends the prompt. The tokens before the first target are
    the prompt without it; a prompt tokenized for itself would end in a token that training never saw there."""
    is_dated: bool = False
    """Whether the chat template asks for the day's date, so that the tokens of another day may differ."""

    def __str__(self) -> str:
        """One line for people."""
        parts = [
            f"{format_count('row', self.num_examples)}, {format_count('token', self.num_tokens)}, "
            f"{self.num_targets:,} of them targets; "
            f"longest {self.max_length}",
            *([f"{format_count('row', self.truncated)} cut at the end"] if self.truncated else []),
            *([f"{format_count('row', self.truncated_left)} cut at the beginning"] if self.truncated_left else []),
            *([f"{format_count('row', self.dropped)} dropped as too long"] if self.dropped else []),
            *([f"{self.unknown_share:.1%} of the tokens are unknown to the tokenizer"] if self.unknown_share else []),
            *([f"{self.byte_share:.1%} of the tokens are bytes of unknown characters"] if self.byte_share else []),
            *(
                [
                    f"{format_count('prompt', self.merged, ('ends', 'end'))} in white space that the first token of "
                    "the response takes in"
                ]
                if self.merged
                else []
            ),
            *(
                ["the chat template asks for the date (strftime_now), so on another day the tokens may be others"]
                if self.is_dated
                else []
            ),
        ]
        return "; ".join(parts)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; no code of the folder is run.

    Args:
        folder: in the Hugging Face layout, or a name on the hub.

    Returns:
        A tokenizer of transformers.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: it has one that cannot be read.
    """
    folder = find_model_files(folder, SMALL_FILES)
    if not (folder / "tokenizer_config.json").exists() and not (folder / "tokenizer.json").exists():
        remedy = "Name a folder in the Hugging Face layout, with the model and its tokenizer."
        if (folder / "model" / "tokenizer_config.json").exists():
            remedy = f"The model of this run is {folder / 'model'}: name that."
        raise FileNotFoundError(f"{folder}: no tokenizer.json or tokenizer_config.json. {remedy}")
    require_whole_files(folder, TOKENIZER_FILES)
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its advice on models that we read ourselves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # of any kind: parsers of several libraries read these files
        if type(error).__module__.startswith("bilevel_jax"):
            raise  # from the handler of a signal
        with contextlib.suppress(FileNotFoundError):
            models.read_config(folder)  # its own words where the config.json, which transformers reads too, is at fault
        if "contains custom code" in str(error):
            raise ValueError(
                f"{folder}: the tokenizer is a program of its own (auto_map in tokenizer_config.json), and code of a "
                "model's folder is never run. Take a model whose tokenizer is one of transformers' own."
            ) from None
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no text")
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {text[:200].rstrip('.:')}). Look at "
            "tokenizer.json, tokenizer_config.json and config.json there, or take them from the source of the model."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    _check_tokenizer(folder, tokenizer)
    # rows beyond the model's context are named by `tokenize`
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError for what transformers makes of a folder that lacks a file, or has odd values in one."""
    if type(tokenizer.model_max_length) not in (int, float):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {tokenizer.model_max_length!r}; it is a number."
        )
    of_text = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    if not of_text:
        raise ValueError(
            f"{folder}: the tokenizer has no token for text, only special and added ones; fetch what is missing, "
            "tokenizer.json or its vocabulary."
        )


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: str = "error",
    template: str = DEFAULT_TEMPLATE,
    train_on: str = "all_turns",
    vocab_size: int | None = None,
    is_model_limit: bool = False,
    token_weights: Mapping[str, TokenWeights] | None = None,
    allow_empty: bool = False,
) -> tuple[Corpus, TokenizationReport]:
    """Token ids and response masks of all examples; row i of the corpus is examples[i].

    Dialogues are rendered by the tokenizer's chat template where it has one, and prompt/response examples by `template`
    where it has none; of plain text, every token but the first is a target. A sequence begins with exactly one BOS if
    the tokenizer has one, and its last response ends with EOS if the tokenizer has one. What follows the last target is
    cut off: no target depends on it.

    Args:
        examples: from `load_examples`; all of them preference pairs, or none.
        tokenizer: from `load_tokenizer`, or any of transformers.
        max_length: tokens of a sequence, at least 2.
        truncation: what becomes of examples beyond max_length.
            "error": an error.
            "left": the beginning is removed, after the BOS, and the last response stays; of a pair the same number of
            tokens of both sides, so that they still share one prompt. A response that is too long alone loses its end.
            "right": the end is removed.
            "drop": the example stays as an empty row, so that the others keep their row numbers.
        template: joins prompt and response where the tokenizer has no chat template.
        train_on: "all_turns" or "last_turn": the assistant turns that are targets. Of a pair only those count that come
            after the turns which both sides share.
        vocab_size: rows of the model's embedding, so that no token is beyond them; None: they are not checked.
        is_model_limit: max_length is the model's context, which no setting raises: for errors.
        token_weights: example id -> a factor for the loss of each of its targets, before any of them is cut off, the
            end token included; they multiply the weight of the turn. A target of weight 0 is none. Not for pairs.
        allow_empty: whether "drop" may leave nothing, as of a part of the examples.

    Returns:
        The corpus, and a report of counts. The corpus has `token_weights` where a turn or a token has one other than 1.

    Raises:
        ValueError: an unknown option, a special token in a text, an example without a target, one beyond max_length
            under "error", a token beyond vocab_size, or token weights that do not fit; with file and line.

    Example:
        >>> import tempfile
        >>> from bilevel_jax.lm.builtin import cipher
        >>> from bilevel_jax.lm.data import examples
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = cipher.write_cipher_data(folder, clean=3, wrong=0, noise=0, copies=0)
        ...     train = examples.load_examples([f"{folder}/train.jsonl"])
        >>> corpus, report = tokenize(train, cipher.make_cipher_tokenizer(), max_length=16)
        >>> corpus.num_examples, report.num_targets  # four letters and EOS each
        (3, 15)
    """
    if truncation not in TRUNCATION_MODES:
        raise ValueError(f"truncation is {truncation!r}; it is one of {list(TRUNCATION_MODES)}.")
    if train_on not in TRAIN_ON_MODES:
        raise ValueError(f"train_on is {train_on!r}; it is one of {list(TRAIN_ON_MODES)}.")
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; at least 2 tokens are needed, one to read and one to predict.")
    sequences = _count_sequences_per_example(examples)
    _check_texts(examples, tokenizer)
    render = make_template_renderer(template)
    num_bos = int(tokenizer.bos_token_id is not None)
    counts: Counter[str] = Counter()
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    problems: list[str] = []
    for first in range(0, len(examples), TOKENIZER_CHUNK):
        chunk = examples[first : first + TOKENIZER_CHUNK]
        chunk_sides = [side for example in chunk for side in _split_sides(example)]
        targets = [choose_targets(side, example, train_on) for example in chunk for side in _split_sides(example)]
        encoded, target_turns = encode_examples(chunk_sides, targets, tokenizer, render), iter(targets)
        for example in chunk:
            sides = []
            given = (token_weights or {}).get(example.id)
            for dialogue in _split_sides(example):
                row, mask, merged = next(encoded)
                side = add_bos_and_eos(row, mask, tokenizer)
                sides.append(weigh_targets(side, dialogue, next(target_turns), given))
                counts["merged"] += merged
            longest = max(len(side.ids) for side in sides)
            if longest > max_length:
                sides, cuts = truncate_sides(sides, max_length, truncation, num_bos)
                counts.update(cuts)
            sides = [leave_out_weightless(side) for side in sides]
            if problem := _describe_problem(example, longest, sides, max_length, truncation, is_model_limit):
                problems.append(problem)
            ids += [np.asarray(side.ids, np.int32) for side in sides]
            masks += [np.asarray(side.mask, bool) for side in sides]
            weights += [np.asarray(side.weights or np.ones(len(side.ids)), np.float32) for side in sides]
    _raise_first_problem(problems)
    lengths = np.array([len(row) for row in ids], np.int64)
    if not lengths.any() and not allow_empty:
        raise ValueError(
            f"none of {len(examples)} rows is within the {max_length} tokens that the model reads. Cut the rows."
            if is_model_limit
            else f"none of {len(examples)} rows is within max_length = {max_length}. Raise it, or cut the rows."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    corpus = Corpus(
        np.concatenate(ids), np.concatenate(masks), offsets, sequences, token_weights=_join_weights(weights, masks)
    )
    if vocab_size is not None:
        check_token_ids(corpus.ids, offsets, examples, tokenizer, vocab_size, sequences)
    byte_ids = [i for text, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x[0-9A-F]{2}>", text)]
    unknown_ids = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    return corpus, TokenizationReport(
        num_examples=len(examples),
        num_tokens=len(corpus.ids),
        num_targets=int(corpus.target_mask.sum()),
        max_length=int(lengths.max()),
        truncated=counts["right"],
        truncated_left=counts["left"],
        dropped=counts["drop"],
        unknown_share=float(np.isin(corpus.ids, unknown_ids).sum()) / max(1, len(corpus.ids)),
        byte_share=float(np.isin(corpus.ids, byte_ids).sum()) / max(1, len(corpus.ids)),
        merged=counts["merged"],
        is_dated=any(example.turns[0].role != "text" for example in examples)
        and "strftime_now" in get_chat_template(tokenizer),
    )


def corpus_from_sequences(sequences: Sequence[TokenizedSequence], sequences_per_example: int = 1) -> Corpus:
    """A corpus of sequences that were tokenized elsewhere.

    Args:
        sequences: token ids and target masks.
        sequences_per_example: 1, or 2: chosen, rejected, chosen, ...

    Returns:
        The corpus, without reference margins, sampler log-probs or multiplicity. It has token weights where a sequence
        has them and one is other than 1.

    Raises:
        ValueError: the sequences do not divide into examples.
    """
    offsets = np.concatenate([[0], np.cumsum([len(sequence.ids) for sequence in sequences])]).astype(np.int64)
    ids = np.concatenate([sequence.ids for sequence in sequences]).astype(np.int32)
    masks = [sequence.target_mask for sequence in sequences]
    weights = [
        np.ones(len(sequence.ids), np.float32) if sequence.token_weights is None else sequence.token_weights
        for sequence in sequences
    ]
    return Corpus(
        ids,
        np.concatenate(masks).astype(bool),
        offsets,
        sequences_per_example,
        token_weights=_join_weights(weights, masks),
    )


# ---- parts


def _count_sequences_per_example(examples: Sequence[Example]) -> int:
    """1, or 2 where the examples are preference pairs; and nothing between."""
    pairs = [bool(example.rejected) for example in examples]
    if any(pairs) and not all(pairs):
        mismatch = examples[pairs.index(not pairs[0])]
        mismatch_kind, others = ("a preference pair", "none") if mismatch.rejected else ("no preference pair", "pairs")
        raise ValueError(
            f"{mismatch.where}: {mismatch_kind}, and the rows before it are {others}. "
            "Keep the two in sets of their own."
        )
    return 2 if any(pairs) else 1


def _split_sides(example: Example) -> list[Example]:
    """The dialogues of an example: one, or the chosen and the rejected one."""
    return [example, example._replace(turns=example.rejected)] if example.rejected else [example]


def _describe_problem(
    example: Example, longest: int, sides: list[EncodedSide], max_length: int, truncation: str, is_model_limit: bool
) -> str:
    targets = all(any(side.mask) for side in sides)
    remedy = "Shorten" if is_model_limit else "Raise max_length, shorten"
    if longest > max_length and truncation == "error":
        limit = f"the model reads at most {max_length}" if is_model_limit else f"max_length is {max_length}"
        return (
            f"{example.where}: {longest} tokens, and {limit}. {remedy} the row, or set truncation to 'left', 'right' "
            "or 'drop'."
        )
    if longest > max_length and truncation == "right" and not targets:
        limit = f"the {max_length} tokens that the model reads" if is_model_limit else f"max_length = {max_length}"
        return (
            f"{example.where}: {longest} tokens, and its prompt alone fills {limit}, so no token of the response is "
            f"left. {remedy} the prompt, or set truncation to 'left' or 'drop'."
        )
    if (longest <= max_length or truncation == "left") and not targets:
        return f"{example.where}: no token to predict among its {longest}. Remove the row."
    return ""


def _join_weights(
    weights: Sequence[Float[np.ndarray, "length"]], masks: Sequence[Bool[np.ndarray, "length"]]
) -> Float[np.ndarray, "tokens"] | None:
    """The weights of all tokens, 1 where there is no target; None if all are 1."""
    if all((part[mask] == 1).all() for part, mask in zip(weights, masks, strict=True)):
        return None
    return np.where(np.concatenate(masks), np.concatenate(weights), 1).astype(np.float32)


def _check_texts(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Text that the tokenizer would read as a special token could end a turn or start another one; half of a surrogate
    pair, which JSON can hold, is no text."""
    texts = [(e, text) for e in examples for turn in e.turns + e.rejected for text in (turn.content, turn.reasoning)]
    _raise_first_problem(
        [
            f"{example.where}: the text holds half of a surrogate pair, U+{ord(match.group()):X}, which no tokenizer "
            "reads. Remove it from the row."
            for example, text in texts
            if (match := SURROGATE.search(text))
        ]
    )
    special = list_special_tokens(tokenizer)
    if not special:
        return
    pattern = re.compile("|".join(map(re.escape, special)))
    _raise_first_problem(
        [
            f"{example.where}: the text holds {match.group()!r}, which the tokenizer reads as a special token. "
            "Remove it from the row."
            for example, text in texts
            if (match := pattern.search(text))
        ]
    )


def _raise_first_problem(problems: Sequence[str]) -> None:
    if problems:
        more = f" ({len(problems) - 1} more rows have such a problem.)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
