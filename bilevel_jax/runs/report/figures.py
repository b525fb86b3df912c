"""Figures of a report as inline SVG: escaped text, and colours that follow the page in light, dark and print."""

import html
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

NUM_COLOURS = 6
"""Groups and series that can be told apart; callers gather the rest in one."""
MAX_POINTS = 500
"""Points drawn of one group or series: enough to see its shape, few enough for a small file."""
MAX_MARKERS = 20
"""Markers on one line, and values told in words for those who cannot see it."""
BIDI_CONTROLS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that turn the direction of what follows them: right-to-left text needs none of them, spoofing does."""
VISIBLE_CONTROLS: dict[int, str] = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {127: "\u2421"}
    | {code: f"⟨U+{code:X}⟩" for code in BIDI_CONTROLS}
)


class Html(str):
    """Text that is markup already. Whatever is not of this type is escaped on its way into a page."""

    def __html__(self) -> str:
        """The markup, for jinja2."""
        return self


class IntervalRow(NamedTuple):
    """One line of a dot-and-interval plot; nan where there is no such number."""

    name: str
    value: float
    half_width: float
    """Half-width of the interval around `value`."""
    seed_values: Sequence[float] = ()
    second_value: float = math.nan
    """Another reading of the same line, drawn hollow."""
    emphasized: bool = False


class Series(NamedTuple):
    """One line of a line plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    kind: Literal["marked", "plain", "cloud"] = "marked"
    """A line with a marker at each value; a bare line, for many values; single points, for many noisy ones."""


