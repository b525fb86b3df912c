"""Leave-k-out retraining and the linear datamodeling score (LDS)."""

from collections.abc import Callable, Container
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from bilevel_jax.core import tree
from bilevel_jax.core.certify import RemovalPrediction, compare_with_retrains
from bilevel_jax.core.types import PADDING, Params, Stream, TrainState, TrainStep
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.runs import stats
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.infra.step_loop import run_steps
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example
from bilevel_jax.runs.tasks.protocol import Task

TARGET_LABELS = {"validation": "L_v", "queries": "each query", "dev": "dev", "test": "test"}
"""What is predicted, as people read it."""


def independent_part(parts: Container[str]) -> str | None:
    """The held-out part that tells whether what holds for validation holds for other examples: dev, else test."""
    return next((part for part in ("dev", "test") if part in parts), None)


class LeaveOutRetrains(NamedTuple):
    """Losses of models trained again without some rows, with the start and the data order of the first training."""

    fractions: tuple[float, ...]
    left_out: Bool[np.ndarray, "fractions subsets rows"]
    losses: dict[str, Float[np.ndarray, "fractions subsets losses"]]
    """By target (a key of TARGET_LABELS): of all of validation, dev and test, of each query; only what there is."""

    def predict_loss_rise(self, scores: Float[np.ndarray, "... rows"]) -> Float[np.ndarray, "... fractions subsets"]:
        """The rise of the loss that scores (larger is better) predict: the sum of those of the rows that left."""
        return np.einsum("fsr,...r->...fs", self.left_out.astype(float), scores)


def draw_subsets(
    num_examples: int, trainable: Int[np.ndarray, "kept"], fraction: float, count: int, seed: int
) -> Bool[np.ndarray, "subsets rows"]:
    """Which rows each subset leaves out: round(fraction * rows) of them at random, from (seed, fraction, number)."""
    left_out = np.zeros((count, num_examples), bool)
    for number, line in enumerate(left_out):
        random = np.random.default_rng((seed, round(1e6 * fraction), number))
        line[random.permutation(trainable)[: round(fraction * len(trainable))]] = True
    return left_out


def retrain_without_subsets(
    task: Task,
    session: Session,
    *,
    start: TrainState,
    stream: Stream,
    queries: Int[np.ndarray, "queries"],
    fractions: tuple[float, ...],
    num_subsets: int,
    vmap_size: int,
    seed: int,
) -> LeaveOutRetrains:
    """Train once without each random subset and read the losses; see `retrain_without`."""
    left_out = np.stack(
        [
            draw_subsets(task.num_examples, task.trainable_indices(), fraction, num_subsets, seed)
            for fraction in fractions
        ]
    )
    readings: list[dict[str, np.ndarray]] = []
    for fraction, group in zip(fractions, left_out, strict=True):
        session.set_phase(f"retraining without {fraction:.3g} of the rows")
        readings.append(
            retrain_without(
                task,
                session,
                start=start,
                stream=stream,
                queries=queries,
                left_out=group,
                vmap_size=vmap_size,
                job=f"bank/{fraction:g}",
            )
        )
    losses = {target: np.stack([reading[target] for reading in readings]) for target in readings[0]}
    return LeaveOutRetrains(fractions, left_out, losses)


def retrain_without(
    task: Task,
    session: Session,
    *,
    start: TrainState,
    stream: Stream,
    queries: Int[np.ndarray, "queries"],
    left_out: Bool[np.ndarray, "runs rows"],
    vmap_size: int,
    job: str,
) -> dict[str, Float[np.ndarray, "runs losses"]]:
    """Losses by target of one training for each line of `left_out`, its rows at weight 0; finished ones are stored.

    Start, batches and their denominators stay, so the estimand is that of `unrolled`: L_v(theta_T(w)). `vmap_size` of
    them run at once, which changes no loss but by rounding. `job` is what their keys among the finished jobs begin
    with.
    """
    value, frozen = validation_loss_fn(task.problem), task.frozen(start.params)
    part_streams = {part: task.held_out_streams[part] for part in TARGET_LABELS if part in task.held_out_streams}

    def read_losses(params: Params) -> dict[str, list[float]]:
        found = {part: [float(value(params, frozen, part_stream))] for part, part_stream in part_streams.items()}
        if len(queries):
            losses = evaluate_per_example(
                task.outer_objective.losses,
                params,
                frozen,
                part_streams["validation"],
                len(task.held_out_examples["validation"]),
            )
            found["queries"] = losses[queries].tolist()
        return found

    def retrain(gone: Bool[np.ndarray, "some rows"]) -> list[dict[str, list[float]]]:
        missing = vmap_size - len(gone)  # filled up, so that every group is of one shape and compiled once
        params = train_vmapped(task, session, start, stream, np.pad(gone, ((0, missing), (0, 0)), mode="edge"))
        found = [read_losses(tree.take(params, at)) for at in range(len(gone))]
        if not all(np.isfinite(values).all() for reading in found for values in reading.values()):
            raise FloatingPointError(
                "a model trained without some of the rows has a loss that is not finite, although the one trained with "
                "all rows has not. Lower optimizer.learning_rate, or set optimizer.max_grad_norm."
            )
        return found

    lines: list[dict[str, list[float]]] = []
    for offset in range(0, len(left_out), vmap_size):
        lines += session.run_once(f"{job}/{offset}", partial(retrain, left_out[offset : offset + vmap_size]))
    return {target: np.array([line[target] for line in lines]) for target in TARGET_LABELS if target in lines[0]}


