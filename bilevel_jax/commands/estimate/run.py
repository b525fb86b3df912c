"""The command `estimate`: what a run will take, from shapes and compiled steps, before anything is loaded or allocated."""

import json
import math
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from bilevel_jax.commands.estimate.abstract_run import (
    AbstractRun,
    make_abstract_run,
    placeholder_text,
    read_examples,
    resolve_run_config,
    simulate_devices,
)
from bilevel_jax.commands.estimate.table import print_comparison, print_estimate
from bilevel_jax.core import checkpointing
from bilevel_jax.core.types import CheckpointPlan
from bilevel_jax.runs.budget import compiled_steps, memory, work
from bilevel_jax.runs.budget.compiled_steps import CompiledProgram, Program
from bilevel_jax.runs.budget.memory import Workspace
from bilevel_jax.runs.budget.work import WorkStage
from bilevel_jax.runs.config.load import (
    AuditConfig,
    CompareConfig,
    OuterLoopConfig,
    RunConfig,
    SelectConfig,
    TrainConfig,
)
from bilevel_jax.runs.config.rules import reads_array_data
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS, EstimateSection
from bilevel_jax.runs.engine.trainer import HVP_WORK, REPLAY_WORK
from bilevel_jax.runs.engine.trajectory_store import GIB, bytes_per_device, device_memory_bytes, num_backward_steps
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.tasks.text import TokenizedData

ESTIMATE_FILE = "estimate.json"
COMMAND_NAMES = {SelectConfig: "select", TrainConfig: "train", CompareConfig: "compare", AuditConfig: "audit"}
FEWER_STEPS_DIVISOR = 4
"""A quarter of the steps, as a remedy."""


class CompiledStep(NamedTuple):
    """A step of the run, compiled."""

    program: Program
    compiled: CompiledProgram


def estimate(config: RunConfig, options: EstimateSection) -> str:
    """Print the estimate, write it where --estimate.dir says, and return its verdict in a sentence.

    Raises ValueError for a config that its command would not run either, FileNotFoundError where there is no config.json.
    """
    if reads_array_data(config):
        raise ValueError("estimate is for runs on text: a task of arrays is over sooner than its estimate.")
    began = time.monotonic()
    simulated = simulate_devices(options.devices)
    with tempfile.TemporaryDirectory() as folder:
        run: Any = resolve_run_config(config, options)
        command = COMMAND_NAMES[type(config)]
        if options.train_examples:
            run = replace(run, data=replace(run.data, packing=False))  # rows of full length do not pack
            text = placeholder_text(run, options)
        else:
            run, text = read_examples(run, Path(folder))
        abstract_run = make_abstract_run(run, text, command)
        result = describe_run(config, abstract_run, options, simulated)
        workspace = Workspace()
        if options.compile:
            steps = compile_steps(abstract_run, simulated)
            workspace = collect_workspace(abstract_run, steps, simulated)
            result |= estimate_compute(config, abstract_run, steps, options, simulated)
        result |= estimate_memory(abstract_run, workspace, options, simulated, result.get("speed", {}))
        if result["budget"] and result["peak"] > result["budget"]:
            result["remedies"] = find_remedies(abstract_run, text, workspace, result["peak"], options, simulated)
    result["seconds_to_estimate"] = time.monotonic() - began
    if options.dir:
        out = Path(options.dir)
        out.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(out / ESTIMATE_FILE, result)
    return print_estimate(result)


# ---- what the compiler says


