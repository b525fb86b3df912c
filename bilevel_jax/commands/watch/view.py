"""The terminal view of a run: how far it is, and its curves."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bilevel_jax.commands.watch.read import Curve, RunState

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 32
"""Characters of a curve."""
BAR_WIDTH = 40
QUIET_SECONDS = 60.0
"""Without a sign of life for so long a run may be gone: its steps are shorter, as a rule."""
HEADINGS = {
    "outer": "outer steps", "single": "steps of parameters and weights together", "steps": "training steps",
    "evaluated": "evaluations", "scored": "scores", "round": "rounds",
}  # fmt: skip
"""By the kind of a record of the log."""


def has_ended(state: RunState, silence: float | None) -> bool:
    """Whether the run has its result, and is not at work again; a copy of it may still have a silent progress.json."""
    return state.result is not None and (state.progress is None or (silence or 0.0) > QUIET_SECONDS)


def render_state(state: RunState, silence: float | None) -> RenderableType:
    """The view of a run at one moment; `silence`: seconds for which nothing was heard of it."""
    parts: list[RenderableType] = [Text(f"{state.command}  {state.folder}", style="bold")]
    parts.append(_render_progress(state, silence))
    for (part, event), curves in state.curves.items():
        if curves:
            heading = HEADINGS.get(event, event)
            parts += [Text(), _render_curves(f"{part}: {heading}" if part else heading, curves)]
    if state.parts:
        counts = ", ".join(f"{name} {count}" for name, count in state.parts.items())
        parts += [Text(), Text(f"records of parts: {counts}")]
    return Group(*parts)


def draw_curve(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """The values as blocks of eight heights, from the least to the largest; of more than `width` the means of runs.

    Wrong about single values where runs are averaged: a spike is lower than it was.
    """
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def _render_progress(state: RunState, silence: float | None) -> RenderableType:
    if state.progress is None or has_ended(state, silence):
        return Text(_describe_rest(state))
    progress = state.progress
    head = Text(f"{progress.get('phase', '')}   ")
    done, total = progress.get("done") or 0.0, progress.get("total")
    row = Table.grid(padding=(0, 1))
    cells: list[Any] = [head]
    if total:
        cells += [ProgressBar(total=total, completed=min(done, total), width=BAR_WIDTH), f"{done / total:4.0%}"]
    cells.append(f"{format_seconds(progress.get('seconds'))}   ETA {format_seconds(progress.get('seconds_left'))}")
    row.add_row(*cells)
    if silence is not None and silence > QUIET_SECONDS:
        quiet = Text(
            f"No sign of life for {format_seconds(silence)}: it makes a long step, or was killed. A killed run goes on "
            "with --resume.",
            style="yellow",
        )
        return Group(row, quiet)
    return row


def _describe_rest(state: RunState) -> str:
    """What a run that is not at work is doing."""
    if state.result is not None:
        verdict = state.result.get("verdict")
        sentence = verdict.get("sentence", "") if isinstance(verdict, dict) else ""
        return "\n".join(filter(None, [sentence, f"report: {state.folder}/report.html"]))
    return "It is starting or has stopped; one that has stopped goes on with --resume."


def _render_curves(heading: str, curves: Sequence[Curve]) -> Table:
    table = Table(
        title=heading, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    for name in ("", "", "first", "last", "least", "largest", "step"):
        table.add_column(name, justify="left" if not name else "right")
    for curve in curves:
        ends = curve.values[0], curve.values[-1], min(curve.values), max(curve.values)
        table.add_row(curve.name, draw_curve(curve.values), *(f"{value:.4g}" for value in ends), f"{curve.steps[-1]:g}")
    return table


def format_seconds(seconds: float | None) -> str:
    """h:mm:ss; what is not known as a dash."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
