"""The answers of a model, and how likely it finds the references."""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.core.types import Params
from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.inference.generate import Prompt, Response
from bilevel_jax.lm.inference.prompts import find_end_tokens
from bilevel_jax.runs.evaluation.models import Candidate, EvaluatingConfig, LocalModel
from bilevel_jax.runs.evaluation.questions import Question, make_question_prompts
from bilevel_jax.runs.infra import identity
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.generation import (
    RESPONSES_FILE,
    make_generator_factory,
    make_service_generator,
    read_responses,
)
from bilevel_jax.runs.scoring.likelihoods import ResumableEngine, fingerprint_params
from bilevel_jax.scores.requests import make_target_requests, trim_responses


class ModelAnswers(NamedTuple):
    """What one model gave."""

    candidate: Candidate
    responses: list[list[Response]]
    """[question][draw]."""
    fingerprint: str
    """Of its parameters; of a service its name and address."""
    reference_nats: Float[np.ndarray, "questions"]
    """-log p of the reference; nan without one, and where it was not asked for."""
    reference_tokens: Float[np.ndarray, "questions"]
    fingerprints: tuple[str, ...] = ()
    """Of models of several trainings that stand as one: that of each, whose draws come one model after the other."""

    @property
    def texts(self) -> list[list[str]]:
        """[question][draw]; empty where a service gave no answer."""
        return [[response.text for response in row] for row in self.responses]


