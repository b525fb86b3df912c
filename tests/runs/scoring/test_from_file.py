"""Weights that a run is given: joined by id, made from scores, refused where they cannot be meant."""

import gzip
import json
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.runs.config.schema import WeightsSection
from bilevel_jax.runs.scoring.from_file import StreamedWeights, load_token_weights, load_weights, read_embeddings

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


def test_the_widest_scores_have_a_scale(file):
    out = load_weights(WeightsSection(file=file([-1.5e308, 1.5e308, 0.0, 0.0]), transform="minmax"), ROWS)
    assert out.weights.tolist() == [0, 1, 0.5, 0.5]


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
        ([1.0], ["zzz"], {}, r"none of its 1 ids, such as zzz, is that of a training example, such as id0"),
        ([1.0, 1.0], ["id0", "id0"], {}, r"w.parquet:2: the id id0 stands twice, first on line 1"),
        (
            [1.0, float("nan"), 1.0, 1.0],
            None,
            {},
            r"w.parquet:2: weight is absent, null or NaN for the training example id1 \(rows.jsonl:2\); a finite",
        ),
        (
            [1.0, -1.0, 1.0, 1.0],
            None,
            {},
            r"weight is -1, .*the weight -1, and a weight is 0 or more. If it is a score",
        ),
        ([0.0] * 4, None, {}, r"every weight is 0"),
        ([3.0] * 4, None, {"transform": "minmax"}, r"every score is 3, so min-max has no scale"),
        (["a"] * 4, None, {}, r"w.parquet:1: weight holds str 'a'; numbers are wanted"),
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
    with pytest.raises(ValueError, match=r"w.csv: the name must end in one of \['.json', '.jsonl', '.parquet'\]"):
        load_weights(WeightsSection(file=str(tmp_path / "w.csv")), ROWS)
    (tmp_path / "w.jsonl").write_text("{")
    with pytest.raises(ValueError, match="w.jsonl:1: bad JSON"):
        load_weights(WeightsSection(file=str(tmp_path / "w.jsonl")), ROWS)


@pytest.mark.parametrize("name", ["w.parquet", "w.jsonl"])
def test_columns_of_version_0_1_are_read_by_their_new_names(file, name):
    path = file([0.1, 0.2, 0.3, 0.4], name=name, column="first_entry")
    out = load_weights(WeightsSection(file=path, column="first_hypergradient"), ROWS)
    assert out.weights.tolist() == [0.1, 0.2, 0.3, 0.4]
    path = file([0.1, 0.2, 0.3, 0.4], name=f"new_{name}", column="hypergradient")
    with pytest.raises(ValueError, match="'entry' is called 'hypergradient' since 0.2"):
        load_weights(WeightsSection(file=path, column="entry"), ROWS)


# ---- every kind of file, at hand and streamed


def put_text(change):
    def put(path, rows):
        path.write_bytes(change("".join(json.dumps(row) + "\n" for row in rows)))
        return str(path)

    return put


def put_table(path, rows):
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}), path)
    return str(path)


