"""Training examples read from files, with ids, deduplication and splits.

`files` reads and writes files, `formats` knows the formats of their rows.
"""

import bisect
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.lm.data import files, formats
from bilevel_jax.lm.data.turns import TARGET_KEYS, UNREAD_ROW_KEYS, DataOptions, Dialogue, EmptyExampleError, Turn


class Example(NamedTuple):
    """A training example. Prompt/response and Alpaca rows are a user turn and an assistant turn."""

    id: str
    """Hash of the turns # occurrence: the same wherever the row stands, whatever its source or label."""
    row: int
    """0-based position in the list it belongs to, which is its row of the weight table."""
    turns: tuple[Turn, ...]
    source: str
    """The row's source field, or the name of its file."""
    label: str | None
    """Hidden truth ("clean", "noise", ...) as `normalize_name` gives it; None where nobody knows. Only reports and
    oracles may look at it."""
    file: str
    line: int
    """1-based; in a parquet table or a `datasets` folder, the row."""
    rejected: tuple[Turn, ...] = ()
    """In a preference pair, the dialogue with the response that was not preferred; `turns` has the one that was."""
    format: str = ""
    """The format that its file was read in, a name in `formats.READ_FORMATS`."""
    num_dropped_turns: int = 0
    """Turns of the user at the end of a ShareGPT row that were left out, because nothing answers them."""
    unread_keys: tuple[str, ...] = ()
    """Keys of the row and of its messages with a value that other tools read, and that nothing reads here."""
    names_source: bool = True
    """False where the row has no source of its own, and `source` is the name of its file."""

    @property
    def where(self) -> str:
        """`file:line`, as it stands in every error."""
        return f"{self.file}:{self.line}"


def load_examples(
    paths: Sequence[str],
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    on_drop: Callable[[str], Any] = lambda message: None,
    keys: set[str] | None = None,
    *,
    mixed: bool = False,
) -> list[Example]:
    """Reads all rows of all paths, in order; `row` counts through them.

    Strict: a row that cannot be used is an error, rather than being skipped.

    Args:
        paths: files (.jsonl, .json, .parquet), folders of `datasets.save_to_disk`, or names on the hub.
        options: the format of rows and the names of their fields.
        on_drop: with options.empty = "drop", called with a sentence for each row that is left out.
        keys: receives the keys that any row has with a value other than null.
        mixed: whether preference pairs may stand next to other examples, for losses that read the one or the other.

    Returns:
        One example for each row.

    Raises:
        ValueError: a row that cannot be used, with its file and line; a path without rows; pairs next to other
            examples.
        FileNotFoundError: no such file.

    Example:
        >>> import json, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.jsonl")
        ...     _ = path.write_text(json.dumps({"prompt": "2 + 2 = ", "response": "4"}))
        ...     [example] = load_examples([str(path)])
        >>> [turn.content for turn in example.turns]
        ['2 + 2 = ', '4']
    """
    _check_options(paths, options)
    return list(_iter_examples(_open_paths(paths, streaming=False), options, on_drop, keys=keys, mixed=mixed))


def load_prompts(
    paths: Sequence[str],
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    on_drop: Callable[[str], Any] = lambda message: None,
    keys: set[str] | None = None,
) -> list[Example]:
    """As `load_examples`, of rows that may lack the answer: their turns then end with the user's.

    A prompt without a response (prompt, Alpaca), or messages that end with the user's (chat, ShareGPT). The id of a
    prompt is that of its turns.

    Args:
        paths: as for `load_examples`.
        options: as for `load_examples`.
        on_drop: as for `load_examples`.
        keys: as for `load_examples`.

    Returns:
        One example for each row.

    Raises:
        ValueError: as `load_examples`.

    Example:
        >>> import json, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "asked.jsonl")
        ...     _ = path.write_text(json.dumps({"prompt": "2 + 2 = "}))
        ...     [prompt] = load_prompts([str(path)])
        >>> [turn.role for turn in prompt.turns]
        ['user']
    """
    _check_options(paths, options)
    sources = (
        (path, ((line, formats.add_missing_answer(row, options)) for line, row in rows))
        for path, rows in _open_paths(paths, streaming=False)
    )
    prompts, seen = [], Counter[str]()
    for example in _iter_examples(sources, options, on_drop, keys=keys):
        if example.turns[-1].content == formats.MISSING_ANSWER:
            turns = example.turns[:-1]
            content = hash_content(turns)
            example = example._replace(id=f"{content}#{seen[content]}", turns=turns)
            seen[content] += 1
        prompts.append(example)
    return prompts


