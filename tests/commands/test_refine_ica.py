"""`refine` with weights that are in-context scores of every round: what they are, how they drift, what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from bilevel_jax.commands.refine.report import format_drift
from bilevel_jax.commands.refine.run import count_rounds_work, prepare_refine_task, refine
from bilevel_jax.commands.refine.scored import check_scores, correlate_scores, score_rows, scores_to_weights
from bilevel_jax.lm import models
from bilevel_jax.runs.config.load import RefineConfig, load_config
from bilevel_jax.runs.config.schema import ScoresSection, ScoreWeightsSection
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.scoring.likelihoods import TaskLikelihoods, train_and_validation_rows
from bilevel_jax.scores import incontext
from bilevel_jax.scores.demonstrations import demonstration_selector
from tests.commands.test_refine import NEEDED, answered, build_round_task, same
from tests.commands.typed_results import check_columns

ALONE = (
    "--outer.steps", "8", "--outer.weighting", "softmax", "--single-loop.steps", "0", "--single-loop.eval-steps", "50",
    "--scores.k", "1",
)  # fmt: skip
"""The defaults again where refine.yaml has others, which methods without steps of weights refuse."""
ICA = ("--refine.methods", "uniform", "ica", "--refine.questions", "fixed", *ALONE)
DYNAMIC = ("--refine.methods", "ica", "--refine.questions", "dynamic", *ALONE)


@pytest.fixture(scope="module")
def config(made):
    return made / "refine.yaml"


def run(config, out, *flags):
    return refine(load_config(RefineConfig, config, [*flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run: (its folder, its result)."""
    out = tmp_path_factory.mktemp("refine") / "run"
    return out, run(config, out, *ICA)


@pytest.fixture(scope="module")
def ready(config, tmp_path_factory):
    """(config, the offline task, a round's task) without a run."""
    from bilevel_jax.commands.refine.run import make_generator_factory

    settings = load_config(RefineConfig, config, ICA)
    folder = tmp_path_factory.mktemp("ready")
    (folder / "checkpoints").mkdir()
    task = prepare_refine_task(settings, folder)
    with session.open_session(folder, progress=False, save_seconds=1e9) as work:
        write = make_generator_factory(settings.generate, task.decoder, task.tokenizer, task.mesh, work)
        found = answered((settings, task, write), folder)
    return settings, task, build_round_task(settings, task, found, 0)


def rows_of(out, number):
    table = pq.read_table(out / "weights.parquet").to_pandas()
    return table[table["round"] == number].set_index("id")


