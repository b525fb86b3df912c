"""Figures of a report as inline SVG: escaped text, and colours that follow the page in light, dark and print."""

import html
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

COLOURS = 6
"""Groups and series that can be told apart; callers gather the rest in one."""
DRAWN = 500
"""Points drawn of one group or series: enough to see its shape, few enough for a small file."""
MARKED = 20
"""Markers on one line, and values told in words for those who cannot see it."""
TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Characters that turn the direction of what follows them: right-to-left text needs none of them, spoofing does."""
CONTROLS: dict[int, str] = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {127: "\u2421"}
    | {code: f"⟨U+{code:X}⟩" for code in TURNS}
)


class Html(str):
    """Text that is markup already. Whatever is not of this type is escaped on its way into a page."""


class Dot(NamedTuple):
    """One line of a dot-and-interval plot; nan where there is no such number."""

    name: str
    value: float
    half: float
    """Half-width of the interval around `value`."""
    runs: Sequence[float] = ()
    second: float = math.nan
    """Another reading of the same line, drawn hollow."""
    strong: bool = False


class Series(NamedTuple):
    """One line of a line plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    kind: Literal["marked", "plain", "cloud"] = "marked"
    """A line with a marker at each value; a bare line, for many values; single points, for many noisy ones."""


def element(name: str, /, *children: str | None, **attributes: object) -> Html:
    """<name attributes>children</name>, where everything that is not Html is escaped: hostile text stays text.

    Attributes may end in an underscore (class_), and other underscores are hyphens; those that are None are left out.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("meta", "br"):
        return Html(f"<{name}{pairs}>")
    return Html(f"<{name}{pairs}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """The children side by side, escaped unless they are Html."""
    parts = (child if isinstance(child, Html) else html.escape(printable(child)) for child in children if child)
    return Html("".join(parts))


def printable(text: str) -> str:
    """The text with control characters made visible, and half surrogate pairs replaced: UTF-8 cannot hold them."""
    return text.translate(CONTROLS).encode("utf-8", "replace").decode("utf-8")


# ---- the figures


def dots(
    rows: Sequence[Dot],
    label: str,
    *,
    names: tuple[str, str] = ("", ""),
    reference: float = math.nan,
    width: float = 520,
) -> Html:
    """A line per row: its value with its interval, below them its single runs; `names` is the legend."""
    left, right, height = 140, width, 27
    top, second = (28 if names[0] else 6), any(math.isfinite(row.second) for row in rows)
    bottom = top + height * len(rows)
    ends = [row.value + sign * row.half for row in rows for sign in (-1, 1) if math.isfinite(row.half)]
    x = scale([*ends, *(v for row in rows for v in (row.value, row.second, *row.runs))], left, right - 8)
    parts = [*_x_axis(x, top, bottom, label)]
    if names[0]:
        entries = [(names[0], "k0", "dot"), *([(names[1], "k1", "hollow")] if second else [])]
        parts += _legend(entries, left)
    if math.isfinite(reference):
        parts.append(_line(x(reference), top, x(reference), bottom, "reference"))
    for index, row in enumerate(rows):
        y = top + height * (index + 0.5)
        strong = " strong" if row.strong else ""
        parts.append(_text(left - 10, y + 4, _cut(row.name, 18), f"label end{strong}", full=row.name))
        if math.isfinite(row.second):
            parts.append(_circle(x(row.second), y, 3.5, "hollow k1"))
        parts += [_circle(x(run), y + 8, 1.9, "faint k0") for run in row.runs if math.isfinite(run)]
        if math.isfinite(row.half):
            parts.append(_line(x(row.value - row.half), y, x(row.value + row.half), y, f"whisker k0{strong}"))
        if math.isfinite(row.value):
            parts.append(_circle(x(row.value), y, 5 if row.strong else 4, "dot k0"))
    words = "; ".join(f"{row.name} {row.value:.4g}" for row in rows)
    return _svg(parts, right, bottom + 40, f"{label}: {words}")


def lines(
    series: Sequence[Series],
    label: str,
    unit: str,
    *,
    mark: tuple[float, str] | None = None,
    bands: Sequence[tuple[float, float]] = (),
    log: bool = False,
    include: Sequence[float] = (),
    height: float = 180,
) -> Html:
    """Lines over a shared x (`log`: equal steps per factor); `bands` shade what is wanted of y.

    What the axis of y does not hold (see `held`) is drawn at its edge.
    """
    left, right = 58, 520
    shapes = {"cloud": "faint", "plain": "line"}
    entries = [(one.name, f"k{one.colour}", shapes.get(one.kind, str(one.colour))) for one in series]
    legend = sum(_wide(name) for name, *_ in entries) if len(entries) > 1 else 0
    below = 20 if legend + 6.4 * len(unit) > right - left else 0  # the legend has a line of its own
    top, bottom = 30 + below, 30 + below + height
    x = scale([value for one in series for value in one.x], left + 10, right - 14, log=log, margin=0)
    y = scale([*held(series), *include], bottom, top + 8)
    parts = [
        element(
            "rect", x=left, width=right - left, y=_n(y(high)), height=_n(y(low) - y(high)), class_="band"
        )
        for low, high in bands
    ]  # fmt: skip
    parts += _x_axis(
        x, top, bottom, label, whole=not log, ticks=sorted({v for s in series for v in s.x}) if log else None
    )
    for tick in y.ticks():
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, _tick(tick), "tick end"))
    parts.append(_text(left, 12, unit, "tick"))
    if mark:
        late = x(mark[0]) > (left + right) / 2
        parts.append(_line(x(mark[0]), top, x(mark[0]), bottom, "reference"))
        parts.append(_text(x(mark[0]) + (-5 if late else 5), top + 10, mark[1], f"tick{' end' if late else ''}"))
    for one in series:
        points = [(x(a), y(b)) for a, b in zip(one.x, one.y, strict=True) if math.isfinite(b)]
        some = [points[at] for at in evenly(len(points))]
        if one.kind == "cloud":
            path = "".join(f"M{_n(a)} {_n(b)}h0" for a, b in some)
            parts.append(element("path", d=path, class_=f"cloud fine k{one.colour}"))
            continue
        path = " ".join(f"{_n(a)},{_n(b)}" for a, b in some)
        dashes = f" d{one.colour}" if one.kind == "marked" else ""
        parts.append(element("polyline", points=path, class_=f"line k{one.colour}{dashes}"))
        if one.kind == "marked":
            parts += [_marker(a, b, one.colour) for a, b in (points[at] for at in evenly(len(points), MARKED))]
    if legend:
        parts.append(element("g", *_legend(entries, right - legend), transform=f"translate(0 {below})"))
    words = "; ".join(f"{one.name}: {_told(one.y)}" for one in series)
    return _svg(parts, right, bottom + 40, f"{unit} by {label}. {words}")


def held(series: Sequence[Series]) -> list[float]:
    """The finite values that the axis of y holds: of lines all, of clouds those that are not far out.

    Far out, after Tukey: more than three times the width of the middle half beyond it.
    """
    values: list[float] = []
    for one in series:
        array = np.asarray(one.y, float)
        array = array[np.isfinite(array)]
        if one.kind == "cloud" and len(array):
            low, high = np.quantile(array, [0.25, 0.75])
            array = array[(array >= low - 3 * (high - low)) & (array <= high + 3 * (high - low))]
        values += array.tolist()
    return values


def strips(groups: Sequence[tuple[str, np.ndarray]], label: str, *, reference: float = math.nan) -> Html:
    """A line per group: its values as a cloud of points, its median as a bar; on a log axis where they spread."""
    left, right, height = 140, 520, 38
    top, bottom = 6, 6 + height * len(groups)
    x = spread(np.concatenate([values for _, values in groups]), left, right - 8, reference)
    parts = [*_x_axis(x, top, bottom, label)]
    if math.isfinite(reference):
        parts.append(_line(x(reference), top, x(reference), bottom, "reference"))
    for index, (name, values) in enumerate(groups):
        middle = top + height * (index + 0.5)
        ordered = np.sort(values)
        some = ordered[evenly(len(ordered))]
        path = "".join(  # offsets by the golden ratio: spread evenly, and the same every time
            f"M{_n(x(value))} {_n(middle + (place * 0.618034 % 1 - 0.5) * 24)}h0" for place, value in enumerate(some)
        )
        parts.append(element("path", d=path, class_=f"cloud k{index}"))
        at = x(float(np.median(values)))
        parts.append(_line(at, middle - 15, at, middle + 15, "median"))
        parts.append(_text(left - 10, middle, _cut(name, 18), "label end", full=name))
        parts.append(_text(left - 10, middle + 13, f"{len(values):,} rows", "tick end"))
    words = "; ".join(f"{name}: {len(values)} rows, median {np.median(values):.4g}" for name, values in groups)
    return _svg(parts, right, bottom + 40, f"{label}. {words}")


def histogram(groups: Sequence[tuple[str, np.ndarray]], label: str, *, reference: float = math.nan) -> Html:
    """Counts of rows, the groups stacked; on a log axis where the values spread widely."""
    left, right, top, bottom = 58, 520, 30, 210
    everything = np.concatenate([values for _, values in groups])
    x = spread(everything, left, right - 8, reference)
    edges = np.linspace(left, right - 8, 41)
    places = [np.array([x(value) for value in values]) for _, values in groups]
    counts = np.array([np.histogram(place, edges)[0] for place in places])
    y = Scale(0, max(float(counts.sum(0).max()) * 1.05, 1), bottom, top + 4)
    parts = [*_x_axis(x, top, bottom, label)]
    for tick in y.ticks():
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, _tick(tick), "tick end"))
    parts.append(_text(left, 12, "rows", "tick"))
    below = np.zeros(40)
    for index, count in enumerate(counts):
        path = "".join(
            f"M{_n(edges[bin] + 0.5)} {_n(y(below[bin]))}V{_n(y(below[bin] + some))}"
            f"H{_n(edges[bin + 1] - 0.5)}V{_n(y(below[bin]))}Z"
            for bin, some in enumerate(count)
            if some
        )
        parts.append(element("path", d=path, class_=f"area k{index}"))
        below = below + count
    if math.isfinite(reference):
        parts.append(_line(x(reference), top, x(reference), bottom, "reference"))
    if len(groups) > 1:
        entries = [(_cut(name, 14), f"k{index}", "area") for index, (name, _) in enumerate(groups)]
        parts += _legend(entries, right - sum(_wide(name) for name, *_ in entries))
    return _svg(parts, right, bottom + 40, f"{label}: {len(everything)} rows")


# ---- scales and marks


def evenly(count: int, most: int = DRAWN) -> np.ndarray:
    """At most so many of `count` places, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _told(values: Sequence[float]) -> str:
    """The values in words; of many, how many there are, the ends and the range."""
    if len(values) <= MARKED:
        return ", ".join(f"{value:.4g}" if math.isfinite(value) else "–" for value in values)
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return (
        f"{len(values)} values from {finite[0]:.4g} to {finite[-1]:.4g}, between {min(finite):.4g} and "
        f"{max(finite):.4g}"
    )


