"""Examples: ids from content, what is dropped, pairs, streams, duplicates, leaks, splits."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_jax.lm.data.examples import (
    DataOptions,
    example_kind,
    find_duplicates,
    find_leaks,
    hash_content,
    is_preference_pair,
    list_formats,
    load_examples,
    load_prompts,
    split_examples,
    stream_examples,
    summarize_examples,
)
from tests.lm.rows import lines, put

GOOD = {"prompt": "a", "response": "b"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_errors_of_options():
    for paths, options, text in [
        ("a.jsonl", DataOptions(), "a list of paths is wanted"),
        ([], DataOptions(), "no data paths were given"),
        (["a"], DataOptions(format="csv"), "data.format is 'csv'; it is one of ['auto', 'text', 'chat', 'sharegpt',"),
        (["a"], DataOptions(empty="skip"), "data.empty is 'skip'; it is one of ['error', 'drop']."),
    ]:
        for read in (load_examples, stream_examples):  # a stream says it at once, not when it is first read
            with pytest.raises(ValueError) as error:
                read(paths, options)
            assert text in str(error.value)


def test_empty_rows_can_be_dropped(tmp_path):
    path = put(tmp_path, lines(GOOD, GOOD | {"response": ""}, {"prompt": "c", "response": "d"}))
    dropped = []
    examples = load_examples([path], DataOptions(empty="drop"), dropped.append)
    assert [(e.row, e.line) for e in examples] == [(0, 1), (1, 3)]
    assert [text.split("rows.jsonl:")[1].split(",")[0] for text in dropped] == ["2: 'response' is empty"]


def test_ids_belong_to_the_content(tmp_path):
    rows = [{"prompt": f"p{i % 7}", "response": "r", "source": f"s{i}", "label": f"l{i}"} for i in range(10)]
    first = load_examples([put(tmp_path, lines(*rows))])
    assert [e.id.split("#")[1] for e in first] == ["0"] * 7 + ["1"] * 3
    random.Random(0).shuffle(rows)
    bare = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "r"}]} for r in rows
    ]
    second = load_examples([put(tmp_path, lines(*bare))])
    assert {(e.id, e.turns) for e in first} == {(e.id, e.turns) for e in second}  # whatever order, layout, source
    assert len({e.id for e in first}) == 10
    assert first[0].id == "9610a0242db8ea82#0"  # written in old runs: must never change
    assert [[e.row for e in group] for group in find_duplicates(first)] == [[0, 7], [1, 8], [2, 9]]
    assert summarize_examples(
        first
    ) == "10 rows; 10 prompt from rows.jsonl; 10 sources; labels l0, l1, l2, l3, l4, l5, l6, l7; " + (
        "3 are copies of an earlier row"
    )


def test_leaks_are_found_whatever_the_layout_case_and_spaces(tmp_path):
    validation = load_examples([put(tmp_path, lines({"prompt": "What is\n it?", "response": "A  Cat"}))])
    rows = [
        {"text": "what is it? a cat"},
        {"text": "what is it? a cat."},
    ]
    train = load_examples([put(tmp_path, lines(*rows), "text.jsonl")])
    chats = [
        {"messages": [SYSTEM, {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": a}]}
        for a in ("a cat", "a dog")
    ]
    train += load_examples([put(tmp_path, lines(*chats), "chat.jsonl")])
    assert [(a.where.split("/")[-1], b.line) for a, b in find_leaks(train, validation)] == [
        ("text.jsonl:1", 1),
        ("chat.jsonl:1", 1),
    ]


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 5))
def test_split_depends_on_content_alone(rows, shuffler, seed):
    whole = split_examples(rows, (0.5, 0.3, 0.2), seed)
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    again = split_examples(shuffled[:200], (0.5, 0.3, 0.2), seed)
    for part, other in zip(whole, again, strict=True):
        assert {e.id for e in other} <= {e.id for e in part}
        assert [e.row for e in other] == list(range(len(other)))
    assert sum(map(len, whole)) == len(rows)
    assert not find_leaks(whole[0], whole[1] + whole[2]) and not find_leaks(whole[1], whole[2])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """300 rows, of which 100 say the same as another in capitals."""
    rows = [{"text": f"row {i}" if i < 200 else f"ROW  {i - 200}"} for i in range(300)]
    return load_examples([put(tmp_path_factory.mktemp("rows"), lines(*rows))])


def test_split_sizes_seeds_and_errors(rows):
    sizes = [len(part) for part in split_examples(rows, (0.5, 0.25, 0.25), 0)]
    assert sum(sizes) == 300 and abs(sizes[0] - 150) < 60  # 5 standard deviations, pairs counted
    assert [e.id for e in split_examples(rows, (0.5, 0.5), 0)[0]] != [
        e.id for e in split_examples(rows, (0.5, 0.5), 1)[0]
    ]
    with pytest.raises(ValueError, match=r"fractions \[0.5, 0.6\] must be positive and sum to 1"):
        split_examples(rows, (0.5, 0.6), 0)
    with pytest.raises(ValueError, match=r"splitting 1 rows .* leaves parts of \[.*\] rows, .* or another seed"):
        split_examples(rows[:1], (0.5, 0.5), 0)


# ---- pairs


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_the_id_of_a_pair_covers_both_sides(tmp_path):
    rows = [pair("a", "b", "c"), pair("a", "b", "d"), pair("a", "c", "b"), pair("a", "b", "c")]
    examples = load_examples([put(tmp_path, lines(*rows))])
    assert [e.id.split("#")[1] for e in examples] == ["0", "0", "0", "1"]
    assert len({e.id for e in examples}) == 4 and all(is_preference_pair(e) for e in examples)
    assert [[e.row for e in group] for group in find_duplicates(examples)] == [[0, 3]]
    sides = {hash_content(side) for side in (examples[0].turns, examples[0].rejected)}
    assert hash_content(examples[0].turns, examples[0].rejected) not in sides
    assert examples[0].id == "a71532cd215b4869#0"  # written in old runs: must never change


def test_a_pair_leaks_by_its_prompt_and_its_chosen_response(tmp_path):
    validation = load_examples([put(tmp_path, lines(pair("What?", "a", "b")), "trusted.jsonl")])
    rows = [pair("what?", "A", "c"), pair("What?", "b", "a"), pair("Who?", "a", "b")]
    train = load_examples([put(tmp_path, lines(*rows))])
    assert [one.line for one, _ in find_leaks(train, validation)] == [1]
    single = load_examples([put(tmp_path, lines({"prompt": "What?", "response": "a"}), "single.jsonl")])
    assert [one.line for one, _ in find_leaks(single, validation)] == [1]
    many = load_examples([put(tmp_path, lines(*(pair(f"{i % 20}", "a", f"b{i}") for i in range(40))), "many.jsonl")])
    one, other = split_examples(many, (0.5, 0.5), 0)
    assert not find_leaks(one, other)


@pytest.mark.parametrize("read", [load_examples, stream_examples])
def test_pairs_and_single_dialogues_do_not_mix(tmp_path, read):
    paths = [put(tmp_path, lines(GOOD), "single.jsonl"), put(tmp_path, lines(pair("a", "b", "c")), "pairs.jsonl")]
    with pytest.raises(ValueError, match=r"pairs.jsonl:1 is a preference pair, and .*single.jsonl:1 is not: one loss"):
        list(read(paths))


# ---- streams


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from("abc ")), st.integers(0, 12))
def test_a_stream_is_what_load_gives(tmp_path_factory, texts, skip):
    path = put(tmp_path_factory.mktemp("stream"), lines("z", *texts))
    options = DataOptions(empty="drop")
    examples = load_examples([path, path], options)
    assert list(stream_examples([path, path], options)) == examples
    assert list(stream_examples([path, path], options, skip=skip)) == examples[skip:]  # ids and rows included


def test_a_stream_reads_no_further_than_it_must(tmp_path):
    rows = stream_examples([put(tmp_path, lines("a", "b") + "{bad\n")])
    assert [next(rows).turns[0].content for _ in range(2)] == ["a", "b"]
    with pytest.raises(ValueError, match="rows.jsonl:3: bad JSON"):
        next(rows)


# ---- summary


def test_summary_names_the_format_of_each_file(tmp_path):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    paths = [
        put(tmp_path, lines(*[{"conversations": [*talk, *talk[:1]]}] * 3), "share.jsonl"),
        put(tmp_path, json.dumps([GOOD | {"source": "web"}]), "plain.json"),
    ]
    examples = load_examples(paths)
    assert list_formats(examples) == {paths[0]: "sharegpt", paths[1]: "prompt"}
    assert summarize_examples(examples) == (
        "4 rows; 3 sharegpt from share.jsonl, 1 prompt from plain.json; 2 sources; 3 are copies of an earlier row; "
        "3 lost a last message of the user, which nothing answers"
    )
    assert [(e.source, e.names_source) for e in examples] == [("share", False)] * 3 + [("web", True)]
    many = load_examples([put(tmp_path, lines({"text": f"{i}"}), f"{i}.jsonl") for i in range(5)])
    assert summarize_examples(many) == "5 rows; 5 text from 5 files; 5 sources"
    assert {example_kind(e) for e in many} == {"text"}
    assert summarize_examples([examples[3]._replace(format="")]).startswith("1 row; 1 prompt from plain.json")


# ---- prompts, with or without an answer

TURNS = [{"role": "user", "content": "a"}]
SHARED = [{"from": "human", "value": "a"}]
PROMPTS = {
    "prompt": ({"prompt": "a"}, {"prompt": "a", "response": "b"}, {}),
    "an empty response": ({"prompt": "a", "response": " "}, {"prompt": "a", "response": "b"}, {}),
    "messages": ({"prompt": TURNS}, {"prompt": TURNS, "response": "b"}, {}),
    "completion": ({"prompt": "a"}, {"prompt": "a", "completion": "b"}, {}),
    "an empty completion": ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}, {}),
    "other names": ({"q": "a", "responses": {"x": "y"}}, {"q": "a", "response": "b"}, {"prompt_field": "q"}),
    "both names": ({"q": "a"}, {"q": "a", "r": "b"}, {"prompt_field": "q", "response_field": "r"}),
    "alpaca": ({"instruction": "a"}, {"instruction": "a", "output": "b"}, {}),
    "chat": ({"messages": TURNS}, {"messages": [*TURNS, {"role": "assistant", "content": "b"}]}, {}),
    "sharegpt": ({"conversations": SHARED}, {"conversations": [*SHARED, {"from": "gpt", "value": "b"}]}, {}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_the_same_with_and_without_an_answer(tmp_path, name):
    without, with_answer, options = PROMPTS[name]
    paths = [put(tmp_path, lines(row), f"{at}.jsonl") for at, row in enumerate((without, with_answer))]
    asked, answered = (load_prompts([path], DataOptions(**options))[0] for path in paths)
    assert [(turn.role, turn.content) for turn in asked.turns] == [("user", "a")]
    assert [(turn.role, turn.content) for turn in answered.turns] == [("user", "a"), ("assistant", "b")]
    assert answered == load_examples(paths[1:], DataOptions(**options))[0] and asked.where.endswith("0.jsonl:1")


def test_copies_of_a_prompt_have_ids_of_their_own_and_pairs_stay_pairs(tmp_path):
    first, second = load_prompts([put(tmp_path, lines({"prompt": "a"}, {"prompt": "a"}))])
    assert first.id.partition("#")[0] == second.id.partition("#")[0] and first.id != second.id
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = put(tmp_path, lines(pair), "pairs.jsonl")
    assert load_prompts([path]) == load_examples([path])
    with pytest.raises(ValueError, match="rows.jsonl:1: no known layout; the keys are \\['question'\\]"):
        load_prompts([put(tmp_path, lines({"question": "a"}))])
