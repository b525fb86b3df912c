"""The verb `refine`: rounds in which the model answers questions itself, and is replaced only where that helped."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.core.transition import finished
from bilevel_jax.core.types import PADDING, Params
from bilevel_jax.lm import tokens
from bilevel_jax.lm.generate import Generator
from bilevel_jax.lm.losses import assemble
from bilevel_jax.lm.prompts import prompts
from bilevel_jax.runs import (
    checkers,
    checkpoint,
    files,
    outputs,
    refine_candidates,
    refine_outputs,
    refine_report,
    rows,
)
from bilevel_jax.runs import config as configs
from bilevel_jax.runs.bootstrap import paired_gain
from bilevel_jax.runs.checkers import Checker
from bilevel_jax.runs.config import RefineConfig
from bilevel_jax.runs.embedded import embedded
from bilevel_jax.runs.generation import generators
from bilevel_jax.runs.likelihoods import fingerprint
from bilevel_jax.runs.refine_candidates import ESTIMANDS, LEARNS, Candidate, Train, settings
from bilevel_jax.runs.refine_rows import Made, answers, choose, judged, question_weights, task_of
from bilevel_jax.runs.sections import RefineMethod
from bilevel_jax.runs.session import Session, run_folder, started
from bilevel_jax.runs.task import Task, per_row, prepare
from bilevel_jax.runs.training import Trainer


class State(NamedTuple):
    """What a round leaves to the next."""

    params: Params
    """Of the present model: the last that was accepted."""
    weights: Float[Array, "questions"]
    """The last weight of each question; before the first, what dynamic begins with (`first_weights`), or 1."""


class Run(NamedTuple):
    """What all rounds share."""

    config: RefineConfig
    task: Task
    """Of the offline rows."""
    trains: dict[RefineMethod, Train]
    write: Callable[[Params], Generator]
    """parameters -> the generator of the model with them."""
    checker: Checker | None
    work: Session


def refine(config: RefineConfig) -> dict[str, Any]:
    """Run the verb in `config.output.folder` and return what result.json holds.

    Raises as `select.select` does, and ValueError without V_fit or V_select, and for questions that are too long.
    """
    with run_folder(config) as folder:
        made = embedded(replace(settings(config, "uniform"), data=config.data), folder)
        ready = replace(config, model=made.model, data=made.data)
        task = prepared(ready, folder)
        checker = checkers.checker(ready.verifier, judged_rows(ready, task)) if ready.verifier.name else None
        with started(config, folder) as work:
            trains = refine_candidates.candidates(ready, task)
            whole = generators(ready.generate, task.decoder, task.tokenizer, task.mesh, work)
            run = Run(ready, task, trains, lambda params: whole(assemble(params, task.base)), checker, work)
            return _work(run, config)


def prepared(config: RefineConfig, folder: Path) -> Task:
    """The task of the offline rows, in a shape that holds every response.

    Raises ValueError where a part of the trusted rows is missing, or a question leaves no room for a response.
    """
    found = rows.load(config.data)
    task = prepare(settings(config, "uniform"), found, folder, steps=config.train.max_steps, seeds=[config.data.seed])
    if missing := [part for part in ("fit", "select") if part not in task.held_out]:
        raise ValueError(
            f"no rows for {' and '.join(f'V_{part}' for part in missing)}: candidates are trained by V_fit and judged "
            "on V_select. Give data.validation with shares for both in data.split, or data.dev."
        )
    asked = [task.examples[row] for row in task.trainable()] + task.trusted.get("report", [])
    questions = prompts(asked, task.tokenizer, template=config.data.template or tokens.TEMPLATE)
    longest = max((len(one.tokens) for one in questions), default=0) + config.generate.max_new_tokens
    if longest > task.architecture.max_length:
        raise ValueError(
            f"the longest question has {longest - config.generate.max_new_tokens} tokens; with generate.max_new_tokens = "
            f"{config.generate.max_new_tokens} that is more than the model's {task.architecture.max_length}. Lower it."
        )
    places = -(-(longest - 1) // 8) * 8 if config.refine.questions != "none" else 0
    task = refine_candidates.with_programs(config, task)
    return task._replace(layout=task.layout._replace(length=max(places, task.layout.length)))


def judged_rows(config: RefineConfig, task: Task) -> list[Any]:
    """The rows whose responses a checker will see."""
    offline = [] if config.refine.questions == "none" else [task.examples[row] for row in task.trainable()]
    return offline + task.trusted.get("report", [])


def _work(run: Run, config: RefineConfig) -> dict[str, Any]:
    task, work, ready = run.task, run.work, run.config
    for note in task.notes:
        work.say(note)
    total = ready.refine.rounds * sum(refine_candidates.work(ready, name) for name in ready.refine.methods)
    work.phase("starting", total=total)
    folder = work.folder / "checkpoints" / "rounds"
    start = task.fresh(ready.train.seed)
    state, records = State(start, jnp.ones(task.rows)), []
    if found := checkpoint.restore(folder, state):
        state, records = found.tree, found.meta["records"]
        work.advance(sum(record["work"] for record in records))
    elif ready.refine.questions == "dynamic":
        state = state._replace(weights=first_weights(run, start))
    for number in range(len(records), ready.refine.rounds):
        state, record = one_round(run, state, number)
        records.append(record)
        work.log.write({"event": "round", "step": number, **{key: record[key] for key in LOGGED}})
        work.say(_line(record))
        checkpoint.save(folder, number, state, {"records": records})
        for name in ready.refine.methods:
            shutil.rmtree(_part(work, number, name), ignore_errors=True)
        work.saved()
    work.phase("reading V_report")
    ends = {"first": start, "last": state.params}
    held = work.once("report", lambda: last_reading(run, ends))
    work.phase("writing")
    outputs.write_model(work.folder / "model", task, state.params, base_path=ready.model.name_or_path)
    refine_outputs.write(work, records, configs.config_hash(config))
    result = {
        "records": records,
        "accepted": sum(record["accepted"] for record in records),
        "report": held,
        "unit": task.objective.unit,
        "estimands": {name: ESTIMANDS[name] for name in ready.refine.methods},
        "looks": looks(ready),
        "rows": {"train": task.rows, **{part: len(some) for part, some in task.trusted.items()}},
        "checker": ready.verifier.name,
        "examples": refine_outputs.shown(work, task, records),
        "moved": refine_outputs.moved(work, records),
        "notes": task.notes,
        "seconds": work.cost("")[1],
        "config_hash": configs.config_hash(config),
    }
    result["sentence"] = refine_report.sentence(result)
    files.write_json(work.folder / "result.json", result)
    refine_report.write(work.folder)
    return result


# ---- a round


def one_round(run: Run, state: State, number: int) -> tuple[State, dict[str, Any]]:
    """Choose questions, answer them with the present model, train every candidate, test the best one."""
    config, first, work = run.config, run.task, run.work
    began, before = time.monotonic(), work.work
    mark = fingerprint(assemble(state.params, first.base))
    chosen = choose(config, first.trainable(), np.asarray(state.weights))
    work.phase(f"round {number}: responses")
    found = answers(
        config,
        first,
        chosen,
        number,
        refine_outputs.responses_path(work, number),
        run.write(state.params),
        mark,
        run.checker,
    )
    written = time.monotonic() - began
    made = task_of(config, first, found, number)
    origin = state.params if config.refine.start_from == "accepted" else first.fresh(config.train.seed)
    made = made._replace(task=made.task._replace(fresh=lambda seed: origin))

    present = select_losses(first, state.params)
    tried: dict[str, Candidate] = {}
    read: dict[str, Float[np.ndarray, "select"]] = {}
    told: list[dict[str, Any]] = []
    for name in config.refine.methods:
        work.phase(f"round {number}: {name}")
        tried[name], cost = trained(run, made, state.params, number, name)
        read[name] = select_losses(first, tried[name].params)
        told.append({"name": name, "select": float(read[name].mean()), **cost})
    best, *others = sorted(tried, key=lambda name: read[name].mean())
    gain, bound = paired_gain(present, read[best], level_of(config), (config.data.seed, 13, number))
    accepted = bound > 0
    judge = next((name for name in (best, *others) if name in LEARNS), None)
    weights = tried[judge].weights if judge else np.ones(len(made.base))
    files.write_table(
        refine_outputs.weights_path(work, number), refine_outputs.weights_table(first, made, weights, judge, number)
    )
    record = {
        "step": number,
        "model": mark,
        "questions": len(chosen),
        "responses": len(found.texts),
        "ended": float(np.mean(found.ended)) if found.ended else None,
        "tokens": int(sum(len(one) for one in found.tokens)),
        "right": judged(found.values),
        "present": float(present.mean()),
        "candidates": told,
        "best": best,
        "gain": gain._asdict(),
        "bound": bound,
        "accepted": bool(accepted),
        "judge": judge,
        "ess": float(weights.sum() ** 2 / (weights**2).sum()),
        "seconds_writing": written,
        "work": work.work - before,
        "seconds": time.monotonic() - began,
    }
    after = jnp.asarray(question_weights(made, weights, first.rows), state.weights.dtype)
    return State(tried[best].params if accepted else state.params, after if judge else state.weights), record


def first_weights(run: Run, params: Params) -> Float[Array, "questions"]:
    """What takes the place of weights before any were learned: -d L_v / d w_i of one step at the given model, its sign.

    <grad l_i, grad L_v> / rows: below 0 where training on the offline row raises L_v on V_fit, to first order.
    """
    made = refine_candidates.programs_of(run.config, run.task)
    task = run.task._replace(problem=made.plain, step=made.plain_step)
    run.work.phase("alignment of the offline rows")
    trainer = Trainer(task, settings(run.config, "unrolled").outer, run.work)
    return -trainer.direct(finished(params), jnp.ones(task.rows), alignment=True).grad


def trained(run: Run, made: Made, sampler: Params, number: int, name: RefineMethod) -> tuple[Candidate, dict[str, Any]]:
    """A candidate, trained now or found where a stopped run left it, and what it cost."""
    work = run.work
    part = work.within(_part(work, number, name).name)
    end = part.folder / "checkpoints" / "end"
    like = (made.task.fresh(0), jnp.ones(made.task.rows))

    def make() -> dict[str, Any]:
        began, before = time.monotonic(), work.work
        candidate = run.trains[name](made, sampler, part, number)
        checkpoint.save(end, 0, (candidate.params, jnp.asarray(candidate.weights, like[1].dtype)), {})
        return {"work": work.work - before, "seconds": time.monotonic() - began}

    told = work.once(f"round {number}/{name}", make)
    found = checkpoint.restore(end, like)
    if found is None:
        raise FileNotFoundError(f"{end} is not there any more, and round {number} needs it. Start anew.")
    params, weights = found.tree
    return Candidate(params, np.asarray(weights)), dict(told)


def looks(config: RefineConfig) -> int:
    """How often V_select is asked whether a candidate is better: once for each candidate of each round."""
    return config.refine.rounds * len(config.refine.methods)


def level_of(config: RefineConfig) -> float:
    """The level of one test. Corrected, that of the run over the looks (Bonferroni): all of them together keep it.

    The best of several candidates is tested, which is as if each had been; later rounds look again.
    """
    return config.refine.level / (looks(config) if config.refine.bonferroni else 1)


def select_losses(task: Task, params: Params) -> Float[np.ndarray, "select"]:
    """The loss of each row of V_select, nats."""
    return part_losses(task, params, "select")


def part_losses(task: Task, params: Params, part: str) -> Float[np.ndarray, "part"]:
    """The loss of each row of a part of the trusted rows that is not too long, nats; FloatingPointError for another."""
    stream, count = task.held_out[part], len(task.trusted[part])
    values = per_row(task.objective.losses, params, task.fixed(params), stream, count)
    index = np.concatenate([np.asarray(stream.batch(step)["index"]).ravel() for step in range(stream.steps)])
    values = values[np.sort(index[index != PADDING])]
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"the loss of a row of V_{part} is not finite. Lower optimizer.learning_rate, or set optimizer.max_grad_norm."
        )
    return values


# ---- the end


def last_reading(run: Run, ends: dict[str, Params]) -> dict[str, Any] | None:
    """L_v on V_report before and after all rounds, and, with a checker, how many answers are right: read once."""
    if "report" not in run.task.held_out:
        return None
    before, after = (part_losses(run.task, params, "report") for params in ends.values())
    gain, _ = paired_gain(before, after, 0.025, (run.config.data.seed, 17))
    accuracy = [answered(run, params) for params in ends.values()] if run.checker else None
    right = None
    if accuracy:
        difference, _ = paired_gain(accuracy[1], accuracy[0], 0.025, (run.config.data.seed, 19))
        right = {"first": float(accuracy[0].mean()), "last": float(accuracy[1].mean()), "gain": difference._asdict()}
    return {"first": float(before.mean()), "last": float(after.mean()), "gain": gain._asdict(), "right": right}


def answered(run: Run, params: Params) -> Float[np.ndarray, "report"]:
    """What the checker says of the greedy answer to each question of V_report."""
    config, task = run.config, run.task
    greedy = replace(config.generate, temperature=0.0, top_k=0, top_p=1.0, num_generations=1)
    held = task.trusted["report"]
    asked = prompts(held, task.tokenizer, template=config.data.template or tokens.TEMPLATE)
    written = generators(greedy, task.decoder, task.tokenizer, task.mesh, run.work)(assemble(params, task.base))
    assert run.checker is not None
    return np.array(
        [run.checker(example, some[0].text) for example, some in zip(held, written(asked, [0]), strict=True)]
    )


LOGGED = ("model", "questions", "responses", "right", "present", "best", "gain", "bound", "accepted", "ess", "seconds")


def _part(work: Session, number: int, name: str) -> Path:
    return work.folder / "parts" / f"round {number} {name}"


def _line(record: dict[str, Any]) -> str:
    """One line for people."""
    gain = record["gain"]
    tried = "  ".join(f"{one['name']} {one['select']:.4f}" for one in record["candidates"])
    right = "" if record["right"] is None else f"   {record['right']:.0%} of the responses right"
    return (
        f"round {record['step']}   L_v on V_select: present {record['present']:.4f}  {tried}   gain "
        f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]   "
        f"{'ACCEPTED' if record['accepted'] else 'kept'}{right}"
    )
