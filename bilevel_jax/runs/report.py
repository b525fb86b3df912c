"""The report of a `select` run: one HTML file with the verdict, the headline, the outer loop and its sections."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bilevel_jax.lm.data import Example
from bilevel_jax.runs import figures, files, keep
from bilevel_jax.runs.figures import Html, Series, element, join
from bilevel_jax.runs.page import (
    NONE,
    Column,
    Estimate,
    banner,
    capital,
    details,
    document,
    figure,
    foretold,
    interval,
    note,
    number,
    paragraph,
    percent,
    reproduced,
    signed,
    table,
    tiles,
)
from bilevel_jax.runs.report_certificates import LOOKS, certificates
from bilevel_jax.runs.report_comparison import arm, compared, comparison, difference, mean_of, seeds_of
from bilevel_jax.runs.report_examples import ends
from bilevel_jax.runs.report_weights import axis, chosen, groups, weights
from bilevel_jax.runs.results import PARTS, Results, part_of, read, real
from bilevel_jax.runs.sections import SINGLE_LOOP_METHODS, SelectionSection

LEAD = ("oracle", "uniform", "learned weights", "selected subset", "random subset")
"""Arms of the first picture, from above."""


def write(folder: Path, examples: Sequence[Example]) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training rows, for their text; they are joined by id. All
    text from data, config and environment is escaped: training data is hostile.
    """
    run = read(folder, examples)
    path = folder / "report.html"
    files.write_atomic(path, page(run))
    return path


def page(run: Results) -> str:
    """The whole report as HTML."""
    intro = join(
        "bilevel_jax select, run ",
        element("b", run.name),
        f". L_v is the trained model's loss on trusted rows, in {run.unit}; lower is better. V_fit steers the weights; "
        "V_report is kept apart and only read for this report.",
    )
    sections = [
        ("comparison", "Do the weights help?", comparison(run)),
        ("loop", "How the weights were learned", loop(run)),
        ("weights", "The weights", weights(run)),
        ("examples", "The examples at both ends", ends(run)),
        ("certificates", "Why believe the gradient, or not", certificates(run)),
        ("provenance", "Data, cost, and how to see the same numbers", provenance(run)),
    ]
    title = f"{run.name}: {run.result['verdict']['level']}"
    return document(title, "Which training rows to trust, and how much", intro, lead(run), sections)


# ---- the verdict and the headline


def lead(run: Results) -> Html:
    """What a person reads first: the verdict, what follows from it, the headline numbers, and two pictures."""
    verdict = run.result["verdict"]
    places = run.result["verdicts"]
    box = banner(
        *LOOKS[verdict["level"]],
        verdict["level"],
        element("p", f"for {verdict['scope']}", class_="scope") if verdict["scope"] else None,
        paragraph(capital(verdict["reason"])),
        paragraph(element("b", "Remedy: "), verdict["remedy"]) if verdict["remedy"] else None,
        paragraph(element("b", "For you: "), _meaning(run)),
        paragraph(
            element("b", "Solved: " if _single(run) else "What the gradient is of: "), run.result["estimand"], "."
        ),
        note(
            "This is the verdict on the gradient at uniform weights, where the thresholds were calibrated. At the "
            f"learned weights they would say {places['learned weights']['level']}: near its optimum a loss has little "
            "slope left, and the ratio tells less."
        )
        if "learned weights" in places and places["learned weights"]["level"] != verdict["level"]
        else None,
    )
    pictures = []
    if rows := run.result["compare"]:
        part = part_of(run)
        pictures.append(
            figure(
                compared(run, [row for name in LEAD if (row := arm(run, name))] or rows, part),
                "Measured: models trained again from cold. Dot: mean; bar: 95 % interval; small dots: each of "
                f"{seeds_of(run)}. Further left is better.",
            )
        )
    else:
        pictures.append(
            figure(_curves(run), "L_v while the weights were learned; models were not trained again to compare.")
        )
    key = "label" if run.labelled else "source"
    pictures.append(
        figure(
            figures.strips(groups(run, key), axis(run), reference=1.0),
            f"Learned weights by {key}. Bar: median; dashed: weight 1, where every row began.",
        )
    )
    return join(
        element(
            "div",
            element("div", box, element("p", headline(run), class_="headline"), class_="pictures left"),
            element("div", *pictures, class_="pictures"),
            class_="lead",
        ),
        boxes(run),
    )


