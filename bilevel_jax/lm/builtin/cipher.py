"""The quickstart's builtin task, a next-letter cipher with corrupted labels.

`bhat>` wants `ciba`: every letter moves on by one, and after the last of the twenty comes the first. A model of 22
thousand parameters that can already copy learns it in seconds; a handful of validation examples does not teach it the
whole alphabet; and which training examples hurt is known.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel_jax.lm.builtin import char_model
from bilevel_jax.lm.data.batches import permute_indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrst"
STRING_LENGTH = 4
NUM_STRINGS = len(LETTERS) ** STRING_LENGTH
CHARACTERS = "abcdefghijklmnopqrstuvwxyz> \n"
"""All the tokenizer knows; more than the cipher needs, so that one's own short rows can be tried."""


def write_cipher_data(
    folder: str | Path,
    *,
    seed: int = 0,
    clean: int = 128,
    wrong: int = 128,
    noise: int = 128,
    validation: int = 16,
    dev: int = 16,
    test: int = 128,
    copies: int = 512,
) -> Path:
    """Writes train, validation, dev, test and copies .jsonl and untrained/ (config and tokenizer) into `folder`.

    Training examples have the label clean (each letter + 1), wrong (each letter - 1) or noise (random letters);
    examples of copies repeat the prompt's letters, which the model is pretrained on to learn the form; all others are
    clean. No prompt is in two examples. The same arguments write the same bytes.

    Args:
        folder: created where it is missing.
        seed: another seed, other strings.
        clean: number of training examples with this label.
        wrong: number of training examples with this label.
        noise: number of training examples with this label.
        validation: number of examples; a file of 0 examples is not written.
        dev: number of examples.
        test: number of examples.
        copies: number of examples.

    Returns:
        `folder`.

    Raises:
        ValueError: a negative number, none in all, or more than there are strings.
        FileExistsError: a file that is already there with other contents.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in write_cipher_data(folder, copies=0, dev=0).iterdir())
        ['test.jsonl', 'train.jsonl', 'untrained', 'validation.jsonl']
    """
    folder = Path(folder)
    sizes = {"clean": clean, "wrong": wrong, "noise": noise, "validation": validation, "dev": dev}
    sizes |= {"test": test, "copies": copies}
    if min(sizes.values()) < 0 or not 0 < sum(sizes.values()) <= NUM_STRINGS:
        raise ValueError(f"{sizes} rows: none may be negative, and together they must be 1 to {NUM_STRINGS} strings.")
    numbers = permute_indices(np.arange(sum(sizes.values())), NUM_STRINGS, seed).tolist()
    strings = iter(spell_string(number, LETTERS) for number in numbers)
    random_numbers = permute_indices(np.arange(2 * noise + 2), NUM_STRINGS, seed, 1).tolist()
    random_strings = iter(spell_string(number, LETTERS) for number in random_numbers)

    def noisy(string: str) -> str:
        return next(r for r in random_strings if r not in {rotate_letters(string, by) for by in (-1, 0, 1)})

    rules: dict[str, Callable[[str], str]] = {
        "clean": lambda string: rotate_letters(string, 1),
        "wrong": lambda string: rotate_letters(string, -1),
        "noise": noisy,
        "copy": lambda string: rotate_letters(string, 0),
    }

    def rows(label: str, count: int) -> list[dict[str, str]]:
        chosen_strings = [next(strings) for _ in range(count)]
        return [{"prompt": s + ">", "response": rules[label](s), "label": label} for s in chosen_strings]

    train = [row for label in ("clean", "wrong", "noise") for row in rows(label, sizes[label])]
    shuffled = [train[i] for i in permute_indices(np.arange(len(train)), max(len(train), 1), seed, 2)]
    files = {"train": shuffled} | {name: rows("clean", sizes[name]) for name in ("validation", "dev", "test")}
    files["copies"] = rows("copy", copies)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if part:
            char_model.write_jsonl(folder / f"{name}.jsonl", part)
    char_model.write_untrained_model(folder / "untrained", CHARACTERS)
    return folder


def rotate_letters(string: str, by: int) -> str:
    """Each letter moved on by `by` places; after the last of the twenty comes the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in string)


def make_cipher_config() -> dict[str, Any]:
    """config.json of the model: 21,952 parameters."""
    return char_model.make_char_config(CHARACTERS)


def make_cipher_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character."""
    return char_model.make_char_tokenizer(CHARACTERS)


def spell_string(number: int, letters: str) -> str:
    """The string of STRING_LENGTH of these letters that has this number."""
    return "".join(letters[number // len(letters) ** place % len(letters)] for place in range(STRING_LENGTH))
