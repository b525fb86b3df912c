"""Rows of files and data sets -> Examples: ids from content, errors with file and line, duplicates, leaks, splits.

What is read, by the end of the name:
    .jsonl          one JSON object (or string) per line
    .json           a list of objects, a list of strings, or {"instances": [...]}
    .parquet        a table
    a folder        written by `datasets.save_to_disk`; `folder@split` where it holds several splits
    hub:name@split  a data set of the Hugging Face hub, `hub:name:config@split`; needs a network

What a row may look like (found out for each file from its first row, or forced by `DataOptions.format`):
    chat      messages = [{"role": "user", "content": "..."}, ...]
    prompt    prompt, response      other names through prompt_field and response_field
    alpaca    instruction, input (may be absent or empty), output
    text      text                  another name through text_field; a bare string is a text row as well
"""

import bisect
import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = ("chat", "prompt", "alpaca", "text")
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One message: `role` is system, user or assistant, or text for a row that is no dialogue."""

    role: str
    content: str


class Example(NamedTuple):
    """One row. Prompt/response and Alpaca rows are a user turn and an assistant turn."""

    id: str
    """Hash of the turns # occurrence: the same wherever the row stands, whatever its source or label."""
    row: int
    """0-based position in the list it belongs to, which is its row of the weight table."""
    turns: tuple[Turn, ...]
    source: str
    """The row's source field, or the name of its file."""
    label: str | None
    """Hidden truth ("clean", "noise", ...). Only reports and oracles may look at it."""
    file: str
    line: int
    """1-based; in a parquet table or a `datasets` folder, the row."""
    rejected: tuple[Turn, ...] = ()
    """In a preference pair, the dialogue with the response that was not preferred; `turns` has the one that was."""

    @property
    def where(self) -> str:
        """`file:line`, as it stands in every error."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class DataOptions:
    """How to read a row. The names of the fields are used where the layout has such a field."""

    format: str = "auto"
    """auto, chat, prompt, alpaca or text."""
    prompt_field: str = "prompt"
    response_field: str = "response"
    text_field: str = "text"
    source_field: str = "source"
    label_field: str = "label"
    empty: str = "error"
    """What becomes of a row whose response or text is empty: error, or drop (leave it out of the set)."""


class Empty(ValueError):
    """A row with nothing to learn from."""


def load(paths: Sequence[str], options: DataOptions = DataOptions()) -> list[Example]:  # noqa: B008 (frozen)
    """Read all rows of all paths, in order; `row` counts through them.

    Strict: a row that cannot be used raises a ValueError that names its file and line, rather than being skipped.
    """
    if isinstance(paths, str):
        raise ValueError(f"data paths are the string {paths!r}; a list of paths is wanted. Write [{paths!r}].")
    if not paths:
        raise ValueError("no data paths were given; name at least one file.")
    if options.format not in ("auto", *FORMATS):
        raise ValueError(f"data.format is {options.format!r}; it is one of {['auto', *FORMATS]}.")
    if options.empty not in ("error", "drop"):
        raise ValueError(f"data.empty is {options.empty!r}; it is one of ['error', 'drop'].")
    examples: list[Example] = []
    seen: Counter[str] = Counter()
    for path in paths:
        kind, first = options.format, len(examples)
        for line, row in _rows(str(path)):
            kind = kind if kind != "auto" else _detect(row, options, f"{path}:{line}")
            try:
                turns = _turns(row, kind, options, f"{path}:{line}")
            except Empty:
                if options.empty == "drop":
                    continue
                raise
            content = content_hash(turns)
            source, label = (
                _name(row, field, f"{path}:{line}") for field in (options.source_field, options.label_field)
            )
            examples.append(
                Example(
                    id=f"{content}#{seen[content]}",
                    row=len(examples),
                    turns=turns,
                    source=source or _stem(str(path)),
                    label=label,
                    file=str(path),
                    line=line,
                )
            )
            seen[content] += 1
        if len(examples) == first:
            raise ValueError(f"{path}: no rows. Give a file with at least one, or leave it out.")
    return examples


def content_hash(turns: Iterable[Turn]) -> str:
    """64 bits of SHA-256 of the turns, as 16 hex digits; for 10 million rows one collision in 370,000 sets."""
    return _digest(json.dumps([list(turn) for turn in turns], ensure_ascii=False))


def duplicates(examples: Sequence[Example]) -> list[list[Example]]:
    """The groups of two or more examples that have exactly the same turns, in order of first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.id.split("#")[0], []).append(example)
    return [group for group in groups.values() if len(group) > 1]


