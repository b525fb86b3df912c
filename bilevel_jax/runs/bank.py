"""The bank of retrains that every score is judged by: random rows leave, the same training runs again."""

from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from bilevel_jax.core.types import PADDING, Inner, Params, Stream, Transition
from bilevel_jax.core.unrolled import outer_value
from bilevel_jax.runs import bootstrap
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task, per_row

TARGETS = {"fit": "L_v", "queries": "each query", "report": "V_report"}
"""What is predicted, as people read it."""


class Bank(NamedTuple):
    """Losses of models trained again without some rows, with the start and the data order of the first training."""

    fractions: tuple[float, ...]
    left_out: Bool[np.ndarray, "fractions subsets rows"]
    losses: dict[str, Float[np.ndarray, "fractions subsets losses"]]
    """By target (a key of TARGETS): of all of V_fit, of each query, of all of V_report; only what there is."""

    def predicted(self, scores: Float[np.ndarray, "... rows"]) -> Float[np.ndarray, "... fractions subsets"]:
        """The rise of the loss that scores (larger is better) foretell: the sum of those of the rows that left."""
        return np.einsum("fsr,...r->...fs", self.left_out.astype(float), scores)


def subsets(
    rows: int, trainable: Int[np.ndarray, "kept"], fraction: float, count: int, seed: int
) -> Bool[np.ndarray, "subsets rows"]:
    """Which rows each subset leaves out: round(fraction * rows) of them at random, from (seed, fraction, number)."""
    left_out = np.zeros((count, rows), bool)
    for number, line in enumerate(left_out):
        random = np.random.default_rng((seed, round(1e6 * fraction), number))
        line[random.permutation(trainable)[: round(fraction * len(trainable))]] = True
    return left_out


def retrained(
    task: Task | ArrayTask,
    session: Session,
    *,
    start: Inner,
    stream: Stream,
    queries: Int[np.ndarray, "queries"],
    fractions: tuple[float, ...],
    count: int,
    together: int,
    seed: int,
) -> Bank:
    """Train once without each subset, its rows at weight 0, and read the losses; finished retrains are remembered.

    Start, batches and their denominators stay, so the estimand is that of `unrolled`: L_v(theta_T(w)). So many go on
    `together`, side by side, which changes no loss but by rounding.
    """
    value, fixed = outer_value(task.problem), task.fixed(start.params)
    held = {part: task.held_out[part] for part in TARGETS if part in task.held_out}
    left_out = np.stack([subsets(task.rows, task.trainable(), one, count, seed) for one in fractions])

    def read(params: Params) -> dict[str, list[float]]:
        found = {part: [float(value(params, fixed, some))] for part, some in held.items()}
        if len(queries):
            losses = per_row(task.objective.losses, params, fixed, held["fit"], len(task.trusted["fit"]))
            found["queries"] = losses[queries].tolist()
        return found

    def retrain(gone: Bool[np.ndarray, "some rows"]) -> list[dict[str, list[float]]]:
        missing = together - len(gone)  # filled up, so that every group is of one shape and compiled once
        params = side_by_side(task, session, start, stream, np.pad(gone, ((0, missing), (0, 0)), mode="edge"))
        found = [read(jax.tree.map(itemgetter(at), params)) for at in range(len(gone))]
        if not all(np.isfinite(values).all() for one in found for values in one.values()):
            raise FloatingPointError(
                "a model trained without some of the rows has a loss that is not finite, although the one trained with "
                "all rows has not. Lower optimizer.learning_rate, or set optimizer.max_grad_norm."
            )
        return found

    lines: list[list[dict[str, list[float]]]] = []
    for fraction, some in zip(fractions, left_out, strict=True):
        session.phase(f"retraining without {fraction:.3g} of the rows")
        groups = {first: some[first : first + together] for first in range(0, count, together)}
        jobs = {f"bank/{fraction:g}/{first}": partial(retrain, gone) for first, gone in groups.items()}
        lines.append([line for key, job in jobs.items() for line in session.once(key, job)])
    targets = [target for target in TARGETS if target in lines[0][0]]
    losses = {target: np.array([[line[target] for line in some] for some in lines]) for target in targets}
    return Bank(fractions, left_out, losses)


