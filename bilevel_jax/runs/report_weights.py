"""The weights in a report: their spread, by source and by label, and whether they find the labels."""

import math
from typing import Any

import numpy as np

from bilevel_jax.runs import figures
from bilevel_jax.runs.figures import COLOURS, Html, Series, element, join
from bilevel_jax.runs.page import NONE, Column, bounded, figure, note, number, paragraph, table
from bilevel_jax.runs.report_comparison import oracle
from bilevel_jax.runs.results import Results, part_of

AUCS = {
    "weights": ("learned weights", "what this run found"),
    "first_entries": ("first hypergradient", "minus the entries at weight 1: one estimate, no loop"),
    "alignment": ("alignment", "<grad loss_i, grad L_v> at the end of uniform training: the cheap way"),
    "low_loss": ("low loss", "rows that the model finds easy after uniform training: the cheapest"),
}


def weights(run: Results) -> Html:
    """How the weights spread, over all rows, by source and by label."""
    values, record, total = run.rows["weight"].astype(float), chosen(run), run.result["rows"]["train"]
    keys = ["label", "source"] if run.labelled else ["source"]
    several = [key for key in keys if len(set(run.rows[key])) > 1]
    by = several[0] if several else keys[0]
    pictures = [
        figure(
            figures.histogram(groups(run, by), axis(run), reference=1.0),
            f"Rows by weight{f', coloured by {by}' if several else ''}. Dashed: weight 1, where every row began.",
        ),
        figure(
            held(values, "learned"),
            "How much of all weight the rows with the largest weights hold. Dashed orange: equal weights; the higher "
            "the curve, the fewer rows count.",
        ),
    ]
    if "source" in several and run.labelled:  # without labels the first picture of the page shows the sources
        pictures.append(
            figure(
                figures.strips(groups(run, "source"), axis(run), reference=1.0),
                "Weights by source. Bar: median.",
            )
        )
    spread = (
        "A weight multiplies its row's loss; 1 is plain training. Together the weights amount to "
        f"{number(record['ess'])} equally weighted rows of {total:,} (ESS); their entropy is "
        f"{number(record['entropy'])} nats, of at most log {total:,} = {number(math.log(total))}; the largest is "
        f"{number(record['largest'])}, the least {number(float(values.min()))}, the median "
        f"{number(float(np.median(values)))}."
    )
    return join(
        paragraph(spread),
        note("All weights are equal: this run tells no row from another.", "warning") if equal(values) else None,
        element("div", *pictures, class_="pair"),
        *(join(element("h3", f"By {key}"), by_key(run, key)) for key in keys),
        _aucs(run),
    )


def chosen(run: Results) -> dict[str, Any]:
    """The record of the outer step whose weights these are."""
    return run.result["records"][run.result["best"]]


def equal(values: np.ndarray) -> bool:
    """Whether all rows have one weight, up to rounding."""
    return bool(np.ptp(values) <= 1e-6 * max(abs(float(values.max())), 1e-30))


def held(values: np.ndarray, name: str) -> Html:
    """How much of all weight the rows with the largest weights hold."""
    share = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])]) / (values.sum() or math.nan)
    at = [0.0, 1, 2, 5, *range(10, 101, 10)]
    shares = [100 * float(np.interp(percent / 100 * len(values), np.arange(len(share)), share)) for percent in at]
    curves = [Series(name, at, shares), Series("equal", [0, 100], [0, 100], 1)]
    return figures.lines(curves, "rows with the largest weights, % of all rows", "share of all weight, %")


def by_key(run: Results, key: str) -> Html:
    """A table of the weights of each label or source."""
    values, kept = run.rows["weight"].astype(float), run.rows.get("selected")
    masks = _masks(run, key, 20)
    total = values.sum() or math.nan
    return table(
        Column(key, [bounded(name) for name, _ in masks]),
        Column("rows", [int(mask.sum()) for _, mask in masks]),
        Column("share", [100 * float(mask.mean()) for _, mask in masks], "% of rows"),
        Column("share", [100 * float(values[mask].sum() / total) for _, mask in masks], "% of weight"),
        Column("mean", [float(values[mask].mean()) for _, mask in masks], "weight"),
        Column("median", [float(np.median(values[mask])) for _, mask in masks], "weight"),
        Column("least", [float(values[mask].min()) for _, mask in masks], "weight"),
        Column("largest", [float(values[mask].max()) for _, mask in masks], "weight"),
        *([] if kept is None else [Column("kept", [int(kept[mask].sum()) for _, mask in masks], "rows")]),
    )


def _aucs(run: Results) -> Html | None:
    found = run.result["auc"]
    if not found:
        return None
    rankings = {key: words for key, words in AUCS.items() if key in found}  # a single-loop method has no entries
    good = run.config["data"]["good_label"]
    return join(
        element("h3", "Do the weights find the labels?"),
        paragraph(
            f"AUC: the chance that a row labelled “{good}” stands above a row with another label; .5 is guessing, 1 "
            "is perfect. The labels were never seen in training. ",
            oracle(run, part_of(run))
            or "No oracle was trained, so it is not known whether these labels matter for L_v.",
        ),
        table(
            Column(
                "ranking rows by",
                [join(element("b", name), element("span", words, class_="sub")) for name, words in rankings.values()],
            ),
            Column("AUC", [found[key] for key in rankings]),
        ),
        note(f"{NONE}: all rows carry one kind of label.") if None in found.values() else None,
    )


def axis(run: Results) -> str:
    """What the axis of the weights says."""
    floor = figures.floor_of(run.rows["weight"].astype(float))
    beyond = int((run.rows["weight"] < floor).sum()) if floor else 0
    return (
        "weight"
        + (" (log scale)" if floor else "")
        + (f"; {beyond:,} rows below the axis, at its edge" if beyond else "")
    )


def _masks(run: Results, key: str, most: int) -> list[tuple[str, np.ndarray]]:
    """(name, which rows) of the labels or sources, the good label first, then by size; the smallest gathered in one."""
    values = np.array([f"no {key}" if value is None else value for value in run.rows[key]], dtype=object)
    good = run.config["data"]["good_label"] if key == "label" else None
    names = sorted(set(values), key=lambda name: (name != good, -int((values == name).sum()), name))
    if len(names) > most:
        names, rest = names[: most - 1], names[most - 1 :]
        return [*((name, values == name) for name in names), (f"{len(rest)} others", np.isin(values, rest))]
    return [(name, values == name) for name in names]


def groups(run: Results, key: str) -> list[tuple[str, np.ndarray]]:
    """(name, weights) of at most as many groups as a figure can tell apart."""
    values = run.rows["weight"].astype(float)
    return [(name, values[mask]) for name, mask in _masks(run, key, COLOURS)]
