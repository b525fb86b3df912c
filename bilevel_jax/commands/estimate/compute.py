"""Compiled steps of a run, their operations and their time."""

import math
import re
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax.commands.estimate.abstract_run import (
    AbstractRun,
)
from bilevel_jax.commands.estimate.peak import plan_run_checkpoints
from bilevel_jax.core import checkpointing
from bilevel_jax.core.training import with_product_precision
from bilevel_jax.core.types import CheckpointPlan
from bilevel_jax.runs.budget import compiled_steps, memory, work
from bilevel_jax.runs.budget.compiled_steps import CompiledProgram, Program
from bilevel_jax.runs.budget.memory import Workspace
from bilevel_jax.runs.budget.work import WorkStage
from bilevel_jax.runs.config.load import (
    AuditConfig,
    CompareConfig,
    TrainConfig,
    TuneConfig,
)
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS, EstimateSection
from bilevel_jax.runs.engine.trainer import HVP_WORK, REPLAY_WORK, measures_product_error
from bilevel_jax.runs.engine.trajectory_store import GIB, bytes_per_device, device_memory_bytes, num_backward_steps
from bilevel_jax.runs.scoring.scores import SCORES
from bilevel_jax.runs.tasks.evaluation import read_labels
from bilevel_jax.runs.tasks.text import TextTask


class CompiledStep(NamedTuple):
    """A step of the run, compiled."""

    program: Program
    compiled: CompiledProgram


def compile_steps(abstract_run: AbstractRun, simulated: bool) -> dict[str, CompiledStep]:
    """The steps of the run by their name in `Workspace`; with outer.linearize `forward` and `backward` with that.

    Those of several targets have their names besides, as "slope, helpful".

    XLA's CPU compiler turns a base in bfloat16 into float32 as a whole, once, which takes twice its memory again; those
    of accelerators have no need to. For devices that are simulated the base is therefore compiled as float32.
    """
    task, shapes = abstract_run.task, abstract_run.shapes
    if simulated and task.base_params is not None:
        float32_base = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding), task.base_params
        )
        task = task._replace(base_params=float32_base)
        shapes = shapes._replace(frozen=task.frozen(shapes.params))
    if isinstance(abstract_run.config, TrainConfig):
        return {"forward": compile_step(compiled_steps.update_program(task, shapes))}
    steps = {"forward": compile_step(compiled_steps.forward_program(task, shapes))}
    if abstract_run.config.outer.method in ("unrolled", "window"):
        if abstract_run.config.outer.linearize:
            steps["linearize"] = compile_step(compiled_steps.linearize_program(task, shapes))
            steps["backward"] = compile_step(compiled_steps.vjp_program(task, shapes, steps["linearize"].compiled))
        else:
            outer, at_highest = abstract_run.config.outer, None
            if measures_product_error(outer):
                at_highest = task.train_step
                step = with_product_precision(at_highest, task.problem, task.optimizer, outer.product_precision)
                task = task._replace(train_step=step)
            steps["backward"] = compile_step(compiled_steps.backward_program(task, shapes))
            losses = work.count_backward_losses(task, abstract_run.config)
            if losses > 1 and not isinstance(abstract_run.config, AuditConfig):
                program = compiled_steps.backward_of_each_program(task, shapes, losses, at_highest)
                steps[f"backward, of {losses} losses"] = compile_step(program)
    config = abstract_run.config
    judges_as_training = task.outer_objective.losses is task.objective.losses
    names = [f", {target.name}" * (len(task.outer_objective.targets) > 1) for target in task.outer_objective.targets]
    if not isinstance(config, AuditConfig) and config.outer.method in SINGLE_LOOP_METHODS:
        steps["alone"] = compile_step(compiled_steps.single_loop_program(task, config, config.single_loop, shapes))
    # V is not packed, and may be wider than a step
    if "validation" in task.held_out_streams and (task.layout != task.layout.unpacked or not judges_as_training):
        for name, program in zip(names, compiled_steps.validation_gradient_programs(task, shapes), strict=True):
            steps[f"slope{name}"] = compile_step(program)
    return steps


def compile_step(program: Program) -> CompiledStep:
    """A step with its executable, workspace and operations."""
    return CompiledStep(program, compiled_steps.compile_program(program))


def collect_workspace(abstract_run: AbstractRun, steps: dict[str, CompiledStep], simulated: bool) -> Workspace:
    """The workspaces of the compiled steps; of those of several targets, which take turns, the largest."""
    largest: dict[str, float] = {}
    for name, step in steps.items():
        kind = name.partition(",")[0]
        largest[kind] = max(largest.get(kind, 0.0), step.compiled.workspace_bytes)
    return Workspace(**{kind: size + upcast_bytes(abstract_run, simulated) for kind, size in largest.items()})


def upcast_bytes(abstract_run: AbstractRun, simulated: bool) -> float:
    """Bytes of a layer and of the embedding or head of a base in bfloat16, as float32, which are there while used."""
    base = abstract_run.task.base_params
    if not simulated or base is None or set(memory.count_by_dtype(base)) == {"float32"}:
        return 0.0
    layer = 4 * sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(base["layers"]))
    return layer + 4 * math.prod(base["embed"].shape)


