"""Templates and tables of report pages."""

import math

import jinja2
import pytest
from markupsafe import Markup

from bilevel_jax.runs.report import html
from bilevel_jax.runs.report.numbers import MeanInterval, SignedNumber

TEMPLATES = html.ENVIRONMENT.list_templates(filter_func=lambda name: name.endswith(".html"))


def render(source: str, **values) -> str:
    return html.ENVIRONMENT.from_string('{% import "macros.html" as ui %}' + source).render(**values)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_compiles_and_marks_no_text_as_safe(name):
    source = html.ENVIRONMENT.loader.get_source(html.ENVIRONMENT, name)[0]
    html.ENVIRONMENT.parse(source)
    assert [part for part in ("|safe", "| safe", "autoescape false") if part in source] == []
    assert "http" not in source


@pytest.mark.parametrize(
    "cells, texts",
    [
        ([1.5, None, 12], ["1.500", "–\u2008\u2007\u2007\u2007", "12\u2008\u2007\u2007\u2007"]),
        ([SignedNumber(0.5), SignedNumber(-1)], ["+0.5000", "−1.000\u2007"]),
        (
            [MeanInterval(1.0, 0.25), MeanInterval(math.nan, math.nan)],
            ["1.000 ± 0.250", "–\u2008\u2007\u2007\u2007" + 7 * "\u2007"],
        ),
        ([MeanInterval(1.0, math.nan)], ["1.000 ± –"]),
    ],
)
def test_numbers_of_a_column_have_their_points_below_each_other(cells, texts):
    assert html.align_numbers(cells) == texts


def test_cells_are_escaped_and_figures_are_not():
    table = html.make_table(
        html.Column("<i>", [html.bold_cell("<b>", sub="<sub>", tag="<tag>"), "<td>"], unit="<u>"),
        html.Column("n", [1, None]),
        row_classes={1: 'x" onclick="y'},
    )
    page = render(
        "{{ ui.table(table) }}{{ ui.figure(picture, '<caption>') }}", table=table, picture=Markup("<svg></svg>")
    )
    for text in ("i", "b", "sub", "tag", "td", "u", "caption"):
        assert f"&lt;{text}&gt;" in page
    assert "<svg></svg>" in page and 'x" onclick' not in page and '<td class="n">–</td>' in page


def test_an_unknown_value_is_an_error_and_none_is_nothing():
    assert render("[{{ value }}]", value=None) == "[]"
    with pytest.raises(jinja2.UndefinedError, match="vlaue"):
        render("{{ vlaue }}", value=1)
