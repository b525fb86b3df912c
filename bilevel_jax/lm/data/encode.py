"""Token ids and response masks of examples, by chat template.

A chat template of the tokenizer's own renders dialogues (`spans` finds the answers in them); without one, a prompt and
its response are joined by a plain template. The tokens of everything before a response must be a prefix of the tokens
of the whole, since at generation time the model is given exactly that prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bilevel_jax.lm.data.examples import Example, example_kind
from bilevel_jax.lm.data.render import Tokenizer, get_chat_template, has_generation_blocks
from bilevel_jax.lm.data.spans import MarkedText, Span, mark_answers, mark_generation_blocks

DEFAULT_TEMPLATE = "{prompt}\n{response}"
TurnMask = list[int]
"""0 = no target; k = a target of the k-th answer that is one, from 1."""
EncodedExample = tuple[list[int], TurnMask, int]
"""(ids, mask, 1 if the response begins inside a token)"""
TemplateRenderer = Callable[[Example], tuple[str, list[int]]]
"""(text, [start, end]): a text and the characters between which its response lies."""


def encode_examples(
    examples: Sequence[Example], targets: Sequence[Sequence[int]], tokenizer: Tokenizer, render: TemplateRenderer
) -> Iterator[EncodedExample]:
    """The tokens of each example, before BOS and EOS are added.

    Args:
        examples: single ones; of a pair, its sides.
        targets: of each example, which of its turns are answers to learn; of plain text, nothing is read.
        tokenizer: of transformers.
        render: joins prompt and response where the tokenizer has no chat template.

    Returns:
        Ids and masks, in order.

    Raises:
        ValueError: an example that cannot be rendered, or whose answers cannot be told apart; with file and line.
    """
    chat_template = get_chat_template(tokenizer)
    mark = mark_generation_blocks if has_generation_blocks(chat_template) else mark_answers
    marked = []
    for example, which in zip(examples, targets, strict=True):
        if example_kind(example) == "text":
            text = example.turns[0].content
            marked.append(MarkedText(text, [Span(0, len(text), 1)]))
        elif chat_template:
            try:
                marked.append(mark(example.turns, which, tokenizer))
            except ValueError as error:
                raise ValueError(f"{example.where}: {error}") from None
        else:
            text, (start, stop) = render(example)
            marked.append(MarkedText(text, [Span(start, stop, 1)] if which else []))
    return iter(_encode_marked_texts(examples, marked, tokenizer))


def make_template_renderer(template: str) -> TemplateRenderer:
    """What joins the prompt and the response of an example by a plain template."""
    if template.count("{prompt}") != 1 or template.count("{response}") != 1 or not template.endswith("{response}"):
        raise ValueError(
            f"the template {template!r} must hold {{prompt}} once and {{response}} once, at its end. "
            f"Write, for instance, {DEFAULT_TEMPLATE!r}."
        )
    head, tail = template.removesuffix("{response}").split("{prompt}")

    def render(example: Example) -> tuple[str, list[int]]:
        if example_kind(example) != "prompt":
            raise ValueError(
                f"{example.where}: a dialogue of {len(example.turns)} turns, and the tokenizer has no chat template. "
                "Use a tokenizer with one, or prompt/response rows."
            )
        if example.turns[1].reasoning:
            raise ValueError(
                f"{example.where}: the answer has a reasoning (reasoning_content), and the tokenizer has no chat "
                "template to show it. Use a tokenizer with one, or write it into the answer."
            )
        prompt, response = (turn.content for turn in example.turns)
        before = head + prompt + tail
        return before + response, [len(before), len(before) + len(response)]

    return render


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common prefix."""
    if first[: len(second)] == second:  # as nearly always
        return len(second)
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _encode_marked_texts(
    examples: Sequence[Example], marked: Sequence[MarkedText], tokenizer: Tokenizer
) -> list[EncodedExample]:
    """The tokens of each text, and which of them are of its spans."""
    texts = [one.text for one in marked]
    prompts = [one.text[: span.start] for one in marked if one.follows_prompt for span in one.spans]
    pieces = list(dict.fromkeys((*texts, *prompts)))  # the sides of a pair have one prompt
    encoded: Any = tokenizer(pieces, add_special_tokens=False, verbose=False) if pieces else {"input_ids": []}
    places = {piece: place for place, piece in enumerate(pieces)}
    ids_of = encoded["input_ids"]
    rows: list[EncodedExample] = []
    for example, one in zip(examples, marked, strict=True):
        place = places[one.text]
        ids, merged = list(ids_of[place]), 0
        mask = [0] * len(ids)
        for span in one.spans:
            stop = _find_stop(encoded, place, one, span.stop, tokenizer)
            if one.follows_prompt:
                prompt = ids_of[places[one.text[: span.start]]]
                start = common_prefix_length(ids, prompt)
                apart = not str(tokenizer.decode(prompt[start:])).strip()
                merged |= start < len(prompt)  # white space that the prompt ends with went into the first token
            else:
                start, apart = _find_first_token(encoded, place, span, example), True
            if not apart or stop is None:
                raise ValueError(
                    f"{example.where}: a token holds the end of a prompt and the start of a response, or the reverse, "
                    "so the prompt alone would be read differently. Put white space or a special token between them."
                )
            mask[start:stop] = [span.number] * (stop - start)
        if not one.follows_prompt:
            for i in range(1, len(ids)):  # an end token that stands just behind a block belongs to the response
                if not mask[i] and ids[i] == tokenizer.eos_token_id:
                    mask[i] = mask[i - 1]
        rows.append((ids, mask, merged))
    return rows


def _find_stop(encoded: Any, place: int, one: MarkedText, end: int, tokenizer: Tokenizer) -> int | None:
    """The number of tokens up to a character; None where a token holds more than white space on both sides of it."""
    ids = encoded["input_ids"][place]
    if end == len(one.text):
        return len(ids)
    if not encoded.is_fast:  # no positions of tokens
        head = tokenizer(one.text[:end], add_special_tokens=False, verbose=False)["input_ids"]
        return len(head) if ids[: len(head)] == head else None
    last = next((token for i in range(end, 0, -1) if (token := encoded.char_to_token(place, i - 1)) is not None), None)
    if last is None:
        return 0
    while last + 1 < len(ids) and encoded.token_to_chars(place, last + 1).start < end:  # the bytes of one character
        last += 1
    beyond = encoded.token_to_chars(place, last).end
    return None if one.follows_prompt and one.text[end:beyond].strip() else last + 1


def _find_first_token(encoded: Any, place: int, span: Span, example: Example) -> int:
    if not encoded.is_fast:
        raise ValueError(
            f"{example.where}: the chat template marks answers by {{% generation %}} blocks, and the tokenizer does "
            "not say which characters its tokens hold. Use the model's fast tokenizer (tokenizer.json), or a template "
            "without them."
        )
    characters = range(span.start, span.stop)
    found = (token for i in characters if (token := encoded.char_to_token(place, i)) is not None)
    return next(found, len(encoded["input_ids"][place]))
