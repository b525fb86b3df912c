"""The verb `estimate`: what a run will take, from shapes and compiled steps, before anything is loaded or allocated."""

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

from bilevel_jax.core import schedule
from bilevel_jax.core.types import Keep
from bilevel_jax.runs import audit, bench, estimate_table, files, memory, plan, programs
from bilevel_jax.runs.config import AuditConfig, CompareConfig, SelectConfig, TrainConfig
from bilevel_jax.runs.memory import Workspace
from bilevel_jax.runs.plan import Stage
from bilevel_jax.runs.programs import Compiled, Program
from bilevel_jax.runs.rules import on_arrays
from bilevel_jax.runs.sections import SINGLE_LOOP_METHODS, EstimateSection
from bilevel_jax.runs.states import GIB, held, of_device, swept
from bilevel_jax.runs.subject import Run, Subject, blank, read_rows, settings, shaped, simulate
from bilevel_jax.runs.task import Text
from bilevel_jax.runs.training import PRODUCT, REPLAY

NAME = "estimate.json"
NAMES = {SelectConfig: "select", TrainConfig: "train", CompareConfig: "compare", AuditConfig: "audit"}
FEW = 4
"""A quarter of the steps, as a remedy."""


class Made(NamedTuple):
    """A step of the run, compiled."""

    program: Program
    compiled: Compiled


def estimate(config: Run | CompareConfig | AuditConfig, asked: EstimateSection) -> str:
    """Print the estimate, write it where --estimate.dir says, and return its verdict in a sentence.

    Raises ValueError for a config that its verb would not run either, FileNotFoundError where there is no config.json.
    """
    if on_arrays(config):
        raise ValueError("estimate is for runs on text: a task of arrays is over sooner than its estimate.")
    began = time.monotonic()
    simulated = simulate(asked.devices)
    with tempfile.TemporaryDirectory() as folder:
        run: Any = settings(config, asked)
        verb = NAMES[type(config)]
        if asked.train_examples:
            run = replace(run, data=replace(run.data, packing=False))  # rows of full length do not pack
            text = blank(run, asked)
        else:
            run, text = read_rows(run, Path(folder))
        subject = shaped(run, text, verb)
        found = described(config, subject, asked, simulated)
        workspace = Workspace()
        if asked.compile:
            made = compiled_steps(subject, simulated)
            workspace = worked(subject, made, simulated)
            found |= told(config, subject, made, asked, simulated)
        found |= lived(subject, workspace, asked, simulated, found.get("speed", {}))
        if found["budget"] and found["peak"] > found["budget"]:
            found["remedies"] = remedies(subject, text, workspace, found["peak"], asked, simulated)
    found["seconds_to_estimate"] = time.monotonic() - began
    if asked.dir:
        out = Path(asked.dir)
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / NAME, found)
    return estimate_table.show(found)


# ---- what the compiler says


def compiled_steps(subject: Subject, simulated: bool) -> dict[str, Made]:
    """The steps of the run by their name in `Workspace`; with outer.linearize `forward` and `backward` with that.

    XLA's CPU compiler turns a base in bfloat16 into float32 as a whole, once, which takes twice its memory again; those
    of accelerators have no need to. For devices that are simulated the base is therefore compiled as float32.
    """
    made, shapes = subject.task, subject.shapes
    if simulated and made.base is not None:
        wide = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=leaf.sharding), made.base
        )
        made = made._replace(base=wide)
        shapes = shapes._replace(fixed=made.fixed(shapes.params))
    if isinstance(subject.config, TrainConfig):
        return {"forward": compiled(programs.descending(made, shapes))}
    steps = {"forward": compiled(programs.forward(made, shapes))}
    if subject.config.outer.method in ("unrolled", "window"):
        if subject.config.outer.linearize:
            steps["linearize"] = compiled(programs.linearizing(made, shapes))
            steps["backward"] = compiled(programs.pulling(made, shapes, steps["linearize"].compiled))
        else:
            steps["backward"] = compiled(programs.backward(made, shapes))
    if subject.config.outer.method in SINGLE_LOOP_METHODS:
        steps["alone"] = compiled(programs.alone(made, subject.config, shapes))
    if "fit" in made.held_out and made.layout != made.layout.flat:  # V is not packed, and may be wider than a step
        steps["slope"] = compiled(programs.slope(made, shapes, made.held_out["fit"].batch(0)))
    return steps