def read_examples(
    source: Any,
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    *,
    name: str = "examples",
    on_drop: Callable[[str], Any] = lambda message: None,
    keys: set[str] | None = None,
) -> list[Example]:
    """The examples of a file, of rows in memory or of a data set: the same examples with the same ids from each.

    Args:
        source: a path (as one of `load_examples`); a list of paths (`pathlib.Path`); a list of rows, which are dicts
            in any format of `options` or, for plain text, strings; a `datasets.Dataset`; or a list of `Example`, which
            is returned with `row` counted anew.
        options: the format of rows and the names of their fields.
        name: what rows in memory are called in errors, as in "examples:3" for the third.
        on_drop: as for `load_examples`.
        keys: as for `load_examples`.

    Returns:
        One example for each row.

    Raises:
        ValueError: as `load_examples`; another type of source; no rows; strings that are names of files; two examples
            with one id, which were read apart.

    Example:
        >>> [example] = read_examples([{"prompt": "2 + 2 = ", "response": "4"}])
        >>> [turn.content for turn in example.turns], example.where
        (['2 + 2 = ', '4'], 'examples:1')
    """
    if isinstance(source, str | os.PathLike):
        return load_examples([os.fspath(source)], options, on_drop, keys)
    if not isinstance(source, list | tuple) and not _is_dataset(source):
        remedy = {
            "DataFrame": "Of a pandas DataFrame give df.to_dict('records').",
            "DatasetDict": "Of a DatasetDict name one split, as in data['train'].",
            "dict": "Put a single row into a list.",
        }.get(type(source).__name__, "Make a list of it.")
        raise ValueError(
            f"the {name} are a {type(source).__name__}; a path, a list of rows or a datasets.Dataset is wanted. "
            f"{remedy}"
        )
    if isinstance(source, list | tuple) and source and all(isinstance(row, os.PathLike) for row in source):
        return load_examples([os.fspath(path) for path in source], options, on_drop, keys)
    if isinstance(source, list | tuple) and any(isinstance(row, Example) for row in source):
        return _renumber_examples(source, name)
    if isinstance(source, list | tuple) and any(files.is_file_name(row) for row in source):
        [file, *_] = [row for row in source if files.is_file_name(row)]
        raise ValueError(
            f"the {name} hold the string {file!r}, and strings in a list are rows of text. Of a file give its path, of "
            f"several a list of pathlib.Path."
        )
    if not len(source):
        raise ValueError(f"the {name} have no rows; at least one is wanted.")
    _check_options([name], options)
    rows = files.iterate_rows_in_memory(source)
    return list(_iter_examples([(name, rows)], options, on_drop, keys=keys))


def stream_examples(
    paths: Sequence[str],
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
    on_drop: Callable[[str], Any] = lambda message: None,
    *,
    skip: int = 0,
    keys: set[str] | None = None,
) -> Iterator[Example]:
    """The examples of `load_examples`, one at a time, with the same ids and rows; for training without weights.

    At most one batch of a table is in memory, but a .json file as a whole. For the ids, which count occurrences, some
    100 bytes are stored per distinct row; they are also why skipped rows are read and hashed (tens of thousands a
    second). Data sets of the hub are streamed rather than downloaded first.

    Args:
        paths: as for `load_examples`.
        options: as for `load_examples`.
        on_drop: as for `load_examples`.
        skip: rows before the first example that is returned.
        keys: as for `load_examples`; those of the rows read so far.

    Returns:
        An iterator over examples.

    Raises:
        ValueError: as `load_examples`, when the row is reached.
    """
    _check_options(paths, options)
    return itertools.islice(_iter_examples(_open_paths(paths, streaming=True), options, on_drop, keys=keys), skip, None)


def example_to_row(example: Example, row_format: str = "auto") -> dict[str, Any]:
    """The example as a row of a file, which `load_examples` reads as the same turns with the same id.

    The row holds the turns alone: add id, source or weight as other keys.

    Args:
        example: any example.
        row_format: a name in `formats.WRITE_FORMATS`, or auto: text, prompt, chat, preference or preference_chat, the
            first that can hold it; the rows of one file should have one format.

    Returns:
        A row of JSON values.

    Raises:
        ValueError: the format cannot hold the example.
    """
    if row_format == "auto" and is_preference_pair(example):
        kinds = {example_kind(example._replace(turns=side)) for side in (example.turns, example.rejected)}
        row_format = "preference" if kinds == {"prompt"} else "preference_chat"
        if formats.has_message_keys(example.turns + example.rejected):
            row_format = "preference_chat"
    elif row_format == "auto":
        row_format = "chat" if formats.has_message_keys(example.turns) else example_kind(example)
    return formats.dialogue_to_row(Dialogue(example.turns, example.rejected), row_format, example.where)


