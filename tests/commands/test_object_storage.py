"""Whole runs on an S3 server: the numbers of a local run, also when the server fails at any write or is busy."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from bilevel_jax import commands
from bilevel_jax.cli import main
from bilevel_jax.runs.config import load, schema
from bilevel_jax.runs.infra import distributed, run_dir, session
from bilevel_jax.storage import copies, lease, objects
from bilevel_jax.storage.objects import ObjectStore, StorageError
from tests.commands.run_table import contents, differences, start, table_inputs, without_clock  # noqa: F401
from tests.runs.infra.test_distributed_slow import ended, launch
from tests.s3_server import DENIED, FAILURE, SLOW_DOWN

URL = "s3://bucket/team/run"
OF_THE_FOLDER = {"config.yaml", "report.html"}
"""Files that quote the run's config, with its folder."""
SAVE_EVERY = 5


@pytest.fixture
def local(table_inputs, tmp_path):  # noqa: F811
    """name -> what a run of a name in RUNS holds in a folder of this machine."""

    def run(name, *flags):
        with without_clock(save_every=SAVE_EVERY):
            start(table_inputs, name, tmp_path / "local", *flags)
        return contents(tmp_path / "local")

    return run


def run_at_url(inputs, name, *flags, url=URL):
    with without_clock(save_every=SAVE_EVERY):
        return start(inputs, name, url, *flags)


def download(folder, url=URL):
    """What the server has of a run, as a folder."""
    store = ObjectStore(url)
    store.download_all({name: folder / name for name in store.list_all() if not lease.LOCK_NAME.fullmatch(name)})
    run_dir.check_files(folder)
    return contents(folder)


def differ(one, other):
    """What two runs hold otherwise, but for their folder's name."""
    return [
        name for name in differences(one, other) if name not in OF_THE_FOLDER and one.get(name) != "an empty folder"
    ]


@pytest.mark.parametrize("name", ["train, a score, refreshed", pytest.param("select", marks=pytest.mark.slow)])
def test_a_run_at_a_url_is_the_run_of_a_folder(s3, table_inputs, local, tmp_path, name):  # noqa: F811
    whole, result = local(name), run_at_url(table_inputs, name)
    held = download(tmp_path / "held")
    assert differ(whole, held) == []
    assert result.result == json.loads(held["result.json"])
    assert URL in held["config.yaml"].decode() and "bilevel-jax-" not in held["report.html"].decode()
    before = s3.names()
    again = run_at_url(table_inputs, name, "--output.resume")  # a finished run changes nothing that it has written
    changed = {name for name, data in s3.names().items() if before.get(name) != data}
    assert {name.removeprefix("team/run/") for name in changed} <= {"log.jsonl", "seals.jsonl", "manifest.json"}
    assert again.result == result.result and commands.read_result(URL).result == result.result


def test_event_files_are_published(s3, table_inputs):  # noqa: F811
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    run_at_url(table_inputs, "train", "--output.tensorboard")
    (events,) = [data for name, data in s3.names("team/run").items() if name.startswith("tensorboard/")]
    assert b"evaluated/test_loss" in events  # the last number of the run


def test_a_folder_in_use_or_taken_is_refused(s3, table_inputs, capsys, monkeypatch):  # noqa: F811
    with lease.hold(ObjectStore(URL)):
        with pytest.raises(RuntimeError, match=rf"{URL} is in use by process {os.getpid()} on "):
            run_at_url(table_inputs, "train")
    assert s3.names() == {}
    assert f"{URL} is held by process {os.getpid()}" in capsys.readouterr().err
    s3.write("team/run/notes.txt", b"mine")
    with pytest.raises(FileExistsError, match=rf"{URL} is not empty \(notes.txt\)"):
        run_at_url(table_inputs, "train")
    with pytest.raises(FileNotFoundError, match=rf"{URL} holds no run"):
        run_at_url(table_inputs, "train", "--output.resume")


def test_a_start_that_fails_leaves_nothing(s3, table_inputs):  # noqa: F811
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/none\.jsonl: there is nothing of this name"):
        run_at_url(table_inputs, "train", "--data.train", "s3://bucket/none.jsonl")
    assert s3.names() == {}


def fail_from(s3, number, answer=FAILURE):  # noqa: F811
    """From the write of this number on, the server takes no more; what it has it still gives."""
    s3.app.writes = 0
    s3.app.refuse = lambda method, _, now: answer if method in ("PUT", "POST", "DELETE") and now >= number else None


