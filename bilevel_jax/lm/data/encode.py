"""Token ids and response masks of examples, by chat template.

A chat template of the tokenizer's own renders dialogues; without one, a prompt and its response are joined by a plain
template. Either way the mask is found by comparing tokens: the tokens of everything before the response must be a
prefix of the tokens of the whole, since at generation time the model is given exactly that prefix.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bilevel_jax.lm.data.examples import Example, example_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes seconds, so it waits for `load_tokenizer`

DEFAULT_TEMPLATE = "{prompt}\n{response}"
TurnMask = list[int]
"""0 = no target; k = a target of the k-th assistant turn, from 1."""
EncodedExample = tuple[list[int], TurnMask, int]
"""(ids, mask, 1 if the response begins inside a token)"""
TemplateRenderer = Callable[[Example], tuple[str, list[int]]]
"""(text, [start, end, start, end, ...]): a text and the characters between which its responses lie."""


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, render: TemplateRenderer
) -> Iterator[EncodedExample]:
    """The tokens of each example, BOS and EOS not yet in order; `join` is for tokenizers without a chat template."""
    chat_template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if re.search(r"{%-?\s*generation\s*-?%}", chat_template):
        with_blocks = {i for i, example in enumerate(examples) if example_kind(example) != "text"}
    else:
        with_blocks = set()
    encoded_by_blocks = iter(_encode_by_generation_blocks([examples[i] for i in sorted(with_blocks)], tokenizer))
    without_blocks = [e for i, e in enumerate(examples) if i not in with_blocks]
    texts = [
        _render_plain_text(e)
        if example_kind(e) == "text"
        else _render_turns(e, tokenizer)
        if chat_template
        else render(e)
        for e in without_blocks
    ]
    encoded_by_prefix = iter(_encode_by_prefix(without_blocks, texts, tokenizer))
    return (next(encoded_by_blocks) if i in with_blocks else next(encoded_by_prefix) for i in range(len(examples)))


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


def _encode_by_generation_blocks(examples: Sequence[Example], tokenizer: Tokenizer) -> list[EncodedExample]:
    """The template itself marks what the assistant says, by {% generation %} blocks."""
    rows: list[EncodedExample] = []
    for example in examples:
        messages = [turn._asdict() for turn in example.turns]
        with _name_example_in_template_errors(example):
            out: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
        if not any(mask):
            raise ValueError(
                f"{example.where}: the chat template's {{% generation %}} blocks mark no token. "
                "Put them around what the assistant says."
            )
        turn = mask[0]
        for i in range(1, len(ids)):
            if mask[i]:
                turn += not mask[i - 1]
                mask[i] = turn
            elif ids[i] == tokenizer.eos_token_id:  # one that stands just behind the block belongs to the response
                mask[i] = mask[i - 1]
        rows.append((ids, mask, 0))
    return rows


def _render_turns(example: Example, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The characters of each assistant turn, with the mark that ends it, by rendering the dialogue up to there."""
    full_text = _render_chat(example, tokenizer, len(example.turns), add_generation_prompt=False)
    edges: list[int] = []
    for k, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        last = k + 1 == len(example.turns)
        prompt_text = _render_chat(example, tokenizer, k, add_generation_prompt=True)
        text_without_generation_prompt = _render_chat(example, tokenizer, k, add_generation_prompt=False) if k else ""
        text_through_turn = full_text if last else _render_chat(example, tokenizer, k + 1, add_generation_prompt=False)
        if not (full_text.startswith(text_through_turn) and text_through_turn.startswith(prompt_text)):
            raise ValueError(
                f"{example.where}: the chat template changes what stands before message {k + 1} once it is answered, "
                "so its answer cannot be distinguished from its prompt. Use a template with {% generation %} blocks."
            )
        turn_text = text_through_turn[len(prompt_text) :]
        content_start = turn_text.rfind(turn.content.strip())
        if content_start < 0:
            raise ValueError(
                f"{example.where}: the chat template changes the text of message {k + 1}. "
                "Use a template with {% generation %} blocks."
            )
        begin = len(prompt_text)
        if prompt_text == text_without_generation_prompt and turn_text[:content_start].strip():
            begin += content_start  # no generation prompt: what stands before the answer is a header, not an answer
        stop = len(prompt_text) + content_start + len(turn.content.strip())
        text_after_answer = text_through_turn[stop:]
        if text_after_answer.strip():  # an end mark, after which white space only leads to the next turn
            stop += len(text_after_answer.rstrip())
        elif not last:  # white space is the end mark
            stop = len(text_through_turn)
        edges += [begin, stop]
    return full_text[: edges[-1]], edges


def _render_plain_text(example: Example) -> tuple[str, list[int]]:
    text = example.turns[0].content
    return text, [0, len(text)]


def _encode_by_prefix(
    examples: Sequence[Example], texts: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer
) -> list[EncodedExample]:
    """The mask by comparing tokens: those of the text up to each edge must be a prefix of those of the whole."""
    pieces = [piece for text, edges in texts for piece in (text, *(text[:edge] for edge in edges))]
    unique_pieces = list(dict.fromkeys(pieces))  # the last edge is the whole text, and a pair has one prompt
    unique_ids = tokenizer(unique_pieces, add_special_tokens=False, verbose=False)["input_ids"] if unique_pieces else []
    ids_by_piece = dict(zip(unique_pieces, unique_ids, strict=True))
    encoded = (ids_by_piece[piece] for piece in pieces)
    rows: list[EncodedExample] = []
    for example, (_, edges) in zip(examples, texts, strict=True):
        ids, merged = list(next(encoded)), 0
        mask = [0] * len(ids)
        for turn in range(1, len(edges) // 2 + 1):
            begin, end = next(encoded), next(encoded)
            start, stop = common_prefix_length(ids, begin), common_prefix_length(ids, end)
            if str(tokenizer.decode(begin[start:])).strip() or stop < len(end):
                raise ValueError(
                    f"{example.where}: a token holds the end of a prompt and the start of a response, or the reverse, "
                    "so the prompt alone would be read differently. Put white space or a special token between them."
                )
            merged |= start < len(begin)  # white space that the prompt ends with went into the first token
            mask[start:stop] = [turn] * (stop - start)
        rows.append((ids, mask, merged))
    return rows


def _render_chat(example: Example, tokenizer: Tokenizer, num_turns: int, add_generation_prompt: bool) -> str:
    """The first turns as text; with `add_generation_prompt`, up to where the assistant is to speak."""
    messages = [turn._asdict() for turn in example.turns[:num_turns]]
    with _name_example_in_template_errors(example):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)  # type: ignore[return-value]


@contextmanager
def _name_example_in_template_errors(example: Example) -> Iterator[None]:
    """Templates raise on roles that they do not know or expect; say in which row."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        roles = [turn.role for turn in example.turns]
        raise ValueError(
            f"{example.where}: the chat template refuses the roles {roles}: {error}. Change the row's roles."
        ) from None
