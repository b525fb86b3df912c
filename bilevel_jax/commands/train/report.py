"""The report of a `train` run: one HTML file with what was trained, what the validation loss did, and the weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.commands.train.report_scores import ScoreHistory, read_score_history, render_scores
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report import figures
from bilevel_jax.runs.report.curves import (
    TrainingLog,
    losses_caption,
    plot_learning_rates,
    plot_losses,
    read_training_log,
    written_step,
)
from bilevel_jax.runs.report.examples import render_extreme_examples
from bilevel_jax.runs.report.figures import Html, html_element, join_html
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
    render_reproduction,
    render_usage,
    verdict_banner,
)
from bilevel_jax.runs.report.numbers import (
    SignedNumber,
    capitalize_first,
    format_count,
    format_number,
    format_percent,
    format_signed,
)
from bilevel_jax.runs.report.results import PART_LABELS, RunResults, float_or_nan, read_results
from bilevel_jax.runs.report.weights import (
    all_equal,
    group_weights,
    plot_lorenz_curve,
    weight_axis_label,
    weights_by_group_table,
)

OBJECTIVE_DESCRIPTIONS = {
    "sft": "the likelihood of the responses",
    "dpo": "DPO on preference pairs",
    "simpo": "SimPO on pairs",
}


class LossChange(NamedTuple):
    """What one part of the validation examples says of the model that is written."""

    part: str
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    """nan where the written parameters are those of a step at which no accuracy was read."""

    @property
    def difference(self) -> float:
        """The change of the loss; below 0 is better."""
        return self.loss_after - self.loss_before


def write_train_report(folder: Path, examples: Sequence[Example]) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training examples, for their text; they are joined by id. All
    text from data, config and environment is escaped: training data is hostile.
    """
    path = folder / "report.html"
    text = render_train_report(
        read_results(folder, examples), read_training_log(folder / "log.jsonl"), read_score_history(folder)
    )
    run_dir.write_atomic(path, text)
    return path


def render_train_report(run: RunResults, log: TrainingLog, score_history: ScoreHistory | None = None) -> str:
    """The whole report as HTML."""
    validation_verdict = judge_validation(run)
    intro = join_html(
        "bilevel_jax train, run ",
        html_element("b", run.name),
        f". Losses are in {run.unit}, lower is better; {run.result['right']} is a {run.accuracy_unit}.",
    )
    sections = [
        ("validation", "What the validation examples say", render_validation(run)),
        *([("scores", "The scores", render_scores(run, score_history))] if score_history else []),
        ("weights", "The weights", render_weight_distribution(run)),
        ("examples", "The examples at both ends", _render_extremes(run)),
        ("model", "Load the model", render_loading_code(run)),
        ("provenance", "Data, cost, and how to see the same numbers", render_provenance(run)),
    ]
    return html_document(
        f"{run.name}: {validation_verdict.level}",
        "Fine-tuning with a weight for every row",
        intro,
        render_lead(run, log),
        sections,
    )


# ---- what is read first


class ValidationVerdict(NamedTuple):
    """What the validation loss did, in words: the box that leads the page."""

    kind: str
    icon: str
    level: str
    text: str
    advice: str