def check_failures(s3, inputs, local, tmp_path, monkeypatch, name, count, *flags):  # noqa: F811
    """Fail at every write (at `count` of them, evenly spread); go on when the server is back; compare the end."""
    monkeypatch.setattr(copies, "JOURNAL_SECONDS", 1e3)  # a journal is there because another file needs it
    whole = local(name, *flags)
    s3.app.writes = 0
    run_at_url(inputs, name, *flags)
    writes, wrong = s3.app.writes, {}
    chosen = [(2 * place + 1) * writes // (2 * count) for place in range(count)] if count else range(writes)
    for number in chosen:
        s3.start_anew()
        copies.forget_copies()
        fail_from(s3, number)
        with monkeypatch.context() as patch:
            patch.setattr(objects, "RETRY_SECONDS", 0.0)
            with pytest.raises(StorageError, match="could not be (written|created|removed): "):
                run_at_url(inputs, name, *flags)
        s3.app.refuse = None
        resume = ["--output.resume"] if "team/run/config.yaml" in s3.names() else []
        try:
            run_at_url(inputs, name, *flags, *resume)
            found = differ(whole, download(tmp_path / f"held-{number}"))
        except Exception as error:
            found = repr(error)
        if found:
            wrong[number] = found
    print(f"\n{name}: {writes} writes, failed at {len(chosen)}, {len(wrong)} wrong")
    assert wrong == {}


def test_a_server_that_fails_and_is_busy_then_costs_no_number(s3, table_inputs, local, tmp_path, monkeypatch):  # noqa: F811
    whole, asked, draw = local("train"), [], random.Random(0)
    fail_from(s3, 50)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="could not be (written|created|removed): "):
        patch.setattr(objects, "RETRY_SECONDS", 0.0)
        run_at_url(table_inputs, "train")

    def refuse(*_):
        asked.append(0)
        return SLOW_DOWN if draw.random() < 0.25 else None  # not every fourth: a listing takes several requests

    s3.app.refuse = refuse
    run_at_url(table_inputs, "train", "--output.resume")
    s3.app.refuse = None
    assert len(asked) > 30
    assert differ(whole, download(tmp_path / "held")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["train", "select", "select, states on disk", "select, rater", "refine", "score", "evaluate"]
)
def test_a_server_that_fails_at_any_write(s3, table_inputs, local, tmp_path, monkeypatch, name):  # noqa: F811
    flags = ["--evaluate.no-harness"] if name == "evaluate" else []  # the harness quotes the run's folder
    check_failures(s3, table_inputs, local, tmp_path, monkeypatch, name, int(os.environ.get("FAILURES", "0")), *flags)


