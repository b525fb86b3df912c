"""Seals of a run's files: what was written, by size and SHA-256, and whether it is still there.

While a run goes on, `seals.jsonl` in its folder has a line for every file that is written, on the disk before the file
takes its name. A line is a JSON object that ends in a seal: a hash of the line and of the seal before it, so that no
line can be changed, moved, left out or taken from another run unseen. Journals have such lines, too.

A finished run has `manifest.json`: the size and SHA-256 of every file, and its own. It is written last; from then on
nothing in the folder is written. A file that is in neither is not of the run, and is read as it is.
"""

import hashlib
import json
import math
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_jax.storage import copies

SEALS_FILE, MANIFEST_FILE = "seals.jsonl", "manifest.json"
CONFIG_FILE, INPUTS_FILE, ENVIRONMENT_FILE, TOKENS_FILE, HUB_FILE = NOT_REMADE = (
    "config.yaml", "inputs.json", "environment.json", "tokens.json", "hub.json",
)  # fmt: skip
"""Files that a run begins with, and cannot make again. Whatever else is missing is made again, the log aside."""
LOG_FILE = "log.jsonl"
"""What a finished run cannot make again either; one that is not finished goes on without it, and says so."""
SEAL_DIGITS = 16
"""Hex digits of the seal of a line."""
MAX_DAMAGES_SHOWN = 5
_SEAL_KEY = b', "seal": "'


class DamagedFileError(ValueError):
    """A file does not hold what was written to it; `problem` is the error's text without the `remedy`."""

    def __init__(self, problem: str, remedy: str = ""):
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem} {remedy}" if remedy else problem)


class DamagedLineError(DamagedFileError):
    """A line of a journal is not as it was written; `number` counts from the first that was read."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"line {number} is not as it was written.")


class Seal(NamedTuple):
    """What a file holds: its size and SHA-256, or, of a journal, the seal of the line that ends at this size."""

    size: int
    sha256: str = ""
    line_seal: str = ""


class Damage(NamedTuple):
    """A file of a run that is not as it was written."""

    name: str
    """Relative to the run's folder."""
    problem: str
    is_missing: bool = False
    is_checkpoint: bool = False

    @property
    def heals(self) -> bool:
        """Whether --resume of a finished run makes it again, or passes over it."""
        return self.name not in (*NOT_REMADE, LOG_FILE) and (self.is_missing or self.is_checkpoint)


# ---- JSON that keeps every float


def format_json(value: Any, **options: Any) -> str:
    """The value as JSON, which has no word for nan, inf and -inf: they are objects such as {"nonfinite": "nan"}."""
    return json.dumps(_replace_nonfinite(value), allow_nan=False, **options)


def parse_json(text: str | bytes) -> Any:
    """What `format_json` was given, every float with the same bits."""
    return json.loads(text, object_hook=_restore_nonfinite)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    return {"nonfinite": repr(float(value))} if isinstance(value, float) and not math.isfinite(value) else value


def _restore_nonfinite(content: dict[str, Any]) -> Any:
    is_number = content.keys() == {"nonfinite"} and content["nonfinite"] in ("nan", "inf", "-inf")
    return float(content["nonfinite"]) if is_number else content


# ---- lines with a seal


