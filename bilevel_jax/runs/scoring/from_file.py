"""Example weights from a file, a transformed score or a constant."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.config.schema import WeightsSection


class LoadedWeights(NamedTuple):
    """One weight for each row, and where it comes from."""

    weights: Float[np.ndarray, "examples"]
    keep_mask: Bool[np.ndarray, "examples"]
    """False for rows without a weight under missing = drop."""
    num_missing: int
    """Rows whose id the file lacks."""
    source: str
    """In words."""


def load_weights(config: WeightsSection, examples: Sequence[Example]) -> LoadedWeights:
    """The configured weights of `examples`.

    A file is joined by id, never by position. Raises ValueError for an id that stands twice, rows that the file lacks
    (unless `missing` says what to do), a value that is not finite, a negative weight, and weights that are all 0.
    """
    num_examples = len(examples)
    if not config.file:
        return LoadedWeights(
            np.full(num_examples, config.constant),
            np.ones(num_examples, bool),
            0,
            f"{config.constant:g} for every example",
        )
    values = read_id_column(config.file, config.column)
    scores = np.array([values.get(example.id, np.nan) for example in examples])
    is_missing = np.array([example.id not in values for example in examples])
    if is_missing.all():
        raise ValueError(
            f"{config.file}: none of its {len(values):,} ids is that of a training example, such as {examples[0].id} "
            f"({examples[0].where}). An id is a hash of the row's text: give the data that the weights were made for."
        )
    if is_missing.any() and config.missing == "error":
        first = examples[int(is_missing.argmax())]
        raise ValueError(
            f"{config.file}: no weight for {int(is_missing.sum()):,} of {num_examples:,} training examples, the first "
            f"{first.id} at {first.where}. Set weights.missing to one, zero or drop."
        )
    nonfinite = ~is_missing & ~np.isfinite(scores)
    if nonfinite.any():
        first = examples[int(nonfinite.argmax())]
        raise ValueError(
            f"{config.file}: {config.column} is {scores[int(nonfinite.argmax())]} for {int(nonfinite.sum()):,} "
            f"training examples, the first {first.id} at {first.where}. Choose another weights.column, or remove "
            "those rows."
        )
    weights = np.where(is_missing, 0.0, 1.0)
    weights[~is_missing] = TRANSFORMS[config.transform](scores[~is_missing])
    weights[is_missing] = config.missing == "one"
    keep_mask = ~is_missing | (config.missing != "drop")
    if (weights < 0).any():
        index = int(weights.argmin())
        raise ValueError(
            f"{config.file}: {config.column} gives {examples[index].id} ({examples[index].where}) the weight "
            f"{weights[index]:.4g}, and a weight is 0 or more. If it is a score, set weights.transform to minmax or "
            "rank."
        )
    if not weights.any():
        raise ValueError(f"{config.file}: every weight is 0, so nothing would be learned.")
    if config.mean_one:
        weights = weights / weights[keep_mask].mean()
    transform_note = "" if config.transform == "none" else f", {TRANSFORM_MEANINGS[config.transform]}"
    mean_note = ", divided by their mean" if config.mean_one else ""
    return LoadedWeights(
        weights, keep_mask, int(is_missing.sum()), f"{config.column} of {config.file}{transform_note}{mean_note}"
    )


def describe_unread_weights(config: WeightsSection) -> LoadedWeights:
    """What can be said of weights before any row was read."""
    source = f"{config.column} of {config.file}" if config.file else f"{config.constant:g} for every example"
    return LoadedWeights(np.zeros(0), np.zeros(0, bool), 0, source)


def make_weight_function(config: WeightsSection) -> Callable[[Example], float | None]:
    """The configured weight of one row at a time, for rows that are streamed; None for a row to be left out.

    As `load_weights`, but for two things that would need all rows: `mean_one` divides by the mean of the file, and a
    score is transformed over the file.
    """
    if not config.file:
        return lambda example: config.constant
    values = read_id_column(config.file, config.column)
    scores = np.array(list(values.values()))
    weights = TRANSFORMS[config.transform](scores)
    if not np.isfinite(weights).all() or (weights < 0).any():
        bad_id, weight = next(pair for pair in zip(values, weights, strict=True) if not 0 <= pair[1] < np.inf)
        raise ValueError(
            f"{config.file}: {config.column} gives {bad_id} the weight {weight:.4g}; a weight is "
            "finite and 0 or more. If it is a score, set weights.transform to minmax or rank."
        )
    weight_by_id = dict(zip(values, (weights / weights.mean() if config.mean_one else weights).tolist(), strict=True))
    default_weights = {"one": 1.0, "zero": 0.0, "drop": None}

    def weight_of(example: Example) -> float | None:
        if example.id not in weight_by_id and config.missing == "error":
            raise ValueError(
                f"{config.file}: no weight for the row {example.id} at {example.where}. "
                "Set weights.missing to one, zero or drop."
            )
        return weight_by_id.get(example.id, default_weights.get(config.missing))

    return weight_of


def read_id_column(path: str, name: str) -> dict[str, float]:
    """id -> value of one column of a parquet, jsonl or json file."""
    ids, values = _read_column(path, name)
    value_by_id = dict(zip(ids, values, strict=True))
    if len(value_by_id) < len(ids):
        duplicate_id = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"{path}: the id {duplicate_id} stands twice; a weight for each row is wanted.")
    return value_by_id


def _minmax_transform(scores: np.ndarray) -> np.ndarray:
    low, high = scores.min(), scores.max()
    if low == high:
        raise ValueError(f"every score is {low:g}, so min-max has no scale. Set weights.transform to none.")
    return (scores - low) / (high - low)


def _rank_transform(scores: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts / 2)[inverse] / len(scores)  # the middle of a tie's ranks


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda scores: scores,
    "negate": lambda scores: -scores,
    "minmax": _minmax_transform,
    "rank": _rank_transform,
}
TRANSFORM_MEANINGS = {
    "negate": "negated",
    "minmax": "from the least (0) to the largest (1)",
    "rank": "by rank, between 0 and 1",
}


FORMER_COLUMNS = {"hypergradient": "entry", "first_hypergradient": "first_entry"}
"""Names of today -> what weights.parquet called these columns before version 0.2; files of then are still read."""


def stored_column(name: str, columns: Sequence[str]) -> str:
    """The name of a column in a file, which a version before 0.2 may have written under its former name."""
    former = FORMER_COLUMNS.get(name, name)
    return former if name not in columns and former in columns else name


def _read_column(path: str, name: str) -> tuple[list[str], list[float]]:
    kind = Path(path).suffix
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Give the weights.parquet of a run, or leave weights.file empty."
        )
    if kind == ".parquet":
        file = pq.ParquetFile(path)
        name = stored_column(name, file.schema_arrow.names)
        _check_columns(path, name, file.schema_arrow.names)
        table = file.read(["id", name])
        ids, values = table["id"].to_pylist(), table[name].to_pylist()
    elif kind in (".jsonl", ".json"):
        rows = _read_json_objects(path, kind)
        ids, values = [row["id"] for row in rows], []
        name = stored_column(name, list(rows[0])) if rows else name
        for number, row in enumerate(rows, 1):
            _check_columns(f"{path}, row {number}", name, list(row))
            values.append(row[name])
    else:
        raise ValueError(f"{path}: weights are read from .parquet, .jsonl or .json, not from '{kind}'.")
    try:
        return ids, [float("nan") if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        not_a_number = next(value for value in values if not isinstance(value, int | float | None))
        raise ValueError(
            f"{path}: {name} holds {not_a_number!r}; numbers are wanted. Choose another weights.column."
        ) from None


def _read_json_objects(path: str, kind: str) -> list[dict[str, Any]]:
    text = Path(path).read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: bad JSON, {error}.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "id" not in row:
            raise ValueError(f"{path}, row {number}: no 'id'; each row is an object with an id and a weight.")
    return rows


def _check_columns(where: str, name: str, names: Sequence[str]) -> None:
    if missing := [key for key in ("id", name) if key not in names]:
        for today, former in FORMER_COLUMNS.items():
            if missing[0] == former and today in names:
                raise ValueError(
                    f"{where}: the column {former!r} is called {today!r} since 0.2: set weights.column to it."
                )
        raise ValueError(
            f"{where}: no column {missing[0]!r}; the columns are {sorted(names)}. Set weights.column to one of them."
        )
