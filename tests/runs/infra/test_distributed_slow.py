"""`select`, `train` and `rank` in two processes as a user runs them: equal to one process; stopped by a signal to one,
resumed by another number of processes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.commands.chat_server import ChatServer
from tests.commands.test_rank import inputs  # noqa: F401
from tests.commands.test_rank_candidates import answer, service
from tests.commands.test_rank_candidates import inputs as candidate_inputs  # noqa: F401
from tests.commands.test_select import same_run
from tests.commands.test_targets import SEVERAL, files, flags  # noqa: F401
from tests.conftest import ROOT
from tests.runs.engine.test_agreement import free_port

pytestmark = pytest.mark.slow

SMOOTH = (
    "--optimizer.eps-root", "1e-6", "--optimizer.learning-rate", "1e-3", "--model.param-dtype", "float64",
)  # fmt: skip


def launch(
    made, out, processes: int, *flags, verb: str = "select", own_flags=None, devices: int = 8, logs=None
) -> list[subprocess.Popen]:
    """So many devices in all; the log of process i is in LOGS.i, OUT.i by default, and `own_flags[i]` are its own."""
    port, running = free_port(), []
    xla = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices // processes}")
    for number in range(processes):
        command = [sys.executable, "-m", "bilevel_jax.cli", verb, str(made / f"{verb}.yaml"), "--out", str(out)]
        command += ["--mesh.data", "0", *flags, *(own_flags[number] if own_flags else ())]
        environment = os.environ | {"XLA_FLAGS": xla}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        with open(f"{logs or out}.{number}", "w") as log:
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return running


def ended(running) -> list[int]:
    return [process.wait(timeout=900) for process in running]


def entries(out) -> np.ndarray:
    return np.array(pq.read_table(out / "weights.parquet")["hypergradient"])


def far(one, other) -> float:
    return float(np.linalg.norm(entries(one) - entries(other)) / np.linalg.norm(entries(other)))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """Uninterrupted runs: in one process, in two."""
    folder = tmp_path_factory.mktemp("whole")
    for processes in (1, 2):
        assert ended(launch(made, folder / str(processes), processes, *SMOOTH)) == [0] * processes
    return folder


def test_two_processes_equal_one(whole):
    assert far(whole / "2", whole / "1") < 1e-9  # float64, other order of sums
    one, two = (json.loads((whole / name / "environment.json").read_text()) for name in "12")
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["devices"]) == len(two["devices"]) == 8
    logged = [json.loads(line)["step"] for line in (whole / "2" / "log.jsonl").read_text().splitlines()]
    assert logged == [0, 1, 2]  # one process writes
    assert "outer step" in (whole / "2.0").read_text() and "outer step" not in (whole / "2.1").read_text()


@pytest.mark.parametrize("then", [2, 1])
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(then, made, whole, tmp_path):
    """By two processes again: bit for bit; by one: but for rounding."""
    out = tmp_path / "run"
    running = launch(made, out, 2, *SMOOTH)
    while not (out / "checkpoints" / "outer").exists():  # the first outer step is done
        time.sleep(0.05)
        assert all(process.poll() is None for process in running), (tmp_path / "run.0").read_text()
    running[1].send_signal(signal.SIGTERM)
    assert ended(running) == [128 + signal.SIGTERM] * 2
    assert not (out / "report.html").exists()
    assert "SIGTERM; everything is saved" in (tmp_path / "run.1").read_text()
    assert ended(launch(made, out, then, *SMOOTH, "--output.resume")) == [0] * then
    if then == 2:
        same_run(out, whole / "2")
    assert far(out, whole / "1") < 1e-9


def test_parameters_split_over_two_processes(made, whole, tmp_path):
    """A mesh of 2 x 4: each copy of the parameters lies with one process."""
    out = tmp_path / "run"
    assert ended(launch(made, out, 2, *SMOOTH, "--mesh.fsdp", "4")) == [0, 0]
    assert far(out, whole / "1") < 1e-9


def test_implicit_with_split_parameters(made, tmp_path):
    """By conjugate gradients on 2 x 2 devices, each of which has a quarter of the parameters."""
    flags = (
        *SMOOTH, "--outer.method", "implicit", "--outer.proximal", "0.5", "--outer.max-iterations", "6",
        "--outer.steps", "1", "--train.max-steps", "4", "--certify.no-enabled", "--retrain.variants", "uniform",
        "learned",
    )  # fmt: skip
    for processes, layout in ((1, ()), (2, ("--mesh.fsdp", "4"))):
        running = launch(made, tmp_path / str(processes), processes, *flags, *layout, devices=4)
        assert ended(running) == [0] * processes, log(tmp_path / str(processes), 0)
    assert far(tmp_path / "2", tmp_path / "1") < 1e-9
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in "12")
    for ours, theirs in zip(two["records"], one["records"], strict=True):
        assert ours["checks"]["steps"] == theirs["checks"]["steps"] > 1
        np.testing.assert_allclose(ours["checks"]["residual"], theirs["checks"]["residual"], rtol=1e-9)


def test_targets_in_two_processes(made, files, tmp_path):  # noqa: F811
    """Pairs of two sources, whose reference model is read once, and a function of the parameters."""
    given = flags(made, files, *SEVERAL, f"{files}/targets.py:distance")[1:]
    for processes in (1, 2):
        assert ended(launch(made, tmp_path / str(processes), processes, *SMOOTH, *given)) == [0] * processes
    assert far(tmp_path / "2", tmp_path / "1") < 1e-9
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in "12")
    for ours, theirs in zip(two["compare"][0]["runs"], one["compare"][0]["runs"], strict=True):
        for part in ("validation", "test"):
            losses = [[target["loss"] for target in run["targets"][part]] for run in (ours, theirs)]
            np.testing.assert_allclose(*losses, rtol=1e-9)


def test_scores_and_training(made, tmp_path):
    """`train` with weights by a score of likelihoods, made twice."""
    flags = ("--weights.score", "ica", "--weights.refresh", "2", "--scores.k", "1", "--model.param-dtype", "float64")
    for processes in (1, 2):
        assert ended(launch(made, tmp_path / str(processes), processes, *flags, verb="train")) == [0] * processes
    one, two = (pq.read_table(tmp_path / name / "scores.parquet") for name in "12")
    for column in one.column_names[4:]:
        np.testing.assert_allclose(np.array(two[column]), np.array(one[column]), rtol=1e-9, atol=1e-9)


def test_rank_in_two_processes(inputs, tmp_path):  # noqa: F811
    """The model's own answers, its likelihoods and its hidden states, over the devices of both."""
    for processes in (1, 2):
        running = launch(inputs, tmp_path / str(processes), processes, "--model.param-dtype", "float64", verb="rank")
        assert ended(running) == [0] * processes, log(tmp_path / str(processes), 0)
    one, two = (pq.read_table(tmp_path / name / "rank.parquet").to_pydict() for name in "12")
    for column, values in one.items():
        if isinstance(values[0], float):
            np.testing.assert_allclose(two[column], values, rtol=1e-9, err_msg=column)  # float64, other sums
        else:
            assert two[column] == values, column
    verdicts = [json.loads((tmp_path / name / "result.json").read_text())["verdict"]["sentence"] for name in "12"]
    assert verdicts[0] == verdicts[1]
    assert "each answered by" in log(tmp_path / "2", 0) and "each answered by" not in log(tmp_path / "2", 1)


