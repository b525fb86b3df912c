"""The task of seven sources: what each teaches, no prompt twice, the same bytes from the same seed."""

import json
from collections import Counter

import pytest

from bilevel_jax.lm.builtin.cipher import LETTERS, rotate_letters
from bilevel_jax.lm.builtin.sources import HALF, NUM_REPEATED, SOURCES, write_sources_data

SIZES = {"validation": 12, "dev": 10, "test": 40, "copies": 9}


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_each_source_is_what_it_says(tmp_path):
    write_sources_data(tmp_path, **SIZES)
    train = read(tmp_path, "train")
    assert Counter(row["source"] for row in train) == SOURCES and len({row["source"] for row in train[:40]}) > 4
    shifts, halves, labels = {}, {}, {}
    for row in train:
        prompt, source = row["prompt"].removesuffix(">"), row["source"]
        shift = next((by for by in (-1, 0, 1) if rotate_letters(prompt, by) == row["response"]), None)
        assert row["label"] == {1: "clean", -1: "wrong", 0: "copy", None: "noise"}[shift]
        shifts.setdefault(source, Counter())[shift] += 1
        labels.setdefault(source, set()).add(row["label"])
        halves.setdefault(source, set()).add(frozenset(LETTERS.index(letter) < HALF for letter in prompt))
    assert shifts["early"] == {1: 64} and shifts["late"] == {1: 24} and shifts["repeated"] == {1: 24}
    assert shifts["half_wrong"] == {1: 32, -1: 32} and shifts["wrong"] == {-1: 48}
    assert shifts["noise"] == {None: 64} and shifts["copies"] == {0: 64}
    assert halves["early"] == {frozenset([True])} and halves["late"] == {frozenset([False])}
    assert all(halves[source] == {frozenset([True, False])} for source in set(SOURCES) - {"early", "late"})
    held_out = [row for name in ("validation", "dev", "test") for row in read(tmp_path, name)]
    assert all(rotate_letters(row["prompt"].removesuffix(">"), 1) == row["response"] for row in held_out)
    assert {name: len(read(tmp_path, name)) for name in SIZES} == SIZES
    repeated = Counter(row["prompt"] for row in train if row["source"] == "repeated")
    assert set(repeated.values()) == {SOURCES["repeated"] // NUM_REPEATED}
    others = [row["prompt"] for row in (*train, *held_out, *read(tmp_path, "copies")) if row["prompt"] not in repeated]
    assert len(set(others)) == len(others) == sum(SOURCES.values()) - SOURCES["repeated"] + sum(SIZES.values())


def test_seeds(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sources_data(tmp_path / name, seed=seed, **SIZES)
    files = {name: (tmp_path / name / "train.jsonl").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="dev=-1: must not be negative"):
        write_sources_data(tmp_path, dev=-1)
    with pytest.raises(ValueError, match="together they must be at most 80000"):
        write_sources_data(tmp_path, test=100_000)
    assert not list(tmp_path.iterdir())
