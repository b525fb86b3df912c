"""Rows of JSON and JSON lines, each with its line.

Stricter than Python's JSON where a row would have two readings or none: a key that stands twice and half of a surrogate
pair are errors. NaN is read, as Python and pandas write it, and is null.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, Any, TypeVar, cast

Parsed = TypeVar("Parsed")

MAGIC_NUMBERS = {
    b"\x1f\x8b": "a gzip file; its name must then end in .jsonl.gz or .json.gz",
    b"PAR1": "a parquet file; its name must then end in .parquet",
    b"ARROW1": "an Arrow file; write it as parquet or JSON lines",
    b"PK\x03\x04": "a zip file; unpack it",
    b"BZh": "a bzip2 file; unpack it",
    b"\xfd7zXZ": "an xz file; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it",
    b"\x93NUMPY": "a numpy array, which holds no rows of text",
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
}
"""The first bytes of files that people give instead of text in UTF-8, and what they are."""


def read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    """(line, row) of each line that is not blank; a line ends at \\n alone, as U+2028 may stand in a string."""
    with _open(path) as lines:
        for line, raw in enumerate(_iter_lines(lines, path), 1):
            if text := _decode(raw, path, line).strip():
                row = _parse(text, path, line, ROW_DECODER.decode)
                if SURROGATE_ESCAPE.search(text):
                    _check_characters(row, f"{path}:{line}")
                yield line, row


def read_json(path: str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a list of rows, or of the list 'instances' of an object."""
    with _open(path) as file:
        text = _decode(b"".join(_iter_lines(file, path)), path, None)
    if not text.strip():
        return
    content = _parse(text, path, None, partial(json.loads, parse_int=float, object_pairs_hook=tuple))
    if isinstance(content, tuple):  # the outermost object; those inside are checked row by row
        pairs = content
        _parse(text, path, None, lambda _: _make_object(pairs))
        content = dict(pairs)
    rows = content.get("instances") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        kinds = {bool: "true or false", float: "a number", str: "a string", type(None): "null"}
        what = kinds.get(type(content)) or f"an object with the keys {sorted(content)}"
        raise ValueError(f"{path}: {what}; a list of rows, or an object with a list 'instances', is wanted.")
    # A second pass reads each row by itself, to know the line on which it starts.
    position = text.index("[") if rows is content else _find_value(text, "instances")
    line, has_surrogates = 1 + text.count("\n", 0, position), SURROGATE_ESCAPE.search(text)
    for number in range(len(rows)):
        begin = _skip(r"[\s,]*" if number else r"\[\s*", text, position)
        line += text.count("\n", position, begin)
        row, end = _parse(text, path, line, partial(ROW_DECODER.raw_decode, idx=begin))
        if has_surrogates:
            _check_characters(row, f"{path}:{line}")
        yield line, row
        line += text.count("\n", begin, end)
        position = end


def _find_value(text: str, key: str) -> int:
    """Where the value of a key of the outermost object begins."""
    decoder, position = json.JSONDecoder(), text.index("{") + 1
    while True:
        name, position = decoder.raw_decode(text, _skip(r"[\s,]*", text, position))
        position = _skip(r"\s*:\s*", text, position)
        if name == key:
            return position
        _, position = decoder.raw_decode(text, position)


def _skip(pattern: str, text: str, position: int) -> int:
    return re.compile(pattern).match(text, position).end()  # type: ignore[union-attr]  # each pattern matches nothing, too


def drop_nulls(value: Any) -> Any:
    """A row without the keys whose value is null or NaN, in objects inside it, too."""
    if isinstance(value, dict):
        return {name: drop_nulls(item) for name, item in value.items() if not _is_null(item)}
    if isinstance(value, list):
        holds_more = any(issubclass(kind, dict | list) for kind in set(map(type, value)))
        return [drop_nulls(item) for item in value] if holds_more else value
    return value


def open_error(path: str, error: Exception) -> OSError:
    """The error of a file that cannot be opened or read, in one sentence."""
    reason = getattr(error, "strerror", None) or str(error)
    return type(error if isinstance(error, OSError) else OSError())(
        f"{path}: cannot be opened ({reason}). Check the name, the links and the permissions."
    )


def _open(path: str) -> IO[bytes]:
    try:
        return cast(IO[bytes], gzip.open(path)) if path.endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise open_error(path, error) from None


def _iter_lines(lines: IO[bytes], path: str) -> Iterator[bytes]:
    # named here, since a stream may be closed when Python has taken gzip away
    broken = (gzip.BadGzipFile, EOFError, zlib.error)
    try:
        yield from lines
    except broken as error:
        raise ValueError(
            f"{path}: not a whole gzip file ({error}). Pack it anew, or remove .gz from the name if it is not packed."
        ) from None
    except OSError as error:
        raise open_error(path, error) from None


def _decode(raw: bytes, path: str, line: int | None) -> str:
    """The text of a line, or without `line` of a whole file."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = line or 1 + raw.count(b"\n", 0, error.start)
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        if line == 1 and (kind := next((kind for magic, kind in MAGIC_NUMBERS.items() if raw.startswith(magic)), "")):
            raise ValueError(f"{path}: not UTF-8 but {kind}.") from None
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte {column + 1} of the line). Convert the file to UTF-8, or mend that line."
        ) from None
    if line in (1, None):
        for magic, kind in MAGIC_NUMBERS.items():
            if raw.startswith(magic):
                raise ValueError(f"{path}: not JSON but {kind}.")
        if "\0" in text[:4]:
            raise ValueError(f"{path}: NUL bytes at the beginning, as of UTF-16 or UTF-32. Convert the file to UTF-8.")
    return text


class RepeatedKeyError(ValueError):
    """A JSON object with one key twice, of which a reader would have to choose a value."""


def _make_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"the key {ascii(repeated)} stands twice in one object")
    return {name: value for name, value in pairs if not _is_null(value)}


ROW_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _parse(text: str, path: str, line: int | None, decode: Callable[[str], Parsed]) -> Parsed:
    """`decode(text)`: of one line, of a row that begins on `line`, or without `line` of a whole file."""
    where = f"{path}:{line}" if line else path
    try:
        return decode(text)
    except json.JSONDecodeError as error:
        hint = ""
        if "Extra data" in error.msg:
            hint = " One object per line is the .jsonl format: rename the file."
        elif error.pos >= len(text.rstrip()) or "Unterminated" in error.msg:
            hint = " It ends too early: the file was cut, or one value spans several lines, which is the .json format."
        where = f"{path}:{(line or 1) + error.lineno - 1}"
        raise ValueError(
            f"{where}: bad JSON, {error.msg.removesuffix(' at')} at column {error.colno}. Mend that line.{hint}"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: lists or objects are nested too deeply. Remove or flatten them.") from None
    except ValueError as error:
        reason = str(error) if isinstance(error, RepeatedKeyError) else "a whole number has thousands of digits"
        raise ValueError(f"{where}: {reason}. Mend the row.") from None


def _check_characters(row: Any, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: a string holds {ascii(error.object[error.start])[1:-1]}, half of a surrogate pair, which is no "
            "character and which no tokenizer reads. Remove it, or write both halves."
        ) from None


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