def headline(run: Results) -> Html:
    """The one number: learned against uniform weights on V_report, paired by seed."""
    if not run.result["compare"]:
        return join(
            element("b", "There is no headline number: "),
            "the comparison was skipped (--fast or retrain.enabled: false). Whether these weights give a better model "
            "was not measured.",
        )
    part = part_of(run)
    if not (gain := difference(run, "learned weights", part)):
        return join(
            element("b", "There is no headline number: "),
            "the comparison lacks “uniform” or “learned weights” (retrain.variants).",
        )
    where = (
        ""
        if part == "report"
        else f" There is no V_report, so this is read on {PARTS[part]}, which the weights have seen."
    )
    amount = f"{interval(Estimate(abs(gain.mean), gain.half)).removeprefix('+')} {run.unit}"
    if math.isnan(gain.half):
        words = (
            f"Learned weights {_moved(gain.mean)} L_v on {PARTS[part]} by {number(abs(gain.mean))} {run.unit} against "
            "uniform weights, with one seed: no interval, so this may be chance."
        )
    elif abs(gain.mean) <= gain.half:
        words = (
            f"Learned and uniform weights cannot be told apart on {PARTS[part]}: learned less uniform is "
            f"{interval(gain)} {run.unit} over {seeds_of(run)}."
        )
    else:
        words = (
            f"Learned weights {_moved(gain.mean)} L_v on {PARTS[part]} by {amount} against uniform weights, "
            f"over {seeds_of(run)}."
        )
    return join(element("b", words), where)


def boxes(run: Results) -> Html:
    """The headline numbers in boxes."""
    part, total = part_of(run), run.result["rows"]["train"]
    ess = float(chosen(run)["ess"])
    shown = []
    for name in ("learned weights", "uniform"):
        if row := arm(run, name):
            shown.append((f"L_v on {PARTS[part]}, {name}", interval(mean_of(row, part)).removeprefix("+"), run.unit))
    if gain := difference(run, "learned weights", part):
        shown.append(("learned − uniform, paired", interval(gain), f"{run.unit}; below 0 is better"))
    shown += [
        ("rows", f"{total:,}", f"{run.result['selected']:,} kept: {_rule(run)}"),
        ("effective sample size", number(ess), f"rows, {percent(ess / total)} of all"),
        ("trusted rows", f"{run.result['rows'].get('fit', 0):,}", "in V_fit, which steer the weights"),
    ]
    return tiles(shown)


def _meaning(run: Results) -> str:
    level, measured = run.result["verdict"]["level"], bool(run.result["compare"])
    then = "the comparison below, which trained again and measured" if measured else "a comparison (run without --fast)"
    if level == "BELIEVE":
        return (
            "the gradient says what retraining really does, and does not hang on a few rows. A row's weight can be "
            f"read as what V_fit rewards. Whether the weights make a better model is for {then}."
        )
    if level == "DO NOT BELIEVE":
        return (
            "read no meaning into the weight of single rows: the gradient that led to them does not foretell what "
            f"training does when weights change this much. To use the weights, rely on {then}, not on the gradient."
        )
    if _single(run):
        return f"this method moves weights and parameters together and offers nothing to certify: go by {then}."
    if not any(one["exact"] for one in run.result["certificates"].values()):
        return (
            f"nothing speaks for or against the weights yet. Before acting on them, run the certificates, and {then}."
        )
    return f"the gradient passes some bars and misses others. Before acting on single rows, look at {then}."


def _rule(run: Results) -> str:
    return keep.rule(SelectionSection(**run.config["selection"]))


def _moved(change: float) -> str:
    return "lower" if change < 0 else "raise"


# ---- the outer loop


def loop(run: Results) -> Html:
    """L_v and the effective sample size over the outer steps, and how far V_fit and V_report have parted."""
    records, best = run.result["records"], run.result["best"]
    steps = [record["step"] for record in records]
    parts = [part for part in PARTS if records[0]["loss"].get(part) is not None]
    rows = run.result["rows"]["train"]
    sizes = [Series("ESS", steps, [real(record["ess"]) for record in records])]
    words = [f"Step 0 trains with weight 1 for every row. The loop ended because {run.result['ended']}."]
    if "select" in parts:
        words.append(f"Step {best} has the least L_v on V_select, so its weights are the ones written.")
    else:
        words.append("There is no V_select, so the weights of the last step are the ones written.")
        values = [real(record["loss"].get("report")) for record in records]
        if "report" in parts and int(np.argmin(values)) != best:
            words.append(
                f"V_report was lowest at step {int(np.argmin(values))} ({number(min(values))} against "
                f"{number(values[best])} {run.unit}); only a V_select may choose such a step "
                "(data.split or data.dev)."
            )
    columns = [
        Column("step", steps),
        *(Column(PARTS[part], [record["loss"][part] for record in records], f"L_v, {run.unit}") for part in parts),
        Column("ESS", [record["ess"] for record in records], "rows"),
        Column("entropy", [record["entropy"] for record in records], "nats"),
        Column("largest", [record["largest"] for record in records], "weight"),
        *([Column("AUC", [record["auc"] for record in records], "weights, labels")] if run.result["auc"] else []),
        Column("growth", [record["checks"].get("growth") for record in records], "of the adjoint"),
        Column("residual", [record["checks"].get("residual") for record in records], "relative"),
        Column("cost", [record["work"] for record in records], "training steps"),
    ]
    columns = [column for column in columns if any(cell is not None for cell in column.cells)]
    return join(
        paragraph(" ".join(words)),
        _gap(run),
        element(
            "div",
            figure(
                _curves(run),
                ("V_fit is trained on." if _single(run) else "V_fit steers the weights.")
                + (" V_report never influenced them, nor the choice of the step." if "report" in parts else ""),
            ),
            figure(
                figures.lines(sizes, "outer step", "effective sample size, rows", mark=_mark(run), include=[0, rows]),
                f"ESS = (Σw)²/Σw²: how many equally weighted rows the weights amount to, of {rows:,}. Near 0 a few "
                "rows win all.",
            ),
            class_="pair",
        ),
        details("Each outer step in numbers", table(*columns, marks={best: "strong"})),
    )