def judge_validation(run: RunResults) -> ValidationVerdict:
    """Did the loss on the most independent validation examples fall?"""
    loss_changes = compute_loss_changes(run)
    if not loss_changes:
        words = "There were no validation examples, so nothing here says whether the model became better."
        return ValidationVerdict(
            "fair", "?", "Not validated", words, "Give validation examples (data.validation) to see whether it did."
        )
    change = loss_changes[-1]
    where, count = PART_LABELS[change.part], run.result["rows"].get(change.part, 0)
    if not math.isfinite(change.difference):
        words = f"The loss on {where} is {format_number(change.loss_before)} before and {format_number(change.loss_after)} after training."
        advice = "Do not use this model: its loss is not a number. Lower optimizer.learning_rate or set optimizer.max_grad_norm."
        return ValidationVerdict("bad", "✕", "Validation loss is not finite", words, advice)
    amount = f"{format_signed(change.difference)}" + (
        f", {_format_percent(change.difference / change.loss_before)}" if change.loss_before > 0 else ""
    )
    direction = "fell" if change.difference < 0 else "rose" if change.difference > 0 else "stayed"
    words = f"The loss on {where} ({format_count('row', count)}) {direction} from {format_number(change.loss_before)} to {format_number(change.loss_after)} "
    words += run.unit + (f" ({amount})" if change.difference else "")
    if math.isfinite(change.accuracy_after):
        words += f"; {run.result['right']} went from {format_number(change.accuracy_before)} to {format_number(change.accuracy_after)}"
    if change.difference >= 0:
        advice = (
            "By these rows the model is no better than before training. Lower optimizer.learning_rate, train for "
            "fewer epochs, or ask whether rows of large weight resemble the trusted ones."
        )
        level = "Validation loss rose" if change.difference > 0 else "Validation loss did not move"
        return ValidationVerdict(
            "bad" if change.difference > 0 else "fair",
            "✕" if change.difference > 0 else "?",
            level,
            f"{words}.",
            advice,
        )
    fair = {
        "test": "test had no part in training. It is one training with one seed: a small change may be chance.",
        "dev": "There is no test. "
        + ("dev chose the step that was kept, which flatters it." if written_step(run) else "dev had no part here."),
        "validation": "There is only validation. Weights that were learned with these rows make its loss fall by design: rows that "
        "nothing has seen (data.test) would tell more.",
    }
    return ValidationVerdict("good", "✓", "Validation loss fell", f"{words}.", fair[change.part])


def render_lead(run: RunResults, log: TrainingLog) -> Html:
    """What was trained on what, what the validation loss did, and the losses as a picture."""
    validation_verdict = judge_validation(run)
    box = verdict_banner(
        validation_verdict.kind,
        validation_verdict.icon,
        validation_verdict.level,
        html_paragraph(html_element("b", validation_verdict.text)),
        html_paragraph(html_element("b", "For you: "), validation_verdict.advice),
        html_paragraph(html_element("b", "Trained: "), _describe_training(run)),
        html_paragraph(html_element("b", "Weights: "), _describe_weights(run)),
        html_paragraph(html_element("b", "Kept: "), _describe_kept_params(run)),
    )
    pictures = [html_figure(plot_losses(run, log), losses_caption(run, log))]
    if any(math.isfinite(rate) for rate in log.learning_rates):
        pictures.append(html_figure(plot_learning_rates(log), "The learning rate of each step."))
    return join_html(
        html_element(
            "div",
            html_element("div", box, class_="pictures left"),
            html_element("div", *pictures, class_="pictures"),
            class_="lead",
        ),
        render_key_numbers(run),
    )


def render_key_numbers(run: RunResults) -> Html:
    """The headline numbers in boxes."""
    total, result = run.result["rows"]["train"], run.result
    cells = []
    if loss_changes := compute_loss_changes(run):
        change = loss_changes[-1]
        cells.append(
            (
                f"loss on {PART_LABELS[change.part]}",
                format_number(change.loss_after),
                f"{run.unit}; {format_number(change.loss_before)} before",
            )
        )
        if math.isfinite(change.accuracy_after):
            unit = f"{run.accuracy_unit}; {format_number(change.accuracy_before)} before"
            cells.append(
                (f"{result['right']} on {PART_LABELS[change.part]}", format_number(change.accuracy_after), unit)
            )
    ess = float_or_nan(result["weights"]["ess"])
    cells += [
        ("rows", f"{total:,}", f"{format_count('step', result['steps'])}, {_format_epochs(run)}"),
        ("effective sample size", format_number(ess), f"rows, {format_percent(ess / total)} of all"),
        ("trained on", format_number(result["tokens"]), "supervised tokens, repeats counted"),
        ("speed", format_number(float_or_nan(result["tokens_per_second"])), "supervised tokens per second"),
    ]
    return number_tiles(cells)


