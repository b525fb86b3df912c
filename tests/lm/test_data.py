"""Rows of every layout and file become Examples; what cannot be used is an error with file, line and remedy."""

import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_jax.lm.data import DataOptions, Turn, duplicates, kind_of, leaks, load, split, summary

PAIR = (Turn("user", "1 + 1?"), Turn("assistant", "2"))
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
CHAT += [{"role": "assistant", "content": "ho"}]
QA = DataOptions(prompt_field="question", response_field="answer")

LAYOUTS = [
    ({"prompt": "1 + 1?", "response": "2"}, DataOptions(), PAIR),
    ({"question": "1 + 1?", "answer": "2"}, QA, PAIR),
    ({"prompt": "1 + 1?", "completion": "2"}, DataOptions(response_field="completion"), PAIR),
    ({"instruction": "1 + 1?", "output": "2"}, DataOptions(), PAIR),
    ({"instruction": "1 + 1?", "input": "", "output": "2"}, DataOptions(), PAIR),
    ({"instruction": "1 + 1?", "input": None, "output": "2"}, DataOptions(), PAIR),
    ({"instruction": "Add.", "input": "1, 1", "output": "2"}, DataOptions(), (Turn("user", "Add.\n1, 1"), PAIR[1])),
    ({"text": "Once."}, DataOptions(), (Turn("text", "Once."),)),
    ({"story": "Once."}, DataOptions(text_field="story"), (Turn("text", "Once."),)),
    ({"messages": CHAT}, DataOptions(), tuple(Turn(**m) for m in CHAT)),
    ({"text": "Once.", "prompt": "a", "response": "b"}, DataOptions(format="text"), (Turn("text", "Once."),)),
]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(folder, text, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("row, options, turns", LAYOUTS)
def test_layout(tmp_path, row, options, turns):
    (example,) = load([put(tmp_path, lines(row))], options)
    assert example.turns == turns
    assert (example.row, example.line, example.source, example.label) == (0, 1, "rows", None)
    assert kind_of(example) == {1: "text", 2: "prompt", 3: "chat"}[len(turns)]


def write_folder(folder, rows, name):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / name))
    return str(folder / name)


def write_split(folder, rows, name):
    datasets.DatasetDict({"fit": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / name))
    return str(folder / name) + "@fit"


def write_parquet(folder, rows, name):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    return str(folder / f"{name}.parquet")


