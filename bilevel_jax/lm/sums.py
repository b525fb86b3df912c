"""An embedded task whose truth is known: sums of two three-digit numbers, right or with the carries forgotten.

`384+267=` wants `651`; who forgets the carries writes `541`. Both rules can be learned, and the model is taught both
from the start, so that it often knows better than the rows that it is then trained on. Every question carries
somewhere, hence the rules never agree; every sum is below 1000, hence all answers have three digits.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bilevel_jax.lm import characters
from bilevel_jax.lm.batches import permutation

CHARACTERS = "0123456789+= \n"
LEAST, NUMBERS = 100, 800
QUESTIONS = NUMBERS * NUMBERS
MISTAKEN = 0.4
"""Share of the lessons that forget the carries: they are easier to learn, so it is below a half."""


def write(
    folder: str | Path,
    *,
    seed: int = 0,
    corrupted: float = 0.4,
    noise: float = 0.0,
    rows: int = 1024,
    validation: int = 16,
    select: int = 64,
    report: int = 384,
    lessons: int = 8192,
) -> Path:
    """Write train, validation, select, report and lessons .jsonl and untrained/ (config and tokenizer) into `folder`.

    Of the training `rows`, round(corrupted rows) forget the carries (label wrong), round(noise rows) answer with a
    number drawn at random (noise), and the others are right (clean). Of the `lessons`, from which the model is
    pretrained, round(MISTAKEN lessons) forget the carries. All other files are right. The key `answer` holds the
    right sum of every row, for a checker alone. No question stands in two rows, nor with its numbers exchanged. The
    same arguments write the same bytes, and neither `corrupted` nor `noise` moves a question; a part of 0 rows is
    left out, and a file that is already there with other contents is an error.
    """
    folder = Path(folder)
    sizes = {"rows": rows, "validation": validation, "select": select, "report": report, "lessons": lessons}
    wrong, random = round(corrupted * rows), round(noise * rows)
    if min(sizes.values()) < 0 or not 0 < sum(sizes.values()) <= QUESTIONS // 8:
        raise ValueError(f"{sizes}: none may be negative, and together they must be 1 to {QUESTIONS // 8}.")
    if min(wrong, random) < 0 or wrong + random > rows:
        raise ValueError(f"corrupted={corrupted}, noise={noise}: shares of the rows are wanted, of at most 1 together.")
    questions = _questions(seed)
    parts = {name: [next(questions) for _ in range(count)] for name, count in sizes.items()}
    numbers = iter((LEAST + permutation(np.arange(3 * random), 3 * random * NUMBERS, seed, 1) % NUMBERS).tolist())

    def labels(name: str, *, wrong: int, noise: int) -> list[str]:
        count = sizes[name]
        ordered = ["wrong"] * wrong + ["noise"] * noise + ["clean"] * (count - wrong - noise)
        return [ordered[i] for i in permutation(np.arange(count), max(count, 1), seed, 2)]

    def answer(label: str, a: int, b: int) -> str:
        rules = {"clean": str(a + b), "wrong": forgetful(a, b)}
        return rules[label] if label in rules else next(str(n) for n in numbers if str(n) not in rules.values())

    def table(name: str, labels: list[str]) -> list[dict[str, str]]:
        return [
            {"prompt": f"{a}+{b}=", "response": answer(label, a, b), "label": label, "answer": str(a + b)}
            for (a, b), label in zip(parts[name], labels, strict=True)
        ]

    files = {"train": table("rows", labels("rows", wrong=wrong, noise=random))}
    files |= {name: table(name, ["clean"] * sizes[name]) for name in ("validation", "select", "report")}
    files["lessons"] = table("lessons", labels("lessons", wrong=round(MISTAKEN * lessons), noise=0))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if part:
            characters.write_rows(folder / f"{name}.jsonl", part)
    characters.write_untrained(folder / "untrained", CHARACTERS)
    return folder


def forgetful(a: int, b: int) -> str:
    """The sum of two numbers of three digits, each column added by itself: what it carries is lost."""
    return str(sum((a // place + b // place) % 10 * place for place in (1, 10, 100)))


def _questions(seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of numbers whose sum carries, in pseudo-random order, each pair in one of its orders only."""
    seen: set[tuple[int, int]] = set()
    for start in range(0, QUESTIONS, 4096):
        for number in permutation(np.arange(start, min(start + 4096, QUESTIONS)), QUESTIONS, seed).tolist():
            a, b = LEAST + number // NUMBERS, LEAST + number % NUMBERS
            if a + b < 1000 and forgetful(a, b) != str(a + b) and (min(a, b), max(a, b)) not in seen:
                seen.add((min(a, b), max(a, b)))
                yield a, b
