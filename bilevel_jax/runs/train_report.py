"""The report of a `train` run: one HTML file with what was trained, what the validation loss did, and the weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.lm.data import Example
from bilevel_jax.runs import figures, files
from bilevel_jax.runs.figures import Html, element, join
from bilevel_jax.runs.page import (
    Column,
    Signed,
    banner,
    bounded,
    capital,
    counted,
    details,
    document,
    figure,
    foretold,
    note,
    number,
    paragraph,
    percent,
    reproduced,
    signed,
    table,
    tiles,
)
from bilevel_jax.runs.report_curves import Log, caption, chosen_step, losses, rates, read_log
from bilevel_jax.runs.report_examples import ends
from bilevel_jax.runs.report_scores import Scores, read_scores, scores
from bilevel_jax.runs.report_weights import axis, by_key, equal, groups, held
from bilevel_jax.runs.results import PARTS, Results, read, real

METHODS = {"sft": "the likelihood of the responses", "dpo": "DPO on preference pairs", "simpo": "SimPO on pairs"}


class Change(NamedTuple):
    """What one part of the trusted rows says of the model that is written."""

    part: str
    before: float
    after: float
    right_before: float
    right_after: float
    """nan where the written parameters are those of a step at which no accuracy was read."""

    @property
    def moved(self) -> float:
        """The change of the loss; below 0 is better."""
        return self.after - self.before


def write(folder: Path, examples: Sequence[Example]) -> Path:
    """Write `folder`/report.html from the files of a finished run, and return its path.

    One file that loads nothing else. `examples` are the training rows, for their text; they are joined by id. All
    text from data, config and environment is escaped: training data is hostile.
    """
    path = folder / "report.html"
    text = page(read(folder, examples), read_log(folder / "log.jsonl"), read_scores(folder))
    files.write_atomic(path, text)
    return path


def page(run: Results, log: Log, made: Scores | None = None) -> str:
    """The whole report as HTML."""
    told = verdict(run)
    intro = join(
        "bilevel_jax train, run ",
        element("b", run.name),
        f". Losses are in {run.unit}, lower is better; {run.result['right']} is a {run.share}.",
    )
    sections = [
        ("validation", "What the trusted rows say", validation(run)),
        *([("scores", "The scores", scores(run, made))] if made else []),
        ("weights", "The weights", weights(run)),
        ("examples", "The examples at both ends", rows(run)),
        ("model", "Load the model", loading(run)),
        ("provenance", "Data, cost, and how to see the same numbers", provenance(run)),
    ]
    return document(
        f"{run.name}: {told.level}", "Fine-tuning with a weight for every row", intro, lead(run, log), sections
    )


# ---- what is read first


class Told(NamedTuple):
    """What the validation loss did, in words: the box that leads the page."""

    kind: str
    icon: str
    level: str
    words: str
    advice: str


def verdict(run: Results) -> Told:
    """Did the loss on the most independent trusted rows fall?"""
    found = changes(run)
    if not found:
        words = "There were no validation rows, so nothing here says whether the model became better."
        return Told("fair", "?", "Not validated", words, "Give trusted rows (data.validation) to see whether it did.")
    one = found[-1]
    where, count = PARTS[one.part], run.result["rows"].get(one.part, 0)
    if not math.isfinite(one.moved):
        words = f"The loss on {where} is {number(one.before)} before and {number(one.after)} after training."
        advice = "Do not use this model: its loss is not a number. Lower optimizer.learning_rate or set optimizer.max_grad_norm."
        return Told("bad", "✕", "Validation loss is not finite", words, advice)
    amount = f"{signed(one.moved)}" + (f", {_percent(one.moved / one.before)}" if one.before > 0 else "")
    moved = "fell" if one.moved < 0 else "rose" if one.moved > 0 else "stayed"
    words = f"The loss on {where} ({counted('row', count)}) {moved} from {number(one.before)} to {number(one.after)} "
    words += run.unit + (f" ({amount})" if one.moved else "")
    if math.isfinite(one.right_after):
        words += f"; {run.result['right']} went from {number(one.right_before)} to {number(one.right_after)}"
    if one.moved >= 0:
        advice = (
            "By these rows the model is no better than before training. Lower optimizer.learning_rate, train for "
            "fewer epochs, or ask whether rows of large weight resemble the trusted ones."
        )
        level = "Validation loss rose" if one.moved > 0 else "Validation loss did not move"
        return Told("bad" if one.moved > 0 else "fair", "✕" if one.moved > 0 else "?", level, f"{words}.", advice)
    fair = {
        "report": "V_report had no part in training. It is one training with one seed: a small change may be chance.",
        "select": "There is no V_report. "
        + (
            "V_select chose the step that was kept, which flatters it."
            if chosen_step(run)
            else "V_select had no part here."
        ),
        "fit": "There is only V_fit. Weights that were learned with these rows make its loss fall by design: rows that "
        "nothing has seen (data.test) would tell more.",
    }
    return Told("good", "✓", "Validation loss fell", f"{words}.", fair[one.part])


def lead(run: Results, log: Log) -> Html:
    """What was trained on what, what the validation loss did, and the losses as a picture."""
    told = verdict(run)
    box = banner(
        told.kind,
        told.icon,
        told.level,
        paragraph(element("b", told.words)),
        paragraph(element("b", "For you: "), told.advice),
        paragraph(element("b", "Trained: "), _trained(run)),
        paragraph(element("b", "Weights: "), _weighted(run)),
        paragraph(element("b", "Kept: "), _kept(run)),
    )
    pictures = [figure(losses(run, log), caption(run, log))]
    if any(math.isfinite(rate) for rate in log.rates):
        pictures.append(figure(rates(log), "The learning rate of each step."))
    return join(
        element(
            "div",
            element("div", box, class_="pictures left"),
            element("div", *pictures, class_="pictures"),
            class_="lead",
        ),
        boxes(run),
    )


def boxes(run: Results) -> Html:
    """The headline numbers in boxes."""
    total, result = run.result["rows"]["train"], run.result
    shown = []
    if found := changes(run):
        one = found[-1]
        shown.append((f"loss on {PARTS[one.part]}", number(one.after), f"{run.unit}; {number(one.before)} before"))
        if math.isfinite(one.right_after):
            unit = f"{run.share}; {number(one.right_before)} before"
            shown.append((f"{result['right']} on {PARTS[one.part]}", number(one.right_after), unit))
    ess = real(result["weights"]["ess"])
    shown += [
        ("rows", f"{total:,}", f"{counted('step', result['steps'])}, {_epochs(run)}"),
        ("effective sample size", number(ess), f"rows, {percent(ess / total)} of all"),
        ("trained on", number(result["tokens"]), "supervised tokens, repeats counted"),
        ("speed", number(real(result["tokens_per_second"])), "supervised tokens per second"),
    ]
    return tiles(shown)


def _trained(run: Results) -> Html:
    model, lora, result = run.config["model"], run.config["lora"], run.result
    what = "all parameters of "
    if lora["r"]:
        targets = ", ".join(lora["target_modules"]) or "on the projections usual for its family"
        what = f"LoRA factors of rank {lora['r']} ({targets}) of "
    steps, batch, total = result["steps"], result["batch"], result["rows"]["train"]
    return join(
        what,
        bounded(model["name_or_path"], end=True),
        ", from random ones," if model["from_scratch"] else None,
        f" by {METHODS[run.config['objective']['name']]}: {counted('step', steps)} of {counted('row', batch)}, "
        f"{_epochs(run)} of {counted('row', total)}.",
    )


def _weighted(run: Results) -> Html:
    told, values, total = run.result["weights"], run.rows["weight"].astype(float), run.result["rows"]["train"]
    words = [f"{told['source']}."]
    if equal(values):
        same = float(values[0])
        words.append(
            "Every row counts the same: plain fine-tuning."
            if abs(same - 1) < 1e-6
            else f"Every row counts the same, {number(same)} times: plain fine-tuning with a scaled loss."
        )
    else:
        words.append(
            f"Their mean is {number(real(told['mean']))}, and they amount to {number(real(told['ess']))} equally "
            f"weighted rows of {total:,} (ESS)."
        )
    if told["zero"]:
        words.append(f"{capital(counted('row', told['zero']))} with weight 0 taught nothing.")
    if told["missing"]:
        fate = {"one": "weight 1", "zero": "weight 0", "drop": "left out"}
        missing = run.config["weights"]["missing"]
        words.append(f"{counted('row', told['missing'])} that the weights file lacks: {fate.get(missing, missing)}.")
    return join(" ".join(words))


def _kept(run: Results) -> str:
    """Which parameters were written, and whether others were better."""
    if best := chosen_step(run):
        return f"the parameters of step {best:,} of {run.result['steps']:,}, where V_select was lowest."
    words = "the parameters of the last step."
    found, records = changes(run), run.result["records"]
    if not found or len(records) < 2:
        return words
    part = found[-1].part
    losses = [real(record["loss"].get(part)) for record in records]
    if not any(map(math.isfinite, losses)):
        return words
    least = int(np.nanargmin(losses))
    if 0 < least < len(losses) - 1:
        words += (
            f" {PARTS[part]} was lowest at step {records[least]['step']:,}: {number(losses[least])} against "
            f"{number(losses[-1])} {run.unit} at the end. Past that point training fitted its rows rather than the "
            "trusted ones; train.load_best: true writes the step that is best on V_select."
        )
    return words


# ---- the sections


def validation(run: Results) -> Html:
    """Losses and accuracies of the trusted rows before and after training, and each reading."""
    found, records, best = changes(run), run.result["records"], chosen_step(run)
    if not found:
        return note("No validation rows were given (data.validation), so no loss was read on any.", "warning")
    written = run.result["steps"] if best is None else best
    after = f"after step {written:,}"
    uses = {
        "fit": "the holdout of the score"
        if run.config["weights"]["score"]
        else "read only here; select learns weights from it",
        "select": "chooses the step" if best is not None else "may choose a step (train.load_best: true)",
        "report": "kept apart, read only",
    }
    parts = [one.part for one in found]
    right = run.result["right"]
    main = table(
        Column("set", [element("b", PARTS[part]) for part in parts], kind="tight"),
        Column("rows", [run.result["rows"].get(part) for part in parts]),
        Column("before", [one.before for one in found], f"loss, {run.unit}"),
        Column(after, [one.after for one in found], f"loss, {run.unit}"),
        Column("change", [Signed(one.moved) for one in found], f"{run.unit}; below 0 is better"),
        Column("before", [one.right_before for one in found], f"{right}, {run.share}"),
        Column(after, [one.right_after for one in found], f"{right}, {run.share}"),
        Column("use", [uses[part] for part in parts]),
    )
    readings = table(
        Column("step", [record["step"] for record in records]),
        *(Column(PARTS[one], [record["loss"].get(one) for record in records], f"loss, {run.unit}") for one in parts),
        *(
            Column(PARTS[one], [(record["accuracy"] or {}).get(one) for record in records], right)
            for one in parts
            if any((record["accuracy"] or {}).get(one) is not None for record in records)
        ),
        marks={index: "strong" for index, record in enumerate(records) if record["step"] == written},
    )
    rose = [PARTS[one.part] for one in found if one.moved > 0]
    pairs = run.config["objective"]["name"] == "dpo"
    return join(
        note(f"The loss rose on {', '.join(rose)}.", "warning") if rose else None,
        main,
        note("The DPO loss of a model that is its own reference is log 2 = 0.6931: a coin toss.") if pairs else None,
        note(f"No accuracy was read at step {written:,}; it is read at both ends of training.")
        if any(math.isnan(one.right_after) and not math.isnan(one.right_before) for one in found)
        else None,
        details(f"Each of the {len(records)} readings", readings),
    )


def weights(run: Results) -> Html:
    """How the weights spread, over all rows, by source and by label."""
    values, told = run.rows["weight"].astype(float), run.result["weights"]
    keys = ["label", "source"] if run.labelled else ["source"]
    several = [key for key in keys if len(set(run.rows[key])) > 1]
    by = several[0] if several else keys[0]
    pictures = None
    if not equal(values):
        pictures = element(
            "div",
            figure(
                figures.histogram(groups(run, by), axis(run), reference=1.0),
                f"Rows by weight{f', coloured by {by}' if several else ''}; dashed: weight 1. ESS = (Σw)²/Σw²: they "
                f"amount to {number(real(told['ess']))} equally weighted rows of {len(values):,}.",
            ),
            figure(
                held(values, "these weights"),
                "How much of all weight the rows with the largest weights hold. Dashed orange: equal weights; the "
                "higher the curve, the fewer rows count.",
            ),
            class_="pair",
        )
    return join(
        paragraph("A weight multiplies its row's loss; 1 is plain training, 0 leaves the row out."),
        paragraph(element("b", "Here: "), _weighted(run)),
        pictures,
        *(join(element("h3", f"By {key}"), by_key(run, key)) for key in keys),
    )


def rows(run: Results) -> Html:
    """The rows with the largest and the least weights, where weights differ."""
    if equal(run.rows["weight"].astype(float)):
        return paragraph("All weights are equal, so no row stands out.")
    return ends(run)


def loading(run: Results) -> Html:
    """The few lines that load what was written."""
    config = run.config
    folder, base, rank = config["output"]["dir"], config["model"]["name_or_path"], config["lora"]["r"]
    parts = config["output"]["model"] if rank else "full"
    full = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({f'{folder}/model'!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({f'{folder}/model'!r})"
    )
    adapter = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        f"model = PeftModel.from_pretrained(base, {f'{folder}/model-adapter'!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({base!r})"
    )
    whole = "The whole model" + (", with the LoRA factors folded in" if rank else "") + ", by transformers:"
    return join(
        join(paragraph(whole), element("pre", full)) if parts != "adapter" else None,
        join(paragraph("The LoRA factors on top of the model they were trained on, by PEFT:"), element("pre", adapter))
        if parts != "full"
        else None,
        note("The paths are those that the run was given: relative to where it was started."),
    )


def provenance(run: Results) -> Html:
    """Rows, notes, cost, and what another person needs to see the same numbers."""
    result, model = run.result, run.config["model"]
    sets = {"train": "training", **PARTS}
    data = table(
        Column("set", [words for part, words in sets.items() if result["rows"].get(part)]),
        Column("rows", [result["rows"][part] for part in sets if result["rows"].get(part)]),
    )
    seconds = real(result["seconds"])
    costs: list[tuple[str, Any, str]] = [
        ("steps", result["steps"], f"updates of the parameters, each from {counted('row', result['batch'])}"),
        ("epochs", _whole(result["epochs"]), "passes over the training rows"),
        ("tokens", result["tokens"], "supervised tokens that were trained on, repeats counted"),
        ("time", seconds, f"seconds of training{_clock(seconds)}, without reading the validation rows"),
        ("speed", real(result["tokens_per_second"]), "supervised tokens per second, after the compilation"),
    ]
    resumed = result["resumed"]
    return join(
        element("h3", "Data"),
        data,
        element("ul", *(element("li", one) for one in result["notes"])) if result["notes"] else None,
        element("h3", "Cost"),
        table(
            Column("what", [element("b", what) for what, *_ in costs]),
            Column("amount", [amount for _, amount, _ in costs]),
            Column("unit", [unit for *_, unit in costs]),
        ),
        note(f"The run was stopped and went on at step {resumed:,}; its speed is that of the last part.")
        if resumed
        else None,
        foretold(run),
        reproduced(
            run,
            "train",
            f"{model['param_dtype']} parameters, matrix products of {run.config['train']['compute_dtype']} factors",
        ),
    )


# ---- numbers and words


def changes(run: Results) -> list[Change]:
    """What each part of the trusted rows says of the written model, the most independent part last."""
    best, records = chosen_step(run), run.result["records"]
    found = []
    for part in PARTS:
        if not (ends := run.result["parts"].get(part)):
            continue
        after = ends["after"]
        if best is not None and best != records[-1]["step"]:
            record = next(record for record in records if record["step"] == best)
            after = {"loss": record["loss"][part], "accuracy": (record["accuracy"] or {}).get(part)}
        values = (ends["before"]["loss"], after["loss"], ends["before"]["accuracy"], after["accuracy"])
        found.append(Change(part, *map(real, values)))
    return found


def _epochs(run: Results) -> str:
    epochs = _whole(run.result["epochs"])
    return f"{number(epochs)} epoch{'s' if epochs != 1 else ''}"


def _whole(value: float) -> float:
    """A whole number without its point."""
    return int(value) if float(value).is_integer() else value


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}\u00a0%".replace("-", "−")


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, where there are minutes."""
    if not seconds >= 60:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f" ({f'{hours:,} h ' if hours else ''}{minutes} min {rest} s)"
