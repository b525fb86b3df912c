"""Scores of the training rows by name: one number per row, larger is better, from a model and V_fit."""

import difflib
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.core import tree
from bilevel_jax.core.transition import begin, descent
from bilevel_jax.core.types import Batch, Fixed, Params, Problem
from bilevel_jax.core.unrolled import outer_gradient
from bilevel_jax.runs import checkpoint, files
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.sections import Scores
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task, per_row


class Scored(NamedTuple):
    """The scores of all training rows, and what they cost."""

    values: Float[np.ndarray, "rows"]
    """Larger is better; nan for rows that were dropped as too long."""
    passes: float
    """Cost in training steps, that is, forward and backward passes over one batch; a forward pass alone is a third."""
    seconds: float
    """With compilation, which the first call of a shape pays."""
    notes: tuple[str, ...] = ()
    """What a person should know of these scores."""


class Made(NamedTuple):
    """What one score's function gives; `score` adds the time."""

    values: Float[np.ndarray, "rows"]
    passes: float
    notes: tuple[str, ...] = ()


Make = Callable[[Task | ArrayTask, Params, Scores, Session], Made]
"""(task, parameters of the judging model, settings, session) -> scores of the rows; V_fit is the holdout."""


def score(name: str, task: Task | ArrayTask, params: Params, settings: Scores, session: Session) -> Scored:
    """The score `name`, a key of SCORES, of every training row under the model `params`.

    Raises ValueError for a name that is not there, a task that it cannot judge, a holdout without rows, and scores
    that are not finite.
    """
    check(name, arrays=isinstance(task, ArrayTask))
    if name not in WITHOUT_HOLDOUT and "fit" not in task.held_out:
        raise ValueError(
            f"the score {name!r} compares with trusted rows, and V_fit has none: give data.validation, with a share "
            f"above 0 for V_fit in data.split, or choose one of {', '.join(WITHOUT_HOLDOUT)}."
        )
    began = time.monotonic()
    made = SCORES[name](task, params, settings, session)
    values, rows = np.asarray(made.values, float), task.trainable()
    odd = rows[~np.isfinite(values[rows])]
    if len(odd):
        raise FloatingPointError(
            f"the score {name!r} is {values[odd[0]]} for {len(odd):,} of {len(rows):,} rows, the first "
            f"{task.examples[odd[0]].where}. The model's losses on these rows are not finite: look at them, or lower "
            "optimizer.learning_rate."
        )
    return Scored(values, made.passes, time.monotonic() - began, made.notes)


