"""The report of `rank`: the pick or none, every metric of every strategy, how they agree, responses with their text."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bilevel_jax.runs import files
from bilevel_jax.runs.figures import Html, element, join, scale
from bilevel_jax.runs.page import (
    NONE,
    Column,
    banner,
    capital,
    cut,
    details,
    document,
    figure,
    note,
    number,
    paragraph,
    percent,
    table,
)
from bilevel_jax.runs.ranking import METRICS
from bilevel_jax.runs.results import real, write_page

Row = dict[str, Any]
SHOWN = 24
"""Questions that are shown with their responses: those that set the strategies furthest apart, half of them, and the
first ones."""
WIDE = 700
"""Characters of a response."""
WINS = {1: "the largest wins", -1: "the least wins"}


def write(folder: Path) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path."""
    responses = pq.read_table(folder / "rank.parquet").to_pylist()
    return write_page(folder, partial(page, responses))


def page(responses: Sequence[Row], name: str, result: Row, config_text: str, environment: Row) -> str:
    """The whole report as HTML."""
    verdict, decide = result["verdict"], next(iter(result["metrics"]))
    intro = join(
        "bilevel_jax rank, run ",
        element("b", name),
        ". A strategy is a way of generating responses. Each is judged by how the model, before any training, takes "
        "its responses to the same questions.",
    )
    lead = join(
        banner(
            "good" if verdict["use"] else "fair",
            "✓" if verdict["use"] else "?",
            f"Use {verdict['use']}" if verdict["use"] else verdict["sentence"].partition(":")[0],
            paragraph(verdict["sentence"]),
            note(protocol(result, decide)),
        ),
        element(
            "div",
            *(
                figure(panel(result, metric, decide), f"{METRICS[metric].title}: {METRICS[metric].meaning}.", wide=True)
                for metric in result["metrics"]
            ),
            class_="pair",
        ),
        *(note(f"{capital(text)}.", "warning") for text in result["remarks"]),
        note(
            f"Strategies stand in the order of {METRICS[decide].title}, the best at the top. Bars: 95 % bootstrap "
            "intervals over the questions. Small points: the blocks, each with its own answers of the model."
        ),
    )
    tested = [("trials", "Train-then-test", trials(result))] if result["tested"] else []
    sections = [
        ("ranking", "Every strategy", ranking_table(result, decide)),
        ("agreement", "Do the metrics agree?", agreement(result)),
        *tested,
        ("questions", "Question by question", questions(responses, result, decide)),
        ("costs", "What it cost", costs(result)),
        ("provenance", "Data, and how to see the same numbers", provenance(result, config_text, environment)),
    ]
    return document(f"{name}: rank", "Which responses will train this model best", intro, lead, sections)


# ---- in words


def protocol(result: Row, decide: str) -> str:
    """How the numbers were made, and what they cannot say."""
    counts = result["counts"]
    rest = (
        " SPPL was published with a gain over plain perplexity of 0.30 points of accuracy, 95 % interval −0.02 to 0.83."
        if decide == "sppl"
        else ""
    )
    return (
        f"{counts['blocks']} disjoint blocks of {counts['block']} questions, drawn by id from {counts['questions']:,}. "
        "A strategy's score is the mean over the blocks. The rule: the best two are compared on the same resampled "
        "questions; a pick takes a 95 % interval of their difference that does not reach 0. The interval knows how "
        "questions vary; not that the two were chosen after looking, nor how trainings, or other answers of the "
        f"model, vary. No metric sees whether a response is right.{rest}"
    )


def reading(found: Sequence[float | None] | None) -> str:
    """A value with its interval."""
    if found is None or found[0] is None:
        return NONE
    value, low, high = (number(real(one), 3) for one in found)
    return f"{value} [{low}, {high}]"


def order_of(result: Row, metric: str) -> list[int]:
    """The strategies, the best by a metric first."""
    lines = result["metrics"][metric]
    return sorted(range(len(lines)), key=lambda at: -METRICS[metric].sign * real(lines[at]["score"][0]))


# ---- tables


