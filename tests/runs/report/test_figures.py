"""Figures of reports: text as text, the page's colours, everything inside its axes, the same bytes again."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from bilevel_jax.runs.report import figures, svg
from bilevel_jax.runs.report.figures import IntervalRow, Point, Series
from bilevel_jax.runs.report.html import read_stylesheet

HOSTILE = "_<script>alert('x')</script>\"'&\x00\x1b\n\u202e $x^2$ {} مرحبا 🙂 \ud800\uffff #000001"
GROUPS = [(f"{at} {HOSTILE}", np.exp(np.random.default_rng(at).normal(0, 2, 300))) for at in range(6)]
FIGURES = {
    "intervals": lambda: figures.plot_intervals(
        [IntervalRow(HOSTILE, 1.8, 1.7, 1.9, [1.75], 2.0), IntervalRow("b", 1.4, emphasized=True)],
        HOSTILE,
        names=(HOSTILE, "hollow"),
        reference=1.8,
    ),
    "lines": lambda: figures.plot_lines(
        [Series(f"{HOSTILE}{kind}", range(9), [1.0, math.nan, *range(7)], 1, kind) for kind in ("marked", "cloud")],
        HOSTILE,
        HOSTILE,
        points=[Point(3, 2.5, 2, 3, title=HOSTILE, kind="hollow")],
        vertical_mark=(4, HOSTILE),
        bands=[(1, 2)],
        x_ticks={3: HOSTILE},
    ),
    "named lines": lambda: figures.plot_lines(
        [Series(f"{at} {HOSTILE}", [1, 100], [0, at], at, "named") for at in range(9)], HOSTILE, HOSTILE, log_x=True
    ),
    "strips": lambda: figures.plot_strips(GROUPS, HOSTILE, reference=1.0),
    "histogram": lambda: figures.plot_histogram(GROUPS, HOSTILE, reference=1.0),
}


def texts(picture: str) -> list[str]:
    return [each.text or "" for each in xml.fromstring(picture).iter("text")]


@pytest.mark.parametrize("draw", FIGURES.values(), ids=list(FIGURES))
def test_hostile_text_stays_text(draw):
    picture = draw()
    root = xml.fromstring(picture)
    assert {each.tag for each in root.iter()} <= {"svg", "g", "defs", "path", "use", "text", "title"}
    assert not re.search(r"<script|url\(|https?:|xmlns|<!|<\?|[\x00-\x1f\u202e\ud800\uffff]", picture)
    assert any("<script>" in text and "$" not in text for text in texts(picture))  # cut before it
    assert any("$x^2$" in text for text in [*texts(picture), *(each.text or "" for each in root.iter("title"))])
    assert "<script>alert('x')</script>\"'&␀␛" in root.get("aria-label", "") and root.get("role") == "img"


@pytest.mark.parametrize("draw", FIGURES.values(), ids=list(FIGURES))
def test_colours_are_those_of_the_page(draw):
    """No colour is a number, so that all of them follow light, dark and print."""
    styles = " ".join(each.get("style", "") for each in xml.fromstring(draw()).iter())
    assert set(re.findall(r"(?:fill|stroke|color): ?([^;\s]+)", styles)) <= {
        "none", *(f"var(--{name})" for name in svg.VARIABLES)
    }  # fmt: skip
    assert "#" not in styles and "var(--muted)" in styles
    for name in svg.VARIABLES:
        assert read_stylesheet().count(f"--{name}: #") == 2  # light, dark


def test_ids_and_bytes():
    """Ids are of one figure alone, nothing is named that is not there, and the same data give the same bytes."""
    pictures = [draw() for draw in FIGURES.values()]
    ids = [re.findall(r' id="(\S+?)"', picture) for picture in pictures]
    assert sum(map(len, ids)) == len(set(sum(ids, []))) > 0
    for picture, own in zip(pictures, ids, strict=True):
        assert set(re.findall(r'href="#(\S+?)"', picture)) <= set(own)
    assert [draw() for draw in FIGURES.values()] == pictures


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low, high", [(0.9, 1.1), (1e-6, 40.0), (3.0, 4000.0), (0.003, 0.1), (5.0, 5.0), (3.1, 4.7)])
def test_axes_hold_their_values_and_have_ticks(low, high, log):
    ends = figures.axis_limits([low, math.nan, high], log=log)
    assert ends[0] < low <= high < ends[1] and (not log or ends[0] > 0)
    picture = figures.plot_intervals([IntervalRow("a", low), IntervalRow("b", high)], "nats", log=log)
    ticks = [
        float(text.replace("−", "-").replace(",", "")) for text in texts(picture) if text not in ("a", "b", "nats")
    ]
    assert 1 <= len(ticks) <= 12 and all(ends[0] <= tick <= ends[1] for tick in ticks)
    places = [float(each.get("x")) for each in xml.fromstring(picture).iter("use")]
    assert all(0 <= place <= 520 for place in places)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0], [5e-9, 1.0], [0.0, 40.0], [-1.0, 3.0]], ids=str)
def test_weights_of_any_spread(values):
    for draw in (figures.plot_strips, figures.plot_histogram):
        picture = draw([("all", np.array(values))], "weight", reference=1.0)
        assert not re.search(r"\bnan\b|\binf\b|None", picture)


def test_many_names_in_the_margin_do_not_overlap():
    names = [f"method {at}" for at in range(30)]
    picture = figures.plot_lines(
        [], "passes", "LDS", points=[Point(1 + at, 0.5, name=name) for at, name in enumerate(names)]
    )
    heights = sorted(float(each.get("y")) for each in xml.fromstring(picture).iter("text") if each.text in names)
    assert len(heights) == 30 and min(np.diff(heights)) > 11


def test_matplotlib_is_imported_when_a_figure_is_drawn():
    code = "import sys, bilevel_jax.cli, bilevel_jax.commands.train.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_axis_of_intervals_holds_the_reference():
    rows = [IntervalRow("one", 15, 14, 16), IntervalRow("other", 43, 42, 44)]
    pictures = [str(figures.plot_intervals(rows, "difference", reference=at)) for at in (0.0, math.nan)]
    with_zero, without = (re.findall(r">(\d+)<", picture) for picture in pictures)
    assert with_zero[0] == "0" and "0" not in without
