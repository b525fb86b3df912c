import errno
import os
import signal
import subprocess
import sys

import pytest

from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.run_dir import create_run_dir, lock_run_dir, write_atomic


def test_write_atomic(tmp_path):
    write_atomic(tmp_path / "a", "é")
    write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_dir.os, "fsync", refuse)
    with pytest.raises(
        OSError, match="the disk is full: .* was not written, what was there before is intact"
    ) as caught:
        write_atomic(tmp_path / "a", "new")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_any_other_trouble_keeps_its_own_words(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "a", "x")


HOLDER = """
import sys, time
from bilevel_jax.runs.infra.run_dir import lock_run_dir
with lock_run_dir(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_frees_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(RuntimeError, match=f"is in use by process {holder.pid} on "), lock_run_dir(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with lock_run_dir(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with lock_run_dir(tmp_path):
        pass


def test_a_run_folder_is_never_overwritten(tmp_path):
    run = create_run_dir(tmp_path / "a" / "run")
    assert run.is_dir()
    with lock_run_dir(run):
        pass
    assert create_run_dir(run) == run  # only a lock file: nothing to lose
    (run / "config.yaml").write_text("")
    with pytest.raises(FileExistsError, match="holds a run; go on with it by --resume, or choose another folder"):
        create_run_dir(run)
    assert create_run_dir(run, resume=True) == run


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"is not empty \(thesis.tex\); choose another folder with --out"):
        create_run_dir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / ".thesis.1.part").write_text("x")  # of another program: no run has been here
    with pytest.raises(FileExistsError, match=r"is not empty \(.thesis.1.part\)"):
        create_run_dir(other)
    with pytest.raises(NotADirectoryError, match="is a file"):
        create_run_dir(tmp_path / "thesis.tex")
    with pytest.raises(FileNotFoundError, match="holds no run"):
        create_run_dir(tmp_path / "nothing", resume=True)
