"""Compiled programs that the next run finds again."""

import contextlib
import hashlib
import importlib.util
import os
import platform
from pathlib import Path

import jax

LIMIT = 2**31
"""Bytes that the folder may hold; those that were not read for longest are removed."""
SECONDS = 0.1
"""Programs that compile in less are compiled anew: reading one takes as long."""


def keep_compiled_programs() -> Path | None:
    """Keep what JAX compiles in a folder of the user, so that another run of the same shapes starts at once.

    Nothing is changed where JAX has been told of a folder, or to keep none (JAX_COMPILATION_CACHE_DIR,
    JAX_ENABLE_COMPILATION_CACHE=false). A folder for each kind of CPU: a program for another's instructions would end
    the process, and homes are often shared by several kinds of machine.

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
    except (OSError, RuntimeError):  # no home, or one that cannot be written: a run needs none of this
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if importlib.util.find_spec("filelock"):  # JAX removes nothing without it
        jax.config.update("jax_compilation_cache_max_size", LIMIT)
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _cpu_kind() -> str:
    """The architecture and, on Linux, a hash of the instructions that the CPU has."""
    kind = platform.machine() or "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        kind += "-" + hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
    return kind
