"""Responses to questions that shipped strategies ask a model for."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_jax.commands.rank.model import (
    RankModel,
    build_question_prompts,
    choose_own_answers,
    drop_long_questions,
    load_rank_model,
    make_special_token_matcher,
)
from bilevel_jax.commands.rank.strategies import (
    Question,
    order_questions,
    read_own_answers,
)
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.inference.generate import GenerateFn, Prompt, Response
from bilevel_jax.runs.config.load import RankConfig
from bilevel_jax.runs.config.rules import names_service, split_service
from bilevel_jax.runs.config.schema import CandidatesSection, GenerateSection
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.generation import make_generator_factory, make_service_generator
from bilevel_jax.scores.random import hash_to_int

STRATEGIES_FILE = "strategies.jsonl"
GOLD = "gold"
"""The strategy of the responses that the rows have already."""
PROMPTS = {
    "direct": "{question}",
    "step_by_step": (
        "{question}\n\nThink step by step: work through the problem in small numbered steps, say what each step does, "
        "and end with the final answer on a line of its own."
    ),
    "concise": (
        "{question}\n\nAnswer as concisely as you can: only what the answer needs, without an introduction, "
        "repetition or a summary."
    ),
    "rephrase": (
        "Here are a question and its correct answer.\n\nQuestion:\n{question}\n\nCorrect answer:\n{answer}\n\nWrite "
        "the correct answer again in your own words. Keep every fact, every step and the result, and add none. Write "
        "the new answer alone."
    ),
    "own_style": (
        "Here are a question and its correct answer, and before them answers of a model to other questions.\n\n"
        "{examples}Question:\n{question}\n\nCorrect answer:\n{answer}\n\nWrite the correct answer again in the style "
        "of that model's answers: order and explain as they do, and use their words where you can. Keep every fact "
        "and the result. Write the new answer alone."
    ),
}
"""What each strategy asks; {answer} is the response of the row, {examples} answers of the model itself."""
EXAMPLE = "Answer of the model to another question:\n{answer}\n\n"
NUM_EXAMPLES = 2
"""Answers of the model that own_style shows."""
MAX_PLACES_SHOWN = 3
"""Rows with bad responses that a note names."""


class WrittenQuestion(NamedTuple):
    """A question with the responses that strategies gave."""

    question: Question
    responses: dict[str, Response]


def write_candidates(
    config: RankConfig, rank_model: RankModel, questions: list[Question], session: Session
) -> tuple[str, list[str]]:
    """The file of the questions that the run reads, each with a response of every strategy, and notes on the rest.

    Questions are taken in the order of `choose_questions`, until as many as wanted have a usable response of every
    strategy. Every response is stored in the run's folder as it arrives, and not asked for again. Raises ValueError for
    a strategy whose responses cannot be used at all, for fewer usable questions than a block takes, for a prompt that
    the writer's context does not hold, and for a question that rank.own_answers leaves out.
    """
    path = session.folder / STRATEGIES_FILE
    is_kept = distributed.is_there(path)
    write = partial(_write, config, rank_model, questions, session, path)
    notes = session.run_once("candidates", write, is_kept=is_kept)
    run_dir.wait_until_seen(path)
    return str(path), notes


def _write(
    config: RankConfig, rank_model: RankModel, questions: list[Question], session: Session, path: Path
) -> list[str]:
    wanted = config.candidates.questions or (
        config.rank.block_size * config.rank.num_blocks + config.rank.train_examples
    )
    unusable = make_special_token_matcher(rank_model.tokenizer)
    own_answers: list[tuple[str, str]] = []
    if config.rank.own_answers:
        own_answers, questions = _read_answers(config, questions, wanted, unusable)
    writer, generate = _open_writer(config, rank_model, session)
    if "own_style" in config.candidates.strategies and not config.rank.own_answers:
        other_names = [name for name in config.candidates.strategies if name != "own_style"]
        # a fault is told before any work
        _make_prompts(config, rank_model, other_names, questions[:wanted], [], writer)
        own_answers = _answer_first(config, rank_model, session, questions[:wanted])
    good: list[WrittenQuestion] = []
    bad: dict[str, list[str]] = {}
    num_cut, asked = 0, 0
    while len(good) < min(wanted, len(questions)) and asked < len(questions):
        chunk = questions[asked : asked + wanted - len(good)]
        asked += len(chunk)
        written = _ask(config, rank_model, chunk, own_answers, writer, generate)
        reasons = [(one, _describe_faults(one, unusable)) for one in written]
        good += [one for one, faults in reasons if not faults]
        for one, faults in reasons:
            for name, reason in faults.items():
                bad.setdefault(name, []).append(f"{one.question.where} ({reason})")
        num_cut += sum(
            not (response.ended or response.missing) for one in written for response in one.responses.values()
        )
        for name, places in bad.items():
            if len(places) == asked:
                raise ValueError(
                    f"candidates.strategies: none of {format_count('response', asked)} of '{name}' can be used, the "
                    f"first to {places[0]}. Raise candidates.max_new_tokens, choose another candidates.model, or leave "
                    f"'{name}' out."
                )
    if len(good) < config.rank.block_size:
        places = [place for some in bad.values() for place in some]
        raise ValueError(
            f"candidates.strategies: {len(good)} of {format_count('question', asked)} got a response of every strategy "
            f"that can be used, and a block has rank.block_size = {config.rank.block_size} of them; the first that "
            f"cannot: {places[0]}. Raise candidates.max_new_tokens, choose another candidates.model, give more "
            "questions, or lower rank.block_size."
        )
    lines = [json.dumps(_make_row(config, one), ensure_ascii=False) for one in good]
    run_dir.write_atomic(path, "".join(f"{line}\n" for line in lines))
    return _make_notes(config, len(good), asked, bad, num_cut)


def choose_questions(
    config: RankConfig, rank_model: RankModel, all_questions: Sequence[Question], notes: Sequence[str]
) -> tuple[list[Question], list[str]]:
    """The questions that are short enough, in the order in which blocks are drawn; the notes, with one on the others.

    Raises ValueError for fewer than a block takes.
    """
    questions = drop_long_questions(config, rank_model, order_questions(all_questions, config.data.seed))
    notes = list(notes)
    if len(questions) < len(all_questions):
        notes.append(
            f"{len(all_questions) - len(questions):,} of {len(all_questions):,} questions have more than "
            f"{config.rank.max_question_tokens} tokens (rank.max_question_tokens), template included, and were not "
            "asked"
        )
    if len(questions) < config.rank.block_size:
        raise ValueError(
            f"{len(questions)} questions can be asked, and a block has rank.block_size = {config.rank.block_size} of "
            "them. Give more questions, lower rank.block_size, or raise rank.max_question_tokens."
        )
    return questions, notes


def _open_writer(config: RankConfig, rank_model: RankModel, session: Session) -> tuple[RankModel | None, GenerateFn]:
    """Who writes: the model of a folder, or the one that will be trained; None for a service. And how it is asked."""
    section = config.candidates
    if names_service(section.model):
        name, url = split_service(section.model)
        settings = _make_settings(section, "service", url, name)
        return None, make_service_generator(settings, session, "candidates")
    settings = replace(_make_settings(section, "embedded", "", ""), max_batch_tokens=config.generate.max_batch_tokens)
    writer = rank_model
    if section.model:
        writer = load_rank_model(replace(config, model=replace(config.model, name_or_path=section.model)))
    factory = make_generator_factory(settings, writer.decoder, writer.tokenizer, writer.mesh, session)
    return writer, factory(writer.params)


def _make_settings(section: CandidatesSection, backend: str, url: str, model: str) -> GenerateSection:
    return GenerateSection(
        backend="service" if backend == "service" else "embedded",
        temperature=section.temperature,
        top_p=section.top_p,
        max_new_tokens=section.max_new_tokens,
        seed=section.seed,
        url=url,
        model=model,
        api_key_env=section.api_key_env,
        concurrency=section.concurrency,
        timeout=section.timeout,
        parameter_names=section.parameter_names,
    )


def _ask(
    config: RankConfig,
    rank_model: RankModel,
    questions: Sequence[Question],
    own_answers: Sequence[tuple[str, str]],
    writer: RankModel | None,
    generate: GenerateFn,
) -> list[WrittenQuestion]:
    """The response of every strategy to each question."""
    names = config.candidates.strategies
    prompts_by_strategy = _make_prompts(config, rank_model, names, questions, own_answers, writer)
    responses: list[dict[str, Response]] = [{} for _ in questions]
    for name in names:
        if name == GOLD:
            for own, question in zip(responses, questions, strict=True):
                own[name] = Response(question.responses[0], (), (), True)
            continue
        for own, (response,) in zip(responses, generate(prompts_by_strategy[name], [0]), strict=True):
            own[name] = response
    return [WrittenQuestion(question, own) for question, own in zip(questions, responses, strict=True)]


def _make_prompts(
    config: RankConfig,
    rank_model: RankModel,
    names: Sequence[str],
    questions: Sequence[Question],
    own_answers: Sequence[tuple[str, str]],
    writer: RankModel | None,
) -> dict[str, list[Prompt]]:
    """What every strategy of `names` but gold asks; raises ValueError for what the writer's context does not hold."""
    prompts_by_strategy = {}
    for name in names:
        if name == GOLD:
            continue
        asked = [
            question._replace(text=_fill(PROMPTS[name], question, _choose_examples(question, own_answers)))
            for question in questions
        ]
        prompts = build_question_prompts(config, writer or rank_model, asked)
        prompts_by_strategy[name] = [prompt._replace(id=f"{name} {prompt.id}") for prompt in prompts]
        if writer is not None:
            _check_context(config, rank_model, writer, name, questions, [len(prompt.tokens) for prompt in prompts])
    return prompts_by_strategy