def check(name: str, *, arrays: bool = False) -> None:
    """A ValueError that names the nearest score where there is none of that name, or none for such data."""
    if name not in SCORES:
        close = difflib.get_close_matches(name, SCORES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no score {name!r}; {hint}the scores: {', '.join(SCORES)}.")
    if arrays and name not in ON_ARRAYS:
        raise ValueError(f"the score {name!r} reads text; for arrays there are {', '.join(ON_ARRAYS)}.")


# ---- scores that read the losses of the rows


def loss(task: Task | ArrayTask, params: Params, settings: Scores, session: Session) -> Made:
    """l_i(params) in the unit of the objective: rows that the model finds hard come first.

    Wrong where labels are: noise is hard. `perplexity` orders the other way round.
    """
    return Made(_losses(task, params), _epoch(task) / 3)


def perplexity(task: Task | ArrayTask, params: Params, settings: Scores, session: Session) -> Made:
    """-exp(l_i(params)): rows that the model finds likely come first (small-loss selection).

    Wrong where the model already knows what it likes.
    """
    return Made(-np.exp(_losses(task, params)), _epoch(task) / 3)


def reducible(task: Task | ArrayTask, params: Params, settings: Scores, session: Session) -> Made:
    """l_i(params) - l_i(holdout model): what is still to be learned and can be (RHO-LOSS, Mindermann et al. 2022).

    The holdout model is one of the same kind, started from scores.seed and trained on V_fit alone, with the optimiser
    and the schedule of the run, for scores.holdout_steps. It is trained once in a run; its losses are kept there.
    Wrong where V_fit is so small that the holdout model over-fits it: noise then looks no worse than the rest.
    """
    path = session.folder / "holdout.parquet"
    passes = _epoch(task) / 3
    if not path.exists():
        steps = min(settings.holdout_steps or task.steps, task.steps)
        values = _losses(task, _holdout(task, settings.seed, steps, session))
        ids = [example.id for example in task.examples]
        files.write_table(path, pa.table({"id": ids, "loss": values}))
        passes += steps + _epoch(task) / 3
    irreducible = dict(zip(*(column.to_pylist() for column in pq.read_table(path).columns), strict=True))
    held = np.array([irreducible[example.id] for example in task.examples], float)
    return Made(_losses(task, params) - held, passes)


def alignment(task: Task | ArrayTask, params: Params, settings: Scores, session: Session) -> Made:
    """<grad l_i, grad L_v>: by how much a small step on row i lowers L_v, to first order, per unit of step.

    One forward-mode product of the rows' losses along grad L_v over all of V_fit; no gradient of a row is formed
    (TracIn, Pruthi et al. 2020, at one checkpoint; one step of GREATS, Wang et al. 2024).
    """
    fixed, validation = task.fixed(params), task.held_out["fit"]
    _, slope = _slope(task.problem)(params, fixed, validation)
    values = per_row(_along(task.objective.losses), (params, slope), fixed, task.summed(seed=0), task.rows)
    return Made(values, validation.steps + _epoch(task) * 2 / 3)


def random(task: Task | ArrayTask, params: Params, settings: Scores, session: Session) -> Made:
    """Uniform in [0, 1), from scores.seed: what every score has to beat."""
    values = np.full(task.rows, np.nan)
    values[task.trainable()] = np.random.default_rng(settings.seed).random(len(task.trainable()))
    return Made(values, 0.0)


SCORES: dict[str, Make] = {
    "loss": loss,
    "perplexity": perplexity,
    "reducible": reducible,
    "alignment": alignment,
    "random": random,
}
ON_ARRAYS = ("loss", "perplexity", "reducible", "alignment", "random")
WITHOUT_HOLDOUT = ("loss", "perplexity", "random")


# ---- parts


def _losses(task: Task | ArrayTask, params: Params) -> Float[np.ndarray, "rows"]:
    return per_row(task.objective.losses, params, task.fixed(params), task.summed(seed=0), task.rows)


def _epoch(task: Task | ArrayTask) -> float:
    """Batches that hold every row once."""
    return float(-(-len(task.trainable()) // task.batch))


@lru_cache(maxsize=8)
def _slope(problem: Problem) -> Callable:
    """(params, fixed, stream) -> L_v and its gradient; remembered, so that each refresh does not compile it anew."""
    return outer_gradient(problem)


@lru_cache(maxsize=8)
def _along(losses: Callable) -> Callable:
    """((params, v), fixed, micro-batch) -> <grad l_i, v> of each row."""

    def slopes(both: tuple[Params, Params], fixed: Fixed, batch: Batch) -> jax.Array:
        params, v = both
        with jax.default_matmul_precision("highest"):
            return jax.jvp(lambda p: losses(p, fixed, batch), (params,), (v,))[1]

    return slopes


def _holdout(task: Task | ArrayTask, seed: int, steps: int, session: Session) -> Params:
    """The parameters after `steps` steps on V_fit alone; saved when due, and gone on with from there."""
    folder = session.folder / "checkpoints" / "holdout"
    # copied: a step takes the memory of the state that it is given, and the model's own must stay
    start = jax.tree.map(jnp.copy, task.fresh(seed))
    state, fixed = begin(task.optimizer, start), task.fixed(task.fresh(seed))
    if found := checkpoint.restore(folder, state):
        state = found.tree
    stream, weights = task.stream(seed, task.fit_rows(), packed=False), jnp.ones(task.corpus.rows)
    step = descent(task.problem, task.optimizer)
    session.phase("scoring: training the holdout model on V_fit")
    for index in range(int(state.step), steps):
        state, _ = step(state, weights, fixed, stream.batch(index))
        if session.due():
            checkpoint.save(folder, index + 1, state, {})
            session.saved()
    if not bool(tree.finite(state.params)):
        raise FloatingPointError(
            f"the holdout model's parameters are not finite after {steps} steps on V_fit. Lower "
            "optimizer.learning_rate, or set optimizer.clip."
        )
    return state.params
