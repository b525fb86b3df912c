"""A builtin task learned in context: letters transcribed by a hidden key.

`b f k>` wants the three letters in another script. The twelve letters form six groups of two, ab to kl; a *key* says
for each group in which of three scripts it is written: Latin (B F K), Greek (β ζ λ) or Cyrillic. The model is
pretrained on dialogues, each with a key of its own, so it knows all scripts and reads the key from earlier exchanges:
with k demonstrations the loss falls from log 3 per letter to 0, as the groups are seen. The examples of a run have one
key, that of validation (label clean), another one for wrong, and none for noise: training teaches the key,
demonstrations tell it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from bilevel_jax.lm.builtin import char_model
from bilevel_jax.lm.builtin.rows import check_not_negative, check_rows, draw_labels
from bilevel_jax.lm.data.batches import permute_indices

LETTERS = "abcdefghijkl"
SCRIPTS = ("ABCDEFGHIJKL", "αβγδεζηθικλμ", "абвгдежзийкл")
GROUP_SIZE = 2
NUM_GROUPS = len(LETTERS) // GROUP_SIZE
NUM_KEYS = len(SCRIPTS) ** NUM_GROUPS
QUESTION_LENGTH = 3
NUM_QUESTIONS = len(LETTERS) ** QUESTION_LENGTH
CHARACTERS = LETTERS + "".join(SCRIPTS) + ">\n"
LESSON_TURNS = 12
"""Exchanges of a lesson: so many less one are demonstrations that the model has learned to read."""
CONFIG_CHANGES = {
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}
FORMATS = ("responses", "pairs")


def write_scripts_data(
    folder: str | Path,
    *,
    seed: int = 0,
    corrupted: float = 0.5,
    noise: float = 0.0,
    format: str = "responses",
    train: int = 256,
    validation: int = 32,
    dev: int = 64,
    test: int = 256,
    lessons: int = 2048,
) -> Path:
    """Writes train, validation, dev, test and lessons .jsonl and untrained/ (config and tokenizer) into `folder`.

    Of the `train` training examples, round(corrupted train) follow another key, which has another script in every group
    (label wrong), round(noise train) a key of their own (noise), and the others the right one (clean), as all examples
    of validation, dev and test. Of pairs, clean ones prefer the response by the right key to that by the wrong one,
    wrong ones the other way round, and noise has a side drawn at random. The key `answer` holds the right response, for
    a verifier alone. No question is in two examples. The same arguments write the same bytes, and neither `corrupted`
    nor `noise` nor `format` moves a question.

    Args:
        folder: created where it is missing.
        seed: another seed, another key and other questions.
        corrupted: share of the training examples that follow the wrong key.
        noise: share of the training examples that follow no key.
        format: "responses" (prompt, response) or "pairs" (prompt, chosen, rejected).
        train: number of examples; a file of 0 examples is not written.
        validation: number of examples.
        dev: number of examples.
        test: number of examples.
        lessons: number of dialogues of `LESSON_TURNS` exchanges that the model is pretrained on.

    Returns:
        `folder`.

    Raises:
        ValueError: negative numbers or shares, shares with a sum above 1, another format, or more examples than
            questions.
        FileExistsError: a file that is already there with other contents.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in write_scripts_data(folder, train=8, lessons=0, dev=0).iterdir())
        ['test.jsonl', 'train.jsonl', 'untrained', 'validation.jsonl']
    """
    folder = Path(folder)
    sizes = {"train": train, "validation": validation, "dev": dev, "test": test}
    num_wrong, num_random = round(corrupted * train), round(noise * train)
    check_not_negative(sizes | {"lessons": lessons, "corrupted": corrupted, "noise": noise})
    check_rows(sizes, NUM_QUESTIONS, corrupted=corrupted, noise=noise)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}; it is one of {', '.join(FORMATS)}.")
    right = draw_key(seed)
    wrong = make_wrong_key(right)
    noisy_keys = iter(_draw_numbers(NUM_KEYS, seed, 5, 16 * num_random + 64).tolist())
    numbers = permute_indices(np.arange(sum(sizes.values())), NUM_QUESTIONS, seed)
    questions = dict(zip(sizes, np.split(numbers, np.cumsum(list(sizes.values()))[:-1]), strict=True))

    def make_row(number: int, label: str) -> dict[str, str]:
        letters = _spell_question(number)
        answer, wrong_answer = transcribe(letters, right), transcribe(letters, wrong)
        row = {"prompt": _write_prompt(letters), "label": label, "answer": answer}
        if label == "noise":
            responses = (transcribe(letters, _spell_key(key)) for key in noisy_keys)
            response = next(other for other in responses if other not in (answer, wrong_answer))
            is_right = next(noisy_keys) % 2 == 0
        else:
            response, is_right = answer if label == "clean" else wrong_answer, label == "clean"
        if format == "responses":
            return row | {"response": response}
        chosen, rejected = (answer, wrong_answer) if is_right else (wrong_answer, answer)
        return row | {"chosen": chosen, "rejected": rejected}

    labels = {name: ["clean"] * size for name, size in sizes.items()}
    labels["train"] = draw_labels(train, num_wrong=num_wrong, num_random=num_random, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in questions.items():
        rows = [make_row(int(number), label) for number, label in zip(part, labels[name], strict=True)]
        if rows:
            char_model.write_jsonl(folder / f"{name}.jsonl", rows)
    if lessons:
        char_model.write_jsonl(folder / "lessons.jsonl", make_lessons(seed, lessons))
    char_model.write_untrained_model(folder / "untrained", CHARACTERS, changes=CONFIG_CHANGES, skip_spaces=True)
    return folder


def transcribe(letters: str, key: tuple[int, ...]) -> str:
    """Each letter in the script that the key has for its group."""
    return "".join(SCRIPTS[key[LETTERS.index(letter) // GROUP_SIZE]][LETTERS.index(letter)] for letter in letters)


def draw_key(seed: int) -> tuple[int, ...]:
    """The script of each group, by a seed."""
    return _spell_key(int(_draw_numbers(NUM_KEYS, seed, 3, 1)[0]))


def make_wrong_key(key: tuple[int, ...]) -> tuple[int, ...]:
    """The next script in every group: no letter is written as by `key`."""
    return tuple((script + 1) % len(SCRIPTS) for script in key)


def make_lessons(seed: int, count: int) -> list[dict[str, Any]]:
    """Dialogues of `LESSON_TURNS` exchanges, each with a key of its own."""
    keys = _draw_numbers(NUM_KEYS, seed, 6, count).tolist()
    questions = _draw_numbers(NUM_QUESTIONS, seed, 7, count * LESSON_TURNS).reshape(count, LESSON_TURNS).tolist()
    return [
        {"messages": [message for number in asked for message in _make_exchange(number, _spell_key(key))]}
        for key, asked in zip(keys, questions, strict=True)
    ]


def _make_exchange(number: int, key: tuple[int, ...]) -> list[dict[str, str]]:
    letters = _spell_question(number)
    return [
        {"role": "user", "content": _write_prompt(letters)},
        {"role": "assistant", "content": transcribe(letters, key)},
    ]


def _write_prompt(letters: str) -> str:
    return " ".join(letters) + ">"  # spaces make words of letters, by which likeness is measured; no token has one


def _draw_numbers(size: int, seed: int, purpose: int, count: int) -> Int[np.ndarray, "count"]:
    """Pseudo-random numbers below `size`, the same on every machine."""
    return permute_indices(np.arange(count), 2**30, seed, purpose) % size


def _spell_key(number: int) -> tuple[int, ...]:
    return tuple(number // len(SCRIPTS) ** group % len(SCRIPTS) for group in range(NUM_GROUPS))


def _spell_question(number: int) -> str:
    return "".join(LETTERS[number // len(LETTERS) ** place % len(LETTERS)] for place in range(QUESTION_LENGTH))
