"""Single-loop methods in `select`: what they write, that they stop and go on, and what they prefer."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.select.run import select
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.engine.single_loop import delayed_linear_decay
from bilevel_jax.runs.infra import session

METHODS = {
    "penalty": ("--outer.method", "penalty", "--outer.weighting", "sigmoid", "--single-loop.eval-steps", "20"),
    "memory-saving": (
        "--outer.method",
        "penalty",
        "--single-loop.second-model",
        "none",
        "--single-loop.eval-steps",
        "20",
    ),
    "per source": ("--outer.method", "penalty", "--outer.weighting", "per_source", "--data.source-field", "label"),
    "bmo": ("--outer.method", "bmo", "--single-loop.eval-steps", "20"),
    "bmo with a copy": ("--outer.method", "bmo", "--single-loop.reference", "copy", "--single-loop.eval-steps", "60"),
    "mixing": ("--outer.method", "mixing", "--single-loop.eval-steps", "20"),
}


def run(made, out, *flags):
    flags = ("--single-loop.steps", "60", "--retrain.variants", "uniform", "learned", *flags)
    return select(load_config(SelectConfig, made / "select.yaml", [*flags, "--out", str(out)]))


SLOW = ("memory-saving", "per source", "bmo", "bmo with a copy", "mixing")
"""tests/core/test_single_loop.py and test_bmo.py have the mathematics of each; `penalty` runs through the command."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
@pytest.mark.slow
def test_every_method_writes_weights_and_its_own_model(made, tmp_path, name):
    whole = name == "penalty"  # the comparison is the same for all of them
    result = run(made, tmp_path / "run", *METHODS[name], *(() if whole else ("--fast",)))
    weights = np.array(pq.read_table(tmp_path / "run" / "weights.parquet")["weight"])
    assert np.isfinite(weights).all() and (weights.std() == 0) == (name == "mixing")
    if name == "per source":  # outer: two steps at rate 0.1; one of three logits can be sqrt(3) times their rms
        assert np.ptp(np.log(weights)) <= 2 * np.sqrt(3) * 0.2
    assert result["verdict"]["level"] == "UNDECIDED" and "no hypergradient" in result["verdict"]["reason"]
    assert "trains on V" in result["estimand"]
    assert result["records"][-1]["loss"]["validation"] < result["records"][0]["loss"]["validation"]
    assert (tmp_path / "run" / "model-own" / "model.safetensors").exists()
    assert [row["name"] for row in result["compare"]] == (["uniform", "learned"] if whole else [])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<html" in page and "trains on V" in page and ">nan<" not in page


@pytest.mark.slow
def test_stopped_anywhere_and_resumed_changes_no_bit(made, tmp_path, stop_at):
    run(made, tmp_path / "whole", "--fast", *METHODS["penalty"])
    stop_at(45)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", "--fast", *METHODS["penalty"])
    run(made, tmp_path / "run", "--fast", *METHODS["penalty"], "--resume")
    for name in ("weights.parquet", "model-own/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow  # tests/runs/test_train.py and test_select.py have a training that diverges
def test_divergence_is_told(made, tmp_path):
    """A rate at which ten steps do not diverge, but sixty do."""
    flags = (
        "--optimizer.name",
        "sgd",
        "--optimizer.learning-rate",
        "1e30",
        "--train.max-steps",
        "1",
        "--optimizer.warmup-steps",
        "0",
    )
    with pytest.raises(FloatingPointError, match="validation loss is (nan|inf) at step 20 of 60"):
        run(made, tmp_path / "run", "--fast", *METHODS["mixing"], *flags)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_the_rate_of_the_weights_falls_and_sums_to_what_it_should(steps):
    rates = np.array([float(delayed_linear_decay(12.0, steps)(step)) for step in range(steps)])
    assert rates.sum() == pytest.approx(12.0, rel=1e-5)
    assert (rates[: steps // 10] == 0).all() and (np.diff(rates[steps // 10 :]) < 0).all() and rates[-1] > 0