def _curves(run: Results) -> Html:
    """L_v over the outer steps; V_report has the colour that it has in the comparison."""
    records = run.result["records"]
    steps = [record["step"] for record in records]
    curves = [
        Series(PARTS[part], steps, [real(record["loss"][part]) for record in records], colour)
        for part, colour in (("fit", 1), ("select", 2), ("report", 0))
        if records[0]["loss"].get(part) is not None
    ]
    return figures.lines(curves, "outer step", f"L_v, {run.unit}", mark=_mark(run))


def _mark(run: Results) -> tuple[float, str]:
    return run.result["best"], f"chosen: step {run.result['best']}"


def _gap(run: Results) -> Html:
    """How far the model does better on the rows that steer the weights than on those that nobody looked at."""
    first, now = (
        real(record["loss"].get("report")) - real(record["loss"].get("fit"))
        for record in (run.result["records"][0], chosen(run))
    )
    if math.isnan(now):
        return note("There is no V_report, so over-fitting to V_fit cannot be seen.", "warning")
    count = run.result["rows"].get("fit", 0)
    if run.result["best"] == 0:
        return paragraph(
            element("b", f"Gap between V_fit and V_report: {signed(now)} {run.unit}"),
            " at step 0, where V_fit has steered nothing yet: the two sets differ by that much on their own.",
        )
    return paragraph(
        element("b", f"Gap between V_fit and V_report: {signed(now)} {run.unit}"),
        f" at step {run.result['best']} (V_report less V_fit), against {signed(first)} at step 0, before V_fit "
        "steered anything. ",
        f"The growth, {signed(now - first)}, is the mark of over-fitting to the {count:,} rows of V_fit; more trusted "
        "rows usually make it smaller."
        if now > first
        else "It did not grow: no sign of over-fitting to V_fit.",
    )


# ---- provenance


def provenance(run: Results) -> Html:
    """Rows, notes, cost, and what another person needs to see the same numbers."""
    rows = run.result["rows"]
    uses = {
        "train": "get weights",
        "fit": "steer the weights",
        "select": "choose the outer step",
        "report": "are read for this report alone",
    }
    data = table(
        Column("set", [{"train": "training", **PARTS}[part] for part in uses]),
        Column("rows", [rows.get(part, 0) for part in uses]),
        Column("which", [words if rows.get(part, 0) else "none" for part, words in uses.items()]),
    )
    seconds = run.result.get("seconds", {})
    work = run.result["work"]
    words = {
        "outer": "learning: training and sweeping, once per outer step",
        "certify": "certificates",
        "compare": "the comparison",
    }
    costs = table(
        Column("what", [words.get(name, name) for name in work]),
        Column("cost", list(work.values()), "training-step equivalents"),
        Column("share", [100 * value / (sum(work.values()) or math.nan) for value in work.values()], "%"),
        Column("time", [seconds.get(name) for name in work], "seconds"),
    )
    return join(
        element("h3", "Data"),
        data,
        element("ul", *(element("li", one) for one in run.result["notes"])),
        element("h3", "Cost"),
        costs,
        note(
            f"One training step is a forward and a backward pass over one batch. {NONE}: not timed. Total: "
            f"{number(float(sum(work.values())))} training steps."
        ),
        foretold(run),
        reproduced(run, "select", run.meanings.get("precision", NONE)),
    )


def _single(run: Results) -> bool:
    """Whether weights and parameters moved together, so that there was no hypergradient."""
    return run.config["outer"]["method"] in SINGLE_LOOP_METHODS