def html_element(tag: str, /, *children: str | None, **attributes: object) -> Html:
    """<name attributes>children</name>, where everything that is not Html is escaped: hostile text stays text.

    Attributes may end in an underscore (class_), and other underscores are hyphens; those that are None are left out.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(show_control_characters(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in ("meta", "br"):
        return Html(f"<{tag}{pairs}>")
    return Html(f"<{tag}{pairs}>{join_html(*children)}</{tag}>")


def join_html(*children: str | None) -> Html:
    """The children side by side, escaped unless they are Html."""
    parts = (
        child if isinstance(child, Html) else html.escape(show_control_characters(child)) for child in children if child
    )
    return Html("".join(parts))


def show_control_characters(text: str) -> str:
    """The text with control characters made visible, and half surrogate pairs replaced: UTF-8 cannot hold them."""
    return text.translate(VISIBLE_CONTROLS).encode("utf-8", "replace").decode("utf-8")


# ---- the figures


def plot_intervals(
    rows: Sequence[IntervalRow],
    label: str,
    *,
    names: tuple[str, str] = ("", ""),
    reference: float = math.nan,
    width: float = 520,
) -> Html:
    """A line per row: its value with its interval, below them its single runs; `names` is the legend."""
    left, right, height = 140, width, 27
    top, second = (28 if names[0] else 6), any(math.isfinite(row.second_value) for row in rows)
    bottom = top + height * len(rows)
    ends = [row.value + sign * row.half_width for row in rows for sign in (-1, 1) if math.isfinite(row.half_width)]
    x = make_scale(
        [*ends, *(v for row in rows for v in (row.value, row.second_value, *row.seed_values))], left, right - 8
    )
    parts = [*_x_axis(x, top, bottom, label)]
    if names[0]:
        legend_items = [(names[0], "k0", "dot"), *([(names[1], "k1", "hollow")] if second else [])]
        parts += _legend(legend_items, left)
    if math.isfinite(reference):
        parts.append(_line(x(reference), top, x(reference), bottom, "reference"))
    for index, row in enumerate(rows):
        y = top + height * (index + 0.5)
        strong = " strong" if row.emphasized else ""
        parts.append(_text(left - 10, y + 4, _truncate(row.name, 18), f"label end{strong}", full=row.name))
        if math.isfinite(row.second_value):
            parts.append(_circle(x(row.second_value), y, 3.5, "hollow k1"))
        parts += [_circle(x(run), y + 8, 1.9, "faint k0") for run in row.seed_values if math.isfinite(run)]
        if math.isfinite(row.half_width):
            parts.append(
                _line(x(row.value - row.half_width), y, x(row.value + row.half_width), y, f"whisker k0{strong}")
            )
        if math.isfinite(row.value):
            parts.append(_circle(x(row.value), y, 5 if row.emphasized else 4, "dot k0"))
    words = "; ".join(f"{row.name} {row.value:.4g}" for row in rows)
    return _svg(parts, right, bottom + 40, f"{label}: {words}")


def plot_lines(
    series: Sequence[Series],
    label: str,
    unit: str,
    *,
    vertical_mark: tuple[float, str] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    log_x: bool = False,
    y_values_shown: Sequence[float] = (),
    height: float = 180,
) -> Html:
    """Lines over a shared x (`log`: equal steps per factor); `bands` shade what is wanted of y.

    What the axis of y does not hold (see `held`) is drawn at its edge.
    """
    left, right = 58, 520
    shapes = {"cloud": "faint", "plain": "line"}
    legend_items = [(curve.name, f"k{curve.colour}", shapes.get(curve.kind, str(curve.colour))) for curve in series]
    legend = sum(_legend_width(name) for name, *_ in legend_items) if len(legend_items) > 1 else 0
    below = 20 if legend + 6.4 * len(unit) > right - left else 0  # the legend has a line of its own
    top, bottom = 30 + below, 30 + below + height
    x = make_scale([value for curve in series for value in curve.x], left + 10, right - 14, log=log_x, margin=0)
    y = make_scale([*y_axis_values(series), *y_values_shown], bottom, top + 8)
    parts = [
        html_element(
            "rect", x=left, width=right - left, y=_format_coordinate(y(high)), height=_format_coordinate(y(low) - y(high)), class_="band"
        )
        for low, high in bands
    ]  # fmt: skip
    parts += _x_axis(
        x, top, bottom, label, whole=not log_x, ticks=sorted({v for s in series for v in s.x}) if log_x else None
    )
    for tick in y.ticks():
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, _format_tick(tick), "tick end"))
    parts.append(_text(left, 12, unit, "tick"))
    if vertical_mark:
        late = x(vertical_mark[0]) > (left + right) / 2
        parts.append(_line(x(vertical_mark[0]), top, x(vertical_mark[0]), bottom, "reference"))
        parts.append(
            _text(
                x(vertical_mark[0]) + (-5 if late else 5), top + 10, vertical_mark[1], f"tick{' end' if late else ''}"
            )
        )
    for curve in series:
        points = [(x(a), y(b)) for a, b in zip(curve.x, curve.y, strict=True) if math.isfinite(b)]
        shown = [points[at] for at in evenly_spaced_indices(len(points))]
        if curve.kind == "cloud":
            path = "".join(f"M{_format_coordinate(a)} {_format_coordinate(b)}h0" for a, b in shown)
            parts.append(html_element("path", d=path, class_=f"cloud fine k{curve.colour}"))
            continue
        path = " ".join(f"{_format_coordinate(a)},{_format_coordinate(b)}" for a, b in shown)
        dashes = f" d{curve.colour}" if curve.kind == "marked" else ""
        parts.append(html_element("polyline", points=path, class_=f"line k{curve.colour}{dashes}"))
        if curve.kind == "marked":
            parts += [
                _marker(a, b, curve.colour)
                for a, b in (points[at] for at in evenly_spaced_indices(len(points), MAX_MARKERS))
            ]
    if legend:
        parts.append(html_element("g", *_legend(legend_items, right - legend), transform=f"translate(0 {below})"))
    words = "; ".join(f"{curve.name}: {_describe_values(curve.y)}" for curve in series)
    return _svg(parts, right, bottom + 40, f"{unit} by {label}. {words}")


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


def plot_strips(groups: Sequence[tuple[str, np.ndarray]], label: str, *, reference: float = math.nan) -> Html:
    """A line per group: its values as a cloud of points, its median as a bar; on a log axis where they spread."""
    left, right, height = 140, 520, 38
    top, bottom = 6, 6 + height * len(groups)
    x = make_weight_scale(np.concatenate([values for _, values in groups]), left, right - 8, reference)
    parts = [*_x_axis(x, top, bottom, label)]
    if math.isfinite(reference):
        parts.append(_line(x(reference), top, x(reference), bottom, "reference"))
    for index, (name, values) in enumerate(groups):
        middle = top + height * (index + 0.5)
        ordered = np.sort(values)
        shown = ordered[evenly_spaced_indices(len(ordered))]
        path = "".join(  # offsets by the golden ratio: spread evenly, and the same every time
            f"M{_format_coordinate(x(value))} {_format_coordinate(middle + (place * 0.618034 % 1 - 0.5) * 24)}h0"
            for place, value in enumerate(shown)
        )
        parts.append(html_element("path", d=path, class_=f"cloud k{index}"))
        at = x(float(np.median(values)))
        parts.append(_line(at, middle - 15, at, middle + 15, "median"))
        parts.append(_text(left - 10, middle, _truncate(name, 18), "label end", full=name))
        parts.append(_text(left - 10, middle + 13, f"{len(values):,} rows", "tick end"))
    words = "; ".join(f"{name}: {len(values)} rows, median {np.median(values):.4g}" for name, values in groups)
    return _svg(parts, right, bottom + 40, f"{label}. {words}")


def plot_histogram(groups: Sequence[tuple[str, np.ndarray]], label: str, *, reference: float = math.nan) -> Html:
    """Counts of rows, the groups stacked; on a log axis where the values spread widely."""
    left, right, top, bottom = 58, 520, 30, 210
    everything = np.concatenate([values for _, values in groups])
    x = make_weight_scale(everything, left, right - 8, reference)
    edges = np.linspace(left, right - 8, 41)
    places = [np.array([x(value) for value in values]) for _, values in groups]
    counts = np.array([np.histogram(place, edges)[0] for place in places])
    y = AxisScale(0, max(float(counts.sum(0).max()) * 1.05, 1), bottom, top + 4)
    parts = [*_x_axis(x, top, bottom, label)]
    for tick in y.ticks():
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, _format_tick(tick), "tick end"))
    parts.append(_text(left, 12, "rows", "tick"))
    below = np.zeros(40)
    for index, count in enumerate(counts):
        path = "".join(
            f"M{_format_coordinate(edges[bin] + 0.5)} {_format_coordinate(y(below[bin]))}V{_format_coordinate(y(below[bin] + height))}"
            f"H{_format_coordinate(edges[bin + 1] - 0.5)}V{_format_coordinate(y(below[bin]))}Z"
            for bin, height in enumerate(count)
            if height
        )
        parts.append(html_element("path", d=path, class_=f"area k{index}"))
        below = below + count
    if math.isfinite(reference):
        parts.append(_line(x(reference), top, x(reference), bottom, "reference"))
    if len(groups) > 1:
        legend_items = [(_truncate(name, 14), f"k{index}", "area") for index, (name, _) in enumerate(groups)]
        parts += _legend(legend_items, right - sum(_legend_width(name) for name, *_ in legend_items))
    return _svg(parts, right, bottom + 40, f"{label}: {len(everything)} rows")


# ---- scales and marks


def evenly_spaced_indices(count: int, max_count: int = MAX_POINTS) -> np.ndarray:
    """At most so many of `count` places, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, max_count)).round().astype(int)


