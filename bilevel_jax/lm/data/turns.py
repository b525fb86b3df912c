"""Chat messages and the fields of an example, read and checked."""

from collections.abc import Collection
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


WEIGHT_KEYS = ("weight", "loss_weight")
"""Keys of a message with the factor of its tokens' losses, as OpenAI-like services and LLaMA-Factory read them."""
TARGET_KEYS = (*WEIGHT_KEYS, "train", "loss", "trainable")
"""Keys of a message that say whether it is a target, in the words of several tools: 0 and false, or 1 and true."""
MAX_TURN_WEIGHT = 1e6
"""The largest weight of a turn or a token; more is taken for a mistake."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer with what was thought before it, as transformers hands it to chat templates."""
TOOL_KEYS = ("tool_calls", "tool_call_id", "function_call", "tool_responses")
UNSUPPORTED_KEYS = ("train_detail", "loss_mask", "images", "image", "audio", "audios", "video", "videos", "refusal")
"""Keys of a message that other tools learn from: without them the row would say something else."""
MESSAGE_KEYS = frozenset(
    ("role", "content", "from", "value", *TARGET_KEYS, *REASONING_KEYS, *TOOL_KEYS, *UNSUPPORTED_KEYS)
)
"""Keys of a message that are read, or refused; any other with a value is counted and named (`find_unread_keys`)."""
UNSUPPORTED_ROW_KEYS = {
    "tools": "Tools are not shown to chat templates: remove the key, or write them into the system message.",
    "functions": "Tools are not shown to chat templates: remove the key, or write them into the system message.",
    "documents": "Documents are not shown to chat templates: remove the key, or write them into a message.",
    "chat_template_kwargs": "Chat templates get no options: remove the key, or set the options in the template.",
    "loss_mask": 'Mark the messages that are no targets with "weight": 0, and remove the key.',
    "history": "Earlier turns are read from 'history' in alpaca rows alone: write them as messages.",
    "images": "Only text is read: remove the row, or the key.",
    "videos": "Only text is read: remove the row, or the key.",
    "audios": "Only text is read: remove the row, or the key.",
}
"""Keys of a row that other tools read beside the messages: without them the row would say something else -> remedy."""
UNREAD_ROW_KEYS = {
    "weight": "weights come from weights.file or weights.score, or are learned",
    "system": "data.format text and hh have no system message",
    "system_prompt": "set data.system_field to it",
    "system_message": "set data.system_field to it",
}
"""Keys of a row that other tools read, and that are counted and named where nothing reads them -> what is read."""


class Turn(NamedTuple):
    """One message: `role` is system, user or assistant, or text for a row that is no dialogue."""

    role: str
    content: str
    is_target: bool = True
    """Whether an answer is one to learn, where training asks for answers at its place: False for an answer that its
    row marks so (`weight`: 0, or `train`, `loss` or `trainable`: false)."""
    reasoning: str = ""
    """What the assistant thought before an answer, for chat templates that show it."""
    weight: float = 1.0
    """Factor of the losses of an answer's tokens, above 0; an answer of weight 0 is no target."""


Turns = tuple[Turn, ...]


class Dialogue(NamedTuple):
    """What a row says."""

    turns: Turns
    rejected: Turns = ()
    """In a preference pair, the dialogue with the response that was not preferred: the same prompt, another end."""
    num_dropped_turns: int = 0
    """User turns at the end that were left out because nothing answers them."""
    unread_keys: tuple[str, ...] = ()
    """Keys of the row and of its messages with a value that nothing reads: those of `find_unread_keys`."""


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
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(
            f"{where}: 'history' is {describe_value(history)}; a list of pairs [instruction, output] is wanted."
        )
    for earlier in history:
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
                "Remove one, or set data.system_field to '' to read none."
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


def turn_to_message(turn: Turn) -> dict[str, str]:
    """A turn as chat templates take it."""
    return {"role": turn.role, "content": turn.content} | (
        {"reasoning_content": turn.reasoning} if turn.reasoning else {}
    )


