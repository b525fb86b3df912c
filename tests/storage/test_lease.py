"""Who holds a URL: one process, which renews its lease, or the next one after it has died."""

import json
import os
import subprocess
import time

import pytest

from bilevel_jax.storage import lease, objects
from bilevel_jax.storage.objects import ObjectStore, StorageError
from tests.s3_server import SLOW_DOWN, be_quick


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


def test_a_write_that_is_tried_again_after_another_took_over_is_not_made(s3, tmp_path):
    store, puts = ObjectStore("s3://bucket/run"), []
    (tmp_path / "x").write_bytes(b"stale")

    def refuse(method, path, _):
        if method == "PUT" and path.endswith("/run/x"):
            puts.append(path)
            return SLOW_DOWN
        return None

    with lease.hold(store) as own:

        def check():
            if puts:  # while the first try waits to be made again, another takes over
                write_lock(store, own._number + 1, token="theirs")
                own._renewed -= lease.LEASE_SECONDS
            own.check()

        s3.app.refuse = refuse
        with pytest.raises(lease.LeaseLostError):
            store.upload(tmp_path / "x", "x", check)
    assert len(puts) == 1 and not store.exists("x")


def test_a_server_that_lets_two_create_one_object_is_refused(store, monkeypatch):
    write = store._filesystem.pipe_file
    monkeypatch.setattr(store._filesystem, "pipe_file", lambda path, data, mode="": write(path, data))
    with pytest.raises(StorageError, match="lets two processes create one object"):
        with lease.hold(store):
            raise AssertionError("nobody can hold it")
    assert store.list_all() == {}


def test_every_file_of_a_folder_is_written_under_the_lease(store, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "PARALLEL_TRANSFERS", 1)
    files = {f"part/{number}": tmp_path / str(number) for number in range(5)}
    for file in files.values():
        file.write_bytes(b"stale")
    upload, done = store._filesystem.put_file, []
    with lease.hold(store) as own:

        def put_file(*rest, **more):
            upload(*rest, **more)
            done.append(rest)
            if len(done) == 2:
                write_lock(store, own._number + 1, token="theirs")
                own._renewed -= lease.LEASE_SECONDS

        monkeypatch.setattr(store._filesystem, "put_file", put_file)
        with pytest.raises(lease.LeaseLostError):
            store.upload_all(files, own.check)
    assert len(done) == 2


def test_a_renewal_that_another_came_before_is_none(store, monkeypatch):
    write = ObjectStore.write
    with lease.hold(store) as own:
        own._ended.set()  # the renewal of this test is the only one
        own._thread.join()

        def write_late(self, name, data):
            write_lock_by(write, self, own._number + 1)
            write(self, name, data)

        monkeypatch.setattr(ObjectStore, "write", write_late)
        own._renewed -= lease.LEASE_SECONDS
        with pytest.raises(lease.LeaseLostError):
            own.check()


def write_lock_by(write, store, number):
    write(store, lease._lock_name(number), lease._format_lock("theirs"))


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
