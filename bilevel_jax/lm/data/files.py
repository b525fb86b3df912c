"""Reading and writing of JSON, JSONL, Parquet and Hugging Face datasets.

What is read, by the end of the name:
    .jsonl          one JSON object (or string) per line
    .json           a list of objects, a list of strings, or {"instances": [...]}
    .parquet        a table
    a folder        written by `datasets.save_to_disk`; `folder@split` where it holds several splits
    hub:name@split  a data set of the Hugging Face hub, of one configuration `hub:name:config@split`, of one revision
                    `hub:name@revision:config@split`; one of its files `hf://datasets/name@revision/file.jsonl`
    .jsonl.gz and .json.gz are unpacked on the way.
    Each but the last may lie on object storage: s3://bucket/rows.jsonl, gs://bucket/folder@split. It is copied to this
    machine whole, once, before it is read.

A key whose value is null or NaN is an absent key, at any depth: in tables every row has every column, so the same rows
read from JSON lines and from a table are equal. What cannot be read is a ValueError or an OSError with the file, the
line where it has one, and the remedy.
"""

import difflib
import itertools
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bilevel_jax.lm.data.json_rows import drop_nulls, open_error, read_json, read_jsonl
from bilevel_jax.lm.hub.downloads import find_dataset_file
from bilevel_jax.lm.hub.names import DATASET_URL_PREFIX, PREFIX, parse_dataset_name
from bilevel_jax.lm.hub.rows import read_dataset_rows
from bilevel_jax.storage import copies, urls


def read_rows(path: str, *, streaming: bool = False) -> Iterator[tuple[int, Any]]:
    """(1-based line, row) for every row of one path; in a table or a data set, the line is the row.

    A .json file is held in memory whole; the others are read as they are asked for. With `streaming`, a data set of the
    hub is streamed instead of downloaded first; it then knows no slices such as train[:9].
    """
    if urls.is_url(path):
        with copies.shown_errors():
            url, split = urls.split_dataset_url(path)
            yield from read_rows(f"{copies.local_path(url)}{split}")
        return
    name = parse_dataset_name(path)
    if name and name.file:
        yield from _choose_reader(path)(str(find_dataset_file(name)))
        return
    if name:
        rows: Iterable[Any] = read_dataset_rows(name, streaming=streaming)
    elif os.path.isdir(folder := path.partition("@")[0]):
        rows = _load_saved_dataset(folder, path.partition("@")[2])
    else:
        _check_file(path)
        yield from _choose_reader(path)(path)
        return
    for line, row in enumerate(rows, 1):
        yield line, drop_nulls(row)