def plain_scores(task, params, folder, k=1):
    """ICA of every row by its own plan, without the machinery of a round."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    candidates, holdout = train_and_validation_rows(task)
    form = incontext.make_demonstration_format(task.tokenizer)
    score = incontext.ica_score(form, demonstration_selector("knn"), k=k, max_length=task.architecture.max_length)
    plan = score(candidates, holdout)
    with session.open_session(folder, progress=False, save_seconds=1e9) as work:
        return plan.combine(TaskLikelihoods(task, params, work)(plan.requests))


def test_all_rows_are_scored_by_the_model_that_training_starts_from(ready, tmp_path):
    """Responses as offline rows; also where training does not start from the model that answered."""
    settings, task, made = ready
    params = jax.tree.map(lambda leaf: leaf + 0.05, task.init_params(0))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with session.open_session(tmp_path / "run", progress=False, save_seconds=1e9) as work:
        scores = score_rows(settings, made.task, params, work, 0)
        assert work.work_done == scores.facts["work"] > 0
        again = score_rows(settings, made.task, params, work, 0)
        np.testing.assert_array_equal(again.values, scores.values)
        assert work.work_done == scores.facts["work"]  # a job that is finished counts once
    expected = plain_scores(made.task, params, tmp_path / "plain")
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)  # float32
    assert np.isfinite(expected).all() and np.std(expected[made.response_numbers >= 0]) > 0.01


@pytest.mark.parametrize("scaling", ["examples", "quantiles", "ranks"])
def test_weights_are_scaled_scores_of_mean_one_over_the_multiplicity(ready, scaling):
    """By hand; splitting a row into two that count half moves no min-max weight."""
    _, _, made = ready
    values = np.random.default_rng(0).normal(size=made.task.num_examples)
    weights = scores_to_weights(ScoreWeightsSection(scaling, 0.1), made, values)
    low, high = np.quantile(values, [0.1, 0.9]) if scaling == "quantiles" else (values.min(), values.max())
    scaled = (np.clip(values, low, high) - low) / (high - low)
    if scaling == "ranks":
        scaled = np.argsort(np.argsort(values)) / (len(values) - 1)
    np.testing.assert_allclose(weights / weights.max(), scaled, atol=1e-12)
    assert (made.multiplicity * weights).sum() == pytest.approx(made.multiplicity.sum())


def test_rows_that_count_nothing_and_rows_without_a_score(ready):
    _, _, made = ready
    values = np.arange(float(made.task.num_examples))
    values[3] = np.nan
    without = made._replace(multiplicity=np.where(values == np.nanmax(values), 0, made.multiplicity))
    weights = scores_to_weights(ScoreWeightsSection(), without, values)
    assert weights[3] == weights[0] == 0 == weights[-1]  # the last counts nothing, and so is not the largest
    assert weights[-2] == weights.max() > 1
    equal = scores_to_weights(ScoreWeightsSection(), made, np.ones(len(values)))
    np.testing.assert_allclose(equal, 1)  # they say nothing


# ---- a run


def test_the_typed_result_holds_the_scores(whole):
    columns = {"ids": "id", "weights": "weight", "scores": "score"}
    typed, _ = check_columns(whole[0], "weights.parquet", columns)
    assert np.isfinite(typed.scores).all() and np.isnan(typed.rewards).all()


def test_a_round_weighs_by_its_scores_and_tells_their_drift(whole):
    out, result, first, second = *whole, rows_of(whole[0], 0), rows_of(whole[0], 1)
    assert {record["judge"] for record in result["records"]} == {"ica"} and result["accepted"] == 2
    for rows in (first, second):
        scaled = (rows["score"] - rows["score"].min()) / (rows["score"].max() - rows["score"].min())
        scaled *= rows["base"].sum() / (rows["base"] * scaled).sum()
        np.testing.assert_allclose(rows["weight"], scaled, rtol=1e-5, atol=1e-6)
        assert rows["generated"].sum() == 18 and rows["score"].notna().all()
    common = first.index[~first["generated"]]
    assert set(common) == set(second.index[~second["generated"]])  # fixed questions leave the same rows
    expected = spearmanr(first.loc[common, "score"], second.loc[common, "score"]).statistic
    at_first, drift = (record["scores"] for record in result["records"])
    assert at_first["first"] is at_first["previous"] is None
    assert drift["first"] == drift["previous"] == {"spearman": pytest.approx(expected, abs=1e-6), "rows": len(common)}
    assert expected < 0.99 and drift["rows"] == len(second)
    assert "forward passes" in result["estimands"]["ica"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in log if line["event"] == "round"] == [
        record["scores"] for record in result["records"]
    ]
    page = " ".join((out / "report.html").read_text().split())
    assert "How fast old scores go out of date" in page and f"{expected:.2f} (27)" in page.replace("−", "-")
    assert format_drift(result["records"][1]).strip() == f"scores agree with those before {expected:.2f}".replace(
        "-", "−"
    )
    assert format_drift({"step": 0}) == ""  # a run of an earlier version


def test_responses_are_scored_again_by_the_model_that_they_led_to(config, whole, tmp_path):
    """The last round's, by the model that the run wrote."""
    out, result = whole
    settings = load_config(RefineConfig, config, ICA)
    task = prepare_refine_task(settings, tmp_path)
    params = models.load_model(out / "model", dtype=jnp.float32)[1]
    rows, written = rows_of(out, 1), pq.read_table(out / "responses.parquet").to_pandas()
    written = written[written["round"] == 1].set_index("id")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    candidates, holdout = train_and_validation_rows(task)
    form, choose = incontext.make_demonstration_format(task.tokenizer), demonstration_selector("knn")
    shown = dict(zip([example.id for example in task.examples], choose(candidates, holdout, 1)[:, 0], strict=True))
    requests = []
    for _, line in written.iterrows():
        at = next(at for at, example in enumerate(task.examples) if example.id == line["question"])
        ids = candidates.sequences(at)[0].ids.tolist()
        prompt = ids[: int(np.argmax(candidates.sequences(at)[0].target_mask))]
        piece = form.format_demonstration(holdout.sequences(int(shown[line["question"]]))[0])
        head = [*form.format_context([piece]), *prompt[form.count_skipped(candidates.sequences(at)[0]) :]]
        requests += [(prompt, line["tokens"].tolist()), (head, line["tokens"].tolist())]
    logits = jax.jit(
        lambda ids: (
            task.decoder.hidden(params, ids[None], jnp.arange(len(ids))[None], jnp.ones((1, len(ids)), int))[0]
            @ task.decoder.head(params)
        )
    )
    nats = []
    for prefix, response in requests:
        log_p = jax.nn.log_softmax(logits(jnp.array(prefix + response, jnp.int32)))
        nats.append(np.mean([log_p[len(prefix) + at - 1, token] for at, token in enumerate(response)]))
    again = np.array(nats[1::2]) - np.array(nats[::2])
    before = rows.loc[written.index, "score"]
    expected = spearmanr(before, again).statistic
    told = result["records"][1]["scores"]["responses"]
    assert told["rows"] == 18 and told["spearman"] == pytest.approx(expected, abs=0.01)  # near ties, float32


