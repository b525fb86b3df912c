"""What the pages of all reports are made of: sections, tables, figures, boxes, numbers in words, the style."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.commands.estimate.table import compare_usage
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.figures import Html, html_element, join_html
from bilevel_jax.runs.report.numbers import MISSING, MeanInterval, SignedNumber, format_number, format_signed
from bilevel_jax.runs.report.results import RunResults


class Column(NamedTuple):
    """A column of a table: numbers are aligned at their points, the rest stands left."""

    heading: str
    cells: Sequence[Any]
    unit: str = ""
    css_class: str | None = None
    """Class of its cells; numbers have their own."""


def html_document(title: str, heading: str, intro: Html, lead: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """A whole page: heading, introduction, what leads, and sections (anchor, title, content) with links to them."""
    links = [join_html(html_element("a", name, href=f"#{key}"), " ") for key, name, _ in sections]
    body = html_element(
        "main",
        html_element("header", html_element("h1", heading), html_element("p", intro), class_="top"),
        lead,
        html_element("nav", *links, aria_label="sections"),
        *(html_element("section", html_element("h2", name), content, id=key) for key, name, content in sections),
    )
    head = join_html(
        html_element("meta", charset="utf-8"),
        html_element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        html_element("meta", name="color-scheme", content="light dark"),
        html_element("title", title),
        Html(f"<style>{PAGE_STYLE}{figures.FIGURE_STYLE}</style>"),
    )
    return (
        f"<!doctype html>\n{html_element('html', html_element('head', head), html_element('body', body), lang='en')}\n"
    )


def verdict_banner(kind: str, icon: str, level: str, *content: Html | None) -> Html:
    """The box that is read first; its kind is good, fair or bad."""
    head = html_element("p", html_element("span", icon, class_="icon", aria_hidden="true"), level, class_="level")
    return html_element("div", head, *content, class_=f"verdict {kind}")


def number_tiles(numbers: Sequence[tuple[str, str, str]]) -> Html:
    """Headline numbers in boxes: (what, number, unit)."""
    boxes = (
        html_element(
            "div",
            html_element("span", head),
            _headline_number(value),
            html_element("span", unit, class_="unit"),
            class_="tile",
        )
        for head, value, unit in numbers
    )
    return html_element("div", *boxes, class_="tiles")


def html_table(*columns: Column, row_classes: dict[int, str] | None = None, css_class: str = "") -> Html:
    """Columns side by side; a row's mark is its class."""
    row_classes = row_classes or {}
    numeric = [
        all(cell is None or isinstance(cell, int | float | np.number | MeanInterval) for cell in column.cells)
        for column in columns
    ]
    kinds = ["n" if number else column.css_class for column, number in zip(columns, numeric, strict=True)]
    cells = [
        _align_numbers(column.cells) if number else column.cells
        for column, number in zip(columns, numeric, strict=True)
    ]
    heads = [
        html_element(
            "th",
            column.heading,
            html_element("span", column.unit, class_="unit") if column.unit else None,
            class_=kind,
            scope="col",
        )
        for column, kind in zip(columns, kinds, strict=True)
    ]
    body = [
        html_element(
            "tr",
            *(html_element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)),
            class_=row_classes.get(index),
        )
        for index, row in enumerate(zip(*cells, strict=True))
    ]
    head = html_element("thead", html_element("tr", *heads)) if any(column.heading for column in columns) else None
    return html_element(
        "div", html_element("table", head, html_element("tbody", *body), class_=css_class or None), class_="scroll"
    )


def _align_numbers(cells: Sequence[Any]) -> list[str]:
    """Numbers of one column, padded after the point so that their points stand below each other."""
    means = _pad_numbers([cell.mean if isinstance(cell, MeanInterval) else cell for cell in cells])
    if not any(isinstance(cell, MeanInterval) for cell in cells):
        return means
    halves = _pad_numbers([cell.half_width if isinstance(cell, MeanInterval) else None for cell in cells], 3)
    return [f"{mean} ± {half}" for mean, half in zip(means, halves, strict=True)]


def _pad_numbers(values: Sequence[Any], digits: int = 4) -> list[str]:
    texts = [
        format_signed(value) if isinstance(value, SignedNumber) else format_number(value, digits) for value in values
    ]
    after = [len(text.partition(".")[2]) for text in texts]
    longest = max(after, default=0)
    figure_space, point_space = "\u2007", "\u2008"
    return [
        text + (point_space if longest and not size else "") + figure_space * (longest - size)
        for text, size in zip(texts, after, strict=True)
    ]


def html_paragraph(*children: str | None) -> Html:
    """A paragraph."""
    return html_element("p", *children)


def html_note(text: str, kind: str = "") -> Html:
    """A remark in small print, or a warning."""
    return html_element("p", text, class_=f"note {kind}".strip())


def html_details(summary: str, content: Html) -> Html:
    """Content that is folded away until it is asked for."""
    return html_element("details", html_element("summary", summary), content)