def parse_messages(value: Any, name: str, roles: dict[str, str], where: str) -> Turns:
    """A list of {role, content} or {from, value} as turns; `roles` says which names of speakers are known.

    Of the other keys, `TARGET_KEYS` and `REASONING_KEYS` are read, and `TOOL_KEYS` and `UNSUPPORTED_KEYS` are refused.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: '{name}' is {describe_value(value)}; a list of {{role, content}} objects is wanted."
        )
    turns = []
    for number, message in enumerate(value, 1):
        place = f"message {number} of {name}"
        turns.append(_parse_message(message, place, roles, where))
        if turns[-1].role == "system" and number > 1:
            raise ValueError(
                f"{where}: {place} is a system message; only the first one may be. Write its text into the first "
                "message, or into one of the user."
            )
    return tuple(turns)


def _parse_message(message: Any, place: str, roles: dict[str, str], where: str) -> Turn:
    role_key, content_key = (
        ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    )
    wanted = f"{where}: {place} is {describe_value(message)}; an object with {role_key} and {content_key} is wanted."
    if not isinstance(message, dict) or message.get(role_key) is None:
        raise ValueError(wanted)
    speaker = message[role_key]
    calls = [key for key in TOOL_KEYS if message.get(key)]
    if calls or (isinstance(speaker, str) and speaker.lower() in TOOL_ROLES):
        by = f"key '{calls[0]}'" if calls else f"role {describe_value(speaker)}"
        raise ValueError(
            f"{where}: {place} is a call of a tool or its result ({by}); only system, user and assistant are read. "
            "Remove the row, or write the call into the text of a message."
        )
    if unsupported := [key for key in UNSUPPORTED_KEYS if message.get(key)]:
        raise ValueError(
            f"{where}: {place} has '{unsupported[0]}' = {describe_value(message[unsupported[0]])}, which is not "
            f'supported. Remove the key or the row; whole answers are left out of the targets by "weight": 0.'
        )
    role = roles.get(speaker.lower() if roles is SHAREGPT_ROLES else speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(
            f"{where}: {place} has role {describe_value(speaker)}; the roles are {list(roles)}. Rename it."
        )
    weight = _read_weight(message, place, where)
    reasoning = _read_reasoning(message, place, where) if role == "assistant" else ""
    if message.get(content_key) is None:
        if role != "assistant":
            raise ValueError(wanted)
        raise EmptyExampleError(
            f"{wanted} There is nothing to learn from: fill it, or set data.empty to 'drop' to leave such rows out."
        )
    content = _read_content(message[content_key], f"{content_key} of {place}", where)
    if role != "assistant":
        return Turn(role, content)
    if weight:
        require_nonblank(content, f"{content_key} of {place}", where)
    return Turn(role, content, weight > 0, reasoning, weight or 1.0)


def _read_content(value: Any, name: str, where: str) -> str:
    """A string, as it stands or as the one part of type text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = [part.get("type", "text") for part in value]
        for key in ("text", "value"):  # the second is LLaMA-Factory's
            if kinds == ["text"] and isinstance(value[0].get(key), str):
                return value[0][key]
        raise ValueError(
            f"{where}: '{name}' is a list of parts of the types {kinds}; a string, or one part of type text, is "
            "wanted. Write one text, as the model is to see it, or remove the row."
        )
    hint = " Write it in quotes." if isinstance(value, (int, float)) else ""
    raise ValueError(f"{where}: '{name}' is {describe_value(value)}; a string is wanted.{hint}")


def _read_weight(message: dict, place: str, where: str) -> float:
    """The factor of a message's losses: 0 where it says that it is no target, 1 where it says nothing."""
    said = {key: message[key] for key in TARGET_KEYS if message.get(key) is not None}
    for key, value in said.items():
        is_number = isinstance(value, (bool, int, float))
        if not is_number or not (0 <= value <= MAX_TURN_WEIGHT if key in WEIGHT_KEYS else value in (0, 1)):
            wanted = f"a number from 0 to {MAX_TURN_WEIGHT:,.0f}" if key in WEIGHT_KEYS else "0 or false, or 1 or true,"
            remedy = "" if key in WEIGHT_KEYS else " Write a factor of its loss under the key 'weight'."
            raise ValueError(
                f"{where}: '{key}' of {place} is {describe_value(value)}; {wanted} is read, and 0 makes it no target."
                f"{remedy}"
            )
    weights = {float(said[key]) for key in WEIGHT_KEYS if key in said}
    if len({value > 0 for value in said.values()}) > 1 or len(weights) > 1:
        raise ValueError(f"{where}: {place} says two things about being a target: {said}. Leave one of them.")
    return weights.pop() if weights else float(all(said.values()))


def _read_reasoning(message: dict, place: str, where: str) -> str:
    said = {key: message[key] for key in REASONING_KEYS if message.get(key) is not None}
    texts = {require_string(value, f"{key} of {place}", where) for key, value in said.items()}
    if len(texts) > 1:
        raise ValueError(f"{where}: {place} has two reasonings, in {list(said)}. Leave one of them.")
    return next(iter(texts), "")


def check_row_keys(row: dict, fields_read: Collection[str], where: str) -> None:
    """Raises ValueError for a key with a value that would change what the row says, and that nothing reads."""
    for key, remedy in UNSUPPORTED_ROW_KEYS.items():
        if key not in fields_read and row.get(key) and row[key] not in ("[]", "{}"):
            raise ValueError(f"{where}: the row has '{key}' = {describe_value(row[key])}, which is not read. {remedy}")


def find_unread_keys(row: dict, fields_read: Collection[str]) -> tuple[str, ...]:
    """Keys with a value that other tools read, and that nothing reads here: of the row, and of its messages.

    Args:
        row: a row of a file.
        fields_read: its keys that are read.

    Returns:
        Names such as "weight" and "messages[].name", each once.
    """
    found = [key for key in UNREAD_ROW_KEYS if key not in fields_read and row.get(key) not in (None, "", 1)]
    for field in fields_read:
        messages = row.get(field)
        for message in messages if isinstance(messages, list) else [messages]:
            if isinstance(message, dict):
                found += [
                    f"{field}[].{key}"
                    for key, value in message.items()
                    if (key not in MESSAGE_KEYS and value is not None) or _is_target_in_vain(key, value, message)
                ]
    return tuple(dict.fromkeys(found))


def _is_target_in_vain(key: str, value: Any, message: dict) -> bool:
    """Whether it asks for a message of the user or the system as a target: only answers are."""
    speaker = str(message.get("role", message.get("from"))).lower()
    asks = isinstance(value, (bool, int, float)) and value > 0
    return key in TARGET_KEYS and asks and SHAREGPT_ROLES.get(speaker) != "assistant"


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
