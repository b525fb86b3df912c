"""Run directory, its lock, atomic writes, and reads that check what was written."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from bilevel_jax.runs.config.local_paths import hide_local_paths
from bilevel_jax.runs.infra import distributed, seals
from bilevel_jax.storage import copies

ResultT = TypeVar("ResultT")
CONFIG_FILE = seals.CONFIG_FILE  # the resolved config: what makes a folder a run's folder
LOCK_FILE = ".lock"
RESULT_FILE = "result.json"
INPUT_FOLDER = "input"
"""Where the files of a built-in task are made."""
WORK_FOLDERS = ("checkpoints", "parts", "harness", INPUT_FOLDER)
"""The folders of a run that hold files which are written one by one."""
LEFTOVER_FILE = re.compile(r"\..+\.[0-9]+\.part")
LEFTOVER_FOLDER = re.compile(r"\.(?P<name>step_[0-9]+)\.(?P<kind>part|old)|\..+\.[0-9a-f]{32}")
"""What a process that was killed leaves behind: what it had not finished writing, and what it was about to remove."""
STEP_FILE = re.compile(r"(?P<step>(?:.*/)?step_[0-9]+)/")
"""The name of a file of a checkpoint."""
SEEN_SECONDS = 120.0
"""Seconds within which a file of another machine is seen: NFS remembers for 60 that it was not there."""
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.1, 2.0
"""Waits between two looks at such a file: each is twice the one before, up to the last."""


def create_run_dir(path: str | Path, resume: bool = False) -> Path:
    """The folder of a run, made if needed. An earlier run is never overwritten, and only a run can be resumed."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; choose another folder with --out.")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if LOCK_FILE in names or seals.SEALS_FILE in names:
        names = [name for name in names if not _find_leftover(path / name)]
    check_run_names(path, names, resume)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_run_names(folder: str | Path, names: Iterable[str], resume: bool) -> None:
    """Raise an error unless a folder with such names can take a new run, or holds one to resume."""
    present_names = [name for name in names if name not in (LOCK_FILE, seals.SEALS_FILE)]
    if resume:
        if CONFIG_FILE in present_names:
            return
        if seals.ENVIRONMENT_FILE in present_names:
            raise FileNotFoundError(
                f"{folder}/{CONFIG_FILE} is missing; put back a copy of it, or start a new run with --out."
            )
        raise FileNotFoundError(f"{folder} holds no run ({CONFIG_FILE} is missing); start one without --resume.")
    if CONFIG_FILE in present_names:
        raise FileExistsError(f"{folder} holds a run; go on with it by --resume, or choose another folder with --out.")
    if present_names:
        shown_names = ", ".join(present_names[:3]) + (", ..." if len(present_names) > 3 else "")
        raise FileExistsError(f"{folder} is not empty ({shown_names}); choose another folder with --out.")


