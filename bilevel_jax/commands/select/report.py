"""The report of a `select` run: one HTML file with the verdict, the headline, the outer loop and its sections."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS, SelectionSection
from bilevel_jax.runs.engine import selection
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.certificates import VERDICT_STYLES, render_certificates
from bilevel_jax.runs.report.comparison import (
    describe_seeds,
    difference_from_uniform,
    find_variant,
    plot_comparison,
    render_comparison,
    variant_interval,
)
from bilevel_jax.runs.report.examples import render_extreme_examples
from bilevel_jax.runs.report.figures import Html, Series, html_element, join_html
from bilevel_jax.runs.report.html import (
    Column,
    html_details,
    html_document,
    html_figure,
    html_note,
    html_paragraph,
    html_table,
    number_tiles,
    render_reproduction,
    render_usage,
    verdict_banner,
)
from bilevel_jax.runs.report.numbers import (
    MISSING,
    MeanInterval,
    capitalize_first,
    format_interval,
    format_number,
    format_percent,
    format_signed,
)
from bilevel_jax.runs.report.results import PART_LABELS, RunResults, float_or_nan, most_independent_part, read_results
from bilevel_jax.runs.report.weights import best_record, group_weights, render_weights, weight_axis_label

FIRST_PICTURE_VARIANTS = ("oracle", "uniform", "learned weights", "selected subset", "random subset")
"""Arms of the first picture, from above."""


def write_select_report(folder: Path, examples: Sequence[Example]) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training examples, for their text; they are joined by id. All
    text from data, config and environment is escaped: training data is hostile.
    """
    run = read_results(folder, examples)
    path = folder / "report.html"
    run_dir.write_atomic(path, render_select_report(run))
    return path


def render_select_report(run: RunResults) -> str:
    """The whole report as HTML."""
    intro = join_html(
        "bilevel_jax select, run ",
        html_element("b", run.name),
        f". L_v is the trained model's loss on validation examples, in {run.unit}; lower is better. validation steers the weights; "
        "test is kept apart and only read for this report.",
    )
    sections = [
        ("comparison", "Do the weights help?", render_comparison(run)),
        ("loop", "How the weights were learned", render_outer_loop(run)),
        ("weights", "The weights", render_weights(run)),
        ("examples", "The examples at both ends", render_extreme_examples(run)),
        ("certificates", "Why believe the gradient, or not", render_certificates(run)),
        ("provenance", "Data, cost, and how to see the same numbers", render_provenance(run)),
    ]
    title = f"{run.name}: {run.result['verdict']['level']}"
    return html_document(title, "Which training examples to trust, and how much", intro, render_lead(run), sections)


# ---- the verdict and the headline


def render_lead(run: RunResults) -> Html:
    """What a person reads first: the verdict, what follows from it, the headline numbers, and two pictures."""
    verdict = run.result["verdict"]
    verdicts = run.result["verdicts"]
    box = verdict_banner(
        *VERDICT_STYLES[verdict["level"]],
        verdict["level"],
        html_element("p", f"for {verdict['scope']}", class_="scope") if verdict["scope"] else None,
        html_paragraph(capitalize_first(verdict["reason"])),
        html_paragraph(html_element("b", "Remedy: "), verdict["remedy"]) if verdict["remedy"] else None,
        html_paragraph(html_element("b", "For you: "), _explain_verdict(run)),
        html_paragraph(
            html_element("b", "Solved: " if _is_single_loop(run) else "What the gradient is of: "),
            run.result["estimand"],
            ".",
        ),
        html_note(
            "This is the verdict on the gradient at uniform weights, where the thresholds were calibrated. At the "
            f"learned weights they would say {verdicts['learned weights']['level']}: near its optimum a loss has little "
            "slope left, and the ratio tells less."
        )
        if "learned weights" in verdicts and verdicts["learned weights"]["level"] != verdict["level"]
        else None,
    )
    pictures = []
    if variants := run.result["compare"]:
        part = most_independent_part(run)
        pictures.append(
            html_figure(
                plot_comparison(
                    run, [row for name in FIRST_PICTURE_VARIANTS if (row := find_variant(run, name))] or variants, part
                ),
                "Measured: models trained again from cold. Dot: mean; bar: 95 % interval; small dots: each of "
                f"{describe_seeds(run)}. Further left is better.",
            )
        )
    else:
        pictures.append(
            html_figure(
                _plot_validation_losses(run),
                "L_v while the weights were learned; models were not trained again to compare.",
            )
        )
    key = "label" if run.has_labels else "source"
    pictures.append(
        html_figure(
            figures.plot_strips(group_weights(run, key), weight_axis_label(run), reference=1.0),
            f"Learned weights by {key}. Bar: median; dashed: weight 1, where every row began.",
        )
    )
    return join_html(
        html_element(
            "div",
            html_element(
                "div", box, html_element("p", render_headline(run), class_="headline"), class_="pictures left"
            ),
            html_element("div", *pictures, class_="pictures"),
            class_="lead",
        ),
        render_key_numbers(run),
    )