def _read_answers(
    config: RankConfig, questions: Sequence[Question], wanted: int, unusable: Callable[[str], Any]
) -> tuple[list[tuple[str, str]], list[Question]]:
    """(question, answer) of the file rank.own_answers, and the questions that can be asked.

    It must answer those that are asked first; of the others, which replace these, those that it does not answer are
    left out.
    """
    known_answers = read_own_answers(config.rank.own_answers, config)
    drafts = choose_own_answers(config, known_answers, questions[:wanted], unusable)
    own_answers = [(one.text, some[0]) for one, some in zip(questions, drafts, strict=False)]
    if "own_style" in config.candidates.strategies and len(own_answers) <= NUM_EXAMPLES:
        raise ValueError(
            f"candidates.strategies has own_style, which shows {NUM_EXAMPLES} own answers to other questions, and "
            f"{len(own_answers)} questions are asked. Raise candidates.questions, or leave own_style out."
        )
    return own_answers, [*questions[:wanted], *(one for one in questions[wanted:] if one.text in known_answers)]


def _answer_first(
    config: RankConfig, rank_model: RankModel, session: Session, questions: Sequence[Question]
) -> list[tuple[str, str]]:
    """(question, the answer of the model that will be trained) of those that it answers."""
    prompts = build_question_prompts(config, rank_model, questions)
    if config.generate.backend == "embedded":
        _check_context(config, rank_model, rank_model, "", questions, [len(prompt.tokens) for prompt in prompts])
    factory = make_generator_factory(
        config.generate, rank_model.decoder, rank_model.tokenizer, rank_model.mesh, session
    )
    responses = factory(rank_model.params)(prompts, [0])
    answers = [(one.text, own.text) for one, (own,) in zip(questions, responses, strict=True) if own.text.strip()]
    if len(answers) <= NUM_EXAMPLES:
        raise ValueError(
            f"candidates.strategies has own_style, and the model gave {len(answers)} answers that are not empty to "
            f"{len(questions)} questions. Raise generate.temperature, or leave own_style out."
        )
    return answers


