"""The task of scripts: its keys, its exact shares, no question twice, the same bytes from the same seed."""

import json

import pytest

import bilevel_jax as bj
from bilevel_jax.lm.builtin import scripts
from bilevel_jax.lm.builtin.scripts import draw_key, make_wrong_key, transcribe, write_scripts_data
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.data.tokens import load_tokenizer, tokenize

SIZES = {"train": 60, "validation": 12, "dev": 20, "test": 40, "lessons": 9}
RIGHT = draw_key(0)
WRONG = make_wrong_key(RIGHT)


def test_keys():
    assert transcribe("abl", (0, 0, 0, 0, 0, 2)) == "ABл" and transcribe("adk", (1, 2, 0, 0, 0, 1)) == "αгλ"
    assert len({draw_key(seed) for seed in range(20)}) > 10
    assert all(one != other for one, other in zip(RIGHT, WRONG, strict=True))  # no letter is written alike


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_labels_tell_the_truth(tmp_path, noise):
    write_scripts_data(tmp_path, noise=noise, **SIZES)
    parts = {name: load_examples([str(tmp_path / f"{name}.jsonl")]) for name in SIZES}
    assert {name: len(part) for name, part in parts.items()} == SIZES
    lessons, examples = parts.pop("lessons"), [example for part in parts.values() for example in part]
    for example in examples:
        letters = example.turns[0].content.removesuffix(">").replace(" ", "")
        rules = {transcribe(letters, RIGHT): "clean", transcribe(letters, WRONG): "wrong"}
        assert example.label == rules.get(example.turns[1].content, "noise")
    labels = [example.label for example in parts["train"]]
    assert (labels.count("wrong"), labels.count("noise")) == (30, round(60 * noise))
    assert {example.label for name in ("validation", "dev", "test") for example in parts[name]} == {"clean"}
    questions = [example.turns[0].content for example in examples]
    assert len(set(questions)) == len(questions) == sum(SIZES.values()) - len(lessons)
    for lesson in lessons:  # one key to a lesson: no group of letters is in two scripts
        asked = "".join(turn.content[::2] for turn in lesson.turns if turn.role == "user")
        written = "".join(turn.content for turn in lesson.turns if turn.role == "assistant")
        found = {
            (scripts.LETTERS.index(letter) // 2, next(i for i, script in enumerate(scripts.SCRIPTS) if sign in script))
            for letter, sign in zip(asked, written, strict=True)
        }
        assert len(found) == len({group for group, _ in found}) and len(asked) == 36


def test_pairs(tmp_path):
    write_scripts_data(tmp_path, noise=0.25, format="pairs", **SIZES)
    for name in ("train", "validation", "dev", "test"):
        for row in map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines()):
            letters = row["prompt"].removesuffix(">").replace(" ", "")
            sides = [transcribe(letters, RIGHT), transcribe(letters, WRONG)]
            assert row["answer"] == sides[0] and {row["chosen"], row["rejected"]} == set(sides)
            assert row["label"] == "noise" or (row["chosen"] == sides[0]) == (row["label"] == "clean")


def test_seeds(tmp_path):
    for name, seed, corrupted in [("a", 0, 0.5), ("b", 0, 0.5), ("c", 1, 0.5), ("d", 0, 0.75)]:
        write_scripts_data(tmp_path / name, seed=seed, corrupted=corrupted, **SIZES)
    a, b, c, d = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in "abcd"
    )
    assert a == b and {path.name for path in a if a[path] != c[path]} == {f"{name}.jsonl" for name in SIZES}
    assert {path.name for path in a if a[path] != d[path]} == {"train.jsonl"}
    second = json.loads((tmp_path / "a" / "train.jsonl").read_text().splitlines()[1])
    assert second == {"prompt": "j c l>", "label": "clean", "answer": "Jвμ", "response": "Jвμ"}  # on every machine


def test_tokens(tmp_path):
    """A token to each letter, none to a space; a lesson is as long as its exchanges, each of which is learned."""
    write_scripts_data(tmp_path, **SIZES)
    tokenizer = load_tokenizer(tmp_path / "untrained")
    (example, *_), lessons = (load_examples([str(tmp_path / f"{part}.jsonl")]) for part in ("test", "lessons"))
    one, lesson = (tokenize(some, tokenizer, max_length=128)[0] for some in ([example], lessons[:1]))
    prompt, response = (turn.content for turn in example.turns)
    assert tokenizer.decode(one.ids[: one.offsets[1]].tolist()) == f"<s>{prompt.replace(' ', '')}{response}</s>"
    assert lesson.offsets[1] == 1 + 8 * scripts.LESSON_TURNS <= 128
    assert (one.target_mask.sum(), lesson.target_mask.sum()) == (4, 4 * scripts.LESSON_TURNS)


def test_impossible_sizes(tmp_path):
    with pytest.raises(ValueError, match="together they must be 1 to 1728"):
        write_scripts_data(tmp_path, train=1500)
    with pytest.raises(ValueError, match=r"corrupted=0.7, noise=0.4: shares of the rows are wanted, of at most 1"):
        write_scripts_data(tmp_path, corrupted=0.7, noise=0.4)
    for wrong in ({"lessons": -1}, {"corrupted": -0.1}, {"train": -2}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}: must not be negative"):
            write_scripts_data(tmp_path, **wrong)
    with pytest.raises(ValueError, match="format='rows'; it is one of responses, pairs"):
        write_scripts_data(tmp_path, format="rows")


def test_rows_of_python():
    rows = bj.lm.builtin_rows("scripts", "dev", sizes={"train": 8, "dev": 3, "lessons": 0})
    assert len(rows) == 3 and sorted(rows[0]) == ["answer", "label", "prompt", "response"]
    assert bj.lm.builtin_rows("scripts", "dev", sizes={"dev": 0, "lessons": 0}) == []
    with pytest.raises(ValueError, match="sizes: scripts has no 'clean'; it takes corrupted, dev, format, lessons"):
        bj.lm.builtin_rows("scripts", sizes={"clean": 2})
    with pytest.raises(ValueError, match="there is no part 'lessons' of a built-in task; there are"):
        bj.lm.builtin_rows("scripts", "lessons")
