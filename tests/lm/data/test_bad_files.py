"""Files that cannot be read: each is one sentence with the file, the line where there is one, and a remedy."""

import gzip
import json
import os
import shutil
import struct

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bilevel_jax.lm.data.examples import load_examples, stream_examples

GOOD = json.dumps({"prompt": "a", "response": "b"}).encode() + b"\n"
ROWS = [{"prompt": f"a{i}", "response": "b" * 50} for i in range(300)]


def parquet(rows=ROWS, **options):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def parquet_with_bad_text():
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(struct.pack("<ii", 0, 2)), pyarrow.py_buffer(b"\xff\xfe")]
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad, "response": ["b"]}), sink)
    return sink.getvalue().to_pybytes()


def parquet_with_equal_names():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), sink)
    return sink.getvalue().to_pybytes()


DEEP = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b', "response": "b"}\n'
BAD_FILES = {
    # name -> (the file's name, its content, the place that the error names, words of the error)
    "empty": ("a.jsonl", b"", "a.jsonl", "no rows"),
    "blank": ("a.jsonl", b"\n \n\r\n", "a.jsonl", "no rows"),
    "empty json": ("a.json", b"", "a.json", "no rows"),
    "empty list": ("a.json", b"[]", "a.json", "no rows"),
    "empty parquet": ("a.parquet", b"", "a.parquet", "cannot be read as parquet"),
    "no instances": ("a.json", b'{"rows": []}', "a.json", "an object with the keys ['rows']"),
    "a number": ("a.json", b"3", "a.json", "a number; a list of rows"),
    "null": ("a.json", b"null", "a.json", "null; a list of rows"),
    "instances null": ("a.json", b'{"instances": null}', "a.json", "a list of rows"),
    "a row that is a list": ("a.jsonl", GOOD + b"[1]\n", "a.jsonl:2", "the row is list [1]"),
    "a row that is null": ("a.jsonl", GOOD + b"null\n", "a.jsonl:2", "a JSON object such as"),
    "a row that is a number": ("a.jsonl", b"1\n", "a.jsonl:1", "a JSON object such as"),
    "cut line": ("a.jsonl", GOOD + GOOD[:-8], "a.jsonl:2", "It ends too early"),
    "cut json": ("a.json", b'[{"prompt": "a",\n"response', "a.json:2", "It ends too early"),
    "indented": ("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), "a.jsonl:1", "which is the .json format"),
    "lines as json": ("a.json", GOOD + GOOD, "a.json:2", "rename the file"),
    "single quotes": ("a.jsonl", b"{'prompt': 'a'}\n", "a.jsonl:1", "bad JSON"),
    "trailing comma": ("a.jsonl", GOOD + b'{"prompt": "a",}\n', "a.jsonl:2", "bad JSON"),
    "tab in a string": ("a.jsonl", b'{"prompt": "a\tb", "response": "c"}\n', "a.jsonl:1", "Invalid control character"),
    "NUL bytes": ("a.jsonl", GOOD + b"\0\0\0\n", "a.jsonl:2", "bad JSON"),
    "csv": ("a.jsonl", b"prompt,response\na,b\n", "a.jsonl:1", "bad JSON"),
    "named csv": ("a.csv", b"prompt,response\na,b\n", "a.csv", "the name must end in one of"),
    "named txt": ("a.txt", GOOD, "a.txt", "the name must end in one of"),
    "no ending": ("rows", GOOD, "rows", "the name must end in one of"),
    "half a pair": ("a.jsonl", GOOD + b'{"prompt": "\\ud800", "response": "b"}\n', "a.jsonl:2", "half of a surrogate"),
    "other half": ("a.jsonl", b'{"prompt": "\\uDC00x", "response": "b"}\n', "a.jsonl:1", "half of a surrogate pair"),
    "half in json": ("a.json", b'[{"prompt": "x", "response": "b"},\n{"prompt": "\\ud800", "response": "a"}]',
                     "a.json:2", "half of a surrogate pair"),
    "half in a key": ("a.jsonl", b'{"\\ud800": 1, "prompt": "a", "response": "b"}\n', "a.jsonl:1", "half of a"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl", "iconv -f UTF-16"),
    "UTF-16 without a mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), "a.jsonl", "Convert the file to UTF-8"),
    "UTF-32": ("a.json", GOOD.decode().encode("utf-32"), "a.json", "UTF-8"),
    "Latin-1": ("a.jsonl", GOOD + '{"prompt": "é"}'.encode("latin-1"), "a.jsonl:2", "not UTF-8 (byte 13 of the line)"),
    "Latin-1 json": ("a.json", '[{"prompt": "a"},\n{"prompt": "é"}]'.encode("latin-1"), "a.json:2", "not UTF-8"),
    "gzip as jsonl": ("a.jsonl", gzip.compress(GOOD), "a.jsonl", "a gzip file; its name must"),
    "parquet as jsonl": ("a.jsonl", parquet(), "a.jsonl", "a parquet file; its name must"),
    "parquet as json": ("a.json", parquet(), "a.json", "a parquet file; its name must"),
    "zip": ("a.jsonl", b"PK\x03\x04" + bytes(30), "a.jsonl", "a zip file; unpack it"),
    "zstd": ("a.jsonl", b"\x28\xb5\x2f\xfd\x04\x00", "a.jsonl", "a zstd file; unpack it"),
    "numpy": ("a.jsonl", b"\x93NUMPY\x01\x00", "a.jsonl", "a numpy array"),
    "random bytes": ("a.jsonl", np.random.default_rng(0).bytes(4000), "a.jsonl:1", "not UTF-8"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD * 100)[:-12], "a.jsonl.gz", "not a whole gzip file"),
    "gzip head alone": ("a.jsonl.gz", gzip.compress(GOOD)[:6], "a.jsonl.gz", "not a whole gzip file"),
    "gzip with a flipped byte": ("a.jsonl.gz", flipped(gzip.compress(GOOD * 100), 20), "a.jsonl.gz", "not a whole"),
    "gzip with a bad sum": ("a.json.gz", flipped(gzip.compress(b"[]"), -6), "a.json.gz", "not a whole gzip file"),
    "gzip and more": ("a.jsonl.gz", gzip.compress(GOOD) + b"more", "a.jsonl.gz", "not a whole gzip file"),
    "not packed": ("a.jsonl.gz", GOOD, "a.jsonl.gz", "remove .gz from the name"),
    "packed parquet": ("a.parquet.gz", gzip.compress(parquet()), "a.parquet.gz", "cannot be read as parquet"),
    "key twice": ("a.jsonl", GOOD + b'{"prompt": "a", "response": "b", "prompt": "c"}\n', "a.jsonl:2",
                  "the key 'prompt' stands twice"),
    "inner key twice": ("a.jsonl", b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "a.jsonl:1",
                        "the key 'role' stands twice"),
    "key twice in json": ("a.json", b'[{"prompt": "x", "response": "b"},\n\n{"prompt": "a", "prompt": "a"}]',
                          "a.json:3", "the key 'prompt' stands twice"),
    "key twice around the rows": ("a.json", b'{"instances": [{"text": "a"}], "b": {}, "instances": [{"text": "b"}]}',
                                  "a.json", "the key 'instances' stands twice"),
    "deep": ("a.jsonl", GOOD + DEEP, "a.jsonl:2", "nested too deeply"),
    "deep json": ("a.json", b"[" + DEEP + b"]", "a.json", "nested too deeply"),
    "huge number": ("a.jsonl", GOOD + b'{"prompt": "a", "response": ' + b"9" * 5000 + b"}", "a.jsonl:2",
                    "thousands of digits"),
    "huge number in json": ("a.json", b'[{"prompt": "a", "response": "b"},\n{"prompt": ' + b"9" * 5000 + b"}]",
                            "a.json:2", "thousands of digits"),
    "NaN for a text": ("a.jsonl", GOOD + b'{"prompt": "a", "response": NaN}\n', "a.jsonl:2", "no 'response'"),
    "null for a text": ("a.jsonl", GOOD + b'{"prompt": null, "response": "b"}\n', "a.jsonl:2", "no 'prompt'"),
    "Infinity for a text": ("a.jsonl", GOOD + b'{"prompt": "a", "response": Infinity}\n', "a.jsonl:2",
                            "'response' is float inf"),
    "cut parquet": ("a.parquet", parquet()[:-40], "a.parquet", "cannot be read as parquet"),
    "head of a parquet": ("a.parquet", parquet()[:40], "a.parquet", "cannot be read as parquet"),
    "text as parquet": ("a.parquet", GOOD * 9, "a.parquet", "rename it if it is no parquet file"),
    "zeros as parquet": ("a.parquet", b"PAR1" + bytes(200) + b"PAR1", "a.parquet", "cannot be read as parquet"),
    "flipped parquet": ("a.parquet", flipped(parquet(write_page_checksum=True, compression="zstd"), 60), "a.parquet",
                        "cannot be read as parquet"),
    "parquet that is no UTF-8": ("a.parquet", parquet_with_bad_text(), "a.parquet", "cannot be read as parquet"),
    "equal columns": ("a.parquet", parquet_with_equal_names(), "a.parquet", "two columns are called 'prompt'"),
    "parquet of no rows": ("a.parquet", parquet([]), "a.parquet", "no rows"),
    "numbers in parquet": ("a.parquet", parquet([{"prompt": 1, "response": 2}]), "a.parquet:1", "'prompt' is int 1"),
}  # fmt: skip


def check_sentence(error, path, words):
    text = str(error.value)
    assert text.startswith(path) and words in text and "\n" not in text and len(text) < 600, text
    assert text.rstrip().endswith("."), text


@pytest.mark.parametrize("read", [load_examples, stream_examples])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path, kind, read):
    name, content, place, words = BAD_FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        list(read([str(tmp_path / name)]))
    check_sentence(error, str(tmp_path / place), words)


