"""`refine` in two processes as a user runs it: equal to one process; killed in a round, resumed by both."""

import json
import signal
import time

import pyarrow.parquet as pq
import pytest

from tests.commands.test_refine import same
from tests.commands.test_refine_devices import compare_columns, compare_numbers
from tests.commands.test_refine_generator import REINFORCE
from tests.runs.infra.test_distributed_slow import ended, last_words, launch, log

pytestmark = pytest.mark.slow

FLAGS = ("--model.param-dtype", "float64", "--optimizer.eps-root", "1e-6", "--train.max-steps", "4")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
"""float64: sums in another order, through two rounds of training."""
WAYS = {
    "weights": ("--outer.steps", "2", "--outer.reliability-every", "1"),
    "reinforce": (
        *(text for pair in REINFORCE.items() for text in pair), "--train.max-steps", "8",
        "--reinforce.reward", "token", "--refine.start-from", "last",
    ),
    "joint": ("--refine.methods", "penalty", "bmo", "mixing", "--single-loop.reference", "snapshot"),
    "scores": (
        "--refine.methods", "ica", "unrolled", "--scores.k", "1", "--single-loop.steps", "0",
        "--single-loop.eval-steps", "50",  # the defaults again, as none of its methods is named
        "--outer.estimate", "auto", "--outer.steps", "2", "--outer.reliability-every", "1",
    ),
    "folds": ("--refine.methods", "unrolled", "--outer.validation-folds", "2", "--outer.steps", "2"),
    "fsdp": ("--refine.methods", "unrolled", "--refine.rounds", "1", "--mesh.fsdp", "2"),
}  # fmt: skip


def start(made, out, processes, way, *flags):
    prompts = ("--evaluate.prompts", str(made / "test.jsonl")) if way == "weights" else ()
    devices = 4 if way == "fsdp" else 2
    return launch(made, out, processes, *FLAGS, *WAYS[way], *prompts, *flags, verb="refine", devices=devices)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """(way, number of processes) -> the folder of a run that was not stopped, on as many devices."""
    folder = tmp_path_factory.mktemp("whole")

    def run(way, processes):
        out = folder / f"{way}-{processes}"
        if not out.exists():
            assert ended(start(made, out, processes, way)) == [0] * processes, log(out, 0)
        return out

    return run


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(way, whole):
    one, two = whole(way, 1), whole(way, 2)
    results = [json.loads((out / "result.json").read_text()) for out in (one, two)]
    compare_numbers(results[1], results[0], TOLERANCE)
    assert results[0]["sentence"] == results[1]["sentence"]
    assert (results[1]["evaluate"] is not None) == (way == "weights")
    for name in ("responses.parquet", "weights.parquet"):
        expected, found = (pq.read_table(out / name).to_pydict() for out in (one, two))
        compare_columns(found, expected, TOLERANCE)
    lines = map(json.loads, (two / "log.jsonl").read_text().splitlines())
    rounds = [line["step"] for line in lines if line["event"] == "round"]
    assert rounds == list(range(len(results[0]["records"])))  # one process writes
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for words in ("round 0", "right answers", "report: "):  # and one prints
        assert words in log(two, 0) and words not in log(two, 1)


@pytest.mark.parametrize("victim, number", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGTERM)])
def test_stopped_in_a_round_and_resumed_changes_no_bit(victim, number, made, whole, tmp_path):
    out, other = tmp_path / "run", 1 - victim
    often = ("--output.save-minutes", "0.0001")  # saved in the middle of each training, too
    running = start(made, out, 2, "weights", *often)
    while not list((out / "parts").glob("round 1 unrolled/checkpoints/outer/step_*")):
        time.sleep(0.02)
        assert all(process.poll() is None for process in running), log(out, 0)
    running[victim].send_signal(number)
    began = time.monotonic()
    codes = ended(running)
    if number == signal.SIGKILL:
        assert time.monotonic() - began < 10  # under a second on an idle machine
        assert codes[victim] == -signal.SIGKILL and codes[other] == 1
        assert f"process {victim} of 2" in last_words(out, other)
    else:
        assert codes == [128 + signal.SIGTERM] * 2 and "everything is saved" in log(out, victim)
    assert not (out / "result.json").exists()
    assert ended(start(made, out, 2, "weights", *often, "--output.resume")) == [0, 0], log(out, 0)
    same(out, whole("weights", 2))


def test_an_error_of_one_process_ends_both(made, tmp_path):
    """A verifier that fails in the first process, which alone asks it about the responses of a round."""
    (tmp_path / "graders.py").write_text("def fail(question, answer, response):\n    raise ValueError('no grade')\n")
    out = tmp_path / "run"
    running = start(made, out, 2, "weights", "--verifier.name", f"{tmp_path}/graders.py:fail")
    assert ended(running) == [1, 1]
    for process in range(2):
        assert "no grade" in last_words(out, process)
