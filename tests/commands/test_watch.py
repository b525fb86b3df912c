"""The terminal view of a run: at work, killed, stopped and ended; it reads what there is, and changes nothing."""

import io
import json
import threading
import time
from types import SimpleNamespace

import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.select.run import select
from bilevel_jax.commands.watch import run as watch_command
from bilevel_jax.commands.watch.read import Curve, collect_curves, read_state
from bilevel_jax.commands.watch.view import draw_curve, format_seconds, render_state
from bilevel_jax.runs.config.load import SelectConfig, load_config, load_watch_config
from bilevel_jax.runs.infra import progress, session
from bilevel_jax.runs.terminal import make_console
from bilevel_jax.storage.objects import ObjectStore

FAST = ("--outer.steps", "1", "--certify.no-enabled", "--retrain.no-enabled")


def drawn(state, silence=0.0, **options):
    console = make_console(file=io.StringIO(), width=120, **options)
    console.print(render_state(state, silence))
    return console.file.getvalue()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def at_work(tmp_path):
    """The folder of a run of `train` in its middle, as its files are."""
    (tmp_path / "config.yaml").write_text("weights: {}\nevaluate: {}\n")
    records = [
        {"event": "steps", "step": 2, "first": 0, "losses": [4.0, 3.0], "rates": [0.1, 0.2], "seal": "0"},
        {"event": "evaluated", "step": 2, "loss": {"validation": 3.5, "dev": None}, "seal": "1"},
        {"event": "outer", "part": "without fold 1", "step": 0, "validation": 1.0, "seal": "2"},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "log.jsonl").write_text(lines + '{"event": "steps", "st')  # a line that is being written
    now = time.time()
    state = {"phase": "training", "done": 2, "total": 8, "seconds": 61, "seconds_left": 183, "time": now}
    (tmp_path / "progress.json").write_text(json.dumps(state))
    return tmp_path


def test_a_run_at_work_shows_its_phase_its_share_its_eta_and_its_curves(at_work):
    before = contents(at_work)
    text = drawn(read_state(str(at_work)))
    assert contents(at_work) == before
    assert text.startswith("train  ") and "training" in text and " 25%" in text and "0:01:01   ETA 0:03:03" in text
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["training loss"][-5:] == ["4", "3", "3", "4", "1"]
    assert lines["validation loss"][-5:] == ["3.5", "3.5", "3.5", "3.5", "2"]
    assert "without fold 1: outer steps" in text and lines["validation"][-5:] == ["1", "1", "1", "1", "0"]
    assert "without fold 1 1" in text and "dev loss" not in text


def test_a_killed_run_is_told_by_its_silence(at_work):
    state = read_state(str(at_work))
    assert "No sign of life" not in drawn(state)
    text = drawn(state, silence=3700.0)
    assert "No sign of life for 1:01:40" in text and "--resume" in text
    (at_work / "result.json").write_text("{}")  # a copy of a run that has ended since, from which nothing was deleted
    ended = read_state(str(at_work))
    assert "No sign of life" not in drawn(ended, silence=3700.0) and "report: " in drawn(ended, silence=3700.0)
    assert " 25%" in drawn(ended, silence=1.0)  # it was resumed


def test_a_stopped_run_is_told_by_the_missing_progress(at_work):
    (at_work / "progress.json").unlink()
    assert "It is starting or has stopped; one that has stopped goes on with --resume." in drawn(
        read_state(str(at_work))
    )


def test_hostile_text_and_half_written_files_are_shown_or_passed_over(at_work):
    (at_work / "progress.json").write_text('{"phase": "a\\u001b[2Jb", "done": 1, "total": null')
    assert read_state(str(at_work)).progress is None
    state = {"phase": "a\x1b[2Jb [bold]c", "done": 1, "total": None, "seconds": None, "seconds_left": None}
    (at_work / "progress.json").write_text(json.dumps(state))
    text = drawn(read_state(str(at_work)))
    assert "\x1b" not in text and "[bold]c" in text and "–   ETA –" in text
    (at_work / "log.jsonl").write_bytes(b"\xff\n[1]\nnull\n{}\n")
    assert drawn(read_state(str(at_work)))


def test_a_step_that_was_logged_again_counts_once():
    records = [{"event": "outer", "step": step, "ess": value} for step, value in [(0, 9), (1, 8), (1, 7), (2, 6)]]
    assert collect_curves(records) == {("", "outer"): [Curve("effective sample size", [0, 1, 2], [9, 7, 6])]}


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ([], ""),
        ([2.0], "▁"),
        ([1.0, 1.0], "▁▁"),
        ([0.0, 1.0], "▁█"),
        (list(range(8)), "▁▂▃▄▅▆▇█"),
        ([0] * 64 + [1] * 64, "▁▁██"),
    ],
)
def test_curves_run_from_the_least_to_the_largest(values, blocks):
    assert draw_curve(values, width=4 if len(values) > 8 else 32) == blocks