def _choose_examples(question: Question, own_answers: Sequence[tuple[str, str]]) -> list[str]:
    """NUM_EXAMPLES answers of the model to other questions, in a circle that begins where the question's id says."""
    others = [answer for text, answer in own_answers if text != question.text]
    start = hash_to_int(question.id, 0) % max(len(others), 1)
    return [*others[start:], *others[:start]][:NUM_EXAMPLES]


def _fill(template: str, question: Question, examples: Sequence[str]) -> str:
    texts: Mapping[str, str] = {
        "{question}": question.text,
        "{answer}": question.responses[0] if question.responses else "",
        "{examples}": "".join(EXAMPLE.replace("{answer}", example) for example in examples),
    }
    # in one pass: a question may hold the text {answer}
    return re.sub("|".join(map(re.escape, texts)), lambda match: texts[match[0]], template)


def _check_context(
    config: RankConfig,
    rank_model: RankModel,
    model: RankModel,
    name: str,
    questions: Sequence[Question],
    lengths: Sequence[int],
) -> None:
    key = "candidates" if name else "generate"
    new = config.candidates.max_new_tokens if name else config.generate.max_new_tokens
    context = model.decoder.config.max_length
    for question, length in zip(questions, lengths, strict=True):
        if length + new > context:
            what = f"the prompt of '{name}'" if name else "the question"
            (alone,) = build_question_prompts(config, rank_model, [question])
            raise ValueError(
                f"{question.where}: {what} has {length} tokens and its answer up to {key}.max_new_tokens = {new}; the "
                f"model's context holds {context}. Lower {key}.max_new_tokens, choose a model with a longer context, "
                f"or leave out such questions by rank.max_question_tokens, which counts {len(alone.tokens)} tokens of "
                "this one: the question alone."
            )