def test_the_plan_counts_the_scores(whole, config, tmp_path):
    """It is the most: requests that share prefixes take less, and so does what is not scored again."""
    settings = load_config(RefineConfig, config, ICA)
    planned = count_rounds_work(settings, prepare_refine_task(settings, tmp_path))
    done = sum(record["work"] for record in whole[1]["records"])
    assert 0.5 * planned < done <= planned
    uniform, scored = whole[1]["records"][0]["candidates"]
    assert uniform["work"] == 6 and scored["work"] == 6 + whole[1]["records"][0]["scores"]["work"]


def test_dynamic_begins_with_the_rows_of_the_least_scores(config, tmp_path):
    result = run(config, tmp_path / "run", *DYNAMIC, "--refine.rounds", "1", "--scores.demonstration-sets", "2")
    settings = load_config(RefineConfig, config, [*DYNAMIC, "--refine.rounds", "1"])
    task = prepare_refine_task(settings, tmp_path)
    params, rows = task.init_params(0), rows_of(tmp_path / "run", 0)
    chosen = demonstration_selector("knn")(*train_and_validation_rows(task), 2)
    form, by_set = incontext.make_demonstration_format(task.tokenizer), []
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    with session.open_session(tmp_path, progress=False, save_seconds=1e9) as work:
        for place in range(2):
            shown = chosen[:, place : place + 1]
            plan = incontext.ica_score(form, lambda *given, shown=shown: shown, k=1, max_length=32)(
                *train_and_validation_rows(task)
            )
            by_set.append(plan.combine(TaskLikelihoods(task, params, work)(plan.requests)))
    least = np.argsort(np.mean(by_set, axis=0), kind="stable")[:9]
    assert set(rows[rows["generated"]]["question"]) == {task.examples[row].id for row in least}
    assert rows["score_standard_error"].gt(0).all() and result["records"][0]["scores"]["standard_error"] > 0
    planned = count_rounds_work(settings, task)
    assert planned > count_rounds_work(replace(settings, refine=replace(settings.refine, questions="fixed")), task)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow), 5, *[
    pytest.param(count, marks=pytest.mark.slow) for count in (8, 15, 16, 20, 26)
]])  # fmt: skip
def test_stopped_anywhere_and_resumed_changes_no_bit(config, whole, tmp_path, stop_at, count):
    stop_at(count)
    with pytest.raises(session.Interrupted):
        run(config, tmp_path / "run", *ICA)
    run(config, tmp_path / "run", *ICA, "--resume")
    same(whole[0], tmp_path / "run")
    drifts = [
        [record["scores"] | {"seconds": 0} for record in json.loads((out / "result.json").read_text())["records"]]
        for out in (whole[0], tmp_path / "run")
    ]
    assert drifts[0] == drifts[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--refine.start-from", "first", "--scores.demonstrations", "random"),
        ("--scores.demonstrations", "clustered:3", "--weights.scaling", "quantiles", "--weights.quantile", "0.1"),
        ("--refine.methods", "ica", "unrolled", "--refine.questions", "dynamic", "--weights.scaling", "ranks"),
        ("--refine.questions", "none", "--lora.r", "2", "--scores.embedding", "hidden"),
        ("--refine.verifier-use", "filter", "--refine.keep-offline"),
    ],
    ids=lambda flags: flags[1],
)
def test_every_arm_runs(config, tmp_path, flags):
    arm = ALONE if "--refine.methods" in flags else ICA
    result = run(config, tmp_path / "run", *arm, *flags)
    assert len(result["records"]) == 2 and np.isfinite(result["test"]["last"])
    drift = result["records"][1]["scores"]
    if "first" in flags:  # the same model scores the same rows
        assert drift["first"]["spearman"] == pytest.approx(1) and drift["responses"] is None