def ranking_table(result: Row, decide: str) -> Html:
    """A line per strategy: every metric with its interval; of the deciding one the gap to the best, and the blocks."""
    order, names = order_of(result, decide), result["strategies"]
    lines = result["metrics"][decide]
    places = {
        metric: {at: place for place, at in enumerate(order_of(result, metric), 1)} for metric in result["metrics"]
    }
    columns = [
        Column(
            METRICS[metric].title,
            [_ranked(places[metric][at], result["metrics"][metric][at]["score"]) for at in order],
            WINS[METRICS[metric].sign],
            "tight",
        )
        for metric in result["metrics"]
    ]
    known = [Column("accuracy", [result["known"][names[at]] for at in order], "given")] if result["known"] else []
    title = METRICS[decide].title
    return join(
        table(
            Column("", [element("b", names[at]) for at in order]),
            *columns,
            *known,
            marks={at: "strong" for at, one in enumerate(order) if names[one] == result["verdict"]["use"]},
            name="bench",
        ),
        element("h3", f"{title}, block by block"),
        table(
            Column("", [element("b", names[at]) for at in order]),
            Column("behind the best", [reading(lines[at]["behind"]) for at in order], "95 %, same questions", "tight"),
            *(
                Column(f"block {block + 1}", [lines[at]["blocks"][block] for at in order])
                for block in range(result["counts"]["blocks"])
            ),
            Column("spread", [real(lines[at]["spread"]) for at in order], "standard deviation"),
            Column("ranks", [", ".join(map(str, lines[at]["ranks"])) for at in order], "in the blocks", "tight"),
            name="bench",
        ),
    )


def _ranked(place: int, found: Sequence[float | None]) -> Html:
    """A score with its rank, its interval below."""
    value, low, high = (number(real(one), 3) for one in found)
    return join(element("b", f"{place}. "), value, element("span", f"[{low}, {high}]", class_="sub"))


def agreement(result: Row) -> Html:
    """Spearman's correlations of the metrics over the strategies, and with accuracies where there are any."""
    found = result["agreement"]
    metrics = list(found)

    def cell(value: float | None) -> str:
        return NONE if value is None else f"{value:.2f}".replace("-", "−")

    known = [
        Column(title, [cell(line[metric]) for metric in metrics], "correlation with it", "tight")
        for title, line in result["against"].items()
    ]
    return join(
        table(
            Column("", [element("b", METRICS[metric].title) for metric in metrics]),
            *(
                Column(METRICS[other].title, [cell(found[one][other]) for one in metrics], "", "tight")
                for other in metrics
            ),
            *known,
        ),
        note(
            f"Spearman's rank correlation over {len(result['strategies'])} strategies, all metrics turned so that "
            "larger is better. Of so few it is rough: of 8 unrelated ones it lies beyond ±.74 in one case of twenty."
        ),
    )


def trials(result: Row) -> Html:
    """What short trainings on each strategy did."""
    tested = result["tested"]
    by = tested["decided_by"]
    sign = 1 if by == "accuracy" else -1
    lines = sorted(tested["strategies"], key=lambda line: -sign * line["mean"][by][0])
    before = tested["before"]

    def mean(line: Row, key: str) -> str:
        value, half = line["mean"][key]
        return f"{value:.4f}" + (f" ± {half:.4f}" if half is not None else "")

    right = [Column("accuracy", [mean(line, "accuracy") for line in lines], "", "tight")] if by == "accuracy" else []
    return join(
        table(
            Column("", [element("b", line["name"]) for line in lines]),
            Column("L_v", [mean(line, "loss") for line in lines], tested["unit"], "tight"),
            *right,
            Column("rows", [line["rows"] for line in lines]),
        ),
        note(
            f"{tested['steps']} steps of {tested['batch']} rows, {len(lines[0]['runs'])} seeds, 95 % intervals over "
            f"them; read on {tested['validation']:,} rows of data.validation. Before training: "
            + "; ".join(f"{key} {value:.4f}" for key, value in before.items())
            + "."
        ),
    )


