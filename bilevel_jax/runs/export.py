"""The verb `export`: the rows that their weights choose, in the input form of another trainer, with a card."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bilevel_jax.lm.files import write_rows
from bilevel_jax.lm.models.huggingface import fresh_folder
from bilevel_jax.runs.card import card, one_line, result_of, settings_of
from bilevel_jax.runs.chosen import Chosen, choose
from bilevel_jax.runs.config import ExportConfig
from bilevel_jax.runs.forms import ENDS, FORMS, NAMES, Target, layout_of
from bilevel_jax.runs.keep import rule

NAMED = 6
"""Sources that the line in the terminal names."""


def of_run(run: Path) -> list[str]:
    """The flags that stand before the user's where a run's folder is exported: its own weights, as they are."""
    config = settings_of(run)
    left_out = config.get("weights", {}).get("missing") == "drop"  # `train` left those rows out of its table, too
    return [
        *("--weights.file", str(run / "weights.parquet"), "--weights.column", "weight"),
        *("--weights.score", "", "--weights.transform", "none", "--weights.no-mean-one"),
        *("--weights.missing", "drop" if left_out else "error"),
    ]


def export(config: ExportConfig, run: Path | None = None, command: str = "") -> str:
    """Write `config.export.folder`, and say in a few lines what is in it.

    `run` is the folder of a run, where the weights are those of a run; `command` is quoted in the card. Raises
    ValueError for rows that lack a weight or do not fit the form, FileExistsError for a folder that is there already.
    """
    folder = Path(config.export.dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and an export never overwrites: choose another with --out.")
    chosen = choose(config, run)
    kept = np.flatnonzero(chosen.repeats)
    examples = [chosen.examples[i] for i in kept]
    layout = layout_of(examples, config.export.layout)
    name = f"train{ENDS[config.export.container]}"
    target = Target(layout, folder / name, config.export.container, config.data.template)
    form = FORMS[config.export.format](examples, target)
    kind = "folder" if config.export.container == "datasets" else config.export.container
    with fresh_folder(folder) as made:
        write_rows(made / name, _rows(form.rows, kept, chosen, config), kind)
        pq.write_table(_table(chosen), made / "selection.parquet")
        if form.config:
            (made / form.config[0]).write_text(form.config[1], encoding="utf-8")
        text = card(config, run, command, chosen, target, form.use)
        (made / "README.md").write_text(text, encoding="utf-8")
    return "\n".join([*chosen.notes, *_doubts(run), _summary(config, chosen, folder / name, layout)])


def _rows(made: list[dict[str, Any]], kept: np.ndarray, chosen: Chosen, config: ExportConfig) -> list[dict[str, Any]]:
    """Each row as often as it was chosen, with its id and weight; a repeat weighs 1, since repeats are the weight."""
    out = []
    for row, i in zip(made, kept.tolist(), strict=True):
        weight = 1.0 if config.selection.resample else float(chosen.weights[i])
        extra = {"id": chosen.examples[i].id} | ({"weight": weight} if config.export.weight_key else {})
        out += [row | extra] * int(chosen.repeats[i])
    return out


def _table(chosen: Chosen) -> pa.Table:
    columns = {
        "id": [example.id for example in chosen.examples],
        "row": [example.row for example in chosen.examples],
        "repeats": chosen.repeats,
        "weight": chosen.weights,
        "source": [example.source for example in chosen.examples],
    }
    meaning = {"repeats": "how often the row was written; 0: it was left out", "row": "0-based, of the data read"}
    return pa.table(columns).replace_schema_metadata({key: value.encode() for key, value in meaning.items()})


def _doubts(run: Path | None) -> list[str]:
    """The verdict of a run whose weights say nothing."""
    verdict = result_of(run).get("verdict", {}) if run else {}
    return [f"The run's own verdict: {verdict['sentence']}"] if verdict.get("level") == "DO NOT BELIEVE" else []


def _summary(config: ExportConfig, chosen: Chosen, path: Path, layout: str) -> str:
    written = Counter[str]()
    for example, count in zip(chosen.examples, chosen.repeats.tolist(), strict=True):
        written[example.source] += count
    before = Counter(example.source for example in chosen.examples)
    some = [f"{one_line(name)} {written[name]:,} of {count:,}" for name, count in before.most_common(NAMED)]
    more = f", and {len(before) - NAMED:,} more sources" if len(before) > NAMED else ""
    parts = f" ({', '.join(some)}{more})" if len(before) > 1 else ""
    return (
        f"{int(chosen.repeats.sum()):,} of {len(chosen.examples):,} rows{parts}, {rule(config.selection)}: {path}, "
        f"layout {layout}, for {NAMES[config.export.format]}; README.md beside it says how it was made."
    )
