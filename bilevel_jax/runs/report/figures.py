"""Plots of the reports: estimates with intervals, lines, strips and histograms."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup

from bilevel_jax.runs.report.svg import (
    COLOURS,
    TITLE,
    clean_text,
    matplotlib_style,
    new_figure,
    to_markup,
    truncate_name,
)

if TYPE_CHECKING:  # imported where a figure is drawn: a training that writes no report does without it
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

NUM_COLOURS = 6
"""Groups and series that can be told apart; callers gather the rest in one."""
MAX_POINTS = 500
"""Points drawn of one group or series: enough to see its shape, few enough for a small file."""
MAX_MARKERS = 20
"""Markers on one line, and values listed in words for those who cannot see it."""
REFERENCE: dict[str, Any] = {"color": COLOURS["muted"], "linestyle": (0, (4, 3)), "linewidth": 1}
DASHES: dict[int, Any] = {1: (0, (3.3, 1.7)), 2: (0, (1.1, 1.7))}
"""Dashes by colour, in widths of the line: series differ by more than their colour."""

Shape = Literal["circle", "square", "cross", "diamond"]
SHAPES: dict[Shape, str] = {"circle": "o", "square": "s", "cross": "X", "diamond": "D"}
"""The shape of a point -> the marker that draws it."""


class IntervalRow(NamedTuple):
    """One line of a dot-and-interval plot; nan where there is no such number."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    """Ends of the interval around `value`."""
    seed_values: Sequence[float] = ()
    second_value: float = math.nan
    """Another reading of the same line, drawn hollow."""
    emphasized: bool = False
    colour: int = 0


class Series(NamedTuple):
    """One line of a line plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    kind: Literal["marked", "plain", "cloud", "named"] = "marked"
    """A line with a marker at each value; a bare line, for many values; single points, for many noisy ones; a line with
    its name at its end, for many lines."""


