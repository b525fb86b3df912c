"""Config changes that lower the peak memory of a run."""

from dataclasses import replace
from typing import Any, cast

from bilevel_jax.commands.estimate.abstract_run import (
    AbstractRun,
    make_abstract_run,
)
from bilevel_jax.commands.estimate.compute import collect_workspace, compile_steps
from bilevel_jax.commands.estimate.peak import estimate_memory
from bilevel_jax.runs.budget.memory import Workspace
from bilevel_jax.runs.config.load import (
    RunConfig,
    TrainConfig,
)
from bilevel_jax.runs.config.schema import EstimateSection
from bilevel_jax.runs.tasks.text import TokenizedData

FEWER_STEPS_DIVISOR = 4
"""The remedy with fewer steps has a quarter of them."""


def find_remedies(
    abstract_run: AbstractRun,
    text: TokenizedData,
    workspace: Workspace,
    peak: float,
    options: EstimateSection,
    simulated: bool,
) -> list[dict[str, Any]]:
    """Config changes with the peak that each gives, the least first; each is estimated as the run itself is."""
    run = abstract_run.config
    model, train, devices = run.model, cast(Any, run.train), abstract_run.task.mesh.size
    max_accumulation = max(1, train.global_batch_size // devices)
    changes: dict[str, tuple[RunConfig, bool]] = {}  # words -> (config, whether the steps are compiled anew)
    if train.gradient_accumulation_steps < max_accumulation and options.compile:
        changes[f"train.gradient_accumulation_steps: {max_accumulation}"] = (
            replace(run, train=replace(train, gradient_accumulation_steps=max_accumulation)),
            True,
        )
    if model.remat != "full" and options.compile:
        changes["model.remat: full"] = replace(run, model=replace(model, remat="full")), True
    if not isinstance(run, TrainConfig) and run.outer.linearize and options.compile:
        changes["outer.linearize: false"] = replace(run, outer=replace(run.outer, linearize=False)), True
    if run.lora.r and model.base_dtype == "float32":
        changes["model.base_dtype: bfloat16"] = replace(run, model=replace(model, base_dtype="bfloat16")), not simulated
    if not run.lora.r and not model.from_scratch:
        changes["lora.r: 16"] = replace(run, lora=replace(run.lora, r=16)), True
    if run.mesh.fsdp < devices:
        parts = replace(run.mesh, data=1, fsdp=devices)
        changes[f"mesh.fsdp: {devices}"] = replace(run, mesh=parts), True
    if not isinstance(run, TrainConfig) and run.train.max_steps >= FEWER_STEPS_DIVISOR:
        fewer = run.train.max_steps // FEWER_STEPS_DIVISOR
        changes[f"train.max_steps: {fewer}"] = replace(run, train=replace(run.train, max_steps=fewer)), False
    helpful_changes = []
    for words, (changed_config, recompile) in changes.items():
        try:
            changed_run = make_abstract_run(changed_config, text, abstract_run.command)
        except ValueError:  # a model that the change does not fit
            continue
        changed_workspace = workspace
        if recompile and options.compile:
            changed_workspace = collect_workspace(changed_run, compile_steps(changed_run, simulated), simulated)
        changed_peak = estimate_memory(changed_run, changed_workspace, options, simulated, {})["peak"]
        if changed_peak < peak:
            helpful_changes.append({"change": words, "peak": changed_peak})
    return sorted(helpful_changes, key=lambda change: change["peak"])
