"""Compiled programs that the next run finds again."""

import contextlib
import hashlib
import importlib
import os
import platform
import socket
import zlib
from pathlib import Path
from typing import Any

import jax

LIMIT = 2**31
"""Bytes that the folder may hold at the start of a run."""
DEFAULTS = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
"""JAX's settings of what is kept: everything, as a run has fifty small programs that take two seconds together."""
ENTRY_SUFFIX, CHECKED_FILE = "-cache", ".checked"
"""The end of the name of an entry of JAX; the file that is as old as the last check."""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
CHUNK_BYTES = 2**20
WRITEBACK_SECONDS = 60.0
"""How long a file may be whole in memory alone, and cut on the disk where the machine stops then."""


def keep_compiled_programs() -> Path | None:
    """Keep what JAX compiles in a folder of the user, so that another run of the same shapes starts sooner.

    Nothing is changed where JAX has been told of a folder, or to keep none (JAX_COMPILATION_CACHE_DIR,
    JAX_ENABLE_COMPILATION_CACHE=false). A folder for each kind of CPU: a program for another's instructions would end
    the process, and homes are often shared by several kinds of machine. Where the folder holds more than `LIMIT`, what
    was written first is removed, and so is a program that was cut short while it was written: JAX would read it again
    in every run, warn of it, and never write it anew.

    Returns:
        The folder; None where none is kept, or none can be made.
    """
    told, enabled = (
        getattr(jax.config, f"jax_{name}") for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if told is not None or not enabled:
        return None
    try:
        folder = _user_cache() / "bilevel_jax" / "compiled" / _cpu_kind()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return None
        remove_cut_short(folder)
        remove_oldest(folder, LIMIT)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: a run needs none of this
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in DEFAULTS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the files of a folder that were written first, until the others are `limit` bytes or less. JAX's own limit
    is not used: it locks the folder for every program, and after one write that was cut short it keeps nothing more."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run removes files, too
            if path.is_file():
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def remove_cut_short(folder: Path) -> None:
    """Remove the entries that a kill or a full disk has cut short.

    An entry is written once and never changes, so only those are read that came since the last check. One that another
    run is writing at this moment is removed, too: that run has the program, and a later one compiles it again.
    """
    checked = folder / CHECKED_FILE
    checking = folder / f"{CHECKED_FILE}-{socket.gethostname()}-{os.getpid()}"
    checking.touch()  # of the clock of the file system, as the entries are; a check that is killed has not been made
    since = checked.stat().st_mtime - WRITEBACK_SECONDS if checked.exists() else 0.0
    for path in folder.glob(f"*{ENTRY_SUFFIX}"):
        with contextlib.suppress(OSError):  # another run removes files, too; another user's may not be read
            if path.stat().st_mtime >= since and path.is_file() and not _is_whole(path):
                path.unlink()
    os.replace(checking, checked)


def _is_whole(path: Path) -> bool:
    """Whether an entry is compressed data with its end; true for what this Python cannot read."""
    with path.open("rb") as file:
        start = file.read(len(ZSTD_MAGIC))
        decompressor = _make_zstd_decompressor() if start == ZSTD_MAGIC else zlib.decompressobj()
        if decompressor is None:
            return True
        try:
            decompressor.decompress(start)
            while chunk := file.read(CHUNK_BYTES):
                if decompressor.eof:
                    return False  # bytes after the end
                decompressor.decompress(chunk)
        except OSError:
            raise
        except Exception:  # each library has an error of its own for what is no data of its format
            return False
        return decompressor.eof


def _make_zstd_decompressor() -> Any:
    """That of the library by which JAX reads entries: of Python 3.14, or else the package; None without both."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").ZstdDecompressor()
    with contextlib.suppress(ImportError):
        decompressor = importlib.import_module("zstandard").ZstdDecompressor().decompressobj()
        return decompressor if hasattr(decompressor, "eof") else None  # early releases do not tell the end
    return None


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _cpu_kind(told: Path = Path("/proc/cpuinfo")) -> str:
    """The architecture and, on Linux, a hash of the instructions that the CPU has."""
    kind = platform.machine() or "unknown"
    with contextlib.suppress(OSError):
        lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        kind += "-" + hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
    return kind