def _describe_training(run: RunResults) -> Html:
    model, lora, result = run.config["model"], run.config["lora"], run.result
    what = "all parameters of "
    if lora["r"]:
        targets = ", ".join(lora["target_modules"]) or "on the projections usual for its family"
        what = f"LoRA factors of rank {lora['r']} ({targets}) of "
    steps, batch, total = result["steps"], result["batch"], result["rows"]["train"]
    return join_html(
        what,
        isolate_text(model["name_or_path"], keep_end=True),
        ", from random ones," if model["from_scratch"] else None,
        f" by {OBJECTIVE_DESCRIPTIONS[run.config['objective']['name']]}: {format_count('step', steps)} of {format_count('row', batch)}, "
        f"{_format_epochs(run)} of {format_count('row', total)}.",
    )


def _describe_weights(run: RunResults) -> Html:
    summary, values, total = run.result["weights"], run.columns["weight"].astype(float), run.result["rows"]["train"]
    words = [f"{summary['source']}."]
    if all_equal(values):
        same = float(values[0])
        words.append(
            "Every row counts the same: plain fine-tuning."
            if abs(same - 1) < 1e-6
            else f"Every row counts the same, {format_number(same)} times: plain fine-tuning with a scaled loss."
        )
    else:
        words.append(
            f"Their mean is {format_number(float_or_nan(summary['mean']))}, and they amount to {format_number(float_or_nan(summary['ess']))} equally "
            f"weighted rows of {total:,} (ESS)."
        )
    if summary["zero"]:
        words.append(f"{capitalize_first(format_count('row', summary['zero']))} with weight 0 taught nothing.")
    if summary["missing"]:
        fate = {"one": "weight 1", "zero": "weight 0", "drop": "left out"}
        missing = run.config["weights"]["missing"]
        words.append(
            f"{format_count('row', summary['missing'])} that the weights file lacks: {fate.get(missing, missing)}."
        )
    return join_html(" ".join(words))


def _describe_kept_params(run: RunResults) -> str:
    """Which parameters were written, and whether others were better."""
    if best := written_step(run):
        return f"the parameters of step {best:,} of {run.result['steps']:,}, where dev was lowest."
    words = "the parameters of the last step."
    loss_changes, records = compute_loss_changes(run), run.result["records"]
    if not loss_changes or len(records) < 2:
        return words
    part = loss_changes[-1].part
    losses = [float_or_nan(record["loss"].get(part)) for record in records]
    if not any(map(math.isfinite, losses)):
        return words
    least = int(np.nanargmin(losses))
    if 0 < least < len(losses) - 1:
        words += (
            f" {PART_LABELS[part]} was lowest at step {records[least]['step']:,}: {format_number(losses[least])} against "
            f"{format_number(losses[-1])} {run.unit} at the end. Past that point training fitted its rows rather than the "
            "trusted ones; train.load_best: true writes the step that is best on dev."
        )
    return words


# ---- the sections