def side_by_side(
    task: Task | ArrayTask, session: Session, start: Inner, stream: Stream, left_out: Bool[np.ndarray, "runs rows"]
) -> Params:
    """The parameters after one training for each line, without its rows; every leaf leads with [runs]."""
    take, forward = _several(task.step)
    weights, fixed = jnp.asarray(~left_out, jnp.result_type(float)), task.fixed(start.params)
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(left_out), *leaf.shape)), start)
    for step in range(stream.steps):
        batch = stream.batch(step)
        state, _ = forward(state, take(weights, batch), fixed, batch)
        session.advance(len(left_out))
        session.check()
    return state.params


@lru_cache(maxsize=2)
def _several(step: Transition) -> tuple[Callable, Callable]:
    """`take` and `forward` of several runs at once; remembered, so that they are compiled once."""
    return jax.jit(jax.vmap(step.take, in_axes=(0, None))), jax.jit(jax.vmap(step.forward, in_axes=(0, 0, None, None)))


def only(stream: Stream, row: int) -> Stream:
    """The validation stream with one row alone: its share of L_v, which is its loss over the number of rows."""
    holds = (step for step in range(stream.steps) if (np.asarray(stream.batch(step)["index"]) == row).any())
    batch = stream.batch(next(holds))
    alone = {**batch, "index": jnp.where(batch["index"] == row, batch["index"], PADDING)}
    return Stream(lambda _: alone, 1)


def scored(
    bank: Bank, scores: Float[np.ndarray, "rows"], each: Float[np.ndarray, "queries rows"] | None, seed: int
) -> dict[str, list[Float[np.ndarray, "draws"]]]:
    """Linear-datamodelling scores by target and fraction, of the bank itself and of its resamples.

    Spearman's correlation over the subsets between foretold and actual losses; for `queries` the mean of those of the
    single queries, each foretold by its own line of `each`, or by the one score of the rows where there is none.
    Subsets are resampled, and queries with them. The draws are the same for every score, so differences are paired.
    """
    found: dict[str, list[np.ndarray]] = {}
    for target, losses in bank.losses.items():
        own = scores[None] if target != "queries" or each is None else each
        foretold = bank.predicted(own)
        found[target] = []
        for index in range(len(bank.fractions)):
            actual = losses[index].T
            counts = bootstrap.resampled(actual.shape[1], (seed, index))
            lines = np.broadcast_to(foretold[:, index], actual.shape)
            drawn = bootstrap.rank_correlations(lines, actual, counts)
            among = bootstrap.resampled(len(actual), (seed, index, 1)) * np.isfinite(drawn)
            with np.errstate(invalid="ignore"):  # nan where a score foretells the same for every subset
                found[target].append((among * np.nan_to_num(drawn)).sum(1) / among.sum(1))
    return found


def table(bank: Bank, ids: list[str], query_ids: list[str]) -> pa.Table:
    """One row per retrain: its fraction, the ids that left, the losses; of queries a list, their ids as metadata."""
    shape = bank.left_out.shape[:2]
    named = np.array(ids, object)
    columns = {
        "fraction": np.repeat(bank.fractions, shape[1]),
        "subset": np.tile(np.arange(shape[1]), shape[0]),
        "left_out": [named[gone].tolist() for gone in bank.left_out.reshape(-1, bank.left_out.shape[2])],
    }
    for target, losses in bank.losses.items():
        flat = losses.reshape(-1, losses.shape[2])
        columns[target] = flat.tolist() if target == "queries" else flat[:, 0]
    return pa.table(columns).replace_schema_metadata({"queries": "\n".join(query_ids)})
