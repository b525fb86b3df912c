"""Scores of the training rows by name: one number per row, larger is better, from a model and V_fit."""

import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.core import tree
from bilevel_jax.core.transition import begin, descent
from bilevel_jax.core.types import Batch, Fixed, Hyper, Params, Problem
from bilevel_jax.core.unrolled import outer_gradient
from bilevel_jax.lm.losses import assemble
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs import checkpoint, files, likelihoods
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.likelihoods import Made
from bilevel_jax.runs.read import nearest
from bilevel_jax.runs.sections import ScoresSection
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task, per_row
from bilevel_jax.scores.margin import el2n, token_el2n
from bilevel_jax.scores.random import number

NAME = "scores.parquet"


class Scored(NamedTuple):
    """The scores of all training rows, and what they cost."""

    values: Float[np.ndarray, "rows"]
    """Larger is better; nan for rows that were dropped as too long, and where `notes` say that there is none."""
    passes: float
    """Cost in training steps, that is, forward and backward passes over one batch; a forward pass alone is a third."""
    seconds: float
    """With compilation, which the first call of a shape pays."""
    notes: tuple[str, ...] = ()
    """What a person should know of these scores."""


Make = Callable[[Task | ArrayTask, Params, ScoresSection, Session], Made]
"""(task, parameters of the judging model, settings, session) -> scores of the rows; V_fit is the holdout."""


