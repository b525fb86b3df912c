"""Weights of examples and tokens, and embeddings, from a file, a transformed score or a constant."""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from bilevel_jax.lm.data import files
from bilevel_jax.lm.data.examples import Example, format_count, read_name
from bilevel_jax.lm.data.targets import TokenWeights
from bilevel_jax.runs.config.local_paths import short_file_names
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
    num_unused: int = 0
    """Ids of the file that no training example has."""


def load_weights(config: WeightsSection, examples: Sequence[Example]) -> LoadedWeights:
    """The configured weights of `examples`.

    A file is joined by id, never by position. Raises ValueError, with the file and line, for what `read_id_column` and
    `check_weights` refuse, rows that the file lacks (unless `missing` says what to do), and weights that are all 0.
    """
    num_examples = len(examples)
    if not config.file:
        return LoadedWeights(
            np.full(num_examples, _check_constant(config)),
            np.ones(num_examples, bool),
            0,
            f"{config.constant:g} for every example",
        )
    column = read_id_column(config.file, config.column)
    is_missing = np.array([example.id not in column.values for example in examples])
    if is_missing.all():
        raise ValueError(_describe_foreign_ids(column, examples[0]))
    if is_missing.any() and config.missing == "error":
        first = examples[int(is_missing.argmax())]
        raise ValueError(_describe_missing_id(column, first, f"{int(is_missing.sum()):,} of {num_examples:,}"))
    present = [example for example in examples if example.id in column.values]
    weights = np.full(num_examples, float(config.missing == "one"))
    weights[~is_missing] = _scores_to_weights(column, config, [column.values[example.id] for example in present])
    check_weights(column, present, weights[~is_missing])
    keep_mask = ~is_missing | (config.missing != "drop")
    if not weights[keep_mask].any():
        raise ValueError(f"{config.file}: {_ALL_ZERO}")
    if config.mean_one:
        weights = weights / weights[keep_mask].mean()
    transform_note = "" if config.transform == "none" else f", {TRANSFORM_MEANINGS[config.transform]}"
    mean_note = ", divided by their mean" if config.mean_one else ""
    return LoadedWeights(
        weights,
        keep_mask,
        int(is_missing.sum()),
        f"{config.column} of {_short_name(config)}{transform_note}{mean_note}",
        len(column.values.keys() - {example.id for example in present}),
    )


TOKEN_WEIGHTS_COLUMN = "token_weights"


def load_token_weights(path: str, examples: Sequence[Example]) -> tuple[dict[str, TokenWeights], str]:
    """The factors of the losses of single targets in a file, for those of `examples` that it names, and a note on them.

    Args:
        path: weights.tokens; any file of `lm.data.files` whose rows have an `id` and a list of numbers `token_weights`.
        examples: the training examples.

    Returns:
        Example id -> its weights, and where they stand; and how many of the examples have some, in words.

    Raises:
        ValueError: as `read_id_lists`; a file that names none of the examples.
        FileNotFoundError: no such file.
    """
    lists = read_id_lists(path, TOKEN_WEIGHTS_COLUMN)
    named = [example.id for example in examples if example.id in lists.values]
    if not named:
        raise ValueError(_describe_foreign_ids(lists, examples[0]))
    unused = len(lists.values) - len(named)
    verbs = "of the file is that", "of the file are those"
    unused_note = f"; {format_count('id', unused, verbs)} of no training example" if unused else ""
    note = (
        f"weights of tokens: of {len(named):,} of {format_count('training example', len(examples))}, from "
        f"{short_file_names([path])[path]}{unused_note}."
    )
    return {i: TokenWeights(lists.values[i], lists.where(i)) for i in named}, note


def describe_unread_weights(config: WeightsSection) -> LoadedWeights:
    """What can be said of weights before any row was read."""
    source = f"{config.column} of {_short_name(config)}" if config.file else f"{config.constant:g} for every example"
    return LoadedWeights(np.zeros(0), np.zeros(0, bool), 0, source)


def _short_name(config: WeightsSection) -> str:
    """The weights' file as results name it."""
    return short_file_names([config.file])[config.file]


