"""Training examples in a report, with their text: those of the largest and of the least weights."""

from collections.abc import Iterable, Sequence

import numpy as np

from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.runs.report.figures import Html, html_element, join_html
from bilevel_jax.runs.report.html import Column, html_paragraph, html_table, isolate_text, truncate_text
from bilevel_jax.runs.report.numbers import SignedNumber, engineering_exponent, format_power_of_ten
from bilevel_jax.runs.report.results import RunResults

EXAMPLES_PER_END = 10
"""Examples shown from each end of the weights."""
MAX_TURN_CHARACTERS = 500
"""Characters shown of one turn of an example."""
MAX_TURNS = 6
"""Turns shown of a dialogue: its first; of a pair's prompt, its last."""


def render_extreme_examples(run: RunResults) -> Html:
    """The rows with the largest and the least weights, with their text."""
    values = run.columns["weight"].astype(float)
    order = np.argsort(-values, kind="stable")
    count = min(EXAMPLES_PER_END, (len(order) + 1) // 2)
    top, bottom = order[:count], order[::-1][: min(EXAMPLES_PER_END, len(order) // 2)]
    power = 0
    if "hypergradient" in run.columns:
        magnitudes = np.abs(run.columns["hypergradient"][np.concatenate([top, bottom])].astype(float))
        power = engineering_exponent(float(np.nanmax(magnitudes, initial=0.0)))
    meaning = (
        "The entry is d L_v / d weight: what one more unit of weight on this row would do to validation loss, at "
        "these weights. ",
        html_element("b", "A negative entry means that more weight on the row lowers L_v."),
        " The weight adds up many steps, so a row with a large weight may have an entry of either sign by now. ",
    )
    return join_html(
        html_paragraph(
            *(meaning if "hypergradient" in run.columns else ()),
            f"Text is shown as it stands in the data, up to {MAX_TURN_CHARACTERS} characters of a turn.",
        ),
        html_element("h3", f"The {len(top)} largest weights"),
        _examples_table(run, top, power),
        html_element("h3", f"The {len(bottom)} least weights") if len(bottom) else None,
        _examples_table(run, bottom, power) if len(bottom) else None,
    )


def _examples_table(run: RunResults, indices: Iterable[int], power: int) -> Html:
    """A line per row: its weight, its entry in units of 10^power if it has one, where it stands, its text."""
    indices = [int(index) for index in indices]
    origins = [
        join_html(
            html_element(
                "span", "source ", html_element("b", isolate_text(run.columns["source"][index])), " ", class_="line"
            ),
            html_element("span", "label ", html_element("b", isolate_text(run.columns["label"][index])), class_="line")
            if run.columns["label"][index] is not None
            else None,
            html_element(
                "span",
                isolate_text(f"{run.columns['file'][index]}:{run.columns['line'][index]}", keep_end=True),
                class_="sub",
            ),
            html_element("span", isolate_text(run.columns["id"][index]), class_="sub"),
        )
        for index in indices
    ]
    hypergradient_columns = []
    if "hypergradient" in run.columns:
        values = [SignedNumber(float(run.columns["hypergradient"][index]) / 10.0**power) for index in indices]
        hypergradient_columns = [Column("hypergradient", values, f"{format_power_of_ten(power)}{run.unit} per unit of weight")]
    return html_table(
        Column("weight", [float(run.columns["weight"][index]) for index in indices]),
        *hypergradient_columns,
        Column("row", origins),
        Column("text", [_render_example(run.examples.get(run.columns["id"][index])) for index in indices]),
        css_class="examples" if hypergradient_columns else "examples short",
    )


def _render_example(example: Example | None) -> Html:
    if example is None:
        return html_element("span", "its text was not given to the report", class_="sub")
    if not example.rejected:
        more = len(example.turns) - MAX_TURNS
        return join_html(
            _render_turns(example.turns[:MAX_TURNS]),
            html_element("span", f"… ({more} more turns)", class_="sub") if more > 0 else None,
        )
    sides = example.turns, example.rejected
    shared = 0  # turns of the prompt; each side keeps one of its own, even where they are equal
    while shared + 1 < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    before = max(shared - MAX_TURNS, 0)
    return join_html(
        html_element("span", f"({before} turns before) …", class_="sub") if before else None,
        _render_turns(example.turns[before:shared]),
        _render_turns(example.turns[shared:], "chosen", "good"),
        _render_turns(example.rejected[shared:], "rejected", "bad"),
    )


def _render_turns(turns: Sequence[Turn], side: str = "", kind: str = "") -> Html:
    """A block per turn; of a preference pair's end, the side stands in the assistant's place."""
    names = [side if side and turn.role == "assistant" else f"{side} {turn.role}".strip() for turn in turns]
    return join_html(
        *(
            html_element(
                "div",
                html_element("span", truncate_text(name, 20), class_=f"role {kind}".strip()),
                html_element("div", truncate_text(turn.content, MAX_TURN_CHARACTERS), dir="auto", class_="content"),
                class_="turn",
            )
            for name, turn in zip(names, turns, strict=True)
        )
    )
