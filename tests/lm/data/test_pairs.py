"""Preference rows of every layout become two dialogues that answer one prompt."""

import pytest

from bilevel_jax.lm.data.examples import example_to_row, find_duplicates, is_preference_pair, load_examples
from bilevel_jax.lm.data.formats import READ_FORMATS
from bilevel_jax.lm.data.turns import DataOptions, Turn, count_shared_turns, turn_to_message
from tests.lm.rows import lines, put

ASK = (Turn("user", "1 + 1?"),)
RIGHT, WRONG = ((Turn("assistant", text),) for text in ("2", "3"))
BRIEF = (Turn("system", "Be brief."),)
LONG = (*ASK, *RIGHT, Turn("user", "Sure?"))
DIGITS = {"chosen": "2", "rejected": "3"}


def said(*turns):
    return list(map(turn_to_message, turns))


def from_value(*turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn.role], "value": turn.content} for turn in turns]


def marked(*turns):
    return "".join(f"\n\n{'Human' if role == 'user' else 'Assistant'}: {content}" for role, content, *_ in turns)


SIDES = {"chosen": said(*RIGHT), "rejected": said(*WRONG)}
WHOLE = {"chosen": said(*ASK, *RIGHT), "rejected": said(*ASK, *WRONG)}
FIELDS = DataOptions(prompt_field="question", chosen_field="good", rejected_field="bad", system_field="role")

READ = [
    ("preference", {"prompt": "1 + 1?"} | DIGITS, DataOptions(), ASK),
    ("preference", {"prompt": "1 + 1?", "system": "Be brief."} | DIGITS, DataOptions(), BRIEF + ASK),
    ("preference", {"prompt": said(*LONG)} | SIDES, DataOptions(), LONG),
    ("preference", {"prompt": said(*LONG)} | DIGITS, DataOptions(), LONG),
    ("preference", {"prompt": "1 + 1?"} | WHOLE, DataOptions(), ASK),
    ("preference", {"prompt": "1 + 1?", "messages": said(*ASK, *RIGHT)} | WHOLE, DataOptions(), ASK),
    ("preference", {"prompt": said(*BRIEF, *ASK)} | WHOLE, DataOptions(), BRIEF + ASK),
    ("preference", {"question": "1 + 1?"} | DIGITS, DataOptions(prompt_field="question"), ASK),
    ("preference", {"question": "1 + 1?", "good": "2", "bad": "3", "role": "Be brief."}, FIELDS, BRIEF + ASK),
    ("preference", {"prompt": "1 + 1?", "response": "4"} | DIGITS, DataOptions(), ASK),
    ("implicit_preference", WHOLE, DataOptions(), ASK),
    ("implicit_preference", WHOLE | {"system": "Be brief."}, DataOptions(), BRIEF + ASK),
    (
        "implicit_preference",
        {"chosen": said(*BRIEF, *LONG, *RIGHT), "rejected": said(*BRIEF, *LONG, *WRONG)},
        DataOptions(),
        BRIEF + LONG,
    ),
    ("alpaca_preference", {"instruction": "1 + 1?", "output": "4"} | DIGITS, DataOptions(), ASK),
    ("alpaca_preference", {"instruction": "1 +", "input": "1?"} | DIGITS, DataOptions(), (Turn("user", "1 +\n1?"),)),
    ("sharegpt_preference", {"conversations": from_value(*LONG)} | SIDES, DataOptions(), LONG),
    (
        "sharegpt_preference",
        {"conversations": from_value(*ASK), "chosen": from_value(*RIGHT)[0], "rejected": from_value(*WRONG)[0]},
        DataOptions(),
        ASK,
    ),
    ("hh", {"chosen": marked(*LONG, *RIGHT), "rejected": marked(*LONG, *WRONG)}, DataOptions(), LONG),
    ("hh", {"chosen": marked(*ASK, *RIGHT)[2:], "rejected": marked(*ASK, *WRONG)[2:]}, DataOptions(), ASK),
]


