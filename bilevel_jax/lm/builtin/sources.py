"""A builtin task of seven data sources of known worth.

The target is the cipher of `cipher.py` on strings that mix letters of both halves of the alphabet. Two sources are
right, each about one half alone, so that the best mixture needs both, and the rarer one more than its size; two are
partly or always wrong; two teach something else; one repeats a few right rows.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bilevel_jax.lm.builtin import char_model
from bilevel_jax.lm.builtin.cipher import CHARACTERS, LETTERS, NUM_STRINGS, rotate_letters, spell_string
from bilevel_jax.lm.builtin.rows import check_not_negative
from bilevel_jax.lm.data.batches import permute_indices

HALF = len(LETTERS) // 2
SOURCES = {"early": 64, "late": 24, "half_wrong": 64, "wrong": 48, "noise": 64, "copies": 64, "repeated": 24}
"""Training examples by source. `early` and `late`: right answers about the first ten letters, and about the last ten;
`half_wrong`: every second answer is wrong; `wrong`: each is (the letter before); `noise`: random letters; `copies`:
the prompt again; `repeated`: NUM_REPEATED right rows, over and over."""
NUM_REPEATED = 4
"""Different rows of the source `repeated`."""


def write_sources_data(
    folder: str | Path,
    *,
    seed: int = 0,
    validation: int = 32,
    dev: int = 32,
    test: int = 256,
    copies: int = 512,
) -> Path:
    """Writes train, validation, dev, test and copies .jsonl and untrained/ (config and tokenizer) into `folder`.

    Training examples have the key `source`, one of SOURCES, and the label clean, wrong, noise or copy; those of
    validation, dev and test are clean; the rows of copies repeat the prompt's letters, which the model is pretrained
    on. But for the rows of `repeated` no prompt is in two examples. The same arguments write the same bytes.

    Args:
        folder: created where it is missing.
        seed: another seed, other strings.
        validation: number of examples; a file of 0 examples is not written.
        dev: number of examples.
        test: number of examples.
        copies: number of examples that the model is pretrained on.

    Returns:
        `folder`.

    Raises:
        ValueError: a negative number, or more examples than there are strings.
        FileExistsError: a file that is already there with other contents.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in write_sources_data(folder, copies=0, dev=0).iterdir())
        ['test.jsonl', 'train.jsonl', 'untrained', 'validation.jsonl']
    """
    folder = Path(folder)
    sizes = {"validation": validation, "dev": dev, "test": test, "copies": copies}
    check_not_negative(sizes)
    if sum(sizes.values()) > NUM_STRINGS // 2:
        raise ValueError(f"{sizes}: together they must be at most {NUM_STRINGS // 2}.")
    mixed, halves = _draw_mixed_strings(seed), [_draw_half_strings(seed, half) for half in (0, 1)]
    random_strings = _draw_mixed_strings(seed + 1_000_003)

    def answer(label: str, string: str) -> str:
        if label == "noise":
            return next(other for other in random_strings if other not in {rotate_letters(string, by) for by in SHIFTS})
        return rotate_letters(string, RULES[label])

    def make_row(label: str, string: str) -> dict[str, str]:
        return {"prompt": string + ">", "response": answer(label, string), "label": label}

    strings_of = {"early": halves[0], "late": halves[1]}
    train: list[dict[str, str]] = []
    for source, count in SOURCES.items():
        labels = [LABELS[source][place % len(LABELS[source])] for place in range(count)]
        strings = [next(strings_of.get(source, mixed)) for _ in range(NUM_REPEATED if source == "repeated" else count)]
        rows = [make_row(label, strings[place % len(strings)]) for place, label in enumerate(labels)]
        train += [row | {"source": source} for row in rows]
    files = {"train": [train[i] for i in permute_indices(np.arange(len(train)), len(train), seed, 2)]}
    files |= {name: [make_row("clean", next(mixed)) for _ in range(sizes[name])] for name in sizes if name != "copies"}
    files["copies"] = [make_row("copy", next(mixed)) for _ in range(copies)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if part:
            char_model.write_jsonl(folder / f"{name}.jsonl", part)
    char_model.write_untrained_model(folder / "untrained", CHARACTERS)
    return folder


RULES = {"clean": 1, "wrong": -1, "copy": 0}
"""By how many places each letter moves on."""
SHIFTS = tuple(RULES.values())
LABELS = {
    "early": ("clean",), "late": ("clean",), "half_wrong": ("clean", "wrong"), "wrong": ("wrong",),
    "noise": ("noise",), "copies": ("copy",), "repeated": ("clean",),
}  # fmt: skip
"""The labels of a source's rows, in turn."""


def _draw_mixed_strings(seed: int) -> Iterator[str]:
    """Strings with letters of both halves, in pseudo-random order, none twice."""
    for number in permute_indices(np.arange(NUM_STRINGS), NUM_STRINGS, seed).tolist():
        string = spell_string(number, LETTERS)
        if len({LETTERS.index(letter) < HALF for letter in string}) == 2:
            yield string


def _draw_half_strings(seed: int, half: int) -> Iterator[str]:
    """Strings of the letters of one half, in pseudo-random order, none twice."""
    letters = LETTERS[half * HALF : (half + 1) * HALF]
    size = HALF ** len(spell_string(0, letters))
    for number in permute_indices(np.arange(size), size, seed, 3 + half).tolist():
        yield spell_string(number, letters)