@pytest.fixture
def server(monkeypatch):
    """A service that takes its time, so that the first process asks it alone for longer than the meetings are apart."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    chat = ChatServer({"writer": answer})
    chat.before = lambda number: time.sleep(0.2)
    yield chat
    chat.close()


def test_rank_by_a_service_in_two_processes(candidate_inputs, server, tmp_path):  # noqa: F811
    """The first process asks; with a signal to either meanwhile, both stop, and go on with what was answered."""
    flags = (*service(server), "--candidates.questions", "12", "--candidates.concurrency", "2")
    for processes in (1, 2):
        before, out = len(server.requests), tmp_path / str(processes)
        running = launch(candidate_inputs, out, processes, *flags, verb="rank", devices=2)
        assert ended(running) == [0] * processes, log(out, 0)
        assert len(server.requests) - before == 12 * 5
    for victim in (0, 1):
        before, out = len(server.requests), tmp_path / f"stopped-{victim}"
        running = launch(candidate_inputs, out, 2, *flags, verb="rank", devices=2)
        while len(server.requests) < before + 20:
            time.sleep(0.02)
            assert all(process.poll() is None for process in running), log(out, 0)
        running[victim].send_signal(signal.SIGTERM)
        assert ended(running) == [128 + signal.SIGTERM] * 2, log(out, 1 - victim)
        running = launch(candidate_inputs, out, 2, *flags, "--output.resume", verb="rank", devices=2)
        assert ended(running) == [0, 0], log(out, 0)
        assert len(server.requests) - before <= 12 * 5 + 2  # those that were under way
    for name in ("2", "stopped-0", "stopped-1"):
        for file in ("strategies.jsonl", "rank.parquet"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
        assert (tmp_path / name / "strategies.jsonl").read_bytes() == (tmp_path / "1" / "strategies.jsonl").read_bytes()


def log(out, number: int) -> str:
    return out.with_name(f"{out.name}.{number}").read_text()


def last_words(out, number: int) -> str:
    """The last line of a process; nothing of C++ stands above it."""
    lines = log(out, number).splitlines()
    assert not [line for line in lines if "Traceback" in line or "Check failure" in line or line.startswith("    @")]
    return lines[-1]


LONG = ("--train.num-epochs", "12", "--train.eval-steps", "10", "--output.save-minutes", "0.02")


def test_processes_with_two_learning_rates_all_stop(made, tmp_path):
    out = tmp_path / "run"
    own_flags = [("--optimizer.learning-rate", rate) for rate in ("1e-3", "2e-3")]
    assert ended(launch(made, out, 2, verb="train", own_flags=own_flags)) == [1, 1]
    for number in range(2):
        assert "optimizer.learning_rate (0.001 in process 0, 0.002 in process 1)" in last_words(out, number)
    assert not out.exists()


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """`train` in two processes, not interrupted."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert ended(launch(made, out, 2, *LONG, verb="train")) == [0, 0]
    return out


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_within_seconds_and_both_resume(victim, made, trained, tmp_path):
    out = tmp_path / "run"
    running = launch(made, out, 2, *LONG, verb="train")
    while "step     20" not in log(out, 0):
        time.sleep(0.02)
        assert all(process.poll() is None for process in running), log(out, 0)
    running[victim].kill()
    start = time.monotonic()
    codes = ended(running)
    assert time.monotonic() - start < 10  # under a second on an idle machine
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert f"process {victim} of 2" in last_words(out, 1 - victim)
    assert "ended without a word" in last_words(out, 1 - victim)
    assert ended(launch(made, out, 2, *LONG, "--output.resume", verb="train")) == [0, 0]
    assert (out / "model" / "model.safetensors").read_bytes() == (trained / "model" / "model.safetensors").read_bytes()