class Point(NamedTuple):
    """One point of a line plot, with its interval."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    name: str = ""
    """Stands in the right margin."""
    title: str = ""
    """Appears under a pointer."""
    colour: int = 0
    kind: Literal["dot", "hollow", "faint"] = "dot"
    shape: Shape = "circle"


# ---- the figures


@matplotlib_style()
def plot_intervals(
    rows: Sequence[IntervalRow],
    label: str,
    *,
    names: tuple[str, str] = ("", ""),
    reference: float = math.nan,
    log: bool = False,
    ends: tuple[float, float] = (-math.inf, math.inf),
    width: float = 520,
) -> Markup:
    """A line for each row: its value with its interval, below them its single runs.

    Args:
        rows: from the top down.
        label: what the axis holds, with its unit.
        names: the legend's words for the filled and the hollow points; empty for no legend.
        reference: where the dashed line stands, which the axis holds; nan for none.
        log: equal steps per factor.
        ends: between which intervals are drawn; one that goes on beyond ends in an arrow.
        width: of the figure, in points.
    """
    figure, axes = new_figure(width, 27 * len(rows) + (70 if names[0] else 46))
    shown = [(max(row.low, ends[0]), min(row.high, ends[1])) for row in rows]
    values = [value for row, interval in zip(rows, shown, strict=True)
              for value in (row.value, *interval, row.second_value, *row.seed_values)]  # fmt: skip
    _set_axis(axes.xaxis, axis_limits([*values, reference], log=log), label, log=log)
    _name_rows(axes, [(row.name, "") for row in rows], [row.emphasized for row in rows])
    if math.isfinite(reference):
        axes.axvline(reference, **REFERENCE)
    handles = []
    for place, row in enumerate(rows):
        colour = COLOURS[f"c{row.colour}"]
        hollow = axes.plot([row.second_value], [place], **_marker("hollow", COLOURS["c1"]))
        axes.plot(row.seed_values, [place + 0.3] * len(row.seed_values), **_marker("faint", colour))
        low, high = shown[place]
        axes.plot([low, high], [place, place], color=colour, linewidth=3 if row.emphasized else 1.6)
        beyond = [(end, marker) for end, whole, marker in ((low, row.low, "<"), (high, row.high, ">")) if end != whole]
        for end, marker in beyond:
            axes.plot([end], [place], color=colour, marker=marker, markersize=6, linestyle="")
        filled = axes.plot([row.value], [place], **_marker("dot", colour))
        handles = [*filled, *(hollow if any(math.isfinite(each.second_value) for each in rows) else [])]
    if names[0]:
        _add_legend(figure, list(zip(handles, names, strict=False)))
    words = "; ".join(f"{row.name} {row.value:.4g}" for row in rows)
    return to_markup(figure, f"{label}: {words}")


@matplotlib_style()
def plot_lines(
    series: Sequence[Series],
    label: str,
    unit: str,
    *,
    points: Sequence[Point] = (),
    vertical_mark: tuple[float, str] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    log_x: bool = False,
    x_ticks: Mapping[float, str] | None = None,
    x_values_shown: Sequence[float] = (),
    y_values_shown: Sequence[float] = (),
    reference: float = math.nan,
    height: float = 250,
    width: float = 520,
) -> Markup:
    """Lines and points over a shared x. What the axis of y does not hold (see `y_axis_values`) is drawn at its edge.

    Args:
        series: the lines, in the order of the legend.
        label: what the axis of x holds.
        unit: what the axis of y holds, with its unit.
        points: single points with their intervals; those with a name have it in the right margin.
        vertical_mark: (x, words) of a dashed vertical line.
        bands: (low, high) of what is wanted of y, shaded.
        log_x: equal steps of x per factor.
        x_ticks: words at places of x; without them the axis has round numbers.
        x_values_shown: the axis of x holds these, too.
        y_values_shown: the axis of y holds these, too.
        reference: y of a dashed horizontal line; nan for none.
        height: of the figure, in points; it grows with the names in the margin.
        width: of the figure, in points.
    """
    named = sum(curve.kind == "named" for curve in series) + sum(bool(point.name) for point in points)
    figure, axes = new_figure(width, max(height, 14 * named + 50))
    x_values = [x for curve in series for x in curve.x] + [point.x for point in points]
    x_limits = axis_limits([*x_values, *x_values_shown], log=log_x, margin=0.02 if series else 0.05)
    ends = [end for point in points for end in (point.y, point.low, point.high)]
    y_limits = axis_limits([*y_axis_values(series), *ends, *y_values_shown])
    _set_axis(axes.xaxis, x_limits, label, log=log_x, whole=not log_x, ticks=x_ticks)
    _set_axis(axes.yaxis, y_limits, unit)
    for low, high in bands:
        axes.axhspan(*np.clip([low, high], *y_limits), color=COLOURS["good"], alpha=0.13, linewidth=0)
    if math.isfinite(reference):
        axes.axhline(reference, **REFERENCE)
    if vertical_mark:
        axes.axvline(vertical_mark[0], **REFERENCE)
        late = vertical_mark[0] > sum(x_limits) / 2
        axes.annotate(
            clean_text(vertical_mark[1]),
            (vertical_mark[0], 1),
            (3 if late else -3, 3),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            horizontalalignment="right" if late else "left",
        )
    handles = [(_draw_series(axes, curve, y_limits), curve.name) for curve in series]
    for point in points:
        colour = COLOURS[f"c{point.colour}"]
        axes.plot([point.x, point.x], [point.low, point.high], color=colour, linewidth=1.6)
        (dot,) = axes.plot([point.x], [point.y], **_marker(point.kind, colour) | {"marker": SHAPES[point.shape]})
        dot.set_gid(TITLE + clean_text(point.title) if point.title else None)
    curve_ends = [(curve.x[-1], curve.y[-1], curve.name) for curve in series if curve.kind == "named"]
    _name_in_margin(axes, [*curve_ends, *((point.x, point.y, point.name) for point in points if point.name)])
    if len(series) > 1 and not curve_ends:
        _add_legend(figure, handles)
    words = [f"{curve.name}: {_describe_values(curve.y)}" for curve in series]
    words += [point.title or f"{point.name}: {point.y:.4g} at {point.x:,.6g}" for point in points]
    return to_markup(figure, f"{unit} by {label}. {'; '.join(words)}")


@matplotlib_style()
def plot_strips(groups: Sequence[tuple[str, np.ndarray]], label: str, *, reference: float = math.nan) -> Markup:
    """A line for each group: its values as a cloud of points, its median as a bar; on a log axis where they spread."""
    figure, axes = new_figure(520, 38 * len(groups) + 46)
    limits, log = _weight_limits(np.concatenate([values for _, values in groups]), reference)
    _set_axis(axes.xaxis, limits, label, log=log)
    _name_rows(axes, [(name, f"{len(values):,} example{'s' * (len(values) != 1)}") for name, values in groups])
    if math.isfinite(reference):
        axes.axvline(reference, **REFERENCE)
    for place, (_, values) in enumerate(groups):
        shown = np.clip(np.sort(values)[evenly_spaced_indices(len(values))], *limits)
        spread = place + (np.arange(len(shown)) * 0.618034 % 1 - 0.5) * 0.62  # golden ratio: even, always the same
        axes.plot(shown, spread, **_marker("cloud", COLOURS[f"c{place}"]))
        if len(values):
            median = np.clip(np.median(values), *limits)
            axes.plot([median, median], [place - 0.4, place + 0.4], color=COLOURS["ink"], linewidth=2.5)
    words = "; ".join(
        f"{name}: {len(values)} examples" + (f", median {np.median(values):.4g}" if len(values) else "")
        for name, values in groups
    )
    return to_markup(figure, f"{label}. {words}")


@matplotlib_style()
def plot_histogram(groups: Sequence[tuple[str, np.ndarray]], label: str, *, reference: float = math.nan) -> Markup:
    """Counts of examples, the groups stacked; on a log axis where the values spread widely."""
    figure, axes = new_figure(520, 250)
    everything = np.concatenate([values for _, values in groups])
    limits, log = _weight_limits(everything, reference)
    edges = np.geomspace(*limits, 41) if log else np.linspace(*limits, 41)
    counts = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for _, values in groups]
    heights = np.cumsum([np.zeros(40), *counts], axis=0)
    _set_axis(axes.xaxis, limits, label, log=log)
    _set_axis(axes.yaxis, (0.0, max(1.05 * heights[-1].max(), 1.0)), "examples", whole=True)
    handles = [
        (axes.stairs(top, edges, baseline=bottom, fill=True, color=COLOURS[f"c{index}"]), name)
        for index, ((name, _), bottom, top) in enumerate(zip(groups, heights, heights[1:], strict=False))
    ]
    if math.isfinite(reference):
        axes.axvline(reference, **REFERENCE)
    if len(groups) > 1:
        _add_legend(figure, handles)
    return to_markup(figure, f"{label}: {len(everything)} examples")


# ---- axes


def axis_limits(values: Sequence[float], *, log: bool = False, margin: float = 0.05) -> tuple[float, float]:
    """The ends of an axis that holds all finite values, with a margin; never equal."""
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log:
        room = (high / low) ** margin if low < high else 2.0
        return low / room, high * room
    room = margin * (high - low) if low < high else max(0.5 * abs(low), 0.5)
    return low - room, high + room


def log_axis_floor(values: np.ndarray) -> float:
    """The least value that a log axis of these shows, at most 1e6 below the largest; 0 where it is linear."""
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        return 0.0
    floor = max(float(positive.min()), float(positive.max()) * 1e-6)
    return floor if values.max() > 20 * max(float(values.min()), floor) else 0.0


def y_axis_values(series: Sequence[Series]) -> list[float]:
    """The finite values that the axis of y holds: of lines all, of clouds those that are not far out.

    Far out, after Tukey: more than three times the width of the middle half beyond it.
    """
    values: list[float] = []
    for curve in series:
        array = np.asarray(curve.y, float)
        array = array[np.isfinite(array)]
        if curve.kind == "cloud" and len(array):
            low, high = np.quantile(array, [0.25, 0.75])
            array = array[(array >= low - 3 * (high - low)) & (array <= high + 3 * (high - low))]
        values += array.tolist()
    return values


def evenly_spaced_indices(count: int, max_count: int = MAX_POINTS) -> np.ndarray:
    """At most so many of `count` places, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, max_count)).round().astype(int)


