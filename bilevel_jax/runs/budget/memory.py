"""Estimated device memory by phase and disk use of a run."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax.core.checkpointing import NO_CHECKPOINTS, single_replay_plan
from bilevel_jax.core.types import CheckpointPlan
from bilevel_jax.runs.budget import compiled_steps, work
from bilevel_jax.runs.budget.compiled_steps import StepShapes
from bilevel_jax.runs.config.load import AuditConfig, OuterLoopConfig, RunConfig, TrainConfig
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS
from bilevel_jax.runs.engine.trajectory_store import (
    bytes_per_device,
    linearization_bytes,
    num_backward_steps,
    plan_checkpoints,
)
from bilevel_jax.runs.tasks.text import TextTask

MID_STEP_CHECKPOINT = "in the middle of an outer step"
"""The checkpoint of a run that was stopped, or that took longer than output.save_minutes for an outer step."""


BYTES_OF_PAIR = 128
"""In reference.parquet: four numbers, an id and a hash, at most."""


class Phase(NamedTuple):
    """A time of a run, and the bytes of one device that are taken then."""

    name: str
    parts: dict[str, float]

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return sum(self.parts.values())


class Workspace(NamedTuple):
    """Bytes of one device beside arguments and results, while each step runs; 0 where nobody asked the compiler."""

    forward: float = 0.0
    """A training step."""
    backward: float = 0.0
    """A step back through it."""
    linearize: float = 0.0
    """A training step that leaves its linearisation."""
    slope: float = 0.0
    """The gradient of one batch's share of L_v."""
    alone: float = 0.0
    """A step of a method whose weights move with the parameters."""


def count_by_dtype(tree: Any) -> dict[str, int]:
    """Total number of elements of all leaves, by dtype."""
    counts: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        counts[str(leaf.dtype)] = counts.get(str(leaf.dtype), 0) + math.prod(leaf.shape)
    return counts


def memory_phases(
    task: TextTask,
    config: RunConfig,
    shapes: StepShapes,
    workspace: Workspace,
    plan: CheckpointPlan | None = None,
) -> list[Phase]:
    """What lives in each phase of a run; the largest is the run's peak.

    Exact for the arrays, as long as a device does not run ahead of the host. `plan` is the checkpointing plan, by
    default the one that the run would choose here.
    """
    resident = _resident_arrays(task, config, shapes)
    if isinstance(config, TrainConfig):
        return [
            _training_phase(config, shapes, resident, workspace),
            writing_phase(task, resident, shapes),
        ]
    return [
        *_hypergradient_phases(task, config, shapes, resident, workspace, plan),
        writing_phase(task, resident, shapes),
    ]


def _resident_arrays(task: TextTask, config: RunConfig, shapes: StepShapes) -> dict[str, float]:
    """What a run holds from the beginning to the end."""
    streams = [*task.held_out_streams.values(), *(task.reported.streams.values() if task.reported else ())]
    table_bytes = bytes_per_device(shapes.weights)
    num_tables = 1 if isinstance(config, TrainConfig) else 8  # weights, entries and baselines of the outer loop
    loaded = task.base_params is None and not config.model.from_scratch
    return {
        "base": bytes_per_device(task.base_params),
        # every training starts from it, and steps in memory of its own
        "the model as loaded": bytes_per_device(shapes.params) if loaded else 0,
        "validation examples": sum(
            bytes_per_device(stream.batch(step)) for stream in streams for step in range(stream.steps)
        ),
        "weight tables": num_tables * table_bytes,
        "batch": bytes_per_device(shapes.batch),
    }


def _training_phase(
    config: TrainConfig, shapes: StepShapes, resident: Mapping[str, float], workspace: Workspace
) -> Phase:
    best_params_bytes = bytes_per_device(shapes.params) if config.train.load_best else 0
    parts = {
        "parameters and optimizer": bytes_per_device(shapes.state),
        "best parameters": best_params_bytes,
        "workspace": workspace.forward,
    }
    return Phase("training", {**resident, **parts})