def train_vmapped(
    task: Task, session: Session, start: TrainState, stream: Stream, left_out: Bool[np.ndarray, "runs rows"]
) -> Params:
    """The parameters of one training run for each row of `left_out`; every leaf leads with [runs]."""
    gather, forward = _vmap_step(task.train_step)
    weights, frozen = jnp.asarray(~left_out, jnp.result_type(float)), task.frozen(start.params)

    def take_step(step: int, states: TrainState) -> TrainState:
        batch = stream.batch(step)
        return forward(states, gather(weights, batch), frozen, batch)[0]

    states = tree.repeat(start, len(left_out))
    return run_steps(session, take_step, states, range(stream.steps), work=len(left_out)).params


@lru_cache(maxsize=2)
def _vmap_step(step: TrainStep) -> tuple[Callable, Callable]:
    """`gather` and `forward` of several runs at once; cached, so that they are compiled once."""
    return jax.jit(jax.vmap(step.gather, in_axes=(0, None))), jax.jit(
        jax.vmap(step.forward, in_axes=(0, 0, None, None))
    )


def single_example_stream(stream: Stream, row: int) -> Stream:
    """The validation stream with one row alone: its share of L_v, which is its loss over the number of rows."""
    matching_steps = (step for step in range(stream.steps) if (fetch_to_host(stream.batch(step)["index"]) == row).any())
    batch = stream.batch(next(matching_steps))
    masked_batch = {**batch, "index": jnp.where(batch["index"] == row, batch["index"], PADDING)}
    return Stream(lambda _: masked_batch, 1)


def compute_lds(
    retrains: LeaveOutRetrains,
    scores: Float[np.ndarray, "examples"],
    query_scores: Float[np.ndarray, "queries rows"] | None,
    seed: int,
) -> dict[str, list[Float[np.ndarray, "draws"]]]:
    """Linear-datamodelling scores by target and fraction, of the retrains themselves and of their resamples.

    Spearman's correlation over the subsets between predicted and actual losses; for `queries` the mean of those of the
    single queries, each predicted by its own line of `query_scores`, or by the one score of the examples.
    Subsets are resampled, and queries with them. The draws are the same for every score, so differences are paired.
    """
    scores_by_target: dict[str, list[np.ndarray]] = {}
    for target, losses in retrains.losses.items():
        target_scores = scores[None] if target != "queries" or query_scores is None else query_scores
        predicted = retrains.predict_loss_rise(target_scores)
        scores_by_target[target] = []
        for index in range(len(retrains.fractions)):
            actual = losses[index].T
            counts = stats.resample_counts(actual.shape[1], (seed, index))
            lines = np.broadcast_to(predicted[:, index], actual.shape)
            correlations = stats.bootstrap_rank_correlations(lines, actual, counts)
            query_counts = stats.resample_counts(len(actual), (seed, index, 1)) * np.isfinite(correlations)
            with np.errstate(invalid="ignore"):  # nan where a score foretells the same for every subset
                scores_by_target[target].append(
                    (query_counts * np.nan_to_num(correlations)).sum(1) / query_counts.sum(1)
                )
    return scores_by_target


def predict_removals(
    retrains: LeaveOutRetrains, scores: Float[np.ndarray, "examples"], part: str, loss: float
) -> RemovalPrediction:
    """What hypergradients (as scores, larger is better) foretell of the retrains without the first share of rows.

    `loss` is that of the held-out `part` with all rows.
    """
    predicted = retrains.predict_loss_rise(scores)[0]
    return compare_with_retrains(retrains.fractions[0], predicted, retrains.losses[part][0][:, 0] - loss)


def build_retrain_table(retrains: LeaveOutRetrains, example_ids: list[str], query_ids: list[str]) -> pa.Table:
    """One row per retrain: its fraction, the ids that left, the losses; of queries a list, their ids as metadata."""
    shape = retrains.left_out.shape[:2]
    id_array = np.array(example_ids, object)
    columns = {
        "fraction": np.repeat(retrains.fractions, shape[1]),
        "subset": np.tile(np.arange(shape[1]), shape[0]),
        "left_out": [
            id_array[excluded].tolist() for excluded in retrains.left_out.reshape(-1, retrains.left_out.shape[2])
        ],
    }
    for target, losses in retrains.losses.items():
        flat = losses.reshape(-1, losses.shape[2])
        columns[target] = flat.tolist() if target == "queries" else flat[:, 0]
    return pa.table(columns).replace_schema_metadata({"queries": "\n".join(query_ids)})
