r"""Chat, Alpaca, ShareGPT and preference formats of training examples.

What a row may look like (`DataOptions.format` forces one; its other options give other names to fields):
    text                 text
    chat                 messages = [{"role": "user", "content": "..."}, ...]
    sharegpt             conversations (or conversation) = [{"from": "human", "value": "..."}, ...]
    prompt               prompt, response
    completion           prompt, completion
    alpaca               instruction, output; input and history (pairs of earlier turns) may be absent or empty
    preference           prompt, chosen, rejected
    implicit_preference  chosen, rejected, which begin alike: the prompt is the turns, or the words, that they share
    alpaca_preference    instruction, chosen, rejected; input and history as in alpaca; an output is not read
    sharegpt_preference  conversations, chosen, rejected
    hh                   chosen, rejected, dialogues with "\n\nHuman:" and "\n\nAssistant:" before the turns; or text

A bare string is a text row as well. prompt, response, completion, chosen and rejected are strings or lists of
messages; a response may repeat the messages of the prompt. Beside every layout but text and hh, `system` may hold the
system message. ShareGPT dialogues that end with the user are cut behind the last answer.

Of a message, role and content (from and value) are read; weight (0 or 1), train, loss and trainable (false or true) say
whether an answer is a target; reasoning_content (reasoning, thinking) goes to the chat template. Keys that would change
what a row says and that nothing reads are refused (`turns.UNSUPPORTED_KEYS`, `turns.UNSUPPORTED_ROW_KEYS`); any other
key of a message with a value is counted and named.
"""

from collections.abc import Callable
from typing import Any

from bilevel_jax.lm.data import pairs
from bilevel_jax.lm.data.turns import (
    CHAT_ROLES,
    SHAREGPT_ROLES,
    DataOptions,
    Dialogue,
    EmptyExampleError,
    Turn,
    Turns,
    check_row,
    check_row_keys,
    count_shared_turns,
    find_conversation_field,
    find_unread_keys,
    join_response,
    parse_messages,
    prepend_system,
    read_conversation,
    read_field,
    read_instruction,
    read_prompt,
    require_answer,
    require_nonblank,
    turn_to_message,
)

MISSING_ANSWER = "\ufffc"
"""Stands for the answer of a row that has none: the object replacement character, which is no text."""


def detect_format(row: Any, options: DataOptions, where: str) -> str:
    """The layout of a file, from its first row."""
    if isinstance(row, str):
        return "text"
    check_row(row, where)
    if options.text_field != DataOptions.text_field:
        return "text"
    if options.response_field != DataOptions.response_field:
        return "prompt"
    sides = {options.chosen_field, options.rejected_field}
    if sides != {DataOptions.chosen_field, DataOptions.rejected_field} or sides <= set(row):
        return pairs.detect_preference_format(row, options, where)
    if options.prompt_field != DataOptions.prompt_field:
        return "prompt"
    if options.messages_field != DataOptions.messages_field:
        return _detect_chat_or_sharegpt(row, options)
    required_fields = {
        "chat": {"messages"},
        "sharegpt": {"conversation" if "conversation" in row else "conversations"},
        "prompt": {"prompt", "response"},
        "completion": {"prompt", "completion"},
        "alpaca": {"instruction", "output"},
        "text": {"text"},
    }
    matches = [kind for kind, fields in required_fields.items() if fields <= set(row)]
    if len(matches) == 1:
        return _detect_chat_or_sharegpt(row, options) if matches == ["chat"] else matches[0]
    if matches:
        raise ValueError(f"{where}: the keys {sorted(row)} fit the formats {matches}. Set data.format to one of them.")
    if sides & set(row):
        return "preference"  # whose reader says which side is missing
    if "prompt" in row:
        return "prompt"  # whose reader says that the response is missing
    raise ValueError(
        f"{where}: no known layout; the keys are {sorted(row)}, and 'messages', 'conversations', 'prompt' and "
        "'response', 'instruction' and 'output', 'chosen' and 'rejected', or 'text' are wanted. "
        "Set data.prompt_field and data.response_field, or data.text_field, to your names."
    )


def parse_row(row: Any, row_format: str, options: DataOptions, where: str) -> Dialogue:
    """What a row of the given layout says; raises Empty for a row with nothing to learn from."""
    if isinstance(row, str):
        if row_format != "text":
            raise ValueError(f"{where}: a bare string among {row_format} rows. Keep one layout per file.")
        row = {options.text_field: row}
    check_row(row, where)
    fields_read = _list_fields_read(row, row_format, options)
    check_row_keys(row, fields_read, where)
    dialogue = READ_FORMATS[row_format](row, options, where)
    sides = [dialogue.turns, dialogue.rejected] if dialogue.rejected else [dialogue.turns]
    for side in sides:
        answers = [turn for turn in side if turn.role == "assistant"]
        if answers and not any(turn.is_target for turn in answers):
            raise EmptyExampleError(
                f"{where}: every answer is marked as no target (weight 0, or train, loss or trainable false), so "
                "there is nothing to learn from. Remove the row, or set data.empty to 'drop' to leave such rows out."
            )
        if dialogue.rejected and (odd := next((turn for turn in answers if turn.weight != 1), None)):
            raise ValueError(
                f"{where}: an answer has the weight {odd.weight:g}, and a preference compares the log-likelihoods of "
                "whole responses: weigh the pair as an example, and leave 0, 1 or nothing as the weight of a message."
            )
    return dialogue._replace(unread_keys=find_unread_keys(row, fields_read))


