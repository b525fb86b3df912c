"""Section `evaluate` of `compare`: the models of all arms and seeds answer, each against one baseline."""

import gc
import json
import os
import re
import signal
import weakref
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.compare import run as run_module
from bilevel_jax.commands.compare.methods import METHODS, MethodResult
from bilevel_jax.commands.compare.report import format_markdown, render_compare_report
from bilevel_jax.commands.compare.report_answers import _choose_level, describe_arm_answers
from bilevel_jax.commands.compare.run import compare, learn_weights, make_task_builder
from bilevel_jax.commands.results import read_result
from bilevel_jax.lm.inference import continuous_batching
from bilevel_jax.runs.budget.work import count_compare_work
from bilevel_jax.runs.config.load import CompareConfig, load_config
from bilevel_jax.runs.evaluation.arms import describe_arms, summarize_crossed
from bilevel_jax.runs.evaluation.metrics import METRICS
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.session import Interrupted, Session
from bilevel_jax.runs.tasks.evaluation import read_labels
from tests.commands.chat_server import ChatServer, make_judge
from tests.commands.test_evaluate_own_models import ASK, compare_folders, run_train
from tests.runs import blobs

SECTIONS = """
outer: {steps: 2, patience: 0, learning_rate: 1.0, window: 2, weighting: sigmoid}
single_loop: {eval_steps: 50}
compare: {budget: 70, seeds: 2, methods: [window], baselines: [uniform, oracle, validation_model]}
"""


@pytest.fixture(scope="module")
def config(made, tmp_path_factory):
    """The config of `select` without the sections that `compare` lacks, and with its own."""
    text = "".join(
        re.sub(r"^(outer|certify|retrain|selection):.*\n", "", (made / "select.yaml").read_text(), flags=re.M)
    )
    path = tmp_path_factory.mktemp("config") / "compare.yaml"
    path.write_text(text + SECTIONS)
    return path


def run(config, made, out, *flags):
    prompts = ["--evaluate.prompts", str(made / "test.jsonl"), "--data.dev", str(made / "dev.jsonl")]
    given = [*prompts, *ASK, *flags, "--out", str(out)]
    return compare(load_config(CompareConfig, config, given))