class StreamedWeights:
    """The configured weight of one row at a time, for rows that are streamed; None for a row to be left out.

    As `load_weights`, but for what needs all rows: `mean_one` divides by the mean of the file, a score is transformed
    over the file, and what is wrong with a row is said when the row is reached.
    """

    def __init__(self, config: WeightsSection):
        self.config = config
        self._num_present, self._column = 0, None  # type: tuple[int, IdColumn | None]
        if not config.file:
            self._constant = _check_constant(config)
            return
        self._column = read_id_column(config.file, config.column)
        weights = _scores_to_weights(self._column, config, list(self._column.values.values()))
        finite = weights[np.isfinite(weights)]
        if finite.size and config.missing != "one" and not finite.any():
            raise ValueError(f"{config.file}: {_ALL_ZERO}")
        scale = finite.mean() if config.mean_one and finite.any() else 1.0
        self._weight_by_id = dict(zip(self._column.values, (weights / scale).tolist(), strict=True))

    def __call__(self, example: Example) -> float | None:
        """The weight of a row. Raises ValueError as `load_weights` does."""
        if self._column is None:
            return self._constant
        weight = self._weight_by_id.get(example.id)
        if weight is not None:
            self._num_present += 1
            check_weights(self._column, [example], np.array([weight]))
            return weight
        if self.config.missing == "error":
            raise ValueError(_describe_missing_id(self._column, example, "1"))
        return {"one": 1.0, "zero": 0.0, "drop": None}[self.config.missing]

    def check_epoch(self, example: Example, total: float) -> None:
        """Raises ValueError if no row of a whole epoch, of which `example` is one, had a weight in the file, or if all
        weights, whose sum is `total`, are 0."""
        if self._column is not None and not self._num_present:
            raise ValueError(_describe_foreign_ids(self._column, example))
        if not total:
            raise ValueError(f"{self.config.file}: {_ALL_ZERO}")

    def count_missing(self, examples: Sequence[Example]) -> int:
        """How many of these rows the file lacks."""
        return 0 if self._column is None else sum(example.id not in self._column.values for example in examples)


MAX_WEIGHT = 1e18
"""The largest factor of a loss: its square is finite in float32, as a gradient's norm needs it."""


def check_weights(column: "IdColumn", examples: Sequence[Example], weights: Float[np.ndarray, "examples"]) -> None:
    """Raise an error for a weight that is negative, not finite or above MAX_WEIGHT.

    Args:
        column: what the weights were made of.
        examples: training examples, all of whose ids the column has.
        weights: one for each of them.

    Raises:
        ValueError: with the first such weight, its file, line and example, the number of others, and the remedy.
    """
    bad = np.flatnonzero(~((weights >= 0) & (weights <= MAX_WEIGHT)))
    if not bad.size:
        return
    example, weight = examples[bad[0]], weights[bad[0]]
    value, who = column.values[example.id], f"the training example {example.id} ({example.where})"
    more = f", as for {len(bad) - 1:,} more" if len(bad) > 1 else ""
    where = f"{column.path}:{column.lines[example.id]}: {column.name}"
    if np.isfinite(value) and weight > MAX_WEIGHT:
        raise ValueError(
            f"{where} is {value:.4g}, which gives {who} the weight {weight:.4g}{more}: no training step holds such a "
            "factor. Set weights.mean_one to true, or weights.transform to minmax or rank."
        )
    if np.isfinite(value):
        raise ValueError(
            f"{where} is {value:.4g}, which gives {who} the weight {weight:.4g}{more}, and a weight is 0 or more. "
            "If it is a score, set weights.transform to minmax or rank."
        )
    words = "is absent, null or NaN" if np.isnan(value) else f"is {value}"
    raise ValueError(
        f"{where} {words} for {who}{more}; a finite number is wanted. Choose another weights.column, or remove such "
        "rows from the file and say by weights.missing what becomes of these examples."
    )


class IdColumn(NamedTuple):
    """One column of numbers of a file, by the id of the example."""

    path: str
    name: str
    values: dict[str, float]
    """nan where a row has no value, null or NaN."""
    lines: dict[str, int]


