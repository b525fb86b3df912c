"""Arms against one baseline: what is told of crossed seeds and questions, corrections, pooling, words."""

import json
import math

import numpy as np
import pytest

from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.inference.generate import Response
from bilevel_jax.runs.config.schema import JudgeSection
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.arms import describe_arms, pool_measures, summarize_crossed
from bilevel_jax.runs.evaluation.measures import Measures
from bilevel_jax.runs.evaluation.metrics import METRICS, PairOutcomes, format_difference, summarize_metric
from bilevel_jax.runs.evaluation.models import Candidate
from bilevel_jax.runs.evaluation.questions import Question
from bilevel_jax.runs.evaluation.remarks import collect_remarks, why_undecided
from bilevel_jax.runs.evaluation.summary import build_answer_table
from bilevel_jax.runs.infra import run_dir


def accuracies(seeds=3, questions=60, gain=0.0, by_seed=0.0):
    """Right answers of the model and the baseline, of which the model's are right more often by `gain`."""
    random = np.random.default_rng(0)
    shifts = by_seed * np.linspace(-1, 1, seeds)[:, None]
    difficulty = random.uniform(0.2, 0.6, questions)
    draws = [random.random((seeds, questions)) for _ in range(2)]
    return {
        "model": (draws[0] < difficulty + gain + shifts).astype(float),
        "baseline": (draws[1] < difficulty).astype(float),
    }


def summarize(values, num_pairs=1, name="accuracy"):
    return summarize_crossed(name, METRICS[name], values, 0, num_pairs)


def test_of_one_seed_and_one_arm_it_is_the_comparison_of_two_models():
    for name in ("accuracy", "perplexity", "preference"):
        values = accuracies(1, gain=0.3)
        values = {"model": values["model"]} if name == "preference" else values
        line = summarize(values, 1, name)
        two = summarize_metric(name, METRICS[name], {role: of_role[0] for role, of_role in values.items()}, 0)
        rates = ("model", "baseline") if name == "preference" else ()  # moved by 1/2 and back
        same = [key for key in two if key not in ("difference", "p", *rates)]
        assert {key: line[key] for key in same} == {key: two[key] for key in same}
        for key in rates:
            assert line[key] == pytest.approx(two[key], abs=1e-12)
        assert line["p"] == pytest.approx(two["p"])
        assert line["difference"] == pytest.approx(two["difference"], abs=1e-12)
        assert line["difference"] == line["for_these_models"] and line["by_seed"] == [line["difference"].value]


def test_a_difference_is_told_and_that_of_a_model_from_itself_is_not():
    same = accuracies()["model"]
    line = summarize({"model": same, "baseline": same})
    assert line["level"] == "none" and line["p"] == 1.0 and line["difference"].value == 0
    assert line["difference"].high > 0  # 60 questions do not say that no other differs
    better = summarize(accuracies(gain=0.35), 8)
    assert better["level"] == "better" and better["difference"].low > 0
    assert summarize(accuracies(gain=0.35), 8, "perplexity")["level"] == "worse"
    assert summarize(accuracies(gain=0.35), 8, "refusal")["level"] == "open"


def test_seeds_that_disagree_tell_no_difference_however_many_questions():
    line = summarize(accuracies(questions=2000, gain=0.1, by_seed=0.2))
    assert line["for_these_models"].low > 0  # that these three are better is plain
    assert line["level"] == "none" and line["difference"].low < 0 < line["difference"].high
    assert min(line["by_seed"]) < 0 < max(line["by_seed"])


def test_more_arms_widen_the_intervals_and_raise_p():
    alone, many = (summarize(accuracies(gain=0.15), count) for count in (1, 9))
    assert many["difference"].high > alone["difference"].high and many["difference"].low < alone["difference"].low
    assert many["p_alone"] == alone["p_alone"] == alone["p"]
    assert many["p"] == pytest.approx(1 - (1 - alone["p"]) ** 9)
    for key in ("model", "baseline", "for_these_models"):
        assert many[key] == alone[key]


def test_questions_without_a_value_under_any_seed_are_left_out():
    values = accuracies(questions=20, gain=0.3)
    fewer = {role: of_role.copy() for role, of_role in values.items()}
    fewer["baseline"][1, 4] = math.nan
    line = summarize(fewer)
    kept = np.delete(np.arange(20), 4)
    assert line == summarize({role: of_role[:, kept] for role, of_role in values.items()}) | {"left_out": 1}
    nothing = summarize({role: np.full((2, 3), math.nan) for role in values})
    assert nothing["questions"] == 0 and nothing["level"] == "none" and nothing["difference"] is None


def through_json(value, folder):
    run_dir.write_json(folder / "value.json", value)
    return json.loads((folder / "value.json").read_text())


def test_one_question_has_no_interval_over_seeds(tmp_path):
    for name in ("accuracy", "perplexity", "preference"):
        values = {role: of_role[:, :1] for role, of_role in accuracies(seeds=3, gain=0.3).items()}
        values["model"] = np.array([[0.0], [1.0], [1.0]])
        values = {"model": values["model"]} if name == "preference" else values
        line = summarize(values, 4, name)
        assert line["difference"].value != 0 and line["level"] == "none"
        assert np.isnan(line["difference"][1:]).all() and np.isnan(line["model"][1:]).all()
        assert format_difference(name, through_json(line, tmp_path)).endswith(" [unknown]")