def _describe_faults(one: WrittenQuestion, unusable: Callable[[str], Any]) -> dict[str, str]:
    """strategy -> why its response cannot be used; that of the row is used as it is."""
    faults = {}
    for name, response in one.responses.items():
        if response.missing or not response.text.strip():
            faults[name] = response.missing or "empty"
        elif name != GOLD and unusable(response.text):
            faults[name] = "with a special token"
    return faults


def _make_row(config: RankConfig, one: WrittenQuestion) -> dict[str, object]:
    row: dict[str, object] = {
        config.data.prompt_field: one.question.text,
        config.rank.responses_field: {name: response.text for name, response in one.responses.items()},
    }
    if config.verifier.answer_field:
        row[config.verifier.answer_field] = one.question.reference_answer
    return row


def _make_notes(
    config: RankConfig, num_good: int, asked: int, bad: Mapping[str, Sequence[str]], num_cut: int
) -> list[str]:
    names = config.candidates.strategies
    writer = config.candidates.model or "the model itself"
    notes = [
        f"{', '.join(names)}: responses to {num_good:,} questions, written by {writer} (section candidates), are in "
        f"{STRATEGIES_FILE}"
    ]
    for name, places in bad.items():
        more = f" and {len(places) - MAX_PLACES_SHOWN} more" if len(places) > MAX_PLACES_SHOWN else ""
        notes.append(
            f"{format_count('response', len(places))} of '{name}' could not be used, and the questions were left out: "
            f"{', '.join(places[:MAX_PLACES_SHOWN])}{more}"
        )
    if num_cut:
        total = asked * len([name for name in names if name != GOLD])
        notes.append(f"{num_cut:,} of {total:,} written responses did not end within candidates.max_new_tokens")
    return notes