def _hypergradient_phases(
    task: TextTask,
    config: OuterLoopConfig,
    shapes: StepShapes,
    resident: dict[str, float],
    workspace: Workspace,
    plan: CheckpointPlan | None,
) -> list[Phase]:
    state, gradient = bytes_per_device(shapes.state), bytes_per_device(shapes.params)
    adjoint, table = bytes_per_device(shapes.adjoint), bytes_per_device(shapes.weights)
    plan = plan_task_checkpoints(task, config, shapes) if plan is None else plan
    backward_steps = num_backward_steps(config.outer, task.num_steps)
    # the start is there in any case, and its parameters are those of the model as loaded
    starting = state - (gradient if resident["the model as loaded"] else 0)
    all_stored, starts_at_beginning = plan.stored_steps >= backward_steps, backward_steps == task.num_steps
    snapshots = 0 if all_stored or config.outer.offload != "device" else max(0, plan.snapshots - starts_at_beginning)
    stored = {
        "start": starting,
        "snapshots": snapshots * state,
        "states on the tape": (plan.stored_steps - (all_stored and starts_at_beginning)) * state,
        "gradients on the tape": plan.stored_steps * gradient,
        "linearisations on the tape": plan.stored_steps * task_linearization_bytes(task, shapes)
        if plan.linearize
        else 0,
    }
    training = Phase(
        "training",
        {
            **resident,
            **stored,
            # a step reads one and makes another; with a tape the one that is read stands on it
            "states of a step": state if plan.stored_steps else 2 * state,
            "gradients": 0 if plan.stored_steps else 2 * gradient,
            "workspace": max(workspace.forward, workspace.linearize),
        },
    )
    losses = work.count_backward_losses(task, config) if config.outer.method in ("unrolled", "window") else 1
    validation_phase = Phase(
        "slope",
        {
            **resident, **stored, "end": state, "gradients": 2 * gradient, "adjoints": (losses - 1) * adjoint,
            "workspace": workspace.slope,
        },
    )  # fmt: skip
    if not isinstance(config, AuditConfig) and config.outer.method in SINGLE_LOOP_METHODS:
        program = compiled_steps.single_loop_program(task, config, config.single_loop, shapes)
        both_models = bytes_per_device(program.arguments[0])
        return [
            training,
            Phase("both models", {**resident, "states of a step": both_models, "workspace": workspace.alone}),
        ]
    if config.outer.method not in ("unrolled", "window"):
        # a solve's vectors: its solution, residual, direction, product and right-hand side, and the solution before
        solve = {"vectors of the solve": 7 * gradient} if config.outer.method == "implicit" else {}
        return [training, validation_phase._replace(parts={**validation_phase.parts, **solve})]
    backward_phase = Phase(
        "step back",
        {
            **resident, **stored, "end": state, "adjoints": 2 * losses * adjoint, "entries": losses * table,
            "workspace": workspace.backward,
        },
    )  # fmt: skip
    if all_stored:
        return [training, validation_phase, backward_phase]
    if backward_steps > plan.stored_steps * (1 + starts_at_beginning):
        # after a replay; where it is of the first steps, the state on the tape that is the start makes up for it
        backward_phase.parts["edge of the sweep"] = state
    replay_phase = Phase(
        "replay",
        {
            **resident, **stored, "end": state, "edge of the sweep": state, "adjoints": losses * adjoint,
            "entries": losses * table,
            "workspace": max(workspace.forward, workspace.linearize),
        },
    )  # fmt: skip
    if (
        config.outer.offload != "device"
        or plan.snapshots < single_replay_plan(backward_steps, plan.stored_steps).snapshots
    ):
        # else the first stored step is a snapshot
        replay_phase.parts["states of a step"] = state
    return [training, validation_phase, replay_phase, backward_phase]


def writing_phase(task: TextTask, resident: dict[str, float], shapes: StepShapes) -> Phase:
    """The model in float32, for the file."""
    params_bytes = bytes_per_device(shapes.params)
    if task.base_params is None:
        return Phase("writing", {**resident, "trained parameters": params_bytes})
    # brought together from all devices, in float32
    cast = 4 * sum(count_by_dtype(task.base_params).values())
    merged = 4 * sum(math.prod(task.base_params["layers"][name]["kernel"].shape) for name in shapes.params["lora"])
    parts = {"trained parameters": params_bytes, "base in float32": cast, "merged projections": merged}
    return Phase("writing", {**resident, **parts})


def plan_task_checkpoints(
    task: TextTask, config: RunConfig, shapes: StepShapes, device_bytes: float = 0.0
) -> CheckpointPlan:
    """The checkpointing plan on a device with so many bytes (0: this one)."""
    if isinstance(config, TrainConfig):
        return NO_CHECKPOINTS
    return plan_checkpoints(
        config.outer,
        task.num_steps,
        shapes.state,
        task.base_params,
        device_bytes,
        linearization_size=lambda: task_linearization_bytes(task, shapes),
    )


def task_linearization_bytes(task: TextTask, shapes: StepShapes) -> int:
    """Bytes of a step's linearisation on one device."""
    return linearization_bytes(task.train_step, *compiled_steps.linearize_program(task, shapes).arguments)


def peak_with_plan(
    task: TextTask, config: OuterLoopConfig, shapes: StepShapes, workspace: Workspace, plan: CheckpointPlan
) -> float:
    """The peak of training and backward pass on one device under a checkpointing plan, in bytes."""
    return max(phase.total_bytes for phase in memory_phases(task, config, shapes, workspace, plan)[:-1])


def disk_bytes(task: TextTask, config: RunConfig, shapes: StepShapes) -> dict[str, float]:
    """Bytes that a run leaves in its folder, without those of its log and report; checkpoints may be compressed."""
    params, state = _total_bytes(shapes.params), _total_bytes(shapes.state)
    table = _total_bytes(shapes.weights)
    sizes: dict[str, float] = {}
    if isinstance(config, TrainConfig):
        sizes["checkpoints"] = 2 * (state + (params if config.train.load_best else 0))
    elif config.outer.method in SINGLE_LOOP_METHODS:
        sizes["checkpoints"] = 2 * state
    else:
        sizes["checkpoints"] = 2 * (6 * table + params)
        plan = plan_task_checkpoints(task, config, shapes)
        # what is resumed, the edge of the sweep, and the snapshots but the start
        count = plan.snapshots - (
            num_backward_steps(config.outer, task.num_steps) == task.num_steps and plan.snapshots > 0
        )
        sizes[MID_STEP_CHECKPOINT] = (count + 2) * state + _total_bytes(shapes.adjoint) + table
    if num_pairs := sum(corpus.num_examples for corpus, _ in task.reference_corpora()):
        sizes["log-probabilities of the reference"] = num_pairs * BYTES_OF_PAIR
    if task.base_params is None:
        sizes["model"] = params
    else:
        parts = config.output.model if isinstance(config, TrainConfig) else "both"
        sizes["model"] = 4 * sum(count_by_dtype(task.base_params).values()) if parts != "adapter" else 0
        sizes["adapter"] = params if parts != "full" else 0
    return sizes


def _total_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
