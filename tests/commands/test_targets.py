"""Commands whose validation examples judge by another loss than that of training."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main

FUNCTIONS = '''
import jax.numpy as jnp
from bilevel_jax.lm import sequence_log_likelihoods


def distance(params):
    """Of the first weights from a picture."""
    picture = jnp.linspace(-1, 1, params["norm"]["scale"].shape[0])
    return jnp.mean((params["norm"]["scale"] - picture) ** 2)


def response_losses(decoder):
    log_likelihoods = sequence_log_likelihoods(decoder)
    return lambda params, batch: -log_likelihoods(params, batch)


def constant(decoder):
    return lambda params, batch: jnp.zeros(batch["index"].shape)


def sometimes_nan(decoder):
    losses = response_losses(decoder)
    return lambda params, batch: jnp.where(batch["index"] == 7, jnp.nan, losses(params, batch)[::2])


def pairs(decoder):
    losses = response_losses(decoder)
    return lambda params, batch: losses(params, batch)[::2]
'''
SMALL = ["--certify.no-enabled", "--retrain.no-enabled", "--output.no-progress"]


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """The pairs of validation and test by two sources, a function file, and the flags that name them."""
    folder = tmp_path_factory.mktemp("targets")
    for part, name in (("validation", "pairs_validation"), ("test", "pairs_report")):
        rows = [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]
        for place, row in enumerate(rows):
            row["source"] = "helpful" if place % 3 else "harmless"
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in (made / "test.jsonl").read_text().splitlines()][:6]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "targets.py").write_text(FUNCTIONS)
    return folder


def flags(made, files, *more):
    return [
        str(made / "select.yaml"), "--data.validation", str(files / "validation.jsonl"),
        "--data.test", str(files / "test.jsonl"), "--optimizer.eps-root", "1e-6", *more,
    ]  # fmt: skip


SEVERAL = [
    "--target.sources", "helpful", "harmless", "parameters", "--target.coefficients", "0.7", "0.3", "0.5",
    "--target.losses", "simpo", "dpo",
]  # fmt: skip


def with_reported(files):
    """SEVERAL, and a target that judges nothing."""
    words = [*SEVERAL, f"{files}/targets.py:distance", "sft"]
    words.insert(words.index("parameters") + 1, "other")
    words.insert(words.index("0.5") + 1, "0")
    return words


@pytest.fixture(scope="module")
def several(made, files, tmp_path_factory):
    """A run of `select` with three targets, its validation examples being pairs, and single responses of coefficient 0
    beside those of test."""
    out = tmp_path_factory.mktemp("several") / "run"
    arguments = flags(made, files, *with_reported(files), "--out", str(out))
    arguments.insert(arguments.index(f"{files}/test.jsonl"), f"{files}/other.jsonl")
    assert main(["select", *arguments, "--retrain.variants", "uniform", "learned", "validation", "oracle"]) == 0
    return out


def test_several_targets_are_reported_each(several):
    result = json.loads((several / "result.json").read_text())
    assert result["unit"] == "units of the sum of targets" and result["right"] == "pair accuracy of helpful"
    assert [target["coefficient"] for target in result["targets"]] == [0.7, 0.3, 0.5, 0]
    for line in result["compare"]:
        for run in line["runs"]:
            for part in ("validation", "test"):
                helpful, harmless, parameters, other = run["targets"][part]
                total = 0.7 * helpful["loss"] + 0.3 * harmless["loss"] + 0.5 * parameters["loss"]
                assert total == pytest.approx(run[part], rel=1e-5)
                assert 0 <= helpful["accuracy"] <= 1 and parameters["accuracy"] is None
                assert other["name"] == "other" and (other["loss"] is None) == (part == "validation")
            assert run["accuracy"] == run["targets"]["test"][0]["accuracy"]
    exact = result["certificates"]["uniform weights"]["exact"]
    assert exact["ratios"][0] == pytest.approx(1, abs=0.05)  # at a step of 10 %
    page = (several / "report.html").read_text()
    assert "0.7 helpful + 0.3 harmless + 0.5 parameters:" in page and "(Pareto)" in page
    assert "Reported beside it, judging nothing: other." in page and "nats per token" in page
    assert result["rows"]["test"] == 16 and any("Reported beside it: sft of other." in note for note in result["notes"])
    assert [line["name"] for line in result["compare"]] == ["uniform", "learned", "oracle"]
    assert "validation trains on validation examples, and here they judge by another loss" in result["absent_arms"][0]


def test_inspect_and_estimate_tell_the_targets_apart(made, files, tmp_path, capsys):
    arguments = flags(made, files, *with_reported(files))
    arguments.insert(arguments.index(f"{files}/test.jsonl"), f"{files}/other.jsonl")
    own = [word for word in arguments if word not in ("--optimizer.eps-root", "1e-6")]
    assert main(["inspect", *own, "--show.width", "200"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("validation: helpful", "test: harmless", "test: other"))
    assert main(["estimate", *arguments, "--estimate.no-compile", "--out", str(tmp_path)]) == 0
    estimated = json.loads((tmp_path / "estimate.json").read_text())
    assert any("Reported beside it: sft of other." in note for note in estimated["notes"])
    assert estimated["disk"]["log-probabilities of the reference"] > 0


@pytest.mark.slow
def test_estimate_compiles_a_validation_batch_of_each_target(made, files, tmp_path, capsys):
    arguments = flags(made, files, *SEVERAL, f"{files}/targets.py:distance", "--out", str(tmp_path))
    assert main(["estimate", *arguments]) == 0
    estimated = json.loads((tmp_path / "estimate.json").read_text())
    slopes = {name: step["flops"] for name, step in estimated["programs"].items() if name.startswith("slope")}
    assert list(slopes) == ["slope, helpful", "slope, harmless", "slope, parameters"]
    assert slopes["slope, helpful"] == slopes["slope, harmless"] > estimated["programs"]["forward"]["flops"]
    assert slopes["slope, parameters"] == 0 and estimated["speed"]["slope, helpful"] > 0
    assert "slope of L_v, harmless" in capsys.readouterr().out
    largest = max(estimated["programs"][name]["workspace"] for name in slopes)
    [phase] = [phase for phase in estimated["phases"] if phase["name"] == "slope"]
    assert phase["parts"]["workspace"] == largest


@pytest.mark.slow
def test_the_split_of_a_step_changes_nothing(made, files, several, tmp_path):
    arguments = flags(made, files, *SEVERAL, f"{files}/targets.py:distance", *SMALL, "--out", str(tmp_path / "run"))
    assert main(["select", *arguments, "--train.gradient_accumulation_steps", "4"]) == 0
    whole, split = (
        pq.read_table(folder / "weights.parquet")["first_hypergradient"].to_numpy()
        for folder in (several, tmp_path / "run")
    )
    np.testing.assert_allclose(split, whole, rtol=2e-3, atol=1e-4 * abs(whole).max())


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(made, files, several, tmp_path, stop_at):
    out = tmp_path / "run"
    arguments = flags(made, files, *SEVERAL, f"{files}/targets.py:distance", *SMALL, "--out", str(out))
    stop_at(30)
    assert main(["select", *arguments]) == 128 + 15
    assert main(["select", *arguments, "--resume"]) == 0
    for name in ("weight", "first_hypergradient"):
        columns = [pq.read_table(folder / "weights.parquet")[name].to_numpy() for folder in (several, out)]
        np.testing.assert_array_equal(*columns)


@pytest.mark.slow
def test_a_changed_function_is_another_run(made, files, tmp_path, stop_at, capsys):
    (tmp_path / "own.py").write_text((files / "targets.py").read_text())
    arguments = flags(
        made, files, "--target.losses", f"{tmp_path}/own.py:pairs", *SMALL, "--out", str(tmp_path / "run")
    )
    stop_at(20)
    assert main(["select", *arguments]) == 128 + 15
    (tmp_path / "own.py").write_text((files / "targets.py").read_text().replace("[::2]", "[::2] * 3"))
    assert main(["select", *arguments, "--resume"]) == 1
    assert "target.losses" in (error := capsys.readouterr().err) and "started with other files" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    (
        ["--outer.method", "implicit", "--outer.proximal", "0.1", "--outer.curvature_batches", "2"],
        ["--outer.method", "penalty", "--single_loop.steps", "8"],
        ["--outer.method", "bmo", "--single_loop.steps", "8"],
        ["--outer.method", "mixing", "--single_loop.steps", "8"],
        ["--outer.estimate", "auto"],
        ["--outer.weighting", "rater", "--rater.features", "length", "loss"],
    ),
    ids=lambda more: more[1],
)
def test_every_method_takes_targets(made, files, tmp_path, more):
    arguments = flags(made, files, *SEVERAL, f"{files}/targets.py:distance", *SMALL, *more)
    assert main(["select", *arguments, "--out", str(tmp_path / "run")]) == 0
    weights = pq.read_table(tmp_path / "run" / "weights.parquet")["weight"].to_numpy()
    assert np.isfinite(weights).all()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ("simpo", "dpo"))
def test_compare_audit_and_refine_take_targets(made, files, tmp_path, loss):
    given = ["--data.validation", str(files / "validation.jsonl"), "--data.test", str(files / "test.jsonl")]
    given += ["--target.losses", loss, "--output.no-progress", "--mesh.data", "1"]
    text = (made / "select.yaml").read_text()
    text = re.sub(r"(?m)^(certify|retrain|selection):.*\n", "", text)
    (tmp_path / "compare.yaml").write_text(
        text + "compare: {methods: [unrolled, penalty, bmo, mixing], budget: 200, seeds: 1}\n"
    )
    (tmp_path / "audit.yaml").write_text(
        text.replace("outer: {steps: 2, patience: 0, learning_rate: 0.1}", "outer: {proximal: 0.1}")
        + "audit: {queries: 2, subsets: 8, removed: [0.5], checkpoints: [end]}\n"
    )
    assert main(["compare", str(tmp_path / "compare.yaml"), *given, "--out", str(tmp_path / "compare")]) == 0
    assert main(["audit", str(tmp_path / "audit.yaml"), *given, "--out", str(tmp_path / "audit")]) == 0
    shutil.copy(files / "test.jsonl", tmp_path / "dev.jsonl")
    refined = [*given[:2], "--data.dev", str(tmp_path / "dev.jsonl"), *given[4:], "--data.split", "1", "0", "0"]
    config = re.sub(r"(?m)^  test:.*\n", "", (made / "refine.yaml").read_text())
    (tmp_path / "refine.yaml").write_text(config)
    assert main(["refine", str(tmp_path / "refine.yaml"), *refined, "--out", str(tmp_path / "refine")]) == 0
    units = [
        json.loads((tmp_path / name / "result.json").read_text())["unit"] for name in ("compare", "audit", "refine")
    ]
    assert units == ["nats per pair"] * 3


@pytest.mark.slow
def test_a_function_of_parameters_needs_no_validation_examples(made, files, tmp_path):
    arguments = ["--target.sources", "parameters", "--target.losses", f"{files}/targets.py:distance", "--data.test"]
    text = re.sub(r"(?m)^  (validation|test):.*\n", "", (made / "select.yaml").read_text())
    (tmp_path / "select.yaml").write_text(text)
    assert main(["select", str(tmp_path / "select.yaml"), *arguments[:-1], "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["rows"] == {"train": 36, "validation": 0} and result["right"] == ""
    assert "reads no examples" in result["verdict"]["others_reason"]
    told = result["recommendation"]
    assert [one["dev_loss"] for one in told["standings"]] == [row["mean"]["validation"] for row in result["compare"]][
        :2
    ]
    assert "a loss without examples, 1 seed" in told["sentence"]
    assert "nothing but the seeds can be chance" in (tmp_path / "run" / "report.html").read_text()


MISUSES = {
    "unknown source": (["--target.sources", "helpful", "harmles"], "its source is 'harmless', which no target reads"),
    "no pairs": (["--target.losses", "sft"], "where validation examples alone are pairs, target.losses"),
    "no target": ([], "a preference pair, and objective.name = sft reads single responses"),
    "pairs, and sft beside": (
        ["--target.sources", "helpful", "harmless", "--target.losses", "sft"],
        "a preference pair, and target.losses = sft reads single responses",
    ),
    "loss": (["--target.losses", "rouge"], "each must be sft, dpo, simpo or path/to/file.py:function"),
    "numbers": (
        ["--target.sources", "helpful", "harmless", "--target.coefficients", "1"],
        "give one number for each of target.sources, at least one of them not 0",
    ),
    "zeros": (
        ["--target.sources", "helpful", "harmless", "--target.coefficients", "0", "0"],
        "give one number for each of target.sources, at least one of them not 0",
    ),
    "reported nowhere": (
        [
            "--target.losses",
            "simpo",
            "--target.sources",
            "helpful",
            "harmless",
            "other",
            "--target.coefficients",
            "1",
            "1",
            "0",
        ],
        "'other' has coefficient 0, so it is read on dev and test alone, and has no example there",
    ),
    "three of two": (
        ["--target.losses", "simpo", "--target.sources", "helpful", "harmless", "--target.beta", "1", "2", "3"],
        "target.beta = (1.0, 2.0, 3.0): give one for all targets, or one for each of target.sources",
    ),
    "a margin of dpo": (
        [
            "--target.losses",
            "simpo",
            "dpo",
            "--target.sources",
            "helpful",
            "harmless",
            "--target.gamma-ratio",
            "1",
            "2",
        ],
        "target.gamma_ratio = (1.0, 2.0): give one for all targets, or one for each of target.sources, with -1",
    ),
    "parameters without a function": (
        ["--target.losses", "simpo", "--target.sources", "helpful", "harmless", "parameters"],
        "parameters has no examples: give it a path/to/file.py:function",
    ),
    "no file": (["--target.losses", "nowhere.py:f"], "target.losses names nowhere.py, which is no file"),
    "no function": (["--target.losses", "{files}/targets.py:f"], "has no function 'f'; it has"),
    "constant": (
        ["--target.losses", "{files}/targets.py:constant"],
        "does not depend on the parameters",
    ),
    "nan": (["--target.losses", "{files}/targets.py:sometimes_nan"], "is nan with a gradient of norm"),
    "sequences": (["--target.losses", "{files}/targets.py:response_losses"], "a preference pair is one example of two"),
    "unread": (
        ["--target.sources", "parameters", "--target.losses", "{files}/targets.py:distance"],
        "the target 'parameters' reads no examples, and examples are given",
    ),
    "rater": (
        ["--target.losses", "simpo", "--outer.weighting", "rater"],
        "rater.features validation_loss read validation examples as they read training examples",
    ),
    "folds": (
        ["--target.losses", "simpo", "--outer.validation_folds", "2"],
        "trains on validation examples by the training loss",
    ),
    "pooled": (
        ["--target.losses", "simpo", "--outer.estimate", "pooled"],
        "pooling compares examples by models of two halves of one validation set, and here",
    ),
    "warm start": (
        ["--target.losses", "simpo", "--outer.warm_start", "ica"],
        "the score 'ica' reads validation examples as it reads training examples",
    ),
}


@pytest.mark.parametrize("more, said", MISUSES.values(), ids=MISUSES)
def test_a_misuse_is_one_sentence(made, files, tmp_path, capsys, more, said):
    more = [word.replace("{files}", str(files)) for word in more]
    assert main(["select", *flags(made, files, *more, *SMALL), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert said in error.strip().splitlines()[-1], error
