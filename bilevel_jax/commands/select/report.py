"""The report page of a `select` run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS, SelectionSection
from bilevel_jax.runs.engine import selection
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.certificates import VERDICT_STYLES, describe_certificates
from bilevel_jax.runs.report.comparison import (
    describe_comparison,
    describe_seeds,
    difference_from_uniform,
    find_variant,
    plot_comparison,
    variant_interval,
)
from bilevel_jax.runs.report.evaluation import describe_run_evaluation
from bilevel_jax.runs.report.examples import describe_extreme_examples, describe_text
from bilevel_jax.runs.report.figures import Series
from bilevel_jax.runs.report.html import Column, Table, bold_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import (
    MISSING,
    MeanInterval,
    format_interval,
    format_number,
    format_percent,
)
from bilevel_jax.runs.report.raters import describe_rater
from bilevel_jax.runs.report.reproduction import describe_reproduction
from bilevel_jax.runs.report.results import RunResults, float_or_nan, most_independent_part, read_results
from bilevel_jax.runs.report.targets import describe_target_results
from bilevel_jax.runs.report.weights import (
    best_record,
    describe_label_ranking,
    describe_weights,
    group_weights,
    weight_axis_label,
)
from bilevel_jax.runs.tasks.splits import PART_NAMES

FIRST_PICTURE_VARIANTS = ("oracle", "uniform", "learned", "learned+validation", "selected", "random")
"""Variants of the first picture, from the top."""
PART_USES = {
    "train": "get weights",
    "validation": "steer the weights",
    "dev": "choose the outer step",
    "test": "are read for this report alone",
}
NUM_CONTRADICTIONS_SHOWN = 20
"""Validation examples that are shown, those of the least gain."""
COST_LABELS = {
    "contradictions": "contradictions within validation",
    "outer": "learning: training and backward pass, once per outer step",
    "certify": "certificates",
    "folds": "intervals of the rater: its steps without each fold of validation",
    "compare": "the comparison",
}


def write_select_report(folder: Path, examples: Sequence[Example], validation: Sequence[Example] = ()) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training examples, for their text; they are joined by id, as
    those of `validation` are. All text from data, config and environment is escaped: training data is hostile.
    """
    run = read_results(folder, examples)
    path = folder / "report.html"
    evaluations = describe_run_evaluation(folder, run.result)
    contradictions = describe_contradictions(folder, run, validation)
    run_dir.write_atomic(path, render_select_report(run, evaluations, contradictions))
    return path


def render_select_report(
    run: RunResults,
    evaluations: Sequence[dict[str, Any]] = (),
    contradictions: dict[str, Any] | None = None,
) -> str:
    """The whole report as HTML; `evaluations` are comparisons of answers to evaluate.prompts, `contradictions` those
    within validation (`describe_contradictions`)."""
    verdict, verdicts = run.result["verdict"], run.result["verdicts"]
    kind, icon = VERDICT_STYLES[verdict["level"]]
    return render_page(
        "select.html",
        run=run,
        result=run.result,
        part=most_independent_part(run),
        single_loop=_is_single_loop(run),
        record=best_record(run),
        verdict=verdict | {"kind": kind, "icon": icon},
        certified=any(place["exact"] for place in run.result["certificates"].values()),
        learned=verdicts.get("learned weights"),
        headline=write_headline(run),
        pictures=draw_first_pictures(run),
        key_numbers=list_key_numbers(run),
        rater=describe_rater(run.result["rater"], run.result.get("rater_intervals")),
        comparison=describe_comparison(run),
        evaluations=evaluations,
        targets=describe_target_results(
            run.result.get("targets", []),
            {row["name"]: [one.get("targets") for one in row["runs"]] for row in run.result["compare"]},
        ),
        loop=describe_outer_loop(run),
        contradictions=contradictions,
        gap=measure_generalization_gap(run),
        weights=describe_weights(run),
        ranking=describe_label_ranking(run),
        examples=describe_extreme_examples(run),
        certificates=describe_certificates(run),
        data=data_table(run),
        costs=costs_table(run),
        reproduction=describe_reproduction(run, "select", run.column_meanings.get("precision", MISSING)),
    )


