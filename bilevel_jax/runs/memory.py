"""What of a run lives at the same time on one device, and what it leaves on the disk: bytes, before it begins."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bilevel_jax.core.schedule import NOTHING, once
from bilevel_jax.core.types import Keep
from bilevel_jax.runs import programs
from bilevel_jax.runs.config import SelectConfig, TrainConfig
from bilevel_jax.runs.programs import Steps
from bilevel_jax.runs.sections import SINGLE_LOOP_METHODS, ModelSection
from bilevel_jax.runs.states import held, linearised, planned, swept
from bilevel_jax.runs.task import Task

MIDWAY = "in the middle of an outer step"
"""What is left there by a run that was stopped, or that took longer than output.save_minutes for an outer step."""


class Phase(NamedTuple):
    """A time of a run, and the bytes of one device that are taken then."""

    name: str
    parts: dict[str, float]

    @property
    def bytes(self) -> float:
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


def by_dtype(some: Any) -> dict[str, int]:
    """Numbers, not bytes, of all leaves in all, by dtype."""
    counts: dict[str, int] = {}
    for leaf in jax.tree.leaves(some):
        counts[str(leaf.dtype)] = counts.get(str(leaf.dtype), 0) + math.prod(leaf.shape)
    return counts


def phases(
    task: Task, config: SelectConfig | TrainConfig, shapes: Steps, workspace: Workspace, keep: Keep | None = None
) -> list[Phase]:
    """What lives in each phase of a run; the largest is the run's peak.

    Exact for the arrays, as long as a device does not run ahead of the host. `keep` is what a training keeps for its
    sweep, by default what it would here.
    """
    always = _always(task, config, shapes)
    if isinstance(config, TrainConfig):
        return [_descending(config, shapes, always, workspace), writing(task, config.model, always, shapes)]
    return [*_estimating(task, config, shapes, always, workspace, keep), writing(task, config.model, always, shapes)]


def _always(task: Task, config: SelectConfig | TrainConfig, shapes: Steps) -> dict[str, float]:
    """What a run holds from the beginning to the end."""
    streams = task.held_out.values()
    table = held(shapes.weights)
    tables = 8 if isinstance(config, SelectConfig) else 1  # weights, entries and baselines of the outer loop
    loaded = task.base is None and not config.model.from_scratch
    return {
        "base": held(task.base),
        # every training starts from it, and steps in memory of its own
        "the model as loaded": held(shapes.params) if loaded else 0,
        "trusted rows": sum(held(stream.batch(step)) for stream in streams for step in range(stream.steps)),
        "weight tables": tables * table,
        "batch": held(shapes.batch),
    }


def _descending(config: TrainConfig, shapes: Steps, always: Mapping[str, float], workspace: Workspace) -> Phase:
    best = held(shapes.params) if config.train.load_best else 0
    parts = {"parameters and optimiser": held(shapes.state), "best parameters": best, "workspace": workspace.forward}
    return Phase("training", {**always, **parts})


def _estimating(
    task: Task,
    config: SelectConfig,
    shapes: Steps,
    always: dict[str, float],
    workspace: Workspace,
    keep: Keep | None,
) -> list[Phase]:
    state, gradient = held(shapes.state), held(shapes.params)
    adjoint, table = held(shapes.adjoint), held(shapes.weights)
    keep = kept(task, config, shapes) if keep is None else keep
    steps = swept(config.outer, task.steps)
    # the start is there in any case, and its parameters are those of the model as loaded
    starting = state - (gradient if always["the model as loaded"] else 0)
    whole, start_again = keep.tape >= steps, steps == task.steps
    snapshots = 0 if whole or config.outer.offload != "device" else max(0, keep.snapshots - start_again)
    retained = {
        "start": starting,
        "snapshots": snapshots * state,
        "states on the tape": (keep.tape - (whole and start_again)) * state,
        "gradients on the tape": keep.tape * gradient,
        "linearisations on the tape": keep.tape * linear(task, shapes) if keep.linear else 0,
    }
    training = Phase(
        "training",
        {
            **always,
            **retained,
            # a step reads one and makes another; with a tape the one that is read stands on it
            "states of a step": state if keep.tape else 2 * state,
            "gradients": 0 if keep.tape else 2 * gradient,
            "workspace": max(workspace.forward, workspace.linearize),
        },
    )
    reading = Phase(
        "slope",
        {**always, **retained, "end": state, "gradients": 2 * gradient, "workspace": workspace.slope},
    )
    if config.outer.method in SINGLE_LOOP_METHODS:
        both = held(programs.alone(task, config, shapes).arguments[0])
        return [training, Phase("both models", {**always, "states of a step": both, "workspace": workspace.alone})]
    if config.outer.method not in ("unrolled", "window"):
        # a solve's vectors: its solution, residual, direction, product and right-hand side, and the solution before
        solve = {"vectors of the solve": 7 * gradient} if config.outer.method == "implicit" else {}
        return [training, reading._replace(parts={**reading.parts, **solve})]
    sweeping = Phase(
        "step back",
        {
            **always, **retained, "end": state, "adjoints": 2 * adjoint, "entries": table,
            "workspace": workspace.backward,
        },
    )  # fmt: skip
    if whole:
        return [training, reading, sweeping]
    replaying = Phase(
        "replay",
        {
            **always, **retained, "end": state, "edge of the sweep": state, "adjoints": adjoint, "entries": table,
            "workspace": max(workspace.forward, workspace.linearize),
        },
    )  # fmt: skip
    if config.outer.offload != "device" or keep.snapshots < once(steps, keep.tape).snapshots:
        # else the first state on the tape is a snapshot
        replaying.parts["states of a step"] = state
    return [training, reading, replaying, sweeping]


def writing(task: Task, model: ModelSection, always: dict[str, float], shapes: Steps) -> Phase:
    """The model in float32, for the file."""
    trained = held(shapes.params)
    if task.base is None:
        return Phase("writing", {**always, "trained parameters": trained})
    # brought together from all devices, in float32
    cast = 4 * sum(by_dtype(task.base).values())
    merged = 4 * sum(math.prod(task.base["layers"][name]["kernel"].shape) for name in shapes.params["lora"])
    parts = {"trained parameters": trained, "base in float32": cast, "merged projections": merged}
    return Phase("writing", {**always, **parts})


def kept(task: Task, config: SelectConfig | TrainConfig, shapes: Steps, device: float = 0.0) -> Keep:
    """What a training keeps for its sweep on a device that has so many bytes (0: this one)."""
    if isinstance(config, TrainConfig):
        return NOTHING
    return planned(config.outer, task.steps, shapes.state, task.base, device, linear=lambda: linear(task, shapes))


def linear(task: Task, shapes: Steps) -> int:
    """Bytes of a step's linearisation on one device."""
    return linearised(task.step, *programs.linearizing(task, shapes).arguments)


