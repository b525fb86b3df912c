"""Formats of preference pairs, with a chosen and a rejected response."""

import re
from collections.abc import Iterable
from typing import Any

from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.lm.data.turns import (
    SHAREGPT_ROLES,
    DataOptions,
    Dialogue,
    EmptyExampleError,
    Turn,
    Turns,
    count_shared_turns,
    find_conversation_field,
    join_response,
    parse_messages,
    prepend_system,
    read_conversation_prompt,
    read_field,
    read_instruction,
    read_prompt,
    require_answer,
    require_nonblank,
)

HH_MARKS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
QUESTION_FIELDS = ("question", "query", "problem", "input")
"""Fields that say that a row has a prompt, under another name than expected."""


def detect_preference_format(row: dict, options: DataOptions, where: str) -> str:
    """The layout of a row that has a chosen and a rejected side."""
    fields = {
        "preference": options.prompt_field,
        "alpaca_preference": "instruction",
        "sharegpt_preference": find_conversation_field(row, options),
    }
    matches = [kind for kind, field in fields.items() if field in row and field != "messages"]
    if len(matches) > 1:
        raise ValueError(f"{where}: the keys {sorted(row)} fit the formats {matches}. Set data.format to one of them.")
    if matches:
        return matches[0]
    values = [row.get(side) for side in (options.chosen_field, options.rejected_field)]
    texts = [value for value in values if isinstance(value, str)]
    if texts != values:
        return "implicit_preference"
    if all({"Human", "Assistant"} <= set(HH_MARKS.findall(text)) for text in texts):
        return "hh"
    if question := next((name for name in QUESTION_FIELDS if name in row), ""):
        raise ValueError(
            f"{where}: no '{options.prompt_field}', but '{question}'; the keys are {sorted(row)}. Set "
            f"data.prompt_field to '{question}', or data.format to 'implicit_preference' if the prompt is what "
            f"'{options.chosen_field}' and '{options.rejected_field}' begin with."
        )
    return "implicit_preference"


def parse_preference(row: dict, options: DataOptions, where: str) -> Dialogue:
    """prompt, chosen, rejected."""
    return _join_responses(read_prompt(row, options, where), row, options, where)


def parse_alpaca_preference(row: dict, options: DataOptions, where: str) -> Dialogue:
    """instruction, input, chosen, rejected."""
    return _join_responses(read_instruction(row, options, where), row, options, where)


def parse_sharegpt_preference(row: dict, options: DataOptions, where: str) -> Dialogue:
    """conversations, chosen, rejected."""
    return _join_responses(read_conversation_prompt(row, options, where), row, options, where)


def parse_implicit_preference(row: dict, options: DataOptions, where: str) -> Dialogue:
    """chosen, rejected: the prompt is what they begin with in common, whole turns or whole words."""
    names, values = _read_sides(row, options, where)
    if all(isinstance(value, str) for value in values):
        sides = _split_at_common_words(values, names, where)
    else:
        both = zip(names, values, strict=True)
        sides = [require_answer(parse_messages(value, name, SHAREGPT_ROLES, where), where) for name, value in both]
    return _make_pair((prepend_system(side, row, options, where) for side in sides), names, where)


def parse_hh(row: dict, options: DataOptions, where: str) -> Dialogue:
    """chosen, rejected, or text alone: whole dialogues with marks before the turns."""
    name = options.text_field
    if not {options.chosen_field, options.rejected_field} & set(row) and name in row:
        return Dialogue(_parse_hh_dialogue(row[name], name, where))
    names, values = _read_sides(row, options, where)
    return _make_pair(
        (_parse_hh_dialogue(value, name, where) for name, value in zip(names, values, strict=True)), names, where
    )


# ---- parts


def _read_sides(row: dict, options: DataOptions, where: str) -> tuple[tuple[str, str], tuple[Any, Any]]:
    names = (options.chosen_field, options.rejected_field)
    chosen = read_field(row, names[0], "Set data.chosen_field to one of them.", where)
    return names, (chosen, read_field(row, names[1], "Set data.rejected_field to one of them.", where))