def test_the_eta_is_that_of_the_work_of_this_process_and_a_new_phase_is_written_at_once(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now, time=lambda: 5.0))
    path = tmp_path / "progress.json"
    file = progress.ProgressFile(path)
    read = lambda: json.loads(path.read_text())  # noqa: E731
    file.update("training", 60.0, 100.0, 60.0)  # all of it restored
    assert (read()["phase"], read()["seconds_left"]) == ("training", None)
    now = 101.0
    file.update("training", 65.0, 100.0, 60.0)
    assert read()["done"] == 60.0  # not yet time
    file.update("writing", 65.0, 100.0, 60.0)
    assert (read()["phase"], read()["seconds_left"]) == ("writing", 1.0 * 35 / 5)
    now = 110.0
    file.update("writing", 100.0, 100.0, 60.0)
    assert read()["seconds_left"] is None  # of work that was not counted nobody knows how long it takes
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_times():
    assert [format_seconds(value) for value in (None, float("inf"), 0.9, 3725)] == ["–", "–", "0:00:00", "1:02:05"]


def test_a_run_writes_how_far_it_is_while_it_runs_and_removes_it(made, tmp_path, monkeypatch):
    monkeypatch.setattr(progress.ProgressFile, "SECONDS", 0.0)
    seen, advance = [], session.Session.advance

    def spying(self, amount=1.0):
        advance(self, amount)
        seen.append(json.loads((self.folder / "progress.json").read_text()))

    monkeypatch.setattr(session.Session, "advance", spying)
    out = tmp_path / "run"
    select(load_config(SelectConfig, made / "select.yaml", [*FAST, "--out", str(out)]))
    assert {state["phase"] for state in seen} >= {"outer step 0 of 1", "outer step 1 of 1"}
    assert all(0 < state["done"] <= 1.2 * state["total"] for state in seen[3:])
    assert not (out / "progress.json").exists() and not list(out.glob(".progress*"))
    before = contents(out)
    text = drawn(read_state(str(out)))
    assert contents(out) == before and text.startswith("select  ") and "outer steps" in text
    assert f"report: {out}/report.html" in text.replace("\n", "") and "validation loss" in text


def test_the_view_is_drawn_again_until_the_run_ends(at_work):
    console = make_console(file=io.StringIO(), width=100, force_terminal=True)

    def end():
        time.sleep(0.3)
        (at_work / "result.json").write_text("{}")
        (at_work / "progress.json").unlink()

    ending = threading.Thread(target=end)
    ending.start()
    state = watch_command.watch(load_watch_config(str(at_work), ["--watch.seconds", "0.05"]), console=console)
    ending.join()
    assert state.result == {} and console.file.getvalue().count("25%") > 1 and "report: " in console.file.getvalue()


def test_a_run_at_a_url_is_read_there(at_work):
    store = ObjectStore("memory://watched/run")
    for name, held in contents(at_work).items():
        store.write(str(name), held)
    assert read_state("memory://watched/run")._replace(folder=str(at_work)) == read_state(str(at_work))
    with pytest.raises(ValueError, match="memory://watched holds no run"):
        read_state("memory://watched")


def test_an_error_of_the_network_and_ctrl_c_end_nothing(at_work, monkeypatch):
    states = iter([read_state(str(at_work)), OSError("busy"), KeyboardInterrupt()])

    def read(folder):
        state = next(states)
        if isinstance(state, BaseException):
            raise state
        return state

    monkeypatch.setattr(watch_command, "read_state", read)
    console = make_console(file=io.StringIO(), width=100, force_terminal=True)
    state = watch_command.watch(load_watch_config(str(at_work), ["--watch.seconds", "0.01"]), console=console)
    assert state.result is None and "not read: busy" in console.file.getvalue()


def test_the_command_line(at_work, tmp_path, capsys):
    assert main(["watch", str(at_work)]) == 0  # no terminal: once
    out = capsys.readouterr().out
    assert "training loss" in out and out.endswith("It has not ended.\n")
    assert main(["watch", str(tmp_path / "nowhere")]) == 1
    assert "holds no run: config.yaml is missing. Give the folder of a run" in capsys.readouterr().err
    assert main(["watch"]) == 1
    assert "watch.dir = '': name the folder of a run" in capsys.readouterr().err
    assert main(["watch", str(at_work), "--watch.second", "1"]) == 2
    assert "--watch.seconds" in capsys.readouterr().err
    assert main(["watch", "--help"]) == 0
    assert "--watch.once" in capsys.readouterr().out
