"""Built-in tasks with generated data and small pretrained models."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, train, train_step
from bilevel_jax.lm import models
from bilevel_jax.lm.builtin import cipher, scripts, sources, sums
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.lm.losses import sft
from bilevel_jax.lm.models.huggingface import atomic_folder
from bilevel_jax.runs.config.load import (
    AuditConfig,
    CompareConfig,
    InspectConfig,
    RefineConfig,
    SelectConfig,
    TrainConfig,
    TuneConfig,
)
from bilevel_jax.runs.config.rules import evaluates_own_models
from bilevel_jax.runs.config.schema import DataSection, ModelSection, OptimizerSection
from bilevel_jax.runs.infra import distributed, seals
from bilevel_jax.runs.infra.run_dir import INPUT_FOLDER, wait_until_seen
from bilevel_jax.runs.infra.session import make_progress_bar
from bilevel_jax.runs.tasks.optimizers import build_optimizer


class DataConfig(Protocol):
    """A config with the sections that may name a built-in task."""

    @property
    def model(self) -> ModelSection:
        """The model."""

    @property
    def data(self) -> DataSection:
        """The files."""


ConfigT = TypeVar(
    "ConfigT", SelectConfig, TrainConfig, InspectConfig, CompareConfig, AuditConfig, TuneConfig, RefineConfig
)
BUILTIN_PREFIX = "builtin:"
"""`builtin:NAME`, in data.train also `builtin:NAME?option=value&option=value`."""


class BuiltinTask(NamedTuple):
    """One built-in task, and how its model is taught what it knows before the run."""

    write_files: Callable[..., Path]
    """(folder, seed=..., options) -> the folder with train, validation, select, report .jsonl and untrained/."""
    options: dict[str, Callable[[str], Any]]
    """What data.train may set, and how its value is read."""
    pretraining_file: str
    """The examples that teach the model."""
    num_steps: int
    batch_size: int
    optimizer: OptimizerSection


BUILTIN_TASKS = {
    "cipher": BuiltinTask(
        cipher.write_cipher_data, {}, "copies", 300, 32, OptimizerSection(learning_rate=4e-3, warmup_steps=20, b2=0.99)
    ),
    "sums": BuiltinTask(
        sums.write_sums_data,
        {"corrupted": float, "noise": float, "train": int, "validation": int, "dev": int},
        "lessons",
        3000,
        64,
        OptimizerSection(learning_rate=4e-3, warmup_steps=20, b2=0.99),
    ),
    "scripts": BuiltinTask(
        scripts.write_scripts_data,
        {"corrupted": float, "noise": float, "format": str, "train": int, "validation": int, "dev": int},
        "lessons",
        500,
        32,
        OptimizerSection(learning_rate=4e-3, warmup_steps=50, b2=0.99),
    ),
    "sources": BuiltinTask(
        sources.write_sources_data,
        {"validation": int, "dev": int},
        "copies",
        300,
        32,
        OptimizerSection(learning_rate=4e-3, warmup_steps=20, b2=0.99),
    ),
}


def resolve_builtin(config: ConfigT, folder: Path) -> ConfigT:
    """The config with `builtin:NAME` replaced by the files that it is made into, once and whole, in `folder`/input.

    Raises ValueError for a task or an option that there is not, for two tasks in one config, and for options
    elsewhere than in data.train.
    """
    name, options = parse_builtin_reference(config)
    if not name:
        return config
    task = BUILTIN_TASKS[name]
    input_folder = folder / INPUT_FOLDER

    def write_files(target: Path) -> None:
        task.write_files(target, seed=config.data.seed, **options)
        if _is_builtin(config.model.name_or_path) and not (target / "model").exists():
            pretrain_builtin_model(
                target, task, progress=not isinstance(config, InspectConfig) and config.output.progress
            )

    def write_task_files() -> None:
        if seals.find_run(input_folder) and seals.is_noted_folder(input_folder):
            return  # a run that goes on
        if input_folder.exists():
            write_files(input_folder)  # which compares what is there
        else:
            with atomic_folder(input_folder) as target:
                write_files(target)
        seals.note_folder(input_folder)

    distributed.run_on_first_process(write_task_files)
    wait_until_seen(input_folder)

    def replace_builtin(part: str, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(input_folder / f"{part}.jsonl") if _is_builtin(path) else path for path in paths)

    model, data_config = config.model, config.data
    resolved = replace(
        config,
        model=replace(
            model, name_or_path=str(input_folder / "model") if _is_builtin(model.name_or_path) else model.name_or_path
        ),
        data=replace(
            data_config,
            train=replace_builtin("train", data_config.train),
            validation=replace_builtin("validation", data_config.validation),
            dev=replace_builtin("dev", data_config.dev),
            test=replace_builtin("test", data_config.test),
        ),
    )
    if not evaluates_own_models(resolved):
        return resolved
    section: Any = vars(resolved)["evaluate"]
    return replace(resolved, **{"evaluate": replace(section, prompts=replace_builtin("test", section.prompts))})


def resolve_builtin_untrained(config: ConfigT, folder: Path) -> ConfigT:
    """As `resolve_builtin`, with the model's config and tokenizer alone, for which nothing is trained."""
    name, options = parse_builtin_reference(config)
    if name and _is_builtin(config.model.name_or_path):
        input_folder = BUILTIN_TASKS[name].write_files(folder / INPUT_FOLDER, seed=config.data.seed, **options)
        config = replace(config, model=replace(config.model, name_or_path=str(input_folder / "untrained")))
    return resolve_builtin(config, folder)