def questions(responses: Sequence[Row], result: Row, decide: str) -> Html:
    """Some questions with all responses and what was measured of each."""
    count = len(result["strategies"])
    groups = [list(responses[at : at + count]) for at in range(0, len(responses), count)]
    reads = [key for key in ("sppl", "perplexity", "ifd", "self_similarity", "rewards") if key in responses[0]]
    by = next(iter(key for key in METRICS[decide].reads))
    apart = sorted(range(len(groups)), key=lambda at: -_ratio([row[by] for row in groups[at]]))[: SHOWN // 2]
    others = [at for at in range(len(groups)) if at not in apart][: SHOWN - len(apart)]
    return join(
        paragraph(
            f"The {len(apart)} questions whose responses lie furthest apart in {METRICS[decide].title}, then the first "
            f"{len(others)} of the rest. rank.parquet has all {len(groups):,}."
        ),
        *(_question(groups[at], reads, by, METRICS[decide].sign) for at in (*apart, *others)),
    )


def _question(rows: Sequence[Row], reads: Sequence[str], by: str, sign: int) -> Html:
    first = rows[0]
    ordered = sorted(rows, key=lambda row: -sign * row[by])
    kept = "" if first["own_answer_kept"] else " (judged wrong, so not shown to others)"
    return details(
        cut(first["question"], 140),
        join(
            element("p", f"{first['file']}:{first['line']}, block {first['block'] + 1}", class_="note"),
            _turn("question", first["question"]),
            _turn(f"own answer{kept}", first["own_answer"]),
            table(
                Column("", [element("b", row["strategy"]) for row in ordered]),
                *(Column(_short(key), [row[key] for row in ordered]) for key in reads),
                Column("tokens", [row["tokens"] for row in ordered], "read"),
                Column("response", [element("div", cut(row["response"], WIDE), class_="content") for row in ordered]),
                name="bench",
            ),
        ),
    )


def _turn(role: str, text: str) -> Html:
    return element(
        "div", element("span", role, class_="role"), element("div", cut(text, WIDE), class_="content"), class_="turn"
    )


def _short(key: str) -> str:
    return METRICS[key].title if key in METRICS else key


def _ratio(values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return high / low if low > 0 else high - low


def costs(result: Row) -> Html:
    """Seconds, and the token places that shared prompts saved."""
    spent, names = result["costs"], {
        "answers": "answers of the model's own", "scores": "likelihoods", "self_similarity": "hidden states",
    }  # fmt: skip
    rows = [(title, spent[key]) for key, title in names.items() if key in spent]
    if result["tested"]:
        rows.append(("train-then-test", result["tested"]["seconds"]))
    share = spent["places"] / spent["tokens"] if spent["tokens"] else math.nan
    return join(
        table(
            Column("", [title for title, _ in rows]), Column("seconds", [value for _, value in rows], "compiled anew")
        ),
        paragraph(
            f"Likelihoods: {spent['tokens']:,} tokens were asked about and {spent['places']:,} places read, padding "
            f"included ({percent(share)}): what a question's responses share, its prompt and the shown answers, is "
            "read once."
        ),
    )


def provenance(result: Row, config_text: str, environment: Row) -> Html:
    """What was read, and what another person needs."""
    packages = ", ".join(f"{key} {version}" for key, version in environment["packages"].items() if version)
    return join(
        *(paragraph(f"{capital(text)}.") for text in result["notes"]),
        element("pre", f"bilevel-jax rank {files.RESOLVED} --out ANOTHER_FOLDER"),
        paragraph("rank.parquet holds every question and strategy: its text, the model's own answer, every number."),
        paragraph(f"{', '.join(environment['devices'])}; {environment['platform']}; {packages}."),
        details(f"{files.RESOLVED}, all settings", element("pre", config_text)),
    )


# ---- the picture


def panel(result: Row, metric: str, decide: str) -> Html:
    """A line per strategy: its score with its interval, and its blocks; in the order of the deciding metric."""
    left, right, top, height = 190, 520, 6, 26
    names, lines, order = result["strategies"], result["metrics"][metric], order_of(result, decide)
    bottom = top + height * len(order)
    values = [real(one) for line in lines for one in (*line["score"], *line["blocks"])]
    wide = metric in ("sppl", "perplexity") and max(values) > 20 * min(values) > 0
    x = scale(values, left, right - 8, log=wide)
    parts = [element("line", x1=left, y1=bottom, x2=right - 8, y2=bottom, class_="axis")]
    ticks = x.ticks()
    for tick in ticks[:: -(-len(ticks) // 6) or 1]:  # as many as there is room for, also over many decades
        parts.append(element("line", x1=_n(x(tick)), y1=top, x2=_n(x(tick)), y2=bottom, class_="grid"))
        parts.append(element("text", f"{tick:g}", x=_n(x(tick)), y=bottom + 16, class_="tick middle"))
    best = order_of(result, metric)[0]
    for place, at in enumerate(order):
        y = top + height * (place + 0.5)
        value, low, high = (real(one) for one in lines[at]["score"])
        colour = "k3" if at == best else "k0"
        words = names[at] if len(names[at]) <= 25 else names[at][:24] + "…"
        parts += [
            element("text", element("title", names[at]), words, x=left - 10, y=_n(y + 4), class_="label end"),
            element("line", x1=_n(x(low)), y1=_n(y), x2=_n(x(high)), y2=_n(y), class_=f"whisker {colour}"),
            *(_point(x(real(one)), y + 8, 1.9, f"faint {colour}") for one in lines[at]["blocks"]),
            _point(x(value), y, 4, f"dot {colour}"),
        ]  # fmt: skip
    label = f"{METRICS[metric].title}, {WINS[METRICS[metric].sign]}"
    parts.append(element("text", label, x=(left + right) / 2, y=bottom + 34, class_="tick middle"))
    told = "; ".join(f"{names[at]} {real(lines[at]['score'][0]):.4g}" for at in order)
    return element("svg", *parts, viewBox=f"0 0 {right} {bottom + 40}", role="img", aria_label=f"{label}: {told}")


def _point(x: float, y: float, radius: float, kind: str) -> Html:
    return element("circle", cx=_n(x), cy=_n(y), r=radius, class_=kind)


def _n(value: float) -> str:
    return f"{value:.1f}"
