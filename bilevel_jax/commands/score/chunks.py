"""Chunks of scored examples on disk: written one by one, read again in order, with constant memory."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from bilevel_jax.commands.score.scorer import ScoredExamples
from bilevel_jax.lm.data.examples import Example, example_kind
from bilevel_jax.runs.infra import run_dir, seals
from bilevel_jax.storage import copies, urls

RADIX_BITS = 16
Metadata = dict[bytes, bytes]
"""Of the schema of a parquet file."""


class ColumnMoments(NamedTuple):
    """What is kept of the features of some examples: enough to compare them with the training examples."""

    num_examples: int
    mean: Float[np.ndarray, "columns"]
    """Of the scaled features."""
    squares: Float[np.ndarray, "columns"]
    """Sum of squared differences from the mean."""
    low: Float[np.ndarray, "columns"]
    """Least value, in the feature's own unit."""
    high: Float[np.ndarray, "columns"]
    outside: Int[np.ndarray, "columns"]
    """Examples beyond the range of the training examples."""


def chunk_path(folder: Path, number: int) -> Path:
    """Where a chunk lies."""
    return folder / "checkpoints" / "score" / f"chunk_{number:08}.parquet"


def list_chunks(folder: Path) -> list[Path]:
    """The chunks that are there, in order."""
    return sorted((folder / "checkpoints" / "score").glob("chunk_*.parquet"))