def score(name: str, task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Scored:
    """The score `name`, a key of SCORES, of every training row under the model `params`.

    Raises ValueError for a name that is not there, a task that it cannot judge and a holdout without rows, and
    FloatingPointError where no row has a finite score. Where some have none, a note says how many.
    """
    check(name, arrays=isinstance(task, ArrayTask), holdout="fit" in task.held_out)
    began = time.monotonic()
    made = SCORES[name](task, params, settings, session)
    values, rows = np.asarray(made.values, float), task.trainable()
    values = np.where(np.isfinite(values), values, np.nan)
    without, notes = rows[np.isnan(values[rows])], made.notes
    if len(without) == len(rows):
        raise FloatingPointError(
            f"the score {name!r} is no finite number for any of {len(rows):,} rows. Is the model's loss finite? Lower "
            "optimizer.learning_rate, or look at the rows."
        )
    if len(without):
        first = task.examples[without[0]].where
        notes = (*notes, f"{len(without):,} of {len(rows):,} rows have no finite {name}, the first {first}.")
    return Scored(values, made.passes, time.monotonic() - began, notes)


def once(
    column: str, name: str, task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session
) -> Scored:
    """`score`, kept as a column of scores.parquet in the run's folder; read from there where it was made before.

    The file holds the rows that were read (none that was dropped), by id, with what made each column in its metadata.
    """
    path, rows = session.folder / NAME, task.trainable()
    stored = pq.read_table(path) if path.exists() else _table(task)
    ids = [task.examples[row].id for row in rows]
    if stored["id"].to_pylist() != ids:
        raise ValueError(f"{path} holds scores of other rows. Give the data that the run was started with.")
    if column not in stored.column_names:
        made = score(name, task, params, settings, session)
        about = {"score": name, "meaning": MEANINGS[name], **made._asdict()}
        del about["values"]
        known = (stored.schema.metadata or {}) | {column.encode(): json.dumps(about).encode()}
        stored = stored.append_column(column, pa.array(made.values[rows])).replace_schema_metadata(known)
        files.write_table(path, stored)
    about = json.loads(stored.schema.metadata[column.encode()])
    values = np.full(task.rows, np.nan)
    values[rows] = stored[column].to_numpy()
    return Scored(values, about["passes"], about["seconds"], tuple(about["notes"]))


def warm(task: Task | ArrayTask, config: SelectConfig, hyper: Hyper, session: Session) -> Hyper:
    """The logits `hyper`, all 0, or those of outer.warm_start: its scores, standardised and cut at -2 and 2.

    Of a weighting by sources, the mean over each source's rows. A row without a score stays at 0.
    """
    name, outer = config.outer.warm_start, config.outer
    if not name:
        return hyper
    params = task.fresh(config.train.seed)
    values = once(name, name, task, params, config.scores, session).values
    spread = float(np.nanstd(values))
    logits = np.nan_to_num(np.clip((values - np.nanmean(values)) / (spread or 1.0), -2, 2))
    if outer.weighting == "per_source":
        _, source = np.unique([example.source for example in task.examples], return_inverse=True)
        logits = np.bincount(source, logits) / np.bincount(source)
    return placing.table(task.mesh, logits.astype(hyper.dtype))


def has(column: str, folder: Path) -> bool:
    """Whether `once` has made a column in this folder."""
    path = folder / NAME
    return path.exists() and column in pq.ParquetFile(path).schema_arrow.names


def check(name: str, *, arrays: bool = False, holdout: bool = True) -> None:
    """A ValueError that says what there is where there is no such score, or none for arrays, or without a holdout."""
    if name not in SCORES:
        raise ValueError(f"there is no score {name!r}; {nearest(name, SCORES)}the scores: {', '.join(SCORES)}.")
    if arrays and name not in ON_ARRAYS:
        raise ValueError(f"the score {name!r} reads text; for arrays there are {', '.join(ON_ARRAYS)}.")
    if not holdout and name not in WITHOUT_HOLDOUT:
        raise ValueError(
            f"the score {name!r} compares with trusted rows, and V_fit has none: give data.validation, with a share "
            f"above 0 for V_fit in data.split, or choose one of {', '.join(WITHOUT_HOLDOUT)}."
        )


# ---- scores that read the losses of the rows


def loss(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """l_i(params) in the unit of the objective: rows that the model finds hard come first.

    Wrong where labels are: noise is hard. `perplexity` orders the other way round.
    """
    return Made(_losses(task, params), _epoch(task) / 3)


def perplexity(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """-exp(l_i(params)): rows that the model finds likely come first (small-loss selection).

    Wrong where the model already knows what it likes.
    """
    return Made(-np.exp(_losses(task, params)), _epoch(task) / 3)


def reducible(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
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


def alignment(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """<grad l_i, grad L_v>: by how much a small step on row i lowers L_v, to first order, per unit of step.

    One forward-mode product of the rows' losses along grad L_v over all of V_fit; no gradient of a row is formed
    (TracIn, Pruthi et al. 2020, at one checkpoint; one step of GREATS, Wang et al. 2024).
    """
    fixed, validation = task.fixed(params), task.held_out["fit"]
    _, slope = _slope(task.problem)(params, fixed, validation)
    values = per_row(_along(task.objective.losses), (params, slope), fixed, task.summed(seed=0), task.rows)
    return Made(values, validation.steps + _epoch(task) * 2 / 3)


def ica(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """How much likelier the row's answer is after rows of V_fit as demonstrations (ICA); see `scores.incontext`."""
    assert isinstance(task, Task)  # `check` has refused arrays
    return likelihoods.ica(task, params, settings, session)


def oneshot(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """How many answers of V_fit are likelier after the row as demonstration (Nuggets); see `scores.oneshot`."""
    assert isinstance(task, Task)  # `check` has refused arrays
    return likelihoods.one_shot(task, params, settings, session)


def margin(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """EL2N: how far the model's probabilities are from the row's own answer; see `scores.margin`. Large for hard rows.

    Of a preference pair its two sides are the classes: sqrt(2) (1 - σ(z)), where -log σ(z) is its loss.
    """
    if isinstance(task, Task) and task.corpus.sequences == 2:
        return Made(np.sqrt(2) * -np.expm1(-_losses(task, params)), _epoch(task) / 3)
    far = _el2n_of_labels(task.objective.loss.outputs) if isinstance(task, ArrayTask) else _el2n_of_tokens(task.decoder)
    return Made(per_row(far, params, task.fixed(params), task.summed(seed=0), task.rows), _epoch(task) / 3)


def random(task: Task | ArrayTask, params: Params, settings: ScoresSection, session: Session) -> Made:
    """Uniform in [0, 1), from the row's id and scores.seed: what every score has to beat."""
    return Made(np.array([number(example.id, settings.seed) for example in task.examples]) / 2.0**64, 0.0)


SCORES: dict[str, Make] = {
    "ica": ica,
    "loss": loss,
    "perplexity": perplexity,
    "reducible": reducible,
    "oneshot": oneshot,
    "alignment": alignment,
    "margin": margin,
    "random": random,
}
MEANINGS = {
    "ica": "how much likelier rows of V_fit, shown before it, make the row's answer: nats, per token by default",
    "loss": "the row's loss, in the unit of the objective",
    "perplexity": "-exp of the row's loss",
    "reducible": "the row's loss minus its loss under a model trained on V_fit alone",
    "oneshot": "the share of the answers of V_fit that are likelier after the row",
    "alignment": "<grad loss_i, grad L_v>: how much a small step on the row lowers L_v",
    "margin": "EL2N, |p - onehot| of the row's own answer",
    "random": "uniform in [0, 1)",
}
ON_ARRAYS = ("loss", "perplexity", "reducible", "alignment", "margin", "random")
WITHOUT_HOLDOUT = ("loss", "perplexity", "margin", "random")


# ---- parts


def _table(task: Task | ArrayTask) -> pa.Table:
    examples = [task.examples[row] for row in task.trainable()]
    columns = {key: [getattr(example, key) for example in examples] for key in ("id", "row", "source", "label")}
    return pa.table(columns)


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


@lru_cache(maxsize=8)
def _el2n_of_labels(outputs: Callable) -> Callable:
    return lambda params, fixed, batch: el2n(outputs(params, fixed, batch), batch["y"])


@lru_cache(maxsize=8)
def _el2n_of_tokens(decoder: Decoder) -> Callable:
    of_sequences = token_el2n(decoder)
    return lambda params, fixed, batch: of_sequences(assemble(params, fixed["base"]), batch)


def _holdout(task: Task | ArrayTask, seed: int, steps: int, session: Session) -> Params:
    """The parameters after `steps` steps on V_fit alone; saved when due, and gone on with from there."""
    folder = session.folder / "checkpoints" / "holdout"
    # copied: a step takes the memory of the state that it is given, and the model's own must stay
    start = jax.tree.map(jnp.copy, task.fresh(seed))
    state, fixed = placing.settled(task.mesh, begin(task.optimizer, start)), task.fixed(task.fresh(seed))
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
            "optimizer.learning_rate, or set optimizer.max_grad_norm."
        )
    return state.params
