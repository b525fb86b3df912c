"""Scores by name, and training with the weights that they give while the model moves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.runs import bench, rows, scoring, session, weights
from bilevel_jax.runs.config import CompareConfig, TrainConfig, load
from bilevel_jax.runs.sections import Scores, Weights
from bilevel_jax.runs.statistics import auc, rank_correlation
from bilevel_jax.runs.task import prepare
from bilevel_jax.runs.train import train
from tests.runs import blobs


def config(made, *flags):
    given = [str(made / flag) if flag.endswith(".jsonl") and "/" not in flag else flag for flag in flags]
    return load(TrainConfig, made / "train.yaml", given)


def run(made, out, *flags):
    return train(config(made, *flags, "--out", str(out)))


def refreshed(name, *flags):
    return "--weights.score", name, "--weights.refresh", "3", *flags


@pytest.mark.parametrize("flags, at", [(refreshed("alignment"), 6)], ids=str)
def test_stopped_anywhere_and_resumed_changes_no_bit(made, tmp_path, stop_at, flags, at):
    run(made, tmp_path / "whole", *flags)
    stop_at(at)
    with pytest.raises(session.Interrupted, match="everything is saved"):
        run(made, tmp_path / "run", *flags)
    result = run(made, tmp_path / "run", *flags, "--resume")
    assert 0 < result["resumed"] < result["steps"]
    for name in ("model/model.safetensors", "weights.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    one, other = (pq.read_table(tmp_path / name / scoring.NAME) for name in ("run", "whole"))
    assert one.equals(other)
