"""What is measured of every answer and of every pair of answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.runs.evaluation import judge, reference_scores
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.judge import Judge, Judgement
from bilevel_jax.runs.evaluation.metrics import PairOutcomes
from bilevel_jax.runs.evaluation.models import Candidate, EvaluatingConfig
from bilevel_jax.runs.evaluation.questions import Question, leave_out_long, load_questions
from bilevel_jax.runs.evaluation.refusals import is_refusal
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.scoring.verifiers import Verifier, make_verifier

AnswerValues = Float[np.ndarray, "questions draws"]
REFERENCE_METRICS = ("chrf", "bleu", "rouge_l")


@dataclass
class Measures:
    """Numbers of all answers."""

    answers: list[dict[str, AnswerValues]]
    """Of each model: metric -> the value of each answer; nan where there is none."""
    pairs: PairOutcomes | None
    """What the judge said of each pair; None without a comparison."""
    judgements: list[dict[str, Any]] = field(default_factory=list)
    """A row for each verdict that was asked for."""
    signatures: dict[str, str] = field(default_factory=dict)
    """Metric -> how it was computed, as papers quote it."""
    corpus_scores: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> the score of all answers of each model together."""
    unjudged: dict[str, float] = field(default_factory=dict)
    """Metric -> the share of its answers, or pairs, without a verdict."""


class Evaluation(NamedTuple):
    """What models are asked and how their answers are measured, read and checked before any work."""

    questions: list[Question]
    candidates: list[Candidate]
    metrics: list[str]
    """The deciding one first."""
    verifier: Verifier | None
    notes: list[str]


def prepare_evaluation(
    config: EvaluatingConfig, files: Sequence[str], make_candidates: Callable[[], list[Candidate]]
) -> Evaluation:
    """The prompts of some files that fit the models, and what is measured of the answers.

    Raises ValueError for prompts, models, references, metrics or a judge's template that do not fit, with the place.
    """
    if config.judge.url:
        judge.load_pair_template(config.judge)
        judge.load_safety_template(config.judge)
    questions, notes = load_questions(config, files)
    candidates = make_candidates()
    questions, long_notes = leave_out_long(config, candidates, questions)
    metrics = choose_metrics(config, questions, candidates)
    verifier = make_question_verifier(config, questions)
    return Evaluation(questions, candidates, metrics, verifier, [*notes, *long_notes])


def choose_metrics(
    config: EvaluatingConfig, questions: Sequence[Question], candidates: Sequence[Candidate]
) -> list[str]:
    """The metrics that are measured, the deciding one first.

    Raises ValueError for one that evaluate.metrics names and that takes references where no prompt has one.
    """
    has_references = any(question.reference is not None for question in questions)
    has_local = any(candidate.local is not None for candidate in candidates)
    has_judge = config.judge.url != ""
    possible = {
        "preference": has_judge and len(candidates) == 2,
        "accuracy": config.verifier.name != "" and (has_references or config.verifier.answer_field != ""),
        "perplexity": has_references and has_local,
        "safety": has_judge,
        "refusal": True,
    }
    if config.verifier.name and not possible["accuracy"]:
        raise ValueError(
            f"{questions[0].example.where}: no prompt has a reference that verifier.name = {config.verifier.name} "
            "could compare with. Name the key of the right answer in verifier.answer_field or data.response_field."
        )
    for name in config.evaluate.metrics:
        if name in (*REFERENCE_METRICS, "perplexity") and not has_references:
            raise ValueError(
                f"{questions[0].example.where}: {name} compares with references, and no prompt has one. Name their "
                "key in data.response_field, or leave it out of evaluate.metrics."
            )
        if name in REFERENCE_METRICS:
            reference_scores.make_text_score(name)
    return list(config.evaluate.metrics) or [name for name, is_possible in possible.items() if is_possible]


def make_question_verifier(config: EvaluatingConfig, questions: Sequence[Question]) -> Verifier | None:
    """The verifier, with the right answer of each question that has one read; None without."""
    if not config.verifier.name:
        return None
    return make_verifier(config.verifier, [item.example for item in questions if _has_answer(config, item)])


def measure(
    config: EvaluatingConfig,
    metrics: Sequence[str],
    questions: Sequence[Question],
    models: Sequence[ModelAnswers],
    verifier: Verifier | None,
    judge_client: Judge | None,
) -> Measures:
    """All metrics of all answers."""
    measures = Measures([{} for _ in models], None)
    if "preference" in metrics:
        assert judge_client is not None
        _compare_pairs(config, questions, models, judge_client, measures)
    for at, model in enumerate(models):
        values = measures.answers[at]
        if "accuracy" in metrics and verifier is not None:
            values["accuracy"] = _verify_answers(config, questions, model, verifier)
        for name in REFERENCE_METRICS:
            if name in metrics:
                _score_text(name, questions, model, values, measures)
        if "safety" in metrics:
            assert judge_client is not None
            template = judge.load_safety_template(config.judge)
            values["safety"] = _judge_answers("safety", template, questions, model, judge_client, measures)
        if "refusal" in metrics and config.evaluate.refusal_by == "judge":
            assert judge_client is not None
            template = judge.load_refusal_template()
            values["refusal"] = _judge_answers("refusal", template, questions, model, judge_client, measures)
        elif "refusal" in metrics:
            values["refusal"] = _map_answers(questions, model, lambda question, text: float(is_refusal(text)))
            values["refusal"] += _refused_by_service(model)
    return measures


