"""Append-only journals of JSON records that survive a kill.

A record counts once its newline is written. A kill in the middle of a write leaves a torn last line without one:
readers pass over it, and the next append cuts it off first. Each line ends in a seal of it and of the lines before
(`seals.py`): any other line that is not as it was written was damaged later, by hand or by the disk, and is an error.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_jax.runs.infra import distributed, seals
from bilevel_jax.runs.infra.run_dir import disk_full_error, fsync_path
from bilevel_jax.storage import copies

NO_MEASUREMENTS = {
    "event", "step", "part", "work", "seconds", "first", "kept", "steps", "batches", "reliability_draw",
}  # fmt: skip
"""Keys of a record of the log that are no measurement, or stand in it under a plainer name, too."""
NAMES = {"losses": "training loss", "rates": "learning rate", "ess": "effective sample size", "auc": "AUC of labels"}
"""What the other keys are called where they are shown."""


class LineEnd(NamedTuple):
    """The end of a line of a journal."""

    size: int
    """Bytes up to here."""
    lines: int
    seal: str


class Journal:
    """Records in a file, appended and read. Of several processes the first writes and reads, and all have what it read.

    The file is opened for each append, so it may be deleted in between: the next append begins a new one.
    """

    def __init__(self, path: str | Path, *, fsync: bool):
        """With `fsync` a record is on the disk when `append` returns; without, it is with the kernel."""
        self.path, self._fsync = Path(path), fsync
        self._read = LineEnd(0, 0, "")
        self._written = LineEnd(0, 0, "")

    def create(self) -> None:
        """Make an empty journal where there is none."""
        if not self.path.exists():
            seals.note_journal(self.path, 0, seals.find_journal_start(self.path))
            self.path.touch()
            copies.publish(self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one JSON object, after cutting off a torn last line."""
        if not distributed.is_first_process():
            return
        try:
            with open(self.path, "ab+") as file:
                size = seals.cut_torn_line(file)
                self._written = self._find_end(size)
                line, seal = seals.seal_line(record, self._written.seal)
                file.write(line)
                file.flush()
                if self._fsync:
                    os.fsync(file.fileno())
                self._written = LineEnd(size + len(line), self._written.lines + 1, seal)
            copies.publish_later(self.path)
        except OSError as error:
            if disk_full := disk_full_error(self.path, error):
                raise disk_full from error
            raise

    def remove(self) -> None:
        """Remove the file: its records are needed no more."""
        seals.note_removal(self.path)
        self.path.unlink(missing_ok=True)

    def read_new(self) -> list[dict[str, Any]]:
        """The records since the last call, at first all. Raises ValueError, with the line, for a damaged one.

        Of several processes all call this, and get what the first one finds: another may see a shorter file.
        """

        def read() -> list[dict[str, Any]]:
            records: list[dict[str, Any]] = []
            if self.path.exists():
                self._read = self._read_from(self._read, records)
            return records

        return distributed.share_work_of_first(read)

    def sync(self) -> None:
        """Put the journal on the disk, and note in the run how far it goes: what is cut off later is missed."""
        if distributed.is_first_process() and self.path.exists():
            fsync_path(self.path)
            if size := self.path.stat().st_size:
                self._written = self._find_end(size)
                copies.publish(self.path)
                seals.note_journal(self.path, self._written.size, self._written.seal)

    def _find_end(self, size: int) -> LineEnd:
        """The end of the last whole line of the file, which has so many bytes."""
        if size == 0:
            start = seals.find_journal_start(self.path)
            seals.note_journal(self.path, 0, start)
            return LineEnd(0, 0, start)
        if size == self._written.size:
            return self._written
        return self._read_from(LineEnd(0, 0, ""), [])

    def _read_from(self, place: LineEnd, records: list[dict[str, Any]]) -> LineEnd:
        """Append the records after a place, and return the place after them."""
        if place.size == 0:
            place = place._replace(seal=seals.find_journal_start(self.path))
        try:
            for record, seal, size in seals.read_sealed_lines(self.path, place.seal, place.size):
                records.append(record)
                place = LineEnd(size, place.lines + 1, seal)
        except seals.DamagedLineError:
            raise seals.DamagedFileError(
                f"{self.path}:{place.lines + 1}: not what was written there.",
                "A stopped run tears the last line only, so this file was changed later, or is of another run; put "
                "back a copy of it, or remove it.",
            ) from None
        return place


class JsonLog:
    """The log of a run: a journal of objects that each have a `step`. nan becomes null. On the disk when closed."""

    def __init__(self, path: str | Path):
        self._journal = Journal(path, fsync=False)
        if distributed.is_first_process():
            self._journal.create()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numpy and jax scalars and arrays become numbers and lists."""
        if "step" not in record:
            raise ValueError(f"a log record needs a 'step'; its keys are {sorted(record)}.")
        self._journal.append(_to_jsonable(record))

    def sync(self) -> None:
        """Put the log on the disk, and note how far it goes."""
        self._journal.sync()

    def write_histogram(self, name: str, step: int, values: Any) -> None:
        """Nothing: a log holds records."""

    def close(self) -> None:
        """Put the log on the disk."""
        self.sync()


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All records of a journal; none where there is no file. Raises ValueError for a damaged one."""
    seals.check(path)
    return Journal(path, fsync=False).read_new()


def list_numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float, float]]:
    """(name, step, value) of each number of a record, at most two levels deep."""
    step = float(record.get("step", 0))
    for key, value in record.items():
        if key in NO_MEASUREMENTS:
            continue
        words = NAMES.get(key, key.replace("_", " "))
        name = f"{words} {prefix}" if prefix in ("loss", "accuracy") else f"{prefix} {words}".strip()
        if isinstance(value, bool | int | float) and math.isfinite(value):
            yield name, step, float(value)
        elif isinstance(value, Mapping) and not prefix:
            for inner, _, number in list_numbers(value, name):
                yield inner, step, number
        elif key in ("losses", "rates") and isinstance(value, list):
            first = record.get("first", step)
            yield from (
                (name, first + place, float(number))
                for place, number in enumerate(value)
                if isinstance(number, int | float) and math.isfinite(number)
            )


def _to_jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_jsonable(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else str(value) if math.isinf(value) else value
    if isinstance(value, str):
        return copies.show(value)
    if isinstance(value, int | bool | None):
        return value
    return _to_jsonable(value.tolist() if hasattr(value, "tolist") else str(value))