def render_validation(run: RunResults) -> Html:
    """Losses and accuracies of the validation examples before and after training, and each reading."""
    loss_changes, records, best = compute_loss_changes(run), run.result["records"], written_step(run)
    if not loss_changes:
        return html_note("No validation examples were given (data.validation), so no loss was read on any.", "warning")
    written = run.result["steps"] if best is None else best
    after = f"after step {written:,}"
    uses = {
        "validation": "the holdout of the score"
        if run.config["weights"]["score"]
        else "read only here; select learns weights from it",
        "dev": "chooses the step" if best is not None else "may choose a step (train.load_best: true)",
        "test": "kept apart, read only",
    }
    parts = [item.part for item in loss_changes]
    right = run.result["right"]
    main = html_table(
        Column("set", [html_element("b", PART_LABELS[part]) for part in parts], css_class="tight"),
        Column("rows", [run.result["rows"].get(part) for part in parts]),
        Column("before", [item.loss_before for item in loss_changes], f"loss, {run.unit}"),
        Column(after, [item.loss_after for item in loss_changes], f"loss, {run.unit}"),
        Column("change", [SignedNumber(item.difference) for item in loss_changes], f"{run.unit}; below 0 is better"),
        Column("before", [item.accuracy_before for item in loss_changes], f"{right}, {run.accuracy_unit}"),
        Column(after, [item.accuracy_after for item in loss_changes], f"{right}, {run.accuracy_unit}"),
        Column("use", [uses[part] for part in parts]),
    )
    readings = html_table(
        Column("step", [record["step"] for record in records]),
        *(
            Column(PART_LABELS[item], [record["loss"].get(item) for record in records], f"loss, {run.unit}")
            for item in parts
        ),
        *(
            Column(PART_LABELS[item], [(record["accuracy"] or {}).get(item) for record in records], right)
            for item in parts
            if any((record["accuracy"] or {}).get(item) is not None for record in records)
        ),
        row_classes={index: "strong" for index, record in enumerate(records) if record["step"] == written},
    )
    rose = [PART_LABELS[item.part] for item in loss_changes if item.difference > 0]
    pairs = run.config["objective"]["name"] == "dpo"
    return join_html(
        html_note(f"The loss rose on {', '.join(rose)}.", "warning") if rose else None,
        main,
        html_note("The DPO loss of a model that is its own reference is log 2 = 0.6931: a coin toss.")
        if pairs
        else None,
        html_note(f"No accuracy was read at step {written:,}; it is read at both ends of training.")
        if any(math.isnan(item.accuracy_after) and not math.isnan(item.accuracy_before) for item in loss_changes)
        else None,
        html_details(f"Each of the {len(records)} readings", readings),
    )


def render_weight_distribution(run: RunResults) -> Html:
    """How the weights spread, over all rows, by source and by label."""
    values, summary = run.columns["weight"].astype(float), run.result["weights"]
    keys = ["label", "source"] if run.has_labels else ["source"]
    several = [key for key in keys if len(set(run.columns[key])) > 1]
    by = several[0] if several else keys[0]
    pictures = None
    if not all_equal(values):
        pictures = html_element(
            "div",
            html_figure(
                figures.plot_histogram(group_weights(run, by), weight_axis_label(run), reference=1.0),
                f"Rows by weight{f', coloured by {by}' if several else ''}; dashed: weight 1. ESS = (Σw)²/Σw²: they "
                f"amount to {format_number(float_or_nan(summary['ess']))} equally weighted rows of {len(values):,}.",
            ),
            html_figure(
                plot_lorenz_curve(values, "these weights"),
                "How much of all weight the rows with the largest weights hold. Dashed orange: equal weights; the "
                "higher the curve, the fewer rows count.",
            ),
            class_="pair",
        )
    return join_html(
        html_paragraph("A weight multiplies its row's loss; 1 is plain training, 0 leaves the row out."),
        html_paragraph(html_element("b", "Here: "), _describe_weights(run)),
        pictures,
        *(join_html(html_element("h3", f"By {key}"), weights_by_group_table(run, key)) for key in keys),
    )


def _render_extremes(run: RunResults) -> Html:
    """The rows with the largest and the least weights, where weights differ."""
    if all_equal(run.columns["weight"].astype(float)):
        return html_paragraph("All weights are equal, so no row stands out.")
    return render_extreme_examples(run)