# ---- the verdict and the headline


def draw_first_pictures(run: RunResults) -> list[tuple[Markup, str]]:
    """The two pictures at the top, with their captions: losses, and weights by label or source."""
    key = "label" if run.has_labels else "source"
    weights = figures.plot_strips(group_weights(run, key), weight_axis_label(run), reference=1.0)
    weights_caption = f"Learned weights by {key}. Bar: median; dashed: weight 1, where every example began."
    if not (variants := run.result["compare"]):
        caption = "Loss while the weights were learned; nothing was retrained to compare."
        return [(_plot_validation_losses(run), caption), (weights, weights_caption)]
    shown = [row for name in FIRST_PICTURE_VARIANTS if (row := find_variant(run, name))] or variants
    caption = (
        "Measured: models retrained from scratch. Dot: mean; bar: 95 % interval; small dots: each of "
        f"{describe_seeds(run)}. Further left is better."
    )
    return [(plot_comparison(run, shown, most_independent_part(run)), caption), (weights, weights_caption)]


def write_headline(run: RunResults) -> tuple[str, str]:
    """The one number, learned against uniform weights on test, paired by seed: (in bold, the rest)."""
    no_number = "There is no headline number: "
    if not run.result["compare"]:
        return no_number, (
            "the comparison was skipped (--fast or retrain.enabled: false). Whether these weights give a better model "
            "was not measured."
        )
    part = most_independent_part(run)
    if not (gain := difference_from_uniform(run, "learned", part)):
        return no_number, "the comparison lacks “uniform” or “learned” (retrain.variants)."
    verb, size = "lower" if gain.mean < 0 else "raise", abs(gain.mean)
    if run.result["best"] == 0 and gain.mean == 0:
        words = (
            f"No outer step was better on dev: the weights are the uniform ones of step 0, and {part} loss is the same "
            "as with uniform weights."
        )
    elif math.isnan(gain.half_width):
        words = (
            f"Learned weights {verb} {part} loss by {format_number(size)} {run.unit} against uniform weights, with one "
            "seed: no interval, so this may be chance."
        )
    elif size <= gain.half_width:
        words = (
            f"Learned and uniform weights cannot be told apart on {part}: learned minus uniform is "
            f"{format_interval(gain)} {run.unit} over {describe_seeds(run)}."
        )
    else:
        amount = format_interval(MeanInterval(size, gain.half_width)).removeprefix("+")
        words = (
            f"Learned weights {verb} {part} loss by {amount} {run.unit} against uniform weights, "
            f"over {describe_seeds(run)}."
        )
    where = f"There is no test, so this is read on {part}, which the weights have seen."
    return words, "" if part == "test" else where


def list_key_numbers(run: RunResults) -> list[tuple[str, str, str]]:
    """The headline numbers: (what, number, unit)."""
    part, total = most_independent_part(run), run.result["rows"]["train"]
    ess = float(best_record(run)["ess"])
    numbers = []
    for name in ("learned", "uniform"):
        if row := find_variant(run, name):
            loss = format_interval(variant_interval(row, part)).removeprefix("+")
            numbers.append((f"{part} loss, {name}", loss, run.unit))
    if gain := difference_from_uniform(run, "learned", part):
        numbers.append(("learned − uniform, paired", format_interval(gain), f"{run.unit}; below 0 is better"))
    rule = selection.describe_selection_rule(SelectionSection(**run.config["selection"]))
    return [
        *numbers,
        ("training examples", f"{total:,}", f"{run.result['selected']:,} selected: {rule}"),
        ("effective sample size", format_number(ess), f"examples, {format_percent(ess / total)} of all"),
        ("validation examples", f"{_count_rows(run, 'validation'):,}", "which steer the weights"),
    ]


# ---- contradictions within validation


