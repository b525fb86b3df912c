"""Data scores of training examples, by name."""

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
from jaxtyping import Float, Int

from bilevel_jax.core import tree
from bilevel_jax.core.training import forward_only_step, init_train_state
from bilevel_jax.core.types import Batch, Frozen, Params, Problem, TrainState
from bilevel_jax.core.unrolled import validation_loss_and_grad_fn
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.lm.models import Decoder
from bilevel_jax.runs.config.schema import ScoresSection
from bilevel_jax.runs.config.yaml_reader import suggest_nearest
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir, seals
from bilevel_jax.runs.infra.placement import replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.infra.step_loop import run_steps
from bilevel_jax.runs.scoring import likelihoods
from bilevel_jax.runs.scoring.likelihoods import ScoreResult
from bilevel_jax.runs.tasks.arrays import ArrayTask
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example, is_validation_trainable
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.text import TextTask
from bilevel_jax.scores.margin import el2n, token_el2n
from bilevel_jax.scores.random import hash_to_int

SCORES_FILE = "scores.parquet"
STANDARD_ERROR_SUFFIX = "_standard_error"
"""Of the column beside a score that is a mean over several sets of demonstrations."""


class ExampleScores(NamedTuple):
    """The scores of all training examples, and what they cost."""

    values: Float[np.ndarray, "examples"]
    """Larger is better; nan for rows that were dropped as too long, and where `notes` say that there is none."""
    passes: float
    """Cost in training steps, that is, forward and backward passes over one batch; a forward pass alone is a third."""
    seconds: float
    """With compilation, which the first call of a shape pays."""
    notes: tuple[str, ...] = ()
    """What a person should know of these scores."""
    standard_errors: Float[np.ndarray, "examples"] | None = None
    """Over several sets of demonstrations; in scores.parquet the column of the score's name with `_standard_error`."""


ScoreFunction = Callable[[Task, Params, ScoresSection, Session], ScoreResult]
"""(task, parameters of the judging model, settings, session) -> scores of the rows; validation is the holdout."""


def compute_score(name: str, task: Task, params: Params, settings: ScoresSection, session: Session) -> ExampleScores:
    """The score `name`, a key of SCORES, of every training example under the model `params`.

    Raises ValueError for a name that is not there, a task that it cannot judge and a holdout without rows, and
    FloatingPointError where no row has a finite score. Where some have none, a note says how many.
    """
    check_score_name(name, arrays=isinstance(task, ArrayTask), holdout="validation" in task.held_out_streams)
    if name in TRAINABLE_HOLDOUT_SCORES and not is_validation_trainable(task):
        others = ", ".join(other for other in SCORES if other not in TRAINABLE_HOLDOUT_SCORES)
        raise ValueError(
            f"the score {name!r} reads validation examples as it reads training examples, and here they judge by "
            f"another loss (section target); choose one of {others}."
        )
    start_time = time.monotonic()
    result = SCORES[name](task, params, settings, session)
    values, indices = np.asarray(result.values, float), task.trainable_indices()
    values = np.where(np.isfinite(values), values, np.nan)
    unscored, notes = indices[np.isnan(values[indices])], result.notes
    if len(unscored) == len(indices):
        raise FloatingPointError(
            f"the score {name!r} is no finite number for any of {len(indices):,} rows. Is the model's loss finite? "
            "Lower optimizer.learning_rate, or look at the rows."
        )
    if len(unscored):
        first = task.examples[unscored[0]].where
        notes = (
            *notes,
            f"{len(unscored):,} of {format_count('row', len(indices))} without a finite {name}, the first {first}.",
        )
    return ExampleScores(values, result.passes, time.monotonic() - start_time, notes, result.standard_errors)


def load_or_compute_score(
    column: str, name: str, task: Task, params: Params, settings: ScoresSection, session: Session
) -> ExampleScores:
    """`score`, kept as a column of scores.parquet in the run's folder; read from there where it was made before.

    The file holds the rows that were read (none that was dropped), by id, with what made each column in its metadata.
    """
    path = session.folder / SCORES_FILE
    stored = read_scores_table(session.folder, task)
    if column not in stored.column_names:
        computed = compute_score(name, task, params, settings, session)
        column_metadata = {"score": name, "meaning": SCORE_MEANINGS[name], **computed._asdict()}
        del column_metadata["values"], column_metadata["standard_errors"]
        table_metadata = (stored.schema.metadata or {}) | {column.encode(): json.dumps(column_metadata).encode()}
        stored = stored.append_column(
            column, pa.array(computed.values[task.trainable_indices()])
        ).replace_schema_metadata(table_metadata)
        if computed.standard_errors is not None:
            stored = stored.append_column(
                column + STANDARD_ERROR_SUFFIX, pa.array(computed.standard_errors[task.trainable_indices()])
            )
        run_dir.write_parquet(path, stored)
        stored = read_scores_table(session.folder, task)  # as the first of several processes wrote it
    return get_score(stored, column, task)


