"""The `export` command, which writes chosen examples for other trainers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from bilevel_jax.commands.export.card import format_dataset_card, read_run_config, read_run_result, to_one_line
from bilevel_jax.commands.export.formats import (
    FILE_SUFFIXES,
    FORMATTERS,
    READS_MESSAGE_WEIGHTS,
    TRAINER_NAMES,
    ExportTarget,
    FormattedRows,
    choose_layout,
)
from bilevel_jax.commands.export.push import check_push, push_export, push_model
from bilevel_jax.commands.export.rows import SelectedExamples, choose_examples
from bilevel_jax.commands.results import ExportResult
from bilevel_jax.lm.data.examples import Example, describe_unread_keys, format_count
from bilevel_jax.lm.data.files import write_rows
from bilevel_jax.lm.models.huggingface import atomic_folder
from bilevel_jax.runs.config.load import ExportConfig
from bilevel_jax.runs.config.local_paths import hide_local_paths
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.engine.selection import describe_selection_rule
from bilevel_jax.storage import copies, urls

MAX_SOURCES_SHOWN = 6
"""Sources that the line in the terminal names."""
CARD_FILE = "README.md"


def flags_for_run(run: Path) -> list[str]:
    """The flags that stand before the user's where a run's folder is exported: its own weights, as they are."""
    config = read_run_config(run)
    left_out = config.get("weights", {}).get("missing") == "drop"  # `train` left those rows out of its table, too
    return [
        *("--weights.file", str(run / "weights.parquet"), "--weights.column", "weight"),
        *("--weights.score", "", "--weights.tokens", "", "--weights.transform", "none", "--weights.no-mean-one"),
        *("--weights.missing", "drop" if left_out else "error"),
    ]


def export(config: ExportConfig, run: Path | None = None, command: str = "") -> ExportResult:
    """Write `config.export.dir`, push it where `config.export` says so, and say in a few lines what is in it.

    `run` is the folder of a run, where the weights are those of a run; `command` is quoted in the card. Raises
    ValueError for rows that lack a weight or do not fit the form, FileExistsError for a folder that is there already.
    """
    is_remote = urls.is_remote(config.export.dir)
    if is_remote:
        copies.check_free(config.export.dir)
        folder = copies.make_local_folder(config.export.dir)
    else:
        folder = Path(urls.strip_file_protocol(config.export.dir))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and an export never overwrites: choose another with --out.")
    check_push(config.export, run)
    selected = choose_examples(config, run)
    indices = np.flatnonzero(selected.repeats)
    examples = [selected.examples[i] for i in indices]
    layout = choose_layout(examples, config.export.layout)
    name = f"train{FILE_SUFFIXES[config.export.container]}"
    weights = _written_weights(config, selected)[indices].tolist()
    target = ExportTarget(
        layout,
        folder / name,
        config.export.container,
        config.data.template,
        weights if config.export.weight_key else (),
    )
    formatted = FORMATTERS[config.export.format](examples, target)
    kind = "folder" if config.export.container == "datasets" else config.export.container
    with atomic_folder(folder) as temporary_folder:
        rows = _build_export_rows(formatted, indices, selected, target.weights)
        write_rows(temporary_folder / name, rows, kind)
        pq.write_table(_selection_table(selected), temporary_folder / "selection.parquet")
        if formatted.config_file:
            (temporary_folder / formatted.config_file[0]).write_text(
                copies.show(formatted.config_file[1]), encoding="utf-8"
            )
        lost = [*_warn_of_message_keys(examples, config.export.format), *_warn_of_token_weights(run)]
        instructions = "\n\n".join([formatted.instructions, *lost])
        text = format_dataset_card(config, run, command, selected, target, instructions, has_ids=formatted.has_ids)
        settings = [*(value for _, value in flatten_config(config)), read_run_config(run) if run else {}]
        text = hide_local_paths(text, settings)  # a card goes where the rows go
        (temporary_folder / CARD_FILE).write_text(copies.show(text), encoding="utf-8")
    if is_remote:
        copies.publish_new_folder(folder, config.export.dir, last=CARD_FILE)
    pushed = _push(config, run, folder, command)
    summary = [
        *selected.notes,
        *describe_unread_keys(examples),
        *lost,
        *_warn_of_run_verdict(run),
        _summarize_export(config, selected, folder / name, layout),
        *pushed,
    ]
    return ExportResult(
        folder=folder,
        file=folder / name,
        card=folder / CARD_FILE,
        summary=copies.show("\n".join(summary)),
        ids=np.array([example.id for example in selected.examples], str),
        sources=np.array([example.source for example in selected.examples], str),
        weights=np.asarray(selected.weights),
        repeats=np.asarray(selected.repeats),
    )


def _push(config: ExportConfig, run: Path | None, folder: Path, command: str) -> list[str]:
    """Push what `config.export` says; where it is, in a sentence each."""
    pushed = []
    try:
        if config.export.push_to_hub:
            pushed.append(push_export(folder, config, run))
        if config.export.push_model_to_hub and run:
            pushed.append(push_model(run, config, command))
    except (OSError, ValueError) as error:
        done = f"; {pushed[0]}" if pushed else ""
        raise type(error)(f"{error} The export is whole in {folder}{done}: try again with another --out.") from None
    return pushed


def _written_weights(config: ExportConfig, selected: SelectedExamples) -> Float[np.ndarray, "examples"]:
    """The weights that rows are written with; a repeat weighs 1, since repeats are the weight."""
    return np.ones(len(selected.weights)) if config.selection.resample else selected.weights


def _build_export_rows(
    formatted: FormattedRows, indices: np.ndarray, selected: SelectedExamples, weights: Sequence[float]
) -> list[dict[str, Any]]:
    """Each row as often as it was chosen, with its id, where the format allows one, and its weight, where wanted."""
    out = []
    for place, (row, i) in enumerate(zip(formatted.rows, indices.tolist(), strict=True)):
        extra: dict[str, Any] = {"id": selected.examples[i].id} if formatted.has_ids else {}
        extra |= {"weight": weights[place]} if weights else {}
        out += [row | extra] * int(selected.repeats[i])
    return out


def _selection_table(selected: SelectedExamples) -> pa.Table:
    columns = {
        "id": [example.id for example in selected.examples],
        "row": [example.row for example in selected.examples],
        "repeats": selected.repeats,
        "weight": selected.weights,
        "source": [example.source for example in selected.examples],
    }
    meaning = {"repeats": "how often the row was written; 0: it was left out", "row": "0-based, of the data read"}
    return pa.table(columns).replace_schema_metadata({key: value.encode() for key, value in meaning.items()})


def _warn_of_message_keys(examples: Sequence[Example], export_format: str) -> list[str]:
    """What messages say beside role and content, which not every trainer reads."""
    turns = [turn for example in examples for turn in example.turns + example.rejected]
    is_read = export_format in READS_MESSAGE_WEIGHTS
    not_learned = 0 if is_read else sum(not turn.is_target for turn in turns)
    with_weight = 0 if is_read else sum(turn.weight != 1 for turn in turns)
    with_reasoning = sum(bool(turn.reasoning) for turn in turns)
    return [
        *(
            [f'{not_learned:,} answers are marked as no target ("weight": 0): see that the trainer leaves them out.']
            if not_learned
            else []
        ),
        *(
            [
                f"{format_count('answer', with_weight, ('has a weight of its', 'have a weight of their'))} own, which "
                f"{TRAINER_NAMES[export_format]} reads nowhere: llama_factory_v1 is the format that holds it."
            ]
            if with_weight
            else []
        ),
        *(
            [f"{with_reasoning:,} answers have reasoning_content: see that the trainer's chat template shows it."]
            if with_reasoning
            else []
        ),
    ]


def _warn_of_token_weights(run: Path | None) -> list[str]:
    """That the weights of single tokens stay behind, which a run was given."""
    given = read_run_config(run).get("weights", {}).get("tokens") if run else ""
    return ["The run's weights of tokens (weights.tokens) are not written: no trainer reads them."] if given else []


def _warn_of_run_verdict(run: Path | None) -> list[str]:
    """The verdict of a run whose weights say nothing."""
    verdict = read_run_result(run).get("verdict", {}) if run else {}
    return [f"The run's own verdict: {verdict['sentence']}"] if verdict.get("level") == "DO NOT BELIEVE" else []


def _summarize_export(config: ExportConfig, selected: SelectedExamples, path: Path, layout: str) -> str:
    written = Counter[str]()
    for example, count in zip(selected.examples, selected.repeats.tolist(), strict=True):
        written[example.source] += count
    before = Counter(example.source for example in selected.examples)
    source_texts = [
        f"{to_one_line(name)} {written[name]:,} of {count:,}" for name, count in before.most_common(MAX_SOURCES_SHOWN)
    ]
    rest = f", and {len(before) - MAX_SOURCES_SHOWN:,} more sources" if len(before) > MAX_SOURCES_SHOWN else ""
    parts = f" ({', '.join(source_texts)}{rest})" if len(before) > 1 else ""
    return (
        f"{int(selected.repeats.sum()):,} of {format_count('row', len(selected.examples))}{parts}, "
        f"{describe_selection_rule(config.selection)}: {path}, layout {layout}, "
        f"for {TRAINER_NAMES[config.export.format]}; {CARD_FILE} beside it says how it was made."
    )