def html_figure(picture: Html, caption: str, *, wide: bool = False) -> Html:
    """A picture with its caption."""
    return html_element("figure", picture, html_element("figcaption", caption), class_="wide" if wide else None)


def _headline_number(value: str) -> Html:
    mean, sign, half = value.partition(" ± ")
    return html_element("b", mean, html_element("small", f" ± {half}") if sign else None)


def render_usage(run: RunResults) -> Html | None:
    """What the run was expected to take, by sizes alone, beside what it took; runs of before that have none."""
    if "measured" not in run.result:
        return None
    lines = compare_usage(run.result["estimate"], run.result["measured"])
    names, expected, measured, notes = zip(*lines, strict=True)
    return join_html(
        html_element("h3", "Estimated and measured"),
        html_table(
            Column("what", names), Column("estimated", expected), Column("measured", measured), Column("", notes)
        ),
    )


def render_reproduction(run: RunResults, command: str, precision: str) -> Html:
    """The command, the environment, the columns and the settings: what another person needs to see the same."""
    environment, arguments = run.environment, run.environment["command"]
    packages, kinds = environment["packages"], environment["devices"]
    devices = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    facts = {
        "commit": environment["commit"] or f"{MISSING} (not a git checkout)",
        "config hash": run.result["config_hash"],
        "device": f"{devices} ({environment['backend']}), processes: {environment['processes']}",
        "precision": precision,
        "platform": f"Python {environment['python']}, {environment['platform']}",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
    }
    columns = {name: meaning for name, meaning in run.column_meanings.items() if name in run.columns}
    return join_html(
        html_element("h3", "Run it again"),
        html_paragraph("As it was started:"),
        html_element(
            "pre", shlex.join(["bilevel-jax" if _is_console_script(arguments[0]) else arguments[0], *arguments[1:]])
        ),
        html_paragraph("From this folder alone, with every setting written out:"),
        html_element("pre", f"bilevel-jax {command} {run_dir.CONFIG_FILE} --out ANOTHER_FOLDER"),
        html_table(
            Column("", [html_element("b", key) for key in facts]), Column("", list(facts.values())), css_class="facts"
        ),
        html_details(
            "Columns of weights.parquet, joined by id",
            html_table(Column("column", list(columns)), Column("meaning", list(columns.values())), css_class="facts"),
        ),
        html_details(f"{run_dir.CONFIG_FILE}, all settings", html_element("pre", run.config_text)),
    )


def _is_console_script(program: str) -> bool:
    return Path(program).name in ("bilevel-jax", "cli.py", "__main__.py")


def truncate_text(text: str, max_characters: int) -> str:
    """The text, or its beginning and how long it is."""
    return text if len(text) <= max_characters else f"{text[:max_characters]}… ({len(text):,} characters)"


def isolate_text(text: str, *, keep_end: bool = False) -> Html:
    """A short piece of foreign text, set apart so that its direction cannot spill; `end` keeps the end of a path."""
    if keep_end and len(text) > 120:
        return html_element("bdi", f"…{text[-120:]}", title=text[:1000])
    return html_element("bdi", truncate_text(text, 80))


