"""Objects on a server that is busy, fails, refuses or vanishes."""

import errno
import os
import re

import pytest

from bilevel_jax.storage import objects
from bilevel_jax.storage.objects import ObjectStore, StorageError
from tests.s3_server import DENIED, FAILURE, SLOW_DOWN, forget_clients

SCHEMES = ["memory", "s3"]


@pytest.fixture(params=SCHEMES)
def store(request):
    if request.param == "s3":
        request.getfixturevalue("s3")
        return ObjectStore("s3://bucket/run")
    store = ObjectStore("memory://objects/run")
    store.remove(store.list_all())
    return store


def test_what_is_written_is_read_listed_and_removed(store, tmp_path):
    store.write("a.txt", b"one")
    store.write("a.txt", b"two")
    (tmp_path / "b").write_bytes(b"three")
    store.upload_all({"deep/b": tmp_path / "b", "deep/er/c": tmp_path / "b"})
    assert store.list_all() == {"a.txt": 3, "deep/b": 5, "deep/er/c": 5}
    assert store.list_all("deep") == {"deep/b": 5, "deep/er/c": 5}
    assert store.list_names() == ["a.txt", "deep"]
    assert (store.read("a.txt"), store.read_or_none("none"), store.exists("a.txt")) == (b"two", None, True)
    assert not store.exists("deep") and not store.exists("none")
    store.download("deep/b", tmp_path / "new" / "b")
    assert (tmp_path / "new" / "b").read_bytes() == b"three"
    store.remove(["a.txt", "none", *store.list_all("deep")])
    assert store.list_all() == {}
    with pytest.raises(FileNotFoundError, match=r"run/a\.txt: there is no such object"):
        store.read("a.txt")


def test_one_of_two_creates(store):
    assert store.create("lock", b"mine")
    assert not store.create("lock", b"other")
    assert store.read("lock") == b"mine"
    assert store.create("lock", b"mine")  # as after an answer that was lost: what is there is what was sent


@pytest.mark.parametrize("name", ["../../x", "deep/../../x", "/etc/x", "deep//x", "./x"])
def test_a_name_that_would_be_a_file_elsewhere_is_refused(s3, name, monkeypatch):
    s3.write("run/a.txt", b"one")
    store, others = ObjectStore("s3://bucket/run"), {"bucket/run/deep/": {"size": 0}}  # a console's, to show a folder
    find = store._filesystem.find  # as another server: that of the tests refuses some of these names
    monkeypatch.setattr(store._filesystem, "find", lambda *rest, **more: find(*rest, **more) | others)
    assert store.list_all() == {"a.txt": 3}
    others[f"bucket/run/{name}"] = {"size": 1}
    with pytest.raises(StorageError, match=f"s3://bucket/run holds an object '{re.escape(name)}'.*Remove it"):
        store.list_all()


@pytest.mark.parametrize("answer", [SLOW_DOWN, FAILURE, (429, "TooManyRequests")], ids=str)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_busy_server_is_asked_again(s3, answer, method):
    store, refused = ObjectStore("s3://bucket/run"), []

    def refuse(asked, path, _):
        if asked == method and len(refused) < 3:
            refused.append(path)
            return answer
        return None

    s3.app.refuse = refuse
    store.write("x", b"whole")
    assert store.read("x") == b"whole" and store.list_all() == {"x": 5}
    store.remove(["x"])
    assert len(refused) == 3 and s3.names() == {}


