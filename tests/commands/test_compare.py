"""The command `compare` as a user runs it: outputs, resuming, and errors."""

import json
import re
import shutil
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.compare import report
from bilevel_jax.commands.compare.methods import METHODS
from bilevel_jax.commands.compare.run import compare
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.config.schema import Baseline, CompareMethod
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.stats import auc
from tests.commands.typed_results import check_columns
from tests.runs import blobs

ITERATED = ("--compare.methods", "unrolled", "implicit", "penalty")
ARMS = [
    "uniform",
    "validation",
    "train+validation",
    "oracle",
    "oracle+validation",
    "random",
    "top_alignment",
    "low_loss",
    "validation_model",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "compare.yaml").write_text(blobs.CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    return folder / "compare.yaml"


def run(config, out, *flags):
    return compare(load_config(CompareConfig, config, [*flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run of two seeds: (its folder, its result)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(config, out, *ITERATED)


def test_writes_what_it_promises(whole):
    out, result = whole
    assert [row["name"] for row in result["rows"]] == [*ARMS, "unrolled", "implicit", "penalty"]
    absent = result["absent_baselines"]  # no dev examples
    assert [text.partition(" ")[0] for text in absent] == ["validation_early_stop", "low_loss_dev"]
    assert all("no dev examples" in text and text in (out / "report.html").read_text() for text in absent)
    rows = {row["name"]: row for row in result["rows"]}
    table = pq.read_table(out / "weights.parquet").to_pandas()
    assert len(table) == 120 and set(table["seed"]) == {0, 1}
    first, second = (set(table["id"][table["seed"] == seed]) for seed in (0, 1))
    assert first != second  # rows are drawn anew for each seed
    for name in ("unrolled", "implicit", "penalty"):
        row = rows[name]
        for seed, cell in enumerate(row["runs"]):
            mine = table[table["seed"] == seed]
            weights, good = mine[f"weight {name}"].to_numpy(), (mine["label"] == "clean").to_numpy()
            assert weights.std() > 0 and cell["auc"] == auc(weights, good)
            kept = weights > 1
            assert cell["f1"] == 2 * (kept & good).sum() / (kept.sum() + good.sum())
            assert 0.5 * 120 < cell["passes"] <= 120 and cell["trail"][-1]["passes"] <= cell["passes"]
        assert row["mean"]["auc"] == np.mean([cell["auc"] for cell in row["runs"]])
        assert row["interval"]["test"] > 0 and "with_v test" in row["mean"]
    assert "own test" in rows["penalty"]["mean"] and "own report" not in rows["unrolled"]["mean"]
    assert rows["oracle"]["mean"]["f1"] == 1 and rows["oracle+validation"]["mean"]["distance"] == 0
    assert rows["uniform"]["mean"]["passes"] == 6 and "f1" not in rows["uniform"]["mean"]
    assert rows["top_alignment"]["mean"]["passes"] == 6 + 6 + 2 * 3  # look, and a pass over all rows and back
    assert rows["validation_model"]["mean"]["passes"] == 6 + 6  # the model of validation, and the retrain

    text = (out / "report.html").read_text()
    assert "<svg" in text and "Which method finds the examples to trust" in text
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == result["sentence"] and len([line for line in lines if line.startswith("| **")]) == 3
    assert "forward-backward passes" in "\n".join(lines)
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {record["part"] for record in logged} == {f"seed {s} {m}" for s in (0, 1) for m in ITERATED[1:]}
    steps = [record for record in logged if record["part"] == "seed 0 unrolled"]
    assert [record["work"] for record in steps] == [6 + 30, 30, 30]  # baselines; 6 steps and their sweep of 4 each
    rates = [record["rate"] for record in steps]
    assert rates == pytest.approx([1, 1 - 36 / 90, 1 - 66 / 90], rel=1e-6)  # by what is spent before the last step


def test_the_typed_result_holds_the_table(whole):
    columns = {
        "seeds": "seed", "ids": "id", "sources": "source", "labels": "label", "alignment": "alignment", "losses": "loss"
    }  # fmt: skip
    columns |= {("weights", name): f"weight {name}" for name in ("unrolled", "implicit", "penalty")}
    typed, table = check_columns(whole[0], "weights.parquet", columns)
    assert list(typed.weights) == ["unrolled", "implicit", "penalty"] and len(table) == 120
    assert typed.result["rows"][0]["name"] == "uniform" and typed.summary == whole[1]["sentence"]


def same(one, other):
    """Equal but for times."""
    assert pq.read_table(one / "weights.parquet").equals(pq.read_table(other / "weights.parquet"))

    def untimed(value):
        if isinstance(value, dict):
            return {key: untimed(item) for key, item in value.items() if key != "seconds"}
        return [untimed(item) for item in value] if isinstance(value, list) else value

    a, b = (untimed(json.loads((folder / "result.json").read_text())) for folder in (one, other))
    assert a == b


@pytest.mark.parametrize("at", [*(pytest.param(at, marks=pytest.mark.slow) for at in (4, 30, 250)), 80])
@pytest.mark.slow
def test_stopped_anywhere_and_resumed_changes_no_number(config, whole, tmp_path, stop_at, at):
    """SIGTERM while looking first, in a retrain, in an outer step, in the second seed."""
    stop_at(at)
    with pytest.raises(session.Interrupted, match="SIGTERM; everything is saved. Go on with --resume"):
        run(config, tmp_path / "run", *ITERATED)
    assert not (tmp_path / "run" / "report.html").exists()
    run(config, tmp_path / "run", *ITERATED, "--resume")
    same(tmp_path / "run", whole[0])


def test_the_report_says_how_far_the_first_hypergradients_speak_for_others(whole):
    def of(*values):
        return {"name": "auto", "runs": [{"trail": [{"reliability": value}, {"reliability": 0.9}]} for value in values]}

    plain = whole[1]["rows"]  # baselines, and methods that spend all of the budget on steps
    assert report.describe_reliability({"rows": plain}) == ""
    assert report.describe_reliability({"rows": [*plain, of(None, 0.4)]}) == ""
    assert " is 0.40 (measured by auto): about" in report.describe_reliability({"rows": [*plain, of(0.4)]})
    assert " is 0.30 ± 1.3 (measured by auto)" in report.describe_reliability({"rows": [of(0.4, 0.2)]})
    old = [{"name": "auto", "runs": [{"trail": [{"auc": 0.5}]}]}]
    assert report.describe_reliability({"rows": old}) == ""


@pytest.mark.slow
def test_every_method_runs(config, tmp_path):
    flags = ("--compare.seeds", "1", "--compare.methods", *METHODS, "--compare.baselines", "oracle+validation")
    result = run(config, tmp_path / "run", *flags, "--arrays.hidden-sizes", "4", "--arrays.label-noise", "redrawn")
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {*METHODS, "oracle+validation"} and all(METHODS[name].estimand for name in METHODS)
    assert "test" not in rows["mixing"]["mean"]  # it learns no weights
    for name in METHODS:
        assert rows[name]["mean"]["passes"] <= 120 and np.isfinite(rows[name]["mean"]["distance"])
    assert "One seed tells nothing apart." in result["sentence"]
    first = rows["pooled"]["runs"][0]["trail"][0]["reliability"]  # of the same uniform training and halves
    assert first == rows["auto"]["runs"][0]["trail"][0]["reliability"] and 0 <= first <= 1
    assert "(measured by pooled)" in (tmp_path / "run" / "report.html").read_text()


def test_sentence_names_what_is_not_told_apart():
    def row(name, values, learns=True):
        runs = [{"test": value, "with_v": {"test": value}} for value in values]
        mean = {"test": np.mean(values), "with_v test": np.mean(values)}
        return {"name": name, "learns": learns, "mean": mean, "interval": {}, "runs": runs}

    rows = [
        row("uniform", [2.0, 2.1, 2.2], False), row("oracle", [1.0, 1.1, 1.2], False),
        row("one", [1.0, 1.1, 1.2]), row("near", [1.1, 1.05, 1.25]), row("far", [1.5, 1.6, 1.7]),
    ]  # fmt: skip
    told = report.summarize_comparison({"rows": rows, "labels": False, "seeds": 3})
    assert "One trained again" in told and "not told apart from near." in told and "far" not in told
    assert "The oracle beats uniform" in told


@pytest.mark.slow
def test_text_with_weights_per_source(made, tmp_path):
    flags = ("--compare.methods", "window", "--compare.budget", "60", "--outer.weighting", "per_source")
    more = (
        "--data.source-field",
        "label",
        "--compare.seeds",
        "1",
        "--outer.window",
        "2",
        "--compare.baselines",
        "oracle",
    )
    settings = (made / "select.yaml").read_text()
    for section in ("certify", "compare", "keep"):
        settings = re.sub(rf"^{section}:.*\n", "", settings, flags=re.MULTILINE)
    (tmp_path / "compare.yaml").write_text(settings)
    result = run(tmp_path / "compare.yaml", tmp_path / "run", *flags, *more)
    rows = {row["name"]: row for row in result["rows"]}
    sources = {key for key in rows["window"]["mean"] if key.startswith("weight of ")}
    assert sources == {"weight of clean", "weight of wrong", "weight of noise"}
    assert result["unit"] == "nats per token" and "oracle" in rows


WRONG = {
    "a budget too small": (["--compare.budget", "50"], "too small to move a weight; needed: unrolled"),
    "implicit without a prior": (["--outer.proximal", "0"], "implicit needs outer.proximal above 0"),
    "a method twice": (["--compare.methods", "mixing", "mixing"], "compare.methods = .* name each once"),
    "packing": (["--data.packing"], "packing cannot know the orders"),
    "no file": (["--data.train", "nowhere.npz"], "nowhere.npz: no such file"),
    "too few rows": (["--arrays.validation-examples", "5000"], "has 120 in x_train"),
    "text without validation examples": (["--data.train", "rows.jsonl"], "name the validation examples"),
    "features of arrays": (
        ["--outer.weighting", "rater", "--compare.methods", "window"],
        "reads text; for arrays",
    ),
    "diverging": (["--optimizer.learning-rate", "1e30"], "training loss is (nan|inf) at step"),
    "folder exists": (["--out", "EXISTS"], "--resume"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(config, whole, tmp_path, capsys, name):
    flags, message = WRONG[name]
    flags = [str(whole[0]) if flag == "EXISTS" else flag for flag in flags]
    assert main(["compare", str(config), "--out", str(tmp_path / "run"), *flags]) == 1
    told = capsys.readouterr().err.strip()
    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told


def test_resuming_under_another_config_is_refused(config, whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    flags = ["--out", str(tmp_path / "run"), "--resume", *ITERATED, "--compare.budget", "121"]
    assert main(["compare", str(config), *flags]) == 1
    assert "compare.budget" in capsys.readouterr().err


def test_methods_and_baselines_have_names_of_their_own():
    """Their results stand side by side in one table and one folder."""
    assert set(get_args(CompareMethod)).isdisjoint(get_args(Baseline))