def get_score(stored: pa.Table, column: str, task: Task) -> ExampleScores:
    """A column of `read_scores_table`."""
    indices = task.trainable_indices()
    column_metadata = json.loads(stored.schema.metadata[column.encode()])

    def spread_over_examples(name: str) -> Float[np.ndarray, "examples"]:
        values = np.full(task.num_examples, np.nan)
        values[indices] = stored[name].to_numpy()
        return values

    error_column = column + STANDARD_ERROR_SUFFIX
    return ExampleScores(
        spread_over_examples(column),
        column_metadata["passes"],
        column_metadata["seconds"],
        tuple(column_metadata["notes"]),
        spread_over_examples(error_column) if error_column in stored.column_names else None,
    )


def warm_start_logits(
    task: Task, name: str, session: Session, *, scores: ScoresSection, train_seed: int
) -> Float[np.ndarray, "examples"]:
    """First logits of the examples: the score `name`, standardised and cut at -2 and 2; 0 of an example without one."""
    values = load_or_compute_score(name, name, task, task.init_params(train_seed), scores, session).values
    spread = float(np.nanstd(values))
    return np.nan_to_num(np.clip((values - np.nanmean(values)) / (spread or 1.0), -2, 2))


def check_score_name(name: str, *, arrays: bool = False, holdout: bool = True) -> None:
    """A ValueError that says what there is where there is no such score, or none for arrays, or without a holdout."""
    if name not in SCORES:
        raise ValueError(f"there is no score {name!r}; {suggest_nearest(name, SCORES)}the scores: {', '.join(SCORES)}.")
    if arrays and name not in ARRAY_SCORES:
        raise ValueError(f"the score {name!r} reads text; for arrays there are {', '.join(ARRAY_SCORES)}.")
    if not holdout and name not in HOLDOUT_FREE_SCORES:
        raise ValueError(
            f"the score {name!r} compares with validation examples, and validation has none: give data.validation, "
            f"with a share above 0 for validation in data.split, or choose one of {', '.join(HOLDOUT_FREE_SCORES)}."
        )


# ---- scores that read the losses of the rows


def loss_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """l_i(params) in the unit of the objective: rows that the model finds hard come first.

    Wrong where labels are: noise is hard. `perplexity` orders the other way round.
    """
    return ScoreResult(example_losses(task, params), steps_per_epoch(task) / 3)


def perplexity_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """-exp(l_i(params)): rows that the model finds likely come first (small-loss selection).

    Wrong where the model already knows what it likes.
    """
    return ScoreResult(-np.exp(example_losses(task, params)), steps_per_epoch(task) / 3)


def reducible_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """l_i(params) - l_i(holdout model): what is still to be learned and can be (RHO-LOSS, Mindermann et al. 2022).

    The holdout model is one of the same kind, started from scores.seed and trained on validation alone, with the
    optimizer and the schedule of the run, for scores.holdout_steps. It is trained once in a run; its losses are stored.
    Wrong where validation is so small that the holdout model over-fits it: noise then looks no worse than the rest.
    """
    path = session.folder / "holdout.parquet"
    passes = steps_per_epoch(task) / 3
    if not distributed.is_there(path):
        values = example_losses(task, train_holdout_model(task, settings, session))
        ids = [example.id for example in task.examples]
        run_dir.write_parquet(path, pa.table({"id": ids, "loss": values}))
        passes += holdout_steps(task, settings) + steps_per_epoch(task) / 3
    holdout_loss_by_id = dict(zip(*(column.to_pylist() for column in run_dir.read_parquet(path).columns), strict=True))
    holdout_losses = np.array([holdout_loss_by_id[example.id] for example in task.examples], float)
    return ScoreResult(example_losses(task, params) - holdout_losses, passes)