def test_a_server_that_keeps_failing_is_given_up_in_one_sentence(s3, monkeypatch):
    monkeypatch.setattr(objects, "RETRY_SECONDS", 1.0)
    s3.app.refuse = lambda *_: FAILURE
    store = ObjectStore("s3://bucket/run")
    with pytest.raises(StorageError) as error:
        store.write("log.jsonl", b"")
    text = str(error.value)
    assert text.startswith("s3://bucket/run/log.jsonl could not be written: the server answered 500 InternalError")
    assert re.search(r", in \d+ tries within [01] s\.", text) and text.endswith("a run goes on with --resume.")
    asked = len(s3.app.requests)
    with pytest.raises(StorageError):  # a program that ends does not wait for each of its last words
        store.write("log.jsonl", b"")
    assert len(s3.app.requests) == asked + 1
    s3.app.refuse = None
    store.write("log.jsonl", b"x")
    s3.app.refuse = lambda method, _, number: SLOW_DOWN if method == "PUT" and len(s3.app.requests) % 3 else None
    store.write("log.jsonl", b"y")  # it was there again, so it is asked again
    assert s3.names("run") == {"log.jsonl": b"y"}


def test_a_refusal_is_not_repeated(s3):
    s3.app.refuse, before = (lambda *_: DENIED), len(s3.app.requests)
    with pytest.raises(StorageError, match="403 AccessDenied.*AWS_ACCESS_KEY_ID"):
        ObjectStore("s3://bucket/run").write("x", b"")
    assert len(s3.app.requests) == before + 1


def test_a_bucket_that_is_not_there_is_named(s3):
    with pytest.raises(StorageError, match="s3://none/run/x could not be written.*Make the bucket"):
        ObjectStore("s3://none/run").write("x", b"")


def test_a_server_that_cannot_be_reached_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    forget_clients()
    monkeypatch.setattr(objects, "RETRY_SECONDS", 0.1)
    with pytest.raises(StorageError, match=r"s3://bucket/run/x could not be read: EndpointConnectionError"):
        ObjectStore("s3://bucket/run").read("x")
    forget_clients()


def test_a_download_that_breaks_off_leaves_nothing(s3, tmp_path, monkeypatch):
    s3.write("run/x", b"whole")
    monkeypatch.setattr(objects, "RETRY_SECONDS", 0.1)
    s3.app.refuse = lambda *_: FAILURE
    with pytest.raises(StorageError):
        ObjectStore("s3://bucket/run").download("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


class Stopped(Exception):
    """As the handler of a signal raises it, in the middle of a request."""


@pytest.mark.parametrize(
    "error", [Stopped("SIGTERM"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=["signal", "full disk"]
)
def test_what_is_no_answer_of_a_server_is_not_told_as_one(error, monkeypatch):
    store = ObjectStore("memory://objects/run")

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(store._filesystem, "cat_file", stop)
    with pytest.raises(type(error)) as raised:
        store.read("x")
    assert raised.value is error


def test_a_program_that_is_to_end_at_once_waits_for_no_server(s3, monkeypatch, tmp_path):
    """Eight files wait for a busy server; a second signal comes."""
    monkeypatch.setattr(objects, "RETRY_SECONDS", 1e3)
    monkeypatch.setattr(objects, "FIRST_WAIT_SECONDS", 1e2)
    monkeypatch.setattr(objects, "MAX_WAIT_SECONDS", 1e2)
    asked = []

    def refuse(method, path, _):
        asked.append(path)
        if len(asked) == objects.PARALLEL_TRANSFERS:
            objects.stop_trying()
        return SLOW_DOWN

    s3.app.refuse = refuse
    (tmp_path / "x").write_bytes(b"")
    try:
        with pytest.raises(StorageError, match="503 SlowDown"):
            ObjectStore("s3://bucket/run").upload_all({str(number): tmp_path / "x" for number in range(100)})
    finally:
        objects.try_again()
    assert len(asked) < 100 // 2


class Refused(Exception):
    """What gcsfs raises: the status is a text."""

    def __init__(self, code):
        super().__init__("as the server says")
        self.code = code


@pytest.mark.parametrize(("code", "again"), [("429", True), (503, True), (412, False), ("404", False), (0, False)])
def test_statuses_of_google_storage_are_understood(code, again):
    assert objects.is_transient(Refused(code)) == again
