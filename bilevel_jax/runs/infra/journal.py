"""Append-only journals of JSON records that survive a kill.

A record counts once its newline is written. A kill in the middle of a write leaves a torn last line without one:
readers pass over it, and the next append cuts it off first. Any other line that is no JSON was damaged later, by hand
or by the disk, and is an error.
"""

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.run_dir import disk_full_error, fsync_path


class Journal:
    """Records in a file, appended and read. Of several processes the first writes, and all read.

    The file is opened for each append, so it may be deleted in between: the next append begins a new one.
    """

    def __init__(self, path: str | Path, *, fsync: bool):
        """With `fsync` a record is on the disk when `append` returns; without, it is with the kernel."""
        self.path, self._fsync = Path(path), fsync
        self._bytes_read = self._lines_read = 0

    def append(self, record: Any) -> None:
        """Append one JSON value, after cutting off a torn last line."""
        # a lone surrogate, which UTF-8 cannot hold, becomes the JSON escape that stands for it
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"
        if not distributed.is_first_process():
            return
        try:
            with open(self.path, "ab+") as file:
                _cut_torn_line(file)
                file.write(line)
                file.flush()
                if self._fsync:
                    os.fsync(file.fileno())
        except OSError as error:
            if disk_full := disk_full_error(self.path, error):
                raise disk_full from error
            raise

    def read_new(self) -> list[Any]:
        """The records since the last call, at first all. Raises ValueError, with the line, for a damaged one."""
        records: list[Any] = []
        if not self.path.exists():
            return records
        with open(self.path, "rb") as file:
            file.seek(self._bytes_read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._bytes_read, self._lines_read = self._bytes_read + len(line), self._lines_read + 1
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}:{self._lines_read}: not a JSON record ({error}). A stopped run tears the last "
                        "line only, so this file was damaged later; remove the line, or the whole file."
                    ) from error
        return records


class JsonLog:
    """The log of a run: a journal of objects that each have a `step`. nan becomes null. On the disk when closed."""

    def __init__(self, path: str | Path):
        self._journal = Journal(path, fsync=False)
        if distributed.is_first_process():
            self._journal.path.touch()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numpy and jax scalars and arrays become numbers and lists."""
        if "step" not in record:
            raise ValueError(f"a log record needs a 'step'; its keys are {sorted(record)}.")
        self._journal.append(_to_jsonable(record))

    def close(self) -> None:
        """Put the log on the disk."""
        if distributed.is_first_process():
            fsync_path(self._journal.path)


def read_journal(path: str | Path) -> list[Any]:
    """All records of a journal; none where there is no file. Raises ValueError, with the line, for a damaged one."""
    return Journal(path, fsync=False).read_new()


def _cut_torn_line(file: IO[bytes]) -> None:
    """Cut off what follows the last newline of a file that is open for reading and appending."""
    end = file.seek(0, os.SEEK_END)
    intact_bytes = end
    while intact_bytes:
        start = max(0, intact_bytes - 4096)
        file.seek(start)
        newline = file.read(intact_bytes - start).rfind(b"\n")
        if newline >= 0:
            intact_bytes = start + newline + 1
            break
        intact_bytes = start
    if intact_bytes < end:
        file.truncate(intact_bytes)


def _to_jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_jsonable(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else str(value) if math.isinf(value) else value
    if isinstance(value, str | int | bool | None):
        return value
    return _to_jsonable(value.tolist() if hasattr(value, "tolist") else str(value))
