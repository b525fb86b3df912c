"""The weights in a report: their spread, by source and by label, and whether they find the labels."""

import math
from typing import Any

import numpy as np

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.comparison import describe_oracle
from bilevel_jax.runs.report.figures import NUM_COLOURS, Html, Series, html_element, join_html
from bilevel_jax.runs.report.html import Column, html_figure, html_note, html_paragraph, html_table, isolate_text
from bilevel_jax.runs.report.numbers import MISSING, format_number
from bilevel_jax.runs.report.results import RunResults, most_independent_part

RANKING_LABELS = {
    "weights": ("learned weights", "what this run found"),
    "first_hypergradient": ("first hypergradient", "minus the entries at weight 1: one estimate, no loop"),
    "alignment": ("alignment", "<grad loss_i, grad L_v> at the end of uniform training: the cheap way"),
    "low_loss": ("low loss", "rows that the model finds easy after uniform training: the cheapest"),
}


def render_weights(run: RunResults) -> Html:
    """How the weights spread, over all rows, by source and by label."""
    values, record, total = run.columns["weight"].astype(float), best_record(run), run.result["rows"]["train"]
    keys = ["label", "source"] if run.has_labels else ["source"]
    varied_keys = [key for key in keys if len(set(run.columns[key])) > 1]
    group_key = varied_keys[0] if varied_keys else keys[0]
    pictures = [
        html_figure(
            figures.plot_histogram(group_weights(run, group_key), weight_axis_label(run), reference=1.0),
            f"Rows by weight{f', coloured by {group_key}' if varied_keys else ''}. Dashed: weight 1, where every row began.",
        ),
        html_figure(
            plot_lorenz_curve(values, "learned"),
            "How much of all weight the rows with the largest weights hold. Dashed orange: equal weights; the higher "
            "the curve, the fewer rows count.",
        ),
    ]
    if "source" in varied_keys and run.has_labels:  # without labels the first picture of the page shows the sources
        pictures.append(
            html_figure(
                figures.plot_strips(group_weights(run, "source"), weight_axis_label(run), reference=1.0),
                "Weights by source. Bar: median.",
            )
        )
    summary = (
        "A weight multiplies its row's loss; 1 is plain training. Together the weights amount to "
        f"{format_number(record['ess'])} equally weighted rows of {total:,} (ESS); their entropy is "
        f"{format_number(record['entropy'])} nats, of at most log {total:,} = {format_number(math.log(total))}; the largest is "
        f"{format_number(record['largest'])}, the least {format_number(float(values.min()))}, the median "
        f"{format_number(float(np.median(values)))}."
    )
    return join_html(
        html_paragraph(summary),
        html_note("All weights are equal: this run tells no row from another.", "warning")
        if all_equal(values)
        else None,
        html_element("div", *pictures, class_="pair"),
        *(join_html(html_element("h3", f"By {key}"), weights_by_group_table(run, key)) for key in keys),
        _render_aucs(run),
    )


def best_record(run: RunResults) -> dict[str, Any]:
    """The record of the outer step whose weights these are."""
    return run.result["records"][run.result["best"]]


def all_equal(values: np.ndarray) -> bool:
    """Whether all rows have one weight, up to rounding."""
    return bool(np.ptp(values) <= 1e-6 * max(abs(float(values.max())), 1e-30))


def plot_lorenz_curve(values: np.ndarray, name: str) -> Html:
    """How much of all weight the rows with the largest weights hold."""
    share = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])]) / (values.sum() or math.nan)
    percents = [0.0, 1, 2, 5, *range(10, 101, 10)]
    shares = [100 * float(np.interp(percent / 100 * len(values), np.arange(len(share)), share)) for percent in percents]
    curves = [Series(name, percents, shares), Series("equal", [0, 100], [0, 100], 1)]
    return figures.plot_lines(curves, "rows with the largest weights, % of all rows", "share of all weight, %")


def weights_by_group_table(run: RunResults, key: str) -> Html:
    """A table of the weights of each label or source."""
    values, selected = run.columns["weight"].astype(float), run.columns.get("selected")
    masks = _group_masks(run, key, 20)
    total = values.sum() or math.nan
    return html_table(
        Column(key, [isolate_text(name) for name, _ in masks]),
        Column("rows", [int(mask.sum()) for _, mask in masks]),
        Column("share", [100 * float(mask.mean()) for _, mask in masks], "% of rows"),
        Column("share", [100 * float(values[mask].sum() / total) for _, mask in masks], "% of weight"),
        Column("mean", [float(values[mask].mean()) for _, mask in masks], "weight"),
        Column("median", [float(np.median(values[mask])) for _, mask in masks], "weight"),
        Column("least", [float(values[mask].min()) for _, mask in masks], "weight"),
        Column("largest", [float(values[mask].max()) for _, mask in masks], "weight"),
        *([] if selected is None else [Column("kept", [int(selected[mask].sum()) for _, mask in masks], "rows")]),
    )


def _render_aucs(run: RunResults) -> Html | None:
    aucs = run.result["auc"]
    if not aucs:
        return None
    rankings = {
        key: words for key, words in RANKING_LABELS.items() if key in aucs
    }  # a single-loop method has no entries
    good = run.config["data"]["good_label"]
    return join_html(
        html_element("h3", "Do the weights find the labels?"),
        html_paragraph(
            f"AUC: the chance that a row labelled “{good}” stands above a row with another label; .5 is guessing, 1 "
            "is perfect. The labels were never seen in training. ",
            describe_oracle(run, most_independent_part(run))
            or "No oracle was trained, so it is not known whether these labels matter for L_v.",
        ),
        html_table(
            Column(
                "ranking rows by",
                [
                    join_html(html_element("b", name), html_element("span", words, class_="sub"))
                    for name, words in rankings.values()
                ],
            ),
            Column("AUC", [aucs[key] for key in rankings]),
        ),
        html_note(f"{MISSING}: all rows carry one kind of label.") if None in aucs.values() else None,
    )


def weight_axis_label(run: RunResults) -> str:
    """What the axis of the weights says."""
    floor = figures.log_axis_floor(run.columns["weight"].astype(float))
    beyond = int((run.columns["weight"] < floor).sum()) if floor else 0
    return (
        "weight"
        + (" (log scale)" if floor else "")
        + (f"; {beyond:,} rows below the axis, at its edge" if beyond else "")
    )


def _group_masks(run: RunResults, key: str, max_groups: int) -> list[tuple[str, np.ndarray]]:
    """(name, which rows) of the labels or sources, the good label first, then by size; the smallest gathered in one."""
    values = np.array([f"no {key}" if value is None else value for value in run.columns[key]], dtype=object)
    good = run.config["data"]["good_label"] if key == "label" else None
    names = sorted(set(values), key=lambda name: (name != good, -int((values == name).sum()), name))
    if len(names) > max_groups:
        names, rest = names[: max_groups - 1], names[max_groups - 1 :]
        return [*((name, values == name) for name in names), (f"{len(rest)} others", np.isin(values, rest))]
    return [(name, values == name) for name in names]


def group_weights(run: RunResults, key: str) -> list[tuple[str, np.ndarray]]:
    """(name, weights) of at most as many groups as a figure can tell apart."""
    values = run.columns["weight"].astype(float)
    return [(name, values[mask]) for name, mask in _group_masks(run, key, NUM_COLOURS)]
