"""The command `refine`: what a round is made of, what it writes, that it stops and goes on, what it refuses."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.commands.refine.candidates import (
    _pull_back_per_whole,
    _step,
    hyper_to_weights,
    make_candidate_trainers,
)
from bilevel_jax.commands.refine.report import describe_refused_steps, format_reliability
from bilevel_jax.commands.refine.rollouts import (
    average_question_weights,
    build_round_task,
    choose_questions,
    collect_rollouts,
)
from bilevel_jax.commands.refine.run import (
    count_rounds_work,
    make_generator_factory,
    prepare_refine_task,
    refine,
)
from bilevel_jax.core import certify
from bilevel_jax.lm import models
from bilevel_jax.lm.losses import sft
from bilevel_jax.lm.losses.importance import importance_weighted_losses
from bilevel_jax.runs.config.load import RefineConfig, load_config
from bilevel_jax.runs.infra import session
from bilevel_jax.runs.scoring.likelihoods import fingerprint_params
from bilevel_jax.runs.stats import bootstrap_paired_gain
from tests.commands.typed_results import check_columns
from tests.tiny_task import count_traces_by_round, stop_session_at


@pytest.fixture(scope="module")
def config(made):
    return made / "refine.yaml"


def run(config, out, *flags):
    return refine(load_config(RefineConfig, config, [*flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One uninterrupted run: (its folder, its result, how often the model had been traced after each round)."""
    out = tmp_path_factory.mktemp("refine") / "run"
    result, counts = count_traces_by_round(lambda: run(config, out))
    return out, result, counts


@pytest.fixture(scope="module")
def ready(config, tmp_path_factory):
    """(config, the offline task, the model's generator) without a run."""
    settings = load_config(RefineConfig, config, ["--refine.share", "0.25"])
    folder = tmp_path_factory.mktemp("ready")
    (folder / "checkpoints").mkdir()
    task = prepare_refine_task(settings, folder)
    with session.open_session(folder, progress=False, save_seconds=1e9) as work:
        yield (
            settings,
            task,
            make_generator_factory(settings.generate, task.decoder, task.tokenizer, task.mesh, work),
        )


def answered(ready, folder, number=0, **changes):
    settings, task, write = ready
    params = task.init_params(0)
    chosen = choose_questions(settings, task.trainable_indices(), np.ones(task.num_examples))
    arguments = {"fingerprint": fingerprint_params(params), "verifier": None} | changes
    return collect_rollouts(settings, task, chosen, number, folder / "responses.parquet", write(params), **arguments)


def test_the_typed_result_holds_the_table(whole):
    columns = {
        "rounds": "round", "ids": "id", "questions": "question", "generated": "generated", "sources": "source",
        "labels": "label", "multiplicity": "base", "weights": "weight",
    }  # fmt: skip
    typed, _ = check_columns(whole[0], "weights.parquet", columns)
    assert typed.accepted == whole[1]["accepted"] and typed.summary == whole[1]["sentence"]
    assert set(typed.rounds) == {0, 1} and 0 < typed.generated.sum() < len(typed.ids)
    assert (typed.model / "config.json").is_file()


# ---- what a round is made of


def test_the_rows_of_a_round_are_what_the_model_wrote(ready, tmp_path):
    """No prompt token is a target, labels are shifted once: else the model would not find its own log-probabilities."""
    settings, task, _ = ready
    found = answered(ready, tmp_path)
    made = build_round_task(settings, task, found, 0)
    corpus, params, offline = made.task.corpus, task.init_params(0), task.num_examples - len(found.questions)
    assert made.task.num_examples == offline + 2 * len(found.questions) == len(made.task.examples)
    assert not set(made.question_rows[:offline]) & set(found.questions)  # their offline examples have left
    for at, response in enumerate(found.tokens):
        ids, supervised, _ = corpus.get_sequence(offline + at)
        assert ids[supervised].tolist() == response.tolist()
        before = task.corpus.get_sequence(int(found.question_rows[at]))
        assert ids[~supervised].tolist() == before.ids[~before.target_mask].tolist()  # the prompt that training reads
        place = corpus.offsets[offline + at] + np.flatnonzero(supervised)
        np.testing.assert_array_equal(corpus.sampler_log_probs[place], found.log_probs[at])
    assert np.isfinite(corpus.sampler_log_probs).sum() == sum(len(one) for one in found.tokens)
    stream = made.task.full_pass_stream(0)
    assert set(stream.batch(0)) >= {"sampler", "multiplicity"}
    token_losses = jax.jit(sft.token_losses(task.decoder, 1024))
    loss = {ratio: jax.jit(importance_weighted_losses(task.decoder, ratio=ratio)) for ratio in ("token", "none")}
    for step in range(stream.steps):
        batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(step))
        own, stored = -np.asarray(token_losses(params, batch)), np.asarray(batch["sampler"])
        sampled = np.isfinite(stored)
        np.testing.assert_allclose(own[sampled], stored[sampled], atol=1e-5)  # float32, with and without a cache
        np.testing.assert_allclose(loss["token"](params, batch), loss["none"](params, batch), atol=1e-5)


