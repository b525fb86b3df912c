"""Likelihood-based scores and the resumable engine behind them."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt32

from bilevel_jax.core.types import Batch, Params, Stream
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.render import Tokenizer
from bilevel_jax.lm.inference.loglik import (
    MAX_BATCH_TOKENS,
    LogLik,
    LogLikRequest,
    LogLikStore,
    make_loglik_scorer,
)
from bilevel_jax.lm.inference.padding import BatchShapes, make_buckets
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs.config.schema import ScoresSection
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.distributed import fetch_from_first, fetch_to_host
from bilevel_jax.runs.infra.journal import Journal
from bilevel_jax.runs.infra.placement import place_stream
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.from_file import load_embeddings
from bilevel_jax.runs.tasks.text import TextTask
from bilevel_jax.scores import incontext, oneshot
from bilevel_jax.scores.demonstrations import demonstration_selector, split_into_sets
from bilevel_jax.scores.embedding import given_vectors, hidden_states, tfidf
from bilevel_jax.scores.random import hash_to_int
from bilevel_jax.scores.requests import (
    LoglikFn,
    ScorePlan,
    TokenizedExamples,
    make_tokenized_examples,
    take_examples,
)

ANSWERS_FILE = "answers.jsonl"
"""The journal of answers in the run's checkpoints, deleted when all requests are answered."""
AGREEMENT_SAMPLE_SIZE = 200
"""Rows of which a cheaper choice of demonstrations is compared with the published one; at most a tenth of all."""


class ScoreResult(NamedTuple):
    """What the function of one score gives."""

    values: Float[np.ndarray, "examples"]
    """Larger is better; nan for a row that was dropped or has none."""
    passes: float
    """Its work, in training steps: a forward and a backward pass over one batch; a forward pass alone is a third."""
    notes: tuple[str, ...] = ()
    """What a person should know of these scores."""
    standard_errors: Float[np.ndarray, "examples"] | None = None
    """Of each value, over several sets of demonstrations; None for one set, and of scores that show none."""


class ScoreValues(NamedTuple):
    """A score without what it took."""

    values: Float[np.ndarray, "examples"]
    notes: tuple[str, ...] = ()
    standard_errors: Float[np.ndarray, "examples"] | None = None
    """As of `ScoreResult`."""


class ResumableEngine:
    """A model answering requests; what it answered before a stop is not asked again."""

    def __init__(self, decoder: Decoder, params: Params, mesh: Mesh, session: Session):
        self.params = params
        self._engine = _cached_engine(decoder, mesh, session)
        self._path = session.folder / "checkpoints" / ANSWERS_FILE
        self.positions_read = 0
        """Token places of the requests so far, read by this process or by those before it that were stopped; what a
        stop had read twice counts once."""

    def __call__(
        self, requests: Sequence[LogLikRequest], on_batch: Callable[[int], None] = lambda done: None
    ) -> list[LogLik]:
        """The answers, in order; `on_batch` is told after each batch how many distinct ones have one."""
        journal = Journal(self._path, fsync=True)
        stored_answers = {key: answer for record in journal.read_new() for key, answer in record.items()}
        store = LogLikStore(fingerprint_params(self.params), stored_answers, journal.append)
        self._engine.on_batch = on_batch
        answers = self._engine.engine.resume(self.params, requests, store)
        self.positions_read += self._engine.engine.count_positions(requests)
        distributed.run_on_first_process(journal.remove)
        return answers


class TaskLikelihoods:
    """The task's model under some parameters, answering requests; counts its work in training steps."""

    def __init__(self, task: TextTask, params: Params, session: Session):
        self.params = assemble_params(params, task.base_params)
        self._engine = ResumableEngine(task.decoder, self.params, task.mesh, session)
        self._positions_per_step = count_step_positions(task)

    def __call__(self, requests: Sequence[LogLikRequest]) -> list[LogLik]:
        """The answers, in order."""
        return self._engine(requests)

    @property
    def passes(self) -> float:
        """The work so far in training steps: token places read, a forward pass being a third of a step."""
        return self._engine.positions_read / self._positions_per_step / 3


