"""The report page of a `refine` run."""

from pathlib import Path
from typing import Any

from bilevel_jax.runs.report.figures import Html, html_element, make_scale
from bilevel_jax.runs.report.html import Cell, Column, Table, bold_cell, isolated_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import MISSING, SignedNumber, format_count, format_number, format_percent
from bilevel_jax.runs.report.results import write_report

JsonObject = dict[str, Any]


def write_refine_report(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    return write_report(folder, render_refine_report)


def summarize_refinement(result: JsonObject) -> str:
    """Rounds accepted, and loss and right answers on test before and after."""
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
    test_result = result["test"]
    return render_page(
        "refine.html",
        name=name,
        result=result,
        config_text=config_text,
        environment=environment,
        better=bool(test_result) and result["accepted"] and test_result["gain"]["low"] > 0,
        first=result["records"][0],
        picture=plot_rounds(result),
        test_numbers=list_test_numbers(result),
        rounds=rounds_table(result),
        responses=responses_table(result) if result["examples"] else None,
        mean_weights=mean_weights_table(result),
    )


def list_test_numbers(result: JsonObject) -> list[tuple[str, str, str]]:
    """The numbers on test: (what, number, unit); none where there is no test."""
    test_result = result["test"]
    if test_result is None:
        return []
    gain = test_result["gain"]
    numbers = [
        ("test loss, before", format_number(test_result["first"]), result["unit"]),
        ("after", format_number(test_result["last"]), result["unit"]),
        ("gain", format_number(gain["value"]), f"{format_number(gain['low'])} to {format_number(gain['high'])}"),
    ]
    if right := test_result["right"]:
        low, high = right["gain"]["low"], right["gain"]["high"]
        numbers += [
            ("right answers, before", format_percent(right["first"]), "greedy, by the verifier"),
            ("after", format_percent(right["last"]), f"{format_percent(low)} to {format_percent(high)} more"),
        ]
    return numbers


# ---- tables


def rounds_table(result: JsonObject) -> Table:
    """A line per candidate; the gain, its bound and the decision stand with the best candidate of each round."""
    lines = [
        (record, candidate, candidate["name"] == record["best"])
        for record in result["records"]
        for candidate in record["candidates"]
    ]
    return make_table(
        Column("round", [record["step"] for record, _, _ in lines]),
        Column("candidate", [bold_cell(candidate["name"]) for _, candidate, _ in lines]),
        Column("present loss", [record["present"] for record, _, _ in lines], "dev"),
        Column("its loss", [candidate["dev"] for _, candidate, _ in lines], "dev"),
        Column(
            "gain",
            [format_gain(record["gain"]) if is_best else MISSING for record, _, is_best in lines],
            "95 % interval",
            "tight",
        ),
        Column(
            "bound",
            [SignedNumber(record["bound"]) if is_best else None for record, _, is_best in lines],
            "one-sided, per look",
        ),
        Column(
            "",
            [("accepted" if record["accepted"] else "kept") if is_best else "" for record, _, is_best in lines],
            "",
            "tight",
        ),
        Column("responses right", [record["right"] for record, _, _ in lines], "share, by the verifier"),
        Column("ended", [record["ended"] for record, _, _ in lines], "share of responses"),
        Column("ESS", [record["ess"] for record, _, _ in lines], "examples, of the best that weights them"),
        Column("passes", [round(candidate["work"]) for _, candidate, _ in lines], "training steps"),
        Column("seconds", [round(candidate["seconds"]) for _, candidate, _ in lines], "with compilation"),
        row_classes={at: "strong" for at, (record, _, is_best) in enumerate(lines) if record["accepted"] and is_best},
    )


def responses_table(result: JsonObject) -> Table:
    """Responses at both ends of the weights."""
    responses = result["examples"]
    columns = [
        Column("weight", [response["weight"] for response in responses]),
        Column("question", [isolated_cell(response["question"]) for response in responses]),
        Column("response", [isolated_cell(response["text"] or "(nothing)") for response in responses]),
        Column("offline example says", [isolated_cell(response["offline"]) for response in responses]),
    ]
    if any(response["label"] for response in responses):
        columns.append(Column("its label", [response["label"] or MISSING for response in responses]))
    if any(response["checker"] is not None for response in responses):
        columns.append(Column("verifier", [response["checker"] for response in responses]))
    return make_table(
        *columns,
        Column("log-probability", [response["log_prob"] for response in responses], "nats, when written"),
        Column("ended", ["yes" if response["ended"] else "cut" for response in responses]),
        Column("id", [Cell(response["id"], "code") for response in responses], "question / round / draw"),
    )


def mean_weights_table(result: JsonObject) -> Table:
    """Mean weights by kind of example and round."""
    kinds = list(dict.fromkeys(item["kind"] for item in result["moved"]))
    rounds = range(len(result["records"]))
    means = {(item["round"], item["kind"]): item for item in result["moved"]}
    return make_table(
        Column("examples", [bold_cell(kind) for kind in kinds]),
        Column("how many", [means.get((rounds[-1], kind), {}).get("rows") for kind in kinds], "in the last round"),
        *(
            Column(f"round {at}", [means.get((at, kind), {}).get("weight") for kind in kinds], "mean weight")
            for at in rounds
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
    """The interval of the best candidate's loss, as the present one's minus the interval of the gain."""
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
