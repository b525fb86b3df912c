"""What a run says while it works."""

import json
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.progress import NotebookProgress
from bilevel_jax.runs.infra.session import FINISHED_JOBS_FILE, Interrupted, open_session


def test_a_notebook_gets_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with open_session(tmp_path, progress=False, save_seconds=60) as work:
        work.print_line("one line [of text]")
    assert capsys.readouterr().err == "one line [of text]\n"


def test_signals_are_left_alone_outside_of_the_main_thread(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    seen = []

    def run():
        with open_session(tmp_path, progress=False, save_seconds=60) as work:
            seen.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT))
            work.check_signals()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == handlers
    with open_session(tmp_path, progress=False, save_seconds=60) as work:
        assert signal.getsignal(signal.SIGTERM) == work.handle_signal
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


class Output:
    """What IPython's `display` returns: one output of a cell, by its present text."""

    def __init__(self, data):
        self.texts = [data["text/plain"]]

    def update(self, data, raw):
        assert raw
        self.texts.append(data["text/plain"])


def notebook(monkeypatch, config):
    """IPython as a process has imported it, with outputs that are kept here."""
    outputs = []

    def display(data, raw, display_id):
        assert raw and display_id is True
        outputs.append(Output(data))
        return outputs[-1]

    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    return outputs


def test_a_notebook_has_one_output_that_is_updated(tmp_path, capsys, monkeypatch):
    outputs = notebook(monkeypatch, {"IPKernelApp": {}})
    monkeypatch.setattr(NotebookProgress, "SECONDS", -1.0)
    with open_session(tmp_path, progress=True, save_seconds=60) as work:
        work.set_phase("training\x1b[31m", total=4)
        work.print_line("a line")
        work.advance()
        work.advance()
    [output] = outputs
    assert output.texts[0].startswith("starting ") and output.texts[-1] == ""
    assert output.texts[-2].startswith("training␛[31") and " 50% 0:00:0" in output.texts[-2]
    assert "ETA" in output.texts[-2] and not any("\n" in text or "\x1b" in text for text in output.texts)
    assert capsys.readouterr() == ("a line\n", "")  # stderr would be shown as an error


def test_updates_of_a_notebook_are_rare(tmp_path, monkeypatch):
    outputs = notebook(monkeypatch, {"IPKernelApp": {}})
    with open_session(tmp_path, progress=True, save_seconds=60) as work:
        for _ in range(1000):
            work.advance()
    assert len(outputs[0].texts) <= 5


def test_a_disabled_bar_and_a_terminal_of_ipython_have_no_output(tmp_path, monkeypatch, capsys):
    outputs = notebook(monkeypatch, {"IPKernelApp": {}})
    with open_session(tmp_path, progress=False, save_seconds=60) as work:
        work.advance()
    outputs += notebook(monkeypatch, {"TerminalIPythonApp": {}})
    with open_session(tmp_path, progress=True, save_seconds=60) as work:
        work.print_line("a line")
    assert outputs == [] and "a line" in capsys.readouterr().err


def test_finished_jobs_are_read_before_another_process_notes_one(tmp_path, monkeypatch):
    """Or that job would be work in one process and a file to read in another."""
    path = tmp_path / "checkpoints" / FINISHED_JOBS_FILE
    job = {"job": {"value": "of another process", "work": 0.0, "seconds": 0.0}}
    monkeypatch.setattr(distributed, "wait_for_all_processes", lambda: path.write_text(json.dumps(job)))
    with open_session(tmp_path, progress=False, save_seconds=60) as work:
        assert path.exists() and work.run_once("job", lambda: "own") == "own"


def test_work_of_the_first_process_alone_moves_no_meeting(tmp_path, monkeypatch):
    """What the first process checks while the others wait must not change at which call all of them meet next."""
    meetings = []

    def allgather(values):
        meetings.append(values)
        return np.array([[*values[:2], 5]] * 2)

    with open_session(tmp_path, progress=False, save_seconds=60) as first:
        monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
        monkeypatch.setattr(distributed, "allgather_values", allgather)
        first.check_signals()
        assert len(meetings) == 1  # the next one is five calls later
        first.check_signals()
        with monkeypatch.context() as alone:
            alone.setattr(distributed, "_on_first_process_only", True)
            for _ in range(12):
                first.check_signals()
            first._received_signal = signal.SIGTERM
            with pytest.raises(Interrupted, match="stopped by SIGTERM"):
                first.check_signals()
            first._received_signal = 0
        for _ in range(3):
            first.check_signals()
        assert len(meetings) == 1
        first.check_signals()
        assert len(meetings) == 2
        first._received_signal = signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            first.check_signals(at_once=True)
        assert len(meetings) == 3
        monkeypatch.undo()


def test_the_work_of_a_job_counts_once(tmp_path):
    """Also where two jobs ask for a third one, and in a run that goes on after any of them."""
    names = ("first", "second")

    def work(session, stop_after=None):
        def train():
            session.advance(4)
            return 1

        def job():
            session.advance(1)
            return session.run_once("shared", train)

        for name in names:
            session.run_once(name, job)
            if name == stop_after:
                return session.work_done
        session.run_once("shared", train)
        return session.work_done

    def costs(folder):
        jobs = json.loads((folder / "checkpoints/done.json").read_text())
        return {name: jobs[name]["work"] for name in ("shared", *names)}

    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    with open_session(tmp_path / "whole", progress=False, save_seconds=60) as session:
        assert work(session) == 4 + 1 + 1
    with open_session(tmp_path / "run", progress=False, save_seconds=60) as session:
        assert work(session, "first") == 5
    for _ in range(2):  # goes on, and is read as a whole
        with open_session(tmp_path / "run", progress=False, save_seconds=60) as session:
            assert work(session) == 6
        assert costs(tmp_path / "run") == costs(tmp_path / "whole") == {"shared": 4, "first": 5, "second": 1}