def read_id_column(path: str, name: str, *, optional: bool = False) -> IdColumn:
    """One column of a file that data can be read from, by id: the one way in which files of weights are read.

    Args:
        path: the weights.parquet of a run, or any file of `lm.data.files` whose rows have an id.
        name: the column.
        optional: a file without that column is empty, instead of an error.

    Returns:
        The values, and the lines that they stand on.

    Raises:
        ValueError: a row without an id, an id that stands twice, a value that is no number, no such column, no rows,
            and what `files.read_rows` refuses; with the file and line.
        FileNotFoundError: no such file.
    """
    former = FORMER_COLUMNS.get(name, name)
    values: dict[str, float] = {}
    lines: dict[str, int] = {}
    keys: set[str] = set()
    for line, example_id, row in _iterate_rows_with_id(path, name):
        keys.update(row)
        values[example_id] = _to_number(row.get(name, row.get(former)), name, f"{path}:{line}")
        lines[example_id] = line
    if not {name, former} & keys:
        if not optional:
            raise ValueError(_describe_missing_column(path, name, keys))
        values = {}
    return IdColumn(path, name, values, lines)


class IdLists(NamedTuple):
    """One column of lists of numbers of a file, by the id of the example."""

    path: str
    name: str
    values: dict[str, Float[np.ndarray, "numbers"]]
    lines: dict[str, int]

    def where(self, example_id: str) -> str:
        """`file:line` of an example."""
        return f"{self.path}:{self.lines[example_id]}"


def read_id_lists(path: str, name: str) -> IdLists:
    """As `read_id_column`, of a column whose values are lists of finite numbers.

    Args:
        path: any file of `lm.data.files` whose rows have an id.
        name: the column.

    Returns:
        The lists, and the lines that they stand on.

    Raises:
        ValueError: as `read_id_column`; a value that is no list, is empty, or holds something else than finite numbers.
        FileNotFoundError: no such file.
    """
    values: dict[str, np.ndarray] = {}
    lines: dict[str, int] = {}
    keys: set[str] = set()
    for line, example_id, row in _iterate_rows_with_id(path, name):
        keys.update(row)
        lines[example_id] = line
        if name in row:
            values[example_id] = _to_numbers(row[name], f"{path}:{line}: {name} of the example {example_id}")
    if name not in keys:
        raise ValueError(_describe_missing_column(path, name, keys))
    if missing := next((example_id for example_id in lines if example_id not in values), ""):
        raise ValueError(f"{path}:{lines[missing]}: no {name} for the example {missing}. Write one, or remove the row.")
    return IdLists(path, name, values, lines)


EMBEDDING_COLUMN = "embedding"


class Embeddings(NamedTuple):
    """Vectors of one width, by the id of the example."""

    lists: IdLists
    width: int

    def rows(self, examples: Sequence[Example]) -> Float[np.ndarray, "examples width"]:
        """The vectors of some examples, as the file has them; a ValueError names the first that it lacks."""
        values = self.lists.values
        missing = [example for example in examples if example.id not in values]
        if missing:
            more = f", one of {len(missing):,}" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.lists.path}: no {self.lists.name} for the example {missing[0].id} ({missing[0].where}){more}; "
                f"it has {format_count('id', len(values))}, such as {next(iter(values))}. An id is a hash of the row's "
                "text: give a file with a vector for each training and validation example."
            )
        return np.stack([values[example.id] for example in examples]) if examples else np.zeros((0, self.width))


def read_embeddings(path: str) -> Embeddings:
    """A file of vectors of the user's own: rows with an `id` and an `embedding`, a list of numbers.

    Raises:
        ValueError: as `read_id_lists`; vectors of several widths, or one that is all zeros and has no direction; with
            the file, line and id.
        FileNotFoundError: no such file.
    """
    lists = read_id_lists(path, EMBEDDING_COLUMN)
    first, width = next((example_id, len(vector)) for example_id, vector in lists.values.items())
    for example_id, vector in lists.values.items():
        if len(vector) != width:
            raise ValueError(
                f"{lists.where(example_id)}: the embedding of the example {example_id} has {len(vector):,} numbers, "
                f"and that of {first} before it has {width:,}. Give all examples vectors of one width, of one model."
            )
        if not vector.any():
            raise ValueError(
                f"{lists.where(example_id)}: the embedding of the example {example_id} is all zeros, which is near "
                "nothing. Make it anew, or remove the example."
            )
    return Embeddings(lists, width)


def load_embeddings(path: str) -> Embeddings:
    """`read_embeddings`, whose result is kept until the file changes."""
    file = Path(path)
    return _cached_embeddings(path, file.stat().st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=2)
