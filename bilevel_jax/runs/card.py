"""The dataset card of an export: what was written, how a trainer reads it, and how it was made."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bilevel_jax.runs import files
from bilevel_jax.runs.chosen import Chosen
from bilevel_jax.runs.config import ExportConfig
from bilevel_jax.runs.figures import printable
from bilevel_jax.runs.forms import NAMES, Target
from bilevel_jax.runs.keep import rule

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def card(config: ExportConfig, run: Path | None, command: str, chosen: Chosen, target: Target, use: str) -> str:
    """README.md of an export: front matter for the hub, how to use the rows, how they were chosen, from what."""
    total = int(chosen.repeats.sum())
    different = int((chosen.repeats > 0).sum())
    again = "" if total == different else f" ({different:,} different ones)"
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": _files(target)}]}],
        "size_categories": [next((name for most, name in SIZES if total < most), "n>10M")],
        "task_categories": ["text-generation"],
    }
    made = [
        (key, _cell(value))
        for key, value in (*_made_by(run), ("weights", chosen.source), ("rule", rule(config.selection)))
    ]
    made += [
        ("rows with a weight", f"{len(chosen.examples):,}"),
        ("rows written", f"{total:,}{again}"),
        ("effective size of the weights", f"{_effective(chosen.weights):,.0f} of {len(chosen.weights):,} rows"),
        ("effective size of what is written", f"{_effective(_written(config, chosen)):,.0f} of {different:,} rows"),
        *([("command", _code(command))] if command else []),
    ]
    weight = (
        "`weight` is 1 in every row: the repeats are the weight."
        if config.selection.resample
        else "`weight` is the factor of the row's loss; a trainer that reads none takes every row as one."
    )
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_cell(target.path.parent.name)}",
        f"{total:,} rows{again} of {len(chosen.examples):,}, chosen by their weight ({rule(config.selection)}), in the "
        f"layout {target.layout} of {NAMES[config.export.format]}.",
        "**Licence:** not stated. These rows were chosen from others, whose terms hold for them; name those terms "
        "before you share the rows.",
        f"## Use\n\n{use}",
        "Each row has an `id`, a hash of its text"
        + (f". {weight}" if config.export.weight_key else " (`#n` counts copies).")
        + " `selection.parquet` tells of every row, written or not: `id`, `row`, `repeats`, `weight`, `source`.",
        "## How it was made\n\n" + _markdown(("", ""), made),
        "## Rows by source\n\n"
        + _markdown(("source", "rows before", "share of the weight", "rows written"), _sources(chosen)),
    ]
    if chosen.notes:
        parts.append("## Left out before choosing\n\n" + "\n".join(f"- {_cell(note)}" for note in chosen.notes))
    return "\n\n".join(parts) + "\n"


def _files(target: Target) -> str:
    return f"{target.path.name}/*.arrow" if target.container == "datasets" else target.path.name


def _made_by(run: Path | None) -> list[tuple[str, str]]:
    """What is known of the run."""
    if run is None:
        return []
    config = settings_of(run)
    result = result_of(run)
    outer = config.get("outer", {})
    method = ", ".join(f"{key} {outer[key]}" for key in ("method", "weighting", "steps") if key in outer)
    found = {
        "run": run.resolve().name,
        "method": f"bilevel-jax select: {method}" if outer else "bilevel-jax train",
        "estimand": result.get("estimand", ""),
        "verdict": result.get("verdict", {}).get("sentence", "the run is not finished" if not result else ""),
        "objective": config.get("objective", {}).get("name", ""),
        "config hash": result.get("config_hash", ""),
    }
    return [(key, str(value)) for key, value in found.items() if value]


def _sources(chosen: Chosen) -> list[tuple[str, ...]]:
    names = np.array([example.source for example in chosen.examples])
    total = chosen.weights.sum() or 1.0
    return [
        (
            _cell(name),
            f"{count:,}",
            f"{chosen.weights[names == name].sum() / total:.1%}",
            f"{int(chosen.repeats[names == name].sum()):,}",
        )
        for name, count in Counter(names.tolist()).most_common()
    ]


def _written(config: ExportConfig, chosen: Chosen) -> np.ndarray:
    """What each row counts in what was written."""
    return chosen.repeats.astype(float) if config.selection.resample else chosen.weights * (chosen.repeats > 0)


def _effective(values: np.ndarray) -> float:
    return float(values.sum() ** 2 / (values**2).sum()) if values.any() else 0.0


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    wide = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return "\n".join([wide[0], "|" + " --- |" * len(head), *wide[1:]])


def _cell(text: str) -> str:
    """Text of anyone's inside Markdown: one line, and no markup."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return text.translate({ord(mark): f"\\{mark}" for mark in "|[]*_`"})


def _code(text: str) -> str:
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def one_line(text: str) -> str:
    """Text of anyone's in one line, with its control characters made visible."""
    return " ".join(printable(text).split())


def result_of(run: Path) -> dict[str, Any]:
    """The result of a run; empty where it has none yet."""
    path = run / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def settings_of(run: Path) -> dict[str, Any]:
    """The config of a run, as it was written; empty where there is none."""
    path = run / files.RESOLVED
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