@pytest.mark.parametrize("name, row, options, prompt", READ)
def test_layout(tmp_path, name, row, options, prompt):
    (example,) = load_examples([put(tmp_path, lines(row))], options)
    assert (example.format, example.turns, example.rejected) == (name, prompt + RIGHT, prompt + WRONG)
    assert is_preference_pair(example) and count_shared_turns(example.turns, example.rejected) == len(prompt)
    again = put(tmp_path, lines(example_to_row(example)), "again.jsonl")
    assert [(e.id, e.format) for e in load_examples([again])] == [(example.id, "preference")]


def test_every_format_is_tested():
    assert {name for name, *_ in READ} == {name for name in READ_FORMATS if "preference" in name or name == "hh"}


@pytest.mark.parametrize(
    "chosen, rejected, parts",
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("Q: 1\nA:  2", "Q: 1\nA:  3", ("Q: 1\nA:", "  2", "  3")),
        ("The sky\nis", "The sky is", ("The sky", "\nis", " is")),
        ("The sky is", "The sky is green.", ("The sky", " is", " is green.")),
        ("The sky is", "The sky is.", ("The sky", " is", " is.")),
    ],
)
def test_texts_part_between_words(tmp_path, chosen, rejected, parts):
    (pair,) = load_examples([put(tmp_path, lines({"chosen": chosen, "rejected": rejected}))])
    assert pair.format == "implicit_preference"
    assert (pair.turns[0].content, pair.turns[1].content, pair.rejected[1].content) == parts
    assert pair.turns[0] == pair.rejected[0]


def test_turns_of_one_speaker_in_a_row_are_one(tmp_path):
    left = "\n\nHuman: a\n\nAssistant: b\n\nAssistant:  c\n\nc\n\nHuman: d\n\nAssistant: "
    (pair,) = load_examples([put(tmp_path, lines({"chosen": left + "e", "rejected": left + "f\n\nAssistant: g"}))])
    prompt = (Turn("user", "a"), Turn("assistant", "b\n\nc\n\nc"), Turn("user", "d"))
    assert pair.turns == (*prompt, Turn("assistant", "e"))
    assert pair.rejected == (*prompt, Turn("assistant", "f\n\ng"))


def test_a_single_dialogue_with_marks(tmp_path):
    path = put(tmp_path, lines({"text": marked(*ASK, *RIGHT)}))
    assert load_examples([path])[0].turns == (Turn("text", "\n\nHuman: 1 + 1?\n\nAssistant: 2"),)
    (example,) = load_examples([path], DataOptions(format="hh"))
    assert (example.turns, example.rejected) == (ASK + RIGHT, ())


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


EQUAL = "rows.jsonl:1: 'chosen' and 'rejected' are equal, so there is nothing to prefer. Remove the row, or set data."
ENDS = "'chosen' ends with a turn of Human, which nothing answers. Remove the row, or set data.empty to 'drop'"
EMPTY = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, EQUAL),
    ({"chosen": "a b", "rejected": "a b"}, EQUAL),
    ({"chosen": said(*ASK, *RIGHT), "rejected": said(*ASK, *RIGHT)}, EQUAL),
    (hh(marked(*ASK, *RIGHT), marked(*ASK, *RIGHT) + " \n"), EQUAL),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rows.jsonl:1: 'rejected' is empty, so there is nothing to learn"),
    ({"chosen": "", "rejected": "a b"}, "rows.jsonl:1: 'chosen' is empty"),
    (hh(marked(*ASK) + "\n\nAssistant: ", marked(*ASK, *WRONG)), "'turn 2 of chosen' is empty"),
    (hh(marked(*ASK, *RIGHT, *ASK), marked(*ASK, *WRONG)), ENDS),
]


@pytest.mark.parametrize("row, message", EMPTY)
def test_nothing_to_prefer(tmp_path, row, message):
    options = DataOptions(format="hh") if "Human:" in str(row) else DataOptions()
    path = put(tmp_path, lines(row, row))
    with pytest.raises(ValueError) as error:
        load_examples([path], options)
    assert message in str(error.value)
    dropped = []
    with pytest.raises(ValueError, match="no rows but 2 with nothing to learn from"):
        load_examples([path], DataOptions(format=options.format, empty="drop"), dropped.append)
    assert len(dropped) == 2 and message in dropped[0]