def add_missing_answer(row: Any, options: DataOptions) -> Any:
    """A row that asks and has no answer, with MISSING_ANSWER in its place; any other row as it is."""
    if not isinstance(row, dict) or {options.chosen_field, options.rejected_field} & set(row):
        return row
    for name in dict.fromkeys((options.messages_field, find_conversation_field(row, options))):
        messages = row.get(name)
        if isinstance(messages, list) and messages and isinstance(last := messages[-1], dict):
            keys = ("from", "value") if "from" in last else ("role", "content")
            is_question = isinstance(last.get(keys[0]), str) and SHAREGPT_ROLES.get(last[keys[0]].lower()) == "user"
            answer = dict(zip(keys, ("gpt" if "from" in last else "assistant", MISSING_ANSWER), strict=True))
            return row | {name: [*messages, answer]} if is_question else row
    layouts: tuple[tuple[str, tuple[str, ...]], ...] = (
        (options.prompt_field, (options.response_field, "completion")),
        ("instruction", ("output",)),
    )
    for prompt, fields in layouts:
        if prompt in row:
            answers = {name: row[name] for name in fields if name in row}
            is_blank = all(isinstance(answer, str) and not answer.strip() for answer in answers.values())
            return row | {next(iter(answers), fields[0]): MISSING_ANSWER} if is_blank else row
    return row


def dialogue_to_row(dialogue: Dialogue, row_format: str, where: str) -> dict[str, Any]:
    """A row of the given layout that `read` reads as the same turns.

    preference gives strings, preference_chat lists of messages. Raises ValueError for a dialogue that the layout
    cannot hold.
    """
    if row_format not in WRITE_FORMATS:
        raise ValueError(f"the layout is {row_format!r}; it is one of {list(WRITE_FORMATS)}.")
    if bool(dialogue.rejected) != row_format.startswith("preference"):
        has, use = ("a pair", "preference_chat") if dialogue.rejected else ("a dialogue that is no pair", "chat")
        raise ValueError(f"{where}: {has} does not fit the layout '{row_format}'. Use '{use}'.")
    if (dialogue.turns[0].role == "text") != (row_format == "text"):
        is_, use = ("a dialogue", "chat") if row_format == "text" else ("a plain text", "text")
        raise ValueError(f"{where}: {is_} does not fit the layout '{row_format}'. Use '{use}'.")
    return WRITE_FORMATS[row_format](dialogue, where)


def has_message_keys(turns: Turns) -> bool:
    """Whether a turn says more than its role and content, which only messages can hold."""
    return any(not turn.is_target or turn.reasoning or turn.weight != 1 for turn in turns)


# ---- rows -> turns


def _parse_text(row: dict, options: DataOptions, where: str) -> Dialogue:
    text = read_field(row, options.text_field, "Set data.text_field to one of them.", where)
    return Dialogue((Turn("text", require_nonblank(text, options.text_field, where)),))


def _parse_chat(row: dict, options: DataOptions, where: str) -> Dialogue:
    name = options.messages_field
    messages = parse_messages(read_field(row, name, "Keep one layout per file.", where), name, CHAT_ROLES, where)
    return Dialogue(require_answer(prepend_system(messages, row, options, where), where))


def _parse_sharegpt(row: dict, options: DataOptions, where: str) -> Dialogue:
    turns = read_conversation(row, options, where)
    # They are pieces of longer dialogues. No loss sees what stands behind the last answer, so nothing is lost.
    length = max((i for i, turn in enumerate(turns, 1) if turn.role == "assistant"), default=0)
    if not length:
        raise EmptyExampleError(
            f"{where}: no message of the assistant, so there is nothing to learn from. "
            "Remove the row, or set data.empty to 'drop' to leave such rows out."
        )
    return Dialogue(turns[:length], num_dropped_turns=len(turns) - length)


def _parse_prompt_response(row: dict, options: DataOptions, where: str) -> Dialogue:
    name = options.response_field
    response = read_field(row, name, "Set data.response_field to one of them.", where)
    return Dialogue(join_response(read_prompt(row, options, where), response, name, where))


def _parse_prompt_completion(row: dict, options: DataOptions, where: str) -> Dialogue:
    response = read_field(row, "completion", "Keep one layout per file, or set data.response_field.", where)
    return Dialogue(join_response(read_prompt(row, options, where), response, "completion", where))


def _parse_alpaca(row: dict, options: DataOptions, where: str) -> Dialogue:
    prompt = read_instruction(row, options, where)
    remedy = "Keep one layout per file, or set data.prompt_field and data.response_field."
    return Dialogue(
        (
            *prompt,
            Turn("assistant", require_nonblank(read_field(row, "output", remedy, where), "output", where)),
        )
    )