def wait_for_chunks(paths: Sequence[Path]) -> None:
    """Return when this process sees all chunks, which other processes wrote, too.

    Raises FileNotFoundError for one that it does not see after a while.
    """

    def look(path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file, though all {len(paths):,} chunks are scored.")

    for path in paths:
        run_dir.read_when_seen(path, partial(look, path), by_any=True)


def write_chunk(
    path: Path,
    examples: Sequence[Example],
    scored: ScoredExamples,
    low: np.ndarray,
    high: np.ndarray,
    *,
    columns: Sequence[str],
) -> None:
    """One chunk, whole or not at all, with its moments; `columns` are those of the features that are written, too."""
    table = {
        "id": [example.id for example in examples],
        "row": [example.row for example in examples],
        "source": [example.source for example in examples],
        "label": pa.array([example.label for example in examples], pa.string()),
        "logit": scored.logits,
    }
    features = {f"feature {name}": np.where(scored.is_kept, scored.raw[:, k], np.nan) for k, name in enumerate(columns)}
    metadata = format_metadata(_moments(scored, low, high), {example_kind(example) for example in examples})
    with run_dir.atomic_replace(path) as part:
        pq.write_table(pa.table(table | features).replace_schema_metadata(metadata), part, write_page_checksum=True)


def format_metadata(moments: ColumnMoments, kinds: set[str]) -> Metadata:
    """What a file of scored examples holds beside its columns; `read_moments` reads it."""
    values = {key: np.asarray(value).tolist() for key, value in moments._asdict().items()}
    return {b"score": seals.format_json({"moments": values, "kinds": sorted(kinds)}).encode()}


def _moments(scored: ScoredExamples, low: np.ndarray, high: np.ndarray) -> ColumnMoments:
    raw, scaled = scored.raw[scored.is_kept], scored.scaled[scored.is_kept]
    if not len(raw):
        none = np.zeros(scored.raw.shape[1])
        return ColumnMoments(0, none, none, none + np.inf, none - np.inf, none.astype(int))
    mean = scaled.mean(0)
    return ColumnMoments(
        len(raw), mean, ((scaled - mean) ** 2).sum(0), raw.min(0), raw.max(0), ((raw < low) | (raw > high)).sum(0)
    )


def read_moments(paths: Sequence[Path]) -> tuple[ColumnMoments, set[str]]:
    """(the moments of all files together, by Chan's update in their order; the kinds of their examples)."""
    total: ColumnMoments | None = None
    kinds: set[str] = set()
    for path in paths:
        metadata = seals.parse_json(pq.read_schema(path).metadata[b"score"])
        kinds |= set(metadata["kinds"])
        fields = {key: np.array(value) for key, value in metadata["moments"].items()}
        new = ColumnMoments(int(fields.pop("num_examples")), **fields)
        total = new if total is None else _add_moments(total, new)
    assert total is not None
    return total, kinds


def _add_moments(one: ColumnMoments, other: ColumnMoments) -> ColumnMoments:
    count = one.num_examples + other.num_examples
    difference = other.mean - one.mean
    share = other.num_examples / max(1, count)
    return ColumnMoments(
        count,
        one.mean + share * difference,
        one.squares + other.squares + one.num_examples * share * difference**2,
        np.minimum(one.low, other.low),
        np.maximum(one.high, other.high),
        one.outside + other.outside,
    )


def read_columns(paths: Sequence[Path], *columns: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Some columns of each chunk, in order: of a chunk's own file, and of scores.parquet of each row group."""
    for path in paths:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=list(columns))
                yield tuple(np.array(table[name].to_pylist(), object) if name in ("id", "source", "label") else
                            table[name].to_numpy() for name in columns)  # fmt: skip


def kth_largest(values: Callable[[], Iterator[Float[np.ndarray, "chunk"]]], count: int) -> tuple[float, int]:
    """(the count-th largest of all values, how many are larger), exactly, in four passes of constant memory.

    `values()` begins the stream anew; nan is left out. A float's bits, with the sign made an order, sort as the floats
    do: each pass fixes 16 of them by a histogram of those that share what is fixed.
    """
    prefix, larger = 0, 0
    for position in range(4):
        shift = 64 - RADIX_BITS * (position + 1)
        histogram = np.zeros(1 << RADIX_BITS, np.int64)
        for chunk in values():
            keys = _sortable_bits(chunk[~np.isnan(chunk)])
            if position:
                keys = keys[keys >> np.uint64(shift + RADIX_BITS) == np.uint64(prefix)]
            digits = (keys >> np.uint64(shift)).astype(np.int64) & ((1 << RADIX_BITS) - 1)
            histogram += np.bincount(digits, minlength=1 << RADIX_BITS)
        from_top = np.cumsum(histogram[::-1])
        place = int(np.searchsorted(from_top, count - larger))
        larger += int(from_top[place] - histogram[::-1][place])
        prefix = (prefix << RADIX_BITS) | ((1 << RADIX_BITS) - 1 - place)
    return _from_sortable_bits(prefix), larger


def _sortable_bits(values: np.ndarray) -> np.ndarray:
    bits = (np.asarray(values, np.float64) + 0.0).view(np.uint64)  # -0 becomes 0
    return np.where(bits >> np.uint64(63) == 1, ~bits, bits | np.uint64(1 << 63))


def _from_sortable_bits(key: int) -> float:
    bits = key & ~(1 << 63) if key >> 63 else ~key & ((1 << 64) - 1)
    return float(np.array([bits], np.uint64).view(np.float64)[0])


def count_rows(paths: Sequence[str]) -> int | None:
    """The rows of some files without reading their text, for the progress bar; None where that takes a reading."""
    total = 0
    for path in paths:
        path = str(copies.local_path(path)) if urls.is_url(path) else path
        if not Path(path).is_file() or Path(path).suffix not in (".jsonl", ".parquet"):
            return None
        if Path(path).suffix == ".parquet":
            total += pq.read_metadata(path).num_rows
            continue
        with open(path, "rb") as file:
            total += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return total


def batched(examples: Iterator[Example], size: int) -> Iterator[tuple[int, list[Example]]]:
    """(number, examples) of each chunk of a stream."""
    for number in itertools.count():
        chunk = list(itertools.islice(examples, size))
        if not chunk:
            return
        yield number, chunk


def to_json(value: Any) -> str:
    """A line of JSON text that UTF-8 can hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace").decode() + "\n"
