"""Data scores of examples by a loaded language model."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Float

from bilevel_jax.language_model import inference
from bilevel_jax.language_model.finetuning import check_count, make_sections, make_task
from bilevel_jax.lm.data.examples import Example, example_kind, is_preference_pair
from bilevel_jax.lm.data.turns import Turn
from bilevel_jax.lm.inference.prompts import find_end_tokens
from bilevel_jax.lm.inference.sampling import SamplingParams
from bilevel_jax.runs.config.schema import ObjectiveSection, ScoresSection, TrainSection
from bilevel_jax.runs.config.yaml_reader import suggest_nearest
from bilevel_jax.runs.scoring import likelihoods
from bilevel_jax.runs.scoring.likelihoods import ScoreValues
from bilevel_jax.runs.scoring.scores import example_alignments, example_margins
from bilevel_jax.runs.tasks.text import TextTask
from bilevel_jax.scores import selfaligned
from bilevel_jax.scores.embedding import extract_question
from bilevel_jax.scores.ifd import ifd_score
from bilevel_jax.scores.perplexity import loss_score, perplexity_score, reducible_loss
from bilevel_jax.scores.random import hash_to_int, random_score
from bilevel_jax.scores.requests import (
    ScoreFn,
    TokenizedExamples,
    make_tokenized_examples,
    take_examples,
    trim_responses,
)
from bilevel_jax.scores.selfsimilarity import response_similarity

if TYPE_CHECKING:
    from bilevel_jax.language_model.model import LanguageModel

Values = Float[np.ndarray, "examples"]


class Scores(NamedTuple):
    """A data score of each example."""

    name: str
    values: Values
    """Larger is better; nan for an example that was dropped as too long, or where `notes` say that there is none."""
    ids: tuple[str, ...]
    """Of the examples, in their order."""
    notes: tuple[str, ...]
    """What a person should know of these scores."""
    standard_errors: Values | None = None
    """Of each value, of ica with several sets of demonstrations: how much it depends on which were shown."""


@dataclass(frozen=True)
class ScoreOptions:
    """The arguments of a score; see `LanguageModel.score`."""

    k: int | None = None
    demonstrations: str = "knn"
    demonstration_sets: int = 1
    embedding: str = "tfidf"
    embedding_file: str = ""
    per_token: bool = True
    max_similarity: float = 0.95
    template: str = ""
    demonstration_template: str = ""
    anchors: int = 32
    objective: str | ObjectiveSection = "sft"
    batch_size: int = 16
    holdout_model: "LanguageModel | None" = None
    own_answers: Mapping[str, str] | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0


class ScoreJob(NamedTuple):
    """What the function of a score reads."""

    lm: "LanguageModel"
    candidates: list[Example]
    holdout: list[Example]
    options: ScoreOptions
    progress: bool


class ScoreKind(NamedTuple):
    """A score by name: how it is computed, and what it reads."""

    compute: Callable[[ScoreJob], ScoreValues]
    options: tuple[str, ...] = ()
    """The arguments that it reads."""
    takes_holdout: bool = False


def score(
    lm: "LanguageModel", name: str, examples: Any, holdout: Any, options: ScoreOptions, *, progress: bool = False
) -> Scores:
    """As `LanguageModel.score`."""
    if name not in SCORES:
        raise ValueError(f"there is no score {name!r}; {suggest_nearest(name, SCORES)}the scores: {', '.join(SCORES)}.")
    kind = SCORES[name]
    _check_options(name, kind, options, holdout is not None)
    candidates = lm.read(examples)
    held_out = lm.read(holdout, name="holdout") if holdout is not None else []
    values, notes, standard_errors = kind.compute(ScoreJob(lm, candidates, held_out, options, progress))
    values = np.where(np.isfinite(values), values, np.nan)
    missing = int(np.isnan(values).sum())
    if missing == len(values):
        raise FloatingPointError(f"the score {name!r} is no finite number for any of {len(values):,} examples.")
    if missing:
        first = candidates[int(np.flatnonzero(np.isnan(values))[0])].where
        notes = (*notes, f"{missing:,} of {len(values):,} examples have no {name}, the first {first}.")
    return Scores(name, values, tuple(example.id for example in candidates), tuple(notes), standard_errors)


# ---- one function for each score


def compute_plan(job: ScoreJob, *, score_fn: Callable[[ScoreJob], ScoreFn]) -> ScoreValues:
    """A score that asks for likelihoods of the examples alone."""
    candidates = inference.tokenize(job.lm, job.candidates)
    plan = score_fn(job)(candidates, candidates)
    return ScoreValues(plan.combine(inference.answer_requests(job.lm, plan.requests, progress=job.progress)))


def compute_reducible(job: ScoreJob) -> ScoreValues:
    """l_i(this model) - l_i(the model that was trained on the holdout)."""
    if job.options.holdout_model is None:
        raise ValueError(
            "the score 'reducible' compares with a model that was trained on the holdout: give "
            "holdout_model=lm.finetune(holdout, optimizer=..., steps=..., solver=None).lm."
        )
    candidates = inference.tokenize(job.lm, job.candidates)
    requests = loss_score(candidates, candidates).requests
    answers = (
        inference.answer_requests(model, requests, progress=job.progress)
        for model in (job.lm, job.options.holdout_model)
    )
    return ScoreValues(reducible_loss(candidates, *answers))


def compute_ica(job: ScoreJob) -> ScoreValues:
    """How much likelier the answer is after holdout examples as demonstrations."""
    lm, (candidates, holdout) = job.lm, (inference.tokenize(job.lm, part) for part in (job.candidates, job.holdout))
    answer = partial(inference.answer_requests, lm, progress=job.progress)
    settings = _scores_section(job.options)
    return likelihoods.ica_values(candidates, holdout, answer, lm.tokenizer, lm.decoder, lm.joined_params, settings)


def compute_one_shot(job: ScoreJob) -> ScoreValues:
    """The share of holdout answers that are likelier after the example."""
    lm, (candidates, holdout) = job.lm, (inference.tokenize(job.lm, part) for part in (job.candidates, job.holdout))
    answer = partial(inference.answer_requests, lm, progress=job.progress)
    settings, max_length = _scores_section(job.options), lm.architecture.max_length
    return likelihoods.one_shot_values(candidates, holdout, answer, lm.tokenizer, max_length, settings)


def compute_margin(job: ScoreJob) -> ScoreValues:
    """EL2N of the example's own answer."""
    task = _make_task(job)
    return ScoreValues(example_margins(task, task.init_params(0)))