WRITERS = {
    "jsonl": lambda folder, rows, name: put(folder, "\n" + lines(*rows), f"{name}.jsonl"),
    "json": lambda folder, rows, name: put(folder, json.dumps(rows, indent=1), f"{name}.json"),
    "instances": lambda folder, rows, name: put(
        folder, json.dumps({"type": "text2text", "instances": rows}), f"{name}.json"
    ),
    "bom": lambda folder, rows, name: put(folder, b"\xef\xbb\xbf" + json.dumps(rows).encode(), f"{name}.json"),
    "parquet": write_parquet,
    "folder": write_folder,
    "split": write_split,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_file(tmp_path, writer):
    rows = [
        {"prompt": f"p{i}\n[", "response": f"r\u2028é{i}", "source": "web" if i else None, "label": i} for i in range(3)
    ]
    examples = load([WRITERS[writer](tmp_path, rows, "mine")])
    assert [tuple(t.content for t in e.turns) for e in examples] == [(r["prompt"], r["response"]) for r in rows]
    assert [e.source for e in examples] == ["mine", "web", "web"]
    assert [e.label for e in examples] == ["0", "1", "2"]
    assert [e.row for e in examples] == [0, 1, 2]


def test_json_of_strings_is_text(tmp_path):
    examples = load([put(tmp_path, json.dumps(["a", "b"]), "s.json"), put(tmp_path, lines("c"), "t.jsonl")])
    assert [(e.turns[0], e.row, e.source) for e in examples] == [
        (Turn("text", t), i, s) for i, (t, s) in enumerate(zip("abc", "sst", strict=True))
    ]


def test_json_knows_the_line_of_each_row(tmp_path):
    text = '{"note": "[",\n "instances":\n [{"text":\n "a"},\n\n {"text": "b"}, {"text": "c"}\n]}'
    assert [e.line for e in load([put(tmp_path, text, "a.json")])] == [3, 6, 6]
    assert [e.line for e in load([put(tmp_path, '\n[\n"a",\n"b\\n",\n"c"]', "b.json")])] == [3, 4, 5]


GOOD = {"prompt": "a", "response": "b"}
KEYS = "Set data.prompt_field and data.response_field, or data.text_field, to your names."
ERRORS = [
    ("", "rows.jsonl: no rows."),
    (lines(*[GOOD] * 6) + '{"prompt": \n', "rows.jsonl:7: bad JSON, Expecting value at column 11. Mend that line."),
    (
        lines(GOOD, {"prompt": "a", "reply": "b"}),
        "rows.jsonl:2: no 'response'; the keys are ['prompt', 'reply']. Set data.response_field to one of them.",
    ),
    (lines({"prompt": "a", "reply": "b"}), "rows.jsonl:1: no 'response'; the keys are ['prompt', 'reply']. Set data."),
    (lines({"q": "a", "a": "b"}), "rows.jsonl:1: no known layout; the keys are ['a', 'q'], and 'messages', 'prompt'"),
    (lines({"q": "a", "a": "b"}), KEYS),
    (lines(GOOD | {"text": "c"}), "fit the formats ['prompt', 'text']. Set data.format to one of them."),
    (lines(GOOD, GOOD | {"response": " \n"}), "rows.jsonl:2: 'response' is empty, so there is nothing to learn from."),
    (lines({"text": ""}), "rows.jsonl:1: 'text' is empty"),
    (lines(GOOD | {"response": 3}), "rows.jsonl:1: 'response' is int 3; a string is wanted."),
    (lines(GOOD | {"response": None}), "rows.jsonl:1: 'response' is NoneType None; a string is wanted."),
    (lines(GOOD | {"source": ["x"]}), "rows.jsonl:1: 'source' is list ['x']; a string or a number is wanted."),
    (lines(GOOD, "text"), "rows.jsonl:2: a bare string among prompt rows. Keep one layout per file."),
    (lines({"text": "a"}, GOOD), "rows.jsonl:2: no 'text'; the keys are ['prompt', 'response']."),
    (lines({"instruction": "a", "output": "b"}, GOOD), "rows.jsonl:2: no 'instruction'; the keys are"),
    (lines({"messages": CHAT}, GOOD), "rows.jsonl:2: no 'messages'; the keys are"),
    (lines([1, 2]), "rows.jsonl:1: the row is list [1, 2]; a JSON object"),
    (lines({"messages": []}), "'messages' is list []; a list of {role, content} objects is wanted."),
    (lines({"messages": [{"role": "user"}]}), "message 1 is dict {'role': 'user'}; an object with role and content"),
    (
        lines({"messages": [{"role": "human", "content": "a"}]}),
        "message 1 has role str 'human'; the roles are ['system', 'user', 'assistant']. Rename it.",
    ),
    (lines({"messages": [*CHAT[1:], CHAT[0]]}), "message 3 is a system message; only the first one may be."),
    (lines({"messages": CHAT[:2]}), "the last message has role 'user'; training needs an answer."),
    (lines({"messages": [{"role": "assistant", "content": ""}]}), "'content of message 1' is empty"),
    (b'{"text": "\xff"}\n', "rows.jsonl:1: not UTF-8 (byte 10). Convert the file to UTF-8."),
]


@pytest.mark.parametrize("text, message", ERRORS)
def test_error_in_a_row(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        load([put(tmp_path, text)])
    assert message in str(error.value)


def test_errors_of_files(tmp_path):
    put(tmp_path, lines(GOOD), "train.jsonl")
    put(tmp_path, lines(GOOD, GOOD), "lines.json")
    put(tmp_path, '{"a": 1}', "object.json")
    put(tmp_path, "x", "rows.csv")
    put(tmp_path, "x", "rows.parquet")
    both = write_split(tmp_path, [GOOD], "both").removesuffix("@fit")
    table = [
        (FileNotFoundError, str(tmp_path / "trian.jsonl"), "no such file. Nearest in", "train.jsonl"),
        (FileNotFoundError, str(tmp_path / "no" / "a.jsonl"), "There is no folder", "either"),
        (ValueError, str(tmp_path / "lines.json"), "lines.json:2: bad JSON, Extra data", "the .jsonl format: rename"),
        (ValueError, str(tmp_path / "object.json"), "an object with a list 'instances', is wanted", "object.json"),
        (ValueError, str(tmp_path / "rows.csv"), "the name must end in one of", ".parquet"),
        (ValueError, str(tmp_path / "rows.parquet"), "not a parquet file", "rows.parquet"),
        (ValueError, str(tmp_path), "not one that `datasets.save_to_disk` wrote", "lines.json"),
        (ValueError, both, "no split asked for; it has ['fit']", "@NAME"),
        (ValueError, "hub:owner/name", "is written hub:name@split", "hub:name:config@split"),
    ]
    for kind, path, *texts in table:
        with pytest.raises(kind) as error:
            load([path])
        assert all(text in str(error.value) for text in texts), str(error.value)
    for paths, options, text in [
        ("a.jsonl", DataOptions(), "a list of paths is wanted"),
        ([], DataOptions(), "no data paths were given"),
        (["a"], DataOptions(format="csv"), "data.format is 'csv'; it is one of ['auto', 'chat'"),
        (["a"], DataOptions(empty="skip"), "data.empty is 'skip'; it is one of ['error', 'drop']."),
    ]:
        with pytest.raises(ValueError) as error:
            load(paths, options)
        assert text in str(error.value)


def test_hub_name_without_a_network_says_what_to_do(monkeypatch):
    def offline(name, config, split):
        raise ConnectionError(f"cannot reach {name} {config} {split}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"hub:o/n:c@train\[:9\]: the hub gave .*cannot reach o/n c train\[:9\].*network"
    ):
        load(["hub:o/n:c@train[:9]"])


def test_empty_rows_can_be_dropped(tmp_path):
    path = put(tmp_path, lines(GOOD, GOOD | {"response": ""}, {"prompt": "c", "response": "d"}))
    examples = load([path], DataOptions(empty="drop"))
    assert [(e.row, e.line) for e in examples] == [(0, 1), (1, 3)]


def test_ids_belong_to_the_content(tmp_path):
    rows = [{"prompt": f"p{i % 7}", "response": "r", "source": f"s{i}", "label": f"l{i}"} for i in range(10)]
    first = load([put(tmp_path, lines(*rows))])
    assert [e.id.split("#")[1] for e in first] == ["0"] * 7 + ["1"] * 3
    random.Random(0).shuffle(rows)
    bare = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "r"}]} for r in rows
    ]
    second = load([put(tmp_path, lines(*bare))])
    assert {(e.id, e.turns) for e in first} == {(e.id, e.turns) for e in second}  # whatever order, layout, source
    assert len({e.id for e in first}) == 10
    assert first[0].id == "9610a0242db8ea82#0"  # written in old runs: must never change
    assert [[e.row for e in group] for group in duplicates(first)] == [[0, 7], [1, 8], [2, 9]]
    assert summary(first) == "10 rows; 10 prompt; 10 sources; labels l0, l1, l2, l3, l4, l5, l6, l7; " + (
        "3 are copies of an earlier row"
    )


