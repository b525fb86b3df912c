"""A builtin task, sums of three-digit numbers with corrupted labels.

`384+267=` wants `651`; who forgets the carries writes `541`. Both rules can be learned, and the model is taught both
from the start, so that it often knows better than the rows that it is then trained on. Every question carries
somewhere, hence the rules never agree; every sum is below 1000, hence all answers have three digits.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bilevel_jax.lm.builtin import char_model
from bilevel_jax.lm.builtin.rows import check_not_negative, check_rows, draw_labels
from bilevel_jax.lm.data.batches import permute_indices

CHARACTERS = "0123456789+= \n"
MIN_NUMBER, NUM_NUMBERS = 100, 800
NUM_QUESTIONS = NUM_NUMBERS * NUM_NUMBERS
WRONG_LESSON_SHARE = 0.4
"""Share of the lessons that forget the carries: they are easier to learn, so it is below a half."""


def write_sums_data(
    folder: str | Path,
    *,
    seed: int = 0,
    corrupted: float = 0.4,
    noise: float = 0.0,
    train: int = 1024,
    validation: int = 16,
    dev: int = 64,
    test: int = 384,
    lessons: int = 8192,
) -> Path:
    """Writes train, validation, dev, test and lessons .jsonl and untrained/ (config and tokenizer) into `folder`.

    Of the `train` training examples, round(corrupted train) forget the carries (label wrong), round(noise train) answer
    with a number drawn at random (noise), and the others are right (clean). Of the `lessons`, on which the model is
    pretrained, round(WRONG_LESSON_SHARE lessons) forget the carries. All other files are right. The key `answer` holds
    the right sum of every example, for a verifier alone. No question is in two examples, nor with its numbers
    exchanged. The same arguments write the same bytes, and neither `corrupted` nor `noise` moves a question.

    Args:
        folder: created where it is missing.
        seed: another seed, other questions.
        corrupted: share of the training examples that forget the carries.
        noise: share of the training examples with a random answer.
        train: number of examples; a file of 0 examples is not written.
        validation: number of examples.
        dev: number of examples.
        test: number of examples.
        lessons: number of examples.

    Returns:
        `folder`.

    Raises:
        ValueError: negative numbers or shares, shares with a sum above 1, or more examples than questions.
        FileExistsError: a file that is already there with other contents.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in write_sums_data(folder, train=8, lessons=0, dev=0).iterdir())
        ['test.jsonl', 'train.jsonl', 'untrained', 'validation.jsonl']
    """
    folder = Path(folder)
    sizes = {"train": train, "validation": validation, "dev": dev, "test": test, "lessons": lessons}
    num_wrong, num_random = round(corrupted * train), round(noise * train)
    check_not_negative(sizes | {"corrupted": corrupted, "noise": noise})
    check_rows(sizes, NUM_QUESTIONS // 8, corrupted=corrupted, noise=noise)
    questions = _iter_questions(seed)
    parts = {name: [next(questions) for _ in range(count)] for name, count in sizes.items()}
    numbers = iter(
        (
            MIN_NUMBER + permute_indices(np.arange(3 * num_random), 3 * num_random * NUM_NUMBERS, seed, 1) % NUM_NUMBERS
        ).tolist()
    )

    def answer(label: str, a: int, b: int) -> str:
        rules = {"clean": str(a + b), "wrong": add_without_carries(a, b)}
        return rules[label] if label in rules else next(str(n) for n in numbers if str(n) not in rules.values())

    def make_rows(name: str, labels: list[str]) -> list[dict[str, str]]:
        return [
            {"prompt": f"{a}+{b}=", "response": answer(label, a, b), "label": label, "answer": str(a + b)}
            for (a, b), label in zip(parts[name], labels, strict=True)
        ]

    labels = draw_labels(train, num_wrong=num_wrong, num_random=num_random, seed=seed)
    files = {"train": make_rows("train", labels)}
    files |= {name: make_rows(name, ["clean"] * sizes[name]) for name in ("validation", "dev", "test")}
    num_wrong_lessons = round(WRONG_LESSON_SHARE * lessons)
    files["lessons"] = make_rows("lessons", draw_labels(lessons, num_wrong=num_wrong_lessons, num_random=0, seed=seed))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if part:
            char_model.write_jsonl(folder / f"{name}.jsonl", part)
    char_model.write_untrained_model(folder / "untrained", CHARACTERS)
    return folder


def add_without_carries(a: int, b: int) -> str:
    """The sum of two numbers of three digits, each column added by itself: what it carries is lost."""
    return str(sum((a // place + b // place) % 10 * place for place in (1, 10, 100)))


def _iter_questions(seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of numbers whose sum carries, in pseudo-random order, each pair in one of its orders only."""
    seen: set[tuple[int, int]] = set()
    for start in range(0, NUM_QUESTIONS, 4096):
        for number in permute_indices(np.arange(start, min(start + 4096, NUM_QUESTIONS)), NUM_QUESTIONS, seed).tolist():
            a, b = MIN_NUMBER + number // NUM_NUMBERS, MIN_NUMBER + number % NUM_NUMBERS
            if a + b < 1000 and add_without_carries(a, b) != str(a + b) and (min(a, b), max(a, b)) not in seen:
                seen.add((min(a, b), max(a, b)))
                yield a, b
