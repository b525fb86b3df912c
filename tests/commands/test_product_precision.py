"""Lower precision of the products in the steps back, as a run has it: what it changes is measured and said."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.refine.run import refine
from bilevel_jax.commands.select.run import select
from bilevel_jax.core.certify.products import measure_product_error
from bilevel_jax.runs.config.load import AuditConfig, CompareConfig, RefineConfig, SelectConfig, load_config
from bilevel_jax.runs.infra import session
from tests.simulated_precision import simulated_precision

FLAGS = ("--outer.steps", "1", "--certify.step-sizes", "0.1", "--certify.removed", "0.2", "--certify.draws", "1",
         "--retrain.no-enabled")  # fmt: skip


def run(made, out, *flags):
    return select(load_config(SelectConfig, made / "select.yaml", [*FLAGS, *flags, "--out", str(out)]))


LOWER = ("--outer.product-precision", "default")


@pytest.mark.slow
def test_it_is_measured_in_the_first_step_and_at_the_learned_weights(made, tmp_path, stop_at, capsys):
    result = run(made, tmp_path / "whole", *LOWER)
    said = capsys.readouterr().err
    stop_at(14)  # in the middle of the first backward pass
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", *LOWER)
    run(made, tmp_path / "run", *LOWER, "--resume")
    own, resumed = (pq.read_table(tmp_path / name / "weights.parquet") for name in ("whole", "run"))
    assert resumed.equals(own)
    first, second = (record["checks"]["product_error"] for record in result["records"])
    assert first < 1e-5 and second is None  # on a CPU all precisions are one
    assert f"outer.product_precision = default changes the hypergradient by {first:.2%} of its norm." in said
    assert all(one["checks"]["product_error"] < 1e-5 for one in result["certificates"].values())
    assert own.schema.metadata[b"precision"].endswith(b"in the steps back at default")
    checks = (tmp_path / "whole/report.html").read_text().split("Without a number in this run")
    assert "product_error" in checks[0] and "product_error" not in checks[1].split("</p>")[0].split("Residual")[0]
    saved = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert saved[0]["checks"]["product_error"] == first


@pytest.mark.slow
def test_what_is_told_is_what_the_products_change(made, tmp_path):
    with simulated_precision("bfloat16"):
        exact_result = run(made, tmp_path / "highest")
        result = run(made, tmp_path / "lower", *LOWER)
    exact, own = (pq.read_table(tmp_path / name / "weights.parquet") for name in ("highest", "lower"))
    h, h_exact = (np.array(table["first_hypergradient"], float) for table in (own, exact))
    error = measure_product_error(h, h_exact, is_per_example=True)
    told = result["records"][0]["checks"]["product_error"]
    assert told == pytest.approx(error, rel=1e-2) and 1e-3 < error < 0.05
    at_places = {name: one["checks"]["product_error"] for name, one in result["certificates"].items()}
    assert at_places.pop("uniform weights") == told and all(1e-4 < other < 0.05 for other in at_places.values())
    assert exact_result["records"][0]["checks"]["product_error"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--outer.method", "alignment"), "is that of hypergradients that go back through training"),
        (("--outer.method", "implicit", "--outer.proximal", "0.1"), "is that of hypergradients that go back"),
        (("--outer.linearize",), "a step that is stored linearized has the products of training"),
    ],
)
def test_where_it_would_not_be_read_it_is_refused(made, tmp_path, flags, words):
    with pytest.raises(ValueError, match=f"outer.product_precision = 'high': {words}"):
        run(made, tmp_path / "run", "--outer.product-precision", "high", *flags)


def test_compare_and_audit_refuse_it():
    for config_class, words in ((CompareConfig, "methods are compared by passes"), (AuditConfig, "audit judges")):
        with pytest.raises(ValueError, match=f"outer.product_precision = 'high': {words}"):
            load_config(config_class, None, ["--outer.product-precision", "high", "--model", "m", "--train", "t"])


@pytest.mark.slow
def test_each_round_of_refine_tells_it(made, tmp_path, capsys):
    flags = ("--refine.methods", "unrolled", "--refine.rounds", "1", "--refine.questions", "fixed", *LOWER)
    out = tmp_path / "run"
    result = refine(load_config(RefineConfig, made / "refine.yaml", [*flags, "--out", str(out)]))
    error = result["records"][0]["candidates"][0]["reliability"]["product_error"]
    assert error < 1e-5  # on a CPU all precisions are one
    assert f"product error {error:.1%}" in capsys.readouterr().err
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["product_error"] for record in logged if record["event"] == "outer"] == [error]
    words = f"changes the hypergradients behind the weights of unrolled by {error:.1%} of their norm."
    assert words in (out / "report.html").read_text()
