"""Commands on names on the hub: the commits that a run records, and a run that goes on after the hub has changed."""

import importlib
import json
import math

import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.export.card import describe_measurements
from bilevel_jax.commands.export.push import list_model_files
from bilevel_jax.commands.results import read_run
from bilevel_jax.commands.select.run import select
from bilevel_jax.lm.checkpoint.folders import find_model_folder
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.models import load_peft, read_config
from bilevel_jax.runs.config.hub_names import describe_hub_names, find_commits, keep_base_commits, replace_names
from bilevel_jax.runs.config.load import EvaluateConfig, SelectConfig, load_config
from bilevel_jax.runs.infra import inputs
from bilevel_jax.runs.infra.seals import DamagedFileError
from tests.lm.hub.hub_server import TOKEN, HubServer, connect

NAMES = ("--model", "me/tiny", "--train", "hub:me/rows@main@train", "--validation", "hub:me/rows@validation")
NAMES += ("--data.test", "hf://datasets/me/rows/test.jsonl", "--data.split", "1", "0", "0")
KEPT = (("dataset", "me/kept"), ("model", "me/tuned"))
FEW_STEPS = ("--train.max-steps", "6", "--train.num-epochs", "1", "--train.eval-steps", "3")


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def online(hub, made, tmp_path, monkeypatch):
    """The tiny task on the hub; a call connects as another process would."""
    hub.repositories.clear()
    hub.add("model", "me/tiny", {path.name: path.read_bytes() for path in (made / "model").iterdir()})
    parts = ("train", "validation", "test")
    hub.add("dataset", "me/rows", {f"{part}.jsonl": (made / f"{part}.jsonl").read_bytes() for part in parts})

    def again(**settings):
        connect(monkeypatch, hub, tmp_path / "home", **settings)
        return hub

    again()
    return again


def run(made, verb, out, *flags):
    return main([verb, str(made / f"{verb}.yaml"), *NAMES, "--out", str(out), *flags])


def read_json(path):
    return json.loads(path.read_text())


def test_a_run_records_commits_and_goes_on_with_them(online, made, tmp_path, capsys, stop_at):
    hub, out = online(), tmp_path / "out"
    model, rows = hub.repositories["model", "me/tiny"], hub.repositories["dataset", "me/rows"]
    pinned = {
        "model.name_or_path": f"hub:me/tiny@{model.head}",
        "data.train": f"hub:me/rows@{rows.head}@train",
        "data.validation": f"hub:me/rows@{rows.head}@validation",
        "data.test": f"hf://datasets/me/rows@{rows.head}/test.jsonl",
    }
    assert run(made, "train", tmp_path / "whole", *FEW_STEPS) == 0
    stop_at(3)
    assert run(made, "train", out, *FEW_STEPS) == 128 + 15
    assert "data.train: hub:me/rows@main@train is read as " + pinned["data.train"] in capsys.readouterr().err
    records = read_json(out / "hub.json")
    assert {record["key"]: record["name"] for record in records} == pinned
    assert [record["asked"].partition("/")[2] for record in records] == [
        "tiny", "rows@main@train", "rows@validation", "/datasets/me/rows/test.jsonl"
    ]  # fmt: skip
    # the branches move, and the network goes away
    model.commit({"config.json": b"{}"})
    rows.commit({"train.jsonl": b'{"prompt": "a", "response": "b"}\n'})
    online(offline=True)
    stop_at(10**9)
    assert run(made, "train", out, *FEW_STEPS, "--resume") == 0
    result = read_json(out / "result.json")
    assert result["hub"] == records
    whole = read_json(tmp_path / "whole" / "result.json")
    assert result["parts"] == whole["parts"] and result["records"] == whole["records"]
    assert all(name in (out / "config.yaml").read_text() for name in pinned.values())
    assert main(["export", str(out), "--out", str(tmp_path / "chosen")]) == 0  # the same rows
    assert len((tmp_path / "chosen" / "train.jsonl").read_text().splitlines()) == 29
    online()  # a new run reads what is there now
    assert run(made, "train", tmp_path / "new", *FEW_STEPS) == 1
    assert "/test.jsonl: me/rows is on the hub and has no such file; nearest: train.jsonl" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_a_selection_of_names_is_that_of_the_files(online, made, tmp_path):
    select(load_config(SelectConfig, made / "select.yaml", ["--out", str(tmp_path / "plain")]))
    assert run(made, "select", tmp_path / "out") == 0
    found = read_run(load_config(SelectConfig, tmp_path / "out" / "config.yaml"), tmp_path / "out")
    assert found.weights.shape == (36,) and found.verdict
    assert found.weights.tolist() == pq.read_table(tmp_path / "plain" / "weights.parquet")["weight"].to_pylist()
    hub = online(token=TOKEN)
    flags = ("--push-to-hub", "me/kept", "--export.push-model-to-hub", "me/tuned")
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "kept"), *flags]) == 0
    for card in (hub.repositories[name].files["README.md"].decode() for name in KEPT):
        assert "## Certificates" in card and "## When these weights are wrong" in card and "| learned |" in card
        assert found.verdict.level in card


