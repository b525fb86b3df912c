"""Scores that ask the model for likelihoods: one engine for a run, its answers kept as they come, its work counted."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from bilevel_jax.core.types import Batch, Params, Stream
from bilevel_jax.lm.loglik import LogLik, Request, Store, engine
from bilevel_jax.lm.losses import assemble
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs import processes
from bilevel_jax.runs.processes import fetch
from bilevel_jax.runs.sections import ScoresSection
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task
from bilevel_jax.scores import incontext, oneshot
from bilevel_jax.scores.demonstrations import choice
from bilevel_jax.scores.embedding import hidden_states, tfidf
from bilevel_jax.scores.random import number
from bilevel_jax.scores.requests import Plan, Rows, rows_of, take

SAMPLE = 200
"""Rows of which a cheaper choice of demonstrations is compared with the published one; at most a tenth of all."""


class Made(NamedTuple):
    """What the function of one score gives."""

    values: Float[np.ndarray, "rows"]
    """Larger is better; nan for a row that was dropped or has none."""
    passes: float
    """Its work, in training steps: a forward and a backward pass over one batch; a forward pass alone is a third."""
    notes: tuple[str, ...] = ()
    """What a person should know of these scores."""


class Reader:
    """A model answering requests; what it answered before a stop is not asked again."""

    def __init__(self, decoder: Decoder, whole: Params, mesh: Mesh, session: Session):
        self.whole = whole
        self._asked = _asked(decoder, mesh, session)
        self._path = session.folder / "checkpoints" / "answers.jsonl"
        self._before = self._asked.places

    def __call__(
        self, requests: Sequence[Request], on_batch: Callable[[int], None] = lambda done: None
    ) -> list[LogLik]:
        """The answers, in order; `on_batch` is told after each batch how many distinct ones have one."""
        store = Store(fingerprint(self.whole), _stored(self._path), lambda new: _append(self._path, new))
        self._asked.on_batch = on_batch
        answers = self._asked.engine.resume(self.whole, requests, store)
        processes.by_first(lambda: self._path.unlink(missing_ok=True))
        return answers

    @property
    def places(self) -> int:
        """Token places that were read so far."""
        return self._asked.places - self._before


class Model:
    """The task's model under some parameters, answering requests; counts its work in training steps."""

    def __init__(self, task: Task, params: Params, session: Session):
        self.whole = assemble(params, task.base)
        self._reader = Reader(task.decoder, self.whole, task.mesh, session)
        self._step = task.layout.micro * task.layout.rows * task.layout.length

    def __call__(self, requests: Sequence[Request]) -> list[LogLik]:
        """The answers, in order."""
        return self._reader(requests)

    @property
    def passes(self) -> float:
        """The work so far in training steps: token places read, a forward pass being a third of a step."""
        return self._reader.places / self._step / 3


class Asked:
    """An engine, compiled once for a run, and how many token places it has read."""

    def __init__(self, decoder: Decoder, mesh: Mesh, session: Session):
        self.places = 0
        self.on_batch: Callable[[int], None] = lambda done: None

        def place(batch: Batch) -> Batch:
            self.places += batch["tokens"].size
            return placing.placed(mesh, Stream(lambda step: batch, 1)).batch(0)

        def progress(done: int, total: int) -> None:
            self.on_batch(done)
            session.check()

        self.engine = engine(decoder, multiple=mesh.size, place=place, fetch=fetch, progress=progress)


@lru_cache(maxsize=4)
def _asked(decoder: Decoder, mesh: Mesh, session: Session) -> Asked:
    return Asked(decoder, mesh, session)


def ica(task: Task, params: Params, settings: ScoresSection, session: Session) -> Made:
    """`incontext.ica` with V_fit as the holdout."""
    model, (rows, holdout) = Model(task, params, session), parts(task)
    embedding = tfidf if settings.embedding == "tfidf" else hidden_states(task.decoder, model.whole, fetch=fetch)

    def score(demonstrations: str) -> incontext.Score:
        chosen = choice(demonstrations, embedding=embedding, alike=settings.max_similarity, seed=settings.seed)
        return incontext.ica(
            _form(task, settings), chosen, max_length=task.architecture.max_length, k=settings.k,
            normalise=settings.per_token,
        )  # fmt: skip

    plan = score(settings.demonstrations)(rows, holdout)
    values = plan.combine(model(plan.requests))
    notes = _held(plan, rows, "demonstrations")
    sample = min(SAMPLE, len(task.trainable()) // 10)
    if settings.demonstrations != "knn" and sample >= 10:
        same = incontext.agreement(values, score("knn"), rows, holdout, model, sample=sample, seed=settings.seed)
        notes += (f"rank correlation with demonstrations = knn on {sample} rows: {same:.3f}.",)
    return Made(values, model.passes, notes)


def one_shot(task: Task, params: Params, settings: ScoresSection, session: Session) -> Made:
    """`oneshot.oneshot` with scores.anchors rows of V_fit as the holdout."""
    model, (rows, holdout) = Model(task, params, session), parts(task)
    usable = np.flatnonzero(holdout.kept)
    drawn = sorted(usable, key=lambda j: number(holdout.examples[int(j)].id, settings.seed))[: settings.anchors]
    score = oneshot.oneshot(
        _form(task, settings), max_length=task.architecture.max_length, alike=settings.max_similarity
    )
    plan = score(rows, take(holdout, np.sort(np.array(drawn))))
    values = plan.combine(model(plan.requests))
    return Made(values, model.passes, _held(plan, rows, "rows of V_fit to be judged by"))


def parts(task: Task) -> tuple[Rows, Rows]:
    """(the training rows, those of V_fit), as scores read them."""
    return rows_of(task.examples, task.corpus), rows_of(task.trusted["fit"], task.corpus, first=task.rows)


def fingerprint(params: Params) -> str:
    """16 hex digits of all parameters: of the sum and the sum of squares of each, so that they stay on the device."""
    moments = _moments(params)
    return hashlib.sha256(b"".join(np.asarray(one).tobytes() for one in jax.tree.leaves(moments))).hexdigest()[:16]


@jax.jit
def _moments(params: Params) -> list[jax.Array]:
    return [jnp.stack([leaf.sum(), (leaf * leaf).sum()]) for leaf in jax.tree.leaves(params)]


def _form(task: Task, settings: ScoresSection) -> incontext.Prompt:
    return incontext.prompt(task.tokenizer, settings.template or incontext.TEMPLATE, settings.demonstration_template)


def _held(plan: Plan, rows: Rows, what: str) -> tuple[str, ...]:
    """How many rows got fewer than were wanted, where any did."""
    held = plan.held[rows.kept]
    few, none = int((held < plan.wanted).sum()), int((held == 0).sum())
    if not few:
        return ()
    return (
        f"{few:,} of {len(held):,} rows had fewer than {plan.wanted} {what}, {none:,} of them none: the rest did not "
        "fit the model's context, or were near-duplicates of the row.",
    )


def _stored(path: Path) -> dict[str, float]:
    """Answers by key; a line that was torn by a kill is passed over."""
    found: dict[str, float] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            found |= json.loads(line)
        except ValueError:
            continue
    return found


def _append(path: Path, new: dict[str, float]) -> None:
    if not processes.first():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(new) + "\n")
        file.flush()
        os.fsync(file.fileno())
