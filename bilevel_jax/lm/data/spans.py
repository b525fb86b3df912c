"""Characters of each answer in a dialogue that a chat template renders.

Where an answer stands is found by comparing renderings in which only its text differs: with a mark put behind it (or in
front of it), everything from the mark on is what the template writes after the answer. So the same words in a prompt,
a header or the mark that ends a turn are never taken for the answer.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bilevel_jax.lm.data.render import (
    ChatTemplateError,
    TemplateLimitError,
    Tokenizer,
    get_chat_template,
    list_special_tokens,
    render_chat,
    render_with_blocks,
)
from bilevel_jax.lm.data.turns import Turn, Turns

USE_BLOCKS = "use a template with {% generation %} blocks"


class Span(NamedTuple):
    """The characters [start, stop) of a target, and the number of its answer among the targets, from 1."""

    start: int
    stop: int
    number: int


class MarkedText(NamedTuple):
    """An example as text, with its targets in order."""

    text: str
    spans: list[Span]
    follows_prompt: bool = True
    """Whether what stands before a span must be tokens of its own, as generation is given it; not where the template
    itself marks the targets."""


def mark_answers(turns: Turns, targets: Sequence[int], tokenizer: Tokenizer) -> MarkedText:
    """The dialogue up to the last target, and where the targets stand, each with the mark that ends its turn.

    A target begins behind the prompt that generation would be given, which is the dialogue before it with the
    template's generation prompt; without one, what stands before the answer is a header, and the target is the answer.

    Args:
        turns: the dialogue.
        targets: which of the turns are targets, in order; all of the assistant. Only these are judged.
        tokenizer: one with a chat template.

    Returns:
        The text and the targets.

    Raises:
        ValueError: a target that cannot be told from its prompt, or a template that fails; without the place of the
            row.
    """
    if not targets:
        return MarkedText("", [])
    text = render_chat(turns, tokenizer)
    spans = []
    for number, target in enumerate(targets, 1):
        through = text if target + 1 == len(turns) else render_chat(turns[: target + 1], tokenizer)
        end, rest = _find_content_end(turns[: target + 1], through, tokenizer)
        if not text.startswith(through[:end]):
            raise ValueError(
                f"the chat template changes what stands before message {target + 1} or in it once other messages "
                "follow, so no text holds this answer as it is given. Use a template with {% generation %} blocks, or "
                "set data.train_on to 'last_turn'."
            )
        _check_text(turns[target], through[:end], target + 1)
        start = _find_start(turns[: target + 1], through, end, tokenizer)
        end_mark = _find_end_mark(rest, text[end:], tokenizer)
        if end_mark.strip():  # white space behind it only leads to the next turn
            stop = end + len(end_mark.rstrip())
        else:  # white space is the end mark, but where EOS is
            stop = end if number == len(targets) else end + len(end_mark)
        spans.append(Span(start, stop, number))
    return MarkedText(text[: spans[-1].stop], spans)


def mark_generation_blocks(turns: Turns, targets: Sequence[int], tokenizer: Tokenizer) -> MarkedText:
    """The dialogue, with the {% generation %} blocks that hold the targets; raises as `mark_answers`."""
    if not targets:
        return MarkedText("", [])
    text, blocks = render_with_blocks(turns, tokenizer)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    holders = _find_answers_in_blocks(turns, answers, len(blocks), tokenizer)
    if not any(holders):
        raise ValueError(
            "the chat template's {% generation %} blocks mark no token of what the assistant says. Put them around "
            "its content and the mark that ends its turn."
        )
    for target in targets:
        shown = sum(found[target] for found in holders)
        if not shown:
            raise ValueError(
                f"the chat template's {{% generation %}} blocks mark nothing of message {target + 1}, which is to be "
                "learned. Put one around every answer, set data.train_on to 'last_turn' if the last alone has one, or "
                'mark the message as no target ("weight": 0).'
            )
        if turns[target].reasoning and shown < 2:
            raise _hidden_reasoning(target + 1, is_last=target + 1 == len(turns))
    is_choice = len(targets) < len(answers)
    beside = _find_answers_beside_blocks(turns, len(blocks), tokenizer) if is_choice and not all(holders) else []
    spans = []
    for i, (start, stop) in enumerate(blocks):
        held = set(holders[i]) or (beside[i] if beside else set(targets))
        learned = held & set(targets)
        if not held or (learned and learned != held):
            raise ValueError(
                f"the chat template's {{% generation %}} blocks mark {text[start:stop][:40]!r}, and it cannot be told "
                "which answer that belongs to. Put one block around each answer."
            )
        if learned and start < stop:
            spans.append(Span(start, stop, 1 + list(targets).index(max(learned))))
    return MarkedText(text, spans, follows_prompt=False)


# ---- by unlike texts


def _find_content_end(turns: Turns, text: str, tokenizer: Tokenizer) -> tuple[int, str]:
    """Where the text of the last turn ends in the rendered dialogue, and what the template writes behind it."""
    (mark,), number = choose_marks(turns, tokenizer), len(turns)
    marked = _render_variant(turns, turns[-1]._replace(content=turns[-1].content + mark), tokenizer)
    if mark not in marked:
        raise ValueError(f"the chat template does not show message {number}, or not its end. Mend the template.")
    if marked.count(mark) > 1:
        raise ValueError(
            f"the chat template writes message {number} {marked.count(mark)} times, so it cannot be told which is the "
            f"answer. Mend the template, or {USE_BLOCKS}."
        )
    rest = marked.partition(mark)[2]
    if not text.endswith(rest):
        raise ValueError(
            f"the chat template changes the text of message {number}: what it writes behind it depends on how it "
            f"ends. Mend the template, or {USE_BLOCKS}."
        )
    return len(text) - len(rest), rest


def _find_content_start(turns: Turns, text: str, tokenizer: Tokenizer) -> int | None:
    """Where what the last turn says, its reasoning first, begins in the rendered dialogue; None if it is not shown."""
    (mark,), last = choose_marks(turns, tokenizer), turns[-1]
    variants = [last._replace(content=mark + last.content)]
    if last.reasoning:
        variants += [variants[0]._replace(reasoning=""), last._replace(reasoning=mark + last.reasoning)]
    starts = []
    for variant in variants:
        marked = _render_variant(turns, variant, tokenizer)
        before = marked.partition(mark)[0]
        if marked.count(mark) == 1 and text.startswith(before):
            starts.append(len(before))
    return min(starts, default=None)


def _find_start(turns: Turns, text: str, end: int, tokenizer: Tokenizer) -> int:
    """Where the target begins that is the last turn: behind its prompt, or with its text."""
    number, before = len(turns), turns[:-1]
    if not before:  # nothing asked for it, and transformers renders no empty dialogue
        return _require_start(_find_content_start(turns, text, tokenizer), number)
    prompt = _try_render(before, tokenizer, add_generation_prompt=True)
    has_generation_prompt = prompt is not None and prompt != _try_render(before, tokenizer)
    if prompt is not None and text.startswith(prompt) and len(prompt) <= end:
        if has_generation_prompt:
            return len(prompt)
        start = _require_start(_find_content_start(turns, text, tokenizer), number)
        return start if text[len(prompt) : start].strip() else len(prompt)  # a header is not an answer
    if prompt is None or not has_generation_prompt:
        start = _require_start(_find_content_start(turns, text, tokenizer), number)
        if prompt is None:
            return start
        asked, _ = _find_content_end(before, prompt, tokenizer)
        if text[:start].startswith(prompt[:asked]):  # only what ends the whole dialogue is gone
            return start
    raise ValueError(
        f"the chat template changes what stands before message {number} once it is answered: it asks for the answer "
        f"with ...{prompt[-40:]!r}, and that does not stand before it. Mend the template, or {USE_BLOCKS}."
    )


def _require_start(start: int | None, number: int) -> int:
    if start is None:
        raise ValueError(
            f"the chat template has no generation prompt and changes the text of message {number}, so it cannot be "
            f"told where the answer begins. Add a generation prompt to the template, or {USE_BLOCKS}."
        )
    return start


def _find_end_mark(rest: str, following: str, tokenizer: Tokenizer) -> str:
    """What ends a turn: what stands behind its text whether or not the dialogue goes on.

    `rest` is what the template writes where the turn is the last, `following` what stands behind it in the dialogue.
    """
    if following.startswith(rest):
        return rest
    common = next((i for i, (a, b) in enumerate(zip(rest, following, strict=False)) if a != b), len(following))
    special = tuple(list_special_tokens(tokenizer))
    while common and not (following[common - 1].isspace() or following[:common].endswith(special)):
        common -= 1  # the beginning of two marks, as of <|end|> and <|user|>
    return following[:common]


def _check_text(turn: Turn, text: str, number: int) -> None:
    """Raises ValueError unless the text ends with what the turn says, but for white space."""
    content, reasoning = ("".join(part.split()) for part in (turn.content, turn.reasoning))
    shown = "".join(text.split())
    if not shown.endswith(content):
        raise ValueError(
            f"the chat template changes the text of message {number}, or leaves out a part of it. Write the message as "
            f"the template shows it, mend the template, or {USE_BLOCKS}."
        )
    if reasoning not in shown[: len(shown) - len(content)]:
        raise _hidden_reasoning(number, is_last=True)


def _hidden_reasoning(number: int, *, is_last: bool) -> ValueError:
    or_last = "" if is_last else ", or set data.train_on to 'last_turn' if it shows that of the last answer alone"
    return ValueError(
        f"the chat template does not show the reasoning of message {number} (reasoning_content), so nothing would "
        f"learn it. Remove the key from the row, or use a tokenizer with a template that shows it{or_last}."
    )


# ---- by {% generation %} blocks


def _find_answers_in_blocks(
    turns: Turns, answers: Sequence[int], num_blocks: int, tokenizer: Tokenizer
) -> list[Counter[int]]:
    """Of each block, the answers whose text or reasoning ends in it, and how often one does."""
    marks, text, blocks = _render_marked_blocks(turns, answers, num_blocks, tokenizer)
    return [
        Counter({turn: count for turn, mark in marks.items() if (count := text.count(mark, start, stop))})
        for start, stop in blocks
    ]


def _find_answers_beside_blocks(turns: Turns, num_blocks: int, tokenizer: Tokenizer) -> list[set[int]]:
    """Of each block, the answer that it stands behind or before, as one around the mark that ends a turn does.

    Empty where it stands between two answers, or beside none.
    """
    marks, text, blocks = _render_marked_blocks(turns, range(len(turns)), num_blocks, tokenizer)
    places = {turn: place for turn, mark in marks.items() if (place := text.rfind(mark)) >= 0}
    beside = []
    for start, stop in blocks:
        before = max((turn for turn, place in places.items() if place < start), default=None)
        behind = min((turn for turn, place in places.items() if place >= stop), default=None)
        near = {turn for turn in (before, behind) if turn is not None and turns[turn].role == "assistant"}
        beside.append(near if len(near) == 1 else set())
    return beside


def _render_marked_blocks(
    turns: Turns, marked: Sequence[int], num_blocks: int, tokenizer: Tokenizer
) -> tuple[dict[int, str], str, list[tuple[int, int]]]:
    """The dialogue with a mark behind some texts and their reasoning: (turn -> mark, text, blocks)."""
    marks = dict(zip(marked, choose_marks(turns, tokenizer, len(marked)), strict=True))
    variant = tuple(
        turn._replace(
            content=turn.content + marks.get(i, ""),
            reasoning=turn.reasoning + marks.get(i, "") if turn.reasoning else "",
        )
        for i, turn in enumerate(turns)
    )
    text, blocks = render_with_blocks(variant, tokenizer)
    if len(blocks) != num_blocks:
        raise ValueError(
            f"the chat template writes {num_blocks} {{% generation %}} blocks, and {len(blocks)} where the messages "
            "end with other words, so they cannot be told apart. Mend the template."
        )
    return marks, text, blocks


# ---- parts


def choose_marks(turns: Turns, tokenizer: Tokenizer, count: int = 1) -> list[str]:
    """Digits that stand nowhere in the dialogue or the template, which no filter of text changes; 7 only in front, so
    that no place where they are put makes them stand twice."""
    taken = get_chat_template(tokenizer) + " ".join(text for turn in turns for text in (turn.content, turn.reasoning))
    digits = (f"7{number:o}".replace("7", "9").replace("9", "7", 1) for number in itertools.count(0o51042163))
    return list(itertools.islice((mark for mark in digits if mark not in taken), count))


def _render_variant(turns: Turns, last: Turn, tokenizer: Tokenizer) -> str:
    """The dialogue with another last turn."""
    try:
        return render_chat((*turns[:-1], last), tokenizer)
    except ChatTemplateError as error:
        raise ValueError(
            f"where message {len(turns)} stands is found by rendering it with other words, and then {error}"
        ) from None


def _try_render(turns: Turns, tokenizer: Tokenizer, *, add_generation_prompt: bool = False) -> str | None:
    """A rendering of the beginning of a dialogue; None where the template wants more of it."""
    try:
        return render_chat(turns, tokenizer, add_generation_prompt=add_generation_prompt)
    except TemplateLimitError:
        raise
    except ChatTemplateError:
        return None