PAGE_STYLE = """
:root {
  color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  --page: #ffffff; --panel: #f7f8fa; --ink: #1b2330; --muted: #586474; --rule: #dfe3e9; --link: #1f5fae;
  --good: #1a7f37; --good-soft: #e7f5ea; --fair: #8f5f00; --fair-soft: #fdf3d8; --bad: #b42318; --bad-soft: #fdebe9;
  --c0: #2166ac; --c1: #d06a12; --c2: #7a3f98; --c3: #2f8f83; --c4: #b23a6b; --c5: #6b7280;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --panel: #1a2027; --ink: #e5e9ee; --muted: #9ca8b5; --rule: #303943; --link: #86b7f2;
    --good: #56c271; --good-soft: #14291a; --fair: #e3b341; --fair-soft: #2b2410; --bad: #ff8a80; --bad-soft: #341a18;
    --c0: #6cb0f5; --c1: #f0994b; --c2: #c79be0; --c3: #5fc7ba; --c4: #ee86b0; --c5: #a3adb8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font);
  font-variant-numeric: tabular-nums; }
main { max-width: 1140px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 25px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 20px; margin: 0 0 8px; }
h3 { font-size: 16px; margin: 24px 0 6px; }
p { margin: 8px 0; max-width: 78ch; } a { color: var(--link); } .top p { color: var(--muted); margin: 0 0 18px; }
section { margin-top: 34px; padding-top: 22px; border-top: 1px solid var(--rule); }
nav { margin-top: 20px; font-size: 14px; } nav a { margin-right: 18px; white-space: nowrap; display: inline-block; }
.lead { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 20px; align-items: stretch; }
.verdict { padding: 18px 22px; border-radius: 10px; border: 1px solid var(--v); border-left-width: 8px;
  background: var(--soft); }
.verdict .level { font-size: 27px; font-weight: 750; line-height: 1.15; color: var(--v); margin: 0 0 10px;
  letter-spacing: .01em; }
.verdict .scope { font-size: 17px; font-weight: 600; margin-top: -6px; }
.icon { display: inline-grid; place-content: center; width: 34px; height: 34px; margin-right: 12px; border-radius: 50%;
  background: var(--v); color: var(--soft); font-size: 20px; vertical-align: 2px; }
.good { --v: var(--good); --soft: var(--good-soft); } .fair { --v: var(--fair); --soft: var(--fair-soft); }
.bad { --v: var(--bad); --soft: var(--bad-soft); }
.pictures { display: grid; gap: 12px; align-content: start; } .pair { display: grid;
  grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px; background: var(--panel); border: 1px solid var(--rule); border-radius: 10px; }
figure.wide { margin-top: 16px; } figure.wide svg { max-width: 840px; } section > figure { margin-top: 16px;
  max-width: 640px; }
section > figure.wide { max-width: none; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.4; margin-top: 6px; }
.left { display: flex; flex-direction: column; } .left .verdict { flex: 1; }
.headline { font-size: 17px; line-height: 1.4; margin: 0; padding: 14px 22px; border: 1px solid var(--rule);
  border-radius: 10px; background: var(--panel); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin-top: 16px; }
.tile { padding: 10px 14px; background: var(--panel); border: 1px solid var(--rule); border-radius: 10px;
  font-size: 13px; line-height: 1.35; }
.tile span { display: block; color: var(--muted); } .tile b { display: block; font-size: 20px; margin: 3px 0 1px;
  white-space: nowrap; }
.tile small { font-size: 13px; font-weight: 500; }
.note { color: var(--muted); font-size: 13px; } .warning { color: var(--ink); font-size: 15px; padding: 10px 14px;
  max-width: none;
  border-left: 5px solid var(--fair); background: var(--fair-soft); border-radius: 6px; }
.scroll { overflow-x: auto; margin: 10px 0; } table { border-collapse: collapse; font-size: 14px; }
th { font-weight: 600; text-align: left; vertical-align: bottom; font-size: 13px;
  border-bottom: 2px solid var(--rule); }
th, td { padding: 5px 16px 5px 0; } td { vertical-align: top; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere; }
.n { text-align: right; } td.n, td.tight { white-space: nowrap; } .unit, .sub { display: block; }
.line { margin-right: 14px; display: inline-block; }
.unit { font-weight: 400; color: var(--muted); font-size: 12px; max-width: 20ch; }
th.n .unit { margin-left: auto; } .sub { color: var(--muted); font-size: 12px; line-height: 1.35; }
tr.strong td { background: var(--panel); } tr.oracle td { border-bottom: 2px solid var(--muted); }
td:first-child, th:first-child { padding-left: 8px; }
.tag { margin-left: 8px; padding: 0 7px; border: 1px solid var(--muted); border-radius: 9px; color: var(--muted);
  font-size: 11px; white-space: nowrap; }
.checks td:nth-last-child(-n+2) { color: var(--muted); font-size: 13px; min-width: 130px; }
.checks td { overflow-wrap: normal; }
.bench td:first-child { min-width: 130px; overflow-wrap: normal; }
.checks .figure { white-space: nowrap; color: var(--v, inherit); font-weight: 500; } .badge { color: var(--v);
  font-weight: 700; font-size: 13px; }
.examples { width: 100%; table-layout: fixed; } .examples th:nth-child(1) { width: 76px; }
.examples th:nth-child(2) { width: 122px; } .examples th:nth-child(3) { width: 250px; }
.examples.short th:nth-child(1) { width: 92px; }
.examples.short th:nth-child(2) { width: 250px; } .examples.short th:nth-child(3) { width: auto; }
.role.good, .role.bad { color: var(--v); font-weight: 600; }
.turn { display: grid; grid-template-columns: 68px minmax(0, 1fr); gap: 8px; } .role { color: var(--muted);
  font-size: 12px; line-height: 21px; }
.content { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: 13px/21px var(--mono); }
pre { padding: 10px 14px; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  font: 13px/1.45 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--link); } ul { padding-left: 20px; }
li { overflow-wrap: anywhere; }
@media (max-width: 820px) { .lead, .pair { grid-template-columns: minmax(0, 1fr); } main { padding: 16px 12px 40px; }
  .examples th:nth-child(3) { width: 130px; } .turn { grid-template-columns: minmax(0, 1fr); gap: 0; } }
@media print {
  details::details-content { content-visibility: visible; block-size: auto; }
  main { max-width: none; padding: 0; } nav { display: none; } body { font-size: 12px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
  figure, tr, .tile, .verdict { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  table, th { font-size: 11px; } th, td { padding-right: 9px; } .sub, .unit, .note, figcaption { font-size: 10px; }
}
"""