def _describe_values(values: Sequence[float]) -> str:
    """The values in words; of many, how many there are, the ends and the range."""
    if len(values) <= MAX_MARKERS:
        return ", ".join(f"{value:.4g}" if math.isfinite(value) else "–" for value in values)
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return (
        f"{len(values)} values from {finite[0]:.4g} to {finite[-1]:.4g}, between {min(finite):.4g} and "
        f"{max(finite):.4g}"
    )


class AxisScale(NamedTuple):
    """From values to pixels; values outside are drawn at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        value = min(max(float(value), self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    def ticks(self) -> list[float]:
        """About five round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wide = len(decades) > 3
            skip = max(1, len(decades) // 6)
            values = [m * 10.0**k for k in decades if k % skip == 0 for m in ((1,) if wide else (1, 2, 5))]
        else:
            raw = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(raw))
            step = min((m * power for m in (1, 2, 5, 10)), key=lambda one: abs(one - raw))
            values = [k * step for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high]


def make_scale(
    values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.05
) -> AxisScale:
    """A scale that holds all finite values with a margin."""
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log:
        return AxisScale(low, high, start, end, True) if low < high else AxisScale(low / 2, low * 2, start, end, True)
    room = margin * (high - low) if low < high else max(0.5 * abs(low), 0.5)
    return AxisScale(low - room, high + room, start, end)


def make_weight_scale(values: np.ndarray, start: float, end: float, reference: float) -> AxisScale:
    """A scale for weights: by factors where they spread over more than 20, else from the least to the largest."""
    finite = values[np.isfinite(values)]
    if floor := log_axis_floor(finite):
        high = max(float(finite.max()), reference if math.isfinite(reference) else 0)
        return AxisScale(floor * 0.9, high * 1.1, start, end, True)
    return make_scale([*finite, reference], start, end)


def log_axis_floor(values: np.ndarray) -> float:
    """The least value that a log axis of these shows, at most 1e6 below the largest; 0 where it is linear."""
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        return 0.0
    floor = max(float(positive.min()), float(positive.max()) * 1e-6)
    return floor if values.max() > 20 * max(float(values.min()), floor) else 0.0


