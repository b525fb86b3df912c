"""Expected and measured memory, disk and work of a run."""

import resource
import sys
from pathlib import Path
from typing import Any

import jax

from bilevel_jax.runs.budget import compiled_steps, memory, work
from bilevel_jax.runs.budget.memory import MID_STEP_CHECKPOINT
from bilevel_jax.runs.config.load import SelectConfig, TrainConfig
from bilevel_jax.runs.engine.trajectory_store import GIB
from bilevel_jax.runs.infra.session import EXPECTED_USAGE_JOB, Session
from bilevel_jax.runs.tasks.text import TextTask

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def predict_usage(task: TextTask, config: SelectConfig | TrainConfig, session: Session) -> dict[str, Any]:
    """What `estimate` predicts without the compiler: training steps, bytes of arrays on one device, disk.

    Made where a run begins and remembered by it, with the most memory so far.
    """
    return session.run_once(EXPECTED_USAGE_JOB, lambda: _predict_usage(task, config))


def _predict_usage(task: TextTask, config: SelectConfig | TrainConfig) -> dict[str, Any]:
    shapes = compiled_steps.step_shapes(task, compiled_steps.make_first_batch(task, config))
    phases = memory.memory_phases(task, config, shapes, memory.Workspace())
    peak_phase = max(phases, key=lambda phase: phase.total_bytes)
    training_steps = (
        task.num_steps
        if isinstance(config, TrainConfig)
        else sum(stage.work for stage in work.select_run_stages(task, config))
    )
    return {
        "passes": training_steps,
        "peak": peak_phase.total_bytes,
        "peak_phase": peak_phase.name,
        "disk": memory.disk_bytes(task, config, shapes),
        "memory_before": peak_memory()[0],
    }


def peak_memory() -> tuple[float, str]:
    """The most memory so far, bytes: of one device where it tells, or else of this process, arrays and all."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"]), "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit), "process"


def measure_usage(
    task: TextTask, session: Session, *, training_steps: float, seconds: float, timed_steps: float
) -> dict[str, Any]:
    """What the run took: `training_steps`, of which `timed_steps` took `seconds`.

    Measured by the process that comes here first, and remembered by the run.
    """
    return session.run_once(
        "measured",
        lambda: _measure_usage(
            task, session.folder, training_steps=training_steps, seconds=seconds, timed_steps=timed_steps
        ),
    )


def _measure_usage(
    task: TextTask, folder: Path, *, training_steps: float, seconds: float, timed_steps: float
) -> dict[str, Any]:
    peak_bytes, memory_of = peak_memory()
    return {
        "passes": training_steps,
        "memory": peak_bytes,
        "memory_of": memory_of,
        "disk": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "seconds_per_pass": seconds / timed_steps if timed_steps else float("nan"),
        "device": f"{task.mesh.size} x {task.mesh.devices.flat[0].device_kind}",
    }


def compare_usage(estimated: dict[str, Any], measured: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, estimated before the run, measured, what to know of it), for a terminal and for a report."""
    whole_process = measured["memory_of"] == "process"
    return [
        ("work, training steps", f"{estimated['passes']:,.0f}", f"{measured['passes']:,.0f}", "estimated: at most"),
        (
            "memory",
            format_bytes(estimated["peak"]),
            format_bytes(measured["memory"]),
            "estimated: arrays on one device, without the workspace of a step; measured: "
            + (
                f"the whole process, {format_bytes(estimated['memory_before'])} of it before training began"
                if whole_process
                else "one device"
            ),
        ),
        (
            "disk",
            format_bytes(sum(amount for name, amount in estimated["disk"].items() if name != MID_STEP_CHECKPOINT)),
            format_bytes(measured["disk"]),
            "estimated: checkpoints and models, without what is saved in the middle of an outer step",
        ),
        (
            "seconds a training step",
            "",
            f"{measured['seconds_per_pass']:.3g}",
            f"on {measured['device']}, all included",
        ),
    ]


def format_bytes(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, bytes_ in (("GiB", GIB), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if num_bytes >= bytes_:
            return f"{num_bytes / bytes_:,.4g}\u00a0{unit}"
    return f"{num_bytes:.0f}\u00a0B"
