"""What a run was expected to take of memory, disk and work, by sizes alone, and what it took."""

import resource
import sys
from pathlib import Path
from typing import Any

import jax

from bilevel_jax.runs import memory, plan, programs
from bilevel_jax.runs.config import SelectConfig, TrainConfig
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task


def expected(task: Task, config: SelectConfig | TrainConfig, work: Session) -> dict[str, Any]:
    """What `estimate` says without asking the compiler: training steps, bytes of arrays on one device, disk.

    Made where a run begins and remembered by it, with the most memory so far.
    """
    return work.once("expected", lambda: _expected(task, config))


def _expected(task: Task, config: SelectConfig | TrainConfig) -> dict[str, Any]:
    shapes = programs.steps(task, programs.first_batch(task, config))
    phases = memory.phases(task, config, shapes, memory.Workspace())
    top = max(phases, key=lambda phase: phase.bytes)
    passes = (
        task.steps if isinstance(config, TrainConfig) else sum(stage.work for stage in plan.selection(task, config))
    )
    return {
        "passes": passes,
        "peak": top.bytes,
        "peak_phase": top.name,
        "disk": memory.disk(task, config, shapes),
        "memory_before": peak()[0],
    }


def peak() -> tuple[float, str]:
    """The most memory so far, bytes: of one device where it tells, or else of this process, arrays and all."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"]), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit), "process"


def taken(task: Task, folder: Path, *, passes: float, seconds: float, timed: float) -> dict[str, Any]:
    """What the run took: `passes` training steps, of which `timed` took `seconds`."""
    most, of = peak()
    return {
        "passes": passes,
        "memory": most,
        "memory_of": of,
        "disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "seconds_per_pass": seconds / timed if timed else float("nan"),
        "device": f"{task.mesh.size} x {task.mesh.devices.flat[0].device_kind}",
    }