class Scale(NamedTuple):
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


def scale(values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.05) -> Scale:
    """A scale that holds all finite values with a margin."""
    finite = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log:
        return Scale(low, high, start, end, True) if low < high else Scale(low / 2, low * 2, start, end, True)
    room = margin * (high - low) if low < high else max(0.5 * abs(low), 0.5)
    return Scale(low - room, high + room, start, end)


def spread(values: np.ndarray, start: float, end: float, reference: float) -> Scale:
    """A scale for weights: by factors where they spread over more than 20, else from the least to the largest."""
    finite = values[np.isfinite(values)]
    if floor := floor_of(finite):
        high = max(float(finite.max()), reference if math.isfinite(reference) else 0)
        return Scale(floor * 0.9, high * 1.1, start, end, True)
    return scale([*finite, reference], start, end)


def floor_of(values: np.ndarray) -> float:
    """The least value that a log axis of these shows, at most 1e6 below the largest; 0 where it is linear."""
    positive = values[values > 0]
    if not len(positive) or values.min() < 0:
        return 0.0
    floor = max(float(positive.min()), float(positive.max()) * 1e-6)
    return floor if values.max() > 20 * max(float(values.min()), floor) else 0.0


def _x_axis(x: Scale, top: float, bottom: float, label: str, *, whole: bool = False, ticks=None) -> list[Html]:
    parts = [_line(x.start, bottom, x.end, bottom, "axis")]
    for tick in x.ticks() if ticks is None else ticks:
        if not whole or float(tick).is_integer():
            parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
            parts.append(_text(x(tick), bottom + 16, _tick(tick), "tick middle"))
    return [*parts, _text((x.start + x.end) / 2, bottom + 34, label, "tick middle")]


