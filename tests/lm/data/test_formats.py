"""Rows of every layout become turns, and turns rows; what cannot be used is an error with line and remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel_jax.lm.data import formats
from bilevel_jax.lm.data.examples import Example, example_kind, example_to_row, load_examples
from bilevel_jax.lm.data.turns import DataOptions, Dialogue, Turn
from tests.lm.rows import lines, put

PAIR = (Turn("user", "1 + 1?"), Turn("assistant", "2"))
BRIEF = (Turn("system", "Be brief."), *PAIR)
LONG = (*PAIR, Turn("user", "2 + 2?"), Turn("assistant", "4"))
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
CHAT += [{"role": "assistant", "content": "ho"}]
QA = DataOptions(prompt_field="question", response_field="answer")


def said(turns, names=("from", "value"), **roles):
    return [dict(zip(names, (roles.get(turn.role, turn.role), turn.content), strict=True)) for turn in turns]


ROLES = ("role", "content")
GPT = said(LONG, user="human", assistant="gpt")

READ = [
    ("prompt", {"prompt": "1 + 1?", "response": "2"}, DataOptions(), PAIR),
    ("prompt", {"question": "1 + 1?", "answer": "2"}, QA, PAIR),
    ("prompt", {"prompt": "1 + 1?", "completion": "2"}, DataOptions(response_field="completion"), PAIR),
    ("prompt", {"prompt": "1 + 1?", "response": "2", "system": "Be brief."}, DataOptions(), BRIEF),
    ("prompt", {"prompt": said(LONG[:3], ROLES), "response": "4"}, DataOptions(), LONG),
    ("completion", {"prompt": "1 + 1?", "completion": "2"}, DataOptions(), PAIR),
    ("completion", {"prompt": said(LONG[:3], ROLES), "completion": said(LONG[3:], ROLES)}, DataOptions(), LONG),
    ("completion", {"prompt": said(LONG[:1], ROLES), "completion": said(LONG, ROLES)}, DataOptions(), LONG),
    ("alpaca", {"instruction": "1 + 1?", "output": "2"}, DataOptions(), PAIR),
    ("alpaca", {"instruction": "1 + 1?", "input": "", "output": "2"}, DataOptions(), PAIR),
    ("alpaca", {"instruction": "1 + 1?", "input": None, "output": "2", "system": ""}, DataOptions(), PAIR),
    ("alpaca", {"instruction": "1 + 1?", "output": "2", "system": "Be brief."}, DataOptions(), BRIEF),
    ("alpaca", {"instruction": "2 + 2?", "output": "4", "history": [["1 + 1?", "2"]]}, DataOptions(), LONG),
    ("alpaca", {"instruction": "1 +", "input": "1?", "output": "2"}, DataOptions(), (Turn("user", "1 +\n1?"), PAIR[1])),
    ("text", {"text": "Once."}, DataOptions(), (Turn("text", "Once."),)),
    ("text", "Once.", DataOptions(), (Turn("text", "Once."),)),
    ("text", {"story": "Once."}, DataOptions(text_field="story"), (Turn("text", "Once."),)),
    ("text", {"text": "Once.", "prompt": "a", "response": "b"}, DataOptions(format="text"), (Turn("text", "Once."),)),
    ("chat", {"messages": CHAT}, DataOptions(), tuple(Turn(**m) for m in CHAT)),
    ("chat", {"talk": CHAT}, DataOptions(messages_field="talk"), tuple(Turn(**m) for m in CHAT)),
    ("sharegpt", {"conversations": GPT}, DataOptions(), LONG),
    ("sharegpt", {"conversation": GPT, "system": "Be brief."}, DataOptions(), (BRIEF[0], *LONG)),
    ("sharegpt", {"conversations": said(BRIEF), "system": "Be brief."}, DataOptions(), BRIEF),
    ("sharegpt", {"conversations": said(LONG, user="User", assistant="ChatGPT")}, DataOptions(), LONG),
    ("sharegpt", {"conversations": said(LONG, ROLES)}, DataOptions(), LONG),
    ("sharegpt", {"messages": GPT}, DataOptions(), LONG),
    ("sharegpt", {"talk": GPT}, DataOptions(messages_field="talk"), LONG),
    ("sharegpt", {"talk": GPT, "text": "x"}, DataOptions(messages_field="talk", format="sharegpt"), LONG),
    ("sharegpt", {"conversations": GPT[:3]}, DataOptions(), PAIR),
]


@pytest.mark.parametrize("name, row, options, turns", READ)
def test_layout(tmp_path, name, row, options, turns):
    (example,) = load_examples([put(tmp_path, lines(row))], options)
    assert (example.format, example.turns, example.rejected) == (name, turns, ())
    assert (example.row, example.line, example.source, example.label) == (0, 1, "rows", None)
    assert example_kind(example) == {("text",): "text", ("user", "assistant"): "prompt"}.get(
        tuple(turn.role for turn in turns), "chat"
    )


def test_every_format_is_documented_and_tested():
    tested = {name for name, *_ in READ}
    assert tested == {name for name in formats.READ_FORMATS if "preference" not in name and name != "hh"}
    assert all(f"\n    {name} " in formats.__doc__ for name in formats.READ_FORMATS)


def test_sharegpt_rows_are_cut_behind_the_last_answer(tmp_path):
    rows = [{"conversations": GPT}, {"conversations": [*GPT, *said(LONG[:1]), *said(LONG[:1])]}]
    assert [(e.turns, e.num_dropped_turns) for e in load_examples([put(tmp_path, lines(*rows))])] == [
        (LONG, 0),
        (LONG, 2),
    ]


GOOD = {"prompt": "a", "response": "b"}
TOOL = {"from": "function_call", "value": "{}"}
KEYS = "Set data.prompt_field and data.response_field, or data.text_field, to your names."
ERRORS = [
    ("", "rows.jsonl: no rows."),
    (lines(*[GOOD] * 6) + '{"prompt": \n', "rows.jsonl:7: bad JSON, Expecting value at column 11. Mend that line."),
    (
        lines(GOOD, {"prompt": "a", "reply": "b"}),
        "rows.jsonl:2: no 'response'; the keys are ['prompt', 'reply']. Set data.response_field to one of them.",
    ),
    (lines({"prompt": "a", "reply": "b"}), "rows.jsonl:1: no 'response'; the keys are ['prompt', 'reply']. Set data."),
    (lines({"q": "a", "a": "b"}), "rows.jsonl:1: no known layout; the keys are ['a', 'q'], and 'messages', 'conv"),
    (lines({"q": "a", "a": "b"}), KEYS),
    (lines(GOOD | {"text": "c"}), "fit the formats ['prompt', 'text']. Set data.format to one of them."),
    (lines(GOOD | {"completion": "c"}), "fit the formats ['prompt', 'completion']. Set data.format to one of them."),
    (lines(GOOD, GOOD | {"response": " \n"}), "rows.jsonl:2: 'response' is empty, so there is nothing to learn from."),
    (lines({"text": ""}), "rows.jsonl:1: 'text' is empty"),
    (lines(GOOD | {"response": 3}), "rows.jsonl:1: 'response' is int 3; a string is wanted."),
    (lines(GOOD | {"response": None}), "rows.jsonl:1: no 'response'; the keys are ['prompt']."),
    (lines(GOOD | {"source": ["x"]}), "rows.jsonl:1: 'source' is list ['x']; a string or a number is wanted."),
    (lines(GOOD | {"system": 3}), "rows.jsonl:1: 'system' is int 3; a string is wanted."),
    (lines(GOOD, "text"), "rows.jsonl:2: a bare string among prompt rows. Keep one layout per file."),
    (lines({"text": "a"}, GOOD), "rows.jsonl:2: no 'text'; the keys are ['prompt', 'response']."),
    (lines({"instruction": "a", "output": "b"}, GOOD), "rows.jsonl:2: no 'instruction'; the keys are"),
    (
        lines({"instruction": "a", "output": "b", "history": [["x"]]}),
        "'history' holds list ['x']; pairs [instruction, output] are wanted.",
    ),
    (
        lines({"instruction": "a", "output": "b", "history": 0.5}),
        "'history' is float 0.5; a list of pairs [instruction, output] is wanted.",
    ),
    (lines({"messages": CHAT}, GOOD), "rows.jsonl:2: no 'messages'; the keys are"),
    (lines({"conversations": GPT}, GOOD), "rows.jsonl:2: no 'conversations'; the keys are"),
    (lines([1, 2]), "rows.jsonl:1: the row is list [1, 2]; a JSON object"),
    (lines({"messages": []}), "'messages' is list []; a list of {role, content} objects is wanted."),
    (
        lines({"messages": [{"role": "user"}]}),
        "message 1 of messages is dict {'role': 'user'}; an object with role and",
    ),
    (lines({"conversations": [{"from": "gpt"}]}), "{'from': 'gpt'}; an object with from and value is wanted."),
    (
        lines({"messages": [{"role": "human", "content": "a"}]}),
        "message 1 of messages has role str 'human'; the roles are ['system', 'user', 'assistant']. Rename it.",
    ),
    (lines({"conversations": said(PAIR, user="narrator")}), "message 1 of conversations has role str 'narrator'; the"),
    (
        lines({"messages": [*CHAT[1:], CHAT[0]]}),
        "message 3 of messages is a system message; only the first one may be.",
    ),
    (
        lines({"conversations": said(BRIEF), "system": "Be long."}),
        "a system message in 'system' and another in front of the messages. Remove one, or set data.system_field",
    ),
    (lines({"messages": CHAT[:2]}), "the last message has role 'user'; training needs an answer."),
    (lines({"messages": [{"role": "assistant", "content": ""}]}), "'content of message 1 of messages' is empty"),
    (
        lines({"conversations": [GPT[0], TOOL]}),
        "message 2 of conversations is a call of a tool or its result (role str",
    ),
    (lines({"messages": [CHAT[1], CHAT[2] | {"tool_calls": [{}]}]}), "message 2 of messages is a call of a tool"),
    (
        lines({"messages": [CHAT[1], {"role": "tool", "content": "a"}]}),
        "only system, user and assistant are read. Remove",
    ),
    (
        lines({"conversations": GPT[:1]}),
        "no message of the assistant, so there is nothing to learn from. Remove the row,",
    ),
    (lines({"conversations": []}), "no message of the assistant, so there is nothing to learn from."),
    (
        lines({"prompt": said(PAIR), "response": "a"}),
        "'prompt' is a prompt, and its last message has role 'assistant'.",
    ),
    (lines({"prompt": "a", "completion": said(PAIR)}), "'completion' does not answer the prompt: list [{"),
    (lines({"prompt": "1 + 1?", "completion": said(LONG[:3])}), "the last message has role 'user'; training needs an"),
    (
        b'{"text": "\xff"}\n',
        "rows.jsonl:1: not UTF-8 (byte 11 of the line). Convert the file to UTF-8, or mend that line.",
    ),
]


@pytest.mark.parametrize("text, message", ERRORS)
def test_error_in_a_row(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        load_examples([put(tmp_path, text)])
    assert message in str(error.value)


# ---- turns -> rows

filled = st.text(min_size=1).filter(str.strip)
system = st.just(()) | filled.map(lambda text: (Turn("system", text),))
asked = st.text().map(lambda text: (Turn("user", text),))
answer = filled.map(lambda text: (Turn("assistant", text),))
single = st.tuples(system, asked, answer).map(lambda parts: sum(parts, ()))
long = st.tuples(system, st.lists(st.tuples(asked, answer).map(lambda two: two[0] + two[1]), min_size=1)).map(
    lambda parts: parts[0] + sum(parts[1], ())
)


def pairs(prompts):
    sides = st.tuples(prompts, answer, answer).filter(lambda parts: parts[1] != parts[2])
    return sides.map(lambda parts: Dialogue(parts[0] + parts[1], parts[0] + parts[2]))


dialogues = {
    "text": filled.map(lambda text: Dialogue((Turn("text", text),))),
    "chat": long.map(Dialogue),
    "sharegpt": long.map(Dialogue),
    "prompt": single.map(Dialogue),
    "completion": single.map(Dialogue),
    "alpaca": single.map(Dialogue),
    "preference": pairs(st.tuples(system, asked).map(lambda parts: parts[0] + parts[1])),
    "preference_chat": pairs(st.tuples(long, asked).map(lambda parts: parts[0] + parts[1])),
}


@pytest.mark.parametrize("layout", formats.WRITE_FORMATS)
@given(data=st.data())
def test_a_row_that_was_written_is_read_as_the_same_turns(layout, data):
    dialogue = data.draw(dialogues[layout])
    row = formats.dialogue_to_row(dialogue, layout, "x:1")
    kind = formats.detect_format(row, DataOptions(), "x:1")
    assert kind == layout.removesuffix("_chat")
    assert formats.parse_row(row, kind, DataOptions(), "x:1") == dialogue


def example(turns, rejected=()):
    return Example("0#0", 0, turns, "web", None, "a.jsonl", 7, rejected)


@pytest.mark.parametrize(
    "turns, rejected, keys",
    [
        ((Turn("text", "Once."),), (), ["text"]),
        (PAIR, (), ["prompt", "response"]),
        (BRIEF, (), ["messages"]),
        (PAIR, (PAIR[0], Turn("assistant", "3")), ["prompt", "chosen", "rejected"]),
        (LONG, (*LONG[:3], Turn("assistant", "5")), ["prompt", "chosen", "rejected"]),
    ],
)
def test_a_layout_that_holds_the_example(turns, rejected, keys):
    row = example_to_row(example(turns, rejected))
    assert list(row) == keys
    assert isinstance(row[keys[0]], str) == (len(turns) < 3)


@pytest.mark.parametrize(
    "turns, rejected, layout, message",
    [
        (PAIR, (), "csv", "the layout is 'csv'; it is one of ['text', 'chat',"),
        (
            LONG,
            (),
            "prompt",
            "a.jsonl:7: a dialogue of 4 messages does not fit the layout 'prompt', which has one prompt",
        ),
        (LONG, (), "alpaca", "and one response. Use 'chat'."),
        (PAIR, (), "text", "a.jsonl:7: a dialogue does not fit the layout 'text'. Use 'chat'."),
        ((Turn("text", "a"),), (), "chat", "a.jsonl:7: a plain text does not fit the layout 'chat'. Use 'text'."),
        (PAIR, (), "preference", "a.jsonl:7: a dialogue that is no pair does not fit the layout 'preference'. Use"),
        (PAIR, PAIR[:1], "chat", "a.jsonl:7: a pair does not fit the layout 'chat'. Use 'preference_chat'."),
        (LONG, LONG[:3], "preference", "Use 'preference_chat'."),
    ],
)
def test_errors_of_layouts(turns, rejected, layout, message):
    with pytest.raises(ValueError) as error:
        example_to_row(example(turns, rejected), layout)
    assert message in str(error.value)


def test_real_instructions(shared):
    paths = [str(shared / "data" / "scalebio_tiny" / f"{name}.json") for name in ("train_alpaca", "train_gpt4_alpaca")]
    dropped = []
    train = load_examples(paths, DataOptions(empty="drop"), dropped.append)
    assert (len(train), len(dropped)) == (9993, 7)
    assert "train_alpaca.json:5602: 'output' is empty" in dropped[0]
    assert {e.format for e in train} == {"alpaca"} and {example_kind(e) for e in train} == {"prompt"}
    problems = load_examples([str(shared / "data" / "gsm8k" / "test.jsonl")], QA)
    assert len(problems) == 1319 and all("#### " in e.turns[1].content for e in problems)