def iterate_rows_in_memory(rows: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """As `read_rows`, of a list of rows or of a `datasets.Dataset`."""
    return ((line, drop_nulls(row)) for line, row in enumerate(rows, 1))


def is_file_name(row: Any) -> bool:
    """Whether a string is written as a path that `read_rows` reads, rather than as text."""
    if not isinstance(row, str) or len(row.split()) != 1:
        return False
    return row.startswith((PREFIX, DATASET_URL_PREFIX)) or Path(row.removesuffix(".gz")).suffix in FILE_READERS


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


def short_name(path: str) -> str:
    """The name of a path without its folder, or of a data set on the hub without its commit: for people."""
    if name := parse_dataset_name(path):
        return str(name._replace(revision="") if name.is_pinned else name)
    return Path(path).name


def source_name(path: str) -> str:
    """The name of a path without its folder and ending: what the rows of a file are called after."""
    if name := parse_dataset_name(path):
        path = name.file or f"{name.repo}:{name.config}".rstrip(":")
    return Path(path.partition("@")[0].removesuffix(".gz")).stem


# ---- reading


def _choose_reader(path: str) -> Callable[[str], Iterator[tuple[int, Any]]]:
    reader = FILE_READERS.get(Path(path.removesuffix(".gz")).suffix)
    if reader is None:
        raise ValueError(
            f"{path}: the name must end in one of {sorted(FILE_READERS)}, or be a folder of `datasets`. Write the "
            "rows as JSON lines: one object per line."
        )
    return reader


def _check_file(path: str) -> None:
    """Raises OSError unless there is a file that can be opened."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file. {_suggest_names(Path(path))}") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or holds a NUL
        raise open_error(path, error) from None
    if not stat.S_ISREG(mode):
        raise OSError(
            f"{path}: not a file but a pipe, a socket or a device. Rows are read more than once: write them to a file."
        )


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    line = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        for batch in table.iter_batches() if len(set(names)) == len(names) else ():
            for row in batch.to_pylist():
                line += 1
                yield line, drop_nulls(row)
    except PermissionError as error:
        raise open_error(path, error) from None
    except Exception as error:  # damaged pages, strings that are no UTF-8, unknown time zones: each has its own class
        where = f"{path}: the rows after {line:,}" if line else f"{path}: the file"
        raise ValueError(
            f"{where} cannot be read as parquet ({_one_line(error)}). Fetch or write it anew, or rename it if it is "
            "no parquet file."
        ) from None
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: two columns are called '{repeated[0]}'. Rename or remove one of them.")


NUM_ROWS_VALIDATED = 1000
"""Rows of a data set that are looked at together before the first of them is read."""
FILE_READERS = {".jsonl": read_jsonl, ".json": read_json, ".parquet": _read_parquet}


def _load_saved_dataset(folder: str, split: str) -> Iterator[Any]:
    import datasets

    try:
        data = datasets.load_from_disk(folder)
    except FileNotFoundError as error:
        if Path(folder, "state.json").exists():
            raise _damaged_folder(folder, error) from None
        files = sorted(
            (p.name for p in Path(folder).iterdir() if p.suffix in FILE_READERS),
            key=lambda name: (
                name != "weights.parquet",
                name.endswith(".json"),
                name,
            ),  # a run's other files are about it
        )
        hint = f"Name a file in it, such as {Path(folder, files[0])}." if files else "Name a file."
        raise ValueError(f"{folder}: a folder, but not one that `datasets.save_to_disk` wrote. {hint}") from None
    except Exception as error:  # damaged JSON, Arrow files and states: each has an error class of its own
        raise _damaged_folder(folder, error) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{folder}: {split or 'no'} split asked for; it has {sorted(data)}. Write {folder}@NAME.")
        data = data[split]
    elif split:
        raise ValueError(f"{folder}: the split '{split}' is asked for, and the data set has no splits. Write {folder}.")
    rows, table = iter(data), data.data.table
    try:
        for start in range(0, len(data), NUM_ROWS_VALIDATED):
            # Arrow takes the offsets of a file as they are: a damaged one would read beyond the memory
            table.slice(start, NUM_ROWS_VALIDATED).validate(full=True)
            yield from itertools.islice(rows, NUM_ROWS_VALIDATED)
    except Exception as error:
        raise _damaged_folder(folder, error) from None


def _damaged_folder(folder: str, error: Exception) -> ValueError:
    return ValueError(
        f"{folder}: the data set in this folder cannot be read ({type(error).__name__}: {_one_line(error)}). Save it "
        "anew with `datasets.save_to_disk`."
    )


def _suggest_names(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{parent} is a file, not a folder." if parent.exists() else f"There is no folder {parent} either."
    if path.is_symlink():
        return f"It is a link to {os.readlink(path)}, which is not there."
    names = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], n=3, cutoff=0.5)
    return f"Nearest in {parent}: {', '.join(names)}." if names else f"Nothing in {parent} has a similar name."


def describe_value(value: Any) -> str:
    """A value's type and beginning, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---- writing


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    _write_text(path, "".join(_format_json(path, row) + "\n" for row in rows))


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    _write_text(path, _format_json(path, rows, indent=1) + "\n")


def _format_json(path: Path, value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    except ValueError as error:
        raise ValueError(
            f"{path}: a row holds a number that is not finite, which JSON lacks ({error}). Write parquet instead."
        ) from None


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
