"""The command `audit`: its statistics, known truths, resuming, and errors."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from bilevel_jax.cli import main
from bilevel_jax.commands.audit import extremes, report, retrains
from bilevel_jax.commands.audit.judge import DataScore, choose_score
from bilevel_jax.commands.audit.run import audit
from bilevel_jax.core.certify import Verdict
from bilevel_jax.runs import stats
from bilevel_jax.runs.budget import work
from bilevel_jax.runs.config.load import AuditConfig, load_config
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.stats import auc, rank_correlation
from tests.commands.typed_results import check_columns
from tests.runs import blobs

CONFIG = """
data: {{train: ['{path}']}}
arrays: {{train_examples: 60, validation_examples: 24, test_examples: 30, noise_share: 0.2}}
optimizer: {{name: sgd, learning_rate: 0.1, schedule: constant, warmup_steps: 0}}
train: {{max_steps: 6, global_batch_size: 20}}
outer: {{proximal: 0.01, max_iterations: 3, curvature_batches: 3}}
audit: {{queries: 24, vmap_size: 12, removed: [0.5, 0.02], subsets: 16, scores: [loss, alignment, random],
  extremes: [0.01, 0.1]}}
certify: {{step_sizes: [0.1], removed: [0.5], draws: 2}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
ENVIRONMENT = {"devices": ["cpu"], "platform": "here", "packages": {"jax": "0"}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "audit.yaml").write_text(CONFIG.format(path=blobs.write(folder / "blobs.npz")))
    return folder / "audit.yaml"


def run(config, out, *flags):
    return audit(load_config(AuditConfig, config, [*flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run: (its folder, its result)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(config, out)


# ---- statistics


def test_weighted_ranks_are_those_of_repeated_items():
    random = np.random.default_rng(0)
    one = np.round(random.normal(size=(3, 20)), 1)  # with ties
    other = one + random.normal(size=(3, 20))
    counts = stats.resample_counts(20, (1, 2))
    assert counts.shape == (1 + stats.NUM_RESAMPLES, 20) and (counts[0] == 1).all() and (counts.sum(1) == 20).all()
    found = stats.bootstrap_rank_correlations(one, other, counts)
    for draw in (0, 1, 77):
        items = np.repeat(np.arange(20), counts[draw])
        for pair in range(3):
            expected = spearmanr(one[pair, items], other[pair, items]).statistic
            assert abs(found[draw, pair] - expected) < 1e-12
    read = stats.percentile_interval(found[:, 0])
    assert read.low < read.value == found[0, 0] < read.high


# ---- what it finds

PARTS = (("validation", "L_v"), ("test", "test loss"))


def test_exact_entries_foretell_what_one_row_does(whole):
    """One of 60 rows leaves a linear model: nearly the infinitesimal change that the entries are exact for."""
    lds = {row["name"]: row["lds"] for row in whole[1]["rows"]}
    for target in ("validation", "queries"):
        value, low, _ = lds["unrolled"][target][1]
        assert value > 0.97 and low > 0.9
    assert lds["unrolled"]["validation"][1].value > lds["loss, start"]["validation"][1].value
    assert whole[1]["certificate"]["level"] and whole[1]["verdict"]["sentence"]
    certificate, lds = whole[1]["certificate"], lds["unrolled"]
    assert "retrains without" in certificate["reason"]  # the verdict reads them
    own, others = (f"of {lds[part][0].value:.2f} with those of {name}" for part, name in PARTS)
    assert certificate["others_reason"].endswith(f"{others}, {own}.") or own in certificate["others_reason"]
    for reading in (f"{lds[part][0].value:.2f} [" for part, _ in PARTS):
        assert reading in whole[1]["verdict"]["sentence"].partition("The exact hypergradient reaches")[2]


def test_the_best_raise_the_loss_and_the_worst_lower_it(whole):
    """Retrains without the ends of each score, against those at random; one example of 60 is a small change."""
    out, found = whole[0], whole[1]["extremes"]
    table = pq.read_table(out / "extremes.parquet").to_pandas()
    scores = pq.read_table(out / "scores.parquet").to_pandas().set_index("id")
    assert found["shares"] == [0.01, 0.1] and found["counts"] == [1, 6]
    assert len(table) == 1 + 2 * (2 * 6 + found["draws"])  # six scores but `random`
    assert not len(table["left_out"][0]) and table["end"][0] == "none"
    exact = scores["unrolled"].sort_values()
    for share, count in zip(found["shares"], found["counts"], strict=True):
        lines = table[(table["score"] == "unrolled") & (table["share"] == share)].set_index("end")
        assert set(lines["left_out"]["worst"]) == set(exact.index[:count])
        assert set(lines["left_out"]["best"]) == set(exact.index[-count:])
        drawn = table[(table["end"] == "random") & (table["share"] == share)]
        assert len({tuple(sorted(ids)) for ids in drawn["left_out"]}) > 8 and {*map(len, drawn["left_out"])} == {count}
    row = next(row for row in found["rows"] if row["name"] == "unrolled")
    full = table["validation"][0]
    for end in ("best", "worst"):
        lines = table[(table["score"] == "unrolled") & (table["end"] == end)]
        np.testing.assert_allclose(row[end]["validation"], lines["validation"] - full, atol=1e-12)
        np.testing.assert_allclose(
            row[f"{end}_queries"], np.array([*lines["queries"]]) - table["queries"][0], atol=1e-12
        )
        # every row of validation is a query; float32, another order of sums
        np.testing.assert_allclose(row[end]["queries"], row[end]["validation"], atol=1e-5)
    # a linear model without one row: the change is what the entry says to first order
    np.testing.assert_allclose(row["best"]["validation"][0], exact.iloc[-1], rtol=0.2)
    np.testing.assert_allclose(row["worst"]["validation"][0], exact.iloc[0], rtol=0.2)
    for at, share in enumerate(found["shares"]):
        drawn = table[(table["end"] == "random") & (table["share"] == share)]["validation"] - full
        assert row["worst"]["validation"][at] <= drawn.min() < drawn.max() <= row["best"]["validation"][at]
        mean, low, high = found["random"]["validation"][at]
        assert low < mean < high and mean == pytest.approx(drawn.mean())
    jobs = json.loads((out / "checkpoints" / "done.json").read_text())
    audit_section = load_config(AuditConfig, out / "config.yaml").audit
    counted = work.count_extreme_retrains(audit_section, ["loss", "alignment", "random"])
    assert counted == 60 and sum(job["work"] for key, job in jobs.items() if key.startswith("extremes/")) == 60 * 6
    assert "with the lowest scores differs most for" in found["sentence"] and "test loss by" in found["sentence"]


def test_a_range_holds_the_next_draw_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 17))
    ranges = np.array([extremes.predict_interval(line[:16]) for line in draws])
    share = np.mean((ranges[:, 1] < draws[:, 16]) & (draws[:, 16] < ranges[:, 2]))
    assert abs(share - 0.95) < 0.02  # standard error .005


def test_ends_of_a_score_with_ties_are_as_many_as_asked_for_and_apart():
    tied = DataScore("tied", "", np.repeat([0.0, 1.0], 10), None, 0.0, 0.0)
    removals = extremes.plan_removals([tied], np.arange(2, 20), 20, [0.05, 0.4], seed=0)
    ends = {(one.share, one.end): one.left_out for one in removals if one.name}
    assert [ends[key].sum() for key in ((0.05, "best"), (0.05, "worst"), (0.4, "best"), (0.4, "worst"))] == [1, 1, 7, 7]
    assert not any((one.left_out[:2]).any() for one in removals)  # rows that training does not read
    assert (ends[0.4, "best"] >= ends[0.05, "best"]).all() and not (ends[0.4, "best"] & ends[0.4, "worst"]).any()
    assert ends[0.4, "worst"][10:].sum() == 0


def test_permuted_scores_foretell_nothing(whole):
    table = pq.read_table(whole[0] / "bank.parquet")
    ids = pq.read_table(whole[0] / "scores.parquet")
    place = {name: row for row, name in enumerate(ids["id"].to_pylist())}
    left_out = np.zeros((1, 16, 60), bool)
    for line, gone in zip(left_out[0], table["left_out"].to_pylist()[:16], strict=True):
        line[[place[one] for one in gone]] = True
    assert (left_out.sum(2) == 30).all() and len({line.tobytes() for line in left_out[0]}) == 16
    made = retrains.LeaveOutRetrains(
        (0.5,), left_out, {"validation": np.array(table["validation"][:16]).reshape(1, 16, 1)}
    )
    exact, random = ids["unrolled"].to_numpy(), np.random.default_rng(0)
    assert retrains.compute_lds(made, exact, None, 0)["validation"][0][0] == pytest.approx(_lds(whole[1], "unrolled"))
    nulls = [
        rank_correlation(made.predict_loss_rise(random.permutation(exact))[0], made.losses["validation"][0, :, 0])
        for _ in range(400)
    ]
    assert abs(np.mean(nulls)) < 0.05  # 400 permutations of a correlation over 16: standard error .013


def _lds(result, name):
    return next(row["lds"]["validation"][0].value for row in result["rows"] if row["name"] == name)


def test_the_typed_result_holds_the_scores(whole):
    columns = pq.read_table(whole[0] / "scores.parquet").column_names
    names = [name for name in columns if name not in ("id", "row", "source", "label", "file", "line")]
    typed, _ = check_columns(whole[0], "scores.parquet", {"ids": "id"} | {("scores", name): name for name in names})
    assert list(typed.scores) == names and {"unrolled", "loss_start", "random"} <= set(names)
    assert typed.summary == whole[1]["verdict"]["sentence"]
    assert set(typed.extremes.best) == set(typed.extremes.worst) == set(names) - {"random"}
    first = whole[1]["extremes"]["rows"][0]
    assert typed.extremes.best["unrolled"]["test"].tolist() == first["best"]["test"] and first["name"] == "unrolled"
    assert typed.extremes.random["test"].shape == (2, 3) and typed.extremes.shares.tolist() == [0.01, 0.1]
    assert typed.lds["unrolled"]["test"] == whole[1]["rows"][0]["lds"]["test"][0] and set(typed.lds) == set(names)
    assert typed.others_part == "test" and typed.others_level == whole[1]["verdict"]["others_level"]
    assert str(typed.verdict) == whole[1]["certificate"]["sentence"]
    assert typed.use in typed.scores and typed.use == whole[1]["verdict"]["use"].replace(", ", "_")


def test_writes_what_it_promises(whole):
    out, result = whole
    scores = pq.read_table(out / "scores.parquet").to_pandas()
    names = ["unrolled", "implicit", "alignment", "loss, start", "alignment, start", "random", "loss, end"]
    assert [row["name"] for row in result["rows"]] == names
    good = (scores["label"] == "clean").to_numpy()
    assert 0 < good.sum() < 60
    columns = ["unrolled", "implicit", "alignment", "loss_start", "alignment_start", "random", "loss_end"]
    for row, column in zip(result["rows"], columns, strict=True):
        assert row["auc"] == auc(scores[column].to_numpy(), good)
        if column != "unrolled":
            assert row["rank"].value == pytest.approx(
                rank_correlation(scores[column].to_numpy(), scores["unrolled"].to_numpy())
            )
    # every row of validation is a query, and L_v is their mean, in entries and in losses
    for name in ("unrolled", "alignment"):
        parts = [np.load(out / "parts" / f"{name} of queries {n}.npy") for n in (0, 1)]
        each = 24 * np.concatenate(parts)
        np.testing.assert_allclose(each.mean(0), scores[name], rtol=1e-4, atol=1e-7)  # float32, another order of sums
    table = pq.read_table(out / "bank.parquet")
    assert len(table) == 32 and table.schema.metadata[b"queries"].count(b"\n") == 23
    np.testing.assert_allclose(np.mean(table["queries"].to_pylist(), 1), table["validation"], rtol=1e-5)
    passes = {row["name"]: row["passes"] for row in result["rows"]}
    assert passes["unrolled"] == 6 + 6 * 4 and passes["loss, end"] == passes["loss, start"] + 6
    text = (out / "report.html").read_text()
    assert "where 95 % of random removals fall" in text and "queries that rose, worst out" in text
    assert text.count("<svg") == 4 and "Which score tells what a training example is worth here" in text


@pytest.mark.parametrize("at", [*(pytest.param(at, marks=pytest.mark.slow) for at in (3, 9, 200)), 60])
def test_stopped_anywhere_and_resumed_changes_no_number(config, whole, tmp_path, stop_at, at):
    """SIGTERM while training, in the first sweep, late in the bank, in a sweep of queries."""
    stop_at(at)
    with pytest.raises(session.Interrupted, match="SIGTERM; everything is saved. Go on with --resume"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    run(config, tmp_path / "run", "--resume")
    for name in ("bank.parquet", "extremes.parquet", "scores.parquet"):
        one, other = (pq.read_table(folder / name) for folder in (tmp_path / "run", whole[0]))
        assert one.equals(other)
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", whole[0]))
    assert [{**row, "seconds": 0} for row in a["rows"]] == [{**row, "seconds": 0} for row in b["rows"]]
    assert a["extremes"] == b["extremes"]
    assert a["verdict"] == b["verdict"] and a["certificate"] == b["certificate"]


@pytest.mark.slow  # their sums are those of tests/runs/scoring/test_token_hypergradients.py
def test_the_tokens_of_an_example_sum_to_its_entry_and_are_shown_escaped(made, tmp_path):
    (tmp_path / "audit.yaml").write_text(
        re.sub(r"^(retrain|selection):.*\n", "", (made / "select.yaml").read_text(), flags=re.M)
    )
    flags = (
        "--train.max-steps",
        "4",
        "--audit.estimators",
        "unrolled",
        "--audit.scores",
        "random",
        "--audit.queries",
        "0",
    )
    flags += ("--audit.subsets", "8", "--audit.removed", "0.5", "--audit.extremes", "--audit.token-examples", "2")
    result = run(tmp_path / "audit.yaml", tmp_path / "run", *flags, "--certify.no-enabled")
    assert result["extremes"] is None
    tokens = pq.read_table(tmp_path / "run" / "tokens.parquet").to_pandas().set_index("id")
    exact = pq.read_table(tmp_path / "run" / "scores.parquet").to_pandas().set_index("id")["unrolled"]
    sums = [np.nansum(np.array(values, float)) for values in tokens["hypergradients"]]
    np.testing.assert_allclose(sums, -exact[tokens.index], rtol=2e-3, atol=2e-3 * exact.abs().max())  # float32
    assert all(len(a) == len(b) for a, b in zip(tokens["tokens"], tokens["token_ids"], strict=True))
    shown = result["tokens"]
    assert [one["end"] for one in shown] == ["help"] * 2 + ["harm"] * 2
    assert [shown[0]["id"], shown[2]["id"]] == [exact.idxmax(), exact.idxmin()]
    text = (tmp_path / "run" / "report.html").read_text()
    colours = re.findall('class="token (good|bad)" style="--a: (.*?)"', text)
    assert ("good" in dict(colours)) and ("bad" in dict(colours)) and max(float(a) for _, a in colours) == 1
    drawn = report.describe_tokens({"tokens": [shown[0] | {"tokens": [["<b>", -1.0], ["x", None], ["&", 0.5]]}]})
    assert drawn[0][1][0]["tokens"] == [
        ("<b>", "good", "1.00", "\u22121"), ("x", "", "", ""), ("&", "bad", "0.50", "+0.5"),
    ]  # fmt: skip
    hostile = shown[0] | {"tokens": [["<script>alert(1)</script>", -1.0], ["<i>", None]], "place": "<u>"}
    page = report.render_audit_report("run", result | {"tokens": [hostile]}, "", ENVIRONMENT)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;</span>&lt;i&gt;" in page


@pytest.mark.slow
def test_text_with_every_score(made, tmp_path):
    settings = re.sub(r"^(retrain|selection):.*\n", "", (made / "select.yaml").read_text(), flags=re.MULTILINE)
    (tmp_path / "audit.yaml").write_text(settings)
    flags = ("--outer.proximal", "0.1", "--audit.queries", "3", "--audit.subsets", "8", "--audit.removed", "0.5")
    result = run(tmp_path / "audit.yaml", tmp_path / "run", *flags, "--audit.vmap-size", "2")
    names = {row["name"] for row in result["rows"]}
    assert {"unrolled", "ica, start", "ica, end", "oneshot, start"} <= names
    targets = {"validation", "queries", "test"}
    assert result["unit"] == "nats per token" and set(result["rows"][0]["lds"]) == targets
    assert result["verdict"]["others_part"] == "test" and set(result["extremes"]["random"]) == targets
    by_loss = next(row["difficulty"] for row in result["rows"] if row["name"] == "loss, start")
    assert by_loss["loss"] == pytest.approx(1) and "the hardest" in by_loss["sentence"]
    lengths = [len(ids) for ids in pq.read_table(tmp_path / "run" / "tokens.parquet")["token_ids"].to_pylist()]
    assert (by_loss["length"] is None) == (len(set(lengths)) == 1)  # examples of one length have no order by it


# ---- the verdict


def line(name, low, value=0.5, report=0.5):
    lds = {
        "validation": [stats.BootstrapInterval(value, low, 0.9)],
        "test": [stats.BootstrapInterval(report, low, 0.9)],
    }
    return {"name": name, "lds": lds, "passes": 10.0, "difficulty": {"sentence": ""}}


GOOD, BAD = Verdict("BELIEVE", "", "it is.", ""), Verdict("DO NOT BELIEVE", "", "ratio 2.", "Lower the rate.")
STEADY, NOISY = np.full(501, 0.5), np.random.default_rng(0).normal(0.4, 0.5, 501)


def test_the_verdict_says_which_score_or_none():
    fit = {"one": STEADY, "near": NOISY, "far": STEADY - 0.3, "unrolled": STEADY + 0.4, "random": STEADY + 0.3}
    draws = {name: {"validation": [values], "test": [STEADY]} for name, values in fit.items()}
    lines = [line("one", 0.3), line("near", 0.1, 0.4), line("far", 0.1, 0.2), line("unrolled", 0.8, 0.9)]
    told = choose_score([*lines, line("random", 0.3, 0.8)], draws, GOOD, 0.5)
    assert told["use"] == "one"
    assert (
        "Not told apart from it: near." in told["sentence"] and "exact hypergradient reaches 0.90" in told["sentence"]
    )
    assert told["instead"] is None and (told["others_part"], told["others_level"]) == ("test", "UNDECIDED")
    assert "correlation of 0.50 [0.30, 0.90] with validation loss and 0.50 [0.30, 0.90] with test" in told["sentence"]
    assert "For other examples UNDECIDED: 0.50 [0.30, 0.90] on test, which no score has read" in told["sentence"]
    none = choose_score([line("one", -0.1)], draws, GOOD, 0.5)
    assert none["use"] is None and "the first may be 0" in none["sentence"]
    trap = {"difficulty": {"sentence": "The scores of one order the examples nearly by length."}}
    trapped = choose_score([lines[0] | trap, *lines[1:]], draws, GOOD, 0.5)
    assert trap["difficulty"]["sentence"] in trapped["sentence"]
    rough = choose_score(lines, draws, BAD, 0.5)
    assert rough["use"] is None and "ratio 2. Lower the rate." in rough["sentence"]
    assert choose_score([line("unrolled", 0.8)], draws, GOOD, 0.5)["use"] is None


def test_the_verdict_tells_of_a_score_that_is_better_on_rows_that_none_has_read():
    draws = {
        "one": {"validation": [STEADY], "test": [STEADY]},
        "far": {"validation": [STEADY - 0.3], "test": [STEADY + 0.3]},
    }
    told = choose_score([line("one", 0.3), line("far", 0.1, 0.2, report=0.8)], draws, GOOD, 0.5)
    assert (told["use"], told["instead"]) == ("one", "far")
    assert "on test, which no score has read" in told["sentence"] and "There far does better: 0.80" in told["sentence"]


def test_what_is_said_of_other_examples_rests_on_dev_and_not_on_validation():
    """Entries that foretell validation with .85 and other examples with .57 do not speak for these."""

    def told(value, low, part="dev"):
        readings = {"validation": [stats.BootstrapInterval(0.85, 0.7, 0.9)]}
        readings |= {part: [stats.BootstrapInterval(value, low, 0.9)]} if part else {}
        draws = {"one": {"validation": [STEADY], "dev": [STEADY], "test": [STEADY]}}
        return choose_score([line("one", 0.3) | {"lds": readings}], draws, GOOD, 0.5)

    levels = [told(0.9, 0.7), told(0.57, 0.3), told(0.5, -0.1), told(0.1, 0.05), told(0.9, 0.7, part=None)]
    assert [one["others_level"] for one in levels] == [
        "BELIEVE", "UNDECIDED", "DO NOT BELIEVE", "DO NOT BELIEVE", "UNDECIDED",
    ]  # fmt: skip
    assert all(one["use"] == "one" for one in levels)
    assert "0.85 [0.70, 0.90] with validation loss and 0.57 [0.30, 0.90] with dev loss" in levels[1]["sentence"]
    assert "give a dev set" in levels[-1]["sentence"] and levels[-1]["others_part"] is None
    both = line("one", 0.3) | {"lds": line("one", 0.3)["lds"] | {"dev": [stats.BootstrapInterval(0.8, 0.6, 0.9)]}}
    draws = {"one": {"validation": [STEADY], "dev": [STEADY], "test": [STEADY]}}
    assert choose_score([both], draws, GOOD, 0.5)["others_part"] == "dev"  # test stays for the last reading


WRONG = {
    "too few subsets": (["--audit.subsets", "4"], "audit.subsets = 4: must be 8 or more"),
    "one query": (["--audit.queries", "1"], "audit.queries = 1: must be 0 .none., or 2 or more"),
    "more queries than rows": (["--audit.queries", "25"], "audit.queries = 25, but validation has 24 rows"),
    "no validation examples": (["--arrays.validation-examples", "0"], "validation_examples = 0: must be 1 or more"),
    "no text to trust": (["--data.train", "rows.jsonl"], "name the validation examples"),
    "an unknown score": (["--audit.scores", "lost"], "there is no score 'lost'; did you mean 'loss'"),
    "a score of text": (["--audit.scores", "ica"], "'ica' reads text; for arrays"),
    "an extreme of everything": (["--audit.extremes", "1"], "audit.extremes = .1.0,.: name each once and in .0, 1."),
    "a share twice": (["--audit.removed", "0.5", "0.5"], "each once and in .0, 1."),
    "implicit without a prior": (["--outer.proximal", "0"], "implicit needs outer.proximal above 0"),
    "no derivative": (["--optimizer.name", "lion"], "lion steps along a sign"),
    "diverging": (["--optimizer.learning-rate", "1e30"], "training loss is (nan|inf) at step"),
    "folder exists": (["--out", "EXISTS"], "--resume"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(config, whole, tmp_path, capsys, name):
    flags, message = WRONG[name]
    flags = [str(whole[0]) if flag == "EXISTS" else flag for flag in flags]
    assert main(["audit", str(config), "--out", str(tmp_path / "run"), *flags]) == 1
    told = capsys.readouterr().err.strip()
    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told
