"""Prompts are what training reads before a response."""

import pytest

from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.inference.prompts import find_end_tokens, make_prompts
from tests.lm.data.test_tokens import (
    BLOCKS,
    CHATML,
    LLAMA3,
    PAIR,
    TALK,
    TEXT,
    bpe,
    example,
)

SYSTEM = example("Be brief.", "Name a pet.", "A cat", roles=("system", "user", "assistant"), line=3)
TABLE = {
    "plain": (None, PAIR, "Name a pet.\n", 1),
    "llama3": (LLAMA3, TALK, None, 3),
    "no bos": (CHATML, SYSTEM, "<|head|>system\nBe brief.<|eot|>\n<|head|>user\nName a pet.<|eot|>\n", 2),
    "blocks": (BLOCKS, TALK, None, 3),
}


@pytest.mark.parametrize("template, row, begins, turns", TABLE.values(), ids=TABLE)
def test_a_prompt_and_the_response_are_the_row(template, row, begins, turns):
    tokenizer = bpe(template)
    (prompt,) = make_prompts([row], tokenizer)
    corpus, _ = tokenize([row], tokenizer, max_length=200, train_on="last_turn")
    ids, supervised, _ = corpus.get_sequence(0)
    assert (*prompt.tokens, *ids[supervised]) == tuple(ids) and prompt.id == row.id
    text = tokenizer.decode(prompt.tokens)
    assert prompt.tokens[0] == tokenizer.bos_token_id and prompt.tokens.count(tokenizer.bos_token_id) == 1
    assert text.startswith("<|begin|>" + (begins or "<|head|>user"))
    if template:  # it asks the assistant to speak
        assert text.rstrip("\n").endswith(("<|head|>assistant<|/head|>", "<|head|>assistant"))
    assert prompt.messages == tuple({"role": turn.role, "content": turn.content} for turn in row.turns[:turns])


def test_pairs_have_one_prompt_and_text_has_none():
    pair = PAIR._replace(rejected=(PAIR.turns[0], PAIR.turns[1]._replace(content="A stone.")))
    assert make_prompts([pair], bpe()) == make_prompts([PAIR], bpe()) and make_prompts([], bpe()) == []
    with pytest.raises(ValueError, match="rows.jsonl:1: a row of plain text has no prompt"):
        make_prompts([PAIR, TEXT], bpe())


def test_a_response_ends_at_either_end_token():
    tokenizer = bpe()
    assert find_end_tokens(tokenizer) == [tokenizer.eos_token_id]
    assert (
        find_end_tokens(tokenizer, (tokenizer.eos_token_id, 7))
        == find_end_tokens(tokenizer, 7)
        == sorted([tokenizer.eos_token_id, 7])
    )
    assert find_end_tokens(bpe(eos=None)) == []
