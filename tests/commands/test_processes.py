"""`audit`, `compare` and `evaluate` in two processes as a user runs them: equal to one process, killed and resumed."""

import json
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.runs.infra.test_distributed_slow import ended, last_words, launch, log

pytestmark = pytest.mark.slow

TRAINING = """
model: {{name_or_path: {made}/model, param_dtype: float64}}
lora: {{r: 0}}
data:
  train: [{made}/train.jsonl]
  validation: [{made}/validation.jsonl]
  dev: [{made}/dev.jsonl]
  test: [{made}/test.jsonl]
  split: [1, 0, 0]
  label_field: label
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 2, eps_root: 1.0e-6}}
train: {{max_steps: 6, global_batch_size: 8}}
output: {{progress: false}}
"""
AUDIT = (
    TRAINING
    + """
audit:
  scores: [loss, reducible]
  checkpoints: [start]
  estimators: [unrolled, alignment]
  queries: 2
  subsets: 8
  removed: [0.2]
  extremes: [0.1]
  vmap_size: 2
  token_examples: 2
certify: {{step_sizes: [0.1], removed: [0.5], draws: 1}}
"""
)
COMPARE = (
    TRAINING
    + """
compare: {{methods: [unrolled, mixing], baselines: [uniform, low_loss], budget: 90, seeds: 1}}
evaluate: {{prompts: [{made}/test.jsonl], questions: 4, baseline: uniform}}
generate: {{max_new_tokens: 4}}
verifier: {{name: exact}}
"""
)
EVALUATE = """
data: {{test: [{made}/test.jsonl]}}
evaluate: {{model: {made}/model, baseline: {made}/model}}
generate: {{num_generations: 2, max_new_tokens: 6, temperature: 1.0}}
verifier: {{name: exact}}
output: {{progress: false}}
"""
TABLES = {
    "audit": ("scores.parquet", "bank.parquet", "extremes.parquet", "tokens.parquet"),
    "compare": ("weights.parquet", "evaluate/unrolled/answers.parquet"),
    "evaluate": ("answers.parquet", "questions.parquet"),
}


@pytest.fixture(scope="module")
def configs(made, tmp_path_factory):
    """The configs of the three commands."""
    folder = tmp_path_factory.mktemp("configs")
    for name, text in (("audit", AUDIT), ("compare", COMPARE), ("evaluate", EVALUATE)):
        (folder / f"{name}.yaml").write_text(text.format(made=made))
    return folder


def compare_values(found, wanted, path: str) -> None:
    """Everything but times is the same; numbers up to the rounding of sums in another order, and so not the hashes of
    models that were trained: all but those of `evaluate`."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            if key != "seconds" and (key != "fingerprint" or path.startswith("evaluate")):
                compare_values(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
            compare_values(one, other, f"{path}/{place}")
    elif isinstance(wanted, float):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12, err_msg=path)
    else:
        assert found == wanted, path


def same_results(verb: str, found, wanted) -> None:
    """result.json and the tables of two runs."""
    results = [json.loads((out / "result.json").read_text()) for out in (found, wanted)]
    compare_values(*results, verb)
    for name in TABLES[verb]:
        compare_values(*(pq.read_table(out / name).to_pydict() for out in (found, wanted)), f"{verb} {name}")


@pytest.mark.parametrize("verb", TABLES)
def test_two_processes_equal_one(verb, configs, tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        assert ended(launch(configs, out, processes, verb=verb, devices=2)) == [0] * processes, log(out, 0)
    same_results(verb, tmp_path / "2", tmp_path / "1")
    assert "report: " in log(tmp_path / "2", 0) and "report: " not in log(tmp_path / "2", 1)  # one talks


@pytest.mark.parametrize(("verb", "fsdp"), [("audit", 2), ("audit", 4), ("compare", 4)])
def test_split_parameters_in_two_processes(verb, fsdp, configs, tmp_path):
    """2 x 2 devices: with fsdp 2 each process has a copy of the parameters, with 4 a half of the only one."""
    for processes, flags in ((1, ()), (2, ("--mesh.fsdp", str(fsdp)))):
        running = launch(configs, tmp_path / str(processes), processes, *flags, verb=verb, devices=4)
        assert ended(running) == [0] * processes, log(tmp_path / str(processes), 0)
    same_results(verb, tmp_path / "2", tmp_path / "1")


def test_a_killed_process_ends_the_other_and_both_resume(configs, tmp_path):
    """After the answers of the first model are stored: they are not made again."""
    whole = tmp_path / "whole"
    assert ended(launch(configs, whole, 2, verb="evaluate", devices=2)) == [0, 0], log(whole, 0)
    for victim in range(2):
        out = tmp_path / f"victim {victim}"
        running, done = launch(configs, out, 2, verb="evaluate", devices=2), out / "checkpoints" / "done.json"
        while not done.exists() or "answers of the model" not in done.read_text():
            time.sleep(0.02)
            assert all(process.poll() is None for process in running), log(out, 0)
        running[victim].kill()
        start = time.monotonic()
        codes = ended(running)
        assert time.monotonic() - start < 10  # about a second on an idle machine
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
        assert f"process {victim} of 2" in last_words(out, 1 - victim)
        assert "ended without a word" in last_words(out, 1 - victim)
        running = launch(configs, out, 2, "--output.resume", verb="evaluate", devices=2)
        assert ended(running) == [0, 0], log(out, 0)
        same_results("evaluate", out, whole)
