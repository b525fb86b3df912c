"""Checkers: the number that a text ends in, equality up to white space, functions of the user's and their errors."""

import json
from fractions import Fraction

import pytest

from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.runs.config.schema import VerifierSection
from bilevel_jax.runs.scoring.verifiers import make_verifier, parse_choice, parse_final_number

MARKERS = VerifierSection().markers
NUMBERS = [  # text, the number that it ends in
    ("She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 1,234", 1234),
    ("#### 18\n\nThat is for 3 days.", 18),  # the first behind the marker
    ("#### 5 no, wait\nfinal answer: 6", 6),  # the last marker, in any case
    ("I am lost at 12. ####", None),  # cut off behind the marker: not the 12
    ("Final Answer: -3.50", Fraction(-7, 2)),
    ("it falls by -$3.50.", Fraction(-7, 2)),
    ("$-3.50", Fraction(-7, 2)),
    ("\u22127 degrees", -7),
    ("so 10-3", 3),  # a hyphen behind a digit is no sign
    ("(4)-3", 3),
    ("x=-3", -3),
    ("no number at all", None),
    ("", None),
    ("first 3, then 4, at last 5.", 5),
    ("1,2,3", 3),
    ("1,234,567.80 dollars", Fraction(123456780, 100)),
    ("1,2345", 2345),
    ("05", 5),
    ("5.0", 5),
    ("The answer is 5.", 5),
    ("the answer is ...5", 5),
    ("about .5", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)),
    ("-2 1/2 miles", Fraction(-5, 2)),
    (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
    ("3/0", None),
    ("50%", 50),
    ("2e3", 2000),
    ("1e999999999", 1),  # not a number of a billion digits
    ("20 m2", 20),
    ("答案是5", 5),
    ("9" * 5000, None),  # a model that repeats itself
]


@pytest.mark.parametrize(("text", "value"), NUMBERS, ids=[text[-20:] for text, _ in NUMBERS])
def test_number(text, value):
    assert parse_final_number(text, MARKERS) == value


def rows(tmp_path, *given):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return load_examples([str(path)])


def test_numeric(tmp_path):
    one, two = rows(
        tmp_path,
        {"prompt": "How many?", "response": "10 + 1,224\n#### 1,234", "gold": 7},
        {"prompt": "How much?", "response": "none", "gold": "1/2"},
    )
    own = make_verifier(VerifierSection("numeric"))
    assert [own(one, text) for text in ("1234", "#### 1234.0", "1,234 of 2,000", "", "#### 10")] == [1, 1, 0, 0, 0]
    field = make_verifier(VerifierSection("numeric", answer_field="gold"), [one, two])
    assert (field(one, "so it is 7"), field(one, "1234"), field(two, "0.5"), field(two, ".49")) == (1, 0, 1, 0)
    assert make_verifier(VerifierSection("numeric", answer_field="gold", markers=("=>",)))(one, "=> 7, not 8") == 1
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no number in the right answer str 'none'. Set verifier.name"):
        make_verifier(VerifierSection("numeric"), [one, two])  # before anything is generated
    with pytest.raises(ValueError, match=r"rows.jsonl:1: 'answer' is .*None; a string or a number is wanted"):
        make_verifier(VerifierSection("exact", answer_field="answer"), [one])


def test_exact(tmp_path):
    (row,) = rows(tmp_path, {"prompt": "Say it", "response": "two  words"})
    judge = make_verifier(VerifierSection("exact"))
    assert [judge(row, text) for text in (" two\nwords ", "two words", "twowords", "Two words", "")] == [1, 1, 0, 0, 0]
    (text,) = rows(tmp_path, {"text": "no dialogue"})
    with pytest.raises(ValueError, match="rows.jsonl:1: the row has no response to compare with"):
        make_verifier(VerifierSection("exact"), [text])
    with pytest.raises(
        ValueError, match=r"verifier.name is 'equal'; it is numeric, exact, choice, or path/to/file.py:function"
    ):
        make_verifier(VerifierSection("equal"))


JUDGES = """
from dataclasses import dataclass

def judge(question, answer, response):
    return question.startswith("Say") and response in answer

def graded(question, answer, response):
    return len(response) / len(answer)

def fails(question, answer, response):
    return 1 / (len(response) - 3)

def silent(question, answer, response):
    pass

NUMBER = 1
"""


def test_function(tmp_path):
    (row,) = rows(tmp_path, {"prompt": "Say it", "response": "two words"})
    file = tmp_path / "own.py"
    file.write_text(JUDGES)
    judge = make_verifier(VerifierSection(f"{file}:judge"))
    assert (judge(row, "two"), judge(row, "three"), type(judge(row, "two"))) == (1.0, 0.0, float)
    assert make_verifier(VerifierSection(f"{file}:graded"))(row, "two") == 1 / 3
    with pytest.raises(
        ValueError, match=r"rows.jsonl:1: .*own.py:graded returned float 2.0 for the response .*; 0 to 1 is"
    ):
        make_verifier(VerifierSection(f"{file}:graded"))(row, "two words" * 2)
    with pytest.raises(ValueError, match=r"failed at .*own.py:11 with ZeroDivisionError.*three strings"):
        make_verifier(VerifierSection(f"{file}:fails"))(row, "two")
    with pytest.raises(ValueError, match="own.py:silent returned .*None"):
        make_verifier(VerifierSection(f"{file}:silent"))(row, "two")
    with pytest.raises(ValueError, match=r"own.py has no function 'NUMBER'; it has \['dataclass', 'fails', 'graded'"):
        make_verifier(VerifierSection(f"{file}:NUMBER"))
    with pytest.raises(FileNotFoundError, match=r"gone.py, which is no file. Give path/to/file.py:function"):
        make_verifier(VerifierSection(f"{tmp_path}/gone.py:judge"))
    file.write_text("x = 1\ny = (\n")
    with pytest.raises(ValueError, match=r"own.py cannot be loaded: SyntaxError at .*own.py:2"):
        make_verifier(VerifierSection(f"{file}:judge"))


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("(C)", "C"), ("**D**", "D"), ("b", None), ("The answer is B.", "B"),
        ("Answer: (D) because A", "D"),
        ("I think it is B) two", None), ("B. two\nC is wrong", "B"), (r"so \boxed{C}, not (A)", "C"),
        (r"\boxed{\text{(E)}}", "E"), ("the answer is A because", "A"), ("The answer is A cat", None),
        ("The answer is I think", None), ("Not (A), but (B)", "B"), ("Answer: A. Final Answer: C", "C"),
        ("#### D", "D"), ("", None), ("A dog. It barks", None), ("The answer's B", None), ("K", None),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(text, letter):
    assert parse_choice(text, VerifierSection().markers) == letter


def test_choice(tmp_path):
    right, none = rows(
        tmp_path, {"prompt": "A or B?", "response": "B) blue"}, {"prompt": "A or B?", "response": "the blue one"}
    )
    verify = make_verifier(VerifierSection("choice"), [right])
    assert (verify(right, "The answer is (B)."), verify(right, "(A)"), verify(right, "blue")) == (1.0, 0.0, 0.0)
    with pytest.raises(
        ValueError, match=r"rows.jsonl:2: no letter of a choice, A to J, in the right answer .*'the blue"
    ):
        make_verifier(VerifierSection("choice"), [none])
