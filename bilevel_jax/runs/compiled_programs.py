"""Compiled programs that the next run finds again."""

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

LIMIT = 2**31
"""Bytes that the folder may hold at the start of a run."""
DEFAULTS = {"jax_persistent_cache_min_compile_time_secs": 0.1, "jax_persistent_cache_min_entry_size_bytes": -1}
"""JAX's settings of what is kept: all but what is compiled in no time."""


def keep_compiled_programs() -> Path | None:
    """Keep what JAX compiles in a folder of the user, so that another run of the same shapes starts sooner.

    Nothing is changed where JAX has been told of a folder, or to keep none (JAX_COMPILATION_CACHE_DIR,
    JAX_ENABLE_COMPILATION_CACHE=false). A folder for each kind of CPU: a program for another's instructions would end
    the process, and homes are often shared by several kinds of machine. Where the folder holds more than `LIMIT`, what
    was written first is removed. A program that was cut short while it was written is compiled again in every run, with
    JAX's warning; remove the folder then.

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
