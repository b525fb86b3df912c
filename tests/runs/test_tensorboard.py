"""Event files of TensorBoard: the numbers of a run's log and histograms of its weights, and nothing without the key."""

import importlib.util
import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.select.run import select
from bilevel_jax.runs import tensorboard
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.infra import session

FAST = ("--outer.steps", "1", "--outer.patience", "0", "--certify.no-enabled", "--retrain.no-enabled")


def run(made, out, *flags):
    return select(load_config(SelectConfig, made / "select.yaml", [*FAST, *flags, "--out", str(out)]))


def read_events(folder):
    """The events of all files: each is a length, its check, the event, and its check."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            events.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
    return events


def scalars(events):
    return {
        (value.tag, event.step): value.simple_value
        for event in events
        for value in event.summary.value
        if value.HasField("simple_value")
    }


@pytest.mark.slow
def test_they_hold_the_numbers_of_the_log_and_the_weights(made, tmp_path, stop_at):
    pytest.importorskip("tensorboardX")
    stop_at(14)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", "--output.tensorboard")
    run(made, tmp_path / "run", "--output.tensorboard", "--resume")
    events = read_events(tmp_path / "run/tensorboard")
    told = scalars(events)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for record in logged:
        for name, value in (
            ("validation_loss", record["loss"]["validation"]),
            ("effective_sample_size", record["ess"]),
        ):
            assert told[f"outer/{name}", record["step"]] == pytest.approx(value, rel=1e-6)
    histograms = [(event.step, value) for event in events for value in event.summary.value if value.HasField("histo")]
    assert [(step, value.tag, value.histo.num) for step, value in histograms] == [
        (0, "weights", 36),
        (1, "weights", 36),
    ]
    weights = np.array(pq.read_table(tmp_path / "run/weights.parquet")["weight"])
    assert histograms[-1][1].histo.max == pytest.approx(weights.max(), rel=1e-6)
    before = sorted((tmp_path / "run").rglob("*"))
    run(made, tmp_path / "run", "--output.tensorboard", "--resume")  # a finished run changes nothing
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_equal_values_and_values_that_are_not_finite_have_histograms_too(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = tensorboard.EventWriter(tmp_path, print)
    writer.add_histogram("equal", 0, np.ones(5))
    writer.add_histogram("broken", 1, np.array([np.nan, 1.0, 2.0, np.inf]))
    writer.add_histogram("nothing", 2, np.array([np.nan]))
    writer.close()
    found = {value.tag: value.histo.num for event in read_events(tmp_path) for value in event.summary.value}
    assert found == {"equal": 5, "broken": 2}


def test_where_it_cannot_write_the_run_goes_on_and_says_so_once(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").write_text("")
    said = []
    writer = tensorboard.EventWriter(tmp_path / "file" / "tensorboard", said.append)
    for step in range(30):
        writer.add_scalars({"loss": [(step, 1.0)]})
    writer.flush()
    writer.close()
    assert len(said) == 1 and said[0].endswith("the run goes on without event files of TensorBoard.")


def test_without_the_package_one_sentence_says_how_to_have_it(made, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else find(name))
    with pytest.raises(ValueError, match=r"tensorboardX is not installed: pip install 'bilevel-jax\[tensorboard\]'"):
        run(made, tmp_path / "run", "--output.tensorboard")
    assert not (tmp_path / "run").exists()