def put_folder(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


FILES = {
    "w.jsonl": put_text(str.encode),
    "mark.jsonl": put_text(lambda text: b"\xef\xbb\xbf" + text.encode()),
    "separators.jsonl": put_text(lambda text: text.replace("__", "\u2028\u2029\u0085\x7f").encode()),
    "crlf.jsonl": put_text(lambda text: text.replace("\n", "\r\n\r\n").rstrip().encode()),
    "w.jsonl.gz": put_text(lambda text: gzip.compress(text.encode())),
    "w.json": put_text(lambda text: ("[" + ",\n".join(text.splitlines()) + "]").encode()),
    "w.json.gz": put_text(lambda text: gzip.compress(("[" + ",".join(text.splitlines()) + "]").encode())),
    "w.parquet": put_table,
    "folder": put_folder,
}


def weigh(config, examples, way):
    """The weights of the examples, None for those that are left out."""
    if way == "streamed":
        weights_of = StreamedWeights(config)
        weights = [weights_of(example) for example in examples]
        if last := [example for example, weight in zip(examples, weights, strict=True) if weight is not None]:
            weights_of.check_epoch(last[-1], sum(weight or 0 for weight in weights))
        return weights
    loaded = load_weights(config, examples)
    return [weight if kept else None for weight, kept in zip(loaded.weights, loaded.keep_mask, strict=True)]


WAYS = ("at hand", "streamed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_the_same_weights_from_every_kind_of_file(tmp_path, name, way):
    rows = [{"response": "a__b", "id": f"id{i}", "weight": 0.5 * i, "note": None if i else "x"} for i in (3, 1, 0, 2)]
    path = FILES[name](tmp_path / name, rows)
    assert weigh(WeightsSection(file=path), ROWS, way) == [0, 0.5, 1, 1.5]


BAD = {
    # name -> (values of the ids id0, id1, ...; options; words with the line; whether the line is named)
    "beyond any step": (
        [1, 1e300, 1, 1],
        {},
        ":2: weight is 1e+300, which gives the training example id1 (rows.jsonl:2) the weight 1e+300",
    ),
    "negative": ([1, -0.5, 1, 1], {}, ":2: weight is -0.5, which gives the training example id1 (rows.jsonl:2)"),
    "null": ([1, None, 1, 1], {}, ":2: weight is absent, null or NaN for the training example id1 (rows.jsonl:2); a"),
    "NaN": ([1, math.nan, 1, 1], {}, ":2: weight is absent, null or NaN for the training example id1"),
    "infinite": ([1, math.inf, 1, 1], {}, ":2: weight is inf for the training example id1 (rows.jsonl:2)"),
    "minus infinite": ([1, 1, 1, -math.inf], {}, ":4: weight is -inf for the training example id3"),
    "a null among scores": ([1, 2, None, 3], {"transform": "rank"}, ":3: weight is absent, null or NaN for"),
    "a score": ([1, 2, 3, 4], {"transform": "negate"}, ":1: weight is 1, which gives the training example id0"),
    "true": ([True] * 4, {}, ":1: weight holds bool True; numbers are wanted"),
    "text": (["0.5"] * 4, {}, ":1: weight holds str '0.5'; numbers are wanted"),
    "a list": ([[1.0]] * 4, {}, ":1: weight holds list [1.0]; numbers are wanted"),
    "zero": ([0, 0, 0, 0], {}, ": every weight is 0, so nothing would be learned. Choose another weights.column"),
    "zero or missing": ([0, 0], {"missing": "zero"}, ": every weight is 0, so nothing would be learned"),
    "zero or dropped": ([0, 0], {"missing": "drop"}, ": every weight is 0, so nothing would be learned"),
    "all equal": ([2, 2, 2, 2], {"transform": "minmax"}, ": every score is 2, so min-max has no scale"),
    "missing": ([1, 1, 1], {}, ": no weight for 1"),
    "no such column": ([1, 1, 1, 1], {"column": "wieght"}, ": no column 'wieght'; nearest: 'weight'; the columns are"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["w.jsonl", "w.json", "w.parquet"])
@pytest.mark.parametrize("kind", BAD)
def test_weights_that_cannot_be_meant_are_refused_in_the_same_words(tmp_path, kind, name, way):
    values, options, words = BAD[kind]
    path = FILES[name](tmp_path / name, [{"id": f"id{i}", "weight": value} for i, value in enumerate(values)])
    with pytest.raises(ValueError) as error:
        weigh(WeightsSection(file=path, **options), ROWS, way)
    assert str(error.value).startswith(path + words), str(error.value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"id": "id0", "weight": 1}, {"id": "id0", "weight": 1}], ":2: the id id0 stands twice, first on line 1; one"),
        ([{"id": 7, "weight": 1}, {"id": "7", "weight": 1}], ":2: the id 7 stands twice, first on line 1"),
        ([{"id": 0, "weight": 1}], ": none of its 1 ids, such as 0, is that of a training example, such as id"),
        ([{"id": "id0", "weight": 1}, {"weight": 1}], ":2: no 'id'; the keys are ['weight']. Each row is the id of"),
        ([{"id": None, "weight": 1}], ":1: no 'id'; the keys are ['weight']"),
        ([{"id": ["id0"], "weight": 1}], ":1: 'id' is list ['id0']; a string or a number is wanted"),
        ([{"weight": 1}], ":1: no 'id'"),
        ([1], ":1: the row is int 1; an object with an id and its weight is wanted."),
        ([{"id": "id0", "weight": 10**400}], ":1: weight is inf for the training example id0"),
        ([], ": no rows. Give one for each example, or leave the file out."),
    ],
)
def test_rows_of_a_weights_file_that_are_refused(tmp_path, rows, words, way):
    path = FILES["w.jsonl"](tmp_path / "w.jsonl", rows)
    with pytest.raises(ValueError) as error:
        weigh(WeightsSection(file=path, missing="one"), ROWS, way)
    assert str(error.value).startswith(path + words), str(error.value)


