"""Arms against one baseline: what is told of crossed seeds and questions, corrections, pooling, words."""

import math

import numpy as np
import pytest

from bilevel_jax.runs.evaluation.arms import describe_arms, pool_measures, summarize_crossed
from bilevel_jax.runs.evaluation.measures import Measures
from bilevel_jax.runs.evaluation.metrics import METRICS, PairOutcomes, summarize_metric


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
        assert {key: line[key] for key in two if key not in ("difference", "p")} == {
            key: two[key] for key in two if key not in ("difference", "p")
        }
        assert line["p"] == pytest.approx(two["p"])
        near = 0.02 if name == "preference" else 1e-12  # which resamples anew
        assert line["difference"] == pytest.approx(two["difference"], abs=near)
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
    assert line == summarize({role: of_role[:, kept] for role, of_role in values.items()})
    nothing = summarize({role: np.full((2, 3), math.nan) for role in values})
    assert nothing["questions"] == 0 and nothing["level"] == "none" and nothing["difference"] is None


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
    assert [row["draw"] for row in pooled.judgements] == [2, 5]
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