def test_a_question_counts_once(ready, tmp_path):
    settings, task, _ = ready
    found = answered(ready, tmp_path)
    made = build_round_task(settings, task, found, 0)
    assert made.multiplicity.mean() == pytest.approx(1)
    each = np.bincount(made.question_rows, made.multiplicity, task.num_examples)
    np.testing.assert_allclose(each, each[0])
    stream = made.task.full_pass_stream(0)
    index, base = (
        np.concatenate([np.asarray(stream.batch(at)[name]).ravel() for at in range(stream.steps)])
        for name in ("index", "multiplicity")
    )
    np.testing.assert_allclose(
        base[index < made.task.num_examples], made.multiplicity[index[index < made.task.num_examples]], rtol=1e-6
    )


def test_wrong_responses_can_be_left_out(ready, tmp_path):
    settings, task, _ = ready
    verdicts = iter([1, 0, 1, 1] + [0] * 100)
    found = answered(ready, tmp_path, verifier=lambda example, text: float(next(verdicts)))
    filtered = load_config(
        RefineConfig,
        None,
        ["--refine.verifier-use", "filter", "--verifier.name", "exact", "--generate.num-generations", "2", *NEEDED],
    )
    base = build_round_task(filtered, task, found, 0).multiplicity[task.num_examples - len(found.questions) :]
    made = build_round_task(filtered, task, found, 0)
    kept = base / made.multiplicity[0]
    offline = np.arange(task.num_examples - len(found.questions))
    assert made.trained.tolist() == [*offline, *(len(offline) + np.array([0, 2, 3]))]  # reliability is of these alone
    np.testing.assert_allclose(kept, [1, 0, 0.5, 0.5] + [0] * (len(base) - 4))


NEEDED = ("--model.name-or-path", "x", "--data.train", "x", "--data.validation", "x")


def test_log_probabilities_of_another_model_are_refused(ready, tmp_path):
    first = answered(ready, tmp_path)
    again = answered(ready, tmp_path)  # from the file
    assert again.texts == first.texts and again.tokens[0].tolist() == first.tokens[0].tolist()
    with pytest.raises(ValueError, match="responses of the model .* are not its own"):
        answered(ready, tmp_path, fingerprint="0" * 16)
    other = answered(ready, tmp_path / "later", number=1)
    assert other.texts != first.texts  # the same model, other draws


def test_dynamic_takes_the_least_weights_and_fixed_the_same_questions(ready):
    settings, task, _ = ready
    weights = np.random.default_rng(0).permutation(task.num_examples).astype(float)
    dynamic = choose_questions(settings, task.trainable_indices(), weights)
    assert sorted(weights[dynamic]) == list(range(len(dynamic)))
    fixed = load_config(RefineConfig, None, ["--refine.questions", "fixed", *NEEDED])
    assert (
        choose_questions(fixed, task.trainable_indices(), weights).tolist()
        == choose_questions(fixed, task.trainable_indices(), -weights).tolist()
    )


def test_responses_move_as_the_row_that_they_share(ready):
    """G rows of base 1/G with one entry between them go where one row would; their logits are not G times slower."""
    entries, base = jnp.array([0.3, -0.2, 0.5]), jnp.ones(3)
    split, third = jnp.array([0.3, -0.2, 0.5 / 3, 0.5 / 3, 0.5 / 3]), jnp.array([1, 1, 1 / 3, 1 / 3, 1 / 3])
    for name in ("sigmoid", "softmax"):
        one, more = (
            _step(1e9, jnp.zeros(len(of)), _pull_back_per_whole(name, jnp.zeros(len(of)), of, given), jnp.ones(()))
            for of, given in ((base, entries), (third, split))
        )
        ratio = np.asarray(more)[[0, 1, 2, 3, 4]] / np.asarray(one)[[0, 1, 2, 2, 2]]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)  # the rms over five rows is not that over three
        weights = [
            hyper_to_weights(name, hyper, of) for hyper, of in ((one, base), (one[jnp.array([0, 1, 2, 2, 2])], third))
        ]
        np.testing.assert_allclose(weights[1], np.asarray(weights[0])[[0, 1, 2, 2, 2]], rtol=1e-5)


