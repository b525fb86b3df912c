"""Paths of this machine in results: short names, and what is left as it is."""

import pytest

from bilevel_jax.runs.config.local_paths import hide_local_paths, hide_paths_in_arguments, short_file_names


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/a/b/rows.jsonl"], ["rows.jsonl"]),
        (
            ["rows.jsonl", "../x/rows.jsonl", "hub:me/data@train"],
            ["rows.jsonl", "../x/rows.jsonl", "hub:me/data@train"],
        ),
        (["/a/b/r", "/a/c/r"], ["b/r", "c/r"]),
        (["/a/b/r", "/a/b/r"], ["r", "r"]),
        (["/b/r", "/a/b/r"], ["b/r", "a/b/r"]),
        (["/", ""], ["/", ""]),
    ],
)
def test_short_file_names(paths, names):
    short = short_file_names(paths)
    assert [short[path] for path in paths] == names


SETTINGS = {
    "data": {"train": ["/home/me/a+b/rows.jsonl"], "test": ["/home/me/set@test"]},
    "output": {"dir": "/home/me/out/run/"},
    "model": {"name_or_path": "/home/me/m", "template": "/{prompt}", "none": None, "rate": 0.1},
}


@pytest.mark.parametrize(
    "text, hidden",
    [
        ("/home/me/a+b/rows.jsonl:3 also stands in /home/me/m", "rows.jsonl:3 also stands in m"),
        ("in /home/me/out/run/input/train.jsonl:7.", "in run/input/train.jsonl:7."),
        ("/home/me/m2 and x/home/me/m are others", "/home/me/m2 and x/home/me/m are others"),
        ("weight of ('/home/me/m')", "weight of ('m')"),
        ("/home/me/set holds no rows", "set holds no rows"),
        ("rows.jsonl", "rows.jsonl"),
        (3.5, 3.5),
        (None, None),
    ],
)
def test_hide_local_paths(text, hidden):
    assert hide_local_paths({"notes": [text], "deep": {"er": (text,)}}, SETTINGS) == {
        "notes": [hidden],
        "deep": {"er": [hidden]},
    }


def test_without_paths_nothing_is_looked_for():
    assert hide_local_paths(["/home/me/m"], {"data": ["rows.jsonl", "/"]}) == ["/home/me/m"]


def test_arguments():
    arguments = [
        "/home/me/run",
        "--out=/home/me/x",
        "--export.dir",
        "/home/me/y",
        "--data.train",
        "rows.jsonl",
        "a=/b/c",
    ]
    assert hide_paths_in_arguments(arguments) == [
        *("run", "--out=x", "--export.dir", "y", "--data.train", "rows.jsonl", "a=/b/c")
    ]