def _legend(entries: Sequence[tuple[str, str, str]], start: float) -> list[Html]:
    parts = []
    for name, colour, shape in entries:
        if shape == "area":
            parts.append(element("rect", x=_n(start), y=4, width=10, height=10, class_=f"area {colour}"))
        elif shape == "line":
            parts.append(_line(start - 4, 9, start + 14, 9, f"line {colour}"))
        elif shape.isdigit():
            parts += [_line(start - 4, 9, start + 14, 9, f"line {colour} d{shape}"), _marker(start + 5, 9, int(shape))]
        else:
            parts.append(_circle(start + 5, 9, 4, f"{shape} {colour}"))
        parts.append(_text(start + 18, 13, name, "tick"))
        start += _wide(name)
    return parts


def _marker(x: float, y: float, kind: int) -> Html:
    """A circle, square or triangle: series differ by more than their colour."""
    path = {0: None, 1: f"M{_n(x - 3.5)} {_n(y - 3.5)}h7v7h-7z", 2: f"M{_n(x)} {_n(y - 4.5)}l4.5 8h-9z"}[kind % 3]
    return _circle(x, y, 3.8, f"dot k{kind}") if path is None else element("path", d=path, class_=f"dot k{kind}")


def _svg(parts: Sequence[Html], width: float, height: float, words: str) -> Html:
    return element("svg", *parts, viewBox=f"0 0 {_n(width)} {_n(height)}", role="img", aria_label=words)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=kind)


def _circle(x: float, y: float, radius: float, kind: str) -> Html:
    return element("circle", cx=_n(x), cy=_n(y), r=radius, class_=kind)


def _text(x: float, y: float, words: str, kind: str, *, full: str = "") -> Html:
    title = element("title", full) if full and full != words else None
    return element("text", title, words, x=_n(x), y=_n(y), class_=kind)


def _wide(name: str) -> float:
    return 34 + 6.4 * len(name)


def _cut(text: str, count: int) -> str:
    return text if len(text) <= count else text[: count - 1] + "…"


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.6g}".replace("-", "−")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


STYLE = """
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
