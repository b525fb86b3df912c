"""Answers of the arms of a comparison, each against one baseline over seeds."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from bilevel_jax.core.types import Params
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.load import CompareConfig
from bilevel_jax.runs.evaluation import answers
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.measures import Evaluation, Measures, measure
from bilevel_jax.runs.evaluation.metrics import (
    LEVEL,
    METRICS,
    Metric,
    PairOutcomes,
    decide_level,
    format_difference,
    mean_interval,
    metric_facts,
)
from bilevel_jax.runs.evaluation.models import ROLES
from bilevel_jax.runs.evaluation.run_models import RunModel, describe_run_answers, make_run_candidate, put_in_role
from bilevel_jax.runs.evaluation.summary import (
    LEVELS_OF_JUDGE,
    RUN_FOLDER,
    make_judge,
    question_values,
    summarize,
    write_tables,
)
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.stats import (
    BootstrapInterval,
    crossed_half_width,
    crossed_p,
    sidak_level,
    sidak_p,
    sign_flip_p,
)
from bilevel_jax.runs.tasks.text import TextTask

SeedValues = Float[np.ndarray, "seeds questions"]


def collect_arm_answers(
    config: CompareConfig,
    task: TextTask,
    evaluation: Evaluation,
    arm: str,
    seed: int,
    load_params: Callable[[], Params],
    session: Session,
) -> ModelAnswers:
    """The answers of the model of an arm under one seed, generated or, as far as an earlier part did that, read.

    Seed number s takes the draws from s * n on, the same for every arm. `load_params` is called only where something
    is left to do.
    """
    candidate = make_run_candidate(task, RunModel(f"{arm} (seed {seed})", f"{arm}, seed {seed}", load_params))
    found = answers.collect_answers(config, candidate, evaluation.questions, seed, session)
    return found._replace(candidate=replace(candidate, name=arm))


def compare_arms(
    config: CompareConfig, evaluation: Evaluation, arm_answers: Mapping[str, Sequence[ModelAnswers]], session: Session
) -> dict[str, Any]:
    """Compare the models of every arm with those of evaluate.baseline, seed by seed and question by question.

    The estimand is the mean difference over trainings and questions: of the same data, with other seeds, and of other
    questions of the same kind. See `summarize_crossed`.

    Args:
        config: that of the run, with sections evaluate, generate, verifier and judge.
        evaluation: what was asked.
        arm_answers: arm -> what its model of each seed answered.
        session: the run's; verdicts that it has stored are not asked for again.

    Returns:
        For result.json: the `baseline`, the number of `seeds`, `level_of_each` interval, a `sentence` on the deciding
        metric, and `comparisons` by arm, each as result.json of `evaluate`. Their tables are written to evaluate/ARM.

    Raises:
        RuntimeError: the judge refuses or does not answer; what came before is stored.
    """
    baseline = config.evaluate.baseline
    others = [arm for arm in arm_answers if arm != baseline]
    comparisons = {}
    for arm in others:
        summary = _compare_arm(config, evaluation, arm_answers[arm], arm_answers[baseline], len(others), session)
        roles = dict(zip(ROLES, (arm, baseline), strict=True))
        summary["seconds"] = {role: session.job_cost(f"answers of the {name} (seed")[1] for role, name in roles.items()}
        comparisons[arm] = summary | {"notes": []}  # those of all arms stand below
        session.print_line(f"evaluate: {summary['sentence']}")
    found = {
        "baseline": baseline,
        "metric": evaluation.metrics[0],
        "seeds": len(arm_answers[baseline]),
        "level_of_each": sidak_level(LEVEL, len(others)),
        "comparisons": comparisons,
        "remarks": _collect_remarks(comparisons),
        "notes": [
            *evaluation.notes,
            *(
                note
                for models in arm_answers.values()
                for note in describe_run_answers(_pool(models), evaluation.questions)
            ),
        ],
    }
    return {"sentence": describe_arms(found), **found}


def _compare_arm(
    config: CompareConfig,
    evaluation: Evaluation,
    models: Sequence[ModelAnswers],
    baselines: Sequence[ModelAnswers],
    num_pairs: int,
    session: Session,
) -> dict[str, Any]:
    questions, metrics = evaluation.questions, evaluation.metrics
    judge_client = make_judge(config, metrics, session)  # counts what this comparison takes
    pairs = [
        [put_in_role(role, one) for role, one in zip(ROLES, pair, strict=True)]
        for pair in zip(models, baselines, strict=True)
    ]
    parts = [measure(config, metrics, questions, pair, evaluation.verifier, judge_client) for pair in pairs]
    lines = {}
    for name in metrics:
        values = [question_values(name, questions, pair, part) for pair, part in zip(pairs, parts, strict=True)]
        by_role = {role: np.stack([of_seed[role] for of_seed in values]) for role in values[0]}
        lines[name] = summarize_crossed(name, METRICS[name], by_role, config.data.seed, num_pairs)
    pooled = [_pool(of_role) for of_role in zip(*pairs, strict=True)]
    measures = pool_measures(parts, config.generate.num_generations)
    summary = summarize(config, metrics, questions, pooled, measures, judge_client, lines)
    folder = session.folder / RUN_FOLDER / models[0].candidate.name
    distributed.run_on_first_process(partial(folder.mkdir, parents=True, exist_ok=True))
    write_tables(folder, metrics, questions, pooled, measures)
    return summary


def summarize_crossed(
    name: str, metric: Metric, values: Mapping[str, SeedValues], seed: int, num_pairs: int
) -> dict[str, Any]:
    """What result.json holds of a metric of an arm and the baseline, whose models answer the same questions.

    Seeds and questions are crossed and both taken as drawn from many (`crossed_half_width`); of one seed, questions
    alone are resampled, and nothing is said of other trainings. Differences have intervals that cover at once for all
    `num_pairs` arms in 95 % of such comparisons (`sidak_level`), and p-values that are corrected likewise; both must
    tell a difference, and so must sign flips of the questions' differences, which also holds where few differ. Where
    all values are alike, see `_interval`. The metrics are not corrected for one another.

    Args:
        name: of the metric.
        metric: what it is.
        values: of the model and of the baseline; of preference the win shares of the model alone. Questions that lack a
            value under any seed are left out, and counted: of what a judge says all of them, of other metrics those
            that have a value at all, as some have no reference.
        seed: of resamples.
        num_pairs: arms that are compared with the baseline.

    Returns:
        As `summarize_metric`, and `seeds`, their number, `left_out`, of questions, `by_seed`, the difference of each
        seed, `for_these_models`, the 95 % interval of the difference over questions alone, of one arm by itself, and
        `p_alone`, which is not corrected. The win rates of preference have the interval of the difference, moved by
        1/2, which covers for all arms at once.
    """
    missing = np.isnan(np.stack(list(values.values())))
    known = ~missing.any((0, 1))
    possible = len(known) if name in (*LEVELS_OF_JUDGE, "refusal") else int((~missing.all((0, 1))).sum())
    kept, key = {role: of_role[:, known] for role, of_role in values.items()}, (seed, *name.encode())
    ends = (0.0, 1.0) if metric.is_share else None
    line: dict[str, Any] = {
        **metric_facts(metric),
        "questions": int(known.sum()),
        "left_out": possible - int(known.sum()),
        "seeds": len(values["model"]),
    }
    level = sidak_level(LEVEL, num_pairs)
    if name == "preference":
        differences, ends, draws = kept["model"] - 0.5, (-0.5, 0.5), (*key, 0)
        difference = _interval(differences, ends, draws, level)
        line["model"] = BootstrapInterval(*(0.5 + end for end in difference))
        line["baseline"] = BootstrapInterval(0.5 - difference.value, 0.5 - difference.high, 0.5 - difference.low)
    else:
        line |= {role: _interval(kept[role], ends, (*key, ROLES.index(role)), LEVEL) for role in kept}
        differences, ends = kept["model"] - kept["baseline"], (-1.0, 1.0) if metric.is_share else None
        draws = (*key, 2)
        difference = _interval(differences, ends, draws, level)
    if not differences.shape[1]:
        nothing: dict[str, Any] = {
            "difference": None,
            "p": None,
            "p_alone": None,
            "by_seed": [],
            "for_these_models": None,
        }
        return line | nothing | {"level": "none"}
    flips = sign_flip_p(differences.mean(0), (*key, 3))
    p_alone = float(np.nanmax([flips, crossed_p(_with_one_apart(differences, ends))]))
    p = sidak_p(p_alone, num_pairs)
    return line | {
        "difference": difference,
        "p": p,
        "p_alone": p_alone,
        "by_seed": differences.mean(1).tolist(),
        "for_these_models": mean_interval(differences.mean(0), ends, draws),
        "level": decide_level(metric.sign, difference, p),
    }


def _interval(
    values: SeedValues, ends: tuple[float, float] | None, seed: tuple[int, ...], level: float
) -> BootstrapInterval:
    """The mean over seeds and questions with its interval, which stays within `ends`; nan ends where it is unknown.

    Several seeds that answer one question have no interval. Shares that are all alike show no spread, and few seeds
    know little of others: their interval holds that of the same sample with one answer that is otherwise
    (`_with_one_apart`), so that it knows how few seeds there are, and the exact one over questions
    (`metrics.mean_interval`). As every interval of the crossed seeds it takes their means as about normal: a seed that
    fails as a whole, and seldom, is not told by a few that do not.
    """
    if len(values) == 1 or not values.size:
        return mean_interval(values.mean(0), ends, seed, level)
    mean, spread = float(values.mean()), _with_one_apart(values, ends)
    half = crossed_half_width(spread, level) + abs(mean - float(spread.mean()))
    if math.isnan(half):
        return BootstrapInterval(mean, math.nan, math.nan)
    low, high = mean - half, mean + half
    if spread is not values:
        over_questions = mean_interval(values.mean(0), ends, seed, level)
        low, high = min(low, over_questions.low), max(high, over_questions.high)
    least, most = ends or (-math.inf, math.inf)
    return BootstrapInterval(mean, max(least, low), min(most, high))


def _with_one_apart(values: SeedValues, ends: tuple[float, float] | None) -> SeedValues:
    """Shares that are all alike with one of them otherwise, by one answer or verdict; other values as they are."""
    if ends is None or not values.size or not np.all(values == values.flat[0]):
        return values
    spread, value = values.copy(), float(values.flat[0])
    spread.flat[0] = value - 1 if value == ends[1] else value + 1 if value == ends[0] else ends[1]
    return spread


def _pool(models: Sequence[ModelAnswers]) -> ModelAnswers:
    """The answers of the models of all seeds as those of one: the draws of the first seed, then of the second, ..."""
    first = models[0]
    unread = np.isnan(np.stack([model.reference_nats for model in models])).any(0)
    nats = np.mean([model.reference_nats for model in models], axis=0)
    return ModelAnswers(
        first.candidate,
        [[response for row in rows for response in row] for rows in zip(*(m.responses for m in models), strict=True)],
        ", ".join(model.fingerprint for model in models),
        np.where(unread, math.nan, nats),
        first.reference_tokens,
        tuple(model.fingerprint for model in models),
    )


def pool_measures(parts: Sequence[Measures], num_draws: int) -> Measures:
    """What was measured under each seed as that of one model with the draws of all of them."""
    first = parts[0]
    pooled_answers = [
        {name: np.concatenate([part.answers[at][name] for part in parts], axis=1) for name in first.answers[at]}
        for at in range(len(first.answers))
    ]
    pairs = None
    if first.pairs is not None:
        outcomes = [part.pairs for part in parts if part.pairs is not None]
        pairs = PairOutcomes(*(np.concatenate(arrays, axis=1) for arrays in zip(*outcomes, strict=True)))
    return Measures(
        pooled_answers,
        pairs,
        [
            row | {"draw": row["draw"] + at * num_draws, "seed": at}
            for at, part in enumerate(parts)
            for row in part.judgements
        ],
        first.signatures,
        {name: np.mean([part.corpus_scores[name] for part in parts], axis=0).tolist() for name in first.corpus_scores},
        {name: float(np.mean([part.unjudged[name] for part in parts])) for name in first.unjudged},
    )


# ---- in words


def describe_arms(found: Mapping[str, Any]) -> str:
    """Which arms are better than the baseline by the deciding metric, which worse, and of which nothing is told."""
    comparisons, name, baseline = found["comparisons"], found["metric"], found["baseline"]
    groups: dict[str, list[str]] = {}
    for arm, compared in comparisons.items():
        line = compared["metrics"][name]
        value = "" if line["difference"] is None else f" ({format_difference(name, line)})"
        groups.setdefault(compared["level"], []).append(f"{arm}{value if compared['level'] in TOLD else ''}")
    title = METRICS[name].title
    parts = [f"{words} {baseline}: {_join(groups[level])}" for level, words in TOLD.items() if level in groups]
    parts += [f"{words} {_join(groups[level])}" for level, words in UNTOLD.items() if level in groups]
    counted = max(compared["metrics"][name]["questions"] for compared in comparisons.values())
    return f"By {title}, on {format_count('question', counted)} and {format_count('seed', found['seeds'])}: " + (
        "; ".join(parts) + "."
    )


TOLD = {"better": "better than", "worse": "worse than"}
UNTOLD = {
    "none": "no difference told for",
    "undecided": "undecided, as too many prompts lack a verdict, for",
    "open": "neither direction is better, measured for",
}


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _collect_remarks(comparisons: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The remarks of all comparisons; what each of them says is said once, the rest with the arm that it is of."""
    counts = Counter(remark for compared in comparisons.values() for remark in compared["remarks"])
    return [
        *(remark for remark, count in counts.items() if count == len(comparisons)),
        *(
            f"{arm}: {remark}"
            for arm, compared in comparisons.items()
            for remark in compared["remarks"]
            if counts[remark] < len(comparisons)
        ),
    ]