def describe_contradictions(folder: Path, run: RunResults, validation: Sequence[Example] = ()) -> dict[str, Any] | None:
    """What each validation example gained by the others, and those that lost; None where it was not measured."""
    if not (measured := run.result.get("contradictions")):
        return None
    rows = run_dir.read_parquet(folder / "validation.parquet").to_pylist()
    rows = sorted((row for row in rows if not math.isnan(row["gain"])), key=lambda row: row["gain"])
    text_of = {example.id: describe_text(example) for example in validation}
    groups = {True: "contradict the others", False: "do not"}
    strips = [
        (words, np.array([row["gain"] for row in rows if row["contradicts"] is is_one]))
        for is_one, words in groups.items()
    ]
    axis = f"gain where other parts choose the weights, {run.unit}"
    shown = [row for row in rows if row["contradicts"]][:NUM_CONTRADICTIONS_SHOWN]
    return measured | {
        "picture": figures.plot_strips([strip for strip in strips if len(strip[1])], axis, reference=0),
        "lines": [
            {
                "gain": format_interval(MeanInterval(row["gain"], row["standard_error"])),
                "source": row["source"],
                "label": row["label"],
                "place": f"{row['file']}:{row['line']}",
                "id": row["id"],
            }
            | text_of.get(row["id"], describe_text(None))
            for row in shown
        ],
    }


def _count_rows(run: RunResults, part: str) -> int:
    """The examples of a part; of validation those that steer the weights (all in runs of earlier versions)."""
    judges = {"validation": run.result["judges"]} if "judges" in run.result else {}
    return (run.result["rows"] | judges).get(part, 0)


# ---- the outer loop


def describe_outer_loop(run: RunResults) -> dict[str, Any]:
    """Losses and the effective sample size over the outer steps, and which step was chosen."""
    records, best = run.result["records"], run.result["best"]
    steps = [record["step"] for record in records]
    sizes = Series("ESS", steps, [float_or_nan(record["ess"]) for record in records])
    test_losses = [float_or_nan(record["loss"].get("test")) for record in records]
    has_test = records[0]["loss"].get("test") is not None
    lowest = int(np.argmin(test_losses)) if has_test else best
    return {
        "has_dev": records[0]["loss"].get("dev") is not None,
        "has_test": has_test,
        "lowest": {"step": lowest, "loss": test_losses[lowest], "chosen": test_losses[best]},
        "losses": _plot_validation_losses(run),
        "sizes": figures.plot_lines(
            [sizes],
            "outer step",
            "effective sample size, examples",
            vertical_mark=_chosen_step_mark(run),
            y_values_shown=[0, run.result["rows"]["train"]],
        ),
        "reliability": plot_reliability(run),
        "pooling": describe_pooling(run),
        "table": outer_steps_table(run),
    }


def describe_pooling(run: RunResults) -> dict[str, Any]:
    """How reliable the parts of pooled steps were, over the outer steps; nothing where steps were per example."""
    records = [record for record in run.result["records"] if record.get("pooling")]
    if not records:
        return {}
    steps = [record["step"] for record in records]
    names = {"shared": "shared part", "own": "own part"}
    curves = [
        Series(words, steps, [record["pooling"][part] for record in records], colour)
        for colour, (part, words) in enumerate(names.items())
    ]
    moved = records[:-1] or records  # nothing is stepped after the last training
    return {
        "estimate": run.config["outer"]["estimate"],
        "first": moved[0]["pooling"],
        "last": moved[-1]["pooling"],
        "still": sum(not any(record["pooling"].values()) for record in moved),
        "picture": figures.plot_lines(curves, "outer step", "reliability, 0 to 1", y_values_shown=[0, 1]),
    }


