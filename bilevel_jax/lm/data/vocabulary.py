"""Tokens of a vocabulary as text, and checks of their embedding rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.lm.checkpoint.files import read_json_object
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.render import Tokenizer
from bilevel_jax.lm.hub.downloads import SMALL_FILES, find_model_files


def spell_tokens(ids: Sequence[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, whether it is special) of each token; its name in the vocabulary where it is no whole character.

    Args:
        ids: of one sequence.
        tokenizer: that made them.

    Returns:
        A pair for each id; the texts of what is not special join to the decoded text, but for the names.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = tokenizer.convert_ids_to_tokens(list(ids))
    out: list[tuple[str, bool]] = []
    # tokens since the last special one, decoded together: a token's space may hang on its neighbour
    run: list[int] = []
    before = ""
    for token, name in zip(ids, names, strict=True):
        if token in special:
            out.append((name, True))
            run, before = [], ""
            continue
        run.append(token)
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
        if text.startswith(before) and not text.endswith("\ufffd") and len(text) > len(before):
            out.append((text[len(before) :], False))
            before = text
        else:
            out.append((f"‹{name}›", False))
    return out


def check_token_ids(
    ids: np.ndarray,
    offsets: np.ndarray,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    vocab_size: int,
    sequences_per_example: int = 1,
) -> None:
    """Refuse token ids outside of [0, vocab_size), which JAX would read as the last row of the embedding.

    Args:
        ids: all sequences, one behind the other.
        offsets: where each begins, and the end of the last.
        examples: those of the sequences.
        tokenizer: that made the ids.
        vocab_size: rows of the embedding.
        sequences_per_example: 1, or 2 for pairs.

    Raises:
        ValueError: with the first example's file and line, the token, and both sizes.
    """
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if not len(outside):
        return
    rows = np.unique((np.searchsorted(offsets, outside, side="right") - 1) // sequences_per_example)
    more = f" ({len(rows) - 1:,} more rows have such a token.)" if len(rows) > 1 else ""
    token = int(ids[outside[0]])
    text = f"{tokenizer.convert_ids_to_tokens(token)!r} " if token >= 0 else ""
    raise ValueError(
        f"{examples[int(rows[0])].where}: the token {text}has the id {token}, and "
        f"{_describe_sizes(tokenizer, vocab_size)}{more}"
    )


def check_special_tokens(folder: str | Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer, or a generation_config.json, whose BOS, EOS or padding has no row of the embedding.

    A negative id of the padding means none, as old configs have it; no sequence of a batch holds it.

    Args:
        folder: of the model, or its name on the hub; its generation_config.json is read if it has one.
        tokenizer: of the model.
        vocab_size: rows of the embedding.

    Raises:
        ValueError: with the key, the id and both sizes.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = {f"{folder}: the tokenizer's": {key: getattr(tokenizer, key) for key in keys}}
    path = find_model_files(folder, SMALL_FILES) / "generation_config.json"
    if path.is_file():
        settings[f"{path}:"] = read_json_object(path)
    for where, values in settings.items():
        for key in keys:
            for token in _read_ids(where, key, values.get(key)):
                if not 0 <= token < vocab_size and not (key == "pad_token_id" and token < 0):
                    raise ValueError(f"{where} {key} is {token}, and {_describe_sizes(tokenizer, vocab_size)}")


def largest_token_id(tokenizer: Tokenizer) -> int:
    """The largest id that a text can become."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _read_ids(where: str, key: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ValueError(f"{where} {key} is {value!r}; the id of a token is wanted, a list of ids, or null.")
    return list(ids)


def _describe_sizes(tokenizer: Tokenizer, vocab_size: int) -> str:
    most = largest_token_id(tokenizer) + 1
    return (
        f"the model's embedding has {vocab_size} rows, for the ids 0 to {vocab_size - 1}; the tokenizer's ids go up to "
        f"{most - 1}. Take the tokenizer that the model was trained with, or give the embedding a row for each token "
        f"(in transformers: model.resize_token_embeddings({max(most, vocab_size)}))."
    )
