import errno
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.lm.inference.generate import Response
from bilevel_jax.runs.infra import journal, seals
from bilevel_jax.runs.infra.journal import Journal, JsonLog, read_journal
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.scoring.generation import ResponseFile

RECORDS = [{"step": 0, "text": "a"}, {"step": 1, "text": "é → 数"}, {"step": 2, "text": "line\nbreak \u2028 \\ \ud800"}]
NEXT = {"step": 3, "text": "after the stop"}


def write(path, records, fsync=True):
    for record in records:
        Journal(path, fsync=fsync).append(record)


@pytest.mark.parametrize("fsync", [True, False])
def test_a_kill_at_any_byte_of_the_last_line_loses_that_record_alone(tmp_path, fsync):
    whole = tmp_path / "whole"
    write(whole, RECORDS, fsync)
    assert read_journal(whole) == RECORDS
    content = whole.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    for kept_bytes in range(start, len(content)):
        torn = tmp_path / "torn"
        torn.write_bytes(content[:kept_bytes])
        assert read_journal(torn) == RECORDS[:-1]
        write(torn, [NEXT, RECORDS[-1]], fsync)
        assert read_journal(torn) == [*RECORDS[:-1], NEXT, RECORDS[-1]]
    assert torn.read_bytes().count(b"\n") == 4


def test_a_first_line_that_is_torn_and_a_long_one_are_cut_off(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b'{"x": 1')
    write(path, [NEXT])
    with open(path, "ab") as file:
        file.write(b'{"long": "' + 20_000 * b"x")
    write(path, [NEXT])
    assert read_journal(path) == [NEXT, NEXT]


@pytest.mark.parametrize("line", [1, 2])
def test_a_damaged_line_elsewhere_is_an_error_with_file_and_line(tmp_path, line):
    path = tmp_path / "journal"
    write(path, RECORDS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1][:9] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(
        ValueError, match=f"journal:{line}: not what was written there.*put back a copy of it, or remove it"
    ):
        read_journal(path)


def test_a_reader_takes_in_what_came_since(tmp_path):
    path = tmp_path / "journal"
    reader = Journal(path, fsync=True)
    assert reader.read_new() == []
    write(path, RECORDS[:2])
    assert reader.read_new() == RECORDS[:2]
    with open(path, "ab") as file:
        file.write(b'{"to')
    assert reader.read_new() == []
    write(path, RECORDS[2:])
    assert reader.read_new() == RECORDS[2:] and reader.read_new() == []
    with open(path, "ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(ValueError, match="journal:4: "):
        reader.read_new()


def test_each_record_is_on_the_disk_where_it_must_be(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal.os, "fsync", lambda descriptor: synced.append(descriptor))
    write(tmp_path / "a", RECORDS, fsync=False)
    assert synced == []
    write(tmp_path / "b", RECORDS, fsync=True)
    assert len(synced) == 3
    log = JsonLog(tmp_path / "log.jsonl")
    log.write({"step": 0})
    assert len(synced) == 3
    log.close()
    assert len(synced) == 4


def test_a_full_disk_is_named_and_loses_no_earlier_record(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    write(path, RECORDS)

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", refuse)
        with pytest.raises(OSError, match="the disk is full: .* what was there before is intact"):
            write(path, [NEXT])
    assert read_journal(path)[: len(RECORDS)] == RECORDS


# ---- the log of a run


def test_a_log_is_cut_before_the_resumed_run_writes(tmp_path):
    with open_session(tmp_path, progress=False, save_seconds=600) as run:
        run.log.write({"step": 0, "loss": 1.0})
        run.part_session("part").log.write({"step": 1})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # killed while writing
    with open_session(tmp_path, progress=False, save_seconds=600) as run:
        run.log.write({"step": 2})
    assert read_journal(tmp_path / "log.jsonl") == [{"step": 0, "loss": 1.0}, {"part": "part", "step": 1}, {"step": 2}]


def test_log_records_are_valid_json(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_text() == ""
    log.write({"step": np.int64(1), "loss": jnp.float32(0.5), "bad": float("nan"), "far": -np.inf, "w": np.ones(2)})
    log.close()
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text) == read_journal(tmp_path / "log.jsonl")[0] | {"seal": text[-19:-3]}
    assert read_journal(tmp_path / "log.jsonl")[0] == {
        "step": 1,
        "loss": 0.5,
        "bad": None,
        "far": "-inf",
        "w": [1.0, 1.0],
    }
    assert "NaN" not in text


def test_a_log_record_without_a_step_is_refused(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"a log record needs a 'step'; its keys are \['loss'\]"):
        log.write({"loss": 1.0})
    log.close()


# ---- responses


def test_responses_go_on_after_a_torn_line(tmp_path):
    first, second = Response("one", (1, 2), (-0.5, -0.25), True), Response("two", (3,), (float("-inf"),), False)
    ResponseFile(tmp_path / "responses.jsonl").append({"a": first})
    with open(tmp_path / "responses.jsonl", "a") as file:
        file.write('{"b": ["tw')
    resumed = ResponseFile(tmp_path / "responses.jsonl")
    assert resumed.responses == {"a": first}
    resumed.append({"b": second})
    assert ResponseFile(tmp_path / "responses.jsonl").responses == {"a": first, "b": second}


NUMBERS = {"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": 0.1 + 0.2, "e": {"nonfinite": "x"}}


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_json_and_come_back(tmp_path):
    text = seals.format_json(NUMBERS)
    assert json.loads(text, parse_constant=refuse_constant)["a"] == {"nonfinite": "nan"}
    back = seals.parse_json(text)
    assert math.isnan(back.pop("a")) and back == {key: value for key, value in NUMBERS.items() if key != "a"}
    journal = Journal(tmp_path / "j.jsonl", fsync=False)
    journal.append(NUMBERS)
    json.loads((tmp_path / "j.jsonl").read_text(), parse_constant=refuse_constant)
    assert repr(Journal(tmp_path / "j.jsonl", fsync=False).read_new()) == repr([NUMBERS])
    assert repr(seals.open_document(seals.seal_document(NUMBERS).encode())) == repr(NUMBERS)