def alignment_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """<grad l_i, grad L_v>: by how much a small step on row i lowers L_v, to first order, per unit of step.

    One forward-mode product of the rows' losses along grad L_v over all of validation; no gradient of a row is formed
    (TracIn, Pruthi et al. 2020, at one checkpoint; one step of GREATS, Wang et al. 2024).
    """
    passes = task.held_out_streams["validation"].steps + steps_per_epoch(task) * 2 / 3
    return ScoreResult(example_alignments(task, params), passes)


def ica_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """How much likelier the answer is after validation examples as demonstrations (ICA); see `scores.incontext`."""
    assert isinstance(task, TextTask)  # `check_score_name` has refused arrays
    return likelihoods.compute_ica(task, params, settings, session)


def oneshot_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """How many validation answers the example makes likelier as demonstration (Nuggets); see `scores.oneshot`."""
    assert isinstance(task, TextTask)  # `check_score_name` has refused arrays
    return likelihoods.compute_one_shot(task, params, settings, session)


def margin_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """EL2N: how far the model's probabilities are from the row's own answer; see `scores.margin`. Large for hard rows.

    Of a preference pair its two sides are the classes: sqrt(2) (1 - σ(z)), where -log σ(z) is its loss.
    """
    return ScoreResult(example_margins(task, params), steps_per_epoch(task) / 3)


def random_score(task: Task, params: Params, settings: ScoresSection, session: Session) -> ScoreResult:
    """Uniform in [0, 1), from the row's id and scores.seed: what every score has to beat."""
    return ScoreResult(np.array([hash_to_int(example.id, settings.seed) for example in task.examples]) / 2.0**64, 0.0)


SCORES: dict[str, ScoreFunction] = {
    "ica": ica_score,
    "loss": loss_score,
    "perplexity": perplexity_score,
    "reducible": reducible_score,
    "oneshot": oneshot_score,
    "alignment": alignment_score,
    "margin": margin_score,
    "random": random_score,
}
SCORE_MEANINGS = {
    "ica": "how much likelier rows of validation, shown before it, make the row's answer: nats, per token by default",
    "loss": "the row's loss, in the unit of the objective",
    "perplexity": "-exp of the row's loss",
    "reducible": "the row's loss minus its loss under a model trained on validation alone",
    "oneshot": "the share of the answers of validation that are likelier after the row",
    "alignment": "<grad loss_i, grad L_v>: how much a small step on the row lowers L_v",
    "margin": "EL2N, |p - onehot| of the row's own answer",
    "random": "uniform in [0, 1)",
}
ARRAY_SCORES = ("loss", "perplexity", "reducible", "alignment", "margin", "random")
TRAINABLE_HOLDOUT_SCORES = ("ica", "reducible", "oneshot")
"""Those that read validation examples as ones to train on."""
HOLDOUT_FREE_SCORES = ("loss", "perplexity", "margin", "random")


# ---- parts


def read_scores_table(folder: Path, task: Task) -> pa.Table:
    """scores.parquet of a run, or the rows without any score; a ValueError where it is of other rows.

    Of several processes all call this, and one that sees an earlier file waits for the columns that the first one sees.
    """
    path = folder / SCORES_FILE

    def list_columns() -> list[str]:
        return run_dir.read_parquet(path).column_names if path.exists() else []

    columns = distributed.share_work_of_first(list_columns)

    def read() -> pa.Table:
        table = run_dir.read_parquet(path)
        if missing := [column for column in columns if column not in table.column_names]:
            raise seals.DamagedFileError(f"the file is an earlier one, without the column {missing[0]}.")
        return table

    stored = run_dir.read_when_seen(path, read) if columns else _ids_table(task)
    if stored["id"].to_pylist() != [task.examples[row].id for row in task.trainable_indices()]:
        raise ValueError(f"{path} holds scores of other rows. Give the data that the run was started with.")
    return stored


def _ids_table(task: Task) -> pa.Table:
    examples = [task.examples[row] for row in task.trainable_indices()]
    columns = {key: [getattr(example, key) for example in examples] for key in ("id", "row", "source", "label")}
    return pa.table(columns)


def example_losses(task: Task, params: Params) -> Float[np.ndarray, "examples"]:
    """l_i(params), in the unit of the objective."""
    return evaluate_per_example(
        task.objective.losses, params, task.frozen(params), task.full_pass_stream(seed=0), task.num_examples
    )