def _cached_embeddings(path: str, changed_ns: int) -> Embeddings:
    return read_embeddings(path)


def _to_numbers(value: Any, what: str) -> Float[np.ndarray, "numbers"]:
    numbers = value if isinstance(value, list) else []
    if not numbers or not set(map(type, numbers)) <= {int, float, Decimal}:
        raise ValueError(f"{what} is {files.describe_value(value)}; a list of numbers is wanted.")
    array = np.array(numbers, float)
    if bad := np.flatnonzero(~np.isfinite(array)).tolist():
        raise ValueError(f"{what} holds {array[bad[0]]} at place {bad[0] + 1}; finite numbers are wanted.")
    return array


def _iterate_rows_with_id(path: str, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, id, row) of each row of a file with one row for each example."""
    first_lines: dict[str, int] = {}
    for line, row in files.read_rows(path):
        where = f"{path}:{line}"
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: the row is {files.describe_value(row)}; an object with an id and its {name} is wanted."
            )
        example_id = read_name(row, "id", where)
        if example_id is None:
            raise ValueError(
                f"{where}: no 'id'; the keys are {sorted(row)}. Each row is the id of a training example and its "
                f"{name}: give the weights.parquet of a run, or rows with such ids, which `export` writes."
            )
        if example_id in first_lines:
            raise ValueError(
                f"{where}: the id {example_id} stands twice, first on line {first_lines[example_id]}; one row for each "
                "example is wanted. Remove one of them."
            )
        first_lines[example_id] = line
        yield line, example_id, row
    if not first_lines:
        raise ValueError(f"{path}: no rows. Give one for each example, or leave the file out.")


def _to_number(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    raise ValueError(
        f"{where}: {name} holds {files.describe_value(value)}; numbers are wanted. Choose another column, or "
        "write a number."
    )


_ALL_ZERO = (
    "every weight is 0, so nothing would be learned. Choose another weights.column or weights.transform, or give the "
    "data that the weights were made for."
)


def _check_constant(config: WeightsSection) -> float:
    if not 0 < config.constant < math.inf:
        raise ValueError(
            f"weights.constant is {config.constant:g}; a finite number above 0 is wanted: with 0 nothing is learned."
        )
    return config.constant


def _scores_to_weights(
    column: IdColumn, config: WeightsSection, scores: Sequence[float]
) -> Float[np.ndarray, "examples"]:
    """The scores, transformed; nan where a score is not finite."""
    values = np.array(scores, float)
    known = np.isfinite(values)
    weights = np.full(values.shape, np.nan)
    try:
        with np.errstate(all="ignore"):  # what comes of numbers at the edge of floats is checked as any weight is
            weights[known] = TRANSFORMS[config.transform](values[known]) if known.any() else np.nan
    except ValueError as error:
        raise ValueError(f"{column.path}: {error}") from None
    return weights


def _describe_foreign_ids(column: "IdColumn | IdLists", example: Example) -> str:
    return (
        f"{column.path}: none of its {len(column.values):,} ids, such as {next(iter(column.values))}, is that of a "
        f"training example, such as {example.id} ({example.where}). An id is a hash of the row's text: give the data "
        "that the weights were made for."
    )


def _describe_missing_id(column: IdColumn, example: Example, count: str) -> str:
    return (
        f"{column.path}: no weight for {count} training examples, the first {example.id} at {example.where}. Set "
        "weights.missing to one, zero or drop, or give the data that the weights were made for."
    )


def _describe_missing_column(path: str, name: str, keys: set[str]) -> str:
    renamed = next((new for new, former in FORMER_COLUMNS.items() if former == name and new in keys), "")
    if renamed:
        return f"{path}: the column {name!r} is called {renamed!r} since 0.2: name it so."
    nearest = difflib.get_close_matches(name, keys, n=1)
    hint = f"; nearest: {nearest[0]!r}" if nearest else ""
    return f"{path}: no column {name!r}{hint}; the columns are {sorted(keys)}. Name one of them."


def _minmax_transform(scores: np.ndarray) -> np.ndarray:
    low, high = scores.min(), scores.max()
    if low == high:
        raise ValueError(f"every score is {low:g}, so min-max has no scale. Set weights.transform to none.")
    return (scores / 2 - low / 2) / (high / 2 - low / 2)  # halves, as the difference of two floats may be none


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
