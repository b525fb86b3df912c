"""Labels: one spelling whatever the file, unknown where there is none, an error where they match nothing."""

import dataclasses
import gzip
import json
import math
from decimal import Decimal

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from bilevel_jax.lm.data.examples import load_examples, normalize_name, stream_examples
from bilevel_jax.lm.data.files import read_rows
from bilevel_jax.runs.config.schema import DataSection
from bilevel_jax.runs.tasks.evaluation import read_labels
from bilevel_jax.runs.tasks.splits import load_splits, make_data_options
from tests.lm.rows import lines, put


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "1.0", " 1 ", "true", "True", np.float64(1)])
def test_one_is_one_whatever_its_type(value):
    assert normalize_name(value) == "1"


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", "\t\n", np.float64("nan")])
def test_nothing_is_no_name(value):
    assert normalize_name(value) is None


def test_other_names():
    values = [
        0,
        0.0,
        False,
        "false",
        0.5,
        "v1.0",
        "1.50",
        "01",
        "nan",
        "None",
        10**30,
        -2.0,
        "clean\n",
        Decimal("1.50"),
        Decimal("2.0"),
    ]
    expected = ["0", "0", "0", "0", "0.5", "v1.0", "1.5", "01", "nan", "None", str(10**30), "-2", "clean", "1.5", "2"]
    assert [normalize_name(value) for value in values] == expected
    for value in ([1], {"a": 1}, b"clean", float("inf")):
        with pytest.raises(ValueError, match="a string or a number is wanted"):
            normalize_name(value)


@pytest.mark.parametrize(
    "values, name",
    [
        ((0, 0.0, -0.0, "-0.0", "-0", "0.00", np.int64(0), np.bool_(False)), "0"),
        ((1.5, "1.50", Decimal("1.500"), np.float32(1.5)), "1.5"),
        ((1e22, "1e22", "1e+22", 10**22), "1" + "0" * 22),
        ((1e23, "1e23", 10**23), "1" + "0" * 23),
        ((1e-7, "1e-07", "0.0000001"), "0.0000001"),
    ],
    ids=str,
)
def test_a_number_has_one_spelling(values, name):
    assert {normalize_name(value) for value in values} == {name}


def test_a_text_that_may_be_an_id_stays_as_it_is():
    for text in ("007", "007.0", "1_000", "+1", "1.", ".5", "12e4", "0x10", "1e9999", "\u0661", "inf", "-"):
        assert normalize_name(text) == text
    assert [normalize_name(value, is_id=True) for value in (True, "true", "True", 1, "1.0")] == [
        "true", "true", "True", "1", "1"
    ]  # fmt: skip


# ---- the same data in every kind of file

CHAT = [{"from": "human", "value": "a\u2028b", "note": None}, {"from": "gpt", "value": "c\u0085d"}]
LONG_CHAT = [*CHAT, CHAT[0] | {"value": "é"}, CHAT[1] | {"value": "f\r\ng"}]
ROWS = [
    {"conversations": CHAT, "label": 1, "source": "web", "system": None},
    {"conversations": LONG_CHAT, "label": None, "source": None},
    {"conversations": CHAT, "label": 0, "source": "", "system": "Be brief."},
    {"conversations": CHAT, "label": 1, "source": "web", "system": ""},
]
DEEP_ROWS = [
    {"a": [{"b": 1, "c": {"d": "x", "e": None}}, {"b": 2}], "f": True, "g": None},
    {"a": [{"c": {"e": 0.5}}, {"b": None, "c": None}], "g": "y", "f": None},
    {"a": None, "f": False, "g": None},
]


def put_parquet(folder, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def put_parquet_of_pandas(folder, rows):
    pandas.DataFrame(rows).to_parquet(folder / "rows.parquet")  # a column of whole numbers and nulls becomes floats
    return str(folder / "rows.parquet")


def put_folder(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "rows"))
    return str(folder / "rows")


def put_splits(folder, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "rows"))
    return str(folder / "rows@train")


def put_jsonl_of_pandas(folder, rows):
    pandas.DataFrame(rows).to_json(folder / "rows.jsonl", orient="records", lines=True)
    return str(folder / "rows.jsonl")


def put_with(folder, rows, change, name="rows.jsonl"):
    return put(folder, change(lines(*rows)), name)


