"""The command as a user runs it: what it writes, that it stops and goes on, and what it says to wrong input."""

import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.results import read_result
from bilevel_jax.commands.select.run import select
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import load_examples as load_rows
from bilevel_jax.runs.config.load import SelectConfig, load_config
from bilevel_jax.runs.infra import session


def run(made, out, *flags):
    return select(load_config(SelectConfig, made / "select.yaml", [*flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """One uninterrupted run: (its folder, its result)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(made, out)


def test_writes_what_it_promises(made, whole):
    out, result = whole
    table = pq.read_table(out / "weights.parquet")
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    assert table.num_rows == 36 and len(set(table["id"].to_pylist())) == 36
    assert table["label"].to_pylist() == [row["label"] for row in rows]
    weights = np.array(table["weight"])
    assert abs(weights.mean() - 1) < 1e-5 and weights.std() > 0  # softmax, and it learned something
    assert [round(record["entropy"], 3) for record in result["records"]][0] == round(np.log(36), 3)
    assert (np.array(table["hypergradient"]) != 0).any()
    meaning = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert "nats per token" in meaning["hypergradient"] and "below 0" in meaning["hypergradient"]
    assert {"estimand", "precision", "device", "config_hash"} <= set(meaning)

    kept = [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == [
        i for i, s in zip(table["id"].to_pylist(), table["selected"].to_pylist(), strict=True) if s
    ]
    assert len(kept) == 18 and set(kept[0]) == {"prompt", "response", "id", "weight"}
    assert min(row["weight"] for row in kept) >= np.median(weights) - 1e-6

    config, params = models.load_model(out / "model")
    assert config == models.read_config(made / "model") and all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)
    )
    assert "<html" in (out / "report.html").read_text()
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged] == [0, 1, 2]
    assert [row["name"] for row in result["compare"]] == ["uniform", "learned", "validation", "oracle"]
    assert result["verdict"]["sentence"].startswith(result["verdict"]["level"])
    assert result["verdict"]["sentence"].count("At the learned weights") == (result["best"] > 0)
    # the certificates at the learned weights, 3 retrains, two estimates and their trainings, are left out without any
    planned, left_out = result["estimate"]["passes"], 0 if result["best"] else 10 * (3 + 2 * (1 + 4))
    smaller = sum(len(place["exact"]["steps"]) - 1 for place in result["certificates"].values())  # a ratio was off
    assert result["measured"]["passes"] == planned - left_out + 10 * 2 * smaller
    assert result["measured"]["seconds_per_pass"] > 0 and "Estimated and measured" in (out / "report.html").read_text()


def same_run(one, other):
    """Equal but for times: every bit of the tables, the model and the numbers of the result."""
    a, b = (pq.read_table(folder / "weights.parquet") for folder in (one, other))
    assert a.equals(b)
    for name in ("selected.jsonl", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for result in results:
        for key in ("seconds", "estimate", "measured"):
            result.pop(key)
        for record in result["records"]:
            record.pop("seconds")
    assert results[0] == results[1]


@pytest.mark.parametrize("at", [27, *(pytest.param(at, marks=pytest.mark.slow) for at in (36, 90, 160))])
def test_stopped_anywhere_and_resumed_changes_no_bit(made, whole, tmp_path, stop_at, at):
    """SIGTERM in a training, in a sweep, while certifying, while comparing."""
    stop_at(at)
    out = tmp_path / "run"
    with pytest.raises(session.Interrupted, match="SIGTERM; everything is saved. Go on with --resume"):
        run(made, out)
    assert not (out / "report.html").exists()
    run(made, out, "--resume")
    same_run(out, whole[0])


CHOSEN_ON_DEV = ("low_loss_dev", "validation_early_stop", "validation_model")


def run_with_dev(made, out, *flags):
    """Validation trains, too, in two folds; every arm that chooses on dev, and a recommendation."""
    arms = ("--retrain.variants", "uniform", "learned", "learned+validation", *CHOSEN_ON_DEV)
    folds = ("--outer.validation-folds", "2", "--data.dev", str(made / "dev.jsonl"), "--retrain.seeds", "2")
    small = ("--train.max-steps", "4", "--outer.steps", "1", "--certify.no-enabled")
    return run(made, out, *folds, *small, *arms, *flags)


@pytest.fixture(scope="module")
def with_dev(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("with_dev") / "run"
    return out, run_with_dev(made, out)


@pytest.mark.slow
def test_arms_choose_on_dev_and_one_is_recommended(with_dev):
    out, result = with_dev
    rows = {row["name"]: row for row in result["compare"]}
    assert list(rows) == ["uniform", "learned", "learned+validation", *CHOSEN_ON_DEV]
    jobs = json.loads((out / "checkpoints/done.json").read_text())
    for name in ("low_loss_dev", "validation_model"):
        tried = {
            key: job["value"]
            for key, job in jobs.items()
            if key.startswith(f"compare/{name}, ") and key.endswith("%/0")
        }
        shares = {key.split(", ")[1].partition("/")[0]: value["dev"] for key, value in tried.items()}
        chosen = rows[name]["meaning"].rpartition(": ")[2]
        assert len(shares) == 5 and shares[chosen] == min(shares.values())
        assert rows[name]["runs"][0]["dev"] == shares[chosen]  # the first seed is the one it was chosen under
    assert all(1 <= one["step"] <= 4 for one in rows["validation_early_stop"]["runs"])
    for name, row in rows.items():  # the losses of single dev examples, whose means the table has
        share = f", {row['meaning'].rpartition(': ')[2]}" if name in ("low_loss_dev", "validation_model") else ""
        for seed, one in enumerate(row["runs"]):
            kept = jobs[f"compare/{name}{share}/{seed}"]["value"]["dev_losses"]
            assert len(kept) == 8 and np.mean(kept) == pytest.approx(one["dev"], abs=2e-6)
    told = result["recommendation"]
    assert told["use"] in rows and told["sentence"] in (out / "report.html").read_text()
    assert {standing["name"] for standing in told["standings"]} == set(rows)
    typed = read_result(out)
    assert typed.recommendation.use == told["use"] and told["sentence"] in repr(typed)
    weights = [record["validation_weight"] for record in result["records"]]
    assert weights[0] == 1 and result["validation_weight"] == pytest.approx(weights[result["best"]])
    assert rows["learned+validation"]["rows"] == 36 + 8
    assert result["measured"]["passes"] == result["estimate"]["passes"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 12, 40, 90])
def test_with_folds_and_dev_a_stop_changes_no_bit(made, with_dev, tmp_path, stop_at, at):
    """SIGTERM in a training, in a sweep, while an arm chooses on dev, in a retrain."""
    stop_at(at)
    with pytest.raises(session.Interrupted):
        run_with_dev(made, tmp_path / "run")
    run_with_dev(made, tmp_path / "run", "--resume")
    same_run(tmp_path / "run", with_dev[0])


@pytest.mark.slow
def test_dev_judges_the_reliability_at_learned_weights(made, tmp_path, stop_at):
    """Stopped in a step back that carries dev and its halves, and gone on with: the same bits."""
    flags = ("--fast", "--outer.steps", "1", "--outer.reliability-every", "1", "--data.dev", str(made / "dev.jsonl"))
    whole = run(made, tmp_path / "whole", *flags)
    first, second = whole["records"]
    assert [first["reliability_draw"]["agreement"], second["reliability_draw"]["noise"]] == [None, None]
    assert first["reliability_draw"]["noise"] > 0
    assert -1 <= (second["reliability"] or 0) <= 1
    assert second["work"] == 10 * (1 + 1 + 3 + 2 * 2)  # training, replay, the product, and tangents of two more losses
    stop_at(35)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", *flags)
    again = run(made, tmp_path / "run", *flags, "--resume")
    tables = [pq.read_table(tmp_path / folder / "weights.parquet") for folder in ("whole", "run")]
    assert tables[0].equals(tables[1])
    assert again["records"][1]["reliability_draw"] == second["reliability_draw"]


@pytest.mark.slow
def test_one_validation_example_has_no_halves_and_the_verdict_asks_for_more_of_them(made, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text((made / "validation.jsonl").read_text("utf-8").splitlines()[0] + "\n", encoding="utf-8")
    flags = ("--outer.steps", "1", "--outer.reliability-every", "1", "--fast")
    result = run(made, tmp_path / "run", "--data.validation", str(one), *flags)
    assert [record["reliability_draw"]["num_validation"] for record in result["records"]] == [1, 1]
    assert [record["reliability"] for record in result["records"]] == [None, None]
    assert "not measured (one validation example has no halves)" in result["verdict"]["others_reason"]


@pytest.mark.slow
def test_the_loop_stops_where_the_validation_set_is_used_up(made, tmp_path):
    flags = ("--outer.steps", "3", "--outer.reliability-every", "1", "--outer.reliability-floor", "0.999")
    result = run(made, tmp_path / "run", "--fast", *flags)
    assert len(result["records"]) == 2
    assert "the reliability was at most outer.reliability_floor in two measurements in a row (0.999)" in result["ended"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "How far the hypergradients speak for examples" in page
    assert "nobody knows. A dev set would tell" in page


@pytest.mark.parametrize(
    "states, memory_gib, at",
    [
        ("disk", "1e-3", 14),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("host", "1e-3", 27), ("device", "1e-3", 16))),
    ],
)
@pytest.mark.slow
def test_where_states_are_kept_changes_no_bit(made, whole, tmp_path, stop_at, states, memory_gib, at):
    """A tape of three steps, of two where a step is replayed more than once; stopped in a sweep, and gone on with."""
    flags = (
        "--outer.offload",
        states,
        "--outer.memory-gib",
        memory_gib,
        "--certify.no-enabled",
        "--retrain.no-enabled",
    )
    stop_at(at)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", *flags)
    assert (tmp_path / "run/checkpoints/inner/states").exists() == (states == "disk")
    run(made, tmp_path / "run", *flags, "--resume")
    here, there = (pq.read_table(folder / "weights.parquet") for folder in (tmp_path / "run", whole[0]))
    assert here.equals(there)
    assert not (tmp_path / "run/checkpoints/inner/states").exists()


@pytest.mark.slow
def test_linearisations_change_nothing_but_rounding(made, whole, tmp_path, stop_at):
    flags = ("--outer.linearize", "--outer.memory-gib", "2e-2", "--certify.no-enabled", "--retrain.no-enabled")
    run(made, tmp_path / "whole", *flags)
    stop_at(14)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "run", *flags)
    run(made, tmp_path / "run", *flags, "--resume")
    same, resumed, plain = (
        pq.read_table(folder / "weights.parquet") for folder in (tmp_path / "whole", tmp_path / "run", whole[0])
    )
    assert resumed.equals(same)
    np.testing.assert_allclose(same["weight"], plain["weight"], rtol=1e-3)  # float32 through three outer steps


def test_a_flipped_byte_is_refused_and_the_step_before_is_used(made, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    newest = sorted((out / "checkpoints" / "outer").glob("step_*"))[-1]
    damaged = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (out / "checkpoints" / "done.json").unlink()
    with pytest.warns(UserWarning, match=newest.name):
        run(made, out, "--resume")
    same_run(out, whole[0])


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            ("--outer.method", "implicit", "--outer.proximal", "0.5", "--outer.curvature-batches", "2"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--outer.method", "implicit", "--outer.proximal", "0.5", "--lora.r", "2", "--outer.restart", "warm"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--outer.method", "window", "--outer.window", "4", "--outer.weighting", "sigmoid"), marks=pytest.mark.slow
        ),
        ("--outer.method", "alignment", "--outer.weighting", "rater", "--rater.features", "length", "loss"),
        pytest.param(
            (
                "--data.packing",
                "--train.gradient-accumulation-steps",
                "2",
                "--outer.weighting",
                "per_source",
                "--data.source-field",
                "label",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--selection.threshold", "1.0", "--optimizer.max-grad-norm", "0.5"), marks=pytest.mark.slow),
        pytest.param(("--selection.resample", "50", "--data.dev", "--data.validation"), marks=pytest.mark.slow),
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_other_ways(made, tmp_path, flags):
    flags = list(flags)
    if "--data.dev" in flags:  # one file of validation examples, split by id
        flags = [*flags[:2], "--data.dev", "--data.test", "--data.validation", str(made / "test.jsonl")]
        flags += ["--data.split", "0.5", "0.25", "0.25"]
    result = run(made, tmp_path / "run", "--fast", "--outer.steps", "1", *flags)
    table = pq.read_table(tmp_path / "run" / "weights.parquet")
    weights = np.array(table["weight"])
    assert np.isfinite(weights).all() and (weights.std() > 0 or result["best"] == 0)
    assert result["verdict"]["level"] in ("UNDECIDED", "DO NOT BELIEVE") and result["compare"] == []
    if "--selection.resample" in flags:
        assert len((tmp_path / "run" / "selected.jsonl").read_text().splitlines()) == 50
        assert all(result["rows"][part] > 0 for part in ("validation", "dev", "test"))


METHODS = {
    "unrolled": (),
    "linearised": ("--outer.linearize",),
    "Gauss-Newton": (
        *("--outer.method", "implicit", "--outer.curvature", "gauss_newton", "--outer.proximal", "0.5"),
        *("--outer.tolerance", "1e-12"),
    ),
}


@pytest.mark.slow  # tests/runs/test_agreement.py has eight devices, a batch, an estimate and a solve at a time
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_equal_one(made, tmp_path, eight_devices, x64, method):
    smooth = ("--optimizer.eps-root", "1e-6", "--optimizer.learning-rate", "1e-3")  # so that rounding is not amplified
    flags = ("--fast", "--outer.steps", "1", "--model.param-dtype", "float64", *smooth, *METHODS[method])
    entries = {}
    for data, model in ((1, 1), (8, 1), (4, 2)):
        out = tmp_path / f"{data} x {model}"
        run(made, out, *flags, "--mesh.data", str(data), "--mesh.fsdp", str(model))
        entries[data, model] = np.array(pq.read_table(out / "weights.parquet")["hypergradient"])
    one = entries[1, 1]
    assert one.dtype == np.float64
    for other in entries.values():  # sums in another order, through two trainings
        assert np.linalg.norm(one - other) < 1e-9 * np.linalg.norm(one)


@pytest.mark.slow
def test_weights_that_learned_nothing_are_said_to_choose_nothing(made, tmp_path, capsys):
    flags = ["--outer.learning-rate", "1e-30", "--outer.steps", "1", "--certify.no-enabled", "--retrain.no-enabled"]
    result = run(made, tmp_path / "run", *flags)
    told = "all 36 rows weigh the same, so the weights choose nothing: the selection is the first rows in the order"
    assert result["notes"][-1].startswith(told) and told in capsys.readouterr().err
    assert told in (tmp_path / "run" / "report.html").read_text()


RATER = ["--outer.weighting", "rater", "--rater.features", "loss", "length", "--certify.no-enabled",
         "--retrain.no-enabled", "--data.test"]  # fmt: skip
FOLDS = [*RATER, "--rater.folds", "2"]


@pytest.fixture(scope="module")
def with_folds(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("folds") / "run"
    return out, run(made, out, *FOLDS)


def check_fold(made, out, fold, folder):
    """The coefficients without a fold are those of a run on the rest of validation."""
    lines = (made / "validation.jsonl").read_text().splitlines(keepends=True)
    left_out = set(np.random.default_rng((0, 4)).permutation(len(lines))[fold - 1 :: 2])
    path = folder / "rest.jsonl"
    path.write_text("".join(line for place, line in enumerate(lines) if place not in left_out))
    rest = run(made, folder / "rest", *RATER, "--data.validation", str(path))
    row = json.loads((out / "checkpoints" / "done.json").read_text())[f"folds/without fold {fold} of 2"]["value"]
    np.testing.assert_allclose(rest["records"][-1]["coefficients"], row, rtol=1e-3, atol=1e-6)  # float32


@pytest.mark.slow
def test_intervals_of_a_rater_are_over_folds_of_validation(made, with_folds, tmp_path):
    out, result = with_folds
    document = json.loads((out / "rater" / "rater.json").read_text())
    assert document["intervals"] == result["rater_intervals"] == {"over": "folds", "count": 2}
    assert document["coefficients"] == result["rater"]
    assert not (out / "parts" / "without fold 1 of 2").exists()
    done = json.loads((out / "checkpoints" / "done.json").read_text())
    rows = [done[f"folds/without fold {fold} of 2"]["value"] for fold in (1, 2)]
    half_widths = 12.706 * np.abs(np.subtract(*rows)) / 2  # Student's t of 1 degree
    np.testing.assert_allclose([one["half_width"] for one in result["rater"]], half_widths, rtol=1e-4)
    assert done["folds/without fold 1 of 2"]["work"] == result["work"]["folds"] / 2 == 2 * 10 * (1 + 1 + 3)
    assert abs(result["estimate"]["passes"] - result["measured"]["passes"]) < 1e-6  # sums of thirds
    assert "over validation sets, from 2 loops" in (out / "report.html").read_text()
    check_fold(made, out, 1, tmp_path)


@pytest.mark.slow
def test_every_fold_is_left_out_and_a_stop_in_one_changes_no_bit(made, with_folds, tmp_path, stop_at):
    out, result = with_folds
    check_fold(made, out, 2, tmp_path)
    for at in (85, 125):  # in the loops without the first and the second fold
        out = tmp_path / f"stopped at {at}"
        stop_at(at)
        with pytest.raises(session.Interrupted):
            run(made, out, *FOLDS)
        again = run(made, out, *FOLDS, "--output.resume")
        assert again["rater"] == result["rater"] and again["work"] == result["work"], at


@pytest.mark.slow
def test_a_rater_of_vectors_of_a_file_says_in_score_what_it_said_in_select(made, tmp_path):
    examples = [e for name in ("train", "validation") for e in load_rows([str(made / f"{name}.jsonl")])]
    vectors = np.random.default_rng(0).normal(size=(len(examples), 6))
    path = str(tmp_path / "e.parquet")
    pq.write_table(pa.table({"id": [e.id for e in examples], "embedding": vectors.tolist()}), path)
    names = ("--rater.features", "length", "embedding", "embedding_likeness", "--rater.embedding-file", path)
    result = run(made, tmp_path / "run", *RATER[:2], *RATER[5:], *names, "--outer.steps", "1")
    assert [one["name"] for one in result["rater"]][-2:] == ["mean embedding likeness", "nearest embedding likeness"]
    assert path in json.dumps(json.loads((tmp_path / "run" / "inputs.json").read_text())["rater.embedding_file"])
    weights = pq.read_table(tmp_path / "run" / "weights.parquet")["weight"].to_numpy()
    words = ["score", "--rater", tmp_path / "run" / "rater", "--data", made / "train.jsonl", "--out", tmp_path / "out"]
    assert main([*map(str, words), "--score.embedding-file", path, "--output.no-progress"]) == 0
    np.testing.assert_allclose(
        pq.read_table(tmp_path / "out" / "scores.parquet")["weight"].to_numpy(), weights, rtol=1e-4
    )


def test_more_folds_than_validation_examples_are_an_error_before_any_work(made, tmp_path):
    with pytest.raises(
        ValueError, match="rater.folds = 9, and each fold needs a validation example, of which there are 8"
    ):
        run(made, tmp_path / "run", *RATER, "--rater.folds", "9")
    assert not (tmp_path / "run").exists()


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [{"prompt": f"{a}{b}cde>", "response": "abcde", "label": "clean"} for a in "abc" for b in "defg"]
WRONG = {
    "empty file": (["--data.train", []], "no rows"),
    "bad JSON on line 7": (["--data.train", [*GOOD[:6], '{"prompt": "a\n', *GOOD[6:]]], ":7: "),
    "unknown config key": (["CONFIG", "outer: {stepz: 3}\n"], "stepz.*steps"),
    "no response": (["--data.train", [*GOOD, {"prompt": "a>", "answer": "b"}]], r":13: no 'response'.*response_field"),
    "prompt beyond the context": (["--data.train", [*GOOD, {"prompt": "a" * 99, "response": "b"}]], ":13"),
    "one example": (["--data.train", GOOD[:1]], "1 training example; weights compare rows"),
    "no validation examples": (["--data.validation", []], "no rows"),
    "validation in training": (
        ["--data.validation", GOOD[3:5], "--data.train", GOOD],
        "2 training examples also stand in",
    ),
    "folder exists": (["--out", "EXISTS"], "--resume"),
    "NaN loss": (["--optimizer.learning-rate", "1e30"], "training loss is (nan|inf) at step"),
    "no derivative": (["--optimizer.eps-root", "0", "--lora.r", "2"], "eps_root > 0"),
    "no model": (["--model.name-or-path", "nowhere"], "nowhere"),
    "fewer rows than strata": (
        ["--selection.strata", "loss", "--selection.num-strata", "19"],
        r"selection.top_share = 0.5 of 36 rows selects 18, and selection.num_strata = 19",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_clear_error(made, whole, tmp_path, capsys, name):
    given, message = WRONG[name]
    config, flags = made / "select.yaml", ["--out", str(tmp_path / "run"), "--fast"]
    for number, item in enumerate(given):
        if isinstance(item, list):
            flags.append(write(tmp_path / f"rows{number}.jsonl", item))
        elif item == "EXISTS":
            flags.append(str(whole[0]))
        elif item == "CONFIG" or "{" in item:
            config = tmp_path / "wrong.yaml"
            config.write_text(item)
        else:
            flags.append(item)
    assert main(["select", str(config), *flags]) == 1
    told = capsys.readouterr().err.strip()
    assert told.splitlines()[-1].startswith("bilevel-jax: ") or "bilevel-jax: " in told
    import re

    assert re.search(message, told, re.DOTALL), told
    assert "Traceback" not in told


@pytest.mark.slow
def test_duplicates_are_told_and_kept_apart(made, tmp_path, capsys):
    rows = (made / "train.jsonl").read_text().splitlines(keepends=True)
    result = run(
        made,
        tmp_path / "run",
        "--fast",
        "--outer.steps",
        "1",
        "--data.train",
        write(tmp_path / "twice.jsonl", [*rows, rows[0]]),
    )
    assert any("1 training example repeats another row" in note for note in result["notes"])
    ids = pq.read_table(tmp_path / "run" / "weights.parquet")["id"].to_pylist()
    assert ids[0].endswith("#0") and ids[-1] == ids[0].replace("#0", "#1")


@pytest.mark.slow
def test_leaks_can_be_dropped(made, tmp_path):
    rows = (made / "validation.jsonl").read_text().splitlines(keepends=True)
    train = (made / "train.jsonl").read_text().splitlines(keepends=True)
    flags = ["--data.leaks", "drop", "--data.train", write(tmp_path / "leaky.jsonl", [*train, *rows[:3]])]
    result = run(made, tmp_path / "run", "--fast", "--outer.steps", "1", *flags)
    assert result["rows"]["train"] == 36 and any("3 training examples were dropped" in note for note in result["notes"])


def test_resuming_under_another_config_is_refused(made, whole, capsys):
    assert (
        main(["select", str(made / "select.yaml"), "--out", str(whole[0]), "--resume", "--train.max-steps", "11"]) == 1
    )
    assert "train.max_steps" in capsys.readouterr().err


@pytest.mark.slow
def test_examples_without_a_label_count_as_neither_good_nor_bad(made, tmp_path):
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    nobody_looked = range(0, len(rows), 3)
    for place in nobody_looked:
        rows[place]["label"] = None
    (tmp_path / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data.train", str(tmp_path / "part.jsonl"), "--certify.no-enabled", "--outer.steps", "1"]
    result = run(made, tmp_path / "out", *data, "--retrain.variants", "uniform", "oracle")
    table = pq.read_table(tmp_path / "out" / "weights.parquet").to_pandas()
    assert sum(table["label"].isna()) == len(nobody_looked)

    def area_by_hand(scores):
        good, other = scores[table["label"] == "clean"], scores[table["label"].isin(["wrong", "noise"])]
        return np.mean([(a > b) + (a == b) / 2 for a in good for b in other])

    scores = {"weights": table["weight"], "first_hypergradient": -table["first_hypergradient"],
              "alignment": -table["alignment"], "low_loss": -table["loss"]}  # fmt: skip
    assert result["auc"] == pytest.approx({name: area_by_hand(values) for name, values in scores.items()}, abs=1e-12)
    num_good = int((table["label"] == "clean").sum())
    assert result["labels"] == {"good": num_good, "other": 24 - num_good, "unlabelled": 12}
    oracle = result["compare"][1]
    assert oracle["rows"] == num_good and oracle["meaning"].endswith("; 12 have no label")
    told = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert "Examples without a label, 12 here, count as neither." in told
    assert any(note.startswith("12 of 36 training examples have no label: AUC, F1") for note in result["notes"])


@pytest.mark.slow
def test_every_json_file_of_a_run_is_json(made, tmp_path, stop_at):
    """Labels of one kind have no AUC: it is nan in the records, in a checkpoint and in the result."""
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["label"] = "clean" if row["label"] == "clean" else None
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.train", str(tmp_path / "one.jsonl"), "--outer.steps", "1", "--retrain.variants", "uniform"]
    stop_at(30)
    with pytest.raises(session.Interrupted):
        run(made, tmp_path / "out", *flags)

    def read_strictly():
        def refuse(name):
            raise AssertionError(f"{name} in {path}")

        paths = [path for path in (tmp_path / "out").rglob("*.json*") if path.is_file()]
        for path in paths:
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(text, parse_constant=refuse)
        return {path.name for path in paths}

    assert "manifest.json" in read_strictly()  # of a checkpoint
    result = run(made, tmp_path / "out", *flags, "--resume")
    assert {"result.json", "log.jsonl", "selected.jsonl"} <= read_strictly()
    assert all(np.isnan(value) for value in result["auc"].values())
    assert set(json.loads((tmp_path / "out" / "result.json").read_text())["auc"].values()) == {None}