def test_a_server_that_refuses_is_told_in_one_sentence(s3, table_inputs, capfd):  # noqa: F811
    s3.app.refuse = lambda method, *_: DENIED if method == "PUT" else None
    assert main(["train", str(table_inputs / "train.yaml"), "--out", URL]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bilevel-jax:")]
    assert len(lines) == 1 and "could not be created: the server answered 403 AccessDenied" in lines[0]


def test_data_are_read_from_urls(s3, table_inputs, local, tmp_path):  # noqa: F811
    for name in ("train", "validation", "test"):
        s3.write(f"data/{name}.jsonl", (table_inputs / f"{name}.jsonl").read_bytes())
    parts = ("train", "validation")
    flags = [f"--data.{part}=s3://bucket/data/{part}.jsonl" for part in parts]
    whole = local("train", *(f"--data.{part}={table_inputs}/{part}.jsonl" for part in parts))
    run_at_url(table_inputs, "train", *flags)
    held = download(tmp_path / "held")
    assert json.loads(held["inputs.json"])["data.train"].keys() == {"s3://bucket/data/train.jsonl"}
    assert json.loads(held["tokens.json"]) == json.loads(whole["tokens.json"])
    named_otherwise = {"inputs.json", "weights.parquet", "result.json", "checkpoints/done.json"}
    assert set(differ(whole, held)) <= named_otherwise
    s3.write("data/train.jsonl", (table_inputs / "train.jsonl").read_bytes() + b"\n")
    copies.forget_copies()
    with pytest.raises(ValueError, match=r"data\.train: s3://bucket/data/train\.jsonl had .* bytes then"):
        run_at_url(table_inputs, "train", *flags, "--output.resume")


def test_models_weights_configs_and_runs_are_read_from_urls(s3, table_inputs, local, tmp_path, capsys):  # noqa: F811
    for path in [*(table_inputs / "model").iterdir(), table_inputs / "weights.jsonl", table_inputs / "train.yaml"]:
        s3.write(path.relative_to(table_inputs).as_posix(), path.read_bytes())
    whole = local("train, weights of a file")
    flags = ["--model.name-or-path", "s3://bucket/model", "--weights.file", "s3://bucket/weights.jsonl"]
    with without_clock(save_every=SAVE_EVERY):
        assert main(["train", "s3://bucket/train.yaml", *flags, "--out", URL]) == 0
    assert f"report: {URL}/report.html" in capsys.readouterr().out
    held = download(tmp_path / "held")
    assert set(differ(whole, held)) <= {"inputs.json", "weights.parquet", "result.json", "checkpoints/done.json"}
    assert held["model/model.safetensors"] == whole["model/model.safetensors"]
    texts = b"".join(data for name, data in held.items() if isinstance(data, bytes))
    assert b"s3://bucket/weights.jsonl" in texts and str(table_inputs / "model").encode() not in texts
    assert b"/bilevel-jax-" not in texts + (tmp_path / "held" / "log.jsonl").read_bytes()
    with without_clock(save_every=SAVE_EVERY):  # the copies of another process have other names
        copies.forget_copies()
        assert main(["train", "s3://bucket/train.yaml", *flags, "--out", URL, "--resume"]) == 0
    assert differ(held, download(tmp_path / "again")) == []

    assert main(["export", URL, "--export.format", "axolotl", "--out", "s3://bucket/rows"]) == 0
    assert s3.names("rows").keys() == {"README.md", "axolotl.yaml", "selection.parquet", "train.jsonl"}
    assert b"s3://bucket/rows/train.jsonl" in s3.names("rows")["axolotl.yaml"]
    assert b"/bilevel-jax-" not in b"".join(s3.names("rows").values())
    capsys.readouterr()
    assert main(["export", URL, "--export.format", "trl", "--out", "s3://bucket/rows"]) == 1
    assert "s3://bucket/rows is there already (README.md)" in capsys.readouterr().err
    s3.write("team/run/weights.parquet", s3.names("team/run")["weights.parquet"][:-1])
    assert main(["export", URL, "--export.format", "trl", "--out", "s3://bucket/other"]) == 1
    assert f"{URL}/weights.parquet has" in capsys.readouterr().err


def test_a_url_with_credentials_is_not_quoted(table_inputs, tmp_path):  # noqa: F811
    secret = "s3://AKIA123:hush/K7M@bucket/run"
    for url, flags in (
        (f"{tmp_path}/data", ["--data.train", secret]),
        (f"{tmp_path}/weights", ["--weights.file", secret]),
        (secret, []),
    ):
        with pytest.raises(ValueError, match="a user or a key stands before the @") as error:
            run_at_url(table_inputs, "train", *flags, url=url)
        assert "hush" not in str(error.value)


def test_a_file_url_is_a_path(tmp_path):
    with session.open_run_dir(
        load.TrainConfig(output=schema.TrainOutputSection(dir=f"file://{tmp_path}/run"))
    ) as folder:
        assert folder == tmp_path / "run" and (folder / "config.yaml").is_file()


@pytest.mark.slow
def test_two_processes_publish_one_run(s3, made, tmp_path):
    """They work in a folder that both see; one of them is stopped, both go on, to the bits of the run in a folder."""
    flags = ("--model.param-dtype", "float64", "--output.save-minutes", "0.001")
    options = {"verb": "train", "devices": 2}
    assert ended(launch(made, tmp_path / "local", 2, *flags, **options)) == [0, 0]
    running = launch(made, URL, 2, *flags, logs=tmp_path / "first", **options)
    while not any("checkpoints/train" in name for name in s3.names("team/run")):
        assert running[0].poll() is None, (tmp_path / "first.0").read_text()
        time.sleep(0.2)
    running[1].send_signal(signal.SIGTERM)
    assert set(ended(running)) <= {128 + signal.SIGTERM, 0}
    assert ended(launch(made, URL, 2, *flags, "--resume", logs=tmp_path / "again", **options)) == [0, 0]
    held, whole = download(tmp_path / "held"), contents(tmp_path / "local")
    for name in ("weights.parquet", "model/model.safetensors", "tokens.json"):
        assert held[name] == whole[name], name


def test_processes_that_share_no_folder_are_told(s3, monkeypatch):
    monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
    monkeypatch.setattr(distributed, "require_agreement", lambda *_: None)
    monkeypatch.setattr(distributed, "share_text", lambda topic, work: work())
    monkeypatch.setattr(distributed, "allgather_values", lambda values: np.array([values, [0]]))
    with pytest.raises(ValueError, match=rf"output.dir = {URL}: .* process 1 does not see .* Set TMPDIR to a folder"):
        with session.open_run_dir(load.TrainConfig(output=schema.TrainOutputSection(dir=URL))):
            raise AssertionError("it was opened")
    assert s3.names() == {}
