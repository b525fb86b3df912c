"""Scores of a `refine` round's rows, the weights they become, and their drift."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.commands.refine.artifacts import read_round_scores, run_saved_job
from bilevel_jax.commands.refine.rollouts import RoundScores, RoundTask, count_questions, count_round_rows
from bilevel_jax.core.types import Params
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.schema import ScoreWeightsSection
from bilevel_jax.runs.infra.distributed import fetch_from_first
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring import likelihoods
from bilevel_jax.runs.scoring.online import fill_missing_scores, scale_over_examples, score_correlation
from bilevel_jax.runs.scoring.scores import compute_score
from bilevel_jax.runs.tasks.evaluation import is_validation_trainable, read_labels
from bilevel_jax.runs.tasks.text import TextTask
from bilevel_jax.scores.random import hash_to_int
from bilevel_jax.scores.requests import take_examples

SCORE = "ica"
MAX_RESCORED = 200
"""Responses that the next model scores once more after a round that was accepted, at most."""


def score_rows(
    config: RefineConfig, task: TextTask, params: Params, session: Session, number: int, name: str = "scores"
) -> RoundScores:
    """The score of every row of a task by a model, made now or read where a stopped run left it.

    The judge is the model that training starts from: a score says what a row would teach *that* model. It is the
    present model, which wrote the responses, unless refine.start_from is first.
    """

    def compute() -> tuple[list[jax.Array], dict[str, Any]]:
        scores = compute_score(SCORE, task, params, config.scores, session)
        session.advance(math.ceil(scores.passes))  # whole, so that sums keep every bit
        arrays = [scores.values, *([] if scores.standard_errors is None else [scores.standard_errors])]
        return [jnp.asarray(array, jnp.result_type(float)) for array in arrays], {"notes": list(scores.notes)}

    structure = [replicate(task.mesh, jnp.ones(task.num_examples))] * (1 + (config.scores.demonstration_sets > 1))
    arrays, facts = run_saved_job(session, number, name, scores_folder(session, number) / name, structure, compute)
    values, *errors = (fetch_from_first(array).astype(float) for array in arrays)
    return RoundScores(values, errors[0] if errors else None, facts)


def scores_folder(session: Session, number: int) -> Path:
    """What scoring has saved of a round that is not done."""
    return session.folder / "parts" / f"round {number} scores"


def scores_to_weights(
    settings: ScoreWeightsSection, round_task: RoundTask, values: Float[np.ndarray, "examples"]
) -> Float[np.ndarray, "examples"]:
    """Weights of the rows from their scores, as `train` makes them, with the mean 1 over the multiplicity.

    Scaled over the rows that are trained on, each of which counts once whatever its multiplicity; a row without a score
    counts as the least of them.
    """
    weights, trained = np.zeros(len(values)), round_task.trained
    weights[trained] = scale_over_examples(fill_missing_scores(values[trained]), settings.scaling, settings.quantile)
    multiplicity = round_task.multiplicity
    return weights * multiplicity.sum() / (multiplicity * weights).sum()


# ---- drift


def describe_scores(config: RefineConfig, round_task: RoundTask, session: Session, number: int) -> dict[str, Any]:
    """What the record of a round says of its scores: quartiles, their AUC against the labels, and their drift.

    The drift is Spearman's rank correlation with the scores of the first round and of the round before, over the
    offline rows that both rounds have.
    """
    scores = round_task.scores
    assert scores is not None
    offline = np.flatnonzero(round_task.response_numbers < 0)
    quantiles = np.nanquantile(scores.values[round_task.trained], [0, 0.25, 0.5, 0.75, 1]).tolist()
    labels = read_labels(round_task.task, config.data)
    area = np.nan if labels is None else labels.auc(fill_missing_scores(scores.values))
    errors = scores.standard_errors
    ids = [round_task.task.examples[row].id for row in offline]
    here = dict(zip(ids, scores.values[offline].tolist(), strict=True))
    return {
        "rows": len(round_task.trained),
        "per_token": config.scores.per_token,
        **dict(zip(("least", "lower", "median", "upper", "largest"), quantiles, strict=True)),
        "standard_error": None if errors is None else float(np.nanmedian(errors[round_task.trained])),
        "auc": None if np.isnan(area) else area,
        "first": correlate_scores(read_round_scores(session, 0), here) if number else None,
        "previous": correlate_scores(read_round_scores(session, number - 1), here) if number else None,
        "responses": None,
        **scores.facts,
    }


def correlate_scores(before: dict[str, float], now: dict[str, float]) -> dict[str, Any] | None:
    """Spearman's rank correlation of the scores of the rows that are in both, and how many there are; None below 2."""
    common = sorted(before.keys() & now.keys())
    if len(common) < 2:
        return None
    first, second = (np.array([scores[key] for key in common], float) for scores in (before, now))
    return {"spearman": score_correlation(first, second), "rows": len(common)}


