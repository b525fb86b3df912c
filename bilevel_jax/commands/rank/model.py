"""The untrained model with its tokenizer, prompts and answers."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from bilevel_jax.commands.rank import strategies
from bilevel_jax.commands.rank.strategies import Question
from bilevel_jax.core.types import Params
from bilevel_jax.lm import models
from bilevel_jax.lm.data import tokens
from bilevel_jax.lm.data.examples import Example, format_count
from bilevel_jax.lm.data.render import Tokenizer
from bilevel_jax.lm.data.vocabulary import check_special_tokens
from bilevel_jax.lm.inference.generate import GenerateFn, Prompt
from bilevel_jax.lm.inference.prompts import find_end_tokens, make_prompts
from bilevel_jax.runs.config.load import RankConfig
from bilevel_jax.runs.infra.placement import make_mesh, replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.generation import make_generator_factory
from bilevel_jax.runs.scoring.verifiers import make_verifier
from bilevel_jax.scores.requests import TokenizedExamples, make_tokenized_examples, trim_responses

SPARE_DRAWS = 4
"""Further answers that are drawn to a question whose answer cannot be used, at most."""


class RankModel(NamedTuple):
    """The model that will be trained, before it is."""

    decoder: models.Decoder
    tokenizer: Tokenizer
    params: Params
    mesh: Mesh


class OwnAnswers(NamedTuple):
    """What the model says itself."""

    texts: list[list[list[str]]]
    """Of each block, each question, each draw."""
    accepted: Bool[np.ndarray, "blocks block"]
    """The verifier accepts the first one, or there is none."""
    notes: list[str]
    shown: Bool[np.ndarray, "blocks block"]
    """Which may be shown before other questions: those accepted, or all of a block that has too few of these."""
    further: list[tuple[Question, str]]
    """Accepted answers to questions of no block, shown in blocks that have too few of their own."""


def load_rank_model(config: RankConfig) -> RankModel:
    """The model and its tokenizer, on the mesh."""
    tokenizer = tokens.load_tokenizer(config.model.name_or_path)
    architecture, params = models.load_model(config.model.name_or_path, dtype=jnp.dtype(config.model.param_dtype))
    check_special_tokens(config.model.name_or_path, tokenizer, architecture.vocab_size)
    mesh = make_mesh(config.mesh.data)
    return RankModel(models.make_decoder(architecture, remat="none"), tokenizer, replicate(mesh, params), mesh)


def collect_own_answers(
    config: RankConfig,
    rank_model: RankModel,
    sample: Sequence[Sequence[Question]],
    session: Session,
    *,
    others: Sequence[Question] | None = None,
) -> OwnAnswers:
    """The model's own answers: read from rank.own_answers, or generated; then judged, where there is a verifier.

    Where it accepts too few of a block to show rank.k of them to each question, `others` are asked, up to
    rank.answer_questions in all; where these do not suffice, all answers of the block are shown, right or wrong. None:
    no answer is going to be shown.
    """
    questions = [question for block in sample for question in block]
    unusable = make_special_token_matcher(rank_model.tokenizer)
    notes = []
    known_answers: dict[str, list[str]] = {}
    generate: GenerateFn | None = None
    if config.rank.own_answers:
        known_answers = strategies.read_own_answers(config.rank.own_answers, config)
        texts = choose_own_answers(config, known_answers, questions, unusable)
    else:
        generate = make_generator_factory(
            config.generate, rank_model.decoder, rank_model.tokenizer, rank_model.mesh, session
        )(rank_model.params)
        texts, answer_notes = _generate_answers(config, rank_model, questions, unusable, session, generate)
        notes += answer_notes
    fewest = min(map(len, texts))
    if most := sum(len(drafts) > fewest for drafts in texts):
        notes.append(
            f"{fewest} own answers to each question are used, for so many has the one with the fewest; {most:,} of "
            f"{len(texts):,} questions had more"
        )
        texts = [drafts[:fewest] for drafts in texts]
    first_texts = [drafts[0] for drafts in texts]
    accepted = np.array(_judge_answers(config, questions, first_texts)).reshape(len(sample), -1)
    if config.verifier.name:
        notes.append(f"{int(accepted.sum()):,} of {accepted.size:,} answers of the model are right")
    further: list[tuple[Question, str]] = []
    if others is not None and config.verifier.name:
        others = [one for one in others if generate is not None or one.text in known_answers]

        def answer(chunk: Sequence[Question]) -> tuple[list[tuple[Question, str]], list[str]]:
            if generate is None:
                drafts = [known_answers[question.text][:1] for question in chunk]
                chunk_notes: list[str] = []
            else:
                chunk = [question for question in chunk if _fits_context(config, rank_model, question)]
                drafts, chunk_notes = _generate_answers(
                    config, rank_model, chunk, unusable, session, generate, is_required=False
                )
            pairs = [(question, some[0]) for question, some in zip(chunk, drafts, strict=True) if some]
            return [(question, text) for question, text in pairs if text.strip() and not unusable(text)], chunk_notes

        further, further_notes = _find_further_answers(config, accepted, others, answer)
        notes += further_notes
    has_enough = accepted.sum(1) + len(further) >= config.rank.k + 2
    shown = accepted | ~has_enough[:, None]
    size = len(sample[0])
    blocks_of_texts = [texts[at : at + size] for at in range(0, len(texts), size)]
    return OwnAnswers(blocks_of_texts, accepted, notes, shown, further)


def choose_own_answers(
    config: RankConfig,
    known_answers: Mapping[str, Sequence[str]],
    questions: Sequence[Question],
    unusable: Callable[[str], Any],
) -> list[list[str]]:
    """Of each question the answers of rank.own_answers that are used: generate.num_generations at most.

    Raises ValueError for a question without an answer, and for an answer with a special token.
    """
    if missing := [question for question in questions if question.text not in known_answers]:
        raise ValueError(
            f"{config.rank.own_answers} has no answer to {len(missing)} of {len(questions)} questions that were "
            f"drawn, the first at {missing[0].where}. Add them, or leave rank.own_answers empty: they are generated "
            "then."
        )
    texts = [list(known_answers[question.text][: config.generate.num_generations]) for question in questions]
    for question, drafts in zip(questions, texts, strict=True):
        if any(unusable(text) for text in drafts):
            raise _no_answer_error(question, [])
    return texts


def drop_long_questions(config: RankConfig, rank_model: RankModel, questions: list[Question]) -> list[Question]:
    """The questions of at most rank.max_question_tokens tokens, template included; all without that limit."""
    limit = config.rank.max_question_tokens
    if not limit:
        return questions
    prompts = build_question_prompts(config, rank_model, questions)
    return [question for question, prompt in zip(questions, prompts, strict=True) if len(prompt.tokens) <= limit]


def build_question_prompts(config: RankConfig, rank_model: RankModel, questions: Sequence[Question]) -> list[Prompt]:
    """The questions as prompts, each by the id of its text: what is drawn does not depend on the strategies."""
    placeholder_examples = [question.with_response("yes") for question in questions]
    question_prompts = make_prompts(
        placeholder_examples,
        rank_model.tokenizer,
        template=config.data.template or tokens.DEFAULT_TEMPLATE,
        vocab_size=rank_model.decoder.config.vocab_size,
    )
    return [prompt._replace(id=question.id) for prompt, question in zip(question_prompts, questions, strict=True)]


def tokenize_for_scoring(
    config: RankConfig, rank_model: RankModel, examples: list[Example]
) -> tuple[TokenizedExamples, int]:
    """Rows by the model's own chat template, their responses without end marks and cut at rank.max_response_tokens."""
    tokenizer = rank_model.tokenizer
    corpus, _ = tokens.tokenize(
        examples,
        tokenizer,
        max_length=sys.maxsize,
        template=config.data.template or tokens.DEFAULT_TEMPLATE,
        vocab_size=rank_model.decoder.config.vocab_size,
    )
    end_tokens = {*find_end_tokens(tokenizer, rank_model.decoder.config.eos), *tokenizer.all_special_ids} - {
        tokenizer.unk_token_id
    }
    corpus, num_cut = trim_responses(corpus, end_tokens, config.rank.max_response_tokens)
    return make_tokenized_examples(examples, corpus), num_cut


