"""The report page of a `train` run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from bilevel_jax.commands.train.report_scores import ScoreHistory, describe_scores, read_score_history
from bilevel_jax.lm.data.examples import Example, format_count
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.report.curves import (
    TrainingLog,
    losses_caption,
    plot_learning_rates,
    plot_losses,
    read_training_log,
    written_step,
)
from bilevel_jax.runs.report.evaluation import describe_run_evaluation
from bilevel_jax.runs.report.examples import describe_extreme_examples
from bilevel_jax.runs.report.html import Column, Table, bold_cell, make_table, render_page
from bilevel_jax.runs.report.numbers import (
    SignedNumber,
    capitalize_first,
    format_number,
    format_percent,
    format_signed,
)
from bilevel_jax.runs.report.reproduction import describe_reproduction
from bilevel_jax.runs.report.results import RunResults, float_or_nan, read_results
from bilevel_jax.runs.report.weights import all_equal, describe_weights
from bilevel_jax.runs.tasks.splits import PART_NAMES

OBJECTIVE_DESCRIPTIONS = {
    "sft": "the likelihood of the responses",
    "dpo": "DPO on preference pairs",
    "simpo": "SimPO on pairs",
}
MISSING_WEIGHTS = {"one": "weight 1", "zero": "weight 0", "drop": "left out"}
"""What training examples get that the weights file lacks."""


class LossChange(NamedTuple):
    """Loss and accuracy of one part of the validation examples, before training and at the written step."""

    part: str
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    """nan where no accuracy was read at the written step."""

    @property
    def difference(self) -> float:
        """The change of the loss; below 0 is better."""
        return self.loss_after - self.loss_before


def write_train_report(folder: Path, examples: Sequence[Example]) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training examples, for their text; they are joined by id. All
    text from data, config and environment is escaped: training data is hostile.
    """
    path, run = folder / "report.html", read_results(folder, examples)
    text = render_train_report(
        run,
        read_training_log(folder / "log.jsonl"),
        read_score_history(folder),
        describe_run_evaluation(folder, run.result),
    )
    run_dir.write_atomic(path, text)
    return path


def render_train_report(
    run: RunResults,
    log: TrainingLog,
    score_history: ScoreHistory | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
) -> str:
    """The whole report as HTML; `evaluations` are comparisons of answers to evaluate.prompts."""
    model, train = run.config["model"], run.config["train"]
    precision = f"{model['param_dtype']} parameters, matrix products of {train['compute_dtype']} factors"
    return render_page(
        "train.html",
        evaluations=evaluations,
        run=run,
        config=run.config,
        result=run.result,
        verdict=judge_validation(run),
        objective=OBJECTIVE_DESCRIPTIONS[run.config["objective"]["name"]],
        epochs=_format_epochs(run),
        weights_text=_describe_weights(run),
        kept_text=_describe_kept_params(run),
        pictures=draw_first_pictures(run, log),
        key_numbers=list_key_numbers(run),
        validation=describe_validation(run),
        scores=describe_scores(run, score_history) if score_history else None,
        weights=describe_weights(run) | {"strips": None},
        examples=describe_extreme_examples(run),
        data=data_table(run),
        costs=costs_table(run),
        reproduction=describe_reproduction(run, "train", precision),
    )


# ---- what is read first


