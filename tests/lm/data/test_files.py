"""Rows of every kind of file, in and out; what cannot be read or written is an error with a remedy."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bilevel_jax.lm.data.examples import load_examples, stream_examples
from bilevel_jax.lm.data.files import FILE_WRITERS, read_rows, source_name, write_rows
from bilevel_jax.lm.data.turns import Turn
from tests.lm.rows import lines, put

GOOD = {"prompt": "a", "response": "b"}


def put_folder(folder, rows, name):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / name))
    return str(folder / name)


def put_split(folder, rows, name):
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / name))
    return str(folder / name) + "@validation"


def put_parquet(folder, rows, name):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


FILES = {
    "jsonl": lambda folder, rows, name: put(folder, "\n" + lines(*rows), f"{name}.jsonl"),
    "json": lambda folder, rows, name: put(folder, json.dumps(rows, indent=1), f"{name}.json"),
    "instances": lambda folder, rows, name: put(
        folder, json.dumps({"type": "text2text", "instances": rows}), f"{name}.json"
    ),
    "bom": lambda folder, rows, name: put(folder, b"\xef\xbb\xbf" + json.dumps(rows).encode(), f"{name}.json"),
    "jsonl.gz": lambda folder, rows, name: put(folder, gzip.compress(lines(*rows).encode()), f"{name}.jsonl.gz"),
    "json.gz": lambda folder, rows, name: put(folder, gzip.compress(json.dumps(rows).encode()), f"{name}.json.gz"),
    "parquet": put_parquet,
    "folder": put_folder,
    "split": put_split,
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("reader", [load_examples, stream_examples])
def test_file(tmp_path, kind, reader):
    rows = [
        {"prompt": f"p{i}\n[", "response": f"r\u2028é{i}", "source": "web" if i else None, "label": i} for i in range(3)
    ]
    examples = list(reader([FILES[kind](tmp_path, rows, "mine")]))
    assert [tuple(t.content for t in e.turns) for e in examples] == [(r["prompt"], r["response"]) for r in rows]
    assert [e.source for e in examples] == ["mine", "web", "web"]
    assert [e.label for e in examples] == ["0", "1", "2"]
    assert [e.row for e in examples] == [0, 1, 2]


def test_json_of_strings_is_text(tmp_path):
    examples = load_examples([put(tmp_path, json.dumps(["a", "b"]), "s.json"), put(tmp_path, lines("c"), "t.jsonl")])
    assert [(e.turns[0], e.row, e.source) for e in examples] == [
        (Turn("text", t), i, s) for i, (t, s) in enumerate(zip("abc", "sst", strict=True))
    ]


def test_json_knows_the_line_of_each_row(tmp_path):
    text = '{"note": "[",\n "instances":\n [{"text":\n "a"},\n\n {"text": "b"}, {"text": "c"}\n]}'
    assert [e.line for e in load_examples([put(tmp_path, text, "a.json")])] == [3, 6, 6]
    assert [e.line for e in load_examples([put(tmp_path, '\n[\n"a",\n"b\\n",\n"c"]', "b.json")])] == [3, 4, 5]


def test_errors_of_files(tmp_path):
    put(tmp_path, lines(GOOD), "train.jsonl")
    put(tmp_path, lines(GOOD, GOOD), "lines.json")
    put(tmp_path, '{"a": 1}', "object.json")
    put(tmp_path, "x", "rows.csv")
    put(tmp_path, "x", "rows.parquet")
    put(tmp_path, "x", "plain.jsonl.gz")
    put(tmp_path, gzip.compress(lines(GOOD).encode())[:-9], "half.jsonl.gz")
    both = put_split(tmp_path, [GOOD], "both").removesuffix("@validation")
    table = [
        (FileNotFoundError, str(tmp_path / "trian.jsonl"), "no such file. Nearest in", "train.jsonl"),
        (FileNotFoundError, str(tmp_path / "no" / "a.jsonl"), "There is no folder", "either"),
        (ValueError, str(tmp_path / "lines.json"), "lines.json:2: bad JSON, Extra data", "the .jsonl format: rename"),
        (ValueError, str(tmp_path / "object.json"), "an object with a list 'instances', is wanted", "object.json"),
        (ValueError, str(tmp_path / "rows.csv"), "the name must end in one of", ".parquet"),
        (ValueError, str(tmp_path / "rows.parquet"), "the file cannot be read as parquet", "rows.parquet"),
        (ValueError, str(tmp_path / "plain.jsonl.gz"), "not a whole gzip file", "Pack it anew"),
        (ValueError, str(tmp_path / "half.jsonl.gz"), "not a whole gzip file", "half.jsonl.gz"),
        (ValueError, str(tmp_path), "not one that `datasets.save_to_disk` wrote", "rows.parquet"),
        (ValueError, both, "no split asked for; it has ['validation']", "@NAME"),
        (ValueError, "hub:owner/name", "is written hub:name@split", "hub:name:config@split"),
    ]
    for kind, path, *texts in table:
        with pytest.raises(kind) as error:
            load_examples([path])
        assert all(text in str(error.value) for text in texts), str(error.value)


ROWS = [
    {"messages": [{"role": "user", "content": "hi\u2028"}, {"role": "assistant", "content": "ho"}], "id": "a#0"},
    {"messages": [{"role": "user", "content": "é\n"}], "weight": 0.5},
]
ENDS = {"jsonl": "out.jsonl", "json": "out.json", "parquet": "out.parquet", "folder": "out"}


@pytest.mark.parametrize("kind", FILE_WRITERS)
def test_what_is_written_is_read(tmp_path, kind):
    path = tmp_path / ENDS[kind]
    write_rows(path, iter(ROWS), kind)
    back = [row for _, row in read_rows(str(path))]
    assert back == ROWS  # a table has every column, and its nulls are absent keys
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [ENDS[kind]]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_surrogate_pair_is_written_as_its_escape_and_named_when_read(tmp_path, kind):
    path = tmp_path / ENDS[kind]
    write_rows(path, [{"text": "a"}, {"text": "\ud83d"}], kind)
    assert b"\\ud83d" in path.read_bytes()
    with pytest.raises(ValueError, match=r"half of a surrogate pair.*Remove it"):
        list(read_rows(str(path)))
    both_halves = '{"text": "\\ud83d\\ude00"}'
    path.write_text(both_halves if kind == "jsonl" else f"[{both_halves}]")
    assert [row for _, row in read_rows(str(path))] == [{"text": "😀"}]


def test_errors_of_writing(tmp_path):
    table = [
        ([GOOD], "csv", "written as 'csv'; it is one of ['jsonl', 'json', 'parquet', 'folder']."),
        ([], "jsonl", "no rows to write."),
        ([{"a": "x"}, {"a": 1}], "parquet", "the column 'a' cannot be written as a table"),
        ([{"a": "\ud83d"}], "folder", "the column 'a' cannot be written as a table"),
    ]
    for rows, kind, text in table:
        with pytest.raises(ValueError) as error:
            write_rows(tmp_path / "out", rows, kind)
        assert text in str(error.value)


def test_stem():
    assert [source_name(path) for path in ("a/b.jsonl.gz", "hub:o/n:c@train", "a/set@validation")] == [
        "b",
        "n:c",
        "set",
    ]