def outer_steps_table(run: RunResults) -> Table:
    """A line per outer step; columns without a number are left out."""
    records = run.result["records"]
    columns = [
        Column("step", [record["step"] for record in records]),
        *(Column(part, [record["loss"].get(part) for record in records], f"loss, {run.unit}") for part in PART_NAMES),
        Column("ESS", [record["ess"] for record in records], "examples"),
        Column("entropy", [record["entropy"] for record in records], "nats"),
        Column("largest", [record["largest"] for record in records], "weight"),
        *([Column("AUC", [record["auc"] for record in records], "weights, labels")] if run.result["auc"] else []),
        Column("reliability", [record.get("reliability") for record in records], "correlation"),
        Column("fitted", [record.get("fitted_reliability") for record in records], "reliability by halves"),
        *(
            Column(name, [(record.get("pooling") or {}).get(part) for record in records], "reliability")
            for part, name in (("shared", "shared part"), ("own", "own part"))
        ),
        Column("growth", [record["checks"].get("growth") for record in records], "of the adjoint"),
        Column("residual", [record["checks"].get("residual") for record in records], "relative"),
        Column("cost", [record["work"] for record in records], "training steps"),
    ]
    columns = [column for column in columns if any(cell is not None for cell in column.cells)]
    return make_table(*columns, row_classes={run.result["best"]: "strong"})


def _plot_validation_losses(run: RunResults) -> Markup:
    """Losses over the outer steps; test has the colour that it has in the comparison."""
    records = run.result["records"]
    steps = [record["step"] for record in records]
    curves = [
        Series(part, steps, [float_or_nan(record["loss"][part]) for record in records], colour)
        for part, colour in (("validation", 1), ("dev", 2), ("test", 0))
        if records[0]["loss"].get(part) is not None
    ]
    return figures.plot_lines(curves, "outer step", f"loss, {run.unit}", vertical_mark=_chosen_step_mark(run))


def plot_reliability(run: RunResults) -> Markup | None:
    """The reliability of the hypergradient over the outer steps; None where it was not measured."""
    curves = []
    for name, key, colour in (("reliability", "reliability", 0), ("by fitted halves", "fitted_reliability", 4)):
        measured = [record for record in run.result["records"] if record.get(key) is not None]
        if measured:
            steps, values = [record["step"] for record in measured], [record[key] for record in measured]
            curves.append(Series(name, steps, values, colour))
    if not curves:
        return None
    return figures.plot_lines(
        curves,
        "outer step",
        "reliability",
        vertical_mark=_chosen_step_mark(run),
        x_values_shown=[record["step"] for record in run.result["records"]],
        y_values_shown=[0, 1],
    )


def _chosen_step_mark(run: RunResults) -> tuple[float, str]:
    return run.result["best"], f"chosen: step {run.result['best']}"


def measure_generalization_gap(run: RunResults) -> dict[str, float]:
    """Test loss minus validation loss at step 0 and at the chosen step; nothing without test."""
    initial, chosen = (
        float_or_nan(record["loss"].get("test")) - float_or_nan(record["loss"].get("validation"))
        for record in (run.result["records"][0], best_record(run))
    )
    return {} if math.isnan(chosen) else {"initial": initial, "chosen": chosen, "growth": chosen - initial}


# ---- data and cost


def data_table(run: RunResults) -> Table:
    """How many examples each part has, and what it is for."""
    counts = {part: _count_rows(run, part) for part in PART_USES}
    return make_table(
        Column("set", [bold_cell("training" if part == "train" else part) for part in counts]),
        Column("examples", list(counts.values())),
        Column("which", [PART_USES[part] if count else "none" for part, count in counts.items()]),
    )


def costs_table(run: RunResults) -> Table:
    """What each part of the run cost, in training steps and seconds."""
    work, seconds = run.result["work"], run.result.get("seconds", {})
    total = sum(work.values()) or math.nan
    return make_table(
        Column("what", [COST_LABELS.get(name, name) for name in work]),
        Column("cost", list(work.values()), "training-step equivalents"),
        Column("share", [100 * value / total for value in work.values()], "%"),
        Column("time", [seconds.get(name) for name in work], "seconds"),
    )


def _is_single_loop(run: RunResults) -> bool:
    """Whether weights and parameters moved together, so that there is no hypergradient."""
    return run.config["outer"]["method"] in SINGLE_LOOP_METHODS
