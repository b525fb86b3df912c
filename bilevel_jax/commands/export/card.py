"""The dataset card of an export."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bilevel_jax.commands.export.formats import TRAINER_NAMES, WEIGHTS_READ, ExportTarget
from bilevel_jax.commands.export.rows import SelectedExamples
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.lm.hub.names import parse_dataset_name, parse_model_name
from bilevel_jax.runs.config.load import ExportConfig
from bilevel_jax.runs.config.local_paths import hide_local_paths
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.config.yaml_reader import read_yaml
from bilevel_jax.runs.engine.selection import describe_selection_rule
from bilevel_jax.runs.infra import run_dir, seals
from bilevel_jax.runs.tasks.splits import PART_NAMES
from bilevel_jax.runs.terminal import show_control_characters

DATA_PARTS = {"train": "training", "validation": "validation", "dev": "dev", "test": "test"}
"""Key of the section data -> what its examples are."""
MAX_NUMBERS_SHOWN = 6
"""Of a list in a certificate."""
SIZE_CATEGORIES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)


def format_dataset_card(
    config: ExportConfig,
    run: Path | None,
    command: str,
    selected: SelectedExamples,
    target: ExportTarget,
    instructions: str,
    *,
    has_ids: bool,
) -> str:
    """README.md of an export: front matter for the hub, how to use the rows, how they were chosen, from what."""
    total = int(selected.repeats.sum())
    num_distinct = int((selected.repeats > 0).sum())
    distinct_note = "" if total == num_distinct else f" ({num_distinct:,} different ones)"
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": _data_files(target)}]}],
        "size_categories": [next((name for most, name in SIZE_CATEGORIES if total < most), "n>10M")],
        "task_categories": ["text-generation"],
        "tags": ["bilevel-jax"],
    }
    run_config, result = (read_run_config(run), read_run_result(run)) if run else ({}, {})
    if data_sets := list_hub_sources(run_config)[1]:
        head["source_datasets"] = data_sets
    facts = [
        (key, escape_cell(value))
        for key, value in (
            *describe_run(run),
            ("weights", hide_local_paths(selected.source, [value for _, value in flatten_config(config)])),
            ("rule", describe_selection_rule(config.selection)),
        )
    ]
    facts += [
        ("rows with a weight", f"{len(selected.examples):,}"),
        ("rows written", f"{total:,}{distinct_note}"),
        (
            "effective size of the weights",
            f"{_effective_size(selected.weights):,.0f} of {len(selected.weights):,} rows",
        ),
        (
            "effective size of what is written",
            f"{_effective_size(_written_weights(config, selected)):,.0f} of {num_distinct:,} rows",
        ),
        *([("command", code_span(command))] if command else []),
    ]
    weight = (
        "`weight` is 1 in every row: the repeats are the weight."
        if config.selection.resample
        else WEIGHTS_READ.get(
            config.export.format,
            f"`weight` is the factor of the row's loss; {TRAINER_NAMES[config.export.format]} reads none and takes "
            "every row as one: write whole repeats (`selection.resample`) in place of weights for it.",
        )
    )
    ids = (
        "Each row has an `id`, a hash of its text (`#n` counts copies)"
        if has_ids
        else "The rows have no keys but those of the format"
    )
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {escape_cell(target.path.parent.name)}",
        f"{total:,} rows{distinct_note} of {len(selected.examples):,}, chosen by their weight "
        f"({describe_selection_rule(config.selection)}), in the "
        f"layout {target.layout} of {TRAINER_NAMES[config.export.format]}.",
        "**Licence:** not stated. These rows were chosen from others, whose terms hold for them; name those terms "
        "before you share the rows.",
        f"## Use\n\n{_describe_hub_use(config)}{instructions}",
        f"{ids}. {weight if config.export.weight_key else 'Weights were left out (export.weight_key).'}"
        + " `selection.parquet` tells of every row, written or not: `id`, `row`, `repeats`, `weight`, `source`.",
        "## How it was made\n\n" + markdown_table(("", ""), facts),
        "## Rows by source\n\n"
        + markdown_table(("source", "rows before", "share of the weight", "rows written"), _source_lines(selected)),
    ]
    parts += describe_measurements(run_config, result)
    if selected.notes:
        parts.append("## Notes on the choice\n\n" + "\n".join(f"- {escape_cell(note)}" for note in selected.notes))
    return "\n\n".join(parts) + "\n"


def _describe_hub_use(config: ExportConfig) -> str:
    """How the rows are read from the hub, where they are pushed."""
    if not (repository := config.export.push_to_hub):
        return ""
    return (
        f'From the hub, with `revision=` for one commit: `load_dataset("{repository}", split="train")`, and for '
        f"`bilevel-jax` the name `hub:{repository}@train`. From a folder of these files:\n\n"
    )


def _data_files(target: ExportTarget) -> str:
    return f"{target.path.name}/*.arrow" if target.container == "datasets" else target.path.name


def describe_run(run: Path | None) -> list[tuple[str, str]]:
    """What is known of the run."""
    if run is None:
        return []
    config = read_run_config(run)
    result = read_run_result(run)
    outer = config.get("outer", {})
    method = ", ".join(f"{key} {outer[key]}" for key in ("method", "weighting", "steps") if key in outer)
    facts = {
        "run": run.resolve().name,
        "method": f"bilevel-jax select: {method}" if outer else "bilevel-jax train",
        "model": config.get("model", {}).get("name_or_path", ""),
        **{f"{part} examples": " ".join(config.get("data", {}).get(key) or ()) for key, part in DATA_PARTS.items()},
        "estimand": result.get("estimand", ""),
        "verdict": result.get("verdict", {}).get("sentence", "the run is not finished" if not result else ""),
        "objective": config.get("objective", {}).get("name", ""),
        "config hash": result.get("config_hash", ""),
    }
    facts = hide_local_paths(facts, config)  # before their marks are escaped
    return [(key, str(value)) for key, value in facts.items() if value]


def list_hub_sources(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The models and the data sets on the hub that a run read, as owner/name."""
    models = [parse_model_name(config.get("model", {}).get("name_or_path", ""))]
    data = [parse_dataset_name(path) for key in DATA_PARTS for path in config.get("data", {}).get(key) or ()]
    return tuple(  # type: ignore[return-value]
        list(dict.fromkeys(name.repo for name in names if name is not None and name.is_pinned))
        for names in (models, data)
    )