def render_loading_code(run: RunResults) -> Html:
    """The few lines that load what was written."""
    config = run.config
    folder, base_path, rank = config["output"]["dir"], config["model"]["name_or_path"], config["lora"]["r"]
    parts = config["output"]["model"] if rank else "full"
    full = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({f'{folder}/model'!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({f'{folder}/model'!r})"
    )
    adapter = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base_path!r})\n"
        f"model = PeftModel.from_pretrained(base, {f'{folder}/model-adapter'!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base_path!r})"
    )
    whole = "The whole model" + (", with the LoRA factors folded in" if rank else "") + ", by transformers:"
    return join_html(
        join_html(html_paragraph(whole), html_element("pre", full)) if parts != "adapter" else None,
        join_html(
            html_paragraph("The LoRA factors on top of the model they were trained on, by PEFT:"),
            html_element("pre", adapter),
        )
        if parts != "full"
        else None,
        html_note("The paths are those that the run was given: relative to where it was started."),
    )


def render_provenance(run: RunResults) -> Html:
    """Rows, notes, cost, and what another person needs to see the same numbers."""
    result, model = run.result, run.config["model"]
    sets = {"train": "training", **PART_LABELS}
    data = html_table(
        Column("set", [words for part, words in sets.items() if result["rows"].get(part)]),
        Column("rows", [result["rows"][part] for part in sets if result["rows"].get(part)]),
    )
    seconds = float_or_nan(result["seconds"])
    costs: list[tuple[str, Any, str]] = [
        ("steps", result["steps"], f"updates of the parameters, each from {format_count('row', result['batch'])}"),
        ("epochs", _integer_if_whole(result["epochs"]), "passes over the training examples"),
        ("tokens", result["tokens"], "supervised tokens that were trained on, repeats counted"),
        ("time", seconds, f"seconds of training{_format_duration(seconds)}, without reading the validation examples"),
        ("speed", float_or_nan(result["tokens_per_second"]), "supervised tokens per second, after the compilation"),
    ]
    resumed = result["resumed"]
    return join_html(
        html_element("h3", "Data"),
        data,
        html_element("ul", *(html_element("li", remark) for remark in result["notes"])) if result["notes"] else None,
        html_element("h3", "Cost"),
        html_table(
            Column("what", [html_element("b", what) for what, *_ in costs]),
            Column("amount", [amount for _, amount, _ in costs]),
            Column("unit", [unit for *_, unit in costs]),
        ),
        html_note(f"The run was stopped and went on at step {resumed:,}; its speed is that of the last part.")
        if resumed
        else None,
        render_usage(run),
        render_reproduction(
            run,
            "train",
            f"{model['param_dtype']} parameters, matrix products of {run.config['train']['compute_dtype']} factors",
        ),
    )


# ---- numbers and words


def compute_loss_changes(run: RunResults) -> list[LossChange]:
    """What each part of the validation examples says of the written model, the most independent part last."""
    best, records = written_step(run), run.result["records"]
    loss_changes = []
    for part in PART_LABELS:
        if not (ends := run.result["parts"].get(part)):
            continue
        after = ends["after"]
        if best is not None and best != records[-1]["step"]:
            record = next(record for record in records if record["step"] == best)
            after = {"loss": record["loss"][part], "accuracy": (record["accuracy"] or {}).get(part)}
        values = (ends["before"]["loss"], after["loss"], ends["before"]["accuracy"], after["accuracy"])
        loss_changes.append(LossChange(part, *map(float_or_nan, values)))
    return loss_changes


def _format_epochs(run: RunResults) -> str:
    epochs = _integer_if_whole(run.result["epochs"])
    return f"{format_number(epochs)} epoch{'s' if epochs != 1 else ''}"


def _integer_if_whole(value: float) -> float:
    """A whole number without its point."""
    return int(value) if float(value).is_integer() else value


def _format_percent(share: float) -> str:
    return f"{100 * share:+.1f}\u00a0%".replace("-", "−")


def _format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, where there are minutes."""
    if not seconds >= 60:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f" ({f'{hours:,} h ' if hours else ''}{minutes} min {rest} s)"