@pytest.fixture(scope="module")
def whole(config, made, tmp_path_factory):
    """One run of two seeds: (its folder, its result)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(config, made, out, "--evaluate.metrics", "perplexity", "accuracy")


def test_every_arm_is_compared_with_the_baseline_seed_by_seed(whole):
    out, result = whole
    found = result["evaluate"]
    assert list(found["comparisons"]) == ["oracle", "validation_model", "window"] and found["seeds"] == 2
    assert found["baseline"] == "uniform" and 1 - (1 - found["level_of_each"]) ** 3 == pytest.approx(0.05)
    for arm, compared in found["comparisons"].items():
        line = compared["metrics"]["perplexity"]
        assert line["questions"] == 16 and len(line["by_seed"]) == 2
        assert line["difference"].value == pytest.approx(sum(line["by_seed"]) / 2) != 0
        answers = pq.read_table(out / "evaluate" / arm / "answers.parquet").to_pandas()
        assert len(answers) == 2 * 2 * 16 and set(answers["draw"]) == {0, 1}
        questions = pq.read_table(out / "evaluate" / arm / "questions.parquet").to_pandas()
        mean = questions["perplexity of the model"].mean() - questions["perplexity of the baseline"].mean()
        assert line["difference"].value == pytest.approx(mean)
        of_model = answers[answers["role"] == "model"].groupby("seed")["fingerprint"].unique()
        assert [", ".join(of_seed) for of_seed in zip(*of_model, strict=True)] == [
            compared["models"]["model"]["fingerprint"]
        ]
    fingerprints = {compared["models"]["baseline"]["fingerprint"] for compared in found["comparisons"].values()}
    assert len(fingerprints) == 1 and len(fingerprints.pop().split(", ")) == 2
    assert "16 questions and 2 seeds" in found["sentence"]


def test_the_models_are_those_of_the_table(whole, made, tmp_path):
    """The uniform one of the first seed is that of `train` with the seeds of the first retrain."""
    flags = ("--train.num-epochs", "1", "--train.max-steps", "10", "--train.seed", "10000", "--data.seed", "10000")
    run_train(made, tmp_path / "uniform", *flags, "--optimizer.warmup-ratio", "0", "--optimizer.warmup-steps", "2")
    found = compare_folders(made, tmp_path / "found", tmp_path / "uniform" / "model", made / "model")
    mine = whole[1]["evaluate"]["comparisons"]["oracle"]["models"]["baseline"]["fingerprint"]
    assert mine.split(", ")[0] == found["models"]["model"]["fingerprint"]


def test_the_result_the_report_and_the_table_tell_it(whole):
    out, result = whole
    typed = read_result(out)
    assert typed.summary.splitlines()[-1] == f"Answers: {result['evaluate']['sentence']}"
    assert list(typed.evaluations) == ["oracle", "validation_model", "window"]
    one = typed.evaluations["window"]
    assert one.summary == result["evaluate"]["comparisons"]["window"]["sentence"]
    assert one.roles.tolist() == ["model"] * 32 + ["baseline"] * 32 and "accuracy" in one.measures
    page = (out / "report.html").read_text()
    assert "Which arms answer better?" in page and page.count("beside those of uniform, first seed") == 3
    assert "hold for all 3 arms at\nonce" in page and "98.3" in page
    lines = (out / "table.md").read_text().splitlines()
    assert result["evaluate"]["sentence"] in lines
    [line] = [line for line in lines if line.startswith("| window | ") and line.count("|") == 5]
    assert line.endswith(("| no difference told |", "| better |", "| worse |"))
    assert one.seeds.tolist() == [0, 1] * 32 and len(set(one.fingerprints)) == 4


@pytest.mark.parametrize("usable", [0, 1])
def test_a_report_of_one_prompt_and_of_none_that_is_usable_is_written(whole, tmp_path, usable):
    """From result.json, which holds null for what is unknown."""
    folder = whole[0]
    result, environment = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "environment"))
    found = result["evaluate"]
    for compared in found["comparisons"].values():
        for name in compared["metrics"]:
            values = {role: np.full((2, 16), np.nan) for role in ("model", "baseline")}
            for at, role in enumerate(values):
                values[role][:, :usable] = [[0.0], [0.5 + at]]
            compared["metrics"][name] |= summarize_crossed(name, METRICS[name], values, 0, 3)
        compared["level"] = compared["metrics"][compared["metric"]]["level"]
    found["sentence"] = describe_arms(found)
    run_dir.write_json(tmp_path / "result.json", result)
    result = json.loads((tmp_path / "result.json").read_text())
    assert "\n| oracle | " + ("0.250 [unknown]" if usable else "unknown") in format_markdown(result)
    page = render_compare_report("run", result, "", environment, describe_arm_answers(folder, result))
    assert "No difference told" in page and "unknown" in page and "nan" not in re.sub(r"<[^>]*>", "", page).split()


@pytest.mark.parametrize("keeps_own", [False, True])
def test_only_an_own_model_that_answers_stays_in_memory(tmp_path, monkeypatch, keeps_own):
    made = []

    def train_own(*given):
        params = np.ones(3)
        made.append(weakref.ref(params))
        return MethodResult(np.ones(2), [], 1.0, 0.0, "", params)

    (tmp_path / "parts").mkdir()
    session = SimpleNamespace(
        folder=tmp_path, run_once=lambda key, make, is_there: make(), part_session=lambda name: None
    )
    monkeypatch.setitem(METHODS, "penalty", METHODS["penalty"]._replace(configure=lambda given: given, run=train_own))
    monkeypatch.setattr(run_module, "_make_cell", lambda *given: {})
    _, _, load_own = learn_weights(None, None, "penalty", 0, 1, session, None, keeps_own=keeps_own)
    gc.collect()
    assert len(made) == 1 and (made[0]() is not None) == keeps_own
    assert load_own().sum() == 3 and len(made) == 2 - keeps_own
    gc.collect()
    assert made[0]() is None


def test_the_headline_counts_both_sides_and_says_what_is_not_judged():
    def level(*levels):
        return _choose_level(levels, "uniform")

    assert level("better", *["worse"] * 6) == ("bad", "✗", "1 of 7 better than uniform, 6 worse")
    assert level("better", "better", "worse", "none")[::2] == ("good", "2 of 4 better than uniform, 1 worse")
    assert level("better", "worse")[0] == "fair"
    assert level("worse", "none")[2] == "None of 2 better than uniform, 1 worse"
    assert level("open", "open")[2] == "Measured, not judged" and level("undecided") == ("fair", "?", "Undecided")
    assert level("none", "undecided")[2] == "No difference told, 1 undecided"


def without_seconds(part):
    if isinstance(part, dict):
        return {key: without_seconds(value) for key, value in part.items() if key != "seconds"}
    return part


def count_batches(monkeypatch):
    built, build = [], continuous_batching._BatchRun
    monkeypatch.setattr(continuous_batching, "_BatchRun", lambda *given: built.append(1) or build(*given))
    return built


def stop_in_phase(patch, wanted):
    """A signal arrives when a phase begins."""
    set_phase = Session.set_phase

    def stop(self, name, **more):
        if name == wanted:
            signal.raise_signal(signal.SIGTERM)
        set_phase(self, name, **more)

    patch.setattr(Session, "set_phase", stop)


def test_a_stop_among_the_answers_asks_nothing_twice(config, made, whole, tmp_path, monkeypatch):
    """Stopped while the model with the learned weights of the first seed answers."""
    built, flags = count_batches(monkeypatch), ("--evaluate.metrics", "perplexity", "accuracy")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_in_phase(patch, "window, seed 0: answering")
        run(config, made, tmp_path / "run", *flags)
    assert len(built) == 4
    result = run(config, made, tmp_path / "run", *flags, "--output.resume")
    assert len(built) == 8  # four arms of two seeds, a batch each
    assert without_seconds(result["evaluate"]) == without_seconds(whole[1]["evaluate"])


@pytest.mark.slow
def test_a_stop_among_the_verdicts_asks_nothing_twice(config, made, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = ChatServer({"judge": make_judge(len)})
    judge = ("--judge.url", server.url, "--judge.model", "judge", "--judge.concurrency", "1", "--judge.retries", "0")
    flags = (
        *judge,
        "--evaluate.metrics",
        "preference",
        "safety",
        "--compare.baselines",
        "uniform",
        "oracle",
        "validation",
    )
    flags = (*flags, "--evaluate.baseline", "validation")
    try:
        result = run(config, made, tmp_path / "whole", *flags)["evaluate"]
        total = len(server.requests)
        assert result["comparisons"]["window"]["judge"]["pairs"]["total"] == 32 and total > 32
        server.requests.clear()
        server.before = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 20 else None
        with pytest.raises(Interrupted):
            run(config, made, tmp_path / "run", *flags)
        monkeypatch.setattr(continuous_batching, "_BatchRun", None)  # whoever answers again, fails
        again = run(config, made, tmp_path / "run", *flags, "--output.resume")["evaluate"]
        requests = [json.dumps(body, sort_keys=True) for body in server.requests]
        assert len(requests) == len(set(requests)) == total
    finally:
        server.close()
    for compared in (*result["comparisons"].values(), *again["comparisons"].values()):
        del compared["judge"]  # whose requests are those of this part of the run
    assert without_seconds(again) == without_seconds(result)


@pytest.mark.slow
def test_the_own_model_of_mixing_answers_and_is_not_trained_again_after_a_stop(config, made, tmp_path, monkeypatch):
    flags = ("--compare.methods", "mixing", "--compare.baselines", "uniform", "--compare.seeds", "1")
    result = run(config, made, tmp_path / "whole", *flags)["evaluate"]
    assert "16 questions and 1 seed:" in result["sentence"] and result["seeds"] == 1
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "not for other trainings" in page and "is its own: trained on validation, too, from another start" in page
    advance, work = Session.advance, []
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_in_phase(patch, "mixing, seed 0: answering")
        run(config, made, tmp_path / "run", *flags)
    assert (tmp_path / "run" / "parts" / "seed 0 mixing").is_dir()
    monkeypatch.setattr(Session, "advance", lambda self, amount=1.0: work.append(amount) or advance(self, amount))
    again = run(config, made, tmp_path / "run", *flags, "--output.resume")["evaluate"]
    assert without_seconds(again) == without_seconds(result)
    assert len([amount for amount in work if amount == 2.0]) <= 1  # none of its 35 steps
    assert not (tmp_path / "run" / "parts" / "seed 0 mixing").exists()


def test_the_trainings_of_answers_are_counted(config, made, tmp_path):
    """An arm that has chosen on dev is trained again to answer: others were trained since."""
    flags = ["--data.dev", str(made / "dev.jsonl"), "--compare.baselines", "uniform", "low_loss_dev", "oracle"]
    without = load_config(CompareConfig, config, flags)
    asked = load_config(CompareConfig, config, [*flags, "--evaluate.prompts", str(made / "test.jsonl"), *ASK])
    task = make_task_builder(without, tmp_path)(0)
    labels = read_labels(task, without.data)
    [before], [same, again] = (count_compare_work(task, one, labels) for one in (without, asked))
    assert same == before and again.work == 2 * 1 * 10  # two seeds, one arm, ten steps


def test_text_of_several_sources_may_be_compared_with_what_it_has_in_any_case(config, made, tmp_path):
    flags = ["--data.source-field", "label", "--evaluate.prompts", str(made / "test.jsonl"), *ASK]
    task = None
    for baseline, more in (("stratified", ["window"]), ("uniform", ["window"]), ("uniform", [])):
        given = [*flags, "--evaluate.baseline", baseline, "--compare.baselines", *(["oracle"] if more else ["uniform"])]
        asked = load_config(CompareConfig, config, [*given, "--compare.methods", *more])
        task = task or make_task_builder(asked, tmp_path)(0)
        run_module._check_evaluated_arms(asked, task)


WRONG = {
    "an arm that is not compared": (
        ["--evaluate.baseline", "random"],
        "evaluate.baseline = 'random': is none of the arms that are compared: add it to compare.baselines",
    ),
    "no such arm": (["--evaluate.baseline", "unifrom"], "uniform"),
    "an arm that cannot be": (
        ["--compare.baselines", "uniform", "low_loss_dev", "--evaluate.baseline", "low_loss_dev"],
        "evaluate.baseline = 'low_loss_dev': low_loss_dev chooses its share on dev, and there are no dev examples",
    ),
    "one that only several sources have": (
        ["--compare.baselines", "oracle", "--evaluate.baseline", "uniform"],
        "evaluate.baseline = 'uniform' is none of the arms that are compared, as all examples come from one source",
    ),
    "stratified without sources": (
        ["--evaluate.baseline", "stratified"],
        "evaluate.baseline = 'stratified': stratified gives several sources equal shares, and all examples come from",
    ),
    "one arm": (
        ["--compare.baselines", "uniform", "--compare.methods"],
        "evaluate.baseline = 'uniform' is the only arm that is possible here: name another one",
    ),
    "no judge": (["--evaluate.metrics", "preference"], "need a judge"),
    "too long": (["--generate.max-new-tokens", "4000"], "test.jsonl:1: the prompt has"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_before_any_work(config, made, tmp_path, capsys, name):
    flags, text = WRONG[name]
    given = ["--evaluate.prompts", str(made / "test.jsonl"), *ASK, *flags, "--out", str(tmp_path / "out")]
    assert main(["compare", str(config), *given]) != 0
    error = capsys.readouterr().err
    assert text in " ".join(error.split()), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["baseline oracle", "questions 4", "metrics refusal"])
def test_what_nothing_is_asked_for_is_refused(config, capsys, tmp_path, key):
    name, value = key.split()
    assert main(["compare", str(config), f"--evaluate.{name}", value, "--out", str(tmp_path / "out")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "the other keys of evaluate say how answers are measured, and nothing is asked: name the prompts" in error


def test_arrays_have_no_answers(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(blobs.CONFIG.format(path=blobs.write(tmp_path / "blobs.npz")))
    prompts = ["--evaluate.prompts", "asked.jsonl", "--out", str(tmp_path / "out")]
    assert main(["compare", str(tmp_path / "c.yaml"), *prompts]) == 1
    error = capsys.readouterr().err
    assert "evaluate.prompts = ('asked.jsonl',): is for text: a task of arrays has no language model" in error
