"""Training rows in a report, with their text: those of the largest and of the least weights."""

from collections.abc import Iterable, Sequence

import numpy as np

from bilevel_jax.lm.data import Example, Turn
from bilevel_jax.runs.figures import Html, element, join
from bilevel_jax.runs.page import Column, Signed, bounded, cut, paragraph, power_of, table, tens
from bilevel_jax.runs.results import Results

SHOWN = 10
"""Examples shown from each end of the weights."""
CUT = 500
"""Characters shown of one turn of an example."""
TURNS = 6
"""Turns shown of a dialogue: its first; of a pair's prompt, its last."""


def ends(run: Results) -> Html:
    """The rows with the largest and the least weights, with their text."""
    values = run.rows["weight"].astype(float)
    order = np.argsort(-values, kind="stable")
    count = min(SHOWN, (len(order) + 1) // 2)
    top, bottom = order[:count], order[::-1][: min(SHOWN, len(order) // 2)]
    power = 0
    if "entry" in run.rows:
        shown = np.abs(run.rows["entry"][np.concatenate([top, bottom])].astype(float))
        power = power_of(float(np.nanmax(shown, initial=0.0)))
    meaning = (
        "The entry is d L_v / d weight: what one more unit of weight on this row would do to L_v on V_fit, at "
        "these weights. ",
        element("b", "A negative entry means that more weight on the row lowers L_v."),
        " The weight adds up many steps, so a row with a large weight may have an entry of either sign by now. ",
    )
    return join(
        paragraph(
            *(meaning if "entry" in run.rows else ()),
            f"Text is shown as it stands in the data, up to {CUT} characters of a turn.",
        ),
        element("h3", f"The {len(top)} largest weights"),
        _cards(run, top, power),
        element("h3", f"The {len(bottom)} least weights") if len(bottom) else None,
        _cards(run, bottom, power) if len(bottom) else None,
    )


def _cards(run: Results, rows: Iterable[int], power: int) -> Html:
    """A line per row: its weight, its entry in units of 10^power if it has one, where it stands, its text."""
    rows = [int(row) for row in rows]
    about = [
        join(
            element("span", "source ", element("b", bounded(run.rows["source"][row])), " ", class_="line"),
            element("span", "label ", element("b", bounded(run.rows["label"][row])), class_="line")
            if run.rows["label"][row] is not None
            else None,
            element("span", bounded(f"{run.rows['file'][row]}:{run.rows['line'][row]}", end=True), class_="sub"),
            element("span", bounded(run.rows["id"][row]), class_="sub"),
        )
        for row in rows
    ]
    entries = []
    if "entry" in run.rows:
        values = [Signed(float(run.rows["entry"][row]) / 10.0**power) for row in rows]
        entries = [Column("entry", values, f"{tens(power)}{run.unit} per unit of weight")]
    return table(
        Column("weight", [float(run.rows["weight"][row]) for row in rows]),
        *entries,
        Column("row", about),
        Column("text", [_text(run.examples.get(run.rows["id"][row])) for row in rows]),
        name="examples" if entries else "examples short",
    )


def _text(example: Example | None) -> Html:
    if example is None:
        return element("span", "its text was not given to the report", class_="sub")
    if not example.rejected:
        more = len(example.turns) - TURNS
        return join(
            _turns(example.turns[:TURNS]), element("span", f"… ({more} more turns)", class_="sub") if more > 0 else None
        )
    sides = example.turns, example.rejected
    shared = 0  # turns of the prompt; each side keeps one of its own, even where they are equal
    while shared + 1 < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    before = max(shared - TURNS, 0)
    return join(
        element("span", f"({before} turns before) …", class_="sub") if before else None,
        _turns(example.turns[before:shared]),
        _turns(example.turns[shared:], "chosen", "good"),
        _turns(example.rejected[shared:], "rejected", "bad"),
    )


def _turns(turns: Sequence[Turn], side: str = "", kind: str = "") -> Html:
    """A block per turn; of a preference pair's end, the side stands in the assistant's place."""
    names = [side if side and turn.role == "assistant" else f"{side} {turn.role}".strip() for turn in turns]
    return join(
        *(
            element(
                "div",
                element("span", cut(name, 20), class_=f"role {kind}".strip()),
                element("div", cut(turn.content, CUT), dir="auto", class_="content"),
                class_="turn",
            )
            for name, turn in zip(names, turns, strict=True)
        )
    )