def render_headline(run: RunResults) -> Html:
    """The one number: learned against uniform weights on test, paired by seed."""
    if not run.result["compare"]:
        return join_html(
            html_element("b", "There is no headline number: "),
            "the comparison was skipped (--fast or retrain.enabled: false). Whether these weights give a better model "
            "was not measured.",
        )
    part = most_independent_part(run)
    if not (gain := difference_from_uniform(run, "learned weights", part)):
        return join_html(
            html_element("b", "There is no headline number: "),
            "the comparison lacks “uniform” or “learned weights” (retrain.variants).",
        )
    where = (
        ""
        if part == "test"
        else f" There is no test, so this is read on {PART_LABELS[part]}, which the weights have seen."
    )
    amount = f"{format_interval(MeanInterval(abs(gain.mean), gain.half_width)).removeprefix('+')} {run.unit}"
    if math.isnan(gain.half_width):
        words = (
            f"Learned weights {_direction_verb(gain.mean)} {PART_LABELS[part]} loss by {format_number(abs(gain.mean))} {run.unit} against "
            "uniform weights, with one seed: no interval, so this may be chance."
        )
    elif abs(gain.mean) <= gain.half_width:
        words = (
            f"Learned and uniform weights cannot be told apart on {PART_LABELS[part]}: learned less uniform is "
            f"{format_interval(gain)} {run.unit} over {describe_seeds(run)}."
        )
    else:
        words = (
            f"Learned weights {_direction_verb(gain.mean)} {PART_LABELS[part]} loss by {amount} against uniform weights, "
            f"over {describe_seeds(run)}."
        )
    return join_html(html_element("b", words), where)


def render_key_numbers(run: RunResults) -> Html:
    """The headline numbers in boxes."""
    part, total = most_independent_part(run), run.result["rows"]["train"]
    ess = float(best_record(run)["ess"])
    cells = []
    for name in ("learned weights", "uniform"):
        if row := find_variant(run, name):
            cells.append(
                (
                    f"{PART_LABELS[part]} loss, {name}",
                    format_interval(variant_interval(row, part)).removeprefix("+"),
                    run.unit,
                )
            )
    if gain := difference_from_uniform(run, "learned weights", part):
        cells.append(("learned − uniform, paired", format_interval(gain), f"{run.unit}; below 0 is better"))
    cells += [
        ("rows", f"{total:,}", f"{run.result['selected']:,} kept: {_describe_selection_rule(run)}"),
        ("effective sample size", format_number(ess), f"rows, {format_percent(ess / total)} of all"),
        ("validation examples", f"{run.result['rows'].get('fit', 0):,}", "in validation, which steer the weights"),
    ]
    return number_tiles(cells)


def _explain_verdict(run: RunResults) -> str:
    level, has_comparison = run.result["verdict"]["level"], bool(run.result["compare"])
    evidence = (
        "the comparison below, which trained again and measured"
        if has_comparison
        else "a comparison (run without --fast)"
    )
    if level == "BELIEVE":
        return (
            "the gradient says what retraining really does, and does not hang on a few rows. A row's weight can be "
            f"read as what validation rewards. Whether the weights make a better model is for {evidence}."
        )
    if level == "DO NOT BELIEVE":
        return (
            "read no meaning into the weight of single rows: the gradient that led to them does not foretell what "
            f"training does when weights change this much. To use the weights, rely on {evidence}, not on the gradient."
        )
    if _is_single_loop(run):
        return f"this method moves weights and parameters together and offers nothing to certify: go by {evidence}."
    if not any(certificate["exact"] for certificate in run.result["certificates"].values()):
        return f"nothing speaks for or against the weights yet. Before acting on them, run the certificates, and {evidence}."
    return f"the gradient passes some bars and misses others. Before acting on single rows, look at {evidence}."


def _describe_selection_rule(run: RunResults) -> str:
    return selection.describe_selection_rule(SelectionSection(**run.config["selection"]))


def _direction_verb(change: float) -> str:
    return "lower" if change < 0 else "raise"


# ---- the outer loop