def hash_content(turns: Iterable[Turn], rejected: Iterable[Turn] = ()) -> str:
    """64 bits of SHA-256 of the turns, as 16 hex digits; for 10 million rows one collision in 370,000 sets.

    That of a preference pair covers both dialogues, and differs from that of either.
    """
    # What a turn says beyond role and content counts where it says something, so that plain turns keep their hash.
    sides = [
        [
            [*turn[:2], *(turn[2 : 5 if turn.weight != 1 else 4] if formats.has_message_keys((turn,)) else ())]
            for turn in side
        ]
        for side in (turns, rejected)
    ]
    return _hash_text(json.dumps(sides if sides[1] else sides[0], ensure_ascii=False))


def find_duplicates(examples: Sequence[Example]) -> list[list[Example]]:
    """The groups of two or more examples that have exactly the same turns, in order of first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.id.split("#")[0], []).append(example)
    return [group for group in groups.values() if len(group) > 1]


def find_leaks(train: Sequence[Example], validation: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Pairs (train, validation) that say the same: equal up to case, white space, layout and system turns.

    Catches copies, not paraphrases, and not a prompt that comes back with another response. Of a preference pair,
    prompt and chosen response count: the same pair with its sides exchanged is no leak.
    """
    by_hash: dict[str, list[Example]] = {}
    for example in validation:
        by_hash.setdefault(hash_normalized_text(example), []).append(example)
    return [(example, other) for example in train for other in by_hash.get(hash_normalized_text(example), ())]


def split_examples(examples: Sequence[Example], fractions: Sequence[float], seed: int) -> tuple[list[Example], ...]:
    """Splits the examples into parts of about the given fractions, by a hash of their content and the seed.

    Where an example goes depends on its own content alone, so adding, removing or reordering examples moves no other;
    and examples that `find_leaks` would pair go to the same part. `row` is counted anew within each part.
    The sizes are random: a part of fraction f of n examples has f n ± sqrt(n f (1 - f)).

    Args:
        examples: in any order.
        fractions: of the parts; positive, with sum 1.
        seed: another seed, another split.

    Returns:
        The parts, in the order of `fractions`.

    Raises:
        ValueError: fractions that do not sum to 1, or a part without examples.
    """
    if any(f <= 0 for f in fractions) or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(f"split fractions {list(fractions)} must be positive and sum to 1.")
    edges = [sum(fractions[: i + 1]) for i in range(len(fractions) - 1)]
    parts: tuple[list[Example], ...] = tuple([] for _ in fractions)
    for example in examples:
        quantile = int(_hash_text(f"{seed} {hash_normalized_text(example)}"), 16) / 2**64
        part = parts[bisect.bisect_right(edges, quantile)]
        part.append(example._replace(row=len(part)))
    if not all(parts):
        raise ValueError(
            f"splitting {len(examples)} rows by fractions {list(fractions)} leaves parts of {[len(p) for p in parts]} "
            "rows, and every part needs one. Give more rows, fewer parts, or another seed."
        )
    return parts


