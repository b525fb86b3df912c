"""What is found of one or two models: the verdict, every metric, and the tables of answers and questions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from bilevel_jax.runs.config.local_paths import short_file_names
from bilevel_jax.runs.evaluation import answers, remarks
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.judge import Judge
from bilevel_jax.runs.evaluation.measures import Measures
from bilevel_jax.runs.evaluation.metrics import (
    BITS_PER_BYTE,
    METRICS,
    describe_verdict,
    nanmean_rows,
    summarize_metric,
)
from bilevel_jax.runs.evaluation.models import EvaluatingConfig
from bilevel_jax.runs.evaluation.questions import Question
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.session import Session

ANSWERS_FILE, QUESTIONS_FILE, JUDGEMENTS_FILE = "answers.parquet", "questions.parquet", "judgements.parquet"
RUN_FOLDER = "evaluate"
"""In the folder of a run that evaluates its own models: a folder of tables for each comparison, named after the other
model."""
LEVELS_OF_JUDGE = ("preference", "safety")
"""Metrics whose values are verdicts of the judge."""


def make_judge(config: EvaluatingConfig, metrics: Sequence[str], session: Session) -> Judge | None:
    """The judge, where something is measured by it."""
    needs_judge = bool(set(LEVELS_OF_JUDGE) & set(metrics)) or config.evaluate.refusal_by == "judge"
    return Judge(config.judge, session) if needs_judge else None


def write_tables(
    folder: Path,
    metrics: Sequence[str],
    questions: Sequence[Question],
    models: Sequence[ModelAnswers],
    measures: Measures,
) -> None:
    """answers.parquet, questions.parquet and, where a judge was asked, judgements.parquet."""
    file_names = short_file_names(question.example.file for question in questions)
    run_dir.write_parquet(folder / ANSWERS_FILE, build_answer_table(questions, models, measures, file_names))
    run_dir.write_parquet(
        folder / QUESTIONS_FILE, build_question_table(metrics, questions, models, measures, file_names)
    )
    if measures.judgements:
        run_dir.write_parquet(folder / JUDGEMENTS_FILE, pa.Table.from_pylist(measures.judgements))


def summarize(
    config: EvaluatingConfig,
    metrics: Sequence[str],
    questions: Sequence[Question],
    models: Sequence[ModelAnswers],
    measures: Measures,
    judge_client: Judge | None,
    lines_by_seed: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What result.json holds of the numbers: the verdict by the first metric, every metric, the judge.

    `lines_by_seed` are the numbers of each metric where models are of several trainings; of one, they come from the
    values of the questions alone.
    """
    seed, names = config.data.seed, {model.candidate.role: model.candidate.name for model in models}
    lines = {}
    for name in metrics:
        if lines_by_seed is not None:
            lines[name] = lines_by_seed[name]
        else:
            metric, values = METRICS[name], question_values(name, questions, models, measures)
            if name == "perplexity" and _have_different_tokenizers(models):
                metric = BITS_PER_BYTE
            lines[name] = summarize_metric(name, metric, values, seed)
        lines[name] |= {
            "corpus": measures.corpus_scores.get(name),
            "signature": measures.signatures.get(name),
            "unjudged": measures.unjudged.get(name),
        }
    undecided = {name: remarks.why_undecided(config.judge, name, lines[name], measures) for name in metrics}
    for name in metrics:
        if undecided[name] and lines[name]["level"] != "open":
            lines[name]["level"] = "undecided"
    deciding = metrics[0]
    judge_facts = remarks.summarize_judge(config.judge, measures, judge_client, seed) if judge_client else None
    return {
        "sentence": describe_verdict(deciding, lines[deciding], names, undecided=undecided[deciding]),
        "level": lines[deciding]["level"],
        "refusal_by": config.evaluate.refusal_by,
        "metric": deciding,
        "names": names,
        "counts": {
            "questions": len(questions),
            "references": sum(question.reference is not None for question in questions),
            "draws": config.generate.num_generations,
        },
        "models": {model.candidate.role: answers.summarize_answers(model) for model in models},
        "metrics": lines,
        "judge": judge_facts,
        "remarks": remarks.collect_remarks(config.judge, lines, judge_facts, measures, models),
    }