def test_streamed_rows_in_two_processes(made, tmp_path):
    """Each tokenizes the rows of its own devices; some are too long, and the answers of some have weights. Stopped by a
    signal to one process and resumed by both it has the same bits."""
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    for place, row in enumerate(rows):
        weight = {"weight": 0.5} if place in (3, 17) else {}
        text = row["response"] * (30 if place in (0, 1, 4, 5, 20) else 1)
        row["response"] = [{"role": "assistant", "content": text} | weight]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--data.train", str(tmp_path / "train.jsonl"), "--data.streaming", "--data.shuffle-buffer", "10",
        "--data.truncation", "drop", "--train.max-steps", "24", "--train.gradient-accumulation-steps", "2",
        "--train.eval-steps", "4", "--output.save-minutes", "0.02", *SMOOTH,
    )  # fmt: skip

    def train(name: str, processes: int, *more: str) -> list[subprocess.Popen]:
        return launch(made, tmp_path / name, processes, *flags, *more, verb="train", devices=2)

    for processes in (1, 2):
        assert ended(train(str(processes), processes)) == [0] * processes, log(tmp_path / str(processes), 0)
    running = train("run", 2)
    while "step      8" not in log(tmp_path / "run", 0):
        time.sleep(0.02)
        assert all(process.poll() is None for process in running), log(tmp_path / "run", 0)
    running[1].send_signal(signal.SIGTERM)
    assert ended(running) == [128 + signal.SIGTERM] * 2
    assert ended(train("run", 2, "--output.resume")) == [0, 0], log(tmp_path / "run", 0)
    one, two, run = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("1", "2", "run"))
    assert one["tokens"] == two["tokens"] == run["tokens"] > 0 and one["rows"] == two["rows"] == run["rows"]
    assert len(one["records"]) == 7 and run["records"] == two["records"] and run["resumed"] >= 8
    for ours, theirs in zip(two["records"], one["records"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)  # float64, other order of sums
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("2", "run")]
    assert models[0] == models[1]
    tables = [pq.read_table(tmp_path / name / "weights.parquet") for name in ("1", "2")]
    assert tables[0].drop(["file"]).equals(tables[1].drop(["file"]))