def parse_builtin_reference(config: DataConfig) -> tuple[str, dict[str, Any]]:
    """(the built-in task that a config names, or nothing; what it sets of the task's options)."""
    data_config = config.data
    prompts = vars(config)["evaluate"].prompts if evaluates_own_models(config) else ()
    other_paths = [config.model.name_or_path, *data_config.validation, *data_config.dev, *data_config.test, *prompts]
    builtin_paths = [path for path in (*data_config.train, *other_paths) if _is_builtin(path)]
    names = {path.removeprefix(BUILTIN_PREFIX).partition("?")[0] for path in builtin_paths}
    if unknown := sorted(names - set(BUILTIN_TASKS)):
        raise ValueError(
            f"{BUILTIN_PREFIX}{unknown[0]} is no built-in task; they are "
            f"{[BUILTIN_PREFIX + name for name in BUILTIN_TASKS]}."
        )
    if len(names) > 1:
        raise ValueError(f"{sorted(builtin_paths)} are two built-in tasks; a run has room for one.")
    if paths_with_options := [path for path in other_paths if _is_builtin(path) and "?" in path]:
        raise ValueError(
            f"{paths_with_options[0]}: options of a built-in task are set in data.train alone. Write them there."
        )
    name = next(iter(names), "")
    return name, _parse_options(name, [path for path in data_config.train if _is_builtin(path)])


def pretrain_builtin_model(folder: Path, task: BuiltinTask, *, progress: bool = True) -> None:
    """Teach the untrained model the task's lessons, and save it as `folder`/model."""
    tokenizer = tokens.load_tokenizer(folder / "untrained")
    architecture, source_files = (
        models.read_config(folder / "untrained"),
        models.read_source_files(folder / "untrained"),
    )
    examples = load_examples([str(folder / f"{task.pretraining_file}.jsonl")])
    corpus, _ = tokens.tokenize(examples, tokenizer, max_length=architecture.max_length)
    order = batches.shuffled_order(corpus.num_examples, task.batch_size, seed=0)
    layout = batches.BatchShape(1, task.batch_size, task.batch_size, batches.padded_max_length(corpus))
    per_example = sft.sft_losses(models.make_decoder(architecture))
    adamw = build_optimizer(task.optimizer, task.num_steps)
    step = train_step(weighted(lambda params, frozen, batch: per_example(params, batch)), adamw)
    state = init_train_state(adamw, models.init_params(architecture, jax.random.key(0)))
    stream = batches.make_train_stream(corpus, order, task.num_steps, layout)
    with make_progress_bar(progress) as bar:
        progress_task = bar.add_task("teaching the built-in model", total=task.num_steps)
        trajectory = train(
            step,
            state,
            jnp.ones(corpus.num_examples),
            None,
            stream,
            on_step=lambda state, info: bar.advance(progress_task),
        )
    models.save_model(folder / "model", architecture, trajectory.end.params, source_files=source_files)


def _is_builtin(path: str) -> bool:
    return path.startswith(BUILTIN_PREFIX)


def _parse_options(name: str, paths: list[str]) -> dict[str, Any]:
    option_strings = {path.partition("?")[2] for path in paths}
    if len(option_strings) > 1:
        raise ValueError(
            f"data.train names {BUILTIN_PREFIX}{name} with two sets of options, {sorted(paths)}; give one."
        )
    options: dict[str, Any] = {}
    for pair in filter(None, "".join(option_strings).split("&")):
        key, _, value = pair.partition("=")
        option_types = BUILTIN_TASKS[name].options
        if key not in option_types:
            former = {"rows": "train", "select": "dev"}.get(key)
            close_names = [former] if former in option_types else difflib.get_close_matches(key, option_types, 1)
            hint = f" Did you mean {close_names[0]}?" if close_names else ""
            raise ValueError(
                f"{paths[0]}: {BUILTIN_PREFIX}{name} has no option {key!r}; it has {list(option_types)}.{hint}"
            )
        try:
            options[key] = option_types[key](value)
        except ValueError:
            raise ValueError(f"{paths[0]}: {key}={value!r} is no {option_types[key].__name__}.") from None
    return options