class SessionEngine:
    """An engine, compiled once for a run."""

    def __init__(self, decoder: Decoder, mesh: Mesh, session: Session):
        self.on_batch: Callable[[int], None] = lambda done: None

        def place_batch(batch: Batch) -> Batch:
            return place_stream(mesh, Stream(lambda step: batch, 1)).batch(0)

        def progress(done: int, total: int) -> None:
            self.on_batch(done)
            session.check_signals()

        self.engine = make_loglik_scorer(
            decoder, row_multiple=mesh.size, place=place_batch, fetch=fetch_to_host, progress=progress
        )


@lru_cache(maxsize=4)
def _cached_engine(decoder: Decoder, mesh: Mesh, session: Session) -> SessionEngine:
    return SessionEngine(decoder, mesh, session)


def compute_ica(task: TextTask, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """`ica_score` with validation as the holdout."""
    model, (train_rows, holdout) = TaskLikelihoods(task, params, session), train_and_validation_rows(task)
    score = ica_values(train_rows, holdout, model, task.tokenizer, task.decoder, model.params, settings)
    return ScoreResult(score.values, model.passes, score.notes, score.standard_errors)


def check_embeddings(settings: ScoresSection, *parts: Sequence[Example]) -> None:
    """Raise ValueError before a run where scores.embedding_file lacks one of the examples that `ica` compares."""
    for examples in parts if settings.embedding == "file" else ():
        load_embeddings(settings.embedding_file).rows(examples)


def check_demonstrations_fit(settings: ScoresSection, task: TextTask, longest: int) -> None:
    """Raise ValueError where `ica` could not show scores.k validation examples before each row of up to `longest`
    tokens, whichever it chooses: rows with fewer of them would have other scores than rows with all."""
    demonstration_selector(settings.demonstrations)  # raises for a name that is unknown
    holdout = train_and_validation_rows(task)[1]
    usable, needed = int(holdout.is_kept.sum()), settings.k * settings.demonstration_sets
    if usable < needed:
        sets = f" in {settings.demonstration_sets} sets" if settings.demonstration_sets > 1 else ""
        raise ValueError(
            f"{usable} validation examples, and scores.k = {settings.k}{sets} takes {needed} of them as "
            "demonstrations. Give more in data.validation, or lower scores.k."
        )
    context = count_context_tokens(settings, task)
    if context + longest > task.architecture.max_length:
        raise ValueError(
            f"the longest example has {longest} tokens with its response, and scores.k = {settings.k} of the longest "
            f"validation examples before it {context} more: over the model's {task.architecture.max_length}. Lower "
            "scores.k or generate.max_new_tokens, or leave out the long examples."
        )


def count_context_tokens(settings: ScoresSection, task: TextTask) -> int:
    """The most tokens that `ica` puts before an example: those of the scores.k longest demonstrations."""
    demonstration_format = _prompt_format(task.tokenizer, settings)
    holdout = train_and_validation_rows(task)[1]
    pieces = [
        demonstration_format.format_demonstration(holdout.sequences(int(place))[0])
        for place in np.flatnonzero(holdout.is_kept)
    ]
    longest = sorted(pieces, key=len)[-settings.k :]
    return len(demonstration_format.format_context(longest)) - len(demonstration_format.bos)  # which the example has


def count_ica_work(settings: ScoresSection, task: TextTask, num_rows: int) -> int:
    """About the most that `ica` of some rows costs, in whole training steps: as if each were the longest, and shared no
    prefix with another; without the hidden states of scores.embedding = hidden."""
    shapes = BatchShapes(make_buckets(task.architecture, ()), MAX_BATCH_TOKENS, task.mesh.size)
    row, context = task.layout.length + 1, count_context_tokens(settings, task)

    def count_positions(num_requests: int, num_tokens: int) -> int:
        length = shapes.pick_length(min(num_tokens, task.architecture.max_length) - 1)  # the last is only predicted
        batch_rows = shapes.max_rows(length)
        return -(-num_requests // batch_rows) * batch_rows * length

    positions = count_positions(num_rows, row) + count_positions(settings.demonstration_sets * num_rows, row + context)
    if settings.demonstrations != "knn":
        positions += count_positions(min(AGREEMENT_SAMPLE_SIZE, num_rows // 10), row + context)
    return math.ceil(positions / count_step_positions(task) / 3)


def count_step_positions(task: TextTask) -> int:
    """Token places of a training step, padding included."""
    return task.layout.num_micro_batches * task.layout.rows * task.layout.length


def compute_one_shot(task: TextTask, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """`oneshot_score` with scores.anchors validation examples as the holdout."""
    model, (train_rows, holdout) = TaskLikelihoods(task, params, session), train_and_validation_rows(task)
    score = one_shot_values(train_rows, holdout, model, task.tokenizer, task.architecture.max_length, settings)
    return ScoreResult(score.values, model.passes, score.notes)


def ica_values(
    candidates: TokenizedExamples,
    holdout: TokenizedExamples,
    loglik_fn: LoglikFn,
    tokenizer: Tokenizer,
    decoder: Decoder,
    params: Params,
    settings: ScoresSection,
) -> ScoreValues:
    """`ica_score` of the candidates; `params` are the whole ones, read for embedding = hidden alone.

    With several sets of demonstrations the mean over them, and its standard error: how much a score depends on which of
    the holdout was shown. It does not tell what another holdout would say.
    """
    embedding = {
        "tfidf": lambda: tfidf,
        "hidden": lambda: hidden_states(decoder, params, fetch=fetch_from_first),
        "file": lambda: given_vectors(load_embeddings(settings.embedding_file).rows),
    }[settings.embedding]()

    num_sets, usable = settings.demonstration_sets, int(holdout.is_kept.sum())
    if num_sets > 1 and usable < num_sets * settings.k:
        raise ValueError(
            f"{usable} holdout rows, and scores.demonstration_sets = {num_sets} disjoint sets of k = {settings.k} take "
            f"{num_sets * settings.k}. Give more holdout rows, fewer sets, or a smaller k."
        )

    def make_scores(demonstrations: str, num_sets: int) -> list[incontext.ScoreFn]:
        choose = demonstration_selector(
            demonstrations, embedding=embedding, max_similarity=settings.max_similarity, seed=settings.seed
        )
        return [
            incontext.ica_score(
                _prompt_format(tokenizer, settings), choose_set, max_length=decoder.config.max_length, k=settings.k,
                per_token_mean=settings.per_token,
            )
            for choose_set in split_into_sets(choose, num_sets)
        ]  # fmt: skip

    plans = [make_score(candidates, holdout) for make_score in make_scores(settings.demonstrations, num_sets)]
    answers = loglik_fn([request for plan in plans for request in plan.requests])  # at once, so that a stop loses none
    ends = np.cumsum([len(plan.requests) for plan in plans]).tolist()
    by_set = np.stack(
        [plan.combine(answers[end - len(plan.requests) : end]) for plan, end in zip(plans, ends, strict=True)]
    )
    values = by_set.mean(0)
    standard_errors = by_set.std(0, ddof=1) / np.sqrt(num_sets) if num_sets > 1 else None
    notes = tuple(dict.fromkeys(note for plan in plans for note in _shortage_notes(plan, candidates, "demonstrations")))
    if standard_errors is not None and np.isfinite(values).any():
        notes += (
            f"standard errors over {num_sets} sets of demonstrations: median {np.nanmedian(standard_errors):.3g}; the "
            f"scores of the rows have a standard deviation of {np.nanstd(values):.3g}.",
        )
    sample = min(AGREEMENT_SAMPLE_SIZE, int(candidates.is_kept.sum()) // 10)
    if settings.demonstrations != "knn" and sample >= 10:
        correlation = incontext.measure_rank_agreement(
            values, make_scores("knn", 1)[0], candidates, holdout, loglik_fn, sample_size=sample, seed=settings.seed
        )
        notes += (f"rank correlation with demonstrations = knn on {sample} rows: {correlation:.3f}.",)
    return ScoreValues(values, notes, standard_errors)


def one_shot_values(
    candidates: TokenizedExamples,
    holdout: TokenizedExamples,
    loglik_fn: LoglikFn,
    tokenizer: Tokenizer,
    max_length: int,
    settings: ScoresSection,
) -> ScoreValues:
    """`oneshot_score` of the candidates on scores.anchors examples of the holdout."""
    usable_indices = np.flatnonzero(holdout.is_kept)
    anchors = sorted(usable_indices, key=lambda j: hash_to_int(holdout.examples[int(j)].id, settings.seed))[
        : settings.anchors
    ]
    score = oneshot.oneshot_score(
        _prompt_format(tokenizer, settings), max_length=max_length, max_similarity=settings.max_similarity
    )
    plan = score(candidates, take_examples(holdout, np.sort(np.array(anchors))))
    values = plan.combine(loglik_fn(plan.requests))
    return ScoreValues(values, _shortage_notes(plan, candidates, "rows of validation to be judged by"))


def train_and_validation_rows(task: TextTask) -> tuple[TokenizedExamples, TokenizedExamples]:
    """(the training examples, those of validation), as scores read them."""
    return make_tokenized_examples(task.examples, task.corpus), make_tokenized_examples(
        task.held_out_examples["validation"], task.corpus, first_row=task.num_examples
    )


def fingerprint_params(params: Params) -> str:
    """16 hex digits of the bits of all parameters, which stay on the device: the same in any layout, on any devices."""
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in _checksums(params))).digest()
    return distributed.fetch_from_first(np.frombuffer(digest[:8], np.uint8)).tobytes().hex()


@jax.jit
def _checksums(params: Params) -> list[UInt32[jax.Array, "2"]]:
    """Two sums for each array, in integers modulo 2^32: unlike sums of floats they are the same in any order."""
    return [_checksum(leaf) for leaf in jax.tree.leaves(params)]


def _checksum(leaf: jax.Array) -> UInt32[jax.Array, "2"]:
    """The sums of the bits of each entry, mixed, times odd numbers that tell its place."""
    word = jnp.uint32 if leaf.dtype.itemsize >= 4 else jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint8
    bits = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)  # of 64 bits two words, along a new last axis
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    odd = 2 * place + 1
    mixed = bits * jnp.uint32(0x9E3779B1)  # the golden ratio, as multiplicative hashing takes it
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    sums = jax.lax.reduce(  # both at once: one by one each would take a copy of the array
        (bits * odd, (mixed ^ (mixed >> 13)) * odd),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda one, other: (one[0] + other[0], one[1] + other[1]),
        range(bits.ndim),
    )
    return jnp.stack(sums)


def _prompt_format(tokenizer: Tokenizer, settings: ScoresSection) -> incontext.DemonstrationFormat:
    return incontext.make_demonstration_format(
        tokenizer, settings.template or incontext.DEMONSTRATIONS_TEMPLATE, settings.demonstration_template
    )


def _shortage_notes(plan: ScorePlan, rows: TokenizedExamples, what: str) -> tuple[str, ...]:
    """How many rows got fewer than were wanted, where any did."""
    counts = plan.num_holdout[rows.is_kept]
    num_short, num_empty = int((counts < plan.num_holdout_wanted).sum()), int((counts == 0).sum())
    if not num_short:
        return ()
    return (
        f"{num_short:,} of {len(counts):,} rows had fewer than {plan.num_holdout_wanted} {what}, {num_empty:,} of "
        "them none: the rest did not fit the model's context, or were near-duplicates of the row.",
    )