@contextlib.contextmanager
def lock_run_dir(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process; a second run is refused. The kernel frees the lock of a killed process."""
    path = Path(folder) / LOCK_FILE
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RuntimeError(f"{folder} is in use by {holder}; wait, stop it, or choose another folder.") from None
        file.truncate(0)  # the name of a dead holder
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield  # the lock file stays: removing it would let two processes lock two files of one name


def check_files(folder: Path) -> None:
    """Check every file of a run before it is resumed.

    Warns of files of a finished run that are missing and of checkpoints that are damaged: the run makes them again.
    Raises seals.DamagedFileError for any other file that is not as it was written, and ValueError for a run of a
    version that wrote no seals.
    """
    if not (folder / seals.SEALS_FILE).exists() and (version := _find_earlier_version(folder)):
        raise ValueError(
            f"{folder} was made by {version}, whose runs cannot be resumed by this one. Start a new run with --out."
        )
    is_finished, damages = restore_manifest(folder), seals.check_run(folder)
    if not is_finished or not all(damage.heals for damage in damages):
        seals.raise_damage(folder, damages, is_finished)
    elif damages:
        damage_text = copies.show(seals.format_damages(folder, damages))
        warnings.warn(f"{damage_text}. It is made again where it is needed.", stacklevel=2)


def _find_earlier_version(folder: Path) -> str:
    """The version of the package that began a run, in words, if it wrote no seals; "" for another, or where unknown."""
    try:
        packages = json.loads((folder / seals.ENVIRONMENT_FILE).read_bytes()).get("packages") or {}
        version = packages.get("bilevel-jax")
        numbers = [int(number) for number in version.split(".")[:2]] if version else []
    except (OSError, ValueError, AttributeError):
        return ""
    if numbers >= [0, 2]:
        return ""
    return f"an earlier version ({version})" if version else "an earlier version"


def reopen_run(folder: Path) -> None:
    """Let a run that is resumed write again: until it has come to its end, its ledger alone holds its seals."""
    (folder / seals.MANIFEST_FILE).unlink(missing_ok=True)
    copies.remove(folder / seals.MANIFEST_FILE)
    for name in seals.Ledger(folder).settle():
        text = f"{folder / name} is missing. It begins anew: what it held is not in the report."
        warnings.warn(copies.show(text), stacklevel=2)


def restore_manifest(folder: Path) -> bool:
    """Whether a run has come to its end; of one whose manifest alone is missing, the manifest is written again."""
    ledger, path = seals.Ledger(folder).read(), folder / seals.MANIFEST_FILE
    if not path.is_file() and seals.MANIFEST_FILE in ledger.files and seals.MANIFEST_FILE in ledger.replaced:
        content, written = seals.format_manifest(ledger).encode(), ledger.files[seals.MANIFEST_FILE]
        if (len(content), hashlib.sha256(content).hexdigest()) == (written.size, written.sha256):
            write_atomic(path, content)
    return path.is_file()


def write_manifest(folder: Path) -> None:
    """Seal the folder of a run that has come to its end."""
    seals.Ledger(folder).settle()
    write_atomic(folder / seals.MANIFEST_FILE, seals.format_manifest(seals.Ledger(folder).read()))


def sweep_leftovers(folder: str | Path) -> None:
    """Remove from the folder of a run, which this process holds, what a killed process left in it.

    A step that was moved aside while another took its place, which never came, goes back to its name. What has any
    other name, or lies in a folder that no run makes or in another run, is left alone.
    """
    for entry in sorted(Path(folder).iterdir()):
        if _find_leftover(entry):
            _remove_leftover(entry)
        elif entry.name in WORK_FOLDERS:
            _sweep_work_folder(entry)


def find_unfinished(names: Iterable[str]) -> set[str]:
    """Of the names in the folder of a run, those in checkpoints without a manifest: a killed process wrote them."""
    names = set(names)
    steps = {name: match["step"] for name in names if (match := STEP_FILE.match(name))}
    return {name for name, step in steps.items() if f"{step}/{seals.MANIFEST_FILE}" not in names}


def _sweep_work_folder(folder: Path) -> None:
    if not folder.is_dir() or folder.is_symlink() or (folder / LOCK_FILE).exists():
        return
    for entry in sorted(folder.iterdir()):
        if _find_leftover(entry):
            _remove_leftover(entry)
        elif not entry.name.startswith("."):
            _sweep_work_folder(entry)


def _find_leftover(path: Path) -> re.Match[str] | None:
    if path.is_symlink():
        return None
    return LEFTOVER_FOLDER.fullmatch(path.name) if path.is_dir() else LEFTOVER_FILE.fullmatch(path.name)


def _remove_leftover(path: Path) -> None:
    leftover = LEFTOVER_FOLDER.fullmatch(path.name)
    if leftover and leftover["kind"] == "old" and not path.with_name(leftover["name"]).exists():
        path.rename(path.with_name(leftover["name"]))
    elif leftover:
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder whole or not at all, as others see it; a kill leaves a leftover, which `sweep_leftovers` takes.

    Nothing happens where there is none.
    """
    copies.remove_folder(folder, first=seals.MANIFEST_FILE)
    trash = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(trash)
        shutil.rmtree(trash)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write the whole file or nothing: a reader, a kill or a full disk never meets half of it.

    Of several processes all call this, and the first writes.
    """

    def write() -> None:
        with atomic_replace(path) as part:
            part.write_bytes(copies.show(data).encode("utf-8") if isinstance(data, str) else data)

    distributed.run_on_first_process(write)


def write_json(path: str | Path, value: Any) -> None:
    """A JSON file, whole or not at all; numbers that are not finite become null."""
    write_atomic(path, json.dumps(_nonfinite_to_none(value), indent=1, allow_nan=False))


def write_result(folder: str | Path, result: Any) -> None:
    """`folder`/result.json, with the commits of names on the hub.

    It may leave this machine, so absolute paths of the run's config.yaml are shortened.
    """
    if (Path(folder) / seals.HUB_FILE).exists():
        result = {**result, "hub": read_json(Path(folder) / seals.HUB_FILE)}
    settings = yaml.safe_load(read_text(Path(folder) / CONFIG_FILE))
    write_json(Path(folder) / RESULT_FILE, hide_local_paths(result, settings))


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """A parquet file, whole or not at all; of several processes the first writes."""

    def write() -> None:
        with atomic_replace(path) as part:
            pq.write_table(table, part, write_page_checksum=True)

    distributed.run_on_first_process(write)


def write_arrays(path: str | Path, arrays: np.ndarray | Mapping[str, np.ndarray]) -> None:
    """A .npy file of an array, or a .npz file of arrays by name, whole or not at all, its folder with it.

    Of several processes the first writes.
    """

    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as part, open(part, "wb") as file:
            if isinstance(arrays, np.ndarray):
                np.save(file, arrays)
            else:
                named: dict[str, Any] = dict(arrays)
                np.savez(file, **named)

    distributed.run_on_first_process(write)


def read_when_seen(path: str | Path, read: Callable[[], ResultT], *, by_any: bool = False) -> ResultT:
    """What `read` returns of `path`, a file or folder that another process of the run may have written.

    A disk that several machines share may show it late: of several processes one that does not find it as it was
    written tries again for SEEN_SECONDS. The first process, which writes, does so only for what is written `by_any`.

    Raises FileNotFoundError for what is not seen by then; elsewhere what `read` raises, at once.
    """
    is_awaited = distributed.is_multiprocess() and (by_any or not distributed.is_first_process())
    end, pause = time.monotonic() + SEEN_SECONDS, FIRST_POLL_SECONDS
    while True:
        try:
            return read()
        except (OSError, seals.DamagedFileError) as error:
            if not is_awaited or not _may_be_late(error):
                raise
            if time.monotonic() > end:
                problem, remedy = "it is missing", ""
                if isinstance(error, seals.DamagedFileError):
                    problem, remedy = error.problem, error.remedy
                after = f" If it is refused again: {remedy}" if remedy else ""
                raise FileNotFoundError(
                    f"{path}: process {distributed.process_number()} on {socket.gethostname()} waited "
                    f"{SEEN_SECONDS:.0f} s, and does not see what another process wrote there ({problem}). A network "
                    "disk may show it later (NFS: mount it with a smaller actimeo), or the processes do not see one "
                    f"folder: give an --out that they share. Remove nothing, and go on with --resume.{after}"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, LAST_POLL_SECONDS)


def _may_be_late(error: OSError | seals.DamagedFileError) -> bool:
    if isinstance(error, FileNotFoundError | seals.DamagedFileError):
        return True
    return error.errno == errno.ESTALE  # a file that another one has replaced


def wait_until_seen(path: str | Path) -> None:
    """Return when this process sees a file, or a folder with all of its files, that the first one wrote into the run.

    Raises FileNotFoundError for one that it does not see after SEEN_SECONDS.
    """
    path = Path(path)

    def look() -> None:
        seals.check(path)
        if not (seals.is_noted_folder(path) if path.is_dir() else path.exists()):
            raise FileNotFoundError(f"{path} is missing, or not whole.")

    if not distributed.is_first_process():
        read_when_seen(path, look)


def read_bytes(path: str | Path) -> bytes:
    """What a file holds, if that is what was written to it.

    Raises seals.DamagedFileError for a file of a run that was changed, cut, swapped or deleted.
    """

    def read() -> bytes:
        seals.check(path)
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing, and nothing makes it again here. Put back a copy of it, or start a new run with "
                "--out."
            ) from None

    return read_when_seen(path, read)


def read_text(path: str | Path) -> str:
    """As `read_bytes`, the text of a file."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}).") from error