def _weight_limits(values: np.ndarray, reference: float) -> tuple[tuple[float, float], bool]:
    """The ends of an axis of weights, and whether it is a log axis: where they spread over more than a factor of 20 and
    the reference has a place on one."""
    finite = values[np.isfinite(values)]
    if (floor := log_axis_floor(finite)) and not reference <= 0:
        high = max(float(finite.max()), reference if math.isfinite(reference) else 0)
        return (floor * 0.9, high * 1.1), True
    return axis_limits([*finite, reference]), False


def _set_axis(
    axis: "XAxis | YAxis",
    limits: tuple[float, float],
    label: str,
    *,
    log: bool = False,
    whole: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> None:
    """Ends, label and about five round ticks, or the given ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes, name = axis.axes, axis.axis_name
    axes.set(**{f"{name}lim": limits, f"{name}label": clean_text(label)})
    if log:
        axes.set(**{f"{name}scale": "log"})
        axis.set_minor_locator(NullLocator())
        wide = limits[1] > 1e3 * limits[0]
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _format_tick(value)))
    if ticks is not None:
        axis.set_major_locator(FixedLocator(list(ticks)))
        axis.set_ticklabels([clean_text(words, keep_lines=True) for words in ticks.values()])


def _name_rows(axes: "Axes", rows: Sequence[tuple[str, str]], strong: Sequence[bool] = ()) -> None:
    """The names of lines that lie below each other, each with a second line in small print."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_yticks(range(len(rows)), [truncate_name(name) + ("\n" * bool(more)) + more for name, more in rows])
    for text, (name, _), bold in zip(axes.get_yticklabels(), rows, strong or [False] * len(rows), strict=True):
        text.set(color=COLOURS["ink"], fontweight="bold" if bold else "normal", gid=TITLE + clean_text(name))


def _name_in_margin(axes: "Axes", ends: Sequence[tuple[float, float, str]]) -> None:
    """The name of each point (x, y, name) to the right of the axes, at its height or as near as there is room."""
    low, high = axes.get_ylim()
    least = 14 * (high - low) / axes.get_window_extent().height
    order = sorted(range(len(ends)), key=lambda at: -ends[at][1])
    places = [ends[at][1] for at in order]
    for at in range(1, len(places)):
        places[at] = min(places[at], places[at - 1] - least)
    for at in range(len(places) - 1, -1, -1):  # and up again where they pass the end
        places[at] = max(places[at], low if at == len(places) - 1 else places[at + 1] + least)
    for at, place in zip(order, places, strict=True):
        x, y, name = ends[at]
        axes.annotate(
            truncate_name(name),
            (x, y),
            (1.03, place),
            xycoords="data",
            textcoords=("axes fraction", "data"),
            verticalalignment="center",
            color=COLOURS["ink"],
            arrowprops={"arrowstyle": "-", "color": COLOURS["rule"], "shrinkA": 2, "shrinkB": 6, "relpos": (0, 0.5)},
            gid=TITLE + clean_text(name),
        )


def _add_legend(figure: "Figure", handles: Sequence[tuple[Any, str]]) -> None:
    """The names of what is drawn, above the axes, in as many columns as there is room for."""
    widths, room = [7 * len(truncate_name(name)) + 34 for _, name in handles], 72 * figure.get_figwidth()
    columns = len(handles) if sum(widths) < room else max(1, int(room / max(widths)))
    marks, names = zip(*handles, strict=True)
    figure.legend(marks, [truncate_name(name) for name in names], loc="outside upper right", ncols=columns)


# ---- marks


def _draw_series(axes: "Axes", curve: Series, limits: tuple[float, float]) -> Any:
    """The line of a series, or its points; its handle for a legend."""
    colour = COLOURS[f"c{curve.colour % NUM_COLOURS}"]
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    x, y = x[np.isfinite(y)], np.clip(y[np.isfinite(y)], *limits)
    if curve.kind == "cloud":
        shown = evenly_spaced_indices(len(x))
        return axes.plot(x[shown], y[shown], **_marker("cloud", colour))[0]
    if curve.kind == "plain" and len(x) > MAX_POINTS:
        shown = evenly_spaced_indices(len(x))
        x, y = x[shown], y[shown]
    style: dict[str, Any] = {"color": colour}
    if curve.kind != "plain":
        at = evenly_spaced_indices(len(x), MAX_MARKERS) if curve.kind == "marked" else [len(x) - 1]
        style = _marker("dot", colour) | {"markevery": list(at), "linestyle": "-"}
        if curve.kind == "marked":
            style |= {"marker": "os^"[curve.colour % 3], "linestyle": DASHES.get(curve.colour, "-")}
        elif curve.colour >= NUM_COLOURS:
            style["linestyle"] = DASHES[1]
    return axes.plot(x, y, **style)[0]


def _marker(kind: str, colour: str) -> dict[str, Any]:
    """How points are drawn: filled, hollow, small and pale, or many that may lie over each other."""
    styles: dict[str, dict[str, Any]] = {
        "dot": {"markersize": 8, "markeredgecolor": COLOURS["panel"], "markeredgewidth": 1},
        "hollow": {"markersize": 7, "markerfacecolor": COLOURS["panel"], "markeredgewidth": 1.8},
        "faint": {"markersize": 4, "markeredgewidth": 0, "alpha": 0.65},
        "cloud": {"markersize": 4, "markeredgewidth": 0, "alpha": 0.55},
    }
    return {"color": colour, "marker": "o", "linestyle": ""} | styles[kind]


def _describe_values(values: Sequence[float]) -> str:
    """The values in words; of many, how many there are, the ends and the range."""
    if len(values) <= MAX_MARKERS:
        return ", ".join(f"{value:.4g}" if math.isfinite(value) else "–" for value in values)
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return (
        f"{len(values)} values from {finite[0]:.4g} to {finite[-1]:.4g}, between {min(finite):.4g} and "
        f"{max(finite):.4g}"
    )


def _format_tick(value: float) -> str:
    return (f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.6g}").replace("-", "−")
