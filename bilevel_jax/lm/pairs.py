"""Layouts of preference rows -> two dialogues that answer one prompt: explicit and implicit prompts, HH marks."""

import re
from collections.abc import Iterable
from typing import Any

from bilevel_jax.lm import turns as part
from bilevel_jax.lm.files import show
from bilevel_jax.lm.turns import SPEAKERS, DataOptions, Dialogue, Empty, Turn, Turns

MARKS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
QUESTIONS = ("question", "query", "problem", "input")
"""Fields that say that a row has a prompt, under another name than expected."""


def detect(row: dict, options: DataOptions, where: str) -> str:
    """The layout of a row that has a chosen and a rejected side."""
    fields = {
        "preference": options.prompt_field,
        "alpaca_preference": "instruction",
        "sharegpt_preference": part.conversation_field(row, options),
    }
    found = [kind for kind, field in fields.items() if field in row and field != "messages"]
    if len(found) > 1:
        raise ValueError(f"{where}: the keys {sorted(row)} fit the formats {found}. Set data.format to one of them.")
    if found:
        return found[0]
    values = [row.get(side) for side in (options.chosen_field, options.rejected_field)]
    texts = [value for value in values if isinstance(value, str)]
    if texts != values:
        return "implicit_preference"
    if all({"Human", "Assistant"} <= set(MARKS.findall(text)) for text in texts):
        return "hh"
    if question := next((name for name in QUESTIONS if name in row), ""):
        raise ValueError(
            f"{where}: no '{options.prompt_field}', but '{question}'; the keys are {sorted(row)}. Set "
            f"data.prompt_field to '{question}', or data.format to 'implicit_preference' if the prompt is what "
            f"'{options.chosen_field}' and '{options.rejected_field}' begin with."
        )
    return "implicit_preference"


def preference(row: dict, options: DataOptions, where: str) -> Dialogue:
    """prompt, chosen, rejected."""
    return _answers(part.prompt(row, options, where), row, options, where)


def alpaca(row: dict, options: DataOptions, where: str) -> Dialogue:
    """instruction, input, chosen, rejected."""
    return _answers(part.instruction(row, options, where), row, options, where)


def sharegpt(row: dict, options: DataOptions, where: str) -> Dialogue:
    """conversations, chosen, rejected."""
    return _answers(part.conversation_prompt(row, options, where), row, options, where)


def implicit(row: dict, options: DataOptions, where: str) -> Dialogue:
    """chosen, rejected: the prompt is what they begin with in common, whole turns or whole words."""
    names, values = _sides(row, options, where)
    if all(isinstance(value, str) for value in values):
        sides = _by_words(values, names, where)
    else:
        both = zip(names, values, strict=True)
        sides = [part.answered(part.messages(value, name, SPEAKERS, where), where) for name, value in both]
    return _pair((part.with_system(side, row, options, where) for side in sides), names, where)


def hh(row: dict, options: DataOptions, where: str) -> Dialogue:
    """chosen, rejected, or text alone: whole dialogues with marks before the turns."""
    name = options.text_field
    if not {options.chosen_field, options.rejected_field} & set(row) and name in row:
        return Dialogue(_marked(row[name], name, where))
    names, values = _sides(row, options, where)
    return _pair((_marked(value, name, where) for name, value in zip(names, values, strict=True)), names, where)


# ---- parts


def _sides(row: dict, options: DataOptions, where: str) -> tuple[tuple[str, str], tuple[Any, Any]]:
    names = (options.chosen_field, options.rejected_field)
    chosen = part.field(row, names[0], "Set data.chosen_field to one of them.", where)
    return names, (chosen, part.field(row, names[1], "Set data.rejected_field to one of them.", where))


def _answers(prompt: Turns, row: dict, options: DataOptions, where: str) -> Dialogue:
    names, values = _sides(row, options, where)
    sides = (part.join(prompt, value, name, where) for name, value in zip(names, values, strict=True))
    return _pair(sides, names, where)


def _pair(sides: Iterable[Turns], names: tuple[str, str], where: str) -> Dialogue:
    """The two dialogues, which must differ from an answer to a user's message on."""
    chosen, rejected = sides
    if chosen == rejected:
        raise Empty(_same(names, where))
    at = part.shared(chosen, rejected)
    follow = [turn.role for side in (chosen, rejected) for turn in side[at : at + 1]]
    if not at or chosen[at - 1].role != "user" or follow != ["assistant", "assistant"]:
        raise ValueError(
            f"{where}: '{names[0]}' and '{names[1]}' begin with {at} equal messages, and do not then give two answers "
            "to the user. Both must answer one prompt: mend the row, or set data.prompt_field to the field with the "
            "prompt."
        )
    return Dialogue(chosen, rejected)


def _same(names: tuple[str, str], where: str) -> str:
    return (
        f"{where}: '{names[0]}' and '{names[1]}' are equal, so there is nothing to prefer. "
        "Remove the row, or set data.empty to 'drop' to leave such rows out."
    )


def _by_words(texts: tuple[str, str], names: tuple[str, str], where: str) -> list[Turns]:
    """Two texts, parted behind the last word with which both begin; the space behind it belongs to the responses."""
    chosen, rejected = (part.filled(text, name, where) for text, name in zip(texts, names, strict=True))
    if chosen == rejected:
        raise Empty(_same(names, where))
    letters = enumerate(zip(chosen, rejected, strict=False))
    at = next((i for i, (one, other) in letters if one != other), min(len(chosen), len(rejected)))
    if not all(text[at : at + 1].isspace() for text in texts):
        space = re.search(r"\s+\S*\Z", chosen[:at])
        at = space.start() if space else 0
    if not (chosen[:at].strip() and chosen[at:].strip() and rejected[at:].strip()):
        raise ValueError(
            f"{where}: '{names[0]}' and '{names[1]}' do not begin with the same words and end with others, so they "
            "are not two answers to one prompt. Set data.prompt_field to the field with the prompt, or mend the row."
        )
    return [(Turn("user", text[:at]), Turn("assistant", text[at:])) for text in texts]


def _marked(value: Any, name: str, where: str) -> Turns:
    """The turns of a dialogue with marks. What one speaker says under several marks in a row is one turn of several
    paragraphs, since chat templates refuse two turns of one role."""
    lead, *parts = MARKS.split(part.filled(value, name, where))
    if lead or not parts:
        raise ValueError(
            f"{where}: '{name}' does not begin with 'Human:' or 'Assistant:' but with {show(lead)}; the format hh is "
            "dialogues with such a mark before each turn. Set data.format to another one, or mend the row."
        )
    turns: list[Turn] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = "user" if speaker == "Human" else "assistant", said.strip()
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content}\n\n{content}".strip())
        else:
            turns.append(Turn(role, content))
    if turns[-1].role == "user":
        raise Empty(
            f"{where}: '{name}' ends with a turn of Human, which nothing answers. "
            "Remove the row, or set data.empty to 'drop' to leave such rows out."
        )
    return tuple(
        Turn(role, part.filled(said, f"turn {number} of {name}", where) if role == "assistant" else said)
        for number, (role, said) in enumerate(turns, 1)
    )
