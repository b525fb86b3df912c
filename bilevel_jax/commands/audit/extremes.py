"""Retrains without the examples that a score puts first, and without those it puts last, beside random removals."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy import stats

from bilevel_jax.commands.audit.judge import DataScore
from bilevel_jax.commands.audit.retrains import retrain_without
from bilevel_jax.core.types import Stream, TrainState
from bilevel_jax.runs.budget.work import NUM_RANDOM_REMOVALS
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.stats import BootstrapInterval
from bilevel_jax.runs.tasks.protocol import Task


class Removal(NamedTuple):
    """The examples that one retrain leaves out."""

    share: float
    """Of the training examples, as asked for."""
    name: str
    """The score that chose them; empty where no score did."""
    end: Literal["none", "best", "worst", "random"]
    """Which end of the score they are; none: every example is trained on."""
    left_out: Bool[np.ndarray, "rows"]


class ExtremeRetrains(NamedTuple):
    """The losses after each removal; the first one removes nothing."""

    removals: list[Removal]
    losses: dict[str, Float[np.ndarray, "removals losses"]]
    """By target (a key of TARGET_LABELS): of all of validation, dev and test, of each query."""

    def changes(self, share: float, name: str, end: str) -> dict[str, Float[np.ndarray, "draws losses"]]:
        """The losses minus those of the training with every example; one draw where a score chose."""
        places = [at for at, one in enumerate(self.removals) if (one.share, one.name, one.end) == (share, name, end)]
        return {target: losses[places] - losses[0] for target, losses in self.losses.items()}


def count_removed(share: float, num_trainable: int) -> int:
    """How many examples a share is: at least one, and not all."""
    return min(max(1, round(share * num_trainable)), num_trainable - 1)


def plan_removals(
    scores: Sequence[DataScore],
    trainable: Int[np.ndarray, "kept"],
    num_examples: int,
    shares: Sequence[float],
    seed: int,
) -> list[Removal]:
    """Nothing; then for each share the best and the worst of each score but `random`, and random draws.

    Examples with the same score are ordered at random, alike for every score and share.
    """

    def mask(rows: Int[np.ndarray, "some"]) -> Bool[np.ndarray, "rows"]:
        return np.isin(np.arange(num_examples), rows)

    order = np.random.default_rng((seed, 5)).permutation(trainable)
    removals = [Removal(0.0, "", "none", mask(order[:0]))]
    for share in shares:
        count = count_removed(share, len(trainable))
        for score in scores:
            if score.name == "random":
                continue  # one draw of what is drawn many times below
            ranked = order[np.argsort(score.values[order], kind="stable")]
            removals.append(Removal(share, score.name, "best", mask(ranked[-count:])))
            removals.append(Removal(share, score.name, "worst", mask(ranked[:count])))
        for draw in range(NUM_RANDOM_REMOVALS):
            random = np.random.default_rng((seed, 6, round(1e6 * share), draw))
            removals.append(Removal(share, "", "random", mask(random.permutation(trainable)[:count])))
    return removals


def retrain_without_extremes(
    task: Task,
    session: Session,
    removals: list[Removal],
    *,
    start: TrainState,
    stream: Stream,
    queries: Int[np.ndarray, "queries"],
    vmap_size: int,
) -> ExtremeRetrains:
    """Train once for each removal, all in one program: their rounding is alike, so that differences are of the data."""
    session.set_phase("retraining without the best and the worst")
    left_out = np.stack([removal.left_out for removal in removals])
    losses = retrain_without(
        task, session, start=start, stream=stream, queries=queries, left_out=left_out, vmap_size=vmap_size,
        job="extremes",
    )  # fmt: skip
    return ExtremeRetrains(removals, losses)


def predict_interval(draws: Float[np.ndarray, "draws"]) -> BootstrapInterval:
    """The mean of the draws, and where 95 % of further ones fall: mean -+ t sd sqrt(1 + 1/n)."""
    count, mean = len(draws), float(np.mean(draws))
    width = float(stats.t.ppf(0.975, count - 1) * np.std(draws, ddof=1) * np.sqrt(1 + 1 / count))
    return BootstrapInterval(mean, mean - width, mean + width)


def summarize_extremes(found: ExtremeRetrains, num_trainable: int, unit: str) -> dict[str, Any]:
    """What result.json holds of it: changes of the loss by target and share, those of each query, a sentence."""
    shares = list(dict.fromkeys(one.share for one in found.removals if one.end != "none"))
    names = list(dict.fromkeys(one.name for one in found.removals if one.name))
    rows: list[dict[str, Any]] = []
    for name in names:
        by_end = {end: [found.changes(share, name, end) for share in shares] for end in ("best", "worst")}
        rows.append(
            {"name": name}
            | {
                end: {target: [float(change[target].mean()) for change in changes] for target in found.losses}
                for end, changes in by_end.items()
            }
            | {
                f"{end}_queries": [change["queries"][0].tolist() for change in changes]
                for end, changes in by_end.items()
                if "queries" in found.losses
            }
        )
    at_random = [found.changes(share, "", "random") for share in shares]
    random = {target: [predict_interval(draws[target].mean(1)) for draws in at_random] for target in found.losses}
    return {
        "shares": shares,
        "counts": [count_removed(share, num_trainable) for share in shares],
        "draws": NUM_RANDOM_REMOVALS,
        "full": {target: float(losses[0].mean()) for target, losses in found.losses.items()},
        "random": random,
        "rows": rows,
        "sentence": _describe_best(rows, random, shares, unit),
    }


def _describe_best(
    rows: list[dict[str, Any]], random: dict[str, list[BootstrapInterval]], shares: list[float], unit: str
) -> str:
    """The score whose ends differ most in validation loss, at the largest share, with the losses that none has read."""
    if not rows:
        return "No score but random ones was judged."
    at = int(np.argmax(shares))
    best = max(rows, key=lambda row: row["best"]["validation"][at] - row["worst"]["validation"][at])
    parts = [part for part in ("validation", "dev", "test") if part in random]

    def tell(values: Sequence[float]) -> str:
        return " and ".join(f"{part} loss by {value:+.2g}" for part, value in zip(parts, values, strict=True))

    ranges = " and ".join(f"{random[part][at].low:+.2g} to {random[part][at].high:+.2g}" for part in parts)
    return (
        f"Removal of the {100 * shares[at]:g} % with the highest and of the {100 * shares[at]:g} % with the lowest "
        f"scores differs most for {best['name']}: the first changes {tell([best['best'][part][at] for part in parts])} "
        f"{unit}, the second {tell([best['worst'][part][at] for part in parts])}; 95 % of removals at random change "
        f"{'them' if len(parts) > 1 else 'it'} by {ranges}."
    )


def build_extremes_table(found: ExtremeRetrains, example_ids: list[str], query_ids: list[str]) -> pa.Table:
    """One row per retrain: its share, score, end, the ids that left, the losses; ids of the queries as metadata."""
    id_array = np.array(example_ids, object)
    columns: dict[str, Any] = {
        "share": [one.share for one in found.removals],
        "score": [one.name for one in found.removals],
        "end": [one.end for one in found.removals],
        "left_out": [id_array[one.left_out].tolist() for one in found.removals],
    }
    for target, losses in found.losses.items():
        columns[target] = losses.tolist() if target == "queries" else losses[:, 0]
    return pa.table(columns).replace_schema_metadata({"queries": "\n".join(query_ids)})