# ---- parts


def _judge_answers(config: RankConfig, questions: Sequence[Question], texts: Sequence[str]) -> list[bool]:
    """Whether the verifier accepts each answer; True where there is none."""
    if not config.verifier.name:
        return [True] * len(questions)
    judge = make_verifier(config.verifier, [question.with_response("") for question in questions])
    pairs = zip(questions, texts, strict=True)
    return [judge(question.with_response(text), text) >= 0.5 for question, text in pairs]


def _find_further_answers(
    config: RankConfig,
    accepted: Bool[np.ndarray, "blocks block"],
    others: Sequence[Question],
    answer: Callable[[Sequence[Question]], tuple[list[tuple[Question, str]], list[str]]],
) -> tuple[list[tuple[Question, str]], list[str]]:
    """(right answers to questions of no block, as many as the block with the fewest lacks; notes)."""
    wanted, own = config.rank.k + 2, accepted.sum(1).tolist()
    limit, asked = min(len(others), config.rank.answer_questions - accepted.size), 0
    further: list[tuple[Question, str]] = []
    notes: list[str] = []
    while min(own) + len(further) < wanted and asked < limit:
        chunk = others[asked : min(asked + accepted.shape[1], limit)]
        asked += len(chunk)
        answered, chunk_notes = answer(chunk)
        is_right = _judge_answers(config, [one for one, _ in answered], [text for _, text in answered])
        further += [pair for pair, right in zip(answered, is_right, strict=True) if right]
        notes += chunk_notes
    if asked:
        notes.append(
            f"blocks with fewer than {wanted} right answers also show those to further questions: of "
            f"{asked:,} that were asked (rank.answer_questions) {len(further)} were answered right"
        )
    if short := [at + 1 for at, count in enumerate(own) if count + len(further) < wanted]:
        notes.append(
            f"{config.rank.k} right answers for each question (rank.k) take {wanted}, and there are fewer for block "
            f"{', '.join(map(str, short))}: there all answers are shown, right or wrong"
        )
    return further, notes


