"""What `refine` leaves beside the model: responses.parquet and weights.parquet, and what its report shows of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.runs import files
from bilevel_jax.runs.refine_rows import Made
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task


def responses_path(work: Session, number: int) -> Path:
    """What the model wrote in a round."""
    return work.folder / "rounds" / f"responses-{number}.parquet"


def weights_path(work: Session, number: int) -> Path:
    """The rows of a round with their weights."""
    return work.folder / "rounds" / f"weights-{number}.parquet"


def weights_table(
    first: Task, made: Made, weights: Float[np.ndarray, "rows"], judge: str | None, number: int
) -> pa.Table:
    """The rows of a round with their weights; `response` is the id in responses.parquet, nothing for offline rows."""
    asked = [first.examples[row] for row in made.question]
    return pa.table(
        {
            "round": np.full(len(weights), number),
            "id": [example.id for example in made.task.examples],
            "question": [example.id for example in asked],
            "generated": made.response >= 0,
            "source": [example.source for example in asked],
            "label": pa.array([example.label for example in asked], pa.string()),
            "base": made.base,
            "weight": np.asarray(weights, float),
            "method": pa.array([judge] * len(weights), pa.string()),
        }
    )


def write(work: Session, records: list[dict[str, Any]], config_hash: str) -> None:
    """weights.parquet and responses.parquet: all rounds, one behind the other."""
    weights, responses = [], []
    for record in records:
        of = pq.read_table(weights_path(work, record["step"]))
        weights.append(of)
        known = dict(zip(of["id"].to_pylist(), of["weight"].to_pylist(), strict=True))
        some = pq.read_table(responses_path(work, record["step"]))
        some = some.append_column("weight", pa.array([known[one] for one in some["id"].to_pylist()], pa.float64()))
        responses.append(some.append_column("accepted", pa.array([record["accepted"]] * len(some), pa.bool_())))
    meaning = {
        "weight": "factor of the row's loss beside base, by `method`, the best candidate that learns weights; else 1",
        "base": "what the row counts before any weight: 1/G for each of G responses, over the mean of all rows",
        "config_hash": config_hash,
    }
    table = pa.concat_tables(weights).replace_schema_metadata({key: text.encode() for key, text in meaning.items()})
    files.write_table(work.folder / "weights.parquet", table)
    meaning = {
        "model": "fingerprint of the model that wrote the response",
        "log_prob": "sum of log_probs, nats: of each token under the sampler, after temperature, top-k and top-p",
        "accepted": "whether the best candidate of the round became the model",
    }
    table = pa.concat_tables(responses).replace_schema_metadata({key: text.encode() for key, text in meaning.items()})
    files.write_table(work.folder / "responses.parquet", table)


def shown(work: Session, first: Task, records: list[dict[str, Any]], count: int = 5) -> list[dict[str, Any]]:
    """Responses of the last round that weigh most and least, with their questions, for the report."""
    table = pq.read_table(work.folder / "responses.parquet").to_pylist()
    last = [row for row in table if row["round"] == len(records) - 1]
    known = {example.id: example for example in first.examples}
    ranked = sorted(last, key=lambda row: -row["weight"])
    chosen = ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]
    return [
        {
            "id": row["id"],
            "question": known[row["question"]].turns[-2].content if len(known[row["question"]].turns) > 1 else "",
            "offline": known[row["question"]].turns[-1].content,
            "label": known[row["question"]].label,
            "text": row["text"],
            "ended": row["ended"],
            "log_prob": row["log_prob"],
            "checker": row["checker"],
            "weight": row["weight"],
        }
        for row in chosen
    ]


def moved(work: Session, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean weight of each kind of row in each round: offline rows by label, responses by what the checker says."""
    out = []
    for record in records:
        table = pq.read_table(weights_path(work, record["step"])).to_pandas()
        values = pq.read_table(responses_path(work, record["step"])).to_pandas().set_index("id")["checker"]
        right = table["id"].map(values)
        kind = table["label"].fillna("offline")
        generated = np.where(right.isna(), "response", np.where(right >= 0.5, "right response", "wrong response"))
        kind = kind.where(~table["generated"], generated)
        means = table.assign(kind=kind).groupby("kind")["weight"].agg(["mean", "size"])
        out += [
            {"round": record["step"], "kind": name, "weight": float(one["mean"]), "rows": int(one["size"])}
            for name, one in means.iterrows()
        ]
    return out