def compute_alignment(job: ScoreJob) -> ScoreValues:
    """<grad l_i, grad L_v>."""
    task = _make_task(job)
    return ScoreValues(example_alignments(task, task.init_params(0)))


def compute_sppl(job: ScoreJob) -> ScoreValues:
    """-exp(loss of the response) after the model's own answers to other questions."""
    answers, order, notes = collect_own_answers(job)
    k = 2 if job.options.k is None else job.options.k
    usable = np.array([bool(answers[question].strip()) for question in order])
    try:
        shown = selfaligned.choose_shown_answers(usable, k)
    except ValueError:
        raise ValueError(
            f"the score 'sppl' shows {k} of the model's own answers to other questions before each, and "
            f"{int(usable.sum())} of {len(order)} questions have one that can be shown; {k + 2} are needed. Give more "
            "questions, own_answers, or a smaller k."
        ) from None
    write = selfaligned.prompt_writer(
        job.options.template or selfaligned.SPPL_TEMPLATE,
        job.options.demonstration_template or selfaligned.EXAMPLE_TEMPLATE,
    )
    prompt_of = {
        question: write(question, [answers[order[place]] for place in places])
        for question, places in zip(order, shown, strict=True)
    }
    prompted = [
        example._replace(turns=(Turn("user", prompt_of[extract_question(example)]), example.turns[-1]))
        for example in job.candidates
    ]
    rows = tokenize_without_end(job.lm, prompted)
    lengths = np.array([len(rows.sequences(i)[0].ids) - 1 for i in range(len(prompted))])
    fits = find_fitting(job, lengths, job.lm.architecture.max_length, f"behind {k} answers of the model's own it takes")
    fitting_rows = take_examples(rows, np.flatnonzero(fits))
    plan = selfaligned.sppl_score(fitting_rows, fitting_rows)
    values = np.full(len(prompted), np.nan)
    values[fits] = plan.combine(inference.answer_requests(job.lm, plan.requests, progress=job.progress))
    return ScoreValues(values, notes)


