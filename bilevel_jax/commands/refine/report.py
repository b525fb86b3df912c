"""The report of `refine`: L_v over rounds with what was accepted, the candidates, responses with their weights."""

from pathlib import Path
from typing import Any

from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report.figures import Html, html_element, join_html, make_scale
from bilevel_jax.runs.report.html import (
    Column,
    html_details,
    html_document,
    html_figure,
    html_note,
    html_paragraph,
    html_table,
    isolate_text,
    number_tiles,
    verdict_banner,
)
from bilevel_jax.runs.report.numbers import MISSING, SignedNumber, format_count, format_number, format_percent
from bilevel_jax.runs.report.results import write_report

JsonObject = dict[str, Any]


def write_refine_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_refine_report)


def summarize_refinement(result: JsonObject) -> str:
    """What came of it: rounds accepted, L_v and right answers on test before and after."""
    num_rounds, test_result = len(result["records"]), result["test"]
    words = f"{result['accepted']} of {format_count('round', num_rounds)} accepted"
    if test_result is None:
        return f"{words}; there is no test, so nothing that decided no round says whether the model became better."
    if not result["accepted"]:
        return f"{words}: the model is the one that was given (test loss {test_result['first']:.4f} {result['unit']})."
    gain, words = test_result["gain"], f"{words}; test loss"
    if gain["low"] <= 0 <= gain["high"]:
        words += (
            f" went from {test_result['first']:.4f} to {test_result['last']:.4f} {result['unit']}, no clear difference"
        )
    else:
        words += (
            f" {'fell' if gain['value'] > 0 else 'ROSE'} from {test_result['first']:.4f} to {test_result['last']:.4f}"
        )
        words += f" {result['unit']}"
    words += f" (gain {gain['value']:+.4f}, 95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})"
    if right := test_result["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        words += f"; right answers {right['first']:.1%} → {right['last']:.1%} ({low:+.1%} to {high:+.1%})"
    return f"{words}."


def render_refine_report(name: str, result: JsonObject, config_text: str, environment: JsonObject) -> str:
    """The whole report as HTML."""
    intro = join_html(
        "bilevel_jax refine, run ",
        html_element("b", name),
        f". L_v is a model's loss on validation examples, in {result['unit']}; lower is better. validation steers weights, "
        "dev decides rounds, test is read once, at the end.",
    )
    test_result = result["test"]
    better = bool(test_result) and result["accepted"] and test_result["gain"]["low"] > 0
    lead = join_html(
        html_element(
            "div",
            html_element(
                "div",
                verdict_banner(
                    "good" if better else "fair",
                    "✓" if better else "?",
                    "Better" if better else "Not shown to be better",
                    html_paragraph(result["sentence"]),
                    html_note(describe_protocol(result)),
                ),
                class_="left",
            ),
            html_figure(
                plot_rounds(result),
                "dev loss. Line: the present model, before each round and after the last. Points: candidates; "
                "filled where one was accepted. Bars: 95 % intervals of the paired difference to the present model.",
            ),
            class_="lead",
        ),
        render_test_numbers(result),
    )
    packages = ", ".join(f"{key} {version}" for key, version in environment["packages"].items() if version)
    sections = [
        ("rounds", "Every round and candidate", render_rounds(result)),
        ("responses", "Responses of the last round, by weight", render_examples(result)),
        ("moved", "What was weighted up and down", render_mean_weights(result)),
        (
            "provenance",
            "Data, and how to see the same numbers",
            join_html(
                *(html_paragraph(text) for text in result["notes"]),
                *(html_paragraph(f"{key}: {text}.") for key, text in result["estimands"].items()),
                html_element("pre", f"bilevel-jax refine {run_dir.CONFIG_FILE} --out ANOTHER_FOLDER"),
                html_paragraph(
                    "responses.parquet holds every response: question, round, draw, the model's fingerprint, tokens "
                    "with their log-probabilities, the checker's word, the weight, whether its round was accepted. "
                    "weights.parquet holds the weight of every row in every round."
                ),
                html_paragraph(f"{', '.join(environment['devices'])}; {environment['platform']}; {packages}."),
                html_details(f"{run_dir.CONFIG_FILE}, all settings", html_element("pre", config_text)),
            ),
        ),
    ]
    return html_document(f"{name}: refine", "What the model gained from its own responses", intro, lead, sections)


def describe_protocol(result: JsonObject) -> str:
    """How a candidate is tested."""
    record = result["records"][0]
    rollout_text = (
        ""
        if not record["questions"]
        else (
            f" In each round {format_count('question', record['questions'])} got {format_count('response', record['responses'])} "
            "by the model as it then was."
        )
    )
    return (
        f"{format_count('training example', result['rows']['train'])}.{rollout_text} A candidate is accepted where the lower bound of "
        f"its gain on {format_count('row', result['rows']['dev'])} of dev, by paired bootstrap, is above 0; with "
        f"{format_count('look', result['looks'])} in all."
    )


def render_test_numbers(result: JsonObject) -> Html | None:
    """The numbers on test."""
    test_result = result["test"]
    if test_result is None:
        return None
    gain = test_result["gain"]
    cells = [
        ("test loss, before", format_number(test_result["first"]), result["unit"]),
        ("after", format_number(test_result["last"]), result["unit"]),
        ("gain", format_number(gain["value"]), f"{format_number(gain['low'])} to {format_number(gain['high'])}"),
    ]
    if right := test_result["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        cells += [
            ("right answers, before", format_percent(right["first"]), "greedy, by the checker"),
            ("after", format_percent(right["last"]), f"{format_percent(low)} to {format_percent(high)} more"),
        ]
    return number_tiles(cells)


# ---- tables


def render_rounds(result: JsonObject) -> Html:
    """A line per candidate."""
    lines = [(record, candidate) for record in result["records"] for candidate in record["candidates"]]
    best = [candidate["name"] == record["best"] for record, candidate in lines]
    decided = [("accepted" if record["accepted"] else "kept") if is_best else "" for (record, _), is_best in
               zip(lines, best, strict=True)]  # fmt: skip
    gains = [
        format_gain(record["gain"]) if is_best else MISSING for (record, _), is_best in zip(lines, best, strict=True)
    ]
    columns = [
        Column("round", [record["step"] for record, _ in lines]),
        Column("candidate", [html_element("b", candidate["name"]) for _, candidate in lines]),
        Column("present L_v", [record["present"] for record, _ in lines], "dev"),
        Column("its L_v", [candidate["dev"] for _, candidate in lines], "dev"),
        Column("gain", gains, "95 % interval", "tight"),
        Column("bound", [SignedNumber(record["bound"]) if is_best else None for (record, _), is_best in
                         zip(lines, best, strict=True)], "one-sided, per look"),
        Column("", decided, "", "tight"),
        Column("responses right", [record["right"] for record, _ in lines], "share, by the checker"),
        Column("ended", [record["ended"] for record, _ in lines], "share of responses"),
        Column("ESS", [record["ess"] for record, _ in lines], "rows, of the best that weighs"),
        Column("passes", [round(candidate["work"]) for _, candidate in lines], "training steps"),
        Column("seconds", [round(candidate["seconds"]) for _, candidate in lines], "with compilation"),
    ]  # fmt: skip
    marks = {at: "strong" for at, (record, _) in enumerate(lines) if record["accepted"] and best[at]}
    writing = sum(record["seconds_writing"] for record in result["records"])
    total = sum(record["seconds"] for record in result["records"])
    return join_html(
        html_table(*columns, row_classes=marks),
        html_note(f"All rounds took {total:,.0f} seconds, {writing:,.0f} of them to write responses."),
    )


def render_examples(result: JsonObject) -> Html:
    """Responses at both ends of the weights."""
    responses = result["examples"]
    if not responses:
        return html_paragraph("No responses were written: refine.questions is none.")
    columns = [
        Column("weight", [response["weight"] for response in responses]),
        Column("question", [isolate_text(response["question"]) for response in responses]),
        Column("response", [isolate_text(response["text"] or "(nothing)") for response in responses]),
        Column("offline row says", [isolate_text(response["offline"]) for response in responses]),
    ]
    if any(response["label"] for response in responses):
        columns.append(Column("its label", [response["label"] or MISSING for response in responses]))
    if any(response["checker"] is not None for response in responses):
        columns.append(Column("checker", [response["checker"] for response in responses]))
    columns += [
        Column("log-probability", [response["log_prob"] for response in responses], "nats, when written"),
        Column("ended", ["yes" if response["ended"] else "cut" for response in responses]),
        Column("id", [html_element("code", response["id"]) for response in responses], "question / round / draw"),
    ]
    return html_table(*columns)


def render_mean_weights(result: JsonObject) -> Html:
    """Mean weights by kind of row and round."""
    kinds = list(dict.fromkeys(item["kind"] for item in result["moved"]))
    count = len(result["records"])
    by_round_and_kind = {(item["round"], item["kind"]): item for item in result["moved"]}

    def cell(at: int, kind: str) -> float | None:
        return by_round_and_kind[at, kind]["weight"] if (at, kind) in by_round_and_kind else None

    return join_html(
        html_table(
            Column("rows", [html_element("b", kind) for kind in kinds]),
            Column(
                "how many",
                [by_round_and_kind.get((count - 1, kind), {}).get("rows") for kind in kinds],
                "in the last round",
            ),
            *(Column(f"round {at}", [cell(at, kind) for kind in kinds], "mean weight") for at in range(count)),
        ),
        html_note(
            "By the best candidate that weighs rows; 1 throughout where none does. Offline rows by their label where "
            "labels are known, responses by the checker where there is one: neither was seen in training."
        ),
    )


def format_gain(gain: JsonObject) -> str:
    """A gain with its interval."""
    return f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]".replace("-", "−")