def example_alignments(task: Task, params: Params) -> Float[np.ndarray, "examples"]:
    """<grad l_i, grad L_v> at `params`."""
    frozen, validation = task.frozen(params), task.held_out_streams["validation"]
    _, validation_gradient = _validation_gradient(task.problem)(params, frozen, validation)
    return evaluate_per_example(
        _directional_derivatives(task.objective.losses),
        (params, validation_gradient),
        frozen,
        task.full_pass_stream(seed=0),
        task.num_examples,
    )


def example_margins(task: Task, params: Params) -> Float[np.ndarray, "examples"]:
    """EL2N of each example at `params`."""
    if isinstance(task, TextTask) and task.corpus.sequences_per_example == 2:
        return np.sqrt(2) * -np.expm1(-example_losses(task, params))
    if isinstance(task, TextTask):
        el2n_function = _el2n_of_tokens(task.decoder)
    else:
        el2n_function = _el2n_of_labels(task.objective.composite_loss.outputs)
    return evaluate_per_example(
        el2n_function, params, task.frozen(params), task.full_pass_stream(seed=0), task.num_examples
    )


def steps_per_epoch(task: Task) -> float:
    """Batches that hold every row once."""
    return float(-(-len(task.trainable_indices()) // task.batch_size))


@lru_cache(maxsize=8)
def _validation_gradient(problem: Problem) -> Callable:
    """(params, fixed, stream) -> L_v and its gradient; remembered, so that each refresh does not compile it anew."""
    return validation_loss_and_grad_fn(problem)


@lru_cache(maxsize=8)
def _directional_derivatives(losses: Callable) -> Callable:
    """((params, v), fixed, micro-batch) -> <grad l_i, v> of each row."""

    def derivatives(params_and_direction: tuple[Params, Params], frozen: Frozen, batch: Batch) -> jax.Array:
        params, direction = params_and_direction
        with jax.default_matmul_precision("highest"):
            return jax.jvp(lambda p: losses(p, frozen, batch), (params,), (direction,))[1]

    return derivatives


@lru_cache(maxsize=8)
def _el2n_of_labels(outputs: Callable) -> Callable:
    return lambda params, frozen, batch: el2n(outputs(params, frozen, batch), batch["y"])


@lru_cache(maxsize=8)
def _el2n_of_tokens(decoder: Decoder) -> Callable:
    of_sequences = token_el2n(decoder)
    return lambda params, frozen, batch: of_sequences(assemble_params(params, frozen["base"]), batch)


def holdout_steps(task: Task, settings: ScoresSection) -> int:
    """Training steps of the holdout model."""
    return min(settings.holdout_steps or task.num_steps, task.num_steps)


def train_holdout_model(task: Task, settings: ScoresSection, session: Session) -> Params:
    """The parameters after training on validation alone, from scores.seed; saved when due, and resumed from there."""
    session.set_phase("scoring: training the holdout model on validation")
    return train_side_model(
        task,
        "holdout",
        task.validation_indices(),
        seed=settings.seed,
        steps=holdout_steps(task, settings),
        session=session,
    )


_cached_step = lru_cache(maxsize=4)(forward_only_step)
"""Compiled once for all models that a run trains beside its own."""


def train_side_model(
    task: Task, name: str, indices: Int[np.ndarray, "chosen"], *, seed: int, steps: int, session: Session
) -> Params:
    """The parameters after `steps` steps on some examples with weight 1; `name` is its checkpoint's, and in errors."""
    folder = session.folder / "checkpoints" / name
    # copied: a step takes the memory of the state that it is given, and the model's own must stay
    start = jax.tree.map(jnp.copy, task.init_params(seed))
    state = replicate_unplaced(task.mesh, init_train_state(task.optimizer, start))
    frozen = task.frozen(task.init_params(seed))
    if restored := checkpoint.restore_checkpoint(folder, state):
        state = restored.tree
    stream = task.training_stream(seed, indices, packed=False)
    weights = jnp.ones(task.corpus.num_examples)
    step = _cached_step(task.problem, task.optimizer)

    def take_step(index: int, state: TrainState) -> TrainState:
        return step(state, weights, frozen, stream.batch(index))[0]

    def save(steps_done: int, state: TrainState) -> None:
        checkpoint.save_checkpoint(folder, steps_done, state, {})

    state = run_steps(session, take_step, state, range(int(state.step), steps), work=0.0, save=save)
    if not bool(tree.all_finite(state.params)):
        raise FloatingPointError(
            f"the {name} model's parameters are not finite after {steps} steps on {len(indices):,} examples. Lower "
            "optimizer.learning_rate, or set optimizer.max_grad_norm."
        )
    return state.params