def compute_self_similarity(job: ScoreJob) -> ScoreValues:
    """The cosine, in hidden states, of the response with the model's own answer."""
    lm = job.lm
    answers, _, notes = collect_own_answers(job)
    own = [example.turns[-1]._replace(content=answers[extract_question(example)]) for example in job.candidates]
    sides = (
        job.candidates,
        [
            example._replace(turns=(*example.turns[:-1], turn))
            for example, turn in zip(job.candidates, own, strict=True)
            if turn.content.strip()
        ],
    )
    has_own = np.array([bool(turn.content.strip()) for turn in own])
    if not has_own.any():
        raise ValueError("the model answers every question with nothing: raise temperature, or give own_answers.")
    rows, own_rows = (tokenize_without_end(lm, side) for side in sides)
    responses = [_response_ids(rows, i) for i in np.flatnonzero(has_own).tolist()]
    others = [_response_ids(own_rows, i) for i in range(int(has_own.sum()))]
    lengths = np.array([max(map(len, pair)) for pair in zip(responses, others, strict=True)])
    room = lm.architecture.max_length - (lm.tokenizer.bos_token_id is not None)
    places = np.flatnonzero(has_own)
    fits = find_fitting(job, lengths, room, "its response, or the model's own, takes", places)
    similarity = response_similarity(
        lm.decoder,
        lm.tokenizer.bos_token_id,
        batch_size_multiple=lm.mesh.size,
        place_batch=partial(inference.place_batch, lm.mesh),
    )
    values = np.full(len(job.candidates), np.nan)
    chosen = np.flatnonzero(fits).tolist()
    values[places[fits]] = similarity(lm.joined_params, [responses[i] for i in chosen], [others[i] for i in chosen])
    return ScoreValues(values, notes)


TEMPLATES = ("template", "demonstration_template")
SCORES: dict[str, ScoreKind] = {
    "loss": ScoreKind(partial(compute_plan, score_fn=lambda job: loss_score)),
    "perplexity": ScoreKind(partial(compute_plan, score_fn=lambda job: perplexity_score)),
    "ifd": ScoreKind(partial(compute_plan, score_fn=lambda job: ifd_score(job.lm.tokenizer.bos_token_id))),
    "margin": ScoreKind(compute_margin, ("objective", "batch_size")),
    "random": ScoreKind(partial(compute_plan, score_fn=lambda job: random_score(job.options.seed)), ("seed",)),
    "ica": ScoreKind(
        compute_ica,
        (
            "k",
            "demonstrations",
            "demonstration_sets",
            "embedding",
            "embedding_file",
            "per_token",
            "max_similarity",
            *TEMPLATES,
            "seed",
        ),
        takes_holdout=True,
    ),
    "oneshot": ScoreKind(compute_one_shot, ("anchors", "max_similarity", *TEMPLATES, "seed"), takes_holdout=True),
    "alignment": ScoreKind(compute_alignment, ("objective", "batch_size"), takes_holdout=True),
    "reducible": ScoreKind(compute_reducible, ("holdout_model",)),
    "sppl": ScoreKind(compute_sppl, ("k", *TEMPLATES, "own_answers", "max_new_tokens", "temperature", "seed")),
    "self_similarity": ScoreKind(compute_self_similarity, ("own_answers", "max_new_tokens", "temperature", "seed")),
}
"""The scores by name."""


# ---- parts


def collect_own_answers(job: ScoreJob) -> tuple[dict[str, str], list[str], tuple[str, ...]]:
    """(question -> the model's own answer, the questions in an order that the examples' order does not change,
    notes)."""
    for example in job.candidates:
        roles = [turn.role for turn in example.turns]
        if roles != ["user", "assistant"] or is_preference_pair(example):
            kind = "a pair" if is_preference_pair(example) else example_kind(example)
            raise ValueError(
                f"{example.where}: a question and one response are wanted for scores with answers of the model's own, "
                f"and this is {kind} ({', '.join(roles)})."
            )
    options, first = job.options, {extract_question(example): example for example in job.candidates}
    prompts = inference.make_text_prompts(job.lm, list(first.values()))
    keys = {question: prompt.id for question, prompt in zip(first, prompts, strict=True)}
    order = sorted(first, key=lambda question: (hash_to_int(keys[question], options.seed), keys[question]))
    if options.own_answers is not None:
        if lacking := [question for question in order if question not in options.own_answers]:
            raise ValueError(
                f"own_answers has none to {len(lacking)} of {len(order)} questions, the first at "
                f"{first[lacking[0]].where}. Add them, or leave own_answers out: they are generated then."
            )
        return {question: options.own_answers[question] for question in order}, order, ()
    sampling = SamplingParams(options.temperature, max_new_tokens=options.max_new_tokens, seed=options.seed)
    drawn = inference.generate(job.lm, list(first.values()), sampling, 1, progress=job.progress)
    answers = {question: responses[0].text for question, responses in zip(first, drawn, strict=True)}
    cut = sum(not responses[0].ended for responses in drawn)
    empty = sum(not text.strip() for text in answers.values())
    notes = [f"{cut:,} of {len(order):,} own answers were cut at max_new_tokens = {options.max_new_tokens}."]
    notes = notes * bool(cut) + [f"{empty:,} own answers are empty, and not shown."] * bool(empty)
    return answers, order, tuple(notes)