def test_values_that_are_all_alike_have_an_interval_as_wide_as_with_one_of_them_otherwise():
    """Two seeds know little of others: 200 prompts do not make it up."""
    for seeds, count in ((2, 9), (2, 1), (5, 9)):
        same = np.ones((seeds, 200))
        apart = same.copy()
        apart[1, 7] = 0.0
        for role in ("model", "baseline"):
            alike, other = (summarize({"model": one, "baseline": same}, count) for one in (same, apart))
            for key in (role, "difference"):
                assert alike[key].low <= other[key].low and alike[key].high >= min(1.0, other[key].high), key
        assert summarize({"model": same}, count, "preference")["model"].low < 0.99
        alone = summarize({"model": same[:1], "baseline": 0 * same[:1]}, count)
        both = summarize({"model": same, "baseline": 0 * same}, count)
        assert both["difference"].low < alone["difference"].low or seeds == 5
        assert both["p_alone"] > 1e-9  # two seeds are never that sure


def test_win_rates_have_the_corrected_interval_that_the_verdict_rests_on():
    line = summarize({"model": accuracies(gain=0.2)["model"]}, 9, "preference")
    assert line["model"] == pytest.approx([0.5 + end for end in line["difference"]])
    assert line["baseline"] == pytest.approx([0.5 - line["difference"][at] for at in (0, 2, 1)])


def test_prompts_left_out_under_some_seed_undo_a_verdict():
    """Few verdicts lack under each seed, and other ones each time."""
    values = (accuracies(seeds=5, questions=400, gain=0.4)["model"] + 1) / 2
    for seed in range(5):
        values[seed, seed * 30 : seed * 30 + 36] = math.nan  # 9 %
    line, judge = summarize({"model": values}, 1, "preference"), JudgeSection()
    measures = Measures([{}, {}], None, unjudged={"preference": 0.09})
    assert (line["level"], line["questions"], line["left_out"]) == ("better", 244, 156)
    why = why_undecided(judge, "preference", line, measures)
    assert why.startswith("156 of 400 prompts lack a verdict or a value under some seed and are left out")
    few = summarize({"model": values[:1]}, 1, "preference")
    assert few["left_out"] == 36 and why_undecided(judge, "preference", few, measures) == ""
    assert "preference: 36 of 400 prompts lack a verdict or a value and are left out" in collect_remarks(
        judge, {"preference": few}, None, Measures([{}, {}], None), []
    )
    without_reference = accuracies(questions=20)
    without_reference["model"][:, :5] = without_reference["baseline"][:, :5] = math.nan
    assert summarize(without_reference)["left_out"] == 0


def test_answers_of_seeds_are_told_by_their_seed_and_its_model():
    turns = Turn("user", "q"), Turn("assistant", "")
    question = Question(Example("a", 0, turns, "s", None, "file", 1), None)
    rows = [[Response(str(draw), (), (), True) for draw in range(4)]]
    pooled = ModelAnswers(Candidate("model", "m", None, None), rows, "x, y", np.ones(1), np.ones(1), ("x", "y"))
    table = build_answer_table([question], [pooled], Measures([{}], None), {"file": "file"}).to_pydict()
    assert table["fingerprint"] == ["x", "x", "y", "y"] and table["seed"] == [0, 0, 1, 1]
    alone = build_answer_table([question], [pooled._replace(fingerprints=())], Measures([{}], None), {"file": "file"})
    assert alone["fingerprint"].to_pylist() == ["x, y"] * 4 and "seed" not in alone.column_names


def test_measures_of_seeds_are_pooled_as_draws():
    def part(number):
        outcomes = PairOutcomes(np.full((2, 3, 2), float(number)), np.ones((2, 3), bool))
        row = {"id": "a", "draw": 2, "metric": "preference"}
        return Measures(
            [{"accuracy": np.full((2, 3), number)}] * 2, outcomes, [row], {"chrf": "s"}, {"chrf": [number, 0.0]},
            {"preference": number / 10},
        )  # fmt: skip

    pooled = pool_measures([part(0.0), part(1.0)], 3)
    assert pooled.answers[1]["accuracy"].tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    assert pooled.pairs.scores.shape == (2, 6, 2) and pooled.pairs.asked.shape == (2, 6)
    assert [(row["draw"], row["seed"]) for row in pooled.judgements] == [(2, 0), (5, 1)]
    assert pooled.corpus_scores == {"chrf": [0.5, 0.0]} and pooled.unjudged == {"preference": 0.05}


def test_the_sentence_names_every_arm_by_what_is_told_of_it():
    def compared(values, level=""):
        line = summarize(values, 4)
        return {"metrics": {"accuracy": line}, "level": level or line["level"]}

    found = {
        "baseline": "uniform", "metric": "accuracy", "seeds": 3,
        "comparisons": {
            "one": compared(accuracies()), "good": compared(accuracies(gain=0.4)), "two": compared(accuracies()),
            "three": compared(accuracies()), "odd": compared(accuracies(), "undecided"),
        },
    }  # fmt: skip
    sentence = describe_arms(found)
    assert sentence.startswith("By accuracy, on 60 questions and 3 seeds: better than uniform: good (+")
    assert "; no difference told for one, two and three; undecided" in sentence and sentence.endswith("odd.")