def _x_axis(x: AxisScale, top: float, bottom: float, label: str, *, whole: bool = False, ticks=None) -> list[Html]:
    parts = [_line(x.start, bottom, x.end, bottom, "axis")]
    for tick in x.ticks() if ticks is None else ticks:
        if not whole or float(tick).is_integer():
            parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
            parts.append(_text(x(tick), bottom + 16, _format_tick(tick), "tick middle"))
    return [*parts, _text((x.start + x.end) / 2, bottom + 34, label, "tick middle")]


def _legend(items: Sequence[tuple[str, str, str]], start: float) -> list[Html]:
    parts = []
    for name, colour, shape in items:
        if shape == "area":
            parts.append(
                html_element("rect", x=_format_coordinate(start), y=4, width=10, height=10, class_=f"area {colour}")
            )
        elif shape == "line":
            parts.append(_line(start - 4, 9, start + 14, 9, f"line {colour}"))
        elif shape.isdigit():
            parts += [_line(start - 4, 9, start + 14, 9, f"line {colour} d{shape}"), _marker(start + 5, 9, int(shape))]
        else:
            parts.append(_circle(start + 5, 9, 4, f"{shape} {colour}"))
        parts.append(_text(start + 18, 13, name, "tick"))
        start += _legend_width(name)
    return parts


def _marker(x: float, y: float, kind: int) -> Html:
    """A circle, square or triangle: series differ by more than their colour."""
    path = {
        0: None,
        1: f"M{_format_coordinate(x - 3.5)} {_format_coordinate(y - 3.5)}h7v7h-7z",
        2: f"M{_format_coordinate(x)} {_format_coordinate(y - 4.5)}l4.5 8h-9z",
    }[kind % 3]
    return _circle(x, y, 3.8, f"dot k{kind}") if path is None else html_element("path", d=path, class_=f"dot k{kind}")


def _svg(parts: Sequence[Html], width: float, height: float, words: str) -> Html:
    return html_element(
        "svg",
        *parts,
        viewBox=f"0 0 {_format_coordinate(width)} {_format_coordinate(height)}",
        role="img",
        aria_label=words,
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return html_element(
        "line",
        x1=_format_coordinate(x1),
        y1=_format_coordinate(y1),
        x2=_format_coordinate(x2),
        y2=_format_coordinate(y2),
        class_=kind,
    )


def _circle(x: float, y: float, radius: float, kind: str) -> Html:
    return html_element("circle", cx=_format_coordinate(x), cy=_format_coordinate(y), r=radius, class_=kind)


def _text(x: float, y: float, words: str, kind: str, *, full: str = "") -> Html:
    title = html_element("title", full) if full and full != words else None
    return html_element("text", title, words, x=_format_coordinate(x), y=_format_coordinate(y), class_=kind)


def _legend_width(name: str) -> float:
    return 34 + 6.4 * len(name)


def _truncate(text: str, count: int) -> str:
    return text if len(text) <= count else text[: count - 1] + "…"


def _format_tick(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.6g}".replace("-", "−")


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


FIGURE_STYLE = """
svg { display: block; overflow: visible; width: 100%; max-width: 560px; height: auto; font: 12px/1 var(--font); }
svg text { fill: var(--ink); } svg .tick { fill: var(--muted); font-size: 11px; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg text.strong { font-weight: 650; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--muted); }
svg .reference { stroke: var(--muted); stroke-dasharray: 4 3; }
svg .median { stroke: var(--ink); stroke-width: 2.5; }
svg .band { fill: var(--good); opacity: .13; }
svg .dot { fill: var(--k); stroke: var(--panel); } svg .faint { fill: var(--k); opacity: .65; }
svg .hollow { fill: var(--panel); stroke: var(--k); stroke-width: 1.8; }
svg .whisker { stroke: var(--k); stroke-width: 1.6; } svg .whisker.strong { stroke-width: 3; }
svg .line { stroke: var(--k); fill: none; stroke-width: 1.8; } svg .d1 { stroke-dasharray: 6 3; }
svg .d2 { stroke-dasharray: 2 3; }
svg .cloud { stroke: var(--k); fill: none; stroke-width: 4; stroke-linecap: round; opacity: .42; }
svg .cloud.fine { stroke-width: 3.5; opacity: .45; }
svg .area { fill: var(--k); }
.k0 { --k: var(--c0); } .k1 { --k: var(--c1); } .k2 { --k: var(--c2); }
.k3 { --k: var(--c3); } .k4 { --k: var(--c4); } .k5 { --k: var(--c5); }
"""
