"""Token ids beyond the model's embedding, in texts and among the special tokens."""

import json
import sys

import numpy as np
import pytest

from bilevel_jax.lm.builtin.cipher import make_cipher_tokenizer
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.data.tokens import tokenize
from bilevel_jax.lm.data.vocabulary import check_special_tokens, check_token_ids
from bilevel_jax.lm.inference.prompts import make_prompts

SIZE = len(make_cipher_tokenizer())
NEW = "<|tool|>"


@pytest.fixture(scope="module")
def tokenizer():
    """The cipher's, with a token that the embedding of its models lacks."""
    tokenizer = make_cipher_tokenizer()
    assert tokenizer.add_tokens([NEW]) == 1 and tokenizer.convert_tokens_to_ids(NEW) == SIZE
    return tokenizer


def example(line, prompt="abcd>", response="bcde", rejected=""):
    turns = (Turn("user", prompt), Turn("assistant", response))
    other = (Turn("user", prompt), Turn("assistant", rejected)) if rejected else ()
    return Example(f"x#{line}", line - 1, turns, "", None, "rows.jsonl", line, other)


PLACES = {
    "prompt": ([example(1), example(2, prompt=f"a{NEW}>")], 2),
    "response": ([example(1), example(2), example(3, response=f"b{NEW}")], 3),
    "chosen": ([example(1, rejected="a"), example(2, response=f"b{NEW}", rejected="a")], 2),
    "rejected": ([example(1, rejected="a"), example(2, rejected=f"b{NEW}")], 2),
    "beyond a chunk": ([*map(example, range(1, 601)), example(601, prompt=f"a{NEW}>")], 601),
}


@pytest.mark.parametrize("examples, line", PLACES.values(), ids=PLACES)
def test_a_token_without_a_row_is_named_with_its_place(tokenizer, examples, line):
    message = (
        rf"^rows.jsonl:{line}: the token '<\|tool\|>' has the id {SIZE}, and the model's embedding has {SIZE} rows, .* "
        rf"ids go up to {SIZE}. .*resize_token_embeddings\({SIZE + 1}\)\).$"
    )
    with pytest.raises(ValueError, match=message):
        tokenize(examples, tokenizer, max_length=32, vocab_size=SIZE)
    tokenize(examples, tokenizer, max_length=32, vocab_size=SIZE + 1)
    tokenize(examples, tokenizer, max_length=32)  # of which model, nobody said


def test_further_rows_are_counted_and_cut_tokens_are_not(tokenizer):
    examples = [example(1, response=f"bcdefgh{NEW}"), example(2)]
    tokenize(examples, tokenizer, max_length=9, truncation="right", vocab_size=SIZE)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* \(1 more rows have such a token.\)"):
        tokenize([examples[0], example(2), example(3, prompt=NEW)], tokenizer, max_length=32, vocab_size=SIZE)
    with pytest.raises(ValueError, match="rows.jsonl:1: the token"):
        make_prompts([example(1, prompt=f"{NEW}>")], tokenizer, vocab_size=SIZE)


def test_negative_ids(tokenizer):
    with pytest.raises(ValueError, match="rows.jsonl:2: the token has the id -1"):
        check_token_ids(np.array([1, 2, 3, -1]), np.array([0, 2, 4]), [example(1), example(2)], tokenizer, SIZE)


SPECIAL = {  # generation_config.json -> the error
    "as it is": ({"bos_token_id": 1, "eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 0.6}, ""),
    "none": ({"bos_token_id": None, "eos_token_id": None}, ""),
    "no padding": ({"pad_token_id": -1}, ""),
    "eos": ({"eos_token_id": SIZE}, f"generation_config.json: eos_token_id is {SIZE}, and the model's embedding has"),
    "one of two": ({"eos_token_id": [2, 50256]}, "generation_config.json: eos_token_id is 50256, and"),
    "bos": ({"bos_token_id": 50256}, "bos_token_id is 50256"),
    "padding": ({"pad_token_id": SIZE}, f"pad_token_id is {SIZE}"),
    "negative": ({"eos_token_id": -1}, "eos_token_id is -1"),
    "text": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; the id of a token is wanted, a list of ids, or null"),
    "nested": ({"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\]; the id"),
    "true": ({"bos_token_id": True}, "bos_token_id is True; the id"),
    "a list": ([1], "generation_config.json: holds a list; a JSON object {...} belongs there"),
}


@pytest.mark.parametrize("contents, message", SPECIAL.values(), ids=SPECIAL)
def test_special_tokens_of_the_generation_config(tmp_path, contents, message):
    (tmp_path / "generation_config.json").write_text(json.dumps(contents))
    if not message:
        return check_special_tokens(tmp_path, make_cipher_tokenizer(), SIZE)
    with pytest.raises(ValueError, match=message):
        check_special_tokens(tmp_path, make_cipher_tokenizer(), SIZE)


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
def test_special_tokens_of_the_tokenizer(tmp_path, key):
    tokenizer = make_cipher_tokenizer()
    tokenizer.add_special_tokens({key: "<new>"})
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer's {key}_id is {SIZE}, and the model's embedding"):
        check_special_tokens(tmp_path, tokenizer, SIZE)
    check_special_tokens(tmp_path, tokenizer, SIZE + 1)


def test_a_generation_config_that_is_no_json(tmp_path):
    (tmp_path / "generation_config.json").write_bytes(b'{"eos_token_id": 2')
    with pytest.raises(ValueError, match="generation_config.json:1: not JSON, "):
        check_special_tokens(tmp_path, make_cipher_tokenizer(), sys.maxsize)
