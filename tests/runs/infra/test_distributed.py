"""What several processes ask of each other, as far as one process can say; test_agreement really starts two."""

import json

import numpy as np
import pytest

from bilevel_jax.runs.config.schema import DistributedSection
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.session import open_session


def test_processes_that_cannot_meet_are_told_how():
    with pytest.raises(ValueError, match="did not find each other .* the same host:port to all"):
        distributed.initialize_distributed(
            DistributedSection(coordinator_address="nowhere:1")
        )  # neither how many nor which


def test_one_process_is_the_first_and_agrees_with_itself():
    assert distributed.is_first_process() and distributed.broadcast_from_first(7) == 7
    assert distributed.share_from_first({"any": [1.5]}) == {"any": [1.5]} and not distributed.is_there("/no/such/file")
    assert distributed.run_on_first_process(lambda: distributed.run_on_first_process(lambda: 3)) == 3
    with pytest.raises(OSError, match="full"):
        distributed.run_on_first_process(lambda: (_ for _ in ()).throw(OSError("full")))


def test_signals_and_saves_are_asked_about_at_the_same_calls(tmp_path, monkeypatch):
    """Two processes that make the same calls meet at the same of them, whatever their clocks say."""
    said: list[list[int]] = []

    def table(values):
        said.append(values)
        return distributed.np.array([[0, 1, 3], values])  # the first: no signal, a save is due, and to meet in 3 calls

    with open_session(tmp_path, progress=False, save_seconds=1e9) as work:
        monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
        monkeypatch.setattr(distributed, "allgather_values", table)
        assert [work.should_save() for _ in range(7)] == [True, False, False, True, False, False, True] and len(
            said
        ) == 3
        work.handle_signal(15, None)
        assert [work.should_save() for _ in range(3)] == [False, False, True]  # the signal is heard when they meet
        assert said[-1][0] == 15


def test_texts_for_the_other_processes_fit(monkeypatch):
    hosts = [f"fe80::{number:04x}" for number in range(200)]
    sent = distributed._format_addresses(hosts, 1234)
    assert 1900 < len(sent) <= distributed.MAX_ERROR_BYTES and json.loads(sent)[-1][0] in hosts
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda buffer: buffer)
    assert distributed._broadcast_text("no file \udcff.json") == "no file \\udcff.json"


@pytest.mark.parametrize("own", [np.array([1.0, 2.0]), np.float32(3.0), np.zeros((0, 2)), np.array([[True], [False]])])
def test_numbers_that_decide_are_those_of_the_first_process(monkeypatch, own):
    """As another process sees it: what the first one sent, in its shape and type, and to be written to."""
    first = (np.asarray(own) + 1).astype(np.asarray(own).dtype)
    assert np.array_equal(distributed.fetch_from_first(own), own)
    monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
    sent = np.frombuffer(first.tobytes(), np.uint8)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda buffer: sent)
    received = distributed.fetch_from_first(own)
    assert np.array_equal(received, first) and received.dtype == first.dtype and received.shape == first.shape
    received[...] = 0
    monkeypatch.setattr(distributed, "run_on_first_process", lambda work: None)  # it is not asked here
    assert np.array_equal(distributed.compute_on_first_process(lambda: 1 / 0, np.asarray(own)), first)