def read_json(path: str | Path) -> Any:
    """As `read_bytes`, the value of a JSON file."""
    text = read_text(path)
    try:
        return seals.parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error


def read_parquet(path: str | Path) -> pa.Table:
    """As `read_bytes`, the table of a parquet file, whose pages are compared with their checksums."""
    content = io.BytesIO(read_bytes(path))
    try:
        return pq.read_table(content, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({error}).") from error


def read_arrays(path: str | Path) -> Any:
    """As `read_bytes`, the array of a .npy file, or the arrays of a .npz file by name."""
    content = io.BytesIO(read_bytes(path))
    try:
        loaded = np.load(content, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole file of arrays ({error}).") from error


@contextlib.contextmanager
def atomic_replace(path: str | Path) -> Iterator[Path]:
    """A name to write to; what was written takes the place of `path` at the end of the block, whole or not at all.

    In the folder of a run that goes on, it is noted what the file will hold.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        fsync_path(part)
        seals.note_file(path, part)
        os.replace(part, path)
        fsync_path(path.parent)
        copies.publish(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if disk_full := disk_full_error(path, error):
            raise disk_full from error
        raise


def fsync_path(path: Path) -> None:
    """Have the kernel put a file, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full_error(path: Path, error: BaseException) -> OSError | None:
    """A clear error if `error` is a full disk (also in the words of orbax's storage), else None."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and os.strerror(errno.ENOSPC) not in str(
        error
    ):
        return None
    text = f"the disk is full: {path} was not written, what was there before is intact. Free space, then --resume."
    return OSError(errno.ENOSPC, text)


def _nonfinite_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nonfinite_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
