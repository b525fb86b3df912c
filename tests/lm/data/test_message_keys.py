"""Keys of messages and rows beside the usual ones: right in the mask, refused, or counted and named."""

import hashlib
import json

import pytest

from bilevel_jax.lm.data.examples import (
    describe_unread_keys,
    example_to_row,
    hash_content,
    load_examples,
    summarize_examples,
)
from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.data.turns import MESSAGE_KEYS, DataOptions, Turn
from tests.lm.data.test_tokens import CHATML, bpe, runs


def put(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def chat(first=None, last=None, user=None, names=("role", "content")):
    """Two questions and answers, with more keys for the messages."""
    speakers = ("human", "gpt") if names[0] == "from" else ("user", "assistant")
    said = zip((*speakers, *speakers), ("A?", "B", "C?", "D"), (user, first, None, last), strict=True)
    return [dict(zip(names, (speaker, text), strict=True)) | (more or {}) for speaker, text, more in said]


def learned(tmp_path, row, **options):
    examples = load_examples(put(tmp_path, row))
    tokenizer = bpe(CHATML)
    return runs(tokenize(examples, tokenizer, max_length=99, **options)[0].get_sequence(0), tokenizer)


BOTH, FIRST, SECOND = ["B<|eot|>", "D<|eot|>"], ["B<|eot|>"], ["D<|eot|>"]


@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("key", ["weight", "train", "loss", "trainable"])
@pytest.mark.parametrize(
    "first, last, wanted",
    [
        (0, None, SECOND),
        (0, 1, SECOND),
        (False, True, SECOND),
        (0.0, 1.0, SECOND),
        (1, 0, FIRST),
        (None, False, FIRST),
        (1, 1, BOTH),
        (None, None, BOTH),
    ],
)
def test_an_answer_that_is_marked_as_no_target(tmp_path, key, names, first, last, wanted):
    field = "messages" if names[0] == "role" else "conversations"
    assert learned(tmp_path, {field: chat({key: first}, {key: last}, names=names)}) == wanted


def test_marks_in_other_formats(tmp_path):
    prompt, response = chat({"weight": 0})[:3], chat()[3:]
    assert learned(tmp_path, {"prompt": prompt, "response": response}) == SECOND
    assert learned(tmp_path, {"prompt": prompt, "completion": response[0]}) == SECOND
    pair = {"prompt": prompt[:1], "chosen": chat({"train": False})[1:], "rejected": chat()[1:2]}
    pair["rejected"][0]["content"] = "E"
    (example,) = load_examples(put(tmp_path, pair))
    tokenizer = bpe(CHATML)
    corpus = tokenize([example], tokenizer, max_length=99)[0]
    assert [runs(corpus.get_sequence(0, side), tokenizer) for side in range(2)] == [SECOND, ["E<|eot|>"]]


REFUSED = [
    ({"weight": -1}, "'weight' of message 2 of messages is int -1; a number from 0 to 1,000,000 is read, and 0 makes"),
    ({"loss_weight": float("inf")}, "'loss_weight' of message 2 of messages is float inf; a number from 0 to"),
    ({"weight": "0.5"}, "'weight' of message 2 of messages is str '0.5'; a number from 0 to 1,000,000 is read"),
    ({"weight": 0.5, "loss_weight": 0.25}, "says two things about being a target: {'weight': 0.5, 'loss_weight': 0.25"),
    ({"weight": 0.5, "loss": 0}, "says two things about being a target: {'weight': 0.5, 'loss': 0}. Leave one"),
    (
        {"loss": 0.5},
        "'loss' of message 2 of messages is float 0.5; 0 or false, or 1 or true, is read, and 0 makes it no"
        " target. Write a factor of its loss under the key 'weight'.",
    ),
    ({"train": "no"}, "'train' of message 2 of messages is str 'no'; 0 or false"),
    ({"loss": [0]}, "'loss' of message 2 of messages is list [0]"),
    ({"weight": 1, "train": False}, "message 2 of messages says two things about being a target: {'weight': 1, 't"),
    ({"train_detail": [{"begin_offset": 0}]}, "message 2 of messages has 'train_detail' = list [{'begin_offset': 0}]"),
    ({"loss_mask": [0, 1]}, "has 'loss_mask' = list [0, 1], which is not supported. Remove the key or the row"),
    ({"images": ["a.png"]}, "message 2 of messages has 'images' = list ['a.png']"),
    ({"refusal": "No."}, "message 2 of messages has 'refusal' = str 'No.'"),
    ({"tool_calls": [{"id": "a"}]}, "message 2 of messages is a call of a tool or its result (key 'tool_calls'); only"),
    ({"tool_call_id": "a"}, "message 2 of messages is a call of a tool or its result (key 'tool_call_id'); only"),
    ({"function_call": {"name": "f"}}, "is a call of a tool or its result (key 'function_call')"),
    ({"reasoning_content": 3}, "'reasoning_content of message 2 of messages' is int 3; a string is wanted."),
    ({"reasoning": "a", "thinking": "b"}, "message 2 of messages has two reasonings, in ['reasoning', 'thinking']"),
    ({"content": 7}, "'content of message 2 of messages' is int 7; a string is wanted. Write it in quotes."),
    ({"content": None}, "an object with role and content is wanted. There is nothing to learn from: fill it"),
    ({"content": {"text": "B"}}, "'content of message 2 of messages' is dict {'text': 'B'}; a string is wanted."),
    ({"content": [{"type": "image_url", "image_url": "x"}]}, "is a list of parts of the types ['image_url']; a str"),
    ({"content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "of the types ['text', 'image']; a string, or"),
    ({"content": [{"type": "text", "text": "a"}] * 2}, "of the types ['text', 'text']; a string, or one part of type"),
    ({"content": [{"type": "text", "text": 3}]}, "a string, or one part of type text, is wanted. Write one text"),
    ({"content": ["a"]}, "'content of message 2 of messages' is list ['a']; a string is wanted."),
    ({"content": []}, "is a list of parts of the types []; a string"),
]


@pytest.mark.parametrize("more, message", REFUSED)
def test_keys_that_would_change_what_a_message_says_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError) as error:
        load_examples(put(tmp_path, {"messages": chat()}, {"messages": chat(more)}))
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ") and message in str(error.value)


def test_values_that_say_nothing(tmp_path):
    nothing = dict.fromkeys(sorted(MESSAGE_KEYS - {"role", "content", "from", "value"}))
    assert learned(tmp_path, {"messages": chat(nothing), "tools": [], "images": None, "history": []}) == BOTH
    (example,) = load_examples(put(tmp_path, {"messages": chat({**nothing, "tool_calls": [], "name": None})}))
    assert example.unread_keys == () and example.turns[1] == Turn("assistant", "B")


def test_one_part_of_text_is_a_text(tmp_path):
    parts = [{"type": "text", "text": "B"}]
    examples = load_examples(put(tmp_path, {"messages": chat({"content": parts})}, {"messages": chat()}))
    assert examples[0].turns == examples[1].turns


def test_a_row_without_a_target_has_nothing_to_learn_from(tmp_path):
    rows = put(tmp_path, {"messages": chat({"weight": 0}, {"loss": False})}, {"messages": chat()})
    with pytest.raises(ValueError, match="rows.jsonl:1: every answer is marked as no target .* data.empty to 'drop'"):
        load_examples(rows)
    dropped = []
    assert len(load_examples(rows, DataOptions(empty="drop"), dropped.append)) == len(dropped) == 1
    (example,) = load_examples(put(tmp_path, {"messages": chat({"content": "", "weight": 0})}))
    assert example.turns[1] == Turn("assistant", "", is_target=False)  # what is not learned may be empty


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_its_names(tmp_path, key):
    (example,) = load_examples(put(tmp_path, {"messages": chat({key: "hm"})}))
    assert [turn.reasoning for turn in example.turns] == ["", "hm", "", ""]


def test_keys_that_nothing_reads_are_counted_and_named(tmp_path):
    rows = [{"messages": chat()} for _ in range(9)]
    rows[2] = {"messages": chat({"name": "anna", "id": 3}), "weight": 0.5, "id": 7}
    rows[5] = {"messages": chat({"name": "ben"}, user={"train": True}), "system_prompt": "Be brief."}
    examples = load_examples(put(tmp_path, *rows))
    assert [example.unread_keys for example in examples if example.unread_keys] == [
        ("weight", "messages[].name", "messages[].id"),
        ("system_prompt", "messages[].train", "messages[].name"),
    ]
    path = f"{tmp_path}/rows.jsonl"
    assert describe_unread_keys(examples) == [
        f"the key 'weight' is not read: 1 row, the first {path}:3 (weights come from weights.file or weights.score, "
        "or are learned)",
        f"the key 'messages[].name' is not read: 2 rows, the first {path}:3",
        f"the key 'messages[].id' is not read: 1 row, the first {path}:3",
        f"the key 'system_prompt' is not read: 1 row, the first {path}:6 (set data.system_field to it)",
        f"the key 'messages[].train' is not read: 1 row, the first {path}:6 (only answers are targets)",
    ]
    options = DataOptions(system_field="system_prompt", source_field="weight")
    assert "system_prompt" not in str([e.unread_keys for e in load_examples(put(tmp_path, *rows), options)])


@pytest.mark.parametrize(
    "more, message",
    [
        ({"tools": [{"name": "f"}]}, "the row has 'tools' = list [{'name': 'f'}], which is not read. Tools are not"),
        ({"loss_mask": [0, 1]}, "has 'loss_mask' = list [0, 1], which is not read. Mark the messages that are no tar"),
        ({"history": [["a", "b"]]}, "has 'history' = list [['a', 'b']], which is not read. Earlier turns are read fr"),
        ({"images": ["a.png"]}, "has 'images' = list ['a.png'], which is not read. Only text is read"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "which is not read. Chat templates get no options"),
    ],
)
@pytest.mark.parametrize("row", [{"messages": chat()}, {"prompt": "a", "response": "b"}])
def test_keys_that_would_change_what_a_row_says_are_refused(tmp_path, row, more, message):
    with pytest.raises(ValueError) as error:
        load_examples(put(tmp_path, row, row | more))
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: the row") and message in str(error.value)


def test_the_system_message_beside_a_chat(tmp_path):
    row = {"messages": chat(), "system": "Be brief."}
    (example,) = load_examples(put(tmp_path, row))
    assert example.turns[0] == Turn("system", "Be brief.") and len(example.turns) == 5


def test_marks_and_reasoning_survive_a_file(tmp_path):
    rows = [
        {"messages": chat({"weight": 0}, {"reasoning_content": "hm"})},
        {"prompt": chat()[:1], "response": chat({"reasoning": "hm"})[1:2]},
    ]
    pair = {"prompt": chat()[:1], "chosen": chat({"thinking": "hm"})[1:2], "rejected": chat()[3:]}
    for batch in (rows[:1], rows[1:], [pair]):
        examples = load_examples(put(tmp_path, *batch))
        again = load_examples(put(tmp_path, *map(example_to_row, examples)))
        assert [(e.turns, e.rejected, e.id) for e in again] == [(e.turns, e.rejected, e.id) for e in examples]
    (example,) = load_examples(put(tmp_path, rows[0]))
    assert load_examples(put(tmp_path, example_to_row(example, "sharegpt")))[0].turns == example.turns
    with pytest.raises(ValueError, match="does not fit the layout 'prompt', which has strings. Use 'chat'."):
        example_to_row(load_examples(put(tmp_path, rows[1]))[0], "prompt")


def test_marks_belong_to_the_identity_of_an_example(tmp_path):
    rows = [chat(), chat({"weight": 0}), chat({"reasoning": "hm"}), chat({"weight": 1})]
    ids = [example.id for example in load_examples(put(tmp_path, *({"messages": one} for one in rows)))]
    assert len({one.split("#")[0] for one in ids}) == 3 and ids[3] == ids[0].replace("#0", "#1")
    assert hash_content([Turn("user", "a")]) == "050d8ef56e888db0"  # files of weights name examples by it
    said = hashlib.sha256(json.dumps([["assistant", "B", False, "hm"]]).encode()).hexdigest()[:16]
    assert hash_content([Turn("assistant", "B", is_target=False, reasoning="hm")]) == said  # as before weights


def test_what_was_found_is_told(tmp_path):
    examples = load_examples(put(tmp_path, {"messages": chat({"weight": 0}, {"reasoning": "hm"})}))
    assert "1 answer is marked as no target; 1 answer comes with a reasoning" in summarize_examples(examples)
