"""Reading and writing of JSON, JSONL, Parquet and Hugging Face datasets.

What is read, by the end of the name:
    .jsonl          one JSON object (or string) per line
    .json           a list of objects, a list of strings, or {"instances": [...]}
    .parquet        a table
    a folder        written by `datasets.save_to_disk`; `folder@split` where it holds several splits
    hub:name@split  a data set of the Hugging Face hub, `hub:name:config@split`; needs a network
    .jsonl.gz and .json.gz are unpacked on the way.
"""

import difflib
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast


def read_rows(path: str, *, streaming: bool = False) -> Iterator[tuple[int, Any]]:
    """(1-based line, row) for every row of one path; in a table or a data set, the line is the row.

    A .json file is held in memory whole; the others are read as they are asked for. With `streaming`, a data set of the
    hub is streamed instead of downloaded first; it then knows no slices such as train[:9].
    """
    if path.startswith("hub:"):
        yield from enumerate(_load_hub_dataset(path, streaming), 1)
        return
    folder, _, part = path.partition("@")
    if Path(folder).is_dir():
        yield from enumerate(_load_saved_dataset(folder, part), 1)
        return
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file. {_suggest_names(Path(path))}")
    reader = FILE_READERS.get(Path(path.removesuffix(".gz")).suffix)
    if reader is None:
        raise ValueError(f"{path}: the name must end in one of {sorted(FILE_READERS)}, or be a folder of `datasets`.")
    yield from reader(path)


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], file_format: str) -> None:
    """Write rows as jsonl, json, parquet, or a folder of `datasets.save_to_disk`; `read_rows` reads each of them.

    Writes straight to the path, whatever its name: a caller that wants all or nothing gives one next to the real path
    and renames. In the two tables every row has every column, and null where a row has no such key; values of one
    column must be of one type.
    """
    if file_format not in FILE_WRITERS:
        raise ValueError(f"rows are to be written as {file_format!r}; it is one of {list(FILE_WRITERS)}.")
    rows = list(rows)
    if not rows:
        raise ValueError(f"{path}: no rows to write. A file without rows could not be read again.")
    FILE_WRITERS[file_format](Path(path), rows)


def source_name(path: str) -> str:
    """The name of a path without its folder and ending: what the rows of a file are called after."""
    return Path(path.removeprefix("hub:").partition("@")[0].removesuffix(".gz")).stem


# ---- reading


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with _open(path) as lines:
        for line, raw in enumerate(_iter_lines(lines, path), 1):
            if text := _decode(raw, f"{path}:{line}").strip():
                yield line, _parse(text, path, line)


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        text = _decode(b"".join(_iter_lines(file, path)), path)
    if not text.strip():
        return
    content = _parse(text, path, 1)
    rows, start = content, text.find("[")
    if isinstance(content, dict):
        rows = content.get("instances")
        if match := re.search(r'"instances"\s*:\s*', text):
            start = match.end()
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: {describe_value(content)}; a list of rows, or an object with a list 'instances', is wanted."
        )
    # A second pass finds the line on which each row starts.
    decoder, line, position = json.JSONDecoder(), 1 + text.count("\n", 0, start), start
    for row in rows:
        begin = re.compile(r"[\s,\[]*").match(text, position + (position == start)).end()  # type: ignore[union-attr]
        line += text.count("\n", position, begin)
        yield line, row
        _, end = decoder.raw_decode(text, begin)
        line += text.count("\n", begin, end)
        position = end


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error}). Write it anew, or rename it.") from None
    yield from enumerate((row for batch in table.iter_batches() for row in batch.to_pylist()), 1)


FILE_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _load_saved_dataset(folder: str, split: str) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(folder)
    except FileNotFoundError:
        files = sorted(p.name for p in Path(folder).iterdir() if p.suffix in FILE_READERS)
        hint = f"Name a file in it, such as {Path(folder, files[0])}." if files else "Name a file."
        raise ValueError(f"{folder}: a folder, but not one that `datasets.save_to_disk` wrote. {hint}") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{folder}: {split or 'no'} split asked for; it has {sorted(data)}. Write {folder}@NAME.")
        return data[split]
    return data


def _load_hub_dataset(path: str, streaming: bool) -> Iterator[Any]:
    match = re.fullmatch(r"hub:([^:@]+)(?::([^:@]+))?@(.+)", path)
    if not match:
        raise ValueError(f"{path}: a hub data set is written hub:name@split or hub:name:config@split.")
    import datasets

    name, config, split = match.groups()
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # offline, unknown name, unknown split: `datasets` has its own class for each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: the hub gave no such data set ({type(error).__name__}: {reason}). Check the name and the "
            "network, or download it where there is one, `save_to_disk` it and name the folder."
        ) from None


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.endswith(".gz") else open(path, "rb")


def _iter_lines(lines: IO[bytes], path: str) -> Iterator[bytes]:
    broken = (gzip.BadGzipFile, EOFError)  # named here, since a stream may be closed when Python has taken gzip away
    try:
        yield from lines
    except broken as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}). Pack it anew.") from None


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


def _suggest_names(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"There is no folder {parent} either."
    names = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3, cutoff=0.5)
    return f"Nearest in {parent}: {', '.join(names)}." if names else f"Nothing in {parent} has a similar name."


def describe_value(value: Any) -> str:
    """A value's type and beginning, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---- writing


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    _write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    # Half of a surrogate pair has no UTF-8; its escape is the same character to a reader of JSON.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(_make_arrow_table(path, rows), path)


def _write_dataset_folder(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset(datasets.table.InMemoryTable(_make_arrow_table(path, rows))).save_to_disk(str(path))
    finally:
        if shown:
            datasets.enable_progress_bars()


def _make_arrow_table(path: Path, rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    names = dict.fromkeys(name for row in rows for name in row)  # pyarrow itself looks at the first row alone
    columns = {}
    for name in names:
        try:
            columns[name] = pyarrow.array([row.get(name) for row in rows])
        except (pyarrow.ArrowException, UnicodeEncodeError) as error:
            raise ValueError(
                f"{path}: the column '{name}' cannot be written as a table ({error}). Write jsonl instead."
            ) from None
    return pyarrow.table(columns)


FILE_WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": _write_jsonl,
    "json": _write_json,
    "parquet": _write_parquet,
    "folder": _write_dataset_folder,
}