def compiled(program: Program) -> Made:
    """A step and what the compiler says of it."""
    return Made(program, programs.compiled(program))


def worked(subject: Subject, made: dict[str, Made], simulated: bool) -> Workspace:
    """The workspaces of the compiled steps."""
    return Workspace(**{name: one.compiled.temporary + upcast(subject, simulated) for name, one in made.items()})


def upcast(subject: Subject, simulated: bool) -> float:
    """Bytes of a layer and of the embedding or head of a base in bfloat16, as float32, which are there while used."""
    base = subject.task.base
    if not simulated or base is None or set(memory.by_dtype(base)) == {"float32"}:
        return 0.0
    layer = 4 * sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(base["layers"]))
    return layer + 4 * math.prod(base["embed"].shape)


def told(
    config: Any, subject: Subject, made: dict[str, Made], asked: EstimateSection, simulated: bool
) -> dict[str, Any]:
    """Workspaces, operations and hours."""
    one = subject.task
    forward = made["forward"].compiled.flops
    backward = made["backward"].compiled.flops if "backward" in made else plan.PRODUCT * forward
    stages = staged(config, subject, kept(subject, asked))
    flops = sum(stage.forwards * forward + stage.backwards * backward + stage.others * forward for stage in stages)
    found: dict[str, Any] = {
        "programs": {
            name: {
                "workspace": step.compiled.temporary,
                "flops": step.compiled.flops,
                "seconds_to_compile": step.compiled.seconds,
            }
            for name, step in made.items()
        },
        "flops": flops,
        "trainings_by_flops": flops / (one.steps * forward),
    }
    count = one.mesh.size
    seconds: dict[str, float] = {}
    if asked.tflops:
        speed = count * asked.tflops * 1e12 * asked.mfu
        seconds = {"forward": forward / speed, "backward": backward / speed, "batch": 0.0}
        source = f"{asked.tflops:g} Tflop/s a device at {asked.mfu:.0%}, given"
    elif not asked.measure:
        source = "not asked for (--estimate.no-measure)"
    elif simulated:
        source = "not measured: the devices are simulated; give --estimate.tflops"
    else:
        room = free()
        wanted = max(held(step.program.arguments) + step.compiled.temporary for step in made.values())
        if wanted * count > 0.8 * room:
            source = f"not measured: a step takes {wanted * count / GIB:.1f} GiB, and {room / GIB:.1f} are free"
        else:
            seconds = {name: programs.timed(step.program, step.compiled.run) for name, step in made.items()}
            seconds.setdefault("backward", plan.PRODUCT * seconds["forward"])
            seconds["batch"] = _feeding(subject)
            source = f"measured on {count} x {jax.devices()[0].device_kind}"
    found["speed"] = {"source": source, **seconds}
    if seconds:
        found["hours"] = {stage.name: _hours(stage, seconds) for stage in stages}
        read = plan.readings(one, subject.config)
        found["hours"]["readings of losses"] = read * seconds["forward"] / 3600
        alone = one.steps * (seconds["forward"] + seconds["batch"]) / 3600
        found["hours_of_one_training"] = alone
    return found


def _hours(stage: Stage, seconds: dict[str, float]) -> float:
    forward, backward = seconds["forward"] + seconds["batch"], seconds["backward"] + seconds["batch"]
    return (stage.forwards * forward + stage.backwards * backward + stage.others * forward) / 3600