def test_a_correlation_takes_rows_of_both():
    drift = correlate_scores({"a": 1.0, "b": 2.0, "c": 0.0, "x": 9.0}, {"a": 5.0, "b": 7.0, "c": 1.0, "y": -9.0})
    assert drift == {"spearman": pytest.approx(1), "rows": 3}
    assert correlate_scores({"a": 1.0}, {"a": 1.0, "b": 0.0}) is None
    assert correlate_scores({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}) == {"spearman": None, "rows": 2}


# ---- refusals

REFUSED = {
    "it is for ica, which refine.methods does not name: leave the section out": (
        "--refine.methods", "uniform", "--scores.k", "2",
    ),
    "weights: it is for ica": ("--refine.methods", "uniform", "--weights.scaling", "ranks"),
    "ica weighs by scores: leave one of them out": (
        "--refine.methods", "ica", "uniform", "--refine.generator", "reinforce",
    ),
    "it is for the score oneshot, and refine scores by ica alone": ("--refine.methods", "ica", "--scores.anchors", "8"),
    "it is for the score reducible, and": ("--refine.methods", "ica", "--scores.holdout-steps", "8"),
    "responses are not in the file": (
        "--refine.methods", "ica", "--scores.embedding", "file", "--scores.embedding-file", "x",
    ),
    "no other method of refine.methods makes steps of weights": (
        "--refine.methods", "ica", "uniform", "--outer.learning-rate", "1",
    ),
    "it is for penalty, bmo, mixing, and refine.methods names none": (
        "--refine.methods", "ica", "unrolled", "--single-loop.steps", "9",
    ),
    "it is for weights.scaling = quantiles": ("--refine.methods", "ica", "--weights.quantile", "0.1"),
    "a target of the parameters alone has none: leave ica out": (
        "--refine.methods", "ica", "--target.sources", "parameters", "--target.losses", "x.py:f",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused(words):
    with pytest.raises(ValueError, match=words):
        load_config(RefineConfig, None, [*NEEDED, *REFUSED[words]])


def test_what_the_data_lack_is_told_before_any_work(config, made, tmp_path):
    with pytest.raises(
        ValueError, match=r"longest example has 12 tokens with its response, and scores.k = 3 .* 30 more"
    ):
        run(config, tmp_path / "a", *ICA, "--scores.k", "3")
    with pytest.raises(ValueError, match="8 validation examples, and scores.k = 9 takes 9 of them"):
        run(config, tmp_path / "b", *ICA, "--scores.k", "9")
    with pytest.raises(ValueError, match="scores.k = 1 in 9 sets takes 9 of them"):
        run(config, tmp_path / "b", *ICA, "--scores.demonstration-sets", "9")
    with pytest.raises(ValueError, match="demonstrations are 'nearest'; they are 'knn'"):
        run(config, tmp_path / "c", *ICA, "--scores.demonstrations", "nearest")
    pairs = str(made / "pairs_validation.jsonl")
    with pytest.raises(ValueError, match="judge by another loss .section target.. Leave ica out"):
        split = ("--data.dev", "--data.test", "--data.split", "0.5", "0.5", "0")
        run(config, tmp_path / "d", *ICA, "--data.validation", pairs, *split, "--target.losses", "simpo")
    assert not list(tmp_path.iterdir())


def test_checks_leave_what_fits(ready):
    settings, task, _ = ready
    longest = task.architecture.max_length - 10  # of one demonstration of 10 tokens
    check_scores(replace(settings, scores=ScoresSection(k=1)), task, longest)
    with pytest.raises(ValueError, match="Lower scores.k or generate.max_new_tokens"):
        check_scores(replace(settings, scores=ScoresSection(k=1)), task, longest + 1)
