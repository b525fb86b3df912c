"""The task of sums: its rules, its exact shares, no question twice, the same bytes from the same seed."""

import json

import pytest

from bilevel_jax.lm.builtin.sums import add_without_carries, write_sums_data
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.runs.config.schema import VerifierSection
from bilevel_jax.runs.scoring.verifiers import make_verifier

PARTS = {"train": 60, "validation": 16, "dev": 20, "test": 40, "lessons": 200}
SIZES = {"train": 60, "dev": 20, "test": 40, "lessons": 200}


@pytest.mark.parametrize(
    ("a", "b", "right", "wrong"),
    [(384, 267, "651", "541"), (199, 101, "300", "290"), (555, 445, "1000", "990"), (899, 100, "999", "999")],
)
def test_rules(a, b, right, wrong):
    assert str(a + b) == right and add_without_carries(a, b) == wrong


def numbers(example):
    return tuple(map(int, example.turns[0].content.removesuffix("=").split("+")))


@pytest.mark.parametrize(("corrupted", "noise"), [(0.4, 0.0), (0.7, 0.0), (0.5, 0.25)])
def test_labels_tell_the_truth(tmp_path, corrupted, noise):
    write_sums_data(tmp_path, corrupted=corrupted, noise=noise, **SIZES)
    parts = {name: load_examples([str(tmp_path / f"{name}.jsonl")]) for name in PARTS}
    assert {name: len(part) for name, part in parts.items()} == PARTS
    for part in parts.values():
        for example in part:
            a, b = numbers(example)
            assert 100 <= min(a, b) and a + b < 1000 and add_without_carries(a, b) != str(a + b)
            assert len(example.turns[1].content) == 3
            kind = {str(a + b): "clean", add_without_carries(a, b): "wrong"}.get(example.turns[1].content, "noise")
            assert example.label == kind
    labels = [example.label for example in parts["train"]]
    assert (labels.count("wrong"), labels.count("noise")) == (round(60 * corrupted), round(60 * noise))
    assert 4 < labels[:20].count("wrong") / corrupted * 0.4 < 14  # shuffled
    assert [e.label for e in parts["lessons"]].count("wrong") == 80
    assert {e.label for name in ("validation", "dev", "test") for e in parts[name]} == {"clean"}
    asked = [frozenset(numbers(example)) for part in parts.values() for example in part]
    assert len(set(asked)) == len(asked) == sum(PARTS.values())  # not even with the numbers exchanged

    def right(row):
        return row._replace(turns=(row.turns[0], row.turns[1]._replace(content=str(sum(numbers(row))))))

    for name in ("numeric", "exact"):
        judge = make_verifier(VerifierSection(name))
        assert all(judge(right(e), e.turns[1].content) == (e.label == "clean") for e in parts["train"])


def test_seeds(tmp_path):
    for name, seed, corrupted in [("a", 0, 0.4), ("b", 0, 0.4), ("c", 1, 0.4), ("d", 0, 0.7)]:
        write_sums_data(tmp_path / name, seed=seed, corrupted=corrupted, **SIZES)
    a, b, c, d = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in "abcd"
    )
    changed = {path.name for path in a if a[path] != c[path]}
    assert a == b and changed == {f"{name}.jsonl" for name in PARTS}
    assert {path.name for path in a if a[path] != d[path]} == {"train.jsonl"}
    few, many = (load_examples([str(tmp_path / name / "train.jsonl")]) for name in "ad")
    assert [e.turns[0] for e in few] == [e.turns[0] for e in many]
    assert all(other.label == "wrong" for one, other in zip(few, many, strict=True) if one.label == "wrong")
    first = json.loads((tmp_path / "a" / "train.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "184+578=", "response": "762", "label": "clean", "answer": "762"}  # on every machine
    with pytest.raises(FileExistsError, match="train.jsonl: already there, with other contents"):
        write_sums_data(tmp_path / "a", corrupted=0.7, **SIZES)


def test_impossible_sizes(tmp_path):
    with pytest.raises(ValueError, match="together they must be 1 to 80000"):
        write_sums_data(tmp_path, train=79_000)
    with pytest.raises(ValueError, match=r"corrupted=0.7, noise=0.4: shares of the rows are wanted, of at most 1"):
        write_sums_data(tmp_path, corrupted=0.7, noise=0.4)
    for wrong in ({"lessons": -1}, {"corrupted": -0.1}, {"train": -2}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}: must not be negative"):
            write_sums_data(tmp_path, **wrong)