class ValidationVerdict(NamedTuple):
    """How the validation loss changed: the box at the top of the page."""

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
    count = run.result["rows"].get(change.part, 0)
    before, after = format_number(change.loss_before), format_number(change.loss_after)
    if not math.isfinite(change.difference):
        words = f"The loss on {change.part} is {before} before and {after} after training."
        advice = (
            "Do not use this model: its loss is not a number. Lower optimizer.learning_rate or set "
            "optimizer.max_grad_norm."
        )
        return ValidationVerdict("bad", "✕", "Validation loss is not finite", words, advice)
    amount = f"{format_signed(change.difference)}" + (
        f", {_format_percent(change.difference / change.loss_before)}" if change.loss_before > 0 else ""
    )
    direction = "fell" if change.difference < 0 else "rose" if change.difference > 0 else "stayed"
    words = f"The loss on {change.part} ({format_count('example', count)}) {direction} from {before} to {after} "
    words += run.unit + (f" ({amount})" if change.difference else "")
    if math.isfinite(change.accuracy_after):
        accuracies = (format_number(value) for value in (change.accuracy_before, change.accuracy_after))
        words += f"; {run.result['right']} went from {' to '.join(accuracies)}"
    if change.difference >= 0:
        advice = (
            "By these examples the model is no better than before training. Lower optimizer.learning_rate, train "
            "for fewer epochs, or ask whether examples of large weight resemble the validation examples."
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
        "validation": "There is only validation. Weights that were learned with these examples make its loss fall "
        "by design: examples that nothing has seen (data.test) would tell more.",
    }
    return ValidationVerdict("good", "✓", "Validation loss fell", f"{words}.", fair[change.part])


def draw_first_pictures(run: RunResults, log: TrainingLog) -> list[tuple[Markup, str]]:
    """Losses and, where there are any, learning rates by step, with their captions."""
    pictures = [(plot_losses(run, log), losses_caption(run, log))]
    if any(math.isfinite(rate) for rate in log.learning_rates):
        pictures.append((plot_learning_rates(log), "The learning rate of each step."))
    return pictures


def list_key_numbers(run: RunResults) -> list[tuple[str, str, str]]:
    """The headline numbers: (what, number, unit)."""
    total, result = run.result["rows"]["train"], run.result
    cells = []
    if loss_changes := compute_loss_changes(run):
        change = loss_changes[-1]
        cells.append(
            (
                f"{change.part} loss",
                format_number(change.loss_after),
                f"{run.unit}; {format_number(change.loss_before)} before",
            )
        )
        if math.isfinite(change.accuracy_after):
            unit = f"{run.accuracy_unit}; {format_number(change.accuracy_before)} before"
            cells.append((f"{result['right']} on {change.part}", format_number(change.accuracy_after), unit))
    ess = float_or_nan(result["weights"]["ess"])
    cells += [
        ("training examples", f"{total:,}", f"{format_count('step', result['steps'])}, {_format_epochs(run)}"),
        ("effective sample size", format_number(ess), f"examples, {format_percent(ess / total)} of all"),
        ("trained on", format_number(result["tokens"]), "supervised tokens, repeats counted"),
        ("speed", format_number(float_or_nan(result["tokens_per_second"])), "supervised tokens per second"),
    ]
    return cells


def _describe_weights(run: RunResults) -> str:
    summary, values, total = run.result["weights"], run.columns["weight"].astype(float), run.result["rows"]["train"]
    words = [f"{summary['source']}."]
    if all_equal(values):
        same = float(values[0])
        words.append(
            "Every example counts the same: plain fine-tuning."
            if abs(same - 1) < 1e-6
            else f"Every example counts the same, {format_number(same)} times: plain fine-tuning with a scaled loss."
        )
    else:
        mean, ess = (format_number(float_or_nan(summary[key])) for key in ("mean", "ess"))
        words.append(f"Their mean is {mean}, and they amount to {ess} equally weighted examples of {total:,} (ESS).")
    if summary["zero"]:
        words.append(f"{capitalize_first(format_count('example', summary['zero']))} with weight 0 taught nothing.")
    if summary["missing"]:
        missing = run.config["weights"]["missing"]
        count = format_count("example", summary["missing"])
        words.append(f"{count} that the weights file lacks: {MISSING_WEIGHTS.get(missing, missing)}.")
    return " ".join(words)


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
            f" {capitalize_first(part)} loss was lowest at step {records[least]['step']:,}: "
            f"{format_number(losses[least])} against {format_number(losses[-1])} {run.unit} at the end. Past that "
            "point training fitted its own examples rather than the validation examples; train.load_best: true "
            "writes the step that is best on dev."
        )
    return words


# ---- the sections


