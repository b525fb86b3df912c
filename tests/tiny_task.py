"""A tiny task that every command runs on in a second: the cipher's files, pairs of its answers, an untrained model."""

import json
import signal

import jax
import pytest

from bilevel_jax.commands.refine import run as refine_run
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.infra.session import Session

SELECT = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data:
  train: [{made}/train.jsonl]
  validation: [{made}/validation.jsonl]
  test: [{made}/test.jsonl]
  split: [1, 0, 0]
  label_field: label
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 2}}
train: {{max_steps: 10, global_batch_size: 8}}
outer: {{steps: 2, patience: 0, learning_rate: 0.1}}
certify: {{step_sizes: [0.1], removed: [0.5], draws: 2}}
retrain: {{seeds: 1, variants: [uniform, learned, validation, oracle]}}
output: {{progress: false}}
selection: {{top_share: 0.5}}
mesh: {{data: 1}}
"""
TRAIN = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data:
  train: [{made}/train.jsonl]
  validation: [{made}/test.jsonl]
  dev: [{made}/dev.jsonl]
  split: [0.5, 0, 0.5]
  label_field: label
optimizer: {{learning_rate: 3.0e-3, warmup_ratio: 0.1}}
train: {{num_epochs: 2, global_batch_size: 8, eval_steps: 4}}
output: {{progress: false}}
mesh: {{data: 1}}
"""

REFINE = """
model: {{name_or_path: {made}/model}}
lora: {{r: 0}}
data:
  train: [{made}/train.jsonl]
  validation: [{made}/validation.jsonl]
  dev: [{made}/dev.jsonl]
  test: [{made}/test.jsonl]
  split: [1, 0, 0]
  label_field: label
refine: {{rounds: 2, questions: dynamic, share: 0.25, methods: [uniform, unrolled], level: 0.5}}
generate: {{num_generations: 2, max_new_tokens: 6}}
verifier: {{name: exact}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 2}}
train: {{max_steps: 6, global_batch_size: 8}}
outer: {{steps: 1, weighting: sigmoid}}
single_loop: {{steps: 6, eval_steps: 6}}
output: {{progress: false}}
mesh: {{data: 1}}
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The cipher's files and an untrained model of its shape; pairs*.jsonl prefer early letters to late ones."""
    folder = cipher.write_cipher_data(
        tmp_path_factory.mktemp("made"), clean=12, wrong=12, noise=12, validation=8, dev=8, test=16, copies=0
    )
    architecture = models.read_config(folder / "untrained")
    tokenizer = load_tokenizer(folder / "untrained")
    models.save_model(
        folder / "model", architecture, models.init_params(architecture, jax.random.key(0)), tokenizer=tokenizer
    )
    (folder / "select.yaml").write_text(SELECT.format(made=folder))
    (folder / "train.yaml").write_text(TRAIN.format(made=folder))
    (folder / "refine.yaml").write_text(REFINE.format(made=folder))
    for name, new in (("train", "pairs"), ("validation", "pairs_validation"), ("test", "pairs_report")):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        (folder / f"{new}.jsonl").write_text("".join(json.dumps(pair(row)) + "\n" for row in rows))
    return folder


def pair(row):
    """An answer of early letters against one of late letters; swapped where the row's label says that it is wrong."""
    places = [cipher.LETTERS.index(letter) % 10 for letter in row["prompt"][:-1]]
    right = "".join(cipher.LETTERS[place] for place in places)
    wrong = "".join(cipher.LETTERS[place + 10] for place in places)
    good = row["label"] != "wrong"
    return {
        "prompt": row["prompt"],
        "chosen": right if good else wrong,
        "rejected": wrong if good else right,
        "label": "clean" if good else "swapped",
    }


@pytest.fixture
def stop_at(monkeypatch):
    """count -> from now on, SIGTERM at the count-th piece of work that a run counts, and at no other."""

    return lambda count: stop_session_at(monkeypatch, count)


def count_traces_by_round(run):
    """What a run of `refine` returns, and how often the model had been traced after each of its rounds."""
    traced, counts = [], []
    hidden, one_round = sft._hidden_states, refine_run.run_round

    def counted(*args):
        traced.append(1)
        return hidden(*args)

    def round_(*args, **named):
        made = one_round(*args, **named)
        counts.append(len(traced))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "_hidden_states", counted)
        patch.setattr(refine_run, "run_round", round_)
        result = run()
    return result, counts


def stop_session_at(patch, count):
    """What `stop_at` does, by any `pytest.MonkeyPatch`."""
    done, advance = 0, Session.advance

    def stopping(self, amount=1.0):
        nonlocal done
        done += 1
        if done == count:
            signal.raise_signal(signal.SIGTERM)
        advance(self, amount)

    patch.setattr(Session, "advance", stopping)
