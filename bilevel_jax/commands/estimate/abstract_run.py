"""A run as array shapes only, on real or simulated devices."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.backend import clear_backends

from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import Example, Turn
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.hub.downloads import CONFIG_FILES, find_model_files
from bilevel_jax.runs.budget import compiled_steps
from bilevel_jax.runs.budget.compiled_steps import StepShapes
from bilevel_jax.runs.budget.work import count_train_steps
from bilevel_jax.runs.config.load import AuditConfig, RunConfig, TrainConfig
from bilevel_jax.runs.config.schema import EXACT_ESTIMATOR, EstimateSection, TargetSection
from bilevel_jax.runs.engine.outer_loop import data_order_seed
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.placement import make_mesh
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin_untrained
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.targets import is_trainable, list_targets, split_reported
from bilevel_jax.runs.tasks.text import (
    TextTask,
    TokenizedData,
    build_programs,
    compose_text_task,
    compute_dtype,
    corpora_with_reference,
    group_by_corpus,
    make_abstract_params,
    max_example_length,
    target_corpus_name,
    tokenize_splits,
)


class AbstractRun(NamedTuple):
    """What is estimated: a task of shapes."""

    command: str
    config: RunConfig
    """The config of the run, on the devices that are asked for."""
    task: TextTask
    shapes: StepShapes

    @property
    def writes_model(self) -> bool:
        """Whether a model is written."""
        return self.command in ("select", "train")


def simulate_devices(count: int) -> bool:
    """Make sure of `count` devices (0: those there are); whether they had to be simulated, for compiling alone."""
    if count <= len(jax.devices()):
        return False
    if jax.live_arrays():
        raise ValueError(
            f"estimate.devices = {count}, and jax has started with {len(jax.devices())}: ask in a process of its own."
        )
    clear_backends()  # how many there are is read when jax first looks for them
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return True


def resolve_run_config(config: RunConfig, options: EstimateSection) -> RunConfig:
    """The config of the run, on the devices that are asked for; `audit` is estimated with its exact estimator."""
    run: Any = config
    if isinstance(config, AuditConfig):
        run = replace(config, outer=replace(config.outer, method=EXACT_ESTIMATOR))
    if options.devices:
        fsdp = run.mesh.fsdp
        if options.devices % fsdp:
            raise ValueError(f"estimate.devices = {options.devices} is no multiple of mesh.fsdp = {fsdp}.")
        run = replace(run, mesh=replace(run.mesh, data=options.devices // fsdp))
    return run


def read_examples(config: Any, folder: Path) -> tuple[RunConfig, TokenizedData]:
    """The rows of the run, as it would read them."""
    ready_config = resolve_builtin_untrained(config, folder)
    try:
        return ready_config, tokenize_splits(
            ready_config, splits.load_splits(ready_config.data), target_section(ready_config)
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} Where data or a tokenizer are not here, --estimate.train-examples stands for them."
        ) from error


def placeholder_text(config: RunConfig, options: EstimateSection) -> TokenizedData:
    """A text of so many rows, without a tokenizer: one row is as long as rows may be, and sets the shape of batches."""
    name = config.model.name_or_path
    if not name or not (find_model_files(name, CONFIG_FILES) / "config.json").is_file():
        raise FileNotFoundError(f"{name}/config.json: no such file; it is all that is needed of a model.")
    architecture = models.read_config(name)
    sequences = _num_sequences(config.objective.name)
    longest = max_example_length(config.data, architecture)
    example = Example("", 0, (Turn("text", ""),), "", None, "", 0)

    def corpus(count: int, sequences: int) -> Corpus:
        lengths = np.full(count * sequences, 2)
        lengths[0] = longest
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Corpus(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], bool), offsets, sequences)

    specs, _ = split_reported(list_targets(target_section(config), config.objective))
    sizes = np.floor(np.array(config.data.split) * options.validation_examples).astype(int)
    reading = [spec for spec in specs if spec.has_examples]
    parts = {
        part: [[example] * max(1, int(size) // len(reading)) for _ in reading]
        for part, size in zip(splits.PART_NAMES, sizes, strict=True)
        if size and reading and config.data.validation
    }
    is_joint = is_trainable(specs, config.objective)
    notes = [f"{options.train_examples:,} rows of {longest:,} tokens each stand for the data."]
    text = TokenizedData(
        [example] * options.train_examples, parts, notes, None, {}, architecture, {}, specs, is_joint=is_joint
    )
    of_target = {
        target_corpus_name(part, spec): _num_sequences(spec.settings.name) if spec.settings else 1
        for part in parts
        for spec in reading
    }
    for name, examples in group_by_corpus(text, streaming=config.data.streaming).items():
        text.corpora[name] = corpus(len(examples), of_target.get(name, sequences))
    return text


def _num_sequences(loss: str) -> int:
    """Of one example."""
    return 1 if loss == "sft" else 2


def target_section(config: RunConfig) -> TargetSection:
    """What validation examples judge by: in `train`, which has no such section, the training loss."""
    return TargetSection() if isinstance(config, TrainConfig) else config.target


def make_abstract_run(config: RunConfig, text: TokenizedData, command: str) -> AbstractRun:
    """The task of a text with parameters that are shapes only."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding_rules = sharding.parse_sharding_rules(config.mesh.sharding_rules, mesh)
    margins = {
        name: text.corpora[name].with_reference_margins(np.zeros(text.corpora[name].num_examples))
        for name in corpora_with_reference(text, config.objective)
    }
    text = text._replace(corpora=text.corpora | margins)
    base, fresh = make_abstract_params(config.model, config.lora, text.architecture, mesh, sharding_rules)
    if isinstance(config, TrainConfig):
        steps, seeds, proximal = count_train_steps(config.train, len(text.examples)), [config.data.seed], 0.0
    else:
        steps, proximal = config.train.max_steps, config.outer.proximal
        seeds = [data_order_seed(config.data, config.outer, step) for step in range(config.outer.steps + 1)]
    programs = build_programs(
        text.architecture,
        config.objective,
        build_optimizer(config.optimizer, steps),
        mesh,
        sharding_rules,
        remat=config.model.remat,
        compute_dtype=compute_dtype(config.train),
        lora=base is not None,
        proximal_strength=proximal,
        specs=text.targets,
        reported=text.reported,
    )
    abstract_task = compose_text_task(config, text, base, fresh, programs, mesh, num_steps=steps, seeds=seeds)
    return AbstractRun(
        command,
        config,
        abstract_task,
        compiled_steps.step_shapes(abstract_task, compiled_steps.make_first_batch(abstract_task, config)),
    )