def test_leaks_are_found_whatever_the_layout_case_and_spaces(tmp_path):
    validation = load([put(tmp_path, lines({"prompt": "What is\n it?", "response": "A  Cat"}))])
    rows = [
        {"text": "what is it? a cat"},
        {"text": "what is it? a cat."},
    ]
    train = load([put(tmp_path, lines(*rows), "text.jsonl")])
    chats = [
        {"messages": [CHAT[0], {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": a}]}
        for a in ("a cat", "a dog")
    ]
    train += load([put(tmp_path, lines(*chats), "chat.jsonl")])
    assert [(a.where.split("/")[-1], b.line) for a, b in leaks(train, validation)] == [
        ("text.jsonl:1", 1),
        ("chat.jsonl:1", 1),
    ]


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 5))
def test_split_depends_on_content_alone(rows, shuffler, seed):
    whole = split(rows, (0.5, 0.3, 0.2), seed)
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    again = split(shuffled[:200], (0.5, 0.3, 0.2), seed)
    for part, other in zip(whole, again, strict=True):
        assert {e.id for e in other} <= {e.id for e in part}
        assert [e.row for e in other] == list(range(len(other)))
    assert sum(map(len, whole)) == len(rows)
    assert not leaks(whole[0], whole[1] + whole[2]) and not leaks(whole[1], whole[2])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """300 rows, of which 100 say the same as another in capitals."""
    rows = [{"text": f"row {i}" if i < 200 else f"ROW  {i - 200}"} for i in range(300)]
    return load([put(tmp_path_factory.mktemp("rows"), lines(*rows))])


def test_split_sizes_seeds_and_errors(rows):
    sizes = [len(part) for part in split(rows, (0.5, 0.25, 0.25), 0)]
    assert sum(sizes) == 300 and abs(sizes[0] - 150) < 60  # 5 standard deviations, pairs counted
    assert [e.id for e in split(rows, (0.5, 0.5), 0)[0]] != [e.id for e in split(rows, (0.5, 0.5), 1)[0]]
    with pytest.raises(ValueError, match=r"fractions \[0.5, 0.6\] must be positive and sum to 1"):
        split(rows, (0.5, 0.6), 0)
    with pytest.raises(ValueError, match=r"splitting 1 rows .* leaves parts of \[.*\] rows, .* or another seed"):
        split(rows[:1], (0.5, 0.5), 0)
