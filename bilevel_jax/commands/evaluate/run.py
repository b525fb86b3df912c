"""The `evaluate` command, which says whether a model answers better than another."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from bilevel_jax.commands.evaluate import answers, harness, judge, report
from bilevel_jax.commands.evaluate.answers import ModelAnswers
from bilevel_jax.commands.evaluate.judge import Judge
from bilevel_jax.commands.evaluate.measures import Measures, choose_metrics, make_question_verifier, measure
from bilevel_jax.commands.evaluate.metrics import (
    BITS_PER_BYTE,
    METRICS,
    describe_verdict,
    measure_position_bias,
    nanmean_rows,
    summarize_metric,
)
from bilevel_jax.commands.evaluate.models import ROLES, Candidate, describe_templates, open_candidates
from bilevel_jax.commands.evaluate.questions import Question, leave_out_long, load_questions
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.load import EvaluateConfig, config_hash
from bilevel_jax.runs.config.local_paths import short_file_names
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.report.html import shorten_text
from bilevel_jax.runs.scoring.verifiers import Verifier

ANSWERS_FILE, QUESTIONS_FILE, JUDGEMENTS_FILE = "answers.parquet", "questions.parquet", "judgements.parquet"
LEVELS_OF_JUDGE = ("preference", "safety")
"""Metrics whose values are verdicts of the judge."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises ValueError for prompts, models, references or a judge's template that do not fit, with the place; and
    RuntimeError where a service refuses or does not answer: what it answered before is stored, and --resume goes on.
    """
    with open_run_dir(config) as folder:
        if config.judge.url:
            judge.load_pair_template(config.judge)  # a fault is told before any work
            judge.load_safety_template(config.judge)
        questions, notes = load_questions(config)
        candidates = open_candidates(config)
        questions, long_notes = leave_out_long(config, candidates, questions)
        metrics = choose_metrics(config, questions, candidates)
        verifier = make_question_verifier(config, questions)
        notes += [*long_notes, *describe_templates(candidates, config.data.template)]
        with start_session(config, folder) as session:
            return _run_evaluation(config, questions, candidates, metrics, verifier, notes, session)


def _run_evaluation(
    config: EvaluateConfig,
    questions: list[Question],
    candidates: list[Candidate],
    metrics: list[str],
    verifier: Verifier | None,
    notes: list[str],
    session: Session,
) -> dict[str, Any]:
    for note in notes:
        session.print_line(note)
    models = []
    for place, candidate in enumerate(candidates):
        began = time.monotonic()
        models.append(answers.collect_answers(config, candidate, questions, place, session))
        _store_seconds(session, candidate.role, began)
        notes += [*answers.describe_answers(models[-1]), *answers.describe_left_out(models[-1], questions)]
    needs_judge = bool(set(LEVELS_OF_JUDGE) & set(metrics)) or config.evaluate.refusal_by == "judge"
    judge_client = Judge(config.judge, session) if needs_judge else None
    began = time.monotonic()
    measures = measure(config, metrics, questions, models, verifier, judge_client)
    _store_seconds(session, "judging", began)
    session.set_phase("writing")
    result = summarize(config, metrics, questions, models, measures, judge_client)
    commands, harness_notes = (
        harness.write_harness_task(session.folder, questions, candidates, config.generate, config.verifier)
        if config.evaluate.harness
        else ([], [])
    )
    result |= {
        "harness": commands,
        "notes": [*notes, *harness_notes],
        "seconds": {
            part: session.run_once(f"seconds: {part}", lambda: 0.0) for part in (*ROLES[: len(models)], "judging")
        },
        "config_hash": config_hash(config),
    }
    for line in [*result["remarks"], *commands]:
        session.print_line(line)
    file_names = short_file_names(question.example.file for question in questions)
    run_dir.write_parquet(session.folder / ANSWERS_FILE, build_answer_table(questions, models, measures, file_names))
    run_dir.write_parquet(
        session.folder / QUESTIONS_FILE, build_question_table(metrics, questions, models, measures, file_names)
    )
    if measures.judgements:
        run_dir.write_parquet(session.folder / JUDGEMENTS_FILE, pa.Table.from_pylist(measures.judgements))
    run_dir.write_result(session.folder, result)
    report.write_evaluate_report(session.folder)
    return result


def _store_seconds(session: Session, part: str, began: float) -> None:
    """How long a part took; of one that was there already, as an earlier process measured it."""
    session.run_once(f"seconds: {part}", lambda: time.monotonic() - began)


def summarize(
    config: EvaluateConfig,
    metrics: Sequence[str],
    questions: Sequence[Question],
    models: Sequence[ModelAnswers],
    measures: Measures,
    judge_client: Judge | None,
) -> dict[str, Any]:
    """What result.json holds of the numbers: the verdict by the first metric, every metric, the judge."""
    seed, names = config.data.seed, {model.candidate.role: model.candidate.name for model in models}
    lines = {}
    for name in metrics:
        metric, values = METRICS[name], question_values(name, questions, models, measures)
        if name == "perplexity" and _have_different_tokenizers(models):
            metric = BITS_PER_BYTE
        lines[name] = summarize_metric(name, metric, values, seed)
        lines[name] |= {
            "corpus": measures.corpus_scores.get(name),
            "signature": measures.signatures.get(name),
            "unjudged": measures.unjudged.get(name),
        }
    deciding = metrics[0]
    undecided = _why_undecided(config, deciding, measures)
    if undecided:
        lines[deciding]["level"] = "undecided"
    judge_facts = _summarize_judge(config, measures, judge_client, seed) if judge_client else None
    return {
        "sentence": describe_verdict(deciding, lines[deciding], names, undecided=undecided),
        "level": lines[deciding]["level"],
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
        "remarks": _collect_remarks(config, lines, judge_facts, measures),
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


def _why_undecided(config: EvaluateConfig, metric: str, measures: Measures) -> str:
    share = measures.unjudged.get(metric, 0.0)
    if share <= config.judge.max_unjudged:
        return ""
    of = "pairs" if metric == "preference" else "answers"
    return (
        f"the judge gave no verdict that is understood on {100 * share:.1f} % of the {of} (judge.max_unjudged = "
        f"{config.judge.max_unjudged:g}), as {_quote_nonsense(metric, measures)}; judgements.parquet has its replies"
    )


def _quote_nonsense(metric: str, measures: Measures) -> str:
    """The first reply without a verdict, in words."""
    replies = [row["reply"] for row in measures.judgements if row["metric"] == metric and row["verdict"] is None]
    return repr(shorten_text(" ".join(replies[0].split()), 80))


def _summarize_judge(config: EvaluateConfig, measures: Measures, client: Judge, seed: int) -> dict[str, Any]:
    use, pairs = client.use(), measures.pairs
    facts: dict[str, Any] = {
        "name": config.judge.model,
        "url": config.judge.url,
        "template": config.judge.template,
        "requests": use.requests,
        "asked_again": use.asked_again,
        "shortened": use.shortened,
        "tokens": use.usage,
        "pairs": None,
    }
    if pairs is not None:
        facts["pairs"] = {
            "total": int(pairs.asked.size),
            "asked": int(pairs.asked.sum()),
            "unjudged": pairs.num_unjudged,
            "contradictions": pairs.num_contradictions,
            "position_bias": measure_position_bias(pairs, seed),
        }
    return facts


def _collect_remarks(
    config: EvaluateConfig, lines: dict[str, Any], judge_facts: dict[str, Any] | None, measures: Measures
) -> list[str]:
    """What a person should know before the numbers."""
    remarks = []
    if list(lines) == ["refusal"]:
        remarks.append("refusals alone are measured: name a verifier, a judge, or prompts with references")
    if judge_facts and (pairs := judge_facts["pairs"]):
        bias = pairs["position_bias"]
        if bias.low > 0 or bias.high < 0:
            place = "first" if bias.value > 0 else "second"
            remarks.append(
                f"the judge prefers the answer that it sees {place}: by {100 * abs(bias.value):.1f} points, 95 % "
                f"interval {100 * min(abs(bias.low), abs(bias.high)):.1f} to "
                f"{100 * max(abs(bias.low), abs(bias.high)):.1f}. Each pair was asked in both "
                "orders, so that this cancels"
            )
        if pairs["asked"] and pairs["contradictions"] > pairs["asked"] / 2:
            remarks.append(
                f"the judge contradicts itself in {pairs['contradictions']:,} of {pairs['asked']:,} pairs, which count "
                "as ties: it hardly tells these answers apart"
            )
        if pairs["asked"] < pairs["total"]:
            same = format_count("pair", pairs["total"] - pairs["asked"], ("has", "have"))
            remarks.append(f"{same} equal answers, or lack one, and the judge was not asked")
    for name, share in measures.unjudged.items():
        if share:
            remarks.append(
                f"{METRICS[name].title}: {100 * share:.1f} % have no verdict that is understood after "
                f"{config.judge.asks} asks, the first {_quote_nonsense(name, measures)}, and are left out"
            )
    if judge_facts and judge_facts["shortened"]:
        requests = format_count("request", judge_facts["shortened"])
        remarks.append(f"{requests} showed the judge an answer without its middle (judge.max_characters)")
    if (line := lines.get("perplexity")) and line["unit"] == BITS_PER_BYTE.unit:
        remarks.append("the models have different tokenizers: losses of references are compared in bits per byte")
    return remarks


def build_answer_table(
    questions: Sequence[Question], models: Sequence[ModelAnswers], measures: Measures, file_names: dict[str, str]
) -> pa.Table:
    """A row for each answer: its question, model and number, its text, and what was measured of it."""
    cells = [
        (at, q, d) for at, model in enumerate(models) for q, row in enumerate(model.responses) for d in range(len(row))
    ]
    responses = [models[at].responses[q][d] for at, q, d in cells]
    columns: dict[str, Any] = {
        "id": [questions[q].id for _, q, _ in cells],
        "file": [file_names[questions[q].example.file] for _, q, _ in cells],
        "line": [questions[q].example.line for _, q, _ in cells],
        "role": [models[at].candidate.role for at, _, _ in cells],
        "model": [models[at].candidate.name for at, _, _ in cells],
        "fingerprint": [models[at].fingerprint for at, _, _ in cells],
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
