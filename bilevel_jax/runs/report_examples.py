"""Training rows in a report, with their text: those of the largest and of the least weights."""

from collections.abc import Iterable

import numpy as np

from bilevel_jax.lm.data import Example
from bilevel_jax.runs.figures import Html, element, join
from bilevel_jax.runs.page import Column, Signed, bounded, cut, paragraph, power_of, table, tens
from bilevel_jax.runs.results import Results

UNIT = "nats per token"

SHOWN = 10
"""Examples shown from each end of the weights."""
CUT = 500
"""Characters shown of one turn of an example."""


def ends(run: Results) -> Html:
    """The rows with the largest and the least weights, with their text."""
    values = run.rows["weight"].astype(float)
    order = np.argsort(-values, kind="stable")
    count = min(SHOWN, (len(order) + 1) // 2)
    top, bottom = order[:count], order[::-1][: min(SHOWN, len(order) // 2)]
    shown = np.abs(run.rows["entry"][np.concatenate([top, bottom])].astype(float))
    power = power_of(float(np.nanmax(shown, initial=0.0)))
    return join(
        paragraph(
            "The entry is d L_v / d weight: what one more unit of weight on this row would do to L_v on V_fit, at "
            "these weights. ",
            element("b", "A negative entry means that more weight on the row lowers L_v."),
            " The weight adds up many steps, so a row with a large weight may have an entry of either sign by now. "
            f"Text is shown as it stands in the data, up to {CUT} characters of a turn.",
        ),
        element("h3", f"The {len(top)} largest weights"),
        cards(run, top, power),
        element("h3", f"The {len(bottom)} least weights"),
        cards(run, bottom, power),
    )


def cards(run: Results, rows: Iterable[int], power: int) -> Html:
    """A line per row: its weight, its entry in units of 10^power, where it stands, its text."""
    rows = [int(row) for row in rows]
    unit = f"{tens(power)}{UNIT} per unit of weight"
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
    return table(
        Column("weight", [float(run.rows["weight"][row]) for row in rows]),
        Column("entry", [Signed(float(run.rows["entry"][row]) / 10.0**power) for row in rows], unit),
        Column("row", about),
        Column("text", [_text(run.examples.get(run.rows["id"][row])) for row in rows]),
        name="examples",
    )


def _text(example: Example | None) -> Html:
    if example is None:
        return element("span", "its text was not given to the report", class_="sub")
    turns = [
        element(
            "div",
            element("span", cut(turn.role, 20), class_="role"),
            element("div", cut(turn.content, CUT), dir="auto", class_="content"),
            class_="turn",
        )
        for turn in example.turns[:6]
    ]
    more = len(example.turns) - len(turns)
    return join(*turns, element("span", f"… ({more} more turns)", class_="sub") if more else None)
