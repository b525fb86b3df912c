"""Weights that a run is given: joined by id, made from scores, refused where they cannot be meant."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.runs.config.schema import WeightsSection
from bilevel_jax.runs.scoring.from_file import load_weights

ROWS = [Example(f"id{i}", i, (Turn("text", "x"),), "s", None, "rows.jsonl", i + 1) for i in range(4)]


@pytest.fixture
def file(tmp_path):
    def write(values, ids=None, name="w.parquet", column="weight"):
        ids = [row.id for row in ROWS][: len(values)] if ids is None else ids
        path = tmp_path / name
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"id": ids, column: values}), path)
        else:
            rows = [{"id": i, column: v} for i, v in zip(ids, values, strict=True)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(json.dumps(rows) if name.endswith(".json") else lines)
        return str(path)

    return write


def test_a_constant():
    out = load_weights(WeightsSection(constant=0.5), ROWS)
    assert out.weights.tolist() == [0.5] * 4 and out.keep_mask.all() and out.source == "0.5 for every example"


@pytest.mark.parametrize("name", ["w.parquet", "w.jsonl", "w.json"])
def test_joined_by_id_from_every_kind_of_file(file, name):
    path = file([4.0, 3.0, 2.0, 1.0, 9.0], ["id3", "id2", "id1", "id0", "other"], name)
    assert load_weights(WeightsSection(file=path), ROWS).weights.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "transform, expected",
    [
        ("none", [0.0, 5.0, 5.0, 10.0]),
        ("minmax", [0.0, 0.5, 0.5, 1.0]),
        ("rank", [0.125, 0.5, 0.5, 0.875]),  # the middle of a tie's places, over the rows
    ],
)
def test_scores_become_weights(file, transform, expected):
    path = file([0.0, 5.0, 5.0, 10.0], column="score")
    out = load_weights(WeightsSection(file=path, column="score", transform=transform), ROWS)
    assert out.weights.tolist() == expected


def test_negated_and_scaled(file):
    out = load_weights(WeightsSection(file=file([-1.0, -2.0, -3.0, -2.0]), transform="negate", mean_one=True), ROWS)
    assert out.weights.tolist() == [0.5, 1.0, 1.5, 1.0]
    assert out.source.endswith(", negated, divided by their mean")


@pytest.mark.parametrize(
    "missing, weights, kept", [("one", [2, 1, 1, 1], 4), ("zero", [2, 0, 0, 0], 4), ("drop", [2, 0, 0, 0], 1)]
)
def test_rows_that_the_file_lacks(file, missing, weights, kept):
    out = load_weights(WeightsSection(file=file([2.0]), missing=missing), ROWS)
    assert out.weights.tolist() == weights and out.keep_mask.sum() == kept and out.num_missing == 3


def test_scaling_reads_the_kept_rows_alone(file):
    out = load_weights(WeightsSection(file=file([2.0, 4.0]), missing="drop", mean_one=True), ROWS)
    assert out.weights[out.keep_mask].tolist() == [2 / 3, 4 / 3]


@pytest.mark.parametrize(
    "values, ids, options, said",
    [
        (
            [1.0],
            None,
            {},
            r"no weight for 3 of 4 training examples, the first id1 at rows.jsonl:2. Set weights.missing",
        ),
        ([1.0], ["zzz"], {}, r"none of its 1 ids is that of a training example, such as id0"),
        ([1.0, 1.0], ["id0", "id0"], {}, r"the id id0 stands twice"),
        ([1.0, float("nan"), 1.0, 1.0], None, {}, r"weight is nan for 1 training examples, the first id1"),
        ([1.0, -1.0, 1.0, 1.0], None, {}, r"the weight -1, and a weight is 0 or more. If it is a score"),
        ([0.0] * 4, None, {}, r"every weight is 0"),
        ([3.0] * 4, None, {"transform": "minmax"}, r"every score is 3, so min-max has no scale"),
        (["a"] * 4, None, {}, r"weight holds 'a'; numbers are wanted"),
        ([1.0] * 4, None, {"column": "score"}, r"no column 'score'; the columns are \['id', 'weight'\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(file, values, ids, options, said):
    with pytest.raises(ValueError, match=said):
        load_weights(WeightsSection(file=file(values, ids), **options), ROWS)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.parquet: no such file"):
        load_weights(WeightsSection(file="nowhere.parquet"), ROWS)
    (tmp_path / "w.csv").write_text("id,weight")
    with pytest.raises(ValueError, match=r"read from .parquet, .jsonl or .json, not from '.csv'"):
        load_weights(WeightsSection(file=str(tmp_path / "w.csv")), ROWS)
    (tmp_path / "w.jsonl").write_text("{")
    with pytest.raises(ValueError, match="bad JSON"):
        load_weights(WeightsSection(file=str(tmp_path / "w.jsonl")), ROWS)


@pytest.mark.parametrize("name", ["w.parquet", "w.jsonl"])
def test_columns_of_version_0_1_are_read_by_their_new_names(file, name):
    path = file([0.1, 0.2, 0.3, 0.4], name=name, column="first_entry")
    out = load_weights(WeightsSection(file=path, column="first_hypergradient"), ROWS)
    assert out.weights.tolist() == [0.1, 0.2, 0.3, 0.4]
    path = file([0.1, 0.2, 0.3, 0.4], name=f"new_{name}", column="hypergradient")
    with pytest.raises(ValueError, match="'entry' is called 'hypergradient' since 0.2"):
        load_weights(WeightsSection(file=path, column="entry"), ROWS)
