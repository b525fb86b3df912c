"""What is pushed to the hub: one commit, and nothing of others lost."""

import json

import pytest

from bilevel_jax.lm.hub.uploads import MANIFEST_FILE, push_files
from tests.lm.hub.hub_server import TOKEN, HubServer, connect

# of httpx, on how huggingface_hub sends a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
FILES = {"README.md": b"# rows\n", "train.jsonl": b"{}\n", "selection.parquet": b"PAR1 and so on", "a/b.txt": b"b"}


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    server.repositories.clear()
    connect(monkeypatch, server, tmp_path / "home", token=TOKEN)
    return server


def push(files=FILES, repository="me/rows", **settings):
    settings = {
        "message": "a push",
        "made_by": "the tests",
        "source": {"run": "a"},
        "private": False,
        "replace": False,
    } | settings
    return push_files("dataset", repository, files, **settings)


def test_all_files_come_in_one_commit(hub, tmp_path):
    big = tmp_path / "big.parquet"
    big.write_bytes(b"PAR1" * 1000)
    pushed = push({**FILES, "big.parquet": big})
    repository = hub.repositories["dataset", "me/rows"]
    assert repository.messages == ["initial commit", "a push"] and not repository.private
    assert pushed.name.revision == repository.head and pushed.url == f"{hub.url}/datasets/me/rows"
    assert {path: repository.files[path] for path in FILES} == FILES
    assert repository.files["big.parquet"] == big.read_bytes()
    assert set(json.loads(repository.files[MANIFEST_FILE])["files"]) == {*FILES, "big.parquet"}


def test_a_second_push_takes_the_place_of_the_first_alone(hub):
    push()
    repository = hub.repositories["dataset", "me/rows"]
    repository.commit({**repository.files, "notes.txt": b"of somebody"})
    push({"README.md": b"# other rows\n", "train-2.jsonl": b"{}\n"})
    assert set(repository.files) == {".gitattributes", MANIFEST_FILE, "README.md", "train-2.jsonl", "notes.txt"}
    assert repository.files["README.md"] == b"# other rows\n" and len(repository.messages) == 4


@pytest.mark.parametrize("path", ["README.md", "selection.parquet", MANIFEST_FILE])
def test_what_somebody_wrote_is_not_overwritten_unless_asked(hub, path):
    push()
    repository = hub.repositories["dataset", "me/rows"]
    repository.commit({**repository.files, path: b"{}"})
    head = repository.head
    with pytest.raises(FileExistsError, match=f"holds .*{path}.* nothing is overwritten.*export.replace"):
        push()
    assert repository.head == head
    push(replace=True)
    assert repository.files[path] != b"{}" and repository.commits[head][path] == b"{}"  # in the history


def test_a_push_from_another_run_replaces_nothing_unless_asked(hub):
    push()
    repository = hub.repositories["dataset", "me/rows"]
    head = repository.head
    with pytest.raises(FileExistsError, match=r"made from something else \(run a\): nothing is overwritten.*replace"):
        push({"other.md": b"# of b\n"}, source={"run": "b"})
    assert repository.head == head
    push({"other.md": b"# of b\n"}, source={"run": "b"}, replace=True)
    assert set(repository.files) == {".gitattributes", MANIFEST_FILE, "other.md"}


def test_a_repository_of_others_is_left_alone(hub):
    hub.add("dataset", "me/rows", {"README.md": "mine", "data.csv": "1"})
    with pytest.raises(FileExistsError, match="README.md, which no export of bilevel-jax made"):
        push()
    assert set(hub.repositories["dataset", "me/rows"].files) == {"README.md", "data.csv"}


def test_a_commit_in_between_is_not_overrun(hub, monkeypatch):
    from huggingface_hub import HfApi

    push()
    repository, preupload = hub.repositories["dataset", "me/rows"], HfApi.preupload_lfs_files

    def slow(*args, **named):
        repository.commit({**repository.files, "README.md": b"meanwhile"})
        return preupload(*args, **named)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", slow)
    with pytest.raises(OSError, match="somebody else pushed at the same time"):
        push({"README.md": b"# later\n"})
    assert repository.files["README.md"] == b"meanwhile"


def test_who_may_see_it(hub):
    assert push(repository="me/secret", private=True).is_private
    assert hub.repositories["dataset", "me/secret"].private
    push({"README.md": b"# new\n"}, repository="me/secret", private=True)
    assert push({"README.md": b"# new\n"}, repository="me/secret").is_private
    assert not push().is_private
    with pytest.raises(ValueError, match="is public, and a private repository is asked for"):
        push(private=True)


@pytest.mark.parametrize(
    ("repository", "settings", "kind", "text"),
    [
        ("rows", {}, ValueError, "'rows' is no name of a repository: it is owner/name"),
        ("me/a b", {}, ValueError, "is no name of a repository"),
        ("me/rows", {"token": ""}, PermissionError, r"nobody is logged in.* log in \(`hf auth login`, or HF_TOKEN\)"),
        ("me/rows", {"offline": True}, ConnectionError, "HF_HUB_OFFLINE is set"),
        ("me/rows", {"token": "hf_of_yesterday"}, PermissionError, "does not accept the token"),
        ("me/rows", {"url": "http://127.0.0.1:9"}, ConnectionError, "cannot be reached, so nothing was pushed"),
        ("you/rows", {}, PermissionError, "the token may not make a repository there.*an owner that is you"),
    ],
)
def test_what_cannot_be_pushed_is_told(hub, tmp_path, monkeypatch, repository, settings, kind, text):
    settings = {"token": TOKEN, "url": hub.url} | settings
    url = settings.pop("url")
    connect(monkeypatch, hub, tmp_path / "home", **settings)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    with pytest.raises(kind, match=text) as error:
        push(repository=repository)
    assert "hf_of" not in str(error.value) and not hub.repositories
