"""Memory of a run by phase, its peak and alternative checkpointing plans."""

import math
from typing import Any, cast

from bilevel_jax.commands.estimate.abstract_run import (
    AbstractRun,
)
from bilevel_jax.core import checkpointing
from bilevel_jax.core.types import CheckpointPlan
from bilevel_jax.runs.budget import memory
from bilevel_jax.runs.budget.memory import Workspace
from bilevel_jax.runs.config.load import (
    OuterLoopConfig,
    TrainConfig,
)
from bilevel_jax.runs.config.schema import EstimateSection
from bilevel_jax.runs.engine.trainer import HVP_WORK
from bilevel_jax.runs.engine.trajectory_store import GIB, device_memory_bytes, num_backward_steps


def plan_run_checkpoints(abstract_run: AbstractRun, options: EstimateSection) -> CheckpointPlan:
    """The checkpointing plan of the run on the device that is asked for."""
    return memory.plan_task_checkpoints(
        abstract_run.task, abstract_run.config, abstract_run.shapes, options.memory_gib * GIB
    )


def estimate_memory(
    abstract_run: AbstractRun,
    workspace: Workspace,
    options: EstimateSection,
    simulated: bool,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The phases of the run, the peak, and the memory of a device; `seconds` of each compiled step, where known."""
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
    """The checkpointing plan of the run and its alternatives, by name."""
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
    """Memory and time of training and backward pass under a checkpointing plan."""
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