def summarize_examples(examples: Sequence[Example]) -> str:
    """One line for people: number of examples, the format of each file, sources, labels, duplicates."""
    formats_and_files = Counter((e.format or example_kind(e), e.file) for e in examples)
    formats_only = Counter(e.format or example_kind(e) for e in examples)
    sources = Counter(e.source for e in examples)
    labels = Counter(e.label for e in examples if e.label is not None)
    copies = sum(len(group) - 1 for group in find_duplicates(examples))
    answers = [turn for e in examples for turn in e.turns + e.rejected if turn.role == "assistant"]
    not_learned = sum(not turn.is_target for turn in answers)
    with_reasoning = sum(bool(turn.reasoning) for turn in answers)
    with_weight = sum(turn.weight != 1 for turn in answers)
    shortened = sum(e.num_dropped_turns > 0 for e in examples)
    by_file = [f"{n:,} {kind} from {files.short_name(file)}" for (kind, file), n in formats_and_files.most_common()]
    by_format = [f"{n:,} {kind}" for kind, n in formats_only.most_common()]
    parts = [
        format_count("row", len(examples)),
        ", ".join(by_file) if len(by_file) <= 4 else f"{', '.join(by_format)} from {len(by_file)} files",
        f"{len(sources)} sources" if len(sources) > 1 else f"source {next(iter(sources), 'none')}",
        *([f"labels {', '.join(sorted(labels)[:8])}"] if labels else []),
        *([f"{len(examples) - labels.total():,} without a label"] if 0 < labels.total() < len(examples) else []),
        *([f"{copies:,} {'is a copy' if copies == 1 else 'are copies'} of an earlier row"] if copies else []),
        *([f"{format_count('answer', not_learned, ('is', 'are'))} marked as no target"] if not_learned else []),
        *(
            [f"{format_count('answer', with_weight, ('has a weight of its', 'have a weight of their'))} own"]
            if with_weight
            else []
        ),
        *([f"{format_count('answer', with_reasoning, ('comes', 'come'))} with a reasoning"] if with_reasoning else []),
        *([f"{shortened:,} lost a last message of the user, which nothing answers"] if shortened else []),
    ]
    return "; ".join(parts)


def format_count(noun: str, count: int, verbs: tuple[str, str] = ("", "")) -> str:
    """So many of something, and the verb for one or for several: 1 row was, 2 rows were."""
    one, several = verbs
    return f"{count:,} {noun}{'s' if count != 1 else ''} {one if count == 1 else several}".rstrip()


def describe_unread_keys(examples: Iterable[Example]) -> list[str]:
    """One sentence for each key that other tools read and that nothing reads here: in how many rows, the first."""
    rows: dict[str, list[Example]] = {}
    for example in examples:
        for key in example.unread_keys:
            rows.setdefault(key, []).append(example)
    hints = UNREAD_ROW_KEYS | dict.fromkeys(
        (key for key in rows if key.rpartition("[].")[2] in TARGET_KEYS and "[]." in key), "only answers are targets"
    )
    return [
        f"the key '{key}' is not read: {format_count('row', len(found))}, the first {found[0].where}"
        + (f" ({hints[key]})" if key in hints else "")
        for key, found in rows.items()
    ]


def list_formats(examples: Sequence[Example]) -> dict[str, str]:
    """file -> the format that it was read in, given or detected."""
    return {example.file: example.format for example in examples}


def example_kind(example: Example) -> str:
    """text, prompt (one user turn, one assistant turn) or chat."""
    roles = [turn.role for turn in example.turns]
    return "text" if roles == ["text"] else "prompt" if roles == ["user", "assistant"] else "chat"


def is_preference_pair(example: Example) -> bool:
    """Whether it is a preference pair: a chosen and a rejected dialogue."""
    return bool(example.rejected)


# ---- names: labels, sources, ids


def read_name(row: Any, field: str, where: str, *, is_id: bool = False) -> str | None:
    """The label, source or id under one key of a row, as `normalize_name` gives it; None where there is none."""
    value = row.get(field) if isinstance(row, dict) else None
    try:
        return normalize_name(value, is_id=is_id)
    except ValueError as error:
        raise ValueError(f"{where}: '{field}' is {error}") from None


def normalize_name(value: Any, *, is_id: bool = False) -> str | None:
    """The one spelling of a label, source or id, whatever kind of file or column it comes from.

    1, 1.0, true, "1", "1.0" and "true" are all "1", and false is "0": a column of whole numbers becomes one of floats
    as soon as it holds a null, and labels of two classes are written as booleans or as numbers. A text is a number
    where it is a plain decimal one: "1.50" and 1.5 are the same, and "007", "+1" and "1_000" stay as they are. null,
    NaN and text without a letter are no name. Space around a text does not count.

    Args:
        value: what a row holds.
        is_id: booleans are no numbers: true is "true", and the text "true" stays as it is.

    Returns:
        The name, or None.

    Raises:
        ValueError: a list, an object, bytes or an infinite number; the message begins with the value.

    Example:
        >>> [normalize_name(value) for value in (1, 1.0, True, "1.0", 0.5, " clean ", "", float("nan"))]
        ['1', '1', '1', '1', '0.5', 'clean', None, None]
    """
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false") and not is_id:
            return str(int(text.lower() == "true"))
        return (_spell_number(Decimal(text)) if PLAIN_NUMBER.fullmatch(text) else text) or None
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value != value:  # NaN differs from itself
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return _spell_number(Decimal(repr(value)) if isinstance(value, float) else value)
    if isinstance(value, bool):
        return str(value).lower() if is_id else str(int(value))
    if isinstance(value, int | datetime.date | datetime.time):
        return str(value)
    raise ValueError(f"{files.describe_value(value)}; a string or a number is wanted.")