# ---- the picture


def plot_rounds(result: JsonObject) -> Html:
    """dev loss: the present model as a line of steps, candidates as points with paired intervals."""
    left, right, top, bottom = 58, 520, 14, 250
    records = result["records"]
    after = [
        next(one["dev"] for one in record["candidates"] if one["name"] == record["best"])
        if record["accepted"]
        else record["present"]
        for record in records
    ]
    ends = [end for record in records for end in _candidate_interval(record)]
    values = [*ends, *after, *(candidate["dev"] for record in records for candidate in record["candidates"])]
    y = make_scale([*values, *(record["present"] for record in records)], bottom, top)
    x = make_scale([-0.5, len(records) - 0.5 + 0.3], left, right, margin=0)
    parts = []
    for tick in y.ticks():
        parts.append(_svg_line(left, y(tick), right, y(tick), "grid"))
        parts.append(
            html_element("text", f"{tick:.6g}", x=left - 6, y=_format_coordinate(y(tick) + 4), class_="tick end")
        )
    for at, (record, end) in enumerate(zip(records, after, strict=True)):
        parts.append(
            html_element("text", str(record["step"]), x=_format_coordinate(x(at)), y=bottom + 16, class_="tick middle")
        )
        parts.append(_svg_line(x(at - 0.5), y(record["present"]), x(at + 0.2), y(record["present"]), "line k0"))
        parts.append(_svg_line(x(at + 0.2), y(record["present"]), x(at + 0.5), y(end), "line k0"))
        count = len(record["candidates"])
        for place, candidate in enumerate(record["candidates"]):
            point_x = x(at + 0.2 + 0.12 * (place - (count - 1) / 2))
            is_best = candidate["name"] == record["best"]
            if is_best:
                low, high = _candidate_interval(record)
                parts.append(_svg_line(point_x, y(low), point_x, y(high), "whisker k1"))
            kind = "dot k3" if is_best and record["accepted"] else "hollow k1" if is_best else "faint k5"
            title = html_element("title", f"{candidate['name']} {candidate['dev']:.4f}")
            parts.append(
                html_element(
                    "circle",
                    title,
                    cx=_format_coordinate(point_x),
                    cy=_format_coordinate(y(candidate["dev"])),
                    r=4.5,
                    class_=kind,
                )
            )
        word = "accepted" if record["accepted"] else "kept"
        parts.append(html_element("text", word, x=_format_coordinate(x(at)), y=bottom + 30, class_="tick middle"))
    parts.append(html_element("text", "round", x=(left + right) / 2, y=bottom + 46, class_="tick middle"))
    words = "; ".join(
        f"round {record['step']}: present {record['present']:.4g}, best {end:.4g}"
        for record, end in zip(records, after, strict=True)
    )
    return html_element("svg", *parts, viewBox=f"0 0 {right} {bottom + 54}", role="img", aria_label=words)


def _candidate_interval(record: JsonObject) -> tuple[float, float]:
    """The interval of the best candidate's L_v, as the present one's minus the interval of the gain."""
    return record["present"] - record["gain"]["high"], record["present"] - record["gain"]["low"]


def _svg_line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return html_element(
        "line",
        x1=_format_coordinate(x1),
        y1=_format_coordinate(y1),
        x2=_format_coordinate(x2),
        y2=_format_coordinate(y2),
        class_=kind,
    )


def _format_coordinate(value: float) -> str:
    return f"{value:.1f}"
