"""Compiled programs are kept where the user keeps such things, and found by the next process."""

import os
import subprocess
import sys

import jax
import pytest

from bilevel_jax.runs import compiled_programs
from tests.conftest import ROOT

NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_compilation_cache_max_size",
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


def test_a_folder_of_the_user_for_each_kind_of_cpu(untold, monkeypatch):
    folder = compiled_programs.keep_compiled_programs()
    assert folder is not None and folder.parent == untold / "bilevel_jax" / "compiled" and folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert compiled_programs.keep_compiled_programs() is None  # it has been told now

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compiled_programs.platform, "machine", lambda: "another")
    assert compiled_programs.keep_compiled_programs() != folder


def test_who_wants_none_has_none(untold):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compiled_programs.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None and not list(untold.iterdir())


@pytest.mark.parametrize("home", ["a file", "no home"])
def test_where_none_can_be_made_the_run_goes_on(untold, monkeypatch, home):
    (untold / "file").write_text("")
    if home == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(untold / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(compiled_programs.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert compiled_programs.keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


SCRIPT = """
import jax, jax.numpy as jnp
from bilevel_jax.runs import compiled_programs
compiled_programs.SECONDS = 0
compiled_programs.keep_compiled_programs()
hits = []
jax.monitoring.register_event_listener(lambda name, **more: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_the_next_process_finds_them(tmp_path):
    told = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment["XDG_CACHE_HOME"] = str(tmp_path)

    def hits() -> int:
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert hits() == 0
    assert hits() >= 1