def _detect_chat_or_sharegpt(row: dict, options: DataOptions) -> str:
    messages = row.get(options.messages_field)
    first = messages[0] if isinstance(messages, list) and messages else None
    return "sharegpt" if isinstance(first, dict) and "from" in first else "chat"


READ_FORMATS: dict[str, Callable[[dict, DataOptions, str], Dialogue]] = {
    "text": _parse_text,
    "chat": _parse_chat,
    "sharegpt": _parse_sharegpt,
    "prompt": _parse_prompt_response,
    "completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "preference": pairs.parse_preference,
    "implicit_preference": pairs.parse_implicit_preference,
    "alpaca_preference": pairs.parse_alpaca_preference,
    "sharegpt_preference": pairs.parse_sharegpt_preference,
    "hh": pairs.parse_hh,
}

_PAIR_FIELDS = ("chosen_field", "rejected_field")
FIELDS_READ: dict[str, tuple[str, ...]] = {
    "text": ("text_field",),
    "chat": ("messages_field", "system_field"),
    "sharegpt": ("conversations", "system_field"),
    "prompt": ("prompt_field", "response_field", "system_field"),
    "completion": ("prompt_field", "completion", "system_field"),
    "alpaca": ("instruction", "input", "output", "history", "system_field"),
    "preference": ("prompt_field", *_PAIR_FIELDS, "system_field"),
    "implicit_preference": (*_PAIR_FIELDS, "system_field"),
    "alpaca_preference": ("instruction", "input", "history", *_PAIR_FIELDS, "system_field"),
    "sharegpt_preference": ("conversations", *_PAIR_FIELDS, "system_field"),
    "hh": (*_PAIR_FIELDS, "text_field"),
}
"""The keys of a row that a format reads, or the options that name them."""


def _list_fields_read(row: dict, row_format: str, options: DataOptions) -> frozenset[str]:
    names = {getattr(options, name, name) for name in FIELDS_READ[row_format]}
    if "conversations" in names:
        names.add(find_conversation_field(row, options))
    return frozenset({*names, options.source_field, options.label_field})


# ---- turns -> rows


def _turns_to_messages(turns: Turns) -> list[dict[str, Any]]:
    return [turn_to_message(turn) | _weight_keys(turn) for turn in turns]


def _weight_keys(turn: Turn) -> dict[str, float]:
    weight = turn.weight if turn.is_target else 0
    return {} if weight == 1 else {"weight": weight}


def _to_sharegpt(dialogue: Dialogue, where: str) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {
        "conversations": [
            {"from": names[message.pop("role")], "value": message.pop("content"), **message}
            for message in _turns_to_messages(dialogue.turns)
        ]
    }


def _to_prompt_response(turns: Turns, names: tuple[str, str], row_format: str, where: str) -> dict[str, str]:
    """One prompt and one response under the given names, with the system message if there is one."""
    system = {"system": turns[0].content} if turns[0].role == "system" and turns[0].content else {}
    rest = turns[len(system) :]
    use = "preference_chat" if row_format == "preference" else "chat"
    if has_message_keys(rest):
        raise ValueError(
            f"{where}: an answer with reasoning, with a weight or that is no target does not fit the layout "
            f"'{row_format}', which has strings. Use '{use}'."
        )
    if [turn.role for turn in rest] != ["user", "assistant"]:
        raise ValueError(
            f"{where}: a dialogue of {len(turns)} messages does not fit the layout '{row_format}', which has one "
            f"prompt and one response. Use '{use}'."
        )
    return system | dict(zip(names, (turn.content for turn in rest), strict=True))


def _to_preference(dialogue: Dialogue, where: str) -> dict[str, Any]:
    chosen = _to_prompt_response(dialogue.turns, ("prompt", "chosen"), "preference", where)
    return chosen | _to_prompt_response(dialogue.rejected, ("prompt", "rejected"), "preference", where)


def _to_preference_chat(dialogue: Dialogue, where: str) -> dict[str, Any]:
    num_shared = count_shared_turns(dialogue.turns, dialogue.rejected)
    sides = {
        "prompt": dialogue.turns[:num_shared],
        "chosen": dialogue.turns[num_shared:],
        "rejected": dialogue.rejected[num_shared:],
    }
    return {name: _turns_to_messages(turns) for name, turns in sides.items()}


WRITE_FORMATS: dict[str, Callable[[Dialogue, str], dict[str, Any]]] = {
    "text": lambda dialogue, where: {"text": dialogue.turns[0].content},
    "chat": lambda dialogue, where: {"messages": _turns_to_messages(dialogue.turns)},
    "sharegpt": _to_sharegpt,
    "prompt": lambda dialogue, where: _to_prompt_response(dialogue.turns, ("prompt", "response"), "prompt", where),
    "completion": lambda dialogue, where: _to_prompt_response(
        dialogue.turns, ("prompt", "completion"), "completion", where
    ),
    "alpaca": lambda dialogue, where: (
        _to_prompt_response(dialogue.turns, ("instruction", "output"), "alpaca", where) | {"input": ""}
    ),
    "preference": _to_preference,
    "preference_chat": _to_preference_chat,
}