def test_an_adapter_names_its_base_with_its_commit(online, made, tmp_path):
    hub, out = online(), tmp_path / "out"
    head = hub.repositories["model", "me/tiny"].head
    assert run(made, "train", out, "--lora.r", "2", *FEW_STEPS) == 0
    adapter = read_json(out / "model-adapter" / "adapter_config.json")
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("me/tiny", head)
    hub.repositories["model", "me/tiny"].commit({"config.json": b"{}"})
    online()
    folders = find_model_folder(out / "model-adapter")
    assert folders.base.name == head and folders.adapter == out / "model-adapter"


def test_a_run_that_fails_at_its_start_leaves_no_folder(online, made, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no training today.")

    monkeypatch.setattr(importlib.import_module("bilevel_jax.commands.train.run"), "TrainingLoop", fail)
    with pytest.raises(ValueError, match="no training today"):
        run(made, "train", tmp_path / "out", *FEW_STEPS)
    assert "is read as hub:me/tiny@" in capsys.readouterr().err  # the session was open
    assert not (tmp_path / "out").exists()


def evaluation(model, baseline, *flags):
    names = ("--evaluate.model", model, "--evaluate.baseline", baseline, "--data.test", "rows.jsonl")
    return load_config(EvaluateConfig, None, [*names, *flags])


def test_the_base_of_an_adapter_is_pinned_and_recorded(online, made, tmp_path):
    hub = online()
    base = hub.repositories["model", "me/tiny"]
    keys = {"base_model_name_or_path": "me/tiny", "revision": None}
    adapter = hub.add("model", "me/adapter", {"adapter_config.json": json.dumps(keys)})
    old, config = base.head, evaluation("me/adapter", "me/tiny")
    pinned = inputs.pin_hub_names(config)
    assert pinned.evaluate.base == pinned.evaluate.baseline == f"hub:me/tiny@{old}"
    records = describe_hub_names(pinned)
    assert {record.key: (record.name, record.asked) for record in records} == {
        "evaluate.model": (f"hub:me/adapter@{adapter.head}", "hub:me/adapter"),
        "evaluate.baseline": (f"hub:me/tiny@{old}", "hub:me/tiny"),
        "evaluate.base": (f"hub:me/tiny@{old}", "hub:me/tiny"),
    }
    base.commit({"config.json": b"{}"})
    online()
    assert replace_names(config, find_commits(config, records)) == pinned  # --resume
    assert inputs.pin_hub_names(pinned) == pinned  # a run of its config.yaml
    online()
    assert inputs.pin_hub_names(config).evaluate.base == f"hub:me/tiny@{base.head}"  # a new run


def test_adapters_on_two_bases_keep_the_commit_of_each(online, made):
    hub = online()
    hub.add("model", "me/big", hub.repositories["model", "me/tiny"].files)
    heads = {name: hub.repositories["model", name].head for name in ("me/tiny", "me/big")}
    for name in heads:
        keys = {"base_model_name_or_path": name}
        hub.add("model", f"{name}-adapter", {"adapter_config.json": json.dumps(keys), "adapter_model.safetensors": b""})
    config = evaluation("me/tiny-adapter", "me/big-adapter")
    pinned = inputs.pin_hub_names(config)
    assert pinned.evaluate.base == ""
    records = describe_hub_names(pinned)
    bases = {record.name for record in records if record.key == "evaluate.base"}
    assert bases == {f"hub:{name}@{head}" for name, head in heads.items()}
    for name in heads:
        hub.repositories["model", name].commit({"config.json": b"{}"})
    online()
    commits = find_commits(config, records)
    keep_base_commits(commits)
    assert replace_names(config, commits) == pinned
    folders = [find_model_folder(name) for name in (pinned.evaluate.model, pinned.evaluate.baseline)]
    assert [folder.base.name for folder in folders] == list(heads.values())


def test_a_model_and_a_data_set_of_one_name_are_told_apart(online, made, tmp_path):
    hub = online()
    repository = hub.add("model", "me/both", {"config.json": b"{}"})
    repository.refs["train"] = model = repository.head
    rows = hub.add("dataset", "me/both", {"train.jsonl": b"{}\n"}).head
    flags = ("--model", "hub:me/both@train", "--train", "hub:me/both@train", "--validation", "hub:me/both@train")
    config = load_config(SelectConfig, made / "select.yaml", flags)
    pinned = inputs.pin_hub_names(config)
    assert pinned.model.name_or_path == f"hub:me/both@{model}" and pinned.data.train == (f"hub:me/both@{rows}@train",)
    assert replace_names(config, find_commits(config, describe_hub_names(pinned))) == pinned


def test_a_name_that_is_not_there_leaves_no_folder(online, made, tmp_path, capsys):
    assert run(made, "select", tmp_path / "out", "--model", "me/tinny") == 1
    error = capsys.readouterr().err
    assert "no model me/tinny on the hub" in error and "Nearest: me/tiny" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models_that_are_asked_are_named_on_the_hub_and_services_are_not(online):
    config = load_config(
        EvaluateConfig,
        None,
        [
            "--evaluate.model", "me/tiny", "--evaluate.baseline", "me/big@http://localhost:8000/v1",
            "--data.test", "rows.jsonl", "--evaluate.base", "hub:me/tiny@main",
        ],
    )  # fmt: skip
    head = online().repositories["model", "me/tiny"].head
    commits = find_commits(config)
    assert commits == {
        "evaluate.model": {"me/tiny": f"hub:me/tiny@{head}"},
        "evaluate.base": {"hub:me/tiny@main": f"hub:me/tiny@{head}"},
    }
    pinned = replace_names(config, commits)
    assert pinned.evaluate.model == f"hub:me/tiny@{head}" and pinned.evaluate.baseline == config.evaluate.baseline
    assert [(record.key, record.asked) for record in describe_hub_names(pinned)] == [
        ("evaluate.model", "hub:me/tiny"), ("evaluate.base", "hub:me/tiny@main")
    ]  # fmt: skip
    assert inputs.pin_hub_names(pinned) == pinned


def test_what_is_inspected_and_estimated_may_be_on_the_hub(online, made, capsys):
    assert main(["inspect", str(made / "select.yaml"), *NAMES]) == 0
    flags = ("--estimate.no-measure", "--estimate.no-compile", "--estimate.train-examples", "40")
    assert main(["estimate", str(made / "select.yaml"), *NAMES, *flags]) == 0
    assert "model" in capsys.readouterr().out


def read_back(name, **settings):
    import datasets

    return datasets.load_dataset(name, split="train", **settings)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of httpx, on a large file
def test_an_export_is_pushed_and_read_back(online, made, tmp_path, capsys):
    hub, out = online(token=TOKEN), tmp_path / "out"
    commit = hub.repositories["dataset", "me/rows"].head
    assert run(made, "train", out, *FEW_STEPS, "--lora.r", "2") == 0
    flags = ("--selection.top-share", "0.5", "--push-to-hub", "me/kept", "--export.push-model-to-hub", "me/tuned")
    assert main(["export", str(out), "--out", str(tmp_path / "kept"), *flags]) == 0
    said = capsys.readouterr().out
    kept, tuned = hub.repositories["dataset", "me/kept"], hub.repositories["model", "me/tuned"]
    assert kept.private and tuned.private
    assert f"pushed the data set me/kept, commit {kept.head} (private): {hub.url}/datasets/me/kept" in said
    assert f"pushed the model me/tuned, commit {tuned.head} (private): {hub.url}/me/tuned" in said
    # by others' programs, and as training data again
    rows = read_back("me/kept", revision=kept.head)
    local = [json.loads(line) for line in (tmp_path / "kept" / "train.jsonl").read_text().splitlines()]
    assert rows["id"][:] == [row["id"] for row in local] and len(rows) == 18
    assert [example.id for example in load_examples(["hub:me/kept@train"])] == [row["id"] for row in local]
    card = kept.files["README.md"].decode()
    assert f"hub:me/rows@{commit}@train" in card and "source_datasets:\n- me/rows" in card
    assert 'load_dataset("me/kept", split="train")' in card and "| test | " in card and "before, nats per token" in card
    # the adapter, on the base that it names
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(tuned.files)
    folders = find_model_folder("me/tuned")
    assert folders.adapter is not None and load_peft(folders.adapter, read_config(folders.base))
    card = tuned.files["README.md"].decode()
    assert "base_model:\n- me/tiny" in card and "base_model_relation: adapter" in card and "AutoPeftModel" in card
    places = [str(tmp_path), str(made), TOKEN]
    pushed = b"".join([*kept.files.values(), *tuned.files.values()])
    assert not any(place.encode() in pushed for place in places) and TOKEN not in said
    # again: the same rows, and nothing changed by hand in between is lost
    kept.commit({**kept.files, "README.md": b"my own words"})
    assert main(["export", str(out), "--out", str(tmp_path / "again"), "--push-to-hub", "me/kept"]) == 1
    error = capsys.readouterr().err
    assert "README.md, which no export" in error and f"whole in {tmp_path / 'again'}" in error
    assert kept.files["README.md"] == b"my own words"
    # a model with other files than the run wrote is not pushed
    (out / "model-adapter" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt, which the run did not write"):
        list_model_files(out / "model-adapter")
    (out / "model-adapter" / "notes.txt").unlink()
    assert list_model_files(out / "model-adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    (out / "model-adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"adapter_model.safetensors"):
        list_model_files(out / "model-adapter")


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.parametrize("container", ["parquet", "datasets", "json"])
def test_every_container_is_read_back(online, made, tmp_path, container):
    hub = online(token=TOKEN)
    rows = ("--train", str(made / "train.jsonl"), "--selection.top-share", "1", "--export.container", container)
    assert main(["export", *rows, "--out", str(tmp_path / "kept"), "--push-to-hub", "me/kept"]) == 0
    there = read_back("me/kept", revision=hub.repositories["dataset", "me/kept"].head)
    assert len(there) == 36 and set(there.column_names) == {"prompt", "completion", "id", "weight"}


def test_what_cannot_be_pushed_is_told_before_anything_is_written(online, made, tmp_path, capsys):
    online(token=TOKEN)
    rows = ("--train", str(made / "train.jsonl"), "--selection.top-share", "1", "--out", str(tmp_path / "kept"))
    table = {
        ("--push-to-hub", "kept"): "'kept' is no name of a repository",
        ("--export.push-model-to-hub", "me/tuned"): "give the folder of one",
    }
    for flags, text in table.items():
        assert main(["export", *rows, *flags]) == 1
        assert text in capsys.readouterr().err and not (tmp_path / "kept").exists()
    online()
    assert main(["export", *rows, "--push-to-hub", "me/kept"]) == 1
    assert "nobody is logged in" in capsys.readouterr().err and not (tmp_path / "kept").exists()


def test_a_card_has_the_numbers_of_a_selection_and_when_they_are_wrong():
    line = {"name": "learned", "rows": 9, "runs": [{}, {}], "mean": {"test": 0.5}, "interval": {"test": 0.25}}
    result = {
        "unit": "nats per token",
        "right": "",
        "compare": [line | {"name": "all_|_rows", "mean": {"test": 1.5}, "interval": {"test": math.nan}}, line],
        "recommendation": {"sentence": "Use learned."},
        "certificates": {
            "uniform weights": {
                "predictive": {"correlation": 0.91, "sizes": [1, 0.5], "draws": [0.1] * 9},
                "reliability": None,
            }
        },
    }
    text = "\n".join(describe_measurements({"outer": {}}, result))
    assert "| learned | 0.5000 ± 0.2500 | 9 |" in text and "| all\\_\\|\\_rows | 1.5000 | 9 |" in text
    assert (
        "| uniform weights | predictive | correlation 0.91, sizes 1 / 0.5, draws of 9 |" in text
        and "Use learned." in text
    )
    assert "## When these weights are wrong" in text and describe_measurements({}, {}) == []


def test_a_run_on_object_storage_goes_on_with_its_commits(online, made, s3, stop_at, tmp_path):
    hub, url = online(), "s3://bucket/team/run"
    rows = hub.repositories["dataset", "me/rows"]
    stop_at(3)
    assert run(made, "train", url, *FEW_STEPS) == 128 + 15
    records = json.loads(s3.names()["team/run/hub.json"])
    assert f"hub:me/rows@{rows.head}@train" in [record["name"] for record in records]
    rows.commit({"train.jsonl": b'{"prompt": "a", "response": "b"}\n'})
    online()
    stop_at(10**9)
    assert run(made, "train", url, *FEW_STEPS, "--resume") == 0
    assert json.loads(s3.names()["team/run/result.json"])["hub"] == records