FILES = {
    "jsonl": lambda folder, rows: put(folder, lines(*rows)),
    "not escaped": lambda folder, rows: put(folder, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    "absent keys": lambda folder, rows: put(
        folder, lines(*({key: value for key, value in row.items() if value is not None} for row in rows))
    ),
    "NaN": lambda folder, rows: put_with(folder, rows, lambda text: text.replace('"label": null', '"label": NaN')),
    "booleans": lambda folder, rows: put_with(
        folder, rows, lambda text: text.replace('"label": 1', '"label": true').replace('"label": 0', '"label": false')
    ),
    "floats": lambda folder, rows: put_with(folder, rows, lambda text: text.replace('"label": 1', '"label": 1.0')),
    "texts": lambda folder, rows: put_with(folder, rows, lambda text: text.replace('"label": 1', '"label": "1"')),
    "CRLF and blank lines": lambda folder, rows: put_with(folder, rows, lambda text: text.replace("\n", "\r\n \r\n")),
    "a byte order mark": lambda folder, rows: put_with(folder, rows, lambda text: "\ufeff" + text.rstrip()),
    "gzip": lambda folder, rows: put_with(folder, rows, lambda text: gzip.compress(text.encode()), "rows.jsonl.gz"),
    "json": lambda folder, rows: put(folder, json.dumps(rows, indent=2), "rows.json"),
    "json not escaped": lambda folder, rows: put(folder, "\ufeff" + json.dumps(rows, ensure_ascii=False), "rows.json"),
    "instances": lambda folder, rows: put(
        folder, json.dumps({"about": {"instances": [3]}, "instances": rows}), "rows.json"
    ),
    "json.gz": lambda folder, rows: put(folder, gzip.compress(json.dumps(rows).encode()), "rows.json.gz"),
    "jsonl of pandas": put_jsonl_of_pandas,
    "parquet": put_parquet,
    "parquet of pandas": put_parquet_of_pandas,
    "folder": put_folder,
    "folder of splits": put_splits,
}  # fmt: skip


@pytest.mark.parametrize("read", [load_examples, stream_examples])
@pytest.mark.parametrize("kind", FILES)
def test_the_same_rows_are_the_same_examples_in_every_kind_of_file(tmp_path, kind, read):
    (tmp_path / "plain").mkdir()
    plain = load_examples([put(tmp_path / "plain", lines(*ROWS))])
    assert [e.label for e in plain] == ["1", None, "0", "1"]
    assert [e.source for e in plain] == ["web", "rows", "rows", "web"]
    assert [e.turns[0].role for e in plain] == ["user", "user", "system", "user"]
    examples = list(read([FILES[kind](tmp_path, ROWS)]))
    assert [e._replace(file="", line=0) for e in examples] == [e._replace(file="", line=0) for e in plain]


@pytest.mark.parametrize("kind", FILES)
def test_keys_without_a_value_are_absent_at_any_depth(tmp_path, kind):
    rows = [row for _, row in read_rows(FILES[kind](tmp_path, DEEP_ROWS))]
    assert rows == [
        {"a": [{"b": 1, "c": {"d": "x"}}, {"b": 2}], "f": True},
        {"a": [{"c": {"e": 0.5}}, {}], "g": "y"},
        {"f": False},
    ]


# ---- what is labelled


@dataclasses.dataclass
class LabelledRows:
    examples: list
    untrained: tuple = ()

    def trainable_indices(self):
        return np.array([row for row in range(len(self.examples)) if row not in self.untrained])


def auc_by_hand(scores, labels, good):
    """The share of pairs (good, labelled otherwise) in which the good one is above, ties half."""
    pairs = [
        (a > b) + (a == b) / 2
        for a, mine in zip(scores, labels, strict=True)
        for b, other in zip(scores, labels, strict=True)
        if mine == good and other not in (good, None)
    ]
    return sum(pairs) / len(pairs)


def labelled(tmp_path, values, good="clean", untrained=()):
    rows = [{"prompt": f"p{i}", "response": "r", "label": value} for i, value in enumerate(values)]
    config = DataSection(train=(put(tmp_path, lines(*rows)),), label_field="label", good_label=good)
    return read_labels(LabelledRows(load_splits(config).train, untrained), config)


def test_auc_reads_the_labelled_examples_alone(tmp_path):
    values = ["clean", None, "noise", "clean", "", "swap", float("nan"), "noise", "clean"]
    names = [None if value in (None, "") or value != value else value for value in values]
    scores = np.array([0.5, 9.0, 0.4, 0.3, -9.0, 0.3, 9.0, 0.1, 0.9])
    labels = labelled(tmp_path, values)
    assert labels.auc(scores) == pytest.approx(auc_by_hand(scores, names, "clean"), abs=1e-12)
    assert labels.to_counts() == {"good": 3, "other": 3, "unlabelled": 3}
    moved = np.where(labels.labelled, scores, np.linspace(-5, 5, 9))  # what nobody knows changes nothing
    assert labels.auc(moved) == labels.auc(scores)
    assert labels.f1(scores > 0.35) == 2 * 2 / (3 + 3) and labels.f1(moved > 0.35) == labels.f1(scores > 0.35)


def test_examples_that_are_not_trained_on_do_not_count(tmp_path):
    labels = labelled(tmp_path, ["clean", "noise", "clean", None], untrained=(2, 3))
    assert labels.to_counts() == {"good": 1, "other": 1, "unlabelled": 0}
    assert labels.auc(np.array([1.0, 0.0, np.nan, np.nan])) == 1


def test_of_one_kind_there_is_no_auc(tmp_path):
    assert math.isnan(labelled(tmp_path, ["clean", None, "clean"]).auc(np.arange(3.0)))


@pytest.mark.parametrize("good", ["1", "1.0", "true", "True"])
@pytest.mark.parametrize("values", [[1, 0, None], [1.0, 0.0, None], [True, False, None], ["1", "0", ""]])
def test_the_good_label_fits_whatever_its_type(tmp_path, good, values):
    assert labelled(tmp_path, values, good).to_counts() == {"good": 1, "other": 1, "unlabelled": 1}


def split(tmp_path, rows, **options):
    return load_splits(DataSection(train=(put(tmp_path, lines(*rows)),), **options))


ROW = {"prompt": "p", "response": "r", "quality": "clean", "origin": "web", "label": None}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "options, said",
    [
        ({"label_field": "qualty"}, "data.label_field is 'qualty', and no training example has a value under that key; "
         "nearest: 'quality'; the keys are ['origin', 'prompt', 'quality', 'response']. Set data.label_field to one"),
        ({"label_field": "label"}, "data.label_field is 'label', and no training example has a value under that key"),
        ({"source_field": "orign"}, "data.source_field is 'orign', and no training example has a value under that key"),
        ({"system_field": "systm"}, "data.system_field is 'systm', and no row has a value under that key"),
    ],
)  # fmt: skip
def test_a_field_that_no_row_has_is_an_error(tmp_path, options, said, streaming):
    with pytest.raises(ValueError) as error:
        split(tmp_path, [ROW, ROW | {"prompt": "q"}], streaming=streaming, **options)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "good, said",
    [
        ("cleen", "data.good_label is 'cleen', and no training example has that label under 'quality'; nearest: "
         "'clean'; the labels are 'clean' (2), 'noise' (1). Set data.good_label to the label of good examples"),
        ("1", "data.good_label is '1', and no training example has that label under 'quality'; the labels are"),
        ("", "data.good_label is '', and no training example has that label"),
    ],
)  # fmt: skip
def test_a_good_label_that_no_example_has_is_an_error(tmp_path, good, said):
    rows = [ROW | {"prompt": f"{i}", "quality": quality} for i, quality in enumerate(["clean", "noise", None, "clean"])]
    with pytest.raises(ValueError) as error:
        split(tmp_path, rows, label_field="quality", good_label=good)
    assert str(error.value).startswith(said)


def test_fields_by_default_may_be_absent(tmp_path):
    dataset = split(tmp_path, [{"prompt": "p", "response": "r"}])
    assert [(e.label, e.source) for e in dataset.train] == [(None, "rows")]


def test_a_stream_may_have_a_field_in_later_rows(tmp_path):
    rows = [{"prompt": f"{i}", "response": "r"} for i in range(1000)]
    notes = split(tmp_path, [*rows, ROW], label_field="quality", streaming=True).notes
    assert notes[-1].startswith("of the first 1,000 rows: data.label_field is 'quality', and no")


def test_the_summary_says_how_many_have_no_label(tmp_path):
    rows = [ROW | {"prompt": f"{i}", "quality": quality} for i, quality in enumerate(["clean", None, "noise", None])]
    notes = split(tmp_path, rows, label_field="quality").notes
    assert "labels clean, noise; 2 without a label" in notes[0]
    assert notes[1] == (
        "2 of 4 training examples have no label: AUC, F1 and the oracle rest on the other 2 alone, of which 1 are good."
    )


def test_options_reach_the_reader():
    config = DataSection(label_field="quality", system_field="")
    assert make_data_options(config).label_field == "quality" and make_data_options(config).system_field == ""
