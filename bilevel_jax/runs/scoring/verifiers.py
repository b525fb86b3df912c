"""Verifiers of generated responses, numeric, exact, by choice letter or user-defined.

Read as numbers: 1,234 and -$3.50 and +7 and .5 and 2e3, 3/4 and 2 1/2 and \\frac{3}{4}; a percent sign or a unit behind
them is passed over, and so are digits inside a word (m2). A hyphen is a sign unless a digit, a letter or a closing
bracket stands right before it: 10-3 holds 10 and 3.

Read as the letter of a choice, the first of these that a response holds, of several of its kind the last: the letter
behind a marker; \\boxed{B}; "answer is B", "answer: (B)"; (B); a line that begins with B. or B) or B: or is B alone.
"""

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from bilevel_jax.lm.data import files
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.runs.config.rules import names_function
from bilevel_jax.runs.config.schema import VerifierSection
from bilevel_jax.runs.tasks.user_functions import error_location, load_user_function

Verifier = Callable[[Example, str], float]
"""(the row with the question and its right answer, a response) -> 0 to 1."""
Grader = Callable[[str, str, str], float]
"""(question, right answer, response) -> 0 to 1: the function inside a verifier, and what a user may give."""

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-+\u2212])? [$€£¥]?
    (?<![A-Za-z\d])(?<!\d\.)
    (?: (?P<ones>\d+)\ (?P<part>\d+)/(?P<parts>\d+)
      | (?P<over>{_INTEGER})/(?P<under>{_INTEGER})
      | (?P<plain>{_INTEGER}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\d))? | (?<!\.)\.\d+) )""",
    re.VERBOSE | re.ASCII,
)
_LATEX = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_LETTER = r"(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9'])(?!(?<=[AI]) (?!because|since|as )[a-z])"  # no "A cat", "I think"
_CHOICE_PATTERNS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"\\boxed\{\s*(?:\\text\{)?\(?([A-J])\)?\}",
        rf"(?i:\b(?:answer|choice|option)\b(?:\s+is)?)\s*:?\s*(?:\*\*|\()*{_LETTER}",
        r"\(([A-J])\)",
        r"^\s*(?:\*\*|\()?([A-J])(?:\*\*)?(?:[.):]|\s*$)",
    )
)
_MAX_NUMBER_LENGTH = 400
"""Characters of a number; a model that repeats one digit writes longer ones, which are no answers."""


def make_verifier(config: VerifierSection, examples: Sequence[Example] = ()) -> Verifier:
    """The verifier that `verifier.name` names: numeric, exact, choice, or path/to/file.py:function.

    The right answer is what the row's key `verifier.answer_field` holds, read from its file again; without such a key,
    the row's own last response. The question is what stands before that. `examples` are rows that will be asked about:
    their answers are read at once, so that one which cannot be used is told before anything is generated.

    Raises ValueError for a name that is none, for a file or function that is not there, for an answer that is missing
    (or is no number, where numbers are compared), and, when called, for a function that fails or returns no number
    from 0 to 1. FileNotFoundError for a file that is not there.
    """
    read_answer = _answer_reader(config)
    grade = _make_grader(config)

    def reference_answer(example: Example) -> str:
        text = read_answer(example)
        if config.name == "numeric" and parse_final_number(text, config.markers) is None:
            raise ValueError(
                f"{example.where}: no number in the right answer {describe_value(text)}. Set verifier.name to exact."
            )
        if config.name == "choice" and parse_choice(text, config.markers) is None:
            raise ValueError(
                f"{example.where}: no letter of a choice, A to J, in the right answer {describe_value(text)}. Set "
                "verifier.answer_field to the key that holds it, or verifier.name to exact."
            )
        return text

    def verify(example: Example, response: str) -> float:
        correct_answer = reference_answer(example)
        try:
            return grade(question_text(example), correct_answer, response)
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error

    for example in examples:
        reference_answer(example)
    return verify


def parse_final_number(text: str, markers: Sequence[str] = ()) -> Fraction | None:
    """The number that a text ends in: the first behind its last marker or, where it has no marker, its last; or None.

    Exact, so 0.33 is not 1/3, and 50 % is 50. Markers are found in any case. Wrong where a response goes on after its
    answer without a marker, and where another number stands between the marker and the answer.
    """
    marker_matches = list(re.finditer("|".join(map(re.escape, markers)), text, re.IGNORECASE)) if markers else []
    text = _LATEX.sub(r"\1/\2", text[marker_matches[-1].end() :] if marker_matches else text)
    number_matches = list(_NUMBER.finditer(text))
    return _parse_number(number_matches[0 if marker_matches else -1]) if number_matches else None


def parse_choice(text: str, markers: Sequence[str] = ()) -> str | None:
    """The letter of the choice, A to J, that a text answers with; None where it says none.

    Wrong where a response discusses choices behind its answer in the same words ("the answer is B, and not (C)" is
    read as B, "B. Not (C)" as C).
    """
    matches = list(re.finditer("|".join(map(re.escape, markers)), text, re.IGNORECASE)) if markers else []
    if matches and (letter := re.search(_LETTER, text[matches[-1].end() :])):
        return letter[1]
    for pattern in _CHOICE_PATTERNS:
        if letters := pattern.findall(text):
            return letters[-1]
    return None


def exact_match(question: str, answer: str, response: str) -> float:
    """1 where answer and response are equal up to white space: none at the ends, one space for each run of it."""
    return float(answer.split() == response.split())


def load_grader(location: str) -> Grader:
    """The function (question, answer, response) -> bool or 0 to 1 that `path/to/file.py:function` names."""
    user_function, path = load_user_function(location, key="verifier.name"), location.rpartition(":")[0]

    def grade(question: str, answer: str, response: str) -> float:
        try:
            value = user_function(question, answer, response)
        except Exception as error:
            raise ValueError(
                f"{location} failed at {error_location(error, path)} with {type(error).__name__}: {error}. It is "
                "called with (question, answer, response), three strings."
            ) from error
        try:
            grade_value = float(value)
        except (TypeError, ValueError):
            grade_value = math.nan
        if not 0 <= grade_value <= 1:
            raise ValueError(
                f"{location} returned {describe_value(value)} for the response {describe_value(response)}; 0 to 1 is "
                "wanted."
            )
        return grade_value

    return grade


def question_text(example: Example) -> str:
    """All that stands before the row's last response, one turn behind the other, an empty line between."""
    return "\n\n".join(turn.content for turn in example.turns[:-1])