def render_outer_loop(run: RunResults) -> Html:
    """L_v and the effective sample size over the outer steps, and how far validation and test have parted."""
    records, best = run.result["records"], run.result["best"]
    steps = [record["step"] for record in records]
    parts = [part for part in PART_LABELS if records[0]["loss"].get(part) is not None]
    num_examples = run.result["rows"]["train"]
    sizes = [Series("ESS", steps, [float_or_nan(record["ess"]) for record in records])]
    words = [f"Step 0 trains with weight 1 for every row. The loop ended because {run.result['ended']}."]
    if "dev" in parts:
        words.append(f"Step {best} has the least dev loss, so its weights are the ones written.")
    else:
        words.append("There is no dev, so the weights of the last step are the ones written.")
        values = [float_or_nan(record["loss"].get("test")) for record in records]
        if "test" in parts and int(np.argmin(values)) != best:
            words.append(
                f"test was lowest at step {int(np.argmin(values))} ({format_number(min(values))} against "
                f"{format_number(values[best])} {run.unit}); only a dev may choose such a step "
                "(data.split or data.dev)."
            )
    columns = [
        Column("step", steps),
        *(
            Column(PART_LABELS[part], [record["loss"][part] for record in records], f"L_v, {run.unit}")
            for part in parts
        ),
        Column("ESS", [record["ess"] for record in records], "rows"),
        Column("entropy", [record["entropy"] for record in records], "nats"),
        Column("largest", [record["largest"] for record in records], "weight"),
        *([Column("AUC", [record["auc"] for record in records], "weights, labels")] if run.result["auc"] else []),
        Column("growth", [record["checks"].get("growth") for record in records], "of the adjoint"),
        Column("residual", [record["checks"].get("residual") for record in records], "relative"),
        Column("cost", [record["work"] for record in records], "training steps"),
    ]
    columns = [column for column in columns if any(cell is not None for cell in column.cells)]
    return join_html(
        html_paragraph(" ".join(words)),
        _render_generalization_gap(run),
        html_element(
            "div",
            html_figure(
                _plot_validation_losses(run),
                ("validation is trained on." if _is_single_loop(run) else "validation steers the weights.")
                + (" test never influenced them, nor the choice of the step." if "test" in parts else ""),
            ),
            html_figure(
                figures.plot_lines(
                    sizes,
                    "outer step",
                    "effective sample size, rows",
                    vertical_mark=_chosen_step_mark(run),
                    y_values_shown=[0, num_examples],
                ),
                f"ESS = (Σw)²/Σw²: how many equally weighted rows the weights amount to, of {num_examples:,}. Near 0 a few "
                "rows win all.",
            ),
            class_="pair",
        ),
        html_details("Each outer step in numbers", html_table(*columns, row_classes={best: "strong"})),
    )


def _plot_validation_losses(run: RunResults) -> Html:
    """L_v over the outer steps; test has the colour that it has in the comparison."""
    records = run.result["records"]
    steps = [record["step"] for record in records]
    curves = [
        Series(PART_LABELS[part], steps, [float_or_nan(record["loss"][part]) for record in records], colour)
        for part, colour in (("validation", 1), ("dev", 2), ("test", 0))
        if records[0]["loss"].get(part) is not None
    ]
    return figures.plot_lines(curves, "outer step", f"L_v, {run.unit}", vertical_mark=_chosen_step_mark(run))


def _chosen_step_mark(run: RunResults) -> tuple[float, str]:
    return run.result["best"], f"chosen: step {run.result['best']}"


def _render_generalization_gap(run: RunResults) -> Html:
    """How far the model does better on the rows that steer the weights than on those that nobody looked at."""
    initial_gap, chosen_gap = (
        float_or_nan(record["loss"].get("test")) - float_or_nan(record["loss"].get("validation"))
        for record in (run.result["records"][0], best_record(run))
    )
    if math.isnan(chosen_gap):
        return html_note("There is no test, so over-fitting to validation cannot be seen.", "warning")
    count = run.result["rows"].get("validation", 0)
    if run.result["best"] == 0:
        return html_paragraph(
            html_element("b", f"Gap between validation and test: {format_signed(chosen_gap)} {run.unit}"),
            " at step 0, where validation has steered nothing yet: the two sets differ by that much on their own.",
        )
    return html_paragraph(
        html_element("b", f"Gap between validation and test: {format_signed(chosen_gap)} {run.unit}"),
        f" at step {run.result['best']} (test less validation), against {format_signed(initial_gap)} at step 0, before validation "
        "steered anything. ",
        f"The growth, {format_signed(chosen_gap - initial_gap)}, is the mark of over-fitting to the {count:,} rows of validation; more trusted "
        "rows usually make it smaller."
        if chosen_gap > initial_gap
        else "It did not grow: no sign of over-fitting to validation.",
    )


# ---- provenance


def render_provenance(run: RunResults) -> Html:
    """Rows, notes, cost, and what another person needs to see the same numbers."""
    rows = run.result["rows"]
    uses = {
        "train": "get weights",
        "validation": "steer the weights",
        "dev": "choose the outer step",
        "test": "are read for this report alone",
    }
    data = html_table(
        Column("set", [{"train": "training", **PART_LABELS}[part] for part in uses]),
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
    costs = html_table(
        Column("what", [words.get(name, name) for name in work]),
        Column("cost", list(work.values()), "training-step equivalents"),
        Column("share", [100 * value / (sum(work.values()) or math.nan) for value in work.values()], "%"),
        Column("time", [seconds.get(name) for name in work], "seconds"),
    )
    return join_html(
        html_element("h3", "Data"),
        data,
        html_element("ul", *(html_element("li", remark) for remark in run.result["notes"])),
        html_element("h3", "Cost"),
        costs,
        html_note(
            f"One training step is a forward and a backward pass over one batch. {MISSING}: not timed. Total: "
            f"{format_number(float(sum(work.values())))} training steps."
        ),
        render_usage(run),
        render_reproduction(run, "select", run.column_meanings.get("precision", MISSING)),
    )


def _is_single_loop(run: RunResults) -> bool:
    """Whether weights and parameters moved together, so that there was no hypergradient."""
    return run.config["outer"]["method"] in SINGLE_LOOP_METHODS