def compile_steps(abstract_run: AbstractRun, simulated: bool) -> dict[str, CompiledStep]:
    """The steps of the run by their name in `Workspace`; with outer.linearize `forward` and `backward` with that.

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
            steps["backward"] = compile_step(compiled_steps.backward_program(task, shapes))
    config = abstract_run.config
    if not isinstance(config, AuditConfig) and config.outer.method in SINGLE_LOOP_METHODS:
        steps["alone"] = compile_step(compiled_steps.single_loop_program(task, config, config.single_loop, shapes))
    if (
        "validation" in task.held_out_streams and task.layout != task.layout.unpacked
    ):  # V is not packed, and may be wider than a step
        steps["slope"] = compile_step(
            compiled_steps.validation_gradient_program(task, shapes, task.held_out_streams["validation"].batch(0))
        )
    return steps


def compile_step(program: Program) -> CompiledStep:
    """A step and what the compiler says of it."""
    return CompiledStep(program, compiled_steps.compile_program(program))


def collect_workspace(abstract_run: AbstractRun, steps: dict[str, CompiledStep], simulated: bool) -> Workspace:
    """The workspaces of the compiled steps."""
    return Workspace(
        **{name: step.compiled.workspace_bytes + upcast_bytes(abstract_run, simulated) for name, step in steps.items()}
    )


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
    flops = sum(
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
        if needed_bytes * count > 0.8 * free_bytes:
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
        evaluation_steps = work.evaluation_work(task, abstract_run.config)
        result["hours"]["readings of losses"] = evaluation_steps * seconds["forward"] / 3600
        training_hours = task.num_steps * (seconds["forward"] + seconds["batch"]) / 3600
        result["hours_of_one_training"] = training_hours
    return result


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


def list_stages(config: Any, abstract_run: AbstractRun, checkpoint_plan: CheckpointPlan) -> list[WorkStage]:
    """The stages of the run, with the steps that its sweeps really replay."""
    if isinstance(config, TrainConfig):
        return [WorkStage("training", forward_steps=abstract_run.task.num_steps)]
    if isinstance(config, CompareConfig):
        return [
            WorkStage("all methods and arms", other_work=work.count_compare_work(abstract_run.task, config.compare))
        ]
    if isinstance(config, AuditConfig):
        return [
            WorkStage(
                "entries and retrains",
                other_work=work.count_audit_work(abstract_run.task, config.audit, config.certify, config.audit.queries),
            )
        ]
    steps = num_backward_steps(config.outer, abstract_run.task.num_steps)
    replays_per_step = (
        checkpointing.count_replayed_steps(steps, checkpoint_plan) / steps
        if checkpoint_plan.stored_steps
        else REPLAY_WORK
    )
    return [
        stage._replace(forward_steps=stage.forward_steps + (replays_per_step - REPLAY_WORK) * stage.backward_steps)
        for stage in work.select_run_stages(abstract_run.task, config)
    ]


def plan_run_checkpoints(abstract_run: AbstractRun, options: EstimateSection) -> CheckpointPlan:
    """What a training keeps for its sweep on the device that is asked for."""
    return memory.plan_task_checkpoints(
        abstract_run.task, abstract_run.config, abstract_run.shapes, options.memory_gib * GIB
    )


# ---- what lives when


def describe_run(config: Any, abstract_run: AbstractRun, options: EstimateSection, simulated: bool) -> dict[str, Any]:
    """The run's shape, its parameters, its work and its disk: all that needs no compiler."""
    task, shapes, run = abstract_run.task, abstract_run.shapes, abstract_run.config
    stages, checkpoint_plan = (
        list_stages(config, abstract_run, checkpointing.NO_CHECKPOINTS),
        plan_run_checkpoints(abstract_run, options),
    )
    state = bytes_per_device(shapes.state)
    return {
        "command": abstract_run.command,
        "model": {"path": run.model.name_or_path, "lora_rank": run.lora.r, "remat": run.model.remat},
        "method": None if isinstance(run, TrainConfig) else run.outer.method,
        "devices": {
            "count": task.mesh.size,
            "mesh": dict(task.mesh.shape),
            "kind": task.mesh.devices.flat[0].device_kind,
            "backend": jax.default_backend(),
            "simulated": simulated,
        },
        "shape": {
            "rows": task.num_examples, "steps": task.num_steps, "batch": task.batch_size, "micro": task.layout.num_micro_batches,
            "places": task.layout.num_micro_batches * task.layout.rows * task.layout.length, "length": task.layout.length,
        },
        "parameters": {"base": memory.count_by_dtype(task.base_params), "trained": memory.count_by_dtype(shapes.params)},
        "arrays": {
            "base": bytes_per_device(task.base_params),
            "trained parameters": bytes_per_device(shapes.params),
            "optimiser": bytes_per_device(shapes.state.opt_state),
            "batch": bytes_per_device(shapes.batch),
            "snapshot": state,
            "snapshots": checkpoint_plan.snapshots,
            "tape": checkpoint_plan.stored_steps,
            "a step on the tape": state + bytes_per_device(shapes.params),
        },
        "disk": memory.disk_bytes(task, run, shapes) if abstract_run.writes_model else {},
        "work": {stage.name: stage.work for stage in stages},
        "passes": sum(stage.work for stage in stages),
        "trainings": sum(stage.work for stage in stages) / task.num_steps,
        "notes": task.notes,
    }  # fmt: skip


