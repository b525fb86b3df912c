"""Killed at any call that changes the disk, a run goes on where it was: the end is the same, bit for bit.

A process that is killed by SIGKILL leaves on the disk what was there at that moment. So one run, copied before each of
its calls, gives what a kill at any of them leaves; each copy is resumed and compared with the run that went on.
Signals that are caught, and kills of processes, are sent.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import jax
import pytest

from bilevel_jax.cli import main
from bilevel_jax.runs.infra import session
from tests.commands.run_table import contents, differences, files, start, table_inputs, without_clock  # noqa: F401
from tests.conftest import ROOT

CALLS = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "link")
"""Of module os: what the run's own code, orbax and shutil.rmtree change the disk by."""
KILLED = (
    "train, a score, refreshed",
    "train, streaming",
    "train, dpo",
    "select",
    "select, states on disk",
    "select, implicit",
    "select, bmo",
    "select, the built-in task",
    "compare",
    "compare, proxies",
    "tune",
    "audit",
    "rank, trials",
    "refine",
    "select, rater",
    "score",
    "evaluate",
)
SAVE_EVERY = 5
"""A checkpoint at every fifth moment that one may be written at."""
COUNT = 24
"""Kills of each run by each way of killing it."""


class DiskCalls:
    """Calls `at(number)` before each call that changes the disk, and once more when the run is over."""

    def __init__(self, at):
        self.at, self.count, self._lock = at, 0, threading.RLock()

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in CALLS:
            self._patch.setattr(os, name, self._watched(getattr(os, name)))
        return self

    def __exit__(self, *_):
        self._patch.undo()

    def _watched(self, call):
        def watched(*given, **more):
            with self._lock:
                number, self.count = self.count, self.count + 1
                self.at(number)
            return call(*given, **more)

        return watched


class Copies:
    """Copies of a folder at every moment that it changed, in another folder."""

    def __init__(self, folder, store):
        self.folder, self.store, self.paths, self._last = folder, store, [], None
        self._busy = False

    def take(self, number):
        """Copy the folder, unless it is as it was."""
        if self._busy or not self.folder.exists():
            return
        self._busy = True
        try:
            listing = {
                (str(path.relative_to(self.folder)), path.stat().st_size, path.stat().st_mtime_ns)
                for path in self.folder.rglob("*")
                if path.name != "log.jsonl"
            }
            if listing != self._last:
                self._last = listing
                target = self.store / f"{number:05d}"
                shutil.copytree(self.folder, target, symlinks=True)
                self.paths.append(target)
        except FileNotFoundError:
            pass  # another thread was faster: the next call copies
        finally:
            self._busy = False


def go_on(inputs, name, out):
    """What a person does after a kill: resume the run, or, where there is none yet, start it."""
    start(inputs, name, out, *(("--resume",) if (out / "config.yaml").exists() else ()))


def whole_run(inputs, name, tmp_path):
    """(what an uninterrupted run holds, the copies of the same run along its way, how many calls it made)."""
    with without_clock(save_every=SAVE_EVERY):
        copies = Copies(tmp_path / "run", tmp_path / "copies")
        with DiskCalls(copies.take) as calls:
            start(inputs, name, tmp_path / "run")
        held = contents(tmp_path / "run")
        copies.take(calls.count)
    shutil.rmtree(tmp_path / "run")
    return held, copies.paths, calls.count