def seal_line(record: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    """(the record as a line of JSON with its seal, the seal); `previous` is the seal of the line before.

    A lone surrogate, which UTF-8 cannot hold, becomes the JSON escape that stands for it.
    """
    body = format_json(record, ensure_ascii=False).encode("utf-8", errors="backslashreplace")
    if not isinstance(record, Mapping) or not record:
        raise TypeError(f"a line of a journal is a JSON object with at least one key, not {body[:40]!r}.")
    seal = _hash_line(body, previous)
    return body[:-1] + _SEAL_KEY + seal.encode() + b'"}\n', seal


def read_sealed_lines(path: Path, previous: str, start: int = 0) -> Iterator[tuple[dict[str, Any], str, int]]:
    """(record, its seal, where its line ends) for each whole line from the byte `start`, after the seal `previous`.

    A last line without a newline was torn by a kill, and is passed over. Raises DamagedFileError, with the line's
    number from `start`, for any other that is not as it was written.
    """
    end = start
    with open(path, "rb") as file:
        file.seek(start)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            body, key, tail = line.rpartition(_SEAL_KEY)
            seal = _hash_line(body + b"}", previous)
            if not key or tail != seal.encode() + b'"}\n':
                raise DamagedLineError(number)
            end += len(line)
            yield parse_json(body + b"}"), seal, end
            previous = seal


def _hash_line(body: bytes, previous: str) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()[:SEAL_DIGITS]


def cut_torn_line(file: Any) -> int:
    """Cut off what follows the last newline of a file that is open for reading and appending; its size then."""
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
    return intact_bytes


# ---- documents with a seal


def seal_document(document: Mapping[str, Any]) -> str:
    """The document as JSON that ends in its own SHA-256."""
    return format_json({**document, "sha256": _hash_text(_format(document))}, indent=1) + "\n"


def open_document(content: bytes) -> dict[str, Any] | None:
    """What `seal_document` was given; None where a byte is not as it was written."""
    try:
        document = parse_json(content)
        sha256 = document.pop("sha256")
        sound = sha256 == _hash_text(_format(document)) and content == seal_document(document).encode()
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    return document if sound else None


def _format(document: Mapping[str, Any]) -> str:
    return format_json(document, indent=1)


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the files of a folder


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests hold them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def find_difference(path: Path, written: Mapping[str, Any], *, contents: bool = True) -> str:
    """What is wrong with a file of which `written` says what it held; "" for nothing. Without `contents` no hashes."""
    if not path.is_file():
        return f"is missing; {written['bytes']:,} bytes were written"
    size = path.stat().st_size
    if size != written["bytes"]:
        return f"has {size:,} bytes, {written['bytes']:,} were written"
    if contents and (sha256 := describe_file(path)["sha256"]) != written["sha256"]:
        return f"is damaged: its SHA-256 is {sha256[:12]}..., {written['sha256'][:12]}... was written"
    return ""


def find_document_difference(path: Path, *, contents: bool = True) -> tuple[dict[str, Any] | None, str]:
    """(the manifest of a folder, what is wrong with it or the files that it lists); None for one that cannot be read.

    The files are relative to the manifest. Without `contents` their sizes alone are compared.
    """
    try:
        document = open_document(path.read_bytes())
    except FileNotFoundError:
        return None, f"{path.name} is missing"
    if document is None:
        return None, f"{path.name} is damaged"
    for name, written in document["files"].items():
        if difference := find_difference(path.parent / name, written, contents=contents):
            return document, f"{name} {difference}"
    return document, ""


# ---- the seals of a run that is not finished


class Ledger:
    """`seals.jsonl` of a run: the last seal of every file, and those that the last line replaced."""

    def __init__(self, root: Path):
        self.root, self.path = root, root / SEALS_FILE
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.run = ""
        """Random digits that tell the lines of this run from those of another."""
        self.files: dict[str, Seal] = {}
        self.folders: dict[str, list[str]] = {}
        """Folders that were written whole, and the names of their files."""
        self.replaced: dict[str, Seal | None] = {}
        """The files of the last line, with their seals before it: a kill may have come before the files had names."""
        self._inode, self._size, self._lines, self._seal = 0, 0, 0, ""

    def read(self) -> "Ledger":
        """Take in the lines that are new. Raises DamagedFileError for one that is not as it was written."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise DamagedFileError(
                f"{self.path} is missing: it says what the files of the run held, and without it nobody can tell "
                "whether they are whole.",
                "Put back a copy of it, or start a new run with --out.",
            ) from None
        if status.st_ino != self._inode or status.st_size < self._size:
            self._clear()
            self._inode = status.st_ino
        try:
            for record, seal, end in read_sealed_lines(self.path, self._seal, self._size):
                self._take_in(record)
                self._seal, self._size, self._lines = seal, end, self._lines + 1
        except DamagedLineError as error:
            raise DamagedFileError(
                f"{self.path}:{self._lines + error.number}: not as it was written, so nobody can tell whether the "
                "files of the run are whole.",
                "Put back a copy of it, or start a new run with --out.",
            ) from None
        if not self.run:
            raise DamagedFileError(
                f"{self.path} is empty: it said what the files of the run held.",
                "Put back a copy of it, or start a new run with --out.",
            )
        return self

    def _take_in(self, record: dict[str, Any]) -> None:
        self.run = record.get("run", self.run)
        new = record.get("files", {})
        self.replaced = {name: self.files.get(name) for name in new}
        for name, fields in new.items():
            if fields is None:
                self.files.pop(name, None)
            else:
                self.files[name] = Seal(*fields)
        if "folder" in record:
            self.folders[record["folder"]] = list(new)

    def append(self, files: Mapping[str, Seal | None], folder: str = "") -> None:
        """Note the seals of files (None: there is no such file), on the disk when this returns.

        Nothing happens where all of it is noted already.
        """
        with self._lock:
            self.read()
            is_known = all(self.files.get(name) == seal for name, seal in files.items())
            is_last = MANIFEST_FILE not in files or MANIFEST_FILE in self.replaced  # the manifest is noted last
            if is_known and is_last and (not folder or folder in self.folders):
                return
            record: dict[str, Any] = {"folder": folder} if folder else {}
            record["files"] = {name: seal and list(seal) for name, seal in files.items()}
            line, _ = seal_line(record, self._seal)
            with open(self.path, "ab+") as file:
                cut_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            copies.publish(self.path)
            self.read()

    def find_difference(self, name: str) -> str:
        """What is wrong with a file by its last seal, or by the one before, where a kill came in between."""
        difference = self._find_difference(name, self.files[name])
        replaced = self.replaced.get(name)
        if difference and replaced and not self._find_difference(name, replaced):
            return ""
        return difference

    def settle(self) -> list[str]:
        """Bring the seals of a checked run to what is there; the journals that are not, though they had records.

        The files of the last line may hold what they held before, where a kill came before they had their names.
        """
        changed: dict[str, Seal | None] = {
            name: replaced
            for name, replaced in self.read().replaced.items()
            if replaced
            and self._find_difference(name, self.files.get(name, replaced))
            and not self._find_difference(name, replaced)
        }
        gone = {
            name: seal for name, seal in self.files.items() if name != MANIFEST_FILE and not (self.root / name).exists()
        }
        if changed or gone:
            self.append(changed | dict.fromkeys(gone))
        return [name for name, seal in gone.items() if seal.line_seal and seal.size]

    def _find_difference(self, name: str, seal: Seal) -> str:
        path = self.root / name
        if not seal.line_seal:
            return find_difference(path, {"bytes": seal.size, "sha256": seal.sha256})
        if not path.is_file():
            return f"is missing; at least {seal.size:,} bytes were written"
        size = path.stat().st_size
        if size < seal.size:
            return f"has {size:,} bytes, at least {seal.size:,} were written"
        previous, found = journal_start(self.run, name), seal.size == 0
        try:
            for _, line_seal, end in read_sealed_lines(path, previous):
                found = found or (end == seal.size and line_seal == seal.line_seal)
        except DamagedLineError as error:
            return f"is damaged: its line {error.number} is not as it was written"
        return "" if found else f"is damaged: no line ends at byte {seal.size:,}, where one was written"


def journal_start(run: str, name: str) -> str:
    """What stands for the seal before the first line of a journal: no line of another file or run follows it."""
    return f"{run}/{name}/"


_ledgers: dict[Path, Ledger] = {}
"""The ledgers of the runs that this process holds, to which it alone appends. One to check files is read anew."""


def hold(folder: Path) -> None:
    """Note from here on what this process writes in the folder of a run; what others write there are their own files.

    Two processes that append to one ledger would break the chain of its seals.
    """
    root = folder.resolve()
    _ledgers.setdefault(root, Ledger(root))


def release(folder: Path) -> None:
    """Note no more of what this process writes in the folder of a run."""
    _ledgers.pop(folder.resolve(), None)


def begin(folder: Path) -> None:
    """Begin the seals of a new run in an empty folder."""
    path = folder / SEALS_FILE
    path.unlink(missing_ok=True)  # of a process that was killed before it wrote the config
    line, _ = seal_line({"run": secrets.token_hex(8)}, "")
    with open(path, "wb") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    copies.publish(path)
    hold(folder)


def _find_open_run(path: Path) -> tuple[Ledger, str] | None:
    """(the ledger of the run that goes on where `path` lies, the name of `path` in it); None elsewhere.

    A file that somebody adds to a finished run, or to one that another process holds, is not of the run.
    """
    path = path.resolve()
    root = _find_unfinished_root(path)
    return (_ledgers[root], path.relative_to(root).as_posix()) if root in _ledgers else None


def _find_unfinished_root(path: Path) -> Path | None:
    root = next((root for root in path.parents if (root / SEALS_FILE).is_file()), None)
    return None if root is None or (root / MANIFEST_FILE).is_file() else root


def note_file(path: Path, content: Path) -> None:
    """Note that `path` will hold what `content` holds now; nothing where it is in no run that this process holds."""
    if found := _find_open_run(path):
        ledger, name = found
        written = describe_file(content)
        ledger.append({name: Seal(written["bytes"], written["sha256"])})


def note_removal(path: Path) -> None:
    """Note that a file is removed; nothing where it is in no run that this process holds."""
    if found := _find_open_run(path):
        ledger, name = found
        ledger.append({name: None})
        copies.remove(path)


def note_folder(folder: Path) -> None:
    """Note what each file in a folder holds, and that the folder is whole with them."""
    if found := _find_open_run(folder):
        ledger, name = found
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        described = {f"{name}/{path.relative_to(folder).as_posix()}": describe_file(path) for path in paths}
        copies.publish_folder(folder)
        ledger.append({key: Seal(one["bytes"], one["sha256"]) for key, one in described.items()}, name)


def is_noted_folder(folder: Path) -> bool:
    """Whether a folder has all files that it was written with; where no run goes on, whether it is there."""
    if not folder.exists():
        return False
    folder = folder.resolve()
    if (root := _find_unfinished_root(folder)) is None:
        return True
    names = Ledger(root).read().folders.get(folder.relative_to(root).as_posix())
    return names is not None and all((root / file).exists() for file in names)


def note_journal(path: Path, size: int, line_seal: str) -> None:
    """Note the seal of the line of a journal that ends at `size`; what is appended later follows it."""
    if found := _find_open_run(path):
        ledger, name = found
        ledger.append({name: Seal(size, "", line_seal)})


def find_journal_start(path: Path) -> str:
    """The seal before the first line of a journal; "" for a file that lies in no run."""
    if (run := find_run(path)) is None:
        return ""
    return journal_start(run.digits, run.name)


# ---- what lies in a run, finished or not


class RunFile(NamedTuple):
    """Where a path lies in the folder of a run."""

    root: Path
    name: str
    digits: str
    """The random digits of the run."""
    manifest: dict[str, Any] | None
    """The manifest of a finished run."""
    ledger: Ledger | None
    """The ledger of one that is not."""

    @property
    def names(self) -> list[str]:
        """The files of the run."""
        return list(self.manifest["files"] if self.manifest is not None else self.ledger.files if self.ledger else ())

    def find_damage(self, name: str) -> Damage | None:
        """What is wrong with a file; None for nothing."""
        is_missing = not (self.root / name).exists()
        if self.manifest is not None:
            difference = find_difference(self.root / name, self.manifest["files"][name])
        else:
            assert self.ledger is not None
            if is_missing and not self._must_exist(name):
                return None
            difference = self.ledger.find_difference(name)
        return Damage(name, difference, is_missing) if difference else None

    def _must_exist(self, name: str) -> bool:
        """Whether a run that is not finished can neither have removed a file nor make it again."""
        assert self.ledger is not None
        if name in self.ledger.replaced and self.ledger.replaced[name] is None:
            return False  # a kill came before it had its name
        folders = [folder for folder, names in self.ledger.folders.items() if name in names]
        return name in (*NOT_REMADE, self.name) or any((self.root / folder).exists() for folder in folders)


def find_run(path: str | Path) -> RunFile | None:
    """The run in whose folder a path lies, with its seals; None for any other path.

    Raises DamagedFileError where the seals themselves are not as they were written.
    """
    try:
        resolved = Path(os.path.realpath(path))
    except ValueError:  # a name that no file can have: it is said where it is opened
        return None
    for root in resolved.parents:
        has_seals, has_manifest = os.path.isfile(root / SEALS_FILE), os.path.isfile(root / MANIFEST_FILE)
        if not has_seals and not has_manifest:
            continue
        name = resolved.relative_to(root).as_posix()
        if has_manifest:
            manifest = open_document((root / MANIFEST_FILE).read_bytes())
            if manifest is not None and "run" in manifest and _is_of_this_run(manifest, root):
                return RunFile(root, name, manifest["run"], manifest, None)
            if has_seals:
                raise DamagedFileError(
                    f"{root / MANIFEST_FILE} is damaged, or it and {root / SEALS_FILE} are of two runs: it says what "
                    "the files of the run hold.",
                    "Put back a copy, or remove it: --resume of the run writes it again.",
                )
        if has_seals:
            ledger = Ledger(root).read()
            return RunFile(root, name, ledger.run, None, ledger)
    return None


def _is_of_this_run(manifest: dict[str, Any], root: Path) -> bool:
    try:
        return manifest["run"] == Ledger(root).read().run
    except DamagedFileError:
        return True  # the manifest has a seal of its own


def check(path: str | Path) -> None:
    """Check a file or a folder that may lie in the folder of a run against what the run wrote.

    Raises DamagedFileError for a file that was changed, cut, swapped or deleted. A file that the run did not write, and
    any file outside of a run, is not looked at.
    """
    run = find_run(path)
    if run is None:
        return
    for name in run.names:
        if name == run.name or name.startswith(f"{run.name}/"):
            raise_damage(run.root, [damage] if (damage := run.find_damage(name)) else [], run.manifest is not None)


def format_damages(root: Path, damages: list[Damage]) -> str:
    """What is wrong with the first of them."""
    listed = "; ".join(f"{root / damage.name} {damage.problem}" for damage in damages[:MAX_DAMAGES_SHOWN])
    return listed + (f"; and {len(damages) - MAX_DAMAGES_SHOWN} more" if len(damages) > MAX_DAMAGES_SHOWN else "")


def raise_damage(root: Path, damages: list[Damage], is_finished: bool) -> None:
    """Raise DamagedFileError where there are any: what is wrong, and what helps in a run that is finished or not."""
    if not damages:
        return
    it = "it" if len(damages) == 1 else "them"
    lasting = (*NOT_REMADE, SEALS_FILE, *([LOG_FILE] if is_finished else []))
    if any(damage.name in lasting or (damage.is_missing and not is_finished) for damage in damages):
        remedy = f"Put back a copy of {it}, or start a new run with --out."
    elif all(damage.is_missing for damage in damages):
        remedy = f"Put back a copy of {it}, or let --resume of the run make {it} again."
    else:
        remedy = f"Put back a copy of {it}, or remove {it}: --resume of the run makes {it} again."
    if not is_finished:
        remedy += f" (What was written is said by {root / SEALS_FILE}, which may be another run's.)"
    raise DamagedFileError(f"{format_damages(root, damages)}.", remedy)


def check_run(root: Path) -> list[Damage]:
    """Every file of a run that is not as it was written, the seals themselves among them.

    Of a run that is not finished, a file that is missing is one that it has removed or will make again, unless it
    cannot be made again or is one of a folder that was written whole; checkpoints are checked where they are read.
    Raises DamagedFileError where nothing can be checked.
    """
    ledger = Ledger(root).read()
    manifest_path = root / MANIFEST_FILE
    if not manifest_path.is_file():
        run = RunFile(root, "", ledger.run, None, ledger)
        return [damage for name in run.names if Path(name).name != MANIFEST_FILE and (damage := run.find_damage(name))]
    if MANIFEST_FILE not in ledger.files or MANIFEST_FILE not in ledger.replaced:
        return [Damage(SEALS_FILE, "was cut: its last line was about the manifest")]
    manifest = open_document(manifest_path.read_bytes())
    if manifest is None or manifest.get("run") != ledger.run:
        return [Damage(MANIFEST_FILE, f"is damaged, or it and {root / SEALS_FILE} are of two runs")]
    if difference := ledger.find_difference(MANIFEST_FILE):
        return [Damage(MANIFEST_FILE, difference)]
    run = RunFile(root, "", ledger.run, manifest, None)
    damages = []
    for name in run.names:
        is_checkpoint = Path(name).name == MANIFEST_FILE
        if damage := run.find_damage(name):
            damages.append(damage._replace(is_checkpoint=is_checkpoint))
        elif is_checkpoint and (difference := find_document_difference(root / name)[1]):
            damages.append(Damage(str(Path(name).parent), f"is damaged: {difference}", False, True))
    return damages


def format_manifest(ledger: Ledger) -> str:
    """The manifest of a run with such a ledger: every file that it wrote and did not remove.

    Raises DamagedFileError for a journal that is not as it was written; other files are taken at their seals' word,
    so that a manifest never says that a file is whole which was damaged before.
    """
    files = {}
    for name, seal in sorted(ledger.files.items()):
        path = ledger.root / name
        if name == MANIFEST_FILE or not path.exists():
            continue
        if seal.line_seal:
            raise_damage(
                ledger.root, [Damage(name, problem)] if (problem := ledger.find_difference(name)) else [], False
            )
            files[name] = describe_file(path)
        else:
            files[name] = {"bytes": seal.size, "sha256": seal.sha256}
    return seal_document({"run": ledger.run, "files": files})
