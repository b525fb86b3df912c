"""The command `tune`: what it writes, resuming, the bias of choosing, and errors."""

import dataclasses
import json
import math

import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.cli import main
from bilevel_jax.commands.tune import report, run
from bilevel_jax.commands.tune.search import Outcome, Trained, Trial
from bilevel_jax.core.certify import Verdict
from bilevel_jax.runs.config.load import AuditConfig, SelectConfig, TuneConfig, load_config
from bilevel_jax.runs.infra import distributed
from tests.commands.run_table import TUNE_TASK
from tests.runs import blobs

CONFIG = (
    TUNE_TASK
    + """tune:
  {{learning_rates: [0.0001], warmup_shares: [], clip_norms: [], batch_sizes: [], activations: [],
   max_loss_increase: 9}}
certify: {{step_sizes: [0.1], removed: [0.5], draws: 1}}
output: {{progress: false}}
mesh: {{data: 1}}
"""
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blobs")
    blobs.write(folder / "blobs.npz")
    (folder / "tune.yaml").write_text(CONFIG.format(made=folder))
    return folder / "tune.yaml"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that was stopped after it had trained the second setting, and went on."""
    out = tmp_path_factory.mktemp("whole") / "run"
    write, trained = run.SettingJudge._train, []

    def stop_in_the_next(judge, setting):
        found = write(judge, setting)
        trained.append(dict(setting))
        if len(trained) == 2:
            judge.session.handle_signal(15, None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.SettingJudge, "_train", stop_in_the_next)
        with pytest.raises(bj.commands.Interrupted):
            bj.commands.tune(config, output={"dir": str(out)})
        result = bj.commands.tune(config, output={"dir": str(out), "resume": True})
    return result, trained


def test_the_proposed_setting_is_ready_for_the_next_command(whole):
    result, trained = whole
    assert trained == [{}, {"optimizer.learning_rate": 0.003}]  # none of them twice
    assert [setting.name for setting in result.settings] == ["the config's own", "learning_rate 0.003"]
    assert result.settings[0].verdict is None or result.settings[0].verdict.level != "BELIEVE"
    assert result.proposed is result.settings[1] and result.proposed.verdict.level == "BELIEVE"
    tuned = load_config(AuditConfig, result.tuned)
    assert tuned.optimizer.learning_rate == pytest.approx(0.003) and tuned.output.dir == f"{result.folder}-tuned"
    assert tuned.arrays == result.config.arrays and not tuned.output.resume
    assert "--optimizer.learning-rate 0.003" in result.summary and "BELIEVE" in result.summary
    assert bj.commands.read_result(result.folder).summary == result.summary
    page = result.report.read_text()
    assert "can only take a BELIEVE away" in page and "of so many tries one may hold by chance" in page
    assert "too low" in page and "Test has chosen nothing" in page and page.count("<svg") == 1
    with pytest.raises(FileExistsError):
        bj.commands.tune(result.folder / "config.yaml")


def test_the_log_has_each_setting_once(whole):
    lines = [json.loads(line) for line in (whole[0].folder / "log.jsonl").read_text().splitlines()]
    trained = [line["setting"] for line in lines if line["event"] == "trained"]
    assert sorted(trained) == sorted(setting.name for setting in whole[0].settings)


AUDIT_FLAGS = ["--audit.subsets", "9", "--audit.scores", "loss", "random", "--audit.removed", "0.5"]


@pytest.mark.parametrize(
    "file, flags, command",
    [
        ("configs/audit_stories.yaml", [], "audit"),
        ("configs/select.yaml", AUDIT_FLAGS, "audit"),
        ("configs/select.yaml", ["--tune.command", "audit"], "audit"),
        ("configs/select.yaml", [], "select"),
        ("configs/audit_stories.yaml", ["--tune.command", "select"], "select"),
    ],
)
def test_tuned_yaml_has_all_sections_of_the_command_that_goes_on(tmp_path, file, flags, command):
    given = ["--model.name-or-path", "m", "--data.train", "a.jsonl", "--data.validation", "b.jsonl", *flags]
    config = load_config(TuneConfig, file, [*given, "--output.dir", "out/tune"])
    text = run.format_tuned(config, {"optimizer.learning_rate": 0.5}, {"sentence": "Use it."})
    assert text.startswith(f"# bilevel-jax {command} out/tune/tuned.yaml\n# Use it.\n")
    (tmp_path / "tuned.yaml").write_text(text)
    tuned = load_config({"audit": AuditConfig, "select": SelectConfig}[command], tmp_path / "tuned.yaml")
    assert tuned.optimizer.learning_rate == 0.5 and tuned.output.dir == "out/tune-tuned"
    for name in {*vars(tuned)} & {*vars(config)} - {"optimizer", "output", "audit"}:
        assert getattr(tuned, name) == getattr(config, name)
    if command == "audit":  # implicit, which is among the defaults, needs outer.proximal
        estimators = config.audit.estimators if file.endswith("audit_stories.yaml") else ("unrolled", "alignment")
        assert tuned.audit == dataclasses.replace(config.audit, estimators=estimators)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--outer.product-precision", "default"], "outer.product_precision = .*audit judges estimates"),
        (["--audit.estimators", "implicit", "alignment"], "audit.estimators = .*implicit needs outer.proximal"),
    ],
)
def test_a_setting_that_audit_would_refuse_in_tuned_yaml_is_refused_before_the_search(flags, message):
    given = ["--model.name-or-path", "m", "--data.train", "a.jsonl", "--data.validation", "b.jsonl", *flags]
    with pytest.raises(ValueError, match=message):
        load_config(TuneConfig, "configs/select.yaml", [*given, "--tune.command", "audit"])
    load_config(TuneConfig, "configs/select.yaml", [*given, "--tune.command", "select"])


def test_choosing_the_least_of_equal_settings_is_optimistic_by_the_noise():
    """Of K settings that differ by noise alone: E max of K normals, over the root of the number of examples."""
    count, settings = 400, 8
    losses = np.random.default_rng(0).normal(size=(settings, count))
    losses -= losses.mean(1, keepdims=True)
    trials = [Trial({"optimizer.learning_rate": float(k)}, Trained({}, 0.0)) for k in range(settings)]
    examples = {trial.name: list(row) for trial, row in zip(trials, losses, strict=True)}
    outcome = Outcome(trials, trials[0], None, limit=1.0, spent=0, stopped_by_budget=False)
    expected_maximum = 1.4236  # of 8 standard normals
    assert run.estimate_optimism(outcome, examples, 0) == pytest.approx(expected_maximum / math.sqrt(count), rel=0.06)
    assert run.estimate_optimism(outcome._replace(proposed=None), examples, 0) is None
    rough = Trial(
        {"optimizer.learning_rate": 99.0}, Trained({}, -1.0), smoothness=0.1
    )  # of the least loss, but no choice
    examples[rough.name] = [-1.0] * count
    with_rough = run.estimate_optimism(outcome._replace(trials=[*trials, rough]), examples, 0)
    assert with_rough == run.estimate_optimism(outcome, examples, 0)


@pytest.mark.slow
def test_on_text_its_certificates_are_those_of_select_and_of_audit_at_the_setting_that_it_proposes(made, tmp_path):
    """The same draws and directions in float32, by programs that are compiled for other optimizers."""
    tune = {"learning_rates": [0.03, 0.01], "warmup_shares": [], "eps_roots": [], "clip_norms": [], "batch_sizes": []}
    train = {"max_steps": 4, "global_batch_size": 18}
    flags = {"optimizer": {"learning_rate": 3.0, "name": "sgd"}, "train": train, "retrain": {"enabled": False}}
    given = flags | {"tune": {**tune, "max_loss_increase": 9.0}, "output": {"dir": str(tmp_path / "tune")}}
    tuned = bj.commands.tune(made / "select.yaml", **given)
    assert tuned.proposed is not None and tuned.proposed is not tuned.settings[0], tuned.summary
    [mine] = [row["certificates"] for row in tuned.result["rows"] if row["name"] == tuned.result["proposed"]]
    selected = bj.commands.select(tuned.tuned, retrain={"enabled": False})
    theirs = selected.result["certificates"]["uniform weights"]
    for key in ("steps", "ratios"):
        assert mine["exact"][key] == pytest.approx(theirs["exact"][key], rel=1e-3)
    for key in ("removed", "cosines"):
        assert mine["smooth"][key] == pytest.approx(theirs["smooth"][key], abs=1e-3)
    assert mine["reliability"]["value"] == pytest.approx(theirs["reliability"]["value"], abs=1e-3)
    given |= {"tune": {**given["tune"], "command": "audit"}, "output": {"dir": str(tmp_path / "other")}}
    again = bj.commands.tune(made / "select.yaml", audit={"subsets": 8, "queries": 0, "extremes": []}, **given)
    scores = {"scores": ["random"], "token_examples": 0}
    assert bj.commands.audit(again.tuned, audit=scores).config.optimizer == selected.config.optimizer


def make_row(name, loss, level=None, draw=None):
    verdict = level and Verdict(level, "", "because.", "")._asdict()
    return {
        "name": name, "losses": {} if loss is None else {"dev": loss}, "failure": "" if loss else "diverged.",
        "draw": draw, "share": 0.5, "verdict": verdict, "certificates": None, "cost_factor": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"proposed": "own", "rows": [make_row("own", 1.0, "BELIEVE")]}, "nothing has to change"),
        ({"proposed": "low"}, "Use --x 1: BELIEVE, with a dev loss of 1.0200 (+2.0%); the config's own"),
        (
            {"beyond": "low"},
            "No setting within 5% of the loss holds. Low does, with a dev loss of 1.0200 (+2.0%), more",
        ),
        ({}, "No setting that was tried holds. The closest is mid: UNDECIDED, metasmoothness 0.70 without 50%"),
        ({"stopped_by_budget": True}, "tune.budget ended the search."),
        ({"rows": [make_row("own", None)]}, "The config's own: diverged."),
    ],
)
def test_the_sentence_says_what_was_found(changes, words):
    rows = [make_row("own", 1.0, "DO NOT BELIEVE", 0.1), make_row("mid", 1.01, "UNDECIDED", 0.7)]
    rows += [make_row("low", 1.02, "BELIEVE", 0.9)] if {"proposed", "beyond"} & set(changes) else []
    result = {
        "rows": rows, "proposed": None, "beyond": None, "part": "dev", "limit": 1.05, "max_loss_increase": 0.05,
        "flags": "--x 1", "stopped_by_budget": False,
    } | changes  # fmt: skip
    assert words in report.summarize_tuning(result)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--outer.method bmo", "outer.method = 'bmo': has no hypergradient that tune could certify: choose unrolled"),
        ("--tune.command select", "tune.command = 'select': select is for text"),
        ("--certify.no-enabled", "certify.enabled = False: tune judges each setting by its certificates"),
        ("--tune.learning-rates --tune.eps-roots", "nothing to try: give tune.learning_rates"),
        ("--certify.step-sizes 0.03 0.01", "certify.step_sizes = (0.03, 0.01): has no step of .1"),
        ("--certify.removed 0.05", "certify.removed = (0.05,): has no share of .1 or more"),
        ("--contradictions.draws 4", "contradictions.draws = 4: is of select"),
    ],
)
def test_what_it_cannot_do_is_told(config, tmp_path, capsys, flags, words):
    assert main(["tune", str(config), *flags.split(), "--out", str(tmp_path / "run")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_several_processes_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
    with pytest.raises(ValueError, match="tune runs in one process"):
        run.tune(bj.commands.TuneConfig())
