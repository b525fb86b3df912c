"""The weights that a run is given: a file joined by id, a score made into weights, or a constant."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from bilevel_jax.lm.data import Example
from bilevel_jax.runs.sections import WeightsSection


class Given(NamedTuple):
    """One weight for each row, and where it comes from."""

    weights: Float[np.ndarray, "rows"]
    kept: Bool[np.ndarray, "rows"]
    """False for rows without a weight under missing = drop."""
    missing: int
    """Rows whose id the file lacks."""
    source: str
    """In words."""


def given(config: WeightsSection, examples: Sequence[Example]) -> Given:
    """The configured weights of `examples`.

    A file is joined by id, never by position. Raises ValueError for an id that stands twice, rows that the file lacks
    (unless `missing` says what to do), a value that is not finite, a negative weight, and weights that are all 0.
    """
    rows = len(examples)
    if not config.file:
        return Given(np.full(rows, config.constant), np.ones(rows, bool), 0, f"{config.constant:g} for every row")
    values = column(config.file, config.column)
    scores = np.array([values.get(example.id, np.nan) for example in examples])
    absent = np.array([example.id not in values for example in examples])
    if absent.all():
        raise ValueError(
            f"{config.file}: none of its {len(values):,} ids is that of a training row, such as {examples[0].id} "
            f"({examples[0].where}). An id is a hash of the row's text: give the data that the weights were made for."
        )
    if absent.any() and config.missing == "error":
        first = examples[int(absent.argmax())]
        raise ValueError(
            f"{config.file}: no weight for {int(absent.sum()):,} of {rows:,} training rows, the first {first.id} at "
            f"{first.where}. Set weights.missing to one, zero or drop."
        )
    odd = ~absent & ~np.isfinite(scores)
    if odd.any():
        first = examples[int(odd.argmax())]
        raise ValueError(
            f"{config.file}: {config.column} is {scores[int(odd.argmax())]} for {int(odd.sum()):,} training rows, the "
            f"first {first.id} at {first.where}. Choose another weights.column, or remove those rows."
        )
    weights = np.where(absent, 0.0, 1.0)
    weights[~absent] = TRANSFORMS[config.transform](scores[~absent])
    weights[absent] = config.missing == "one"
    kept = ~absent | (config.missing != "drop")
    if (weights < 0).any():
        at = int(weights.argmin())
        raise ValueError(
            f"{config.file}: {config.column} gives {examples[at].id} ({examples[at].where}) the weight "
            f"{weights[at]:.4g}, and a weight is 0 or more. If it is a score, set weights.transform to minmax or rank."
        )
    if not weights.any():
        raise ValueError(f"{config.file}: every weight is 0, so nothing would be learned.")
    if config.mean_one:
        weights = weights / weights[kept].mean()
    how = "" if config.transform == "none" else f", {MEANINGS[config.transform]}"
    scaled = ", divided by their mean" if config.mean_one else ""
    return Given(weights, kept, int(absent.sum()), f"{config.column} of {config.file}{how}{scaled}")


def unknown(config: WeightsSection) -> Given:
    """What can be said of weights before any row was read."""
    source = f"{config.column} of {config.file}" if config.file else f"{config.constant:g} for every row"
    return Given(np.zeros(0), np.zeros(0, bool), 0, source)


def by_row(config: WeightsSection) -> Callable[[Example], float | None]:
    """The configured weight of one row at a time, for rows that are streamed; None for a row to be left out.

    As `given`, but for two things that would need all rows: `mean_one` divides by the mean of the file, and a score is
    transformed over the file.
    """
    if not config.file:
        return lambda example: config.constant
    values = column(config.file, config.column)
    scores = np.array(list(values.values()))
    weights = TRANSFORMS[config.transform](scores)
    if not np.isfinite(weights).all() or (weights < 0).any():
        odd, weight = next(pair for pair in zip(values, weights, strict=True) if not 0 <= pair[1] < np.inf)
        raise ValueError(
            f"{config.file}: {config.column} gives {odd} the weight {weight:.4g}; a weight is "
            "finite and 0 or more. If it is a score, set weights.transform to minmax or rank."
        )
    table = dict(zip(values, (weights / weights.mean() if config.mean_one else weights).tolist(), strict=True))
    otherwise = {"one": 1.0, "zero": 0.0, "drop": None}

    def weigh(example: Example) -> float | None:
        if example.id not in table and config.missing == "error":
            raise ValueError(
                f"{config.file}: no weight for the row {example.id} at {example.where}. "
                "Set weights.missing to one, zero or drop."
            )
        return table.get(example.id, otherwise.get(config.missing))

    return weigh


def column(path: str, name: str) -> dict[str, float]:
    """id -> value of one column of a parquet, jsonl or json file."""
    ids, values = _read(path, name)
    out = dict(zip(ids, values, strict=True))
    if len(out) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"{path}: the id {twice} stands twice; a weight for each row is wanted.")
    return out


def _minmax(scores: np.ndarray) -> np.ndarray:
    low, high = scores.min(), scores.max()
    if low == high:
        raise ValueError(f"every score is {low:g}, so min-max has no scale. Set weights.transform to none.")
    return (scores - low) / (high - low)


def _rank(scores: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts / 2)[inverse] / len(scores)  # the middle of a tie's ranks


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda scores: scores,
    "negate": lambda scores: -scores,
    "minmax": _minmax,
    "rank": _rank,
}
MEANINGS = {
    "negate": "negated",
    "minmax": "from the least (0) to the largest (1)",
    "rank": "by rank, between 0 and 1",
}


def _read(path: str, name: str) -> tuple[list[str], list[float]]:
    kind = Path(path).suffix
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Give the weights.parquet of a run, or leave weights.file empty."
        )
    if kind == ".parquet":
        file = pq.ParquetFile(path)
        _wanted(path, name, file.schema_arrow.names)
        table = file.read(["id", name])
        ids, values = table["id"].to_pylist(), table[name].to_pylist()
    elif kind in (".jsonl", ".json"):
        rows = _objects(path, kind)
        ids, values = [row["id"] for row in rows], []
        for number, row in enumerate(rows, 1):
            _wanted(f"{path}, row {number}", name, list(row))
            values.append(row[name])
    else:
        raise ValueError(f"{path}: weights are read from .parquet, .jsonl or .json, not from '{kind}'.")
    try:
        return ids, [float("nan") if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        odd = next(value for value in values if not isinstance(value, int | float | None))
        raise ValueError(f"{path}: {name} holds {odd!r}; numbers are wanted. Choose another weights.column.") from None


def _objects(path: str, kind: str) -> list[dict[str, Any]]:
    text = Path(path).read_text(encoding="utf-8")
    try:
        rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: bad JSON, {error}.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "id" not in row:
            raise ValueError(f"{path}, row {number}: no 'id'; each row is an object with an id and a weight.")
    return rows


def _wanted(where: str, name: str, names: Sequence[str]) -> None:
    if missing := [key for key in ("id", name) if key not in names]:
        raise ValueError(
            f"{where}: no column {missing[0]!r}; the columns are {sorted(names)}. Set weights.column to one of them."
        )