ERRORS = [
    (
        {"prompt": "a", "chosen": "b"},
        "rows.jsonl:1: no 'rejected'; the keys are ['chosen', 'prompt']. Set data.rejected_",
    ),
    (
        {"prompt": "a", "rejected": "b"},
        "no 'chosen'; the keys are ['prompt', 'rejected']. Set data.chosen_field to one",
    ),
    (
        {"prompt": "a", "instruction": "b"} | DIGITS,
        "fit the formats ['preference', 'alpaca_preference']. Set data.form",
    ),
    (
        {"question": "1 + 1?"} | DIGITS,
        "no 'prompt', but 'question'; the keys are ['chosen', 'question', 'rejected']. Set",
    ),
    (
        {"question": "1 + 1?"} | DIGITS,
        "data.format to 'implicit_preference' if the prompt is what 'chosen' and 'rejected'",
    ),
    (DIGITS, "'chosen' and 'rejected' do not begin with the same words and end with others"),
    ({"chosen": "Paris", "rejected": "Paris it is"}, "are not two answers to one prompt. Set data.prompt_field to the"),
    (SIDES, "begin with 0 equal messages, and do not then give two answers to the user. Both must answer one prompt"),
    (WHOLE | {"rejected": said(*LONG, *WRONG)}, "begin with 2 equal messages, and do not then give two answers"),
    (WHOLE | {"rejected": said(Turn("user", "2?"), *WRONG)}, "begin with 0 equal messages, and do not then give two"),
    (WHOLE | {"rejected": said(*ASK)}, "the last message has role 'user'; training needs an answer."),
    ({"prompt": said(*ASK, *RIGHT)} | SIDES, "'prompt' is a prompt, and its last message has role 'assistant'. End it"),
    ({"prompt": "a"} | WHOLE, "'chosen' does not answer the prompt: list [{"),
    ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen' is int 1; a string is wanted."),
    ({"conversations": []} | SIDES, "'conversations' is a prompt, and it is empty. End it with a message of the user."),
    (
        hh("Hi.\n\nHuman: a\n\nAssistant: b", marked(*ASK, *WRONG)),
        "'chosen' does not begin with 'Human:' or 'Assistant:'",
    ),
    (hh(marked(*ASK, *RIGHT), marked(Turn("user", "2?"), *WRONG)), "begin with 0 equal messages"),
]


@pytest.mark.parametrize("row, message", ERRORS)
def test_error_in_a_row(tmp_path, row, message):
    with pytest.raises(ValueError) as error:
        load_examples([put(tmp_path, lines(row))])
    assert message in str(error.value)


def test_real_dialogues(shared):
    dropped = []
    path = str(shared / "data" / "hh_rlhf" / "harmless_test.jsonl")
    pairs = load_examples([path], DataOptions(empty="drop"), dropped.append)
    assert (len(pairs), {e.format for e in pairs}) == (2308, {"hh"})
    assert [int(text.split(".jsonl:")[1].split(":")[0]) for text in dropped] == [87, 517, 926, 1104]
    assert all("of chosen' is empty" in text for text in dropped)
    for pair in pairs:
        for side in (pair.turns, pair.rejected):
            assert [turn.role for turn in side] == ["user", "assistant"] * (len(side) // 2)
            assert pair.turns[:-1] == side[:-1]  # the two differ in the last answer alone
    assert not find_duplicates(pairs)


def test_real_instructions(shared):
    dropped = []
    path = str(shared / "data" / "preference" / "instruction_preference.json")
    pairs = load_examples([path], DataOptions(empty="drop"), dropped.append)
    assert (len(pairs), len(dropped), {e.format for e in pairs}) == (1094, 6, {"alpaca_preference"})
    assert all("are equal" in text for text in dropped)
    assert pairs[0].turns[0].content.endswith("spelling given.\nfreind --> friend")
    assert "flat out wrong" in pairs[0].rejected[1].content