def _has_answer(config: EvaluatingConfig, question: Question) -> bool:
    return config.verifier.answer_field != "" or question.reference is not None


def _map_answers(
    questions: Sequence[Question], model: ModelAnswers, value: Callable[[Question, str], float]
) -> AnswerValues:
    return np.array(
        [[value(question, text) for text in row] for question, row in zip(questions, model.texts, strict=True)]
    )


def _verify_answers(
    config: EvaluatingConfig, questions: Sequence[Question], model: ModelAnswers, verifier: Verifier
) -> AnswerValues:
    def verify() -> AnswerValues:
        return _map_answers(
            questions,
            model,
            lambda question, text: verifier(question.example, text) if _has_answer(config, question) else math.nan,
        )

    like = np.zeros((len(model.texts), len(model.texts[0]) if model.texts else 0))
    return distributed.compute_on_first_process(verify, like)


def _refused_by_service(model: ModelAnswers) -> AnswerValues:
    """1 for an answer in whose place a service says that the model refused, which has no text."""
    return np.array([[float(item.missing.startswith("the model refused")) for item in row] for row in model.responses])


def _score_text(
    name: str, questions: Sequence[Question], model: ModelAnswers, values: dict[str, AnswerValues], measures: Measures
) -> None:
    score = reference_scores.make_text_score(name)
    measures.signatures[name] = score.signature
    values[name] = _map_answers(
        questions,
        model,
        lambda question, text: math.nan if question.reference is None else score.score_answer(text, question.reference),
    )
    if score.score_corpus:
        pairs = [
            (text, question.reference)
            for question, row in zip(questions, model.texts, strict=True)
            for text in row
            if question.reference is not None
        ]
        texts, references = zip(*pairs, strict=True)
        measures.corpus_scores.setdefault(name, []).append(score.score_corpus(texts, references))


def _judge_answers(
    name: str,
    template: judge.Template,
    questions: Sequence[Question],
    model: ModelAnswers,
    judge_client: Judge,
    measures: Measures,
) -> AnswerValues:
    """1 where the judge gives the first verdict of a template, 0 for the second; nan for none, or without an answer."""
    places = [(q, d) for q, row in enumerate(model.texts) for d, text in enumerate(row) if text.strip()]
    texts = [{"question": questions[q].text, "answer": model.texts[q][d]} for q, d in places]
    judged = judge_client.ask(template, texts, f"{model.candidate.name}: judging {name}")
    values = np.full((len(questions), len(model.texts[0])), math.nan)
    for (q, d), one in zip(places, judged, strict=True):
        values[q, d] = math.nan if one.verdict is None else 1.0 - one.verdict
        measures.judgements.append(_judgement_row(questions[q], d, name, model.candidate.role, template, one))
    unjudged = sum(one.verdict is None for one in judged) / max(1, len(judged))
    measures.unjudged[name] = max(measures.unjudged.get(name, 0.0), unjudged)
    return values


def _compare_pairs(
    config: EvaluatingConfig,
    questions: Sequence[Question],
    models: Sequence[ModelAnswers],
    judge_client: Judge,
    measures: Measures,
) -> None:
    """Ask about each pair of answers in both orders, and fill `pairs`; equal answers tie, a missing one loses."""
    template = judge.load_pair_template(config.judge)
    first, second = (model.texts for model in models)
    shape = len(questions), len(first[0])
    scores, asked = np.full((*shape, 2), math.nan), np.zeros(shape, bool)
    places, texts = [], []
    for q, question in enumerate(questions):
        for d in range(shape[1]):
            own, other = first[q][d], second[q][d]
            if own.strip() == other.strip() or not (own.strip() and other.strip()):
                scores[q, d] = 0.5 + (bool(own.strip()) - bool(other.strip())) / 2
                continue
            asked[q, d] = True
            for order, (a, b) in enumerate(((own, other), (other, own))):
                places.append((q, d, order))
                texts.append({"question": question.text, "answer_a": a, "answer_b": b})
    judged = judge_client.ask(template, texts, "judging pairs")
    for (q, d, order), one in zip(places, judged, strict=True):
        if one.verdict is not None:
            scores[q, d, order] = 0.5 if one.verdict == 2 else float(one.verdict == order)
        shown = "baseline first" if order else "model first"
        measures.judgements.append(_judgement_row(questions[q], d, "preference", shown, template, one))
    measures.pairs = PairOutcomes(scores, asked)
    measures.unjudged["preference"] = measures.pairs.num_unjudged / max(1, scores[..., 0].size)


def _judgement_row(
    question: Question, draw: int, name: str, shown: str, template: judge.Template, judgement: Judgement
) -> dict[str, Any]:
    verdict = None if judgement.verdict is None else template.marks[judgement.verdict]
    return {
        "id": question.id, "draw": draw, "metric": name, "shown": shown, "verdict": verdict, "reply": judgement.reply,
    }  # fmt: skip
