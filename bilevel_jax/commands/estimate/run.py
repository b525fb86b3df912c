"""The `estimate` command, which predicts memory, disk and time."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from bilevel_jax.commands.estimate.abstract_run import (
    AbstractRun,
    make_abstract_run,
    placeholder_text,
    read_examples,
    resolve_run_config,
    simulate_devices,
)
from bilevel_jax.commands.estimate.compute import collect_workspace, compile_steps, estimate_compute, list_stages
from bilevel_jax.commands.estimate.hosts import check_hosts, describe_hosts
from bilevel_jax.commands.estimate.peak import estimate_memory, plan_run_checkpoints
from bilevel_jax.commands.estimate.remedies import find_remedies
from bilevel_jax.commands.estimate.table import print_comparison, print_estimate
from bilevel_jax.commands.results import EstimateResult
from bilevel_jax.core import checkpointing
from bilevel_jax.runs.budget import memory
from bilevel_jax.runs.budget.memory import Workspace
from bilevel_jax.runs.config.load import (
    COMMANDS,
    RunConfig,
    TrainConfig,
    TuneConfig,
)
from bilevel_jax.runs.config.rules import reads_array_data
from bilevel_jax.runs.config.schema import EstimateSection
from bilevel_jax.runs.engine.trajectory_store import bytes_per_device
from bilevel_jax.runs.infra import run_dir
from bilevel_jax.runs.infra.inputs import check_inputs_whole
from bilevel_jax.storage import urls

ESTIMATE_FILE = "estimate.json"


def estimate(config: RunConfig, options: EstimateSection) -> EstimateResult:
    """Print the estimate, write it where --estimate.dir says, and return it with its verdict in a sentence.

    Raises ValueError for a config that its command would not run either, FileNotFoundError without a config.json.
    """
    if reads_array_data(config):
        raise ValueError("estimate is for runs on text: a task of arrays is over sooner than its estimate.")
    if urls.is_remote(options.dir):
        raise ValueError(f"estimate.dir = {options.dir}: an estimate is written to a folder of this machine. Name one.")
    if isinstance(config, TuneConfig) and options.hosts > 1:
        raise ValueError(f"estimate.hosts = {options.hosts}: tune runs in one process, on one host. Leave it at 1.")
    check_inputs_whole(config)
    if options.devices:
        check_hosts(options, options.devices)  # before all rows are read
    began = time.monotonic()
    simulated = simulate_devices(options.devices)
    with tempfile.TemporaryDirectory() as folder:
        run: Any = resolve_run_config(config, options)
        command = COMMANDS[type(config)]
        if options.train_examples:
            run = replace(run, data=replace(run.data, packing=False))  # rows of full length do not pack
            text = placeholder_text(run, options)
        else:
            run, text = read_examples(run, Path(folder))
        abstract_run = make_abstract_run(run, text, command)
        check_hosts(options, abstract_run.task.mesh.size)
        result = describe_run(config, abstract_run, options, simulated)
        workspace = Workspace()
        if options.compile:
            steps = compile_steps(abstract_run, simulated)
            workspace = collect_workspace(abstract_run, steps, simulated)
            result |= estimate_compute(config, abstract_run, steps, options, simulated)
        result |= estimate_memory(abstract_run, workspace, options, simulated, result.get("speed", {}))
        if options.hosts > 1:
            result["hosts"] = describe_hosts(config, abstract_run, text, options, result["peak"])
        if result["budget"] and result["peak"] > result["budget"]:
            result["remedies"] = find_remedies(abstract_run, text, workspace, result["peak"], options, simulated)
    result["seconds_to_estimate"] = time.monotonic() - began
    if options.dir:
        out = Path(options.dir)
        out.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(out / ESTIMATE_FILE, result)
    hours = sum(result["hours"].values()) if "hours" in result else None
    return EstimateResult(print_estimate(result), result["peak"], result["passes"], hours, result)


def describe_run(config: Any, abstract_run: AbstractRun, options: EstimateSection, simulated: bool) -> dict[str, Any]:
    """The shape, parameters, work and disk use of the run: everything that needs no compiler."""
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
            "rows": task.num_examples,
            "steps": task.num_steps,
            "batch": task.batch_size,
            "micro": task.layout.num_micro_batches,
            "places": task.layout.num_micro_batches * task.layout.rows * task.layout.length,
            "length": task.layout.length,
        },
        "parameters": {
            "base": memory.count_by_dtype(task.base_params),
            "trained": memory.count_by_dtype(shapes.params),
        },
        "arrays": {
            "base": bytes_per_device(task.base_params),
            "trained parameters": bytes_per_device(shapes.params),
            "optimizer": bytes_per_device(shapes.state.opt_state),
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
    }


def compare_with_measured(folder: Path) -> EstimateResult:
    """Print the estimate of a finished run next to what was measured, and return what was measured in a sentence."""
    for name in (run_dir.CONFIG_FILE, "result.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; give the folder of a finished run of select or train.")
    result = run_dir.read_json(folder / "result.json")
    if not isinstance(result, dict) or "measured" not in result:
        raise ValueError(
            f"{folder}/result.json has nothing measured: it is of another command, or of an older version. Give the "
            "folder of a finished run of select or train."
        )
    try:
        estimated, measured = result["estimate"], result["measured"]
        sentence, seconds = print_comparison(estimated, measured), measured["seconds_per_pass"]
        hours = None if seconds is None else measured["passes"] * seconds / 3600
        return EstimateResult(
            sentence, estimated["peak"], estimated["passes"], hours, {"estimate": estimated, "measured": measured}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}/result.json has an estimate of another shape ({type(error).__name__}: {error}). Give the "
            "folder of a run of this version."
        ) from error
