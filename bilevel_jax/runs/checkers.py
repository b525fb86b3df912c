"""Whether a generated response answers its question, as one number from 0 (wrong) to 1 (right).

Read as numbers: 1,234 and -$3.50 and +7 and .5 and 2e3, 3/4 and 2 1/2 and \\frac{3}{4}; a percent sign or a unit behind
them is passed over, and so are digits inside a word (m2). A hyphen is a sign unless a digit, a letter or a closing
bracket stands right before it: 10-3 holds 10 and 3.
"""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from bilevel_jax.lm import files
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.files import show
from bilevel_jax.runs.sections import VerifierSection

Checker = Callable[[Example, str], float]
"""(the row with the question and its right answer, a response) -> 0 to 1."""
Judge = Callable[[str, str, str], float]
"""(question, right answer, response) -> 0 to 1: what a checker is made of, and what a user may give."""

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)\]}}])[-+\u2212])? [$€£¥]?
    (?<![A-Za-z\d])(?<!\d\.)
    (?: (?P<ones>\d+)\ (?P<part>\d+)/(?P<parts>\d+)
      | (?P<over>{_WHOLE})/(?P<under>{_WHOLE})
      | (?P<plain>{_WHOLE}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\d))? | (?<!\.)\.\d+) )""",
    re.VERBOSE | re.ASCII,
)
_LATEX = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_LONGEST = 400
"""Characters of a number; a model that repeats one digit writes longer ones, which are no answers."""


def checker(check: VerifierSection, examples: Sequence[Example] = ()) -> Checker:
    """The checker that `verifier.name` names: numeric, exact, or path/to/file.py:function.

    The right answer is what the row's key `verifier.answer_field` holds, read from its file again; without such a key,
    the row's own last response. The question is what stands before that. `examples` are rows that will be asked about:
    their answers are read at once, so that one which cannot be used is told before anything is generated.

    Raises ValueError for a name that is none, for a file or function that is not there, for an answer that is missing
    (or is no number, where numbers are compared), and, when called, for a function that fails or returns no number
    from 0 to 1. FileNotFoundError for a file that is not there.
    """
    answer = _answers(check)
    judge = _judge(check)

    def gold(example: Example) -> str:
        text = answer(example)
        if check.name == "numeric" and number(text, check.markers) is None:
            raise ValueError(
                f"{example.where}: no number in the right answer {show(text)}. Set verifier.name to exact."
            )
        return text

    def judged(example: Example, response: str) -> float:
        right = gold(example)
        try:
            return judge(question(example), right, response)
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error

    for example in examples:
        gold(example)
    return judged


def number(text: str, markers: Sequence[str] = ()) -> Fraction | None:
    """The number that a text ends in: the first behind its last marker or, where it has no marker, its last; or None.

    Exact, so 0.33 is not 1/3, and 50 % is 50. Markers are found in any case. Wrong where a response goes on after its
    answer without a marker, and where another number stands between the marker and the answer.
    """
    behind = list(re.finditer("|".join(map(re.escape, markers)), text, re.IGNORECASE)) if markers else []
    text = _LATEX.sub(r"\1/\2", text[behind[-1].end() :] if behind else text)
    found = list(_NUMBER.finditer(text))
    return _value(found[0 if behind else -1]) if found else None


def exact(question: str, answer: str, response: str) -> float:
    """1 where answer and response are equal up to white space: none at the ends, one space for each run of it."""
    return float(answer.split() == response.split())


def function(place: str) -> Judge:
    """The function (question, answer, response) -> bool or 0 to 1 that `path/to/file.py:function` names."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"verifier.name names {path}, which is no file. Give path/to/file.py:function.")
    module = _module(str(Path(path).resolve()), path)
    given = getattr(module, name, None)
    if not callable(given):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{path} has no function {name!r}; it has {there}. Set verifier.name to {path}:NAME.")

    def judge(question: str, answer: str, response: str) -> float:
        try:
            value = given(question, answer, response)
        except Exception as error:
            raise ValueError(
                f"{place} failed at {_line(error, path)} with {type(error).__name__}: {error}. It is called with "
                "(question, answer, response), three strings."
            ) from error
        try:
            judged = float(value)
        except (TypeError, ValueError):
            judged = math.nan
        if not 0 <= judged <= 1:
            raise ValueError(f"{place} returned {show(value)} for the response {show(response)}; 0 to 1 is wanted.")
        return judged

    return judge


def question(example: Example) -> str:
    """All that stands before the row's last response, one turn behind the other, an empty line between."""
    return "\n\n".join(turn.content for turn in example.turns[:-1])


def _judge(check: VerifierSection) -> Judge:
    if check.name == "numeric":
        return lambda question, answer, response: float(
            number(answer, check.markers) == number(response, check.markers)
        )
    if check.name == "exact":
        return exact
    if ".py:" in check.name:
        return function(check.name)
    raise ValueError(f"verifier.name is {check.name!r}; it is numeric, exact, or path/to/file.py:function.")


def _answers(check: VerifierSection) -> Callable[[Example], str]:
    """example -> its right answer."""

    @cache
    def rows(path: str) -> dict[int, Any]:
        return dict(files.read_rows(path))

    def answer(example: Example) -> str:
        if not check.answer_field:
            if example.turns[-1].role != "assistant":
                raise ValueError(
                    f"{example.where}: the row has no response to compare with. Set verifier.answer_field."
                )
            return example.turns[-1].content
        row = rows(example.file)[example.line]
        value = row.get(check.answer_field) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise ValueError(
                f"{example.where}: '{check.answer_field}' is {show(value)}; a string or a number is wanted. "
                "Set verifier.answer_field to the key of the right answer, or to nothing for the row's own response."
            )
        return str(value)

    return answer


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _LONGEST:
        return None
    sign = -1 if found["sign"] in ("-", "\u2212") else 1
    part = {
        name: Fraction(text.replace(",", "")) for name, text in found.groupdict().items() if text and name != "sign"
    }
    if "plain" in part:
        return sign * part["plain"]
    over, under = (part["part"], part["parts"]) if "ones" in part else (part["over"], part["under"])
    return sign * (part.get("ones", Fraction(0)) + over / under) if under else None


def _module(resolved: str, path: str) -> Any:
    """The file as a module of its own; its name is in sys.modules while it runs, as dataclasses want."""
    name = f"checker {resolved}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__} at {_line(error, path)}: {error}") from error
    return module


def _line(error: BaseException, path: str) -> str:
    """`file:line` where the error arose, in the user's file if it passed through it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    own = str(Path(path).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f"{path}:{lines[-1]}" if lines else path
