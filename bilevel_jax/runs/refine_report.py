"""The report of `refine`: L_v over rounds with what was accepted, the candidates, responses with their weights."""

from pathlib import Path
from typing import Any

from bilevel_jax.runs import files
from bilevel_jax.runs.figures import Html, element, join, scale
from bilevel_jax.runs.page import (
    NONE,
    Column,
    Signed,
    banner,
    bounded,
    counted,
    details,
    document,
    figure,
    note,
    number,
    paragraph,
    percent,
    table,
    tiles,
)
from bilevel_jax.runs.results import write_page

Row = dict[str, Any]


def write(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_page(folder, page)


def sentence(result: Row) -> str:
    """What came of it: rounds accepted, L_v and right answers on V_report before and after."""
    rounds, held = len(result["records"]), result["report"]
    words = f"{result['accepted']} of {counted('round', rounds)} accepted"
    if held is None:
        return f"{words}; there is no V_report, so nothing that decided no round says whether the model became better."
    if not result["accepted"]:
        return f"{words}: the model is the one that was given (L_v on V_report {held['first']:.4f} {result['unit']})."
    gain, words = held["gain"], f"{words}; L_v on V_report"
    if gain["low"] <= 0 <= gain["high"]:
        words += f" went from {held['first']:.4f} to {held['last']:.4f} {result['unit']}, no clear difference"
    else:
        words += f" {'fell' if gain['value'] > 0 else 'ROSE'} from {held['first']:.4f} to {held['last']:.4f}"
        words += f" {result['unit']}"
    words += f" (gain {gain['value']:+.4f}, 95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})"
    if right := held["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        words += f"; right answers {right['first']:.1%} → {right['last']:.1%} ({low:+.1%} to {high:+.1%})"
    return f"{words}."


def page(name: str, result: Row, config_text: str, environment: Row) -> str:
    """The whole report as HTML."""
    intro = join(
        "bilevel_jax refine, run ",
        element("b", name),
        f". L_v is a model's loss on trusted rows, in {result['unit']}; lower is better. V_fit steers weights, "
        "V_select decides rounds, V_report is read once, at the end.",
    )
    held = result["report"]
    better = bool(held) and result["accepted"] and held["gain"]["low"] > 0
    lead = join(
        element(
            "div",
            element(
                "div",
                banner(
                    "good" if better else "fair",
                    "✓" if better else "?",
                    "Better" if better else "Not shown to be better",
                    paragraph(result["sentence"]),
                    note(protocol(result)),
                ),
                class_="left",
            ),
            figure(
                picture(result),
                "L_v on V_select. Line: the present model, before each round and after the last. Points: candidates; "
                "filled where one was accepted. Bars: 95 % intervals of the paired difference to the present model.",
            ),
            class_="lead",
        ),
        headline(result),
    )
    packages = ", ".join(f"{key} {version}" for key, version in environment["packages"].items() if version)
    sections = [
        ("rounds", "Every round and candidate", rounds(result)),
        ("responses", "Responses of the last round, by weight", examples(result)),
        ("moved", "What was weighted up and down", moved(result)),
        (
            "provenance",
            "Data, and how to see the same numbers",
            join(
                *(paragraph(text) for text in result["notes"]),
                *(paragraph(f"{key}: {text}.") for key, text in result["estimands"].items()),
                element("pre", f"bilevel-jax refine {files.RESOLVED} --out ANOTHER_FOLDER"),
                paragraph(
                    "responses.parquet holds every response: question, round, draw, the model's fingerprint, tokens "
                    "with their log-probabilities, the checker's word, the weight, whether its round was accepted. "
                    "weights.parquet holds the weight of every row in every round."
                ),
                paragraph(f"{', '.join(environment['devices'])}; {environment['platform']}; {packages}."),
                details(f"{files.RESOLVED}, all settings", element("pre", config_text)),
            ),
        ),
    ]
    return document(f"{name}: refine", "What the model gained from its own responses", intro, lead, sections)


def protocol(result: Row) -> str:
    """How a candidate is tested."""
    record = result["records"][0]
    asked = (
        ""
        if not record["questions"]
        else (
            f" In each round {counted('question', record['questions'])} got {counted('response', record['responses'])} "
            "by the model as it then was."
        )
    )
    return (
        f"{counted('training row', result['rows']['train'])}.{asked} A candidate is accepted where the lower bound of "
        f"its gain on {counted('row', result['rows']['select'])} of V_select, by paired bootstrap, is above 0; with "
        f"{counted('look', result['looks'])} in all."
    )


def headline(result: Row) -> Html | None:
    """The numbers on V_report."""
    held = result["report"]
    if held is None:
        return None
    gain = held["gain"]
    shown = [
        ("L_v on V_report, before", number(held["first"]), result["unit"]),
        ("after", number(held["last"]), result["unit"]),
        ("gain", number(gain["value"]), f"{number(gain['low'])} to {number(gain['high'])}"),
    ]
    if right := held["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        shown += [
            ("right answers, before", percent(right["first"]), "greedy, by the checker"),
            ("after", percent(right["last"]), f"{percent(low)} to {percent(high)} more"),
        ]
    return tiles(shown)


# ---- tables


def rounds(result: Row) -> Html:
    """A line per candidate."""
    lines = [(record, one) for record in result["records"] for one in record["candidates"]]
    best = [one["name"] == record["best"] for record, one in lines]
    decided = [("accepted" if record["accepted"] else "kept") if is_best else "" for (record, _), is_best in
               zip(lines, best, strict=True)]  # fmt: skip
    gains = [interval(record["gain"]) if is_best else NONE for (record, _), is_best in zip(lines, best, strict=True)]
    columns = [
        Column("round", [record["step"] for record, _ in lines]),
        Column("candidate", [element("b", one["name"]) for _, one in lines]),
        Column("present L_v", [record["present"] for record, _ in lines], "V_select"),
        Column("its L_v", [one["select"] for _, one in lines], "V_select"),
        Column("gain", gains, "95 % interval", "tight"),
        Column("bound", [Signed(record["bound"]) if is_best else None for (record, _), is_best in
                         zip(lines, best, strict=True)], "one-sided, per look"),
        Column("", decided, "", "tight"),
        Column("responses right", [record["right"] for record, _ in lines], "share, by the checker"),
        Column("ended", [record["ended"] for record, _ in lines], "share of responses"),
        Column("ESS", [record["ess"] for record, _ in lines], "rows, of the best that weighs"),
        Column("passes", [round(one["work"]) for _, one in lines], "training steps"),
        Column("seconds", [round(one["seconds"]) for _, one in lines], "with compilation"),
    ]  # fmt: skip
    marks = {at: "strong" for at, (record, _) in enumerate(lines) if record["accepted"] and best[at]}
    writing = sum(record["seconds_writing"] for record in result["records"])
    total = sum(record["seconds"] for record in result["records"])
    return join(
        table(*columns, marks=marks),
        note(f"All rounds took {total:,.0f} seconds, {writing:,.0f} of them to write responses."),
    )


def examples(result: Row) -> Html:
    """Responses at both ends of the weights."""
    shown = result["examples"]
    if not shown:
        return paragraph("No responses were written: refine.questions is none.")
    columns = [
        Column("weight", [one["weight"] for one in shown]),
        Column("question", [bounded(one["question"]) for one in shown]),
        Column("response", [bounded(one["text"] or "(nothing)") for one in shown]),
        Column("offline row says", [bounded(one["offline"]) for one in shown]),
    ]
    if any(one["label"] for one in shown):
        columns.append(Column("its label", [one["label"] or NONE for one in shown]))
    if any(one["checker"] is not None for one in shown):
        columns.append(Column("checker", [one["checker"] for one in shown]))
    columns += [
        Column("log-probability", [one["log_prob"] for one in shown], "nats, when written"),
        Column("ended", ["yes" if one["ended"] else "cut" for one in shown]),
        Column("id", [element("code", one["id"]) for one in shown], "question / round / draw"),
    ]
    return table(*columns)


def moved(result: Row) -> Html:
    """Mean weights by kind of row and round."""
    kinds = list(dict.fromkeys(one["kind"] for one in result["moved"]))
    count = len(result["records"])
    known = {(one["round"], one["kind"]): one for one in result["moved"]}

    def cell(at: int, kind: str) -> float | None:
        return known[at, kind]["weight"] if (at, kind) in known else None

    return join(
        table(
            Column("rows", [element("b", kind) for kind in kinds]),
            Column("how many", [known.get((count - 1, kind), {}).get("rows") for kind in kinds], "in the last round"),
            *(Column(f"round {at}", [cell(at, kind) for kind in kinds], "mean weight") for at in range(count)),
        ),
        note(
            "By the best candidate that weighs rows; 1 throughout where none does. Offline rows by their label where "
            "labels are known, responses by the checker where there is one: neither was seen in training."
        ),
    )


def interval(one: Row) -> str:
    """A gain with its interval."""
    return f"{one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]".replace("-", "−")


# ---- the picture


def picture(result: Row) -> Html:
    """L_v on V_select: the present model as a line of steps, candidates as points with paired intervals."""
    left, right, top, bottom = 58, 520, 14, 250
    records = result["records"]
    after = [
        next(one["select"] for one in record["candidates"] if one["name"] == record["best"])
        if record["accepted"]
        else record["present"]
        for record in records
    ]
    ends = [end for record in records for end in _ends(record)]
    values = [*ends, *after, *(one["select"] for record in records for one in record["candidates"])]
    y = scale([*values, *(record["present"] for record in records)], bottom, top)
    x = scale([-0.5, len(records) - 0.5 + 0.3], left, right, margin=0)
    parts = []
    for tick in y.ticks():
        parts.append(_line(left, y(tick), right, y(tick), "grid"))
        parts.append(element("text", f"{tick:.6g}", x=left - 6, y=_n(y(tick) + 4), class_="tick end"))
    for at, (record, end) in enumerate(zip(records, after, strict=True)):
        parts.append(element("text", str(record["step"]), x=_n(x(at)), y=bottom + 16, class_="tick middle"))
        parts.append(_line(x(at - 0.5), y(record["present"]), x(at + 0.2), y(record["present"]), "line k0"))
        parts.append(_line(x(at + 0.2), y(record["present"]), x(at + 0.5), y(end), "line k0"))
        count = len(record["candidates"])
        for place, one in enumerate(record["candidates"]):
            here = x(at + 0.2 + 0.12 * (place - (count - 1) / 2))
            chosen = one["name"] == record["best"]
            if chosen:
                low, high = _ends(record)
                parts.append(_line(here, y(low), here, y(high), "whisker k1"))
            kind = "dot k3" if chosen and record["accepted"] else "hollow k1" if chosen else "faint k5"
            title = element("title", f"{one['name']} {one['select']:.4f}")
            parts.append(element("circle", title, cx=_n(here), cy=_n(y(one["select"])), r=4.5, class_=kind))
        word = "accepted" if record["accepted"] else "kept"
        parts.append(element("text", word, x=_n(x(at)), y=bottom + 30, class_="tick middle"))
    parts.append(element("text", "round", x=(left + right) / 2, y=bottom + 46, class_="tick middle"))
    words = "; ".join(
        f"round {record['step']}: present {record['present']:.4g}, best {end:.4g}"
        for record, end in zip(records, after, strict=True)
    )
    return element("svg", *parts, viewBox=f"0 0 {right} {bottom + 54}", role="img", aria_label=words)


def _ends(record: Row) -> tuple[float, float]:
    """The interval of the best candidate's L_v, as the present one's minus the interval of the gain."""
    return record["present"] - record["gain"]["high"], record["present"] - record["gain"]["low"]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=kind)


def _n(value: float) -> str:
    return f"{value:.1f}"