def rescore_responses(
    config: RefineConfig, round_task: RoundTask, params: Params, session: Session, number: int
) -> dict[str, Any] | None:
    """How the scores of a round's responses agree with those by the model that the round led to, `params`.

    Of MAX_RESCORED responses at most, with demonstrations chosen by the same rule: the same ones, but where that
    reads the model or the round's rows (hidden, clustered). None where the round has fewer than two.
    """
    scores, chosen = round_task.scores, _choose_responses(config, round_task)
    assert scores is not None
    if len(chosen) < 2:
        return None

    def compute() -> dict[str, Any]:
        session.set_phase(f"round {number}: responses scored again")
        task, rows = round_task.task, chosen
        if config.scores.demonstrations.startswith("clustered"):  # clusters are those of all rows
            rows = np.arange(task.num_examples)
        model = likelihoods.TaskLikelihoods(task, params, session)
        candidates, holdout = likelihoods.train_and_validation_rows(task)
        values = np.full(task.num_examples, np.nan)
        values[rows] = likelihoods.ica_values(
            take_examples(candidates, rows), holdout, model, task.tokenizer, task.decoder, model.params, config.scores
        ).values
        session.advance(math.ceil(model.passes))
        examples = [task.examples[row].id for row in chosen]
        before, after = (dict(zip(examples, one[chosen].tolist(), strict=True)) for one in (scores.values, values))
        return correlate_scores(before, after) or {}

    return session.run_once(f"round {number}/responses again", compute)


def _choose_responses(config: RefineConfig, round_task: RoundTask) -> Int[np.ndarray, "chosen"]:
    rows = round_task.trained[round_task.response_numbers[round_task.trained] >= 0]
    examples = round_task.task.examples
    return np.sort(sorted(rows, key=lambda row: hash_to_int(examples[row].id, config.scores.seed))[:MAX_RESCORED])


# ---- before a run


def check_scores(config: RefineConfig, task: TextTask, longest: int) -> None:
    """Raise ValueError where rows of `longest` tokens cannot be scored: another validation loss, demonstrations that do
    not fit beside them, too few validation rows, embeddings or templates that are not understood."""
    if not is_validation_trainable(task):
        raise ValueError(
            "refine.methods = ica shows validation examples as if they were training examples, and here they judge by "
            "another loss (section target). Leave ica out, or the section."
        )
    likelihoods.check_embeddings(config.scores, task.examples, task.held_out_examples["validation"])
    likelihoods.check_demonstrations_fit(config.scores, task, longest)


def count_scoring_work(config: RefineConfig, task: TextTask) -> float:
    """About the most that scoring adds to a round, in training steps: all of its rows, and its responses again."""
    num_trainable = len(task.trainable_indices())
    num_rows = count_round_rows(config, num_trainable)
    num_responses = count_questions(config, num_trainable) * config.generate.num_generations
    work = likelihoods.count_ica_work(config.scores, task, num_rows)
    if not num_responses or config.refine.start_from != "accepted":
        return work
    is_clustered = config.scores.demonstrations.startswith("clustered")
    return work + likelihoods.count_ica_work(
        config.scores, task, num_rows if is_clustered else min(num_responses, MAX_RESCORED)
    )