def test_the_bound_holds_its_level():
    """Gains with mean 0: of 200 tests at level .1 about 20 are passed; and the interval covers 0 in about 95 %."""
    random, passed, covered = np.random.default_rng(0), 0, 0
    for number in range(200):
        before = random.normal(size=60)
        gain, bound = bootstrap_paired_gain(before, before + random.normal(size=60), 0.1, (number,))
        passed += bound > 0
        covered += gain.low < 0 < gain.high
    assert 8 <= passed <= 36 and 178 <= covered <= 198  # three standard errors of a binomial, and its small bias


# ---- a run


def test_compiles_in_the_first_round_only(whole):
    assert whole[2][0] == whole[2][1] > 0


def test_every_response_is_traceable(whole):
    out, result, _ = whole
    rows, weights = (pq.read_table(out / name).to_pandas() for name in ("responses.parquet", "weights.parquet"))
    assert result["accepted"] == 2 and rows["accepted"].all()  # an untrained model: any training helps
    assert (rows["id"] == rows["question"] + "/" + rows["round"].astype(str) + "/" + rows["draw"].astype(str)).all()
    marks = rows.groupby("round")["model"].unique()
    assert len(marks[0]) == len(marks[1]) == 1 and marks[0] != marks[1]  # refreshed, though training was 6 steps
    assert marks[0][0] == result["records"][0]["model"]
    joined = rows.merge(weights[weights["generated"]], on="id", validate="one_to_one")
    assert len(joined) == len(rows) and (joined["weight_x"] == joined["weight_y"]).all()
    assert (rows["log_probs"].map(sum) - rows["log_prob"]).abs().max() < 1e-5
    assert (rows["log_probs"].map(len) == rows["tokens"].map(len)).all()
    assert weights[weights["generated"]]["weight"].std() > 0


def test_dynamic_mode_uses_what_it_generated(whole):
    """The questions of round 1 are those of the least weight after round 0, and their responses were trained on."""
    weights = pq.read_table(whole[0] / "weights.parquet").to_pandas()
    first, second = (weights[weights["round"] == number] for number in (0, 1))
    mean = (first["base"] * first["weight"]).groupby(first["question"]).sum() / first.groupby("question")["base"].sum()
    chosen = second[second["generated"]]["question"].unique()
    assert len(chosen) == 9 and mean[chosen].max() <= mean.drop(chosen).min()
    assert not set(second[~second["generated"]]["question"]) & set(chosen)
    assert (second.groupby("question")["base"].sum().round(5).nunique()) == 1


def test_writes_a_model_and_a_report(whole):
    out, result, _ = whole
    params = models.load_model(out / "model", dtype=jnp.float32)[1]
    assert fingerprint_params(params) not in {record["model"] for record in result["records"]}
    held = result["test"]
    assert held["first"] > held["last"] and held["gain"]["value"] == pytest.approx(held["first"] - held["last"])
    assert result["sentence"].startswith("2 of 2 rounds accepted; test loss fell from ")
    assert result["looks"] == 4 and "right answers" in result["sentence"]
    page = (out / "report.html").read_text()
    assert "<svg" in page and "accepted" in page and ">nan<" not in page
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["accepted"] for line in log if line["event"] == "round"] == [True, True]