def _join_responses(prompt: Turns, row: dict, options: DataOptions, where: str) -> Dialogue:
    names, values = _read_sides(row, options, where)
    sides = (join_response(prompt, value, name, where) for name, value in zip(names, values, strict=True))
    return _make_pair(sides, names, where)


def _make_pair(sides: Iterable[Turns], names: tuple[str, str], where: str) -> Dialogue:
    """The two dialogues, which must differ from an answer to a user's message on."""
    chosen, rejected = sides
    if chosen == rejected:
        raise EmptyExampleError(_equal_sides_message(names, where))
    num_shared = count_shared_turns(chosen, rejected)
    next_roles = [turn.role for side in (chosen, rejected) for turn in side[num_shared : num_shared + 1]]
    if not num_shared or chosen[num_shared - 1].role != "user" or next_roles != ["assistant", "assistant"]:
        raise ValueError(
            f"{where}: '{names[0]}' and '{names[1]}' begin with {num_shared} equal messages, and do not then give "
            "two answers to the user. Both must answer one prompt: mend the row, or set data.prompt_field to the "
            "field with the prompt."
        )
    return Dialogue(chosen, rejected)


def _equal_sides_message(names: tuple[str, str], where: str) -> str:
    return (
        f"{where}: '{names[0]}' and '{names[1]}' are equal, so there is nothing to prefer. "
        "Remove the row, or set data.empty to 'drop' to leave such rows out."
    )


def _split_at_common_words(texts: tuple[str, str], names: tuple[str, str], where: str) -> list[Turns]:
    """Two texts, parted behind the last word with which both begin; the space behind it belongs to the responses."""
    chosen, rejected = (require_nonblank(text, name, where) for text, name in zip(texts, names, strict=True))
    if chosen == rejected:
        raise EmptyExampleError(_equal_sides_message(names, where))
    letters = enumerate(zip(chosen, rejected, strict=False))
    position = next((i for i, (letter, other) in letters if letter != other), min(len(chosen), len(rejected)))
    if not all(text[position : position + 1].isspace() for text in texts):
        space = re.search(r"\s+\S*\Z", chosen[:position])
        position = space.start() if space else 0
    if not (chosen[:position].strip() and chosen[position:].strip() and rejected[position:].strip()):
        raise ValueError(
            f"{where}: '{names[0]}' and '{names[1]}' do not begin with the same words and end with others, so they "
            "are not two answers to one prompt. Set data.prompt_field to the field with the prompt, or mend the row."
        )
    return [(Turn("user", text[:position]), Turn("assistant", text[position:])) for text in texts]


def _parse_hh_dialogue(value: Any, name: str, where: str) -> Turns:
    """The turns of a dialogue with marks. What one speaker says under several marks in a row is one turn of several
    paragraphs, since chat templates refuse two turns of one role."""
    lead, *parts = HH_MARKS.split(require_nonblank(value, name, where))
    if lead or not parts:
        raise ValueError(
            f"{where}: '{name}' does not begin with 'Human:' or 'Assistant:' but with {describe_value(lead)}; "
            "the format hh is dialogues with such a mark before each turn. Set data.format to another, or mend the row."
        )
    turns: list[Turn] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role, content = "user" if speaker == "Human" else "assistant", text.strip()
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content}\n\n{content}".strip())
        else:
            turns.append(Turn(role, content))
    if turns[-1].role == "user":
        raise EmptyExampleError(
            f"{where}: '{name}' ends with a turn of Human, which nothing answers. "
            "Remove the row, or set data.empty to 'drop' to leave such rows out."
        )
    return tuple(
        turn._replace(content=require_nonblank(turn.content, f"turn {number} of {name}", where))
        if turn.role == "assistant"
        else turn
        for number, turn in enumerate(turns, 1)
    )