@pytest.mark.parametrize("name", ["w.jsonl", "w.parquet"])
def test_lists_are_joined_by_id(tmp_path, name):
    rows = [{"id": f"id{i}", "token_weights": [0.5, i, 2.0]} for i in (2, 0, 9)]
    path = FILES[name](tmp_path / name, rows)
    weights, note = load_token_weights(path, ROWS)
    assert {i: one.values.tolist() for i, one in weights.items()} == {"id0": [0.5, 0, 2], "id2": [0.5, 2, 2]}
    assert weights["id0"].where == f"{path}:2"
    assert note == (
        f"weights of tokens: of 2 of {len(ROWS)} training examples, from {name}; 1 id of the file is that of no "
        "training example."
    )


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"id": "id0", "token_weights": 0.5}], ":1: token_weights of the example id0 is float 0.5; a list of numbers"),
        ([{"id": "id0", "token_weights": []}], ":1: token_weights of the example id0 is list []; a list of numbers"),
        ([{"id": "id0", "token_weights": ["1"]}], ":1: token_weights of the example id0 is list ['1']; a list of num"),
        ([{"id": "id0", "token_weights": [True]}], ":1: token_weights of the example id0 is list [True]; a list of nu"),
        (
            [{"id": "id0", "token_weights": [1, float("nan")]}],
            ":1: token_weights of the example id0 holds nan at place 2; finite numbers are wanted.",
        ),
        ([{"id": "id0", "token_weights": [1]}, {"id": "id1"}], ":2: no token_weights for the example id1. Write one"),
        ([{"id": "id0", "token_weight": [1]}], ": no column 'token_weights'; nearest: 'token_weight'; the columns are"),
        ([{"id": "id0", "token_weights": [1]}] * 2, ":2: the id id0 stands twice, first on line 1"),
        ([{"token_weights": [1]}], ":1: no 'id'; the keys are ['token_weights']. Each row is the id of a training ex"),
        ([{"id": "x", "token_weights": [1]}], ": none of its 1 ids, such as x, is that of a training example, such as"),
        ([], ": no rows. Give one for each example"),
    ],
)
def test_lists_that_are_refused(tmp_path, rows, words):
    path = FILES["w.jsonl"](tmp_path / "t.jsonl", rows)
    with pytest.raises(ValueError) as error:
        load_token_weights(path, ROWS)
    assert str(error.value).startswith(path + words), str(error.value)


@pytest.mark.parametrize("name", ["w.jsonl", "w.parquet"])
def test_embeddings_are_joined_by_id(tmp_path, name):
    rows = [{"id": f"id{i}", "embedding": [float(i), 1.0]} for i in (3, 1, 0, 2)]
    embeddings = read_embeddings(FILES[name](tmp_path / name, rows))
    assert embeddings.width == 2 and embeddings.rows(ROWS).tolist() == [[0, 1], [1, 1], [2, 1], [3, 1]]
    assert embeddings.rows(ROWS[2:3]).tolist() == [[2, 1]] and embeddings.rows([]).shape == (0, 2)


@pytest.mark.parametrize(
    "vectors, words",
    [
        ([[1, 2], [1, 2, 3]], ":2: the embedding of the example id1 has 3 numbers, and that of id0 before it has 2."),
        ([[1, 2], [0, 0.0]], ":2: the embedding of the example id1 is all zeros, which is near nothing."),
        ([[1, 2], [1, float("nan")]], ":2: embedding of the example id1 holds nan at place 2; finite numbers are wan"),
        ([[1, 2]], ": no embedding for the example id1 (rows.jsonl:2), one of 3; it has 1 id, such as id0. An id"),
        ([[1, 2]] * 3, ": no embedding for the example id3 (rows.jsonl:4); it has 3 ids, such as id0. An id is"),
    ],
)
def test_embeddings_that_are_refused(tmp_path, vectors, words):
    rows = [{"id": f"id{i}", "embedding": vector} for i, vector in enumerate(vectors)]
    path = FILES["w.jsonl"](tmp_path / "e.jsonl", rows)
    with pytest.raises(ValueError) as error:
        read_embeddings(path).rows(ROWS)
    assert str(error.value).startswith(path + words), str(error.value)


def test_what_no_example_reads_is_no_error_and_is_counted(tmp_path):
    rows = [{"id": f"id{i}", "weight": 1.0 if i < 4 else None} for i in range(7)]
    path = FILES["w.jsonl"](tmp_path / "w.jsonl", rows)
    loaded = load_weights(WeightsSection(file=path), ROWS)
    assert loaded.weights.tolist() == [1] * 4 and loaded.num_unused == 3
    assert weigh(WeightsSection(file=path), ROWS, "streamed") == [1] * 4


@pytest.mark.parametrize("constant", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_constant_that_teaches_nothing_is_refused(constant, way):
    with pytest.raises(ValueError, match=r"weights.constant is .*; a finite number above 0 is wanted"):
        weigh(WeightsSection(constant=constant), ROWS, way)