PLAIN_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]+)?|[1-9](?:\.[0-9]+)?[eE][+-]?[0-9]{1,3})")
"""A decimal number as programs write it; others, as 007, 12e4 and 1_000, may be ids."""


def _spell_number(value: Decimal) -> str:
    """All digits, without an exponent, zeros at the end and the sign of 0."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


# ---- rows -> examples


def _is_dataset(source: Any) -> bool:
    """Whether it is a `datasets.Dataset`, which is not imported where nobody has."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset)


def _renumber_examples(source: Sequence[Any], name: str) -> list[Example]:
    """Examples that were read before, with their row in this list."""
    ids: Counter[str] = Counter()
    for place, example in enumerate(source, 1):
        if not isinstance(example, Example):
            raise ValueError(
                f"{name}:{place}: {files.describe_value(example)} among examples that are read already. Give rows "
                "alone, or read all of them by `read_examples`."
            )
        ids[example.id] += 1
        if ids[example.id] > 1:
            raise ValueError(
                f"{name}:{place}: the id {example.id} stands twice. Read the rows of both together: copies then get "
                "ids of their own."
            )
    return [example._replace(row=row) for row, example in enumerate(source)]


def _open_paths(paths: Sequence[str], *, streaming: bool) -> Iterator[tuple[str, Iterator[tuple[int, Any]]]]:
    return ((path, files.read_rows(path, streaming=streaming)) for path in map(str, paths))


def _iter_examples(
    sources: Iterable[tuple[str, Iterator[tuple[int, Any]]]],
    options: DataOptions,
    on_drop: Callable[[str], Any],
    *,
    keys: set[str] | None,
    mixed: bool = False,
) -> Iterator[Example]:
    """The examples of all rows; a source is its path, or its name, and its rows with their lines."""
    count = 0
    seen: Counter[str] = Counter()
    firsts: dict[bool, str] = {}
    for path, rows in sources:
        row_format, count_before, num_empty = options.format, count, 0
        for line, row in rows:
            where = f"{path}:{line}"
            if keys is not None and isinstance(row, dict):
                keys.update(row)
            row_format = row_format if row_format != "auto" else formats.detect_format(row, options, where)
            try:
                turns, rejected, num_dropped_turns, unread_keys = formats.parse_row(row, row_format, options, where)
            except EmptyExampleError as error:
                if options.empty == "drop":
                    on_drop(str(error))
                    num_empty += 1
                    continue
                raise
            firsts.setdefault(bool(rejected), where)
            if len(firsts) == 2 and not mixed:
                raise ValueError(
                    f"{firsts[True]} is a preference pair, and {firsts[False]} is not: one loss cannot read both. "
                    "Give pairs alone, or none; data.format says how a file is read."
                )
            content = hash_content(turns, rejected)
            source, label = (read_name(row, field, where) for field in (options.source_field, options.label_field))
            yield Example(
                id=f"{content}#{seen[content]}",
                row=count,
                turns=turns,
                source=source or files.source_name(path),
                names_source=bool(source),
                label=label,
                file=path,
                line=line,
                rejected=rejected,
                format=row_format,
                num_dropped_turns=num_dropped_turns,
                unread_keys=unread_keys,
            )
            seen[content] += 1
            count += 1
        if count == count_before:
            left = f" but {num_empty} with nothing to learn from" if num_empty else ""
            raise ValueError(f"{path}: no rows{left}. Give a file with at least one, or leave it out.")


def _check_options(paths: Sequence[str], options: DataOptions) -> None:
    if isinstance(paths, str):
        raise ValueError(f"data paths are the string {paths!r}; a list of paths is wanted. Write [{paths!r}].")
    if not paths:
        raise ValueError("no data paths were given; name at least one file.")
    allowed = {"format": ["auto", *formats.READ_FORMATS], "empty": ["error", "drop"]}
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            raise ValueError(f"data.{name} is {getattr(options, name)!r}; it is one of {values}.")


# ---- hashes


def hash_normalized_text(example: Example) -> str:
    """What the example says, without case, white space, layout and system turns."""
    text = " ".join(turn.content for turn in example.turns if turn.role != "system")
    return _hash_text(" ".join(text.casefold().split()))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