def question_values(
    name: str, questions: Sequence[Question], models: Sequence[ModelAnswers], measures: Measures
) -> dict[str, Float[np.ndarray, "questions"]]:
    """The value of each question by a metric, by the role of the model; of preference the win shares of the first."""
    if name == "preference":
        assert measures.pairs is not None
        return {"model": nanmean_rows(measures.pairs.shares)}
    roles = [model.candidate.role for model in models]
    if name != "perplexity":
        return {role: nanmean_rows(values[name]) for role, values in zip(roles, measures.answers, strict=True)}
    read = {role: model for role, model in zip(roles, models, strict=True) if model.candidate.local is not None}
    if _have_different_tokenizers(models):
        sizes = np.array([len((question.reference or "").encode("utf-8", "surrogatepass")) for question in questions])
        return {role: model.reference_nats / np.log(2) / np.maximum(sizes, 1) for role, model in read.items()}
    return {role: model.reference_nats / model.reference_tokens for role, model in read.items()}


def _have_different_tokenizers(models: Sequence[ModelAnswers]) -> bool:
    """Whether two models in this process split references into other numbers of tokens."""
    counts = [model.reference_tokens for model in models if not np.isnan(model.reference_tokens).all()]
    return len(counts) == 2 and not np.array_equal(counts[0], counts[1], equal_nan=True)


def build_answer_table(
    questions: Sequence[Question], models: Sequence[ModelAnswers], measures: Measures, file_names: dict[str, str]
) -> pa.Table:
    """A row for each answer: its question, model, number and, of models of several trainings, the seed of its own; its
    text, and what was measured of it."""
    cells = [
        (at, q, d) for at, model in enumerate(models) for q, row in enumerate(model.responses) for d in range(len(row))
    ]
    responses = [models[at].responses[q][d] for at, q, d in cells]
    num_draws = [len(model.responses[0]) // max(1, len(model.fingerprints)) for model in models]
    seeds = [d // num_draws[at] for at, _, d in cells]
    columns: dict[str, Any] = {
        "id": [questions[q].id for _, q, _ in cells],
        "file": [file_names[questions[q].example.file] for _, q, _ in cells],
        "line": [questions[q].example.line for _, q, _ in cells],
        "role": [models[at].candidate.role for at, _, _ in cells],
        "model": [models[at].candidate.name for at, _, _ in cells],
        "fingerprint": [
            models[at].fingerprints[seed] if models[at].fingerprints else models[at].fingerprint
            for (at, _, _), seed in zip(cells, seeds, strict=True)
        ],
        **({"seed": seeds} if any(model.fingerprints for model in models) else {}),
        "draw": [d for _, _, d in cells],
        "prompt": [questions[q].text for _, q, _ in cells],
        "reference": pa.array([questions[q].reference for _, q, _ in cells], pa.string()),
        "answer": [response.text for response in responses],
        "ended": [response.ended for response in responses],
        "missing": [response.missing for response in responses],
    }
    for name in measures.answers[0]:
        columns[name] = [float(measures.answers[at][name][q, d]) for at, q, d in cells]
    return pa.table(columns)


def build_question_table(
    metrics: Sequence[str],
    questions: Sequence[Question],
    models: Sequence[ModelAnswers],
    measures: Measures,
    file_names: dict[str, str],
) -> pa.Table:
    """A row for each question, with the value of each model by each metric: the mean over its answers."""
    columns: dict[str, Any] = {
        "id": [question.id for question in questions],
        "file": [file_names[question.example.file] for question in questions],
        "line": [question.example.line for question in questions],
        "prompt": [question.text for question in questions],
        "reference": pa.array([question.reference for question in questions], pa.string()),
    }
    for name in metrics:
        for role, values in question_values(name, questions, models, measures).items():
            columns[name if name == "preference" else f"{name} of the {role}"] = values
    return pa.table(columns)
