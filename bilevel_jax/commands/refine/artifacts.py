"""Artifacts of `refine` with the responses and weights of every round."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from bilevel_jax.commands.refine.rollouts import RoundTask
from bilevel_jax.core.types import PyTree
from bilevel_jax.runs.infra import checkpoint, run_dir
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.scores import STANDARD_ERROR_SUFFIX
from bilevel_jax.runs.tasks.text import TextTask

SCORE_COLUMN = "score"
"""In weights.parquet, the score of an example by the model that its round starts from."""


def run_saved_job(
    session: Session, number: int, name: str, folder: Path, like: PyTree, compute: Callable[[], tuple[PyTree, Any]]
) -> tuple[PyTree, dict[str, Any]]:
    """The arrays and the facts of a job of a round: computed now, or read where a stopped run left them.

    Args:
        session: of the whole run, which remembers the facts.
        number: of the round.
        name: of the job.
        folder: where its arrays are saved.
        like: arrays of the structure, dtypes and shardings of its own.
        compute: gives (the arrays, what else is known of them, as JSON).

    Returns:
        The arrays, and the facts with `work` and `seconds` of the job.

    Raises:
        FileNotFoundError: where the arrays are gone of a job that was finished.
    """
    restored = checkpoint.restore_checkpoint(folder, like)

    def make() -> dict[str, Any]:
        nonlocal restored
        restored = None  # saved by a run that was stopped before it noted the job
        began, before = time.monotonic(), session.work_done
        arrays, facts = compute()
        checkpoint.save_checkpoint(folder, 0, arrays, {})
        return {"work": session.work_done - before, "seconds": time.monotonic() - began, **facts}

    facts = session.run_once(f"round {number}/{name}", make, restored is not None)
    restored = restored or checkpoint.restore_checkpoint(folder, like)
    if restored is None:
        raise FileNotFoundError(f"{folder} is not there any more, and round {number} needs it. Go on with --resume.")
    return restored.tree, dict(facts)


def responses_path(session: Session, number: int) -> Path:
    """What the model wrote in a round."""
    return session.folder / "rounds" / f"responses-{number}.parquet"


def weights_path(session: Session, number: int) -> Path:
    """The rows of a round with their weights."""
    return session.folder / "rounds" / f"weights-{number}.parquet"


def build_round_weights_table(
    offline_task: TextTask,
    round_task: RoundTask,
    weights: Float[np.ndarray, "examples"],
    judge: str | None,
    round_number: int,
    rewards: Float[np.ndarray, "responses"] | None = None,
) -> pa.Table:
    """The examples of a round with their weights, with their scores where they have some, and, where a generator is
    trained, with the rewards of responses."""
    question_examples = [offline_task.examples[row] for row in round_task.question_rows]
    table = pa.table(
        {
            "round": np.full(len(weights), round_number),
            "id": [example.id for example in round_task.task.examples],
            "question": [example.id for example in question_examples],
            "generated": round_task.response_numbers >= 0,
            "source": [example.source for example in question_examples],
            "label": pa.array([example.label for example in question_examples], pa.string()),
            "base": round_task.multiplicity,
            "weight": np.asarray(weights, float),
            "method": pa.array([judge] * len(weights), pa.string()),
        }
    )
    if round_task.scores:
        columns = {"": round_task.scores.values, STANDARD_ERROR_SUFFIX: round_task.scores.standard_errors}
        for suffix, values in columns.items():
            if values is not None:
                table = table.append_column(SCORE_COLUMN + suffix, pa.array(values, from_pandas=True))  # nan: no score
    if rewards is None:
        return table
    by_row = [None if number < 0 else float(rewards[number]) for number in round_task.response_numbers]
    return table.append_column("reward", pa.array(by_row, pa.float64()))


def read_round_scores(session: Session, number: int) -> dict[str, float]:
    """The scores of the offline examples of an earlier round by their ids; none where it scored nothing."""
    table = run_dir.read_parquet(weights_path(session, number))
    if SCORE_COLUMN not in table.column_names:
        return {}
    columns = (table[name].to_pylist() for name in ("id", "generated", SCORE_COLUMN))
    return {
        example_id: np.nan if score is None else score
        for example_id, is_generated, score in zip(*columns, strict=True)
        if not is_generated
    }


def write_round_tables(session: Session, records: list[dict[str, Any]], config_hash: str) -> None:
    """weights.parquet and responses.parquet: all rounds, one behind the other."""
    weights, responses = [], []
    for record in records:
        round_weights = run_dir.read_parquet(weights_path(session, record["step"]))
        weights.append(round_weights)
        round_responses = run_dir.read_parquet(responses_path(session, record["step"]))
        for name in ("weight", "reward"):
            if name in round_weights.column_names:
                by_id = dict(zip(round_weights["id"].to_pylist(), round_weights[name].to_pylist(), strict=True))
                values = pa.array(
                    [by_id[response_id] for response_id in round_responses["id"].to_pylist()], pa.float64()
                )
                round_responses = round_responses.append_column(name, values)
        responses.append(
            round_responses.append_column("accepted", pa.array([record["accepted"]] * len(round_responses), pa.bool_()))
        )
    meaning = {
        "weight": "factor of the row's loss beside base, by `method`, the best candidate that learns weights; else 1",
        "base": "what the row counts before any weight: 1/G for each of G responses, over the mean of all rows",
        "reward": "of a generator's response: minus the derivative of L_v by its weight at weight 1, over base",
        SCORE_COLUMN: "of refine.methods = ica: log p(response) with demonstrations minus without, nats "
        "(per token with scores.per_token)",
        SCORE_COLUMN + STANDARD_ERROR_SUFFIX: "of score, over sets of demonstrations (scores.demonstration_sets)",
        "config_hash": config_hash,
    }
    table = pa.concat_tables(weights).replace_schema_metadata({key: text.encode() for key, text in meaning.items()})
    run_dir.write_parquet(session.folder / "weights.parquet", table)
    meaning = {
        "model": "fingerprint of the model that wrote the response",
        "log_prob": "sum of log_probs, nats: of each token under the sampler, after temperature, top-k and top-p",
        "accepted": "whether the best candidate of the round became the model",
    }
    table = pa.concat_tables(responses).replace_schema_metadata({key: text.encode() for key, text in meaning.items()})
    run_dir.write_parquet(session.folder / "responses.parquet", table)


def pick_extreme_responses(
    session: Session, offline_task: TextTask, records: list[dict[str, Any]], count: int = 5
) -> list[dict[str, Any]]:
    """Responses of the last round that weigh most and least, with their questions, for the report; by rewards where a
    generator is trained."""
    table = run_dir.read_parquet(session.folder / "responses.parquet").to_pylist()
    last = [row for row in table if row["round"] == len(records) - 1]
    example_by_id = {example.id: example for example in offline_task.examples}
    key = "reward" if last and "reward" in last[0] else "weight"
    ranked = sorted(last, key=lambda row: -row[key])
    extremes = ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]
    return [
        {
            "id": row["id"],
            "question": example_by_id[row["question"]].turns[-2].content
            if len(example_by_id[row["question"]].turns) > 1
            else "",
            "offline": example_by_id[row["question"]].turns[-1].content,
            "label": example_by_id[row["question"]].label,
            "text": row["text"],
            "ended": row["ended"],
            "log_prob": row["log_prob"],
            "checker": row["checker"],
            "weight": row["weight"],
            "reward": row.get("reward"),
        }
        for row in extremes
    ]


def average_weights_by_kind(
    session: Session, records: list[dict[str, Any]], column: str = "weight"
) -> list[dict[str, Any]]:
    """Mean weights in each round: of offline examples by label, of responses by the verifier's score.

    `column` may be reward, which responses of a generator alone have.
    """
    out = []
    for record in records:
        table = run_dir.read_parquet(weights_path(session, record["step"])).to_pandas()
        values = run_dir.read_parquet(responses_path(session, record["step"])).to_pandas().set_index("id")["checker"]
        right = table["id"].map(values)
        kind = table["label"].fillna("offline")
        generated = np.where(right.isna(), "response", np.where(right >= 0.5, "right response", "wrong response"))
        kind = kind.where(~table["generated"], generated)
        means = table.assign(kind=kind).dropna(subset=[column]).groupby("kind")[column].agg(["mean", "size"])
        out += [
            {"round": record["step"], "kind": name, "weight": float(stats["mean"]), "rows": int(stats["size"])}
            for name, stats in means.iterrows()
        ]
    return out
