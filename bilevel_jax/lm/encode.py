"""Examples -> token ids, and the assistant turn that each token belongs to: by chat template or by a plain template.

A chat template of the tokenizer's own renders dialogues; without one, a prompt and its response are joined by a plain
template. Either way the mask is found by comparing tokens: the tokens of everything before the response must be a
prefix of the tokens of the whole, since at generation time the model is given exactly that prefix.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bilevel_jax.lm.data import Example, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes seconds, so it waits for `load_tokenizer`

TEMPLATE = "{prompt}\n{response}"
Mask = list[int]
"""0 = no target; k = a target of the k-th assistant turn, from 1."""
Row = tuple[list[int], Mask, int]
"""(ids, mask, 1 if the response begins inside a token)"""
Joiner = Callable[[Example], tuple[str, list[int]]]
"""(text, [start, end, start, end, ...]): a text and the characters between which its responses lie."""


def encode(examples: Sequence[Example], tokenizer: Tokenizer, join: Joiner) -> Iterator[Row]:
    """The tokens of each example, BOS and EOS not yet in order; `join` is for tokenizers without a chat template."""
    chat = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if re.search(r"{%-?\s*generation\s*-?%}", chat):
        marked = {i for i, example in enumerate(examples) if kind_of(example) != "text"}
    else:
        marked = set()
    rendered = iter(_by_generation_block([examples[i] for i in sorted(marked)], tokenizer))
    plain = [e for i, e in enumerate(examples) if i not in marked]
    texts = [_whole_text(e) if kind_of(e) == "text" else _by_turns(e, tokenizer) if chat else join(e) for e in plain]
    compared = iter(_by_prefix(plain, texts, tokenizer))
    return (next(rendered) if i in marked else next(compared) for i in range(len(examples)))


def joiner(template: str) -> Joiner:
    """What joins the prompt and the response of an example by a plain template."""
    if template.count("{prompt}") != 1 or template.count("{response}") != 1 or not template.endswith("{response}"):
        raise ValueError(
            f"the template {template!r} must hold {{prompt}} once and {{response}} once, at its end. "
            f"Write, for instance, {TEMPLATE!r}."
        )
    head, tail = template.removesuffix("{response}").split("{prompt}")

    def join(example: Example) -> tuple[str, list[int]]:
        if kind_of(example) != "prompt":
            raise ValueError(
                f"{example.where}: a dialogue of {len(example.turns)} turns, and the tokenizer has no chat template. "
                "Use a tokenizer with one, or prompt/response rows."
            )
        prompt, response = (turn.content for turn in example.turns)
        before = head + prompt + tail
        return before + response, [len(before), len(before) + len(response)]

    return join


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix."""
    if one[: len(other)] == other:  # as nearly always
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _by_generation_block(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Row]:
    """The template itself marks what the assistant says, by {% generation %} blocks."""
    rows: list[Row] = []
    for example in examples:
        messages = [turn._asdict() for turn in example.turns]
        with _refusals(example):
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


def _by_turns(example: Example, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The characters of each assistant turn, with the mark that ends it, by rendering the dialogue up to there."""
    whole = _render(example, tokenizer, len(example.turns), ask=False)
    edges: list[int] = []
    for k, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        last = k + 1 == len(example.turns)
        asked = _render(example, tokenizer, k, ask=True)
        silent = _render(example, tokenizer, k, ask=False) if k else ""
        upto = whole if last else _render(example, tokenizer, k + 1, ask=False)
        if not (whole.startswith(upto) and upto.startswith(asked)):
            raise ValueError(
                f"{example.where}: the chat template changes what stands before message {k + 1} once it is answered, "
                "so its answer cannot be told from its prompt. Use a template with {% generation %} blocks."
            )
        said = upto[len(asked) :]
        place = said.rfind(turn.content.strip())
        if place < 0:
            raise ValueError(
                f"{example.where}: the chat template changes the text of message {k + 1}. "
                "Use a template with {% generation %} blocks."
            )
        begin = len(asked)
        if asked == silent and said[:place].strip():
            begin += place  # no generation prompt: what stands before the answer is a header, not an answer
        stop = len(asked) + place + len(turn.content.strip())
        mark = upto[stop:]
        if mark.strip():  # an end mark, after which white space only leads to the next turn
            stop += len(mark.rstrip())
        elif not last:  # white space is the end mark
            stop = len(upto)
        edges += [begin, stop]
    return whole[: edges[-1]], edges


def _whole_text(example: Example) -> tuple[str, list[int]]:
    text = example.turns[0].content
    return text, [0, len(text)]


def _by_prefix(examples: Sequence[Example], texts: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer) -> list[Row]:
    """The mask by comparing tokens: those of the text up to each edge must be a prefix of those of the whole."""
    pieces = [piece for text, edges in texts for piece in (text, *(text[:edge] for edge in edges))]
    different = list(dict.fromkeys(pieces))  # the last edge is the whole text, and a pair has one prompt
    ids_of = tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"] if different else []
    known = dict(zip(different, ids_of, strict=True))
    encoded = (known[piece] for piece in pieces)
    rows: list[Row] = []
    for example, (_, edges) in zip(examples, texts, strict=True):
        ids, merged = list(next(encoded)), 0
        mask = [0] * len(ids)
        for turn in range(1, len(edges) // 2 + 1):
            begin, end = next(encoded), next(encoded)
            start, stop = common(ids, begin), common(ids, end)
            if str(tokenizer.decode(begin[start:])).strip() or stop < len(end):
                raise ValueError(
                    f"{example.where}: a token holds the end of a prompt and the start of a response, or the reverse, "
                    "so the prompt alone would be read differently. Put white space or a special token between them."
                )
            merged |= start < len(begin)  # white space that the prompt ends with went into the first token
            mask[start:stop] = [turn] * (stop - start)
        rows.append((ids, mask, merged))
    return rows


def _render(example: Example, tokenizer: Tokenizer, turns: int, ask: bool) -> str:
    """The first turns as text; with `ask`, up to where the assistant is to speak."""
    messages = [turn._asdict() for turn in example.turns[:turns]]
    with _refusals(example):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)  # type: ignore[return-value]


@contextmanager
def _refusals(example: Example) -> Iterator[None]:
    """Templates raise on roles that they do not know or expect; say in which row."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        roles = [turn.role for turn in example.turns]
        raise ValueError(
            f"{example.where}: the chat template refuses the roles {roles}: {error}. Change the row's roles."
        ) from None
