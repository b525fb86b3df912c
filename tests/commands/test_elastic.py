"""A run that was stopped goes on with fewer devices and its parameters in another layout."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main

SMALL = (
    "--model.param-dtype", "float64", "--optimizer.eps-root", "1e-6", "--optimizer.learning-rate", "1e-3",
    "--train.max-steps", "4", "--outer.steps", "1", "--certify.no-enabled", "--retrain.variants", "uniform", "learned",
)  # fmt: skip
EIGHT, FOUR = ("--mesh.data", "8"), ("--mesh.data", "2", "--mesh.fsdp", "2")


def run(made, out, *flags):
    """`select`, as a user runs it."""
    assert main(["select", str(made / "select.yaml"), "--out", str(out), *SMALL, *flags]) == 0
    result = json.loads((out / "result.json").read_text())
    return np.array(pq.read_table(out / "weights.parquet")["hypergradient"]), result


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_with_four(made, tmp_path, stop_at, monkeypatch, eight_devices):
    """Stopped in its first training: each device had whole matrices before, and has halves of them after."""
    wanted, result = run(made, tmp_path / "whole", *EIGHT)
    out = tmp_path / "run"
    stop_at(3)
    assert main(["select", str(made / "select.yaml"), "--out", str(out), *SMALL, *EIGHT]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert not (out / "result.json").exists()
    found, resumed = run(made, out, *FOUR, "--resume")
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())  # sums in another order
    for record, other in zip(resumed["records"], result["records"], strict=True):
        np.testing.assert_allclose(record["loss"]["validation"], other["loss"]["validation"], rtol=1e-9)
    for line, other in zip(resumed["compare"], result["compare"], strict=True):
        np.testing.assert_allclose(line["mean"]["test"], other["mean"]["test"], rtol=1e-9)