def describe_measurements(config: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Sections of a card: what the run measured, its certificates, and when its weights are wrong."""
    sections = []
    unit, right = result.get("unit", ""), result.get("right", "")
    if lines := result.get("compare"):
        columns = [name for name in (*PART_NAMES, "accuracy") if name in lines[0]["mean"]]
        heads = ("trained on", *(right if name == "accuracy" else f"{name} loss, {unit}" for name in columns), "rows")
        table = [
            (
                escape_cell(line["name"]),
                *(_format_mean(line["mean"][name], line["interval"].get(name)) for name in columns),
                f"{line['rows']:,}",
            )
            for line in lines
        ]
        seeds = len(lines[0]["runs"])
        sections.append(
            f"## What training reached\n\nFrom the same start, {seeds} seed{'' if seeds == 1 else 's'} (mean and half "
            f"of a 95 % interval).\n\n" + markdown_table(heads, table)
        )
        if sentence := result.get("recommendation", {}).get("sentence"):
            sections[-1] += f"\n\n{escape_cell(sentence)}"
    elif parts := {part: ends for part, ends in (result.get("parts") or {}).items() if ends}:
        table = [
            (part, *(_format_mean(ends.get(when, {}).get("loss"), None) for when in ("before", "after")))
            for part, ends in parts.items()
        ]
        sections.append(
            "## What training reached\n\n" + markdown_table(("", f"before, {unit}", f"after, {unit}"), table)
        )
    if certificates := result.get("certificates"):
        table = [
            (escape_cell(where), escape_cell(name), escape_cell(_format_values(values)))
            for where, checks in certificates.items()
            for name, values in checks.items()
            if values is not None
        ]
        sections.append("## Certificates\n\n" + markdown_table(("weights", "certificate", "numbers"), table))
    if "outer" in config:
        sections.append(
            "## When these weights are wrong\n\n"
            "- They were learned for one model, one validation set and one training run. For another model or another "
            "aim they are a guess.\n"
            "- Where the verdict is DO NOT BELIEVE, hypergradients did not predict what retraining does; where it is "
            "UNDECIDED, nothing says that they do. Its second sentence is about other examples than the validation "
            "set's.\n"
            "- They follow the validation examples, mistakes and tastes included. A weight of 0 is no proof that an "
            "example is wrong, nor is a large one that it is right.\n"
            "- A trainer that reads no weights, another batch size or learning rate, and more epochs change what they "
            "do."
        )
    return sections


def _format_mean(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" + (f" ± {half:.4f}" if half is not None and half == half else "")


def _format_values(values: Any) -> str:
    """The numbers of a certificate in a line; of a long list, as one of a number for each example, how many."""
    if isinstance(values, dict):
        return ", ".join(f"{key} {_format_values(value)}" for key, value in values.items() if value is not None)
    if isinstance(values, list):
        if len(values) > MAX_NUMBERS_SHOWN or any(isinstance(value, list | dict) for value in values):
            return f"of {len(values):,}"
        return " / ".join(map(_format_values, values))
    return f"{values:.4g}" if isinstance(values, float) else str(values)


def _source_lines(selected: SelectedExamples) -> list[tuple[str, ...]]:
    names = np.array([example.source for example in selected.examples])
    total = selected.weights.sum() or 1.0
    return [
        (
            escape_cell(name),
            f"{count:,}",
            f"{selected.weights[names == name].sum() / total:.1%}",
            f"{int(selected.repeats[names == name].sum()):,}",
        )
        for name, count in Counter(names.tolist()).most_common()
    ]


def _written_weights(config: ExportConfig, selected: SelectedExamples) -> np.ndarray:
    """What each row counts in what was written."""
    return selected.repeats.astype(float) if config.selection.resample else selected.weights * (selected.repeats > 0)


def _effective_size(values: np.ndarray) -> float:
    return float(values.sum() ** 2 / (values**2).sum()) if values.any() else 0.0


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown."""
    wide = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([wide[0], "|" + " --- |" * len(head), *wide[1:]])


def escape_cell(text: str) -> str:
    """Text of anyone's inside Markdown: one line, and no markup."""
    text = to_one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return text.translate({ord(mark): f"\\{mark}" for mark in "|[]*_`"})


def code_span(text: str) -> str:
    """Text of anyone's as code, inside a cell."""
    return f"`{to_one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def to_one_line(text: str) -> str:
    """Text of anyone's in one line, with its control characters made visible."""
    return " ".join(show_control_characters(text).split())


def read_run_result(run: Path) -> dict[str, Any]:
    """The result of a run; empty where it has none yet."""
    path = run / "result.json"
    if not path.is_file():
        seals.check(path)
        return {}
    result = run_dir.read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("verdict", {}), dict):
        raise ValueError(
            f"{path}: no result of a run, but {describe_value(result)}. Put back the file that the run wrote."
        )
    return result


def read_run_config(run: Path) -> dict[str, Any]:
    """The config of a run, as it was written; empty where there is none."""
    path = run / run_dir.CONFIG_FILE
    if not path.is_file():
        return {}
    seals.check(path)
    content = read_yaml(path)[1]
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(
            f"{path}: no config of a run, but {describe_value(content)}. Put back the file that the run wrote."
        )
    return content