def find_fitting(
    job: ScoreJob, lengths: np.ndarray, room: int, what: str, places: np.ndarray | None = None
) -> np.ndarray:
    """Which examples are within the model's context; a ValueError where one is not, unless such are to be dropped."""
    fits = lengths <= room
    if not fits.any() or (job.lm.data.truncation != "drop" and not fits.all()):
        longest = int(np.argmax(lengths))
        example = job.candidates[longest if places is None else int(places[longest])]
        raise ValueError(
            f"{example.where}: {what} {lengths[longest]} token places, and the model's context has {room}; so do "
            f"{int((~fits).sum())} of {len(fits)} examples. Lower k or max_new_tokens, give shorter templates or "
            "examples, or load the model with data.truncation = drop."
        )
    return fits


def tokenize_without_end(lm: "LanguageModel", examples: list[Example]) -> TokenizedExamples:
    """Examples whose responses have no end token, so that none counts for how it ends."""
    rows = inference.tokenize_whole(lm, examples)
    end_tokens = {*find_end_tokens(lm.tokenizer, lm.architecture.eos), *lm.tokenizer.all_special_ids}
    corpus, _ = trim_responses(rows.corpus, end_tokens - {lm.tokenizer.unk_token_id})
    return make_tokenized_examples(examples, corpus)


def _make_task(job: ScoreJob) -> TextTask:
    sections = make_sections(
        job.lm, lora=0, objective=job.options.objective, train=TrainSection(1, job.options.batch_size)
    )
    return make_task(job.lm, sections, job.candidates, job.holdout, optax.identity())


def _scores_section(options: ScoreOptions) -> ScoresSection:
    return ScoresSection(
        k=3 if options.k is None else options.k,
        demonstrations=options.demonstrations,
        demonstration_sets=options.demonstration_sets,
        embedding=options.embedding,  # type: ignore[arg-type]
        embedding_file=options.embedding_file,
        per_token=options.per_token,
        max_similarity=options.max_similarity,
        template=options.template,
        demonstration_template=options.demonstration_template,
        anchors=options.anchors,
        seed=options.seed,
    )


def _response_ids(rows: TokenizedExamples, i: int) -> tuple[int, ...]:
    ids, is_target, _ = rows.sequences(i)[0]
    return tuple(ids[is_target].tolist())


def _check_options(name: str, kind: ScoreKind, options: ScoreOptions, has_holdout: bool) -> None:
    """Raise ValueError for an argument that the score does not read, a holdout that it lacks, and bad counts."""
    default = ScoreOptions()
    for field in dataclasses.fields(ScoreOptions):
        value = getattr(options, field.name)
        if value != getattr(default, field.name) and field.name not in kind.options:
            reads = f"it reads {', '.join(kind.options)}" if kind.options else "it reads none of these arguments"
            raise ValueError(f"the score {name!r} does not read {field.name}; {reads}. Leave it out.")
    if kind.takes_holdout and not has_holdout:
        raise ValueError(f"the score {name!r} compares with a holdout: give trusted examples as the third argument.")
    if has_holdout and not kind.takes_holdout:
        raise ValueError(f"the score {name!r} reads no holdout. Leave it out.")
    for count in ("demonstration_sets", "anchors", "batch_size", "max_new_tokens"):
        check_count(count, getattr(options, count))
    check_count("seed", options.seed, least=0)
    if options.k is not None:
        check_count("k", options.k)
    if options.embedding not in ("tfidf", "hidden", "file"):
        raise ValueError(f"embedding is {options.embedding!r}; it is 'tfidf', 'hidden' or 'file'.")
    if bool(options.embedding_file) != (options.embedding == "file"):
        raise ValueError("embedding='file' reads embedding_file: give both, or neither.")
