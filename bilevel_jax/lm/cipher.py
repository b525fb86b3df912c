"""The quickstart's task: a next-letter cipher with right, consistently wrong and random rows, as ordinary files.

`bhat>` wants `ciba`: every letter moves on by one, and after the last of the twenty comes the first. A model of 22
thousand parameters that can already copy learns it in seconds; a handful of trusted rows does not teach it the whole
alphabet; and which training rows hurt is known.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel_jax.lm import characters
from bilevel_jax.lm.batches import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrst"
WIDTH = 4
STRINGS = len(LETTERS) ** WIDTH
CHARACTERS = "abcdefghijklmnopqrstuvwxyz> \n"
"""All the tokenizer knows; more than the cipher needs, so that one's own short rows can be tried."""


def write(
    folder: str | Path,
    *,
    seed: int = 0,
    clean: int = 128,
    wrong: int = 128,
    noise: int = 128,
    validation: int = 16,
    select: int = 16,
    report: int = 128,
    copies: int = 512,
) -> Path:
    """Write train, validation, select, report and copies .jsonl and untrained/ (config and tokenizer) into `folder`.

    Training rows carry the label clean (each letter + 1), wrong (each letter - 1) or noise (random letters); rows of
    copies repeat the prompt's letters, for the model to learn the form before it is asked anything; all other rows
    are clean. No prompt stands in two rows. The same arguments write the same bytes; a part of 0 rows is
    left out, and a file that is already there with other contents is an error.
    """
    folder = Path(folder)
    sizes = {"clean": clean, "wrong": wrong, "noise": noise, "validation": validation, "select": select}
    sizes |= {"report": report, "copies": copies}
    if min(sizes.values()) < 0 or not 0 < sum(sizes.values()) <= STRINGS:
        raise ValueError(f"{sizes} rows: none may be negative, and together they must be 1 to {STRINGS} strings.")
    drawn = permutation(np.arange(sum(sizes.values())), STRINGS, seed).tolist()
    strings = iter(_letters(number) for number in drawn)
    random = iter(_letters(number) for number in permutation(np.arange(2 * noise + 2), STRINGS, seed, 1).tolist())

    def noisy(string: str) -> str:
        return next(r for r in random if r not in {rotate(string, by) for by in (-1, 0, 1)})

    rules: dict[str, Callable[[str], str]] = {
        "clean": lambda string: rotate(string, 1),
        "wrong": lambda string: rotate(string, -1),
        "noise": noisy,
        "copy": lambda string: rotate(string, 0),
    }

    def rows(label: str, count: int) -> list[dict[str, str]]:
        taken = [next(strings) for _ in range(count)]
        return [{"prompt": s + ">", "response": rules[label](s), "label": label} for s in taken]

    train = [row for label in ("clean", "wrong", "noise") for row in rows(label, sizes[label])]
    shuffled = [train[i] for i in permutation(np.arange(len(train)), max(len(train), 1), seed, 2)]
    files = {"train": shuffled} | {name: rows("clean", sizes[name]) for name in ("validation", "select", "report")}
    files["copies"] = rows("copy", copies)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if part:
            characters.write_rows(folder / f"{name}.jsonl", part)
    characters.write_untrained(folder / "untrained", CHARACTERS)
    return folder


def rotate(string: str, by: int) -> str:
    """Each letter moved on by `by` places; after the last of the twenty comes the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in string)


def config() -> dict[str, Any]:
    """config.json of the model: 21,952 parameters."""
    return characters.config(CHARACTERS)


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character."""
    return characters.tokenizer(CHARACTERS)


def _letters(number: int) -> str:
    return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(WIDTH))