def test_a_round_says_how_far_its_weights_speak_for_others(whole, config, tmp_path):
    """The questions follow validation from the start, so dev tells; the passes are those that were planned."""
    out, result, _ = whole
    for record in result["records"]:
        uniform, unrolled = record["candidates"]
        assert "reliability" not in uniform and uniform["work"] == 6
        draw = unrolled["reliability"]["last"]
        assert unrolled["reliability"] == {"first": draw, "last": draw, "steps": 1} | NOT_STOPPED
        assert draw["noise"] is None and draw["agreement"] is not None and draw["num_validation"] == 8
        assert not draw["is_fitted"] and -1 <= (draw["value"] or 0) <= 1
        assert unrolled["work"] == 6 * (1 + 5 + 2 * 2)  # the last training; back through validation, dev, its halves
    settings = load_config(RefineConfig, config)
    planned = count_rounds_work(settings, prepare_refine_task(settings, tmp_path))
    assert planned == sum(record["work"] for record in result["records"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rounds, steps = ([line for line in log if line["event"] == event] for event in ("round", "outer"))
    assert [line["candidates"] for line in rounds] == [record["candidates"] for record in result["records"]]
    assert [line["reliability_draw"] for line in steps] == [
        record["candidates"][1]["reliability"]["last"] for record in result["records"]
    ]
    page = " ".join((out / "report.html").read_text().split())
    assert "Round 1: in the one step, where all weights are equal, " in page


NOT_STOPPED = {"is_used_up": False, "is_concentrated": False, "why_not": ""}


def train_weighted(ready, made, folder, **outer):
    """The unrolled candidate of a round."""
    settings, task, _ = ready
    settings = replace(settings, outer=replace(settings.outer, **outer))
    (folder / "checkpoints").mkdir(parents=True)
    with session.open_session(folder, progress=False, save_seconds=1e9) as work:
        candidate = make_candidate_trainers(settings, task)["unrolled"](made, None, work, 0)
        return candidate, work.work_done


@pytest.mark.slow
def test_dev_measures_and_steers_nothing(ready, tmp_path):
    """With other examples as dev the weights and the model keep every bit, and the last reliability is another."""
    settings, task, _ = ready
    made = build_round_task(settings, task, answered(ready, tmp_path), 0)
    parts = {
        name: {**getattr(made.task, name), "dev": getattr(made.task, name)["test"]}
        for name in ("held_out_streams", "held_out_examples")
    }
    other = made._replace(task=made.task._replace(**parts), is_fitted=True)
    outer = {"steps": 2, "reliability_every": 1}
    (one, work), (two, _) = (
        train_weighted(ready, rows, tmp_path / name, **outer) for name, rows in (("a", made), ("b", other))
    )
    np.testing.assert_array_equal(one.weights, two.weights)
    assert fingerprint_params(one.params) == fingerprint_params(two.params)
    first, last = one.reliability["first"], one.reliability["last"]
    assert 0 < first["noise"] and not first["is_fitted"] and last["agreement"] is not None
    assert last["agreement"] != two.reliability["last"]["agreement"]
    assert two.reliability["first"] == first | {"is_fitted": True}  # the same halves, of what the model had seen
    assert work == 6 * (1 + 2 * 5 + 2 * (1 + 2))


def test_a_round_stops_where_validation_is_used_up(ready, tmp_path):
    """By halves of validation, twice in a row; dev is not asked."""
    settings, task, _ = ready
    made = build_round_task(settings, task, answered(ready, tmp_path), 0)
    outer = {"steps": 4, "reliability_every": 1, "reliability_floor": 0.999}
    candidate, work = train_weighted(ready, made, tmp_path / "run", **outer)
    found = candidate.reliability
    assert found["steps"] == 2 and found["is_used_up"] and found["last"]["is_fitted"]
    assert work == 6 * (1 + 2 * (5 + 2))
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "outer"] == [0, 1]


@pytest.mark.slow
def test_dynamic_begins_with_the_rows_that_raise_validation_loss(whole, config, tmp_path):
    """Against slow, separate gradients: the questions of round 0 are those of the least <grad l_i, grad L_v>."""
    task = prepare_refine_task(load_config(RefineConfig, config), tmp_path)
    params = task.init_params(0)
    slope = jax.jit(jax.jacrev(lambda params, batch: task.objective.losses(params, task.frozen(params), batch)))
    pull = jax.grad(lambda p: task.problem.outer(p, task.frozen(p), jax.tree.map(lambda a: a[0], batch_of(task))))(
        params
    )
    aligned = np.full(task.num_examples, np.nan)
    stream = task.full_pass_stream(0)
    for step in range(stream.steps):
        batch = jax.tree.map(lambda leaf: leaf[0], stream.batch(step))
        each = jax.tree.map(lambda a, b: a.reshape(len(a), -1) @ b.ravel(), slope(params, batch), pull)
        index = np.asarray(batch["index"])
        aligned[index[index < task.num_examples]] = np.asarray(sum(jax.tree.leaves(each)))[index < task.num_examples]
    rows = pq.read_table(whole[0] / "responses.parquet").to_pandas()
    chosen = rows[rows["round"] == 0]["question"].unique()
    wanted = [task.examples[row].id for row in np.argsort(aligned)[: len(chosen)]]
    assert set(chosen) == set(wanted)


def batch_of(task):
    stream = task.held_out_streams["validation"]
    assert stream.steps == 1
    return stream.batch(0)


def same(one, other):
    for name in ("model/model.safetensors", "responses.parquet", "weights.parquet"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    measured = [
        [(candidate["name"], candidate["dev"], candidate["work"], candidate.get("reliability"))
         for record in result["records"] for candidate in record["candidates"]]
        for result in results
    ]  # fmt: skip
    assert measured[0] == measured[1]


@pytest.mark.parametrize(
    "count",
    [pytest.param(count, marks=[pytest.mark.slow] * (count != 9)) for count in (3, 9, 16, 22, 30, 37)],
)
def test_stopped_anywhere_and_resumed_changes_no_bit(config, whole, tmp_path, stop_at, count):
    stop_at(count)
    with pytest.raises(session.Interrupted):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run", "--resume")
    same(whole[0], tmp_path / "run")


@pytest.mark.slow
def test_rounds_of_several_measured_steps_are_resumed(config, tmp_path, monkeypatch):
    """Halves of validation in the first step, dev in the last; stopped in every training and backward pass."""
    flags = (
        "--outer.steps",
        "3",
        "--outer.reliability-every",
        "1",
        "--refine.rounds",
        "1",
        "--refine.methods",
        "unrolled",
    )
    run(config, tmp_path / "whole", *flags)
    for count in range(3, 40, 7):
        with monkeypatch.context() as patch:
            stop_session_at(patch, count)
            with pytest.raises(session.Interrupted):
                run(config, tmp_path / str(count), *flags)
        run(config, tmp_path / str(count), *flags, "--resume")
        same(tmp_path / "whole", tmp_path / str(count))


def test_what_is_not_better_is_not_taken(config, tmp_path):
    """A training that moves nothing gains nothing: the model stays, bit for bit, and so says the sentence."""
    flags = ("--refine.methods", "uniform", "--refine.questions", "none", "--optimizer.learning-rate", "1e-30")
    result = run(config, tmp_path / "run", "--refine.rounds", "1", *flags)
    assert result["accepted"] == 0 and result["records"][0]["bound"] <= 0
    assert "0 of 1 round accepted: the model is the one that was given" in result["sentence"]
    given = load_config(RefineConfig, config).model.name_or_path
    before, after = (models.load_model(path, dtype=jnp.float32)[1] for path in (given, tmp_path / "run" / "model"))
    assert fingerprint_params(before) == fingerprint_params(after)


ARMS = {
    "mixing": ("--refine.methods", "mixing", "--refine.questions", "fixed"),
    "bmo, from the first": (
        "--refine.methods", "bmo", "--single-loop.reference", "snapshot", "--refine.start-from", "first",
    ),
    "sequences": ("--refine.methods", "penalty", "--refine.ratio", "sequence", "--train.global-batch-size", "8"),
    "all, beside": ("--refine.methods", "uniform", "--refine.questions", "all", "--refine.keep-offline"),
    "softmax": ("--refine.methods", "unrolled", "--outer.weighting", "softmax", "--refine.ratio", "none"),
    "adapters": ("--refine.methods", "unrolled", "--lora.r", "2", "--model.base-dtype", "bfloat16"),
}  # fmt: skip


def test_a_step_that_leaves_few_examples_is_not_made(ready, tmp_path):
    settings, task, _ = ready
    made = build_round_task(settings, task, answered(ready, tmp_path), 0)
    outer = {"steps": 4, "weighting": "softmax", "learning_rate": 0.5, "reliability_every": 0, "ess_floor": 0.6}
    candidate, work = train_weighted(ready, made, tmp_path / "run", **outer)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    *made_steps, refused = [line for line in lines if line["event"] == "outer"]
    assert made_steps and all(line["is_stepped"] for line in made_steps) and not refused["is_stepped"]
    mass = made.multiplicity * candidate.weights
    share = mass.sum() ** 2 / (made.multiplicity.sum() * (mass * candidate.weights).sum())
    assert made_steps[-1]["share_after"] == pytest.approx(share, rel=1e-5)
    assert refused["share_after"] < 0.6 <= share
    assert candidate.reliability["is_concentrated"] and candidate.reliability["steps"] == len(made_steps) + 1
    record = {"step": 3, "candidates": [{"name": "unrolled", "reliability": candidate.reliability}]}
    (line,) = describe_refused_steps({"records": [record]})
    assert line.startswith(f"Round 3: the weights of unrolled are those of {len(made_steps)} step")
    assert format_reliability(record["candidates"][0]) == f"weights of {len(made_steps)} steps"
    assert work == 6 * (1 + 5 * (len(made_steps) + 1))


def test_examples_that_count_nothing_do_not_hold_the_effective_share_up():
    """Two examples of ten count; one of them has all the weight."""
    multiplicity = np.array([5.0, 5.0, *[0.0] * 8])
    weights = np.array([2.0, 0.0, *[1.0] * 8])
    assert certify.effective_share(weights, multiplicity) == pytest.approx(0.5)
    assert certify.effective_share(np.ones(10), multiplicity) == pytest.approx(1.0)
    halves = certify.effective_share(
        np.array([2.0, 0.5, 0.5]), np.array([1.0, 0.5, 0.5])
    )  # a split example counts once
    assert halves == pytest.approx(certify.effective_share(np.array([2.0, 0.5]), np.ones(2)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_runs(config, tmp_path, name):
    result = run(config, tmp_path / "run", *ARMS[name])
    assert len(result["records"]) == 2 and np.isfinite(result["test"]["last"])
    assert (tmp_path / "run" / "report.html").exists()


REFUSED = {
    "differentiate another training": ("--refine.ratio", "sequence", "--refine.methods", "unrolled"),
    "multiple of generate.num_generations": (
        "--refine.ratio",
        "sequence",
        "--refine.methods",
        "penalty",
        "--generate.num-generations",
        "3",
    ),
    "they have no ratio": ("--generate.temperature", "0"),
    "dynamic chooses by weights": ("--refine.questions", "dynamic", "--refine.methods", "uniform"),
    "filter needs a verifier": ("--refine.verifier-use", "filter"),
    "choose sigmoid or softmax": ("--outer.weighting", "per_source"),
    "leave section objective at its defaults": ("--objective.name", "simpo"),
    "a model that can answer": ("--model.from-scratch",),
    "refine.methods says how candidates are trained: leave it out": ("--outer.method", "window"),
    "dev decides about whole rounds, and is not read between the steps of one": ("--outer.patience", "2"),
    "the same model .refine.start_from.: leave it out": ("--outer.restart", "warm"),
    "differentiate the whole training run: leave it out": ("--outer.window", "3"),
    "the steps of unrolled, which refine.methods does not name": ("--outer.ess-floor", "0.5"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused(words):
    with pytest.raises(ValueError, match=words):
        load_config(RefineConfig, None, [*NEEDED, "--train.global-batch-size", "8", *REFUSED[words]])


def test_what_the_data_lack_is_told(config, tmp_path):
    with pytest.raises(ValueError, match="no rows for dev"):
        run(config, tmp_path / "a", "--data.dev")
    with pytest.raises(ValueError, match="longest question has 6 tokens; with generate.max_new_tokens = 40"):
        run(config, tmp_path / "b", "--generate.max-new-tokens", "40")


@pytest.mark.slow
def test_bmo_compares_with_the_model_that_wrote(ready, tmp_path, monkeypatch):
    """Also where training starts from another: the weights of the first step are ratios to the sampler."""
    from bilevel_jax.runs.engine import single_loop

    settings, task, _ = ready
    section = replace(settings.single_loop, reference="snapshot", steps=1)
    settings = replace(settings, refine=replace(settings.refine, methods=("bmo",)), single_loop=section)
    made = build_round_task(settings, task, answered(ready, tmp_path), 0)
    compared, refresh = [], single_loop.replace_reference
    monkeypatch.setattr(
        single_loop,
        "replace_reference",
        lambda state, phi: compared.append(fingerprint_params(phi)) or refresh(state, phi),
    )
    sampler = jax.tree.map(lambda leaf: leaf + 0.01, task.init_params(0))
    (tmp_path / "bmo" / "checkpoints").mkdir(parents=True)
    with session.open_session(tmp_path / "bmo", progress=False, save_seconds=1e9) as work:
        candidate = make_candidate_trainers(settings, task)["bmo"](made, sampler, work, 0)
    assert compared == [fingerprint_params(sampler)]
    assert candidate.weights.std() > 0


def test_question_weights_are_means_over_its_rows(ready, tmp_path):
    settings, task, _ = ready
    made = build_round_task(settings, task, answered(ready, tmp_path), 0)
    weights = np.random.default_rng(1).uniform(size=made.task.num_examples)
    found = average_question_weights(made, weights, task.num_examples)
    for question in (made.question_rows[0], made.question_rows[-1]):
        assert found[question] == pytest.approx(weights[made.question_rows == question].mean())
