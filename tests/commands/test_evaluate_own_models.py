"""Section `evaluate` of `select`, `train` and `refine`: their models answer as written ones do, once."""

import json
import os
import re
import signal

import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.evaluate.run import evaluate
from bilevel_jax.commands.refine.run import refine
from bilevel_jax.commands.results import read_result
from bilevel_jax.commands.select.run import select
from bilevel_jax.commands.train.run import train
from bilevel_jax.lm.inference import continuous_batching
from bilevel_jax.runs.config.load import EvaluateConfig, RefineConfig, SelectConfig, TrainConfig, load_config
from bilevel_jax.runs.infra.session import Interrupted, Session
from tests.commands.chat_server import ChatServer, make_judge

ASK = ("--verifier.name", "exact", "--generate.max-new-tokens", "6")
FAST = ("--certify.no-enabled", "--retrain.no-enabled")


def run_select(made, out, *flags, prompts="test"):
    given = ["--evaluate.prompts", str(made / f"{prompts}.jsonl"), *ASK, *FAST, *flags, "--out", str(out)]
    return select(load_config(SelectConfig, made / "select.yaml", given))


def run_train(made, out, *flags):
    return train(load_config(TrainConfig, made / "train.yaml", [*flags, "--out", str(out)]))


@pytest.fixture(scope="module")
def selected(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("selected") / "run"
    return out, run_select(made, out, "--outer.learning-rate", "1")


def compare_folders(made, out, model, baseline):
    """What the command `evaluate` finds of two folders."""
    given = ["--model", str(model), "--baseline", str(baseline), "--prompts", str(made / "test.jsonl"), *ASK,
             "--mesh.data", "1", "--output.no-progress", "--out", str(out)]  # fmt: skip
    return evaluate(load_config(EvaluateConfig, None, given))


def same_numbers(*parts):
    """What is found, without the names of the models."""

    def without_names(part):
        text = json.dumps({name: part[name] for name in ("level", "refusal_by", "counts", "metrics", "models")})
        return json.loads(text.replace(part["names"]["model"], "A").replace(part["names"]["baseline"], "B"))

    return map(without_names, parts)


def test_select_says_of_its_models_what_evaluate_says_of_their_folders(made, selected, tmp_path):
    """The learned one is model/; the uniform one is that of `train` with the seeds of the first retrain."""
    out, result = selected
    flags = ("--train.num-epochs", "1", "--train.max-steps", "10", "--train.seed", "10000", "--data.seed", "10000")
    warm = ("--optimizer.warmup-ratio", "0", "--optimizer.warmup-steps", "2")
    run_train(made, tmp_path / "uniform", *flags, *warm)
    for key, folder in (("uniform", tmp_path / "uniform" / "model"), ("before", made / "model")):
        found = compare_folders(made, tmp_path / f"against {key}", out / "model", folder)
        own, wanted = same_numbers(result["evaluate"]["comparisons"][key], found)
        assert own == wanted
        mine, other = (
            pq.read_table(at / "answers.parquet") for at in (out / "evaluate" / key, tmp_path / f"against {key}")
        )
        assert mine.drop(["model"]).equals(other.drop(["model"]))
    assert list(result["evaluate"]["comparisons"]["uniform"]["metrics"]) == ["accuracy", "perplexity", "refusal"]
    assert result["evaluate"]["sentence"] == result["evaluate"]["comparisons"]["uniform"]["sentence"]


def test_the_result_and_the_report_of_select_tell_it(selected):
    out, result = selected
    typed = read_result(out)
    assert typed.summary.splitlines()[-1] == f"Answers: {result['evaluate']['sentence']}"
    assert list(typed.evaluations) == ["uniform", "before"]
    compared = typed.evaluations["uniform"]
    assert compared.level == result["evaluate"]["level"] and len(compared.answers) == 32
    assert compared.roles.tolist() == ["model"] * 16 + ["baseline"] * 16
    mean = compared.measures["accuracy"][compared.roles == "model"].mean()
    assert compared.result["metrics"]["accuracy"]["model"][0] == pytest.approx(mean)
    page = (out / "report.html").read_text()
    assert "Are the answers better?" in page and page.count("Answers side by side") == 2
    assert "The model with learned weights against the model with uniform weights" in page


@pytest.mark.slow
def test_weights_that_stayed_uniform_give_no_difference(made, tmp_path):
    result = run_select(made, tmp_path / "out", "--outer.learning-rate", "1e-12")["evaluate"]
    line = result["comparisons"]["uniform"]["metrics"]["perplexity"]
    assert line["difference"] == (0, 0, 0) and result["level"] == "none"
    assert result["sentence"].startswith("No difference told between the model with learned weights and the model with")


def test_without_prompts_nothing_is_asked_and_prompts_of_training_are_told(made, tmp_path):
    result = run_train(made, tmp_path / "none")
    assert result["evaluate"] is None and not (tmp_path / "none" / "evaluate").exists()
    assert read_result(tmp_path / "none").evaluations == {} and "Are the answers" not in (
        tmp_path / "none" / "report.html"
    ).read_text()  # fmt: skip
    asked = run_train(made, tmp_path / "asked", "--evaluate.prompts", str(made / "train.jsonl"), *ASK)["evaluate"]
    assert list(asked["comparisons"]) == ["before"]
    notes = asked["comparisons"]["before"]["notes"]
    assert any("WARNING: 36 prompts also stand among the training examples" in note for note in notes)
    assert read_result(tmp_path / "asked").summary.splitlines()[-1] == f"Answers: {asked['sentence']}"
    found = compare_folders(made, tmp_path / "folders", tmp_path / "asked" / "model", made / "model")
    assert set(found["metrics"]) == set(asked["comparisons"]["before"]["metrics"])


@pytest.mark.slow
def test_refine_compares_its_last_model_with_the_first(made, tmp_path):
    """None is accepted where dev must gain more than it can, so that both are the model that was given."""
    prompts = ("--evaluate.prompts", str(made / "test.jsonl"), "--evaluate.questions", "9", "--refine.rounds", "1")
    given = [*prompts, "--refine.methods", "unrolled", "--refine.level", "1e-6", "--out", str(tmp_path / "out")]
    result = refine(load_config(RefineConfig, made / "refine.yaml", given))
    compared = read_result(tmp_path / "out").evaluations["first"]
    assert result["accepted"] == 0 and compared.level == "none" and compared.summary == result["evaluate"]["sentence"]
    assert compared.result["metrics"]["perplexity"]["difference"] == [0, 0, 0]
    assert len(compared.answers) == 2 * 2 * 9 and compared.result["counts"]["questions"] == 9
    assert (compared.answers[:18] != compared.answers[18:]).any()  # sampled anew
    assert "The last accepted model against the first model" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow  # test_compare_answers stops among answers, too
def test_a_stop_asks_nothing_twice_and_changes_no_number(made, tmp_path, monkeypatch):
    """Stopped while the judge replies: answers and verdicts are there, and no model is trained or read again."""
    for name in ("http_proxy", "HTTP_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = ChatServer({"judge": make_judge(len)})
    judge = ("--judge.url", server.url, "--judge.model", "judge", "--judge.concurrency", "1", "--judge.retries", "0")
    flags = (*judge, "--evaluate.metrics", "preference", "safety", "--outer.learning-rate", "1", "--outer.steps", "1")
    try:
        whole = run_select(made, tmp_path / "whole", *flags)["evaluate"]
        total = len(server.requests)
        assert whole["comparisons"]["uniform"]["judge"]["pairs"]["total"] == 16 and total > 16
        server.requests.clear()
        server.before = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 9 else None
        with pytest.raises(Interrupted):
            run_select(made, tmp_path / "out", *flags)
        monkeypatch.setattr(continuous_batching, "_BatchRun", None)  # whoever answers again, fails
        result = run_select(made, tmp_path / "out", *flags, "--output.resume")["evaluate"]
        requests = [json.dumps(body, sort_keys=True) for body in server.requests]
        assert len(requests) == len(set(requests)) == total
    finally:
        server.close()
    for key in ("uniform", "before"):
        own, wanted = same_numbers(result["comparisons"][key], whole["comparisons"][key])
        assert own == wanted


@pytest.mark.slow
def test_a_stop_in_the_uniform_training_goes_on(made, selected, tmp_path, monkeypatch):
    advance, phases = Session.advance, []

    def stopping(self, amount=1.0):
        if "answers of the learned" in self._finished_jobs and not phases:
            phases.append("uniform")
            signal.raise_signal(signal.SIGTERM)
        advance(self, amount)

    monkeypatch.setattr(Session, "advance", stopping)
    with pytest.raises(Interrupted):
        run_select(made, tmp_path / "out", "--outer.learning-rate", "1")
    result = run_select(made, tmp_path / "out", "--outer.learning-rate", "1", "--output.resume")
    own, wanted = same_numbers(
        result["evaluate"]["comparisons"]["uniform"], selected[1]["evaluate"]["comparisons"]["uniform"]
    )
    assert own == wanted


ERRORS = {
    "nothing to ask": (["--verifier.name", "exact"], "evaluate.prompts = (): evaluate.metrics, verifier.name"),
    "no file": (["--evaluate.prompts", "gone.jsonl"], "gone.jsonl: no such file"),
    "greedy draws": (["--generate.num-generations", "2"], "greedy answers to one prompt are all the same"),
    "a service": (
        ["--generate.backend", "service", "--generate.url", "http://x/v1", "--generate.model", "x"],
        "the models of the run answer in this process",
    ),
    "no verifier": (["--evaluate.prompts", "{made}/test.jsonl", "--evaluate.metrics", "accuracy"], "accuracy needs a"),
    "no judge": (["--evaluate.prompts", "{made}/test.jsonl", "--evaluate.metrics", "preference"], "need a judge"),
    "no reference": (
        ["--evaluate.prompts", "{bare}", "--evaluate.metrics", "perplexity", *ASK[2:]],
        "bare.jsonl:1: perplexity compares with references",
    ),
    "too long": (
        ["--evaluate.prompts", "{made}/test.jsonl", "--generate.max-new-tokens", "4000"],
        "test.jsonl:1: the prompt has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["select", "train"])
@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_told_before_any_work(made, tmp_path, capsys, command, name):
    flags, text = ERRORS[name]
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "ab>"}\n')
    flags = [flag.format(made=made, bare=bare) for flag in flags]
    assert main([command, str(made / f"{command}.yaml"), *flags, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(f"^bilevel-jax: .*{re.escape(text)}", error, re.MULTILINE), error
    assert not (tmp_path / "out").exists()