def _feeding(subject: Subject) -> float:
    """Median seconds of making a batch and moving it to the devices."""
    if subject.config.data.streaming:
        return 0.0
    stream, seconds = subject.task.stream(subject.config.data.seed), []
    for step in range(min(5, stream.steps)):
        began = time.monotonic()
        jax.block_until_ready(stream.batch(step))
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def staged(config: Any, subject: Subject, keep: Keep) -> list[Stage]:
    """The stages of the run, with the steps that its sweeps really replay."""
    if isinstance(config, TrainConfig):
        return [Stage("training", forwards=subject.task.steps)]
    if isinstance(config, CompareConfig):
        return [Stage("all methods and arms", others=bench.planned_work(config, subject.task))]
    if isinstance(config, AuditConfig):
        return [Stage("entries and retrains", others=audit.planned_work(config, subject.task, config.audit.queries))]
    steps = swept(config.outer, subject.task.steps)
    replayed = schedule.replays(steps, keep) / steps if keep.tape else REPLAY
    return [
        stage._replace(forwards=stage.forwards + (replayed - REPLAY) * stage.backwards)
        for stage in plan.selection(subject.task, config)
    ]


def kept(subject: Subject, asked: EstimateSection) -> Keep:
    """What a training keeps for its sweep on the device that is asked for."""
    return memory.kept(subject.task, subject.config, subject.shapes, asked.memory_gib * GIB)


# ---- what lives when


def described(config: Any, subject: Subject, asked: EstimateSection, simulated: bool) -> dict[str, Any]:
    """The run's shape, its parameters, its work and its disk: all that needs no compiler."""
    one, shapes, run = subject.task, subject.shapes, subject.config
    stages, keep = staged(config, subject, schedule.NOTHING), kept(subject, asked)
    state = held(shapes.state)
    return {
        "verb": subject.verb,
        "model": {"path": run.model.name_or_path, "lora_rank": run.lora.r, "remat": run.model.remat},
        "method": None if isinstance(run, TrainConfig) else run.outer.method,
        "devices": {
            "count": one.mesh.size,
            "mesh": dict(one.mesh.shape),
            "kind": one.mesh.devices.flat[0].device_kind,
            "backend": jax.default_backend(),
            "simulated": simulated,
        },
        "shape": {
            "rows": one.rows, "steps": one.steps, "batch": one.batch, "micro": one.layout.micro,
            "places": one.layout.micro * one.layout.rows * one.layout.length, "length": one.layout.length,
        },
        "parameters": {"base": memory.by_dtype(one.base), "trained": memory.by_dtype(shapes.params)},
        "arrays": {
            "base": held(one.base),
            "trained parameters": held(shapes.params),
            "optimiser": held(shapes.state.opt),
            "batch": held(shapes.batch),
            "snapshot": state,
            "snapshots": keep.snapshots,
            "tape": keep.tape,
            "a step on the tape": state + held(shapes.params),
        },
        "disk": memory.disk(one, run, shapes) if subject.writes else {},
        "work": {stage.name: stage.work for stage in stages},
        "passes": sum(stage.work for stage in stages),
        "trainings": sum(stage.work for stage in stages) / one.steps,
        "notes": one.notes,
    }  # fmt: skip


def lived(
    subject: Subject, workspace: Workspace, asked: EstimateSection, simulated: bool, speed: dict[str, float]
) -> dict[str, Any]:
    """The phases of the run, the largest, and what the memory of a device is; `speed`: seconds of a step, if known."""
    keep = kept(subject, asked)
    phases = memory.phases(subject.task, subject.config, subject.shapes, workspace, keep)
    phases = phases if subject.writes else phases[:-1]
    top = max(phases, key=lambda phase: phase.bytes)
    found: dict[str, Any] = {
        "phases": [{"name": phase.name, "bytes": phase.bytes, "parts": phase.parts} for phase in phases],
        "peak": top.bytes,
        "peak_phase": top.name,
        "budget": asked.memory_gib * GIB or (0.0 if simulated else of_device()),
    }
    if isinstance(subject.config, SelectConfig) and subject.config.outer.method in ("unrolled", "window"):
        found["kept"] = [
            _kept(subject, workspace, other, name, speed) for name, other in choices(subject, keep).items()
        ]
    return found