def _fits_context(config: RankConfig, rank_model: RankModel, question: Question) -> bool:
    """Whether the model can answer a question to the end."""
    if config.generate.backend != "embedded":
        return True
    num_tokens = len(build_question_prompts(config, rank_model, [question])[0].tokens)
    return num_tokens + config.generate.max_new_tokens <= rank_model.decoder.config.max_length


def _generate_answers(
    config: RankConfig,
    rank_model: RankModel,
    questions: Sequence[Question],
    unusable: Callable[[str], Any],
    session: Session,
    generate: GenerateFn,
    *,
    is_required: bool = True,
) -> tuple[list[list[str]], list[str]]:
    """The first usable answers to each question, at least one where it is required, and notes on the others."""
    session.set_phase("answering")
    pending = build_question_prompts(config, rank_model, questions)
    new, context = config.generate.max_new_tokens, rank_model.decoder.config.max_length
    for prompt, item in zip(pending, questions, strict=True):
        if config.generate.backend == "embedded" and len(prompt.tokens) + new > context:
            raise ValueError(
                f"{item.where}: the question has {len(prompt.tokens)} tokens and its answer up to "
                f"generate.max_new_tokens = {new}; the model's context holds {context}. Lower "
                f"generate.max_new_tokens, or set rank.max_question_tokens to {context - new} or less."
            )
    count = config.generate.num_generations
    texts: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}  # prompt id -> why a service gave no answer, once for each draw
    num_unusable, redrawn = 0, False
    for draws in (range(count), range(count, count + SPARE_DRAWS)):
        redrawn = draws.start > 0
        for prompt, responses in zip(pending, generate(pending, draws), strict=True):
            usable = texts.setdefault(prompt.id, [])
            missing = [item.missing for item in responses if item.missing]
            reasons.setdefault(prompt.id, []).extend(missing)
            good = [item.text for item in responses if item.text.strip() and not unusable(item.text)]
            num_unusable += len(responses) - len(good) - len(missing) if draws.start == 0 else 0
            usable += good[: count - len(usable)]
        pending = [prompt for prompt in pending if len(texts[prompt.id]) < count]
        if not pending or not config.generate.temperature:
            break
        if not any(texts.values()) and any(reasons.values()):
            break  # a service that answers nothing at all is not asked again
    for question in questions:
        if is_required and not texts[question.id]:
            raise _no_answer_error(question, reasons[question.id])
    notes = []
    if num_unusable:
        notes.append(
            f"{format_count('answer', num_unusable)} of the model could not be used, empty or with a special token"
            + ("; others were drawn instead" if redrawn else "")
        )
    if all_reasons := [reason for one in reasons.values() for reason in one]:
        notes.append(
            f"{format_count('request', len(all_reasons))} got no answer from the service: {_count_reasons(all_reasons)}"
        )
    return [texts[question.id] for question in questions], notes


def _no_answer_error(question: Question, reasons: Sequence[str]) -> ValueError:
    why = f"the service gave none, {_count_reasons(reasons)}" if reasons else ""
    remedy = "Raise generate.temperature"
    if any("max_new_tokens" in reason for reason in reasons):
        remedy = "Raise generate.max_new_tokens, or let the service answer without reasoning"
    elif reasons:
        remedy = "Remove the question, ask another service"
    return ValueError(
        f"{question.where}: the model gives no answer to this question that can be shown "
        f"({why or 'empty, or with a special token'}). {remedy}, or give answers by rank.own_answers."
    )


def _count_reasons(reasons: Sequence[str]) -> str:
    """Each kind of reason with its number, the most frequent first, and the words of the first."""
    first = {reason.partition(":")[0]: reason for reason in reversed(reasons)}
    kinds = Counter(reason.partition(":")[0] for reason in reasons)
    words = (f"{format_count('time', number)}, {first[kind].rstrip('.')}" for kind, number in kinds.most_common())
    return "; ".join(words)


def make_special_token_matcher(tokenizer: Tokenizer) -> Callable[[str], Any]:
    """text -> whether it holds a special token, which the tokenizer would read as one."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    names = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))).search if names else lambda text: None