def describe_validation(run: RunResults) -> dict[str, Any]:
    """Losses and accuracies of the validation examples before and after training, and each reading."""
    loss_changes, best = compute_loss_changes(run), written_step(run)
    if not loss_changes:
        return {}
    written = run.result["steps"] if best is None else best
    return {
        "rose": [item.part for item in loss_changes if item.difference > 0],
        "table": changes_table(run, loss_changes, written),
        "readings": readings_table(run, [item.part for item in loss_changes], written),
        "written": written,
        "no_accuracy": any(
            math.isnan(item.accuracy_after) and not math.isnan(item.accuracy_before) for item in loss_changes
        ),
    }


def changes_table(run: RunResults, loss_changes: Sequence[LossChange], written: int) -> Table:
    """A line per part of the validation examples: loss and accuracy before training and at the written step."""
    parts, after, loss_unit = [item.part for item in loss_changes], f"after step {written:,}", f"loss, {run.unit}"
    accuracy_unit = f"{run.result['right']}, {run.accuracy_unit}"
    uses = {
        "validation": "the holdout of the score"
        if run.config["weights"]["score"]
        else "read only here; select learns weights from it",
        "dev": "chooses the step" if written_step(run) is not None else "may choose a step (train.load_best: true)",
        "test": "kept apart, read only",
    }
    return make_table(
        Column("set", [bold_cell(part) for part in parts], css_class="tight"),
        Column("examples", [run.result["rows"].get(part) for part in parts]),
        Column("before", [item.loss_before for item in loss_changes], loss_unit),
        Column(after, [item.loss_after for item in loss_changes], loss_unit),
        Column("change", [SignedNumber(item.difference) for item in loss_changes], f"{run.unit}; below 0 is better"),
        Column("before", [item.accuracy_before for item in loss_changes], accuracy_unit),
        Column(after, [item.accuracy_after for item in loss_changes], accuracy_unit),
        Column("use", [uses[part] for part in parts]),
    )


def readings_table(run: RunResults, parts: Sequence[str], written: int) -> Table:
    """A line per reading: the losses and, where they were read, the accuracies."""
    records = run.result["records"]
    accuracies = {part: [(record["accuracy"] or {}).get(part) for record in records] for part in parts}
    return make_table(
        Column("step", [record["step"] for record in records]),
        *(Column(part, [record["loss"].get(part) for record in records], f"loss, {run.unit}") for part in parts),
        *(
            Column(part, values, run.result["right"])
            for part, values in accuracies.items()
            if any(value is not None for value in values)
        ),
        row_classes={index: "strong" for index, record in enumerate(records) if record["step"] == written},
    )


def data_table(run: RunResults) -> Table:
    """How many examples each part has."""
    counts = {part: run.result["rows"].get(part) for part in ("train", *PART_NAMES)}
    counts = {part: count for part, count in counts.items() if count}
    return make_table(
        Column("set", [bold_cell("training" if part == "train" else part) for part in counts]),
        Column("examples", list(counts.values())),
    )


def costs_table(run: RunResults) -> Table:
    """Steps, epochs, tokens, time and speed, each with its unit."""
    result, seconds = run.result, float_or_nan(run.result["seconds"])
    costs: list[tuple[str, Any, str]] = [
        ("steps", result["steps"], f"updates of the parameters, each from {format_count('example', result['batch'])}"),
        ("epochs", _integer_if_whole(result["epochs"]), "passes over the training examples"),
        ("tokens", result["tokens"], "supervised tokens that were trained on, repeats counted"),
        ("time", seconds, f"seconds of training{_format_duration(seconds)}, without reading the validation examples"),
        ("speed", float_or_nan(result["tokens_per_second"]), "supervised tokens per second, after the compilation"),
    ]
    return make_table(
        Column("what", [bold_cell(what) for what, *_ in costs]),
        Column("amount", [amount for _, amount, _ in costs]),
        Column("unit", [unit for *_, unit in costs]),
    )


# ---- numbers and words


def compute_loss_changes(run: RunResults) -> list[LossChange]:
    """The change of each part of the validation examples, the most independent part last."""
    best, records = written_step(run), run.result["records"]
    loss_changes = []
    for part in PART_NAMES:
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