def choices(subject: Subject, keep: Keep) -> dict[str, Keep]:
    """What the run keeps, and what it could."""
    steps = swept(cast(SelectConfig, subject.config).outer, subject.task.steps)
    others = {
        "every state": schedule.everything(steps),
        "square root": schedule.square_root(steps),
        "fewer": schedule.within(steps, 1, 1, 2 + math.isqrt(steps)),
    }
    others = {name: other._replace(linear=keep.linear) for name, other in others.items()}
    return {"this run": keep} | {name: other for name, other in others.items() if other != keep}


def _kept(subject: Subject, workspace: Workspace, keep: Keep, name: str, speed: dict[str, float]) -> dict[str, Any]:
    """The memory and the time of training and sweep, if a training keeps this."""
    config = cast(SelectConfig, subject.config)
    steps = swept(config.outer, subject.task.steps)
    forwards = 1 + schedule.replays(steps, keep) / steps
    return {
        "name": name,
        "snapshots": keep.snapshots,
        "tape": keep.tape,
        "bytes": memory.kept_otherwise(subject.task, config, subject.shapes, workspace, keep),
        "times": forwards + PRODUCT - keep.linear,
        "times_measured": forwards + speed["backward"] / speed["forward"] if "forward" in speed else None,
    }


def free() -> float:
    """Bytes that are free for arrays now, on all devices."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"]) * jax.device_count()
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", told.read_text()) if told.is_file() else None
    return 1024.0 * int(found[1]) if found else of_device() * jax.device_count() / 2


# ---- what to do where it does not fit


def remedies(
    subject: Subject, text: Text, workspace: Workspace, peak: float, asked: EstimateSection, simulated: bool
) -> list[dict[str, Any]]:
    """Changes of the config with the peak that they give, the least first; each is estimated as the run itself is."""
    run = subject.config
    model, train, devices = run.model, cast(Any, run.train), subject.task.mesh.size
    most = max(1, train.global_batch_size // devices)
    changed: dict[str, tuple[Run, bool]] = {}  # words -> (config, whether the steps are compiled anew)
    if train.gradient_accumulation_steps < most and asked.compile:
        changed[f"train.gradient_accumulation_steps: {most}"] = (
            replace(run, train=replace(train, gradient_accumulation_steps=most)),
            True,
        )
    if model.remat != "full" and asked.compile:
        changed["model.remat: full"] = replace(run, model=replace(model, remat="full")), True
    if isinstance(run, SelectConfig) and run.outer.linearize and asked.compile:
        changed["outer.linearize: false"] = replace(run, outer=replace(run.outer, linearize=False)), True
    if run.lora.r and model.base_dtype == "float32":
        changed["model.base_dtype: bfloat16"] = replace(run, model=replace(model, base_dtype="bfloat16")), not simulated
    if not run.lora.r and not model.from_scratch:
        changed["lora.r: 16"] = replace(run, lora=replace(run.lora, r=16)), True
    if run.mesh.fsdp < devices:
        parts = replace(run.mesh, data=1, fsdp=devices)
        changed[f"mesh.fsdp: {devices}"] = replace(run, mesh=parts), True
    if isinstance(run, SelectConfig) and run.train.max_steps >= FEW:
        fewer = run.train.max_steps // FEW
        changed[f"train.max_steps: {fewer}"] = replace(run, train=replace(run.train, max_steps=fewer)), False
    found = []
    for words, (other, anew) in changed.items():
        try:
            changed_to = shaped(other, text, subject.verb)
        except ValueError:  # a model that the change does not fit
            continue
        space = workspace
        if anew and asked.compile:
            space = worked(changed_to, compiled_steps(changed_to, simulated), simulated)
        least = lived(changed_to, space, asked, simulated, {})["peak"]
        if least < peak:
            found.append({"change": words, "peak": least})
    return sorted(found, key=lambda one: one["peak"])


# ---- after a run


def compared(folder: Path) -> str:
    """Print what was estimated of a finished run beside what was measured, and return it in a sentence."""
    for name in (files.RESOLVED, "result.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; give the folder of a finished run of select or train.")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if "measured" not in result:
        raise ValueError(f"{folder}/result.json has nothing measured: it is of another verb, or of an older version.")
    return estimate_table.beside(result["estimate"], result["measured"])
