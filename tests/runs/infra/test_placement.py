"""Streams whose batches are kept."""

from types import SimpleNamespace

import numpy as np
import pytest

from bilevel_jax.core.types import Stream
from bilevel_jax.runs.engine.folds import turn_training_stream
from bilevel_jax.runs.infra.placement import keep_batches


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (100, 1), (10**6, 4)])
def test_batches_are_made_once_as_far_as_they_fit(limit, kept):
    made = []

    def batch(step):
        made.append(step)
        return {"index": np.full(20, step, np.float32)}  # 80 bytes

    stream = keep_batches(Stream(batch, 4), limit)
    for step in (0, 1, 2, 3, 3, 2, 1, 0):
        assert (stream.batch(step)["index"] == step).all()
    assert stream.steps == 4
    assert made == [0, 1, 2, 3, *reversed(range(kept, 4))]


def test_the_outer_loop_keeps_them():
    made = []

    def batch(step):
        made.append(step)
        return {"index": np.zeros(1)}

    stream = turn_training_stream(SimpleNamespace(training_stream=lambda seed: Stream(batch, 2)), 0, None)
    for step in (0, 1, 1, 0):
        stream.batch(step)
    assert made == [0, 1]
