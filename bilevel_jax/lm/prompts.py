"""Examples -> prompts: what stands before a response, exactly as training reads it."""

import sys
from collections.abc import Sequence

import numpy as np

from bilevel_jax.lm.data import Example, kind_of
from bilevel_jax.lm.encode import TEMPLATE, Tokenizer
from bilevel_jax.lm.generate import Prompt
from bilevel_jax.lm.tokens import tokenize


def prompts(examples: Sequence[Example], tokenizer: Tokenizer, *, template: str = TEMPLATE) -> list[Prompt]:
    """What stands before the last response of each example, with the example's id.

    The tokens are those that `tokenize` puts before that response: by the tokenizer's own chat template, with what asks
    the assistant to speak, or by `template` where it has none. So a response that is generated stands where training
    has one. The messages are the turns before it. Of a preference pair: the prompt that both sides share.

    White space that ends a prompt and that the response's first token takes in (`Report.merged`) is not in the tokens,
    so these may then differ between two examples with one prompt. Raises ValueError, with file and line, for a row of
    plain text, which has no prompt, and where `tokenize` does.
    """
    if plain := [example for example in examples if kind_of(example) == "text"]:
        raise ValueError(f"{plain[0].where}: a row of plain text has no prompt to answer. Give rows with a prompt.")
    if not examples:
        return []
    corpus, _ = tokenize(examples, tokenizer, max_length=sys.maxsize, template=template, supervise="last_turn")
    out = []
    for i, example in enumerate(examples):
        row = corpus.row(i)
        before = row.ids[: int(np.argmax(row.supervised))].tolist()
        last = max(at for at, turn in enumerate(example.turns) if turn.role == "assistant")
        messages = tuple(turn._asdict() for turn in example.turns[:last])
        out.append(Prompt(example.id, tuple(before), messages))
    return out


def ends(tokenizer: Tokenizer, eos: int | tuple[int, ...] | None = None) -> list[int]:
    """The tokens that end a response: the tokenizer's end of sequence, and those that config.json names (`eos`)."""
    named = () if eos is None else (eos,) if isinstance(eos, int) else eos
    return sorted({*named} | ({tokenizer.eos_token_id} - {None}))
