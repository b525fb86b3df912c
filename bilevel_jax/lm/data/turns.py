"""Chat messages and the fields of an example, read and checked."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from bilevel_jax.lm.data.files import describe_value

ROLES = ("system", "user", "assistant")
CHAT_ROLES = {role: role for role in ROLES}
SHAREGPT_ROLES = (
    CHAT_ROLES | {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant")
)
"""Names of the speakers in ShareGPT dialogues, in small letters -> roles."""
TOOL_ROLES = {"tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation"}
CONVERSATION_FIELDS = ("conversations", "conversation", "messages")
"""Fields in which ShareGPT rows have their messages, the usual one first."""


class Turn(NamedTuple):
    """One message: `role` is system, user or assistant, or text for a row that is no dialogue."""

    role: str
    content: str


Turns = tuple[Turn, ...]


class Dialogue(NamedTuple):
    """What a row says."""

    turns: Turns
    rejected: Turns = ()
    """In a preference pair, the dialogue with the response that was not preferred: the same prompt, another end."""
    num_dropped_turns: int = 0
    """User turns at the end that were left out because nothing answers them."""


@dataclass(frozen=True)
class DataOptions:
    """How to read a row. The names of the fields are used where the layout has such a field."""

    format: str = "auto"
    """auto, or a name in `formats.READ_FORMATS`."""
    prompt_field: str = "prompt"
    response_field: str = "response"
    text_field: str = "text"
    messages_field: str = "messages"
    """The list of messages; in ShareGPT rows `conversations` or `conversation` unless another name is given."""
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    system_field: str = "system"
    source_field: str = "source"
    label_field: str = "label"
    empty: str = "error"
    """What becomes of a row with nothing to learn from (an empty response or text, no answer at all, a chosen
    response equal to the rejected one): error, or drop (leave it out of the set)."""


class EmptyExampleError(ValueError):
    """A row with nothing to learn from."""


def count_shared_turns(turns: Turns, rejected: Turns) -> int:
    """How many turns the two dialogues of a pair begin with in common: the prompt's."""
    pairs = enumerate(zip(turns, rejected, strict=False))
    return next((i for i, (turn, other) in pairs if turn != other), min(len(turns), len(rejected)))


# ---- prompts and responses of a row


def read_prompt(row: dict, options: DataOptions, where: str) -> Turns:
    """What the prompt field holds, a string or messages that end with the user's, after the system message."""
    name = options.prompt_field
    value = read_field(row, name, "Set data.prompt_field to one of them.", where)
    if not isinstance(value, list):
        return prepend_system((Turn("user", require_string(value, name, where)),), row, options, where)
    return prepend_system(
        _require_question(parse_messages(value, name, SHAREGPT_ROLES, where), name, where), row, options, where
    )


def read_instruction(row: dict, options: DataOptions, where: str) -> Turns:
    """The prompt of an Alpaca row: history, instruction and input, after the system message."""
    remedy = "Keep one layout per file, or set data.prompt_field and data.response_field."
    text = require_string(read_field(row, "instruction", remedy, where), "instruction", where)
    extra = row.get("input")
    if extra is not None and require_string(extra, "input", where):
        text = f"{text}\n{extra}"
    turns: list[Turn] = []
    for earlier in row.get("history") or ():
        if not isinstance(earlier, list) or [type(text_part) for text_part in earlier] != [str, str]:
            raise ValueError(
                f"{where}: 'history' holds {describe_value(earlier)}; pairs [instruction, output] are wanted."
            )
        turns += [Turn("user", earlier[0]), Turn("assistant", require_nonblank(earlier[1], "history", where))]
    return prepend_system((*turns, Turn("user", text)), row, options, where)


def read_conversation(row: dict, options: DataOptions, where: str) -> Turns:
    """The messages of a ShareGPT row, after the system message; none where the list is empty."""
    name = find_conversation_field(row, options)
    value = read_field(row, name, "Set data.messages_field to one of them.", where)
    return prepend_system(
        () if value == [] else parse_messages(value, name, SHAREGPT_ROLES, where), row, options, where
    )


def read_conversation_prompt(row: dict, options: DataOptions, where: str) -> Turns:
    """A ShareGPT dialogue that waits for an answer."""
    return _require_question(read_conversation(row, options, where), find_conversation_field(row, options), where)


def find_conversation_field(row: dict, options: DataOptions) -> str:
    """Where a ShareGPT row has its messages."""
    if options.messages_field != DataOptions.messages_field:
        return options.messages_field
    return next((name for name in CONVERSATION_FIELDS if name in row), CONVERSATION_FIELDS[0])