def put_folder(folder, change):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    change(folder)
    return str(folder)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


BAD_FOLDERS = {
    "cut arrow": lambda folder: truncate(next(folder.glob("*.arrow")), 900),
    "empty arrow": lambda folder: truncate(next(folder.glob("*.arrow")), 0),
    "no arrow": lambda folder: next(folder.glob("*.arrow")).unlink(),
    "arrow of other bytes": lambda folder: next(folder.glob("*.arrow")).write_bytes(b"x" * 5000),
    "cut state": lambda folder: truncate(folder / "state.json", 10),
    "state of another shape": lambda folder: (folder / "state.json").write_text("[]"),
    "cut info": lambda folder: truncate(folder / "dataset_info.json", 10),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_damaged_folder_is_one_sentence(tmp_path, kind):
    path = put_folder(tmp_path / "set", BAD_FOLDERS[kind])
    with pytest.raises(ValueError) as error:
        load_examples([path])
    check_sentence(error, path, "Save it anew with `datasets.save_to_disk`.")


def make_loop(path):
    path.symlink_to(path)


BAD_PATHS = {
    # name -> (what to make at a.jsonl, the path that is asked for, words)
    "nothing": (lambda path: None, "a.jsonl", "no such file"),
    "a folder": (lambda path: path.mkdir(), "a.jsonl", "Name a file"),
    "an empty folder with a split": (lambda path: path.mkdir(), "a.jsonl@train", "Name a file"),
    "a pipe": (os.mkfifo, "a.jsonl", "a pipe, a socket or a device"),
    "a loop": (make_loop, "a.jsonl", "cannot be opened (Too many levels of symbolic links)"),
    "a link to nothing": (lambda path: path.symlink_to(path.parent / "b"), "a.jsonl", "a link to"),
    "below a file": (lambda path: path.write_bytes(GOOD), "a.jsonl/b.jsonl", "is a file, not a folder"),
    "a long name": (lambda path: None, "a" * 300 + ".jsonl", "cannot be opened (File name too long)"),
    "a NUL": (lambda path: None, "a\0.jsonl", "embedded null "),  # byte, or character: by the version of Python
}


@pytest.mark.parametrize("kind", BAD_PATHS)
def test_a_bad_path_is_one_sentence(tmp_path, kind):
    make, name, words = BAD_PATHS[kind]
    make(tmp_path / "a.jsonl")
    with pytest.raises((ValueError, OSError)) as error:
        load_examples([f"{tmp_path}/{name}"])
    check_sentence(error, str(tmp_path), words)


def test_a_device_is_one_sentence():
    with pytest.raises(OSError, match="/dev/null: not a file but a pipe, a socket or a device"):
        load_examples(["/dev/null"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes({"a.parquet": parquet(), "a.jsonl.gz": gzip.compress(GOOD)}.get(name, GOOD))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(PermissionError) as error:
        load_examples([str(path)])
    check_sentence(error, str(path), "cannot be opened (Permission denied). Check the name, the links and the permiss")


def test_a_split_of_a_set_without_splits_is_refused(tmp_path):
    path = put_folder(tmp_path / "set", lambda folder: None)
    with pytest.raises(ValueError, match="the split 'train' is asked for, and the data set has no splits"):
        load_examples([f"{path}@train"])
    assert len(load_examples([path])) == 300
    shutil.rmtree(path)


def damage(content, random):
    """The content cut, with a bit flipped, a stretch lost, or something hostile put in."""
    place = random.integers(len(content))
    kind = random.choice(["cut", "flip", "lose", "insert"])
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << random.integers(8)]) + content[place + 1 :]
    if kind == "lose":
        return content[:place] + content[place + random.integers(1, 30) :]
    hostile = [b"\\ud800", b'"', b"{", b"[", b"\xff", b"\0", b"1e999", b"NaN", b"\n", b"\\", random.bytes(9)]
    return content[:place] + hostile[random.integers(len(hostile))] + content[place:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "set"])
def test_whatever_happens_to_a_file_is_read_or_one_sentence(tmp_path, name):
    random = np.random.default_rng(0)
    path = tmp_path / name
    table = pyarrow.Table.from_pylist(ROWS[:20])
    if name == "set":  # Arrow itself believes the offsets of a file, and would read beyond the memory
        datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(path))
    elif name == "a.parquet":
        path.write_bytes(parquet(ROWS[:20], compression="none"))
    else:
        text = json.dumps(ROWS[:20]) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in ROWS[:20])
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    num_refused = 0
    for _ in range(60):
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        file.write_bytes(damage(whole, random))
        try:
            assert len(load_examples([str(path)])) <= 21
        except (ValueError, OSError) as error:
            num_refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 700, error
        file.write_bytes(whole)
    assert num_refused > 20
