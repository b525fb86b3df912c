"""Examples selected for an export by their weights."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.lm.data.examples import Example, find_leaks, format_count, load_examples
from bilevel_jax.runs.config.load import ExportConfig, InspectConfig
from bilevel_jax.runs.engine.selection import (
    STRATA_COLUMNS,
    describe_shortfall,
    describe_strata,
    describe_ties,
    divide_into_strata,
    select_examples,
)
from bilevel_jax.runs.infra.inputs import check_inputs_whole
from bilevel_jax.runs.scoring import from_file
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin


class SelectedExamples(NamedTuple):
    """The rows with a weight, and how often each was chosen."""

    examples: list[Example]
    weights: Float[np.ndarray, "examples"]
    repeats: Int[np.ndarray, "examples"]
    source: str
    """Where the weights come from, in words."""
    notes: list[str]


def choose_examples(config: ExportConfig, run: Path | None = None) -> SelectedExamples:
    """The rows with a weight, and how often `config.selection` takes each; `run` is where builtin:cipher may lie.

    Raises ValueError for rows without a weight, unless the run that made the weights left them out.
    """
    if not config.weights.file and (config.selection.top_share < 1 or config.selection.resample):
        raise ValueError(
            "weights.file is empty, so every example weighs the same and there is nothing to choose by. Give a run's "
            "folder or weights.file, or set selection.top_share to 1 to write every example."
        )
    with tempfile.TemporaryDirectory() as temporary:
        input_folder = run if run and (run / "input").is_dir() else Path(temporary)  # where builtin:cipher lies
        config = replace(config, data=resolve_builtin(InspectConfig(data=config.data), input_folder).data)
        check_inputs_whole(config)
        empty: list[str] = []
        examples = load_examples(config.data.train, splits.make_data_options(config.data), empty.append)
        notes = (
            [f"{format_count('row', len(empty), ('was', 'were'))} left out (data.empty = drop), the first: {empty[0]}"]
            if empty
            else []
        )
        examples, leak_notes = _drop_leaks(config, examples)
    notes += leak_notes
    loaded_weights = from_file.load_weights(config.weights, examples)
    usable = loaded_weights.keep_mask & ~_find_unread(config, examples)
    if loaded_weights.num_unused:
        notes.append(f"{format_count('id', loaded_weights.num_unused)} of {config.weights.file} not among the rows.")
    if missing := int((~loaded_weights.keep_mask).sum()):
        notes.append(
            f"{format_count('row', missing, ('was', 'were'))} left out for having no weight (weights.missing = drop)."
        )
    if unread := int((loaded_weights.keep_mask & ~usable).sum()):
        notes.append(
            f"{format_count('row', unread, ('was', 'were'))} too long for the run, which gave no loss, and left out."
        )
    sources = [example.source for example in examples]
    candidates = np.flatnonzero(usable)
    strata = _read_strata(config, examples, candidates)
    places = select_examples(
        loaded_weights.weights, candidates, config.selection, sources=sources, seed=config.data.seed, strata=strata
    )
    if note := describe_ties(loaded_weights.weights, candidates, places, config.selection, sources, strata):
        notes.append(note)
    if note := describe_strata(strata, places, config.selection):
        notes.append(note)
    if shortfall := describe_shortfall(config.selection, len(places)):
        notes.append(shortfall)
    repeats = np.bincount(places, minlength=len(examples))[usable]
    examples = [example for example, use in zip(examples, usable, strict=True) if use]
    return SelectedExamples(examples, loaded_weights.weights[usable], repeats, loaded_weights.source, notes)


def _drop_leaks(config: ExportConfig, examples: list[Example]) -> tuple[list[Example], list[str]]:
    """The rows without those that a run with data.leaks = drop left out, so that they have no weight."""
    if config.data.leaks != "drop" or not config.weights.file or config.weights.missing != "error":
        return examples, []
    known_weights = from_file.read_id_column(config.weights.file, config.weights.column).values
    absent = [example for example in examples if example.id not in known_weights]
    if not absent:
        return examples, []
    leaked_ids = {example.id for example in absent}
    with contextlib.suppress(
        FileNotFoundError
    ):  # where the validation examples are not at hand, nothing can be compared
        trusted = splits.load_held_out(config.data, splits.make_data_options(config.data), lambda message: None)
        leaked_ids = {row.id for row, _ in find_leaks(absent, [row for part in trusted.values() for row in part])}
    remaining = [example for example in examples if example.id not in leaked_ids]
    return remaining, [
        f"{format_count('row', len(leaked_ids), ('was', 'were'))} left out, as by the run: also a validation example."
    ] if leaked_ids else []


def _read_strata(
    config: ExportConfig, examples: Sequence[Example], candidates: Int[np.ndarray, "usable"]
) -> Int[np.ndarray, "examples"] | None:
    """The strata that selection.strata asks for, by a column of the file of weights; None where it is off."""
    rule = config.selection
    if not rule.strata:
        return None
    if not config.weights.file:
        raise ValueError(
            f"selection.strata = {rule.strata} reads a column of the file of weights, and there is none: give a run's "
            "folder or weights.file, or leave strata empty."
        )
    column = from_file.read_id_column(config.weights.file, STRATA_COLUMNS[rule.strata], optional=True)
    if not column.values:
        raise ValueError(
            f"{config.weights.file}: no column {column.name!r}, which selection.strata = {rule.strata} reads; runs of "
            "select by an earlier version have none. Run select again (its weights.parquet has the column), add the "
            "column to the file, or leave selection.strata empty."
        )
    values = np.array([column.values.get(example.id, np.nan) for example in examples])
    unknown = candidates[~np.isfinite(values[candidates])]
    if len(unknown):
        raise ValueError(
            f"{examples[unknown[0]].where}: {config.weights.file}: its column {column.name!r} is no number for this "
            "row, which so belongs to no stratum. Give every row one, or leave selection.strata empty."
        )
    return divide_into_strata(values, candidates, rule.num_strata)


def _find_unread(config: ExportConfig, examples: Sequence[Example]) -> np.ndarray:
    """Rows that a run of `select` left out as too long: they have no loss there."""
    file = config.weights.file
    losses = from_file.read_id_column(file, "loss", optional=True).values if file.endswith(".parquet") else {}
    return np.array([not np.isfinite(losses.get(example.id, 0.0)) for example in examples], bool)
