"""Report section on training examples with the largest and smallest weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.runs.report.html import align_numbers
from bilevel_jax.runs.report.numbers import SignedNumber, engineering_exponent, format_power_of_ten
from bilevel_jax.runs.report.results import RunResults

EXAMPLES_PER_END = 10
"""Examples shown from each end of the weights."""
MAX_TURN_CHARACTERS = 500
"""Characters shown of one turn of an example."""
MAX_TURNS = 6
"""Turns shown of a dialogue: its first; of a pair's prompt, its last."""


def describe_extreme_examples(run: RunResults) -> dict[str, Any]:
    """The values of the template `examples.html`: the examples with the largest and the least weights."""
    order = np.argsort(-run.columns["weight"].astype(float), kind="stable")
    count = min(EXAMPLES_PER_END, (len(order) + 1) // 2)
    ends = {"largest": order[:count], "least": order[::-1][: min(EXAMPLES_PER_END, len(order) // 2)]}
    power = 0
    if run.hypergradient is not None:
        magnitudes = np.abs(run.hypergradient[np.concatenate(list(ends.values()))].astype(float))
        power = engineering_exponent(float(np.nanmax(magnitudes, initial=0.0)))
    return {
        "max_characters": MAX_TURN_CHARACTERS,
        "unit": f"{format_power_of_ten(power)}{run.unit} per unit of weight" if run.hypergradient is not None else "",
        "ends": {name: _describe_lines(run, indices, power) for name, indices in ends.items() if len(indices)},
    }


def _describe_lines(run: RunResults, indices: np.ndarray, power: int) -> list[dict[str, Any]]:
    """A line per example: its weight, its hypergradient in units of 10^power if it has one, its origin, its text."""
    columns = run.columns
    weights = align_numbers([float(columns["weight"][index]) for index in indices])
    hypergradients = [""] * len(indices)
    if run.hypergradient is not None:
        hypergradients = align_numbers(
            [SignedNumber(float(run.hypergradient[index]) / 10.0**power) for index in indices]
        )
    return [
        {
            "weight": weight,
            "hypergradient": hypergradient,
            "source": columns["source"][index],
            "label": columns["label"][index],
            "place": f"{columns['file'][index]}:{columns['line'][index]}",
            "id": columns["id"][index],
        }
        | describe_text(run.examples.get(columns["id"][index]))
        for index, weight, hypergradient in zip(indices, weights, hypergradients, strict=True)
    ]


def describe_text(example: Example | None) -> dict[str, Any]:
    """The turns that are shown of an example as (role, text, kind), and how many are left out before and after them."""
    if example is None:
        return {"turns": None}
    if not example.rejected:
        more = max(len(example.turns) - MAX_TURNS, 0)
        return {"turns": _describe_turns(example.turns[:MAX_TURNS]), "before": 0, "after": more}
    sides = example.turns, example.rejected
    shared = 0  # turns of the prompt; each side keeps one of its own, even where they are equal
    while shared + 1 < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    before = max(shared - MAX_TURNS, 0)
    turns = [
        *_describe_turns(example.turns[before:shared]),
        *_describe_turns(example.turns[shared:], "chosen", "good"),
        *_describe_turns(example.rejected[shared:], "rejected", "bad"),
    ]
    return {"turns": turns, "before": before, "after": 0}


def _describe_turns(turns: Sequence[Turn], side: str = "", kind: str = "") -> list[tuple[str, str, str]]:
    """(role, text, kind) of each turn; of a preference pair's end, the side stands in the assistant's place."""
    return [
        (side if side and turn.role == "assistant" else f"{side} {turn.role}".strip(), turn.content, kind)
        for turn in turns
    ]