def join_response(prompt: Turns, response: Any, name: str, where: str) -> Turns:
    """A prompt and its response, which is a string or messages; where those begin with the prompt, it stands once."""
    if not isinstance(response, (list, dict)):
        return (*prompt, Turn("assistant", require_nonblank(response, name, where)))
    answer = parse_messages([response] if isinstance(response, dict) else response, name, SHAREGPT_ROLES, where)
    for begin in (prompt, prompt[1:] if prompt[0].role == "system" else prompt):
        if answer[: len(begin)] == begin:
            answer = answer[len(begin) :]
    if not answer or answer[0].role != "assistant":
        raise ValueError(
            f"{where}: '{name}' does not answer the prompt: {describe_value(response)}. "
            "Begin it with a message of the assistant, or with all messages of the prompt."
        )
    return prompt + require_answer(answer, where)


def prepend_system(turns: Turns, row: dict, options: DataOptions, where: str) -> Turns:
    """The turns behind the row's own system message, if it has one."""
    text = row.get(options.system_field)
    if text is None or not require_string(text, options.system_field, where):
        return turns
    if turns and turns[0].role == "system":
        if turns[0].content != text:
            raise ValueError(
                f"{where}: a system message in '{options.system_field}' and another in front of the messages. "
                "Remove one, or set data.system_field to a name that no row has."
            )
        return turns
    return (Turn("system", text), *turns)


def require_answer(turns: Turns, where: str) -> Turns:
    """The turns, of which the last must be the assistant's."""
    if turns[-1].role != "assistant":
        raise ValueError(
            f"{where}: the last message has role '{turns[-1].role}'; training needs an answer. "
            "End the messages with role 'assistant'."
        )
    return turns


def _require_question(turns: Turns, name: str, where: str) -> Turns:
    if not turns or turns[-1].role != "user":
        last = f"its last message has role '{turns[-1].role}'" if turns else "it is empty"
        raise ValueError(f"{where}: '{name}' is a prompt, and {last}. End it with a message of the user.")
    return turns


# ---- messages, fields, strings


def parse_messages(value: Any, name: str, roles: dict[str, str], where: str) -> Turns:
    """A list of {role, content} or {from, value} as turns; `roles` says which names of speakers are known."""
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: '{name}' is {describe_value(value)}; a list of {{role, content}} objects is wanted."
        )
    turns = []
    for number, message in enumerate(value, 1):
        message_name = f"message {number} of {name}"
        keys = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
        if not isinstance(message, dict) or not set(keys) <= set(message):
            raise ValueError(
                f"{where}: {message_name} is {describe_value(message)}; an object with {' and '.join(keys)} is wanted."
            )
        speaker = message[keys[0]]
        if message.get("tool_calls") or (isinstance(speaker, str) and speaker.lower() in TOOL_ROLES):
            raise ValueError(
                f"{where}: {message_name} is a call of a tool or its result (role {describe_value(speaker)}); only "
                "system, user and assistant are read. Remove the row, or write the call into the text of a message."
            )
        role = roles.get(speaker.lower() if roles is SHAREGPT_ROLES else speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(
                f"{where}: {message_name} has role {describe_value(speaker)}; the roles are {list(roles)}. Rename it."
            )
        if role == "system" and number > 1:
            raise ValueError(f"{where}: {message_name} is a system message; only the first one may be.")
        check = require_nonblank if role == "assistant" else require_string
        turns.append(Turn(role, check(message[keys[1]], f"{keys[1]} of {message_name}", where)))
    return tuple(turns)


def check_row(row: Any, where: str) -> None:
    """Raises ValueError unless the row is an object with fields."""
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: the row is {describe_value(row)}; a JSON object such as {{"prompt": ...}} is wanted.'
        )


def read_field(row: dict, name: str, remedy: str, where: str) -> Any:
    """row[name], or a ValueError that names the keys and ends in the remedy."""
    if name in row:
        return row[name]
    raise ValueError(f"{where}: no '{name}'; the keys are {sorted(row)}. {remedy}")


def require_string(value: Any, name: str, where: str) -> str:
    """The value, which must be a string."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a string is wanted.")
    return value


def require_nonblank(value: Any, name: str, where: str) -> str:
    """The value, which must be a string with something else than white space in it; else Empty."""
    if not require_string(value, name, where).strip():
        raise EmptyExampleError(
            f"{where}: '{name}' is empty, so there is nothing to learn from. "
            "Fill it, or set data.empty to 'drop' to leave such rows out."
        )
    return value
