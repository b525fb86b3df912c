"""The dataset card of an export."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bilevel_jax.commands.export.formats import TRAINER_NAMES, WEIGHTS_READ, ExportTarget
from bilevel_jax.commands.export.rows import SelectedExamples
from bilevel_jax.lm.data.files import describe_value
from bilevel_jax.runs.config.load import ExportConfig
from bilevel_jax.runs.config.yaml_reader import read_yaml
from bilevel_jax.runs.engine.selection import describe_selection_rule
from bilevel_jax.runs.infra import run_dir, seals
from bilevel_jax.runs.terminal import show_control_characters

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
    }
    facts = [
        (key, _escape_cell(value))
        for key, value in (
            *_describe_run(run),
            ("weights", selected.source),
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
        *([("command", _code_span(command))] if command else []),
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
        f"# {_escape_cell(target.path.parent.name)}",
        f"{total:,} rows{distinct_note} of {len(selected.examples):,}, chosen by their weight "
        f"({describe_selection_rule(config.selection)}), in the "
        f"layout {target.layout} of {TRAINER_NAMES[config.export.format]}.",
        "**Licence:** not stated. These rows were chosen from others, whose terms hold for them; name those terms "
        "before you share the rows.",
        f"## Use\n\n{instructions}",
        f"{ids}. {weight if config.export.weight_key else 'Weights were left out (export.weight_key).'}"
        + " `selection.parquet` tells of every row, written or not: `id`, `row`, `repeats`, `weight`, `source`.",
        "## How it was made\n\n" + _markdown_table(("", ""), facts),
        "## Rows by source\n\n"
        + _markdown_table(("source", "rows before", "share of the weight", "rows written"), _source_lines(selected)),
    ]
    if selected.notes:
        parts.append("## Notes on the choice\n\n" + "\n".join(f"- {_escape_cell(note)}" for note in selected.notes))
    return "\n\n".join(parts) + "\n"


def _data_files(target: ExportTarget) -> str:
    return f"{target.path.name}/*.arrow" if target.container == "datasets" else target.path.name


def _describe_run(run: Path | None) -> list[tuple[str, str]]:
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
        "estimand": result.get("estimand", ""),
        "verdict": result.get("verdict", {}).get("sentence", "the run is not finished" if not result else ""),
        "objective": config.get("objective", {}).get("name", ""),
        "config hash": result.get("config_hash", ""),
    }
    return [(key, str(value)) for key, value in facts.items() if value]


def _source_lines(selected: SelectedExamples) -> list[tuple[str, ...]]:
    names = np.array([example.source for example in selected.examples])
    total = selected.weights.sum() or 1.0
    return [
        (
            _escape_cell(name),
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


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    wide = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([wide[0], "|" + " --- |" * len(head), *wide[1:]])


def _escape_cell(text: str) -> str:
    """Text of anyone's inside Markdown: one line, and no markup."""
    text = to_one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return text.translate({ord(mark): f"\\{mark}" for mark in "|[]*_`"})


def _code_span(text: str) -> str:
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
