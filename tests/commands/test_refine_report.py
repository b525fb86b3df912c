"""What the report of `refine` says of how far the weights of a round speak for other examples."""

import pytest

from bilevel_jax.commands.refine.report import describe_reliability, format_reliability, rounds_table
from bilevel_jax.core.certify import Reliability
from bilevel_jax.runs.engine.reliability import fields_to_json

NAN = float("nan")
HALVES = Reliability(0.6, 0.64, 64)
FITTED = Reliability(0.03, 0.999, 64, is_fitted=True)
DEV = Reliability(-0.4, NAN, 64, agreement=-0.2, signal=0.25)
ONE = Reliability(NAN, NAN, 1)
UNKNOWN = Reliability(NAN, NAN, 64, agreement=0.1, signal=-0.1)


def candidate(first, last, *, steps=3, is_used_up=False, name="unrolled"):
    draws = {key: draw and fields_to_json(draw) for key, draw in (("first", first), ("last", last))}
    reliability = {**draws, "steps": steps, "is_used_up": is_used_up}
    return {"name": name, "dev": 1.0, "work": 9.0, "seconds": 1.0, "reliability": reliability}


def result(*candidates):
    """A run of one round."""
    gain = {"value": 0.1, "low": 0.0, "high": 0.2}
    record = {"step": 0, "present": 1.1, "best": candidates[0]["name"], "gain": gain, "bound": 0.05, "accepted": True}
    return {"records": [record | {"right": None, "ended": None, "ess": 4.0, "candidates": list(candidates)}]}


def cells(table, heading):
    """unit -> the cells of the columns with a heading."""
    return {
        unit: [row[place][0].text.strip() for _, row in table.rows]
        for place, (name, unit, _) in enumerate(table.heads)
        if name == heading
    }


UNIFORM = {"name": "uniform", "dev": 1.2, "work": 3.0, "seconds": 1.0}
FIRST, LAST = "in the first step, where all weights are equal, ", "in the last, at learned weights, "
NOBODY = "nobody knows (halves of what the weights follow do not tell, and dev was not read)"
NEED = " For 0.9 about 485 validation examples would be needed."  # 64 (.64 / .36) (.81 / .19)
SAID = {
    "halves, then dev": (
        candidate(HALVES, DEV),
        f"{FIRST}0.60 by halves of validation; {LAST}−0.40 by dev.{NEED}",
        "reliability 0.60 → -0.40",
    ),
    "enough of them": (
        candidate(HALVES._replace(value=0.95, noise=0.0975), DEV),
        f"{FIRST}0.95 by halves of validation; {LAST}−0.40 by dev.",
        "reliability 0.95 → -0.40",
    ),
    "nothing but noise": (
        candidate(HALVES._replace(value=0.0, noise=1.2), DEV),
        f"{FIRST}0 by halves of validation; {LAST}−0.40 by dev. Nothing but noise is seen there, so no number of "
        "validation examples can be told.",
        "reliability 0.00 → -0.40",
    ),
    "no dev to make halves of": (
        candidate(HALVES, FITTED._replace(value=0.8)),
        f"{FIRST}0.60 by halves of validation; {LAST}{NOBODY}.{NEED}",
        "reliability 0.60 → unknown",
    ),
    "a model that had learned from validation": (
        candidate(FITTED, DEV),
        "in the last step, at learned weights, −0.40 by dev.",
        "reliability -0.40",
    ),
    "halves of dev disagree": (
        candidate(None, UNKNOWN),
        "in the last step, at learned weights, nobody knows (halves of dev agree on nothing).",
        "reliability unknown",
    ),
    "one validation example": (
        candidate(ONE, ONE),
        "in the last step, at learned weights, nobody knows (one validation example has no halves, and dev was not "
        "read).",
        "reliability unknown",
    ),
    "one step": (
        candidate(DEV, DEV, steps=1),
        "in the one step, where all weights are equal, −0.40 by dev.",
        "reliability -0.40",
    ),
    "used up": (
        candidate(FITTED, FITTED, steps=2, is_used_up=True),
        f"in the last step, at learned weights, {NOBODY}. The weights stopped after 2 steps: by halves of validation "
        "the reliability was at most outer.reliability_floor twice in a row, so validation is used up.",
        "reliability unknown (used up after 2 steps)",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_round_says_what_is_known_of_other_examples(name):
    measured, sentence, line = SAID[name]
    described = describe_reliability(result(UNIFORM, measured))
    assert described == {
        "missing": "",
        "lines": [f"Round 0: {sentence}"],
        "num_validation": measured["reliability"]["last"]["num_validation"],
    }
    assert format_reliability(measured) == line and not format_reliability(UNIFORM)


OLD = {"name": "unrolled", "dev": 1.0, "work": 9.0, "seconds": 1.0}
MISSING = {
    "no candidate has hypergradients": [UNIFORM, UNIFORM | {"name": "penalty"}],
    "this run is of a version that did not measure it": [UNIFORM, OLD],
    "outer.reliability_every is 0": [candidate(None, None)],
    "a target of the parameters alone": [
        OLD | {"reliability": {"first": None, "last": None, "steps": 1, "why_not": "a target of the parameters alone"}}
    ],
}


@pytest.mark.parametrize("words", MISSING)
def test_a_report_says_why_nothing_was_measured(words):
    described = describe_reliability(result(*MISSING[words]))
    assert described["missing"].startswith(words) and not described["lines"]
    assert not cells(rounds_table(result(*MISSING[words])), "reliability")
    assert not any(map(format_reliability, MISSING[words]))


def test_a_number_stands_in_the_column_of_what_measured_it():
    halves, dev = "first step, by halves of validation", "last step, by dev"
    both = cells(rounds_table(result(UNIFORM, candidate(HALVES, DEV))), "reliability")
    assert both == {halves: ["–", "0.6000"], dev: ["–", "−0.4000"]}
    assert cells(rounds_table(result(candidate(HALVES, HALVES, steps=1))), "reliability") == {halves: ["0.6000"]}
    assert cells(rounds_table(result(candidate(FITTED, FITTED))), "reliability") == {}