def estimate_compute(
    config: Any, abstract_run: AbstractRun, steps: dict[str, CompiledStep], options: EstimateSection, simulated: bool
) -> dict[str, Any]:
    """Workspaces, operations and hours."""
    task = abstract_run.task
    forward = steps["forward"].compiled.flops
    backward = steps["backward"].compiled.flops if "backward" in steps else HVP_WORK * forward
    stages = list_stages(config, abstract_run, plan_run_checkpoints(abstract_run, options))
    target_costs = _target_costs(task, {name: step.compiled.flops for name, step in steps.items()})
    evaluation_steps = work.evaluation_work(task, abstract_run.config, target_costs)
    flops = evaluation_steps * forward + sum(
        stage.forward_steps * forward + stage.backward_steps * backward + stage.other_work * forward for stage in stages
    )
    result: dict[str, Any] = {
        "programs": {
            name: {
                "workspace": step.compiled.workspace_bytes,
                "flops": step.compiled.flops,
                "seconds_to_compile": step.compiled.compile_seconds,
            }
            for name, step in steps.items()
        },
        "flops": flops,
        "trainings_by_flops": flops / (task.num_steps * forward),
    }
    count = task.mesh.size
    seconds: dict[str, float] = {}
    if options.tflops:
        speed = count * options.tflops * 1e12 * options.mfu
        seconds = {"forward": forward / speed, "backward": backward / speed, "batch": 0.0}
        source = f"{options.tflops:g} Tflop/s a device at {options.mfu:.0%}, given"
    elif not options.measure:
        source = "not asked for (--estimate.no-measure)"
    elif simulated:
        source = "not measured: the devices are simulated; give --estimate.tflops"
    else:
        free_bytes = free_memory_bytes()
        needed_bytes = max(
            bytes_per_device(step.program.arguments) + step.compiled.workspace_bytes for step in steps.values()
        )
        if free_bytes <= 0:
            source = "not measured: the device does not tell how much memory is free"
        elif needed_bytes * count > 0.8 * free_bytes:
            source = (
                f"not measured: a step takes {needed_bytes * count / GIB:.1f} GiB, and {free_bytes / GIB:.1f} are free"
            )
        else:
            seconds = {
                name: compiled_steps.time_program(step.program, step.compiled.executable)
                for name, step in steps.items()
            }
            seconds.setdefault("backward", HVP_WORK * seconds["forward"])
            seconds["batch"] = _time_batch(abstract_run)
            source = f"measured on {count} x {jax.devices()[0].device_kind}"
    result["speed"] = {"source": source, **seconds}
    if seconds:
        result["hours"] = {stage.name: _stage_hours(stage, seconds) for stage in stages}
        if not options.tflops:
            evaluation_steps = work.evaluation_work(task, abstract_run.config, _target_costs(task, seconds))
        result["hours"]["readings of losses"] = evaluation_steps * seconds["forward"] / 3600
        training_hours = task.num_steps * (seconds["forward"] + seconds["batch"]) / 3600
        result["hours_of_one_training"] = training_hours
    return result


def _target_costs(task: TextTask, amounts: dict[str, float]) -> list[float]:
    """The gradient of a validation batch of each target in training steps; `amounts` are operations, or seconds, of the
    compiled steps. 1 where it is a training step's."""
    slopes = [amount for name, amount in amounts.items() if name.partition(",")[0] == "slope"]
    return [slope / amounts["forward"] for slope in slopes] or [1.0] * len(task.outer_objective.targets)


def list_stages(config: Any, abstract_run: AbstractRun, checkpoint_plan: CheckpointPlan) -> list[WorkStage]:
    """The stages of the run, with the steps that its backward passes really replay."""
    if isinstance(config, TrainConfig):
        return [WorkStage("training", forward_steps=abstract_run.task.num_steps)]
    if isinstance(config, CompareConfig):
        labels = read_labels(abstract_run.task, config.data)
        return work.count_compare_work(abstract_run.task, config, labels)
    if isinstance(config, AuditConfig):
        names = config.audit.scores or tuple(SCORES)
        total = work.count_audit_work(abstract_run.task, config.audit, config.certify, config.audit.queries, names)
        return [WorkStage("hypergradients and retrains", other_work=total)]
    if isinstance(config, TuneConfig):
        stages = work.tune_run_stages(abstract_run.task, config)
    else:
        stages = work.select_run_stages(abstract_run.task, config)
    steps = num_backward_steps(config.outer, abstract_run.task.num_steps)
    replays_per_step = (
        checkpointing.count_replayed_steps(steps, checkpoint_plan) / steps
        if checkpoint_plan.stored_steps
        else REPLAY_WORK
    )
    return [
        stage._replace(forward_steps=stage.forward_steps + (replays_per_step - REPLAY_WORK) * stage.backward_steps)
        for stage in stages
    ]


def _stage_hours(stage: WorkStage, seconds: dict[str, float]) -> float:
    forward, backward = seconds["forward"] + seconds["batch"], seconds["backward"] + seconds["batch"]
    return (stage.forward_steps * forward + stage.backward_steps * backward + stage.other_work * forward) / 3600


def _time_batch(abstract_run: AbstractRun) -> float:
    """Median seconds of making a batch and moving it to the devices."""
    if abstract_run.config.data.streaming:
        return 0.0
    stream, seconds = abstract_run.task.training_stream(abstract_run.config.data.seed), []
    for step in range(min(5, stream.steps)):
        began = time.monotonic()
        jax.block_until_ready(stream.batch(step))
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def free_memory_bytes() -> float:
    """Bytes that are free for arrays now, on all devices; 0 where an accelerator does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    if stats.get("bytes_limit"):
        return float(stats["bytes_limit"] - stats["bytes_in_use"]) * jax.device_count()
    if jax.devices()[0].platform != "cpu":
        return 0.0  # the host's memory is not the device's
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return 1024.0 * int(match[1]) if match else device_memory_bytes() * jax.device_count() / 2