def spread(items, count):
    """At most so many of the items, evenly spread over them."""
    return [items[place * len(items) // count] for place in range(count)] if len(items) > count else list(items)


def put_back(copy, out):
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(copy, out, symlinks=True)


@pytest.fixture(autouse=True)
def fewer_programs():
    yield
    jax.clear_caches()


def ends_otherwise(inputs, name, out, whole):
    """Go on with the run in a folder; the names of what it then holds otherwise, or the error that it ends with."""
    try:
        with without_clock(save_every=SAVE_EVERY):
            go_on(inputs, name, out)
    except Exception as error:
        return repr(error)
    return differences(whole, contents(out))


def count_kills():
    """COUNT, or what the environment asks for."""
    return int(os.environ.get("KILLS", COUNT))


def report(name, way, tried, wrong):
    """Print how many kills were tried; those that ended otherwise."""
    print(f"\n{name}, {way}: {tried} tried, {len(wrong)} wrong")
    return wrong


def check_states(inputs, name, tmp_path, count):
    """Go on from what a SIGKILL at a call leaves on the disk."""
    whole, copies, _ = whole_run(inputs, name, tmp_path)
    wrong, chosen = {}, spread(copies, count)
    for number, copy in enumerate(chosen):
        put_back(copy, tmp_path / "run")
        if found := ends_otherwise(inputs, name, tmp_path / "run", whole):
            wrong[copy.name] = found
        if number % 20 == 19:
            jax.clear_caches()
    assert report(name, f"{len(copies)} states of the disk", len(chosen), wrong) == {}


def test_what_a_kill_leaves_ends_with_the_same_bits(table_inputs, tmp_path):  # noqa: F811
    check_states(table_inputs, "train, streaming", tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_what_a_kill_at_any_call_leaves_ends_with_the_same_bits(table_inputs, tmp_path, name):  # noqa: F811
    check_states(table_inputs, name, tmp_path, count_kills())


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_twice_it_ends_with_the_same_bits(table_inputs, tmp_path, name):  # noqa: F811
    """The second kill comes while what the first has left is resumed."""
    whole, copies, _ = whole_run(table_inputs, name, tmp_path)
    out, draw, wrong = tmp_path / "run", random.Random(name), {}
    chosen = spread(copies, count_kills())
    for copy in chosen:
        put_back(copy, out)
        again = Copies(out, tmp_path / "again")
        with without_clock(save_every=SAVE_EVERY), DiskCalls(again.take):
            go_on(table_inputs, name, out)
        second = draw.choice(again.paths)
        put_back(second, out)
        if found := ends_otherwise(table_inputs, name, out, whole):
            wrong[f"{copy.name} {second.name}"] = found
        shutil.rmtree(tmp_path / "again")
    assert report(name, "two kills", len(chosen), wrong) == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", KILLED)
def test_stopped_by_a_signal_at_any_call_it_ends_with_the_same_bits(table_inputs, tmp_path, name, number):  # noqa: F811
    whole, _, calls = whole_run(table_inputs, name, tmp_path)
    out, wrong, stopped = tmp_path / "run", {}, 0
    chosen = spread(range(calls), count_kills())
    for call in chosen:
        shutil.rmtree(out, ignore_errors=True)

        def stop(at, call=call):
            if at == call:
                signal.raise_signal(number)

        try:
            with without_clock(save_every=SAVE_EVERY), DiskCalls(stop):
                start(table_inputs, name, out)
        except session.Interrupted:
            stopped += 1
        if found := ends_otherwise(table_inputs, name, out, whole):
            wrong[call] = found
    assert report(name, f"{signal.Signals(number).name}, {stopped} stopped", len(chosen), wrong) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_a_process_killed_at_any_call_ends_with_the_same_bits(table_inputs, tmp_path, name):  # noqa: F811
    """Real processes, forked from one that has imported everything, killed by SIGKILL."""
    command = [sys.executable, "-m", "tests.commands.killed_processes", table_inputs, name, tmp_path]
    run = subprocess.run([*map(str, command), str(count_kills())], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert report(name, f"SIGKILL, {told['killed']} killed", told["tried"], told["wrong"]) == {}
    assert told["killed"] == told["tried"]


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_or_all_of_it(table_inputs, tmp_path):  # noqa: F811
    """What is there is whole; where it is not there, exporting again writes it, and what was left beside it goes."""
    start(table_inputs, "train", tmp_path / "model")
    target = tmp_path / "exports" / "rows"

    def export():
        assert main(["export", str(tmp_path / "model"), "--export.format", "axolotl", "--out", str(target)]) == 0

    export()
    whole = files(target)
    shutil.rmtree(target)
    copies = Copies(tmp_path / "exports", tmp_path / "copies")
    with DiskCalls(copies.take):
        export()
    for copy in copies.paths:
        put_back(copy, tmp_path / "exports")
        if target.exists():
            assert files(target) == whole
            shutil.rmtree(target)
        export()
        assert files(target) == whole and os.listdir(tmp_path / "exports") == ["rows"]
    print(f"\nexport: {len(copies.paths)} states of the disk")
