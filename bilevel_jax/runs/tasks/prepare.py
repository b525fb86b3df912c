"""The task of a config that may name arrays or text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import optax

from bilevel_jax.runs.config.load import AuditConfig, TuneConfig
from bilevel_jax.runs.config.rules import reads_array_data
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.arrays import (
    ArrayDataset,
    ArrayTask,
    build_array_model,
    prepare_array_task,
    read_npz_dataset,
)
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.splits import DataSplits
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task

ConfigT = TypeVar("ConfigT", AuditConfig, TuneConfig)


def load_data(config: ConfigT, folder: Path) -> tuple[ConfigT, ArrayDataset | DataSplits]:
    """(the config with built-in tasks replaced by their files, the data): arrays of an .npz, or text."""
    if reads_array_data(config):
        return config, read_npz_dataset(config.data.train[0])
    resolved: Any = resolve_builtin(config, folder)
    return resolved, splits.load_splits(resolved.data)


def build_task(
    config: AuditConfig | TuneConfig,
    dataset: ArrayDataset | DataSplits,
    folder: Path,
    seeds: Sequence[int],
    optimizer: optax.GradientTransformation | None = None,
) -> ArrayTask | TextTask:
    """The task of a config and its data, as `load_data` gives them; `seeds` are those of its data orders, and
    `optimizer` takes the place of that of the config."""
    if isinstance(dataset, ArrayDataset):
        model = build_array_model(
            dataset,
            config.arrays,
            model=config.model,
            optimizer=optimizer or config.optimizer,
            max_steps=config.train.max_steps,
            proximal_strength=config.outer.proximal,
        )
        return prepare_array_task(
            dataset, model, config.arrays, folder, train=config.train, mesh=config.mesh, data_seed=config.data.seed
        )
    return prepare_text_task(
        config,
        dataset,
        folder,
        num_steps=config.train.max_steps,
        seeds=seeds,
        proximal_strength=config.outer.proximal,
        target=config.target,
        optimizer=optimizer,
    )
