"""Metrics of strategies judged by known accuracies: numbers against loops, ties, orders of rows, wrong tables."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr, t

from bilevel_jax.cli import main
from bilevel_jax.commands.functions import rank as rank_from_python
from bilevel_jax.commands.rank import records
from bilevel_jax.commands.results import RankRecordsResult, read_result
from bilevel_jax.runs.config.schema import RankSection


def make_rows(num_models=3, num_tasks=4, strategies=5, seed=0):
    """Perplexities that foretell accuracies, and SPPL that foretells them better; `mine` is another column."""
    rng = np.random.default_rng(seed)
    rows = []
    for model in range(num_models):
        for task in range(num_tasks):
            quality = rng.normal(size=strategies)
            accuracy = np.clip(0.6 + 0.02 * (task + 1) * quality, 0, 1)
            sppl, perplexity = (np.exp(1 - quality + noise * rng.normal(size=strategies)) for noise in (0.3, 2.0))
            for s in range(strategies):
                rows.append(
                    {
                        "model": f"m{model}", "task": f"t{task}", "strategy": f"s{s}", "accuracy": accuracy[s],
                        "perplexity": perplexity[s], "sppl": sppl[s], "mine": quality[s], "note": "x",
                    }
                )  # fmt: skip
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def judge(path, **options):
    section = RankSection(records=str(path), **options)
    return records.judge_records(records.load_records(section), section, 0)


def test_the_numbers_are_those_of_a_loop(tmp_path):
    rows = make_rows()
    result = judge(write(tmp_path / "table.jsonl", rows), largest_wins=("mine",))
    assert result["metrics"] == ["mine", "sppl", "perplexity"] and len(result["pairs"]) == 12
    assert result["notes"][1].startswith("columns that were not read: note")
    assert result["notes"][2] == "accuracies are read as shares (rank.accuracy_unit)"
    groups = [[row for row in rows if (row["model"], row["task"]) == key] for key in
              {(row["model"], row["task"]): None for row in rows}]  # fmt: skip
    spreads = np.array([np.std([row["accuracy"] for row in group]) for group in groups])
    for subset in result["subsets"]:
        kept = [group for group, spread in zip(groups, spreads, strict=True) if spread > subset["spread_above"]]
        assert subset["pairs"] == len(kept)
        for name, sign in (("sppl", -1), ("perplexity", -1), ("mine", 1)):
            picks = [max(group, key=lambda row: sign * row[name])["accuracy"] for group in kept]
            rho = [
                spearmanr([sign * row[name] for row in group], [row["accuracy"] for row in group])[0] for group in kept
            ]
            line, weights = subset["metrics"][name], spreads[spreads > subset["spread_above"]]
            assert line["accuracy"].value == pytest.approx(np.mean(picks), abs=1e-12)
            assert line["correlation"].value == pytest.approx(np.mean(rho), abs=1e-12)
            assert line["weighted_correlation"].value == pytest.approx(np.average(rho, weights=weights), abs=1e-12)
            mean, half = np.mean(picks), t.ppf(0.975, len(picks) - 1) * np.std(picks, ddof=1) / len(picks) ** 0.5
            np.testing.assert_allclose(line["accuracy"], [mean, mean - half, mean + half], rtol=1e-12)
        assert subset["best"] == pytest.approx(np.mean([max(row["accuracy"] for row in group) for group in kept]))
        assert subset["mean"] == pytest.approx(np.mean([np.mean([r["accuracy"] for r in group]) for group in kept]))
        assert set(subset["always"]) == {f"s{s}" for s in range(5)}
    assert [subset["spread_above"] for subset in result["subsets"]] == [0.0, 0.02, 0.04]
    mine = result["subsets"][0]["metrics"]["mine"]
    assert mine["correlation"].value == pytest.approx(1) and mine["picks_the_best"] == 12
    assert result["subsets"][0]["metrics"]["sppl"]["gain"].value > 0


def test_intervals_are_of_pairs_and_paired(tmp_path):
    """A metric that is another one in other units is behind it by exactly nothing, however wide its own interval."""
    rows = [{**row, "perplexity": 3 * row["sppl"] + 1} for row in make_rows()]
    result = judge(write(tmp_path / "table.jsonl", rows))
    line = result["subsets"][0]["metrics"]["perplexity"]
    assert tuple(line["gain"]) == (0, 0, 0) and line["accuracy"].high > line["accuracy"].low
    assert result["sentence"].endswith("the difference is 0.00 [0.00, 0.00] points and may be 0.")


def test_a_gain_and_a_loss_are_said_and_few_pairs_tell_nothing(tmp_path):
    rows = make_rows()
    said = judge(write(tmp_path / "a.jsonl", rows))["sentence"]
    lost = judge(write(tmp_path / "b.jsonl", rows), pick_by="perplexity")["sentence"]
    gain = re.search(r"it gains (\S+) \[(\S+), (\S+)\] points\.$", said).groups()
    assert re.search(r"it loses (\S+) \[(\S+), (\S+)\] points\.$", lost).groups() == gain
    few = judge(write(tmp_path / "c.jsonl", rows[:10]))["sentence"]
    assert re.search(
        r"Against perplexity, the best of the others, [+−]\d+\.\d\d points: so few pairs tell no difference", few
    )


def test_a_claimed_difference_is_seldom_chance():
    """Two metrics that pick alike on average, 10 pairs: at most a twentieth, and noise, of tables is told apart."""
    rng = np.random.default_rng(0)
    gains = 0.05 * rng.normal(size=(2000, records.MIN_PAIRS))
    intervals = [records._mean_interval(one) for one in gains]
    assert np.mean([one.low > 0 or one.high < 0 for one in intervals]) < 0.065


def test_metrics_that_tie_over_the_best_strategies_pick_them(tmp_path):
    """The mean of three times .1 is not .1 in floating point, and still it is the best."""
    rows = [
        {"model": f"m{at}", "task": "t", "strategy": name, "accuracy": 0.1 if name != "d" else 0.05,
         "sppl": 1.0 if name != "d" else 2.0}
        for at in range(3) for name in "abcd"
    ]  # fmt: skip
    result = judge(write(tmp_path / "table.jsonl", rows))
    assert result["subsets"][0]["metrics"]["sppl"]["picks_the_best"] == 3
    assert result["pairs"][0]["accuracies"]["sppl"] == 0.1


def test_neither_the_order_of_rows_nor_percent_changes_anything(tmp_path):
    rows = make_rows()
    one = judge(write(tmp_path / "a.jsonl", rows))
    order = np.random.default_rng(1).permutation(len(rows))
    percent = [{**rows[at], "accuracy": 100 * rows[at]["accuracy"]} for at in order]
    other = judge(write(tmp_path / "b.jsonl", percent), accuracy_unit="percent")
    assert any("read as percent" in note for note in other["notes"])
    for mine, theirs in zip(one["subsets"], other["subsets"], strict=True):
        for name, line in mine["metrics"].items():
            np.testing.assert_allclose(
                line["weighted_correlation"], theirs["metrics"][name]["weighted_correlation"], rtol=1e-9
            )
            np.testing.assert_allclose(line["accuracy"], theirs["metrics"][name]["accuracy"], rtol=1e-9)
    assert [pair["picks"] for pair in one["pairs"]] == [pair["picks"] for pair in other["pairs"]]


def test_ties_and_constants_count_as_they_should(tmp_path):
    row = {"model": "m", "task": "t", "sppl": 1.0}
    rows = [{**row, "strategy": name, "accuracy": a} for name, a in (("a", 0.2), ("b", 0.6))]
    rows += [{**row, "task": "u", "strategy": name, "accuracy": 0.5, "sppl": s} for name, s in (("a", 1.0), ("b", 2.0))]
    result = judge(write(tmp_path / "table.jsonl", rows))
    whole, *some = result["subsets"]
    line = whole["metrics"]["sppl"]
    assert line["accuracy"].value == pytest.approx((0.4 + 0.5) / 2)  # of a tie the mean; where all are equal, any
    assert np.isnan(line["correlation"].value) and line["pairs_with_correlation"] == 0
    assert whole["always"] == pytest.approx({"a": 0.35, "b": 0.55}) and [one["pairs"] for one in some] == [1, 1]
    assert np.isnan(some[0]["metrics"]["sppl"]["accuracy"].low)
    assert result["pairs"][0]["picks"]["sppl"] == "a, b"


def test_the_command_writes_a_table_and_a_report(tmp_path, capsys):
    rows = [{**row, "strategy": "<b>s" if row["strategy"] == "s0" else row["strategy"]} for row in make_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    flags = ["--rank.records", str(tmp_path / "table.parquet"), "--out", str(tmp_path / "run")]
    assert main(["rank", *flags]) == 0
    told = capsys.readouterr().out
    assert "Over 12 pairs of a model and a task, picking by SPPL reaches an accuracy of" in told
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "<b>s" not in page and "&lt;b&gt;s" in page and page.count("<svg") == 1
    typed = read_result(tmp_path / "run")
    assert isinstance(typed, RankRecordsResult) and len(typed.models) == 24
    assert typed.accuracies[typed.metrics == "sppl"].mean() == pytest.approx(
        typed.result["subsets"][0]["metrics"]["sppl"]["accuracy"][0]
    )
    again = rank_from_python(rank={"records": str(tmp_path / "table.parquet")}, output={"dir": str(tmp_path / "two")})
    assert again.summary == typed.summary


def changed(**fields):
    return lambda rows: [*rows[:2], {**rows[2], **fields}, *rows[3:]]


def without(name):
    return lambda rows: [*rows[:2], {key: value for key, value in rows[2].items() if key != name}, *rows[3:]]


WRONG = {
    "no accuracy": (without("accuracy"), [], r"table.jsonl:3: no 'accuracy'; the keys are"),
    "no score": (without("sppl"), [], r"table.jsonl:3: no 'sppl'; the keys are .* Every row has a number there"),
    "no model": (changed(model=" "), [], r"table.jsonl:3: 'model' is str ' '; a name is wanted"),
    "no number": (changed(sppl="low"), [], r"table.jsonl:3: 'sppl' is str 'low'; a finite number is wanted"),
    "nan": (changed(perplexity=float("nan")), [], r"jsonl:3"),
    "negative": (changed(accuracy=-0.1), [], r"table.jsonl:3: 'accuracy' is -0.1; a number from 0 to 1 is wanted"),
    "percent": (changed(accuracy=61.5), [], r"jsonl:3: 'accuracy' is 61.5; .* Set rank.accuracy_unit to percent, if"),
    "huge": (changed(sppl=10**400), [], r"table.jsonl:3: 'sppl' is int .*; a finite number is wanted"),
    "no such metric": (None, ["--rank.metrics", "ifd", "sppl"], r"rank.metrics names 'ifd', which is no column"),
    "no use for strategies": (None, ["--rank.strategies", "s0", "s1"], r"is read without model and responses"),
    "twice": (lambda rows: [*rows, rows[1]], [], r"jsonl:61: 's1' of 'm0' and 't0' stands at .*table.jsonl:2, too"),
    "alone": (lambda rows: rows[:6], [], r"table.jsonl:6: 's0' is the only strategy of 'm0' and 't1'"),
    "empty": (lambda rows: [], [], r"table.jsonl"),
    "unknown column": (None, ["--rank.least-wins", "splp"], r"rank.least_wins names 'splp', .* did you mean 'sppl'"),
    "no metric": (lambda rows: [{k: r[k] for k in ("model", "task", "strategy", "accuracy", "mine")} for r in rows], [],
                  r"no column of scores that is known .* Name yours in rank.least_wins"),
    "both": (None, ["--rank.least-wins", "mine", "--rank.largest-wins", "mine"], "both name 'mine'; name it in one"),
    "data, too": (None, ["--data.train", "x.jsonl"], "data.train ranks strategies by responses: leave"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_gets_one_clear_sentence(tmp_path, capsys, name):
    change, flags, message = WRONG[name]
    rows = make_rows()
    path = write(tmp_path / "table.jsonl", change(rows) if change else rows)
    assert main(["rank", "--rank.records", path, "--out", str(tmp_path / "run"), *flags]) == 1
    told = capsys.readouterr().err.strip()
    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told and not (tmp_path / "run").exists()
