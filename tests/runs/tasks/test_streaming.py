"""Streamed rows of which each process tokenizes those of its own devices make the batches of one process."""

import json
import threading

import numpy as np
import pytest

from bilevel_jax.lm.builtin import cipher
from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.batches import BatchShape
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.tasks import streaming

MICRO, EXAMPLES = 2, 4
LENGTH = 12
HALVES = np.array([True, True, False, False]), np.array([False, False, True, True])
"""The rows of a micro-batch that lie on the devices of each of two processes."""


class Weights:
    """Every row has the weight of its number."""

    def __call__(self, example):
        return float(example.row)

    def check_epoch(self, example, total):
        """They sum to something."""


def make_stream(folder, mask, monkeypatch, tokenized, *, dropped=(), weighted=()):
    """Twenty rows; `dropped` and `weighted` are those that are too long, and whose answers have weights."""
    rows = [
        {
            "prompt": f"{'abcd'[row % 4]}>",
            "response": [{"role": "assistant", "content": "talp" * (9 if row in dropped else 1 + row % 2)}
                         | ({"weight": 2.0} if row in weighted else {})],
        }
        for row in range(20)
    ]  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = cipher.make_cipher_tokenizer()

    def tokenize(chunk, allow_empty):
        tokenized.extend(example.row for example in chunk)
        return tokens.tokenize(chunk, tokenizer, max_length=LENGTH, truncation="drop", allow_empty=allow_empty)[0]

    monkeypatch.setattr(streaming, "local_rows", lambda mesh, count: mask)
    return streaming.StreamingBatches(
        DataSection(train=(str(path),), shuffle_buffer=0, streaming=True),
        BatchShape(MICRO, EXAMPLES, EXAMPLES, LENGTH - 1),
        None,
        weight_of=Weights(),
        tokenize=tokenize,
        check_examples=lambda chunk: None,
        held_out_examples=[],
    )


def batches_of_two(streams, steps, monkeypatch):
    """The batches of two processes, each in a thread of its own, and the errors that they raise."""
    given, meet = {}, threading.Barrier(2, timeout=30)

    def gather(topic, values):
        given[threading.current_thread().name] = values
        meet.wait()
        gathered = np.array([given["0"], given["1"]])
        meet.wait()
        return gathered

    monkeypatch.setattr(streaming, "gather_numbers", gather)
    made = {"0": [], "1": []}

    def run(name, stream):
        try:
            made[name] += [stream.batch(step) for step in steps]
        except ValueError as error:
            made[name].append(str(error))

    threads = [threading.Thread(target=run, args=(str(n), one), name=str(n)) for n, one in enumerate(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return made["0"], made["1"]


@pytest.mark.parametrize(
    "given",
    [{}, {"dropped": (1, 2, 9)}, {"weighted": (3,)}, {"dropped": (0, 1, 4, 5), "weighted": (15,)}],
    ids=["all", "some too long", "one answer has a weight", "one process has none in the first step"],
)
def test_two_processes_make_the_batches_of_one(tmp_path, monkeypatch, given):
    steps = [0, 1, 2, 1]  # the third is of two epochs, and the last is read again from the beginning
    tokenized = [], [], []
    whole, *streams = [
        make_stream(tmp_path, mask, monkeypatch, rows, **given)
        for mask, rows in zip((None, *HALVES), tokenized, strict=True)
    ]
    wanted = [whole.batch(step) for step in steps]
    for half, made in zip(HALVES, batches_of_two(streams, steps, monkeypatch), strict=True):
        assert len(made) == len(steps), made
        for (weights, batch), (wanted_weights, wanted_batch) in zip(made, wanted, strict=True):
            assert np.array_equal(weights, wanted_weights) and batch.keys() == wanted_batch.keys()
            for name, leaf in wanted_batch.items():
                ours, own = (batch[name], leaf) if leaf.ndim == 1 else (batch[name][:, half], leaf[:, half])
                assert ours.dtype == own.dtype and np.array_equal(ours, own), name
    assert len(tokenized[1]) == len(tokenized[2]) and sorted(tokenized[0]) == sorted(tokenized[1] + tokenized[2])


def test_a_step_whose_rows_are_all_too_long_is_refused_by_all(tmp_path, monkeypatch):
    streams = [make_stream(tmp_path, half, monkeypatch, [], dropped=range(8)) for half in HALVES]
    said = f"none of 8 rows is within max_length = {LENGTH}. Raise it, or cut the rows."
    assert batches_of_two(streams, [0], monkeypatch) == ([said], [said])
