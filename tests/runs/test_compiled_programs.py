"""Compiled programs are kept where the user keeps such things, and found by the next process."""

import os
import subprocess
import sys
import zlib
from types import SimpleNamespace

import jax
import pytest

from bilevel_jax import cli
from bilevel_jax.runs import compiled_programs
from tests.conftest import ROOT

NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def untold(tmp_path, monkeypatch):
    """JAX as it is where nobody told it of a cache; a home of one's own."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_of_the_user(untold):
    folder = compiled_programs.keep_compiled_programs()
    assert folder is not None and folder.parent == untold / "bilevel_jax" / "compiled" and folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert compiled_programs.keep_compiled_programs() is None  # it has been told now


def test_a_name_for_each_kind_of_cpu(tmp_path):
    kinds = []
    for flags in ("flags : sse avx2", "flags : avx2 sse", "flags : sse avx2 avx512f", "Features : neon"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
        kinds.append(compiled_programs._cpu_kind(tmp_path / "cpuinfo"))
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3
    assert compiled_programs._cpu_kind(tmp_path / "absent")  # as on other systems


def test_what_was_written_first_is_removed(tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "folder").mkdir()
    compiled_programs.remove_oldest(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new", "old"]
    compiled_programs.remove_oldest(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_what_was_cut_short_is_removed_and_nothing_else(tmp_path):
    whole = zlib.compress(bytes(range(256)) * 9000)
    contents = {
        "whole": whole, "cut": whole[:-1], "begun": whole[:1], "empty": b"", "zeros": bytes(len(whole)),
        "longer": whole + bytes(compiled_programs.CHUNK_BYTES), "damaged": whole[:-9] + bytes(9),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "notes.txt").write_bytes(b"")
    compiled_programs.remove_cut_short(tmp_path)
    left = [".checked", "notes.txt", "whole-cache"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    for name, age in (("old", 99), ("late", 30), ("new", -9)):  # nothing of long before is read again
        (tmp_path / f"{name}-cache").write_bytes(whole[:9])
        time = (tmp_path / ".checked").stat().st_mtime - age
        os.utime(tmp_path / f"{name}-cache", (time, time))
    compiled_programs.remove_cut_short(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*left, "old-cache"])


@pytest.mark.parametrize("library", ["compression.zstd", "zstandard"])
def test_entries_of_zstandard_are_read_where_jax_can(tmp_path, library):
    zstd = pytest.importorskip(library, reason=f"{library} is not installed: JAX compresses by zlib here")
    make = getattr(zstd, "compress", None) or zstd.ZstdCompressor().compress
    whole = make(os.urandom(500_000))
    for name, content in (("whole", whole), ("cut", whole[:-1])):
        (tmp_path / f"{name}-cache").write_bytes(content)
    compiled_programs.remove_cut_short(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["whole-cache"]


def test_what_the_user_told_jax_stays(untold, monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    assert compiled_programs.keep_compiled_programs()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


@pytest.mark.parametrize("told", ["nothing", "a key", "a variable"])
def test_the_command_line_keeps_them_for_a_process_that_is_alone(untold, monkeypatch, told):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    if told == "a variable":
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    distributed = SimpleNamespace(coordinator_address="127.0.0.1:1" if told == "a key" else "")
    config = SimpleNamespace(distributed=distributed)
    monkeypatch.setattr(cli, "_import", lambda name: lambda config: SimpleNamespace(summary="done"))
    assert cli._call("run_command", config) == "done"
    assert (jax.config.jax_compilation_cache_dir is not None) == (told == "nothing")


def test_who_wants_none_has_none(untold):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compiled_programs.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None and not list(untold.iterdir())


@pytest.mark.parametrize("home", ["a file", "no home", "read-only"])
def test_where_none_can_be_made_the_run_goes_on(untold, monkeypatch, home):
    (untold / "file").write_text("")
    if home == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(untold / "file"))
    elif home == "read-only":
        monkeypatch.setattr(compiled_programs.os, "access", lambda path, mode: False)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(compiled_programs.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert compiled_programs.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


SCRIPT = """
import jax, jax.numpy as jnp
from bilevel_jax.runs import compiled_programs
compiled_programs.DEFAULTS["jax_persistent_cache_min_compile_time_secs"] = 0
compiled_programs.keep_compiled_programs()
hits = []
jax.monitoring.register_event_listener(lambda name, **more: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


@pytest.fixture
def count_hits(tmp_path):
    """Counts what the next process finds, in the folder of a user of its own."""
    told = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment["XDG_CACHE_HOME"] = str(tmp_path)

    def hits() -> int:
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "persistent compilation cache" not in done.stderr  # as JAX warns
        return int(done.stdout)

    return hits


def test_the_next_process_finds_them(count_hits):
    assert count_hits() == 0
    assert count_hits() >= 1


@pytest.mark.slow
def test_one_that_was_cut_short_is_compiled_anew_once(count_hits, tmp_path):
    count_hits()
    found = count_hits()
    entries = {path: path.read_bytes() for path in tmp_path.rglob("*-cache")}
    largest = max(entries, key=lambda path: path.stat().st_size)
    os.truncate(largest, len(entries[largest]) // 2)  # as by a kill while it is written
    assert count_hits() == found - 1 and len(largest.read_bytes()) > len(entries[largest]) // 2
    assert count_hits() == found