def estimate_memory(
    abstract_run: AbstractRun,
    workspace: Workspace,
    options: EstimateSection,
    simulated: bool,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The phases of the run, the largest, and what the memory of a device is; `speed`: seconds of a step, if known."""
    checkpoint_plan = plan_run_checkpoints(abstract_run, options)
    phases = memory.memory_phases(
        abstract_run.task, abstract_run.config, abstract_run.shapes, workspace, checkpoint_plan
    )
    phases = phases if abstract_run.writes_model else phases[:-1]
    peak_phase = max(phases, key=lambda phase: phase.total_bytes)
    result: dict[str, Any] = {
        "phases": [{"name": phase.name, "bytes": phase.total_bytes, "parts": phase.parts} for phase in phases],
        "peak": peak_phase.total_bytes,
        "peak_phase": peak_phase.name,
        "budget": options.memory_gib * GIB or (0.0 if simulated else device_memory_bytes()),
    }
    if not isinstance(abstract_run.config, TrainConfig) and abstract_run.config.outer.method in ("unrolled", "window"):
        result["kept"] = [
            _plan_costs(abstract_run, workspace, other_plan, name, seconds)
            for name, other_plan in alternative_plans(abstract_run, checkpoint_plan).items()
        ]
    return result


def alternative_plans(abstract_run: AbstractRun, checkpoint_plan: CheckpointPlan) -> dict[str, CheckpointPlan]:
    """What the run keeps, and what it could."""
    steps = num_backward_steps(cast(OuterLoopConfig, abstract_run.config).outer, abstract_run.task.num_steps)
    others = {
        "every state": checkpointing.store_all_plan(steps),
        "square root": checkpointing.square_root_plan(steps),
        "fewer": checkpointing.plan_within_budget(steps, 1, 1, 2 + math.isqrt(steps)),
    }
    others = {name: other._replace(linearize=checkpoint_plan.linearize) for name, other in others.items()}
    return {"this run": checkpoint_plan} | {name: other for name, other in others.items() if other != checkpoint_plan}


def _plan_costs(
    abstract_run: AbstractRun,
    workspace: Workspace,
    checkpoint_plan: CheckpointPlan,
    name: str,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The memory and the time of training and sweep, if a training keeps this."""
    config = cast(OuterLoopConfig, abstract_run.config)
    steps = num_backward_steps(config.outer, abstract_run.task.num_steps)
    forwards = 1 + checkpointing.count_replayed_steps(steps, checkpoint_plan) / steps
    return {
        "name": name,
        "snapshots": checkpoint_plan.snapshots,
        "tape": checkpoint_plan.stored_steps,
        "bytes": memory.peak_with_plan(abstract_run.task, config, abstract_run.shapes, workspace, checkpoint_plan),
        "times": forwards + HVP_WORK - checkpoint_plan.linearize,
        "times_measured": forwards + seconds["backward"] / seconds["forward"] if "forward" in seconds else None,
    }


def free_memory_bytes() -> float:
    """Bytes that are free for arrays now, on all devices."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"]) * jax.device_count()
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    return 1024.0 * int(match[1]) if match else device_memory_bytes() * jax.device_count() / 2


# ---- what to do where it does not fit


def find_remedies(
    abstract_run: AbstractRun,
    text: TokenizedData,
    workspace: Workspace,
    peak: float,
    options: EstimateSection,
    simulated: bool,
) -> list[dict[str, Any]]:
    """Changes of the config with the peak that they give, the least first; each is estimated as the run itself is."""
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


# ---- after a run


def compare_with_measured(folder: Path) -> str:
    """Print what was estimated of a finished run beside what was measured, and return it in a sentence."""
    for name in (run_dir.CONFIG_FILE, "result.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; give the folder of a finished run of select or train.")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if "measured" not in result:
        raise ValueError(
            f"{folder}/result.json has nothing measured: it is of another command, or of an older version."
        )
    return print_comparison(result["estimate"], result["measured"])