def leaks(train: Sequence[Example], validation: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Pairs (train, validation) that say the same: equal up to case, white space, layout and system turns.

    Catches copies, not paraphrases, and not a prompt that comes back with another response.
    """
    held: dict[str, list[Example]] = {}
    for example in validation:
        held.setdefault(_gist(example), []).append(example)
    return [(example, other) for example in train for other in held.get(_gist(example), ())]


def split(examples: Sequence[Example], fractions: Sequence[float], seed: int) -> tuple[list[Example], ...]:
    """Deal the examples into parts of about the given fractions, by a hash of their content and the seed.

    Where a row goes depends on nothing but its own content, so adding, removing or reordering rows moves no other
    row; and rows that `leaks` would pair go to the same part. `row` is counted anew within each part.
    The sizes are random: a part of fraction f of n rows has f n ± sqrt(n f (1 - f)).
    """
    if any(f <= 0 for f in fractions) or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(f"split fractions {list(fractions)} must be positive and sum to 1.")
    edges = [sum(fractions[: i + 1]) for i in range(len(fractions) - 1)]
    parts: tuple[list[Example], ...] = tuple([] for _ in fractions)
    for example in examples:
        place = int(_digest(f"{seed} {_gist(example)}"), 16) / 2**64
        part = parts[bisect.bisect_right(edges, place)]
        part.append(example._replace(row=len(part)))
    if not all(parts):
        raise ValueError(
            f"splitting {len(examples)} rows by fractions {list(fractions)} leaves parts of {[len(p) for p in parts]} "
            "rows, and every part needs one. Give more rows, fewer parts, or another seed."
        )
    return parts


def summary(examples: Sequence[Example]) -> str:
    """One line for people: rows, layouts, sources, labels, duplicates."""
    kinds = Counter(kind_of(e) for e in examples)
    sources = Counter(e.source for e in examples)
    labels = Counter(e.label for e in examples if e.label is not None)
    copies = sum(len(group) - 1 for group in duplicates(examples))
    parts = [
        f"{len(examples):,} rows",
        ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()),
        f"{len(sources)} sources" if len(sources) > 1 else f"source {next(iter(sources), 'none')}",
        *([f"labels {', '.join(sorted(labels)[:8])}"] if labels else []),
        *([f"{copies:,} are copies of an earlier row"] if copies else []),
    ]
    return "; ".join(parts)


def kind_of(example: Example) -> str:
    """text, prompt (one user turn, one assistant turn) or chat."""
    roles = [turn.role for turn in example.turns]
    return "text" if roles == ["text"] else "prompt" if roles == ["user", "assistant"] else "chat"


# ---- rows -> turns


def _detect(row: Any, options: DataOptions, where: str) -> str:
    """The layout of a file, from its first row."""
    if isinstance(row, str):
        return "text"
    _object(row, where)
    pair = {options.prompt_field, options.response_field}
    if options.text_field != DataOptions.text_field:
        return "text"
    if pair != {DataOptions.prompt_field, DataOptions.response_field}:
        return "prompt"
    wanted = {"chat": {"messages"}, "prompt": pair, "alpaca": {"instruction", "output"}, "text": {options.text_field}}
    found = [kind for kind, fields in wanted.items() if fields <= set(row)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{where}: the keys {sorted(row)} fit the formats {found}. Set data.format to one of them.")
    if options.prompt_field in row:
        return "prompt"  # whose reader says that the response is missing
    raise ValueError(
        f"{where}: no known layout; the keys are {sorted(row)}, and 'messages', 'prompt' and 'response', "
        "'instruction' and 'output', or 'text' are wanted. "
        "Set data.prompt_field and data.response_field, or data.text_field, to your names."
    )


def _turns(row: Any, kind: str, options: DataOptions, where: str) -> tuple[Turn, ...]:
    if isinstance(row, str):
        if kind != "text":
            raise ValueError(f"{where}: a bare string among {kind} rows. Keep one layout per file.")
        return (Turn("text", _filled(row, "text", where)),)
    _object(row, where)
    if kind == "text":
        return (Turn("text", _filled(_field(row, options.text_field, "text", kind, where), "text", where)),)
    if kind == "chat":
        return _messages(_field(row, "messages", "", kind, where), where)
    if kind == "alpaca":
        prompt = _string(_field(row, "instruction", "prompt", kind, where), "instruction", where)
        extra = row.get("input")
        if extra is not None and _string(extra, "input", where):
            prompt = f"{prompt}\n{extra}"
        response = _field(row, "output", "response", kind, where)
        return Turn("user", prompt), Turn("assistant", _filled(response, "output", where))
    prompt = _string(_field(row, options.prompt_field, "prompt", kind, where), options.prompt_field, where)
    response = _field(row, options.response_field, "response", kind, where)
    return Turn("user", prompt), Turn("assistant", _filled(response, options.response_field, where))


def _messages(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' is {_show(messages)}; a list of {{role, content}} objects is wanted.")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(
                f"{where}: message {number} is {_show(message)}; an object with role and content is wanted."
            )
        role = message["role"]
        if role not in ROLES:
            raise ValueError(
                f"{where}: message {number} has role {_show(role)}; the roles are {list(ROLES)}. Rename it."
            )
        if role == "system" and number > 1:
            raise ValueError(f"{where}: message {number} is a system message; only the first one may be.")
        name = f"content of message {number}"
        check = _filled if role == "assistant" else _string
        turns.append(Turn(role, check(message["content"], name, where)))
    if turns[-1].role != "assistant":
        raise ValueError(
            f"{where}: the last message has role '{turns[-1].role}'; training needs an answer. "
            "End the messages with role 'assistant'."
        )
    return tuple(turns)


def _object(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: the row is {_show(row)}; a JSON object such as {{"prompt": ...}} is wanted.')


def _field(row: dict, name: str, meaning: str, kind: str, where: str) -> Any:
    if name in row:
        return row[name]
    keys = f"{where}: no '{name}'; the keys are {sorted(row)}."
    remedies = {
        "prompt": f"Set data.{meaning}_field to one of them.",
        "text": "Set data.text_field to one of them.",
        "alpaca": "Keep one layout per file, or set data.prompt_field and data.response_field.",
        "chat": "Keep one layout per file.",
    }
    raise ValueError(f"{keys} {remedies[kind]}")


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{name}' is {_show(value)}; a string is wanted.")
    return value


def _filled(value: Any, name: str, where: str) -> str:
    if not _string(value, name, where).strip():
        raise Empty(
            f"{where}: '{name}' is empty, so there is nothing to learn from. "
            "Fill it, or set data.empty to 'drop' to leave such rows out."
        )
    return value


def _name(row: Any, field: str, where: str) -> str | None:
    """A source or a label: a string, or a number as a string."""
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, (dict, list)):
        raise ValueError(f"{where}: '{field}' is {_show(value)}; a string or a number is wanted.")
    return None if value is None else str(value)


# ---- files -> rows


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """(1-based line, row) for every row of one path."""
    if path.startswith("hub:"):
        yield from enumerate(_hub(path), 1)
        return
    folder, _, part = path.partition("@")
    if Path(folder).is_dir():
        yield from enumerate(_saved(folder, part), 1)
        return
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file. {_nearest(Path(path))}")
    reader = READERS.get(Path(path).suffix)
    if reader is None:
        raise ValueError(f"{path}: the name must end in one of {sorted(READERS)}, or be a folder of `datasets`.")
    yield from reader(path)


def _jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as lines:
        for line, raw in enumerate(lines, 1):
            if text := _decode(raw, f"{path}:{line}").strip():
                yield line, _parse(text, path, line)


def _json(path: str) -> Iterator[tuple[int, Any]]:
    text = _decode(Path(path).read_bytes(), path)
    if not text.strip():
        return
    whole = _parse(text, path, 1)
    rows, start = whole, text.find("[")
    if isinstance(whole, dict):
        rows = whole.get("instances")
        if found := re.search(r'"instances"\s*:\s*', text):
            start = found.end()
    if not isinstance(rows, list):
        raise ValueError(f"{path}: {_show(whole)}; a list of rows, or an object with a list 'instances', is wanted.")
    # A second pass finds the line on which each row starts.
    decoder, line, place = json.JSONDecoder(), 1 + text.count("\n", 0, start), start
    for row in rows:
        begin = re.compile(r"[\s,\[]*").match(text, place + (place == start)).end()  # type: ignore[union-attr]
        line += text.count("\n", place, begin)
        yield line, row
        _, end = decoder.raw_decode(text, begin)
        line += text.count("\n", begin, end)
        place = end


def _parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error}). Write it anew, or rename it.") from None
    yield from enumerate((row for batch in table.iter_batches() for row in batch.to_pylist()), 1)


READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def _saved(folder: str, part: str) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(folder)
    except FileNotFoundError:
        files = sorted(p.name for p in Path(folder).iterdir() if p.suffix in READERS)
        hint = f"Name a file in it, such as {Path(folder, files[0])}." if files else "Name a file."
        raise ValueError(f"{folder}: a folder, but not one that `datasets.save_to_disk` wrote. {hint}") from None
    if isinstance(data, datasets.DatasetDict):
        if part not in data:
            raise ValueError(f"{folder}: {part or 'no'} split asked for; it has {sorted(data)}. Write {folder}@NAME.")
        return data[part]
    return data


def _hub(path: str) -> Any:
    found = re.fullmatch(r"hub:([^:@]+)(?::([^:@]+))?@(.+)", path)
    if not found:
        raise ValueError(f"{path}: a hub data set is written hub:name@split or hub:name:config@split.")
    import datasets

    name, config, part = found.groups()
    try:
        return datasets.load_dataset(name, config, split=part)
    except Exception as error:  # offline, unknown name, unknown split: `datasets` has its own class for each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: the hub gave no such data set ({type(error).__name__}: {reason}). Check the name and the "
            "network, or download it where there is one, `save_to_disk` it and name the folder."
        ) from None


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}). Convert the file to UTF-8.") from None


def _parse(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        hint = " One object per line is the .jsonl format: rename the file." if "Extra data" in error.msg else ""
        raise ValueError(f"{where}: bad JSON, {error.msg} at column {error.colno}. Mend that line.{hint}") from None


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"There is no folder {parent} either."
    names = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3, cutoff=0.5)
    return f"Nearest in {parent}: {', '.join(names)}." if names else f"Nothing in {parent} has a similar name."


def _stem(path: str) -> str:
    return Path(path.removeprefix("hub:").partition("@")[0]).stem


# ---- hashes


def _gist(example: Example) -> str:
    """What the example says, without case, white space, layout and system turns."""
    text = " ".join(turn.content for turn in example.turns if turn.role != "system")
    return _digest(" ".join(text.casefold().split()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