def _make_grader(config: VerifierSection) -> Grader:
    if config.name == "numeric":
        return lambda question, answer, response: float(
            parse_final_number(answer, config.markers) == parse_final_number(response, config.markers)
        )
    if config.name == "exact":
        return exact_match
    if config.name == "choice":
        return lambda question, answer, response: float(
            parse_choice(answer, config.markers) == parse_choice(response, config.markers)
        )
    if names_function(config.name):
        return load_grader(config.name)
    raise ValueError(f"verifier.name is {config.name!r}; it is numeric, exact, choice, or path/to/file.py:function.")


def _answer_reader(config: VerifierSection) -> Callable[[Example], str]:
    """example -> its right answer."""

    @cache
    def read_rows_by_line(path: str) -> dict[int, Any]:
        return dict(files.read_rows(path))

    def read_answer(example: Example) -> str:
        if not config.answer_field:
            if example.turns[-1].role != "assistant":
                raise ValueError(
                    f"{example.where}: the row has no response to compare with. Set verifier.answer_field."
                )
            return example.turns[-1].content
        row = read_rows_by_line(example.file)[example.line]
        value = row.get(config.answer_field) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise ValueError(
                f"{example.where}: '{config.answer_field}' is {describe_value(value)}; a string or a number is wanted. "
                "Set verifier.answer_field to the key of the right answer, or to nothing for the row's own response."
            )
        return str(value)

    return read_answer


def _parse_number(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > _MAX_NUMBER_LENGTH:
        return None
    sign = -1 if match["sign"] in ("-", "\u2212") else 1
    fractions = {
        name: Fraction(text.replace(",", "")) for name, text in match.groupdict().items() if text and name != "sign"
    }
    if "plain" in fractions:
        return sign * fractions["plain"]
    numerator, denominator = (
        (fractions["part"], fractions["parts"]) if "ones" in fractions else (fractions["over"], fractions["under"])
    )
    return sign * (fractions.get("ones", Fraction(0)) + numerator / denominator) if denominator else None
