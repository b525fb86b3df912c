"""Copies of this machine: what is published in which order, and what may be written where."""

import contextlib

import pytest

from bilevel_jax.storage import copies, lease
from bilevel_jax.storage.objects import ObjectStore, StorageError
from tests.s3_server import DENIED, be_quick


@pytest.fixture
def working_copy(monkeypatch):
    """A working copy at memory://copies/run that publishes no journal by itself."""
    be_quick(monkeypatch)
    monkeypatch.setattr(copies, "JOURNAL_SECONDS", 1e3)
    copy = copies.WorkingCopy("memory://copies/run")
    copy.store.remove(copy.store.list_all())
    copy.root.mkdir()
    with lease.hold(copy.store) as owner:
        copy.open(owner)
        yield copy
        with contextlib.suppress(StorageError):
            copy.close()


def names(copy):
    return {name for name in copy.store.list_all() if not lease.LOCK_NAME.fullmatch(name)}


@pytest.mark.parametrize("how", ["publish", "publish_folder", "remove", "remove_folder"])
def test_a_journal_is_on_the_server_before_what_relies_on_it(working_copy, monkeypatch, how):
    (working_copy.root / "part").mkdir()
    journal, done = working_copy.root / "responses.jsonl", working_copy.root / "part" / "done.json"
    done.write_text("{}")
    working_copy.publish(done)
    journal.write_text('{"row": 1}\n')
    copies.publish_later(journal)
    assert names(working_copy) == {"part/done.json"}
    fail, seen = ObjectStore.upload, []

    def look(*_, **__):
        seen.append(names(working_copy))
        raise StorageError("killed here")

    def upload(self, file, name, *rest, **more):
        return look() if name == "part/done.json" else fail(self, file, name, *rest, **more)

    monkeypatch.setattr(ObjectStore, "upload", upload)
    monkeypatch.setattr(ObjectStore, "remove", look)
    with pytest.raises(StorageError, match="killed here"):
        getattr(working_copy, how)(done if how in ("publish", "remove") else done.parent)
    assert seen and all("responses.jsonl" in one for one in seen)


def test_a_journal_that_could_not_be_published_is_published_later(working_copy, monkeypatch):
    journal = working_copy.root / "responses.jsonl"
    journal.write_text('{"row": 1}\n')
    copies.publish_later(journal)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "upload", lambda *_, **__: (_ for _ in ()).throw(StorageError("away")))
        with pytest.raises(StorageError, match="away"):
            working_copy.publish_journals()
    working_copy.publish_journals()
    assert working_copy.store.read("responses.jsonl") == b'{"row": 1}\n'


def test_a_file_is_read_without_the_right_to_list(s3):
    s3.write("data/rows.jsonl", b"{}")
    s3.app.refuse = lambda method, path, _: DENIED if path.endswith(("manifest.json", "seals.jsonl", ".yaml")) else None
    assert copies.local_path("s3://bucket/data/rows.jsonl").read_bytes() == b"{}"


def test_a_folder_of_data_with_a_manifest_is_no_run(s3):
    for name in ("manifest.json", "parts/0.jsonl"):
        s3.write(f"data/{name}", b"{}")
    assert (copies.local_path("s3://bucket/data") / "parts" / "0.jsonl").read_bytes() == b"{}"


def test_a_run_may_be_a_whole_bucket(s3):
    for name in ("config.yaml", "seals.jsonl", "model/a", "checkpoints/done.json"):
        s3.write(name, b"{}")
    folder = copies.local_path("s3://bucket/")
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"config.yaml", "seals.jsonl", "a"}
    assert (copies.local_path("s3://bucket/model") / "a").read_bytes() == b"{}"