def kept_otherwise(task: Task, config: SelectConfig, shapes: Steps, workspace: Workspace, keep: Keep) -> float:
    """The peak of training and sweep on one device, in bytes, if a training kept this."""
    return max(phase.bytes for phase in phases(task, config, shapes, workspace, keep)[:-1])


def disk(task: Task, config: SelectConfig | TrainConfig, shapes: Steps) -> dict[str, float]:
    """Bytes that a run leaves in its folder, without those of its log and report; checkpoints may be compressed."""
    params, state = _stored(shapes.params), _stored(shapes.state)
    table = _stored(shapes.weights)
    found: dict[str, float] = {}
    if isinstance(config, TrainConfig):
        found["checkpoints"] = 2 * (state + (params if config.train.load_best else 0))
    elif config.outer.method in SINGLE_LOOP_METHODS:
        found["checkpoints"] = 2 * state
    else:
        found["checkpoints"] = 2 * (6 * table + params)
        keep = kept(task, config, shapes)
        # what is resumed, the edge of the sweep, and the snapshots but the start
        count = keep.snapshots - (swept(config.outer, task.steps) == task.steps and keep.snapshots > 0)
        found[MIDWAY] = (count + 2) * state + _stored(shapes.adjoint) + table
    if task.base is None:
        found["model"] = params
    else:
        parts = config.output.model if isinstance(config, TrainConfig) else "both"
        found["model"] = 4 * sum(by_dtype(task.base).values()) if parts != "adapter" else 0
        found["adapter"] = params if parts != "full" else 0
    return found


def _stored(some: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(some))
