"""Who holds a URL: one process, which renews its lease, or the next one after it has died."""

import json
import os
import subprocess
import time

import pytest

from bilevel_jax.storage import lease
from bilevel_jax.storage.objects import ObjectStore
from tests.s3_server import be_quick


@pytest.fixture(params=["memory", "s3"])
def store(request, monkeypatch):
    be_quick(monkeypatch)
    if request.param == "s3":
        request.getfixturevalue("s3")
        return ObjectStore("s3://bucket/run")
    store = ObjectStore("memory://leases/run")
    store.remove(store.list_all())
    return store


def write_lock(store, number, **fields):
    """As another process would have left it."""
    lock = json.loads(lease._format_lock("theirs")) | fields
    store.write(lease._lock_name(number), json.dumps(lock).encode())


def test_a_second_one_is_refused_while_the_first_is_alive(store):
    with lease.hold(store):
        with pytest.raises(RuntimeError, match=rf"is in use by process {os.getpid()} on .*; wait, stop it, or choose"):
            with lease.hold(store):
                raise AssertionError("two hold it")
    with lease.hold(store):  # it was given back
        pass


def test_a_lease_that_nobody_renews_is_taken_over_with_a_sentence(store):
    write_lock(store, 7, machine="far-away", space="another", process=12)
    said = []
    with lease.hold(store, said.append) as own:
        own.check()
    assert len(said) == 2
    assert "held by process 12 on far-away; looking whether it is alive" in said[0]
    assert "no sign of life for 1 s: taken over" in said[1]


def test_where_a_process_has_died_on_this_machine_nobody_waits(store):
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_lock(store, 3, process=ended.pid)
    start = time.monotonic()
    with lease.hold(store):
        assert time.monotonic() - start < lease.LEASE_SECONDS


def test_one_who_was_silent_for_too_long_stops_before_it_writes(store, monkeypatch):
    with lease.hold(store) as own:
        write_lock(store, own._number + 1, token="theirs")
        own._renewed -= lease.LEASE_SECONDS
        with pytest.raises(lease.LeaseLostError, match="taken over by another process"):
            own.check()
        with pytest.raises(lease.LeaseLostError):
            own.check()
    holder = json.loads(store.read(lease._lock_name(own._number + 1)))
    assert holder["token"] == "theirs" and not holder["is_free"]  # what it holds is not given back by the first


def test_of_two_that_come_at_once_one_wins(store, monkeypatch):
    """The second one creates its lock between the look and the creation of the first."""
    create, came = ObjectStore.create, []

    def create_late(self, name, data):
        if not came:
            came.append(name)
            write_lock(store, 1, machine="other", space="another", process=9)
        return create(self, name, data)

    monkeypatch.setattr(ObjectStore, "create", create_late)
    said = []
    with lease.hold(store, said.append) as own:
        assert own._number == 2 and "process 9 on other" in said[0]