@contextlib.contextmanager
def name_prompts(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors of a service call a prompt by a name that a person knows, instead of its id."""
    try:
        yield
    except RuntimeError as error:
        for prompt_id, name in names.items():
            if f"prompt {prompt_id}" in str(error):
                raise RuntimeError(str(error).replace(f"prompt {prompt_id}", name)) from None
        raise


def collect_answers(
    config: EvaluatingConfig, candidate: Candidate, questions: Sequence[Question], place: int, session: Session
) -> ModelAnswers:
    """The answers of a model, generated or, as far as an earlier part of the run did that, read.

    Model number `place` takes the draws from place * n on, so that a model compared with itself answers anew.
    Of a model in this process the parameters are loaded only where something is left to do.
    """
    count = config.generate.num_generations
    draws = range(place * count, (place + 1) * count)
    prompts = make_question_prompts(config, candidate, questions)
    unknown = np.full(len(questions), math.nan)
    if candidate.service is not None:
        session.set_phase(f"{candidate.name}: asking")
        generate = make_service_generator(candidate.service.settings(config.generate), session)
        with name_prompts({question.id: question.example.where for question in questions}):
            responses = generate(prompts, draws)
        fingerprint = f"{candidate.service.name}@{candidate.service.url}"
        return ModelAnswers(candidate, responses, fingerprint, unknown, unknown)
    assert candidate.local is not None
    return _answer_locally(config, candidate, candidate.local, questions, prompts, draws, session)


def check_any_answer(answers: ModelAnswers) -> None:
    """Raise ValueError for a model that gave no answer at all."""
    if not any(text.strip() for row in answers.texts for text in row):
        raise ValueError(_describe_no_answers(answers))


def describe_answers(answers: ModelAnswers) -> list[str]:
    """What a person should know of the answers, in sentences."""
    responses = [response for row in answers.responses for response in row]
    total, notes = format_count("answer", len(responses)), []
    if missing := [response.missing for response in responses if response.missing]:
        reason, count = Counter(missing).most_common(1)[0]
        notes.append(
            f"{answers.candidate.name} gave no answer in {len(missing):,} of {len(responses):,} cases, {count:,} times "
            f"because {reason.rstrip('.')}; an answer that is missing loses against one that is there"
        )
    if empty := sum(not response.text.strip() and not response.missing for response in responses):
        notes.append(f"{empty:,} of {total} of {answers.candidate.name} are empty")
    cut = sum(not response.ended and not response.missing for response in responses)
    if cut:
        notes.append(f"{cut:,} of {total} of {answers.candidate.name} did not end within generate.max_new_tokens")
    return notes


def describe_left_out(answers: ModelAnswers, questions: Sequence[Question]) -> list[str]:
    """How many references a model in this process could not read, as a sentence; none where it read all."""
    has_reference = np.array([question.reference is not None for question in questions])
    left_out = int((has_reference & np.isnan(answers.reference_nats)).sum())
    if not left_out or left_out == has_reference.sum():  # all: nothing was asked of it
        return []
    are = format_count("reference", left_out, ("does", "do"))
    return [f"{are} not fit the context of {answers.candidate.name} and are left out of its reference loss"]


def summarize_answers(answers: ModelAnswers) -> dict[str, Any]:
    """Counts for result.json."""
    responses = [response for row in answers.responses for response in row]
    words = [len(response.text) for response in responses]
    return {
        "name": answers.candidate.name,
        "kind": answers.candidate.kind,
        "fingerprint": answers.fingerprint,
        "answers": len(responses),
        "missing": sum(bool(response.missing) for response in responses),
        "cut": sum(not response.ended and not response.missing for response in responses),
        "characters": float(np.mean(words)),
        "tokens": sum_usage(responses)
        if answers.candidate.service
        else {"answers": sum(map(_count_tokens, responses))},
    }


def sum_usage(responses: Sequence[Response]) -> dict[str, int]:
    """Tokens as a service counts them, and of how many responses it says nothing."""
    known = [response.usage for response in responses if response.usage]
    return {
        "prompts": sum(usage[0] for usage in known),
        "answers": sum(usage[1] for usage in known),
        "not_counted": len(responses) - len(known),
    }


def _count_tokens(response: Response) -> int:
    return len(response.tokens)


def _describe_no_answers(answers: ModelAnswers) -> str:
    reasons = Counter(response.missing or "they are empty" for row in answers.responses for response in row)
    reason = reasons.most_common(1)[0][0].rstrip(".")
    asked = format_count("prompt", len(answers.responses))
    return (
        f"evaluate.{answers.candidate.role}: {answers.candidate.name} gave no answer to any of {asked} ({reason}). "
        "Raise generate.max_new_tokens, look at its template, or name another model."
    )


def _answer_locally(
    config: EvaluatingConfig,
    candidate: Candidate,
    local: LocalModel,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    draws: range,
    session: Session,
) -> ModelAnswers:
    token_ids = np.array([token for prompt in prompts for token in prompt.tokens], np.int32)
    lengths = np.array([len(prompt.tokens) for prompt in prompts], np.int64)
    identity.check_tokens(
        session.folder,
        {
            f"prompts of the {candidate.role}": {
                "sequences": len(prompts),
                "tokens": len(token_ids),
                "token ids": identity.hash_arrays(token_ids, lengths),
            }
        },
    )
    wants_references = wants_perplexity(config) and any(question.reference is not None for question in questions)

    def answer() -> dict[str, Any]:
        session.set_phase(f"{candidate.name}: loading")
        params = local.load_params()
        session.set_phase(f"{candidate.name}: answering")
        make_generator_factory(config.generate, local.decoder, local.tokenizer, local.mesh, session)(params)(
            prompts, draws
        )
        references = None
        if wants_references:
            session.set_phase(f"{candidate.name}: reading references")
            references = _read_references(config, local, params, questions, session)
        return {"fingerprint": fingerprint_params(params), "references": references}

    stored = session.run_once(
        f"answers of the {candidate.role}", answer, (session.folder / "checkpoints" / RESPONSES_FILE).exists()
    )
    responses = read_responses(config.generate, session.folder, stored["fingerprint"], prompts, draws)
    nats = token_counts = np.full(len(questions), math.nan)
    if stored["references"] is not None:
        nats, token_counts = (np.array(column, float) for column in zip(*stored["references"], strict=True))
    return ModelAnswers(candidate, responses, stored["fingerprint"], nats, token_counts)


def wants_perplexity(config: EvaluatingConfig) -> bool:
    """Whether references are read by the models in this process."""
    return not config.evaluate.metrics or "perplexity" in config.evaluate.metrics


def _read_references(
    config: EvaluatingConfig, local: LocalModel, params: Params, questions: Sequence[Question], session: Session
) -> list[tuple[float, float]]:
    """(-log p in nats, tokens) of each reference, end marks left out; nan where it does not fit the context."""
    corpus, _ = tokens.tokenize(
        [question.example for question in questions],
        local.tokenizer,
        max_length=sys.maxsize,
        template=config.data.template or tokens.DEFAULT_TEMPLATE,
        train_on="last_turn",
        vocab_size=local.architecture.vocab_size,
    )
    end_tokens = {*find_end_tokens(local.tokenizer, local.architecture.eos), *local.tokenizer.all_special_ids} - {
        local.tokenizer.unk_token_id
    }
    if corpus.sequences_per_example > 1:  # of a pair, the chosen side
        corpus = tokens.corpus_from_sequences([corpus.get_sequence(row, 0) for row in range(len(questions))])
    corpus, _ = trim_responses(corpus, end_tokens)
    requests = {}
    for row, question in enumerate(questions):
        [*targets] = make_target_requests(corpus.get_sequence(row)) if question.reference is not None else []
        fits = sum(map(len, targets[-1])) <= local.architecture.max_length if targets else False
        if fits:
            requests[row] = targets[-1]
    engine = ResumableEngine(local.decoder, params, local.mesh, session)
    logliks = dict(zip(requests, engine(list(requests.values())), strict=True))
    pairs = [(logliks[row].nats, logliks[row].num_tokens) if row in logliks else None for row in range(len(questions))]
    return [(-pair[0], float(pair[1])) if pair else (math.nan, math.nan) for pair in pairs]
