"""Models and rows by their names on the hub: what is read, from which commit, and every error in one sentence."""

import json

import jax
import pytest

from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.checkpoint.folders import find_model_folder
from bilevel_jax.lm.data.examples import load_examples, stream_examples, summarize_examples
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.hub.downloads import find_model_files, resolve_commit
from bilevel_jax.lm.hub.errors import explain_errors, repository_url
from bilevel_jax.lm.hub.names import parse_dataset_name, parse_model_name
from bilevel_jax.lm.models.source_files import find_hub_name
from tests.lm.hub.hub_server import TOKEN, HubServer, connect

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lines(count, word="r"):
    return "".join(json.dumps({"prompt": f"p{i}", "response": f"{word}{i}"}) + "\n" for i in range(count))


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """A tiny model, beside what is of no use and never fetched."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = models.read_config(cipher.make_cipher_config())
    params = models.init_params(config, jax.random.key(0))
    models.save_model(folder, config, params, tokenizer=cipher.make_cipher_tokenizer())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "LICENSE": b"free"}


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """An empty hub and an empty cache; calls with `token` or `offline` connect anew with the same cache."""
    hub.repositories.clear()
    hub.requests.clear()
    hub.fail_with = None

    def again(**settings):
        connect(monkeypatch, hub, tmp_path / "home", **settings)
        return hub

    return again


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("hub:owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("hf://owner/name@main", ("owner/name", "main")),
        ("hf:/owner/name", ("owner/name", "")),  # through a `Path`
        ("hub:gpt2", ("gpt2", "")),
    ],
)
def test_a_model_is_named_in_three_ways(text, parts):
    name = parse_model_name(text)
    assert (name.repo, name.revision) == parts
    assert parse_model_name(str(name)) == name


@pytest.mark.parametrize(
    "text", ["", "gpt2", "/a/b", "./a/b", "../a", "out/run/model", "~/model", "builtin:cipher", "a/b/", "m@http://h/v1"]
)
def test_a_path_is_no_name_of_a_model(text):
    assert parse_model_name(text) is None


def test_a_folder_here_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert parse_model_name("out/mine") is None  # misspelled, perhaps, but a path: no stranger's model is fetched
    assert parse_model_name("hub:out/mine").repo == "out/mine"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:o/n@train", ("o/n", "", "", "train", "")),
        ("hub:o/n:c@train[:9]", ("o/n", "", "c", "train[:9]", "")),
        ("hub:o/n@v1@train+test", ("o/n", "v1", "", "train+test", "")),
        (f"hub:o/n@{COMMIT}:c@test", ("o/n", COMMIT, "c", "test", "")),
        ("hf://datasets/o/n/a/b.jsonl", ("o/n", "", "", "", "a/b.jsonl")),
        ("hf://datasets/o/n@refs/pr/1/b.jsonl.gz", ("o/n", "refs/pr/1", "", "", "b.jsonl.gz")),
        ("hf://datasets/o/n@a%2Fb/c.parquet", ("o/n", "a/b", "", "", "c.parquet")),
    ],
)
def test_a_data_set_is_named_with_revision_configuration_and_split(text, parts):
    name = parse_dataset_name(text)
    assert (name.repo, name.revision, name.config, name.split, name.file) == parts
    assert parse_dataset_name(str(name)) == name
    pinned = parse_dataset_name(str(name.with_commit(COMMIT)))
    assert pinned == name._replace(revision=COMMIT) and pinned.is_pinned


@pytest.mark.parametrize(
    "text", ["hub:", "hub:o/n", "hub:o/n@a@b@c", "hf://o/n/a.jsonl", "hf://datasets/o/n/../a.jsonl"]
)
def test_half_a_name_of_a_data_set_is_told(text):
    with pytest.raises(ValueError, match="is written"):
        parse_dataset_name(text)


def test_a_model_is_read_by_its_name(online, model_files):
    hub = online()
    repository = hub.add("model", "me/tiny", model_files)
    config, params = models.load_model("me/tiny@main")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 21952
    assert len(load_tokenizer("me/tiny")) == config.vocab_size
    assert models.read_source_files("hf://me/tiny")["LICENSE"] == b"free"
    assert find_model_folder("me/tiny").base.name == repository.head
    assert find_hub_name(find_model_folder("me/tiny").base) == (parse_model_name(f"me/tiny@{repository.head}"))
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert "model.safetensors" in fetched and not fetched & {"modeling_tiny.py", "pytorch_model.bin"}


def test_the_architecture_alone_fetches_no_weights(online, model_files):
    hub = online()
    hub.add("model", "me/tiny", model_files)
    assert models.read_config("me/tiny").vocab_size > 0
    assert not any("safetensors" in path for _, path, _ in hub.requests)


def test_one_process_reads_one_commit(online, model_files):
    hub = online()
    repository = hub.add("model", "me/tiny", model_files)
    first = resolve_commit(parse_model_name("me/tiny"))
    repository.commit(model_files | {"LICENSE": b"not free"})
    assert models.read_source_files("me/tiny")["LICENSE"] == b"free"
    online()  # another process
    assert models.read_source_files("me/tiny")["LICENSE"] == b"not free"
    assert models.read_source_files(f"me/tiny@{first}")["LICENSE"] == b"free"


def test_rows_are_read_by_their_name(online):
    repository = online().add(
        "dataset", "me/rows", {"train.jsonl": lines(5), "test.jsonl": lines(2, "t"), "more/extra.jsonl": lines(1, "x")}
    )
    assert len(load_examples(["hub:me/rows@train"])) == 5
    assert [example.turns[-1].content for example in load_examples(["hub:me/rows@test"])] == ["t0", "t1"]
    assert len(load_examples(["hub:me/rows@main@train[:2]"])) == 2
    assert len(list(stream_examples(["hub:me/rows@train"]))) == 5
    (example,) = load_examples(["hf://datasets/me/rows/more/extra.jsonl"])
    assert (example.where, example.source) == ("hf://datasets/me/rows/more/extra.jsonl:1", "extra")
    examples = load_examples([f"hub:me/rows@{repository.head}@train"])
    assert examples[0].source == "rows" and "from hub:me/rows@train;" in summarize_examples(examples)


def test_configurations_are_those_of_the_card(online):
    card = "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n"
    card += "- config_name: hard\n  data_files: hard.jsonl\n---\n"
    hub = online()
    hub.add("dataset", "me/two", {"README.md": card, "easy.jsonl": lines(2), "hard.jsonl": lines(3)})
    hub.add("dataset", "me/one", {"README.md": card.split("- config_name: hard")[0] + "---\n", "easy.jsonl": lines(2)})
    assert len(load_examples(["hub:me/two:hard@train"])) == 3
    with pytest.raises(ValueError, match=r"several configurations, and none named; there are easy, hard.*:NAME@train"):
        load_examples(["hub:me/two@train"])
    with pytest.raises(ValueError, match=r"no configuration 'hart'; nearest: 'hard'"):
        load_examples(["hub:me/two:hart@train"])
    assert len(load_examples(["hub:me/one@train"])) == 2
    online(offline=True)
    assert len(load_examples(["hub:me/one@train"])) == 2  # the only one, as online
    with pytest.raises(ValueError, match="several configurations, and none named"):
        load_examples(["hub:me/two@train"])  # though one of them is in the cache
    with pytest.raises(ConnectionError, match="not in the cache"):
        load_examples(["hub:me/two:easy@train"])


def test_the_cache_answers_for_the_commit_that_it_has_and_for_no_other(online, model_files):
    hub = online()
    rows, model = hub.add("dataset", "me/rows", {"train.jsonl": lines(5)}), hub.add("model", "me/tiny", model_files)
    load_examples(["hub:me/rows@train", "hf://datasets/me/rows/train.jsonl"])
    models.load_model("me/tiny")
    old, new = rows.head, rows.commit({"train.jsonl": lines(7).encode()})
    online(offline=True)
    requests = len(hub.requests)
    assert len(load_examples(["hub:me/rows@train", "hf://datasets/me/rows/train.jsonl"])) == 10
    assert len(load_examples([f"hub:me/rows@{old}@train"])) == 5 == len(list(stream_examples(["hub:me/rows@train"])))
    assert models.load_model("me/tiny") and models.load_model(f"me/tiny@{model.head}")
    for name in (f"hub:me/rows@{new}@train", "hub:me/rows@v2@train", "hub:me/others@train"):
        with pytest.raises(ConnectionError, match="not in the cache .* HF_HUB_OFFLINE forbids to ask the hub"):
            load_examples([name])
    with pytest.raises(ConnectionError, match="me/big: not in the cache .*, and no folder of this name here"):
        models.load_model("me/big")
    assert len(hub.requests) == requests  # nobody was asked
    online()
    assert len(load_examples([f"hub:me/rows@{new}@train"])) == 7 == len(load_examples(["hub:me/rows@train"]))
    assert len(load_examples([f"hub:me/rows@{old}@train"])) == 5


def test_a_folder_of_the_name_of_a_data_set_is_not_read_in_its_place(online, tmp_path, monkeypatch):
    hub = online()
    hub.add("dataset", "me/rows", {"train.jsonl": lines(5)})
    (tmp_path / "me" / "rows").mkdir(parents=True)
    (tmp_path / "me" / "rows" / "train.jsonl").write_text(lines(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="a folder me/rows is here"):
        load_examples(["hub:me/rows@train"])


ERRORS = {
    "no such model": ("me/tinny", FileNotFoundError, r"no model me/tinny on the hub, and no folder.*Nearest: me/tiny"),
    "no such owner": (
        "you/tiny",
        FileNotFoundError,
        r"no model you/tiny on the hub.*spelling, or log in .* private\.$",
    ),
    "a data set as model": ("me/rows", FileNotFoundError, "There is a data set of this name"),
    "no such revision": ("me/tiny@v9", FileNotFoundError, r"no revision 'v9'\. Branches and tags: v1\."),
    "no such commit": (f"me/tiny@{COMMIT}", FileNotFoundError, f"no revision '{COMMIT}'"),
    "gated": ("me/gated", PermissionError, r"accept its terms at http://127.*/me/gated, then log in \(`hf auth login`"),
    "private": ("me/private", FileNotFoundError, r"log in \(`hf auth login`, or HF_TOKEN\) if it is private"),
    "code": ("me/code", ValueError, r"auto_map names modeling_own.py\), and code of a model's folder is never run"),
    "code of a tokenizer": ("me/own-tokenizer", ValueError, "the tokenizer is a program of its own .*never run"),
    "only pickles": ("me/bin", FileNotFoundError, "model.safetensors"),
    "no such data": ("hub:me/rowz@train", FileNotFoundError, "no data set me/rowz on the hub. Nearest: me/rows"),
    "no such split": ("hub:me/rows@trian", ValueError, r"no split 'trian'; nearest: 'train'; .*me/rows@REVISION@train"),
    "a revision as split": ("hub:me/rows@main", ValueError, r"no split 'main'; .* A revision stands before the split"),
    "no such data revision": ("hub:me/rows@v9@train", FileNotFoundError, "no revision 'v9'"),
    "no such file": ("hf://datasets/me/rows/trai.jsonl", FileNotFoundError, "no such file; nearest: train.jsonl"),
    "gated data": (
        "hub:me/secret@train",
        PermissionError,
        "the data set is gated: accept its terms at .*datasets/me/s",
    ),
    "a gated file": ("hf://datasets/me/secret/train.jsonl", PermissionError, "gated"),
    "a program": ("hub:me/program@train", ValueError, r"program of its own \(program.py\), and code .* never run"),
    "no rows": ("hub:me/empty@train", ValueError, "cannot be read"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_had_is_told_in_one_sentence(online, model_files, case, caplog, capfd):
    hub = online()
    hub.add("model", "me/tiny", model_files).refs["v1"] = "1" * 40
    hub.add("model", "me/gated", model_files, gated=True)
    hub.add("model", "me/private", model_files, private=True)
    own = json.loads(model_files["config.json"]) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}
    hub.add("model", "me/code", model_files | {"config.json": json.dumps(own)})
    own = json.loads(model_files["tokenizer_config.json"]) | {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    own["tokenizer_class"] = "OwnTokenizer"
    hub.add("model", "me/own-tokenizer", model_files | {"tokenizer_config.json": json.dumps(own), "own.py": "exit(3)"})
    hub.add("model", "me/bin", {name: data for name, data in model_files.items() if "safetensors" not in name})
    hub.add("dataset", "me/rows", {"train.jsonl": lines(3), "test.jsonl": lines(1)})
    hub.add("dataset", "me/secret", {"train.jsonl": lines(3)}, gated=True)
    hub.add("dataset", "me/program", {"program.py": "import os; os._exit(3)", "train.jsonl": lines(3)})
    hub.add("dataset", "me/empty", {"README.md": "nothing"})
    name, kind, text = ERRORS[case]
    with pytest.raises(kind, match=text) as error:
        read = load_tokenizer if "tokenizer" in name else models.load_model
        load_examples([name]) if "hub:" in name or "hf:" in name else read(name)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_a_token_reads_what_is_private_and_is_never_shown(online, model_files):
    hub = online(token=TOKEN)
    hub.add("model", "me/private", model_files, private=True)
    hub.add("model", "me/gated", model_files, gated=True)
    assert models.load_model("me/private")
    assert {token for _, _, token in hub.requests} == {TOKEN}
    seen = []
    with pytest.raises(PermissionError, match="gated") as error:
        models.load_model("me/gated")
    seen.append(str(error.value))
    with pytest.raises(FileNotFoundError, match="ask for access for the account of your token") as error:
        models.load_model("me/nothing")
    seen.append(str(error.value))
    online(token="hf_an_old_token")
    with pytest.raises(PermissionError, match="does not accept the token") as error:
        models.load_model("me/other")
    seen.append(str(error.value))
    assert not any("hf_a" in text for text in seen)


def test_what_is_secret_in_a_text_is_not_shown(online, monkeypatch):
    online(token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ConnectionError, match="the hub at http://127.0.0.1:9 cannot be reached"):
        models.load_model("me/tiny")
    assert repository_url(parse_model_name("me/tiny")) == "http://127.0.0.1:9/me/tiny"
    said = f"Illegal header value b'Bearer hf_old\\n' of {TOKEN}, https://cdn/a/b?X-Signature=secret&c=d, http://m:secret@h/x"
    with pytest.raises(ValueError, match="cannot be read") as error, explain_errors(parse_model_name("me/tiny")):
        raise RuntimeError(said)
    shown = "Illegal header value b'Bearer ***' of ***, https://cdn/a/b?*** http://h/x"
    assert shown in str(error.value)


@pytest.mark.parametrize(("status", "reason"), [(503, "status 503"), (404, "status 404"), (0, "ReadTimeout")])
def test_an_old_commit_of_the_cache_is_read_with_a_warning_alone(online, monkeypatch, recwarn, status, reason):
    hub = online()
    repository = hub.add("model", "me/tiny", {"config.json": b"{}"})
    name, old = parse_model_name("me/tiny"), repository.head
    assert resolve_commit(name) == old and not recwarn
    repository.commit({"config.json": b"{ }"})
    online()
    hub.fail_with = ("/api/", status)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 10 if status else 0.1)
    with pytest.warns(UserWarning, match=rf"me/tiny: the hub did not answer \({reason}\); the cache's commit {old} is"):
        assert resolve_commit(name) == old
    online()
    hub.fail_with = None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 10)
    assert resolve_commit(name) == repository.head != old


@pytest.mark.parametrize(("status", "text"), [(429, "too many requests"), (418, "status 418")])
def test_a_hub_in_trouble_is_told(online, status, text):
    hub = online()
    hub.fail_with = ("/api/", status)
    with pytest.raises(OSError, match=text):
        find_model_files("me/tiny")


def test_no_network_is_told(online, monkeypatch):
    from huggingface_hub import constants

    online()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for name, read in (("me/tiny", models.load_model), ("hub:me/rows@train", lambda name: load_examples([name]))):
        with pytest.raises(ConnectionError, match=r"the hub at http://127.0.0.1:9 cannot be reached.*HF_ENDPOINT"):
            read(name)
