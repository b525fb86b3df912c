"""Report section on the distribution of weights by source and label."""

import math
from typing import Any

import numpy as np
from markupsafe import Markup

from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.comparison import describe_oracle
from bilevel_jax.runs.report.figures import NUM_COLOURS, Series
from bilevel_jax.runs.report.html import Column, Table, bold_cell, isolated_cell, make_table
from bilevel_jax.runs.report.results import RunResults, most_independent_part

RANKING_LABELS = {
    "weights": ("learned weights", "the weights of this run"),
    "first_hypergradient": ("first hypergradient", "minus the hypergradient at weight 1: one estimate, no outer loop"),
    "alignment": ("alignment", "<grad loss_i, grad validation loss> at the end of uniform training: the cheap way"),
    "low_loss": ("low_loss", "examples that the model finds easy after uniform training: the cheapest"),
}


def describe_weights(run: RunResults) -> dict[str, Any]:
    """The values of the template `weights.html`: the spread of the weights."""
    values = run.columns["weight"].astype(float)
    keys = ["label", "source"] if run.has_labels else ["source"]
    varied_keys = [key for key in keys if len(set(run.columns[key])) > 1]
    group_key = varied_keys[0] if varied_keys else keys[0]
    return {
        "total": len(values),
        "ess": float(values.sum() ** 2 / ((values**2).sum() or math.nan)),
        "max_entropy": math.log(len(values)),
        "least": float(values.min()),
        "median": float(np.median(values)),
        "equal": all_equal(values),
        "coloured_by": group_key if varied_keys else "",
        "histogram": figures.plot_histogram(group_weights(run, group_key), weight_axis_label(run), reference=1.0),
        "lorenz": plot_lorenz_curve(values, "weights"),
        "strips": figures.plot_strips(group_weights(run, "source"), weight_axis_label(run), reference=1.0)
        if "source" in varied_keys and run.has_labels  # without labels the first picture of the page shows the sources
        else None,
        "groups": {key: weights_by_group_table(run, key) for key in keys},
    }


def describe_label_ranking(run: RunResults) -> dict[str, Any]:
    """How well each ranking of the examples finds the good label; nothing without labels."""
    aucs = run.result["auc"]
    if not aucs:
        return {}
    rankings = {key: words for key, words in RANKING_LABELS.items() if key in aucs}  # single-loop methods lack some
    return {
        "good_label": run.config["data"]["good_label"],
        "oracle": describe_oracle(run, most_independent_part(run)),
        "table": make_table(
            Column("ranking examples by", [bold_cell(name, sub=meaning) for name, meaning in rankings.values()]),
            Column("AUC", [aucs[key] for key in rankings]),
        ),
        "undefined": None in aucs.values(),
        "unlabelled": (run.result.get("labels") or {}).get("unlabelled", 0),
    }


def best_record(run: RunResults) -> dict[str, Any]:
    """The record of the outer step whose weights these are."""
    return run.result["records"][run.result["best"]]


def all_equal(values: np.ndarray) -> bool:
    """Whether all examples have one weight, up to rounding."""
    return bool(np.ptp(values) <= 1e-6 * max(abs(float(values.max())), 1e-30))


def plot_lorenz_curve(values: np.ndarray, name: str) -> Markup:
    """How much of all weight the examples with the largest weights hold."""
    share = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])]) / (values.sum() or math.nan)
    percents = [0.0, 1, 2, 5, *range(10, 101, 10)]
    shares = [100 * float(np.interp(percent / 100 * len(values), np.arange(len(share)), share)) for percent in percents]
    curves = [Series(name, percents, shares), Series("equal", [0, 100], [0, 100], 1)]
    return figures.plot_lines(curves, "examples with the largest weights, % of all", "share of all weight, %")


def weights_by_group_table(run: RunResults, key: str) -> Table:
    """A table of the weights of each label or source."""
    values, selected = run.columns["weight"].astype(float), run.columns.get("selected")
    masks = _group_masks(run, key, 20)
    total = values.sum() or math.nan
    return make_table(
        Column(key, [isolated_cell(name) for name, _ in masks]),
        Column("examples", [int(mask.sum()) for _, mask in masks]),
        Column("share", [100 * float(mask.mean()) for _, mask in masks], "% of examples"),
        Column("share", [100 * float(values[mask].sum() / total) for _, mask in masks], "% of weight"),
        Column("mean", [float(values[mask].mean()) for _, mask in masks], "weight"),
        Column("median", [float(np.median(values[mask])) for _, mask in masks], "weight"),
        Column("least", [float(values[mask].min()) for _, mask in masks], "weight"),
        Column("largest", [float(values[mask].max()) for _, mask in masks], "weight"),
        *([] if selected is None else [Column("kept", [int(selected[mask].sum()) for _, mask in masks], "examples")]),
    )


def weight_axis_label(run: RunResults) -> str:
    """The label of an axis of weights."""
    floor = figures.log_axis_floor(run.columns["weight"].astype(float))
    beyond = int((run.columns["weight"] < floor).sum()) if floor else 0
    return (
        "weight"
        + (" (log scale)" if floor else "")
        + (f"; {beyond:,} examples below the axis, at its edge" if beyond else "")
    )


def _group_masks(run: RunResults, key: str, max_groups: int) -> list[tuple[str, np.ndarray]]:
    """(name, which examples) of the labels or sources: the good label, then by size; the smallest gathered in one."""
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
