"""HTML pages and tables, rendered from jinja2 templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report.numbers import (
    MISSING,
    MeanInterval,
    SignedNumber,
    capitalize_first,
    format_interval,
    format_number,
    format_percent,
    format_signed,
)
from bilevel_jax.runs.terminal import show_control_characters

FIGURE_SPACE, POINT_SPACE = "\u2007", "\u2008"
"""Spaces as wide as a digit and as a point."""


class Cell(NamedTuple):
    """A cell of a table: its text within an element, more text, a tag, and a line of small print."""

    text: str
    element: str = ""
    css_class: str = ""
    rest: str = ""
    tag: str = ""
    sub: str = ""


class Column(NamedTuple):
    """A column of a table: numbers are aligned at their points, the rest stands left."""

    heading: str
    cells: Sequence[Any]
    """Numbers, `MeanInterval`, text, `Cell` or None."""
    unit: str = ""
    css_class: str = ""
    """Class of its cells; numbers have their own."""


class Table(NamedTuple):
    """What the template of a table needs."""

    heads: list[tuple[str, str, str]]
    """(heading, unit, class) of each column."""
    rows: list[tuple[str, list[tuple[Cell, str]]]]
    """(class, cells with their classes) of each row."""
    css_class: str

    @property
    def has_heads(self) -> bool:
        """Whether any column has a heading."""
        return any(heading for heading, _, _ in self.heads)


def render_page(template: str, **values: Any) -> str:
    """A whole page from a template and its values; all text is escaped, and control characters are made visible."""
    page = ENVIRONMENT.get_template(template).render(**values)
    return show_control_characters(page)


def read_stylesheet() -> str:
    """The style of all pages."""
    return (Path(__file__).parent / "templates" / "style.css").read_text("utf-8")


def make_table(*columns: Column, row_classes: Mapping[int, str] | None = None, css_class: str = "") -> Table:
    """A table of columns; `row_classes` are classes by index of the row."""
    numeric = [
        all(cell is None or isinstance(cell, int | float | np.number | MeanInterval) for cell in column.cells)
        for column in columns
    ]
    kinds = ["n" if is_number else column.css_class for column, is_number in zip(columns, numeric, strict=True)]
    cells = [
        align_numbers(column.cells) if is_number else column.cells
        for column, is_number in zip(columns, numeric, strict=True)
    ]
    return Table(
        [(column.heading, column.unit, kind) for column, kind in zip(columns, kinds, strict=True)],
        [
            (
                (row_classes or {}).get(index, ""),
                [
                    (cell if isinstance(cell, Cell) else Cell(cell or ""), kind)
                    for cell, kind in zip(row, kinds, strict=True)
                ],
            )
            for index, row in enumerate(zip(*cells, strict=True))
        ],
        css_class,
    )


def bold_cell(text: str, *, sub: str = "", tag: str = "") -> Cell:
    """A name in bold, with a tag and a line of small print."""
    return Cell(text, "b", tag=tag, sub=sub)


def isolated_cell(text: str) -> Cell:
    """The beginning of foreign text, set apart so that its direction cannot spill over."""
    return Cell(shorten_text(text, 80), "bdi")


def align_numbers(cells: Sequence[Any]) -> list[str]:
    """Numbers of one column as text, padded after the point so that their points stand below each other."""
    means = _pad_numbers([cell.mean if isinstance(cell, MeanInterval) else cell for cell in cells])
    if not any(isinstance(cell, MeanInterval) for cell in cells):
        return means
    halves = _pad_numbers([cell.half_width if isinstance(cell, MeanInterval) else None for cell in cells], 3)
    blank = FIGURE_SPACE * (len(halves[0]) + 2)  # as wide as the interval and its sign
    return [
        mean + blank if mean.strip(FIGURE_SPACE + POINT_SPACE) == MISSING else f"{mean} ± {half}"
        for mean, half in zip(means, halves, strict=True)
    ]


def _pad_numbers(values: Sequence[Any], digits: int = 4) -> list[str]:
    texts = [
        format_signed(value) if isinstance(value, SignedNumber) else format_number(value, digits) for value in values
    ]
    after = [len(text.partition(".")[2]) for text in texts]
    longest = max(after, default=0)
    return [
        text + (POINT_SPACE if longest and not size else "") + FIGURE_SPACE * (longest - size)
        for text, size in zip(texts, after, strict=True)
    ]


def shorten_text(text: str, max_characters: int) -> str:
    """The text, or its beginning and how long it is."""
    return text if len(text) <= max_characters else f"{text[:max_characters]}… ({len(text):,} characters)"


def format_versions(packages: Mapping[str, str | None]) -> str:
    """The packages that are installed, with their versions."""
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("bilevel_jax.runs.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: "" if value is None else value,
)
ENVIRONMENT.filters |= {
    "capital": capitalize_first,
    "count": lambda count, noun: format_count(noun, count),
    "interval": format_interval,
    "merge": lambda first, second: {**first, **second},
    "number": format_number,
    "percent": format_percent,
    "repr": repr,
    "shorten": shorten_text,
    "signed": format_signed,
    "versions": format_versions,
}
ENVIRONMENT.globals["config_file"] = run_dir.CONFIG_FILE
